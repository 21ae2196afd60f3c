"""The bootstrap against all draws there are, a closed form, and simulated truths."""

from itertools import product
from math import sqrt
from statistics import NormalDist

import numpy as np
import pytest

from uptrain.evaluation import bootstrap
from uptrain.evaluation.bootstrap import interval, p_value, resample_means, settings

Z = NormalDist().inv_cdf(0.975)


def test_draws_are_those_of_all_possible_ones() -> None:
    sums, counts = np.array([[1.0, 5.0, 2.0, 9.0], [4.0, 0.0, 1.0, 1.0]]), np.array([1.0, 2, 3, 4])
    means = resample_means(sums, counts)
    assert means.shape == (2, settings()["resamples"])
    every = np.array(list(product(range(4), repeat=4)))
    exact = sums[:, every].sum(-1) / counts[every].sum(-1)
    centre = (sums.sum(1) / counts.sum())[:, None]
    plain = centre + (means - centre) / bootstrap._widening(4)
    for found, expected in zip(plain, exact, strict=True):
        for x in np.unique(expected.round(9)):
            # 4000 draws know a probability to 0.8% (one standard deviation); 4 of those.
            assert (found <= x + 1e-9).mean() == pytest.approx(
                (expected <= x + 1e-9).mean(), abs=0.032
            )


def test_documents_of_one_length_have_students_interval() -> None:
    values = np.random.default_rng(1).normal(3, 0.5, 200)
    low, high = interval(resample_means(values[None] * 7, np.full(200, 7.0))[0])
    error = values.std(ddof=1) / sqrt(200)
    t = 1.971957  # of 199 degrees of freedom
    # The quantile of 4000 draws has a standard deviation of 2.7% of the distance.
    assert high - low == pytest.approx(2 * t * error, rel=0.08)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.1 * error)


@pytest.mark.parametrize(
    ("documents", "student"), [(5, 2.776445), (10, 2.262157), (30, 2.045230), (1000, 1.962341)]
)
def test_few_documents_widen_the_interval(documents: int, student: float) -> None:
    expected = student / Z * sqrt(documents / (documents - 1))
    # The next term of the expansion is 1.3 / (documents - 1)³; the table has six digits.
    tolerance = 2 / (documents - 1) ** 3 + 1e-6
    assert bootstrap._widening(documents) == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("documents", [5, 20])
def test_intervals_cover_the_truth(documents: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "_RESAMPLES", 1000)
    random = np.random.default_rng(documents)
    trials, covered, significant = 400, 0, 0
    for _ in range(trials):
        counts = np.ceil(random.lognormal(5, 0.5, documents))
        own = random.normal(3.0, 0.4, documents)  # a document's own loss
        other = own + random.normal(0, 0.1, documents)
        means = resample_means(np.stack([own, other]) * counts, counts)
        low, high = interval(means[0])
        covered += low <= 3.0 <= high
        significant += p_value(means[1] - means[0]) < 0.05
    # 95% and 5%, each with a standard deviation of 1.1% over 400 trials, and what is left of the
    # error of a percentile with so few documents.
    assert 0.90 <= covered / trials <= 0.99
    assert significant / trials <= 0.10


def test_a_difference_is_found_where_documents_agree_on_it() -> None:
    random = np.random.default_rng(0)
    counts = np.full(20, 100.0)
    own = random.normal(3.0, 1.0, 20)
    means = resample_means(np.stack([own + 0.01, own]) * counts, counts)
    # Each alone is uncertain by a hundred times the difference between them.
    assert interval(means[0])[1] - interval(means[0])[0] > 0.5
    assert p_value(means[0] - means[1]) < 0.001
    assert p_value(means[0] - means[0]) == 1


def test_more_documents_than_groups_keep_their_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    counts = random.integers(1, 20, 3000).astype(float)
    sums = random.normal(3.0, 1.0, (1, 3000)) * counts
    one_by_one = resample_means(sums, counts)
    monkeypatch.setattr(bootstrap, "_MAX_GROUPS", 700)
    grouped = resample_means(sums, counts)
    # 700 groups tell a spread to 2.7% (one standard deviation), 4000 draws to 1.1%.
    assert grouped.std() == pytest.approx(one_by_one.std(), rel=0.1)
    assert grouped.mean() == pytest.approx(one_by_one.mean(), abs=one_by_one.std() / 10)
