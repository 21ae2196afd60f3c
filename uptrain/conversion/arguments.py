"""What a model calls its layers with beside hidden states."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from uptrain.errors import UnsupportedFamilyError


class Stop(Exception):
    """Ends a forward once what was wanted of it is known."""


@dataclass(frozen=True)
class Arguments:
    """For hidden states of one shape."""

    by_layer: list[dict[str, Any]]
    """`args` and `kwargs`; nothing for a layer that the model left out."""
    encoded: torch.Tensor | None
    """What stands among them for the encoder's output."""

    def of(self, index: int, encoded: torch.Tensor | None) -> dict[str, Any]:
        """Give one layer's, with an encoder's output in its place."""
        if self.encoded is None:
            return self.by_layer[index]
        found: dict[str, Any] = tree_map(
            lambda leaf: encoded if leaf is self.encoded else leaf, self.by_layer[index]
        )
        return found


def differ(one: Arguments, other: Arguments) -> bool:
    """Say whether layers were called with different tensors, an encoder's output apart."""
    for index in range(len(one.by_layer)):
        leaves = tree_leaves(one.of(index, None)), tree_leaves(other.of(index, None))
        pairs = zip(*leaves, strict=True)
        if any(isinstance(a, torch.Tensor) and not torch.equal(a, b) for a, b in pairs):
            return True
    return False


def blank_inputs(name: str, entry: str, config: Any, batch: int, length: int) -> torch.Tensor:
    """Make inputs of which only the shape counts.

    Args:
        name: Of the checkpoint and its family, for messages.
        entry: What the model takes: `input_ids`, `input_features`, …
        config: The model's, or its encoder's.
        batch: Sequences.
        length: Tokens; speech is of one length, whatever this says.

    Returns:
        [batch, length], int64, or [batch, mel bins, frames], float32.

    Raises:
        UnsupportedFamilyError: If it is neither text nor a spectrum as Whisper takes it.
    """
    if entry == "input_ids":
        # Neither it nor its successor is padding, which some models would mask by themselves.
        token = 0 if getattr(config, "pad_token_id", None) not in (0, 1) else 2
        return torch.full((batch, length), token)
    if not is_known(entry, config):
        raise UnsupportedFamilyError(
            f"{name}: its encoder, {config.model_type}, takes {entry} in a form that is not known here, expected "
            "text or Whisper's spectra; convert its decoder without --calibration, say by --method factorize"
        )
    # Of two convolutions the second halves the frames.
    return torch.zeros(batch, config.num_mel_bins, 2 * config.max_source_positions)


def is_known(entry: str, config: Any) -> bool:
    """Say whether `blank_inputs` can make what a model takes."""
    hears = entry == "input_features" and hasattr(config, "max_source_positions")
    return entry == "input_ids" or hears
