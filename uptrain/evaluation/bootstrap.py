"""How sure a mean over documents is: intervals and a paired test by resampling documents."""

from math import sqrt
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

CONFIDENCE = 0.95
MIN_DOCUMENTS = 5  # fewer say nothing about the next one
_RESAMPLES, _SEED = 4000, 0
_MAX_GROUPS = 10_000
_CHUNK = 2**22  # numbers drawn at a time


def resample_means(sums: Floats, counts: Floats) -> Floats:
    """Draw documents with replacement, as many as there are, again and again.

    Documents are what is drawn because tokens of one document are alike. More than 10,000 are drawn
    in groups of neighbours, which changes the spread of a mean over so many by next to nothing.

    Args:
        sums: [quantities, documents], each a sum over the tokens of a document.
        counts: [documents], tokens of each.

    Returns:
        [quantities, resamples] means a token of each draw, spread out as few documents call for; all
        quantities see the same draws, so the difference of two is paired.
    """
    documents = len(counts)
    if documents > _MAX_GROUPS:
        starts = np.arange(_MAX_GROUPS) * documents // _MAX_GROUPS
        sums, counts = np.add.reduceat(sums, starts, axis=1), np.add.reduceat(counts, starts)
    random = np.random.default_rng(_SEED)
    groups = len(counts)
    means = []
    for size in _chunks(_RESAMPLES, max(1, _CHUNK // groups)):
        drawn = random.integers(0, groups, (size, groups))
        total = counts[drawn].sum(1)
        means.append(np.stack([each[drawn].sum(1) / total for each in sums]))
    found: Floats = np.concatenate(means, axis=1)
    centre: Floats = (sums.sum(1) / counts.sum())[:, None]
    return centre + _widening(groups) * (found - centre)


def interval(means: Floats) -> tuple[float, float]:
    """Give the interval that holds the middle 95% of resampled means (the percentile bootstrap)."""
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def p_value(differences: Floats) -> float:
    """Test whether a paired difference is zero, both sides, from its resampled means.

    Twice the smaller tail beyond zero, which is to say one less the widest confidence at which the
    percentile interval leaves zero out; never below what so many resamples can tell.
    """
    below, above = (differences <= 0).sum(), (differences >= 0).sum()
    return float(min(1.0, 2 * (min(below, above) + 1) / (len(differences) + 1)))


def settings() -> dict[str, float]:
    """Say how it is done, for the record."""
    return {"confidence": CONFIDENCE, "resamples": _RESAMPLES, "seed": _SEED}


def _widening(documents: int) -> float:
    """Say by how much percentiles of few draws are too narrow.

    With n documents, the resampled spread lacks a factor √(n/(n-1)), and Student's t takes the
    place of the normal distribution; its quantile by the first terms of its expansion in 1/(n-1).

    Source: Hesterberg 2015, What Teachers Should Know About the Bootstrap, section 5.3, the expanded
    percentile interval; Abramowitz and Stegun 26.7.5.
    """
    z, n = NormalDist().inv_cdf((1 + CONFIDENCE) / 2), documents - 1
    student = z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
    return sqrt(documents / n) * student / z


def _chunks(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]
