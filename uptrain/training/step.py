"""One step of training: all of its parts forward and backward, then the optimizer."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from uptrain.errors import TrainingError
from uptrain.training import processes
from uptrain.training.batches import MicroBatch
from uptrain.training.optimizer import set_learning_rate
from uptrain.training.setup import Run
from uptrain.training.trainable import set_trained

_SHOWN_SEQUENCES = 8


def train_step(
    run: Run,
    optimizer: torch.optim.Optimizer,
    step: int,
    parts: Sequence[MicroBatch],
    learning_rate: float,
    stop_asked: Callable[[], bool],
) -> tuple[dict[str, Any], bool]:
    """Do one step.

    Args:
        run: From `prepare`.
        optimizer: Of its objective's parameters.
        step: Steps done before.
        parts: This process's share of the step.
        learning_rate: Of this step.
        stop_asked: Whether this process was asked to stop.

    Returns:
        The step's row of the log, and whether any process was asked to stop.

    Raises:
        TrainingError: If a loss or the gradient's norm is not finite (the step and its sequences are
            named, nothing is changed), or the device's memory is too small.
    """
    accelerator, options = run.accelerator, run.recipe.train
    # Nothing random is carried from step to step, so none of it is part of a checkpoint.
    seed = [options.seed, step, accelerator.process_index]
    torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1))
    set_trained(run.objective.model, run.trainable.at(step))
    whole = accelerator.gather(_accumulate(run, step, parts, stop_asked)).double().cpu()
    _check_finite(run, step, whole[:, 0])
    loss, cross_entropy, divergence, tokens, _ = whole.sum(0).tolist()
    set_learning_rate(optimizer, learning_rate)
    # Gradients are sums over this process's tokens, averaged over processes.
    scale = accelerator.num_processes / tokens
    norm = _scale_gradients(run.objective, scale, options.gradient_clipping)
    if not np.isfinite(norm):
        raise TrainingError(_failure(run, step, f"the norm of the gradient is {norm}", []))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    row = {
        "step": step + 1,
        "tokens": (step + 1) * options.batch_tokens,
        "loss": loss / tokens,
        "learning_rate": learning_rate,
        "gradient_norm": norm,
    }
    if options.gradient_clipping is not None and norm > options.gradient_clipping:
        row["clipped"] = True
    if run.teacher is not None:
        row |= {"cross_entropy": cross_entropy / tokens, "kl": divergence / tokens}
    return row, bool(whole[:, 4].any())


def _accumulate(
    run: Run, step: int, parts: Sequence[MicroBatch], stop_asked: Callable[[], bool]
) -> torch.Tensor:
    """Add up the gradients of this process's share of a step.

    Returns:
        [parts, 5]: the three sums of `Objective`, tokens, and whether to stop. Row after row the
        parts of all processes are the whole step, in the order of its sequences.
    """
    device, rows = run.accelerator.device, []
    try:
        for part in parts:
            with run.autocast():
                sums = run.objective(*part.to(device))
            sums[0].backward()
            rows.append([*sums.detach(), sums.new_tensor(float(part.targets.numel()))])
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"step {step + 1}: the device's memory is too small; set "
            "train.gradient_checkpointing: true, or lower train.micro_batch_tokens from "
            f"{run.micro_sequences * run.batches.sequence_length}"
        ) from error
    stop = rows[0][-1].new_tensor(float(stop_asked()))
    return torch.stack([torch.stack([*row, stop]) for row in rows])


@torch.no_grad()
def _scale_gradients(model: torch.nn.Module, scale: float, clipping: float | None) -> float:
    """Multiply all gradients by `scale`, clip their norm; returns the norm before clipping."""
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    # This process's rows of each: to ask for those of a whole list at once takes milliseconds.
    parts = [each.to_local() if isinstance(each, DTensor) else each for each in gradients]
    norm = processes.norm(torch.nn.utils.get_total_norm(parts)) * scale
    if clipping is not None and norm > clipping:
        scale *= clipping / norm
    torch._foreach_mul_(parts, scale)
    return norm


def _check_finite(run: Run, step: int, losses: torch.Tensor) -> None:
    bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
    if bad:
        sequences = np.split(run.batches.indices(step), len(losses))[bad[0]].tolist()
        raise TrainingError(_failure(run, step, f"the loss is {losses[bad[0]]:.4g}", sequences))


def _failure(run: Run, step: int, finding: str, sequences: list[int]) -> str:
    among = ""
    if sequences:
        shown = ", ".join(map(str, sequences[:_SHOWN_SEQUENCES]))
        more = ", …" if len(sequences) > _SHOWN_SEQUENCES else ""
        among = f" among sequences {shown}{more} of data.train"
    return (
        f"step {step + 1}: {finding}{among}, expected a finite number; checkpoints before it stay "
        f"in {run.output / 'checkpoints'}; lower train.learning_rate or raise train.warmup"
    )
