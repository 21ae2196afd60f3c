"""The residual streams of the original and of the converted model, side by side over one text."""

from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from uptrain.conversion.fit import Run, relative_error
from uptrain.conversion.stream import LayerStream

_STEP_TOKENS = 4096
"""Tokens of one step; a wide layer takes more, so that a step's update does not outweigh its gradient."""
MOMENT_TOKENS = 65_536
"""Tokens that second moments are taken of: those of more differ little."""
_ERROR_TOKENS = 4096


class ResidualStreams:
    """What enters the next layer: in the original, and behind the converted layers before it."""

    def __init__(
        self,
        source: LayerStream,
        target: LayerStream,
        tokens: Tensor,
        activation_bytes: int | None = None,
    ) -> None:
        """Embed the text.

        Args:
            source: The original.
            target: The converted model.
            tokens: [sequences, length], int64; sequences beyond whole batches are left out.
            activation_bytes: Most bytes of activations on the device; the host holds them if they
                are more.
        """
        self.source, self.target, self._device = source, target, source.device
        length = tokens.shape[1]
        first = source.embed(tokens[:1])
        step_tokens = max(_STEP_TOKENS, 2 * first.shape[-1])
        self.batch = max(1, min(len(tokens), step_tokens // length))
        """Sequences at a time."""
        usable = len(tokens) - len(tokens) % self.batch
        # bfloat16 halves the activations on a GPU; its rounding is far below the error to repair.
        dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32
        # Both streams and one set of targets.
        needed = 3 * usable * length * first.shape[-1] * dtype.itemsize
        place = self._device if self._fits(needed, activation_bytes) else torch.device("cpu")
        self.original = torch.cat(
            [source.embed(part).to(place, dtype) for part in tokens[:usable].split(self.batch)]
        )
        """[sequences, length, hidden_size]."""
        self.converted = self.original.clone()
        """[sequences, length, hidden_size]."""

    def _fits(self, needed: int, budget: int | None) -> bool:
        if budget is not None and needed > budget:
            return False
        if self._device.type != "cuda":
            return True
        free, _ = torch.cuda.mem_get_info(self._device)
        return needed < free // 2

    def run_source(self, layer: nn.Module, index: int) -> Run:
        """Make a function that runs a layer of the original."""
        return partial(self._run, self.source, layer, index)

    def run_target(self, layer: nn.Module, index: int) -> Run:
        """Make a function that runs a converted layer."""
        return partial(self._run, self.target, layer, index)

    def _run(self, stream: LayerStream, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        on_gpu = self._device.type == "cuda"
        with torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext():
            return stream.run(layer, index, hidden)

    def batches(self, hidden: Tensor) -> list[Tensor]:
        """Cut activations in batches."""
        return list(hidden.split(self.batch))

    def some_batches(self, hidden: Tensor, tokens: int = MOMENT_TOKENS) -> list[Tensor]:
        """Cut activations in batches and take about `tokens` of them, evenly."""
        every = max(1, hidden.shape[0] * hidden.shape[1] // tokens)
        return self.batches(hidden)[::every]

    def to_device(self, hidden: Tensor) -> Tensor:
        """Bring a batch where layers run, in float32."""
        return hidden.to(self._device).float()

    @torch.no_grad()
    def map(self, run: Run, hidden: Tensor, into: Tensor | None = None) -> Tensor:
        """Run over all sequences; `into` may be `hidden` itself."""
        result = torch.empty_like(hidden) if into is None else into
        for part, output in zip(self.batches(hidden), result.split(self.batch), strict=True):
            output.copy_(run(self.to_device(part)))
        return result

    @torch.no_grad()
    def error(self, target: Run, source: Run) -> float:
        """Relative error of the residual stream behind a layer, on some of the tokens."""
        pairs = zip(
            self.some_batches(self.converted, _ERROR_TOKENS),
            self.some_batches(self.original, _ERROR_TOKENS),
            strict=True,
        )
        errors = [
            float(relative_error(target(self.to_device(a)), source(self.to_device(b))))
            for a, b in pairs
        ]
        return sum(errors) / len(errors)

    def move(
        self, index: int, source: nn.Module, layer: nn.Module, original: Tensor | None = None
    ) -> None:
        """Move both streams behind a layer that is finished.

        Args:
            index: Its place in the stack.
            source: The original layer.
            layer: The converted one.
            original: What leaves the original layer, if that is known already.
        """
        if original is None:
            original = self.map(self.run_source(source, index), self.original, self.original)
        self.original = original
        self.map(self.run_target(layer, index), self.converted, self.converted)
