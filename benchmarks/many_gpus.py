r"""The loss curve on several GPUs beside that on one, and of a run that goes from several to one.

    python benchmarks/many_gpus.py [--devices 2] [--steps 24] [--shape 1b] [--set compile=true …]

Trains a random Llama of 1.12B parameters on `examples/books-train.jsonl` three times with the same
recipe: on one GPU, on several, and on several until it is told to stop halfway (SIGTERM) and from its
checkpoint on one. Prints the losses of all three by step, and by how much they differ from those of one
GPU at most. Same order of the same tokens; only sums are added in another order, in bfloat16. Needs the
GPUs and 60 GB of disk; `--shape tiny` on as many CPU processes shows that it runs.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from train_speed import SHAPES, Shape
from transformers import LlamaConfig, LlamaForCausalLM

EXAMPLES = Path(__file__).parents[1] / "examples"
VOCABULARY = 32_000  # of which the example's tokenizer uses 2,048


def make_source(folder: Path, shape: Shape) -> Path:
    kv_heads = shape.config["num_attention_heads"] // shape.query_per_kv_head
    config = LlamaConfig(**shape.config, vocab_size=VOCABULARY, num_key_value_heads=kv_heads)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLES / "books-1m" / name, folder)
    return folder


def losses_of(output: Path) -> list[float]:
    log = output / "train.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [row["loss"] for row in rows if "loss" in row]


def finetune(recipe: dict[str, Any], folder: Path, devices: int, stop_after: int | None) -> None:
    """Run it as a user does, until it ends or has done so many steps."""
    written, output = folder / "recipe.yaml", Path(recipe["output"])
    written.write_text(yaml.safe_dump(recipe))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={devices}"]
    launch = [sys.executable, *(torchrun if devices > 1 else []), "-m", "uptrain"]
    with subprocess.Popen([*launch, "finetune", str(written), "--resume"]) as process:
        while stop_after is not None and process.poll() is None:
            if len(losses_of(output)) >= stop_after:
                process.send_signal(signal.SIGTERM)
                break
            time.sleep(0.05)
    steps, done = recipe["train"]["steps"], len(losses_of(output))
    if done < (stop_after or steps) or (stop_after is not None and done == steps):
        wanted = "all of them" if stop_after is None else f"{stop_after} or a few more"
        raise SystemExit(f"{output.name} ended behind step {done} of {steps}, expected {wanted}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="train.KEY")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        recipe = {
            "source": str(make_source(folder / "source", shape)),
            "data": {
                "train": [str(EXAMPLES / "books-train.jsonl")],
                "tokens": str(folder / "tokens"),
                "repeat": True,
            },
            "train": {
                "steps": options.steps,
                "batch_tokens": shape.batch * shape.length * options.devices,
                "sequence_length": shape.length,
                "learning_rate": 1e-4,
                **{
                    key: yaml.safe_load(value)
                    for key, value in (each.split("=") for each in options.set)
                },
            },
        }
        curves: dict[str, list[float]] = {}
        several, half = options.devices, options.steps // 2
        for name, parts in {
            "one": [(1, None)],
            "several": [(several, None)],
            "several, then one": [(several, half), (1, None)],
        }.items():
            output = folder / name
            for devices, stop_after in parts:
                finetune(recipe | {"output": str(output)}, folder, devices, stop_after)
                print(f"{name}: {len(losses_of(output))} steps", flush=True)
            curves[name] = losses_of(output)
            shutil.rmtree(output)
    print(f"{'step':>5}" + "".join(f"{name:>20}" for name in curves))
    for step, row in enumerate(zip(*curves.values(), strict=True), 1):
        print(f"{step:>5}" + "".join(f"{loss:>20.5f}" for loss in row))
    for name in list(curves)[1:]:
        both = zip(curves[name], curves["one"], strict=True)
        most = max(abs(ours - theirs) / theirs for ours, theirs in both)
        print(f"{name}: loss within {most:.1e} of one GPU's at every step")


if __name__ == "__main__":
    main()
