"""Read a checkpoint folder lazily, refusing every malformed or hostile input by name."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from uptrain.checkpoint.config import check_parts, read_config
from uptrain.checkpoint.files import (
    CONFIG,
    LFS_POINTER,
    MODEL_CARD,
    RECORD,
    check_link,
    disguise,
    file_chunks,
    read_json,
    reading,
)
from uptrain.checkpoint.tensors import (
    DTYPES,
    TensorEntry,
    entry_chunks,
    load_bin,
    read_bin_entries,
    read_header,
    tensor_chunks,
)
from uptrain.errors import CheckpointError, one_line

# Files of a source that hold weights in some form and would be stale beside converted ones.
_WEIGHT_SUFFIXES = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".gguf", ".onnx",
    ".npz", ".onnx_data",
}  # fmt: skip
_CHAT_TEMPLATES = "additional_chat_templates/*.jinja"  # the one folder that transformers reads
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass
class Checkpoint:
    """A checkpoint folder: its config, its tensors by name, its companion files."""

    folder: Path
    name: str
    """The hub id, or the folder's own name."""
    revision: str | None
    config: dict[str, Any]
    tensors: dict[str, TensorEntry]
    companions: list[Path]
    """Tokenizer, generation and other files that belong to a checkpoint, without weights and card."""
    left_out: list[Path]
    """Weights in other formats, which a conversion does not carry over."""
    _bin_path: Path | None = field(default=None, repr=False)
    _bin_tensors: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def companion_name(self, path: Path) -> str:
        """Name a companion file relative to the folder, as `uptrain.json` does."""
        return path.relative_to(self.folder).as_posix()

    def companion_files(self) -> Iterator[tuple[str, Iterator[memoryview]]]:
        """Yield name and content of every companion file, at most 1 MiB of it at a time."""
        for path in self.companions:
            yield self.companion_name(path), file_chunks(path)

    @property
    def making_bytes(self) -> int:
        """Most bytes that `read` takes beside the tensor itself."""
        return 0

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())

    def chunks(self, name: str) -> Iterator[memoryview]:
        """Yield the raw little-endian bytes of tensor `name`, at most 1 MiB at a time."""
        entry = self.tensors[name]
        if entry.path.suffix == ".bin":
            yield from tensor_chunks(self.read(name))
            return
        yield from entry_chunks(entry)

    def read(self, name: str) -> torch.Tensor:
        """Read tensor `name` whole, in its own dtype and shape, on the CPU."""
        entry = self.tensors[name]
        if entry.path.suffix == ".bin":
            if self._bin_path != entry.path:
                self._bin_path, self._bin_tensors = entry.path, load_bin(entry.path)
            return self._bin_tensors[name]
        data = bytearray(entry.nbytes)
        start = 0
        for chunk in self.chunks(name):
            data[start : start + len(chunk)] = chunk
            start += len(chunk)
        dtype = DTYPES[entry.dtype]
        if not data:
            return torch.empty(entry.shape, dtype=dtype)
        return torch.frombuffer(data, dtype=dtype).reshape(entry.shape)


def resolve_source(
    source: str | os.PathLike[str], only: Sequence[str] | None = None
) -> tuple[Path, str, str | None]:
    """Find the folder of a checkpoint that is named by path or by hub id.

    Args:
        source: A folder, or `owner/name` of a model on the Hugging Face hub (fetched, or taken from
            the local cache when the hub cannot be reached).
        only: Patterns of the files that are wanted from the hub; all if not given.

    Returns:
        The folder, a name to record, and the hub revision if there is one.

    Raises:
        CheckpointError: If there is no such folder and no such model within reach.
    """
    path = Path(source)
    if path.exists() or not _HUB_ID.fullmatch(str(source)):
        if not path.is_dir():
            found = "is a file" if path.exists() else "does not exist"
            raise CheckpointError(
                f"{source}: {found}; expected a checkpoint folder or a hub id like owner/name"
            )
        real = path.resolve()
        repository = real.parent.parent.name
        if real.parent.name == "snapshots" and repository.startswith("models--"):
            return path, repository.removeprefix("models--").replace("--", "/"), real.name
        return path, real.name, None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(
                str(source),
                allow_patterns=None if only is None else list(only),
                ignore_patterns=["*.gguf", "*.onnx", "*.h5", "*.msgpack", "*.pth", "original/*"],
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{source}: no such folder, and not to be had from the Hugging Face hub "
            f"({type(error).__name__}); check the name, the network, or log in with `hf auth login`"
        ) from error
    return folder, str(source), folder.name


