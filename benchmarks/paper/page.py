"""docs/results.md: tables and conclusions, all computed from the stored results."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from points import (
    ALPHA,
    ALPHAS,
    COMPARED,
    DECODE,
    HEADS,
    METHODS,
    SHORT_ALPHAS,
    Point,
    all_points,
    fewer_heads,
)

Results = dict[str, dict[str, Any]]

FIGURES = ("figure-4.svg", "figure-5.svg", "figure-6.svg")
TIE = 0.002
"""Nats a token: another order of the text moved an increase by up to half of this (methods.md)."""
_PAPER_ORDER = ("mean", "first", "random")


def increase(results: Results, method: str, heads: int, alpha: float) -> float | None:
    """Give a point's loss over the original's, nats a token; None if it is not stored."""
    if not alpha:  # methods that differ in the uptraining share their conversion
        same = METHODS[method].conversion
        method = next(each for each in COMPARED if METHODS[each].conversion == same)
    stored = results.get(Point(method, heads, alpha).name)
    return None if stored is None else float(stored["evaluation"]["loss_increase"])


def source_heads(results: Results) -> int:
    """Give the number of KV heads of the original."""
    evaluation = next(each["evaluation"] for each in results.values() if "evaluation" in each)
    return int(evaluation["reference_num_key_value_heads"])


def make_page(results: Results) -> str:
    """Write the page.

    Args:
        results: What is stored, by name; at least one point.
    """
    blocks = [
        "# The GQA paper's figures on a decoder",
        *_introduction(results),
        "## Figure 4: how heads are merged",
        f"![Loss over the original by method](paper/{FIGURES[0]})",
        _methods_table(results),
        _bullets([*_order(results), *_parts(results)]),
        "## Figure 5: how long it is uptrained",
        f"![Loss over the original by alpha](paper/{FIGURES[1]})",
        _alpha_table(results),
        _bullets([*_crossings(results), *_costs(results)]),
        "## Figure 6: how many KV heads are left",
        f"![Time of a decoding step, and loss against it](paper/{FIGURES[2]})",
        _heads_table(results),
        _bullets(_speeds(results)),
        "## What did not help",
        _bullets(_negative(results)) or "Nothing so far.",
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _introduction(results: Results) -> Iterator[str]:
    heads = source_heads(results)
    points = all_points(heads)
    names = {point.name for point in points} | {DECODE}
    evaluation = next(each["evaluation"] for each in results.values() if "evaluation" in each)
    yield (
        "Ainslie et al. 2023 (arXiv:2305.13245) convert T5 and show by figures 4 to 6 how the choice of "
        "pooling, the length of the uptraining and the number of KV heads matter. Here are these figures "
        f"for a decoder, {evaluation['reference']} with {heads} heads, and beside the paper's method ours: "
        "calibrated, then distilled ([methods.md](methods.md)). Figures are **increases of the loss over "
        f"the original's {evaluation['reference_loss']:.4f}, in nats a token**, on "
        f"{evaluation['tokens']:,} tokens that neither model has seen, in {evaluation['dtype']}; 0 is the "
        "original. `alpha` is the length of the uptraining as a fraction of the pretraining."
    )
    trained = {name: each["training"] for name, each in results.items() if each.get("training")}
    if usual := next((each for name, each in trained.items() if "-small" not in name), None):
        longest = max(each["tokens"] for each in trained.values())
        epochs = longest / usual["text_tokens"]
        yield (
            f"Every uptraining has `{usual['optimizer']}`, a peak rate of {usual['learning_rate']:g}, a "
            f"{usual['schedule']} schedule of its own down to {usual['floor']:g} of the peak, and "
            f"{usual['batch_tokens']:,} tokens a step, of text that the original was pretrained on"
            + (f" (the longest sees it {epochs:.1f} times)" if epochs > 1 else "")
            + '. "Small batches" have a quarter of the tokens a step and go down to 0, ours from a peak '
            "of 3e-4. The paper trained T5 with Adafactor and its own schedule, and measured tasks, not "
            "loss. Each point is one run."
        )
    stored = [results[name] for name in sorted(names & results.keys())]
    seconds = sum(each["seconds"] for each in stored)
    shared = sum(not each["alone"] for each in stored)
    versions = stored[0]["versions"]
    yield (
        f"Made on {versions['device']} (torch {versions['torch']}, transformers "
        f"{versions['transformers']}) in {seconds / 60:.0f} minutes"
        + (f", {shared} points beside others, whose times are not compared" if shared else "")
        + f"; {len(stored)} of {len(names)} results are stored in `benchmarks/paper/results`, and this page, with its conclusions, follows from them:"
    )
    yield (
        "```\n"
        "python benchmarks/paper/measure.py books-14m --train books-train.jsonl \\\n"
        "    --validation books-validation.jsonl --work DIR    # again until it says that all is stored\n"
        "python benchmarks/paper/draw.py\n"
        "```"
    )


def _methods_table(results: Results) -> str:
    columns = [(heads, alpha) for heads in HEADS for alpha in (0, ALPHA)]
    header = [f"{_heads(heads)}, alpha {alpha:g}" for heads, alpha in columns]
    rows = [
        [METHODS[method].label, *(_cell(increase(results, method, *each)) for each in columns)]
        for method in (*COMPARED, "mean-distilled", "calibrated")
    ]
    return _table(["method", *header], rows)


def _alpha_table(results: Results) -> str:
    rows = [
        [
            f"{METHODS[method].label}, {_heads(heads)}",
            *(_cell(increase(results, method, heads, alpha)) for alpha in ALPHAS),
        ]
        for heads in HEADS
        for method in ("mean", "mean-small", "ours", "ours-small")
    ]
    return _table(["alpha", *(f"{alpha:g}" for alpha in ALPHAS)], rows)


def _heads_table(results: Results) -> str:
    decoded = results.get(DECODE, {"decode": []})["decode"]
    batches = sorted({row["batch"] for row in decoded})
    times = {(row["model"], row["batch"]): row["milliseconds_per_step"] for row in decoded}
    whole = source_heads(results)
    rows = []
    for heads in [*fewer_heads(whole), whole]:
        known = [
            each["evaluation"]
            for each in results.values()
            if each.get("num_key_value_heads") == heads
        ]
        measured = [
            increase(results, method, heads, alpha)
            for method, alpha in (("mean", ALPHA), ("ours", 0), ("ours", ALPHA))
        ]
        rows.append(
            [
                f"{heads}",
                f"{known[0]['kv_cache_bytes_per_token']:,}" if known else "–",
                *(_number(times.get((str(heads), batch)), ".3f") for batch in batches),
                *map(_cell, measured),
            ]
        )
    header = ["KV heads", "KV cache, bytes a token", *(f"ms a step, batch {n}" for n in batches)]
    labels = [f"mean, alpha {ALPHA:g}", "ours, alpha 0", f"ours, alpha {ALPHA:g}"]
    return _table([*header, *labels], rows)


def _order(results: Results) -> Iterator[str]:
    """Say whether mean > first > random, as in the paper."""
    for heads in HEADS:
        for alpha in (0, ALPHA):
            found = {each: increase(results, each, heads, alpha) for each in _PAPER_ORDER}
            known = {name: value for name, value in found.items() if value is not None}
            if len(known) < len(_PAPER_ORDER):
                continue
            best = sorted(known, key=lambda name: known[name])
            listed = ", ".join(f"{name} {known[name]:+.3f}" for name in best)
            ties = [f"{a} and {b}" for a, b in pairwise(best) if known[b] - known[a] < TIE]
            verdict = (
                "the paper's order, mean > first > random"
                if tuple(best) == _PAPER_ORDER
                else f"**not** the paper's order: {' > '.join(best)}"
            )
            tied = f" ({'; '.join(ties)} are too close to tell apart)" if ties else ""
            when = f"after alpha {alpha:g}" if alpha else "before uptraining"
            yield f"{_heads(heads)}, {when}: {verdict}{tied}; {listed}."


def _parts(results: Results) -> Iterator[str]:
    """Say what calibration and distillation have done, each alone and both."""
    names = ("mean", "mean-distilled", "calibrated", "ours")
    for heads in HEADS:
        found = [increase(results, name, heads, ALPHA) for name in names]
        if None not in found:
            plain, distilled, calibrated, both = map(_cell, found)
            yield (
                f"{_heads(heads)}, alpha {ALPHA:g}: the paper's {plain} becomes {distilled} by "
                f"distillation alone, {calibrated} by calibration alone, {both} by both."
            )


def _crossings(results: Results) -> Iterator[str]:
    """Say how much uptraining the paper's method needs to reach a calibration without any."""
    for heads in HEADS:
        start = increase(results, "ours", heads, 0)
        curve = [(alpha, increase(results, "mean", heads, alpha)) for alpha in ALPHAS]
        known = [(alpha, value) for alpha, value in curve if value is not None]
        if start is None or not known:
            continue
        better = [alpha for alpha, value in known if value < start]
        yield f"{_heads(heads)}: the paper's method " + (
            f"gets below a calibration without uptraining ({start:+.3f}) from alpha {better[0]:g} on."
            if better
            else f"does not reach a calibration without uptraining ({start:+.3f}) up to alpha "
            f"{known[-1][0]:g} ({known[-1][1]:+.3f})."
        )


