"""Sums by document and position against plain loops over tokens."""

import math

import numpy as np
import pytest

from uptrain.evaluation.blocks import Blocks
from uptrain.evaluation.scoring import Scores
from uptrain.evaluation.tally import Tally

LENGTH, BLOCKS = 12, 20


def make(compares: bool = True, documents: int = 7) -> tuple[Tally, Blocks, Scores]:
    """A tally of random scores, added in three parts that cut documents."""
    random = np.random.default_rng(0)
    shape = (BLOCKS, LENGTH)
    edges = np.sort(random.choice(np.arange(1, BLOCKS * LENGTH), documents - 1, replace=False))
    numbers = np.searchsorted(edges, np.arange(BLOCKS * LENGTH), side="right").reshape(shape)
    tokens = random.integers(0, 9, shape)
    blocks = Blocks(tokens, tokens, numbers, random.integers(0, 5, shape), 0)
    values = [random.random(shape).astype(np.float32) for _ in range(3)]
    scores = Scores(values[0], *(values[1:] if compares else ()))
    if compares:
        scores = Scores(*values, random.random(shape) < 0.5)
    tally = Tally(LENGTH, compares)
    for part in (slice(0, 5), slice(5, 6), slice(6, None)):
        tally.add(
            Blocks(*(each[part] for each in (tokens, tokens, numbers, blocks.byte_counts)), 0),
            Scores(
                *(
                    None if each is None else each[part]
                    for each in (scores.loss, scores.reference_loss, scores.kl, scores.agrees)
                )
            ),
        )
    return tally, blocks, scores


def test_the_whole_is_the_mean_of_all_tokens() -> None:
    tally, blocks, scores = make()
    found = tally.summary()
    loss = scores.loss.astype(np.float64).mean()
    assert found["loss"] == pytest.approx(loss, rel=1e-12)
    assert found["kl"] == pytest.approx(scores.kl.astype(np.float64).mean(), rel=1e-12)
    assert found["top1_agreement"] == scores.agrees.mean()
    assert found["loss_increase"] == found["loss"] - found["reference_loss"]
    assert found["perplexity"] == pytest.approx(math.exp(loss))
    bits = loss * blocks.labels.size / math.log(2)
    assert found["bits_per_byte"] == pytest.approx(bits / blocks.byte_counts.sum(), rel=1e-12)
    assert (found["tokens"], found["documents"]) == (BLOCKS * LENGTH, 7)
    assert found["bootstrap"]["confidence"] == 0.95


def test_positions_are_in_ranges_that_double_and_add_up() -> None:
    tally, _, scores = make()
    rows = tally.by_position()
    assert [(row["first"], row["last"]) for row in rows] == [
        (1, 1),
        (2, 2),
        (3, 4),
        (5, 8),
        (9, 12),
    ]
    for row in rows:
        part = scores.loss[:, row["first"] - 1 : row["last"]].astype(np.float64)
        assert (row["tokens"], row["loss"]) == (part.size, pytest.approx(part.mean(), rel=1e-12))
        assert row["loss_increase"] == row["loss"] - row["reference_loss"]
    total = tally.summary()
    for key in ("loss", "reference_loss", "kl", "top1_agreement"):
        together = sum(row["tokens"] * row[key] for row in rows) / total["tokens"]
        assert together == pytest.approx(total[key], rel=1e-12)


def test_documents_add_up_and_the_worst_come_first() -> None:
    tally, blocks, scores = make(documents=4)
    found = tally.by_document()
    assert (found["of"], found["documents"]) == ("loss_increase", len(found["worst"]))
    increases = [row["loss_increase"] for row in found["worst"]]
    assert increases == sorted(increases, reverse=True)
    assert found["quantiles"]["0.5"] == pytest.approx(np.median(increases))
    for row in found["worst"]:
        mask = blocks.documents == row["document"]
        assert row["tokens"] == mask.sum() >= 32
        assert row["kl"] == pytest.approx(scores.kl[mask].astype(np.float64).mean(), rel=1e-12)
    short = [number for number in range(4) if (blocks.documents == number).sum() < 32]
    assert not {row["document"] for row in found["worst"]} & set(short)
    total = sum(row["tokens"] for row in found["worst"])
    total += sum(int((blocks.documents == number).sum()) for number in short)
    assert total == BLOCKS * LENGTH


def test_documents_that_are_all_short_are_listed() -> None:
    tally, *_ = make(documents=60)
    found = tally.by_document()
    assert found["documents"] == 60
    assert len(found["worst"]) == 10


def test_alone_there_is_nothing_to_compare() -> None:
    tally, *_ = make(compares=False)
    found = tally.summary()
    assert set(found["intervals"]) == {"loss"}
    assert "loss_increase_p" not in found
    assert set(tally.by_position()[0]) == {"first", "last", "tokens", "loss"}
    assert tally.by_document()["of"] == "loss"


def test_few_documents_have_no_interval() -> None:
    found = make(documents=4)[0].summary()
    assert found["documents"] == 4
    assert not {"intervals", "bootstrap", "loss_increase_p"} & found.keys()
