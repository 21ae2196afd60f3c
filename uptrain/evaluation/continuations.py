"""How models continue a few prompts, and how much they repeat themselves."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from uptrain.data import read_documents
from uptrain.data.encoding import encode_documents
from uptrain.evaluation.blocks import Ids
from uptrain.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS = 5, 32, 64
_GRAM = 4
_SEED = 0
_MODES = {"greedy": False, "sampled": True}


def continue_prompts(
    models: Mapping[str, "PreTrainedModel"], tokenizer: Any, path: Path, context: int
) -> dict[str, Any]:
    """Let models continue the beginnings of five documents, greedily and by a seeded draw.

    Draws are from the whole distribution, at temperature 1, and begin from one seed for each model.
    A continuation ends where the model says so.

    Args:
        models: Causal language models in eval mode, by name.
        tokenizer: That of all of them.
        path: The text that the prompts are taken from. If it has fewer documents, they give more
            than one prompt each.
        context: Most tokens of prompt and continuation together.

    Returns:
        `prompt_tokens`, `new_tokens`, `seed`; `prompts`, each with its `prompt`, how the `text` goes
        on, and for each model its `greedy` and `sampled` continuation; and `repetition`, means over
        the prompts of the fraction of 4-grams that were there before, of the `text` and by model.

    Source: Welleck et al. 2020, Neural Text Generation with Unlikelihood Training (seq-rep-4).
    """
    new_tokens = min(_NEW_TOKENS, context - min(_PROMPT_TOKENS, context // 2))
    prompts, texts = _pick_prompts(path, tokenizer, min(_PROMPT_TOKENS, context // 2), new_tokens)
    found: dict[str, dict[str, list[list[int]]]] = {name: {} for name in models}
    with progress("continue", len(models) * len(_MODES), "passes") as advance:
        for name, model in models.items():
            for mode, sample in _MODES.items():
                found[name][mode] = _generate(model, tokenizer, prompts, new_tokens, sample)
                advance(1)
    return {
        "prompt_tokens": prompts.shape[1],
        "new_tokens": new_tokens,
        "seed": _SEED,
        "prompts": [
            {
                "prompt": tokenizer.decode(prompt, skip_special_tokens=True),
                "text": tokenizer.decode(texts[i], skip_special_tokens=True),
            }
            | {
                name: {mode: tokenizer.decode(each[i]) for mode, each in modes.items()}
                for name, modes in found.items()
            }
            for i, prompt in enumerate(prompts.tolist())
        ],
        "repetition": {"text": _mean_repetition(texts)}
        | {
            name: {mode: _mean_repetition(each) for mode, each in modes.items()}
            for name, modes in found.items()
        },
    }


def repetition(tokens: Sequence[int]) -> float:
    """Give the fraction of 4-grams that occurred before in the same tokens."""
    grams = list(zip(*(tokens[i:] for i in range(_GRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _mean_repetition(continuations: Sequence[Sequence[int]]) -> float:
    return sum(map(repetition, continuations)) / len(continuations)


def _pick_prompts(
    path: Path, tokenizer: Any, length: int, new_tokens: int
) -> tuple[torch.Tensor, list[list[int]]]:
    """Take the beginnings of documents, then what follows in them, until there are enough.

    Returns:
        The prompts [prompts, tokens], and how the text of each goes on.
    """
    encoded = encode_documents(read_documents(path, tokenizer), tokenizer)
    documents = [each.tokens for each in islice(encoded, _PROMPTS)]
    length = min(length, max(map(len, documents)))
    windows = islice(_windows(documents, length), _PROMPTS)
    pairs = [(tokens[:length], tokens[length : length + new_tokens]) for tokens in windows]
    prompts = np.stack([prompt for prompt, _ in pairs])
    return torch.from_numpy(prompts), [text.tolist() for _, text in pairs]


def _windows(documents: Sequence[Ids], length: int) -> Iterator[Ids]:
    """Give each document from its start, then each from `length` tokens on, and so forth."""
    for start in range(0, max(map(len, documents)), length):
        yield from (tokens[start:] for tokens in documents if len(tokens) >= start + length)


def _generate(
    model: "PreTrainedModel", tokenizer: Any, prompts: torch.Tensor, new_tokens: int, sample: bool
) -> list[list[int]]:
    """Give the new tokens of each prompt, without the one that ends it."""
    from transformers import GenerationConfig

    own = model.generation_config
    ends = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    drawing = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {}
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=sample,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        **drawing,
    )
    inputs = prompts.to(model.device)
    # What the checkpoint's own settings say (a temperature, a penalty) must not differ by model.
    model.generation_config = GenerationConfig()
    try:
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(_SEED)
            out = model.generate(
                inputs, attention_mask=torch.ones_like(inputs), generation_config=settings
            )
    finally:
        model.generation_config = own
    rows: list[list[int]] = out[:, inputs.shape[1] :].tolist()
    return [
        row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in rows
    ]
