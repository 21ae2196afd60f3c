"""run(): convert, uptrain, evaluate and report from one recipe; picks up where it stopped."""

import hashlib
import json
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from uptrain.checkpoint.card import model_card
from uptrain.checkpoint.files import MODEL_CARD, RECORD, read_json
from uptrain.checkpoint.reader import resolve_source
from uptrain.checkpoint.staging import replace_file
from uptrain.conversion.convert import convert
from uptrain.conversion.options import make_options
from uptrain.errors import CheckpointError, RecipeError
from uptrain.evaluation.quality import check_evaluation, evaluate
from uptrain.report import report
from uptrain.report.runs import RUN, STAGES
from uptrain.training import processes
from uptrain.training.inputs import check_inputs
from uptrain.training.loop import finetune
from uptrain.training.options import ConvertOptions, EvaluateOptions
from uptrain.training.recipe import Recipe
from uptrain.training.setup import make_accelerator

Note = Callable[[str, float], None]


def run(recipe: Recipe, command: str | None = None) -> dict[str, Any]:
    """Do everything that a recipe says; stages that an earlier call finished are not done again.

    Its output folder comes to hold `converted/`, `checkpoints/`, `final/` and `report/`.

    Args:
        recipe: From `load_recipe`; its `source` is the original checkpoint.
        command: The command line, for the report to name.

    Returns:
        `converted`, `final` and `report_path` (paths), `training` (what `finetune` returned),
        `evaluations` by stage and `report` (the content of report.json). Empty in all processes but
        the main one.

    Raises:
        RecipeError: If the recipe has no `convert` or no `evaluate`.
        UptrainError: As `convert`, `finetune`, `evaluate` and `report` do.
    """
    if recipe.convert is None or recipe.evaluate is None:
        missing = "convert" if recipe.convert is None else "evaluate"
        raise RecipeError(
            f"the recipe has no {missing}: section, which `uptrain run` needs; add it"
        )
    evaluation, output = recipe.evaluate, Path(recipe.output)
    converted, folder = output / "converted", output / "report"
    accelerator = make_accelerator(recipe)  # from here on the processes know of each other
    how = recipe.convert
    # What a later stage would refuse should not cost the earlier ones.
    check_inputs(recipe, accelerator)
    keys = {"data", "max_tokens", "sequence_length", "tasks", "tasks_folder"}
    asked = evaluation.model_dump(include=keys)
    processes.in_main(lambda: check_evaluation(recipe.source, **asked))
    note = partial(_note, output / RUN, command)
    processes.in_main(lambda: _convert(recipe.source, converted, how, note))
    training = finetune(recipe.model_copy(update={"source": str(converted)}), resume=True)
    if not training:
        return {}
    note("uptrain", training["seconds"])
    final = Path(training["final"])
    # The converted checkpoint decodes as fast as the final one, which has its shape.
    alike = evaluation.model_copy(update={"decode": False})
    evaluations = {
        name: _evaluate(model, recipe.source, options, folder / f"{name}.json", note)
        for name, model, options in (
            ("converted", converted, alike),
            ("final", final, evaluation),
        )
    }
    for model, found in ((converted, evaluations["converted"]), (final, evaluations["final"])):
        card = model_card(read_json(model / RECORD), found)
        replace_file(model / MODEL_CARD, card.encode())
    return {
        "converted": str(converted),
        "final": str(final),
        "report_path": str(folder / "report.html"),
        "training": training,
        "evaluations": evaluations,
        "report": report([output], folder),
    }


def _note(path: Path, command: str | None, stage: str, seconds: float) -> None:
    """Keep for the report what a stage took: its time, and the most memory until its end.

    Raises:
        CheckpointError: If that cannot be written.
    """
    kept = read_json(path) if path.is_file() else {}
    unit = 1 if sys.platform == "darwin" else 1024
    took = {
        "seconds": seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }
    if torch.cuda.is_available():
        took["peak_device_bytes"] = torch.cuda.max_memory_allocated()
    kept |= {"stages": kept.get("stages", {}) | {stage: took}}
    kept |= {} if command is None else {"command": command}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{path.parent}: cannot be created ({error.strerror}); choose another output"
        ) from error
    replace_file(path, (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode())


def _convert(source: str, target: Path, options: ConvertOptions, note: Note) -> None:
    if not target.exists():
        begun = time.perf_counter()
        convert(source, target, **options.model_dump())
        note("convert", time.perf_counter() - begun)
        return
    record = read_json(target / RECORD)
    settings = make_options(
        **options.model_dump(exclude={"num_key_value_heads", "activation_bytes", "device"})
    )
    wanted = {
        "source": resolve_source(source)[1],
        "num_key_value_heads": options.num_key_value_heads,
        **settings.describe(),
    }
    found = {
        **{key: record.get(key) for key in wanted},
        "source": record["source"]["name"],
        "num_key_value_heads": record["num_key_value_heads"]["target"],
    }
    for key in wanted:
        if found[key] != wanted[key]:
            raise CheckpointError(
                f"{target}: was converted with {key}={found[key]}, the recipe says {wanted[key]}; "
                "remove it or choose another output"
            )


def _evaluate(
    model: Path, source: str, options: EvaluateOptions, kept: Path, note: Note
) -> dict[str, Any]:
    """Evaluate a checkpoint against the original, unless that was done on the same inputs."""
    data = Path(options.data)
    inputs = {
        **options.model_dump(),
        "data": [data.stat().st_size, data.stat().st_mtime_ns] if data.exists() else None,
        "model": hashlib.sha256((model / RECORD).read_bytes()).hexdigest(),
    }
    if kept.is_file():
        known = read_json(kept)
        if known.pop("inputs", None) == inputs:
            return known
    begun = time.perf_counter()
    result = evaluate(str(model), reference=source, **options.model_dump())
    note(f"evaluate {STAGES[kept.stem]}", time.perf_counter() - begun)
    content = json.dumps({**result, "inputs": inputs}, indent=2, ensure_ascii=False) + "\n"
    replace_file(kept, content.encode())
    return result
