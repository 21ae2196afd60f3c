"""What is printed: columns, units, and every part of a result."""

from pathlib import Path

import pytest
from tiny import save, tiny_config, tiny_model

from uptrain.checkpoint.reader import open_checkpoint
from uptrain.conversion.plan import inspect
from uptrain.evaluation.serving import describe_serving, split_over
from uptrain.evaluation.tables import evaluation, gpus, inspection, size, table

RESULT = {
    "model": "gqa",
    "loss": 3.25,
    "perplexity": 25.79,
    "bits_per_byte": 1.5,
    "tokens": 65536,
    "documents": 12,
    "num_key_value_heads": 4,
    "kv_cache_bytes_per_token": 3072,
    "data": "books.jsonl",
    "dtype": "float32",
}
COMPARED = {
    **RESULT,
    "reference_loss": 3.125,
    "loss_increase": 0.125,
    "kl": 0.0625,
    "top1_agreement": 0.875,
    "intervals": {"loss": [3.0, 3.5], "loss_increase": [0.1, 0.15]},
    "loss_increase_p": 0.0005,
    "bootstrap": {"confidence": 0.95},
}


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"), (1023, "1,023 bytes"), (1024, "1.0 KiB"), (1.5 * 2**20, "1.5 MiB"),
        (2**30, "1.0 GiB"), (5 * 2**42, "20,480.0 GiB"),
    ],
)  # fmt: skip
def test_sizes(nbytes: float, text: str) -> None:
    assert size(nbytes) == text


def test_columns_are_aligned() -> None:
    assert table([["heads", "bytes", "note"], ["12", "9,216", "all of them"]], left=1) == [
        "  heads  bytes  note",
        "  ─────  ─────  ───────────",
        "     12  9,216  all of them",
    ]


def test_an_evaluation_alone() -> None:
    assert evaluation({**RESULT, "documents": 3}).splitlines() == [
        "gqa",
        "  loss           3.2500 nats a token",
        "  perplexity     25.79",
        "  bits per byte  1.5000",
        "  KV cache       3,072 bytes a token, 4 KV heads",
        "  measured on    65,536 tokens, 3 documents of books.jsonl, in float32",
        "  no intervals   fewer than 5 documents say nothing of others",
    ]


def test_a_comparison_with_its_intervals() -> None:
    lines = evaluation(COMPARED).splitlines()
    assert "  loss           3.2500 nats a token (3.0000 … 3.5000)" in lines
    assert "  increase       +0.1250 nats a token (+0.1000 … +0.1500, p < 0.001)" in lines
    assert "  KL             0.0625 nats a token, KL(reference ‖ model)" in lines
    assert "  agreement      87.5% of most likely tokens" in lines
    assert lines[-1] == "  in brackets    95%, over documents"


def test_every_part_that_was_asked_for() -> None:
    losses = {"loss": 2.0, "reference_loss": 1.5}
    said = {"greedy": "on and on", "sampled": "off"}
    row = {
        "model": "target", "batch": 16, "context": 4096, "milliseconds_per_step": 5.0,
        "bound_milliseconds": 4.0, "bandwidth_fraction": 0.8, "tokens_per_second": 3200.0,
        "speedup": 2.05, "prefill_tokens_per_second": 40000.0, "peak_bytes": 20 * 2**30,
        "largest_batch": 200, "cuda_graph": False,
    }  # fmt: skip
    result = COMPARED | {
        "long_context": {
            "sequence_length": 4096,
            "by_position": [{"first": 2049, "last": 4096, "loss_increase": 0.5, **losses}],
        },
        "copying": [{"distance": 128, "first_loss": 9.0, "reference_first_loss": 8.5, **losses}],
        "continuations": {
            "prompts": [{"prompt": "It goes", "text": "like this", "target": said}],
            "repetition": {"text": 0.0, "target": {"greedy": 0.5, "sampled": 0.25}},
        },
        "tasks": {"piqa": {"acc": {"target": 0.75, "target_stderr": 0.01, "reference": 0.8}}},
        "decode": [row],
        "decode_conditions": {
            "device": "H200", "device_type": "cuda", "dtype": "bfloat16",
            "bandwidth": {"bytes_per_second": 4.3e12},
            "left_out": [{"model": "reference", "batch": 512, "context": 4096}],
        },
    }  # fmt: skip
    parts = evaluation(result).split("\n\n")[1:]
    cells = [[line.split() for line in part.splitlines()] for part in parts]
    assert parts[0].startswith("by position in a context of 4,096 tokens")
    assert cells[0][-1] == ["2,048", "2.0000", "1.5000", "+0.5000"]
    assert cells[1][1] == ["tokens", "back", "first", "again", "reference", "first", "again"]
    assert cells[1][-1] == ["128", "9.0000", "2.0000", "8.5000", "1.5000"]
    assert cells[2][-1] == ["0.0%", "50.0%", "25.0%"]
    assert cells[3] == [
        ["prompt", "It", "goes"],
        ["text", "like", "this"],
        ["target", "on", "and", "on"],
    ]
    assert cells[4][-1] == ["piqa", "acc", "0.7500", "±", "0.0100", "0.8000"]
    decode = parts[5].splitlines()
    assert decode[2].split() == [
        "4,096", "16", "target", "5.00", "4.00", "80%", "3,200", "2.05×", "40,000", "20.0", "GiB",
        "200",
    ]  # fmt: skip
    assert "at the 4,300 GB/s measured here" in decode[3]
    assert decode[-2].startswith("  not every step could be made a CUDA graph")
    assert decode[-1] == "  left out for lack of memory: reference, batch 512 at 4,096"


