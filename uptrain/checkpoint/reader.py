"""Read a checkpoint folder lazily, refusing every malformed or hostile input by name."""

import json
import math
import os
import pickle
import re
import struct
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from uptrain.errors import CheckpointError, one_line

CONFIG = "config.json"
SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
MODEL_CARD = "README.md"
RECORD = "uptrain.json"

# safetensors' own names of dtypes, as its format document lists them.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

CHUNK_BYTES = 2**20  # larger buffers cost more in page faults than they save in calls
_MAX_HEADER_BYTES = 100_000_000  # the limit that safetensors itself sets
_MAX_DIMENSIONS = 64  # what torch can hold; the product of very many sizes would take hours
_MAX_JSON_BYTES = 64 * 2**20
# Keys of a config by which transformers builds so many parts, one by one, and the most that is
# believed of them where the weights do not have as many tensors or rows.
_PARTS = re.compile("layer|expert|label|block|depth|stage|codebook")
_MAX_PARTS = 4096
# Files of a source that hold weights in some form and would be stale beside converted ones.
_WEIGHT_SUFFIXES = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".gguf", ".onnx",
    ".npz", ".onnx_data",
}  # fmt: skip
_CHAT_TEMPLATES = "additional_chat_templates/*.jinja"  # the one folder that transformers reads
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies; its data is read only when asked for."""

    name: str
    dtype: str
    """safetensors' name of the dtype, such as `BF16`."""
    shape: tuple[int, ...]
    path: Path
    offset: int
    """Bytes from the start of the file; unused in `.bin` files."""

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


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
                self._bin_path, self._bin_tensors = entry.path, _load_bin(entry.path)
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


def entry_chunks(entry: TensorEntry) -> Iterator[memoryview]:
    """Yield the raw bytes of a tensor in a safetensors file, at most 1 MiB at a time.

    Raises:
        CheckpointError: If the file has become shorter since its header was read.
    """
    left = entry.nbytes
    for chunk in file_chunks(entry.path, entry.offset, left):
        left -= len(chunk)
        yield chunk
    if left:
        raise CheckpointError(
            f"{entry.path}: ended while tensor {entry.name} was being read; "
            "the file changed or its disk failed, copy it again"
        )


def file_chunks(path: Path, offset: int = 0, nbytes: int = sys.maxsize) -> Iterator[memoryview]:
    """Yield `nbytes` of a file from `offset` on, or what there is, at most 1 MiB at a time.

    Raises:
        CheckpointError: If it cannot be read.
    """
    # Buffered: a raw read may give less than it was asked for.
    with _reading(path), path.open("rb") as file:
        file.seek(offset)
        while chunk := file.read(min(nbytes, CHUNK_BYTES)):
            nbytes -= len(chunk)
            yield memoryview(chunk)


def byte_chunks(content: bytes) -> Iterator[memoryview]:
    """Yield what is in memory as `file_chunks` would."""
    for start in range(0, len(content), CHUNK_BYTES):
        yield memoryview(content)[start : start + CHUNK_BYTES]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or path}: cannot be read ({error.strerror or one_line(error)}); "
            "check the disk, and who may read it"
        ) from error


def tensor_chunks(tensor: torch.Tensor) -> Iterator[memoryview]:
    """Yield the raw little-endian bytes of `tensor`, at most 1 MiB at a time."""
    data = memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    for start in range(0, len(data), CHUNK_BYTES):
        yield data[start : start + CHUNK_BYTES]


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
    with _reading(folder):
        return _open_folder(folder, name, revision)


def _open_folder(folder: Path, name: str, revision: str | None) -> Checkpoint:
    config = read_config(folder)
    weights = _weight_files(folder)
    tensors: dict[str, TensorEntry] = {}
    for path, indexed in weights.items():
        entries = _read_bin_entries(path) if path.suffix == ".bin" else read_header(path)
        if indexed is not None:
            _compare_with_index(path, indexed, entries)
        tensors |= entries  # none is in two files: an index names one for each
    if not tensors:
        raise CheckpointError(f"{folder}: its weight files hold no tensor; fetch them again")
    _check_parts(folder / CONFIG, config, tensors)
    companions, left_out = [], []
    for path in sorted([*folder.iterdir(), *folder.glob(_CHAT_TEMPLATES)]):
        if path.is_symlink() and not path.exists():
            raise CheckpointError(f"{path}: is a link to a file that does not exist; fetch it")
        if path.name.startswith(".") or not path.is_file() or path in weights:
            continue
        if path.name in (CONFIG, MODEL_CARD, RECORD) or path.name.endswith(".index.json"):
            continue
        if path.suffix in _WEIGHT_SUFFIXES:
            left_out.append(path)
        else:
            _check_link(path, folder)
            companions.append(path)
    return Checkpoint(folder, name, revision, config, tensors, companions, left_out)


