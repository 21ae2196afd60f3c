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


@dataclass(frozen=True)
class Curve:
    """The losses of one run; every list of [tokens, nats a token]."""

    name: str
    training: Sequence[Sequence[float]] = ()
    validation: Sequence[Sequence[float]] = ()
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
    """Draw training and validation loss over tokens: one run in full, several as smooth lines.

    Args:
        path: PNG to write.
        curves: At least one.
    """
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        figure, axes = _figure("tokens trained on", "loss, nats a token")
        for number, curve in enumerate(curves):
            colour = _COLOURS[number % len(_COLOURS)]
            _draw_curve(axes, curve, colour, alone=len(curves) == 1)
        if len(curves) == 1:
            _draw_levels(axes, curves[0].levels)
        else:
            _draw_levels(axes, _shared_levels(curves))
        axes.set_xlim(left=0)
        axes.set_title(curves[0].name if len(curves) == 1 else "Uptraining")
        _draw_legend(axes)
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
            _draw_point(axes, point, _COLOURS[number % len(_COLOURS)])
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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not through pyplot: a library must not touch the caller's figures or choose a display.
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return figure, axes


def _draw_curve(axes: Any, curve: Curve, colour: str, alone: bool) -> None:
    from matplotlib.ticker import EngFormatter

    if curve.training:
        tokens, losses = np.array(curve.training).T
        if alone:
            axes.plot(tokens, losses, color=colour, alpha=0.25, linewidth=1, label="training")
        label = "training, smoothed" if alone else curve.name
        axes.plot(tokens, smooth(losses), color=colour, linewidth=2, label=label)
    if curve.validation:
        tokens, losses = np.array(curve.validation).T
        own_colour = _COLOURS[1] if alone else colour
        name = "validation" if alone else None if curve.training else curve.name
        axes.plot(
            tokens, losses, marker="o", markersize=5, linewidth=1, color=own_colour, label=name
        )
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _draw_legend(axes: Any) -> None:
    # Above the axes, where no line can run through it.
    count = len(axes.get_legend_handles_labels()[1])
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=min(count, 4), borderaxespad=0.2)


def _draw_levels(axes: Any, levels: dict[str, float]) -> None:
    for label, loss in levels.items():
        axes.axhline(loss, color=_FAINT, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"{label} {loss:.3f}",
            (1, loss),
            xycoords=("axes fraction", "data"),
            # Below the original, which a good run comes close to from above.
            xytext=(-2, -3 if label == "original" else 3),
            va="top" if label == "original" else "baseline",
            textcoords="offset points",
            ha="right",
            color=_FAINT,
            fontsize=9,
        )


def _shared_levels(curves: Sequence[Curve]) -> dict[str, float]:
    first = curves[0].levels.get("original")
    is_shared = first is not None and all(c.levels.get("original") == first for c in curves)
    return {"original": first} if first is not None and is_shared else {}


def _draw_point(axes: Any, point: Point, colour: str) -> None:
    x = point.kv_cache_bytes
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
