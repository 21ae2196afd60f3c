"""Everything that is settled, and refused, before the first step of a run."""

import importlib.util
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

import uptrain
from uptrain.checkpoint.reader import Checkpoint
from uptrain.checkpoint.staging import check_room
from uptrain.data.shards import TokenShards
from uptrain.errors import TrainingError
from uptrain.evaluation.blocks import read_tokens
from uptrain.loading import load_tokenizer
from uptrain.training import processes
from uptrain.training.batches import Batches
from uptrain.training.inputs import check_inputs
from uptrain.training.models import Place, Source, load_objective
from uptrain.training.objective import Objective
from uptrain.training.recipe import Recipe
from uptrain.training.saved import (
    SavedState,
    check_fingerprint,
    clean_states,
    find_states,
    named_digest,
)
from uptrain.training.shard import make_mesh
from uptrain.training.trainable import Trainable

_VALIDATION_TOKENS = 65536
# Others wait for the main process while it tokenises, saves and exports.
_PATIENCE = timedelta(hours=6)
# What of `train` leaves the result the same, up to rounding.
_FREE_OPTIONS = {
    "alpha", "pretraining_tokens", "steps", "tokens",  # total_steps says what they come to
    "micro_batch_tokens", "gradient_checkpointing", "compile", "save_every_steps",
    "evaluate_every_steps", "trackers", "teacher",  # its digest stands for it
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run that can start."""

    recipe: Recipe
    accelerator: Accelerator
    source: Checkpoint
    teacher: Checkpoint | None
    objective: Objective
    """On the devices, in float32."""
    trainable: Trainable
    batches: Batches
    micro_sequences: int
    """Sequences that go through a device at once."""
    precision: str
    validation: npt.NDArray[np.int64] | None
    """Tokens [blocks * sequence_length + 1]."""
    fingerprint: dict[str, Any]
    resumed: SavedState | None

    @property
    def output(self) -> Path:
        """Where everything goes."""
        return Path(self.recipe.output)

    def autocast(self) -> AbstractContextManager[Any]:
        """Do the arithmetic in the run's precision."""
        if self.precision == "float32":
            return nullcontext()
        # Each weight is used once, and a cache would keep all copies until the backward.
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, cache_enabled=False)

    def uncompiled(self) -> AbstractContextManager[Any]:
        """Compile nothing, for what is run too seldom."""
        is_compiled = self.recipe.train.compile
        return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Find out which processes and devices there are.

    Raises:
        TrainingError: If a tracker is not installed.
    """
    for tracker in recipe.train.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise TrainingError(
                f"train.trackers: {tracker} is not installed; pip install it, or leave it out"
            )
    return Accelerator(
        # Unasked, accelerate takes several processes without a GPU for as many runs.
        cpu=not torch.accelerator.is_available(),
        # The loss is autocast here instead: accelerate would copy all logits to float32.
        mixed_precision="no",
        log_with=list(recipe.train.trackers) or None,
        project_dir=recipe.output,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
    )


def prepare(recipe: Recipe, accelerator: Accelerator, resume: bool) -> Run:
    """Check a recipe against its model, data and machine, and load them.

    Args:
        recipe: The recipe.
        accelerator: From `make_accelerator`.
        resume: Go on from the newest checkpoint, if there is one.

    Raises:
        RecipeError: If lengths do not divide each other, or exceed the model's context.
        TrainingError: If the output holds checkpoints and `resume` is false, they are of another
            run, or the device lacks what the recipe asks for.
        DataError: If the text cannot be read, or is too short.
        CheckpointError, UnsupportedFamilyError: If the source cannot be read or loaded.
    """
    options, output = recipe.train, Path(recipe.output)
    inputs = check_inputs(recipe, accelerator)
    source, length = inputs.source, inputs.sequence_length
    resumed = processes.in_main(lambda: _find_resumed(output / "checkpoints", resume))
    tokenizer = load_tokenizer(source)
    validation = None
    if recipe.data.validation is not None:
        tokens = max(_VALIDATION_TOKENS, length)
        validation = read_tokens(Path(recipe.data.validation), tokenizer, length, tokens)
    folder = Path(recipe.data.tokens or output / "tokens")
    processes.in_main(lambda: check_room(output, source.nbytes))  # for the export, at the least
    processes.in_main(
        lambda: (
            TokenShards.prepare(
                folder, recipe.data.train, tokenizer, shared=recipe.data.tokens is not None
            ).tokens
        )
    )
    batches = Batches(
        TokenShards.open(folder),
        length,
        inputs.batch_sequences,
        recipe.data.seed,
        recipe.data.weights,
        recipe.data.attention_within_documents,
    )
    batches.check(options.total_steps, recipe.data.repeat)
    for name, epochs in batches.epochs(options.total_steps):
        if epochs > 1 and accelerator.is_main_process:
            print(f"{name}: {epochs:.2f} epochs, reshuffled each", file=sys.stderr)
    fingerprint = _fingerprint(recipe, source, inputs.teacher, batches, inputs.precision)
    if resumed is not None:
        check_fingerprint(resumed, fingerprint)
    _replace_dropout(inputs.config, options.dropout)
    objective, trainable = load_objective(
        Source(source, inputs.config),
        None if inputs.teacher is None else Source(inputs.teacher, inputs.teacher_config),
        options,
        Place(
            accelerator.device,
            make_mesh(accelerator.device, accelerator.num_processes),
            inputs.precision == "bfloat16",
        ),
        max_token=max(
            batches.shards.manifest["max_token"], 0 if validation is None else int(validation.max())
        ),
        within_documents=batches.within_documents,
    )
    return Run(
        recipe=recipe,
        accelerator=accelerator,
        source=source,
        teacher=inputs.teacher,
        objective=objective,
        trainable=trainable,
        batches=batches,
        micro_sequences=inputs.micro_sequences,
        precision=inputs.precision,
        validation=validation,
        fingerprint=fingerprint,
        resumed=resumed,
    )


def _find_resumed(folder: Path, resume: bool) -> SavedState | None:
    states = find_states(folder)
    if states and not resume:
        raise TrainingError(
            f"{folder}: holds step {states[-1].step} of an earlier run; "
            "add --resume to go on with it, or choose another output"
        )
    clean_states(folder)
    return states[-1] if states else None


def _fingerprint(
    recipe: Recipe,
    source: Checkpoint,
    teacher: Checkpoint | None,
    batches: Batches,
    precision: str,
) -> dict[str, Any]:
    options = {
        f"train.{key}": value
        for key, value in recipe.train.model_dump(mode="json").items()
        if key not in _FREE_OPTIONS
    }
    return {
        **options,
        "train.precision": precision,
        "train.sequence_length": batches.sequence_length,
        "steps": recipe.train.total_steps,
        **batches.fingerprint(),
        "source": named_digest(source),
        "teacher": named_digest(teacher) if teacher else None,
        "uptrain version": uptrain.__version__,
    }


def _replace_dropout(config: Any, dropout: float) -> None:
    """Set every dropout of a config, nested ones too; the config is never written."""
    for key, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            _replace_dropout(value, dropout)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and ("dropout" in key or key.endswith("_pdrop")):
            setattr(config, key, dropout)