def _costs(results: Results) -> Iterator[str]:
    """Say what a calibration takes, and what the same number of tokens costs more by our method."""
    alone = {name: each for name, each in results.items() if each["alone"]}
    for heads in HEADS:
        start, mean, ours = (
            alone.get(Point(method, heads, alpha).name)
            for method, alpha in (("ours", 0), ("mean", ALPHA), ("ours", ALPHA))
        )
        if start and start["conversion_seconds"]:
            yield f"{_heads(heads)}: the calibration took {start['conversion_seconds']:.0f} s."
        if mean and ours:
            ratio = ours["training"]["seconds"] / mean["training"]["seconds"]
            yield (
                f"{_heads(heads)}: with the original beside it as teacher, the same tokens took {ratio:.2f} "
                f"times as long, {ours['training']['seconds']:.1f} s for alpha {ALPHA:g}."
            )


def _speeds(results: Results) -> Iterator[str]:
    if DECODE not in results:
        return
    rows = results[DECODE]["decode"]
    whole = str(source_heads(results))
    for batch in sorted({row["batch"] for row in rows}):
        here = {row["model"]: row for row in rows if row["batch"] == batch}
        if not {"1", whole} <= here.keys():
            continue
        yield (
            f"Batch {batch}, context {here['1']['context']}: 1 KV head decodes "
            f"{here['1']['speedup']:.2f} times as many tokens a second as {whole}; the bound of the "
            f"memory's bandwidth is reached to {here[whole]['bandwidth_fraction']:.0%} with {whole} and to "
            f"{here['1']['bandwidth_fraction']:.0%} with 1."
        )


