"""What a recipe asks of its models, text and devices, checked before anything is loaded or written."""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from uptrain.checkpoint.reader import Checkpoint, open_checkpoint
from uptrain.data import open_source
from uptrain.errors import RecipeError, TrainingError
from uptrain.loading import check_same_vocabulary, context_length, load_config
from uptrain.training.batches import default_length, sequences_at_once
from uptrain.training.optimizer import check_optimizer
from uptrain.training.recipe import Recipe


@dataclass(frozen=True)
class Inputs:
    """What a run is made of, opened."""

    source: Checkpoint
    config: Any
    """Of the source, from `load_config`."""
    teacher: Checkpoint | None
    teacher_config: Any
    sequence_length: int
    batch_sequences: int
    """Of a step."""
    micro_sequences: int
    """That go through a device at once."""
    precision: str


def check_inputs(recipe: Recipe, accelerator: Accelerator) -> Inputs:
    """Check a recipe against its models, the paths of its text and its devices.

    What a conversion leaves the same decides, so that the original stands for a source that is not
    converted yet.

    Args:
        recipe: The recipe.
        accelerator: From `make_accelerator`.

    Raises:
        RecipeError: If lengths do not divide each other, or exceed the model's context.
        TrainingError: If the device lacks what the recipe asks for.
        DataError: If a text is not there.
        CheckpointError, UnsupportedFamilyError: If a checkpoint cannot be read, or is of another
            vocabulary.
    """
    options = recipe.train
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
    return Inputs(
        source,
        config,
        teacher,
        teacher_config,
        length,
        batch_sequences,
        micro_sequences,
        precision,
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
        return default_length(context)
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
        on_cpu = accelerator.device.type == "cpu"
        return batch // length, sequences_at_once(length, hidden_size, world, share, on_cpu)
    if micro % length or share % (micro // length):
        possible = [str(n * length) for n in range(1, share + 1) if share % n == 0]
        raise RecipeError(
            f"train.micro_batch_tokens={micro} does not cut a device's share of a step, "
            f"{share * length} tokens, into equal parts of whole sequences of {length}; "
            f"choose one of {', '.join(possible)}"
        )
    return batch // length, micro // length
