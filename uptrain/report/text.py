"""Say the results of a run in words; tables, and how a terminal shows them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first row is the header. A cell's second line is a remark on the first."""

    rows: list[list[str]]
    caption: str = ""
    words: tuple[int, ...] = (0,)
    """Columns that hold words, set to the left; the others hold numbers."""
    is_folded: bool = False
    """Whether a page shows it when asked only."""


@dataclass(frozen=True)
class Section:
    """A part of a report; what it lacks is left out."""

    title: str
    text: str = ""
    figures: tuple[str, ...] = ()
    """Names of those that belong here, drawn or not."""
    tables: tuple[Table, ...] = ()
    quotes: tuple[Table, ...] = ()
    """Of each prompt, who says what."""
    code: tuple[str, ...] = ()
    """Command lines."""
    is_wide: bool = True
    """Whether it needs the whole width of a large page."""


def cell(value: Any, form: str) -> str:
    """Show a figure, or a dash where there is none."""
    return "–" if value is None else form.format(value)


def as_text(table: Table) -> str:
    """Align a table for a terminal, without remarks."""
    rows = [[each.partition("\n")[0] for each in row] for row in table.rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            each.ljust(width) if number in table.words else each.rjust(width)
            for number, (each, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join(lines)


def verdict(run: Mapping[str, Any]) -> str:
    """Say in plain words what was saved, lost and won back."""
    stages = run["evaluations"]
    original, converted = stages.get("original"), stages.get("converted")
    final = last_stage(stages)
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
        sentences.append(f"loss {' → '.join(losses)}{_say_won_back(stages)}")
    if not sentences and run["training"]:
        sentences.append(_say_training(run["training"]))
    if not sentences and run["conversion"]:
        heads = run["conversion"]["num_key_value_heads"]
        method = run["conversion"]["method"]
        sentences.append(f"converted by {method} to {heads['target']} KV heads, not yet evaluated")
    text = "; ".join(sentences)
    return text[:1].upper() + text[1:] + "." if not text[:1].isdigit() else text + "."


def last_stage(stages: Mapping[str, Any]) -> dict[str, Any] | None:
    """Give the evaluation of what came out in the end, if it is more than converted."""
    return stages.get("uptrained") or stages.get("evaluated")


def won_back(stages: Mapping[str, Any]) -> float | None:
    """Give the part of what was lost that uptraining won back, if it did."""
    before, after = (
        stage.get("loss_increase") if stage else None
        for stage in (stages.get("converted"), last_stage(stages))
    )
    if before is None or after is None or before <= 0 or after > before:
        return None
    return float((before - after) / before)


def is_measured(training: Mapping[str, Any], key: str) -> bool:
    """Say whether a figure is known both before and after a training."""
    return None not in (training[f"initial_{key}"], training[key])


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
        if is_measured(training, key)
    ]
    if changes:
        return f"trained on {training['tokens']:,} tokens: {', '.join(changes)}"
    return f"trained for {training['steps']:,} steps to a training loss of {training['loss']:.3f}"


def _say_won_back(stages: Mapping[str, Any]) -> str:
    found = [stages.get("converted"), last_stage(stages)]
    before, after = (stage.get("loss_increase") if stage else None for stage in found)
    if "original" not in stages or (before is None and after is None):
        return ""
    if before is None or after is None:
        return f" ({before if after is None else after:+.3f} over the original)"
    if before <= 0:
        return f": nothing was lost, {after:+.3f} over the original"
    part = won_back(stages)
    if part is None:
        return f": uptraining made it worse, {after:+.3f} over the original"
    return f": {part:.0%} of the lost quality won back"


def objective(training: Mapping[str, Any]) -> str:
    """Name what was minimised: cross-entropy, KL to the teacher, or a mixture."""
    weight = training["distillation_weight"] if training["teacher"] else 0
    parts = ((1 - weight, "cross-entropy"), (weight, "KL to the teacher"))
    return " + ".join(
        name if share == 1 else f"{share:.3g} {name}" for share, name in parts if share > 0
    )


def p_value(evaluation: Mapping[str, Any]) -> str:
    """Show the p of the paired test, if there was one."""
    p = evaluation.get("loss_increase_p")
    return "" if p is None else "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def interval(evaluation: Mapping[str, Any], key: str, form: str) -> str:
    """Show the interval of a figure, if there is one."""
    found: Sequence[float] | None = (evaluation.get("intervals") or {}).get(key)
    return f"{form} … {form}".format(*found) if found else ""
