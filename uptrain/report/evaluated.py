"""What was evaluated of a run's models: the sections of a report, and what their plots show."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from uptrain.evaluation.tables import size
from uptrain.report.text import Section, Table, cell, interval, p_value

Stages = Mapping[str, Mapping[str, Any]]

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
_MODES = ("greedy", "sampled")


def quality_table(stages: Stages) -> Table | None:
    """Lay out the figures of all stages beside each other."""
    rows = [["", *stages]]
    for label, key, form in _FIGURES:
        values = [
            # The original is not compared with itself.
            None if key == "loss_increase" and name == "original" else stage.get(key)
            for name, stage in stages.items()
        ]
        if any(value is not None for value in values):
            remarks = [_remark(stages, name, key, form) for name in stages]
            cells = [cell(value, form) for value in values]
            rows.append([label, *map(_remarked, cells, remarks)])
    return Table(rows) if len(rows) > 1 else None


def _remarked(value: str, remark: str) -> str:
    return f"{value}\n{remark}" if remark else value


def _remark(stages: Stages, name: str, key: str, form: str) -> str:
    """Give the interval of a figure, that of the original from what was compared with it."""
    if name != "original":
        found = interval(stages[name], key, form)
        test = p_value(stages[name]) if key == "loss_increase" else ""
        return ", ".join(part for part in (found, test) if part)
    if key != "loss":
        return ""
    of_others = (interval(stage, "reference_loss", form) for stage in stages.values())
    return next((found for found in of_others if found), "")


def quality(stages: Stages) -> Section | None:
    """Lay out what every stage predicts, with intervals."""
    table = quality_table(stages)
    if table is None:
        return None
    measured = list(stages.values())[-1]
    text = f"Measured on {measured['tokens']:,} tokens"
    if measured.get("documents"):
        text += f" in {measured['documents']:,} document{'s' * (measured['documents'] != 1)}"
    text += f" of {measured['data']}" if measured.get("data") else ""
    if measured.get("sequence_length"):
        text += f", in blocks of {measured['sequence_length']:,}"
    if measured.get("dtype"):
        text += f", in {measured['dtype']} on {measured.get('device', 'an unknown device')}"
    text += "."
    if "bootstrap" in measured:
        text += (
            f" Small: {measured['bootstrap']['confidence']:.0%} intervals by bootstrap over documents, "
            "and the p of the paired test against the original."
        )
    return Section("Quality", text, tables=(table,))


def compared(stages: Stages, key: str) -> Iterator[tuple[str, Any]]:
    """Give what each stage but the original has of a measurement that was asked for."""
    for name, stage in stages.items():
        if name != "original" and stage.get(key):
            yield name, stage[key]


def places(stages: Stages) -> tuple[dict[str, Sequence[Mapping[str, Any]]], int]:
    """Give losses by position of the stages that have them, of the longest context there is."""
    long = dict(compared(stages, "long_context"))
    if long:
        rows = {name: found["by_position"] for name, found in long.items()}
        context = next(iter(long.values()))["sequence_length"]
    else:
        rows = dict(compared(stages, "by_position"))
        context = next((stages[name]["sequence_length"] for name in rows), 0)
    first: Sequence[Any] = next(iter(rows.values()), [])
    same = {
        name: found
        for name, found in rows.items()
        if len(found) == len(first) and "loss_increase" in found[0]
    }
    return same, context


def positions(stages: Stages) -> Section | None:
    """Lay out what is lost by place in the context and by document."""
    found, _ = places(stages)
    tables = []
    if found:
        rows = [["tokens before", "original", *(f"{name}, over it" for name in found)]]
        for each in zip(*found.values(), strict=True):
            increases = [f"{row['loss_increase']:+.4f}" for row in each]
            rows.append(
                [f"{each[0]['first'] - 1:,}", f"{each[0]['reference_loss']:.4f}", *increases]
            )
        tables.append(Table(rows, "by position", words=(), is_folded=True))
    quantiles = {
        name: each["quantiles"] for name, each in compared(stages, "by_document")
        if each["of"] == "loss_increase"
    }  # fmt: skip
    if quantiles:
        parts = list(next(iter(quantiles.values())))
        rows = [["", *(f"{float(part):.0%}" for part in parts)]]
        rows += [
            [name, *(f"{each[part]:+.3f}" for part in parts)] for name, each in quantiles.items()
        ]
        tables.append(Table(rows, "Loss over the original, quantiles over documents"))
    if not tables:
        return None
    text = "At which place of the context, and in which documents."
    return Section("Where it is lost", text, ("positions",), tuple(tables), is_wide=False)


def copying_losses(stages: Stages) -> dict[str, list[tuple[float, float, float]]]:
    """Give by model: distance, loss the first time and again."""
    losses: dict[str, list[tuple[float, float, float]]] = {}
    for name, rows in compared(stages, "copying"):
        if "reference_loss" in rows[0]:
            losses.setdefault(
                "original",
                [(r["distance"], r["reference_first_loss"], r["reference_loss"]) for r in rows],
            )
        losses[name] = [(r["distance"], r["first_loss"], r["loss"]) for r in rows]
    lengths = {len(rows) for rows in losses.values()}
    return losses if len(lengths) == 1 else {}


def copying(stages: Stages) -> Section | None:
    """Lay out how well a span that was seen before is copied."""
    losses = copying_losses(stages)
    if not losses:
        return None
    rows = [["tokens back", *(f"{name}, {when}" for name in losses for when in ("first", "again"))]]
    for each in zip(*losses.values(), strict=True):
        values = [f"{value:.4f}" for _, first, again in each for value in (first, again)]
        rows.append([f"{each[0][0]:,}", *values])
    text = (
        "Loss on a span of random tokens that comes again: only attention that far back knows it."
    )
    table = Table(rows, "every distance", words=(), is_folded=True)
    return Section("Copying", text, ("copying",), (table,), is_wide=False)


def tasks(stages: Stages) -> Section | None:
    """Lay out the scores of the lm-evaluation-harness."""
    columns: dict[str, dict[tuple[str, str], str]] = {}
    for name, tasks in compared(stages, "tasks"):
        for task, metrics in tasks.items():
            for metric, values in metrics.items():
                for who, column in (("reference", "original"), ("target", name)):
                    if who in values:
                        error = values.get(f"{who}_stderr")
                        spread = f" ± {error:.4f}" if error is not None else ""
                        shown = f"{values[who]:.4f}{spread}"
                        columns.setdefault(column, {})[task, metric] = shown
    if not columns:
        return None
    keys = list(dict.fromkeys(key for each in columns.values() for key in each))
    rows = [["task", "metric", *columns]]
    rows += [[*key, *(each.get(key, "–") for each in columns.values())] for key in keys]
    return Section("Tasks", tables=(Table(rows, words=(0, 1)),), is_wide=False)


def continuations(stages: Stages) -> Section | None:
    """Lay out how the models go on from the same prompts."""
    said: dict[str, dict[str, dict[str, str]]] = {}
    repeated: dict[str, list[str]] = {}
    for name, found in compared(stages, "continuations"):
        repetition = found["repetition"]
        repeated["the text itself"] = [f"{repetition['text']:.1%}", "–"]
        for who, column in (("reference", "original"), ("target", name)):
            if who in repetition:
                repeated[column] = [f"{repetition[who][mode]:.1%}" for mode in _MODES]
        for each in found["prompts"]:
            voices = said.setdefault(each["prompt"], {"the text itself": {"": each["text"]}})
            for who, column in (("reference", "original"), ("target", name)):
                if who in each:
                    voices.setdefault(column, each[who])
    if not said:
        return None
    quotes = []
    for prompt, voices in said.items():
        # Greedy beside greedy: that is what differs by model and not by chance.
        spoken = [
            [f"{name}, {mode}" if mode else name, voices[name][mode]]
            for mode in ("", *_MODES)
            for name in voices
            if mode in voices[name]
        ]
        quotes.append(Table([["", "continuation"], *spoken], prompt, words=(0, 1)))
    rows = [["4-grams that were there before", *_MODES]]
    rows += [[name, *values] for name, values in repeated.items()]
    return Section("Continuations", tables=(Table(rows),), quotes=tuple(quotes))


def decode(evaluation: Mapping[str, Any]) -> Section | None:
    """Lay out the speed of decoding beside its bound."""
    rows, conditions = evaluation.get("decode"), evaluation.get("decode_conditions")
    if not rows or not conditions:
        return None
    header = "batch|context|model|ms a step|bound, ms|of the bound|tokens/s|speed-up"
    table = [[*header.split("|"), "prefill, tokens/s", "memory", "largest batch"]]
    for row in sorted(rows, key=lambda row: (row["context"], row["batch"], row["model"])):
        table.append(
            [
                f"{row['batch']:,}",
                f"{row['context']:,}",
                "original" if row["model"] == "reference" else "this model",
                f"{row['milliseconds_per_step']:.2f}",
                f"{row['bound_milliseconds']:.2f}",
                f"{row['bandwidth_fraction']:.0%}",
                f"{row['tokens_per_second']:,.0f}",
                cell(row.get("speedup"), "{:.2f}×"),
                f"{row['prefill_tokens_per_second']:,.0f}",
                size(row["peak_bytes"]),
                f"{row['largest_batch']:,}",
            ]
        )
    bandwidth = conditions["bandwidth"]["bytes_per_second"] / 1e9
    text = (
        f"{conditions['device']}, {conditions['dtype']}. The bound is the time to read weights and "
        f"cache once at the {bandwidth:,.0f} GB/s measured in the same run."
    )
    return Section("Decoding", text, ("decode",), (Table(table, words=(2,)),))
