"""Cross-entropy and KL over chunks of tokens through the head: the logits are never whole in memory."""

import functools
from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor

Head = Callable[[Tensor], Tensor]
"""From hidden states [1, n, hidden_size] to logits [1, n, vocabulary]."""

# Logits of one trip through the head. More are not faster, and only cost memory.
_CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**27}
# Logits that are in float32 at once: on a CPU they should stay in its cache. A fused kernel holds none.
_SLICE_ELEMENTS = {"cpu": 2**18, "cuda": 2**25}


def even_chunk(tokens: int, vocabulary: int, device: torch.device) -> int:
    """Cut `tokens` into chunks as even as can be; returns the tokens of one."""
    most = max(1, _CHUNK_ELEMENTS[_kind(device)] // vocabulary)
    return ceil(tokens / ceil(tokens / most))


def chunked_loss(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    parameters: Sequence[Tensor],
    chunk_tokens: int,
    *,
    teacher_head: Head | None = None,
    teacher_hidden: Tensor | None = None,
    distillation_weight: float = 0.0,
    fused: bool = False,
) -> Tensor:
    """Sum the losses of all tokens, forward and backward in one pass over chunks of them.

    Args:
        head: The student's.
        hidden: The student's hidden states, [B, L, hidden_size].
        targets: The token behind each, int64 [B, L].
        parameters: What `head` works with and is trained; they get their gradients.
        chunk_tokens: Tokens that go through the heads at once.
        teacher_head: The teacher's; not differentiated.
        teacher_hidden: The teacher's hidden states, [B, L, its hidden_size].
        distillation_weight: w, of the KL divergence; cross-entropy has 1 - w.
        fused: Compile what follows the logits to one kernel; for a GPU.

    Returns:
        Float32 [3], sums in nats: (1 - w) CE + w KL, which can be differentiated once; CE; and
        KL(teacher ‖ student), 0 without a teacher.
    """
    # torch declares no types for Function.apply.
    sums: Tensor = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden.flatten(0, 1),
        targets.flatten(),
        head,
        None if teacher_hidden is None else teacher_hidden.flatten(0, 1),
        teacher_head,
        distillation_weight,
        chunk_tokens,
        fused,
        *parameters,
    )
    return sums


class _ChunkedLoss(torch.autograd.Function):
    """Makes the gradients with the loss; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        head: Head,
        teacher_hidden: Tensor | None,
        teacher_head: Head | None,
        weight: float,
        chunk_tokens: int,
        fused: bool,
        *parameters: Tensor,
    ) -> Tensor:
        sums = torch.zeros(3, dtype=torch.float32, device=hidden.device)
        wanted = any(ctx.needs_input_grad)
        gradients: list[Tensor | None] = [None] * len(parameters)
        of_hidden = torch.empty_like(hidden) if wanted else None
        for start in range(0, len(targets), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            with torch.set_grad_enabled(wanted):
                entering = hidden[part].detach().requires_grad_(wanted)
                logits = head(entering[None])[0]
            teacher = None
            if teacher_head is not None and teacher_hidden is not None:
                teacher = teacher_head(teacher_hidden[part][None])[0]
            found, upstream = _token_losses(logits.detach(), teacher, targets[part], weight, fused)
            sums += found
            del teacher
            if of_hidden is not None:
                first, *rest = torch.autograd.grad(logits, [entering, *parameters], upstream)
                of_hidden[part] = first
                gradients = [
                    new.float() if old is None else old.add_(new)
                    for old, new in zip(gradients, rest, strict=True)
                ]
        ctx.gradients = [of_hidden, *gradients]
        return sums

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        # Scaled in place, so good for one use only.
        gradients, ctx.gradients = ctx.gradients, None
        of_hidden, *rest = [
            None if each is None else each.mul_(upstream[0][0].to(each.dtype)) for each in gradients
        ]
        return (of_hidden, *[None] * 7, *rest)


def _token_losses(
    logits: Tensor, teacher: Tensor | None, targets: Tensor, weight: float, fused: bool
) -> tuple[Tensor, Tensor]:
    """Do `_losses_and_gradient` in slices, or in one fused kernel."""
    if fused:
        return _fused()(logits, teacher, targets, weight)
    rows = max(1, _SLICE_ELEMENTS[_kind(logits.device)] // logits.shape[-1])
    sums = logits.new_zeros(3, dtype=torch.float32)
    gradient = torch.empty_like(logits)
    for start in range(0, len(targets), rows):
        part = slice(start, start + rows)
        of_teacher = None if teacher is None else teacher[part]
        found, gradient[part] = _losses_and_gradient(
            logits[part], of_teacher, targets[part], weight
        )
        sums += found
    return sums, gradient


@functools.cache
def _fused() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_losses_and_gradient)


def _losses_and_gradient(
    logits: Tensor, teacher: Tensor | None, targets: Tensor, weight: float
) -> tuple[Tensor, Tensor]:
    """Sum CE and KL of tokens, and differentiate their mixture by the logits.

    Args:
        logits: [n, vocabulary], of any floating dtype; the arithmetic is float32.
        teacher: [n, vocabulary] or None.
        targets: int64 [n].
        weight: Of KL.

    Returns:
        Float32 [3]: the mixture, CE, KL; and [n, vocabulary] in the dtype of `logits`.
    """
    log_student = logits.float().log_softmax(-1)
    # One-hot by comparison: in one kernel with the rest, where a scatter would need its own.
    is_target = torch.arange(logits.shape[-1], device=logits.device) == targets[:, None]
    cross_entropy = -log_student.gather(-1, targets[:, None]).sum()
    gradient = log_student.exp()
    if teacher is None:
        divergence = torch.zeros_like(cross_entropy)
        mixture = cross_entropy
        gradient = gradient - is_target.float()
    else:
        log_teacher = teacher.float().log_softmax(-1)
        likely = log_teacher.exp()
        # A logit of -inf has no probability and adds nothing, though the product is NaN.
        terms = torch.where(likely > 0, likely * (log_teacher - log_student), 0.0)
        divergence = terms.sum()
        mixture = (1 - weight) * cross_entropy + weight * divergence
        gradient = gradient - (1 - weight) * is_target.float() - weight * likely
    return torch.stack([mixture, cross_entropy, divergence]), gradient.to(logits.dtype)


def _kind(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else "cuda"
