"""A checkpoint seen as one of another family: tensors are rewritten when they are read."""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from uptrain.checkpoint.reader import (
    DTYPE_NAMES,
    DTYPES,
    Checkpoint,
    TensorEntry,
    byte_chunks,
    tensor_chunks,
)
from uptrain.conversion.tokenizer_files import tokenizer_files
from uptrain.errors import CheckpointError, UnsupportedFamilyError
from uptrain.families import meta
from uptrain.families.head_tensors import can_have_heads
from uptrain.families.rewrites import Recipe, Rewrite, find_rewrites
from uptrain.families.runtimes import runtimes

_BUFFER = ".rotary_emb.inv_freq"
_FETCH = "config and weights do not belong together, fetch both again"


@dataclass(kw_only=True)
class RewrittenCheckpoint(Checkpoint):
    """A source rewritten into a family that has a number of KV heads, with as many as query heads.

    Its tensors are made one by one from those of the source, which are kept for the next one only.
    """

    source: Checkpoint
    recipes: dict[str, Recipe]
    """Sources under their names in the files."""
    files: Mapping[str, bytes]
    """Companions that are not the source's."""
    lost: tuple[str, ...]
    _held: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def chunks(self, name: str) -> Iterator[memoryview]:
        """Yield the raw little-endian bytes of tensor `name`, at most 1 MiB at a time."""
        recipe = self.recipes[name]
        if recipe.is_copy:
            return self.source.chunks(recipe.sources[0])
        return tensor_chunks(self.read(name))

    def read(self, name: str) -> Tensor:
        """Make tensor `name` whole, on the CPU."""
        recipe, entry = self.recipes[name], self.tensors[name]
        if recipe.constant is not None:
            return torch.full(entry.shape, recipe.constant, dtype=DTYPES[entry.dtype])
        held = self._held
        self._held = {
            each: held[each] if each in held else self.source.read(each) for each in recipe.sources
        }
        tensors = [self._held[each] for each in recipe.sources]
        return tensors[0] if recipe.make is None else recipe.make(*tensors)

    def companion_files(self) -> Iterator[tuple[str, Iterator[memoryview]]]:
        """Yield name and content of the target's companions, at most 1 MiB of it at a time."""
        for name, chunks in super().companion_files():
            if name not in self.files:
                yield name, chunks
        for name, content in self.files.items():
            yield name, byte_chunks(content)

    @property
    def making_bytes(self) -> int:
        """Most bytes of what a tensor is made from, and of it in float64, before and behind."""
        return max(
            (
                sum(self.source.tensors[each].nbytes for each in recipe.sources)
                + 2 * torch.float64.itemsize * math.prod(self.tensors[name].shape)
                for name, recipe in self.recipes.items()
                if recipe.make is not None and recipe.constant is None
            ),
            default=0,
        )


def as_architecture(
    checkpoint: Checkpoint,
    architecture: str = "auto",
    num_key_value_heads: int = 1,
    code: Path | None = None,
) -> Checkpoint:
    """See a checkpoint as one of the family that it is to be converted in.

    Args:
        checkpoint: The source.
        architecture: `auto` to rewrite a family that has no number of KV heads, `keep` never to, or
            the `model_type` to get.
        num_key_value_heads: Of the conversion's target; a family that can have as many is preferred.
        code: The checkpoint's folder if its own Python code may be executed.

    Returns:
        The checkpoint itself, or its rewritten view; no tensor was read.

    Raises:
        UnsupportedFamilyError: If there is no exact rewrite.
        CheckpointError: If config and weights contradict each other.
    """
    with _naming(checkpoint.folder):
        rewrites = find_rewrites(checkpoint.config, architecture)
        if not rewrites:
            return checkpoint
        fitting = (r for r in rewrites if can_have_heads(r.config, num_key_value_heads, code))
        return _rewritten(checkpoint, next(fitting, rewrites[0]), code)


def all_architectures(checkpoint: Checkpoint, code: Path | None = None) -> list[Checkpoint]:
    """See a checkpoint as one of each family that `auto` chooses from, in order of preference.

    Raises:
        UnsupportedFamilyError: As `as_architecture`.
        CheckpointError: As `as_architecture`.
    """
    with _naming(checkpoint.folder):
        rewrites = find_rewrites(checkpoint.config)
        return [_rewritten(checkpoint, rewrite, code) for rewrite in rewrites] or [checkpoint]


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    try:
        yield
    except (CheckpointError, UnsupportedFamilyError) as error:
        raise type(error)(f"{folder}: {error}") from error


