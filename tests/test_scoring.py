"""Scores of tokens: parts against the whole, and logits that have no probability."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_quality import CONTEXT, VOCABULARY, make_model, stream
from transformers import AutoModelForCausalLM

from uptrain.evaluation import scoring


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[torch.nn.Module]:
    folder: Path = tmp_path_factory.mktemp("models")
    return [
        AutoModelForCausalLM.from_pretrained(
            make_model(folder / str(seed), seed), dtype=torch.float32
        )
        for seed in (0, 1)
    ]


def blocks() -> tuple[np.ndarray, np.ndarray]:
    tokens = np.array(stream()[: 5 * CONTEXT + 1])
    return tokens[:-1].reshape(5, CONTEXT), tokens[1:].reshape(5, CONTEXT)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("_CHUNK_BYTES", {"cpu": 7 * 4 * VOCABULARY}),
        # 5 of 16 inputs at a time through the cache of each model.
        ("_WHOLE_BLOCK_BYTES", 4 * VOCABULARY * 5),
    ],
)
def test_parts_do_not_change_the_scores(
    models: list, monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    inputs, labels = blocks()
    at_once = scoring.score(models[0], inputs, labels, models[1])
    monkeypatch.setattr(scoring, name, value)
    monkeypatch.setitem(scoring._LOGIT_BYTES, "cuda", 4 * VOCABULARY * 5)
    in_parts = scoring.score(models[0], inputs, labels, models[1])
    assert at_once.loss.shape == (5, CONTEXT)
    for field in ("loss", "reference_loss", "kl", "agrees"):
        # float32 sums in another order
        np.testing.assert_allclose(getattr(at_once, field), getattr(in_parts, field), atol=1e-5)


def test_rows_are_bound_by_logits_and_by_tokens(models: list) -> None:
    config = models[0].config
    by_tokens = scoring._BATCH_TOKENS["cpu"] // CONTEXT
    assert scoring.rows_at_once(config, torch.float32, CONTEXT, "cpu") == by_tokens
    wide = scoring._LOGIT_BYTES["cpu"] // (4 * VOCABULARY) + 1
    assert scoring.rows_at_once(config, torch.float32, wide, "cpu") == 1


def test_a_logit_of_minus_infinity_adds_nothing_to_kl() -> None:
    logits = torch.tensor([[0.0, 1.0, -math.inf]])
    labels = torch.tensor([0])
    loss, _, kl, agrees = scoring._score_tokens([logits, logits * 2], labels)
    assert torch.isfinite(loss).all()
    assert 0 < kl.item() < 1
    assert agrees.item()
