"""Checkpoints of a run: each whole or absent, each only for the run that made it."""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from uptrain.checkpoint.reader import CONFIG, RECORD, Checkpoint, read_json
from uptrain.checkpoint.writer import staged_folder, write_json
from uptrain.errors import CheckpointError, TrainingError

MANIFEST = "manifest.json"
_STATE = "state.pt"
_FORMAT = 1
_KEEP = 2

Fingerprint = Mapping[str, Any]
"""What decides the result of a run, by the names that a recipe gives it."""


@dataclass(frozen=True)
class SavedState:
    """A whole checkpoint on disk."""

    folder: Path
    step: int
    """Steps done."""
    manifest: dict[str, Any]


def find_states(folder: Path) -> list[SavedState]:
    """Give the whole checkpoints in `folder`, oldest first, by what their manifests say."""
    states = []
    for path in folder.iterdir() if folder.is_dir() else ():
        try:
            manifest = read_json(path / MANIFEST)
            size = (path / _STATE).stat().st_size
            if manifest["format"] == _FORMAT and size == manifest["files"][_STATE]["bytes"]:
                states.append(SavedState(path, int(manifest["step"]), manifest))
        except (CheckpointError, OSError, KeyError, TypeError, ValueError):
            continue
    return sorted(states, key=lambda state: state.step)


def save_state(
    folder: Path,
    step: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    fingerprint: Fingerprint,
) -> Path:
    """Save a checkpoint, and remove older ones but the latest once it is whole.

    Args:
        folder: Of all checkpoints of the run.
        step: Steps done.
        model: Its parameters and persistent buffers are saved as they are.
        optimizer: Its state is saved.
        fingerprint: Of the run.

    Returns:
        The checkpoint's folder.

    Raises:
        TrainingError: If it cannot be written; the older ones are as they were.
    """
    target = folder / f"step-{step:08d}"
    if any(state.folder == target for state in find_states(folder)):
        return target
    _remove(target)  # found by no manifest: a part of a removed one
    try:
        with staged_folder(target) as staging:
            content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            size, digest = _write_tensors(staging / _STATE, content)
            manifest = {
                "format": _FORMAT,
                "step": step,
                "files": {_STATE: {"bytes": size, "sha256": digest}},
                "run": dict(fingerprint),
            }
            write_json(staging / MANIFEST, manifest)
    except (OSError, RuntimeError, CheckpointError) as error:
        # torch.save hides the error of the file behind one of its own.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError | CheckpointError):
            raise
        reason = " ".join(str(cause).split())[:200]
        raise TrainingError(
            f"{target}: the checkpoint cannot be written ({reason}); "
            "make room, then add --resume to go on from the one before"
        ) from error
    for state in find_states(folder)[:-_KEEP]:
        _remove(state.folder)
    return target


def load_state(
    state: SavedState,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    fingerprint: Fingerprint,
) -> None:
    """Put a checkpoint into a model and its optimizer.

    Raises:
        TrainingError: If it is of another run (the difference is named), or damaged.
    """
    check_fingerprint(state, fingerprint)
    damaged = f"{state.folder}: is damaged; remove it to go on from the checkpoint before it"
    path = state.folder / _STATE
    with path.open("rb") as file:
        if (
            hashlib.file_digest(file, "sha256").hexdigest()
            != state.manifest["files"][_STATE]["sha256"]
        ):
            raise TrainingError(damaged)
    # On a CPU the optimizer would go on working in the mapped file.
    is_copied = next(model.parameters()).device.type != "cpu"
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_copied)
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])


def check_fingerprint(state: SavedState, fingerprint: Fingerprint) -> None:
    """Refuse a checkpoint of another run.

    Raises:
        TrainingError: If it is; the first difference is named.
    """
    # As it would be read back: tuples are lists there.
    now = json.loads(json.dumps(dict(fingerprint)))
    then = state.manifest.get("run")
    then = then if isinstance(then, dict) else {}
    for key in [*now, *then]:
        if now.get(key) != then.get(key):
            is_digest = isinstance(now.get(key), str) and len(now[key]) == 64
            found = f"another {key}" if is_digest else f"{key}={then.get(key)}, now {now.get(key)}"
            raise TrainingError(
                f"{state.folder}: was made with {found}; go on with what it was made with, "
                "or choose another output"
            )


def clean_states(folder: Path) -> None:
    """Remove what killed runs left half written or half removed. No other run may be at work."""
    whole = {state.folder for state in find_states(folder)}
    for path in folder.glob("step-*"):
        if path not in whole:
            _remove(path)


def source_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 of a source's config and weights; `uptrain.json`, if there, stands for them."""
    digest = hashlib.sha256((checkpoint.folder / CONFIG).read_bytes())
    for name, entry in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {entry.dtype} {entry.shape}\n".encode())
    record = checkpoint.folder / RECORD
    if record.is_file():
        digest.update(record.read_bytes())
    else:
        for path in sorted({entry.path for entry in checkpoint.tensors.values()}):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _remove(folder: Path) -> None:
    if folder.exists():
        (folder / MANIFEST).unlink(missing_ok=True)  # first: what is half removed is no checkpoint
        shutil.rmtree(folder)


class _HashingFile(io.RawIOBase):
    """A file that is hashed while it is written."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self.size = 0
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        written = self._file.write(data)
        self.digest.update(data)
        self.size += written
        return written

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()


def _write_tensors(path: Path, content: dict[str, Any]) -> tuple[int, str]:
    with _HashingFile(path) as file:
        # It needs write() only, but is declared to take a file with every method.
        torch.save(content, file)  # type: ignore[arg-type]
    return file.size, file.digest.hexdigest()
