"""The pictures of a report, drawn with matplotlib (extra `report`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

HOW_TO_GET_PLOTS = "Plots need matplotlib: pip install 'uptrain-gqa[report]'"

# Told apart by lightness too, so that they survive grey print and most colour blindness.
_COLOURS = ("#0b5cad", "#d9622b", "#2a9d70", "#8e44ad", "#b8860b", "#5d6d7e", "#c2185b", "#00838f")
_INK, _FAINT, _GRID = "#222222", "#7a7a7a", "#e6e6e6"
_ALARM = "#c2185b"
_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "text.color": _INK,
}


Points = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Curve:
    """What one run measured on its way; every list of [tokens, nats a token]."""

    name: str
    loss: Points = ()
    """Cross-entropy of the steps."""
    kl: Points = ()
    """KL(teacher ‖ model) of the steps; empty without a teacher."""
    validation_loss: Points = ()
    validation_kl: Points = ()
    spikes: Points = ()
    """Losses that stood out."""
    exported_tokens: float | None = None
    """Tokens of the step that was exported; None if it was the last one."""
    levels: dict[str, float] = field(default_factory=dict)
    """Losses to draw as horizontal lines, by their label."""


@dataclass(frozen=True)
class Point:
    """A converted model: what it costs to serve against what it lost."""

    name: str
    kv_cache_bytes: int
    """A token."""
    converted: float | None
    """Loss over the original before uptraining, nats a token."""
    final: float | None
    """Loss over the original after uptraining, nats a token."""


def can_draw() -> bool:
    """Say whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw_loss(path: Path, curves: Sequence[Curve]) -> None:
    """Draw losses over tokens, and in a panel of its own the KL to a teacher if a run had one.

    One run is drawn in full, several as smooth lines.

    Args:
        path: PNG to write.
        curves: At least one.
    """
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        alone = len(curves) == 1
        labels = ["loss, nats a token"]
        if any(curve.kl or curve.validation_kl for curve in curves):
            labels.append("KL to the teacher")
        figure, panels = _panels("tokens trained on", labels)
        for number, curve in enumerate(curves):
            colour = _COLOURS[number % len(_COLOURS)]
            _draw_curve(panels[0], curve.loss, curve.validation_loss, colour, curve.name, alone)
            if len(panels) > 1:
                _draw_curve(panels[1], curve.kl, curve.validation_kl, colour, curve.name, alone)
        # Behind all curves: a limit that is set no longer follows what is drawn.
        panels[0].set_xlim(left=0)
        for axes in panels[1:]:
            axes.set_ylim(bottom=0)
        if alone:
            _draw_spikes(panels[0], curves[0].spikes)
            _draw_export(panels, curves[0])
        _draw_levels(panels[0], curves[0].levels if alone else _shared_levels(curves))
        if alone:
            panels[0].set_title(curves[0].name)
        else:
            panels[0].set_title("— training, smoothed   ● validation", color=_FAINT, fontsize=10)
        _draw_legend(panels[0])
        _save(figure, path)


def draw_comparison(path: Path, points: Sequence[Point]) -> None:
    """Draw what runs lost against their KV cache, before and after uptraining.

    Args:
        path: PNG to write.
        points: At least one, each with at least one of the two losses.
    """
    import matplotlib as mpl
    from matplotlib.ticker import FuncFormatter, NullFormatter

    with mpl.rc_context(_STYLE):
        figure, axes = _figure(
            "KV cache, bytes a token (log scale)", "loss over the original, nats a token"
        )
        axes.axhline(0, color=_FAINT, linewidth=1)
        for number, point in enumerate(points):
            _draw_point(axes, point, _beside(points, number), _COLOURS[number % len(_COLOURS)])
        axes.set_xscale("log", base=2)
        sizes = sorted({point.kv_cache_bytes for point in points})
        axes.set_xlim(sizes[0] / 2, sizes[-1] * 2)
        axes.set_xticks(sizes)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title("○ converted   ● after uptraining", color=_FAINT, fontsize=10)
        _draw_legend(axes)
        _save(figure, path)


def draw_layers(path: Path, layers: Sequence[Mapping[str, Any]]) -> None:
    """Draw what each layer lost and how far each repair step brought it back.

    Args:
        path: The PNG to write.
        layers: As `uptrain.json` holds them: `layer`, `discarded_energy`, `error` by step.
    """
    known = [layer for layer in layers if layer["discarded_energy"]]
    steps = list(dict.fromkeys(step for layer in known for step in layer["error"]))
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        figure, axes = _figure("layer", "part of the energy that is discarded")
        positions = [layer["layer"] for layer in known]
        if steps:
            axes.set_ylabel("relative error of the residual stream")
            axes.set_yscale("log")
            for step, colour in zip(steps, _COLOURS, strict=False):
                errors = [layer["error"].get(step, np.nan) for layer in known]
                axes.plot(positions, errors, marker="o", markersize=4, color=colour, label=step)
        else:
            for part, colour in zip(("value", "key"), _COLOURS, strict=False):
                lost = [layer["discarded_energy"][part] for layer in known]
                axes.plot(positions, lost, marker="o", markersize=4, color=colour, label=part)
        axes.xaxis.get_major_locator().set_params(integer=True)
        _draw_legend(axes)
        _save(figure, path)


