"""One attention block's weights as heads, whatever their names, layout and biases."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from uptrain.errors import UnsupportedFamilyError
from uptrain.families.layouts import join_heads, split_heads
from uptrain.families.schema import Heads, HeadTensor, Layout

# Queries, keys and values; what stands behind them in the same module, or beside it in BERT's.
_SEPARATE = (
    ("q_proj", "k_proj", "v_proj"), ("q", "k", "v"), ("self.query", "self.key", "self.value"),
    ("q_proj.linear", "k_proj.linear", "v_proj.linear"),
)  # fmt: skip
_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "o", "output.dense", "o_proj.linear")
_FUSED = (Layout.CONCATENATED, Layout.GROUPED, Layout.COLUMNS)


@dataclass(frozen=True)
class AttentionNames:
    """Where an attention block's weights are, by name within its layer."""

    module: str
    """Such as `self_attn`."""
    layout: Layout
    query: str
    """Module of the queries; of all three where they are fused."""
    key: str
    value: str
    """That of the keys, where one projection makes both (gemma4)."""
    output: str
    biased: frozenset[str]
    """Those of the queries, keys and values that have a bias; whisper's keys have none."""
    gated: bool
    """Whether each query head's rows are followed by as many rows of an output gate."""
    beside: Mapping[str, HeadTensor]
    """What else follows the number of KV heads, by name: gains of norms, convolutions behind a
    projection. It is pooled, and the projections are free as far as it lets them be."""
    heads: Heads
    """Of the source."""
    num_key_value_heads: int
    """Of the target."""

    @property
    def has_bias(self) -> bool:
        """Whether queries, keys or values have a bias."""
        return bool(self.biased)

    @property
    def tied(self) -> bool:
        """Whether keys and values are made by one projection."""
        return self.layout is Layout.SEPARATE and self.key == self.value

    @property
    def transposed(self) -> bool:
        """Whether the weights lie `[inputs, outputs]`, as in gpt2."""
        return self.layout is Layout.COLUMNS

    def is_among(self, names: Collection[str]) -> bool:
        """Say whether the block's keys are among tensors named within the layer."""
        return f"{self.module}.{self.key}.weight" in names

    def is_projection(self, name: str) -> bool:
        """Say whether a tensor, by its name within the layer, is of queries, keys, values or output."""
        leaves = (self.query, self.key, self.value, self.output)
        return name.rpartition(".")[0] in {f"{self.module}.{leaf}" for leaf in leaves}


@dataclass(frozen=True)
class AttentionHeads:
    """An attention block's weights, head by head, with biases as one more input column.

    H query heads, K KV heads; `inputs` is `hidden_size`, plus one where there is a bias.
    """

    query: torch.Tensor
    """[K, H / K, head_dim, inputs]."""
    key: torch.Tensor
    """[K, head_dim, inputs]."""
    value: torch.Tensor
    """[K, value_dim, inputs]."""
    output: torch.Tensor
    """[K, H / K, hidden_size, value_dim]."""
    gate: torch.Tensor | None
    """[K, H / K, head_dim, inputs]: rows of an output gate that go with each query head."""
    tied: bool = False
    """Whether `value` is `key`: one projection makes both, so that they change together."""

    def reordered(self, order: torch.Tensor) -> "AttentionHeads":
        """Put the KV heads, each with its query heads, in another order."""
        gate = None if self.gate is None else self.gate[order]
        return replace(
            self,
            query=self.query[order],
            key=self.key[order],
            value=self.value[order],
            output=self.output[order],
            gate=gate,
        )


