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

from uptrain.checkpoint.files import byte_chunks
from uptrain.checkpoint.reader import Checkpoint
from uptrain.checkpoint.tensors import DTYPE_NAMES, DTYPES, TensorEntry, tensor_chunks
from uptrain.conversion.tokenizer_files import files_without_code, load_from, tokenizer_files
from uptrain.errors import CheckpointError, UnsupportedFamilyError
from uptrain.families import meta
from uptrain.families.head_tensors import can_have_heads
from uptrain.families.rewrites import REWRITES, Recipe, Rewrite, find_rewrites
from uptrain.families.runtimes import refusals, runtimes
from uptrain.loading import load_tokenizer

# Of models that transformers does not know: no weights, and written by their older versions only.
_BUFFERS = (".inv_freq", ".masked_bias")
_FETCH = "config and weights do not belong together, fetch both again"


@dataclass(kw_only=True)
class RewrittenCheckpoint(Checkpoint):
    """A source rewritten into a family that has a number of KV heads, with as many as it has itself.

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
            if code is None and needs_own_code(checkpoint):
                _refuse_unknown(checkpoint.config["model_type"])
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


def known_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Give a checkpoint's config, or that of its rewrite if only its own code knows its family.

    Raises:
        UnsupportedFamilyError: As `as_architecture`.
        CheckpointError: As `as_architecture`.
    """
    with _naming(checkpoint.folder):
        rewrites = find_rewrites(checkpoint.config) if needs_own_code(checkpoint) else []
        return rewrites[0].config if rewrites else checkpoint.config


def _refuse_unknown(model_type: str) -> None:
    """Name the rewrites of a family that is to stay what only its own code knows."""
    if known := REWRITES.get(model_type):
        raise UnsupportedFamilyError(
            f"{model_type}: is known to transformers only by code of the checkpoint's own, which has no "
            f"number of KV heads; choose one of {', '.join(('auto', *known))}"
        )


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
    return {
        "source": checkpoint.source.config["model_type"],
        "target": config["model_type"],
        "keeps_tensors": all(recipe.is_copy for recipe in checkpoint.recipes.values()),
        "source_needs_code": needs_own_code(checkpoint.source),
        "accepted_by": [
            each["runtime"] for each in runtimes(config, num_key_value_heads) if each["accepts"]
        ],
        "lost": [*checkpoint.lost, *refusals(config, num_key_value_heads)],
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
    config, companions, lost = rewrite.config, checkpoint.companions, rewrite.lost
    files: dict[str, bytes] = {}
    if needs_own_code(checkpoint):
        files, loss = files_without_code(checkpoint)
        lost += loss
        # Code is of no use any more, but for that of a tokenizer that could not be written anew.
        companions = [
            path
            for path in companions
            if path.suffix != ".py" or (loss and path.name.startswith("tokenization"))
        ]
        if not {"dtype", "torch_dtype"} & config.keys():  # transformers takes that of the weights
            dtype = DTYPES[next(iter(tensors.values())).dtype]
            config = {**config, "torch_dtype": str(dtype).removeprefix("torch.")}
    return RewrittenCheckpoint(
        folder=checkpoint.folder,
        name=checkpoint.name,
        revision=checkpoint.revision,
        config=config,
        tensors=tensors,
        companions=companions,
        left_out=checkpoint.left_out,
        source=checkpoint,
        recipes=found,
        files={**rewrite.files, **(files or tokenizer_files(checkpoint, config))},
        lost=lost,
    )


def needs_own_code(checkpoint: Checkpoint) -> bool:
    """Say whether transformers does not know a checkpoint's family but by code that it brings along."""
    return checkpoint.config["model_type"] not in CONFIG_MAPPING


def tokenizer_of(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    """Load a checkpoint's tokenizer, that of the target if it was rewritten.

    Raises:
        CheckpointError: If there is none, or transformers cannot load it.
    """
    if isinstance(checkpoint, RewrittenCheckpoint) and "tokenizer.json" in checkpoint.files:
        return load_from(checkpoint, checkpoint.files)
    return load_tokenizer(checkpoint, trust_remote_code)


def _source_names(checkpoint: Checkpoint, code: Path | None) -> dict[str, str]:
    """Map the names that recipes use, transformers' own in memory, to those in the files.

    What transformers does not know is left out: buffers that older versions wrote. Of a family that it
    does not know at all, names are the files' own.

    Raises:
        CheckpointError: If a tensor has another shape than the config asks for, or a layer that it
            does not know.
    """
    if needs_own_code(checkpoint):
        return {name: name for name in checkpoint.tensors if not name.endswith(_BUFFERS)}
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
    try:
        made = empty[0] if recipe.make is None else recipe.make(*empty)
    except (RuntimeError, IndexError) as error:  # only where transformers does not know the shapes
        shapes = " and ".join(f"{e.name} of shape {e.shape}" for e in entries)
        raise CheckpointError(f"{name} cannot be made from tensor {shapes}; {_FETCH}") from error
    return TensorEntry(name, DTYPE_NAMES[made.dtype], tuple(made.shape), entries[0].path, 0)
