"""Very large checkpoints: many tensors, many shards, many bytes, in bounded memory and time."""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import pytest
from faults import note

ROOT = Path(__file__).parents[1]
GIB = 2**30

CONVERT = """
import json, sys, time
from pathlib import Path
from uptrain import convert
begun = time.monotonic()
convert(sys.argv[1], sys.argv[2], 1, max_shard_bytes=int(sys.argv[3]))
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(json.dumps({
    "seconds": time.monotonic() - begun,
    "cpu_seconds": time.process_time(),
    "peak_bytes": int(status["VmHWM"].split()[0]) * 1024,  # mapped pages included
}))
"""


def llama(**changes: Any) -> dict[str, Any]:
    settings = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16",
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 4, "head_dim": 4, "tie_word_embeddings": False,
    } | changes  # fmt: skip
    return settings | {"num_key_value_heads": settings["num_attention_heads"]}


def shapes(config: dict[str, Any]) -> Iterator[tuple[str, list[int]]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    rows = config["num_attention_heads"] * config["head_dim"]
    yield "model.embed_tokens.weight", [config["vocab_size"], hidden]
    for layer in range(config["num_hidden_layers"]):
        base = f"model.layers.{layer}"
        yield f"{base}.input_layernorm.weight", [hidden]
        yield f"{base}.post_attention_layernorm.weight", [hidden]
        for name in ("q", "k", "v"):
            yield f"{base}.self_attn.{name}_proj.weight", [rows, hidden]
        yield f"{base}.self_attn.o_proj.weight", [hidden, rows]
        yield f"{base}.mlp.gate_proj.weight", [inner, hidden]
        yield f"{base}.mlp.up_proj.weight", [inner, hidden]
        yield f"{base}.mlp.down_proj.weight", [hidden, inner]
    yield "model.norm.weight", [hidden]
    yield "lm_head.weight", [config["vocab_size"], hidden]


def make_sparse(folder: Path, config: dict[str, Any], shards: int) -> int:
    """Make a checkpoint of zeros, which take no room on the disk; gives the bytes of its tensors."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = list(shapes(config))
    weight_map, total = {}, 0
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        header, end = {}, 0
        for tensor, shape in tensors[number::shards]:
            begin, end = end, end + 2 * prod(shape)
            header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
            weight_map[tensor] = name
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
        total += end
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def convert_apart(folder: Path, shard_bytes: int) -> dict[str, Any]:
    """Convert in a process of its own; gives its times and its largest memory."""
    done = subprocess.run(
        [sys.executable, "-c", CONVERT, folder / "source", folder / "target", str(shard_bytes)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout)


def tensors_of(folder: Path) -> int:
    return len(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"])


@pytest.mark.slow
def test_ten_thousand_tensors_in_two_hundred_shards(tmp_path: Path) -> None:
    config = llama(num_hidden_layers=1112)
    total = make_sparse(tmp_path / "source", config, shards=200)
    found = convert_apart(tmp_path, shard_bytes=total // 250)
    assert tensors_of(tmp_path / "target") == tensors_of(tmp_path / "source") > 10_000
    assert len([*(tmp_path / "target").glob("*.safetensors")]) > 190
    assert found["peak_bytes"] < GIB
    assert found["cpu_seconds"] < 120
    note(fault="load", operation="10,011 tensors in 200 shards", points=1, outcomes=found)


# Half of it is keys and values, of which the target has next to none; what it has is written in full.
WIDE = {"hidden_size": 8192, "num_attention_heads": 64, "head_dim": 144}


@pytest.mark.slow
def test_fifty_gigabytes_in_bounded_memory(tmp_path: Path) -> None:
    layer_bytes = 4 * 2 * 8192 * 64 * 144
    room = shutil.disk_usage(tmp_path).free - 20 * GIB  # others use the disk, too
    layers = min(83, room // (layer_bytes // 2 + 2**24))
    if layers < 2:
        pytest.skip("needs a disk with more than 20 GiB free")
    total = make_sparse(tmp_path / "source", llama(num_hidden_layers=layers, **WIDE), shards=layers)
    found = convert_apart(tmp_path, shard_bytes=5 * 10**9)
    shutil.rmtree(tmp_path / "target")
    assert found["peak_bytes"] < 2 * GIB
    note(fault="load", operation=f"{total / 1e9:.1f} GB, sparse", points=1, outcomes=found)
