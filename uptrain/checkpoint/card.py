"""The model card of a converted checkpoint: where it comes from and what was measured."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from uptrain.checkpoint.files import MODEL_CARD

# What a source's card says of its terms holds for what is made of it.
_INHERITED = ("license", "license_name", "license_link", "language")
_MOST_CHARACTERS = 2**16  # of front matter, and of what it says

_METRICS = {
    "loss": "loss, nats a token",
    "loss_increase": "loss over the original, nats a token",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "kl": "KL(original ‖ this model), nats a token",
    "top1_agreement": "same most likely token as the original",
}
_ROWS = (
    *(
        (key, label, {"top1_agreement": "{:.1%}", "loss_increase": "{:+.4f}"}.get(key, "{:.4f}"))
        for key, label in _METRICS.items()
    ),
    ("num_key_value_heads", "KV heads", "{:,}"),
    ("kv_cache_bytes_per_token", "KV cache, bytes a token", "{:,}"),
    ("parameters", "parameters", "{:,}"),
)
_MARKS = str.maketrans({c: f"\\{c}" for c in "\\`*[]|"} | {"<": "&lt;", "&": "&amp;"})


def inherited_metadata(folder: Path) -> dict[str, Any]:
    """Read licence and language from the front matter of a source's card, if it has one."""
    path = folder / MODEL_CARD
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", errors="replace") as file:
        parts = file.read(_MOST_CHARACTERS).split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        # Every scalar stays text: `no` is Norwegian here. Hostile nesting ends in RecursionError.
        metadata = yaml.load(parts[1], yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError):
        return {}
    if not isinstance(metadata, dict):
        return {}
    return {key: metadata[key] for key in _INHERITED if _is_plain(metadata.get(key))}


