"""What a conversion costs other kinds of attention than Llama's, on small models trained for it.

    python benchmarks/kinds.py --tokenizer CHECKPOINT --train TEXT --validation TEXT --work DIR
        [--kinds llama gpt_neox …] [--heads 4 1] [--steps 800] [--minutes 9.5]

Trains a model of 6 layers, 384 wide, with 12 heads of 32, of each kind on TEXT, from random weights and in the
same way, and converts it without any uptraining: by mean pooling, by factorize with search and no text,
and calibrated as by default. Prints the increase of the loss over each model's own, in nats a token. Every
figure is kept in DIR as soon as it is there; a call stops after `--minutes`, and the next one does what is
missing. Wants a GPU; `--steps 2 --device cpu` shows that it runs.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import uptrain
from uptrain.checkpoint.staging import replace_file
from uptrain.training.recipe import Recipe

LENGTH = 512
BATCH_TOKENS = 65_536
WIDE: dict[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "max_position_embeddings": LENGTH,
}
KV: dict[str, Any] = {"num_key_value_heads": 12, "head_dim": 32}
GEMMA: dict[str, Any] = {"query_pre_attn_scalar": 32, "sliding_window": 128}
# What is particular about each, and its config.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("rotary, RMSNorm", {**WIDE, **KV}),
    "gpt_neox": (
        "parallel blocks, rotary in a quarter of the channels, biases, LayerNorm",
        {**WIDE, "intermediate_size": 1536, "rotary_pct": 0.25, "use_parallel_residual": True},
    ),
    "qwen2": ("biases on q, k, v", {**WIDE, **KV}),
    "qwen3": ("norms on q and k by head", {**WIDE, **KV}),
    "olmo2": ("norms behind the blocks and on the whole of q and k", {**WIDE, **KV}),
    "gemma2": ("norms around the blocks, soft caps, sliding window", {**WIDE, **KV, **GEMMA}),
    "cohere": ("parallel blocks, interleaved rotary pairs, LayerNorm", {**WIDE, **KV}),
    "opt": (
        "learned positions, biases, LayerNorm",
        {**WIDE, "ffn_dim": 1536, "word_embed_proj_dim": 384, "dropout": 0.0},
    ),
}
METHODS: dict[str, tuple[bool, dict[str, Any]]] = {
    "mean": (False, {"method": "mean"}),
    "factorize, search": (False, {"method": "factorize", "grouping": "search"}),
    "calibrated": (True, {}),
}


def make_start(kind: str, arguments: argparse.Namespace) -> Path:
    """Save a model of random weights."""
    folder: Path = arguments.work / f"{kind}-start"
    if not folder.exists():
        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
        special = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id")}
        config = AutoConfig.for_model(
            kind,
            **KINDS[kind][1],
            **special,
            pad_token_id=None,
            vocab_size=len(tokenizer),
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def train(kind: str, arguments: argparse.Namespace) -> Path:
    """Train it, once."""
    output = arguments.work / kind
    if not (output / "final").exists():
        data = {
            "train": [str(arguments.train)],
            "repeat": True,
            "tokens": str(arguments.work / "tokens"),
        }
        schedule = {"learning_rate": 3e-3, "weight_decay": 0.1, "save_every_steps": arguments.steps}
        amounts = {
            "steps": arguments.steps,
            "batch_tokens": BATCH_TOKENS,
            "sequence_length": LENGTH,
        }
        recipe = {
            "source": str(make_start(kind, arguments)),
            "data": data,
            "train": {**amounts, **schedule},
            "output": str(output),
        }
        uptrain.finetune(Recipe.model_validate(recipe), resume=True)
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
    final: Path = output / "final"
    return final


def measure(kind: str, heads: int, method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    source = train(kind, arguments)
    needs_text, options = METHODS[method]
    target = arguments.work / f"{kind}-target"
    shutil.rmtree(target, ignore_errors=True)
    begun = time.perf_counter()
    text = arguments.train if needs_text else None
    uptrain.convert(source, target, heads, calibration=text, device=arguments.device, **options)
    seconds = time.perf_counter() - begun
    found = uptrain.evaluate(
        target,
        arguments.validation,
        reference=source,
        max_tokens=arguments.tokens,
        dtype="float32",
        device=arguments.device,
    )
    record = json.loads((target / "uptrain.json").read_text())
    keys = ("loss", "reference_loss", "loss_increase", "kl", "top1_agreement", "tokens")
    return {
        "kind": kind,
        "heads": heads,
        "method": method,
        "seconds": seconds,
        **{key: found[key] for key in keys},
        "target_model_type": record["model_type"],
        "layers": record["layers"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--heads", type=int, nargs="+", default=[4, 1])
    parser.add_argument("--steps", type=int, default=800, help="of 65,536 tokens")
    parser.add_argument("--tokens", type=int, default=65_536, help="evaluated")
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--device")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * arguments.minutes
    columns = [f"{method}, {heads}" for heads in arguments.heads for method in METHODS]
    print(f"| kind | loss | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 2)}")
    for kind in arguments.kinds:
        loss, cells = "–", []
        for heads in arguments.heads:
            for method in METHODS:
                kept = arguments.work / f"{kind}-{method.replace(', ', '-')}-{heads}.json"
                if not kept.is_file() and time.monotonic() < until:
                    found = measure(kind, heads, method, arguments)
                    replace_file(kept, json.dumps(found, indent=1).encode())
                if not kept.is_file():
                    cells.append("–")
                    continue
                found = json.loads(kept.read_text())
                loss = f"{found['reference_loss']:.3f}"
                cells.append(f"{found['loss_increase']:+.3f}")
        print(f"| {kind}: {KINDS[kind][0]} | {loss} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
