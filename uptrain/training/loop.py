"""The training loop: one for any number of devices."""

import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from uptrain.checkpoint.staging import check_room
from uptrain.errors import Interrupted
from uptrain.progress import progress
from uptrain.training import processes
from uptrain.training.batches import read_ahead
from uptrain.training.export import export_checkpoint
from uptrain.training.guard import locked, stop_on_signal
from uptrain.training.log import append_log, cut_log
from uptrain.training.optimizer import make_optimizer, make_schedule
from uptrain.training.recipe import Recipe
from uptrain.training.saved import SavedState, find_states
from uptrain.training.setup import Run, make_accelerator, prepare
from uptrain.training.state import StateWriter, load_state
from uptrain.training.step import train_step
from uptrain.training.watch import best_step, is_overfit, is_spike

LOG = "train.jsonl"
_RECORDED = (
    "learning_rate", "schedule", "floor", "decay", "warmup", "optimizer", "betas", "weight_decay",
    "gradient_clipping", "trainable", "attention_fraction", "dropout", "batch_tokens", "seed",
)  # fmt: skip

Rows = list[dict[str, Any]]


def finetune(recipe: Recipe, *, resume: bool = False) -> dict[str, Any]:
    """Train a converted checkpoint as a recipe says, and export the result.

    The recipe's output folder comes to hold `tokens/`, `checkpoints/`, `train.jsonl` and `final/`,
    a plain checkpoint in the source's form. Started by `accelerate launch` or `torchrun`, several
    processes share each step.

    Args:
        recipe: From `load_recipe`; its `source` is the checkpoint to train.
        resume: Go on from the newest checkpoint of the same run, if there is one.

    Returns:
        `steps`, `tokens`, `loss` (of the last step, nats a token), `validation_loss`,
        `initial_validation_loss` (None without data.validation), with a `teacher` (its name)
        `validation_kl` and `initial_validation_kl` too, `exported_step`, `seconds` (of the steps),
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
        accelerator.init_trackers(
            "uptrain",
            config=_flat(recipe.model_dump(mode="json")),
            init_kwargs={"wandb": {"dir": recipe.output, "name": run.output.name}},
        )
        try:
            rows, checkpoint = _train(run)
        except Interrupted:  # in all processes alike
            accelerator.end_training()
            raise
        result = _finish(run, rows, checkpoint)
        accelerator.wait_for_everyone()
        accelerator.end_training()
    return result if accelerator.is_main_process else {}


def _train(run: Run) -> tuple[Rows, SavedState]:
    """Do the steps that are left.

    Returns:
        The rows of the log; and the checkpoint to export, which the model holds.
    """
    options, device = run.recipe.train, run.accelerator.device
    optimizer = make_optimizer(run.objective.model, options)
    # The least that will be written: the export, and a checkpoint's parameters.
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    least = run.source.nbytes + (0 if run.resumed else sum(each.nbytes for each in parameters))
    processes.in_main(lambda: check_room(run.output, least))
    learning_rate = make_schedule(options)
    steps, log, is_main = options.total_steps, run.output / LOG, run.accelerator.is_main_process
    done = 0
    if run.resumed is not None:
        load_state(run.resumed, run.objective, optimizer, run.fingerprint)
        done = run.resumed.step
    rows = processes.in_main(lambda: cut_log(log, done if run.resumed else -1))
    seconds = max((row.get("seconds", 0.0) for row in rows), default=0.0)

    def note(row: dict[str, Any]) -> None:
        rows.append(row)
        if is_main:
            append_log(log, row)
            run.accelerator.log({key: row[key] for key in row if key != "step"}, step=row["step"])

    def judge() -> None:
        if run.validation is None:
            return
        note(_validate(run, done))
        if is_main and is_overfit(rows):
            print(
                f"step {done}: the validation loss has risen three times in a row: the model learns "
                "its text by heart; stop, or train on more text",
                file=sys.stderr,
            )
        if options.keep_best and best_step(rows) == done:
            writer.save(done, keep=[done])

    def save() -> Path:
        best = best_step(rows) if options.keep_best else None
        return writer.save(done, keep=[] if best is None else [best])

    bar = progress("train", steps * options.batch_tokens, "tokens", done * options.batch_tokens)
    with (
        StateWriter(
            run.output / "checkpoints", run.objective, optimizer, run.fingerprint
        ) as writer,
        read_ahead(
            run.batches,
            range(done, steps),
            run.micro_sequences,
            processes.rank(),
            processes.count(),
            device,
        ) as batches,
        stop_on_signal() as stop_asked,
    ):
        if done == 0 and not rows:
            judge()
        elif done == steps:
            save()  # is saved; but removing older ones may have been cut short
        with bar if is_main else nullcontext(_ignore) as advance:
            while done < steps:
                begun = time.perf_counter()
                run.objective.train()
                row, stop = train_step(
                    run, optimizer, done, next(batches), learning_rate(done), stop_asked
                )
                done += 1
                took = time.perf_counter() - begun
                seconds += took
                if is_spike(rows, row["loss"]):
                    row["spike"] = True
                row |= {"tokens_per_second": options.batch_tokens / took, "seconds": seconds}
                note(row)
                speed = f"{row['tokens_per_second']:,.0f} tokens/s"
                advance(options.batch_tokens, f"loss {row['loss']:.4f}, {speed}")
                every = options.evaluate_every_steps
                if done == steps or (every is not None and done % every == 0):
                    judge()
                if stop or done == steps or done % options.save_every_steps == 0:
                    folder = save()
                if stop and done < steps:
                    writer.wait()
                    raise Interrupted(
                        f"stopped after step {done} of {steps}, saved in {folder}; add --resume to go on"
                    )
    states = processes.in_main(lambda: find_states(run.output / "checkpoints"))
    latest = states[-1]
    best = best_step(rows) if options.keep_best else None
    chosen = next((state for state in states if state.step == best), latest)
    if chosen.step != latest.step:
        load_state(chosen, run.objective, optimizer, run.fingerprint)
    return rows, chosen


def _validate(run: Run, step: int) -> dict[str, Any]:
    """Measure the loss on data.validation, and the divergence from the teacher if there is one."""
    assert run.validation is not None
    device, length = run.accelerator.device, run.batches.sequence_length
    tokens = torch.from_numpy(run.validation)
    inputs = tokens[:-1].reshape(-1, length).split(run.micro_sequences)
    targets = tokens[1:].reshape(-1, length).split(run.micro_sequences)
    sums = torch.zeros(3, dtype=torch.float64)
    run.objective.eval()
    # Each process takes its share; all run equally often, as sharded weights are gathered together.
    for first in range(0, len(inputs), processes.count()):
        place = first + processes.rank()
        part = min(place, len(inputs) - 1)
        with torch.no_grad(), run.autocast(), run.uncompiled():
            found = run.objective(inputs[part].to(device), targets[part].to(device))
        if place < len(inputs):
            sums += found.double().cpu()
    whole = torch.stack(processes.in_all(lambda: sums)).sum(0) / (len(tokens) - 1)
    row = {"step": step, "validation_loss": float(whole[1])}
    if run.teacher is not None:
        row["validation_kl"] = float(whole[2])
    return row


def _finish(run: Run, rows: Rows, checkpoint: SavedState) -> dict[str, Any]:
    """Export the model and sum up the run."""
    recipe, options = run.recipe, run.recipe.train
    steps = [row for row in rows if "loss" in row]
    losses: dict[str, Any] = {"loss": steps[-1]["loss"]}
    for key in ("validation_loss", "validation_kl"):
        measured = {row["step"]: row[key] for row in rows if key in row}
        if measured or key == "validation_loss":
            losses[key] = measured.get(checkpoint.step)
            losses[f"initial_{key}"] = measured.get(0)
    tokens = options.total_steps * options.batch_tokens
    alpha = options.alpha
    if alpha is None and options.pretraining_tokens is not None:
        alpha = tokens / options.pretraining_tokens
    uptraining = {
        "steps": options.total_steps,
        "exported_step": checkpoint.step,
        "tokens": tokens,
        "alpha": alpha,
        "pretraining_tokens": options.pretraining_tokens,
        "teacher": run.teacher.name if run.teacher else None,
        "distillation_weight": options.distillation_weight if run.teacher else 0.0,
        **{key: getattr(options, key) for key in _RECORDED},
        "sequence_length": run.batches.sequence_length,
        "precision": run.precision,
        "data": {
            "seed": recipe.data.seed,
            "tokens": run.batches.shards.tokens,
            "sources": run.batches.shards.manifest["sources"],
        },
        **losses,
    }
    final = run.output / "final"
    export_checkpoint(run.objective.model, run.source, final, uptraining)
    return {
        "steps": options.total_steps,
        "exported_step": checkpoint.step,
        "tokens": tokens,
        "teacher": uptraining["teacher"],
        **losses,
        "seconds": steps[-1]["seconds"],
        "tokens_per_second": tokens / steps[-1]["seconds"],
        "precision": run.precision,
        "processes": processes.count(),
        "final": str(final),
        "checkpoint": str(checkpoint.folder),
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
