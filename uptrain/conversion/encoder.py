"""What an encoder gives to a decoder: of a text, or what stands for it where there is none."""

from dataclasses import dataclass

import torch
from torch import Tensor

from uptrain.conversion.freedom import noisy
from uptrain.conversion.moments import balanced_signs
from uptrain.conversion.residual import ResidualStreams
from uptrain.conversion.stream import LayerStream

_PROBE_LENGTH = 32


@dataclass(frozen=True)
class Encoded:
    """An encoder's output, which its decoder's layers attend to."""

    probe: Tensor
    """[1, length, hidden_size], float32: what it may be."""
    gains: Tensor
    """[sequences, length, hidden_size], float32: the gains of its last norm with balanced signs."""
    by_sequence: tuple[Tensor, Tensor] | None = None
    """Of the calibration text, [sequences, length, hidden_size], in the original and in the converted
    model; one tensor if the encoder is not converted."""


def encode(source: LayerStream, inputs: Tensor | None, activation_bytes: int | None) -> Encoded:
    """Run an encoder that is not converted.

    Args:
        source: Its layers.
        inputs: [sequences, ...], tokens or spectra; None without calibration.
        activation_bytes: As in `ResidualStreams`.
    """
    if inputs is None:
        known = source.can_be_read
        return (
            encoded_by(source, source, None)
            if known
            else unseen(source.encoder_width, source.device)
        )
    streams = ResidualStreams(source, source, inputs, activation_bytes)
    for index in range(len(source)):
        layer = source.layer(index)
        streams.map(streams.run_source(layer, index), streams.original, streams.original)
    streams.converted = streams.original
    return encoded_by(source, source, streams)


@torch.no_grad()
def encoded_by(
    source: LayerStream, target: LayerStream, streams: ResidualStreams | None
) -> Encoded:
    """Say what leaves an encoder whose layers are done.

    Args:
        source: Layers of the original encoder.
        target: Those of the converted one; `source` if it is not converted.
        streams: What leaves their last layers; None without calibration.
    """
    width = source.embed(source.blank_inputs(1, 1)).shape[-1]
    signs = balanced_signs(width).to(source.device)
    gains = source.encoded(signs)
    if streams is None:
        return Encoded(source.encoded(_noise(width).to(source.device)), gains)
    original = streams.map(lambda hidden, rows: source.encoded(hidden), streams.original)
    converted = original
    if target is not source:
        converted = streams.map(lambda hidden, rows: target.encoded(hidden), streams.converted)
    return Encoded(noisy(original[:1].to(source.device).float()), gains, (original, converted))


def unseen(width: int, device: torch.device) -> Encoded:
    """Stand for features of an image, of which a text says nothing, or for what an encoder may give.

    Args:
        width: Their number.
        device: Where they are wanted.
    """
    return Encoded(_noise(width).to(device), balanced_signs(width).to(device))


def _noise(width: int) -> Tensor:
    return torch.randn(1, _PROBE_LENGTH, width, generator=torch.Generator().manual_seed(0))
