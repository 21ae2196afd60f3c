"""A model around its layers: what lies before and behind them, and what each of them is called with.

What layers are called with (masks, rotary angles, the first layer's bias by position) is recorded by a
forward in which no layer computes anything.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.modeling_outputs import BaseModelOutput

from uptrain.conversion.arguments import Arguments, Stop, blank_inputs, differ, is_known
from uptrain.conversion.stacks import DECODER, ENCODER
from uptrain.errors import UnsupportedFamilyError, one_line

_BESIDE = "cross_attention_states"
"""Under this name mllama takes what some of its layers attend to beside the text."""
_WAY_OUT = "so they cannot be run one by one; use --method mean without --calibration"


class Frame:
    """A transformers model of which one list of layers is run from outside."""

    def __init__(
        self,
        name: str,
        model: Any,
        layers: nn.ModuleList,
        half: str | None,
        device: torch.device,
        first: Callable[[], nn.Module],
        twin: "Frame | None" = None,
    ) -> None:
        """Take a model whose parts outside the layers are filled.

        Args:
            name: Of the checkpoint and its family, for messages.
            model: The model.
            layers: Its layers, empty.
            half: `ENCODER` or `DECODER` if they are one of two lists.
            device: Where it runs.
            first: Loads the first layer.
            twin: Of the original, for the conversion's target.
        """
        self.name, self.model, self.half, self.device = name, model, half, device
        self._layers, self._first, self._twin = layers, first, twin
        self._arguments: dict[tuple[int, ...], Arguments] = {}
        self._reached: list[bool] = []
        self.by_text = False
        """Whether layers are given more of the text than hidden states, embeddings of their own say, or an
        encoder's output in another form."""
        self._beside: dict[tuple[int, ...], tuple[Any, ...] | None] = {}
        """What the first layer returns beside the hidden states; None if it returns a tensor."""

    @property
    def entry(self) -> str:
        """What the layers compute on: `input_ids` for text, `input_features` for speech, say."""
        is_encoder = self.half == ENCODER
        return str(self.model.get_encoder().main_input_name) if is_encoder else "input_ids"

    def reaches(self, index: int) -> bool:
        """Say whether text alone reaches a layer; those that attend to images are left out then."""
        self._learn()
        return self._reached[index]

    def embed(self, inputs: Tensor) -> Tensor:
        """Compute what enters the first layer.

        Args:
            inputs: [batch, length], int64; of speech, what the processor made of it, float32.

        Returns:
            [batch, length, hidden_size], float32, on the device.

        Raises:
            UnsupportedFamilyError: If it is of another form.
        """
        entering: list[Tensor] = []

        def stop(hidden: Tensor, *_: Any, **__: Any) -> None:
            entering.append(hidden)
            raise Stop

        with torch.no_grad():
            self._forward(inputs, lambda index: stop, self._blank(len(inputs), 1))
        if entering[0].shape[:-2] != (len(inputs),):
            raise UnsupportedFamilyError(
                f"{self.name}: its layers pass on {entering[0].shape[0]} streams of hidden states, expected "
                f"one, {_WAY_OUT}"
            )
        return entering[0]

    def leave(self, hidden: Tensor) -> Any:
        """Compute what the model returns of what leaves the last layer.

        Args:
            hidden: [batch, length, hidden_size].
        """
        batch, length = hidden.shape[:2]
        inputs, blank = self.blank_inputs(batch, length), self._blank(batch, 1)
        if not self._beside:
            with torch.no_grad():
                self._learn_return(inputs, (batch, length), blank)
        return self._forward(inputs, self._give(hidden), blank)

    def _give(self, hidden: Tensor) -> Callable[[int], Callable[..., Any]]:
        """Let every layer return the same hidden states."""
        return lambda index: lambda *_, **__: self._wrap(hidden)

    def arguments(
        self, batch: int, length: int, encoded: Tensor | None = None, inputs: Tensor | None = None
    ) -> Arguments:
        """Say what layers are called with beside hidden states.

        Args:
            batch: Sequences.
            length: Tokens of each.
            encoded: [batch, encoder's length, width], what an encoder made, if there is one.
            inputs: [batch, length], the text itself; it counts if `by_text`.

        Raises:
            UnsupportedFamilyError: If that depends on what earlier layers computed.
        """
        self._learn()
        if self.by_text:
            given = self.blank_inputs(batch, length) if inputs is None else inputs
            return self._record(given, encoded)
        shape = (batch, length, *(() if encoded is None else encoded.shape[1:]))
        if shape not in self._arguments:
            blank = None if encoded is None else torch.zeros_like(encoded)
            self._arguments[shape] = self._record(self.blank_inputs(batch, length), blank)
        return self._arguments[shape]

    def blank_inputs(self, batch: int, length: int) -> Tensor:
        """Make inputs of which only the shape counts, as the function of this name."""
        config = self.model.get_encoder().config if self.half == ENCODER else self.model.config
        return blank_inputs(self.name, self.entry, config, batch, length).to(self.device)

    def _blank(self, batch: int, length: int) -> Tensor | None:
        """Stands for what an encoder made; None without one."""
        if self.half != DECODER:
            return None
        return torch.zeros(batch, length, self.encoder_width, device=self.device)

    @property
    def encoder_width(self) -> int:
        """Size of what an encoder gives for each of its positions."""
        return int(self.model.get_encoder().config.get_text_config().hidden_size)

    @property
    def can_be_read(self) -> bool:
        """Whether what the layers compute on is of a known form."""
        config = self.model.get_encoder().config if self.half == ENCODER else self.model.config
        return is_known(self.entry, config)

    @torch.no_grad()
    def _learn(self) -> None:
        """See which layers text reaches, and whether they are given more of it than hidden states."""
        if self._reached:
            return
        if self._twin is not None:
            self._twin._learn()
            self._reached, self.by_text = self._twin._reached, self._twin.by_text
            return
        tokens = self.blank_inputs(1, 2)
        blank = self._blank(1, 2)
        one = self._record(tokens, blank)
        reached = [bool(found) for found in one.by_layer]
        takes_more = _BESIDE in inspect.signature(self.model.forward).parameters
        if not all(reached) and (self.half is not None or not takes_more or not any(reached)):
            raise UnsupportedFamilyError(
                f"{self.name}: text alone does not reach all its layers, {_WAY_OUT}"
            )
        if differ(one, self._record(tokens, blank, moved=1.0)):
            raise UnsupportedFamilyError(
                f"{self.name}: its layers are given more of what earlier layers computed than hidden states, "
                f"{_WAY_OUT}"
            )
        other = None if blank is None else blank + 1
        by_text = differ(one, self._record(tokens + 1, other))
        states = self.embed(tokens)
        left = [self._forward(t, self._give(states), blank) for t in (tokens, tokens + 1)]
        if by_text and not torch.equal(left[0][0], left[1][0]):
            raise UnsupportedFamilyError(
                f"{self.name}: what lies behind its layers is given more of the text than hidden states, "
                f"{_WAY_OUT}"
            )
        self._reached, self.by_text = reached, by_text

    @torch.no_grad()
    def _record(
        self, inputs: Tensor, encoded: Tensor | None = None, moved: float = 0.0
    ) -> Arguments:
        """Record what layers are called with.

        Args:
            inputs: [batch, length].
            encoded: [batch, encoder's length, width], what an encoder made, if there is one.
            moved: What each layer adds to what it passes on.
        """
        length = inputs.shape[1] if self.entry == "input_ids" else self.embed(inputs).shape[1]
        shape = (len(inputs), length, *(() if encoded is None else encoded.shape[1:]))
        recorded: list[dict[str, Any]] = [{} for _ in self._layers]

        def record(index: int) -> Callable[..., Any]:
            def keep(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
                recorded[index] = {"args": args, "kwargs": kwargs}
                if self.by_text and index == len(recorded) - 1:
                    raise Stop
                return self._wrap(hidden + moved, shape)

            return keep

        self._learn_return(inputs, shape, encoded)
        self._forward(inputs, record, encoded)
        return Arguments(recorded, encoded)

    def _learn_return(self, inputs: Tensor, shape: tuple[int, ...], encoded: Tensor | None) -> None:
        """See from the first layer what layers return beside hidden states, which may be for the next."""
        if self._twin is not None:
            self._twin._learn_return(inputs, shape, encoded)
            self._beside = self._twin._beside
        has_tensors = any(isinstance(each, Tensor) for each in tree_leaves(self._beside))
        if shape in self._beside or (self._beside and not has_tensors):
            return
        first = self._first()

        def call(hidden: Tensor, *args: Any, **kwargs: Any) -> None:
            output = first(hidden, *args, **kwargs)
            self._beside[shape] = output[1:] if isinstance(output, tuple) else None
            raise Stop

        self._forward(inputs, lambda index: call, encoded)

    def _wrap(self, hidden: Tensor, shape: tuple[int, ...] = ()) -> Any:
        """Return hidden states as a layer does."""
        if not self._beside:
            return hidden
        any_shape = next(iter(self._beside.values()))
        beside = self._beside.get(shape, any_shape)
        return hidden if beside is None else (hidden, *beside)

    def _forward(
        self,
        inputs: Tensor,
        replacement: Callable[[int], Callable[..., Any]],
        encoded: Tensor | None = None,
    ) -> Any:
        """Run the model, or its encoder alone, with every layer's forward replaced."""
        for index, layer in enumerate(self._layers):
            layer.forward = replacement(index)
        inputs = inputs.to(self.device)
        try:
            if self.half == ENCODER:
                return self.model.get_encoder()(**{self.entry: inputs})
            if self.half == DECODER:
                made = BaseModelOutput(last_hidden_state=encoded)
                made.attention_mask = None  # encoders of speech may return one
                return self.model(decoder_input_ids=inputs, encoder_outputs=made, use_cache=False)
            beside = {} if encoded is None else {_BESIDE: encoded}
            return self.model(input_ids=inputs, use_cache=False, **beside)
        except Stop:
            return None
        except ValueError as error:  # what transformers raises if an input is missing
            raise UnsupportedFamilyError(
                f"{self.name}: cannot be run on text alone ({one_line(error)}); use --method mean "
                "without --calibration"
            ) from error
        finally:
            for layer in self._layers:
                del layer.forward
