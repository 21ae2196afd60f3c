"""Say the results of runs in words and tables."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

Table = list[list[str]]
"""Rows of cells; the first row is the header."""

_FIGURES = (
    ("loss, nats a token", "loss", "{:.4f}"),
    ("loss over the original, nats a token", "loss_increase", "{:+.4f}"),
    ("perplexity", "perplexity", "{:,.2f}"),
    ("bits per byte", "bits_per_byte", "{:.4f}"),
    ("KL(original ‖ model), nats a token", "kl", "{:.4f}"),
    ("same most likely token", "top1_agreement", "{:.1%}"),
    ("KV heads", "num_key_value_heads", "{:,}"),
    ("KV cache, bytes a token", "kv_cache_bytes_per_token", "{:,}"),
    ("parameters", "parameters", "{:,}"),
)
_PLOTS = {
    "loss.png": "Training and validation loss over tokens, and the divergence from a teacher",
    "layers.png": "What each layer lost, and how far each repair brought it back",
    "comparison.png": "Loss over the original against KV-cache bytes a token",
}


def verdict(run: Mapping[str, Any]) -> str:
    """Say in plain words what was saved, lost and won back."""
    stages = run["evaluations"]
    original, converted = stages.get("original"), stages.get("converted")
    final = stages.get("uptrained") or stages.get("evaluated")
    last, sentences = final or converted, []
    if original and last:
        sentences.append(_say_cache(original, last))
    losses = [f"{original['loss']:.3f}"] if original else []
    if converted:
        losses.append(f"{converted['loss']:.3f} after conversion")
    if final:
        after = "after uptraining" if "uptrained" in stages else "now"
        losses.append(f"{final['loss']:.3f} {after}{_say_budget(run)}")
    if losses:
        won_back = _say_won_back(original, converted, final)
        sentences.append(f"loss {' → '.join(losses)}{won_back}")
    if not sentences and run["training"]:
        sentences.append(_say_training(run["training"]))
    if not sentences and run["conversion"]:
        heads = run["conversion"]["num_key_value_heads"]
        method = run["conversion"]["method"]
        sentences.append(f"converted by {method} to {heads['target']} KV heads, not yet evaluated")
    text = "; ".join(sentences)
    return text[:1].upper() + text[1:] + "." if not text[:1].isdigit() else text + "."


def _say_cache(original: Mapping[str, Any], last: Mapping[str, Any]) -> str:
    heads = [stage["num_key_value_heads"] for stage in (original, last)]
    cache = [stage["kv_cache_bytes_per_token"] for stage in (original, last)]
    if cache[0] == cache[1]:
        return f"{heads[0]} KV heads, KV cache {cache[0]:,} bytes a token as before"
    return (
        f"{heads[0]} → {heads[1]} KV heads: KV cache {cache[0] / cache[1]:.1f}× smaller "
        f"({cache[0]:,} → {cache[1]:,} bytes a token)"
    )


def _say_budget(run: Mapping[str, Any]) -> str:
    training = run["training"]
    if not training:
        return ""
    share = training.get("alpha")
    of_pretraining = f" ({share * 100:.2g}% of the pretraining)" if share else ""
    return f" on {training['tokens']:,} tokens{of_pretraining}"


def _say_training(training: Mapping[str, Any]) -> str:
    changes = [
        f"{name} {training[f'initial_{key}']:.3f} → {training[key]:.3f}"
        for name, key in (("validation loss", "validation_loss"), ("KL", "validation_kl"))
        if _is_measured(training, key)
    ]
    if changes:
        return f"trained on {training['tokens']:,} tokens: {', '.join(changes)}"
    return f"trained for {training['steps']:,} steps to a training loss of {training['loss']:.3f}"


def _is_measured(training: Mapping[str, Any], key: str) -> bool:
    return None not in (training[f"initial_{key}"], training[key])


def _say_won_back(
    original: Mapping[str, Any] | None,
    converted: Mapping[str, Any] | None,
    final: Mapping[str, Any] | None,
) -> str:
    before = converted.get("loss_increase") if converted else None
    after = final.get("loss_increase") if final else None
    if original is None or (before is None and after is None):
        return ""
    if before is None or after is None:
        return f" ({before if after is None else after:+.3f} over the original)"
    if before <= 0:
        return f": nothing was lost, {after:+.3f} over the original"
    if after > before:
        return f": uptraining made it worse, {after:+.3f} over the original"
    return f": {(before - after) / before:.0%} of the lost quality won back"


def tables(run: Mapping[str, Any]) -> list[tuple[str, Table]]:
    """Lay out what is known of one run as titled tables: its quality and its uptraining."""
    stages = run["evaluations"]
    quality: Table = [["", *stages]]
    for label, key, form in _FIGURES:
        values = [stage.get(key) for stage in stages.values()]
        if key == "loss_increase" and "original" in stages:
            values[0] = None  # of itself
        if any(value is not None for value in values):
            quality.append([label, *(_cell(value, form) for value in values)])
    uptraining: Table = [["uptraining", ""]]
    if run["training"]:
        uptraining += _training_rows(run["training"], stages)
    return [("Quality", quality), ("Uptraining", uptraining)]


def _training_rows(training: Mapping[str, Any], stages: Mapping[str, Any]) -> Table:
    """Say how a model was trained and what came of it, but for what its evaluations say."""
    steps = training["steps"]
    rows = [("steps", f"{steps:,}"), ("tokens trained on", f"{training['tokens']:,}")]
    if training.get("alpha"):
        rows.append(("share of the pretraining", f"{training['alpha']:.2%}"))
    if training["optimizer"]:
        rows.append(("loss minimised", _objective(training)))
        if training["teacher"]:
            rows.append(("teacher", training["teacher"]))
        rows += [
            ("trained parameters", training["trainable"]),
            ("optimizer", training["optimizer"]),
            ("learning rate", f"{training['learning_rate']:g}, {training['schedule']}"),
        ]
    known = stages.keys() >= {"converted", "uptrained"}
    is_known = {
        "validation_loss": known,
        "validation_kl": known and stages["uptrained"].get("reference") == training["teacher"],
    }
    for label, key in (
        ("validation loss", "validation_loss"),
        ("KL to the teacher", "validation_kl"),
    ):
        if _is_measured(training, key) and not is_known[key]:
            rows.append((label, f"{training[f'initial_{key}']:.4f} → {training[key]:.4f}"))
    if training["exported_step"] != steps:
        rows.append(("exported", f"step {training['exported_step']:,}, the lowest validation loss"))
    rows += [
        ("steps with clipped gradients", f"{training['clipped_steps']:,}"),
        ("steps with a loss spike", f"{training['spikes']:,}"),
    ]
    if training["seconds"]:
        rows += [
            ("time, seconds", f"{training['seconds']:,.0f}"),
            ("speed, tokens a second", f"{training['tokens_per_second']:,.0f}"),
        ]
    return [list(row) for row in rows]


def _objective(training: Mapping[str, Any]) -> str:
    """Name what was minimised: cross-entropy, KL to the teacher, or a mixture."""
    weight = training["distillation_weight"] if training["teacher"] else 0
    parts = ((1 - weight, "cross-entropy"), (weight, "KL to the teacher"))
    return " + ".join(
        name if share == 1 else f"{share:.3g} {name}" for share, name in parts if share > 0
    )


def comparison(runs: Sequence[Mapping[str, Any]]) -> Table:
    """Lay out several runs side by side; losses of conversions are those over the original."""
    header = "run|method|KV heads|KV cache, bytes a token|original loss|converted|uptrained|KL"
    table: Table = [[*header.split("|"), "tokens trained on", "KL in the loss", "time, s"]]
    for run in runs:
        stages, training = run["evaluations"], run["training"] or {}
        original, converted = stages.get("original", {}), stages.get("converted", {})
        final = stages.get("uptrained") or stages.get("evaluated") or {}
        last = final or converted or original
        table.append(
            [
                run["name"],
                (run["conversion"] or {}).get("method", "–"),
                _cell(last.get("num_key_value_heads"), "{:,}"),
                _cell(last.get("kv_cache_bytes_per_token"), "{:,}"),
                _cell(original.get("loss"), "{:.4f}"),
                _cell(converted.get("loss_increase"), "{:+.4f}"),
                _cell(final.get("loss_increase"), "{:+.4f}"),
                _cell(final.get("kl", converted.get("kl")), "{:.4f}"),
                _cell(training.get("tokens"), "{:,}"),
                _cell(training.get("distillation_weight"), "{:.0%}"),
                _cell(training.get("seconds"), "{:,.0f}"),
            ]
        )
    return table


def _cell(value: Any, form: str) -> str:
    return "–" if value is None else form.format(value)


def markdown(content: Mapping[str, Any]) -> str:
    """Write a report as a Markdown page, one run or several compared."""
    runs = content["runs"]
    lines = ["# Uptraining report", ""]
    images = [line for plot in content["plots"] for line in (f"![{_PLOTS[plot]}]({plot})", "")]
    if len(runs) > 1:
        lines += [_as_markdown(comparison(runs)), ""]
        lines += ["Converted and uptrained: loss over the original, in nats a token.", "", *images]
    for run in runs:
        if len(runs) > 1:
            lines += [f"## {run['name']}", ""]
        lines += [run["verdict"], ""]
        for title, table in tables(run):
            if len(table) > 1:
                lines += [f"{'#' * (2 + (len(runs) > 1))} {title}", "", _as_markdown(table), ""]
        lines += images if len(runs) == 1 else []
        lines += _how_made(run, "#" * (2 + (len(runs) > 1)))
    if content.get("note"):
        lines += [content["note"], ""]
    return "\n".join(lines)


def _how_made(run: Mapping[str, Any], heading: str) -> list[str]:
    """Write the commands and versions behind a run's figures."""
    conversion, commands = run["conversion"], []
    if conversion and conversion.get("source"):
        source = shlex.quote(conversion["source"])
        commands.append(
            f"uptrain convert {source} converted"
            f" --num-key-value-heads {conversion['num_key_value_heads']['target']}"
            f" --method {conversion['method']} --seed {conversion.get('seed', 0)}"
            + _calibration_options(conversion)
        )
    evaluations = run["evaluations"]
    for stage, folder in (("converted", "converted"), ("uptrained", "final"), ("evaluated", None)):
        if evaluation := evaluations.get(stage):
            commands.append(
                _evaluate_command(evaluation, folder or evaluation.get("model", "MODEL"))
            )
    versions = [f"{name} {version}" for name, version in (run["versions"] or {}).items()]
    lines = []
    if commands:
        lines += [f"{heading} Commands", "", "```bash", *commands, "```", ""]
    if versions:
        lines += [f"Versions: {', '.join(versions)}.", ""]
    return lines


