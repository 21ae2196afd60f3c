"""Results of runs, gathered into one JSON file, a Markdown page and plots."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import uptrain
from uptrain.errors import UptrainError
from uptrain.report import plots, text
from uptrain.report.runs import read_runs

__all__ = ["report", "summary_table"]


def report(folders: Sequence[Path], output: Path) -> dict[str, Any]:
    """Gather the results of runs into `report.json`, `report.md` and plots.

    Args:
        folders: Output folders of `uptrain run` or `finetune`, or folders with an
            `evaluation.json`. What a folder lacks, the report leaves out.
        output: Where to write; made if it does not exist.

    Returns:
        The content of `report.json`: `runs`, each with its `verdict`, `evaluations`, `conversion`
        and `training`; the file names of the `plots`; a `note` if there are none.

    Raises:
        UptrainError: If a folder holds no result, a result is malformed, or `output` cannot be
            written.
    """
    runs = read_runs([Path(folder) for folder in folders])
    for run in runs:
        run["verdict"] = text.verdict(run)
    content: dict[str, Any] = {"uptrain_version": uptrain.__version__, "runs": runs}
    try:
        output.mkdir(parents=True, exist_ok=True)
        if plots.can_draw():
            content["plots"] = _draw(runs, output)
        else:
            content |= {"plots": [], "note": plots.HOW_TO_GET_PLOTS}
        as_json = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        _publish(output / "report.json", lambda path: _write_text(path, as_json))
        _publish(output / "report.md", lambda path: _write_text(path, text.markdown(content)))
    except OSError as error:
        raise UptrainError(
            f"{output}: cannot take the report ({error.strerror}); choose another --output"
        ) from error
    return content


def summary_table(content: Mapping[str, Any]) -> str:
    """Lay out the verdict and main figures of a report as plain text for a terminal."""
    runs = content["runs"]
    if len(runs) == 1:
        tables = [table for _, table in text.tables(runs[0])]
        blocks = [runs[0]["verdict"]]
    else:
        tables, blocks = [text.comparison(runs)], []
    blocks += [text.as_text(table) for table in tables if len(table) > 1]
    if content.get("note"):
        blocks.append(content["note"])
    return "\n\n".join(blocks)


def _draw(runs: Sequence[Mapping[str, Any]], output: Path) -> list[str]:
    """Draw what there is to draw; returns the names of the files."""
    drawn = []
    curves = [curve for run in runs if (curve := _curve(run)) is not None]
    if curves:
        _publish(output / "loss.png", lambda path: plots.draw_loss(path, curves))
        drawn.append("loss.png")
    if len(runs) == 1 and runs[0]["layers"]:
        layers = runs[0]["layers"]
        _publish(output / "layers.png", lambda path: plots.draw_layers(path, layers))
        drawn.append("layers.png")
    points = [point for run in runs if (point := _point(run)) is not None]
    if len(runs) > 1 and points:
        _publish(output / "comparison.png", lambda path: plots.draw_comparison(path, points))
        drawn.append("comparison.png")
    return drawn


def _curve(run: Mapping[str, Any]) -> plots.Curve | None:
    training, stages = run["training"], run["evaluations"]
    if training is None:
        return None
    levels = {"original": stages["original"]["loss"]} if "original" in stages else {}
    is_last = training["exported_step"] == training["steps"]
    exported = None if is_last else training["exported_tokens"]
    return plots.Curve(run["name"], **training["curves"], exported_tokens=exported, levels=levels)


def _point(run: Mapping[str, Any]) -> plots.Point | None:
    stages = run["evaluations"]
    converted = stages.get("converted")
    final = stages.get("uptrained") or stages.get("evaluated")
    increases = [stage.get("loss_increase") if stage else None for stage in (converted, final)]
    if increases == [None, None]:
        return None
    cached = (final or converted)["kv_cache_bytes_per_token"]
    return plots.Point(run["name"], cached, *increases)


def _publish(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file beside `path`, then put it in its place."""
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    partial.replace(path)


def _write_text(path: Path, content: str) -> None:
    path.write_text(content, encoding="utf-8")
