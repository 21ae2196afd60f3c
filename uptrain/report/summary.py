"""A run at a glance, and several runs side by side."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from uptrain.report.plots import Point
from uptrain.report.sections import duration
from uptrain.report.text import Section, Table, cell, interval, last_stage, p_value, won_back

Run = Mapping[str, Any]
Tile = tuple[str, str, str]
"""A label, a figure, what is to be known of it."""


def title(run: Run) -> str:
    """Name a run by what was converted into what, by its folder if that is not known."""
    conversion, stages = run["conversion"], run["evaluations"]
    heads = conversion["num_key_value_heads"] if conversion else None
    source = conversion["source"] if conversion else stages.get("original", {}).get("model")
    if heads and source:
        return f"{source}: {heads['source']} → {heads['target']} KV heads"
    return str(run["name"])


def tiles(run: Run) -> list[Tile]:
    """Give the figures that stand on top of a report; what was not measured has none."""
    stages = run["evaluations"]
    original, final = stages.get("original"), last_stage(stages) or stages.get("converted")
    found: list[Tile] = []
    if original and final:
        cached = [stage["kv_cache_bytes_per_token"] for stage in (original, final)]
        heads = [stage["num_key_value_heads"] for stage in (original, final)]
        note = f"{cached[0]:,} → {cached[1]:,} bytes a token, {heads[0]} → {heads[1]} KV heads"
        found.append(("KV cache", f"{cached[0] / cached[1]:.3g}× smaller", note))
    if final and final.get("loss_increase") is not None and final is not original:
        parts = ["nats a token", interval(final, "loss_increase", "{:+.4f}"), p_value(final)]
        note = ", ".join(part for part in parts if part)
        found.append(("loss over the original", f"{final['loss_increase']:+.4f}", note))
    part = won_back(stages)
    if part is not None:
        before, after = (
            stages["converted"]["loss_increase"],
            (last_stage(stages) or {})["loss_increase"],
        )
        tokens = f" in {run['training']['tokens']:,} tokens" if run["training"] else ""
        found.append(("won back", f"{part:.0%}", f"{before:+.4f} → {after:+.4f}{tokens}"))
    if final and final.get("top1_agreement") is not None:
        note = f"as the original; KL {final['kl']:.4f} nats a token"
        found.append(("same most likely token", f"{final['top1_agreement']:.1%}", note))
    found += _decode_tile(final or {})
    if run["stages"]:
        seconds = sum(stage["seconds"] for stage in run["stages"].values())
        found.append(("cost", duration(seconds), "conversion, uptraining, evaluation"))
    return found


def _decode_tile(evaluation: Run) -> Iterator[Tile]:
    """Give the setting in which decoding gained most."""
    rows = [row for row in evaluation.get("decode") or () if row["model"] == "target"]
    row = max((row for row in rows if "speedup" in row), key=lambda r: r["speedup"], default=None)
    if row is not None:
        note = (
            f"batch {row['batch']:,} at {row['context']:,} tokens: "
            f"{row['milliseconds_per_step']:.3g} ms a step, {row['bandwidth_fraction']:.0%} of the bound"
        )
        yield "decoding", f"{row['speedup']:.2f}× as fast", note


def ranked(runs: Sequence[Run]) -> list[Run]:
    """Sort runs by what they lost in the end, those that were not compared behind the others."""

    def lost(run: Run) -> tuple[bool, float]:
        stage = last_stage(run["evaluations"]) or run["evaluations"].get("converted") or {}
        found = stage.get("loss_increase")
        return found is None, found or 0.0

    return sorted(runs, key=lost)


def comparison(runs: Sequence[Run]) -> Table:
    """Lay out several runs side by side; losses of conversions are those over the original."""
    step = common_setting(runs)
    columns: dict[str, list[str]] = {}
    for run in runs:
        stages, training = run["evaluations"], run["training"] or {}
        original, converted = stages.get("original", {}), stages.get("converted", {})
        final = last_stage(stages) or {}
        last = final or converted or original
        compared = final if "kl" in final else converted
        cells = {
            "run": run["name"],
            "KV heads": cell(last.get("num_key_value_heads"), "{:,}"),
            "converted": _increase(converted),
            "uptrained": _increase(final),
            "KL": cell(compared.get("kl"), "{:.4f}"),
            "agreement": cell(compared.get("top1_agreement"), "{:.1%}"),
            "KV cache, bytes a token": cell(last.get("kv_cache_bytes_per_token"), "{:,}"),
            "ms a step": cell(milliseconds(run, step), "{:.2f}"),
            "original loss": cell(original.get("loss"), "{:.4f}"),
            "tokens trained on": cell(training.get("tokens"), "{:,}"),
            "KL in the loss": cell(training.get("distillation_weight"), "{:.0%}"),
            "time": duration(training["seconds"]) if training.get("seconds") else "–",
            "method": (run["conversion"] or {}).get("method", "–"),
        }
        for title, text in cells.items():
            columns.setdefault(title, []).append(text)
    # A column that no run fills says nothing.
    used = {title: texts for title, texts in columns.items() if {*texts} != {"–"}}
    rows = [list(used), *map(list, zip(*used.values(), strict=True))]
    return Table(rows, words=(0, len(used) - 1) if "method" in used else (0,))


def _increase(stage: Mapping[str, Any]) -> str:
    between = interval(stage, "loss_increase", "{:+.4f}")
    return cell(stage.get("loss_increase"), "{:+.4f}") + (f"\n{between}" if between else "")


def compare_sections(runs: Sequence[Run]) -> list[Section]:
    """Lay out what several runs have in common, in the order that `ranked` gives."""
    step = common_setting(runs)
    text = "Sorted by loss. Converted and uptrained: loss over the original, in nats a token."
    if any("intervals" in stage for run in runs for stage in run["evaluations"].values()):
        text += " Small: 95% intervals by bootstrap over documents."
    if step is not None:
        text += f" A step decodes {step[1]:,} tokens at once, each behind {step[0]:,}."
    figures = ("comparison", "decode-comparison", "loss")
    return [Section("Compared", text, figures, (comparison(runs),))]


def points(runs: Sequence[Run], setting: tuple[int, int] | None = None) -> list[Point]:
    """Give what runs lost against their cache a token, or against a decoding step of a setting."""
    found = []
    for run in runs:
        stages = run["evaluations"]
        converted, final = stages.get("converted"), last_stage(stages)
        increases = [stage.get("loss_increase") if stage else None for stage in (converted, final)]
        measured = final or converted
        if measured is None or increases == [None, None]:
            continue
        cost = (
            measured["kv_cache_bytes_per_token"] if setting is None else milliseconds(run, setting)
        )
        if cost:
            found.append(Point(run["name"], cost, *increases))
    return found


def common_setting(runs: Sequence[Run]) -> tuple[int, int] | None:
    """Find the largest context and batch at which most runs were timed; None if fewer than two."""
    counts: dict[tuple[int, int], int] = {}
    for run in runs:
        for setting in _steps(run):
            counts[setting] = counts.get(setting, 0) + 1
    best = max(counts, key=lambda setting: (counts[setting], *setting), default=None)
    return best if best is not None and counts[best] > 1 else None


def milliseconds(run: Run, setting: tuple[int, int] | None) -> float | None:
    """Give the time of a decoding step at a context and batch, if it was measured."""
    return None if setting is None else _steps(run).get(setting)


def _steps(run: Run) -> dict[tuple[int, int], float]:
    rows = (last_stage(run["evaluations"]) or {}).get("decode") or ()
    return {
        (row["context"], row["batch"]): row["milliseconds_per_step"]
        for row in rows
        if row["model"] == "target"
    }