def read_config(folder: Path) -> dict[str, Any]:
    """Read `config.json` as plain JSON.

    Raises:
        CheckpointError: If it is missing, is not a JSON object, names no `model_type`, or says that
            the weights are quantised.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: has no config.json; expected a checkpoint folder as save_pretrained writes it"
        )
    _check_link(path, folder)
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder}: is an adapter (it has adapter_config.json); merge it into its base model first"
        )
    config = read_json(path)
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(
            f"{path}: model_type is {json.dumps(config.get('model_type'))}, expected a name such as "
            '"llama"; take config.json from the original checkpoint'
        )
    names = config.get("architectures") or []
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise CheckpointError(
            f"{path}: architectures is {json.dumps(names)[:80]}, expected names of model classes; "
            "take config.json from the original checkpoint"
        )
    if not isinstance(config.get("auto_map", {}), dict):
        raise CheckpointError(
            f"{path}: auto_map is {json.dumps(config['auto_map'])[:80]}, expected an object; "
            "take config.json from the original checkpoint"
        )
    for key in ("quantization_config", "compression_config"):
        if config.get(key) is not None:
            method = config[key].get("quant_method") if isinstance(config[key], dict) else None
            raise CheckpointError(
                f"{path}: the weights are quantised ({method or key}), packed rows are not heads; "
                "dequantize the checkpoint and remove the key, or take the unquantised original"
            )
    return config


def _check_parts(path: Path, config: dict[str, Any], tensors: dict[str, TensorEntry]) -> None:
    """Refuse a config that would have a model built of more parts than there can be."""
    rows = max((n for entry in tensors.values() for n in entry.shape), default=0)
    most = max(len(tensors), rows, _MAX_PARTS)
    for key, number in _numbers(config):
        if number > most and _PARTS.search(key) and not key.endswith("theta"):
            raise CheckpointError(
                f"{path}: {key} is {number}, the checkpoint has {len(tensors)} tensors of at most "
                f"{rows} rows; config and weights do not belong together, fetch both again"
            )


def _numbers(config: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield every number of a config, however deep, under its key."""
    pending: list[tuple[str, Any]] = [("", config)]
    while pending:
        key, content = pending.pop()
        if isinstance(content, dict):
            pending += content.items()
        elif isinstance(content, list):
            pending += ((key, each) for each in content)
        elif isinstance(content, int | float):
            yield key, content


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from `path`.

    Raises:
        CheckpointError: If it is not readable UTF-8 JSON, not an object, or names a key twice.
    """
    with _reading(path):
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: is too large to be JSON; fetch the file again")
        data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
        content = json.loads(text, object_pairs_hook=_unique_keys)
        json.dumps(content, ensure_ascii=False).encode()  # a lone surrogate could not be written
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: is not valid JSON ({one_line(error)}); fetch the file again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: holds a {type(content).__name__}, expected a JSON object; fetch it again"
        )
    return content


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Read and check the header of a safetensors file.

    Returns:
        The tensors by name, in the order of their data.

    Raises:
        CheckpointError: If the file is truncated, is no safetensors file (a Git LFS pointer, a web
            page), or its header contradicts itself or the file's size.
    """
    with _reading(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        (length,) = struct.unpack("<Q", start.ljust(8, b"\xff"))
        if length > min(size - 8, _MAX_HEADER_BYTES):
            # Asked only now: the length of a good header may well begin with the byte of a "<".
            if (disguise := _disguise(start + file.read(64))) is not None:
                raise CheckpointError(f"{path}: {disguise}")
            if len(start) < 8:
                raise CheckpointError(f"{path}: is truncated ({size} bytes); fetch the file again")
            raise CheckpointError(
                f"{path}: is truncated or no safetensors file (a header of {length} bytes in a file "
                f"of {size}); fetch the file again"
            )
        file.seek(8)
        header_bytes = file.read(length)
    try:
        header = json.loads(header_bytes, object_pairs_hook=_unique_keys)
        if not isinstance(header, dict):
            raise ValueError("the header is not an object")
        header.pop("__metadata__", None)
        spans = [
            (_header_entry(path, 8 + length, *item), item[1]["data_offsets"])
            for item in header.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: its safetensors header is malformed ({one_line(error)}); fetch the file again"
        ) from error
    spans.sort(key=lambda span: (span[1][0], span[1][1]))
    position = 0
    for entry, (begin, end) in spans:
        if begin != position:
            raise CheckpointError(
                f"{path}: tensor {entry.name} starts at byte {begin} of the data, expected {position} "
                "(tensors overlap or leave a hole); fetch the file again"
            )
        position = end
    if 8 + length + position != size:
        raise CheckpointError(
            f"{path}: is {size} bytes long, its header says {8 + length + position}; "
            "the file is truncated or has trailing bytes, fetch it again"
        )
    return {entry.name: entry for entry, _ in spans}


def _header_entry(path: Path, base: int, name: str, value: dict[str, Any]) -> TensorEntry:
    dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
    if dtype not in DTYPES:
        raise ValueError(f"tensor {name} has the unknown dtype {dtype!r}")
    if len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"tensor {name} has {len(shape)} dimensions")
    if not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end)):
        raise ValueError(f"tensor {name} has a size that is not a natural number")
    entry = TensorEntry(name, dtype, tuple(shape), path, base + begin)
    if end - begin != entry.nbytes:
        raise ValueError(f"tensor {name} spans {end - begin} bytes, its shape needs {entry.nbytes}")
    return entry


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """Find the weight files, in transformers' order of preference, and what an index says of each."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        single, index = folder / stem, folder / f"{stem}.index.json"
        if single.is_file():
            _check_link(single, folder)
            return {single: None}
        if index.is_file():
            _check_link(index, folder)
            return _read_index(index, folder)
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
            or "\0" in shard
        ):
            raise CheckpointError(
                f"{path}: puts tensor {tensor} in {json.dumps(shard)}, outside the folder; "
                "expected the plain name of a file beside the index"
            )
        if not shard.endswith(suffix):
            raise CheckpointError(
                f"{path}: puts tensor {tensor} in {shard}, expected a name that ends in {suffix}; "
                "fetch the file again"
            )
        names.setdefault(shard, set()).add(tensor)
    for shard in sorted(names):
        if not (folder / shard).is_file():
            raise CheckpointError(
                f"{folder / shard}: is missing, {path.name} names it for {len(names[shard])} tensors; "
                "fetch the missing shard"
            )
        _check_link(folder / shard, folder)
        shards[folder / shard] = names[shard]
    return shards


def _compare_with_index(path: Path, indexed: set[str], entries: dict[str, TensorEntry]) -> None:
    for missing in sorted(indexed - entries.keys()):
        raise CheckpointError(
            f"{path}: does not hold tensor {missing}, which the index puts there; "
            "index and shards are of different versions, fetch both again"
        )
    for extra in sorted(entries.keys() - indexed):
        raise CheckpointError(
            f"{path}: holds tensor {extra}, which the index does not name; "
            "index and shards are of different versions, fetch both again"
        )


def _check_link(path: Path, folder: Path) -> None:
    """Let a link lead only within the folder or to the hub cache's own blobs."""
    if not path.is_symlink():
        return
    real, home = path.resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs"
    is_cached = home.parent.name == "snapshots" and real.is_relative_to(blobs)
    if not (real.is_relative_to(home) or is_cached):
        raise CheckpointError(
            f"{path}: is a link that leads out of the folder; replace it by the file itself"
        )


