"""Folders as runs leave them, written in a millisecond."""

import json
import math
from pathlib import Path
from typing import Any

ORIGINAL_LOSS = 3.351


def evaluation(name: str, loss: float, heads: int, reference: bool = True) -> dict[str, Any]:
    result = {
        "model": name,
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss / 2,
        "tokens": 65536,
        "parameters": 1000000 + heads,
        "num_key_value_heads": heads,
        "kv_cache_bytes_per_token": 128 * heads,
        "data": "validation.jsonl",
        "sequence_length": 256,
    }
    if reference:
        result |= {
            "reference": "books",
            "reference_loss": ORIGINAL_LOSS,
            "reference_parameters": 1000008,
            "reference_num_key_value_heads": 8,
            "reference_kv_cache_bytes_per_token": 1024,
            "loss_increase": loss - ORIGINAL_LOSS,
            "kl": 0.5,
            "top1_agreement": 0.75,
        }
    return result


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def make_run(
    folder: Path, converted: float = 5.5, final: float = 3.9, heads: int = 2, **training: Any
) -> Path:
    write(folder / "report" / "original.json", evaluation("books", ORIGINAL_LOSS, 8, False))
    write(folder / "report" / "converted.json", evaluation("converted", converted, heads))
    write(folder / "report" / "final.json", evaluation("final", final, heads))
    record = {
        "source": {"name": "books"},
        "num_key_value_heads": {"source": 8, "target": heads},
        "method": "mean",
        "seed": 0,
        "versions": {"torch": "2.13.0"},
    }
    write(folder / "converted" / "uptrain.json", record)
    write(folder / "final" / "uptrain.json", record | {"uptraining": {"alpha": 0.005, **training}})
    rows = []
    for step in range(1, 41):
        loss = final + (converted - final) * math.exp(-step / 8)
        rows.append({"step": step, "tokens": step * 16384, "loss": loss, "seconds": step * 2.0})
        if step % 10 == 0:
            rows.append({"step": step, "validation_loss": loss})
    write_rows(folder, rows)
    return folder


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


SETTINGS = {
    "optimizer": "adamw",
    "learning_rate": 0.0015,
    "schedule": "cosine",
    "trainable": "all",
    "teacher": None,
    "distillation_weight": 0.0,
}


def make_distilled(folder: Path, weight: float = 0.7, exported: int = 40) -> Path:
    """Write what `finetune` leaves: no evaluations, a teacher, a spike, a rise at the end."""
    taught = {"teacher": "books", "distillation_weight": weight, "exported_step": exported}
    write(folder / "final" / "uptrain.json", {"uptraining": SETTINGS | taught})
    rows: list[dict[str, Any]] = [{"step": 0, "validation_loss": 5.5, "validation_kl": 2.0}]
    for step in range(1, 41):
        cross_entropy, kl = 3.5 + 2 * math.exp(-step / 8), 2 * math.exp(-step / 8)
        row = {"step": step, "tokens": step * 1000, "loss": kl, "seconds": step * 2.0}
        row |= {"cross_entropy": cross_entropy, "kl": kl, "gradient_norm": 0.5}
        row |= {"clipped": True} if step < 4 else {}
        row |= {"cross_entropy": 9.0, "spike": True} if step == 25 else {}
        rows.append(row)
        if step % 10 == 0:
            risen = step == 40
            rows.append(
                {
                    "step": step,
                    "validation_loss": 4 - step / 100 + risen,
                    "validation_kl": 20 / step,
                }
            )
    write_rows(folder, rows)
    return folder


def make_measured(folder: Path, scale: float = 1.0, **stage: Any) -> Path:
    """Write a run of which everything was measured, on its final checkpoint and the converted one."""
    make_run(folder, 3.551, 3.351 + 0.1 * scale)
    for name, part in (("converted", 2.0), ("final", scale)):
        path = folder / "report" / f"{name}.json"
        found = json.loads(path.read_text()) | _everything(0.1 * part) | stage
        if name == "converted":
            del found["decode"], found["decode_conditions"]
        write(path, found)
    record = json.loads((folder / "converted" / "uptrain.json").read_text())
    layer = {
        "discarded_energy": {"value": 0.25, "key": 0.05},
        "error": {"merged": 0.1, "layer": 0.02},
    }
    record["layers"] = [{"layer": number, **layer} for number in range(3)]
    record["layers"].append({"layer": 3, "discarded_energy": {}, "error": {}})
    write(folder / "converted" / "uptrain.json", record)
    took = {"seconds": 61.0, "peak_bytes": 2**30}
    command = "uptrain run quickstart output=run"
    write(folder / "report" / "run.json", {"command": command, "stages": {"convert": took}})
    return folder


def _everything(lost: float) -> dict[str, Any]:
    places = [
        {"first": first, "loss": 3 + lost, "reference_loss": 3.0, "loss_increase": lost,
         "top1_agreement": 0.75, "kl": lost, "tokens": 10, "last": last}
        for first, last in ((1, 1), (2, 2), (3, 4), (5, 8))
    ]  # fmt: skip
    said = {"greedy": "on and on", "sampled": "off"}
    decode = {
        "milliseconds_per_step": 5.0, "bound_milliseconds": 4.0, "bandwidth_fraction": 0.8,
        "tokens_per_second": 3200.0, "speedup": 2.5, "prefill_tokens_per_second": 40000.0,
        "peak_bytes": 20 * 2**30, "largest_batch": 200, "batch": 16, "context": 4096,
    }  # fmt: skip
    return {
        "documents": 12,
        "dtype": "float32",
        "device": "cpu",
        "intervals": {
            "loss": [3.3, 3.6], "reference_loss": [3.2, 3.5], "loss_increase": [lost - 0.01, lost + 0.01],
            "kl": [0.4, 0.6], "top1_agreement": [0.7, 0.8],
        },
        "loss_increase_p": 0.0005,
        "bootstrap": {"confidence": 0.95, "resamples": 4000, "seed": 0},
        "by_position": places,
        "by_document": {"documents": 12, "of": "loss_increase", "quantiles": {"0.05": lost, "0.95": 2 * lost},
                        "worst": []},
        "copying": [
            {"distance": n, "tokens": 64, "loss": 2 + lost, "first_loss": 9.0, "reference_loss": 2.0,
             "reference_first_loss": 8.5}
            for n in (8, 16)
        ],
        "continuations": {
            "prompts": [{"prompt": "It goes", "text": "like this", "target": said, "reference": said}],
            "repetition": {"text": 0.0, "target": {"greedy": 0.5, "sampled": 0.25},
                           "reference": {"greedy": 0.4, "sampled": 0.2}},
        },
        "tasks": {"piqa": {"acc": {"target": 0.75, "target_stderr": 0.01, "reference": 0.8}}},
        "decode": [
            decode | {"model": "target"},
            decode | {"model": "reference", "milliseconds_per_step": 12.5, "speedup": 1.0},
        ],
        "decode_conditions": {
            "device": "H200", "device_type": "cuda", "dtype": "bfloat16",
            "bandwidth": {"bytes_per_second": 4.3e12}, "left_out": [],
        },
    }  # fmt: skip
