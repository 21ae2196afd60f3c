"""Continuations against stock transformers' own loop, token by token."""

import json
from pathlib import Path

import pytest
import torch
from test_quality import TEXTS, make_model, stream
from transformers import AutoModelForCausalLM, AutoTokenizer

from uptrain.evaluation.continuations import continue_prompts, repetition

CONTEXT = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "one")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return path


def test_greedy_is_the_most_likely_token_again_and_again(folder: Path, data: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # What a checkpoint asks of generate must not count.
    model.generation_config.update(
        do_sample=True, temperature=0.3, repetition_penalty=3.0, eos_token_id=None
    )
    found = continue_prompts({"target": model}, tokenizer, data, CONTEXT)
    assert (found["prompt_tokens"], found["new_tokens"]) == (8, 8)
    assert model.generation_config.temperature == 0.3
    tokens = torch.tensor([stream()[:8]])
    with torch.no_grad():
        for _ in range(8):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    first = found["prompts"][0]
    assert first["prompt"] == TEXTS[0][:7]
    assert first["target"]["greedy"] == tokenizer.decode(tokens[0, 8:])
    assert first["text"].startswith(TEXTS[0][7:12])


def test_prompts_are_beginnings_then_what_follows_in_them(folder: Path, data: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = continue_prompts({"target": model}, tokenizer, data, CONTEXT)
    prompts = [each["prompt"] for each in found["prompts"]]
    assert prompts[:2] == [TEXTS[0][:7], TEXTS[1][:7]]
    assert prompts[4] == TEXTS[1][7:15]
    assert len(prompts) == 5


def test_draws_are_seeded_and_leave_the_generator_alone(folder: Path, data: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = continue_prompts({"target": model, "reference": model}, tokenizer, data, CONTEXT)
    assert torch.equal(torch.get_rng_state(), before)
    for prompt in found["prompts"]:
        assert prompt["target"] == prompt["reference"]
        assert prompt["target"]["greedy"] != prompt["target"]["sampled"]
    assert found["repetition"]["target"] == found["repetition"]["reference"]


def test_a_continuation_ends_where_the_model_says_so(tmp_path: Path, data: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "a"), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    model.lm_head.weight.data.zero_()  # every token is as likely: the first one is taken
    model.generation_config.eos_token_id = [0]
    found = continue_prompts({"target": model}, tokenizer, data, CONTEXT)
    assert {each["target"]["greedy"] for each in found["prompts"]} == {""}
    model.generation_config.eos_token_id = None
    found = continue_prompts({"target": model}, tokenizer, data, CONTEXT)
    assert {each["target"]["greedy"] for each in found["prompts"]} == {tokenizer.decode([0] * 8)}
    assert found["repetition"]["target"]["greedy"] == 1 - 1 / 5


def test_a_text_of_one_short_document(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("abc")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = continue_prompts(
        {"target": model}, AutoTokenizer.from_pretrained(folder), path, CONTEXT
    )
    assert [(each["prompt"], each["text"]) for each in found["prompts"]] == [("abc", "")]


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [([], 0), ([1, 2, 3], 0), ([1, 2, 3, 4, 5], 0), ([1] * 8, 0.8), ([1, 2, 3, 4] * 2, 0.2)],
)
def test_repetition_counts_four_grams_that_were_there_before(tokens: list, rate: float) -> None:
    assert repetition(tokens) == pytest.approx(rate)
