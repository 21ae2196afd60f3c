"""Runs that take a second: a random Llama, the example's tokenizer, a little text."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from uptrain.training.recipe import Recipe

EXAMPLE = Path(__file__).parents[1] / "examples" / "books-1m"
CONTEXT = 32
VOCABULARY = 2048


def make_source(folder: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Path:
    """Save a random grouped-query Llama with the example's tokenizer."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    LlamaForCausalLM(LlamaConfig(**(settings | options))).to(dtype).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((EXAMPLE / name).read_bytes())
    return folder


def write_text(path: Path, documents: int = 40, seed: int = 0) -> Path:
    """Write documents of a hundred words each, about 120 tokens, as jsonl."""
    chooser = random.Random(seed)
    words = ["the", "house", "and", "a", "river", "was", "old", "she", "said", "never", "again"]
    with path.open("w") as file:
        for _ in range(documents):
            text = " ".join(chooser.choice(words) for _ in range(100))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def make_recipe(folder: Path, **train: Any) -> Recipe:
    """Give a recipe of 12 steps of 4 sequences that reads and writes in `folder`."""
    source = folder / "source"
    if not source.exists():
        make_source(source)
    if not (folder / "train.jsonl").exists():
        write_text(folder / "train.jsonl")
        write_text(folder / "validation.jsonl", 4, seed=1)
    top = {key: train.pop(key) for key in ("output", "source") if key in train}
    of_data = ("repeat", "validation", "attention_within_documents")
    data = {key: train.pop(key) for key in of_data if key in train}
    options = {
        "steps": 12,
        "learning_rate": 1e-2,
        "batch_tokens": 4 * CONTEXT,
        "save_every_steps": 5,
    }
    return Recipe.model_validate(
        {
            "source": str(source),
            "output": str(folder / "output"),
            "data": {"train": [str(folder / "train.jsonl")], **data},
            "train": options | train,
            **top,
        }
    )
