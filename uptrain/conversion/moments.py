"""Second moments of what enters an attention block, from text or from the gains of its norm."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from uptrain.conversion.attention import AttentionNames
from uptrain.conversion.fit import Run
from uptrain.conversion.repair import run_attention

_SIGN_ROWS = 32


@torch.no_grad()
def input_moments(
    layer: nn.Module, names: AttentionNames, run: Run, batches: Iterable[Tensor]
) -> tuple[Tensor, Tensor]:
    """Take the second moment of an attention block's input, and its covariance.

    Args:
        layer: The layer.
        names: Where its attention block is.
        run: Runs the whole layer.
        batches: What enters the layer, each [sequences, length, hidden_size].

    Returns:
        E[x xᵀ] and E[x xᵀ] − E[x] E[x]ᵀ, [inputs, inputs], float64, with a constant 1 appended to x
        where there are biases.
    """
    seen: list[Tensor] = []
    projection = layer.get_submodule(f"{names.module}.{names.key}")
    handle = projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    until_attention = run_attention(layer, names, run)
    total = sums = torch.zeros(())
    tokens = 0
    try:
        for batch in batches:
            seen.clear()
            until_attention(batch)
            entering = seen[0].flatten(0, -2).float()
            if names.has_bias:
                entering = torch.cat([entering, torch.ones_like(entering[:, :1])], dim=1)
            total = total.to(entering.device) + (entering.T @ entering).double()
            sums = sums.to(entering.device) + entering.sum(0).double()
            tokens += len(entering)
    finally:
        handle.remove()
    moment = total / tokens
    mean = moment[-1] if names.has_bias else sums / tokens
    return moment, moment - torch.outer(mean, mean)


def balanced_signs(width: int) -> Tensor:
    """Draw rows that pass a norm unchanged, so that what comes out of it is its gain.

    Each goes with its negative, so that a LayerNorm's offset does not mix with the gain.

    Args:
        width: Of the layer's input.

    Returns:
        [rows, width], half of each row 1 and half −1.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(_SIGN_ROWS, width, generator=generator).argsort(-1)
    signs = torch.where(order < width // 2, 1.0, -1.0)
    return torch.cat([signs, -signs])
