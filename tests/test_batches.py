"""Batches: which tokens come when, for any number of processes, and read ahead of their use."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data import write
from tiny_run import EXAMPLE
from transformers import AutoTokenizer

from uptrain.data.shards import TokenShards
from uptrain.errors import DataError
from uptrain.training.batches import Batches, MicroBatch, read_ahead


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> TokenShards:
    """Two files: twenty documents of three or four tokens, and a longer one."""
    folder = tmp_path_factory.mktemp("text")
    paths = [
        write(folder / "a.jsonl", *({"text": f"document {i}"} for i in range(20))),
        write(folder / "b.jsonl", {"text": "another file of some more words than that " * 4}),
    ]
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    return TokenShards.prepare(folder / "tokens", paths, tokenizer, shard_tokens=16)


def make(shards: TokenShards, batch: int = 8, **options) -> Batches:
    return Batches(shards, 4, batch, seed=3, **options)


def test_blocks_feed_and_predict_as_the_readme_says(shards):
    made = make(shards)
    tokens = shards.read(0, shards.tokens).tolist()
    assert made.blocks == (len(tokens) - 1) // 4
    inputs, targets = made.read(range(made.blocks))
    assert inputs.flatten().tolist() == tokens[: made.blocks * 4]
    assert targets.flatten().tolist() == tokens[1 : made.blocks * 4 + 1]


def test_weighted_sources_are_cut_on_their_own(shards):
    made = make(shards, weights=(1.0, 1.0))
    first, second = (entry["tokens"] for entry in shards.manifest["sources"])
    counts = (first - 1) // 4, (second - 1) // 4
    assert made.blocks == sum(counts)
    inputs, targets = made.read(range(made.blocks))
    tokens = shards.read(0, shards.tokens).tolist()
    expected = tokens[: counts[0] * 4] + tokens[first : first + counts[1] * 4]
    assert inputs.flatten().tolist() == expected
    assert targets[counts[0]].tolist() == tokens[first + 1 : first + 5]


def test_weights_decide_how_often_each_source_comes(shards):
    made = make(shards, weights=(3.0, 1.0))
    inside = (shards.manifest["sources"][0]["tokens"] - 1) // 4
    for step in range(20):
        indices = made.indices(step)
        assert (indices < inside).sum() == 6
        assert indices.max() < made.blocks
    assert made.epochs(20)[0] == ("a.jsonl", 120 / inside)
    assert made.epochs(20)[1] == ("b.jsonl", 40 / (made.blocks - inside))


@pytest.mark.parametrize("weights", [None, (0.6, 0.4)])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_share_the_same_batches(shards, weights, world_size):
    made = make(shards, weights=weights)
    for step in range(5):
        parts = [made.indices(step, rank, world_size) for rank in range(world_size)]
        assert np.concatenate(parts).tolist() == made.indices(step).tolist()
        assert {len(part) for part in parts} == {8 // world_size}


def test_what_decides_the_tokens_is_in_the_fingerprint(shards):
    variants = [{}, {"weights": (1, 1)}, {"weights": (1, 2)}, {"within_documents": True}]
    prints = [make(shards, **options).fingerprint() for options in variants]
    assert all(prints.count(each) == 1 for each in prints)
    assert make(shards, weights=(2, 4)).fingerprint() == prints[2]


def test_too_little_text_is_refused(shards):
    made = make(shards)
    fit = made.blocks // 8
    made.check(fit, repeat=False)
    made.check(100, repeat=True)
    assert made.epochs(100) == [("data.train", 800 / made.blocks)]
    with pytest.raises(DataError) as caught:
        made.check(fit + 1, repeat=False)
    wanted = (fit + 1) * 8
    assert str(caught.value) == (
        f"data.train holds {shards.tokens} tokens, but {fit + 1} steps of 32 need {wanted * 4 + 1}; "
        "add text, lower the budget, or set data.repeat: true to go over the text "
        f"{wanted / made.blocks:.1f} times"
    )
    with pytest.raises(
        DataError, match=r"tokens, fewer than one batch of 512 .* lower train.batch"
    ):
        make(shards, batch=128).check(1, repeat=True)


def test_a_weighted_source_that_is_too_short_is_named(shards):
    made = make(shards, weights=(1.0, 9.0))
    with pytest.raises(DataError) as caught:
        made.check(3, repeat=False)
    times = dict(made.epochs(3))["b.jsonl"]
    assert str(caught.value) == (
        "data.train: b.jsonl is too short for its weight in 3 steps of 32 tokens; add text, lower "
        f"the budget or the weight, or set data.repeat: true to go over it {times:.1f} times"
    )
    assert times > 1
    made.check(3, repeat=True)
    long = Batches(shards, 60, 1, seed=0, weights=(1.0, 1.0))
    with pytest.raises(
        DataError, match=r"b\.jsonl has not one sequence of 60 tokens; add text, or"
    ):
        long.check(1, repeat=True)


def test_positions_restart_where_documents_begin(shards):
    assert make(shards).position_ids([0]) is None
    made = make(shards, within_documents=True)
    ids = made.position_ids(range(made.blocks))
    assert ids is not None
    starts = set(shards.document_starts(0, shards.tokens).tolist())
    for block, row in enumerate(ids.tolist()):
        expected = 0
        for place, position in enumerate(row):
            expected = 0 if block * 4 + place in starts else expected
            assert position == expected
            expected += 1


def flat(steps) -> list[list[list[int]]]:
    return [[part.inputs.tolist() for part in parts] for parts in steps]


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_reading_ahead_changes_nothing(shards, ahead):
    made = make(shards, within_documents=True)
    with read_ahead(made, range(2, 9), 2, rank=1, world_size=2, ahead=ahead) as steps:
        found = list(steps)
    assert len(found) == 7
    for step, parts in enumerate(found, 2):
        expected = made.indices(step, 1, 2)
        assert [len(part.inputs) for part in parts] == [2, 2]
        joined = MicroBatch(*(torch.cat(each) for each in zip(*parts, strict=True)))
        inputs, targets = made.read(expected)
        assert torch.equal(joined.inputs, inputs)
        assert torch.equal(joined.targets, targets)
        assert torch.equal(joined.position_ids, made.position_ids(expected))


class Slow(Batches):
    """Batches that note when they are read, and fail at step 3."""

    def indices(self, step: int, rank: int = 0, world_size: int = 1):
        READ.append(step)
        if step == 3:
            raise OSError("the disk is gone")
        return super().indices(step, rank, world_size)


READ: list[int] = []


def test_steps_are_read_while_others_are_used(shards):
    READ.clear()
    made = Slow(shards, 4, 8, seed=3)
    with read_ahead(made, range(10, 20), 8, ahead=2) as steps:
        for used in range(10, 20):
            next(steps)
            for _ in range(200):
                if len(READ) == min(used + 3, 20) - 10:
                    break
                time.sleep(0.01)
            # The one in use and two more; never further.
            assert list(range(10, min(used + 3, 20))) == READ
        with pytest.raises(StopIteration):
            next(steps)


def test_what_a_reading_raises_comes_with_its_own_step(shards):
    made = Slow(shards, 4, 8, seed=3)
    with read_ahead(made, range(10), 8, ahead=2) as steps:
        for _ in range(3):
            next(steps)
        with pytest.raises(OSError, match="the disk is gone"):
            next(steps)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_the_thread_ends_with_the_context(shards, error):
    def stop() -> None:
        with read_ahead(make(shards), range(1000), 8) as steps:
            next(steps)
            assert any("read-ahead" in thread.name for thread in threading.enumerate())
            raise error

    with pytest.raises(error):
        stop()
    assert not any("read-ahead" in thread.name for thread in threading.enumerate())


@pytest.mark.gpu
def test_batches_for_a_gpu_are_pinned(shards):
    made = make(shards, within_documents=True)
    with read_ahead(made, range(2), 8, device=torch.device("cuda", 0)) as steps:
        for (part,) in steps:
            assert all(each is not None and each.is_pinned() for each in part)


def test_many_files_are_read_as_one(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    text = Path(write(tmp_path / "a.jsonl", {"text": "some words " * 50}))
    one, many = (
        TokenShards.prepare(tmp_path / str(size), [text], tokenizer, shard_tokens=size)
        for size in (10**6, 3)
    )
    for start in range(0, one.tokens, 7):
        for stop in range(start + 1, min(start + 12, one.tokens)):
            assert one.read(start, stop).tolist() == many.read(start, stop).tolist()
