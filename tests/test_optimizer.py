"""Optimizers, judged by the libraries' own and by what resuming must keep to the bit."""

import copy
import importlib.util
import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny import tiny_config, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from transformers.optimization import Adafactor

from uptrain.errors import TrainingError
from uptrain.training.optimizer import (
    layer_matrices,
    make_optimizer,
    make_schedule,
    set_learning_rate,
)
from uptrain.training.options import TrainOptions

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="the extra 8bit is not installed"
)
OPTIMIZERS = ["adamw", "adafactor", "muon", pytest.param("adamw8bit", marks=needs_torchao)]
RATE, DECAY = 1e-2, 0.1


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch):
    # torchao compiles its step, which takes seconds and changes no more than rounding.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def options_of(optimizer: str = "adamw", **options: Any) -> TrainOptions:
    settings = {"learning_rate": RATE, "steps": 10, "batch_tokens": 1, "optimizer": optimizer}
    return TrainOptions(**(settings | options))


def model_of(**overrides: Any) -> Any:
    """A Llama in float32, with biases, and matrices that are large enough for 8-bit moments."""
    config = tiny_config("llama", attention_bias=True, intermediate_size=64, **overrides)
    return tiny_model(config).float()


def train(model: Any, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Train on other tokens in each step; half of the vocabulary is never seen in one."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 64, (2, 16), generator=generator) + 64 * (step % 2)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def set_gradients(model: Any, size: float = 1.0) -> None:
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = size * torch.randn_like(parameter)


def by_hand(model: Any, cls: Any, matrices: list[Any], **options: Any) -> torch.optim.Optimizer:
    """A library's optimizer of some parameters, vectors not decayed."""
    parts = [
        {"params": [p for p in matrices if p.ndim == 2], "weight_decay": DECAY},
        {"params": [p for p in matrices if p.ndim == 1], "weight_decay": 0.0},
    ]
    return cls([part for part in parts if part["params"]], lr=RATE, **options)


def assert_same(found: Any, expected: Any, **tolerance: float) -> None:
    pairs = zip(found.named_parameters(), expected.parameters(), strict=True)
    for (name, one), other in pairs:
        torch.testing.assert_close(one, other, msg=lambda text, n=name: f"{n}: {text}", **tolerance)


# Fused kernels round otherwise than loops, some units in the last place of an update of RATE.
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}


def test_adamw_steps_as_the_loop_over_its_formula():
    found, expected = model_of(), model_of()
    optimizer = make_optimizer(found, options_of())
    reference = by_hand(
        expected, torch.optim.AdamW, [*expected.parameters()], betas=(0.9, 0.95), foreach=False
    )
    for _ in range(3):
        set_gradients(found)
        set_gradients(expected)
        optimizer.step()
        reference.step()
    assert_same(found, expected, **ROUNDING)


