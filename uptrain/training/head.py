"""A language model in two parts: the trunk gives hidden states, the head makes logits of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from uptrain.errors import UnsupportedFamilyError

_PROBE_TOKENS = 2


@dataclass(frozen=True)
class Split:
    """Where a model's trunk ends; the same for every copy of the model."""

    trunk: str
    """Name of the module that gives the last hidden states."""
    output_type: type
    """What that module returns them in."""
    parameters: tuple[str, ...]
    """Names of the parameters that the logits are made with, from hidden states on."""
    vocabulary: int
    """Size of the logits."""


class SplitModel:
    """A model whose head can be run on some of the tokens at a time.

    Both parts are run by the model's own forward, with the other part stood in for: whatever a family
    does around its head (a tie, a bias, a scale, a soft cap) is done here too.
    """

    def __init__(self, model: Any, split: Split) -> None:
        """Take a model apart.

        Args:
            model: A causal language model of transformers.
            split: From `find_split`, of this model or one like it.
        """
        self.model, self.split = model, split

    def head_parameters(self) -> list[nn.Parameter]:
        """Give the trained parameters that the head works with, as they are now."""
        found = [self.model.get_parameter(name) for name in self.split.parameters]
        return [parameter for parameter in found if parameter.requires_grad]

    def hidden(self, **inputs: Any) -> Tensor:
        """Run the trunk: [B, L, hidden_size] for inputs of the model's forward."""
        found: list[Tensor] = []
        hook = self.model.get_submodule(self.split.trunk).register_forward_hook(
            lambda module, _, output: found.append(output.last_hidden_state)
        )
        try:
            # Something must pass for logits; their last dimension is the one that is large.
            with _forward(self.model.get_output_embeddings(), lambda hidden: hidden[..., :1]):
                self.model(**inputs, use_cache=False)
        finally:
            hook.remove()
        return found[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Run the head: [B, L, vocabulary] from hidden states [B, L, hidden_size]."""
        output = self.split.output_type(last_hidden_state=hidden)
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        with _forward(self.model.get_submodule(self.split.trunk), lambda *_, **__: output):
            result: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return result


def check_head(model: Any) -> None:
    """Refuse a model that gives no logits.

    Raises:
        UnsupportedFamilyError: If it has no output embeddings.
    """
    if model.get_output_embeddings() is None:
        raise _refusal(model, "has no output embeddings")


def find_split(model: Any) -> Split:
    """See on one call of a model where its trunk ends.

    Args:
        model: A causal language model of transformers with its weights, in eval mode.

    Raises:
        UnsupportedFamilyError: If its logits are not made of its trunk's hidden states alone.
    """
    check_head(model)
    names = {module: name for name, module in model.named_modules() if name}
    tokens = torch.zeros(1, _PROBE_TOKENS, dtype=torch.int64, device=model.device)
    with torch.no_grad(), _outermost_calls(names) as calls:
        expected = model(input_ids=tokens, use_cache=False).logits
    # The largest of the modules that the model itself calls.
    trunk, output = max(calls, key=lambda call: sum(p.numel() for p in call[0].parameters()))
    if not hasattr(output, "last_hidden_state"):
        raise _refusal(model, "has no trunk and head that can be told apart")
    hidden = output.last_hidden_state
    split = Split(names[trunk], type(output), (), int(expected.shape[-1]))
    with torch.no_grad():
        if not torch.equal(SplitModel(model, split).logits(hidden), expected):
            raise _refusal(model, "makes its logits of more than its last hidden states")
    return Split(
        split.trunk, split.output_type, _head_names(model, split, hidden), split.vocabulary
    )


def _head_names(model: Any, split: Split, hidden: Tensor) -> tuple[str, ...]:
    named = [(n, p) for n, p in model.named_parameters() if p.is_floating_point()]
    trained = [p.requires_grad for _, p in named]
    try:
        for _, parameter in named:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            total = SplitModel(model, split).logits(hidden).float().sum()
        found = torch.autograd.grad(total, [p for _, p in named], allow_unused=True)
    finally:
        for (_, parameter), was in zip(named, trained, strict=True):
            parameter.requires_grad_(was)
    return tuple(
        name for (name, _), gradient in zip(named, found, strict=True) if gradient is not None
    )


@contextmanager
def _outermost_calls(names: dict[nn.Module, str]) -> Iterator[list[tuple[nn.Module, Any]]]:
    """Collect the calls of modules that no other of them makes, with what they return."""
    calls: list[tuple[nn.Module, Any]] = []
    depth = 0

    def enter(*_: Any) -> None:
        nonlocal depth
        depth += 1

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        nonlocal depth
        depth -= 1
        if depth == 0:
            calls.append((module, output))

    hooks = [module.register_forward_pre_hook(enter) for module in names]
    hooks += [module.register_forward_hook(leave) for module in names]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _forward(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Let `function` stand in for a module's forward."""
    module.forward = function
    try:
        yield
    finally:
        del module.forward


def _refusal(model: Any, finding: str) -> UnsupportedFamilyError:
    return UnsupportedFamilyError(
        f"{type(model).__name__} {finding}; this family cannot be trained"
    )
