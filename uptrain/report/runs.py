"""Read what a run left behind: evaluations, records, the training log, times."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from uptrain.checkpoint.files import CONFIG, RECORD, read_json
from uptrain.checkpoint.reader import open_checkpoint
from uptrain.conversion.plan import inspect
from uptrain.errors import UptrainError
from uptrain.evaluation.quality import EVALUATION
from uptrain.evaluation.serving import describe_serving
from uptrain.training.log import read_log

TRAINING_LOG = "train.jsonl"
RUN = "report/run.json"
"""The command line of a run, and what its stages took."""

STAGES = {"original": "original", "converted": "converted", "final": "uptrained"}
_MEASURED_ON = ("tokens", "data", "sequence_length")
_SETTINGS = (
    "teacher", "distillation_weight", "optimizer", "learning_rate", "schedule", "trainable",
)  # fmt: skip
_MAX_POINTS = 1000  # of a curve: a plot shows no more


def read_runs(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Read the results of runs.

    Args:
        folders: Output folders of `uptrain run` or `finetune`, or folders with an
            `evaluation.json`.

    Returns:
        For each run its `name` (each another), `evaluations` by stage (original, converted,
        uptrained, evaluated), `conversion`, `layers`, `training`, `serving` (as `describe_serving`
        gives it for the number of KV heads that it has), `command`, `stages` and `versions`; None or
        empty for what is not there.

    Raises:
        UptrainError: If a folder holds no result, or a result is malformed.
    """
    runs = [_read_run(folder) for folder in folders]
    _name_apart(runs, folders)
    return runs


