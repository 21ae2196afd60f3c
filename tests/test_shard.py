"""A model spread over processes: the same numbers, the same checkpoints, the same export."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from many import in_processes
from safetensors.torch import load_file
from test_state import Remembering
from tiny_run import CONTEXT, VOCABULARY, make_source
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import MixtralConfig, MixtralForCausalLM

from uptrain.checkpoint.reader import open_checkpoint
from uptrain.errors import TrainingError
from uptrain.loading import load_config, load_model
from uptrain.training import processes
from uptrain.training import shard as sharding
from uptrain.training import state as states
from uptrain.training.export import export_checkpoint
from uptrain.training.models import Place, Source, load_objective
from uptrain.training.options import TrainOptions
from uptrain.training.saved import SavedState, find_states
from uptrain.training.shard import fill, gather, load_on_main, make_mesh, shard
from uptrain.training.state import StateWriter, load_state

CPU = torch.device("cpu")
RUN = {"train.learning_rate": 0.01}
LEARNING_RATE = 0.01


class Objective(nn.Module):
    """The head's weight is used outside of the model's own forward, as a chunked loss does."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        hidden = self.model.model(input_ids=inputs, use_cache=False).last_hidden_state
        logits = hidden @ self.model.lm_head.weight.T
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def build(folder: Path) -> tuple[Objective, Any]:
    """Load a source for one process or spread it over all."""
    source = open_checkpoint(folder)
    config = load_config(source)
    mesh = make_mesh(CPU, processes.count())
    if mesh is None:
        objective = Objective(load_model(source, CPU, config, torch.float32))
    else:
        model, loaded = load_on_main(source, config, torch.float32)
        objective = Objective(model)
        sharding._UNIT_PARAMETERS = 1  # each layer by itself; tests of whole runs have one unit
        shard(objective, model.model.layers, mesh)
        fill(model, CPU, loaded.state_dict() if loaded else {})
    optimizer = torch.optim.AdamW(objective.parameters(), lr=LEARNING_RATE, fused=True)
    return objective, optimizer


def batch(step: int) -> torch.Tensor:
    torch.manual_seed(step)
    return torch.randint(0, VOCABULARY, (8, CONTEXT + 1))


def train(objective: Objective, optimizer: Any, steps: range) -> list[float]:
    """Give each step's loss and gradient norm, over all processes; two parts of a batch each."""
    losses = []
    for step in steps:
        whole = batch(step)
        sums = []
        for part in whole.chunk(processes.count())[processes.rank()].chunk(2):
            loss = objective(part[:, :-1], part[:, 1:])
            loss.backward()
            sums.append(loss.detach())
        total = torch.stack(sums).sum()
        if processes.count() > 1:
            dist.all_reduce(total)
        gradients = [each.grad for each in objective.parameters() if each.grad is not None]
        torch._foreach_mul_(gradients, processes.count() / whole[:, 1:].numel())
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE
        optimizer.step()
        optimizer.zero_grad()
        losses += [float(total / whole[:, 1:].numel()), float(norm.detach())]
    return losses


def go_on(source: Path, folder: Path, start: int, stop: int) -> list[float]:
    """Train from the newest checkpoint up to a step, and save there; gives the losses."""
    objective, optimizer = build(source)
    if start:
        load_state(find_states(folder)[-1], objective, optimizer, RUN)
    losses = train(objective, optimizer, range(start, stop))
    with StateWriter(folder, objective, optimizer, RUN) as writer:
        writer.save(stop)
    return losses


