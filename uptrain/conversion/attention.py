"""One attention block's weights as heads, whatever their names, layout and biases."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from uptrain.checkpoint.reader import Checkpoint
from uptrain.errors import UnsupportedFamilyError
from uptrain.families import meta
from uptrain.families.layouts import join_heads, split_heads
from uptrain.families.schema import Heads, HeadTensor, Layout

_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")


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
    output: str
    has_bias: bool
    """Whether queries, keys and values have a bias."""
    gated: bool
    """Whether each query head's rows are followed by as many rows of an output gate."""
    layouts: Mapping[str, Layout]
    """Of all tensors that follow the number of KV heads, norms among them, by name."""

    @property
    def transposed(self) -> bool:
        """Whether the weights lie `[inputs, outputs]`, as in gpt2."""
        return self.layout is Layout.COLUMNS

    @property
    def projections(self) -> set[str]:
        """Modules of the queries, keys, values and output."""
        return {self.query, self.key, self.value, self.output}


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


def is_norm(name: str) -> bool:
    """Say whether a tensor belongs to a norm, by its name within the layer."""
    return "norm" in name.split(".")[-2]


def find_attention(
    tensors: Mapping[str, torch.Size], layouts: Mapping[str, Layout], heads: Heads
) -> AttentionNames:
    """Find the parts of a layer's attention block.

    Args:
        tensors: Shapes of the layer's tensors by name within the layer.
        layouts: Layout of those that follow the number of KV heads.
        heads: The head counts.

    Raises:
        UnsupportedFamilyError: If a part cannot be told, or anything but projections and norms
            follows the number of KV heads, so that only pooling is possible.
    """
    projections = [name for name in layouts if name.endswith(".weight") and not is_norm(name)]
    modules = {name.rsplit(".", 2)[0] for name in projections}
    if len(modules) != 1:
        raise UnsupportedFamilyError(
            f"its KV heads are in {', '.join(sorted(modules))}, expected plain key and value projections side "
            "by side; use --method mean without --calibration"
        )
    module = modules.pop()
    leaves = sorted(name.rsplit(".", 2)[1] for name in projections)
    layout = layouts[projections[0]]
    if layout is not Layout.SEPARATE and len(leaves) == 1:
        query = key = value = leaves[0]
    elif leaves == ["k_proj", "v_proj"] and f"{module}.q_proj.weight" in tensors:
        query, key, value = "q_proj", "k_proj", "v_proj"
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
    per_query = rows // heads.num_attention_heads
    if layout is Layout.SEPARATE:
        H, K = heads.num_attention_heads, heads.num_key_value_heads
        inputs, value_rows = (
            tensors[f"{module}.{outputs[0]}.weight"][1],
            tensors[f"{module}.{value}.weight"][0],
        )
        if per_query * K not in (key_rows, 2 * key_rows) or inputs * K != value_rows * H:
            raise UnsupportedFamilyError(
                f"its {module} has another number of query heads than the config says, expected one number "
                "for all layers; use --method mean without --calibration"
            )
    gated = layout is Layout.SEPARATE and (per_query == 2 * (key_rows // heads.num_key_value_heads))
    names = AttentionNames(
        module,
        layout,
        query,
        key,
        value,
        outputs[0],
        has_bias=f"{module}.{key}.bias" in tensors,
        gated=gated,
        layouts=layouts,
    )
    for name, found in layouts.items():
        is_gain = is_norm(name) and found is Layout.SEPARATE
        if name.split(".")[-2] not in names.projections and not is_gain:
            raise UnsupportedFamilyError(
                f"its tensor {name} follows the number of KV heads beside the projections; "
                "use --method mean without --calibration"
            )
    return names


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
    return AttentionHeads(query.unflatten(0, (K, -1)), key, value, output, gate)


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
        if names.has_bias:
            state[f"{names.module}.{leaf}.bias"] = rows[:, -1].contiguous()
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
    written = write_heads(columns, replace(names, has_bias=False))
    rows = _turned(written[f"{names.module}.{names.key}.weight"], names).mT

    def hook(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        order = torch.arange(output.shape[-2]) % period
        return output + rows[order.to(rows.device)].to(output)

    handle = layer.get_submodule(f"{names.module}.{names.key}").register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def find_layers(
    checkpoint: Checkpoint, head_tensors: Mapping[str, HeadTensor], heads: Heads, code: Path | None
) -> tuple[dict[int, AttentionNames], str]:
    """Find the attention block of each layer that has one.

    Args:
        checkpoint: The source.
        head_tensors: Its tensors that follow the number of KV heads, by name in the files.
        heads: Its head counts.
        code: The checkpoint's folder if its own Python code may be executed.

    Returns:
        Names by layer, and the name of the list of layers, such as `model.layers`.

    Raises:
        UnsupportedFamilyError: If the blocks are in no list of layers, in several, or as
            `find_attention`.
    """
    model = meta.build_on_meta(checkpoint.config, code)
    in_memory, expected = meta.names_in_memory(model, checkpoint.tensors), model.state_dict()
    found: dict[int, dict[str, Layout]] = {}
    stacks = set()
    for disk, tensor in head_tensors.items():
        match = re.fullmatch(r"(.*?)\.(\d+)\.(.*)", in_memory.get(disk, ""))
        if match is None:
            raise UnsupportedFamilyError(
                f"{checkpoint.name}: tensor {disk} is in no list of layers; use --method mean without --calibration"
            )
        if expected[in_memory[disk]].shape != tensor.source_shape:
            raise UnsupportedFamilyError(
                f"{checkpoint.name}: tensor {disk} is stored in another form than it is computed with; use "
                "--method mean without --calibration"
            )
        stacks.add(match[1])
        found.setdefault(int(match[2]), {})[match[3]] = tensor.layout
    if len(stacks) != 1:
        raise UnsupportedFamilyError(
            f"{checkpoint.name}: KV heads are in {len(stacks)} stacks of layers ({', '.join(sorted(stacks))}), "
            "which calibration does not cover yet; use --method mean without --calibration"
        )
    stack = stacks.pop()
    names = {}
    for index, layouts in sorted(found.items()):
        state = model.get_submodule(f"{stack}.{index}").state_dict()
        try:
            names[index] = find_attention({n: t.shape for n, t in state.items()}, layouts, heads)
        except UnsupportedFamilyError as error:
            raise UnsupportedFamilyError(f"{checkpoint.name}: layer {index}: {error}") from error
    return names, stack
