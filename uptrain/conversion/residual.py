"""The residual streams of the original and of the converted model, side by side over one text."""

from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from uptrain.conversion.fit import Rows, Run, relative_error
from uptrain.conversion.stream import LayerStream

_STEP_TOKENS = 4096
"""Tokens of one step; a wide layer takes more, so that a step's update does not outweigh its gradient."""
MOMENT_TOKENS = 65_536
"""Tokens that second moments are taken of: those of more differ little."""
_ERROR_TOKENS = 4096
_ENCODED_TOKENS = 2 * _STEP_TOKENS
"""Most positions of an encoder's output in one step: they are many, and cost less than a token."""


class ResidualStreams:
    """What enters the next layer: in the original, and behind the converted layers before it."""

    def __init__(
        self,
        source: LayerStream,
        target: LayerStream,
        tokens: Tensor,
        activation_bytes: int | None = None,
        encoded: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Embed the text.

        Args:
            source: The original.
            target: The converted model.
            tokens: [sequences, length], int64, or what else the layers compute on; sequences beyond
                whole batches are left out.
            activation_bytes: Most bytes of activations on the device; the host holds them if they
                are more.
            encoded: What the encoder made, in the original and in the converted model,
                [sequences, encoder's length, encoder's hidden_size].
        """
        self.source, self.target, self._device = source, target, source.device
        if encoded is not None:
            tokens = tokens[: len(encoded[0])]
        first = source.embed(tokens[:1])
        length = first.shape[1]
        step_tokens = max(_STEP_TOKENS, 2 * first.shape[-1])
        most = step_tokens // length
        if encoded is not None:
            most = min(most, _ENCODED_TOKENS // encoded[0].shape[1])
        self.batch = max(1, min(len(tokens), most))
        """Sequences at a time."""
        usable = len(tokens) - len(tokens) % self.batch
        self._inputs = tokens[:usable]
        # bfloat16 halves the activations on a GPU; its rounding is far below the error to repair.
        dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32
        # Both streams and one set of targets.
        needed = 3 * usable * length * first.shape[-1] * dtype.itemsize
        distinct = {id(each): each for each in encoded or ()}
        needed += sum(each.numel() for each in distinct.values()) * dtype.itemsize
        place = self._device if self._fits(needed, activation_bytes) else torch.device("cpu")
        self.original = torch.cat(
            [source.embed(part).to(place, dtype) for part in tokens[:usable].split(self.batch)]
        )
        """[sequences, length, hidden_size]."""
        held = {key: each.to(place, dtype) for key, each in distinct.items()}
        self._encoded = [held[id(each)] for each in encoded or ()]
        """What the encoder made, for `source` and `target`; one tensor if it was not converted."""
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

    def _run(
        self, stream: LayerStream, layer: nn.Module, index: int, hidden: Tensor, rows: Rows
    ) -> Tensor:
        encoded = None
        if self._encoded:
            whole = self._encoded[0 if stream is self.source else 1]
            on_device = rows if isinstance(rows, slice) else rows.to(whole.device)
            encoded = self.to_device(whole[on_device])
        rows = rows if isinstance(rows, slice) else rows.to(self._inputs.device)
        on_gpu = self._device.type == "cuda"
        with torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext():
            return stream.run(layer, index, hidden, encoded, self._inputs[rows])

    @property
    def tokens(self) -> int:
        """Positions that the layers are given."""
        return self.original.shape[0] * self.original.shape[1]

    def batches(self) -> list[slice]:
        """Cut the sequences in batches."""
        starts = range(0, len(self.original), self.batch)
        return [slice(start, start + self.batch) for start in starts]

    def some_batches(self, tokens: int = MOMENT_TOKENS) -> list[slice]:
        """Cut the sequences in batches and take about `tokens` of them, evenly."""
        every = max(1, self.original.shape[0] * self.original.shape[1] // tokens)
        return self.batches()[::every]

    def to_device(self, hidden: Tensor) -> Tensor:
        """Bring a batch where layers run, in float32."""
        return hidden.to(self._device).float()

    @torch.no_grad()
    def map(self, run: Run, hidden: Tensor, into: Tensor | None = None) -> Tensor:
        """Run over all sequences; `into` may be `hidden` itself."""
        result = torch.empty_like(hidden) if into is None else into
        for rows in self.batches():
            result[rows].copy_(run(self.to_device(hidden[rows]), rows))
        return result

    @torch.no_grad()
    def error(self, target: Run, source: Run) -> float:
        """Relative error of the residual stream behind a layer, on some of the tokens."""
        errors = [
            float(
                relative_error(
                    target(self.to_device(self.converted[rows]), rows),
                    source(self.to_device(self.original[rows]), rows),
                )
            )
            for rows in self.some_batches(_ERROR_TOKENS)
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
