"""The pictures of a report, drawn with matplotlib (extra `report`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from uptrain.report.canvas import (
    FAINT,
    INK,
    PAPER,
    Figure,
    as_figure,
    colour,
    legend,
    panels,
    shown,
    styled,
)

STAGE_COLOURS = {"original": INK, "converted": colour(1), "uptrained": colour(0)}
_DOT = {"marker": "o", "markersize": 4, "linewidth": 1.4, "clip_on": False, "zorder": 3}

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Point:
    """A converted model: what it costs to serve against what it lost."""

    name: str
    x: float
    """What it costs."""
    converted: float | None
    """Loss over the original before uptraining, nats a token."""
    final: float | None
    """Loss over the original after uptraining, nats a token."""


@dataclass(frozen=True)
class Series:
    """One line of a plot."""

    name: str
    x: Sequence[float] = ()
    y: Sequence[float] = field(default_factory=list)


def draw_layers(layers: Rows) -> Figure:
    """Draw what each layer lost, and how far each repair step brought it back.

    Args:
        layers: As `uptrain.json` holds them: `layer`, `discarded_energy`, `error` by step.
    """
    known = [layer for layer in layers if layer["discarded_energy"]]
    steps = list(dict.fromkeys(step for layer in known for step in layer["error"]))
    places = [layer["layer"] for layer in known]
    parts = list(dict.fromkeys(part for layer in known for part in layer["discarded_energy"]))
    lost = {part: [layer["discarded_energy"][part] for layer in known] for part in parts}
    with styled():
        labels = ["energy discarded", *(["relative error"] if steps else [])]
        drawing, stacked = panels("layer", labels, 1.7)
        for part, values in lost.items():
            shade = colour({"value": 3, "key": 2}.get(part, 4))
            stacked[0].plot(places, values, color=shade, label=f"{part}s", **_DOT)
        stacked[0].set_ylim(bottom=0)
        stacked[0].yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        for number, step in enumerate(steps):
            errors = [layer["error"].get(step, np.nan) for layer in known]
            stacked[1].plot(places, errors, color=_repair_colour(number, steps), label=step, **_DOT)
        if steps:
            stacked[1].set_yscale("log")
            _plain_log(stacked[1].yaxis)
        stacked[-1].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        for axes in stacked:
            legend(axes)
        alt = f"Energy discarded in layers {places[0]} to {places[-1]}: " + "; ".join(
            f"{part}s {min(values):.1%} to {max(values):.1%}" for part, values in lost.items()
        )
        if steps:
            means = ", ".join(
                f"{step} {np.mean([layer['error'][step] for layer in known if step in layer['error']]):.4f}"
                for step in steps
            )
            alt += f". Mean relative error of the residual stream by step: {means}"
        return as_figure(
            drawing, "layers", "What each layer lost, and what each repair left of it", f"{alt}."
        )


def draw_positions(stages: Mapping[str, Rows], context: int) -> Figure:
    """Draw what is lost at each place of the context.

    Args:
        stages: By stage, rows of `by_position` that hold `loss_increase`.
        context: Tokens of a block.
    """
    places = [row["first"] - 1 for row in next(iter(stages.values()))]
    with styled():
        drawing, stacked = panels("tokens before", ["loss over the original", "agreement"], 2.0)
        for axes, key in zip(stacked, ("loss_increase", "top1_agreement"), strict=True):
            _by_doubling(axes, places)
            for stage, rows in stages.items():
                values = [row[key] for row in rows]
                axes.plot(range(len(rows)), values, color=_of_stage(stage), label=stage, **_DOT)
        stacked[0].axhline(0, color=FAINT, linewidth=1)
        stacked[1].yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        legend(stacked[0])
        alt = "; ".join(
            f"{stage}: {rows[0]['loss_increase']:+.3f} on the first token, "
            f"{rows[-1]['loss_increase']:+.3f} behind {places[-1]:,} tokens"
            for stage, rows in stages.items()
        )
        return as_figure(
            drawing,
            "positions",
            f"By position in a context of {context:,} tokens",
            f"Loss over the original by the number of tokens before. {alt}.",
        )


def draw_copying(series: Sequence[Series]) -> Figure:
    """Draw the loss on a random span that comes again, by how far back it was.

    Args:
        series: By model: distances and losses, nats a token.
    """
    distances = list(series[0].x)
    with styled():
        drawing, (axes,) = panels("tokens back", ["loss the second time"])
        _by_doubling(axes, distances)
        for each in series:
            axes.plot(
                range(len(each.y)), each.y, color=_of_stage(each.name), label=each.name, **_DOT
            )
        legend(axes)
        alt = "; ".join(
            f"{each.name} {each.y[0]:.2f} at {distances[0]:,} to {each.y[-1]:.2f} at {distances[-1]:,}"
            for each in series
        )
        return as_figure(
            drawing,
            "copying",
            "Copying a span of random tokens",
            f"Loss, nats a token, on the second showing by distance: {alt}.",
        )


def draw_decode(rows: Rows) -> Figure:
    """Draw the time of a decoding step, and the bound that the memory's bandwidth sets.

    Args:
        rows: Of `measure_decode`.
    """
    settings = list(dict.fromkeys((row["context"], row["batch"]) for row in rows))
    models = [name for name in ("reference", "target") if name in {row["model"] for row in rows}]
    names = {"reference": "original", "target": "this model"}
    height = 0.8 / len(models)
    with styled():
        drawing, (axes,) = panels(
            "milliseconds a step", [""], 0.5 + 0.24 * len(models) * len(settings)
        )
        slowest = max(row["milliseconds_per_step"] for row in rows)
        for row in rows:
            number = models.index(row["model"])
            place = settings.index((row["context"], row["batch"]))
            y = place + (number - (len(models) - 1) / 2) * height
            shade = FAINT if row["model"] == "reference" else colour(0)
            took, bound = row["milliseconds_per_step"], row["bound_milliseconds"]
            axes.barh(y, took, height * 0.85, color=shade, alpha=0.35)
            axes.barh(y, min(bound, took), height * 0.85, color=shade)
            axes.text(took + slowest * 0.01, y, f"{took:,.3g}", va="center", fontsize=8.5)
        axes.set_yticks(range(len(settings)), [f"{b:,} × {c:,}" for c, b in settings])
        axes.set_ylabel("batch × context")
        axes.set_xlim(0, slowest * 1.12)
        axes.grid(False, axis="y")
        axes.invert_yaxis()
        for name in models:
            shade = FAINT if name == "reference" else colour(0)
            axes.barh([np.nan], [np.nan], color=shade, label=names[name])
        axes.barh([np.nan], [np.nan], color=FAINT, alpha=0.35, label="beyond the bound")
        legend(axes)
        alt = "; ".join(
            f"batch {row['batch']:,} at {row['context']:,}, {names[row['model']]}: "
            f"{row['milliseconds_per_step']:.3g} ms, bound {row['bound_milliseconds']:.3g}"
            for row in rows
        )
        return as_figure(
            drawing,
            "decode",
            "Time of a decoding step; solid is the least that the bandwidth allows",
            f"Milliseconds a decoding step: {alt}.",
        )


def draw_comparison(points: Sequence[Point], what: str, name: str) -> Figure:
    """Draw what runs lost against what they cost to serve, before and after uptraining.

    Args:
        points: At least one, each with at least one of the two losses.
        what: The cost, with its unit.
        name: Of the figure.
    """
    with styled():
        costs = sorted({point.x for point in points})
        is_wide = costs[-1] >= 2 * costs[0]
        label = f"{what}{' (log scale)' * is_wide}"
        drawing, (axes,) = panels(label, ["loss over the original"], 3.0)
        axes.axhline(0, color=FAINT, linewidth=1)
        for number, point in enumerate(points):
            _draw_point(axes, point, beside(points, number), colour(number))
        if is_wide:
            axes.set_xscale("log", base=2)
            axes.set_xticks(_apart(costs))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.4g}")
            axes.minorticks_off()
        margin = (costs[-1] / costs[0]) ** 0.2 * 1.1
        axes.set_xlim(costs[0] / margin, costs[-1] * margin)
        legend(axes)
        alt = "; ".join(
            f"{point.name} at {point.x:,.4g}: "
            + " → ".join(
                f"{loss:+.3f}" for loss in (point.converted, point.final) if loss is not None
            )
            for point in points
        )
        return as_figure(
            drawing,
            name,
            f"Loss over the original against {what}: hollow converted, full after uptraining",
            f"Loss over the original, nats a token, against {what}. {alt}.",
        )


def beside(points: Sequence[Point], number: int) -> float:
    """Give a point's place on the x axis, beside the others of the same cost."""
    cost = points[number].x
    same = [i for i, point in enumerate(points) if point.x == cost]
    return float(cost * 2 ** ((same.index(number) - (len(same) - 1) / 2) * 0.8 / len(points)))


