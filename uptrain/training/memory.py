"""What a run will need on each device, computed from a config before there is a run."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from uptrain.checkpoint.config import read_config
from uptrain.checkpoint.files import CONFIG
from uptrain.checkpoint.reader import resolve_source
from uptrain.errors import HeadCountError, TrainingError
from uptrain.families import meta, registry
from uptrain.families.head_tensors import can_have_heads, possible_head_counts
from uptrain.loading import context_length, decoder_layers
from uptrain.training.batches import default_length, sequences_at_once
from uptrain.training.flops import Work, matrices_of
from uptrain.training.head import check_head
from uptrain.training.loss import even_chunk
from uptrain.training.optimizer import layer_matrices
from uptrain.training.recipe import Recipe, load_recipe
from uptrain.training.shard import join_layers
from uptrain.training.trainable import attention_names, shrinkable

_BFLOAT16, _FLOAT32 = 2, 4  # bytes
# Of torchao: values that share a scale, and the fewest that are worth it.
_BLOCK, _MIN_QUANTIZED, _MAP_BYTES = 256, 4096, 256 * 4


@dataclass(frozen=True)
class Scale:
    """What of a run decides its memory and speed."""

    devices: int = 1
    num_key_value_heads: int | None = None
    """Of the student; the model's own if not given."""
    optimizer: str = "adamw"
    trainable: str = "all"
    teacher: bool = True
    """Whether the model itself is the teacher, in bfloat16."""
    sequence_length: int | None = None
    micro_batch_tokens: int | None = None
    """Tokens that go through a device at once; as many as a run would take if not given."""
    batch_tokens: int | None = None
    """Of a step of all devices."""
    tokens: int | None = None
    """Of the whole run."""
    flops_per_second: float = 4e14
    """What one device really does."""


