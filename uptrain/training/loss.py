"""The losses of training: functions of a model and a batch, to be replaced at will."""

from collections.abc import Callable
from typing import Any

import torch

# Of a chunk of float32 logits: more leaves a CPU's cache, and only costs memory on a GPU.
_CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}

Metrics = dict[str, torch.Tensor]
Loss = Callable[[Any, torch.Tensor, torch.Tensor], tuple[torch.Tensor, int, Metrics]]
"""(model, inputs [B, L], targets [B, L]) to the summed loss, float32 []; the number of its tokens;
further sums over the same tokens, by name. Sums, so that parts of a batch can be added."""


def cross_entropy(
    model: Any, inputs: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, int, Metrics]:
    """Sum the cross-entropy of every token of a batch.

    Args:
        model: A causal language model of transformers.
        inputs: Token ids, int64 [B, L].
        targets: The token behind each input, int64 [B, L].

    Returns:
        The sum in nats, float32 []; B * L; nothing further.
    """
    logits = model(input_ids=inputs, use_cache=False).logits
    loss = sum_cross_entropy(logits.flatten(0, 1), targets.flatten())
    return loss, targets.numel(), {}


def sum_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum -log softmax(logits)[target] in float32, without ever holding all logits in float32.

    Args:
        logits: [N, vocabulary], of any floating dtype.
        targets: int64 [N].

    Returns:
        Float32 []. Its gradient has the dtype of `logits`.
    """
    # torch declares no types for Function.apply.
    loss: torch.Tensor = _SumCrossEntropy.apply(logits, targets)  # type: ignore[no-untyped-call]
    return loss


class _SumCrossEntropy(torch.autograd.Function):
    """Computes the gradient with the loss, a chunk at a time, instead of keeping probabilities."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        size = _CHUNK_ELEMENTS["cpu" if logits.device.type == "cpu" else "cuda"]
        rows = max(1, size // logits.shape[-1])
        loss = torch.zeros((), dtype=torch.float32, device=logits.device)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets), rows):
            chunk = logits[start : start + rows].float()
            target = targets[start : start + rows, None]
            log_probabilities = chunk.log_softmax(-1)
            loss -= log_probabilities.gather(-1, target).sum()
            if gradient is not None:
                part = log_probabilities.exp_()
                part.scatter_add_(-1, target, torch.full_like(target, -1, dtype=part.dtype))
                gradient[start : start + rows] = part
        ctx.gradient = gradient
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient, ctx.gradient = ctx.gradient, None  # scaled in place, so good for one use only
        return gradient.mul_(upstream[0].to(gradient.dtype)), None
