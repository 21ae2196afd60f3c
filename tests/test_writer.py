"""Writing checkpoints: whole or not at all, and nothing of anybody else's is touched."""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from uptrain.checkpoint import writer
from uptrain.checkpoint.staging import check_target, staged_folder
from uptrain.checkpoint.tensors import DTYPES, tensor_chunks
from uptrain.checkpoint.writer import TensorSpec, write_tensors
from uptrain.errors import CheckpointError


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Where to write: the only thing in a folder of its own."""
    (tmp_path / "home").mkdir()
    return tmp_path / "home" / "target"


def old_checkpoint(target: Path) -> None:
    target.mkdir()
    (target / "config.json").write_text('{"model_type": "llama"}')
    (target / "model.safetensors").write_text("old")


def write(folder: Path, text: str = "new") -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_text(text)


def write_and_fail(target: Path, error: type[BaseException], overwrite: bool = False) -> None:
    with staged_folder(target, overwrite) as folder:
        write(folder)
        raise error


def content(target: Path) -> str:
    return (target / "model.safetensors").read_text()


def neighbours(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir())


def test_a_staged_folder_appears_whole(target: Path) -> None:
    with staged_folder(target) as folder:
        write(folder)
        assert not target.exists()
    assert content(target) == "new"
    assert neighbours(target) == ["target"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_write_leaves_nothing(target: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        write_and_fail(target, error)
    assert neighbours(target) == []


def test_an_interrupted_overwrite_leaves_the_old(target: Path) -> None:
    old_checkpoint(target)
    with pytest.raises(RuntimeError):
        write_and_fail(target, RuntimeError, overwrite=True)
    assert content(target) == "old"
    assert neighbours(target) == ["target"]


@pytest.mark.parametrize("number", [1, 2])
def test_a_failed_rename_leaves_the_old(
    target: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_checkpoint(target)
    calls = 0
    rename = Path.rename

    def fail_once(self: Path, other: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == number:
            raise OSError(5, "Input/output error")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", fail_once)
    with (
        pytest.raises(
            CheckpointError, match=r"target: cannot be written \(Input/output error\); mak"
        ),
        staged_folder(target, True) as folder,
    ):
        write(folder)
    assert content(target) == "old"
    assert neighbours(target) == ["target"]


def test_overwriting_replaces_the_folder_whole(target: Path) -> None:
    old_checkpoint(target)
    (target / "extra.json").write_text("{}")
    with staged_folder(target, overwrite=True) as folder:
        write(folder)
    assert content(target) == "new"
    assert not (target / "extra.json").exists()
    assert neighbours(target) == ["target"]


@pytest.mark.parametrize("after", ["staged", "moved aside", "published"])
def test_what_a_killed_run_left_is_cleaned_up(target: Path, after: str) -> None:
    staging, replaced = (target.with_name(f"target.uptrain-{x}") for x in ("staging", "replaced"))
    old_checkpoint(target)
    if after == "moved aside":
        target.rename(replaced)
    if after == "published":
        replaced.mkdir()
    else:
        (staging / "sub").mkdir(parents=True)
        write(staging, "half")
    with staged_folder(target, overwrite=True) as folder:
        assert list(folder.iterdir()) == []
        write(folder)
    assert content(target) == "new"
    assert neighbours(target) == ["target"]


def test_a_run_that_fails_after_a_killed_one_brings_the_old_back(target: Path) -> None:
    old_checkpoint(target)
    target.rename(target.with_name("target.uptrain-replaced"))
    with pytest.raises(RuntimeError):
        write_and_fail(target, RuntimeError, overwrite=True)
    assert content(target) == "old"
    assert neighbours(target) == ["target"]


def test_only_one_writes_at_a_time(target: Path) -> None:
    with staged_folder(target) as folder:
        write(folder)
        message = "another process is writing it right now; wait for it or choose another target"
        with pytest.raises(CheckpointError, match=message), staged_folder(target):
            pass
    assert content(target) == "new"


def test_a_target_that_appears_meanwhile_is_kept(target: Path) -> None:
    def write_late() -> None:
        with staged_folder(target) as folder:
            write(folder)
            old_checkpoint(target)

    with pytest.raises(CheckpointError, match=r"target: exists already"):
        write_late()
    assert content(target) == "old"
    assert neighbours(target) == ["target"]


def test_an_existing_target_is_refused(target: Path) -> None:
    target.mkdir()
    with pytest.raises(CheckpointError, match=r"exists already; .* or add --overwrite"):
        check_target(target, overwrite=False)
    check_target(target, overwrite=True)  # empty


@pytest.mark.parametrize("kind", ["folder", "file", "link", "dangling link", "application"])
def test_overwriting_never_touches_what_is_no_checkpoint(target: Path, kind: str) -> None:
    elsewhere = target.parent / "elsewhere"
    old_checkpoint(elsewhere)
    if kind == "file":
        target.write_text("mine")
    elif "link" in kind:
        target.symlink_to(elsewhere if kind == "link" else "nowhere")
    else:
        target.mkdir()
        (target / "thesis.tex").write_text("mine")
        if kind == "application":  # many programs keep a config.json of their own
            (target / "config.json").write_text('{"theme": "dark"}')
    with (
        pytest.raises(CheckpointError, match="is no checkpoint folder, so --overwrite will not"),
        staged_folder(target, overwrite=True),
    ):
        pass
    assert neighbours(target) == ["elsewhere", "target"]
    assert content(elsewhere) == "old"


def test_a_link_where_the_staging_folder_goes_is_not_followed(target: Path) -> None:
    victim = target.parent / "victim"
    victim.mkdir()
    (victim / "precious").write_text("mine")
    target.with_name("target.uptrain-staging").symlink_to(victim)
    with pytest.raises(CheckpointError, match="cannot be created"), staged_folder(target):
        pass
    assert (victim / "precious").read_text() == "mine"
    assert not target.is_symlink()


def test_an_error_leaves_no_new_parent_folders(target: Path) -> None:
    with pytest.raises(RuntimeError):
        write_and_fail(target / "deep" / "er", RuntimeError)
    assert neighbours(target) == []


def test_a_target_below_a_file_is_refused(target: Path) -> None:
    target.write_text("")
    with pytest.raises(CheckpointError, match="cannot be created"), staged_folder(target / "x"):
        pass


def specs_of(state: dict[str, torch.Tensor]) -> list[TensorSpec]:
    names = {dtype: name for name, dtype in DTYPES.items()}
    return [TensorSpec(name, names[t.dtype], tuple(t.shape)) for name, t in state.items()]


STATE = {
    "byte": torch.arange(3, dtype=torch.uint8),
    "wide": torch.arange(5, dtype=torch.float64),
    "half": torch.arange(4, dtype=torch.float16),
    "scalar": torch.tensor(7),
    "empty": torch.ones(0, 2),
}


@pytest.mark.parametrize("max_shard_bytes", [1, 48, 10**6])
def test_shards_are_read_back_by_safetensors(tmp_path: Path, max_shard_bytes: int) -> None:
    written: list[int] = []
    digests = write_tensors(
        tmp_path,
        specs_of(STATE),
        lambda spec: tensor_chunks(STATE[spec.name]),
        max_shard_bytes,
        written.append,
    )
    found, home = {}, {}
    for path in tmp_path.glob("*.safetensors"):
        shard = safetensors.torch.load_file(path)
        assert len(shard) == 1 or sum(t.nbytes for t in shard.values()) <= max_shard_bytes
        found |= shard
        home |= dict.fromkeys(shard, path.name)
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in STATE.items())
    assert sum(written) == sum(tensor.nbytes for tensor in STATE.values())
    index = tmp_path / "model.safetensors.index.json"
    if len(set(home.values())) == 1:
        assert set(home.values()) == {"model.safetensors"}
        assert not index.exists()
    else:
        metadata = {"total_size": sum(written)}
        assert json.loads(index.read_text()) == {"metadata": metadata, "weight_map": home}
    assert digests == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.iterdir()
    }


def test_files_are_synced_while_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_SYNC_BYTES", 8)

    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write_tensors(tmp_path, specs_of(STATE), lambda spec: tensor_chunks(STATE[spec.name]))


def test_many_shards_need_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync, most = os.fsync, 0

    def slow(descriptor: int) -> None:
        nonlocal most
        time.sleep(0.005)
        most = max(most, len(list(Path("/proc/self/fd").iterdir())))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    before = len(list(Path("/proc/self/fd").iterdir()))
    state = {str(number): torch.zeros(1) for number in range(150)}
    write_tensors(tmp_path, specs_of(state), lambda spec: tensor_chunks(state[spec.name]), 1)
    assert most - before < 100


def test_an_error_of_the_data_ends_the_writing(tmp_path: Path) -> None:
    def data(spec: TensorSpec) -> Iterator[memoryview]:
        yield memoryview(b"x")
        raise CheckpointError("gone")

    with pytest.raises(CheckpointError, match="gone"):
        write_tensors(tmp_path, specs_of(STATE), data)


def test_file_modes_follow_the_umask(target: Path) -> None:
    old = os.umask(0o027)
    try:
        with staged_folder(target) as folder:
            writer.write_json(folder / "config.json", {"ü": 1})
    finally:
        os.umask(old)
    assert target.stat().st_mode & 0o777 == 0o750
    assert (target / "config.json").stat().st_mode & 0o777 == 0o640
    assert (target / "config.json").read_text("utf-8") == '{\n  "ü": 1\n}\n'