def find_attention(
    tensors: Mapping[str, torch.Size], head_tensors: Mapping[str, HeadTensor]
) -> tuple[AttentionNames, ...]:
    """Find the parts of a layer's attention blocks.

    Args:
        tensors: Shapes of the layer's tensors by name within the layer.
        head_tensors: Those that follow the number of KV heads.

    Returns:
        The blocks in the order of the layer: a decoder's attention to itself comes before the one to
        the encoder.

    Raises:
        UnsupportedFamilyError: If a part cannot be told, so that only pooling is possible.
    """
    leaves: dict[str, list[str]] = {}
    for name in (name for name in tensors if name in head_tensors):
        if found := _projection(name, head_tensors[name].layout):
            leaves.setdefault(found[0], []).append(found[1])
    blocks = [_find_block(module, found, tensors, head_tensors) for module, found in leaves.items()]
    for name, tensor in head_tensors.items():
        if any(block.is_projection(name) for block in blocks):
            continue
        owners = [n for n, b in enumerate(blocks) if name.startswith(f"{b.module}.")]
        if len(owners) != 1:
            raise UnsupportedFamilyError(
                f"its tensor {name} follows the number of KV heads, expected keys and values as rows of "
                f"{', '.join(key for _, key, _ in _SEPARATE)} or in one with the queries; use --method mean "
                "without --calibration"
            )
        block = blocks[owners[0]]
        blocks[owners[0]] = replace(block, beside={**block.beside, name: tensor})
    return tuple(blocks)


def _projection(name: str, layout: Layout) -> tuple[str, str] | None:
    """Split the name of a projection's weight in its block's and its own within; None for others."""
    path, _, kind = name.rpartition(".")
    if kind != "weight":
        return None
    if layout in _FUSED:
        module, _, leaf = path.rpartition(".")
        return module, leaf
    known = [leaf for _, *pair in _SEPARATE for leaf in pair if path.endswith(f".{leaf}")]
    return (path.removesuffix(f".{known[0]}"), known[0]) if known else None


def _find_block(
    module: str,
    leaves: list[str],
    tensors: Mapping[str, torch.Size],
    head_tensors: Mapping[str, HeadTensor],
) -> AttentionNames:
    """Find the parts of the block `module`, of which `leaves` have KV heads."""
    found = head_tensors[f"{module}.{leaves[0]}.weight"]
    layout, heads = found.layout, found.heads
    separate = [
        each
        for each in _SEPARATE
        if f"{module}.{each[0]}.weight" in tensors
        and set(leaves) == {n for n in each[1:] if f"{module}.{n}.weight" in tensors}
        and each[1] in leaves
    ]
    if layout is not Layout.SEPARATE and len(leaves) == 1:
        query = key = value = leaves[0]
    elif separate:
        query, key, value = separate[0]
        value = value if f"{module}.{value}.weight" in tensors else key
    else:
        raise UnsupportedFamilyError(
            f"the queries, keys and values of {module} cannot be told among {', '.join(leaves)}; "
            "use --method mean without --calibration"
        )
    outputs = [name for name in _OUTPUTS if f"{module}.{name}.weight" in tensors]
    if len(outputs) != 1:
        raise UnsupportedFamilyError(
            f"the output projection of {module} cannot be told; use --method mean without --calibration"
        )
    rows = tensors[f"{module}.{query}.weight"][0]
    key_rows = tensors[f"{module}.{key}.weight"][0]
    H, K = heads.num_attention_heads, heads.num_key_value_heads
    if layout is Layout.SEPARATE:
        inputs = tensors[f"{module}.{outputs[0]}.weight"][1]
        value_rows = tensors[f"{module}.{value}.weight"][0]
        if rows // H * K not in (key_rows, 2 * key_rows) or inputs * K != value_rows * H:
            raise UnsupportedFamilyError(
                f"its {module} has another number of query heads than the config says, expected one number "
                "for all layers; use --method mean without --calibration"
            )
    return AttentionNames(
        module,
        layout,
        query,
        key,
        value,
        outputs[0],
        biased=frozenset(
            leaf for leaf in (query, key, value) if f"{module}.{leaf}.bias" in tensors
        ),
        gated=layout is Layout.SEPARATE and rows // H == 2 * (key_rows // K),
        beside={},
        heads=heads,
        num_key_value_heads=found.num_key_value_heads,
    )


