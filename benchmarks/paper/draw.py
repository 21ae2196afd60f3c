"""Draw the GQA paper's figures 4 to 6 from the stored results, and write docs/results.md.

    python benchmarks/paper/draw.py [--results DIR] [--docs DIR]

Points that are not stored are left out of the figures and shown as – in the tables.
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from page import FIGURES, Results, increase, make_page, source_heads
from points import (
    ALPHA,
    ALPHAS,
    COMPARED,
    DECODE,
    HEADS,
    METHODS,
    RESULTS,
    fewer_heads,
    read_results,
)

DOCS = Path(__file__).parents[2] / "docs"
COLOURS = {
    "mean": "#0b5cad",
    "first": "#8e44ad",
    "random": "#5d6d7e",
    "ours": "#d9622b",
    "mean-distilled": "#4f9bdf",
    "calibrated": "#e0a43a",
    "mean-small": "#0b5cad",
    "ours-small": "#d9622b",
}
INK, FAINT = "#222222", "#7a7a7a"
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "svg.hashsalt": "uptrain",  # the same bytes every time
}
LOSS = "loss over the original, nats a token"


def draw_methods(results: Results) -> Figure:
    """Figure 4: methods, before and after an uptraining."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    methods = [*COMPARED, "mean-distilled", "calibrated"]
    panels = figure.subplots(1, len(HEADS), sharey=True)
    for axes, heads in zip(panels, HEADS, strict=True):
        for place, method in enumerate(methods):
            before, after = (increase(results, method, heads, alpha) for alpha in (0, ALPHA))
            colour = COLOURS[method]
            if before is not None and after is not None:
                axes.plot([before, after], [place, place], color=colour, alpha=0.4)
            ends = [(before, "white"), (after, colour)]
            known = sorted((value, fill) for value, fill in ends if value is not None and value > 0)
            for value, fill in known:
                axes.plot(value, place, "o", markersize=8, color=colour, markerfacecolor=fill)
            for (value, _), offset, side in zip(known, (-8, 8), ("right", "left"), strict=False):
                _note(axes, f"{value:+.3f}", value, place, (offset, -3), side)
        axes.set(xscale="log", title=f"{heads} KV head{'s' if heads > 1 else ''}", xlabel=LOSS)
        axes.margins(x=0.3, y=0.12)
        _plain(axes.xaxis)
    panels[0].set_yticks(range(len(methods)), [METHODS[method].label for method in methods])
    panels[0].invert_yaxis()
    figure.suptitle(f"○ converted   ● after alpha {ALPHA:g}", color=FAINT, fontsize=10)
    return figure


def draw_alphas(results: Results) -> Figure:
    """Figure 5: loss over the length of the uptraining."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, len(HEADS), sharey=True)
    for axes, heads in zip(panels, HEADS, strict=True):
        for method in ("mean", "mean-small", "ours", "ours-small"):
            curve = [(alpha, increase(results, method, heads, alpha)) for alpha in ALPHAS]
            known = [(alpha, value) for alpha, value in curve if value is not None and value > 0]
            if any(alpha for alpha, _ in known):
                style = "--" if method.endswith("small") else "-"
                axes.plot(
                    *zip(*known, strict=True), f"o{style}", markersize=5,
                    color=COLOURS[method], label=METHODS[method].label,
                )  # fmt: skip
        axes.set_xscale("symlog", linthresh=ALPHAS[1], linscale=0.4)
        axes.set_xlim(left=0)
        axes.set_xticks(ALPHAS, [f"{alpha:g}" for alpha in ALPHAS])
        axes.set_xticks([], minor=True)
        axes.set(yscale="log", title=f"{heads} KV head{'s' if heads > 1 else ''}")
        _plain(axes.yaxis)
    panels[0].set_ylabel(LOSS)
    figure.supxlabel(
        f"alpha: uptraining / pretraining (log scale above {ALPHAS[1]:g})", fontsize=10
    )
    if panels[-1].lines:
        figure.legend(handles=panels[-1].lines, loc="outside upper right", ncols=4)
    return figure


def draw_heads(results: Results) -> Figure:
    """Figure 6: time of a step by the number of KV heads, and loss against that time."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    by_heads, by_time = figure.subplots(1, 2)
    rows: list[dict[str, Any]] = results.get(DECODE, {"decode": []})["decode"]
    times: dict[int, dict[int, float]] = {}
    for row in rows:
        times.setdefault(row["batch"], {})[int(row["model"])] = row["milliseconds_per_step"]
    for number, (batch, curve) in enumerate(sorted(times.items())):
        shade = 0.35 + 0.65 * (number + 1) / len(times)
        by_heads.plot(
            list(curve), list(curve.values()), "o-", markersize=5,
            color=COLOURS["mean"], alpha=shade, label=f"batch {batch}",
        )  # fmt: skip
    whole = source_heads(results)
    heads = [*fewer_heads(whole), whole]
    by_heads.set(
        xscale="log", yscale="log", xlabel="KV heads", ylabel="milliseconds a decoding step"
    )
    by_heads.set_xticks(heads, [str(each) for each in heads])
    by_heads.set_xticks([], minor=True)
    _plain(by_heads.yaxis)
    if not times:
        return figure
    by_heads.legend()
    largest = max(times)
    for method, alpha, style in (("mean", ALPHA, "o-"), ("ours", 0, "o--"), ("ours", ALPHA, "o-")):
        found = [(n, increase(results, method, n, alpha)) for n in heads if n < whole]
        known = [(n, value) for n, value in found if value is not None and n in times[largest]]
        fill = COLOURS[method] if alpha else "white"
        by_time.plot(
            [times[largest][n] for n, _ in known], [value for _, value in known], style,
            color=COLOURS[method], markerfacecolor=fill, label=f"{METHODS[method].label}, alpha {alpha:g}",
        )  # fmt: skip
        for n, value in known if (method, alpha) == ("mean", ALPHA) else ():
            _note(by_time, str(n), times[largest][n], value, (0, 7), "center")
    by_time.margins(y=0.1)
    by_time.axvline(times[largest][whole], color=FAINT, linestyle=(0, (4, 3)))
    by_time.axhline(0, color=FAINT, linewidth=1)
    _note(by_time, "original", times[largest][whole], 0, (-4, 6), "right")
    by_time.set(xlabel=f"milliseconds a decoding step, batch {largest}", ylabel=LOSS)
    by_time.legend()
    return figure


def _note(axes: Any, text: str, x: float, y: float, offset: tuple[int, int], side: str) -> None:
    style = {"textcoords": "offset points", "fontsize": 9, "color": FAINT}
    axes.annotate(text, (x, y), xytext=offset, ha=side, **style)


def _plain(axis: Any) -> None:
    """Mark 0.1 and 0.3, and not 10⁻¹ alone."""
    axis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=DOCS)
    options = parser.parse_args()
    results = read_results(options.results)
    if not results.keys() - {DECODE}:
        parser.error(f"{options.results}: holds no point; run benchmarks/paper/measure.py first")
    folder = options.docs / "paper"
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        for name, draw in zip(FIGURES, (draw_methods, draw_alphas, draw_heads), strict=True):
            draw(results).savefig(folder / name, metadata={"Date": None, "Creator": None})
    page = options.docs / "results.md"
    page.write_text(make_page(results), encoding="utf-8")
    print(f"{page} and {len(FIGURES)} figures in {folder}")


if __name__ == "__main__":
    main()