def _of_stage(stage: str) -> str:
    return STAGE_COLOURS.get(stage, colour(0))


def _repair_colour(number: int, steps: Sequence[str]) -> str:
    """Give the last step, what is left in the end, the colour of a finished model."""
    return colour(0) if number == len(steps) - 1 else colour((1, 4, 7, 5)[number % 4])


def _by_doubling(axes: Any, places: Sequence[float]) -> None:
    """Set places that double at equal distances, with as many labels as there is room for."""
    every = -(-len(places) // 9)
    ticks = range(len(places) - 1, -1, -every)
    axes.set_xticks(ticks, [f"{places[tick]:,}" for tick in ticks])


def _plain_log(axis: Any) -> None:
    """Write powers of ten, and what lies between if there are few of them, as plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_locator(NullLocator())


def _apart(costs: Sequence[float]) -> list[float]:
    """Leave out ticks whose labels would run into the one before."""
    kept = [costs[0]]
    room = (costs[-1] / costs[0]) ** 0.17
    for cost in costs[1:]:
        if cost >= kept[-1] * max(room, 1.05):
            kept.append(cost)
    return kept


def _draw_point(axes: Any, point: Point, x: float, shade: str) -> None:
    if point.converted is not None and point.final is not None:
        axes.plot([x, x], [point.converted, point.final], color=shade, alpha=0.5, linewidth=1.4)
    label: str | None = shown(point.name)
    for loss, face in ((point.final, shade), (point.converted, PAPER)):
        if loss is None:
            continue
        style = {"marker": "o", "markersize": 7, "linestyle": "none", "zorder": 3}
        axes.plot([x], [loss], markerfacecolor=face, markeredgecolor=shade, label=label, **style)
        if label is not None:
            place = {"xytext": (7, -3), "textcoords": "offset points", "fontsize": 8.5}
            axes.annotate(f"{loss:+.3f}", (x, loss), **place)
        label = None
