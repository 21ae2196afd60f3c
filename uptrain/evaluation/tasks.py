"""Tasks of the lm-evaluation-harness, on models that are loaded already."""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from uptrain.errors import UptrainError, one_line
from uptrain.evaluation.scoring import rows_at_once
from uptrain.loading import context_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MAX_ROWS = 64
_DEFAULT_CONTEXT = 2048


def check_tasks(tasks: Sequence[str], folder: str | os.PathLike[str] | None = None) -> Any:
    """Find tasks by name.

    Args:
        tasks: Names of tasks, groups or tags.
        folder: Where more tasks are, as YAML files.

    Returns:
        The harness's `TaskManager`.

    Raises:
        UptrainError: If the harness is not installed, or has no such task.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UptrainError(
            "tasks need the lm-evaluation-harness, which is not installed; "
            "pip install 'uptrain-gqa[lm-eval]'"
        ) from error
    logging.getLogger("lm_eval").setLevel(
        logging.ERROR
    )  # it remarks on models that are given to it
    manager = TaskManager(include_path=None if folder is None else str(folder))
    for task in tasks:
        if task not in manager.all_tasks:
            raise UptrainError(
                f"{task}: no task of lm-eval {lm_eval.__version__}"
                + (f", and none of {folder}" if folder else "")
                + "; `lm-eval ls tasks` lists them"
            )
    return manager


def run_tasks(
    models: Mapping[str, "PreTrainedModel"], tokenizer: Any, tasks: Sequence[str], manager: Any
) -> dict[str, dict[str, dict[str, float]]]:
    """Measure models on tasks as the harness does by default, with its own seeds.

    Args:
        models: Causal language models in eval mode, by name.
        tokenizer: That of all of them.
        tasks: Names that `check_tasks` found.
        manager: What `check_tasks` returned.

    Returns:
        For each task and metric the value of each model, and its standard error as `NAME_stderr`.

    Raises:
        UptrainError: If a task cannot be run; mostly its data set is not there.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    results: dict[str, dict[str, dict[str, float]]] = {}
    for name, model in models.items():
        context = context_length(model.config) or _DEFAULT_CONTEXT
        rows = rows_at_once(model.config, model.dtype, context, model.device.type)
        wrapped = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=min(rows, _MAX_ROWS),
            max_length=context,
        )
        try:
            found = lm_eval.simple_evaluate(
                wrapped, tasks=list(tasks), task_manager=manager, log_samples=False
            )
        except Exception as error:  # a task may download and run anything
            raise UptrainError(f"tasks {', '.join(tasks)}: {one_line(error)}") from error
        for task, metrics in found["results"].items():
            for key, value in metrics.items():
                metric, _, which = key.partition(",")
                if isinstance(value, int | float) and which:
                    of = metric.removesuffix("_stderr")
                    column = name if metric == of else f"{name}_stderr"
                    label = of if which == "none" else f"{of} ({which})"
                    results.setdefault(task, {}).setdefault(label, {})[column] = float(value)
    return results
