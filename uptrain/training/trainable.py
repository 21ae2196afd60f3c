"""Which parameters train, as a pure function of the step."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from uptrain.errors import UnsupportedFamilyError
from uptrain.families import meta
from uptrain.families.head_tensors import all_head_tensors
from uptrain.training.options import TrainOptions


@dataclass(frozen=True)
class Trainable:
    """The names of the parameters that train, and when."""

    first: frozenset[str]
    """Trained from the first step on."""
    later: frozenset[str]
    """Trained as well once `first_steps` are done."""
    first_steps: int

    @property
    def ever(self) -> frozenset[str]:
        """All that are trained at some step."""
        return self.first | self.later

    def at(self, step: int) -> frozenset[str]:
        """Give what is trained in a step, counted from 0."""
        return self.first if step < self.first_steps else self.ever


def choose_trainable(
    model: nn.Module, config: Mapping[str, Any], options: TrainOptions
) -> Trainable:
    """Read from a recipe which parameters of a model train at which step.

    Args:
        model: On any device; parameters that need no gradient are never trained.
        config: The content of its `config.json`.
        options: The recipe's.

    Raises:
        UnsupportedFamilyError: If only attention is to be trained, and it cannot be told.
    """
    every = frozenset(name for name, each in model.named_parameters() if each.requires_grad)
    if options.trainable == "all":
        return Trainable(every, frozenset(), 0)
    attention = every & attention_names(model, config)
    if options.trainable == "attention":
        return Trainable(attention, frozenset(), 0)
    steps = round(options.attention_fraction * options.total_steps)
    return Trainable(attention, every - attention, steps)


def attention_names(
    model: nn.Module, config: Mapping[str, Any], code: Path | None = None
) -> frozenset[str]:
    """Name the parameters of attention.

    Those of whole blocks: the projections of queries and of the output, biases and norms of heads are
    among them, the norm before a block and layers without KV heads are not.

    Args:
        model: On any device.
        config: The content of its `config.json`.
        code: The checkpoint's folder if its own Python code may be executed.

    Raises:
        UnsupportedFamilyError: If the family has no number of KV heads that could tell it.
    """
    blocks = tuple(f"{block}." for block in attention_blocks(model, config, code))
    return frozenset(name for name, _ in model.named_parameters() if name.startswith(blocks))


def attention_blocks(
    model: nn.Module, config: Mapping[str, Any], code: Path | None = None
) -> list[str]:
    """Name the modules that project keys and values to heads, as `attention_names`."""
    tensors = all_head_tensors(config, meta.tensor_shapes(config, code), code)
    names = meta.names_in_memory(model, [each.name for each in tensors if each.is_projection])
    if not names:
        raise UnsupportedFamilyError(
            f"{config['model_type']}: its attention cannot be told, because no other number of KV heads is "
            "possible; set train.trainable: all"
        )
    # Moshi wraps every projection once more.
    modules = (name.removesuffix(".weight").removesuffix(".linear") for name in names.values())
    return sorted({module.rpartition(".")[0] for module in modules})


def set_trained(model: nn.Module, names: Collection[str]) -> None:
    """Let these parameters of a model have gradients, and no others."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad != (name in names):
            parameter.requires_grad_(name in names)


def shrink_frozen(model: nn.Module, trained: Collection[str]) -> None:
    """Keep the matrices that are never trained in 16 bits if these hold them without a loss.

    They do if the checkpoint was in 16 bits. Under bfloat16 autocast nothing changes but memory: of a
    matrix that is used the same is made as of its float32 copy. Norms, biases and embeddings stay
    float32, and with them the residual stream.

    Args:
        model: In float32, not on the meta device.
        trained: Names of the parameters that are trained at some step.
    """
    for parameter in shrinkable(model, trained):
        for dtype in (torch.bfloat16, torch.float16):
            smaller = parameter.detach().to(dtype)
            if torch.equal(smaller.to(parameter.dtype), parameter.detach()):
                parameter.data = smaller
                break


def shrinkable(model: nn.Module, trained: Collection[str]) -> list[torch.Tensor]:
    """Give the matrices that `shrink_frozen` is about."""
    kept = {id(each) for name, each in model.named_parameters() if name in trained}
    kept |= {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
    linear = (each for each in model.modules() if isinstance(each, nn.Linear))
    return [each.weight for each in linear if id(each.weight) not in kept]
