"""Reading checkpoints: what is found, in which order, and what is refused before a byte is used."""

import io
import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from uptrain.checkpoint import files
from uptrain.checkpoint.reader import Checkpoint, open_checkpoint
from uptrain.checkpoint.tensors import DTYPES, read_header
from uptrain.errors import CheckpointError

CONFIG = {"model_type": "llama"}


def header_file(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(begin: int, end: int, dtype: Any = "U8", shape: Any = None) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [end - begin] if shape is None else shape,
        "data_offsets": [begin, end],
    }


def checkpoint(folder: Path, **files: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    safetensors.torch.save_file({"a": torch.arange(4.0)}, folder / "model.safetensors")
    for name, content in files.items():
        (folder / name).write_text(content)
    return folder


def bin_checkpoint(folder: Path, shards: dict[str, Any], **options: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name, content in shards.items():
        torch.save(content, folder / name, **options)
    return folder


def raw(source: Checkpoint, name: str) -> bytes:
    return b"".join(source.chunks(name))


def every_dtype() -> dict[str, torch.Tensor]:
    return {name: torch.ones(3, 2).to(dtype) for name, dtype in DTYPES.items()}


def test_safetensors_are_read_as_the_library_reads_them(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "source")
    state = every_dtype() | {"scalar": torch.tensor(2.0), "empty": torch.ones(0, 3)}
    safetensors.torch.save_file(state, folder / "model.safetensors")
    source = open_checkpoint(folder)
    assert source.tensors.keys() == state.keys()
    assert source.nbytes == sum(tensor.nbytes for tensor in state.values())
    for name, tensor in state.items():
        found = source.read(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert raw(source, name) == bytes(tensor.reshape(-1).view(torch.uint8).tolist())


def test_tensors_come_in_the_order_of_their_data(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt"}, "late": entry(2, 3), "early": entry(0, 2)}
    assert list(read_header(header_file(tmp_path / "x", header, b"abc"))) == ["early", "late"]


@pytest.mark.parametrize("length", [60, 0x3C20])
def test_a_header_length_that_looks_like_html_is_no_web_page(length: int, tmp_path: Path) -> None:
    text = json.dumps({"a": entry(0, 1)}).encode()
    path = header_file(
        tmp_path / "x", text.ljust(length), b"x"
    )  # the length's bytes are " <" or "<"
    assert list(read_header(path)) == ["a"]


def test_large_tensors_come_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", 6)
    source = open_checkpoint(checkpoint(tmp_path / "source"))
    assert [len(chunk) for chunk in source.chunks("a")] == [6, 6, 4]
    assert torch.equal(source.read("a"), torch.arange(4.0))


def test_chunks_are_full_even_where_a_read_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_checkpoint(checkpoint(tmp_path / "source"))

    class Trickle(io.FileIO):
        """What a network disk may do: give less than was asked for."""

        def read(self, size: int = -1) -> bytes:
            return super().read(min(size, 3))

        def readinto(self, buffer: Any) -> int:
            return super().readinto(memoryview(buffer)[:3])

    monkeypatch.setattr(files, "CHUNK_BYTES", 6)
    monkeypatch.setattr(
        Path,
        "open",
        lambda path, mode, buffering=-1: (
            io.BufferedReader(Trickle(path)) if buffering else Trickle(path)
        ),
    )
    assert [len(chunk) for chunk in source.chunks("a")] == [6, 6, 4]


def test_a_file_that_shrinks_while_read_is_noticed(tmp_path: Path) -> None:
    source = open_checkpoint(checkpoint(tmp_path / "source"))
    path = tmp_path / "source" / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: ended while tensor a was being"
    ):
        source.read("a")


HEADERS: dict[str, tuple[Any, bytes, str]] = {
    "overlap": ({"a": entry(0, 4), "b": entry(2, 6)}, b"x" * 6, "tensors overlap or leave a hole"),
    "hole": ({"a": entry(0, 2), "b": entry(3, 4)}, b"x" * 4, "tensors overlap or leave a hole"),
    "late start": ({"a": entry(1, 2)}, b"xx", "starts at byte 1 of the data, expected 0"),
    "truncated": ({"a": entry(0, 4)}, b"xxx", "the file is truncated or has trailing bytes"),
    "trailing": ({"a": entry(0, 4)}, b"x" * 5, "the file is truncated or has trailing bytes"),
    "twice": (b'{"a":{},"a":{}}', b"", "a key occurs twice"),
    "size lies": ({"a": entry(0, 4, shape=[5])}, b"x" * 4, "spans 4 bytes, its shape needs 5"),
    "backwards": ({"a": entry(4, 0)}, b"x" * 4, "malformed"),
    "negative": ({"a": entry(0, 4, shape=[-2, -2])}, b"x" * 4, "not a natural number"),
    "boolean": ({"a": entry(0, 1, shape=[True])}, b"x", "not a natural number"),
    "fraction": ({"a": entry(0, 1, shape=[1.0])}, b"x", "not a natural number"),
    "minus zero": (
        b'{"a":{"dtype":"U8","shape":[],"data_offsets":[-0,1]}}',
        b"x",
        "not a natural number",
    ),
    "huge": ({"a": entry(0, 2**64)}, b"", "not a natural number"),
    "dtype": ({"a": entry(0, 4, "F4")}, b"x" * 4, "unknown dtype 'F4'"),
    "dtype list": ({"a": entry(0, 4, ["F32"])}, b"x" * 4, "malformed"),
    "no offsets": ({"a": {"dtype": "U8", "shape": []}}, b"", "malformed"),
    "list": ([], b"", "the header is not an object"),
    "entry": ({"a": 3}, b"", "malformed"),
    "not JSON": (b"{", b"", "malformed"),
    "not UTF-8": (b'{"\xff":1}', b"", "malformed"),
    "deep": (b"[" * 200_000, b"", "malformed"),
    "empty": (b"", b"", "malformed"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_contradicts_itself_is_refused(case: str, tmp_path: Path) -> None:
    header, data, message = HEADERS[case]
    path = header_file(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match="fetch") as caught:
        read_header(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_a_shape_of_many_dimensions_costs_no_time(tmp_path: Path) -> None:
    header = {"a": entry(0, 0, shape=[2**62] * 20_000)}
    begun = time.process_time()
    with pytest.raises(CheckpointError, match="header is malformed"):
        read_header(header_file(tmp_path / "model.safetensors", header))
    assert time.process_time() - begun < 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is truncated (0 bytes)"),
        (b"1234567", "is truncated (7 bytes)"),
        (struct.pack("<Q", 2**63) + b"{}", f"a header of {2**63} bytes in a file of 10"),
        (struct.pack("<Q", 3) + b"{}", "a header of 3 bytes in a file of 10"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "is a Git LFS pointer"),
        (b"\n <!DOCTYPE html><html></html>", "is a web page, not the weights"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_a_header_of_more_than_100_mb_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_001))
    os.truncate(path, 8 + 100_000_001)  # sparse
    with pytest.raises(CheckpointError, match="a header of 100000001 bytes"):
        read_header(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_bin_shards_are_read(tmp_path: Path, zipped: bool) -> None:
    first = {
        "half": torch.ones(2, dtype=torch.bfloat16),
        "transposed": torch.arange(6.0).reshape(2, 3).t(),
        "expanded": torch.ones(1).expand(4),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    second = {"empty": torch.ones(0, 2), "scalar": torch.tensor(3)}
    folder = bin_checkpoint(
        tmp_path / "source",
        {"a.bin": first, "b.bin": second},
        _use_new_zipfile_serialization=zipped,
    )
    weight_map = dict.fromkeys(first, "a.bin") | dict.fromkeys(second, "b.bin")
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    source = open_checkpoint(folder)
    for name, tensor in (first | second).items():
        assert torch.equal(source.read(name), tensor)
        assert raw(source, name) == bytes(
            tensor.contiguous().reshape(-1).view(torch.uint8).tolist()
        )


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path: Path, zipped: bool) -> None:
    content = {"a": torch.ones(2), "b": Evil(tmp_path / "executed")}
    folder = bin_checkpoint(
        tmp_path / "source",
        {"pytorch_model.bin": content},
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(CheckpointError, match=r"bin: cannot be loaded as plain tensors") as caught:
        open_checkpoint(folder)
    assert not (tmp_path / "executed").exists()
    # torch's own text advises to load it all the same; ours must not.
    assert "Re-running" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "holds more than named tensors; expected a state dict"),
        ({"a": torch.ones(2), "step": 3}, "holds more than named tensors; expected a state dict"),
        ({1: torch.ones(2)}, "holds more than named tensors; expected a state dict"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, "torch.complex128"),
        ({"a": torch.ones(2).to_sparse()}, "sparse"),
        ({"a": torch.ones(2, device="meta")}, "meta"),
        ({}, "its weight files hold no tensor"),
    ],
)
def test_a_bin_that_is_no_state_dict_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    folder = bin_checkpoint(tmp_path / "source", {"pytorch_model.bin": content})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert message in str(caught.value)


@pytest.mark.parametrize("length", [0, 10, 400])
def test_a_truncated_bin_is_refused(length: int, tmp_path: Path) -> None:
    folder = bin_checkpoint(tmp_path / "source", {"pytorch_model.bin": {"a": torch.ones(99)}})
    os.truncate(folder / "pytorch_model.bin", length)
    with pytest.raises(CheckpointError, match="fetch the file again"):
        open_checkpoint(folder)


def test_companions_are_the_files_that_are_no_weights(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "source", **{"tokenizer.json": "{}", "README.md": "", ".x": ""})
    (folder / "model-old.gguf").write_text("")
    (folder / "pytorch_model.bin").write_text("")
    source = open_checkpoint(folder)
    assert [path.name for path in source.companions] == ["tokenizer.json"]
    assert [path.name for path in source.left_out] == ["model-old.gguf", "pytorch_model.bin"]
    assert (source.name, source.revision) == ("source", None)


def test_chat_templates_in_their_folder_are_companions(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "source")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}")
    source = open_checkpoint(folder)
    assert [path.name for path in source.companions] == ["tool.jinja"]


def hub_cache(root: Path) -> Path:
    """Lay a checkpoint out as the hub's cache does: links to blobs."""
    plain = checkpoint(root / "plain", **{"tokenizer.json": "{}"})
    snapshot = root / "models--owner--name" / "snapshots" / "abc123"
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(plain.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    return snapshot


def test_a_snapshot_of_the_hub_cache_is_read(tmp_path: Path) -> None:
    source = open_checkpoint(hub_cache(tmp_path))
    assert source.revision == "abc123"
    assert [path.name for path in source.companions] == ["tokenizer.json"]
    assert torch.equal(source.read("a"), torch.arange(4.0))


def test_a_snapshot_is_called_by_its_hub_id(tmp_path: Path) -> None:
    assert open_checkpoint(hub_cache(tmp_path)).name == "owner/name"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("cached", [True, False], ids=["cache", "folder"])
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, name: str, cached: bool) -> None:
    folder = hub_cache(tmp_path) if cached else checkpoint(tmp_path / "s", **{"tokenizer.json": ""})
    secret = tmp_path / "secret"
    secret.write_bytes((folder / name).read_bytes())
    (folder / name).unlink()
    (folder / name).symlink_to(secret)
    with pytest.raises(CheckpointError, match="is a link that leads out of the folder") as caught:
        open_checkpoint(folder)
    assert str(caught.value).startswith(f"{folder / name}: ")


def test_a_link_within_the_folder_is_followed(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "source", **{"chat.json": "{}"})
    (folder / "tokenizer.json").symlink_to("chat.json")
    (tmp_path / "link").symlink_to(folder)
    assert len(open_checkpoint(tmp_path / "link").companions) == 2


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_link_to_nothing_is_refused(tmp_path: Path, name: str) -> None:
    folder = checkpoint(tmp_path / "source")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("blob-that-was-never-fetched")
    with pytest.raises(CheckpointError, match="is a link to a file that does not exist; fetch it"):
        open_checkpoint(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "source")
    both = {"a": torch.ones(1), "b": torch.ones(1)}
    (folder / "model.safetensors").unlink()
    safetensors.torch.save_file({"a": torch.ones(1)}, folder / "x.safetensors")
    safetensors.torch.save_file(both, folder / "y.safetensors")
    index = {"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"y\.safetensors: holds tensor a, which the index"):
        open_checkpoint(folder)


@pytest.mark.parametrize("content", [b"\xff\xfe{\x00}\x00", b'{"a": "\\ud800"}'])
def test_json_that_could_not_be_written_again_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json: is not valid JSON"):
        files.read_json(path)


def test_what_is_neither_folder_nor_within_reach_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "file").write_text("")
    for source, finding in {
        "nothing": "does not exist; expected a checkpoint folder or a hub id like owner/name",
        "file": "is a file; expected a checkpoint folder or a hub id like owner/name",
        "nobody/nothing-at-all": "no such folder, and not to be had from the Hugging Face hub",
    }.items():
        with pytest.raises(CheckpointError, match=f"^{source}: {finding}"):
            open_checkpoint(source)
