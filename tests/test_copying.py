"""Copying: models that are known to copy, or not to, and the loss computed by hand."""

import math
import string
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_quality import VOCABULARY, make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from uptrain.evaluation import copying
from uptrain.evaluation.copying import measure_copying

CONTEXT = 64


class Copier(torch.nn.Module):
    """A model that is sure to see the token again that came `back` + 1 tokens before the next."""

    def __init__(self, back: int) -> None:
        super().__init__()
        self.back, self.device, self.dtype = back, torch.device("cpu"), torch.float32
        self.config = SimpleNamespace(
            vocab_size=VOCABULARY, get_text_config=lambda: SimpleNamespace(vocab_size=VOCABULARY)
        )

    def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        logits = torch.zeros(*input_ids.shape, VOCABULARY)
        for place in range(self.back - 1, input_ids.shape[1]):
            seen = input_ids[:, place + 1 - self.back]
            logits[:, place].scatter_(-1, seen[:, None], 100.0)
        return SimpleNamespace(logits=logits)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "one", max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(string.ascii_letters * 4)
    return path


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "_SPAN_TOKENS", 64)


def test_a_copier_has_no_loss_at_its_distance_only(folder: Path, text: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = measure_copying(Copier(16), tokenizer, text, CONTEXT, Copier(32))
    assert [row["distance"] for row in rows] == [8, 16, 32]
    assert [row["tokens"] for row in rows] == [64, 64, 64]
    by_distance = {row["distance"]: row for row in rows}
    assert by_distance[16]["loss"] == pytest.approx(0, abs=1e-6)
    assert by_distance[32]["reference_loss"] == pytest.approx(0, abs=1e-6)
    for row in (by_distance[8]["loss"], by_distance[32]["loss"], by_distance[16]["reference_loss"]):
        assert row > 1
    # At first it guesses, but for the last token, where it is sure that bos comes again.
    guess = math.log(VOCABULARY)
    assert by_distance[16]["first_loss"] == pytest.approx((15 * guess + 100) / 16, abs=1e-5)


def test_the_loss_is_that_of_the_second_half(folder: Path, text: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen = []
    hook = model.register_forward_pre_hook(
        lambda module, args, options: seen.append(options["input_ids"]), with_kwargs=True
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    row = measure_copying(model, tokenizer, text, CONTEXT)[0]
    hook.remove()
    (tokens,) = [each for each in seen if each.shape[1] == 16]
    assert (tokens[:, 0] == tokenizer.bos_token_id).all()
    assert torch.equal(tokens[:, 1:8], tokens[:, 9:])  # the last token is only predicted
    assert set(tokenizer.decode(tokens[:, 1:].flatten())) <= set(string.ascii_letters)
    with torch.no_grad():
        log_probs = model(tokens).logits.double().log_softmax(-1)
    whole = torch.cat([tokens[:, 1:], tokens[:, 8:9]], dim=1)
    loss = -log_probs.gather(-1, whole[..., None]).squeeze(-1)
    assert row["loss"] == pytest.approx(loss[:, 8:].mean().item(), abs=1e-5)
    assert row["first_loss"] == pytest.approx(loss[:, :8].mean().item(), abs=1e-5)
    assert "reference_loss" not in row


def test_the_same_spans_every_time_and_none_where_the_context_is_short(
    folder: Path, text: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert measure_copying(model, tokenizer, text, 16) == measure_copying(
        model, tokenizer, text, 16
    )
    assert measure_copying(model, tokenizer, text, 15) == []
