"""The training loop: one for any number of devices."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from uptrain.errors import Interrupted, TrainingError
from uptrain.evaluation.scoring import score
from uptrain.progress import progress
from uptrain.training.export import export_checkpoint
from uptrain.training.guard import locked, stop_on_signal
from uptrain.training.log import append_log, cut_log, read_log
from uptrain.training.loss import Loss, cross_entropy
from uptrain.training.optimizer import make_optimizer, make_schedule
from uptrain.training.recipe import Recipe
from uptrain.training.setup import Run, make_accelerator, prepare
from uptrain.training.state import load_state, save_state

LOG = "train.jsonl"
_SHOWN_SEQUENCES = 8


def finetune(recipe: Recipe, *, resume: bool = False, loss: Loss = cross_entropy) -> dict[str, Any]:
    """Train a converted checkpoint as a recipe says, and export the result.

    The recipe's output folder comes to hold `tokens/`, `checkpoints/`, `train.jsonl` and `final/`,
    a plain checkpoint in the source's form. Started by `accelerate launch` or `torchrun`, several
    processes share each step.

    Args:
        recipe: From `load_recipe`; its `source` is the checkpoint to train.
        resume: Go on from the newest checkpoint of the same run, if there is one.
        loss: What to minimise.

    Returns:
        `steps`, `tokens`, `loss` (of the last step, nats a token), `validation_loss` and
        `initial_validation_loss` (None without data.validation), `seconds` (of the steps),
        `tokens_per_second`, and where things are: `final`, `checkpoint`, `log`. Empty in all
        processes but the main one.

    Raises:
        UptrainError: Of the kinds that `prepare` names, if the run cannot start.
        TrainingError: If the loss is not finite, the device's memory is too small, or a checkpoint
            cannot be written. Earlier checkpoints stay.
        Interrupted: If SIGTERM or SIGINT came; the step was finished and saved.
    """
    accelerator = make_accelerator(recipe)
    with locked(Path(recipe.output)) if accelerator.is_main_process else nullcontext():
        run = prepare(recipe, accelerator, resume)
        accelerator.init_trackers("uptrain", config=_flat(recipe.model_dump(mode="json")))
        checkpoint = _train(run, loss)
        result = _finish(run, checkpoint) if accelerator.is_main_process else {}
        accelerator.wait_for_everyone()
        accelerator.end_training()
    return result


def _train(run: Run, loss: Loss) -> Path:
    """Do the steps that are left; returns the last checkpoint's folder."""
    options, accelerator = run.recipe.train, run.accelerator
    wrapped = accelerator.prepare(run.model)
    optimizer = make_optimizer(run.model, options)
    learning_rate = make_schedule(options)
    steps, log = options.total_steps, run.output / LOG
    done, seconds = 0, 0.0
    checkpoint = Path()
    if run.resumed is not None:
        load_state(run.resumed, run.model, optimizer, run.fingerprint)
        done, checkpoint = run.resumed.step, run.resumed.folder
    if accelerator.is_main_process:
        cut_log(log, done if run.resumed else -1)
        seconds = max((row.get("seconds", 0.0) for row in read_log(log)), default=0.0)
    if done == 0:
        _validate(run, 0)
    run.model.train()
    is_main = accelerator.is_main_process
    bar = progress("train", steps * options.batch_tokens, "tokens", done * options.batch_tokens)
    with stop_on_signal() as stop_asked, bar if is_main else nullcontext(_ignore) as advance:
        while done < steps:
            begun = time.perf_counter()
            row, stop = _step(run, wrapped, optimizer, loss, done, learning_rate(done), stop_asked)
            done += 1
            took = time.perf_counter() - begun
            seconds += took
            row |= {"tokens_per_second": options.batch_tokens / took, "seconds": seconds}
            if is_main:
                append_log(log, row)
                accelerator.log({key: row[key] for key in row if key != "step"}, step=done)
            advance(
                options.batch_tokens,
                f"loss {row['loss']:.4f}, {row['tokens_per_second']:,.0f} tokens/s",
            )
            every = options.evaluate_every_steps
            if done == steps or (every is not None and done % every == 0):
                _validate(run, done)
            if stop or done == steps or done % options.save_every_steps == 0:
                checkpoint = _save(run, done, optimizer)
            if stop and done < steps:
                raise Interrupted(
                    f"stopped after step {done} of {steps}, saved in {checkpoint}; "
                    "add --resume to go on"
                )
    return checkpoint


