"""The checkpoints of a run on disk: which are whole, and by what they were made.

A checkpoint is a folder: of each process a part, which is plain safetensors, and a manifest that
lists them.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uptrain.checkpoint.files import CONFIG, RECORD, SAFETENSORS, file_chunks, read_json
from uptrain.checkpoint.reader import Checkpoint
from uptrain.checkpoint.staging import STAGING
from uptrain.errors import CheckpointError, TrainingError, one_line

MANIFEST = "manifest.json"
FORMAT = 2

Fingerprint = Mapping[str, Any]
"""What decides the result of a run, by the names that a recipe gives it.

Files stand there by their `name` and their `sha256`, which alone decides.
"""


@dataclass(frozen=True)
class SavedState:
    """A whole checkpoint on disk."""

    folder: Path
    step: int
    """Steps done."""
    manifest: dict[str, Any]

    @property
    def parts(self) -> list[str]:
        """Name the files, in the order of the processes that wrote them."""
        return [part_name(rank) for rank in range(self.manifest["processes"])]


def find_states(folder: Path) -> list[SavedState]:
    """Give the whole checkpoints in `folder`, oldest first, by what their manifests say.

    Raises:
        TrainingError: If one cannot be read, or is of another format: an older one must not silently
            take its place, nor may it be removed.
    """
    states = []
    try:
        for path in folder.iterdir() if folder.is_dir() else ():
            # What is still staged is perhaps not yet on the disk.
            if not path.name.endswith(STAGING) and (path / MANIFEST).is_file():
                states += _read_state(path)
    except OSError as error:
        raise TrainingError(
            f"{error.filename or folder}: cannot be read ({error.strerror}); "
            "check the disk, or remove the checkpoint"
        ) from error
    return sorted(states, key=lambda state: state.step)


def _read_state(path: Path) -> list[SavedState]:
    """Read a checkpoint's manifest; gives nothing if the checkpoint is not whole."""
    try:
        manifest = read_json(path / MANIFEST)
        if type(found := manifest.get("format")) is int and found != FORMAT:
            raise TrainingError(
                f"{path}: has format {found}, this version of uptrain reads {FORMAT}; go on with the "
                "version that made it, or choose another output"
            )
        step, count = manifest["step"], manifest["processes"]
        if type(step) is not int or type(count) is not int or count != len(manifest["files"]):
            return []
        state = SavedState(path, step, manifest)
        sizes = [manifest["files"][name]["bytes"] for name in state.parts]
        stored = [(path / name).stat().st_size for name in state.parts]
        is_whole = "format" in manifest and bool(sizes) and stored == sizes
    except CheckpointError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from error
        return []
    except (FileNotFoundError, NotADirectoryError, KeyError, TypeError, ValueError):
        return []
    return [state] if is_whole else []


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
        if _content(now.get(key)) != _content(then.get(key)):
            raise TrainingError(
                f"{state.folder}: was made with {_difference(key, then.get(key), now.get(key))}; "
                "go on with what it was made with, or choose another output"
            )


def _content(value: Any) -> Any:
    return value.get("sha256") if isinstance(value, dict) else value


def _difference(key: str, then: Any, now: Any) -> str:
    """Name what differs; a digest tells a reader nothing."""
    before, after = (
        one_line("none" if each is None else each.get("name") if isinstance(each, dict) else each)
        for each in (then, now)
    )
    if isinstance(now, dict) and before == after:
        return f"{key}={before} of other content"
    if isinstance(then, str) and isinstance(now, str) and len(now) == 64:
        return f"another {one_line(key)}"
    return f"{one_line(key)}={before}, now {after}"


def clean_states(folder: Path) -> None:
    """Remove what killed runs left half written or half removed. No other run may be at work."""
    whole = {state.folder for state in find_states(folder)}
    for path in folder.glob("step-*"):
        if path not in whole:
            remove_state(path)


def named_digest(checkpoint: Checkpoint) -> dict[str, str]:
    """Give a checkpoint's `name`, and as its `sha256` what `source_digest` says."""
    return {"name": checkpoint.name, "sha256": source_digest(checkpoint)}


def source_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 of a source's config and weights; `uptrain.json`, if there, stands for them."""
    digest = hashlib.sha256()
    for name, entry in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {entry.dtype} {entry.shape}\n".encode())
    record = checkpoint.folder / RECORD
    weights = {record} if record.is_file() else {e.path for e in checkpoint.tensors.values()}
    for path in (checkpoint.folder / CONFIG, *sorted(weights)):
        for chunk in file_chunks(path):
            digest.update(chunk)
    return digest.hexdigest()


def remove_state(folder: Path) -> None:
    """Remove a checkpoint, if it is there."""
    if folder.exists():
        (folder / MANIFEST).unlink(missing_ok=True)  # first: what is half removed is no checkpoint
        shutil.rmtree(folder)


def part_name(rank: int) -> str:
    """Name the file that a process writes."""
    return f"part-{rank:05d}/{SAFETENSORS}"
