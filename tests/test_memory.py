"""The plan of a training, judged by tensors that are really made and work that is really done."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from family_list import FAMILIES
from test_optimizer import OPTIMIZERS, options_of, set_gradients
from tiny import tiny_config, tiny_model
from torch import nn

from uptrain.checkpoint.config import read_config
from uptrain.cli import main
from uptrain.errors import HeadCountError, TrainingError, UnsupportedFamilyError
from uptrain.training import shard
from uptrain.training.memory import Scale, plan_training
from uptrain.training.optimizer import make_optimizer
from uptrain.training.trainable import attention_names, set_trained, shrink_frozen

ROOT = Path(__file__).parent.parent
SHAPES = ROOT / "docs" / "shapes"
# Matrices that are large enough for 8-bit moments, rows that do not divide by 3.
SMALL = {"intermediate_size": 64, "vocab_size": 130}


def config_of(model_type: str = "llama", **overrides: Any) -> dict[str, Any]:
    config: dict[str, Any] = tiny_config(model_type, **overrides).to_dict()
    return config | {"model_type": model_type}


def parts_of(config: dict[str, Any], checkpointing: bool = False, **scale: Any) -> dict[str, int]:
    plan = plan_training(config, Scale(**scale))["plans"][checkpointing]
    assert plan["total_bytes_per_device"] == sum(plan["bytes_per_device"].values())
    parts: dict[str, int] = plan["bytes_per_device"]
    return parts


def nbytes(tensors: Any) -> int:
    """Count the bytes of tensors, of those within quantised ones too."""
    total = 0
    for tensor in tensors:
        if hasattr(tensor, "__tensor_flatten__"):
            total += nbytes(getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        else:
            total += tensor.nbytes
    return total


@pytest.mark.parametrize("trainable", ["all", "attention"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_really_takes_what_was_planned(monkeypatch, optimizer, trainable):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # as in test_optimizer
    model = tiny_model(tiny_config("llama", **SMALL)).to(torch.float16).float()
    config = config_of(**SMALL) | {"dtype": "float16"}
    trained = {name for name, _ in model.named_parameters()}
    if trainable == "attention":
        trained = attention_names(model, config)
    set_trained(model, trained)
    shrink_frozen(model, trained)
    optimizer_ = make_optimizer(model, options_of(optimizer))
    set_gradients(model)
    for parameter in model.parameters():
        parameter.grad = parameter.grad if parameter.requires_grad else None
    optimizer_.step()
    state = [
        value
        for values in optimizer_.state.values()
        for name, value in values.items()
        if name != "step"
    ]
    parts = parts_of(config, optimizer=optimizer, trainable=trainable)
    assert parts["weights"] == nbytes(model.parameters())
    assert parts["gradients"] == nbytes(p.grad for p in model.parameters() if p.grad is not None)
    assert parts["optimizer_state"] == nbytes(state)


def test_each_of_several_devices_holds_the_first_part_of_every_tensor():
    """As torch.chunk cuts rows, which is how FSDP2 shards."""
    model = tiny_model(tiny_config("llama", **SMALL))
    shares = sum(torch.chunk(each, 3)[0].numel() for each in model.parameters())
    parts = parts_of(config_of(**SMALL), devices=3)
    assert (parts["weights"], parts["gradients"]) == (4 * shares, 4 * shares)
    assert (parts["optimizer_state"], parts["teacher"]) == (8 * shares, 2 * shares)
    config = config_of(**SMALL) | {"dtype": "bfloat16"}
    assert parts_of(config, devices=3, trainable="attention")["weights"] == 4 * shares


def test_the_student_has_fewer_heads_than_its_teacher():
    plan = plan_training(config_of(), Scale(num_key_value_heads=2))
    student = tiny_model(tiny_config("llama", num_key_value_heads=2))
    assert plan["num_key_value_heads"] == 2
    assert plan["parameters"]["total"] == student.num_parameters()
    assert plan["teacher_parameters"] == tiny_model(tiny_config("llama")).num_parameters()
    alone = parts_of(config_of(), teacher=False)
    assert alone["teacher"] == 0
    assert alone["loss"] < parts_of(config_of())["loss"]


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_once_by_part(tied):
    model = tiny_model(tiny_config("llama", tie_word_embeddings=tied))
    counts = plan_training(config_of(tie_word_embeddings=tied), Scale())["parameters"]
    matrix = model.lm_head.weight.numel()
    assert counts["embeddings"] == matrix
    assert counts["head"] == (0 if tied else matrix)
    attention = sum(layer.self_attn.q_proj.weight.numel() for layer in model.model.layers) * 4
    assert counts["attention"] == attention
    assert counts["other"] == model.model.norm.weight.numel()
    assert counts["total"] == model.num_parameters() == sum(counts.values()) - counts["total"]


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [("llama", {}), ("gpt_bigcode", {"multi_query": False}), ("starcoder2", {})],
)
def test_activations_are_what_enters_and_leaves_matrices(model_type, overrides):
    model = tiny_model(tiny_config(model_type, **overrides))
    numbers = 0

    def count(_: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal numbers
        numbers += inputs[0].numel() + output.numel()

    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            module.register_forward_hook(count)
    model(input_ids=torch.arange(24)[None])
    parts = parts_of(config_of(model_type, **overrides), micro_batch_tokens=24)
    assert parts["activations"] == 2 * numbers


def test_checkpointing_keeps_the_residual_stream_and_one_layer():
    config = config_of(num_hidden_layers=5)
    tokens, layers = 24, 5
    whole = parts_of(config, micro_batch_tokens=tokens)
    part = parts_of(config, checkpointing=True, micro_batch_tokens=tokens)
    expected = whole["activations"] // layers + 4 * tokens * layers * config["hidden_size"]
    assert part["activations"] == expected
    assert {key for key in whole if whole[key] != part[key]} == {"activations", "working_weights"}


def test_time_follows_from_work_and_devices():
    config = config_of()
    one = plan_training(config, Scale(tokens=10**9, flops_per_second=1e9))
    two = plan_training(config, Scale(tokens=10**9, flops_per_second=1e9, devices=2))
    for plan, twice in zip(one["plans"], two["plans"], strict=True):
        assert plan["tokens_per_second"] == 1e9 / plan["flops_per_token"]
        assert plan["days"] == pytest.approx(1e9 / plan["tokens_per_second"] / 86400)
        assert twice["days"] == pytest.approx(plan["days"] / 2)
    assert plan_training(config, Scale())["plans"][0]["days"] is None


@pytest.mark.parametrize("joined", [1, 2])
def test_on_several_devices_units_are_gathered_and_the_rest_stays(joined, monkeypatch):
    model = tiny_model(tiny_config("llama"))
    layer = sum(each.numel() for each in model.model.layers[0].parameters())
    outside = model.num_parameters() - layer * len(model.model.layers)
    monkeypatch.setattr(shard, "_UNIT_PARAMETERS", joined * layer)
    parts = parts_of(config_of(), devices=2)
    assert parts["working_weights"] == (4 + 4 + 2) * outside + (2 + 2 + 2 + 4) * joined * layer
    frozen = parts_of(config_of(), devices=2, trainable="attention", teacher=False)
    assert frozen["working_weights"] == 4 * outside + (2 + 2 + 2 + 4) * joined * layer


def test_the_loss_takes_chunks_of_logits_however_large_the_vocabulary():
    tokens, hidden_size = 4096, 64

    def loss(vocabulary: int, **scale: Any) -> int:
        config = config_of(vocab_size=vocabulary)
        return parts_of(config, micro_batch_tokens=tokens, **scale)["loss"]

    small = loss(1000, trainable="attention", teacher=False)
    assert small == 2 * 2 * tokens * (1000 + hidden_size)
    assert loss(1000, trainable="attention") == small * 3 // 2
    assert loss(1000, teacher=False) == small + 2 * 4 * 1000 * hidden_size
    # 2**27 logits at once.
    assert loss(10**6, trainable="attention", teacher=False) <= 4 * (2**27 + tokens * hidden_size)


def test_what_cannot_be_is_refused():
    with pytest.raises(
        HeadCountError, match="num_key_value_heads=3: cannot be had from this model"
    ):
        plan_training(config_of(), Scale(num_key_value_heads=3))
    with pytest.raises(TrainingError, match="adafactor works on one device only, 2 asked for"):
        plan_training(config_of(), Scale(optimizer="adafactor", devices=2))
    with pytest.raises(UnsupportedFamilyError, match="gpt2"):
        plan_training(config_of("gpt2"), Scale())


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["inspect", *map(str, arguments)])


def test_a_config_is_enough_for_the_command():
    result = invoke(SHAPES / "llama2-7b", "--train-plan", "--num-key-value-heads", "8")
    assert result.exit_code == 0
    assert result.stdout.startswith("llama2-7b (llama), 8 KV heads\n")
    assert "5,933,109,248 (all) by adamw" in result.stdout
    as_json = invoke(SHAPES / "llama2-7b", "--train-plan", "--num-key-value-heads", "8", "--json")
    (plan, _) = json.loads(as_json.stdout)["plans"]
    total = f"{plan['total_bytes_per_device'] / 2**30:.2f}"
    assert re.search(rf"\n  total +{re.escape(total)} ", result.stdout)


def test_a_recipe_gives_what_the_options_leave_out():
    arguments = [SHAPES / "llama2-7b", "--train-plan", "--json", "--recipe", "llama2-7b-gqa8"]
    recipe = json.loads(invoke(*arguments).stdout)
    found = [
        recipe[key] for key in ("num_key_value_heads", "sequence_length", "micro_batch_tokens")
    ]
    assert found == [8, 4096, 4096]
    assert recipe["tokens"] == pytest.approx(4e9, rel=1e-3)
    changed = json.loads(invoke(*arguments, "--micro-batch-tokens", "8192").stdout)
    assert (changed["micro_batch_tokens"], changed["sequence_length"]) == (8192, 4096)


@pytest.mark.parametrize(
    ("devices", "batch_tokens", "tokens"),
    [(1, None, 4096), (2, None, 8192), (8, None, 8192), (8, 32_768, 4096), (2, 3 * 8192, 4096)],
)
def test_a_plan_takes_as_many_tokens_at_once_as_a_run(devices, batch_tokens, tokens):
    """2**24 numbers of the residual stream on one device, twice that on several, in equal parts."""
    config = read_config(SHAPES / "llama2-7b")
    scale = Scale(devices=devices, sequence_length=4096, batch_tokens=batch_tokens)
    assert plan_training(config, scale)["micro_batch_tokens"] == tokens


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--devices", "8"], 2, "--devices needs --train-plan"),
        (["--no-teacher"], 2, "--teacher needs --train-plan"),
        (["--train-plan", "--num-key-value-heads", "5"], 1, "num_key_value_heads=5: cannot be had"),
        (["--train-plan", "--recipe", "none"], 2, "none: no such file, and"),
    ],
)
def test_a_wrong_use_is_one_line(arguments, code, message):
    result = invoke(SHAPES / "llama2-7b", *arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr.splitlines()[-1]


def test_a_model_that_is_not_there_is_one_line(tmp_path):
    result = invoke(tmp_path / "none", "--train-plan")
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
    assert "does not exist; expected a checkpoint folder or a hub id" in result.stderr


def test_a_model_that_sees_too_is_planned_by_its_text(tmp_path):
    tiny_config("qwen2_vl", **FAMILIES["qwen2_vl"]).save_pretrained(tmp_path)
    result = invoke(tmp_path, "--train-plan", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["parameters"]["other"] > 0  # what sees


def test_a_model_without_logits_is_refused():
    config = tiny_config("eurobert").to_dict()
    with pytest.raises(UnsupportedFamilyError, match="has no output embeddings; this family"):
        plan_training(config, Scale())


SCALING = (ROOT / "docs" / "scaling.md").read_text("utf-8")
BLOCKS = [
    block.replace("\\\n", " ").partition("\n")
    for block in re.findall(r"```console\n\$ (uptrain inspect docs/.*?)\n```", SCALING, re.DOTALL)
]


def test_the_routes_to_one_gpu_are_what_their_commands_print(monkeypatch):
    monkeypatch.chdir(ROOT)
    (command,) = [command.split()[2:] for command, _, output in BLOCKS if not output]
    rows = re.findall(r"^\| `(--.*)` \| (.*) \|$", SCALING, re.MULTILINE)
    assert len(rows) == 6
    for options, figures in rows:
        found = []
        for teacher in ("--no-teacher", "--teacher"):
            plan = json.loads(invoke(*command, *options.split(), teacher, "--json").stdout)
            found += [f"{each['total_bytes_per_device'] / 2**30:.1f}" for each in plan["plans"]]
        assert " | ".join(found) == figures
