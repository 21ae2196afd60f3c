"""The recovery curve: what was measured of runs on their way, over tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from uptrain.report.canvas import (
    ALARM,
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


def draw_recovery(curves: Sequence[Curve]) -> Figure:
    """Draw losses over tokens, and in a panel of its own the KL to a teacher if a run had one.

    One run is drawn in full, several as smooth lines.

    Args:
        curves: At least one.
    """
    with styled():
        alone = len(curves) == 1
        labels = ["loss, nats a token"]
        if any(curve.kl or curve.validation_kl for curve in curves):
            labels.append("KL to the teacher")
        drawing, stacked = panels("tokens trained on", labels)
        for number, curve in enumerate(curves):
            shade, name = colour(number), shown(curve.name)
            _draw(stacked[0], curve.loss, curve.validation_loss, shade, name, alone)
            if len(stacked) > 1:
                _draw(stacked[1], curve.kl, curve.validation_kl, shade, name, alone)
        # Behind all curves: a limit that is set no longer follows what is drawn.
        stacked[0].set_xlim(left=0)
        for axes in stacked[1:]:
            axes.set_ylim(bottom=0)
        if alone:
            _draw_spikes(stacked[0], curves[0].spikes)
            _draw_export(stacked, curves[0])
        _draw_levels(stacked[0], curves[0].levels if alone else _shared_levels(curves))
        legend(stacked[0])
        caption = f"Recovery of {curves[0].name} over the tokens trained on"
        if not alone:
            caption = "Recovery over the tokens trained on: lines of training, dots of validation"
        alt = " ".join(_describe(curve) for curve in curves)
        return as_figure(drawing, "loss", caption, alt)


def smooth(values: Sequence[float]) -> list[float]:
    """Average each loss with its neighbours on both sides, 1/20 of the run in all."""
    reach = len(values) // 40
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    centre = np.arange(len(values))
    # Where the run begins and ends the window shrinks on both sides, so that it stays centred.
    reach_here = np.minimum(reach, np.minimum(centre, centre[::-1]))
    total = sums[centre + reach_here + 1] - sums[centre - reach_here]
    return [float(value) for value in total / (2 * reach_here + 1)]


def _describe(curve: Curve) -> str:
    """Say in words how a curve goes."""
    parts = []
    for what, points in (
        ("training loss", curve.loss),
        ("validation loss", curve.validation_loss),
        ("validation KL", curve.validation_kl),
    ):
        if points:
            ends = (
                f"{points[0][1]:.3f} → {points[-1][1]:.3f}" if points[1:] else f"{points[0][1]:.3f}"
            )
            parts.append(f"{what} {ends}")
    longest = max((p[-1][0] for p in (curve.loss, curve.validation_loss) if p), default=0)
    parts += [f"{label} {loss:.3f}" for label, loss in curve.levels.items()]
    return f"{curve.name}, {longest:,.0f} tokens: {', '.join(parts)}."


def _draw(
    axes: Any, training: Points, validation: Points, shade: str, name: str, alone: bool
) -> None:
    from matplotlib.ticker import EngFormatter

    if training:
        tokens, values = np.array(training).T
        smoothed = smooth(values)
        is_noisy = alone and smoothed != list(values)
        if is_noisy:
            axes.plot(tokens, values, color=shade, alpha=0.25, linewidth=1)
        label = f"training{', smoothed' * is_noisy}" if alone else name
        # Of several runs it is validation that can be compared, where there is more than an end.
        is_faint = not alone and len(validation) > 2
        alpha, width = (0.3, 1.2) if is_faint else (1.0, 1.8)
        named = None if is_faint else label
        axes.plot(tokens, smoothed, color=shade, alpha=alpha, linewidth=width, label=named)
    if validation:
        tokens, values = np.array(validation).T
        own = colour(1) if alone else shade
        label = "validation" if alone else "" if training and len(validation) < 3 else name
        style = {"marker": "o", "markersize": 4, "linewidth": 1.2, "clip_on": False, "zorder": 3}
        axes.plot(tokens, values, color=own, label=label or None, **style)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _draw_spikes(axes: Any, spikes: Points) -> None:
    if spikes:
        tokens, losses = np.array(spikes).T
        style = {"marker": "v", "markersize": 6, "linestyle": "none", "color": ALARM, "zorder": 4}
        axes.plot(tokens, losses, label="spike", **style)


def _draw_export(stacked: Sequence[Any], curve: Curve) -> None:
    """Ring what was measured of the step that was exported, if others came behind it."""
    for axes, points in zip(stacked, (curve.validation_loss, curve.validation_kl), strict=False):
        for tokens, value in points:
            if tokens == curve.exported_tokens:
                style = {"markersize": 10, "markeredgewidth": 1.5, "clip_on": False, "zorder": 4}
                ring = {"markerfacecolor": "none", "markeredgecolor": INK, "linestyle": "none"}
                axes.plot([tokens], [value], "o", **ring, **style)
                axes.annotate(
                    "exported",
                    (tokens, value),
                    xytext=(0, 9),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8.5,
                )


def _draw_levels(axes: Any, levels: dict[str, float]) -> None:
    for label, loss in levels.items():
        axes.axhline(loss, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"{label} {loss:.3f}",
            (1, loss),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            color=FAINT,
            fontsize=8.5,
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1, "alpha": 0.6},
        )


def _shared_levels(curves: Sequence[Curve]) -> dict[str, float]:
    first = curves[0].levels.get("original")
    is_shared = first is not None and all(c.levels.get("original") == first for c in curves)
    return {"original": first} if first is not None and is_shared else {}
