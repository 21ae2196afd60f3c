"""What was inspected and evaluated, as text for a terminal or an issue."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from uptrain.evaluation.bootstrap import MIN_DOCUMENTS

_RULE = "─"
_NARROW = 80  # characters of a line of what is pasted into an issue
_CONTEXTS = (4096, 32768)
_LINE = 100  # characters of a text that is shown
_MODES = ("greedy", "sampled")
_DECODE_COLUMNS = [
    "context", "batch", "model", "ms a step", "bound", "of bound", "tokens/s", "speed-up",
    "prefill tokens/s", "memory", "largest batch",
]  # fmt: skip


def table(rows: Sequence[Sequence[str]], left: int = 0) -> list[str]:
    """Set rows in columns, numbers to the right.

    Args:
        rows: Cells; the first row is the header.
        left: How many columns at the end hold words, which are set to the left.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    words = len(widths) - left
    lines = [
        "  ".join(
            cell.ljust(width) if i >= words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (rows[0], [_RULE * width for width in widths], *rows[1:])
    ]
    return ["  " + line.rstrip() for line in lines]


def labelled(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Set labels and what they say one below the other."""
    width = max(len(label) for label, _ in rows)
    return [f"  {label:<{width}}  {text}".rstrip() for label, text in rows]


def inspection(result: Mapping[str, Any]) -> str:
    """Show a checkpoint's heads, and what follows from each number of KV heads.

    No line is wider than 80 characters, so that it survives a terminal, a pipe and an issue.

    Args:
        result: From `uptrain.evaluation.serving.describe_serving`.
    """
    H, K = result["num_attention_heads"], result["num_key_value_heads"]
    kind = "multi-head" if K == H else "multi-query" if K == 1 else "grouped-query"
    context = result["context"]
    architecture = f" ({result['architecture']})" if result["architecture"] else ""
    head = labelled(
        [
            ("family", f"{result['model_type']}{architecture}"),
            (
                "attention",
                f"{H} query heads, {K} KV heads ({kind}), {result['num_hidden_layers']} layers",
            ),
            ("head size", f"{result['head_dim']:,}"),
            ("context", f"{context:,} tokens" if context else "the config names none"),
            (
                "weights",
                f"{result['parameters']:,} parameters, {size(result['weight_bytes'])} in "
                f"{result['dtype']}",
            ),
        ]
    )
    parts = [[result["model"], *head], _caches(result), _runtimes(result)]
    return "\n\n".join("\n".join(part) for part in parts)


def _caches(result: Mapping[str, Any]) -> list[str]:
    """Show the KV cache of a token and of whole contexts, for each number of KV heads."""
    targets, K = result["targets"], result["num_key_value_heads"]
    own = next(t for t in targets if t["num_key_value_heads"] == K)["kv_cache_bytes_per_token"]
    lengths = sorted({*_CONTEXTS, result["context"] or _CONTEXTS[0]})
    rows = [["KV heads", "bytes a token", "smaller", *(f"at {_short_count(n)}" for n in lengths)]]
    for target in targets:
        cached = target["kv_cache_bytes_per_token"]
        rows.append(
            [
                str(target["num_key_value_heads"]),
                f"{cached:,}",
                f"{own / cached:.3g}×",
                *(size(cached * length) for length in lengths),
            ]
        )
    return table(rows)


def _short_count(tokens: int) -> str:
    """Name a context as people do: 4k is 4096 tokens."""
    return f"{tokens // 1024:,}k" if tokens % 1024 == 0 else f"{tokens:,}"


def _runtimes(result: Mapping[str, Any]) -> list[str]:
    """Say over how many GPUs each runtime takes each number of KV heads, and why not others."""
    targets = result["targets"]
    names = [runtime["runtime"] for runtime in targets[0]["runtimes"]]
    rows = [["KV heads", *names]]
    for target in targets:
        rows.append([str(target["num_key_value_heads"]), *map(_taken, target["runtimes"])])
    lines = ["  Runtimes, and the GPUs that each can split it over", *table(rows, left=len(names))]
    if any("*" in cell for row in rows for cell in row):
        lines += _wrapped(
            "*", "KV heads lie there more than once: each GPU's cache gets no smaller"
        )
    if any("?" in cell for row in rows for cell in row):
        lines += _wrapped("?", "not known whether it loads")
    lines.append("")
    for i, name in enumerate(names):
        notes: dict[str, list[int]] = {}
        for target in targets:
            note = target["runtimes"][i]["note"]
            notes.setdefault(note, []).append(target["num_key_value_heads"])
        for number, (note, about) in enumerate(notes.items()):
            which = "" if len(notes) == 1 else f"{_join(about)}: "
            lines += _wrapped(name if number == 0 else "", which + note, max(map(len, names)))
    for model_type in dict.fromkeys(target["model_type"] for target in targets):
        if model_type != result["model_type"]:
            about = [t["num_key_value_heads"] for t in targets if t["model_type"] == model_type]
            lines += ["", *_wrapped(f"{_join(about)} KV heads", f"rewritten as {model_type}")]
    return lines


def _taken(runtime: Mapping[str, Any]) -> str:
    """Say whether a runtime takes a checkpoint, and over how many GPUs."""
    return "no" if runtime["accepts"] is False else gpus(runtime) + " ?" * (not runtime["accepts"])


def gpus(runtime: Mapping[str, Any]) -> str:
    """Give the numbers of GPUs that a runtime splits a checkpoint over; a star marks copies."""
    if runtime["tensor_parallel"] is None:
        return "any"
    return " ".join(f"{n}{'*' * (n in runtime['copied'])}" for n in runtime["tensor_parallel"])


def _wrapped(label: str, text: str, width: int = 0) -> list[str]:
    """Set a label and what it says, in lines of 80 characters."""
    first = f"  {label:<{width}}  "
    return textwrap.wrap(
        text,
        _NARROW,
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _join(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def size(nbytes: float) -> str:
    """Show bytes in the unit that suits them."""
    units = ("KiB", "MiB", "GiB")
    if nbytes < 1024:
        return f"{nbytes:,.0f} bytes"
    power = min(int(math.log2(nbytes)) // 10, len(units))
    return f"{nbytes / 1024**power:,.1f} {units[power - 1]}"


def evaluation(result: Mapping[str, Any]) -> str:
    """Show what `evaluate` measured.

    Args:
        result: From `uptrain.evaluation.quality.evaluate`.
    """
    rows = [
        ("loss", f"{result['loss']:.4f} nats a token{_between(result, 'loss')}"),
        ("perplexity", f"{result['perplexity']:.2f}"),
        ("bits per byte", f"{result['bits_per_byte']:.4f}"),
    ]
    if "reference_loss" in result:
        rows += [
            (
                "reference",
                f"{result['reference_loss']:.4f} nats a token{_between(result, 'reference_loss')}",
            ),
            (
                "increase",
                f"{result['loss_increase']:+.4f} nats a token"
                f"{_between(result, 'loss_increase', '+.4f', _p_value(result))}",
            ),
            (
                "KL",
                f"{result['kl']:.4f} nats a token{_between(result, 'kl')}, KL(reference ‖ model)",
            ),
            (
                "agreement",
                f"{result['top1_agreement']:.1%}{_between(result, 'top1_agreement', '.1%')} "
                "of most likely tokens",
            ),
        ]
    rows += [
        (
            "KV cache",
            f"{result['kv_cache_bytes_per_token']:,} bytes a token, "
            f"{result['num_key_value_heads']} KV heads",
        ),
        (
            "measured on",
            f"{result['tokens']:,} tokens, {result['documents']:,} document"
            f"{'s' * (result['documents'] != 1)} of {result['data']}, in {result['dtype']}",
        ),
    ]
    sure = ("no intervals", f"fewer than {MIN_DOCUMENTS} documents say nothing of others")
    if "bootstrap" in result:
        sure = ("in brackets", f"{result['bootstrap']['confidence']:.0%}, over documents")
    parts = [[result["model"], *labelled([*rows, sure])]]
    if "long_context" in result:
        title = f"by position in a context of {result['long_context']['sequence_length']:,} tokens"
        parts.append([title, *_by_position(result["long_context"]["by_position"])])
    if "copying" in result:
        parts.append(["random tokens, again", *_copying(result["copying"])])
    if "continuations" in result:
        parts.append(_continuations(result["continuations"]))
    if "tasks" in result:
        parts.append(_tasks(result["tasks"]))
    if "decode" in result:
        parts.append(_decode(result["decode"], result["decode_conditions"]))
    return "\n\n".join("\n".join(part) for part in parts)


def _between(result: Mapping[str, Any], key: str, form: str = ".4f", more: str = "") -> str:
    found = result.get("intervals", {}).get(key)
    return f" ({found[0]:{form}} … {found[1]:{form}}{more})" if found else ""


def _p_value(result: Mapping[str, Any]) -> str:
    p = result.get("loss_increase_p", 1.0)
    return ", p < 0.001" if p < 0.001 else f", p = {p:.3f}"


def _by_position(places: Sequence[Mapping[str, Any]]) -> list[str]:
    compares = "reference_loss" in places[0]
    rows = [["tokens before", "loss", *(["reference", "increase"] if compares else [])]]
    for place in places:
        rows.append([f"{place['first'] - 1:,}", f"{place['loss']:.4f}"])
        if compares:
            rows[-1] += [f"{place['reference_loss']:.4f}", f"{place['loss_increase']:+.4f}"]
    return table(rows)


def _copying(distances: Sequence[Mapping[str, Any]]) -> list[str]:
    names = [name for name in ("", "reference_") if f"{name}loss" in distances[0]]
    rows = [["tokens back"]]
    for name in names:
        rows[0] += [f"{name.replace('_', ' ')}first", "again"]
    for each in distances:
        rows.append([f"{each['distance']:,}"])
        for name in names:
            rows[-1] += [f"{each[f'{name}first_loss']:.4f}", f"{each[f'{name}loss']:.4f}"]
    return table(rows)


def _continuations(found: Mapping[str, Any]) -> list[str]:
    repetition = found["repetition"]
    names = [name for name in repetition if name != "text"]
    rows = [["4-grams repeated", "text", *(f"{name}, {mode}" for name in names for mode in _MODES)]]
    each = [repetition["text"], *(repetition[name][mode] for name in names for mode in _MODES)]
    lines = table([*rows, ["", *(f"{value:.1%}" for value in each)]])
    for prompt in found["prompts"]:
        said = [("prompt", prompt["prompt"]), ("text", prompt["text"])]
        said += [(name, prompt[name]["greedy"]) for name in names]
        lines += ["", *labelled([(label, _short(text)) for label, text in said])]
    return lines


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LINE else f"{line[: _LINE - 1]}…"


def _tasks(tasks: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    first = next(metrics for each in tasks.values() for metrics in each.values())
    names = [name for name in ("target", "reference") if name in first]
    rows = [["task", "metric", *names]]
    for task, metrics in tasks.items():
        for metric, values in metrics.items():
            cells = []
            for name in names:
                error = values.get(f"{name}_stderr")
                spread = f" ± {error:.4f}" if error is not None else ""
                cells.append(f"{values[name]:.4f}{spread}")
            rows.append([task, metric, *cells])
    return table(rows, left=len(rows[0]))


def _decode(rows: Sequence[Mapping[str, Any]], conditions: Mapping[str, Any]) -> list[str]:
    lines = [_DECODE_COLUMNS]
    for row in rows:
        lines.append(
            [
                f"{row['context']:,}",
                f"{row['batch']:,}",
                row["model"],
                f"{row['milliseconds_per_step']:.2f}",
                f"{row['bound_milliseconds']:.2f}",
                f"{row['bandwidth_fraction']:.0%}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['speedup']:.2f}×" if "speedup" in row else "",
                f"{row['prefill_tokens_per_second']:,.0f}",
                size(row["peak_bytes"]),
                f"{row['largest_batch']:,}",
            ]
        )
    bandwidth = conditions["bandwidth"]["bytes_per_second"] / 1e9
    notes = [
        f"  {conditions['device']}, {conditions['dtype']}; bound: weights and cache read once at the "
        f"{bandwidth:,.0f} GB/s measured here",
        "  largest batch: estimated from free memory, for the model alone",
    ]
    if rows and conditions["device_type"] == "cuda" and not all(row["cuda_graph"] for row in rows):
        notes.append(
            "  not every step could be made a CUDA graph: those figures hold Python's time too"
        )
    notes += [
        f"  left out for lack of memory: {each['model']}, batch {each['batch']:,} at {each['context']:,}"
        for each in conditions["left_out"]
    ]
    return [*table(lines), *notes]
