"""How heads are merged and repaired: the choices of a conversion, with their defaults."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uptrain.conversion.pooling import POOLS
from uptrain.errors import OptionError

METHODS = (*POOLS, "align", "factorize")
GROUPINGS = ("contiguous", "search")
DEFAULT_TOKENS = 262_144


@dataclass(frozen=True)
class Options:
    """The choices of a conversion; `make_options` checks them and fills in the defaults."""

    method: str
    grouping: str
    architecture: str
    """`auto`, `keep`, or the `model_type` that the source is rewritten into."""
    encoder: bool
    """Whether the encoder of an encoder-decoder is converted, too."""
    calibration: Path | None
    calibration_tokens: int
    refit: bool
    reconstruct_steps: int | None
    """For each layer; 0 for none, None for as many as the tokens call for."""
    activation_bytes: int | None
    """Most bytes of activations on the device; the host holds them if they are more."""
    device: str | None
    seed: int

    @property
    def by_layer(self) -> bool:
        """Whether layers have to be taken into memory, or tensors can be pooled one by one."""
        return self.calibration is not None or self.method not in POOLS

    def describe(self) -> dict[str, Any]:
        """Say what decides the result, in the words of the command line."""
        calibration = None
        if self.calibration is not None:
            calibration = {
                "data": self.calibration.name,
                "tokens": self.calibration_tokens,
                "refit": self.refit,
                "reconstruct_steps": self.reconstruct_steps,
            }
        return {
            "method": self.method,
            "grouping": self.grouping,
            "architecture": self.architecture,
            "encoder": self.encoder,
            "seed": self.seed,
            "calibration": calibration,
        }


def make_options(
    *,
    method: str | None = None,
    grouping: str | None = None,
    architecture: str = "auto",
    encoder: bool = False,
    calibration: str | os.PathLike[str] | None = None,
    calibration_tokens: int = DEFAULT_TOKENS,
    refit: bool = True,
    reconstruct_steps: int | None = None,
    activation_bytes: int | None = None,
    device: str | None = None,
    seed: int = 0,
) -> Options:
    """Check the choices of a conversion and fill in the best known defaults.

    Raises:
        OptionError: If a choice is unknown, or two of them exclude each other.
    """
    if method is None:
        method = "factorize" if calibration is not None else "mean"
    if method not in METHODS:
        raise OptionError(f"method {method!r}: is unknown; choose one of {', '.join(METHODS)}")
    if method == "random" and calibration is not None:
        raise OptionError(
            "method 'random' draws heads anew and has nothing to calibrate; choose another"
        )
    absorbs = method not in POOLS
    if grouping is None:
        grouping = "search" if calibration is not None and absorbs else "contiguous"
    if grouping not in GROUPINGS:
        raise OptionError(f"grouping {grouping!r}: is unknown; choose contiguous or search")
    if grouping == "search" and not absorbs:
        raise OptionError(
            f"grouping 'search' needs heads in a common basis, which method {method!r} does not give; "
            "choose align or factorize"
        )
    for name, number, least in (
        ("calibration_tokens", calibration_tokens, 1),
        ("reconstruct_steps", reconstruct_steps, 0),
        ("activation_bytes", activation_bytes, 0),
    ):
        if number is not None and number < least:
            raise OptionError(f"{name} {number}: expected {least} or more")
    return Options(
        method,
        grouping,
        architecture,
        encoder,
        None if calibration is None else Path(calibration),
        calibration_tokens,
        refit,
        reconstruct_steps,
        activation_bytes,
        device,
        seed,
    )
