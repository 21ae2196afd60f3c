"""Repair one converted layer: solve its output projection anew, then fit its weights.

No gradient crosses more than one layer. The layer's inputs are those it will really get, behind the
converted layers before it; its targets are what the original's residual stream is there. So each
layer also repairs the drift of the layers before it.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

import torch
from torch import Tensor, nn

from uptrain.conversion.attention import AttentionNames
from uptrain.conversion.fit import Fit, Loss, Run, fit_layer, relative_error
from uptrain.conversion.refit import Refit, refit_projection
from uptrain.conversion.residual import ResidualStreams
from uptrain.errors import UnsupportedFamilyError
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
    names: AttentionNames,
    probe: Tensor,
    *,
    refit: bool,
    steps: int,
    seed: int,
    advance: Advance,
) -> tuple[dict[str, float], Tensor | None]:
    """Refit and reconstruct a merged layer, in place.

    First the output projection is solved anew, then the attention's projections are fitted to the
    original's attention, then the whole layer to the original's layer. The last layer is fitted to
    the original's logits instead.

    Args:
        streams: What enters the layer in both models.
        index: Its place in the stack.
        source: The original layer.
        layer: The converted one.
        names: Where the attention block is.
        probe: [1, length, hidden_size], what may enter the layer.
        refit: Whether to solve the output projection; only plain pre-norm blocks allow it.
        steps: Of both fits together; 0 for none.
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
    # Probed in float32: rounding would hide what is plain.
    plain = is_plain(source, names, partial(streams.source.run, source, index), probe)
    wanted: Run = original
    reach: Run = run
    if plain:
        wanted = run_attention(source, names, original)
        reach = run_attention(layer, names, run)
    # One set of targets at a time: activations are what takes the memory.
    targets = streams.map(wanted, streams.original)
    if plain and refit:
        pairs = zip(
            streams.some_batches(streams.converted), streams.some_batches(targets), strict=True
        )
        refit_output(layer, names, run, pairs)
        errors["refit"] = streams.error(run, original)
    if not steps:
        advance(1, title)
        return errors, None if plain else targets
    attention = {
        name: ATTENTION_RATE
        for name, _ in layer.named_parameters()
        if name.startswith(f"{names.module}.") and name.split(".")[-2] in names.projections
    }
    first = round(steps * _ATTENTION_PART)
    fit = Fit(attention, first, streams.batch, ATTENTION_DECAY)
    _fit(streams, layer, reach, targets, fit, f"{title}, attention", seed + 2 * index, advance)
    errors["attention"] = streams.error(run, original)
    if plain:
        del targets
        targets = streams.map(original, streams.original)
    is_last = index == len(streams.source) - 1
    rates = {
        name: LAYER_RATE if name in attention else MLP_RATE
        for name in _trainable(streams, index, layer)
    }
    batch = streams.batch
    loss: Loss = relative_error
    if is_last:
        rates = dict.fromkeys(rates, LAST_RATE)
        logits = batch * streams.converted.shape[1] * streams.source.vocabulary
        loss = partial(_divergence, streams, max(LOGITS_EVERY, -(-logits // _LOGITS)))
    fit = Fit(rates, steps - first, batch, LAYER_DECAY, orthogonal=not is_last)
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
            loss=loss,
            seed=seed,
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
    """Matrices and biases of a layer that lie in the files as they are in memory."""
    known = streams.target.names(index)
    norms = {
        name
        for name, parameter in layer.named_parameters()
        if parameter.dim() < 2 and not name.endswith(".bias")
    }
    return [
        n for n, _ in layer.named_parameters() if n in known and n not in norms and "norm" not in n
    ]


class _Reached(Exception):
    """The attention block has done its work, and nothing behind it is wanted."""


def run_attention(layer: nn.Module, names: AttentionNames, run: Run) -> Run:
    """Make a function that computes a layer up to its attention block's output, added to its input.

    Args:
        layer: The layer.
        names: Where its attention block is.
        run: Runs the whole layer.

    Returns:
        From hidden states [batch, length, hidden_size] to the same shape.
    """

    def until_attention(hidden: Tensor) -> Tensor:
        with _attention_output(layer, names, stop=True) as outputs, suppress(_Reached):
            run(hidden)
        if outputs[0].shape != hidden.shape:
            raise UnsupportedFamilyError(
                f"{names.module} gives {outputs[0].shape[-1]} channels of the {hidden.shape[-1]} that its layers "
                "pass on, so they cannot be fitted one by one; use --method mean without --calibration"
            )
        return hidden + outputs[0]

    return until_attention


@contextmanager
def _attention_output(
    layer: nn.Module, names: AttentionNames, stop: bool, given: Tensor | None = None
) -> Iterator[list[Tensor]]:
    """Record what the attention block returns; end there (`stop`), or let it return `given`."""
    outputs: list[Tensor] = []

    def hook(module: nn.Module, args: object, output: object) -> object:
        is_tuple = isinstance(output, tuple)
        found = output[0] if isinstance(output, tuple) else output
        assert isinstance(found, Tensor)
        outputs.append(found)
        if stop:
            raise _Reached
        if given is None:
            return None
        return (given, *output[1:]) if isinstance(output, tuple) and is_tuple else given

    handle = layer.get_submodule(names.module).register_forward_hook(hook)
    try:
        yield outputs
    finally:
        handle.remove()


@torch.no_grad()
def is_plain(layer: nn.Module, names: AttentionNames, run: Run, hidden: Tensor) -> bool:
    """Say whether a layer is a plain pre-norm block: input + attention, then the rest on that sum.

    Probed: moving something from the input to the attention's output must not change the result. It
    does in parallel blocks, behind a norm on the output, and with residual multipliers.

    Args:
        layer: The layer.
        names: Where its attention block is.
        run: Runs the whole layer.
        hidden: [batch, length, hidden_size], what may enter it.
    """
    with _attention_output(layer, names, stop=False) as outputs:
        reference = run(hidden)
    moved = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden)
    moved = moved * hidden.std()
    with _attention_output(layer, names, stop=False, given=outputs[0] + moved):
        shifted = run(hidden - moved)
    with _attention_output(layer, names, stop=False, given=outputs[0]):
        control = run(hidden - moved)
    return bool((shifted - reference).abs().max() <= 1e-2 * (control - reference).abs().max())


@torch.no_grad()
def refit_output(
    layer: nn.Module, names: AttentionNames, run: Run, pairs: Iterable[tuple[Tensor, Tensor]]
) -> Refit:
    """Solve the output projection of a plain block anew and put it into the layer.

    Args:
        layer: The converted layer.
        names: Where its attention block is.
        run: Runs the whole layer.
        pairs: Batches [sequences, length, hidden_size] of what enters it, and of what input plus
            attention are in the original.
    """
    projection = layer.get_submodule(f"{names.module}.{names.output}")
    weight = projection.weight.mT if names.transposed else projection.weight
    assert isinstance(weight, Tensor)
    assert projection.bias is None or isinstance(projection.bias, Tensor)
    device = weight.device
    outputs, size = weight.shape
    gram = torch.zeros(size, size, dtype=torch.float64, device=device)
    cross = torch.zeros(size, outputs, dtype=torch.float64, device=device)
    energy = torch.zeros((), dtype=torch.float64, device=device)
    seen: list[Tensor] = []
    handle = projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    until_attention = run_attention(layer, names, run)
    try:
        for entering, wanted in pairs:
            entering, wanted = entering.to(device).float(), wanted.to(device).float()
            seen.clear()
            until_attention(entering)
            heads = seen[0].float().flatten(0, -2)
            target = (wanted - entering).flatten(0, -2)
            if projection.bias is not None:
                target = target - projection.bias
            gram += heads.T @ heads
            cross += heads.T @ target
            energy += target.square().sum()
    finally:
        handle.remove()
    refit = refit_projection(weight, gram, cross, float(energy))
    weight.copy_(refit.weight)
    return refit