def _load_bin(path: Path) -> dict[str, torch.Tensor]:
    """Load one pickled shard, tensors only, memory-mapped."""
    with path.open("rb") as file:
        if (disguise := _disguise(file.read(72))) is not None:
            raise CheckpointError(f"{path}: {disguise}")
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the older, unzipped format cannot be memory-mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: cannot be loaded as plain tensors: it holds other Python objects, which might "
            "execute code; take a safetensors version of the checkpoint"
        ) from error
    except Exception as error:  # torch documents no closed set of errors for malformed files
        raise CheckpointError(
            f"{path}: cannot be loaded as plain tensors ({one_line(error)}); "
            "fetch the file again, or take a safetensors version of the checkpoint"
        ) from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()
    ):
        raise CheckpointError(f"{path}: holds more than named tensors; expected a state dict")
    return dict(content)


def _read_bin_entries(path: Path) -> dict[str, TensorEntry]:
    entries = {}
    for name, tensor in _load_bin(path).items():
        if tensor.dtype not in DTYPE_NAMES or tensor.layout != torch.strided or tensor.is_meta:
            raise CheckpointError(
                f"{path}: tensor {name} is a {tensor.dtype} {tensor.layout} tensor on {tensor.device}, which "
                "safetensors cannot hold; take a safetensors version of the checkpoint"
            )
        entries[name] = TensorEntry(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), path, 0)
    return entries


def _disguise(start: bytes) -> str | None:
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights; run `git lfs pull` in the folder"
    if start.lstrip()[:1] == b"<":
        return "is a web page, not the weights; download the file itself"
    return None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result