def describe_rewrite(checkpoint: Checkpoint, num_key_value_heads: int) -> dict[str, Any] | None:
    """Say what a source is rewritten into and what that costs; None if it stays as it is.

    Args:
        checkpoint: From `as_architecture`.
        num_key_value_heads: Of the conversion's target.
    """
    if not isinstance(checkpoint, RewrittenCheckpoint):
        return None
    config = checkpoint.config
    refusing = [r for r in runtimes(config, num_key_value_heads) if not r["accepts"]]
    return {
        "source": checkpoint.source.config["model_type"],
        "target": config["model_type"],
        "keeps_tensors": all(recipe.is_copy for recipe in checkpoint.recipes.values()),
        "lost": [*checkpoint.lost, *(f"{r['runtime']}: {r['note']}" for r in refusing)],
    }


def _rewritten(checkpoint: Checkpoint, rewrite: Rewrite, code: Path | None) -> Checkpoint:
    names = _source_names(checkpoint, code)
    recipes = rewrite.tensors
    if recipes is None:
        recipes = {name: Recipe((name,)) for name in checkpoint.tensors}
        names = {name: name for name in recipes}
    found: dict[str, Recipe] = {}
    for name, recipe in recipes.items():
        # A base model's own names lack the first part.
        sources = [names.get(each, names.get(each.partition(".")[2])) for each in recipe.sources]
        if None in sources:
            if name == "lm_head.weight" and rewrite.config["tie_word_embeddings"]:
                continue
            lacking = recipe.sources[sources.index(None)]
            raise CheckpointError(
                f"the checkpoint lacks tensor {lacking}, which its config.json asks for; {_FETCH}"
            )
        found[name] = replace(recipe, sources=tuple(map(str, sources)))
    used = {source for recipe in found.values() for source in recipe.sources}
    for unused in sorted(set(names.values()) - used):
        raise UnsupportedFamilyError(
            f"{checkpoint.config['model_type']}: tensor {unused} has no place in "
            f"{rewrite.config['model_type']}; the checkpoint is more than config.json says"
        )
    tensors = {name: _entry(checkpoint, name, recipe) for name, recipe in found.items()}
    return RewrittenCheckpoint(
        folder=checkpoint.folder,
        name=checkpoint.name,
        revision=checkpoint.revision,
        config=rewrite.config,
        tensors=tensors,
        companions=checkpoint.companions,
        left_out=checkpoint.left_out,
        source=checkpoint,
        recipes=found,
        files={**rewrite.files, **tokenizer_files(checkpoint, rewrite.config)},
        lost=rewrite.lost,
    )


def _source_names(checkpoint: Checkpoint, code: Path | None) -> dict[str, str]:
    """Map the names that recipes use, transformers' own in memory, to those in the files.

    What transformers does not know is left out: buffers that older versions wrote. Of a family that it
    does not know at all, names are the files' own.

    Raises:
        CheckpointError: If a tensor has another shape than the config asks for, or a layer that it
            does not know.
    """
    if checkpoint.config["model_type"] not in CONFIG_MAPPING:
        return {name: name for name in checkpoint.tensors if not name.endswith(_BUFFER)}
    model = meta.build_on_meta(checkpoint.config, code)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    known = meta.names_in_memory(model, checkpoint.tensors)
    kinds = {re.sub(r"\d+", "0", disk) for disk in known}
    for disk, entry in checkpoint.tensors.items():
        name = known.get(disk)
        if name is None and re.sub(r"\d+", "0", disk) in kinds:
            finding = "belongs to a layer that config.json does not have"
        elif name is not None and entry.shape != expected[name]:
            finding = f"has shape {entry.shape}, config.json asks for {expected[name]}"
        else:
            continue
        raise CheckpointError(f"tensor {disk} {finding}; {_FETCH}")
    return {name: disk for disk, name in known.items()}


def _entry(checkpoint: Checkpoint, name: str, recipe: Recipe) -> TensorEntry:
    """Learn a tensor's dtype and shape by making it without data."""
    entries = [checkpoint.tensors[source] for source in recipe.sources]
    empty = [torch.empty(e.shape, dtype=DTYPES[e.dtype], device="meta") for e in entries]
    made = empty[0] if recipe.make is None else recipe.make(*empty)
    return TensorEntry(name, DTYPE_NAMES[made.dtype], tuple(made.shape), entries[0].path, 0)