def smooth(values: Sequence[float]) -> list[float]:
    """Average each loss with its neighbours on both sides, 1/20 of the run in all."""
    reach = len(values) // 40
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    centre = np.arange(len(values))
    # Where the run begins and ends the window shrinks on both sides, so that it stays centred.
    reach_here = np.minimum(reach, np.minimum(centre, centre[::-1]))
    total = sums[centre + reach_here + 1] - sums[centre - reach_here]
    return [float(value) for value in total / (2 * reach_here + 1)]


def _figure(x_label: str, y_label: str) -> tuple[Any, Any]:
    figure, (axes,) = _panels(x_label, [y_label])
    return figure, axes


def _panels(x_label: str, y_labels: Sequence[str]) -> tuple[Any, Sequence[Any]]:
    """Stack panels over one x axis, the first twice as high as the others."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not through pyplot: a library must not touch the caller's figures or choose a display.
    count = len(y_labels)
    figure = Figure(figsize=(8, 3.3 + 1.8 * (count - 1) + 1.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    ratios = [2] + [1] * (count - 1)
    grid = figure.subplots(count, squeeze=False, sharex=True, height_ratios=ratios)
    panels = [row[0] for row in grid]
    for axes, label in zip(panels, y_labels, strict=True):
        axes.set_ylabel(label)
    panels[-1].set_xlabel(x_label)
    figure.align_ylabels(panels)
    return figure, panels


def _draw_curve(
    axes: Any, training: Points, validation: Points, colour: str, name: str, alone: bool
) -> None:
    from matplotlib.ticker import EngFormatter

    if training:
        tokens, values = np.array(training).T
        smoothed = smooth(values)
        is_noisy = alone and smoothed != list(values)
        if is_noisy:
            axes.plot(tokens, values, color=colour, alpha=0.25, linewidth=1)
        label = f"training{', smoothed' * is_noisy}" if alone else name
        axes.plot(tokens, smoothed, color=colour, linewidth=2, label=label)
    if validation:
        tokens, values = np.array(validation).T
        own_colour = _COLOURS[1] if alone else colour
        label = "validation" if alone else "" if training else name
        style = {"marker": "o", "markersize": 4, "linewidth": 1.2, "clip_on": False, "zorder": 3}
        axes.plot(tokens, values, color=own_colour, label=label or None, **style)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _draw_spikes(axes: Any, spikes: Points) -> None:
    if spikes:
        tokens, losses = np.array(spikes).T
        style = {"marker": "v", "markersize": 6, "linestyle": "none", "color": _ALARM, "zorder": 4}
        axes.plot(tokens, losses, label="spike", **style)


def _draw_export(panels: Sequence[Any], curve: Curve) -> None:
    """Ring what was measured of the step that was exported, if others came behind it."""
    for axes, points in zip(panels, (curve.validation_loss, curve.validation_kl), strict=False):
        for tokens, value in points:
            if tokens == curve.exported_tokens:
                style = {"markersize": 11, "markeredgewidth": 1.5, "clip_on": False, "zorder": 4}
                ring = {"markerfacecolor": "none", "markeredgecolor": _INK, "linestyle": "none"}
                axes.plot([tokens], [value], "o", **ring, **style)
                axes.annotate(
                    "exported",
                    (tokens, value),
                    xytext=(0, 10),
                    textcoords="offset points",
                    ha="center",
                    fontsize=9,
                )


def _draw_legend(axes: Any) -> None:
    # Above the axes, where no line can run through it.
    count = len(axes.get_legend_handles_labels()[1])
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=min(count, 4), borderaxespad=0.2)


def _draw_levels(axes: Any, levels: dict[str, float]) -> None:
    for label, loss in levels.items():
        axes.axhline(loss, color=_FAINT, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"{label}\n{loss:.3f}",
            (1, loss),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=_FAINT,
            fontsize=9,
        )


def _shared_levels(curves: Sequence[Curve]) -> dict[str, float]:
    first = curves[0].levels.get("original")
    is_shared = first is not None and all(c.levels.get("original") == first for c in curves)
    return {"original": first} if first is not None and is_shared else {}


def _beside(points: Sequence[Point], number: int) -> float:
    """Give a point's place on the x axis, beside the others of the same size."""
    size = points[number].kv_cache_bytes
    same = [i for i, point in enumerate(points) if point.kv_cache_bytes == size]
    return float(size * 2 ** ((same.index(number) - (len(same) - 1) / 2) * 0.8 / len(points)))


def _draw_point(axes: Any, point: Point, x: float, colour: str) -> None:
    hollow = {"marker": "o", "markerfacecolor": "white", "markeredgecolor": colour}
    filled = {"marker": "o", "color": colour}
    style = {"markersize": 8, "linestyle": "none", "zorder": 3}
    if point.converted is not None and point.final is not None:
        axes.annotate(
            "",
            (x, point.final),
            (x, point.converted),
            arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.5},
        )
    label: str | None = point.name
    for loss, marker in ((point.final, filled), (point.converted, hollow)):
        if loss is None:
            continue
        axes.plot([x], [loss], label=label, **marker, **style)
        axes.annotate(f"{loss:+.3f}", (x, loss), (8, -3), textcoords="offset points", fontsize=9)
        label = None


def _save(figure: Any, path: Path) -> None:
    # Without its version matplotlib draws the same bytes every time.
    figure.savefig(path, format="png", metadata={"Software": None})
