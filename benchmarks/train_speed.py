r"""Training speed and memory against a plain loop, in one run.

    python benchmarks/train_speed.py [--vocabulary 32000] [--steps 12] [--only plain-ce ours-ce …]
    python benchmarks/train_speed.py --only ours-ce ours-kl --devices 2
    python benchmarks/train_speed.py --shape 7b --only ours-kl --set optimizer=adamw8bit \
        gradient_checkpointing=true

Makes a random Llama of 1.12B parameters (22 layers, 2048 wide, 32 query and 8 KV heads, MLP 5632) and a
teacher of the same shape with 32 KV heads, and trains for a few steps of 8 x 2048 tokens. The plain loop
is what one would write with transformers: `torch.compile`, bf16 autocast over float32 weights, fused
AdamW, clipped gradients, the teacher's logits whole; ours is uptrain's own step. Both hold float32
weights and moments and checkpoint no activations. Each variant has a process of its own; speed is the
median over the steps behind the first four. Several devices get as many tokens each. The shape of
Llama 2 7B gets one sequence of 4,096 tokens a step. Needs a GPU; `--shape tiny` shows that it runs.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from uptrain.training import processes
from uptrain.training.batches import read_ahead
from uptrain.training.optimizer import make_optimizer
from uptrain.training.options import Recipe
from uptrain.training.setup import make_accelerator, prepare
from uptrain.training.step import train_step

VARIANTS = ["plain-ce", "ours-ce", "plain-kl", "ours-kl"]
WARM_UP_STEPS = 4
OUTPUT = "output"


class Shape(NamedTuple):
    """Of a model, and what it trains on."""

    config: dict[str, int]
    query_per_kv_head: int
    batch: int
    """Sequences a step on each device."""

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.config["max_position_embeddings"]


SHAPES = {
    "1b": Shape(
        {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
        },
        query_per_kv_head=4,
        batch=8,
    ),
    "7b": Shape(
        {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 4096,
        },
        query_per_kv_head=4,
        batch=1,
    ),
    "tiny": Shape(
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "max_position_embeddings": 64,
        },
        query_per_kv_head=4,
        batch=8,
    ),
}


def make_models(folder: Path, shape: Shape, vocabulary: int) -> None:
    words = {f"w{i}": i for i in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    heads = shape.config["num_attention_heads"]
    for name, kv_heads in (("student", heads // shape.query_per_kv_head), ("teacher", heads)):
        config = LlamaConfig(**shape.config, vocab_size=vocabulary, num_key_value_heads=kv_heads)
        torch.manual_seed(0)
        with torch.device(device):
            model = LlamaForCausalLM(config).bfloat16()
        model.save_pretrained(folder / name)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / name)


def make_text(folder: Path, vocabulary: int, tokens: int) -> None:
    drawn = np.random.default_rng(0).integers(0, vocabulary, tokens + 1)
    (folder / "text.txt").write_text(" ".join(f"w{i}" for i in drawn))


def measure(step: Callable[[int], None], steps: int, tokens: int) -> dict[str, float]:
    seconds = []
    for index in range(steps):
        if index == 1 and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # not those of loading and compiling
        begun = time.perf_counter()
        step(index)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    kept = seconds[min(WARM_UP_STEPS, steps - 1) :]
    return {
        "tokens_per_second": tokens / statistics.median(kept),
        "spread": (max(kept) - min(kept)) / statistics.median(kept),
        "peak_gib": peak / 2**30,
        "first_step_seconds": seconds[0],
    }


def plain(folder: Path, shape: Shape, steps: int, with_teacher: bool) -> dict[str, float]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def load(name: str, dtype: torch.dtype) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder / name, dtype=dtype).to(device)

    model: Any = torch.compile(load("student", torch.float32).train())
    teacher: Any = None
    if with_teacher:
        teacher = load("teacher", torch.bfloat16).eval().requires_grad_(False)
        teacher = torch.compile(teacher)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    vocabulary = model.config.vocab_size
    generator = torch.Generator().manual_seed(0)

    def step(index: int) -> None:
        batch = torch.randint(
            0, vocabulary, (shape.batch, shape.length + 1), generator=generator
        ).to(device)
        inputs, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(input_ids=inputs, use_cache=False).logits.float().flatten(0, 1)
            if teacher is None:
                loss = torch.nn.functional.cross_entropy(logits, targets.flatten())
            else:
                with torch.no_grad():
                    likely = teacher(input_ids=inputs, use_cache=False).logits.float()
                loss = torch.nn.functional.kl_div(
                    logits.log_softmax(-1),
                    likely.flatten(0, 1).log_softmax(-1),
                    reduction="batchmean",
                    log_target=True,
                )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return measure(step, steps, shape.batch * shape.length)


def ours(
    folder: Path, shape: Shape, steps: int, with_teacher: bool, changes: list[str]
) -> dict[str, float]:
    tokens = shape.batch * shape.length * int(os.environ.get("WORLD_SIZE", 1))
    train = {
        "steps": steps,
        "batch_tokens": tokens,
        "sequence_length": shape.length,
        "learning_rate": 1e-5,
        "compile": True,
        "teacher": str(folder / "teacher") if with_teacher else None,
        **{key: yaml.safe_load(value) for key, value in (each.split("=") for each in changes)},
    }
    recipe = Recipe.model_validate(
        {
            "source": str(folder / "student"),
            "data": {"train": [str(folder / "text.txt")]},
            "train": train,
            "output": str(folder / OUTPUT),
        }
    )
    run = prepare(recipe, make_accelerator(recipe), resume=False)
    optimizer = make_optimizer(run.objective.model, recipe.train)
    run.objective.train()
    device = run.accelerator.device
    with read_ahead(
        run.batches, range(steps), run.micro_sequences, processes.rank(), processes.count(), device
    ) as batches:

        def step(index: int) -> None:
            train_step(run, optimizer, index, next(batches), 1e-5, lambda: False)

        return measure(step, steps, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--devices", type=int, default=1, help="GPUs, for ours")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="train.KEY, ours")
    parser.add_argument("--inputs", type=Path, help="Models are made once and kept here.")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    if options.folder is not None:  # one variant, in a process of its own
        (variant,) = options.only
        kind, objective = variant.split("-")
        arguments = (options.folder, shape, options.steps, objective == "kl")
        torch.set_float32_matmul_precision("high")
        found = plain(*arguments) if kind == "plain" else ours(*arguments, options.set)
        if int(os.environ.get("RANK", 0)) == 0:
            print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as temporary:
        inputs = options.inputs or Path(temporary)
        tokens = shape.batch * shape.length * options.steps * options.devices
        if not (inputs / "teacher").exists():
            make_models(inputs, shape, options.vocabulary)
        make_text(inputs, options.vocabulary, tokens)
        results: dict[str, dict[str, float]] = {}
        for variant in options.only:
            devices = options.devices if variant.startswith("ours") else 1
            launch = [] if devices == 1 else ["-m", "torch.distributed.run", "--standalone"]
            launch += [] if devices == 1 else [f"--nproc_per_node={devices}"]
            command = [sys.executable, *launch, __file__, *sys.argv[1:], "--folder", str(inputs)]
            command += ["--only", variant]
            shutil.rmtree(inputs / OUTPUT, ignore_errors=True)
            result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            results[variant] = json.loads(result.stdout.splitlines()[-1])
            row = results[variant]
            print(
                f"{variant:<10}{row['tokens_per_second']:>10,.0f} tokens/s{row['peak_gib']:>8.1f} GiB"
                f"   spread {row['spread']:.1%}, first step {row['first_step_seconds']:.0f} s",
                flush=True,
            )
    for first, second in (("ours-ce", "plain-ce"), ("ours-kl", "plain-kl"), ("ours-kl", "ours-ce")):
        if first in results and second in results:
            speed, memory = (
                results[first][key] / max(results[second][key], 1e-9)
                for key in ("tokens_per_second", "peak_gib")
            )
            print(f"{first} / {second}: {speed:.2f} of its speed, {memory:.2f} of its memory")


if __name__ == "__main__":
    main()
