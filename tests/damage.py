"""Ways in which a checkpoint can be bad, and how the command line is asked what it says of it."""

import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from click.testing import CliRunner, Result
from tiny import save, tiny_config, tiny_model

from uptrain.cli import main

TO_2 = ("--num-key-value-heads", "2")


K_PROJ = "model.layers.0.self_attn.k_proj.weight"


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def edit_config(**changes: Any) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def config_of(model_type: str, **overrides: Any) -> Callable[[Path], object]:
    def replace(folder: Path) -> None:
        config = tiny_config(model_type, **overrides).to_dict() | {"model_type": model_type}
        (folder / "config.json").write_text(json.dumps(config))

    return replace


def become(model_type: str) -> Callable[[Path], object]:
    return lambda folder: save(tiny_model(tiny_config(model_type)), folder)


def text(name: str, content: str | bytes) -> Callable[[Path], object]:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(data)


def edit_header(edit: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    def rewrite(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = edit(data[8 : 8 + length])
        path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])

    return rewrite


def edit_state(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def rewrite(folder: Path) -> None:
        path = folder / "model.safetensors"
        state = safetensors.torch.load_file(path)
        edit(state)
        safetensors.torch.save_file(state, path, {"format": "pt"})

    return rewrite


def resize(change: int) -> Callable[[Path], object]:
    def rewrite(folder: Path) -> None:
        path = folder / "model.safetensors"
        os.truncate(path, path.stat().st_size + change)

    return rewrite


def overlap(header: bytes) -> bytes:
    content = json.loads(header)
    spans = sorted(v["data_offsets"] for k, v in content.items() if k != "__metadata__")
    for value in content.values():
        if value.get("data_offsets") == spans[1]:
            value["data_offsets"] = [spans[1][0] - 8, spans[1][1] - 8]
    return json.dumps(content).encode()


def shard(edit: Callable[[Path, dict[str, str]], object]) -> Callable[[Path], object]:
    """Split the weights in two, then damage the folder or the index's weight_map."""

    def split(folder: Path) -> None:
        single = folder / "model.safetensors"
        state = safetensors.torch.load_file(single)
        single.unlink()
        home = {name: f"model-{1 + ('layers.1' in name)}.safetensors" for name in state}
        for path in set(home.values()):
            part = {name: tensor for name, tensor in state.items() if home[name] == path}
            safetensors.torch.save_file(part, folder / path)
        edit(folder, home)
        index = {"metadata": {}, "weight_map": home}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return split


def then(*damages: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: [damage(folder) for damage in damages]


def as_shards(folder: Path) -> None:
    shard(lambda folder, home: None)(folder)


def edit_entry(**changes: Any) -> Callable[[Path], object]:
    """Let the header say something else of one tensor."""

    def edit(header: bytes) -> bytes:
        content = json.loads(header)
        content[K_PROJ] |= changes
        return json.dumps(content).encode()

    return edit_header(edit)


def as_bin(content: Any = None, **options: Any) -> Callable[[Path], object]:
    """Pickle the weights, or something else in their place."""

    def rewrite(folder: Path) -> None:
        single = folder / "model.safetensors"
        state = safetensors.torch.load_file(single) if content is None else content
        single.unlink()
        torch.save(state, folder / "pytorch_model.bin", **options)

    return rewrite


def pack(folder: Path) -> None:
    """Compress a pickle, which torch does not do."""
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as plain:
        members = {member.filename: plain.read(member) for member in plain.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in members.items():
            packed.writestr(name, data)


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (self.path,)


def evil_bin(folder: Path) -> None:
    as_bin({"a": torch.ones(1), "b": Evil(str(folder.parent / "executed"))})(folder)


def sparse(name: str, nbytes: int, start: bytes = b"") -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(start)
        os.truncate(folder / name, nbytes)

    return write


def link_out(name: str) -> Callable[[Path], object]:
    def move(folder: Path) -> None:
        # Into the test's own folder, which a conversion must leave as it was.
        (folder / name).rename(folder.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent / "elsewhere")

    return move


Damage = Callable[[Path], object]


def assert_one_line(result: Result, file: Path, finding: str, code: int = 1) -> None:
    """One printable line that names the file, the finding and the way out; no traceback."""
    assert result.exit_code == code
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    line = result.stderr.removesuffix("\n")
    assert line.startswith("uptrain: ")
    assert line.isprintable(), line
    assert finding in line
    assert "unexpected" not in line
    assert str(file) in line
    # A family that cannot be converted leaves no way out.
    assert ";" in line or "cannot be converted" in line


def listing(folder: Path) -> dict[str, Any]:
    """Give the content of all files below a folder, the size of large ones; None for what is no file."""

    def content(path: Path) -> Any:
        size = path.stat().st_size
        return path.read_bytes() if size < 2**24 else size

    return {
        str(path.relative_to(folder)): content(path) if path.is_file() else None
        for path in folder.rglob("*")
    }