def _negative(results: Results) -> Iterator[str]:
    whole = source_heads(results)
    control = increase(results, "mean", whole, ALPHA)
    if control is not None:
        yield (
            f"The original itself ({whole} KV heads), trained on with the paper's recipe for alpha "
            f"{ALPHA:g}, {'loses' if control > 0 else 'gains'}: {control:+.4f}. This much of what is above "
            "is the recipe and not the heads."
        )
    for heads in HEADS:
        for method in METHODS:
            yield from _worse_than_none(results, method, heads)
        for method in ("mean", "ours"):
            yield from _worse_than_less(results, method, heads)
            yield from _worse_in_small_batches(results, method, heads)


def _worse_than_none(results: Results, method: str, heads: int) -> Iterator[str]:
    start = increase(results, method, heads, 0)
    curve = [(alpha, increase(results, method, heads, alpha)) for alpha in ALPHAS[1:]]
    worse = [
        f"{alpha:g} ({found:+.3f})"
        for alpha, found in curve
        if start is not None and found is not None and found > start
    ]
    if worse:
        yield (
            f"{METHODS[method].label}, {_heads(heads)}: worse than without uptraining ({start:+.3f}) at "
            f"alpha {', '.join(worse)}."
        )


def _worse_than_less(results: Results, method: str, heads: int) -> Iterator[str]:
    curve = [(alpha, increase(results, method, heads, alpha)) for alpha in ALPHAS[1:]]
    known = [(alpha, found) for alpha, found in curve if found is not None]
    for (less, before), (more, after) in pairwise(known):
        if after > before:
            yield (
                f"{METHODS[method].label}, {_heads(heads)}: alpha {more:g} is worse than {less:g}, "
                f"{before:+.3f} to {after:+.3f}."
            )


def _worse_in_small_batches(results: Results, method: str, heads: int) -> Iterator[str]:
    for alpha in SHORT_ALPHAS:
        large = increase(results, method, heads, alpha)
        small = increase(results, f"{method}-small", heads, alpha)
        if large is not None and small is not None and small > large:
            yield (
                f"{METHODS[method].label}, {_heads(heads)}, alpha {alpha:g}: small batches are worse, "
                f"{large:+.3f} to {small:+.3f}."
            )


def _heads(number: int) -> str:
    return f"{number} KV head{'s' if number > 1 else ''}"


def _cell(value: float | None) -> str:
    return _number(value, "+.3f")


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"* {line}" for line in lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
