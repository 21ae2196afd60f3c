"""Run a checkpoint's decoder layer by layer: one layer's weights at a time, straight from the files.

The layers are transformers' own modules. What each of them is called with (masks, rotary angles) is
recorded once by a forward in which no layer computes anything.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from uptrain.checkpoint.reader import Checkpoint
from uptrain.errors import CheckpointError, UnsupportedFamilyError, one_line
from uptrain.families import meta


class _Stop(Exception):
    """Ends a forward once what was wanted of it is known."""


class LayerStream:
    """The decoder of a checkpoint, of which one layer at a time is in memory."""

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
        _fill_buffers(self._model, device)
        if twin is None:
            outside = [
                disk for disk, name in self._names.items() if not name.startswith(f"{stack}.")
            ]
            state = self._read(outside)
        else:
            state = {
                name: tensor
                for name, tensor in twin._model.state_dict().items()
                if not name.startswith(f"{stack}.")
            }
        self._fill(self._model, state, prefix="")
        self._model.tie_weights()
        self._model.requires_grad_(False)
        self._arguments: dict[tuple[int, int], list[dict[str, Any]]] = {}
        self._twin = twin
        self._returned: int | None = None
        """Length of the tuple that a layer returns; 0 if it returns a tensor."""

    @property
    def vocabulary(self) -> int:
        """Size of the logits."""
        return int(self._model.get_output_embeddings().weight.shape[0])

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
        state = self._read(
            disk
            for disk, name in self._names.items()
            if name.startswith(prefix) and name.removeprefix(prefix) not in replaced
        )
        state |= {f"{prefix}{name}": tensor for name, tensor in replaced.items()}
        layer = copy.deepcopy(self._layers[index])
        self._fill(layer, state, prefix)
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

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Compute what enters the first layer.

        Args:
            tokens: [batch, length], int64.

        Returns:
            [batch, length, hidden_size], float32, on the device.
        """
        entering: list[torch.Tensor] = []

        def stop(hidden: torch.Tensor, *_: Any, **__: Any) -> None:
            entering.append(hidden)
            raise _Stop

        with torch.no_grad():
            self._forward(tokens, lambda index: stop)
        return entering[0]

    def run(self, layer: nn.Module, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Run a layer as the model would.

        Args:
            layer: From `layer(index)`, or one like it.
            index: Its place in the stack.
            hidden: [batch, length, hidden_size].

        Returns:
            [batch, length, hidden_size].
        """
        arguments = self._arguments_of(hidden.shape[0], hidden.shape[1])[index]
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
        last = len(self) - 1

        def give(index: int) -> Callable[..., Any]:
            def pass_on(entering: torch.Tensor, *_: Any, **__: Any) -> Any:
                return self._wrap(hidden if index == last else entering)

            return pass_on

        tokens = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device)
        found: torch.Tensor = self._forward(tokens, give).logits
        return found

    def _arguments_of(self, batch: int, length: int) -> list[dict[str, Any]]:
        if (batch, length) not in self._arguments:
            recorded: list[dict[str, Any]] = [{} for _ in self._layers]

            def record(index: int) -> Callable[..., Any]:
                def keep(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                    recorded[index] = {"args": args, "kwargs": kwargs}
                    return self._wrap(hidden)

                return keep

            tokens = torch.zeros(batch, length, dtype=torch.long, device=self.device)
            with torch.no_grad():
                self._learn_return(tokens)
                self._forward(tokens, record)
                if not all(recorded):
                    raise UnsupportedFamilyError(
                        f"{self._checkpoint.name}: text alone does not reach all its layers, so they cannot be run "
                        "one by one; use --method mean without --calibration"
                    )
                if not self._arguments:
                    first, recorded = recorded, [{} for _ in self._layers]
                    self._forward(tokens + 1, record)
                    self._check_independent(first, recorded)
            self._arguments[batch, length] = recorded
        return self._arguments[batch, length]

    def _check_independent(self, first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
        """Refuse layers that are given something else than the hidden states for another text."""
        for one, other in zip(first, second, strict=True):
            pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
            if any(isinstance(a, torch.Tensor) and not torch.equal(a, b) for a, b in pairs):
                raise UnsupportedFamilyError(
                    f"{self._checkpoint.name}: its layers are given more of the text than hidden states, so they "
                    "cannot be run one by one; use --method mean without --calibration"
                )

    def _learn_return(self, tokens: torch.Tensor) -> None:
        """See from the first layer whether layers return a tensor or a tuple."""
        if self._twin is not None:
            self._twin._learn_return(tokens)
            self._returned = self._twin._returned
        if self._returned is not None:
            return
        first = self.layer(0)

        def call(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            output = first(hidden, *args, **kwargs)
            self._returned = len(output) if isinstance(output, tuple) else 0
            raise _Stop

        self._forward(tokens, lambda index: call)

    def _wrap(self, hidden: torch.Tensor) -> Any:
        return (hidden, *[None] * (self._returned - 1)) if self._returned else hidden

    def _forward(
        self, tokens: torch.Tensor, replacement: Callable[[int], Callable[..., Any]]
    ) -> Any:
        """Run the model with every layer's forward replaced."""
        for index, layer in enumerate(self._layers):
            layer.forward = replacement(index)
        try:
            return self._model(input_ids=tokens.to(self.device), use_cache=False)
        except _Stop:
            return None
        except ValueError as error:  # what transformers raises if an input is missing
            raise UnsupportedFamilyError(
                f"{self._checkpoint.name}: cannot be run on text alone ({one_line(error)}); use --method mean "
                "without --calibration"
            ) from error
        finally:
            for layer in self._layers:
                del layer.forward

    def _read(self, disk_names: Iterable[str]) -> dict[str, torch.Tensor]:
        tensors = {disk: self._checkpoint.read(disk) for disk in disk_names}
        for disk, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise CheckpointError(
                    f"{self._checkpoint.folder}: tensor {disk} has NaN or infinite values; the checkpoint is "
                    "damaged, fetch it again"
                )
        return meta.load_into_memory(self._model, tensors)

    def _fill(self, module: nn.Module, state: Mapping[str, torch.Tensor], prefix: str) -> None:
        """Put float32 tensors in the place of a module's empty ones."""
        converted = {
            name.removeprefix(prefix): tensor.to(self.device, torch.float32)
            if tensor.is_floating_point()
            else tensor.to(self.device)
            for name, tensor in state.items()
        }
        module.load_state_dict(converted, strict=False, assign=True)
        if prefix and (missing := [n for n, p in module.named_parameters() if p.is_meta]):
            raise UnsupportedFamilyError(
                f"{self._checkpoint.name}: tensor {prefix}{missing[0]} is not in the files under its own name, "
                "so its layers cannot be run one by one; use --method mean without --calibration"
            )
        buffers = {prefix + n: b for n, b in module.named_buffers()}
        inside = f"{self._stack}." if not prefix else " "
        unset = [
            n for n, b in buffers.items() if not n.startswith(inside) and bool(b.isnan().any())
        ]
        if unset:
            raise UnsupportedFamilyError(
                f"{self._checkpoint.name}: buffer {unset[0]} is neither in the files nor computed by "
                "transformers, so its layers cannot be run one by one; use --method mean without --calibration"
            )


def _fill_buffers(model: Any, device: torch.device) -> None:
    """Let transformers compute the buffers that no file holds (rotary frequencies, scales).

    Before weights are loaded: initialising a module may draw its weights too.
    """
    for module in model.modules():
        empty = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in empty:
            old = getattr(module, name)
            unset = float("nan") if old.is_floating_point() else 0
            setattr(module, name, torch.full_like(old, unset, device=device))
    _initialise(model, model)


def _initialise(owner: Any, module: nn.Module) -> None:
    """Let the innermost model around each module initialise it, as transformers does."""
    if isinstance(module, PreTrainedModel):
        owner = module
    for child in module.children():
        _initialise(owner, child)
    if any(True for _ in module.buffers(recurse=False)) or module is owner:
        owner._init_weights(module)
