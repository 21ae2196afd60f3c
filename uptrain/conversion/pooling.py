"""Merge the heads of each group into one head."""

import hashlib

import torch

from uptrain.families.layouts import join_heads, split_heads
from uptrain.families.schema import HeadTensor, Layout

POOLS = ("mean", "first", "random")


def pool_tensor(
    weight: torch.Tensor,
    tensor: HeadTensor,
    method: str,
    *,
    seed: int = 0,
    std: float = 0.02,
) -> torch.Tensor:
    """Merge neighbouring KV heads in one tensor of a checkpoint.

    Args:
        weight: The tensor, in its source shape.
        tensor: Its layout, shapes and head counts.
        method: One of `POOLS`.
        seed: Seed of `random`.
        std: Standard deviation of `random`.

    Returns:
        The tensor in its target shape, in the dtype of `weight`.
    """
    count = tensor.num_key_value_heads
    if tensor.layout is Layout.MIXED:
        # What its rows read from the heads of a group, they now read from the one in their place.
        columns = weight.unflatten(1, (count, tensor.heads.num_key_value_heads // count, -1))
        weight = columns.sum(2, dtype=working_dtype(weight)).flatten(1).to(weight.dtype)
    query, key_value = split_heads(weight, tensor.layout, tensor.heads)
    merged = []
    for part, source in enumerate(key_value):
        pooled = pool_heads(source, count, "first" if method == "first" else "mean")
        # Norms over heads keep their mean: there is no sense in a random gain.
        is_norm = tensor.layout is Layout.LISTED or "norm" in tensor.name.split(".")[-2]
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
    working = working_dtype(heads)
    # Group by group: the wide copy is then no larger than one group.
    return torch.stack([group.to(working).mean(0).to(heads.dtype) for group in grouped])


def working_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Give the dtype to take sums in: float64 for 32-bit and wider weights, else float32."""
    return torch.float64 if tensor.dtype.itemsize >= 4 else torch.float32


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
