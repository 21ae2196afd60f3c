"""Fit one layer's weights to targets by a short descent; no gradient leaves the layer."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import cos, pi

import torch
from torch import Tensor, nn

_WARMUP_STEPS = 5
_SETTLED_STEPS = 6
_MOMENTUM = 0.95
# Newton-Schulz iteration of Muon (Jordan et al. 2024), as torch.optim.Muon has it too; that one works
# in bfloat16, which a CPU without such units does three times slower than float32.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5

Rows = slice | Tensor
"""Which sequences of the calibration text a batch holds."""
Run = Callable[[Tensor, Rows], Tensor]
"""From hidden states [batch, length, hidden_size], and which sequences they are of."""
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Fit:
    """How a layer's weights are fitted."""

    rates: Mapping[str, float]
    """Step size by parameter name; what is not named stays."""
    steps: int
    decay: float
    """Pull back to the start, as a part of the step size."""
    orthogonal: bool = True
    """Muon for matrices; else Adam for all."""


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over tokens of |output - target|² / |target|²."""
    error = (output.float() - target.float()).square().sum(-1)
    return (error / target.float().square().sum(-1).clamp(min=1e-20)).mean()


def fit_layer(
    layer: nn.Module,
    run: Run,
    inputs: Tensor,
    targets: Tensor,
    fit: Fit,
    batches: Iterator[Tensor],
    *,
    loss: Loss = relative_error,
    advance: Callable[[float], None] = lambda value: None,
) -> None:
    """Fit a layer's weights to its targets, in place.

    Args:
        layer: The converted layer.
        run: From hidden states to what `loss` compares with the targets.
        inputs: [sequences, length, hidden_size], what enters the layer.
        targets: [sequences, length, hidden_size].
        fit: What is trained, how fast and how long.
        batches: Which sequences each step takes, without end.
        loss: From output and target to a scalar.
        advance: Called after each step with its loss.
    """
    parameters = {n: p for n, p in layer.named_parameters() if n in fit.rates}
    layer.requires_grad_(False)
    start = {n: p.detach().clone() for n, p in parameters.items()}
    # A tensor of zeros (a bias, mostly) has no size of its own and stays.
    rates = {n: fit.rates[n] * float(start[n].square().mean().sqrt()) for n in parameters}
    orthogonal = {n for n, p in parameters.items() if fit.orthogonal and p.dim() == 2}
    momenta = {n: torch.zeros_like(start[n]) for n in orthogonal}
    others = {n: p for n, p in parameters.items() if n not in orthogonal}
    groups = [{"params": [p], "rate": rates[n]} for n, p in others.items()]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-12) if groups else None
    device = next(layer.parameters()).device
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for step in range(fit.steps):
        factor = _schedule(step, fit.steps)
        chosen = next(batches).to(inputs.device)
        entering = inputs[chosen].to(device).float()
        value = loss(run(entering, chosen), targets[chosen].to(device).float())
        value.backward()
        with torch.no_grad():
            for name in orthogonal:
                gradient = parameters[name].grad
                if gradient is None:  # chooses, and computes nothing itself: an indexer, say
                    continue
                momenta[name].lerp_(gradient, 1 - _MOMENTUM)
                ahead = gradient.lerp(momenta[name], _MOMENTUM)  # Nesterov's
                scale = rates[name] * factor * max(gradient.shape) ** 0.5
                parameters[name].sub_(orthogonalize(ahead), alpha=scale)
            if adam is not None:
                for group in adam.param_groups:
                    group["lr"] = group["rate"] * factor
                adam.step()
            for name, parameter in parameters.items():
                parameter.lerp_(start[name], fit.decay * fit.rates[name] * factor)
                parameter.grad = None
        advance(float(value.detach()))
    layer.requires_grad_(False)


def orthogonalize(matrix: Tensor) -> Tensor:
    """Bring all singular values of a matrix near 1, by Newton-Schulz iteration.

    Args:
        matrix: [rows, columns].

    Returns:
        The same shape, float32; in bfloat16 arithmetic on a GPU.
    """
    a, b, c = _NEWTON_SCHULZ
    work = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    tall = work.shape[0] > work.shape[1]
    work = work.mT if tall else work
    work = work / (work.norm() + 1e-12)
    for _ in range(_ITERATIONS):
        gram = work @ work.mT
        work = a * work + (b * gram + c * gram @ gram) @ work
    result: Tensor = (work.mT if tall else work).float()
    return result


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up, then cosine to zero; few steps are small, as they end before they settle."""
    peak = min(1.0, steps / _SETTLED_STEPS)
    warmup = min(_WARMUP_STEPS, steps // 4)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * 0.5 * (1 + cos(pi * (step - warmup) / max(1, steps - warmup)))