def _read_run(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise UptrainError(f"{folder}: {found}; expected the output folder of a run")
    evaluations: dict[str, Any] = {}
    files = {stage: folder / "report" / f"{name}.json" for name, stage in STAGES.items()}
    for stage, path in (files | {"evaluated": folder / EVALUATION}).items():
        if (evaluation := _read_evaluation(path)) is not None:
            evaluations[stage] = evaluation
    if "original" not in evaluations:
        for evaluation in evaluations.values():
            if "reference_loss" in evaluation:
                evaluations = {"original": _of_reference(evaluation), **evaluations}
                break
    records = [
        read_json(path)
        for stage in ("converted", "final", ".")
        if (path := folder / stage / RECORD).is_file()
    ]
    conversion = next((_pick_conversion(r) for r in records if _is_converted(r)), None)
    uptrained = [record["uptraining"] for record in records if _is_uptrained(record)]
    training = _read_training(folder / TRAINING_LOG, uptrained[-1] if uptrained else {})
    layers: list[Any] = next((r["layers"] for r in records if r.get("layers")), [])
    if not evaluations and training is None and not layers:
        raise UptrainError(
            f"{folder}: holds no result; expected report/original.json, {EVALUATION} or "
            f"{TRAINING_LOG}, as `uptrain run`, `evaluate --output` and `finetune` leave them"
        )
    _add_increases(evaluations)
    kept = read_json(folder / RUN) if (folder / RUN).is_file() else {}
    return {
        "name": folder.resolve().name,
        "evaluations": evaluations,
        "conversion": conversion,
        "layers": layers,
        "training": training,
        "serving": _read_serving(folder),
        "command": kept.get("command"),
        "stages": kept.get("stages", {}),
        "versions": next((r["versions"] for r in records if "versions" in r), None),
    }


def _read_evaluation(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    evaluation = read_json(path)
    for key in ("loss", "tokens", "num_key_value_heads", "kv_cache_bytes_per_token"):
        if not isinstance(evaluation.get(key), int | float):
            raise UptrainError(f"{path}: has no {key}; expected what `uptrain evaluate` writes")
    return evaluation


def _read_serving(folder: Path) -> dict[str, Any] | None:
    """Ask of the checkpoint that came out how it can be served."""
    for path in (folder / "final", folder / "converted", folder):
        if not (path / CONFIG).is_file():
            continue
        try:
            checkpoint = open_checkpoint(path)
            found = describe_serving(inspect(checkpoint), checkpoint)
        except UptrainError:  # what was trained cannot be converted: there is nothing to say
            return None
        heads = found["num_key_value_heads"]
        own = next(each for each in found.pop("targets") if each["num_key_value_heads"] == heads)
        return {**found, "model": path.name, **own}
    return None


def _of_reference(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Take out of an evaluation what it says about its reference."""
    shared = {key: evaluation[key] for key in _MEASURED_ON if key in evaluation}
    own = {
        key.removeprefix("reference_"): value
        for key, value in evaluation.items()
        if key.startswith("reference_")
    }
    return {"model": evaluation.get("reference"), **own, **shared}


def _add_increases(evaluations: dict[str, Any]) -> None:
    """Fill in how far each stage is from the original, where both saw the same text."""
    original = evaluations.get("original")
    if original is None:
        return
    for evaluation in evaluations.values():
        if all(evaluation.get(key) == original.get(key) for key in _MEASURED_ON):
            evaluation.setdefault("loss_increase", evaluation["loss"] - original["loss"])


def _is_converted(record: Mapping[str, Any]) -> bool:
    return str(record.get("method", "none")) != "none"


def _is_uptrained(record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("uptraining"), dict)


def _pick_conversion(record: Mapping[str, Any]) -> dict[str, Any]:
    keys = (
        "model_type",
        "num_attention_heads",
        "num_key_value_heads",
        "method",
        "grouping",
        "seed",
    )
    more = ("calibration", "calibration_used", "rewrite", "architecture", "encoder")
    picked = {key: record[key] for key in (*keys, *more) if key in record}
    source = record.get("source")
    return {"source": source.get("name") if isinstance(source, dict) else source, **picked}


def _read_training(path: Path, uptraining: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read a log, and from the record of what was exported how it was trained.

    `loss` is cross-entropy here, whatever was minimised.
    """
    if not path.is_file():
        return None
    # A step that was repeated after a restart counts once, as it went the last time.
    rows = read_log(path)
    steps = {row["step"]: row for row in rows if {"loss", "tokens"} <= row.keys()}
    if not steps:
        return None
    ordered = [steps[step] for step in sorted(steps)]
    for row in ordered:
        row["loss"] = row.get("cross_entropy", row["loss"])
    last = ordered[-1]
    seconds = last.get("seconds")
    exported = uptraining.get("exported_step", last["step"])
    tokens_at = {step: row["tokens"] for step, row in steps.items()} | {0: 0}
    measured: dict[str, float | None] = {}
    curves = {key: _thin(_points(ordered, key, tokens_at)) for key in ("loss", "kl")}
    for key in ("validation_loss", "validation_kl"):
        curves[key] = _points(rows, key, tokens_at)
        by_step = {row["step"]: row[key] for row in rows if key in row}
        measured |= {f"initial_{key}": by_step.get(0), key: by_step.get(exported)}
    curves["spikes"] = _points([row for row in ordered if row.get("spike")], "loss", tokens_at)
    return {
        **{key: uptraining.get(key) for key in _SETTINGS},
        **_share(uptraining, last["tokens"]),
        "steps": last["step"],
        "exported_step": exported,
        "exported_tokens": tokens_at.get(exported),
        "tokens": last["tokens"],
        "seconds": seconds,
        "tokens_per_second": last["tokens"] / seconds if seconds else None,
        "loss": last["loss"],
        **measured,
        "spikes": len(curves["spikes"]),
        "clipped_steps": sum(1 for row in ordered if row.get("clipped")),
        "curves": curves,
    }


def _points(
    rows: Sequence[Mapping[str, Any]], key: str, tokens_at: Mapping[int, float]
) -> list[list[float]]:
    """Give a value over tokens, the last one that each step has."""
    values = {row["step"]: row[key] for row in rows if key in row and row["step"] in tokens_at}
    return [[tokens_at[step], values[step]] for step in sorted(values)]


def _thin(points: list[list[float]]) -> list[list[float]]:
    stride = -(-len(points) // _MAX_POINTS)
    return points[::stride] if stride > 1 else points


def _share(uptraining: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    if pretraining := uptraining.get("pretraining_tokens"):
        return {"alpha": tokens / pretraining, "pretraining_tokens": pretraining}
    return {"alpha": uptraining["alpha"]} if uptraining.get("alpha") else {}


def _name_apart(runs: list[dict[str, Any]], folders: Sequence[Path]) -> None:
    """Put the parent's name before names that occur twice, then a number."""
    for name in {run["name"] for run in runs}:
        same = [i for i, run in enumerate(runs) if run["name"] == name]
        longer = [f"{folders[i].resolve().parent.name}/{name}" for i in same]
        if len(same) > 1:
            for number, i in enumerate(same, 1):
                is_clear = len(set(longer)) == len(same)
                runs[i]["name"] = longer[number - 1] if is_clear else f"{name} ({number})"
