"""Repairing a layer: the fit, the two residual streams, and what counts as a plain block."""

from itertools import chain, cycle, islice, repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from family_list import FAMILIES
from tiny import save, tiny_config, tiny_model
from torch import nn

from uptrain.checkpoint.reader import open_checkpoint
from uptrain.conversion.attention import AttentionNames
from uptrain.conversion.fit import Fit, Rows, fit_layer, orthogonalize, relative_error
from uptrain.conversion.partway import run_attention
from uptrain.conversion.plan import plan_conversion
from uptrain.conversion.repair import is_plain, refit_output
from uptrain.conversion.residual import ResidualStreams
from uptrain.conversion.stacks import find_stacks
from uptrain.conversion.stream import LayerStream

CPU = torch.device("cpu")
ALL = slice(None)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# The fit.


class Block(nn.Module):
    """A layer of two projections and a gain."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 20)
        self.second = nn.Linear(20, 12, bias=False)
        self.gain = nn.Parameter(torch.ones(12))

    def forward(self, hidden: torch.Tensor, rows: Rows = ALL) -> torch.Tensor:
        return self.second(self.first(hidden)) * self.gain


def block(seed: int) -> Block:
    made = Block()
    with torch.no_grad():
        for index, parameter in enumerate(made.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=seed + index) / 4)
    return made


def fit_block(rates: dict[str, float], **options: Any) -> tuple[Block, list[float], float, float]:
    """Fit one block to another near it; returns it, the losses, and the error before and after."""
    wanted, layer = block(0), block(0)
    with torch.no_grad():
        for index, parameter in enumerate(layer.parameters()):
            parameter.add_(draw(*parameter.shape, seed=50 + index) / 20)
    inputs = draw(16, 5, 12, seed=99)
    targets = wanted(inputs).detach()
    losses: list[float] = []

    def error() -> float:
        with torch.no_grad():
            return float(relative_error(layer(inputs), targets))

    before = error()
    fit = Fit(**{"rates": rates, "steps": 60, "decay": 0.0, **options})
    batches = cycle(torch.arange(16).split(4))
    fit_layer(layer, layer, inputs, targets, fit, batches, advance=losses.append)
    return layer, losses, before, error()


WHOLE = {"first.weight": 0.05, "first.bias": 0.05, "second.weight": 0.05}


@pytest.mark.parametrize("orthogonal", [True, False])
def test_a_fit_lowers_the_error(orthogonal: bool) -> None:
    _, losses, before, after = fit_block(WHOLE, orthogonal=orthogonal)
    assert after < 0.2 * before
    assert len(losses) == 60


def test_what_is_not_named_stays() -> None:
    start, (layer, *_) = block(0), fit_block({"second.weight": 0.05})
    untouched = {n: p for n, p in layer.named_parameters() if n != "second.weight"}
    for index, (name, parameter) in enumerate(start.named_parameters()):
        moved = parameter.detach() + draw(*parameter.shape, seed=50 + index) / 20
        if name in untouched:
            assert torch.equal(untouched[name], moved)
        else:
            assert not torch.equal(layer.get_parameter(name), moved)


@pytest.mark.parametrize("nothing", [{"steps": 0}, {"rates": dict.fromkeys(WHOLE, 0.0)}])
def test_no_steps_or_no_rate_change_nothing(nothing: dict[str, Any]) -> None:
    layer, losses, before, after = fit_block(nothing.pop("rates", WHOLE), **nothing)
    assert after == before
    assert len(losses) == nothing.get("steps", 60)
    assert not any(p.requires_grad for p in layer.parameters())


def test_the_pull_leads_back_to_the_start() -> None:
    def distance(decay: float) -> float:
        layer, *_ = fit_block(WHOLE, decay=decay)
        free, *_ = fit_block(WHOLE, steps=0)
        pairs = zip(layer.parameters(), free.parameters(), strict=True)
        return sum(float((a - b).detach().square().sum()) for a, b in pairs)

    assert distance(10.0) < 0.5 * distance(0.0)


def test_a_tensor_of_zeros_stays() -> None:
    layer = block(0)
    with torch.no_grad():
        layer.first.bias.zero_()
    inputs = draw(4, 5, 12)
    fit = Fit(WHOLE, steps=3, decay=0.0)
    fit_layer(layer, layer, inputs, inputs, fit, repeat(torch.arange(4)))
    assert not layer.first.bias.any()


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8), (64, 48)])
def test_orthogonalize_brings_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = draw(*shape) * 1e-3
    values = torch.linalg.svdvals(orthogonalize(matrix))
    # Newton-Schulz stops near 1, and leaves directions alone that are much smaller than the rest.
    strong = torch.linalg.svdvals(matrix) > 0.05 * torch.linalg.matrix_norm(matrix)
    assert bool(((values > 0.6) & (values < 1.3))[strong].all())
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert float((orthogonalize(matrix) * (u @ v)).sum()) > 0.7 * min(shape)


def test_orthogonalize_of_nothing_is_nothing() -> None:
    assert not orthogonalize(torch.zeros(4, 6)).any()


def test_relative_error() -> None:
    target = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    # 25 and 4 of energy; errors of 1 and 4: (1/25 + 4/4) / 2.
    assert float(
        relative_error(target + torch.tensor([[1.0, 0.0], [2.0, 0.0]]), target)
    ) == pytest.approx(0.52)
    assert float(relative_error(target, target)) == 0


# Layers of real families.


class Layers:
    """A tiny checkpoint's stream, and where its attention is."""

    def __init__(self, folder: Path, model_type: str, count: int = 2, **overrides: Any) -> None:
        save(tiny_model(tiny_config(model_type, **overrides)).float(), folder)
        checkpoint = open_checkpoint(folder)
        self.plan = plan_conversion(checkpoint, count)
        ((stack, blocks),) = find_stacks(checkpoint, self.plan.head_tensors, None).items()
        self.stream = LayerStream(checkpoint, checkpoint.config, stack, CPU)
        self.target = LayerStream(checkpoint, self.plan.config, stack, CPU, None, self.stream)
        self.index = min(blocks)
        self.layer = self.stream.layer(self.index)
        self.blocks: tuple[AttentionNames, ...] = blocks[self.index]
        entering = self.stream.embed(torch.arange(1, 25)[None])
        self.probe = entering + draw(*entering.shape) * entering.std()

    def run(self, hidden: torch.Tensor, rows: Rows = ALL) -> torch.Tensor:
        return self.stream.run(self.layer, 0, hidden)


