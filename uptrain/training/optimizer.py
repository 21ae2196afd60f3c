"""The optimizer of a run, and its learning rate as a pure function of the step."""

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.optimization import (
    get_constant_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_wsd_schedule,
)

from uptrain.errors import TrainingError
from uptrain.training.options import TrainOptions

_MIN_WARMUP_STEPS = 2
# The square of the first is added to squared gradients, 1e-30 in T5; torch's own default would drown
# the gradients of large models.
_ADAFACTOR_EPS = (1e-15, 1e-3)

Group = dict[str, Any]
"""Parameters, and how they are treated."""


def check_optimizer(options: TrainOptions) -> None:
    """Refuse an optimizer whose library is not here.

    Raises:
        TrainingError: If it is not installed.
    """
    if options.optimizer == "adamw8bit" and importlib.util.find_spec("torchao") is None:
        raise TrainingError(
            "train.optimizer=adamw8bit: torchao is not installed; pip install 'uptrain-gqa[8bit]', "
            "or choose adamw"
        )


def make_optimizer(model: nn.Module, options: TrainOptions) -> torch.optim.Optimizer:
    """Make the optimizer of all parameters that need gradients.

    Vectors (norms, biases) are not decayed. Muon and 8-bit AdamW take the matrices of the layers;
    embeddings, the head and vectors go to AdamW in float32: Muon is not meant for them, and 8-bit
    moments of tokens that a batch lacks would be divided by zero.

    Args:
        model: Already where it is trained, and sharded if it is to be. Parameters that start to
            train later must need gradients now; their moments begin with their first gradient.
        options: Of the recipe.

    Raises:
        TrainingError: If the optimizer's library is not installed, or the model is sharded and the
            optimizer cannot be.
    """
    check_optimizer(options)
    trained = [each for each in model.parameters() if each.requires_grad]
    if options.optimizer == "adamw":
        return _adamw(trained, options)
    if options.optimizer == "adafactor":
        return _adafactor(trained, options)
    special = {id(each) for each in layer_matrices(model)}
    matrices = [each for each in trained if id(each) in special]
    others = [each for each in trained if id(each) not in special]
    first = (
        _muon(matrices, options) if options.optimizer == "muon" else _adamw8bit(matrices, options)
    )
    return JointOptimizer([first, _adamw(others, options)]) if others else first


def layer_matrices(model: Any) -> list[nn.Parameter]:
    """Give the two-dimensional parameters of a model that neither embed tokens nor make logits."""
    outside = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    outside |= {id(each) for each in head.parameters()} if head is not None else set()
    return [each for each in model.parameters() if each.ndim == 2 and id(each) not in outside]


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of the next step, the same for all parameters."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):  # compiled optimizers want it to stay one
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate


class JointOptimizer(torch.optim.Optimizer):
    """Several optimizers as one, each with parameters of its own."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        """Join optimizers; their groups and state are this one's from now on."""
        self._parts = list(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})
        for part in parts:
            self.state.update(part.state)
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Do a step of each."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave."""
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """Let the parts work on this optimizer's groups and state, which loading makes anew."""
        start = 0
        for part in self._parts:
            end = start + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[start:end], self.state
            start = end


def _groups(parameters: Iterable[nn.Parameter], options: TrainOptions) -> list[Group]:
    """Part matrices from vectors, which are not decayed."""
    parameters = list(parameters)
    groups: list[Group] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _adamw(parameters: list[nn.Parameter], options: TrainOptions) -> torch.optim.Optimizer:
    beta1, beta2 = options.betas
    return torch.optim.AdamW(
        _groups(parameters, options),
        lr=options.learning_rate,
        betas=(beta1, beta2),
        fused=parameters[0].device.type in ("cpu", "cuda"),
    )


def _adafactor(parameters: list[nn.Parameter], options: TrainOptions) -> torch.optim.Optimizer:
    """Make T5's: no momentum, factored second moment, steps relative to each tensor's size.

    Source:
        Shazeer and Stern 2018 (arXiv:1804.04235), algorithms 4 and 5 with section 8's decay of -0.8.
    """
    if any(isinstance(each, DTensor) for each in parameters):
        raise TrainingError(
            "train.optimizer=adafactor: works on one device only, its factors cannot be sharded; choose "
            "adamw, whose moments are sharded with the weights"
        )
    return torch.optim.Adafactor(
        _groups(parameters, options), lr=options.learning_rate, eps=_ADAFACTOR_EPS
    )


def _muon(matrices: list[nn.Parameter], options: TrainOptions) -> torch.optim.Optimizer:
    """Make Muon whose updates have the size of AdamW's, so that one learning rate fits both."""
    return torch.optim.Muon(
        matrices,
        lr=options.learning_rate,
        weight_decay=options.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )


def _adamw8bit(matrices: list[nn.Parameter], options: TrainOptions) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    beta1, beta2 = options.betas
    optimizer: torch.optim.Optimizer = AdamW8bit(
        matrices,
        lr=options.learning_rate,
        betas=(beta1, beta2),
        weight_decay=options.weight_decay,
    )
    return optimizer


def make_schedule(options: TrainOptions) -> Callable[[int], float]:
    """Give the learning rate of each step, counted from 0.

    The first step already learns, the last warm-up step has the peak, the last step the floor.
    """
    steps = options.total_steps
    warmup = round(options.warmup * steps)
    if options.warmup:
        warmup = min(max(warmup, _MIN_WARMUP_STEPS), steps)
    # transformers ties its schedules to an optimizer; only their factors are wanted.
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=options.learning_rate)
    if options.schedule == "cosine":
        scheduler = get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, warmup, steps, min_lr_rate=options.floor
        )
    elif options.schedule == "wsd":
        scheduler = get_wsd_schedule(
            optimizer,
            warmup,
            num_decay_steps=min(round(options.decay * steps), steps - warmup),
            num_training_steps=steps,
            min_lr_ratio=options.floor,
        )
    else:
        scheduler = get_constant_schedule_with_warmup(optimizer, warmup)
    (factor,) = scheduler.lr_lambdas
    # transformers counts the steps done: its step 0 has a rate of 0 and would be lost.
    return lambda step: options.learning_rate * float(factor(step + 1))
