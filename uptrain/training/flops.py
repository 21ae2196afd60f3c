"""How much a token is multiplied in training, counted on the meta device."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from uptrain.families import registry
from uptrain.loading import decoder_layers
from uptrain.training.trainable import attention_blocks


class Work:
    """The work of one token in a model, in floating-point operations.

    A multiplication with an addition are two. What is linear in the model's width (norms, activation
    functions) is not counted.
    """

    def __init__(
        self, model: Any, config: Mapping[str, Any], length: int, code: Path | None = None
    ) -> None:
        """Count.

        Args:
            model: On any device.
            config: The content of its `config.json`.
            length: Tokens of a sequence; a token attends to half of it on average.
            code: The checkpoint's folder if its own Python code may be executed.
        """
        parsed = registry.parse_config(config, code).get_text_config(decoder=True)
        self._model = model
        self._experts: int | None = getattr(parsed, "num_experts_per_tok", None)
        heads = registry.read_heads(config, code).num_attention_heads
        size: int = getattr(parsed, "head_dim", None) or parsed.hidden_size // heads
        blocks = len(attention_blocks(model, config, code))
        self._scores = 2 * length * heads * size * blocks

    @property
    def forward(self) -> float:
        """Of a forward: two for every parameter that the token meets, and attention's scores."""
        return 2 * self._met(self._model) + self._scores

    def training(self, trained: Collection[str], checkpointing: bool) -> float:
        """Of a forward and a backward.

        Args:
            trained: Names of the parameters that get a gradient.
            checkpointing: Whether the layers' forward is done twice.
        """
        ids = {id(each) for name, each in self._model.named_parameters() if name in trained}
        matrices = matrices_of(self._model, self._experts)
        learning = sum(each.numel() * used for each, used in matrices if id(each) in ids)
        within = sum(self._met(layer) for layer in decoder_layers(self._model))
        again = 2 * within + self._scores if checkpointing else 0.0
        passed_on = self.forward + self._scores
        return self.forward + again + passed_on + 2 * learning

    def _met(self, module: nn.Module) -> float:
        return sum(each.numel() * used for each, used in matrices_of(module, self._experts))

    def numbers_at_matrices(self, layer: nn.Module) -> int:
        """Count the numbers of a token that enter or leave the matrices of a layer."""
        return round(
            sum(
                sum(each.shape[-2:]) * (used * each.shape[0] if each.ndim == 3 else 1)
                for each, used in matrices_of(layer, self._experts)
            )
        )


def matrices_of(
    module: nn.Module, experts: int | None = None
) -> Iterable[tuple[nn.Parameter, float]]:
    """Give the matrices that tokens are multiplied with, and the fraction of each that one meets.

    Args:
        module: A model or a part of one; experts are stacked in one tensor, as transformers does.
        experts: How many of them a token goes through; all if not given.
    """
    for owner in module.modules():
        for each in owner.parameters(recurse=False):
            if each.ndim == 2 and not isinstance(owner, nn.Embedding):
                yield each, 1.0
            elif each.ndim == 3 and not isinstance(owner, nn.Conv1d):
                yield each, min(1.0, experts / each.shape[0]) if experts else 1.0
