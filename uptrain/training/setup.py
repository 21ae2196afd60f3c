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
from uptrain.checkpoint.reader import Checkpoint, open_checkpoint
from uptrain.checkpoint.staging import check_room
from uptrain.data import open_source
from uptrain.data.shards import TokenShards
from uptrain.errors import RecipeError, TrainingError
from uptrain.evaluation.blocks import read_tokens
from uptrain.evaluation.quality import check_same_vocabulary
from uptrain.loading import context_length, load_config, load_tokenizer
from uptrain.training import processes
from uptrain.training.batches import Batches
from uptrain.training.models import Place, Source, load_objective
from uptrain.training.objective import Objective
from uptrain.training.optimizer import check_optimizer
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

_MAX_SEQUENCE_LENGTH = 2048
_VALIDATION_TOKENS = 65536
# Of a device's micro-batch, if the recipe leaves it open: tokens on a CPU, tokens × hidden_size on a
# GPU. Measured on the example models and on one of 1.12B parameters: more are hardly faster.
_CPU_MICRO_TOKENS, _GPU_MICRO_ELEMENTS = 4096, 2**24
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
    check_optimizer(options)
    if options.keep_best and recipe.data.validation is None:
        raise RecipeError("train.keep_best: there is no data.validation to judge by; add it")
    precision = _choose_precision(options.precision, accelerator.device)
    source = open_checkpoint(recipe.source)
    config = load_config(source)
    length = _choose_length(options.sequence_length, context_length(config), source.name)
    teacher, teacher_config = _open_teacher(recipe, source, config, length)
    batch_sequences, micro_sequences = _divide_batch(
        recipe, length, config.get_text_config().hidden_size, accelerator
    )
    for each in recipe.data.train:
        open_source(each)
    if recipe.data.validation is not None:
        open_source(recipe.data.validation)
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
        batch_sequences,
        recipe.data.seed,
        recipe.data.weights,
        recipe.data.attention_within_documents,
    )
    batches.check(options.total_steps, recipe.data.repeat)
    for name, epochs in batches.epochs(options.total_steps):
        if epochs > 1 and accelerator.is_main_process:
            print(f"{name}: {epochs:.2f} epochs, reshuffled each", file=sys.stderr)
    fingerprint = _fingerprint(recipe, source, teacher, batches, precision)
    if resumed is not None:
        check_fingerprint(resumed, fingerprint)
    _replace_dropout(config, options.dropout)
    objective, trainable = load_objective(
        Source(source, config),
        None if teacher is None else Source(teacher, teacher_config),
        options,
        Place(
            accelerator.device,
            make_mesh(accelerator.device, accelerator.num_processes),
            precision == "bfloat16",
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
        teacher=teacher,
        objective=objective,
        trainable=trainable,
        batches=batches,
        micro_sequences=micro_sequences,
        precision=precision,
        validation=validation,
        fingerprint=fingerprint,
        resumed=resumed,
    )


def _choose_precision(wanted: str, device: torch.device) -> str:
    has_bfloat16 = device.type == "xpu" or (
        device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    if wanted == "bfloat16" and not has_bfloat16:
        raise TrainingError(
            f"train.precision=bfloat16: {device.type} does not compute in it here; "
            "choose auto or float32"
        )
    if wanted == "auto":
        return "bfloat16" if has_bfloat16 else "float32"
    return wanted


def _choose_length(wanted: int | None, context: int | None, name: str) -> int:
    if wanted is None:
        return min(context or _MAX_SEQUENCE_LENGTH, _MAX_SEQUENCE_LENGTH)
    if context is not None and wanted > context:
        raise RecipeError(
            f"train.sequence_length={wanted}: {name} was made for {context} tokens; "
            f"choose {context} or less"
        )
    return wanted


def _open_teacher(
    recipe: Recipe, source: Checkpoint, config: Any, length: int
) -> tuple[Checkpoint | None, Any]:
    """Open the teacher, and refuse one that cannot teach this student."""
    if recipe.train.teacher is None or recipe.train.distillation_weight == 0:
        return None, None
    teacher = open_checkpoint(recipe.train.teacher)
    teacher_config = load_config(teacher)
    check_same_vocabulary(source, config, teacher, teacher_config, role="teacher")
    context = context_length(teacher_config)
    if context is not None and length > context:
        raise RecipeError(
            f"train.sequence_length={length}: the teacher, {teacher.name}, was made for {context} "
            f"tokens; choose {context} or less"
        )
    return teacher, teacher_config


def _divide_batch(
    recipe: Recipe, length: int, hidden_size: int, accelerator: Accelerator
) -> tuple[int, int]:
    """Return the sequences of a step, and those that a device takes at once."""
    batch, micro = recipe.train.batch_tokens, recipe.train.micro_batch_tokens
    world = accelerator.num_processes
    if batch % (length * world):
        unit = f"train.sequence_length={length}" + (f" × {world} processes" if world > 1 else "")
        near = max(1, round(batch / (length * world))) * length * world
        raise RecipeError(
            f"train.batch_tokens={batch} is no multiple of {unit}; choose {near}, for example"
        )
    share = batch // length // world
    if micro is None:
        most = _CPU_MICRO_TOKENS
        if accelerator.device.type != "cpu":
            # Each part of a sharded step gathers all weights anew.
            most = _GPU_MICRO_ELEMENTS * min(world, 2) // hidden_size
        most = max(1, most // length)
        return batch // length, max(n for n in range(1, min(most, share) + 1) if share % n == 0)
    if micro % length or share % (micro // length):
        possible = [str(n * length) for n in range(1, share + 1) if share % n == 0]
        raise RecipeError(
            f"train.micro_batch_tokens={micro} does not cut a device's share of a step, "
            f"{share * length} tokens, into equal parts of whole sequences of {length}; "
            f"choose one of {', '.join(possible)}"
        )
    return batch // length, micro // length


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
