"""A batch whose context is full: prefilled, and decoded one token further again and again."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from uptrain.errors import UptrainError, one_line
from uptrain.loading import decoder_layers, vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PREFILL_TOKENS = {"cpu": 4096, "cuda": 16384}  # at once; servers bound them as well
_WARMUP_STEPS = 3
_ROTARY = "apply_rotary_pos_emb"
"""Of the modeling files of transformers."""


class FullBatch:
    """Sequences of `context` tokens, of which the last is decoded again with every step.

    A step writes the last place of a static cache and reads all of the cache, as a decoder does
    whose context is full. Use it within `unmasked_steps` and `torch.inference_mode`.
    """

    def __init__(self, model: "PreTrainedModel", batch: int, context: int) -> None:
        self.model, self.batch, self.context = model, batch, context
        self.device = model.device
        self.cache = _static_cache(model, context)
        self.prefill_batch = _prefill_batch(self.cache, batch, context, self.device.type)
        draw = torch.Generator().manual_seed(0)
        size = (self.prefill_batch, context)
        self.tokens = torch.randint(vocabulary_size(model.config) or 2, size, generator=draw).to(
            self.device
        )
        self._last = self.tokens[:, -1:]
        self._places: list[torch.Tensor] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self.logits: torch.Tensor | None = None
        """Of the last step: [batch, vocabulary]."""

    def prefill(self) -> None:
        """Fill the cache but for its last place; a large batch is prefilled in part."""
        self.cache.reset()
        few = {"logits_to_keep": 1} if _keeps_few_logits(self.model) else {}
        self.model(input_ids=self.tokens[:, :-1], past_key_values=self.cache, use_cache=True, **few)

    def widen(self) -> None:
        """Repeat what was prefilled for the whole batch."""
        repeats = self.batch // self.prefill_batch
        self._last = self._last.repeat_interleave(repeats, 0)
        for layer in self.cache.layers if repeats > 1 else ():
            layer.keys = layer.keys.repeat_interleave(repeats, 0)
            layer.values = layer.values.repeat_interleave(repeats, 0)
        self._places = [
            layer.cumulative_length
            for layer in self.cache.layers
            if isinstance(getattr(layer, "cumulative_length", None), torch.Tensor)
        ]

    @property
    def is_graph(self) -> bool:
        """Whether a step is a CUDA graph."""
        return self._graph is not None

    def step(self) -> None:
        """Decode the last token of every sequence, greedily."""
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()

    def _step(self) -> None:
        out = self.model(input_ids=self._last, past_key_values=self.cache, use_cache=True)
        self.logits = out.logits[:, -1]
        self.next = self.logits.argmax(-1)
        if self._places:  # back to the last place
            torch._foreach_sub_(self._places, 1)
        for layer in self.cache.layers:
            if hasattr(layer, "cumulative_length_int"):  # a sliding window counts in Python as well
                layer.cumulative_length_int -= 1

    def capture(self) -> None:
        """Make a CUDA graph of the step, so that no time goes into launching it from Python.

        Much of it is compiled, so that none goes into many small kernels either; where it cannot be,
        the graph holds the stock ones.
        """
        places = [place.clone() for place in self._places]
        try:
            with compiled_parts(self.model):
                self._graph = self._captured()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # the compiler's errors are such too
            torch.cuda.synchronize()
            for place, was in zip(self._places, places, strict=True):
                place.copy_(was)
            self._graph = self._captured()

    def _captured(self) -> torch.cuda.CUDAGraph | None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARMUP_STEPS):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # the model waits for the device on the way, which a graph cannot
            torch.cuda.synchronize()
            return None
        return graph


@contextmanager
def compiled_parts(model: "PreTrainedModel") -> Iterator[None]:
    """Compile the norms and MLPs of a model's layers, and its rotary embedding.

    Most of a stock step's kernels are theirs and small. Attention itself knows its place in the cache,
    and would be compiled anew for each layer.
    """
    parts = [
        part
        for layer in decoder_layers(model)
        for part in layer.children()
        if not any(hasattr(module, "layer_idx") for module in part.modules())
    ]
    code = sys.modules[type(model).__module__]
    rotary = getattr(code, _ROTARY, None)
    # A limit is meant for functions whose arguments vary without end; here they are few.
    with torch._dynamo.config.patch(recompile_limit=2**10):
        for part in parts:
            part.forward = torch.compile(part.forward, dynamic=False)
        if rotary is not None:
            setattr(code, _ROTARY, torch.compile(rotary, dynamic=False))
        try:
            yield
        finally:
            for part in parts:
                del part.forward
            if rotary is not None:
                setattr(code, _ROTARY, rotary)


@contextmanager
def unmasked_steps() -> Iterator[None]:
    """Let transformers decode without a mask, and flash attention come first.

    All places of the cache are full, so that a single query needs no mask. With one, transformers
    would repeat the KV heads for each query head, or leave the kernels that read them once.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS

    stock = MASKS["sdpa"]

    def mask(*args: Any, **kwargs: Any) -> Any:
        return None if kwargs.get("q_length") == 1 else stock(*args, **kwargs)

    preferred = [
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.MATH,
    ]
    MASKS["sdpa"] = mask
    try:
        with sdpa_kernel(preferred, set_priority=True):
            yield
    finally:
        del MASKS["sdpa"]


def cache_bytes(model: "PreTrainedModel", context: int) -> int:
    """Measure what a model's cache takes for one sequence, as it is held.

    Raises:
        UptrainError: If the model cannot decode from a static cache.
    """
    cache = _static_cache(model, context)
    token = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
    try:
        model(input_ids=token, past_key_values=cache, use_cache=True)
    except Exception as error:  # what a family lacks shows in a way of its own
        raise UptrainError(
            f"{model.config.model_type}: cannot decode from a static cache ({one_line(error)}); "
            "leave out --decode"
        ) from error
    held = (value for layer in cache.layers for value in vars(layer).values())
    return sum(value.nbytes for value in held if isinstance(value, torch.Tensor) and value.dim())


def _static_cache(model: "PreTrainedModel", context: int) -> Any:
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=context)


def _prefill_batch(cache: Any, batch: int, context: int, device: str) -> int:
    """Say how many sequences to prefill: a divisor of the batch, few enough to do it at once."""
    from transformers.cache_utils import StaticLayer

    if not all(isinstance(layer, StaticLayer) for layer in cache.layers):
        return batch  # a state of another kind cannot be repeated in a simple way
    most = max(1, _PREFILL_TOKENS["cpu" if device == "cpu" else "cuda"] // context)
    return max(rows for rows in range(1, min(most, batch) + 1) if batch % rows == 0)


def _keeps_few_logits(model: "PreTrainedModel") -> bool:
    return "logits_to_keep" in signature(model.forward).parameters
