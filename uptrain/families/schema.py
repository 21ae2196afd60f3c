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


@dataclass(frozen=True)
class HeadTensor:
    """A tensor of a checkpoint whose shape follows the number of key/value heads."""

    name: str
    layout: Layout
    source_shape: tuple[int, ...]
    target_shape: tuple[int, ...]

    @property
    def is_projection(self) -> bool:
        """Whether its rows are what the KV cache holds (no bias, norm or convolution)."""
        return len(self.source_shape) == 2 and "norm" not in self.name.rsplit(".", 2)[-2]


@dataclass(frozen=True)
class Heads:
    """The head counts of a checkpoint, under the names of `config.json`."""

    num_attention_heads: int
    num_key_value_heads: int


@dataclass(frozen=True)
class Family:
    """How one `model_type` states its number of key/value heads, and what needs a special rule.

    Families that keep `num_key_value_heads` at the top of the config and store key and value heads
    one after the other need no entry at all: this class's defaults describe them.
    """

    kv_key: str = "num_key_value_heads"
    """Dotted path of the key in `config.json`."""
    kv_key_is_flag: bool = False
    """The key is a boolean: true means one KV head, false as many as query heads."""
    other_kv_keys: tuple[str, ...] = ()
    """Keys of further layers (sliding-window ones, say) that must hold the same number."""
    fused: Mapping[str, Layout] = field(default_factory=dict)
    """Layout of tensors that hold queries, keys and values together, by module path in the layer."""
    requires: Mapping[str, Any] = field(default_factory=dict)
    """Values of the config that the rules need; `refusal` says why."""
    refusal: str | None = None
    """Why the family cannot be converted (always, or where `requires` is not met)."""
