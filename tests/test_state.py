"""Checkpoints of a run: whole or absent, and only for the run that made them."""

import json
from pathlib import Path

import pytest
import torch

from uptrain.checkpoint.reader import open_checkpoint
from uptrain.errors import TrainingError
from uptrain.training import state as states
from uptrain.training.state import (
    clean_states,
    find_states,
    load_state,
    save_state,
    source_digest,
)

RUN = {"train.learning_rate": 0.1, "train.betas": [0.9, 0.95], "data.train": "a" * 64}


def trained(seed: int, steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def assert_equal(one: object, other: object) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_equal(*pair)
    else:
        assert one == other


def test_what_is_saved_comes_back_to_the_bit(tmp_path):
    model, optimizer = trained(0, 3)
    save_state(tmp_path, 3, model, optimizer, RUN)
    other, other_optimizer = trained(1, 0)
    (found,) = find_states(tmp_path)
    load_state(found, other, other_optimizer, RUN)
    assert found.step == 3
    assert_equal(model.state_dict(), other.state_dict())
    assert_equal(optimizer.state_dict(), other_optimizer.state_dict())


def test_the_latest_two_are_kept_and_found_by_their_manifests(tmp_path):
    model, optimizer = trained(0, 1)
    for step in (5, 10, 15):
        save_state(tmp_path, step, model, optimizer, RUN)
    assert [state.step for state in find_states(tmp_path)] == [10, 15]
    (tmp_path / "step-00000010").rename(tmp_path / "zzz")
    assert [state.step for state in find_states(tmp_path)] == [10, 15]


def test_what_is_not_whole_is_not_found_and_removed_by_the_next_run(tmp_path):
    model, optimizer = trained(0, 1)
    for step in (1, 2):
        save_state(tmp_path, step, model, optimizer, RUN)
    (tmp_path / "step-00000003").mkdir()  # of a removal cut short: its manifest is gone
    (tmp_path / "step-00000004.uptrain-staging").mkdir()
    with (tmp_path / "step-00000002" / "state.pt").open("r+b") as file:
        file.truncate(100)
    assert [state.step for state in find_states(tmp_path)] == [1]
    clean_states(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    save_state(tmp_path, 2, model, optimizer, RUN)
    assert [state.step for state in find_states(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    "manifest", ["", "[]", "{}", '{"format": 9}', '{"format": 1, "step": "x"}']
)
def test_a_malformed_manifest_is_no_checkpoint(tmp_path, manifest):
    model, optimizer = trained(0, 1)
    save_state(tmp_path, 1, model, optimizer, RUN)
    (tmp_path / "step-00000001" / "manifest.json").write_text(manifest)
    assert find_states(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"train.learning_rate": 0.2},
            "was made with train.learning_rate=0.1, now 0.2; go on with",
        ),
        ({"train.betas": (0.9, 0.99)}, r"with train.betas=\[0.9, 0.95\], now \[0.9, 0.99\]"),
        ({"data.train": "b" * 64}, "was made with another data.train; go on with what it was made"),
        ({"train.dropout": 0.1}, "was made with train.dropout=None, now 0.1"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, message):
    model, optimizer = trained(0, 1)
    save_state(tmp_path, 1, model, optimizer, RUN)
    (found,) = find_states(tmp_path)
    with pytest.raises(TrainingError, match=message) as caught:
        load_state(found, model, optimizer, RUN | change)
    assert str(caught.value).endswith("or choose another output")


def test_a_tuple_is_the_list_that_it_is_saved_as(tmp_path):
    model, optimizer = trained(0, 1)
    save_state(tmp_path, 1, model, optimizer, RUN | {"train.betas": (0.9, 0.95)})
    load_state(find_states(tmp_path)[0], model, optimizer, RUN)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    model, optimizer = trained(0, 1)
    path = save_state(tmp_path, 1, model, optimizer, RUN) / "state.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        TrainingError, match="is damaged; remove it to go on from the checkpoint bef"
    ):
        load_state(find_states(tmp_path)[0], model, optimizer, RUN)


def test_a_full_disk_keeps_the_older_checkpoints(tmp_path, monkeypatch):
    model, optimizer = trained(0, 1)
    for step in (1, 2):
        save_state(tmp_path, step, model, optimizer, RUN)

    def write(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(states._HashingFile, "write", write)
    with pytest.raises(
        TrainingError, match=r"step-00000003: the checkpoint cannot be written \(.*No space left"
    ):
        save_state(tmp_path, 3, model, optimizer, RUN)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00000001", "step-00000002"]


def test_the_source_digest_follows_its_bytes(tmp_path):
    from tiny_run import make_source

    folder = make_source(tmp_path / "source")
    first = source_digest(open_checkpoint(folder))
    assert source_digest(open_checkpoint(folder)) == first
    path: Path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    second = source_digest(open_checkpoint(folder))
    (folder / "uptrain.json").write_text(json.dumps({"files": {}}))
    third = source_digest(open_checkpoint(folder))
    assert len({first, second, third}) == 3
