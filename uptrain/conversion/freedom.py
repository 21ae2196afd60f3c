"""Which changes of basis an attention block does not notice, found by trying them on its own weights.

A shared head can stand for several only up to what their query and output projections absorb. What
they absorb depends on rotary embedding and its pairing, on norms, gates and clips; no list of
families is trusted for it. Each candidate change is made and undone on the real layer: it is
allowed if the layer's output stays, and if it does not stay once the undoing is left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import torch

from uptrain.conversion.attention import AttentionHeads
from uptrain.families import registry

# An allowed change moves the output by rounding only, a forbidden one by about as much as the change
# without its undoing; the bound lies far from both.
TOLERANCE = 1e-3


class Basis(StrEnum):
    """What may be done to the basis of a KV head, from the most to the least.

    Of values, TURNED is any rotation.
    """

    FULL = "full"
    """Any invertible map."""
    SCALED = "scaled"
    """A complex scale of each rotary pair."""
    TURNED = "turned"
    """A rotation of each rotary pair: a norm on queries and keys fixes the lengths."""
    SIGNED = "signed"
    """A sign for each rotary pair: such a norm has different gains within the pair."""
    FIXED = "fixed"
    """Nothing."""


@dataclass(frozen=True)
class Freedom:
    """What one attention block allows."""

    value: Basis
    """FULL, TURNED or FIXED; where keys are the values, `key` says what may be done to both."""
    key: Basis
    rotary_dim: int
    """Leading channels of a head that are rotated; those behind it may take any map if `key` is
    SCALED, and none under a norm."""
    interleaved: bool
    """Channels 2m and 2m + 1 are a rotary pair, else m and m + rotary_dim / 2."""
    reorder: bool
    """Whether KV heads may change places together with their query heads."""
    shift: bool = False
    """Whether one vector may be added to all keys of a KV head, in the channels behind the rotary
    ones: it cancels in a softmax without sinks."""


class Run(Protocol):
    """Computes a layer's output, any shape, from changed weights."""

    def __call__(self, parts: AttentionHeads, added: torch.Tensor | None = None, /) -> torch.Tensor:
        """Run the layer with these weights.

        Args:
            parts: The attention block's weights.
            added: [K, head_dim, 2], what the keys at even and at odd positions are shifted by.
        """


def find_freedom(parts: AttentionHeads, run: Run, rotary_dims: list[int]) -> Freedom:
    """Probe an attention block.

    Args:
        parts: Its weights.
        run: Runs the layer.
        rotary_dims: Numbers of leading channels that may be the rotary ones.

    Returns:
        The most that the block allows.
    """
    generator = torch.Generator().manual_seed(0)
    reference = run(parts)

    def allows(made: torch.Tensor, undone: torch.Tensor) -> bool:
        moved, left = (made - reference).abs().max(), (undone - reference).abs().max()
        return bool(torch.isfinite(left)) and float(left) <= TOLERANCE * float(moved)

    value = Basis.FIXED
    for basis in () if parts.tied else (Basis.TURNED, Basis.FULL):
        maps = _random_maps(parts.value.shape[:2], generator, turns=basis is Basis.TURNED)
        maps = maps.to(parts.value)
        changed = replace(parts, value=maps @ parts.value)
        if not allows(run(changed), run(_absorbed(changed, torch.linalg.inv(maps)))):
            break
        value = basis

    order = torch.arange(len(parts.key)).roll(1).to(parts.key.device)  # every head moves
    moved_kv = replace(parts, key=parts.key[order], value=parts.value[order])
    # With one KV head there is nothing to reorder.
    reorder = len(parts.key) > 1 and allows(run(moved_kv), run(parts.reordered(order)))

    d = parts.key.shape[1]
    candidates = [(Basis.FULL, 0, False)]
    for basis in (Basis.SCALED, Basis.TURNED, Basis.SIGNED):
        # What is not rotated may take any map if SCALED, and none under a norm: where several numbers
        # fit (interleaved pairs of partial rotary), the fewest free most there, the most here.
        dims = sorted((n for n in rotary_dims if n <= d), reverse=basis is not Basis.SCALED)
        candidates += [(basis, n, mode) for n in dims for mode in (False, True)]
    for basis, rotary_dim, interleaved in candidates:
        maps, inverses = _key_maps(parts, basis, rotary_dim, interleaved, generator)
        changed = replace(parts, key=maps @ parts.key)
        # Scores are q . k: the queries take the inverse's transpose.
        undone = replace(changed, query=inverses.mT[:, None] @ parts.query)
        if parts.tied:
            changed = replace(changed, value=changed.key)
            undone = _absorbed(replace(undone, value=undone.key), inverses)
        if allows(run(changed), run(undone)):
            added = torch.zeros(*parts.key.shape[:2], 2).to(parts.key)
            if basis in (Basis.FULL, Basis.SCALED) and rotary_dim < d:
                draw = torch.randn(len(parts.key), d, 1, generator=generator).to(added)
                added += draw * parts.key.norm(dim=-1, keepdim=True)
                added[:, :rotary_dim] = 0
            # The same at all positions goes unnoticed, and with changing signs it does not.
            signs = torch.tensor([1.0, -1.0]).to(added)
            shift = bool(added.any()) and allows(run(parts, added * signs), run(parts, added))
            return Freedom(value, basis, rotary_dim, interleaved, reorder, shift)
    return Freedom(value, Basis.FIXED, 0, False, reorder)


