"""Turn a multi-head attention checkpoint into a grouped-query one, and win its quality back."""

from typing import TYPE_CHECKING, Any

from uptrain.families import carried

__version__ = "0.1.0"
__all__ = ["__version__", "convert", "evaluate", "finetune"]

if TYPE_CHECKING:
    from uptrain.conversion.convert import convert
    from uptrain.evaluation.quality import evaluate
    from uptrain.training.loop import finetune


carried.install()


def __getattr__(name: str) -> Any:
    # Imported on first use: torch takes seconds, and `uptrain --help` should not wait for it.
    if name == "convert":
        from uptrain.conversion.convert import convert

        return convert
    if name == "evaluate":
        from uptrain.evaluation.quality import evaluate

        return evaluate
    if name == "finetune":
        from uptrain.training.loop import finetune

        return finetune
    raise AttributeError(f"module 'uptrain' has no attribute {name!r}")
