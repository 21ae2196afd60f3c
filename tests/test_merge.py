"""Merging within what an attention block allows, for every kind of attention, judged by transformers.

The key oracle: a checkpoint whose KV heads are equal within groups up to a change of basis that its
attention does not notice must convert without a trace, and the plain mean must not manage that.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from family_list import FAMILIES
from test_families import logits
from tiny import save, tiny_config, tiny_model

import uptrain
from uptrain.checkpoint.reader import open_checkpoint
from uptrain.conversion.attention import (
    AttentionHeads,
    read_heads,
    write_heads,
)
from uptrain.conversion.freedom import Basis, Freedom
from uptrain.conversion.merge import merge_heads
from uptrain.conversion.plan import plan_conversion
from uptrain.conversion.stacks import find_stacks

# Layers are merged from float32 weights, so float64 checkpoints agree to float32 rounding only.
ROUNDING = 1e-4


@dataclass(frozen=True)
class Kind:
    """A kind of attention: what its config needs, and what its heads may be changed by."""

    model_type: str
    key: str
    """What each K head may be changed by: `full`, `scaled`, `turned`, `signed` or `fixed`."""
    rotary: int
    """Leading channels that are rotated; 0 for none, or where nothing may be done to pairs of them."""
    interleaved: bool = False
    overrides: dict[str, Any] | None = None
    value: str = "full"
    """What V may be changed by: `full`, `turned` or `fixed`; where V is K, what goes for K."""
    reorder: bool = True
    count: int = 2
    shift: bool = False
    """Whether each K head may be shifted by a bias of its own."""
    equal_gains: bool = False
    """Give norms on queries and keys one gain for all channels."""


GQA = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 128}
BIASES = {"attention_bias": True}
TIED = {"global_head_dim": 16, "num_global_key_value_heads": 4}
UNCLIPPED = {"attn_config": {"kv_n_heads": 4, "rope_theta": 10000.0, "clip_qkv": 99.0}}
KINDS = {
    "llama": Kind("llama", "scaled", 16),
    "llama, biases on q, k, v, o": Kind("llama", "scaled", 16, overrides=BIASES),
    "llama, 8 query and 4 KV heads": Kind("llama", "scaled", 16, overrides=GQA),
    "llama, 4 KV heads to 1": Kind("llama", "scaled", 16, count=1),
    "qwen2, biases on q, k, v": Kind("qwen2", "scaled", 16),
    "starcoder2, biases and layer norms": Kind("starcoder2", "scaled", 16),
    "cohere, interleaved, parallel": Kind("cohere", "scaled", 16, interleaved=True),
    "ernie4_5, interleaved": Kind("ernie4_5", "scaled", 16, interleaved=True),
    "glm, interleaved, half rotary": Kind("glm", "scaled", 8, interleaved=True),
    "phi, half rotary, parallel": Kind("phi", "scaled", 8, shift=True),
    "stablelm, quarter rotary": Kind("stablelm", "scaled", 4),
    "nemotron, half rotary": Kind("nemotron", "scaled", 8),
    "gpt_bigcode, learned positions": Kind("gpt_bigcode", "full", 0, count=1, shift=True),
    "nemotron_h, no positions, hybrid": Kind("nemotron_h", "full", 0),
    "jamba, no positions, hybrid": Kind("jamba", "full", 0),
    "granite, multipliers": Kind("granite", "scaled", 16),
    "gemma2, softcap, sliding window": Kind(
        "gemma2", "scaled", 16, overrides={"sliding_window": 8}
    ),
    "gpt_oss, sinks": Kind("gpt_oss", "scaled", 16, reorder=False),
    "qwen3, norms on q and k": Kind("qwen3", "signed", 16),
    "qwen3, norms of equal gains": Kind("qwen3", "turned", 16, equal_gains=True),
    "llama4_text, norms without gains": Kind("llama4_text", "turned", 16, interleaved=True),
    "olmo2, norms of all heads": Kind("olmo2", "signed", 16, reorder=False),
    "qwen3_next, gates, hybrid": Kind("qwen3_next", "signed", 4, value="fixed"),
    "afmoe, gates": Kind("afmoe", "signed", 16, value="fixed", reorder=False),
    "bitnet, norm on the output": Kind("bitnet", "scaled", 16, value="fixed", reorder=False),
    "gemma4_text, norm on V, inputs by layer": Kind("gemma4_text", "signed", 16, value="turned"),
    "gemma4_text, keys are values": Kind(
        "gemma4_text:keys-are-values", "signed", 16, value="turned", overrides=TIED
    ),
    "gemma4_text, keys are values, equal gains": Kind(
        "gemma4_text:keys-are-values",
        "turned",
        16,
        value="turned",
        overrides=TIED,
        equal_gains=True,
    ),
    "stablelm, norms of each head": Kind("stablelm:norms", "fixed", 0, reorder=False),
    "inkling_text, convolutions": Kind("inkling_text", "signed", 16, value="fixed", reorder=False),
    "doge, values choose": Kind("doge", "signed", 16, value="fixed", reorder=False),
    "qwen4_exp_text, several streams": Kind("qwen4_exp_text", "signed", 16, value="fixed"),
    "moshi, wrapped projections": Kind("moshi", "scaled", 16),
    "zamba, a shared block": Kind("zamba", "full", 0),
    "zamba2, a shared block": Kind("zamba2", "full", 0),
    "molmo2, split while loading": Kind("molmo2", "signed", 16),
    "phi3, fused": Kind("phi3", "scaled", 16),
    "falcon, fused by groups": Kind("falcon", "scaled", 16),
    "dbrx, fused, mixture of experts": Kind("dbrx", "scaled", 16, overrides=UNCLIPPED),
    "mixtral, mixture of experts": Kind("mixtral", "scaled", 16),
}


def turns(count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Random orthogonal matrices [count, size, size]."""
    draw = torch.randn(count, size, size, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(draw)[0]


def any_maps(count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Random maps [count, size, size] with singular values between a half and two."""
    sizes = 2 ** (2 * torch.rand(count, size, generator=generator, dtype=torch.float64) - 1)
    return turns(count, size, generator) * sizes[:, None] @ turns(count, size, generator)


def key_maps(
    kind: Kind, heads: int, size: int, rigid: bool, generator: torch.Generator
) -> torch.Tensor:
    """Random maps [heads, size, size] of K that the attention does not notice; `rigid`: turns only."""
    n = kind.rotary
    maps = torch.eye(size, dtype=torch.float64).repeat(heads, 1, 1)
    if kind.key in ("full", "scaled") and n < size:
        maps[:, n:, n:] = (turns if rigid else any_maps)(heads, size - n, generator)
    for pair in range(n // 2):
        a, b = (2 * pair, 2 * pair + 1) if kind.interleaved else (pair, pair + n // 2)
        draw = torch.rand(2, heads, generator=generator, dtype=torch.float64)
        angle = draw[0] * 2 * torch.pi
        if kind.key == "signed":
            angle = (draw[0] * 2).floor() * torch.pi
        length = 2 ** (2 * draw[1] - 1) if kind.key == "scaled" and not rigid else 1
        maps[:, a, a] = maps[:, b, b] = length * angle.cos()
        maps[:, b, a] = length * angle.sin()
        maps[:, a, b] = -length * angle.sin()
    return maps


def changed(parts: AttentionHeads, kind: Kind, rigid: bool, seed: int) -> AttentionHeads:
    """Change the basis of each KV head, undone on what reads it."""
    generator = torch.Generator().manual_seed(seed)
    heads, size = parts.key.shape[:2]
    made = key_maps(kind, heads, size, rigid, generator)
    # Of norms and rotations: the inverse of a map is its transpose's; in general q' = M^-T q.
    query = torch.einsum("kba,kqbi->kqai", torch.linalg.inv(made), parts.query)
    parts = replace(parts, key=made @ parts.key, query=query)
    if kind.shift and not rigid:
        parts.key[:, kind.rotary :, -1] += torch.randn(
            heads, size - kind.rotary, generator=generator, dtype=torch.float64
        )
    if parts.tied:
        output = torch.einsum("kqhd,kde->kqhe", parts.output, torch.linalg.inv(made))
        parts = replace(parts, value=parts.key, output=output)
    elif kind.value != "fixed":
        rigid = rigid or kind.value == "turned"
        made = (turns if rigid else any_maps)(heads, parts.value.shape[1], generator)
        output = torch.einsum("kqhd,kde->kqhe", parts.output, torch.linalg.inv(made))
        parts = replace(parts, value=made @ parts.value, output=output)
    return parts


def attention_layers(folder: Path, count: int) -> Iterator[tuple[str, Any, Any]]:
    """Find each attention block: its layer's prefix in memory, its names, the source's head counts."""
    plan = plan_conversion(open_checkpoint(folder), count)
    for stack, blocks in find_stacks(plan.checkpoint, plan.head_tensors, None).items():
        for index, (names,) in blocks.items():
            yield f"{stack}.{index}.", names, names.heads


def build(
    kind: Kind, folder: Path, rigid: bool = False, shuffle: bool = False
) -> tuple[Path, Path]:
    """Save a checkpoint with heads equal within groups, and one with their bases changed."""
    model = tiny_model(
        tiny_config(
            kind.model_type.partition(":")[0],
            **FAMILIES[kind.model_type] | (kind.overrides or {}),
        )
    )
    plain, other = folder / "plain", folder / "changed"
    save(model, plain)
    after: dict[str, torch.Tensor] = {}
    state = model.state_dict()
    for seed, (prefix, names, heads) in enumerate(attention_layers(plain, kind.count)):
        layer = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        parts = read_heads(layer, names, heads)
        size = heads.num_key_value_heads // kind.count
        first = torch.arange(heads.num_key_value_heads) // size * size
        parts = replace(parts, key=parts.key[first], value=parts.value[first])
        made = changed(parts, kind, rigid, seed)
        if shuffle:
            # Heads 0, 2 and 1, 3 belong together afterwards.
            made = made.reordered(torch.arange(4).view(2, 2).T.flatten())
        for target, content in ((state, parts), (after, made)):
            target |= {prefix + n: t for n, t in write_heads(content, names).items()}
        for tensor in names.beside.values():
            whole = torch.cat([layer[member] for member in tensor.members])
            parted = whole.unflatten(0, (tensor.heads.num_key_value_heads, -1))
            equal = parted[first if len(tensor.members) == 1 else torch.zeros_like(first[:size])]
            pieces = equal.flatten(0, 1).chunk(len(tensor.members))
            state |= {prefix + n: t for n, t in zip(tensor.members, pieces, strict=True)}
        for name, tensor in layer.items():
            if kind.equal_gains and name.endswith(("q_norm.weight", "k_norm.weight")):
                state[prefix + name] = torch.full_like(tensor, 1.25)
    model.load_state_dict(state)
    save(model, plain)
    model.load_state_dict(state | after)
    return plain, save(model, other)


def distance(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference, as a part of the largest logit."""
    return float((found - reference).abs().max() / reference.abs().max())


@pytest.mark.filterwarnings("ignore")  # of the model classes themselves
@pytest.mark.parametrize("name", KINDS)
def test_heads_equal_up_to_their_basis_merge_without_a_trace(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    plain, source = build(kind, tmp_path)
    reference = logits(source)
    # The change of basis is one that transformers does not notice (some classes rotate in float32).
    assert distance(reference, logits(plain)) < 1e-6
    report = uptrain.convert(source, tmp_path / "factorize", kind.count, method="factorize")
    uptrain.convert(source, tmp_path / "mean", kind.count, method="mean")
    assert distance(logits(tmp_path / "factorize"), reference) < ROUNDING
    assert distance(logits(tmp_path / "mean"), reference) > 100 * ROUNDING
    found = [layer for layer in report["layers"] if layer["freedom"]]
    assert {layer["freedom"]["key"] for layer in found} == {kind.key}
    assert {layer["freedom"]["rotary_dim"] for layer in found} == {kind.rotary}
    assert all(0 <= part < 1e-9 for layer in found for part in layer["discarded_energy"].values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n for n, kind in KINDS.items() if kind.count == 1])
def test_heads_equal_up_to_a_turn_are_aligned_without_a_trace(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    _, source = build(kind, tmp_path, rigid=True)
    uptrain.convert(source, tmp_path / "align", kind.count, method="align")
    assert distance(logits(tmp_path / "align"), logits(source)) < ROUNDING


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n for n, kind in KINDS.items() if kind.count == 2])
@pytest.mark.parametrize("method", ["align", "factorize"])
def test_search_finds_heads_that_belong_together(name: str, method: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    rigid = method == "align"
    _, source = build(kind, tmp_path, rigid=rigid, shuffle=kind.reorder)
    report = uptrain.convert(source, tmp_path / "target", 2, method=method, grouping="search")
    assert distance(logits(tmp_path / "target"), logits(source)) < ROUNDING
    groups = {json.dumps(layer["groups"]) for layer in report["layers"] if layer["groups"]}
    # Where heads cannot change places, neighbours are merged.
    assert groups == {"[[0, 2], [1, 3]]" if kind.reorder else "[[0, 1], [2, 3]]"}


# One block, without a model.

MEMBERS, SIZE, INPUTS, HIDDEN = 4, 8, 20, 24


def draw(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def some_heads() -> AttentionHeads:
    return AttentionHeads(
        query=draw(MEMBERS, 2, SIZE, INPUTS, seed=0),
        key=draw(MEMBERS, SIZE, INPUTS, seed=1),
        value=draw(MEMBERS, SIZE, INPUTS, seed=2),
        output=draw(MEMBERS, 2, HIDDEN, SIZE, seed=3),
        gate=None,
    )


def moment() -> torch.Tensor:
    tokens = draw(50, INPUTS, seed=4)
    return tokens.T @ tokens / 50


def value_loss(before: AttentionHeads, after: AttentionHeads, groups: list[list[int]]) -> float:
    """Energy of the error of Wo Wv, as a part of the whole, query head by query head."""
    order = [head for group in groups for head in group]
    wanted = (before.output @ before.value[:, None])[order].flatten(0, 1)
    found = (after.output @ after.value[:, None]).flatten(0, 1)

    def energy(rows: torch.Tensor) -> torch.Tensor:
        return ((rows @ moment()) * rows).sum()

    return float(energy(wanted - found) / energy(wanted))


FREE = Freedom(Basis.FULL, Basis.SCALED, SIZE, False, True)


@pytest.mark.parametrize("grouping", ["contiguous", "search"])
@pytest.mark.parametrize("count", [2, 1])
def test_the_discarded_energy_is_the_error(grouping: str, count: int) -> None:
    merged = merge_heads(some_heads(), FREE, moment(), count, method="factorize", grouping=grouping)
    loss = value_loss(some_heads(), merged.parts, merged.groups)
    assert merged.discarded_value == pytest.approx(loss, rel=1e-9)
    assert merged.parts.key.shape == (count, SIZE, INPUTS)
    assert merged.parts.query.shape == (count, 8 // count, SIZE, INPUTS)
    assert merged.parts.output.shape == (count, 8 // count, HIDDEN, SIZE)


def test_no_method_loses_less_than_factorize() -> None:
    losses = {}
    for method in ("mean", "first", "align", "factorize"):
        merged = merge_heads(some_heads(), FREE, moment(), 2, method=method, grouping="contiguous")
        losses[method] = value_loss(some_heads(), merged.parts, merged.groups)
    assert min(losses, key=lambda method: losses[method]) == "factorize"


def test_search_is_never_worse_and_moves_whole_heads() -> None:
    parts = replace(some_heads(), gate=draw(MEMBERS, 2, SIZE, INPUTS, seed=5))
    near = merge_heads(parts, FREE, moment(), 2, method="factorize", grouping="contiguous")
    best = merge_heads(parts, FREE, moment(), 2, method="factorize", grouping="search")
    assert best.discarded_value + best.discarded_key <= near.discarded_value + near.discarded_key
    order = [head for group in best.groups for head in group]
    assert best.parts.gate is not None
    assert parts.gate is not None
    assert torch.equal(best.parts.gate.flatten(0, 1), parts.gate[order].flatten(0, 1))


@pytest.mark.parametrize("method", ["mean", "align", "factorize"])
def test_what_is_fixed_is_averaged(method: str) -> None:
    parts = some_heads()
    fixed = Freedom(Basis.FIXED, Basis.FIXED, 0, False, False)
    merged = merge_heads(parts, fixed, moment(), 2, method=method, grouping="search")
    assert merged.groups == [[0, 1], [2, 3]]
    assert torch.equal(merged.parts.query.flatten(0, 1), parts.query.flatten(0, 1))
    assert torch.equal(merged.parts.output.flatten(0, 1), parts.output.flatten(0, 1))
    for found, whole in ((merged.parts.key, parts.key), (merged.parts.value, parts.value)):
        assert torch.allclose(found, whole.unflatten(0, (2, 2)).mean(1))


def test_first_keeps_each_groups_first_head() -> None:
    parts = some_heads()
    merged = merge_heads(parts, FREE, moment(), 2, method="first", grouping="contiguous")
    assert torch.equal(merged.parts.key, parts.key[::2])
    assert torch.equal(merged.parts.value, parts.value[::2])


@pytest.mark.parametrize("key", [Basis.SCALED, Basis.TURNED, Basis.SIGNED])
@pytest.mark.parametrize("method", ["align", "factorize"])
def test_opposed_members_give_numbers(key: Basis, method: str) -> None:
    parts = some_heads()
    signs = torch.tensor([1.0, -1, 1, -1], dtype=torch.float64).view(4, 1, 1)
    parts = replace(
        parts,
        key=parts.key[[0, 0, 2, 2]] * signs,
        query=parts.query * signs[:, None],
        value=parts.value[[0, 0, 2, 2]] * signs,
    )
    freedom = replace(FREE, key=key)
    merged = merge_heads(parts, freedom, moment(), 2, method=method, grouping="contiguous")
    # q . k of each member is what it was.
    before = torch.einsum("kqdi,kdj->kqij", parts.query, parts.key).flatten(0, 1)
    after = torch.einsum("kqdi,kdj->kqij", merged.parts.query, merged.parts.key).flatten(0, 1)
    assert torch.allclose(before, after, atol=1e-9)
    assert value_loss(parts, merged.parts, merged.groups) < 1e-9


@pytest.mark.parametrize("zero", ["key", "query", "value", "output"])
@pytest.mark.parametrize("method", ["mean", "align", "factorize"])
def test_heads_of_zeros_give_numbers(zero: str, method: str) -> None:
    parts = some_heads()
    parts = replace(parts, **{zero: torch.zeros_like(getattr(parts, zero))})
    merged = merge_heads(parts, FREE, moment(), 2, method=method, grouping="search")
    for name in ("query", "key", "value", "output"):
        assert getattr(merged.parts, name).isfinite().all()
    assert 0 <= merged.discarded_value <= 1
    assert 0 <= merged.discarded_key <= 1
