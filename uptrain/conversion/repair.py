"""Repair one converted layer: solve its output projection anew, then fit its weights.

No gradient crosses more than one layer. The layer's inputs are those it will really get, behind the
converted layers before it; its targets are what the original's residual stream is there. So each
layer also repairs the drift of the layers before it.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from uptrain.conversion.attention import AttentionNames
from uptrain.conversion.fit import Fit, Loss, Rows, Run, fit_layer, relative_error
from uptrain.conversion.partway import attention_output, run_attention
from uptrain.conversion.refit import Refit, refit_projection
from uptrain.conversion.residual import ResidualStreams
from uptrain.progress import Advance

# Step sizes are parts of a tensor's root mean square, so that one setting suits all models.
ATTENTION_RATE = 0.03
LAYER_RATE = 0.02
MLP_RATE = 0.006
"""Of everything in the layer but the attention's projections, which have less to repair."""
LAST_RATE = 0.005
"""Of the last layer, which is fitted to the original's logits, with Adam."""
ATTENTION_DECAY, LAYER_DECAY = 0.3, 1.0
LOGITS_EVERY = 2
"""The last layer is fitted to the logits of every so many tokens, or fewer of a large vocabulary."""
_ATTENTION_PART = 2 / 3  # of the steps
_LOGITS = 2**27  # most logits of one step


