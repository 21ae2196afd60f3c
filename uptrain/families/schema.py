"""The terms in which an architecture is described."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Layout(StrEnum):
    """How the heads of a tensor that depends on the number of key/value heads lie in its rows.

    d is `head_dim`, H `num_attention_heads`, K `num_key_value_heads`.
    """

    SEPARATE = "separate"
    """One head after the other, `[K, ...]`: k_proj, v_proj, their biases, norms over all heads."""
    CONCATENATED = "concatenated"
    """`[q: H·d; k: K·d; v: K·d]`, as in phi3."""
    GROUPED = "grouped"
    """`[K, H/K + 2, d]`: each group's query heads, its key, its value, as in falcon.

    With K = H this is the `[H, 3, d]` of older models, with K = 1 it equals CONCATENATED.
    """
    COLUMNS = "columns"
    """CONCATENATED with the rows as columns, as in gpt2: `[inputs, q; k; v]`; a bias has them as rows."""
    MIXED = "mixed"
    """`[K, K·d]`: one row for each head, which reads the heads of all (doge's dt_proj)."""
    LISTED = "listed"
    """K tensors of their own, one for each head, numbered from 0 (stablelm's norms of keys)."""


@dataclass(frozen=True)
class Heads:
    """The head counts of a checkpoint, or of a part of it, under the names of `config.json`."""

    num_attention_heads: int
    num_key_value_heads: int


@dataclass(frozen=True)
class KVSetting:
    """Keys of a config that hold the same number of KV heads, for the same number of query heads."""

    keys: tuple[str, ...]
    """Dotted paths in `config.json`."""
    heads: Heads


@dataclass(frozen=True)
class HeadTensor:
    """A tensor of a checkpoint whose shape follows the number of key/value heads."""

    name: str
    """In the target."""
    layout: Layout
    source_shape: tuple[int, ...]
    target_shape: tuple[int, ...]
    heads: Heads
    """Of the part of the source that the tensor belongs to."""
    num_key_value_heads: int
    """Of that part of the target."""
    members: tuple[str, ...]
    """Tensors of the source that it is made of, one behind the other: itself, but for LISTED."""

    @property
    def is_projection(self) -> bool:
        """Whether its rows are what the KV cache holds (no bias, norm or convolution)."""
        is_plain = self.layout not in (Layout.MIXED, Layout.LISTED)
        module = self.name.rsplit(".", 2)[-2]
        return is_plain and len(self.source_shape) == 2 and "norm" not in module


@dataclass(frozen=True)
class Family:
    """How a `model_type` states its numbers of key/value heads, and what needs a special rule.

    Families that keep `num_key_value_heads` at the top of the config, or in its `text_config`, and
    store key and value heads one after the other need no entry at all.
    """

    when: Mapping[str, Any] = field(default_factory=dict)
    """Values of the config for which this holds, where a `model_type` has several forms."""
    kv_keys: tuple[str, ...] = ("num_key_value_heads",)
    """Dotted paths of the keys in `config.json`. The first must be there; further ones, of other layers
    or parts, count where they are."""
    encoder_kv_keys: tuple[str, ...] = ()
    """Keys of an encoder, which count only if it is asked for: it keeps nothing in a cache."""
    query_key: str | None = None
    """Dotted path of the number of query heads, where it is not `num_attention_heads` beside the key."""
    is_flag: bool = False
    """The key is a boolean: true means one KV head, false as many as query heads."""
    sets: Mapping[str, Any] = field(default_factory=dict)
    """What else to write beside it."""
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    """Layout of tensors other than SEPARATE ones, by module path in the layer."""
    unread: str | None = None
    """What its layers are given that no plain text gives them, so that only pooling is possible."""
    refusal: str | None = None
    """Why the family cannot be converted, and what to do instead."""
