"""The residual streams of the original and of the converted model, side by side over one text."""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from uptrain.conversion.fit import Rows, Run, relative_error
from uptrain.conversion.stream import LayerStream

_STEP_TOKENS = 4096
"""Tokens of one step; a wide layer takes more, so that a step's update does not outweigh its gradient."""
MOMENT_TOKENS = 65_536
"""Tokens that second moments are taken of: those of more differ little."""
_ENCODED_TOKENS = 2 * _STEP_TOKENS
"""Most positions of an encoder's output in one step: they are many, and cost less than a token."""
_SHORT, _FEW = 64, 4
"""A quarter of the batches is read as texts of so many tokens, if a sequence holds a few of them."""


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
        # Attention rests on the first token of a text (Xiao et al. 2024), whose activations grow large in
        # some layer, whatever token it is. Whole sequences have too few of them to fit that to. A quarter
        # has enough to spare, an eighth just enough; half cost models that have no such token 2 to 4%.
        is_long = length % _SHORT == 0 and length >= _FEW * _SHORT
        is_cut = is_long and source.half is None and _chunk(source.config) <= _SHORT
        batches = usable // self.batch
        self._whole = self.batch * (batches - (batches + 2) // 4 if is_cut else batches)
        """So many sequences are read whole; those behind them, as short texts."""
        # bfloat16 halves the activations on a GPU; its rounding is far below the error to repair.
        dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32
        # Both streams and one set of targets.
        needed = 3 * usable * length * first.shape[-1] * dtype.itemsize
        distinct = {id(each): each for each in encoded or ()}
        needed += sum(each.numel() for each in distinct.values()) * dtype.itemsize
        place = self._device if self._fits(needed, activation_bytes) else torch.device("cpu")
        embedded = []
        for rows in self._slices(usable):
            part = source.embed(self._as_read(self._inputs[rows], rows))
            embedded.append(part.to(place, dtype).reshape(self.batch, length, -1))
        self.original = torch.cat(embedded)
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
        read, inputs = self._as_read(hidden, rows), self._as_read(self._inputs[rows], rows)
        with torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext():
            return stream.run(layer, index, read, encoded, inputs).reshape(hidden.shape)

    def _as_read(self, tensor: Tensor, rows: Rows) -> Tensor:
        """Cut a batch [sequences, length, …] into the texts that it is read as."""
        first = rows.start or 0 if isinstance(rows, slice) else int(rows[0])
        return tensor if first < self._whole else tensor.reshape(-1, _SHORT, *tensor.shape[2:])

    @property
    def tokens(self) -> int:
        """Positions that the layers are given."""
        return self.original.shape[0] * self.original.shape[1]

    def batches(self) -> list[slice]:
        """Cut the sequences in batches; all of a batch are read whole, or all as short texts."""
        return self._slices(len(self.original))

    def _slices(self, sequences: int) -> list[slice]:
        return [slice(start, start + self.batch) for start in range(0, sequences, self.batch)]

    def drawn(self, seed: int) -> Iterator[Tensor]:
        """Draw batches without end, each sequence once before any is seen again.

        Args:
            seed: Of the draw.
        """
        generator = torch.Generator().manual_seed(seed)
        parts = self._whole, len(self.original) - self._whole
        while True:
            orders = [torch.randperm(part, generator=generator) for part in parts]
            batches = torch.cat([orders[0], orders[1] + self._whole]).split(self.batch)
            for place in torch.randperm(len(batches), generator=generator).tolist():
                yield batches[place]

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
        batches = self.batches()
        errors = [
            float(
                relative_error(
                    target(self.to_device(self.converted[rows]), rows),
                    source(self.to_device(self.original[rows]), rows),
                )
            )
            # Whole sequences, and short texts if there are any.
            for rows in (batches[0], batches[-1])
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


def _chunk(config: Any) -> int:
    """Tokens that a state space model fills a shorter text up to."""
    text = config.get_text_config()
    return max(getattr(text, key, None) or 0 for key in ("chunk_size", "mamba_chunk_size"))