def inspect_training(
    model: str, changes: Mapping[str, Any], *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Plan the training of a checkpoint of which there need be no more than `config.json`.

    Args:
        model: A folder or a hub id.
        changes: Fields of `Scale` that differ from its defaults; `recipe`, the path or name of one,
            gives other defaults.
        trust_remote_code: Run the code that the checkpoint brings along.

    Returns:
        As `plan_training`, and `model`.

    Raises:
        RecipeError: If the recipe cannot be read.
        UptrainError: As `plan_training`, or if there is no such model.
    """
    folder, name, _ = resolve_source(model, only=(CONFIG, "*.py"))
    fields = dict(changes)
    recipe = fields.pop("recipe", None)
    scale = Scale() if recipe is None else _scale_of(load_recipe(recipe))
    code = folder if trust_remote_code else None
    return {"model": name} | plan_training(read_config(folder), replace(scale, **fields), code)


def _scale_of(recipe: Recipe) -> Scale:
    train = recipe.train
    return Scale(
        num_key_value_heads=recipe.convert.num_key_value_heads if recipe.convert else None,
        optimizer=train.optimizer,
        trainable=train.trainable,
        teacher=train.teacher is not None and train.distillation_weight > 0,
        sequence_length=train.sequence_length,
        micro_batch_tokens=train.micro_batch_tokens,
        batch_tokens=train.batch_tokens,
        tokens=train.total_steps * train.batch_tokens,
    )


def plan_training(
    config: Mapping[str, Any], scale: Scale, code: Path | None = None
) -> dict[str, Any]:
    """Say what training a model takes: bytes by part on each device, work, and time.

    Parameters are counted exactly, on the meta device. Arithmetic is bfloat16 with float32 masters; on
    several devices weights, gradients, moments and teacher are sharded, layer by layer. Activations
    are an estimate for compiled layers: 2 bytes for every number that enters or leaves a matrix, all
    of a layer's if it is not checkpointed. The device's context and the allocator's gaps, 1 to 3 GiB,
    come on top.

    Args:
        config: The content of the original's `config.json`.
        scale: What to plan for.
        code: The checkpoint's folder if its own Python code may be executed.

    Returns:
        `model_type`, `devices`, `optimizer`, `trainable`, `num_key_value_heads`, `sequence_length`,
        `micro_batch_tokens`; `parameters` by part, `trained_parameters`, `teacher_parameters`; and
        `plans`, without and with gradient checkpointing: `bytes_per_device` by part, their
        `total_bytes_per_device`, `flops_per_token`, `tokens_per_second` of all devices, `days` (None
        without a number of tokens).

    Raises:
        HeadCountError: If the model cannot have that many KV heads.
        TrainingError: If the optimizer cannot be sharded.
        UnsupportedFamilyError: If the family has no number of KV heads, or gives no logits.
        CheckpointError: If transformers cannot build the model.
    """
    if scale.optimizer == "adafactor" and scale.devices > 1:
        raise TrainingError(
            f"adafactor works on one device only, {scale.devices} asked for; choose adamw"
        )
    student = _with_heads(config, scale.num_key_value_heads, code)
    model = meta.build_on_meta(student, code)
    check_head(model)
    teacher = meta.build_on_meta(config, code) if scale.teacher else None
    parsed = registry.parse_config(student, code)
    length = scale.sequence_length or default_length(context_length(parsed))
    tokens = scale.micro_batch_tokens
    if tokens is None:
        share = scale.batch_tokens and max(1, scale.batch_tokens // length // scale.devices)
        hidden_size = parsed.get_text_config().hidden_size
        tokens = length * sequences_at_once(length, hidden_size, scale.devices, share)
    names = dict(model.named_parameters())
    attention = attention_names(model, student, code)
    trained = attention if scale.trainable == "attention" else frozenset(names)
    work = Work(model, student, length, code)
    taught = 0.0 if teacher is None else Work(teacher, config, length, code).forward
    fixed = _fixed_bytes(model, teacher, trained, scale, registry.checkpoint_dtype(student))
    plans = []
    for checkpointing in (False, True):
        parts = {
            **fixed,
            "working_weights": _working_bytes(
                model, teacher, trained, scale.devices, checkpointing
            ),
            "activations": _activation_bytes(model, work, tokens, checkpointing),
            "loss": _loss_bytes(model, trained, tokens, has_teacher=teacher is not None),
        }
        flops = work.training(trained, checkpointing) + taught
        speed = scale.devices * scale.flops_per_second / flops
        plans.append(
            {
                "gradient_checkpointing": checkpointing,
                "bytes_per_device": parts,
                "total_bytes_per_device": sum(parts.values()),
                "flops_per_token": flops,
                "tokens_per_second": speed,
                "days": scale.tokens / speed / 86400 if scale.tokens else None,
            }
        )
    return {
        "model_type": config["model_type"],
        "devices": scale.devices,
        "optimizer": scale.optimizer,
        "trainable": scale.trainable,
        "num_key_value_heads": registry.read_heads(student, code).num_key_value_heads,
        "sequence_length": length,
        "micro_batch_tokens": tokens,
        "parameters": _count_by_part(model, attention),
        "trained_parameters": sum(names[name].numel() for name in trained),
        "teacher_parameters": _count(teacher.parameters()) if teacher is not None else 0,
        "tokens": scale.tokens,
        "flops_per_second": scale.flops_per_second,
        "plans": plans,
    }


def _with_heads(
    config: Mapping[str, Any], count: int | None, code: Path | None
) -> Mapping[str, Any]:
    if count is None:
        return config
    if not can_have_heads(config, count, code):
        possible = ", ".join(map(str, possible_head_counts(config, code)))
        raise HeadCountError(
            f"num_key_value_heads={count}: cannot be had from this model; choose one of {possible}"
        )
    return registry.with_key_value_heads(config, count, code)


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(each.numel() for each in parameters)


def _count_by_part(model: Any, attention: frozenset[str]) -> dict[str, int]:
    """Count a model's parameters; a head that is tied to the embeddings counts as these."""
    layers = {id(each) for layer in decoder_layers(model) for each in layer.parameters()}
    embeddings = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
    head = {id(each) for each in model.get_output_embeddings().parameters()}
    counts = dict.fromkeys(("attention", "other_in_layers", "embeddings", "head", "other"), 0)
    for name, each in model.named_parameters():
        if name in attention:
            part = "attention"
        elif id(each) in layers:
            part = "other_in_layers"
        elif id(each) in embeddings:
            part = "embeddings"
        else:
            part = "head" if id(each) in head else "other"
        counts[part] += each.numel()
    return counts | {"total": sum(counts.values())}


def _fixed_bytes(
    model: Any, teacher: Any, trained: Collection[str], scale: Scale, dtype: torch.dtype
) -> dict[str, int]:
    """Give what is on a device from the first step to the last."""
    named = {name: (each, _shard(each, scale.devices)) for name, each in model.named_parameters()}
    # Only one device keeps them small: a sharded layer is in one dtype.
    frozen = {id(each) for each in shrinkable(model, trained)} if scale.devices == 1 else set()
    frozen_bytes = min(dtype.itemsize, _FLOAT32)
    matrices = {id(each) for each in layer_matrices(model)}
    return {
        "weights": sum(
            share.numel() * (frozen_bytes if id(each) in frozen else _FLOAT32)
            for each, share in named.values()
        ),
        "gradients": _FLOAT32 * sum(named[name][1].numel() for name in trained),
        "optimizer_state": sum(
            _state_bytes(scale.optimizer, named[name][1], id(named[name][0]) in matrices)
            for name in trained
        ),
        "teacher": _BFLOAT16
        * sum(_shard(each, scale.devices).numel() for each in teacher.parameters())
        if teacher is not None
        else 0,
    }


def _shard(parameter: torch.Tensor, devices: int) -> torch.Tensor:
    """Give the largest share of a parameter that a device holds: rows, as FSDP2 cuts them."""
    return parameter[: ceil(parameter.shape[0] / devices)] if parameter.ndim else parameter


def _state_bytes(optimizer: str, share: torch.Tensor, is_layer_matrix: bool) -> int:
    """Count an optimizer's state for a device's share of a parameter."""
    n = share.numel()
    if optimizer == "adafactor" and share.ndim >= 2:
        return _FLOAT32 * (n // share.shape[-1] + n // share.shape[-2])
    if optimizer == "adafactor" or (optimizer == "muon" and is_layer_matrix):
        return _FLOAT32 * n
    if optimizer == "adamw8bit" and is_layer_matrix and n >= _MIN_QUANTIZED and n % _BLOCK == 0:
        return 2 * (n + _FLOAT32 * n // _BLOCK + _MAP_BYTES)
    return 2 * _FLOAT32 * n


def _working_bytes(
    model: Any, teacher: Any, trained: Collection[str], devices: int, checkpointing: bool
) -> int:
    """Count the copies of weights that a forward and backward work with, and gradients on their way."""
    layers, outside = decoder_layers(model), _outside_layers(model)
    if devices == 1:
        # What autocast makes of matrices; a checkpointed layer makes it twice, and keeps none.
        cast = [each for each, _ in matrices_of(model)]
        if checkpointing:
            cast = _largest([[layer] for layer in layers]) + outside
        return _BFLOAT16 * _count(cast)
    # A unit at work and the next one, its gradient, and that gradient in float32. What is outside of
    # layers is there in float32 from forward to backward, and so is its gradient.
    ids = {id(each) for each in outside}
    learns = any(id(each) in ids for name, each in model.named_parameters() if name in trained)
    unit = _largest(join_layers(layers))
    found = (2 * _BFLOAT16 + _BFLOAT16 + _FLOAT32) * _count(unit)
    found += _FLOAT32 * _count(outside) * (1 + learns)
    return found + (_BFLOAT16 * _count(_outside_layers(teacher)) if teacher is not None else 0)


def _largest(units: Iterable[Sequence[nn.Module]]) -> list[nn.Parameter]:
    return max(
        ([each for layer in unit for each in layer.parameters()] for unit in units), key=_count
    )


def _outside_layers(model: Any) -> list[nn.Parameter]:
    within = {id(each) for layer in decoder_layers(model) for each in layer.parameters()}
    return [each for each in model.parameters() if id(each) not in within]


def _activation_bytes(model: Any, work: Work, tokens: int, checkpointing: bool) -> int:
    """Estimate what the tokens leave in the layers for the backward."""
    kept = [_BFLOAT16 * work.numbers_at_matrices(layer) for layer in decoder_layers(model)]
    if not checkpointing:
        return tokens * sum(kept)
    residual: int = _FLOAT32 * model.get_output_embeddings().weight.shape[1]
    return tokens * (max(kept) + residual * len(kept))


def _loss_bytes(model: Any, trained: Collection[str], tokens: int, *, has_teacher: bool) -> int:
    """Count what the loss takes.

    That is of a chunk of tokens the logits, their gradient and the teacher's logits; as much of all
    tokens' hidden states; and of the head two gradients, this chunk's and that of those before it.
    """
    head: nn.Parameter = model.get_output_embeddings().weight
    vocabulary, hidden_size = head.shape
    chunk = even_chunk(tokens, vocabulary, torch.device("cuda"))
    found = _BFLOAT16 * (2 + has_teacher) * (chunk * vocabulary + tokens * hidden_size)
    learns = any(each is head for name, each in model.named_parameters() if name in trained)
    return found + 2 * _FLOAT32 * head.numel() * learns