def test_muon_has_the_layers_matrices_and_adamw_the_rest():
    found, expected = model_of(), model_of()
    optimizer = make_optimizer(found, options_of("muon"))
    matrices = [each for name, each in expected.named_parameters() if name.endswith("_proj.weight")]
    assert len(matrices) == 7 * 2
    others = [each for each in expected.parameters() if all(each is not m for m in matrices)]
    references = [
        torch.optim.Muon(matrices, RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"),
        by_hand(expected, torch.optim.AdamW, others, betas=(0.9, 0.95), fused=True),
    ]
    for _ in range(3):
        set_gradients(found)
        set_gradients(expected)
        optimizer.step()
        for reference in references:
            reference.step()
    assert_same(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("size", [1.0, 1e-7])
def test_adafactor_steps_as_another_implementation_of_the_paper(size):
    """Also for gradients as small as those of large models, where torch's own epsilon would count."""
    found, expected = model_of(), model_of()
    optimizer = make_optimizer(found, options_of("adafactor"))
    reference = by_hand(
        expected, Adafactor, [*expected.parameters()], scale_parameter=True, relative_step=False
    )
    # There the decay is scaled with the step, here it is not.
    for group in [*optimizer.param_groups, *reference.param_groups]:
        group["weight_decay"] = 0.0
    for _ in range(3):
        set_gradients(found, size)
        set_gradients(expected, size)
        optimizer.step()
        reference.step()
    assert_same(found, expected, **ROUNDING)


@needs_torchao
def test_the_first_8_bit_step_is_adamws_and_moments_take_a_byte():
    """The moments are rounded after they were used."""
    found, expected = model_of(), model_of()
    optimizer = make_optimizer(found, options_of("adamw8bit"))
    reference = make_optimizer(expected, options_of("adamw"))
    set_gradients(found)
    set_gradients(expected)
    optimizer.step()
    reference.step()
    assert_same(found, expected, **ROUNDING)
    for parameter in layer_matrices(found):
        assert optimizer.state[parameter]["exp_avg"].codes.dtype == torch.uint8
    assert optimizer.state[found.lm_head.weight]["exp_avg"].dtype == torch.float32


@needs_torchao
@pytest.mark.parametrize("tied", [True, False])
def test_tokens_that_a_batch_lacks_are_not_thrown_away_by_8_bit_moments(tied):
    model = model_of(tie_word_embeddings=tied)
    before = copy.deepcopy(model)
    train(model, make_optimizer(model, options_of("adamw8bit")), range(8))
    # No step of AdamW is much larger than the learning rate.
    assert_same(model, before, rtol=0, atol=2 * 8 * RATE)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_matrices_are_decayed_and_vectors_are_not(optimizer):
    model = model_of()
    before = copy.deepcopy(model)
    made = make_optimizer(model, options_of(optimizer))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    made.step()
    with torch.no_grad():
        for parameter in before.parameters():
            if parameter.ndim == 2:
                parameter.mul_(1 - RATE * DECAY)
    assert_same(model, before, rtol=1e-6, atol=0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resume_is_exact_to_the_bit(optimizer):
    whole = model_of()
    made = make_optimizer(whole, options_of(optimizer))
    train(whole, made, range(3))
    file = io.BytesIO()
    torch.save([whole.state_dict(), made.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed = model_of()
    resumed.load_state_dict(weights)
    again = make_optimizer(resumed, options_of(optimizer))
    again.load_state_dict(state)
    for model, each in ((whole, made), (resumed, again)):
        set_learning_rate(each, RATE / 2)
        train(model, each, range(3, 6))
    assert_same(resumed, whole, rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_parameter_that_starts_late_starts_as_in_a_new_optimizer(optimizer):
    """Its moments begin with its first gradient, also if there was a resume before."""
    late, new = model_of(), model_of()
    made = make_optimizer(late, options_of(optimizer))
    starting = late.model.layers[1].mlp.up_proj.weight
    for step in range(3):
        set_gradients(late)
        starting.grad = None
        made.step()
        if step == 1:
            saved, made = made.state_dict(), make_optimizer(late, options_of(optimizer))
            made.load_state_dict(saved)
    assert torch.equal(starting, new.model.layers[1].mlp.up_proj.weight)
    fresh = make_optimizer(new, options_of(optimizer))
    for model, each in ((late, made), (new, fresh)):
        set_gradients(model)
        each.step()
    assert torch.equal(starting, new.model.layers[1].mlp.up_proj.weight)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_learning_rate_of_a_step_counts(optimizer):
    model = model_of()
    before = copy.deepcopy(model)
    made = make_optimizer(model, options_of(optimizer))
    set_learning_rate(made, 0.0)
    train(model, made, range(1))
    assert_same(model, before, rtol=0, atol=0)
    assert len(made.state) == len([*model.parameters()])


def test_parameters_that_need_no_gradient_have_no_place_in_it():
    model = model_of()
    model.model.layers.requires_grad_(False)
    made = make_optimizer(model, options_of())
    sizes = [len(group["params"]) for group in made.param_groups]
    assert sizes == [2, 1]  # embeddings and head; the last norm


def test_a_missing_library_is_named(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torchao" else find_spec(name)
    )
    with pytest.raises(TrainingError) as caught:
        make_optimizer(model_of(), options_of("adamw8bit"))
    assert str(caught.value) == (
        "train.optimizer=adamw8bit: torchao is not installed; pip install 'uptrain-gqa[8bit]', "
        "or choose adamw"
    )


def test_adafactor_is_refused_where_weights_are_sharded():
    model = torch.nn.Linear(4, 4)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model.weight = torch.nn.Parameter(distribute_tensor(model.weight.detach(), mesh))
        with pytest.raises(TrainingError, match="adafactor: works on one device only, its factors"):
            make_optimizer(model, options_of("adafactor"))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("schedule", "first"), [("cosine", 2), ("wsd", 12)])
def test_schedules_go_down_to_the_floor(schedule, first):
    options = options_of(schedule=schedule, steps=20, floor=0.3, decay=0.4, learning_rate=1.0)
    rates = [make_schedule(options)(step) for step in range(20)]
    assert rates[1] == rates[first - 1] == 1.0
    assert all(one > other for one, other in zip(rates[first - 1 :], rates[first:], strict=False))
    assert rates[-1] == pytest.approx(0.3)