def _step(
    run: Run,
    wrapped: Any,
    optimizer: torch.optim.Optimizer,
    loss: Loss,
    step: int,
    learning_rate: float,
    stop_asked: Callable[[], bool],
) -> tuple[dict[str, Any], bool]:
    """Do one step; returns its row of the log, and whether any process was asked to stop."""
    accelerator, batches = run.accelerator, run.batches
    # Nothing random is carried from step to step, so none of it is part of a checkpoint.
    seed = [run.recipe.train.seed, step, accelerator.process_index]
    torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1))
    indices = batches.indices(step, accelerator.process_index, accelerator.num_processes)
    parts = np.split(indices, len(indices) // run.micro_sequences)
    sums = []
    try:
        for part in parts:
            inputs, targets = (each.to(accelerator.device) for each in batches.read(part))
            is_last = part is parts[-1]
            with nullcontext() if is_last else accelerator.no_sync(wrapped):
                with run.autocast():
                    value, tokens, _ = loss(wrapped, inputs, targets)
                accelerator.backward(value)
            sums.append(torch.stack([value.detach(), value.new_tensor(float(tokens))]))
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"step {step + 1}: the device's memory is too small; set "
            "train.gradient_checkpointing: true, or lower train.micro_batch_tokens from "
            f"{run.micro_sequences * batches.sequence_length}"
        ) from error
    stop = torch.full((len(sums), 1), float(stop_asked()), device=accelerator.device)
    # Row after row the parts of the whole step, in the order of its sequences.
    whole = accelerator.gather(torch.cat([torch.stack(sums), stop], 1)).double().cpu()
    _check_finite(run, step, whole[:, 0])
    loss_sum, tokens, _ = whole.sum(0).tolist()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    # Gradients are sums over this process's tokens, averaged over processes.
    scale = accelerator.num_processes / tokens
    norm = _scale_gradients(run.model, scale, run.recipe.train.gradient_clipping)
    if not np.isfinite(norm):
        raise TrainingError(_failure(run, step, f"the norm of the gradient is {norm}", []))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    row = {
        "step": step + 1,
        "tokens": (step + 1) * run.recipe.train.batch_tokens,
        "loss": loss_sum / tokens,
        "learning_rate": learning_rate,
        "gradient_norm": norm,
    }
    return row, bool(whole[:, 2].any())


def _scale_gradients(model: torch.nn.Module, scale: float, clipping: float | None) -> float:
    """Multiply all gradients by `scale`, clip their norm; returns the norm before clipping."""
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients)) * scale
    if clipping is not None and norm > clipping:
        scale *= clipping / norm
    torch._foreach_mul_(gradients, scale)
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


def _validate(run: Run, step: int) -> None:
    if run.validation is None or not run.accelerator.is_main_process:
        return
    run.model.eval()
    eager = torch.compiler.set_stance("force_eager") if run.recipe.train.compile else nullcontext()
    with run.autocast(), eager:
        scores = score(run.model, run.validation, run.batches.sequence_length)
    run.model.train()
    row = {"step": step, "validation_loss": float(scores.loss.mean(dtype=np.float64))}
    append_log(run.output / LOG, row)
    run.accelerator.log({"validation_loss": row["validation_loss"]}, step=step)


def _save(run: Run, step: int, optimizer: torch.optim.Optimizer) -> Path:
    folder = run.output / "checkpoints"
    if run.accelerator.is_main_process:
        folder = save_state(folder, step, run.model, optimizer, run.fingerprint)
    run.accelerator.wait_for_everyone()
    return folder


def _finish(run: Run, checkpoint: Path) -> dict[str, Any]:
    """Export the model and sum up the run."""
    recipe, options = run.recipe, run.recipe.train
    rows = read_log(run.output / LOG)
    last = [row for row in rows if "loss" in row][-1]
    validation = [row["validation_loss"] for row in rows if "validation_loss" in row]
    losses = {
        "loss": last["loss"],
        "validation_loss": validation[-1] if validation else None,
        "initial_validation_loss": validation[0] if validation else None,
    }
    tokens = options.total_steps * options.batch_tokens
    alpha = options.alpha
    if alpha is None and options.pretraining_tokens is not None:
        alpha = tokens / options.pretraining_tokens
    uptraining = {
        "steps": options.total_steps,
        "tokens": tokens,
        "alpha": alpha,
        "pretraining_tokens": options.pretraining_tokens,
        "objective": "cross-entropy",
        **{
            key: getattr(options, key)
            for key in ("learning_rate", "schedule", "warmup", "optimizer", "betas", "weight_decay")
        },
        "gradient_clipping": options.gradient_clipping,
        "dropout": options.dropout,
        "batch_tokens": options.batch_tokens,
        "sequence_length": run.batches.sequence_length,
        "precision": run.precision,
        "seed": options.seed,
        "data": {
            "seed": recipe.data.seed,
            "tokens": run.batches.shards.tokens,
            "sources": run.batches.shards.manifest["sources"],
        },
        **losses,
    }
    final = run.output / "final"
    export_checkpoint(run.model, run.source, final, uptraining)
    return {
        "steps": options.total_steps,
        "tokens": tokens,
        **losses,
        "seconds": last["seconds"],
        "tokens_per_second": tokens / last["seconds"],
        "precision": run.precision,
        "processes": run.accelerator.num_processes,
        "final": str(final),
        "checkpoint": str(checkpoint),
        "log": str(run.output / LOG),
    }


def _ignore(amount: float, text: str = "") -> None:
    """Show no progress: the main process does."""


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name nested values by dotted keys, as trackers want them."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, int | float) else str(value)
    return flat
