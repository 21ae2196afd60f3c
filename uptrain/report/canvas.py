"""An empty figure, and its way to SVG whose colours follow a light or a dark page."""

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from typing import Any

from uptrain.checkpoint.card import printable

HOW_TO_GET_PLOTS = "Plots need matplotlib: pip install 'uptrain-gqa[report]'"

# By their role: on a light page, on a dark one. Each light one occurs once, for it stands for the
# role until the figure is text. Series are told apart by lightness too, for grey print and most
# colour blindness.
COLOURS = {
    "ink": ("#1f2328", "#e6e8eb"),
    "faint": ("#69707a", "#9aa3ad"),
    "grid": ("#e4e6ea", "#2c323a"),
    "paper": ("#fefefe", "#171a1f"),
    "alarm": ("#c2185c", "#ff7eb0"),
    "series-0": ("#0b5cad", "#6cb2f7"),
    "series-1": ("#d9622b", "#f59a6b"),
    "series-2": ("#2a9d70", "#5fd0a3"),
    "series-3": ("#8e44ad", "#cb96e6"),
    "series-4": ("#a8790b", "#e3bd52"),
    "series-5": ("#5d6d7e", "#a9b8c6"),
    "series-6": ("#c2185b", "#f58fb8"),
    "series-7": ("#00838f", "#58c7d1"),
}
INK, FAINT, GRID, PAPER, ALARM = (
    COLOURS[role][0] for role in ("ink", "faint", "grid", "paper", "alarm")
)
_SERIES = [light for role, (light, _) in COLOURS.items() if role.startswith("series")]
_WIDTH_INCHES = 4.6  # small, so that its words can be read where a telephone shrinks it
_STYLE = {
    "font.size": 9.5,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a name is one
    "svg.fonttype": "none",
}
_LONGEST_NAME = 36


@dataclass(frozen=True)
class Figure:
    """A picture of a report."""

    name: str
    """Of its file, without the suffix."""
    caption: str
    alt: str
    """What it shows, in words and figures."""
    svg: str
    """To stand in a page that defines `colour_rules`."""

    @property
    def file(self) -> str:
        """Its file's name."""
        return f"{self.name}.svg"

    def standalone(self) -> str:
        """Give the content of a file of its own."""
        head, body = self.svg.split(">", 1)
        head = head.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
        head = head.replace("<svg", '<svg xmlns:xlink="http://www.w3.org/1999/xlink"', 1)
        return f"{head}><style>{colour_rules('svg')}</style>{body}"


def can_draw() -> bool:
    """Say whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def colour(number: int) -> str:
    """Give the colour of a series."""
    return _SERIES[number % len(_SERIES)]


def colour_rules(selector: str) -> str:
    """Write the CSS that gives each role its colour on a light and on a dark page."""
    light, dark = (
        "".join(f"--{role}:{pair[shade]};" for role, pair in COLOURS.items()) for shade in (0, 1)
    )
    return f"{selector}{{{light}}}@media(prefers-color-scheme:dark){{{selector}{{{dark}}}}}"


def shown(name: str) -> str:
    """Make a name fit for a legend: printable, not too long, not hidden for an underscore."""
    text = printable(name)
    half = _LONGEST_NAME // 2
    text = text if len(text) <= _LONGEST_NAME else f"{text[:half]}…{text[-half:]}"
    return f"\u200b{text}" if text.startswith("_") else text


@contextmanager
def styled() -> Iterator[None]:
    """Draw in the report's style, and in any script: a browser has the glyphs that it lacks."""
    import matplotlib as mpl

    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def panels(
    x_label: str, y_labels: Sequence[str], first_inches: float = 2.5
) -> tuple[Any, list[Any]]:
    """Stack panels over one x axis, all but the first of 1.4 inches."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Drawing

    # Not through pyplot: a library must not touch the caller's figures or choose a display.
    heights = [first_inches] + [1.4] * (len(y_labels) - 1)
    drawing = Drawing(figsize=(_WIDTH_INCHES, sum(heights) + 0.5), layout="constrained")
    FigureCanvasSVG(drawing)
    grid = drawing.subplots(len(heights), squeeze=False, sharex=True, height_ratios=heights)
    stacked = [row[0] for row in grid]
    for axes, label in zip(stacked, y_labels, strict=True):
        axes.set_ylabel(label)
    stacked[-1].set_xlabel(x_label)
    drawing.align_ylabels(stacked)
    return drawing, stacked


def legend(axes: Any) -> None:
    """Name the lines above the axes, where none of them can run through a name."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        columns = max(1, min(len(labels), 60 // (max(map(len, labels)) + 6)))
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
        axes.legend(
            handles,
            labels,
            ncols=columns,
            handlelength=1.4,
            columnspacing=1.2,
            borderpad=0,
            **place,
        )


def as_figure(drawing: Any, name: str, caption: str, alt: str) -> Figure:
    """Turn a drawing into SVG; the same drawing gives the same text."""
    import matplotlib as mpl

    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with io.StringIO() as file, mpl.rc_context({"svg.hashsalt": name}):
        drawing.savefig(file, format="svg", transparent=True, metadata=nothing)
        text = file.getvalue()
    text = text[text.index("<svg") :]
    _, body = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    body = re.sub(r"<[^>]*>", lambda tag: _tidy(tag[0], name), body)
    opening = (
        f'<svg {box[0]} role="img" aria-label="{escape(alt)}" '
        'font-family="system-ui, sans-serif" stroke-linejoin="round" stroke-linecap="butt">'
    )
    return Figure(name, caption, alt, opening + "".join(body.splitlines()))


def _tidy(tag: str, name: str) -> str:
    """Give a tag the page's font and colours, and ids that no other figure of the page has."""
    tag = re.sub(r'<g id="[^"]*"', "<g", tag)
    tag = re.sub(r'(\bid="|"#|url\(#)', rf"\g<1>{name}-", tag)
    tag = re.sub(r"font-family: [^;\"]*;? ?", "", tag)
    tag = re.sub(r"[0-9]+[.][0-9]{3,}", lambda number: f"{float(number[0]):.2f}", tag)
    for role, (light, _) in COLOURS.items():
        tag = tag.replace(light, f"var(--{role})")
    return tag.replace("\n", " ")
