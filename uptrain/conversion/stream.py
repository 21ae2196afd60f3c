"""Run a checkpoint's layers one by one: one layer's weights at a time, straight from the files.

The layers are transformers' own modules. What each of them is called with (masks, rotary angles, the
first layer's bias by position) is recorded once by a forward in which no layer computes anything. The
two halves of an encoder-decoder are two streams: layers of the decoder are given what the encoder made.
"""

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers.modeling_outputs import BaseModelOutput

from uptrain.checkpoint.reader import Checkpoint
from uptrain.conversion import weights
from uptrain.conversion.arguments import Arguments, Stop, blank_inputs, check_independent
from uptrain.conversion.stacks import DECODER, ENCODER, halves
from uptrain.errors import UnsupportedFamilyError, one_line
from uptrain.families import meta


class LayerStream:
    """A checkpoint's list of layers, of which one at a time is in memory."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: Mapping[str, Any],
        stack: str,
        device: torch.device,
        code: Path | None = None,
        twin: "LayerStream | None" = None,
    ) -> None:
        """Build the model on the meta device and load what lies before and behind the layers.

        Args:
            checkpoint: Where weights come from.
            config: Content of a `config.json`: the checkpoint's own, or that of a conversion's target.
            stack: Name of the list of layers, such as `model.layers`.
            device: Where layers run.
            code: The checkpoint's folder if its own Python code may be executed.
            twin: The stream of the original, for that of the conversion's target: what lies outside the
                layers is shared with it.
        """
        self.device = device
        self._checkpoint = checkpoint
        self._stack = stack
        self._model = meta.build_on_meta(config, code)
        self._model.eval()
        self._names = meta.names_in_memory(self._model, checkpoint.tensors)
        self._layers: nn.ModuleList = self._model.get_submodule(stack)
        self._lists = halves(self._model)
        self.half: str | None = next(
            (half for half, name in self._lists.items() if name == stack), None
        )
        weights.fill_buffers(self._model, device)
        # The other half's layers are never run.
        inside = tuple(f"{name}." for name in {stack, *self._lists.values()})
        if twin is None:
            outside = [disk for disk, name in self._names.items() if not name.startswith(inside)]
            state = weights.read(checkpoint, self._model, outside)
        else:
            state = {
                name: tensor
                for name, tensor in twin._model.state_dict().items()
                if not name.startswith(inside)
            }
        weights.fill(self._model, state, device)
        weights.check_filled(self._model, checkpoint.name, unused=inside)
        self._model.tie_weights()
        self._model.requires_grad_(False)
        self._arguments: dict[tuple[int, ...], Arguments] = {}
        self._twin = twin
        self._beside: dict[tuple[int, ...], tuple[Any, ...] | None] = {}
        """What the first layer returns beside the hidden states; None if it returns a tensor."""

    @property
    def encoder(self) -> str | None:
        """Name of the encoder's list of layers, if the layers are given what an encoder made."""
        return self._lists[ENCODER] if self.half == DECODER else None

    @property
    def entry(self) -> str:
        """What the layers compute on: `input_ids` for text, `input_features` for speech, say."""
        is_encoder = self.half == ENCODER
        return str(self._model.get_encoder().main_input_name) if is_encoder else "input_ids"

    @property
    def config(self) -> Any:
        """The model's, as transformers reads it."""
        return self._model.config

    @property
    def vocabulary(self) -> int:
        """Size of the logits; 0 if the layers do not end in any that could be told."""
        head = self._model.get_output_embeddings() if self.half != ENCODER else None
        return 0 if head is None else int(head.weight.shape[0])

    def __len__(self) -> int:
        """Count the layers."""
        return len(self._layers)

    def layer(self, index: int, replaced: Mapping[str, torch.Tensor] | None = None) -> nn.Module:
        """Load one layer in float32.

        Args:
            index: Which layer.
            replaced: Tensors to take instead of the checkpoint's, by name in memory, without the
                stack's prefix (`self_attn.k_proj.weight`).
        """
        prefix = f"{self._stack}.{index}."
        replaced = replaced or {}
        disk_names = [
            disk
            for disk, name in self._names.items()
            if name.startswith(prefix) and name.removeprefix(prefix) not in replaced
        ]
        state = weights.read(self._checkpoint, self._model, disk_names)
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()} | dict(
            replaced
        )
        layer = copy.deepcopy(self._layers[index])
        weights.fill(layer, state, self.device)
        weights.check_filled(layer, self._checkpoint.name, prefix)
        return layer.eval()

    def names(self, index: int) -> dict[str, str]:
        """Map one layer's names in memory, without the stack's prefix, to those in the files.

        Tensors that are stacked or split while loading are left out.
        """
        prefix = f"{self._stack}.{index}."
        shared = Counter(self._names.values())
        return {
            name.removeprefix(prefix): disk
            for disk, name in self._names.items()
            if name.startswith(prefix) and shared[name] == 1
        }

    def embed(self, inputs: torch.Tensor) -> torch.Tensor:
        """Compute what enters the first layer.

        Args:
            inputs: [batch, length], int64; of speech, what the processor made of it, float32.

        Returns:
            [batch, length, hidden_size], float32, on the device.
        """
        entering: list[torch.Tensor] = []

        def stop(hidden: torch.Tensor, *_: Any, **__: Any) -> None:
            entering.append(hidden)
            raise Stop

        with torch.no_grad():
            self._forward(inputs, lambda index: stop, self._blank(len(inputs), 1))
        return entering[0]

    def run(
        self,
        layer: nn.Module,
        index: int,
        hidden: torch.Tensor,
        encoded: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run a layer as the model would.

        Args:
            layer: From `layer(index)`, or one like it.
            index: Its place in the stack.
            hidden: [batch, length, hidden_size].
            encoded: [batch, encoder's length, encoder's hidden_size], if there is an encoder.

        Returns:
            [batch, length, hidden_size].
        """
        recorded = self._arguments_of(
            *hidden.shape[:2], *([] if encoded is None else encoded.shape[1:])
        )
        arguments = recorded.of(index, encoded)
        output = layer(hidden, *arguments["args"], **arguments["kwargs"])
        found: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return found

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute the logits from what leaves the last layer.

        Args:
            hidden: [batch, length, hidden_size].

        Returns:
            [batch, length, vocabulary].
        """
        found: torch.Tensor = self._leave(hidden).logits
        return found

    def encoded(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute what an encoder gives to the decoder from what leaves its last layer.

        Args:
            hidden: [batch, length, hidden_size].

        Returns:
            [batch, length, hidden_size].
        """
        with torch.no_grad():
            found: torch.Tensor = self._leave(hidden)[0]
        return found

    def _leave(self, hidden: torch.Tensor) -> Any:
        last = len(self) - 1

        def give(index: int) -> Callable[..., Any]:
            def pass_on(entering: torch.Tensor, *_: Any, **__: Any) -> Any:
                return self._wrap(hidden if index == last else entering)

            return pass_on

        batch, length = hidden.shape[:2]
        inputs, blank = self.blank_inputs(batch, length), self._blank(batch, 1)
        if not self._beside:
            with torch.no_grad():
                self._learn_return(inputs, (batch, length), blank)
        return self._forward(inputs, give, blank)

    def blank_inputs(self, batch: int, length: int) -> torch.Tensor:
        """Make inputs of which only the shape counts, as the function of this name."""
        config = self._model.get_encoder().config if self.half == ENCODER else self.config
        made = blank_inputs(self._checkpoint.name, self.entry, config, batch, length)
        return made.to(self.device)

    def _blank(self, batch: int, length: int) -> torch.Tensor | None:
        """Stands for what an encoder made; None without one."""
        if self.half != DECODER:
            return None
        config = self._model.get_encoder().config
        return torch.zeros(batch, length, config.hidden_size, device=self.device)

    def _arguments_of(self, batch: int, length: int, *encoded: int) -> "Arguments":
        shape = (batch, length, *encoded)
        if shape not in self._arguments:
            recorded: list[dict[str, Any]] = [{} for _ in self._layers]
            blank = torch.zeros(batch, *encoded, device=self.device) if encoded else None

            def record(index: int) -> Callable[..., Any]:
                def keep(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                    recorded[index] = {"args": args, "kwargs": kwargs}
                    return self._wrap(hidden, shape)

                return keep

            tokens = self.blank_inputs(batch, length)
            with torch.no_grad():
                self._learn_return(tokens, shape, blank)
                self._forward(tokens, record, blank)
                if not all(recorded):
                    raise UnsupportedFamilyError(
                        f"{self._checkpoint.name}: text alone does not reach all its layers, so they cannot be run "
                        "one by one; use --method mean without --calibration"
                    )
                if not self._arguments:
                    first, recorded = recorded, [{} for _ in self._layers]
                    other = None if blank is None else blank + 1
                    self._forward(tokens + 1, record, other)
                    name = self._checkpoint.name
                    check_independent(name, Arguments(first, blank), Arguments(recorded, other))
                    blank = other
            self._arguments[shape] = Arguments(recorded, blank)
        return self._arguments[shape]

    def _learn_return(
        self, inputs: torch.Tensor, shape: tuple[int, ...], encoded: torch.Tensor | None
    ) -> None:
        """See from the first layer what layers return beside hidden states, which may be for the next."""
        if self._twin is not None:
            self._twin._learn_return(inputs, shape, encoded)
            self._beside = self._twin._beside
        has_tensors = any(isinstance(each, torch.Tensor) for each in tree_leaves(self._beside))
        if shape in self._beside or (self._beside and not has_tensors):
            return
        first = self.layer(0)

        def call(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            output = first(hidden, *args, **kwargs)
            self._beside[shape] = output[1:] if isinstance(output, tuple) else None
            raise Stop

        self._forward(inputs, lambda index: call, encoded)

    def _wrap(self, hidden: torch.Tensor, shape: tuple[int, ...] = ()) -> Any:
        """Return hidden states as a layer does."""
        if not self._beside:
            return hidden
        any_shape = next(iter(self._beside.values()))
        beside = self._beside.get(shape, any_shape)
        return hidden if beside is None else (hidden, *beside)

    def _forward(
        self,
        inputs: torch.Tensor,
        replacement: Callable[[int], Callable[..., Any]],
        encoded: torch.Tensor | None = None,
    ) -> Any:
        """Run the model, or its encoder alone, with every layer's forward replaced."""
        for index, layer in enumerate(self._layers):
            layer.forward = replacement(index)
        inputs = inputs.to(self.device)
        try:
            if self.half == ENCODER:
                return self._model.get_encoder()(**{self.entry: inputs})
            if encoded is not None:
                made = BaseModelOutput(last_hidden_state=encoded)
                return self._model(decoder_input_ids=inputs, encoder_outputs=made, use_cache=False)
            return self._model(input_ids=inputs, use_cache=False)
        except Stop:
            return None
        except ValueError as error:  # what transformers raises if an input is missing
            raise UnsupportedFamilyError(
                f"{self._checkpoint.name}: cannot be run on text alone ({one_line(error)}); use --method mean "
                "without --calibration"
            ) from error
        finally:
            for layer in self._layers:
                del layer.forward
