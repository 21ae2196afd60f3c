"""The command lines that make a run and its figures again."""

import shlex
from collections.abc import Mapping
from typing import Any


def commands(run: Mapping[str, Any]) -> list[str]:
    """Give the command lines behind a run's figures, the one that was typed first if it is known."""
    conversion, found = run["conversion"], [run["command"]] if run.get("command") else []
    if conversion and conversion.get("source"):
        found.append(_convert_command(conversion))
    evaluations = run["evaluations"]
    for stage, folder in (("converted", "converted"), ("uptrained", "final"), ("evaluated", None)):
        if evaluation := evaluations.get(stage):
            found.append(_evaluate_command(evaluation, folder or evaluation.get("model", "MODEL")))
    return found


def _convert_command(conversion: Mapping[str, Any]) -> str:
    heads = conversion["num_key_value_heads"]["target"]
    parts = ["uptrain", "convert", conversion["source"], "converted"]
    parts += ["--num-key-value-heads", str(heads), "--method", conversion["method"]]
    parts += ["--seed", str(conversion.get("seed", 0))]
    if conversion.get("architecture", "auto") != "auto":
        parts += ["--architecture", conversion["architecture"]]
    parts += ["--encoder"] if conversion.get("encoder") else []
    calibration = conversion.get("calibration")
    if calibration or conversion.get("grouping", "contiguous") != "contiguous":
        parts += ["--grouping", conversion["grouping"]]
    if calibration:
        parts += ["--calibration", calibration["data"]]
        parts += ["--calibration-tokens", str(calibration["tokens"])]
        parts += [] if calibration["refit"] else ["--no-refit"]
        if calibration["reconstruct_steps"] is not None:
            parts += ["--reconstruct-steps", str(calibration["reconstruct_steps"])]
    return shlex.join(parts)


def _evaluate_command(evaluation: Mapping[str, Any], folder: str) -> str:
    parts = ["uptrain", "evaluate", folder]
    if evaluation.get("reference"):
        parts += ["--reference", evaluation["reference"]]
    parts += ["--data", evaluation.get("data", "TEXT"), "--max-tokens", str(evaluation["tokens"])]
    if evaluation.get("sequence_length"):
        parts += ["--sequence-length", str(evaluation["sequence_length"])]
    for part in ("long_context", "copying", "continuations", "decode"):
        parts += [f"--{part.replace('_', '-')}"] if evaluation.get(part) else []
    parts += ["--tasks", ",".join(evaluation["tasks"])] if evaluation.get("tasks") else []
    return shlex.join(parts)
