"""Everything that is settled, and refused, before the first step of a run."""

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

import uptrain
from uptrain.checkpoint.reader import Checkpoint, open_checkpoint
from uptrain.data import check_file
from uptrain.errors import DataError, RecipeError, TrainingError
from uptrain.evaluation.quality import _read_tokens as read_tokens
from uptrain.loading import context_length, load_config, load_model, load_tokenizer
from uptrain.training.batches import Batches, TokenShards
from uptrain.training.recipe import Recipe
from uptrain.training.state import (
    SavedState,
    check_fingerprint,
    clean_states,
    find_states,
    source_digest,
)

_MAX_SEQUENCE_LENGTH = 2048
_VALIDATION_TOKENS = 65536
# Enough to keep the device busy; measured on the example models for a CPU.
_MICRO_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
# Others wait for the main process while it tokenises, saves and exports.
_PATIENCE = timedelta(hours=6)
# What of `train` leaves the result the same, up to rounding.
_FREE_OPTIONS = {
    "alpha", "pretraining_tokens", "steps", "tokens",  # total_steps says what they come to
    "micro_batch_tokens", "gradient_checkpointing", "compile", "save_every_steps",
    "evaluate_every_steps", "trackers",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run that can start."""

    recipe: Recipe
    accelerator: Accelerator
    source: Checkpoint
    model: torch.nn.Module
    """On the device, in float32, not wrapped."""
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
        return torch.autocast(self.accelerator.device.type, torch.bfloat16)


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
        # The loss is autocast here instead: accelerate would copy all logits to float32.
        mixed_precision="no",
        log_with=list(recipe.train.trackers) or None,
        project_dir=recipe.output,
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=_PATIENCE),
        ],
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
    precision = _choose_precision(options.precision, accelerator.device)
    source = open_checkpoint(recipe.source)
    config = load_config(source)
    length = _choose_length(options.sequence_length, context_length(config), source.name)
    batch_sequences, micro_sequences = _divide_batch(recipe, length, accelerator)
    paths = [Path(path) for path in recipe.data.train]
    for path in [*paths, *map(Path, filter(None, [recipe.data.validation]))]:
        check_file(path)
    resumed = _find_resumed(output / "checkpoints", resume)
    tokenizer = load_tokenizer(source)
    validation = None
    if recipe.data.validation is not None:
        tokens = max(_VALIDATION_TOKENS, length)
        validation, _ = read_tokens(Path(recipe.data.validation), tokenizer, length, tokens)
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            shards = TokenShards.prepare(output / "tokens", paths, tokenizer)
        else:
            shards = TokenShards.open(output / "tokens")
    batches = Batches(shards, length, batch_sequences, recipe.data.seed)
    batches.check(options.total_steps, recipe.data.repeat)
    fingerprint = _fingerprint(recipe, source, batches, precision)
    if resumed is not None:
        check_fingerprint(resumed, fingerprint)
    _replace_dropout(config, options.dropout)
    model = load_model(source, torch.device("cpu"), config, torch.float32)
    rows = model.get_input_embeddings().weight.shape[0]
    if shards.manifest["max_token"] >= rows:
        raise DataError(
            f"{source.folder}: its tokenizer gives token {shards.manifest['max_token']}, its model "
            f"has {rows}; take the tokenizer files of the original checkpoint"
        )
    if options.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise TrainingError(
                f"train.gradient_checkpointing: {type(model).__name__} cannot do it; leave it out"
            )
        # transformers 5 renamed it on the way to 6.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    if options.compile:
        model.compile()
    return Run(
        recipe=recipe,
        accelerator=accelerator,
        source=source,
        model=model.to(accelerator.device),
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


def _divide_batch(recipe: Recipe, length: int, accelerator: Accelerator) -> tuple[int, int]:
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
        kind = "cpu" if accelerator.device.type == "cpu" else "cuda"
        most = max(1, _MICRO_BATCH_TOKENS[kind] // length)
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
    recipe: Recipe, source: Checkpoint, batches: Batches, precision: str
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
        "data.seed": recipe.data.seed,
        "data.train": batches.shards.digest,
        "source": source_digest(source),
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
