"""The points of the figures: by which method, to how many KV heads, uptrained for how long."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

RECIPE = "books-14m-gqa4-paper"
RESULTS = Path(__file__).parent / "results"
ALPHA = 0.05
ALPHAS = (0, 0.005, 0.01, 0.02, ALPHA, 0.1)
SHORT_ALPHAS = (0.005, 0.01)
HEADS = (1, 4)
"""Those of which the whole curve over alpha is measured."""
DECODE = "decode"
"""Name of the measurement that is not a point: the speed for each number of KV heads."""

CONVERSIONS = {
    "mean": ("convert.method=mean",),
    "first": ("convert.method=first",),
    "random": ("convert.method=random",),
    "calibrated": ("convert.method=null", "convert.calibration={text}"),
}
"""What each kind of conversion changes in the recipe."""

_DISTILLED = ("train.teacher={source}",)
_SMALL_BATCHES = ("train.batch_tokens=16384", "train.floor=0")


class Method(NamedTuple):
    """A conversion and an uptraining."""

    label: str
    conversion: str
    train: tuple[str, ...] = ()
    """What it changes in the recipe's uptraining."""


METHODS = {
    "mean": Method("mean (paper)", "mean"),
    "first": Method("first", "first"),
    "random": Method("random", "random"),
    "ours": Method("calibrated, distilled (ours)", "calibrated", _DISTILLED),
    "mean-distilled": Method("mean, distilled", "mean", _DISTILLED),
    "calibrated": Method("calibrated, not distilled", "calibrated"),
    "mean-small": Method("mean (paper), small batches", "mean", _SMALL_BATCHES),
    "ours-small": Method(
        "ours, small batches",
        "calibrated",
        (*_DISTILLED, *_SMALL_BATCHES, "train.learning_rate=3e-4"),
    ),
}
COMPARED = ("mean", "first", "random", "ours")
"""The methods of the paper, and ours."""


class Point(NamedTuple):
    """One checkpoint that is made and evaluated."""

    method: str
    num_key_value_heads: int
    alpha: float

    @property
    def name(self) -> str:
        """Of its file among the results."""
        return f"{self.method}-{self.num_key_value_heads}-{self.alpha:g}"


def all_points(source_heads: int) -> list[Point]:
    """Give what is to be measured, first what matters most.

    Args:
        source_heads: KV heads of the original.
    """
    return list(dict.fromkeys(_points(source_heads)))


def fewer_heads(source_heads: int) -> list[int]:
    """Give the numbers of KV heads that the original can go to."""
    return [heads for heads in range(1, source_heads) if source_heads % heads == 0]


def _points(source_heads: int) -> Iterator[Point]:
    fewer = fewer_heads(source_heads)
    for heads in fewer:
        yield from (Point(method, heads, 0) for method in COMPARED)
    for heads in HEADS:
        yield from (Point(method, heads, ALPHA) for method in COMPARED)
    for heads in fewer:
        yield from (Point(method, heads, ALPHA) for method in ("mean", "ours"))
    yield Point("mean", source_heads, ALPHA)  # the original itself, trained on for as long
    for alpha in ALPHAS[1:]:
        yield from (Point(method, n, alpha) for n in HEADS for method in ("mean", "ours"))
    for heads in HEADS:
        yield from (Point(method, heads, ALPHA) for method in ("mean-distilled", "calibrated"))
    for alpha in SHORT_ALPHAS:
        yield from (
            Point(method, n, alpha) for n in HEADS for method in ("mean-small", "ours-small")
        )


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Read what is stored, by the names of points and `DECODE`."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
