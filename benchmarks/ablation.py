"""Loss by method and number of KV heads, without any uptraining.

    python benchmarks/ablation.py SOURCE --calibration TEXT --data TEXT --output DIR [--heads 6 4 3 2 1]
        [--methods mean …]

Converts SOURCE to each number of heads by each method, measures the increase of loss over the original
on the same text, and prints a table. Every figure is kept in DIR as soon as it is there; a second call
does only what is missing. `--methods` picks rows of the table by their names.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import uptrain
from uptrain.checkpoint.staging import replace_file

# Name in the table, options of `uptrain.convert`, whether it needs text.
METHODS: list[tuple[str, dict[str, Any], bool]] = [
    ("random", {"method": "random"}, False),
    ("first", {"method": "first"}, False),
    ("mean (paper)", {"method": "mean"}, False),
    ("align", {"method": "align"}, False),
    ("factorize", {"method": "factorize"}, False),
    ("factorize, search", {"method": "factorize", "grouping": "search"}, False),
    ("+ calibrated", {"refit": False, "reconstruct_steps": 0}, True),
    ("+ refit", {"reconstruct_steps": 0}, True),
    ("+ reconstruct", {}, True),
]


def measure(
    source: str, heads: int, options: dict[str, Any], text: Path | None, data: Path, tokens: int
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "target"
        uptrain.convert(source, target, heads, calibration=text, **options)
        return uptrain.evaluate(
            str(target), data, reference=source, max_tokens=tokens, device="cpu"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--methods", nargs="+", choices=[name for name, *_ in METHODS])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--max-tokens", type=int, default=65_536)
    parser.add_argument("--heads", type=int, nargs="+", default=[6, 4, 3, 2, 1])
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    methods = [m for m in METHODS if arguments.methods is None or m[0] in arguments.methods]
    print("| method | " + " | ".join(f"{heads} KV heads" for heads in arguments.heads) + " |")
    print("|---|" + "---|" * len(arguments.heads))
    for name, options, needs_text in methods:
        cells = []
        for heads in arguments.heads:
            kept = arguments.output / f"{name.replace(' ', '-')}-{heads}.json"
            if not kept.is_file():
                text = arguments.calibration if needs_text else None
                found = measure(
                    arguments.source, heads, options, text, arguments.data, arguments.max_tokens
                )
                replace_file(kept, json.dumps(found, indent=2).encode())
            cells.append(f"{json.loads(kept.read_text())['loss_increase']:+.3f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