def repair_layer(
    streams: ResidualStreams,
    index: int,
    source: nn.Module,
    layer: nn.Module,
    blocks: Sequence[AttentionNames],
    probe: Run,
    entering: Tensor,
    *,
    refit: bool,
    steps: int,
    seed: int,
    advance: Advance,
) -> tuple[dict[str, float], Tensor | None]:
    """Refit and reconstruct a merged layer, in place.

    For each attention block, in the order of the layer: first the output projection is solved anew,
    then the attention's projections are fitted to the original's attention. Then the whole layer is
    fitted to the original's layer. The last layer is fitted to the original's logits instead.

    Args:
        streams: What enters the layer in both models.
        index: Its place in the stack.
        source: The original layer.
        layer: The converted one.
        blocks: Where its attention blocks are.
        probe: Runs the original layer in float32: rounding would hide what is plain.
        entering: [1, length, hidden_size], what `probe` may be given.
        refit: Whether to solve the output projection; only plain pre-norm blocks allow it.
        steps: Of all fits together; 0 for none.
        seed: Of the order of the text.
        advance: Progress.

    Returns:
        Relative error of the residual stream behind the layer, after each step, and what leaves the
        original layer [sequences, length, hidden_size], if that was computed.
    """
    title = f"layer {index}"
    errors: dict[str, float] = {}
    run = streams.run_target(layer, index)
    original = streams.run_source(source, index)
    errors["merged"] = streams.error(run, original)
    first = round(steps * _ATTENTION_PART) if blocks else 0
    targets = None
    for number, names in enumerate(blocks):
        before = blocks[: number + 1]
        plain = is_plain(source, before, probe, entering)
        wanted: Run = original
        reach: Run = run
        if plain:
            wanted = run_attention(source, before, original)
            reach = run_attention(layer, before, run)
        # One set of targets at a time: activations are what takes the memory.
        targets = None
        targets = streams.map(wanted, streams.original)
        if plain and refit:
            entered = (
                (streams.converted[rows], targets[rows], rows) for rows in streams.some_batches()
            )
            refit_output(layer, before, run, entered)
            errors["refit"] = streams.error(run, original)
        share = first * (number + 1) // len(blocks) - first * number // len(blocks)
        if share:
            fit = Fit(_projections(layer, names), share, ATTENTION_DECAY)
            fitted = f"{title}, {names.module if len(blocks) > 1 else 'attention'}"
            _fit(streams, layer, reach, targets, fit, fitted, seed + 2 * index, advance)
            errors["attention"] = streams.error(run, original)
        targets = None if plain else targets
    if not steps:
        advance(1, title)
        return errors, targets
    if targets is None:
        targets = streams.map(original, streams.original)
    # Logits behind the last layer, if the model has a head that gives some.
    is_last = index == streams.source.last and streams.source.vocabulary > 0
    attention = {name for names in blocks for name in _projections(layer, names)}
    rates = {
        name: LAYER_RATE if name in attention else MLP_RATE
        for name in _trainable(streams, index, layer)
    }
    loss: Loss = relative_error
    if is_last:
        rates = dict.fromkeys(rates, LAST_RATE)
        logits = streams.batch * streams.converted.shape[1] * streams.source.vocabulary
        loss = partial(_divergence, streams, max(LOGITS_EVERY, -(-logits // _LOGITS)))
    fit = Fit(rates, steps - first, LAYER_DECAY, orthogonal=not is_last)
    _fit(
        streams,
        layer,
        run,
        targets,
        fit,
        f"{title}, whole layer",
        seed + 2 * index + 1,
        advance,
        loss,
    )
    errors["layer"] = streams.error(run, original)
    return errors, targets


def _projections(layer: nn.Module, names: AttentionNames) -> dict[str, float]:
    """Step sizes of an attention block's projections, by name."""
    return {
        name: ATTENTION_RATE for name, _ in layer.named_parameters() if names.is_projection(name)
    }


def _fit(
    streams: ResidualStreams,
    layer: nn.Module,
    run: Run,
    targets: Tensor,
    fit: Fit,
    title: str,
    seed: int,
    advance: Advance,
    loss: Loss = relative_error,
) -> None:
    with torch.enable_grad():
        fit_layer(
            layer,
            run,
            streams.converted,
            targets,
            fit,
            streams.drawn(seed),
            loss=loss,
            advance=lambda value: advance(1, f"{title}, residual {value:.4f}"),
        )


def _divergence(streams: ResidualStreams, apart: int, output: Tensor, target: Tensor) -> Tensor:
    """KL(original ‖ converted) behind the last layer; the head and final norm stay as they are."""
    every = slice(apart // 2, None, apart)
    with torch.no_grad():
        wanted = streams.source.logits(target[:, every]).float().log_softmax(-1)
    found = streams.source.logits(output[:, every]).float().log_softmax(-1)
    return (wanted.exp() * (wanted - found)).sum(-1).mean()


def _trainable(streams: ResidualStreams, index: int, layer: nn.Module) -> list[str]:
    """Matrices and biases of a layer that lie in the files as they are in memory, and are its own."""
    known = streams.target.names(index).keys() - streams.target.shared(index)
    # A table that later layers read, too: T5's bias by position.
    tables = {
        f"{name}.weight" for name, each in layer.named_modules() if isinstance(each, nn.Embedding)
    }
    norms = {
        name
        for name, parameter in layer.named_parameters()
        if parameter.dim() < 2 and not name.endswith(".bias")
    }
    return [
        n
        for n, _ in layer.named_parameters()
        if n in known and n not in norms | tables and "norm" not in n
    ]


@torch.no_grad()
def is_plain(layer: nn.Module, blocks: Sequence[AttentionNames], run: Run, hidden: Tensor) -> bool:
    """Say whether a layer is a plain pre-norm block: input + attention, then the rest on that sum.

    Probed: moving something from the input to the attention's output must not change the result. It
    does in parallel blocks, behind a norm on the output, and with residual multipliers.

    Args:
        layer: The layer.
        blocks: Where its attention blocks are, up to the one in question; the others' outputs are held.
        run: Runs the whole layer.
        hidden: [batch, length, hidden_size], what may enter it.
    """

    def run_with(given: list[Tensor | None], entering: Tensor) -> tuple[Tensor, list[Tensor]]:
        with ExitStack() as stack:
            outputs = [
                stack.enter_context(attention_output(layer, names, stop=False, given=output))
                for names, output in zip(blocks, given, strict=True)
            ]
            result = run(entering, slice(None))
        return result, [output for (output,) in outputs]

    reference, outputs = run_with([None] * len(blocks), hidden)
    if outputs[-1].shape != hidden.shape:  # what layers pass on is more than one stream
        return False
    moved = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden)
    moved = moved * hidden.std()
    shifted, _ = run_with([*outputs[:-1], outputs[-1] + moved], hidden - moved)
    control, _ = run_with([*outputs], hidden - moved)
    return bool((shifted - reference).abs().max() <= 1e-2 * (control - reference).abs().max())


@torch.no_grad()
def refit_output(
    layer: nn.Module,
    blocks: Sequence[AttentionNames],
    run: Run,
    batches: Iterable[tuple[Tensor, Tensor, Rows]],
) -> Refit:
    """Solve the output projection of a plain block anew and put it into the layer.

    A token counts by the square of its error relative to what is wanted behind the block.

    Args:
        layer: The converted layer.
        blocks: Where its attention blocks are, up to the one to be solved.
        run: Runs the whole layer.
        batches: What enters the layer, [sequences, length, hidden_size], what input plus attention are
            in the original, and which sequences of the text these are.
    """
    names = blocks[-1]
    projection = layer.get_submodule(f"{names.module}.{names.output}")
    weight = projection.weight.mT if names.transposed else projection.weight
    assert isinstance(weight, Tensor)
    assert projection.bias is None or isinstance(projection.bias, Tensor)
    device = weight.device
    outputs, inputs = weight.shape
    gram = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
    cross = torch.zeros(inputs, outputs, dtype=torch.float64, device=device)
    energy = torch.zeros((), dtype=torch.float64, device=device)
    seen: list[Tensor] = []
    handle = projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    until_attention = run_attention(layer, blocks, run)
    until_earlier = run_attention(layer, blocks[:-1], run)
    try:
        for entering, wanted, rows in batches:
            entering, wanted = entering.to(device).float(), wanted.to(device).float()
            seen.clear()
            until_attention(entering, rows)
            heads = seen[0].float().flatten(0, -2)
            target = (wanted - until_earlier(entering, rows)).flatten(0, -2)
            if projection.bias is not None:
                target = target - projection.bias
            # Errors relative to the stream, as a fit's are: where a few tokens have activations of a
            # hundred times the others' (Sun et al. 2024), these alone would decide.
            size = wanted.flatten(0, -2).norm(dim=-1, keepdim=True).clamp(min=1e-10)
            heads, target = heads / size, target / size
            gram += heads.T @ heads
            cross += heads.T @ target
            energy += target.square().sum()
    finally:
        handle.remove()
    refit = refit_projection(weight, gram, cross, float(energy))
    weight.copy_(refit.weight)
    return refit
