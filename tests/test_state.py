"""Checkpoints of a run: whole or absent, and only for the run that made them."""

import hashlib
import json
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

from uptrain.checkpoint import staging
from uptrain.checkpoint.reader import open_checkpoint
from uptrain.errors import CheckpointError, TrainingError
from uptrain.training import state as states
from uptrain.training.optimizer import JointOptimizer
from uptrain.training.saved import (
    SavedState,
    clean_states,
    find_states,
    remove_state,
    source_digest,
)
from uptrain.training.state import StateWriter, load_state

PART = "part-00000/model.safetensors"
RUN = {
    "train.learning_rate": 0.1,
    "train.betas": [0.9, 0.95],
    "data.train": "a" * 64,
    "teacher": {"name": "master", "sha256": "b"},
    "uptrain version": "1",
}


MAKERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), fused=True),
    "adafactor": lambda model: torch.optim.Adafactor(model.parameters()),
    "sgd": lambda model: torch.optim.SGD(model.parameters()),
    "muon": lambda model: JointOptimizer(
        [
            torch.optim.Muon([p for p in model.parameters() if p.ndim == 2]),
            torch.optim.AdamW([p for p in model.parameters() if p.ndim < 2]),
        ]
    ),
}


def make(seed: int, kind: str = "adamw") -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[3].weight = model[2].weight  # tied
    return model, MAKERS[kind](model)


def train(model: nn.Module, optimizer: Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()


def trained(seed: int, steps: int) -> tuple[nn.Module, Optimizer]:
    model, optimizer = make(seed)
    train(model, optimizer, steps)
    return model, optimizer


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    run: dict[str, Any] = RUN,
    keep: Collection[int] = (),
) -> Path:
    with StateWriter(folder, model, optimizer, run) as writer:
        return writer.save(step, keep)


def latest(folder: Path) -> SavedState:
    return find_states(folder)[-1]


def assert_equal(one: object, other: object) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    else:
        assert one == other


@pytest.mark.parametrize("kind", MAKERS)
def test_what_is_saved_comes_back_to_the_bit(tmp_path, kind):
    model, optimizer = make(0, kind)
    train(model, optimizer, 3)
    save(tmp_path, 3, model, optimizer)
    other, other_optimizer = make(1, kind)
    load_state(latest(tmp_path), other, other_optimizer, RUN)
    assert latest(tmp_path).step == 3
    assert_equal(model.state_dict(), other.state_dict())
    assert_equal(optimizer.state_dict()["state"], other_optimizer.state_dict()["state"])
    for _ in range(2):  # and both go on as one
        torch.manual_seed(7)
        for each in (optimizer, other_optimizer):
            for group in each.param_groups:
                group["lr"] = 0.1
        train(model, optimizer, 1)
        torch.manual_seed(7)
        train(other, other_optimizer, 1)
        assert_equal(model.state_dict(), other.state_dict())


