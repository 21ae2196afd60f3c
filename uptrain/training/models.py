"""The models of a run: loaded, checked, compiled, and spread over its devices."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from uptrain.checkpoint.reader import Checkpoint
from uptrain.errors import DataError, TrainingError
from uptrain.loading import decoder_layers, load_model
from uptrain.training import processes
from uptrain.training.head import Split, SplitModel, find_split
from uptrain.training.objective import Objective
from uptrain.training.options import TrainOptions
from uptrain.training.packing import check_packing
from uptrain.training.shard import fill, load_on_main, shard
from uptrain.training.trainable import Trainable, choose_trainable, set_trained, shrink_frozen


@dataclass(frozen=True)
class Place:
    """Where the models of a run are, and what they compute in."""

    device: torch.device
    mesh: DeviceMesh | None
    """All processes; None if there is only one."""
    is_bfloat16: bool
    """Whether the arithmetic is autocast to bfloat16."""


@dataclass(frozen=True)
class Source:
    """A checkpoint to load."""

    checkpoint: Checkpoint
    config: Any
    """From `load_config`."""


def load_objective(
    student: Source,
    teacher: Source | None,
    options: TrainOptions,
    place: Place,
    *,
    max_token: int = 0,
    within_documents: bool = False,
) -> tuple[Objective, Trainable]:
    """Load what a run trains, and what it learns from.

    Args:
        student: The model to train, in float32; its config with the dropouts to train with.
        teacher: The model to learn from, in the precision of the run; none for cross-entropy alone.
        options: Of the recipe.
        place: Of the run.
        max_token: The largest token of the text.
        within_documents: Whether attention must stay inside documents.

    Returns:
        The objective on the run's devices, and which parameters of the student train when.

    Raises:
        DataError: If the tokenizer gives a token that the student lacks.
        TrainingError: If a model cannot do what is asked for.
        CheckpointError, UnsupportedFamilyError: If a model cannot be loaded or taken apart.
    """
    model, whole = _load(student, torch.float32, place)
    rows = model.get_input_embeddings().weight.shape[0]
    if max_token >= rows:
        raise DataError(
            f"{student.checkpoint.folder}: its tokenizer gives token {max_token}, its model has "
            f"{rows}; take the tokenizer files of the original checkpoint"
        )
    split = _look_into(whole, within_documents)
    trainable = choose_trainable(model, student.checkpoint.config, options)
    set_trained(model, trainable.ever)
    if options.gradient_checkpointing:
        _checkpoint_activations(model)
    objective = Objective(
        SplitModel(model, split),
        None if teacher is None else _load_teacher(teacher, options, place, within_documents),
        options.distillation_weight,
        fused=options.compile and place.device.type == "cuda",
    )
    # A sharded layer wants its parameters in one dtype; alone on a device, memory is dear.
    if place.mesh is None and place.is_bfloat16:
        shrink_frozen(model, trainable.ever)
    _spread(objective, model, whole, options, place)
    return objective, trainable


def _load_teacher(
    teacher: Source, options: TrainOptions, place: Place, within_documents: bool
) -> SplitModel:
    dtype = torch.bfloat16 if place.is_bfloat16 else torch.float32
    model, whole = _load(teacher, dtype, place)
    split = _look_into(whole, within_documents)
    model.requires_grad_(False)
    _spread(model, model, whole, options, place)
    return SplitModel(model, split)


def _load(source: Source, dtype: torch.dtype, place: Place) -> tuple[Any, Any]:
    """Give a model, on the meta device if it is to be sharded; and it or a twin with its weights.

    Only the main process has that twin.
    """
    if place.mesh is None:
        model = load_model(source.checkpoint, torch.device("cpu"), source.config, dtype)
        return model, model
    return load_on_main(source.checkpoint, source.config, dtype)


def _look_into(whole: Any, within_documents: bool) -> Split:
    """Find out in the main process what a model's weights are needed for."""

    def look() -> Split:
        if within_documents:
            check_packing(whole)
        return find_split(whole)

    return processes.in_main(look)


def _spread(root: nn.Module, model: Any, whole: Any, options: TrainOptions, place: Place) -> None:
    """Bring a model to the run's devices, `root` being what is run."""
    layers = decoder_layers(model)
    if place.mesh is None:
        model.to(place.device)
    else:
        shard(root, layers, place.mesh, torch.bfloat16 if place.is_bfloat16 else None)
        fill(model, place.device, whole.state_dict() if whole is not None else {})
    for layer in layers if options.compile else ():
        # Its forward alone, so that what gathers a sharded layer stands around it, not within; and only
        # now, since sharding changes the layer's class, whose forward is what checkpoints activations.
        layer.forward = torch.compile(layer.forward)


def _checkpoint_activations(model: Any) -> None:
    if not model.supports_gradient_checkpointing:
        raise TrainingError(
            f"train.gradient_checkpointing: {type(model).__name__} cannot do it; leave it out"
        )
    # transformers 5 renamed it on the way to 6.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
