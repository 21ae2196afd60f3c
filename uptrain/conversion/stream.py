"""Run a checkpoint's layers one by one: one layer's weights at a time, straight from the files.

The layers are transformers' own modules, called as the model around them would. The two halves of an
encoder-decoder are two streams: layers of the decoder are given what the encoder made. A part that
several layers share (zamba) is in the files once, and comes with each of them.
"""

import copy
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from uptrain.checkpoint.reader import Checkpoint
from uptrain.checkpoint.tensors import DTYPES
from uptrain.conversion import weights
from uptrain.conversion.frame import Frame
from uptrain.conversion.stacks import DECODER, ENCODER, halves
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
        self._otherwise = meta.stored_otherwise(self._model, self._names)
        self._shared = _shared_names(self._model, f"{stack}.")
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
        self._frame: Frame = Frame(
            f"{checkpoint.name}: {config['model_type']}",
            self._model,
            self._layers,
            self.half,
            device,
            lambda: self.layer(0),
            None if twin is None else twin._frame,
        )

    @property
    def encoder(self) -> str | None:
        """Name of the encoder's list of layers, if the layers are given what an encoder made."""
        return self._lists[ENCODER] if self.half == DECODER else None

    @property
    def config(self) -> Any:
        """The model's, as transformers reads it."""
        return self._model.config

    @property
    def vocabulary(self) -> int:
        """Size of the logits; 0 if the layers do not end in any that could be told."""
        head = self._model.get_output_embeddings() if self.half != ENCODER else None
        return 0 if head is None else int(head.weight.shape[0])

    @property
    def last(self) -> int:
        """The last layer that text reaches."""
        return max(index for index in range(len(self)) if self.reaches(index))

    def __len__(self) -> int:
        """Count the layers."""
        return len(self._layers)

    def layer(self, index: int, replaced: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Load one layer in float32.

        Args:
            index: Which layer.
            replaced: Tensors to take instead of the checkpoint's, by name in memory, without the
                stack's prefix (`self_attn.k_proj.weight`).
        """
        prefix = f"{self._stack}.{index}."
        replaced = replaced or {}
        names = {first: name for name, first in self.shared(index).items() if name not in replaced}
        own = (n for n in self._names.values() if n.startswith(prefix))
        names |= {n: local for n in own if (local := n.removeprefix(prefix)) not in replaced}
        disk_names = [disk for disk, name in self._names.items() if name in names]
        read = weights.read(self._checkpoint, self._model, disk_names)
        state = {names.get(n, n.removeprefix(prefix)): tensor for n, tensor in read.items()}
        state |= replaced
        layer = copy.deepcopy(self._layers[index])
        weights.fill(layer, state, self.device)
        weights.check_filled(layer, self._checkpoint.name, prefix)
        return layer.eval()

    def shared(self, index: int) -> dict[str, str]:
        """Map the names of what a layer shares with others, without its prefix, to its first full name."""
        prefix = f"{self._stack}.{index}."
        found = self._shared.items()
        return {n.removeprefix(prefix): first for n, first in found if n.startswith(prefix)}

    def names(self, index: int) -> dict[str, str]:
        """Map one layer's names in memory, without the stack's prefix, to those in the files.

        Tensors that are stacked, split or turned while loading are left out.
        """
        prefix = f"{self._stack}.{index}."
        shared = Counter(self._names.values())
        return {
            name.removeprefix(prefix): disk
            for disk, name in self._names.items()
            if name.startswith(prefix) and shared[name] == 1 and disk not in self._otherwise
        }

    def to_files(
        self, index: int, state: Mapping[str, Tensor], changed: Collection[str]
    ) -> dict[str, Tensor]:
        """Bring what was changed of a layer into the form of the files, rounded to their dtype.

        Args:
            index: Which layer.
            state: All of its tensors by name in memory, without the stack's prefix. The changed ones
                are rounded, too.
            changed: Names of those that were changed; what has no place of its own is left out.

        Returns:
            By name in the files.
        """
        prefix, known = f"{self._stack}.{index}.", self.names(index)
        files = {known[name]: state[name] for name in changed if name in known}
        others = set(changed) - known.keys() - self.shared(index).keys()
        modules = {name.rsplit(".", 2)[0] for name in others}
        beside = [n for n in state if n not in known and n.rsplit(".", 2)[0] in modules]
        full = {prefix + name: state[name] for name in beside}
        files |= meta.bring_to_files(self._model, full) if full else {}
        found = {}
        for disk, tensor in files.items():
            found[disk] = tensor.detach().to(DTYPES[self._checkpoint.tensors[disk].dtype])
        for name, tensor in self.from_files(index, found).items():
            state[name].copy_(tensor)
        return {disk: tensor.cpu().contiguous() for disk, tensor in found.items()}

    def from_files(self, index: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bring what `to_files` gave back into memory, by name without the stack's prefix."""
        prefix = f"{self._stack}.{index}."
        loaded = meta.load_into_memory(self._model, tensors)
        return {name.removeprefix(prefix): tensor for name, tensor in loaded.items()}

    def embed(self, inputs: Tensor) -> Tensor:
        """Compute what enters the first layer, as `Frame.embed`."""
        return self._frame.embed(inputs)

    def blank_inputs(self, batch: int, length: int) -> Tensor:
        """Make inputs of which only the shape counts, as the function of this name."""
        return self._frame.blank_inputs(batch, length)

    @property
    def encoder_width(self) -> int:
        """Size of what an encoder gives for each of its positions."""
        return self._frame.encoder_width

    @property
    def can_be_read(self) -> bool:
        """Whether what the layers compute on is of a known form: text, or Whisper's spectra."""
        return self._frame.can_be_read

    def reaches(self, index: int) -> bool:
        """Say whether text alone reaches a layer; those that attend to images are left out then."""
        return self._frame.reaches(index)

    def run(
        self,
        layer: nn.Module,
        index: int,
        hidden: Tensor,
        encoded: Tensor | None = None,
        inputs: Tensor | None = None,
    ) -> Tensor:
        """Run a layer as the model would.

        Args:
            layer: From `layer(index)`, or one like it.
            index: Its place in the stack.
            hidden: [batch, length, hidden_size].
            encoded: [batch, encoder's length, encoder's hidden_size], what the layers attend to beside
                the text: an encoder's output, features of an image.
            inputs: [batch, length], the text, of which some families give more to their layers than
                hidden states.

        Returns:
            [batch, length, hidden_size]; `hidden` itself if the model would leave the layer out.
        """
        recorded = self._frame.arguments(hidden.shape[0], hidden.shape[1], encoded, inputs)
        arguments = recorded.of(index, encoded)
        if not arguments:
            return hidden
        output = layer(hidden, *arguments["args"], **arguments["kwargs"])
        found: Tensor = output[0] if isinstance(output, tuple) else output
        return found

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute the logits from what leaves the last layer.

        Args:
            hidden: [batch, length, hidden_size].

        Returns:
            [batch, length, vocabulary].
        """
        found: Tensor = self._frame.leave(hidden).logits
        return found

    def encoded(self, hidden: Tensor) -> Tensor:
        """Compute what an encoder gives to the decoder from what leaves its last layer.

        Args:
            hidden: [batch, length, hidden_size].

        Returns:
            [batch, length, hidden_size].
        """
        with torch.no_grad():
            found: Tensor = self._frame.leave(hidden)[0]
        return found


def _shared_names(model: nn.Module, prefix: str) -> dict[str, str]:
    """Map each name of a parameter that has several, behind the prefix, to the first of them."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.startswith(prefix):
            names.setdefault(id(parameter), []).append(name)
    return {name: several[0] for several in names.values() for name in several if several[1:]}
