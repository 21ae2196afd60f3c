"""Results of runs, gathered into one page: HTML, Markdown, JSON and plots."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import uptrain
from uptrain.errors import UptrainError
from uptrain.report import plots
from uptrain.report.canvas import HOW_TO_GET_PLOTS, Figure, can_draw
from uptrain.report.evaluated import copying_losses, places, quality_table
from uptrain.report.page import pages
from uptrain.report.recovery import Curve, draw_recovery
from uptrain.report.runs import read_runs
from uptrain.report.sections import training_table
from uptrain.report.summary import common_setting, comparison, points, ranked
from uptrain.report.text import as_text, last_stage, verdict

__all__ = ["report", "summary_table"]


def report(folders: Sequence[Path], output: Path) -> dict[str, Any]:
    """Gather the results of runs into `report.html`, `report.md`, `report.json` and plots.

    The page holds its plots, and takes nothing from a network.

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
        run["verdict"] = verdict(run)
    figures = _draw(runs) if can_draw() else []
    content: dict[str, Any] = {
        "uptrain_version": uptrain.__version__,
        "runs": runs,
        "plots": [figure.file for figure in figures],
    }
    if not can_draw():
        content["note"] = HOW_TO_GET_PLOTS
    files = {figure.file: figure.standalone() for figure in figures}
    files["report.json"] = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    files |= pages(runs, figures, content.get("note"))
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            _publish(output / name, text)
    except OSError as error:
        raise UptrainError(
            f"{output}: cannot take the report ({error.strerror}); choose another --output"
        ) from error
    return content


def summary_table(content: Mapping[str, Any]) -> str:
    """Lay out the verdict and main figures of a report as plain text for a terminal."""
    runs = content["runs"]
    if len(runs) == 1:
        tables = [quality_table(runs[0]["evaluations"]), training_table(runs[0])]
        blocks = [runs[0]["verdict"]]
    else:
        tables, blocks = [comparison(ranked(runs))], []
    blocks += [as_text(table) for table in tables if table is not None]
    if content.get("note"):
        blocks.append(content["note"])
    return "\n\n".join(blocks)


def _draw(runs: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Draw what there is to draw."""
    ordered = ranked(runs)
    curves = [curve for run in ordered if (curve := _curve(run)) is not None]
    drawn = [draw_recovery(curves)] if curves else []
    if len(runs) == 1:
        return drawn + _draw_one(runs[0])
    if against_cache := points(ordered):
        what = "KV cache, bytes a token"
        drawn.append(plots.draw_comparison(against_cache, what, "comparison"))
    setting = common_setting(runs)
    if setting is not None and (against_time := points(ordered, setting)):
        what = "milliseconds a decoding step"
        drawn.append(plots.draw_comparison(against_time, what, "decode-comparison"))
    return drawn


def _draw_one(run: Mapping[str, Any]) -> list[Figure]:
    stages, drawn = run["evaluations"], []
    if any(layer["discarded_energy"] for layer in run["layers"]):
        drawn.append(plots.draw_layers(run["layers"]))
    found, context = places(stages)
    if found:
        drawn.append(plots.draw_positions(found, context))
    if losses := copying_losses(stages):
        series = [
            plots.Series(name, [row[0] for row in rows], [row[2] for row in rows])
            for name, rows in losses.items()
        ]
        drawn.append(plots.draw_copying(series))
    if rows := (last_stage(stages) or {}).get("decode"):
        drawn.append(plots.draw_decode(rows))
    return drawn


def _curve(run: Mapping[str, Any]) -> Curve | None:
    training, stages = run["training"], run["evaluations"]
    if training is None:
        return None
    levels = {"original": stages["original"]["loss"]} if "original" in stages else {}
    is_last = training["exported_step"] == training["steps"]
    exported = None if is_last else training["exported_tokens"]
    return Curve(run["name"], **training["curves"], exported_tokens=exported, levels=levels)


def _publish(path: Path, text: str) -> None:
    """Put a text beside `path`, then in its place."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
