"""How long a conversion takes beside copying the same files, and how much memory.

    python benchmarks/convert_speed.py [--gib 2.4] [--folder DIR] [--rounds 3] [--json PATH]

Makes a synthetic Llama checkpoint in a temporary folder, once in one shard and once in 16, and for
each measures, in turns and each in a fresh process:

* copying its files and syncing the copies,
* `uptrain.convert` to 8 KV heads, in the same number of shards,
* once, what one would write by hand: load with transformers, average the heads, save, sync.

Imports and the first build of the model class on the meta device take the same time whatever the
size of the checkpoint: a conversion of a tiny one of the same class goes first, and both are shown
apart. The page cache is as warm for one as for the other. Peak memory is the process's ru_maxrss,
mapped pages included.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# This process stays small and imports no torch: a child begins with its parent's ru_maxrss.

HEADS, TARGET_HEADS, HEAD_DIM, INTERMEDIATE, VOCABULARY = 32, 8, 64, 5504, 32000
HIDDEN = HEADS * HEAD_DIM
TINY = {"heads": 8, "layers": 2, "vocabulary": 64, "intermediate": 32}
MAX_RATIO, MAX_GIB = 1.5, 1.2


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gib", type=float, default=2.4, help="size of the checkpoint")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each; the median counts")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        task, *arguments = options.child
        print(json.dumps(CHILDREN[task](*arguments)))
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="convert-speed-") as folder:
        results = [measure(Path(folder), options.gib, n, options.rounds) for n in (1, 16)]
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "gib": options.gib}
    if options.json:
        options.json.write_text(json.dumps({**machine, "results": results}, indent=2) + "\n")
    show(results)
    ok = all(r["ratio"] <= MAX_RATIO and r["peak_gib"] <= MAX_GIB for r in results)
    print(
        f"\ngoal: at most {MAX_RATIO} × copying and {MAX_GIB} GiB: {'reached' if ok else 'MISSED'}"
    )
    return 0 if ok else 1


def measure(folder: Path, gib: float, shards: int, rounds: int) -> dict[str, Any]:
    """Measure one layout of the checkpoint; returns seconds (medians) and GiB."""
    source, target, tiny = folder / "source", folder / "target", folder / "tiny"
    shutil.rmtree(source, ignore_errors=True)
    made = child("make", source, gib, shards)
    if not tiny.exists():
        child("make-tiny", tiny)
    copies, conversions = [], []
    for _ in range(rounds):
        copies.append(child("copy", source, target)["seconds"])
        discard(target)
        conversions.append(child("convert", source, target, tiny, made["shard_bytes"]))
        discard(target)
    by_hand = child("by-hand", source, target, made["shard_bytes"])
    discard(target)
    seconds = statistics.median(run["seconds"] for run in conversions)
    return {
        "shards": made["shards"],
        "gib": made["gib"],
        "copy_seconds": statistics.median(copies),
        "convert_seconds": seconds,
        "ratio": seconds / statistics.median(copies),
        "peak_gib": max(run["peak_gib"] for run in conversions),
        "import_seconds": statistics.median(run["import_seconds"] for run in conversions),
        "first_build_seconds": statistics.median(run["first_seconds"] for run in conversions),
        "by_hand_seconds": by_hand["seconds"],
        "by_hand_peak_gib": by_hand["peak_gib"],
        "all_copy_seconds": copies,
        "all_convert_seconds": [run["seconds"] for run in conversions],
    }


def show(results: list[dict[str, Any]]) -> None:
    print(
        f"{'':34}"
        + "".join(
            f"{r['shards']:>5} shard{'s' if r['shards'] > 1 else ''}".rjust(11) for r in results
        )
    )
    for label, key, form in (
        ("checkpoint, GiB", "gib", "{:.2f}"),
        ("copy and sync, s", "copy_seconds", "{:.2f}"),
        ("uptrain convert, s", "convert_seconds", "{:.2f}"),
        ("  ratio to copying", "ratio", "{:.2f}"),
        ("  peak memory, GiB", "peak_gib", "{:.2f}"),
        ("  imports, apart, s", "import_seconds", "{:.2f}"),
        ("  first meta build, apart, s", "first_build_seconds", "{:.2f}"),
        ("by hand with transformers, s", "by_hand_seconds", "{:.2f}"),
        ("  peak memory, GiB", "by_hand_peak_gib", "{:.2f}"),
    ):
        print(f"{label:<34}" + "".join(f"{form.format(r[key]):>11}" for r in results))


def child(task: str, *arguments: object) -> dict[str, Any]:
    """Run one of CHILDREN in a process of its own."""
    os.sync()  # nobody pays for what another one left to be written
    command = [sys.executable, __file__, "--child", task, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{task} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def discard(folder: Path) -> None:
    shutil.rmtree(folder)


def make(folder: str, gib: str, shards: str) -> dict[str, Any]:
    """Write a checkpoint of about `gib` GiB in `shards` shards; no model is built."""
    from uptrain.checkpoint.writer import TensorSpec

    layer = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE + 2 * HIDDEN
    layers = round((float(gib) * 2**29 - 2 * VOCABULARY * HIDDEN) / layer)
    specs = [
        TensorSpec(name, "BF16", shape)
        for name, shape in llama_shapes(HEADS, layers, VOCABULARY, INTERMEDIATE)
    ]
    total = sum(spec.nbytes for spec in specs)
    shard_bytes = -(-total // int(shards))
    while count_shards([spec.nbytes for spec in specs], shard_bytes) > int(shards):
        shard_bytes += total // 1000
    return write(Path(folder), specs, HEADS, layers, VOCABULARY, INTERMEDIATE, shard_bytes)


def make_tiny(folder: str) -> dict[str, Any]:
    from uptrain.checkpoint.writer import TensorSpec

    specs = [TensorSpec(name, "BF16", shape) for name, shape in llama_shapes(**TINY)]
    return write(Path(folder), specs, **TINY, shard_bytes=10**9)


def llama_shapes(
    heads: int, layers: int, vocabulary: int, intermediate: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden = heads * HEAD_DIM
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for i in range(layers):
        for projection in "qkvo":
            yield f"model.layers.{i}.self_attn.{projection}_proj.weight", (hidden, hidden)
        yield f"model.layers.{i}.mlp.gate_proj.weight", (intermediate, hidden)
        yield f"model.layers.{i}.mlp.up_proj.weight", (intermediate, hidden)
        yield f"model.layers.{i}.mlp.down_proj.weight", (hidden, intermediate)
        yield f"model.layers.{i}.input_layernorm.weight", (hidden,)
        yield f"model.layers.{i}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def count_shards(sizes: list[int], shard_bytes: int) -> int:
    shards, filled = 1, 0
    for size in sizes:
        if filled and filled + size > shard_bytes:
            shards, filled = shards + 1, 0
        filled += size
    return shards


def write(
    folder: Path,
    specs: list[Any],
    heads: int,
    layers: int,
    vocabulary: int,
    intermediate: int,
    shard_bytes: int,
) -> dict[str, Any]:
    import torch

    from uptrain.checkpoint.staging import write_json
    from uptrain.checkpoint.writer import write_tensors

    torch.manual_seed(0)
    noise: Any = (torch.randn(2**24) * 0.02).to(torch.bfloat16).view(torch.uint8).numpy()

    def data(spec: Any) -> Iterator[memoryview]:
        left = spec.nbytes
        while left:
            chunk = memoryview(noise[: min(left, len(noise))])
            left -= len(chunk)
            yield chunk

    folder.mkdir()
    files = write_tensors(folder, specs, data, shard_bytes)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": heads * HEAD_DIM,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }
    write_json(folder / "config.json", config)
    nbytes = sum(spec.nbytes for spec in specs)
    shards = sum(name.endswith(".safetensors") for name in files)
    return {"gib": nbytes / 2**30, "shards": shards, "shard_bytes": shard_bytes}


def copy(source: str, target: str) -> dict[str, Any]:
    begun = time.perf_counter()
    Path(target).mkdir()
    for path in sorted(Path(source).iterdir()):
        shutil.copyfile(path, Path(target) / path.name)
        sync(Path(target) / path.name)
    sync(Path(target))
    return {"seconds": time.perf_counter() - begun}


def convert(source: str, target: str, tiny: str, shard_bytes: str) -> dict[str, Any]:
    begun = time.perf_counter()
    from uptrain.conversion.convert import convert as uptrain_convert

    imported = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        uptrain_convert(tiny, Path(folder) / "target", 2)
    warm = time.perf_counter()
    uptrain_convert(source, target, TARGET_HEADS, max_shard_bytes=int(shard_bytes))
    done = time.perf_counter()
    return {
        "import_seconds": imported - begun,
        "first_seconds": warm - imported,
        "seconds": done - warm,
        "peak_gib": peak_gib(),
    }


def by_hand(source: str, target: str, shard_bytes: str) -> dict[str, Any]:
    """Convert as one would without a tool; imports not counted either."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **_TINY_LLAMA))
    begun = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    state = model.state_dict()
    for name, weight in state.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            grouped = weight.view(TARGET_HEADS, HEADS // TARGET_HEADS, HEAD_DIM, HIDDEN)
            state[name] = grouped.float().mean(1).to(weight.dtype).reshape(-1, HIDDEN)
    config = model.config
    config.num_key_value_heads = TARGET_HEADS
    with torch.device("meta"):
        converted = AutoModelForCausalLM.from_config(config)
    converted.load_state_dict(state, assign=True)
    converted.save_pretrained(target, max_shard_size=int(shard_bytes))
    for path in Path(target).iterdir():
        sync(path)
    return {"seconds": time.perf_counter() - begun, "peak_gib": peak_gib()}


_TINY_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
}


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


CHILDREN: dict[str, Callable[..., dict[str, Any]]] = {
    "make": make,
    "make-tiny": make_tiny,
    "copy": copy,
    "convert": convert,
    "by-hand": by_hand,
}

if __name__ == "__main__":
    sys.exit(main())