def test_an_inspection(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(tiny_model(tiny_config("phi")), tmp_path / "phi"))
    lines = inspection(describe_serving(inspect(checkpoint), checkpoint)).splitlines()
    assert lines[:5] == [
        "phi",
        "  family     phi (PhiForCausalLM)",
        "  attention  4 query heads, 4 KV heads (multi-head), 2 layers",
        "  head size  16",
        "  context    64 tokens",
    ]
    rows = [line.split() for line in lines]
    start = next(i for i, row in enumerate(rows) if row[:2] == ["KV", "heads"])
    assert rows[start][-6:] == ["at", "64", "at", "4k", "at", "32k"]
    assert rows[start + 2] == ["4", "2,048", "1×", "128.0", "KiB", "8.0", "MiB", "64.0", "MiB"]
    assert rows[start + 4] == ["1", "512", "4×", "32.0", "KiB", "2.0", "MiB", "16.0", "MiB"]
    start = next(i for i, row in enumerate(rows) if row[:2] == ["KV", "heads"] and "vLLM" in row)
    taken = {}
    for name in ("transformers", "vLLM", "TGI"):
        place = lines[start].index(name)
        taken[name] = [line[place:].split("  ")[0] for line in lines[start + 2 : start + 5]]
    assert taken == {
        "transformers": ["1 2 4", "1 2", "1"],
        "vLLM": ["1 2 4", "no", "no"],
        "TGI": ["1 2 4 ?", "1 2 ?", "1 ?"],
    }
    notes = " ".join(" ".join(row) for row in rows[start + 5 :])
    assert "? not known whether it loads" in notes
    assert "vLLM 4: from its source, not run 2, 1: its own class ignores the number of" in notes
    assert "2, 1: its converter writes as many KV heads as query heads CTranslate2" in notes


def test_copies_and_layers_are_told_apart() -> None:
    split = {"tensor_parallel": [1, 2, 4, 8], "copied": [4, 8]}
    assert gpus(split) == "1 2 4* 8*"
    assert gpus({"tensor_parallel": None, "copied": []}) == "any"


@pytest.mark.parametrize("model_type", ["llama", "phi", "gpt_neox", "opt"])
def test_an_inspection_fits_80_columns(model_type: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(tiny_model(tiny_config(model_type)), tmp_path / model_type))
    described = describe_serving(inspect(checkpoint), checkpoint)
    text = inspection(described)
    assert max(map(len, text.splitlines())) <= 80
    assert ("rewritten" in text) == (model_type in ("gpt_neox", "opt"))


def test_the_widest_inspection_fits_80_columns() -> None:
    runtimes = [
        {"runtime": name, "accepts": None if name == "TGI" else True, "note": "word " * 40}
        for name in ("transformers", "vLLM", "llama.cpp", "CTranslate2", "TGI")
    ]
    targets = [
        {
            "num_key_value_heads": G,
            "kv_cache_bytes_per_token": G * 131072,
            "model_type": "llama",
            "runtimes": [
                each
                | (
                    {"tensor_parallel": None, "copied": []}
                    if each["runtime"] == "llama.cpp"
                    else split_over(each["runtime"], "llama", 128, G)
                )
                for each in runtimes
            ],
        }
        for G in (128, 8, 1)
    ]
    text = inspection(
        {
            "model": "large", "model_type": "llama", "architecture": "LlamaForCausalLM",
            "num_attention_heads": 128, "num_key_value_heads": 128, "num_hidden_layers": 128,
            "head_dim": 128, "context": 131072, "parameters": 10**12, "weight_bytes": 2 * 10**12,
            "dtype": "bfloat16", "targets": targets,
        }
    )  # fmt: skip
    assert max(map(len, text.splitlines())) <= 80
    assert "at 128k" in text
    assert "1 2* 4* 8* 16*" in text