@pytest.mark.filterwarnings("ignore")  # of the model classes themselves
@pytest.mark.parametrize(
    ("model_type", "overrides", "plain"),
    [
        ("llama", {}, True),
        ("qwen3", {}, True),
        ("mixtral", {}, True),
        ("gpt_oss", {}, True),
        ("starcoder2", {}, True),
        ("olmo2", {}, False),  # norms behind the blocks
        ("gemma2", {}, False),
        ("glm4", {}, False),
        ("phi", {}, False),  # parallel
        ("cohere", {}, False),
        ("granite", {"residual_multiplier": 0.5}, False),
        ("granite", {"residual_multiplier": 1.0}, True),
    ],
)
def test_plain_blocks(
    model_type: str, overrides: dict[str, Any], plain: bool, tmp_path: Path
) -> None:
    layers = Layers(tmp_path, model_type, **overrides)
    assert is_plain(layers.layer, layers.blocks, layers.run, layers.probe) is plain


def test_attention_is_run_and_nothing_behind_it(tmp_path: Path) -> None:
    layers = Layers(tmp_path, "llama")
    layer = layers.layer
    with torch.no_grad():
        found = run_attention(layer, layers.blocks, layers.run)(layers.probe, ALL)
        layer.mlp.down_proj.weight.zero_()
        assert torch.allclose(found, layers.run(layers.probe), atol=1e-6)
    assert not layer.self_attn._forward_hooks


@pytest.mark.parametrize("bias", [False, True])
def test_refit_brings_back_a_damaged_projection(bias: bool, tmp_path: Path) -> None:
    layers = Layers(tmp_path, "llama", attention_bias=bias)
    wanted = run_attention(layers.layer, layers.blocks, layers.run)
    hidden = draw(8, 24, 64)
    with torch.no_grad():
        targets = wanted(hidden, ALL)
        projection = layers.layer.self_attn.o_proj
        original = projection.weight.clone()
        projection.weight.add_(draw(64, 64, seed=3) * original.std())
        cut = (slice(first, first + 2) for first in range(0, 8, 2))
        batches = [(hidden[rows], targets[rows], rows) for rows in cut]
        refit = refit_output(layers.layer, layers.blocks, layers.run, batches)
    assert refit.error_after < 1e-2 * refit.error_before
    assert (projection.weight - original).norm() < 0.3 * draw(64, 64, seed=3).mul(
        original.std()
    ).norm()
    assert not projection._forward_pre_hooks


# The residual streams.


def test_streams_hold_what_enters_each_layer(tmp_path: Path) -> None:
    layers = Layers(tmp_path, "llama")
    tokens = torch.randint(1, 100, (6, 16), generator=torch.Generator().manual_seed(0))
    streams = ResidualStreams(layers.stream, layers.target, tokens)
    assert streams.original.shape == (6, 16, 64)
    assert torch.equal(streams.original, streams.converted)
    streams.batch = 3
    source = layers.stream.layer(0)
    with torch.no_grad():
        expected = layers.stream.run(source, 0, streams.original)
    changed = layers.stream.layer(0, {"self_attn.o_proj.weight": torch.zeros(64, 64)})
    run, original = streams.run_source(changed, 0), streams.run_source(source, 0)
    error = streams.error(run, original)
    with torch.no_grad():
        assert error == pytest.approx(
            float(relative_error(run(streams.original, ALL), expected)), rel=1e-4
        )
    assert streams.error(original, original) == 0
    streams.move(0, source, source)
    assert torch.allclose(streams.original, expected, atol=1e-6)
    assert torch.equal(streams.original, streams.converted)