def _absorbed(parts: AttentionHeads, inverses: torch.Tensor) -> AttentionHeads:
    """Undo maps of the values [K, value_dim, value_dim] in the output projection."""
    return replace(parts, output=torch.einsum("kqhd,kde->kqhe", parts.output, inverses))


def noisy(hidden: torch.Tensor) -> torch.Tensor:
    """Add noise of the same size to activations, so that a probe finds no direction empty."""
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    return hidden + noise.to(hidden.device) * hidden.std()


def rotary_dims(config: Mapping[str, Any], code: Path | None) -> list[int]:
    """Numbers of leading channels of a head that may be rotated, from what the config says."""
    setting = registry.kv_settings(config, code)[0]
    part = registry.part_of(config, setting.keys[0], code)
    sizes = registry.head_sizes(part, setting.heads.num_attention_heads)
    rope = getattr(part, "rope_parameters", None)
    rope = rope if isinstance(rope, dict) else {}
    shares = [rope.get("partial_rotary_factor")]
    shares += [r.get("partial_rotary_factor") for r in rope.values() if isinstance(r, dict)]
    shares += [getattr(part, "partial_rotary_factor", None), getattr(part, "rotary_pct", None)]
    dims = sizes | {int(size * share) for size in sizes for share in shares if share}
    dims |= {getattr(part, "rotary_dim", None) or min(sizes)}
    return sorted((n for n in dims if n % 2 == 0), reverse=True)


def _key_maps(
    parts: AttentionHeads,
    basis: Basis,
    rotary_dim: int,
    interleaved: bool,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one map [K, head_dim, head_dim] of each KV head's channels, and its inverse."""
    K, d = parts.key.shape[:2]
    maps = torch.eye(d, dtype=torch.float64).repeat(K, 1, 1)
    rest = d - rotary_dim
    if basis in (Basis.FULL, Basis.SCALED) and rest:
        maps[:, rotary_dim:, rotary_dim:] = _random_maps(torch.Size((K, rest)), generator)
    pairs = rotary_dim // 2
    if pairs:
        angle = torch.rand(K, pairs, generator=generator, dtype=torch.float64) * 6.28
        size = torch.ones(K, pairs, dtype=torch.float64)
        if basis is Basis.SCALED:
            size = 0.5 + torch.rand(K, pairs, generator=generator, dtype=torch.float64)
        if basis is Basis.SIGNED:
            angle = torch.where(angle > 3.14, torch.pi, 0.0)
        first = torch.arange(pairs) * 2 if interleaved else torch.arange(pairs)
        second = first + 1 if interleaved else first + pairs
        maps[:, first, first] = maps[:, second, second] = size * angle.cos()
        maps[:, second, first] = size * angle.sin()
        maps[:, first, second] = -size * angle.sin()
    maps = maps.to(parts.key)
    return maps, torch.linalg.inv(maps)


def _random_maps(
    shape: torch.Size, generator: torch.Generator, turns: bool = False
) -> torch.Tensor:
    """Draw well-conditioned maps [K, d, d]: random turns, with sizes between a half and one and a half."""
    K, d = shape
    normal = torch.randn(K, d, d, generator=generator, dtype=torch.float64)
    turned: torch.Tensor = torch.linalg.qr(normal)[0]
    if turns:
        return turned
    sizes = 0.5 + torch.rand(K, 1, d, generator=generator, dtype=torch.float64)
    return turned * sizes
