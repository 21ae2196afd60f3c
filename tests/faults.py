"""Faults on demand: every operation on the files of a folder counted, then failed or killed, once each."""

import ctypes
import errno
import hashlib
import io
import json
import os
import platform
import signal
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import transformers

import uptrain

KINDS = ("ENOSPC", "EIO", "EDQUOT", "SIGKILL")
_OUTCOMES = "UPTRAIN_OUTCOMES"
"""Names a file that gets a line of each sweep; `benchmarks/reliability.py` makes a table of it."""
_HUNG_SECONDS = 60
# Of <sched.h> and <sys/mount.h>.
_CLONE_NEWNS, _CLONE_NEWUSER, _MS_REC, _MS_PRIVATE = 0x20000, 0x10000000, 0x4000, 0x40000


class Point(NamedTuple):
    """An operation that is about to happen."""

    operation: str
    path: str
    number: int
    """Which one of these, from 1: threads may swap places, but not the operations on one file."""
    nbytes: int = 0
    """What is written; a time in it may have more digits in another run."""

    def is_at(self, other: "Point") -> bool:
        """Whether it is the same operation of another run."""
        return self[:3] == other[:3]


class Write(NamedTuple):
    """What a point is about to write; nothing if it does something else."""

    nbytes: int = 0
    do: Callable[[int], object] = lambda nbytes: None
    """Writes so many bytes of it."""

    def half(self) -> None:
        self.do(self.nbytes // 2)


Before = Callable[[Point, Write], object]
"""Acts before a point."""


@contextmanager
def watched(folder: Path, before: Before) -> Iterator[None]:
    """Act before whatever Python code does to the files of a folder.

    Operations are called as in `os`; to open a file for reading is a `read`. What libraries read in C
    and Rust is not seen: weights that are mapped into memory, the tokenizer.
    """
    home = f"{os.path.realpath(folder)}/"
    counts: Counter[tuple[str, str]] = Counter()
    lock = threading.Lock()

    def reach(operation: str, place: str, write: Write = Write()) -> None:
        if f"{place}/".startswith(home):
            with lock:
                counts[operation, place] += 1
                number = counts[operation, place]
            before(Point(operation, place, number, write.nbytes), write)

    def with_path(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def act(path: Any, *arguments: Any, dir_fd: int | None = None, **options: Any) -> Any:
            flags = arguments[0] if name == "open" else os.O_WRONLY
            is_read = not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            reach("read" if is_read else name, _absolute(path, dir_fd))
            options |= {} if dir_fd is None else {"dir_fd": dir_fd}
            return real(path, *arguments, **options)

        return act

    write, fsync, opened = os.write, os.fsync, io.open

    def watch_write(descriptor: int, data: Any) -> int:
        view = memoryview(data).cast("B")
        some = Write(len(view), lambda nbytes: write(descriptor, view[:nbytes]))
        reach("write", _place(descriptor), some)
        return write(descriptor, data)

    def watch_fsync(descriptor: int) -> None:
        reach("fsync", _place(descriptor))
        fsync(descriptor)

    class Raw(io.FileIO):
        """What lies below the buffers of a file that is written."""

        def write(self, data: Any) -> int:
            view = memoryview(data).cast("B")
            some = Write(len(view), lambda nbytes: super(Raw, self).write(view[:nbytes]))
            reach("write", _place(self.fileno()), some)
            return super().write(data)

    def watch_open(
        file: Any, mode: str = "r", buffering: int = -1, *text: Any, **options: Any
    ) -> Any:
        place = _place(file) if isinstance(file, int) else _absolute(file)
        is_read = not set(mode) & set("wxa+")
        reach("read" if is_read else "open", place)
        if not place.startswith(home) or is_read:
            return opened(file, mode, buffering, *text, **options)
        raw = Raw(file, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *text, **options)

    names = ("open", "rename", "replace", "unlink", "remove", "rmdir", "mkdir")
    changes = {name: with_path(name) for name in names}
    with (
        mock.patch.multiple(os, write=watch_write, fsync=watch_fsync, **changes),
        mock.patch("io.open", watch_open),
        mock.patch("builtins.open", watch_open),
    ):
        yield


def _absolute(path: Any, dir_fd: int | None = None) -> str:
    if isinstance(path, int):
        return _place(path)
    base = os.getcwd() if dir_fd is None else _place(dir_fd)
    return os.path.join(base, os.fsdecode(path))


def _place(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


def points_of(folder: Path, run: Callable[[], object]) -> list[Point]:
    """Run something, and give its points."""
    found: list[Point] = []
    with watched(folder, lambda point, _: found.append(point)):
        run()
    return found


def raise_at(chosen: Point, kind: str, broken: threading.Event, lasting: bool = False) -> Before:
    """Let a point fail as a full or broken disk does, half done; and all behind it, if it lasts.

    Whether it was reached is said by `broken`.
    """
    number = getattr(errno, kind)

    def before(point: Point, write: Write) -> None:
        if point.is_at(chosen):
            write.half()
            broken.set()
        if point.is_at(chosen) or (lasting and broken.is_set()):
            raise _error(number, point)

    return before


def kill_at(chosen: Point) -> Before:
    """Let the process be killed at a point, half done."""

    def before(point: Point, write: Write) -> None:
        if point.is_at(chosen):
            write.half()
            os.kill(os.getpid(), signal.SIGKILL)

    return before


def fill_after(nbytes: int) -> Before:
    """Let the disk be full after so many bytes."""
    left = nbytes

    def before(point: Point, write: Write) -> None:
        nonlocal left
        if write.nbytes > left:
            write.do(left)
            raise _error(errno.ENOSPC, point)
        left -= write.nbytes

    return before


def _error(number: int, point: Point) -> OSError:
    """Make what the system would raise: it names no file that is open already."""
    named = () if point.operation in ("write", "fsync") else (point.path,)
    return OSError(number, os.strerror(number), *named)


def in_child(run: Callable[[], object]) -> int:
    """Run something in a fork of this process; gives the status it ended with, as `waitpid` does."""
    return os.waitpid(start_child(run), 0)[1]


def start_child(run: Callable[[], object]) -> int:
    """Run something in a fork of this process; gives its number."""
    child = os.fork()
    if child == 0:
        signal.alarm(_HUNG_SECONDS)
        try:
            torch.set_num_threads(1)  # makes its pool anew, before threads race for it
            run()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def tree(folder: Path) -> dict[str, str | None]:
    """Give the SHA-256 of all files below a folder, by their names; None for a folder."""
    return {
        path.relative_to(folder).as_posix(): None
        if path.is_dir()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
    }


def note(**outcome: Any) -> None:
    """Leave a line for the table, if one is wanted: which test says it, of what code, and where it ran.

    Processes may share the file: a line is appended by one write.
    """
    if where := os.environ.get(_OUTCOMES):
        test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]
        line = json.dumps({"test": test, **ran(), **outcome}) + "\n"
        descriptor = os.open(where, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        os.write(descriptor, line.encode())
        os.close(descriptor)


@cache
def ran() -> dict[str, Any]:
    """Give a digest of each module of the code, and the versions and the cores that it runs with."""
    package = Path(uptrain.__file__).parent
    code = {
        path.relative_to(package).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        for path in sorted(package.rglob("*.py"))
    }
    versions = (
        f"torch {torch.__version__}, transformers {transformers.__version__} "
        f"and Python {platform.python_version()} on {os.cpu_count()} CPU cores"
    )
    return {"code": code, "where": versions}


def own_mounts() -> bool:
    """Let this process mount what no other sees; gives whether the system lets it."""
    as_root = (_CLONE_NEWNS, _CLONE_NEWNS | _CLONE_NEWUSER)
    libc = ctypes.CDLL(None, use_errno=True)
    user = os.geteuid()
    for flags in as_root if user == 0 else as_root[1:]:
        if libc.unshare(flags) == 0:
            if flags & _CLONE_NEWUSER:
                Path("/proc/self/uid_map").write_text(f"0 {user} 1")
            return bool(libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None) == 0)
    return False


@contextmanager
def small_disk(folder: Path, nbytes: int) -> Iterator[None]:
    """Let a folder be a disk of its own, after `own_mounts`."""
    libc = ctypes.CDLL(None, use_errno=True)
    place, options = os.fsencode(folder), f"size={nbytes}".encode()
    if libc.mount(b"tmpfs", place, b"tmpfs", 0, options) != 0:
        raise OSError(ctypes.get_errno(), "tmpfs cannot be mounted")
    try:
        yield
    finally:
        libc.umount(place)
