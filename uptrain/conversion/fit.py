"""Fit one layer's weights to targets by a short descent; no gradient leaves the layer."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn

_WARMUP_STEPS = 5
_MUON_RMS = 0.2  # torch's Muon with match_rms_adamw moves a tensor by this part of the rate

Run = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Fit:
    """How a layer's weights are fitted."""

    rates: Mapping[str, float]
    """Step size by parameter name; what is not named stays."""
    steps: int
    batch: int
    """Sequences of one step."""
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
    *,
    loss: Loss = relative_error,
    seed: int = 0,
    advance: Callable[[float], None] = lambda value: None,
) -> None:
    """Fit a layer's weights to its targets, in place.

    Args:
        layer: The converted layer.
        run: From hidden states to what `loss` compares with the targets.
        inputs: [sequences, length, hidden_size], what enters the layer.
        targets: [sequences, length, hidden_size].
        fit: What is trained, how fast and how long.
        loss: From output and target to a scalar.
        seed: Of the order of the sequences.
        advance: Called after each step with its loss.
    """
    parameters = {n: p for n, p in layer.named_parameters() if n in fit.rates}
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    start = {n: p.detach().clone() for n, p in parameters.items()}
    optimizers: list[Any] = []
    matrices: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for name, parameter in parameters.items():
        parameter.requires_grad_(True)
        size = float(parameter.detach().square().mean().sqrt())
        group = {"params": [parameter], "rate": fit.rates[name] * size, "name": name}
        (matrices if fit.orthogonal and parameter.dim() == 2 else others).append(group)
    if matrices:
        optimizers.append(
            torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        )
    if others:
        optimizers.append(torch.optim.Adam(others, betas=(0.9, 0.95), eps=1e-12))
    generator = torch.Generator().manual_seed(seed)
    order = _orders(len(inputs), fit.batch, generator)
    device = next(layer.parameters()).device
    for step in range(fit.steps):
        factor = _schedule(step, fit.steps)
        chosen = next(order).to(inputs.device)
        entering = inputs[chosen].to(device).float()
        value = loss(run(entering), targets[chosen].to(device).float())
        value.backward()
        for optimizer in optimizers:
            scale = 1 / _MUON_RMS if isinstance(optimizer, torch.optim.Muon) else 1.0
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * factor * scale
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.lerp_(start[name], fit.decay * fit.rates[name] * factor)
        advance(float(value.detach()))
    for parameter in layer.parameters():
        parameter.requires_grad_(False)


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up, then cosine to zero."""
    warmup = min(_WARMUP_STEPS, steps // 4)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + cos(pi * (step - warmup) / max(1, steps - warmup)))


def _orders(sequences: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield batches of indices, each sequence once before any is seen again."""
    while True:
        order = torch.randperm(sequences, generator=generator)
        yield from order[: sequences - sequences % batch].split(batch)
