"""Merge the heads of each group into one head."""

import hashlib

import torch

from uptrain.families.layouts import join_heads, split_heads
from uptrain.families.schema import Heads, HeadTensor

POOLS = ("mean", "first", "random")


def pool_tensor(
    weight: torch.Tensor,
    tensor: HeadTensor,
    heads: Heads,
    num_key_value_heads: int,
    method: str,
    *,
    seed: int = 0,
    std: float = 0.02,
) -> torch.Tensor:
    """Merge neighbouring KV heads in one tensor of a checkpoint.

    Args:
        weight: The tensor, in its source shape.
        tensor: Its layout and shapes.
        heads: The source's head counts.
        num_key_value_heads: G of the target.
        method: One of `POOLS`.
        seed: Seed of `random`.
        std: Standard deviation of `random`.

    Returns:
        The tensor in its target shape, in the dtype of `weight`.
    """
    query, key_value = split_heads(weight, tensor.layout, heads)
    merged = []
    for part, source in enumerate(key_value):
        pooled = pool_heads(source, num_key_value_heads, "first" if method == "first" else "mean")
        # Norms over heads keep their mean: there is no sense in a random gain.
        is_norm = "norm" in tensor.name.split(".")[-2]
        if method == "random" and len(pooled) < len(source) and not is_norm:
            scale = 0.0 if tensor.name.endswith("bias") else std
            pooled = random_heads(pooled, f"{tensor.name}:{part}", seed, scale)
        merged.append(pooled)
    result = join_heads(query, merged, tensor.layout)
    assert tuple(result.shape) == tensor.target_shape
    return result


def pool_heads(heads: torch.Tensor, num_key_value_heads: int, method: str) -> torch.Tensor:
    """Merge neighbouring heads, K / G at a time.

    Args:
        heads: [K, ...], one slice per source head, any floating dtype.
        num_key_value_heads: G, a divisor of K.
        method: `mean`, or `first` to keep each group's first head.

    Returns:
        [G, ...] in the dtype of `heads`. The mean is taken in float64 for 32-bit and wider weights
        and in float32 for narrower ones, where the mean of equal heads is that head exactly.

    Source: Ainslie et al. 2023, arXiv:2305.13245, section 2.1 and figure 4.
    """
    grouped: torch.Tensor = heads.unflatten(0, (num_key_value_heads, -1))
    if method == "first" or grouped.shape[1] == 1:
        return grouped[:, 0].contiguous()
    working = torch.float64 if heads.dtype.itemsize >= 4 else torch.float32
    # Group by group: the wide copy is then no larger than one group.
    return torch.stack([group.to(working).mean(0).to(heads.dtype) for group in grouped])


def random_heads(like: torch.Tensor, name: str, seed: int, std: float) -> torch.Tensor:
    """Draw a tensor anew, as at the start of a pretraining.

    Args:
        like: [G, ...], gives shape and dtype.
        name: The tensor's name; each tensor gets its own stream of numbers.
        seed: Seed of the conversion.
        std: Standard deviation, the config's `initializer_range`.

    Source: Ainslie et al. 2023, arXiv:2305.13245, figure 4 (`random`).
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.normal(0.0, std, like.shape, generator=generator).to(like.dtype)