class Quantised(torch.Tensor):
    """A tensor made of others, as 8-bit optimizers keep their memory."""

    codes: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor) -> "Quantised":
        made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)
        made.codes, made.scale = codes, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], *_: Any) -> "Quantised":
        return Quantised(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        assert function is torch.ops.aten.detach.default
        return Quantised(args[0].codes, args[0].scale)


class Remembering(Optimizer):
    """Keeps the size of the gradient's rows, quantised."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            size = parameter.grad.abs()
            scale = size.amax(1)
            codes = (size / scale[:, None] * 255).to(torch.uint8)
            self.state[parameter]["size"] = Quantised(codes, scale)


def test_quantised_memory_comes_back_to_the_bit(tmp_path):
    def run(seed: int) -> tuple[nn.Module, Optimizer]:
        torch.manual_seed(seed)
        model = nn.Linear(32, 16, bias=False)
        return model, Remembering(model.parameters(), {"lr": 0.1})

    model, optimizer = run(0)
    model(torch.randn(4, 32)).square().sum().backward()
    optimizer.step()
    path = save(tmp_path, 1, model, optimizer) / PART
    assert load_file(path).keys() == {"weight", "size.codes/weight", "size.scale/weight"}
    other, other_optimizer = run(1)
    load_state(latest(tmp_path), other, other_optimizer, RUN)
    one, two = (
        each.state[next(m.parameters())]["size"]
        for m, each in ((model, optimizer), (other, other_optimizer))
    )
    assert torch.equal(one.codes, two.codes)
    assert torch.equal(one.scale, two.scale)
    assert len(one.codes.unique()) > 100


def test_only_what_trains_is_saved_and_memory_that_has_not_begun_stays_so(tmp_path):
    model, _ = make(0)
    optimizer = torch.optim.AdamW([*model[0].parameters(), *model[2].parameters()])
    model[0](torch.randn(5, 4)).sum().backward()  # the others have no gradient yet
    optimizer.step()
    saved = load_file(save(tmp_path, 1, model, optimizer) / PART)
    parameters = {"0.weight", "0.bias", "2.weight", "2.bias"}
    buffers = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    memory = {f"{k}/0.{n}" for k in ("step", "exp_avg", "exp_avg_sq") for n in ("weight", "bias")}
    assert saved.keys() == parameters | buffers | memory
    other, _ = make(0)
    fresh = torch.optim.AdamW([*other[0].parameters(), *other[2].parameters()])
    load_state(latest(tmp_path), other, fresh, RUN)
    assert_equal(model.state_dict(), other.state_dict())
    assert set(fresh.state) == set(other[0].parameters())


def test_the_copy_is_of_the_step_that_was_saved(tmp_path, monkeypatch):
    model, optimizer = trained(0, 1)
    expected = {name: each.clone() for name, each in model.state_dict().items()}
    free = threading.Event()
    write = states.save_part

    def wait_and_write(*arguments: Any) -> Any:
        assert free.wait(60)
        return write(*arguments)

    monkeypatch.setattr(states, "save_part", wait_and_write)
    with StateWriter(tmp_path, model, optimizer, RUN) as writer:
        for step in (1, 2):  # the second writes over the first's copies, once that is written
            writer.save(step)
            assert len(find_states(tmp_path)) == step - 1
            train(model, optimizer, 1)
            free.set()
    first, second = (load_file(state.folder / PART) for state in find_states(tmp_path))
    for name in ("0.weight", "1.running_mean"):
        assert torch.equal(first[name], expected[name])
        assert not torch.equal(first[name], second[name])


def test_without_room_for_a_copy_it_is_written_at_once(tmp_path, monkeypatch):
    model, optimizer = trained(0, 1)
    monkeypatch.setattr(states, "_available_bytes", lambda: 1000)
    with StateWriter(tmp_path, model, optimizer, RUN) as writer:
        writer.save(1)
        assert latest(tmp_path).step == 1
        assert not writer._copies


def test_the_same_state_makes_the_same_files(tmp_path):
    for name in ("one", "two"):
        save(tmp_path / name, 3, *trained(0, 3))
    one, two = (latest(tmp_path / name).manifest for name in ("one", "two"))
    assert one == two


def test_a_run_that_went_on_writes_the_same_files(tmp_path):
    """Whatever was saved before the optimizer remembered anything."""
    model, optimizer = make(0)
    with StateWriter(tmp_path / "one", model, optimizer, RUN) as writer:
        writer.save(0)
        train(model, optimizer, 1)
        writer.save(1)
    save(tmp_path / "two", 1, model, optimizer)
    assert latest(tmp_path / "one").manifest == latest(tmp_path / "two").manifest


def test_the_latest_two_and_the_kept_are_kept_and_found_by_their_manifests(tmp_path):
    model, optimizer = trained(0, 1)
    for step in (5, 10, 15, 20):
        save(tmp_path, step, model, optimizer, keep=[5])
    assert [state.step for state in find_states(tmp_path)] == [5, 15, 20]
    (tmp_path / "step-00000015").rename(tmp_path / "zzz")
    assert [state.step for state in find_states(tmp_path)] == [5, 15, 20]
    save(tmp_path, 25, model, optimizer, keep=[20])
    assert [state.step for state in find_states(tmp_path)] == [20, 25]


def test_what_is_not_whole_is_not_found_and_removed_by_the_next_run(tmp_path):
    model, optimizer = trained(0, 1)
    for step in (1, 2):
        save(tmp_path, step, model, optimizer, RUN)
    (tmp_path / "step-00000003").mkdir()  # of a removal cut short: its manifest is gone
    (tmp_path / "step-00000004.uptrain-staging").mkdir()
    with (tmp_path / "step-00000002" / PART).open("r+b") as file:
        file.truncate(100)
    assert [state.step for state in find_states(tmp_path)] == [1]
    clean_states(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    save(tmp_path, 2, model, optimizer, RUN)
    assert [state.step for state in find_states(tmp_path)] == [1, 2]


def test_what_is_still_staged_is_no_checkpoint(tmp_path):
    folder = save(tmp_path, 1, *trained(0, 1))
    folder.rename(f"{folder}.uptrain-staging")
    assert find_states(tmp_path) == []


@pytest.mark.parametrize(
    "manifest",
    ["", "[]", "{}", '{"format": "x"}', '{"format": 2, "step": "x"}', '{"format": 2, "step": 1}'],
)
def test_a_malformed_manifest_is_no_checkpoint(tmp_path, manifest):
    model, optimizer = trained(0, 1)
    save(tmp_path, 1, model, optimizer, RUN)
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
        ({"train.dropout": 0.1}, "was made with train.dropout=none, now 0.1"),
        (
            {"teacher": {"name": "tutor", "sha256": "c"}},
            "was made with teacher=master, now tutor; go on with",
        ),
        (
            {"teacher": {"name": "master", "sha256": "c"}},
            "was made with teacher=master of other content; go on with",
        ),
        ({"teacher": None}, "was made with teacher=master, now none; go on with"),
        ({"uptrain version": "2"}, "was made with uptrain version=1, now 2; go on with"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, message):
    model, optimizer = trained(0, 1)
    save(tmp_path, 1, model, optimizer, RUN)
    (found,) = find_states(tmp_path)
    with pytest.raises(TrainingError, match=message) as caught:
        load_state(found, model, optimizer, RUN | change)
    assert str(caught.value).endswith("or choose another output")


def test_a_file_may_have_another_name(tmp_path):
    model, optimizer = trained(0, 1)
    save(tmp_path, 1, model, optimizer, RUN)
    moved = RUN | {"teacher": {"name": "moved", "sha256": "b"}}
    load_state(find_states(tmp_path)[0], model, optimizer, moved)


def test_a_checkpoint_of_another_format_is_refused_and_never_removed(tmp_path):
    manifest = save(tmp_path, 1, *trained(0, 1)) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 3'))
    for act in (find_states, clean_states):
        with pytest.raises(TrainingError, match="step-00000001: has format 3, this version of upt"):
            act(tmp_path)
    assert manifest.exists()


def test_a_tuple_is_the_list_that_it_is_saved_as(tmp_path):
    model, optimizer = trained(0, 1)
    save(tmp_path, 1, model, optimizer, RUN | {"train.betas": (0.9, 0.95)})
    load_state(find_states(tmp_path)[0], model, optimizer, RUN)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    model, optimizer = trained(0, 1)
    path = save(tmp_path, 1, model, optimizer, RUN) / PART
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        TrainingError, match="is damaged; remove it to go on from the checkpoint bef"
    ):
        load_state(find_states(tmp_path)[0], model, optimizer, RUN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("0.bias"), "0.bias is saved there or kept here, but not both"),
        (lambda t: t.update({"0.bias": t["0.bias"][:2]}), "0.bias has 2 rows there, expected 8"),
        (lambda t: t.update({"0.bias": t["0.bias"].double()}), "0.bias has another shape or dtype"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(tmp_path, change, message):
    path = save(tmp_path, 1, *trained(0, 1)) / PART
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    manifest = json.loads((path.parents[1] / "manifest.json").read_text())
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    manifest["files"][PART] = {"bytes": len(content), "sha256": digest}
    (path.parents[1] / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(TrainingError, match=f"cannot be taken on .{message}.*choose another outp"):
        load_state(latest(tmp_path), *trained(0, 0), RUN)


def test_a_full_disk_keeps_the_older_checkpoints(tmp_path, monkeypatch):
    model, optimizer = trained(0, 1)
    for step in (1, 2):
        save(tmp_path, step, model, optimizer)

    def write(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(staging, "write_all", write)
    with StateWriter(tmp_path, model, optimizer, RUN) as writer:
        writer.save(3)  # in the background: the run hears of it when it asks next
        with pytest.raises(
            TrainingError,
            match=r"step-00000003: the checkpoint cannot be written \(.*No space left",
        ):
            writer.save(4)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00000001", "step-00000002"]


def test_whatever_fails_in_the_background_is_raised(tmp_path, monkeypatch):
    def fail(*_: Any) -> None:
        raise KeyError("bug")

    monkeypatch.setattr(states, "save_part", fail)
    with (
        pytest.raises(KeyError, match="bug"),
        StateWriter(tmp_path, *trained(0, 1), RUN) as writer,
    ):
        writer.save(1)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_run_is_not_hidden_by_one_of_the_checkpoint(tmp_path, monkeypatch):
    def fail(*_: Any) -> None:
        raise CheckpointError("no room")

    monkeypatch.setattr(states, "save_part", fail)

    def run() -> None:
        with StateWriter(tmp_path, *trained(0, 1), RUN) as writer:
            writer.save(1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()


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


def test_a_removal_begins_with_the_manifest(tmp_path, monkeypatch):
    folder = save(tmp_path, 1, *trained(0, 1))
    with monkeypatch.context() as patch:

        def fail(*_: Any) -> None:
            raise OSError(5, "Input/output error")

        patch.setattr("shutil.rmtree", fail)
        with pytest.raises(OSError, match="Input/output error"):
            remove_state(folder)
    assert find_states(tmp_path) == []
