"""How long a calibrated conversion takes, by step, and how much memory.

    python benchmarks/calibrate_speed.py --calibration TEXT --tokenizer CHECKPOINT [--layers 32]

Makes a synthetic Llama checkpoint of the 7B shape (random weights, the tokenizer of another checkpoint)
in a temporary folder and converts it from 32 to 8 KV heads with the full settings. With fewer layers
than 32 the whole time is estimated from those. Needs a GPU for anything but patience.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch

import uptrain
from uptrain.checkpoint.staging import write_json
from uptrain.checkpoint.tensors import tensor_chunks
from uptrain.checkpoint.writer import TensorSpec, write_tensors
from uptrain.conversion import repair, walk
from uptrain.conversion.residual import ResidualStreams
from uptrain.conversion.stream import LayerStream

HEADS, HEAD_DIM, INTERMEDIATE, ALL_LAYERS = 32, 128, 11008, 32
HIDDEN = HEADS * HEAD_DIM


def make_checkpoint(folder: Path, tokenizer: Path, layers: int) -> None:
    folder.mkdir()
    config = json.loads((tokenizer / "config.json").read_text())
    config |= {
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 2048,
        "dtype": "bfloat16",
    }
    write_json(folder / "config.json", config)
    for path in tokenizer.glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], HIDDEN)
    }
    for index in range(layers):
        layer = f"model.layers.{index}"
        shapes |= {f"{layer}.self_attn.{p}_proj.weight": (HIDDEN, HIDDEN) for p in "qkvo"}
        shapes |= {f"{layer}.mlp.{p}_proj.weight": (INTERMEDIATE, HIDDEN) for p in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        shapes |= {
            f"{layer}.{norm}.weight": (HIDDEN,)
            for norm in ("input_layernorm", "post_attention_layernorm")
        }
    shapes["model.norm.weight"] = (HIDDEN,)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def data(spec: TensorSpec) -> Any:
        if len(spec.shape) == 1:
            return tensor_chunks(torch.ones(spec.shape, dtype=torch.bfloat16))
        weights = torch.randn(spec.shape, device=device) * spec.shape[-1] ** -0.5
        return tensor_chunks(weights.bfloat16())

    write_tensors(folder, [TensorSpec(n, "BF16", s) for n, s in shapes.items()], data)


def timed(owner: Any, name: str, label: str, seconds: dict[str, float]) -> None:
    """Count the seconds that go into a function, inner timed ones apart."""
    function: Callable[..., Any] = getattr(owner, name)

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        before = sum(seconds.values())
        begun = time.perf_counter()
        result = function(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds[label] += time.perf_counter() - begun - (sum(seconds.values()) - before)
        return result

    setattr(owner, name, wrapper)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=ALL_LAYERS)
    options = parser.parse_args()
    seconds: dict[str, float] = defaultdict(float)
    timed(LayerStream, "layer", "load a layer", seconds)
    timed(walk, "find_freedom", "probe its freedom", seconds)
    timed(walk, "merge_heads", "group and factorize", seconds)
    timed(repair, "refit_output", "refit", seconds)
    timed(repair, "fit_layer", "reconstruct", seconds)
    timed(ResidualStreams, "map", "run both models", seconds)
    timed(ResidualStreams, "error", "measure errors", seconds)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_checkpoint(folder / "source", options.tokenizer, options.layers)
        begun = time.perf_counter()
        uptrain.convert(folder / "source", folder / "target", 8, calibration=options.calibration)
        total = time.perf_counter() - begun
    seconds["all else"] = total - sum(seconds.values())
    print(f"{'step':<22}{'seconds':>9}{'of all':>9}")
    for label, value in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"{label:<22}{value:>9.1f}{value / total:>9.1%}")
    print(f"{'in all':<22}{total:>9.1f}")
    if options.layers < ALL_LAYERS:
        scaled = total / options.layers * ALL_LAYERS
        print(f"{ALL_LAYERS} layers, estimated {scaled:>7.0f} s from {options.layers}")
    if torch.cuda.is_available():
        print(f"device memory, most   {torch.cuda.max_memory_allocated() / 2**30:>9.2f} GiB")


if __name__ == "__main__":
    main()