def test_sequences_beyond_whole_batches_are_left_out(tmp_path: Path) -> None:
    layers = Layers(tmp_path, "llama")
    streams = ResidualStreams(layers.stream, layers.target, torch.ones(300, 16, dtype=torch.long))
    assert streams.batch == 256
    assert len(streams.original) == 256
    assert streams.some_batches(1) == [slice(0, 256)]


def random_tokens(sequences: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 100, (sequences, length), generator=generator)


@pytest.mark.filterwarnings("ignore")  # of the model classes themselves
@pytest.mark.parametrize("model_type", ["llama", "gpt_bigcode", "gemma4_text", "zamba"])
def test_short_texts_go_through_layers_as_texts(model_type: str, tmp_path: Path) -> None:
    options = dict(FAMILIES[model_type])
    options["n_positions" if model_type == "gpt_bigcode" else "max_position_embeddings"] = 256
    layers = Layers(tmp_path, model_type, 1, **options)
    tokens = random_tokens(32, 256)
    streams = ResidualStreams(layers.stream, layers.target, tokens)
    index = layers.index
    source = layers.stream.layer(index)
    run = streams.run_source(source, index)
    with torch.no_grad():
        for rows, texts in (
            (slice(0, 16), tokens[:16]),
            (slice(16, 32), tokens[16:].reshape(64, 64)),
        ):
            entering = layers.stream.embed(texts)
            torch.testing.assert_close(streams.original[rows].view(entering.shape), entering)
            leaving = layers.stream.run(source, index, entering, None, texts)
            found = run(streams.original[rows], rows)
            torch.testing.assert_close(found.view(leaving.shape), leaving)
            until = run_attention(source, layers.blocks, run)(streams.original[rows], rows)
            assert until.shape == found.shape


def test_the_error_is_that_of_whole_sequences_and_of_short_texts(tmp_path: Path) -> None:
    layers = Layers(tmp_path, "llama", max_position_embeddings=256)
    streams = ResidualStreams(layers.stream, layers.target, random_tokens(64, 256))
    source = layers.stream.layer(0)
    changed = layers.stream.layer(0, {"self_attn.o_proj.weight": torch.zeros(64, 64)})
    run, original = streams.run_source(changed, 0), streams.run_source(source, 0)
    with torch.no_grad():
        both = [
            float(
                relative_error(
                    run(streams.original[rows], rows), original(streams.original[rows], rows)
                )
            )
            for rows in (slice(0, 16), slice(48, 64))
        ]
    assert streams.error(run, original) == pytest.approx(sum(both) / 2, rel=1e-5)
    assert both[0] != pytest.approx(both[1], rel=1e-3)


def test_short_texts_are_not_filled_up(tmp_path: Path) -> None:
    """A state space model would compute on its chunk size for each of them."""
    layers = Layers(tmp_path, "llama", max_position_embeddings=256)
    layers.stream.config.chunk_size = 128
    streams = ResidualStreams(layers.stream, layers.target, random_tokens(80, 256))
    assert streams._whole == 80


@pytest.mark.parametrize(
    ("sequences", "length", "whole"),
    [(80, 256, 64), (32, 256, 16), (16, 256, 16), (80, 128, 64), (80, 250, 80)],
)
def test_which_texts_are_cut(sequences: int, length: int, whole: int, tmp_path: Path) -> None:
    layers = Layers(tmp_path, "llama", max_position_embeddings=256)
    streams = ResidualStreams(layers.stream, layers.target, random_tokens(sequences, length))
    assert streams._whole == whole


def test_batches_are_drawn_by_seed_and_hold_texts_of_one_length(tmp_path: Path) -> None:
    layers = Layers(tmp_path, "llama", max_position_embeddings=256)
    streams = ResidualStreams(layers.stream, layers.target, random_tokens(80, 256))
    assert (streams.batch, streams._whole) == (16, 64)

    def drawn(seed: int) -> list[list[int]]:
        return [rows.tolist() for rows in islice(streams.drawn(seed), 10)]

    first = drawn(0)
    assert first == drawn(0) != drawn(1)
    for once in (first[:5], first[5:]):
        assert sorted(chain(*once)) == list(range(80))
        assert sum(max(rows) < 64 for rows in once) == 4
        assert sum(min(rows) >= 64 for rows in once) == 1
    assert first[:5] != first[5:]