def open_checkpoint(source: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint without reading its weights.

    Args:
        source: A folder with `config.json` and safetensors or `.bin` weights, or a hub id.

    Returns:
        The checkpoint; every header was checked, no tensor was read.

    Raises:
        CheckpointError: If anything in the folder is missing, malformed, leads out of it, or is
            quantised.
    """
    folder, name, revision = resolve_source(source)
    with reading(folder):
        return _open_folder(folder, name, revision)


def _open_folder(folder: Path, name: str, revision: str | None) -> Checkpoint:
    config = read_config(folder)
    weights = _weight_files(folder)
    tensors: dict[str, TensorEntry] = {}
    for path, indexed in weights.items():
        entries = read_bin_entries(path) if path.suffix == ".bin" else read_header(path)
        if indexed is not None:
            _compare_with_index(path, indexed, entries)
        tensors |= entries  # none is in two files: an index names one for each
    if not tensors:
        raise CheckpointError(f"{folder}: its weight files hold no tensor; fetch them again")
    check_parts(folder / CONFIG, config, tensors)
    for tensor, entry in tensors.items():
        if tensor.endswith(".weight") and not DTYPES[entry.dtype].is_floating_point:
            raise CheckpointError(
                f"{entry.path}: tensor {one_line(tensor)} is stored as {entry.dtype}, expected floats; "
                "packed or quantised weights cannot be used, take the unquantised original"
            )
    companions, left_out = [], []
    for path in sorted([*folder.iterdir(), *folder.glob(_CHAT_TEMPLATES)]):
        if path.is_symlink() and not path.exists():
            raise CheckpointError(f"{path}: is a link to a file that does not exist; fetch it")
        if path.name.startswith(".") or not path.is_file() or path in weights:
            continue
        if path.suffix in _WEIGHT_SUFFIXES:
            left_out.append(path)
            continue
        check_link(path, folder)
        if path.name in (CONFIG, MODEL_CARD, RECORD) or path.name.endswith(".index.json"):
            continue
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise CheckpointError(f"{path}: {disguise(LFS_POINTER)}")
        companions.append(path)
    return Checkpoint(folder, name, revision, config, tensors, companions, left_out)


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """Find the weight files, in transformers' order of preference, and what an index says of each."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        single, index = folder / stem, folder / f"{stem}.index.json"
        name, suffix = stem.split(".")
        found = {single} if single.is_file() else set()
        weights: dict[Path, set[str] | None] = dict.fromkeys(found)
        if index.is_file():
            check_link(index, folder)
            weights = _read_index(index, folder)
        for stray in sorted(found.union(folder.glob(f"{name}-*-of-*.{suffix}")) - weights.keys()):
            raise CheckpointError(
                f"{stray}: is named by no index, but lies beside other weights; "
                "remove it, or what it replaces together with the index"
            )
        for path in weights:
            check_link(path, folder)
        if weights:
            return weights
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (folder / stem).is_symlink():
            raise CheckpointError(
                f"{folder / stem}: is a link to a file that does not exist; fetch it"
            )
    raise CheckpointError(
        f"{folder}: has no weights; expected model.safetensors, pytorch_model.bin or an index of shards"
    )


def _read_index(path: Path, folder: Path) -> dict[Path, set[str] | None]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map; fetch the file again")
    shards: dict[Path, set[str] | None] = {}
    suffix = ".bin" if ".bin." in path.name else ".safetensors"
    names: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        if (
            not isinstance(shard, str)
            or Path(shard).name != shard
            or "\\" in shard
            or not shard.isprintable()
        ):
            raise CheckpointError(
                f"{path}: puts tensor {one_line(tensor)} in {json.dumps(shard)[:200]}, outside the folder; "
                "expected the plain name of a file beside the index"
            )
        if not shard.endswith(suffix):
            raise CheckpointError(
                f"{path}: puts tensor {one_line(tensor)} in {one_line(shard)}, expected a name that "
                f"ends in {suffix}; "
                "fetch the file again"
            )
        names.setdefault(shard, set()).add(tensor)
    for shard in sorted(names):
        if not (folder / shard).is_file():
            raise CheckpointError(
                f"{folder / shard}: is missing, {path.name} names it for {len(names[shard])} tensors; "
                "fetch the missing shard"
            )
        shards[folder / shard] = names[shard]
    return shards


def _compare_with_index(path: Path, indexed: set[str], entries: dict[str, TensorEntry]) -> None:
    for missing in sorted(indexed - entries.keys()):
        raise CheckpointError(
            f"{path}: does not hold tensor {one_line(missing)}, which the index puts there; "
            "index and shards are of different versions, fetch both again"
        )
    for extra in sorted(entries.keys() - indexed):
        raise CheckpointError(
            f"{path}: holds tensor {one_line(extra)}, which the index does not name; "
            "index and shards are of different versions, fetch both again"
        )