def _is_plain(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    is_text = bool(items) and all(isinstance(item, str) for item in items)
    return is_text and sum(map(len, items)) <= _MOST_CHARACTERS  # aliases repeat what they name


def escape(text: str) -> str:
    """Write words, whatever they hold, as Markdown that shows them; line ends become breaks."""
    return "<br>".join(printable(line).translate(_MARKS) for line in text.splitlines())


def code(text: str) -> str:
    """Write words as a Markdown code span."""
    shown = printable(text)
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence = "`" * (longest + 1)
    pad = " " * (shown[:1] == "`" or shown[-1:] == "`")
    return f"{fence}{pad}{shown}{pad}{fence}"


def printable(text: str) -> str:
    """Replace what no page should hold; names of files may hold anything."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def model_card(record: dict[str, Any], evaluation: dict[str, Any] | None = None) -> str:
    """Write the card of a checkpoint.

    Args:
        record: The content of its `uptrain.json`.
        evaluation: What `evaluate` with the original as reference returned for it, if it was run.

    Returns:
        Markdown with the hub's metadata on top.
    """
    source, heads = record["source"], record["num_key_value_heads"]
    kind = "multi-query" if heads["target"] == 1 else "grouped-query"
    is_converted = heads["source"] != heads["target"]
    name = source["name"].rsplit("/", 1)[-1]
    name += f" with {heads['target']} KV heads" if is_converted else ", uptrained"
    bar = "\\|"  # in a table a bar ends a cell, in a code span too
    compared = evaluation is not None and "reference_loss" in evaluation
    lines = [
        "---",
        _metadata(record, kind, name, evaluation if compared else None),
        "---",
        "",
        f"# {escape(name)}",
        "",
        f"{code(source['name'])} converted from {heads['source']} to {heads['target']} key/value heads "
        f"({kind} attention): its KV cache is {heads['source'] / heads['target']:.3g} times smaller."
        if is_converted
        else f"{code(source['name'])}, trained further; its key/value heads are what they were.",
        "",
    ]
    if evaluation is not None and compared:
        lines += _measured(evaluation)
    lines += ["## How it was made", "", "| | |", "|---|---|"]
    lines += [f"| {label} | {text.replace('|', bar)} |" for label, text in _making(record)]
    auto = record.get("auto_class", "AutoModelForCausalLM")
    own_code = [name for name in record.get("files", ()) if name.startswith("modeling_")]
    trust = ", trust_remote_code=True" if own_code else ""
    lines += [
        "",
        "## How to use it",
        "",
        f"It brings its own class in {code(own_code[0])}; without `trust_remote_code` it loads after "
        "`import uptrain`:"
        if own_code
        else "It loads with plain transformers:",
        "",
        "```python",
        f"from transformers import {auto}",
        "",
        f'model = {auto}.from_pretrained("path/to/this/folder"{trust})',
        "```",
        "",
        f"Made with uptrain {record['uptrain_version']}; `uptrain.json` holds the full record and the hash of "
        "every file, `uptrain verify` checks them.",
        "",
    ]
    return "\n".join(lines)


def _metadata(
    record: dict[str, Any], kind: str, name: str, evaluation: dict[str, Any] | None
) -> str:
    """Write what the hub reads: lineage, licence, and the figures as a model index."""
    from huggingface_hub import EvalResult, ModelCardData

    source = record["source"]
    tags = ["uptrain", f"{kind}-attention", "kv-cache"]
    if (record.get("uptraining") or {}).get("teacher"):
        tags.append("distillation")
    fields: dict[str, Any] = {"library_name": "transformers", "tags": tags}
    if record.get("auto_class", "AutoModelForCausalLM") == "AutoModelForCausalLM":
        fields["pipeline_tag"] = "text-generation"
    if "/" in source["name"]:
        fields |= {"base_model": source["name"], "base_model_relation": "finetune"}
    if evaluation is not None:
        fields["model_name"] = name
        fields["eval_results"] = [
            EvalResult(
                task_type="text-generation",
                dataset_type=evaluation["data"],
                dataset_name=evaluation["data"],
                metric_type=metric,
                metric_name=label,
                metric_value=round(evaluation[metric], 6),
            )
            for metric, label in _METRICS.items()
            if metric in evaluation
        ]
    text: str = ModelCardData(**fields, **source.get("card", {})).to_yaml()
    return text


def _measured(evaluation: dict[str, Any]) -> list[str]:
    """Lay out what was measured beside the original."""
    rows = ["| | original | this model |", "|---|---:|---:|"]
    for key, label, form in _ROWS:
        if key in evaluation:
            original = evaluation.get(f"reference_{key}")
            beside = "" if original is None else form.format(original)
            rows.append(f"| {label} | {beside} | {form.format(evaluation[key])} |")
    found = evaluation.get("intervals", {}).get("loss_increase")
    between = f"; 95% interval of the difference {found[0]:+.4f} … {found[1]:+.4f}" if found else ""
    on = f"On {evaluation['tokens']:,} tokens of {code(evaluation['data'])}{between}."
    return ["## What was measured", "", *rows, "", on, ""]


def _making(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Say of what and how it was made, row by row."""
    source = record["source"]
    at = f" at {code(source['revision'])}" if source["revision"] else ""
    yield "source", code(source["name"]) + at
    yield "method", f"{record['method']}, {record['grouping']} groups, seed {record['seed']}"
    if rewrite := record.get("rewrite"):
        yield "architecture", f"{rewrite['source']} rewritten as {rewrite['target']}"
    if calibration := record.get("calibration"):
        tokens = (record.get("calibration_used") or calibration)["tokens"]
        yield "calibration", f"{tokens:,} tokens of {code(calibration['data'])}"
    uptraining = record.get("uptraining")
    if uptraining is None:
        yield "uptraining", "none yet"
        return
    share = f" ({uptraining['alpha']:.2g} of the pretraining)" if uptraining.get("alpha") else ""
    yield "uptraining", f"{uptraining['steps']:,} steps, {uptraining['tokens']:,} tokens{share}"
    if uptraining.get("teacher"):
        weight = uptraining.get("distillation_weight", 1.0)
        yield (
            "distillation",
            f"from {code(uptraining['teacher'])}: {weight:.0%} of the loss is KL(teacher ‖ student) on "
            "the whole distribution",
        )
