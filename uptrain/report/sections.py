"""What is known of one run, in the order in which a report tells it."""

from collections.abc import Mapping, Sequence
from typing import Any

from uptrain.evaluation.tables import gpus, size
from uptrain.report.evaluated import (
    continuations,
    copying,
    decode,
    positions,
    quality,
    tasks,
)
from uptrain.report.text import Section, Table, cell, is_measured, last_stage, objective


def sections(run: Mapping[str, Any], commands: Sequence[str]) -> list[Section]:
    """Lay out a run.

    Args:
        run: From `read_runs`.
        commands: That make it again.
    """
    found = (
        quality(run["evaluations"]),
        _uptraining(run),
        _layers(run["layers"]),
        positions(run["evaluations"]),
        copying(run["evaluations"]),
        tasks(run["evaluations"]),
        continuations(run["evaluations"]),
        decode(last_stage(run["evaluations"]) or {}),
        _serving(run["serving"]),
        _cost(run),
        _making(run, commands),
    )
    return [section for section in found if section is not None]


def training_table(run: Mapping[str, Any]) -> Table | None:
    """Say how a model was trained and what came of it, but for what its evaluations say."""
    training, stages = run["training"], run["evaluations"]
    if training is None:
        return None
    steps = training["steps"]
    rows = [("steps", f"{steps:,}"), ("tokens trained on", f"{training['tokens']:,}")]
    if training.get("alpha"):
        rows.append(("share of the pretraining", f"{training['alpha']:.2%}"))
    if training["optimizer"]:
        rows.append(("loss minimised", objective(training)))
        if training["teacher"]:
            rows.append(("teacher", training["teacher"]))
        rows += [
            ("trained parameters", training["trainable"]),
            ("optimizer", training["optimizer"]),
            ("learning rate", f"{training['learning_rate']:g}, {training['schedule']}"),
        ]
    known = stages.keys() >= {"converted", "uptrained"}
    is_known = {
        "validation_loss": known,
        "validation_kl": known and stages["uptrained"].get("reference") == training["teacher"],
    }
    for label, key in (
        ("validation loss", "validation_loss"),
        ("KL to the teacher", "validation_kl"),
    ):
        if is_measured(training, key) and not is_known[key]:
            rows.append((label, f"{training[f'initial_{key}']:.4f} → {training[key]:.4f}"))
    if training["exported_step"] != steps:
        rows.append(("exported", f"step {training['exported_step']:,}, the lowest validation loss"))
    rows += [
        ("steps with clipped gradients", f"{training['clipped_steps']:,}"),
        ("steps with a loss spike", f"{training['spikes']:,}"),
    ]
    if training["seconds"]:
        rows += [
            ("time, seconds", f"{training['seconds']:,.0f}"),
            ("speed, tokens a second", f"{training['tokens_per_second']:,.0f}"),
        ]
    return Table([["uptraining", ""], *(list(row) for row in rows)], words=(0, 1))


def _uptraining(run: Mapping[str, Any]) -> Section | None:
    table = training_table(run)
    return None if table is None else Section("Recovery", figures=("loss",), tables=(table,))


def _layers(layers: Sequence[Mapping[str, Any]]) -> Section | None:
    known = [layer for layer in layers if layer["discarded_energy"]]
    if not known:
        return None
    parts = list(dict.fromkeys(part for layer in known for part in layer["discarded_energy"]))
    steps = list(dict.fromkeys(step for layer in known for step in layer["error"]))
    rows = [["layer", *(f"{part}s discarded" for part in parts), *(f"error, {s}" for s in steps)]]
    for layer in known:
        lost = [cell(layer["discarded_energy"].get(part), "{:.1%}") for part in parts]
        left = [cell(layer["error"].get(step), "{:.4f}") for step in steps]
        rows.append([str(layer["layer"]), *lost, *left])
    text = "Energy: the part of what a layer's keys and values carry that fewer heads cannot."
    if steps:
        text += (
            " Error: of the residual stream behind the layer, relative to its size, after each step of "
            "its repair."
        )
    table = Table(rows, "every layer", words=(), is_folded=True)
    return Section("Layers", text, ("layers",), (table,), is_wide=False)


def _serving(serving: Mapping[str, Any] | None) -> Section | None:
    if serving is None:
        return None
    rows = [["runtime", "loads it", "GPUs it can be split over", "remark"]]
    for each in serving["runtimes"]:
        accepts = {True: "yes", False: "no", None: "not known"}[each["accepts"]]
        rows.append(
            [
                each["runtime"],
                accepts,
                gpus(each) if each["accepts"] is not False else "–",
                each["note"],
            ]
        )
    cached = serving["kv_cache_bytes_per_token"]
    text = f"KV cache of a sequence of 4,096 tokens: {size(4096 * cached)}; of 32,768: {size(32768 * cached)}."
    if any(each.get("copied") for each in serving["runtimes"]):
        text += " *: KV heads are copied there, and each GPU's cache gets no smaller."
    return Section("Serving", text, tables=(Table(rows, words=(0, 1, 2, 3)),))


def _cost(run: Mapping[str, Any]) -> Section | None:
    conversion = run["conversion"] or {}
    calibration = conversion.get("calibration_used") or conversion.get("calibration") or {}
    training = run["training"] or {}
    stages = dict(run["stages"])
    if training.get("seconds"):
        stages.setdefault("uptrain", {"seconds": training["seconds"]})
    if not stages:
        return None
    tokens = {"convert": calibration.get("tokens"), "uptrain": training.get("tokens")}
    tokens |= {f"evaluate {name}": stage["tokens"] for name, stage in run["evaluations"].items()}
    rows = [["", "tokens", "time", "memory", "GPU memory"]]
    for name, stage in stages.items():
        rows.append(
            [
                name,
                cell(tokens.get(name), "{:,}"),
                duration(stage["seconds"]),
                *(
                    size(stage[key]) if stage.get(key) else "–"
                    for key in ("peak_bytes", "peak_device_bytes")
                ),
            ]
        )
    total = sum(stage["seconds"] for stage in stages.values())
    rows.append(["in all", "", duration(total), "", ""])
    used = [i for i in range(5) if i < 3 or any(row[i] not in ("–", "") for row in rows[1:])]
    text = "Memory: the most that the process held until the end of the stage." if 3 in used else ""
    table = Table([[row[i] for i in used] for row in rows])
    return Section("Cost", text, tables=(table,), is_wide=False)


def duration(seconds: float) -> str:
    """Show a time in the units that suit it."""
    if seconds < 120:
        return f"{seconds:,.1f} s" if seconds < 10 else f"{seconds:,.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60:,} h {minutes % 60} min"


def _making(run: Mapping[str, Any], commands: Sequence[str]) -> Section | None:
    versions = [f"{name} {version}" for name, version in (run["versions"] or {}).items()]
    if not commands and not versions:
        return None
    text = f"Versions: {', '.join(versions)}." if versions else ""
    return Section("How it was made", text, code=tuple(commands))