def _calibration_options(conversion: Mapping[str, Any]) -> str:
    calibration, parts = conversion.get("calibration"), []
    if calibration or conversion.get("grouping", "contiguous") != "contiguous":
        parts += ["--grouping", conversion["grouping"]]
    if calibration:
        parts += ["--calibration", calibration["data"]]
        parts += ["--calibration-tokens", str(calibration["tokens"])]
        parts += [] if calibration["refit"] else ["--no-refit"]
        if calibration["reconstruct_steps"] is not None:
            parts += ["--reconstruct-steps", str(calibration["reconstruct_steps"])]
    return f" {shlex.join(parts)}" if parts else ""


def _evaluate_command(evaluation: Mapping[str, Any], folder: str) -> str:
    parts = ["uptrain", "evaluate", folder]
    if evaluation.get("reference"):
        parts += ["--reference", evaluation["reference"]]
    parts += ["--data", evaluation.get("data", "TEXT"), "--max-tokens", str(evaluation["tokens"])]
    if evaluation.get("sequence_length"):
        parts += ["--sequence-length", str(evaluation["sequence_length"])]
    return shlex.join(parts)


def _as_markdown(table: Table) -> str:
    header, *rows = table
    rule = ["---"] + ["---:" if title else "---" for title in header[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def as_text(table: Table) -> str:
    """Align a table for a terminal: the first column and such without a title left, others right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [
            cell.rjust(width) if title and number else cell.ljust(width)
            for number, (cell, title, width) in enumerate(zip(row, table[0], widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join(lines)
