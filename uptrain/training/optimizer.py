"""The optimizer of a run, and its learning rate as a pure function of the step."""

from collections.abc import Callable

import torch
from transformers.optimization import (
    get_constant_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_wsd_schedule,
)

from uptrain.training.options import TrainOptions

_FLOOR = 0.1
_WSD_DECAY = 0.2
_MIN_WARMUP_STEPS = 2


def make_optimizer(model: torch.nn.Module, options: TrainOptions) -> torch.optim.Optimizer:
    """Make AdamW over all trainable parameters; vectors (norms, biases) are not decayed."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {
            "params": [parameter for parameter in parameters if parameter.ndim >= 2],
            "weight_decay": options.weight_decay,
        },
        {
            "params": [parameter for parameter in parameters if parameter.ndim < 2],
            "weight_decay": 0.0,
        },
    ]
    beta1, beta2 = options.betas
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=options.learning_rate,
        betas=(beta1, beta2),
        fused=parameters[0].device.type in ("cpu", "cuda"),
    )


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
            optimizer, warmup, steps, min_lr_rate=_FLOOR
        )
    elif options.schedule == "wsd":
        scheduler = get_wsd_schedule(
            optimizer,
            warmup,
            num_decay_steps=min(round(_WSD_DECAY * steps), steps - warmup),
            num_training_steps=steps,
            min_lr_ratio=_FLOOR,
        )
    else:
        scheduler = get_constant_schedule_with_warmup(optimizer, warmup)
    (factor,) = scheduler.lr_lambdas
    # transformers counts the steps done: its step 0 has a rate of 0 and would be lost.
    return lambda step: options.learning_rate * float(factor(step + 1))
