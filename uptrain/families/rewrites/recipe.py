"""The terms of an exact rewrite: which tensors of one family make up which of another."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from uptrain.families.layouts import split_heads
from uptrain.families.registry import checkpoint_dtype, parse_config
from uptrain.families.schema import Heads, Layout

Rows = Callable[[Tensor], Tensor]
"""Chooses or orders the rows of a weight [rows, inputs] or a bias [rows]."""

# What every family's config has, by the names that transformers gives them in memory.
_COMMON = (
    "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings",
    "use_cache",
)  # fmt: skip
# What only some configs state, and no rewrite changes.
_KEPT = (
    "dtype", "torch_dtype", "tokenizer_class", "id2label", "label2id", "problem_type",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How one tensor of the target is made."""

    sources: tuple[str, ...]
    """Tensors of the source, by their names in transformers' memory."""
    make: Callable[..., Tensor] | None = None
    """A function of them, linear in the heads; None for the single source as it is."""
    constant: float | None = None
    """Fill the tensor with this; shape and dtype are still those that `make` gives."""

    @property
    def is_copy(self) -> bool:
        """Whether the tensor is a source's, byte for byte."""
        return self.make is None and self.constant is None


@dataclass(frozen=True)
class Rewrite:
    """A checkpoint as one of another family that computes the same, with as many KV heads as query heads."""

    config: dict[str, Any]
    """The whole content of its `config.json`."""
    tensors: Mapping[str, Recipe] | None
    """By name in the target's files, a layer after the other; None if all stay as they are."""
    lost: tuple[str, ...] = ()
    """What the target does worse, in sentences."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Files that the target needs beside the source's companions, by name."""


def common_keys(config: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """Begin the target's config with what is the same in all families."""
    parsed = parse_config(config)
    return {
        "model_type": model_type,
        **{key: getattr(parsed, key, None) for key in _COMMON},
        **{key: config[key] for key in _KEPT if key in config},
    }


def stated_keys(config: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """Begin the target's config as `common_keys`, for a source that transformers does not know."""
    kept = [key for key in (*_COMMON, *_KEPT) if key != "tokenizer_class" and key in config]
    return {
        "model_type": model_type,
        "tie_word_embeddings": False,
        **{key: config[key] for key in kept},
    }


def rotary_keys(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """State rotary settings as transformers 5 reads them, and as 4 does.

    Args:
        parameters: transformers 5's `rope_parameters`, complete.
    """
    scaling = {
        key: value
        for key, value in parameters.items()
        if key not in ("rope_theta", "partial_rotary_factor")
    }
    return {
        "rope_parameters": dict(parameters),
        "rope_theta": parameters["rope_theta"],
        "rope_scaling": None if parameters["rope_type"] == "default" else scaling,
        "partial_rotary_factor": parameters.get("partial_rotary_factor", 1.0),
    }


def copied(target: str, source: str, *parts: str) -> dict[str, Recipe]:
    """Take tensors as they are: `source.part` becomes `target.part`."""
    return {f"{target}.{part}": Recipe((f"{source}.{part}",)) for part in parts}


def renamed(target: str, source: str, names: Mapping[str, str]) -> dict[str, Recipe]:
    """Take tensors as they are: `source.old` becomes `target.new`, for names {new: old}."""
    return {f"{target}.{new}": Recipe((f"{source}.{old}",)) for new, old in names.items()}


def norm(target: str, source: str) -> dict[str, Recipe]:
    """Take a layer norm as it is."""
    return copied(target, source, "weight", "bias")


def linear(
    target: str, source: str, rows: Rows | None = None, *, has_bias: bool = True
) -> dict[str, Recipe]:
    """Take a linear map, or some of its rows; where it has no bias, the target's is zero."""
    weight = f"{source}.weight"
    bias = Recipe((f"{source}.bias",), rows) if has_bias else zero_bias(weight, rows)
    return {f"{target}.weight": Recipe((weight,), rows), f"{target}.bias": bias}


def fused_rows(layout: Layout, heads: Heads) -> dict[str, Rows]:
    """Choose the rows of queries, keys and values in one tensor, by the names of their maps."""

    def part(place: int) -> Rows:
        def rows(tensor: Tensor) -> Tensor:
            query, others = split_heads(tensor, layout, heads)
            assert query is not None  # the layouts of fused tensors hold all three
            return (query, *others)[place].flatten(0, 1)

        return rows

    return {name: part(place) for place, name in enumerate(("q_proj", "k_proj", "v_proj"))}


def fused(
    target: str, source: str, layout: Layout, heads: Heads, *, has_bias: bool = False
) -> dict[str, Recipe]:
    """Take queries, keys and values out of one linear map, all weights before all biases."""
    return {
        f"{target}.{part}.{leaf}": Recipe((f"{source}.{leaf}",), rows)
        for leaf in (("weight", "bias") if has_bias else ("weight",))
        for part, rows in fused_rows(layout, heads).items()
    }


def zero_bias(weight: str, rows: Rows | None = None) -> Recipe:
    """Make a bias of zeros for the rows of a weight [rows, inputs]."""
    return Recipe((weight,), lambda w: (w if rows is None else rows(w))[:, 0], constant=0.0)


def folded_norm(target: str, source: str, gain: float) -> dict[str, Recipe]:
    """Leave nothing of a layer norm but its normalising: `gain` is what the target stores for 1."""
    return {
        f"{target}.weight": Recipe((f"{source}.weight",), constant=gain),
        f"{target}.bias": Recipe((f"{source}.bias",), constant=0.0),
    }


def folded_linear(
    target: str, source: str, norm: str, rows: Rows | None = None, *, has_bias: bool = True
) -> dict[str, Recipe]:
    """Take a linear map together with gain and shift of the layer norm before it.

    W (g ∘ n + s) + b = (W diag g) n + (W s + b), computed in float64 and rounded once.
    """

    def chosen(tensor: Tensor) -> Tensor:
        return (tensor if rows is None else rows(tensor)).double()

    def scale(weight: Tensor, gain: Tensor) -> Tensor:
        return (chosen(weight) * gain.double()).to(weight.dtype)

    def shift(weight: Tensor, added: Tensor, *bias: Tensor) -> Tensor:
        shifted = torch.mv(chosen(weight), added.double())
        return sum((chosen(b) for b in bias), shifted).to(weight.dtype)

    weight, biases = f"{source}.weight", (f"{source}.bias",) if has_bias else ()
    return {
        f"{target}.weight": Recipe((weight, f"{norm}.weight"), scale),
        f"{target}.bias": Recipe((weight, f"{norm}.bias", *biases), shift),
    }


def folding_loss(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Say what folding norms costs in a checkpoint of 16 bits."""
    return rounding_loss(config, "layer norms are folded into the weights behind them, which are")


def rounding_loss(config: Mapping[str, Any], finding: str) -> tuple[str, ...]:
    """Say of weights that are made anew that a checkpoint of 16 bits rounds them once more."""
    dtype = checkpoint_dtype(config)
    if dtype.itemsize > 2:
        return ()
    return (f"{finding} rounded to {str(dtype).removeprefix('torch.')} once more",)
