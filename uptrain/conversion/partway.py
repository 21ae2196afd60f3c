"""Run a layer as far as one of its attention blocks."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

from torch import Tensor, nn

from uptrain.conversion.attention import AttentionNames
from uptrain.conversion.fit import Rows, Run


class _Reached(Exception):
    """The attention block has done its work, and nothing behind it is wanted."""


def run_attention(layer: nn.Module, blocks: Sequence[AttentionNames], run: Run) -> Run:
    """Make a function that computes a plain layer up to an attention block's output, added to its input.

    Args:
        layer: The layer.
        blocks: Where its attention blocks are, up to the one that is wanted; with none, nothing is run.
        run: Runs the whole layer.

    Returns:
        From hidden states [batch, length, hidden_size] to the same shape.
    """

    def run_until(hidden: Tensor, rows: Rows) -> Tensor:
        outputs = reach_attention(layer, blocks, run, hidden, rows)
        # What is run may be shorter texts, cut out of these.
        return hidden + sum(output.reshape(hidden.shape) for output in outputs)

    return run_until


def reach_attention(
    layer: nn.Module, blocks: Sequence[AttentionNames], run: Run, hidden: Tensor, rows: Rows
) -> list[Tensor]:
    """Run a layer until the last of these attention blocks has done its work.

    Args:
        layer: The layer.
        blocks: Where the blocks are; with none, nothing is run.
        run: Runs the whole layer.
        hidden: [batch, length, hidden_size], what enters it.
        rows: Which sequences of the text these are.

    Returns:
        What each block returns, [batch, length, channels].
    """
    if not blocks:
        return []
    with ExitStack() as stack:
        outputs = [
            stack.enter_context(attention_output(layer, names, stop=names is blocks[-1]))
            for names in blocks
        ]
        with suppress(_Reached):
            run(hidden, rows)
    return [output for (output,) in outputs]


@contextmanager
def attention_output(
    layer: nn.Module, names: AttentionNames, stop: bool, given: Tensor | None = None
) -> Iterator[list[Tensor]]:
    """Record what an attention block returns; end there, or let it return something else.

    Args:
        layer: The layer.
        names: Where the block is.
        stop: Whether to end there.
        given: What it is to return, [batch, length, hidden_size].
    """
    outputs: list[Tensor] = []

    def hook(module: nn.Module, args: object, output: object) -> object:
        found = output[0] if isinstance(output, tuple) else output
        assert isinstance(found, Tensor)
        outputs.append(found)
        if stop:
            raise _Reached
        if given is None:
            return None
        return (given, *output[1:]) if isinstance(output, tuple) else given

    handle = layer.get_submodule(names.module).register_forward_hook(hook)
    try:
        yield outputs
    finally:
        handle.remove()
