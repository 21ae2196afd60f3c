"""Save a run's state in the background, and take it on again, each only for the run that made it."""

import hashlib
import os
import threading
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from uptrain.checkpoint.staging import (
    check_room,
    side_folders,
    staged_folder,
    write_json,
)
from uptrain.errors import CheckpointError, TrainingError, one_line
from uptrain.training import processes
from uptrain.training.parts import load_parts, own_part, pieces_of, save_part
from uptrain.training.saved import (
    FORMAT,
    MANIFEST,
    Fingerprint,
    SavedState,
    check_fingerprint,
    find_states,
    part_name,
    remove_state,
)
from uptrain.training.shard import reshard

_KEEP = 2


class StateWriter:
    """Saves a run's checkpoints in the background, one at a time; used as a context.

    Every process of the run makes one and calls the same methods at the same steps.
    """

    def __init__(
        self, folder: Path, root: nn.Module, optimizer: Optimizer, fingerprint: Fingerprint
    ) -> None:
        """Remember what is to be saved.

        Args:
            folder: Of all checkpoints of the run, the same for all processes.
            root: Its persistent buffers are saved, and the parameters that the optimizer holds: no
                others ever change.
            optimizer: What it remembers is saved; its options are the run's, and are not.
            fingerprint: Of the run.
        """
        self._folder, self._root, self._optimizer = folder, root, optimizer
        self._fingerprint = dict(fingerprint)
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        # Of its own: it is used in the background, between whatever the run does on its group.
        self._group = dist.new_group(backend="gloo") if processes.count() > 1 else None

    def __enter__(self) -> "StateWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join()  # what was begun may still become whole

    def save(self, step: int, keep: Collection[int] = ()) -> Path:
        """Begin to save a checkpoint; it is there once it is whole.

        The state is copied to the host's memory first and written from there, while the run goes
        on; where there is no room for that, it is written at once. When the checkpoint is whole,
        older ones are removed but the latest two and those to keep.

        Args:
            step: Steps done.
            keep: Steps whose checkpoints are not removed.

        Returns:
            The checkpoint's folder.

        Raises:
            TrainingError: If the one before could not be written, or this one cannot.
            CheckpointError: If the disk has no room for it.
        """
        self.wait()
        target = self._folder / f"step-{step:08d}"
        if processes.in_main(lambda: any(s.folder == target for s in find_states(self._folder))):
            processes.in_main(lambda: self._remove_older(set(keep)))  # perhaps no longer done
            return target
        reshard(self._root)
        tensors = own_part(pieces_of(self._root, self._optimizer))
        needed = sum(processes.in_all(lambda: sum(each.nbytes for each in tensors.values())))
        processes.in_main(lambda: check_room(target, needed))
        if self._copy(tensors):
            # The impatient need not wait for it: what it leaves behind is no checkpoint.
            self._thread = threading.Thread(
                target=self._run, args=(target, step, self._copies, set(keep)), daemon=True
            )
            self._thread.start()
        else:
            self._run(target, step, tensors, set(keep))
            self.wait()
        return target

    def wait(self) -> None:
        """Wait until the checkpoint that was begun is whole.

        Raises:
            TrainingError: If it cannot be written; the older ones are as they were.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _copy(self, tensors: dict[str, Tensor]) -> bool:
        """Copy tensors to the host, over the copies before them; False if there is no room."""
        self._copies = {name: copy for name, copy in self._copies.items() if name in tensors}
        missing = [name for name in tensors if name not in self._copies]
        if sum(tensors[name].nbytes for name in missing) > _available_bytes() // 2:
            return False
        for name in missing:
            self._copies[name] = torch.empty_like(tensors[name], device="cpu")
        # In the order in which a run that goes on from here would write them.
        self._copies = {name: self._copies[name] for name in tensors}
        for name, tensor in tensors.items():
            self._copies[name].copy_(tensor)
        return True

    def _run(self, target: Path, step: int, tensors: dict[str, Tensor], keep: set[int]) -> None:
        try:
            self._write(target, step, tensors)
            processes.in_main(lambda: self._remove_older(keep), self._group)
        except (OSError, RuntimeError, CheckpointError) as error:
            reason = error.__cause__ if isinstance(error.__cause__, OSError) else error
            self._error = TrainingError(
                f"{target}: the checkpoint cannot be written ({one_line(reason)}); "
                "make room, then add --resume to go on from the one before"
            )
            self._error.__cause__ = error
        except BaseException as error:  # raised by `wait`, where the run is
            self._error = error

    def _remove_older(self, keep: set[int]) -> None:
        for state in find_states(self._folder)[:-_KEEP]:
            if state.step not in keep:
                remove_state(state.folder)

    def _write(self, target: Path, step: int, tensors: dict[str, Tensor]) -> None:
        """Write all parts, then the manifest, then let the folder appear."""
        staging = side_folders(Path(os.path.abspath(target)))[0]
        with ExitStack() as stack:

            def begin() -> None:
                remove_state(target)  # found by no manifest: a part of a removed one
                stack.enter_context(staged_folder(target))

            def publish() -> None:
                manifest = {
                    "format": FORMAT,
                    "step": step,
                    "processes": len(files),
                    "files": {part_name(rank): file for rank, file in enumerate(files)},
                    "run": self._fingerprint,
                }
                write_json(staging / MANIFEST, manifest)
                stack.close()

            processes.in_main(begin, self._group)
            files = processes.in_all(
                lambda: save_part(staging / part_name(processes.rank()), tensors), self._group
            )
            processes.in_main(publish, self._group)


def load_state(
    state: SavedState, root: nn.Module, optimizer: Optimizer, fingerprint: Fingerprint
) -> None:
    """Put a checkpoint into a model and its optimizer, whatever the number of processes.

    Args:
        state: From `find_states`, the same in all processes.
        root: As `StateWriter` was given it; parameters that were not saved stay as they are.
        optimizer: As `StateWriter` was given it. Its learning rate is 0 afterwards.
        fingerprint: Of the run.

    Raises:
        TrainingError: If it is of another run (the difference is named), or damaged.
    """
    check_fingerprint(state, fingerprint)
    mine = state.parts[processes.rank() :: processes.count()]
    if not all(processes.in_all(lambda: all(_is_sound(state, name) for name in mine))):
        raise TrainingError(
            f"{state.folder}: is damaged; remove it to go on from the checkpoint before it"
        )
    try:
        load_parts([state.folder / name for name in state.parts], root, optimizer)
    except ValueError as error:
        raise TrainingError(
            f"{state.folder}: cannot be taken on ({error}); go on with what it was made with, or "
            "choose another output"
        ) from error


def _is_sound(state: SavedState, name: str) -> bool:
    try:
        with (state.folder / name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return False
    return bool(found == state.manifest["files"][name].get("sha256"))


def _available_bytes() -> int:
    """Estimate this process's share of the host's free memory, as the kernel does; 0 if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    kib = next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), 0)
    return kib * 1024 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