def look(source: Path, merged: Path, output: Path) -> dict[str, Any]:
    """Spread models over processes, look at them from all sides, train and export."""
    objective, _ = build(source)
    model = objective.model
    config = load_config(open_checkpoint(source))
    reference = load_model(open_checkpoint(source), CPU, config, torch.float32)
    whole = gather(model)
    for name, expected in reference.state_dict().items():
        assert processes.rank() or torch.equal(whole[name], expected), name
    assert bool(whole) == (processes.rank() == 0)
    for (name, ours), (_, theirs) in zip(
        model.named_buffers(), reference.named_buffers(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    held = sum(each.to_local().numel() for each in model.parameters())
    losses = go_on(source, output / "spread", 0, 2)
    losses += go_on(source, output / "alone", 2, 4)  # from what one process saved
    uptraining = {"steps": 3, "tokens": 9}
    record = export_checkpoint(model, open_checkpoint(source), output / "final", uptraining)
    experts, _ = build(merged)
    export_checkpoint(experts.model, open_checkpoint(merged), output / "merged", uptraining)
    return {"held": held, "losses": losses, "record": record}


def test_two_processes_compute_save_and_export_what_one_does(tmp_path):
    source = make_source(tmp_path / "source", vocab_size=VOCABULARY + 1)  # cut into unequal parts
    merged = make_experts(tmp_path / "experts")
    expected = go_on(source, tmp_path / "alone", 0, 2)
    spread = in_processes(2, look, source, merged, tmp_path)
    total = sum(each.numel() for each in build(source)[0].parameters())
    assert sum(each["held"] for each in spread) == total
    assert max(each["held"] for each in spread) < 0.51 * total
    # One goes on from what two saved, as two did from what one saved.
    expected += go_on(source, tmp_path / "spread", 2, 4)
    for each in spread:
        assert each["losses"] == pytest.approx(expected, rel=1e-5)  # sums in another order
    assert [
        find_states(tmp_path / each)[-1].manifest["processes"] for each in ("spread", "alone")
    ] == [1, 2]
    one, two = (load_parts(tmp_path / each) for each in ("spread", "alone"))
    assert one.keys() == two.keys()
    for name in one:
        # The moments are sums of squares of such sums.
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)
    for name, origin in (("final", source), ("merged", merged)):
        before, after = (load_file(f / "model.safetensors") for f in (origin, tmp_path / name))
        assert before.keys() == after.keys()
        assert all(torch.equal(after[key], before[key]) for key in before)
    record = json.loads((tmp_path / "final" / "uptrain.json").read_text())
    assert [each["record"] for each in spread] == [record, record]


def load_parts(folder: Path) -> dict[str, torch.Tensor]:
    """Put the parts of the newest checkpoint in a folder together."""
    state = find_states(folder)[-1]
    parts = [load_file(state.folder / name) for name in state.parts]
    names = {name for part in parts for name in part}
    return {name: torch.cat([part[name] for part in parts if name in part]) for name in names}


def make_experts(folder: Path) -> Path:
    """Save a model whose tensors transformers merges while it loads."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=3,
        max_position_embeddings=16,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


def fail_in_one(source: Path, folder: Path) -> str:
    """Let the second process find no room for its part; gives the error that this one sees."""
    objective, optimizer = build(source)
    write = states.save_part

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with StateWriter(folder, objective, optimizer, RUN) as writer:
        states.save_part = full if processes.rank() else write
        writer.save(1)
        with pytest.raises(TrainingError) as caught:
            writer.wait()
        states.save_part = write
        writer.save(2)
    return str(caught.value)


def test_an_error_of_one_process_is_one_of_all(tmp_path):
    for text in in_processes(2, fail_in_one, make_source(tmp_path / "source"), tmp_path / "states"):
        assert "step-00000001: the checkpoint cannot be written (" in text
        assert "No space left on device); make room, then add --resume" in text
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["step-00000002"]


def quantised(folder: Path) -> tuple[SavedState, nn.Module, Any]:
    model = nn.Linear(8, 4, bias=False)
    optimizer = Remembering(model.parameters(), {"lr": 0.1})
    model(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    if processes.count() == 1:
        with StateWriter(folder, model, optimizer, RUN) as writer:
            writer.save(1)
    return find_states(folder)[-1], model, optimizer


def take_on_quantised(folder: Path) -> str:
    with pytest.raises(TrainingError) as caught:
        load_state(*quantised(folder), RUN)
    return str(caught.value)


def test_memory_that_cannot_be_cut_needs_as_many_processes(tmp_path):
    quantised(tmp_path)
    for text in in_processes(2, take_on_quantised, tmp_path):
        assert "cannot be taken on (size.codes/weight was saved by 1 processes, now there" in text
        assert "are 2, and it cannot be parted anew); go on with what it was made with" in text


def small(folder: Path, step: int) -> tuple[Any, int]:
    """Go on with a matrix of three rows; gives it whole, and how many of them are here."""
    torch.manual_seed(0)
    model = nn.Linear(8, 3)
    mesh = make_mesh(CPU, processes.count())
    if mesh is not None:
        shard(model, [], mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    if step:
        load_state(find_states(folder)[-1], model, optimizer, RUN)
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE
    model(torch.ones(2, 8)).square().sum().backward()
    optimizer.step()
    with StateWriter(folder, model, optimizer, RUN) as writer:
        writer.save(step + 1)
    held = len(model.weight.to_local()) if isinstance(model.weight, DTensor) else 3
    return gather(model).get("weight"), held


def test_fewer_rows_than_processes(tmp_path):
    found = in_processes(4, small, tmp_path / "chained", 0)
    assert [held for _, held in found] == [1, 1, 1, 0]
    small(tmp_path / "chained", 1)
    (chained, _), *_ = in_processes(4, small, tmp_path / "chained", 2)
    expected = [small(tmp_path / "straight", step)[0] for step in range(3)][-1]
    torch.testing.assert_close(chained, expected)


def checkpointed(folder: Path, count: int) -> int:
    """Count how often layers that are compiled and checkpointed are run through the checkpoint."""
    source = open_checkpoint(folder)
    options = TrainOptions(
        steps=1, learning_rate=1.0, batch_tokens=1, compile=True, gradient_checkpointing=True
    )
    place = Place(CPU, make_mesh(CPU, count), is_bfloat16=False)
    with mock.patch("torch.compile", lambda function: function):
        objective, _ = load_objective(Source(source, load_config(source)), None, options, place)
    calls = 0

    def counted(act: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            return act(*arguments, **options)

        return run

    objective.train()
    for layer in objective.model.model.layers:
        layer._gradient_checkpointing_func = counted(layer._gradient_checkpointing_func)
    tokens = batch(0)
    objective(tokens[:, :-1], tokens[:, 1:])[0].backward()
    return calls


def test_layers_that_are_sharded_and_compiled_are_checkpointed_all_the_same(tmp_path):
    source = make_source(tmp_path / "source", vocab_size=VOCABULARY)
    layers = open_checkpoint(source).config["num_hidden_layers"]
    assert in_processes(2, checkpointed, source, 2) == [layers] * 2


def test_layers_are_joined_until_they_are_worth_gathering(monkeypatch):
    layers = [nn.Linear(3, size, bias=False) for size in (4, 4, 4, 100, 4)]
    monkeypatch.setattr(sharding, "_UNIT_PARAMETERS", 20)
    joined = sharding.join_layers(layers)
    assert [[each.out_features for each in unit] for unit in joined] == [[4, 4], [4, 100], [4]]
    other = nn.Bilinear(1, 1, 1)
    assert [len(unit) for unit in sharding.join_layers([layers[0], other, layers[1]])] == [1, 1, 1]


@pytest.mark.slow
def test_one_then_two_then_four_then_one(tmp_path):
    source = make_source(tmp_path / "source", vocab_size=VOCABULARY + 1)
    folder = tmp_path / "chained"
    losses = go_on(source, folder, 0, 2)
    losses += in_processes(2, go_on, source, folder, 2, 4)[0]
    losses += in_processes(4, go_on, source, folder, 4, 6)[0]
    losses += go_on(source, folder, 6, 8)
    assert [each.manifest["processes"] for each in find_states(folder)] == [4, 1]
    assert losses == pytest.approx(go_on(source, tmp_path / "straight", 0, 8), rel=1e-5)
    chained, straight = (load_parts(each) for each in (folder, tmp_path / "straight"))
    for name, expected in straight.items():
        torch.testing.assert_close(chained[name], expected, rtol=1e-3, atol=1e-5)
