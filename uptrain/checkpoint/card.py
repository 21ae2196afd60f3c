"""The model card of a converted checkpoint: where it comes from and what was measured."""

from pathlib import Path
from typing import Any

import yaml

from uptrain.checkpoint.reader import MODEL_CARD

# What a source's card says of its terms holds for what is made of it.
_INHERITED = ("license", "license_name", "license_link", "language")


def inherited_metadata(folder: Path) -> dict[str, Any]:
    """Read licence and language from the front matter of a source's card, if it has one."""
    path = folder / MODEL_CARD
    if not path.is_file():
        return {}
    parts = path.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
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
    return bool(items) and all(isinstance(item, str) for item in items)


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
    metadata = {
        "library_name": "transformers",
        "tags": ["uptrain", f"{kind}-attention"],
        **source.get("card", {}),
    }
    if "/" in source["name"]:
        metadata["base_model"] = source["name"]
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=True, allow_unicode=True).strip(),
        "---",
        "",
        f"# {source['name'].rsplit('/', 1)[-1]} with {heads['target']} KV heads",
        "",
        f"`{source['name']}` converted from {heads['source']} to {heads['target']} key/value heads "
        f"({kind} attention): its KV cache is {heads['source'] / heads['target']:.3g} times smaller.",
        "",
        "| | |",
        "|---|---|",
        f"| source | `{source['name']}`"
        + (f" at `{source['revision']}`" if source["revision"] else "")
        + " |",
        f"| method | {record['method']}, {record['grouping']} groups, seed {record['seed']} |",
    ]
    if rewrite := record.get("rewrite"):
        lines.append(f"| architecture | {rewrite['source']} rewritten as {rewrite['target']} |")
    uptraining = record.get("uptraining")
    if uptraining is None:
        lines.append("| uptraining | none yet |")
    else:
        lines.append(
            f"| uptraining | {uptraining['steps']:,} steps, {uptraining['tokens']:,} tokens |"
        )
    if evaluation is not None and "reference_loss" in evaluation:
        lines += [
            f"| loss of the original | {evaluation['reference_loss']:.4f} nats a token |",
            f"| loss of this model | {evaluation['loss']:.4f} nats a token "
            f"({evaluation['loss_increase']:+.4f}, on {evaluation['tokens']:,} tokens) |",
            f"| KL(original ‖ this) | {evaluation['kl']:.4f} nats a token |",
            f"| KV cache | {evaluation['kv_cache_bytes_per_token']:,} bytes a token |",
        ]
    auto = record.get("auto_class", "AutoModelForCausalLM")
    code = [name for name in record.get("files", ()) if name.startswith("modeling_")]
    trust = ", trust_remote_code=True" if code else ""
    lines += [
        "",
        f"It brings its own class in `{code[0]}`; without `trust_remote_code` it loads after `import uptrain`:"
        if code
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