def read_heads(
    state: Mapping[str, torch.Tensor], names: AttentionNames, heads: Heads
) -> AttentionHeads:
    """View a layer's attention weights as heads, in float64.

    Args:
        state: The layer's tensors by name within the layer.
        names: From `find_attention`.
        heads: The head counts of these weights.
    """
    H, K = heads.num_attention_heads, heads.num_key_value_heads

    def rows(leaf: str) -> torch.Tensor:
        weight = _turned(state[f"{names.module}.{leaf}.weight"].double(), names)
        bias = state.get(f"{names.module}.{leaf}.bias")
        if not names.has_bias:
            return weight
        column = torch.zeros(len(weight), 1).to(weight) if bias is None else bias.double()[:, None]
        return torch.cat([weight, column], dim=1)

    if names.layout is Layout.SEPARATE:
        query = rows(names.query).unflatten(0, (H, -1))
        (key,) = split_heads(rows(names.key), Layout.SEPARATE, heads)[1]
        (value,) = split_heads(rows(names.value), Layout.SEPARATE, heads)[1]
    else:
        layout = Layout.CONCATENATED if names.transposed else names.layout
        found, (key, value) = split_heads(rows(names.query), layout, heads)
        assert found is not None
        query = found
    gate = None
    if names.gated:
        query, gate = query.chunk(2, dim=1)
        gate = gate.unflatten(0, (K, -1))
    output = _turned(state[f"{names.module}.{names.output}.weight"].double(), names)
    output = output.unflatten(1, (K, H // K, -1)).permute(1, 2, 0, 3)
    return AttentionHeads(query.unflatten(0, (K, -1)), key, value, output, gate, names.tied)


def write_heads(parts: AttentionHeads, names: AttentionNames) -> dict[str, torch.Tensor]:
    """Put heads back into a layer's tensors; the inverse of `read_heads`.

    Returns:
        float64 tensors by name within the layer.
    """
    query = parts.query.flatten(0, 1)
    if parts.gate is not None:
        query = torch.cat([query, parts.gate.flatten(0, 1)], dim=1)
    if names.layout is Layout.SEPARATE:
        joined = {
            names.query: query.flatten(0, 1),
            names.key: parts.key.flatten(0, 1),
            names.value: parts.value.flatten(0, 1),
        }
    else:
        layout = Layout.CONCATENATED if names.transposed else names.layout
        joined = {names.query: join_heads(query, [parts.key, parts.value], layout)}
    state = {}
    for leaf, rows in joined.items():
        if leaf in names.biased:
            state[f"{names.module}.{leaf}.bias"] = rows[:, -1].contiguous()
        if names.has_bias:
            rows = rows[:, :-1]
        state[f"{names.module}.{leaf}.weight"] = _turned(rows, names).contiguous()
    output = parts.output.permute(2, 0, 1, 3).flatten(1)
    state[f"{names.module}.{names.output}.weight"] = _turned(output, names).contiguous()
    return state


def _turned(weight: torch.Tensor, names: AttentionNames) -> torch.Tensor:
    """Turn a weight of the model to [outputs, inputs], or back."""
    return weight.mT if names.transposed else weight


@contextmanager
def add_to_keys(
    layer: nn.Module, names: AttentionNames, parts: AttentionHeads, added: torch.Tensor
) -> Iterator[None]:
    """Add vectors to what the key projection returns, whether or not it has a bias.

    Args:
        layer: The layer.
        names: From `find_attention`.
        parts: From `read_heads`.
        added: [K, head_dim, period]; position t gets column t modulo `period`.
    """
    period = added.shape[-1]

    def nothing(rows: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*rows.shape[:-1], period).to(added)

    columns = replace(
        parts,
        query=nothing(parts.query),
        key=added,
        value=nothing(parts.value),
        gate=None if parts.gate is None else nothing(parts.gate),
    )
    written = write_heads(columns, replace(names, biased=frozenset()))
    rows = _turned(written[f"{names.module}.{names.key}.weight"], names).mT

    def hook(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        order = torch.arange(output.shape[-2]) % period
        return output + rows[order.to(rows.device)].to(output)

    handle = layer.get_submodule(f"{names.module}.{names.key}").register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
