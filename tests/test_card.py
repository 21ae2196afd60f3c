"""The model card: the hub's own parser reads it, and it is text whatever a name holds."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from uptrain.checkpoint.card import code, escape, inherited_metadata, model_card

RECORD: dict[str, Any] = {
    "uptrain_version": "0.1.0",
    "source": {
        "name": "acme/small",
        "revision": "abc",
        "card": {"license": "apache-2.0", "language": ["en", "no"]},
    },
    "num_key_value_heads": {"source": 8, "target": 2},
    "method": "factorize",
    "grouping": "search",
    "seed": 0,
    "calibration": {"data": "books.jsonl", "tokens": 131072},
    "files": {},
}
UPTRAINED = RECORD | {
    "uptraining": {
        "steps": 80, "tokens": 655360, "alpha": 0.005, "teacher": "acme/small", "distillation_weight": 0.7,
    }
}  # fmt: skip
EVALUATION: dict[str, Any] = {
    "loss": 3.5, "perplexity": 33.1, "bits_per_byte": 1.6, "reference_loss": 3.25,
    "reference_perplexity": 25.8, "reference_bits_per_byte": 1.5, "loss_increase": 0.25, "kl": 0.125,
    "top1_agreement": 0.75, "tokens": 65536, "data": "validation.jsonl", "num_key_value_heads": 2,
    "reference_num_key_value_heads": 8, "kv_cache_bytes_per_token": 512, "parameters": 1000,
    "reference_kv_cache_bytes_per_token": 2048, "intervals": {"loss_increase": [0.2, 0.3]},
}  # fmt: skip


def test_the_hub_reads_lineage_licence_and_figures() -> None:
    data = ModelCard(model_card(UPTRAINED, EVALUATION)).data
    assert (data.base_model, data.base_model_relation) == ("acme/small", "finetune")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert (data.license, data.language) == ("apache-2.0", ["en", "no"])
    assert data.tags == ["uptrain", "grouped-query-attention", "kv-cache", "distillation"]
    assert data.model_name == "small with 2 KV heads"
    measured = {each.metric_type: each.metric_value for each in data.eval_results}
    assert measured == {
        key: EVALUATION[key]
        for key in ("loss", "loss_increase", "perplexity", "bits_per_byte", "kl", "top1_agreement")
    }
    assert {(each.task_type, each.dataset_name) for each in data.eval_results} == {
        ("text-generation", "validation.jsonl")
    }


def test_what_is_not_known_is_not_said() -> None:
    local = RECORD | {"source": {"name": "folder", "revision": None}, "auto_class": "AutoModel"}
    data = ModelCard(model_card(local)).data
    assert data.eval_results is None
    assert data.base_model is None  # the hub has no model of that name
    assert not {"base_model_relation", "license", "pipeline_tag"} & data.to_dict().keys()
    assert "distillation" not in data.tags
    assert "## What was measured" not in model_card(local, {"loss": 3.0})


def test_the_page_says_what_was_measured_and_how_it_was_made() -> None:
    lines = model_card(UPTRAINED, EVALUATION).splitlines()
    for line in (
        "# small with 2 KV heads",
        "| loss, nats a token | 3.2500 | 3.5000 |",
        "| loss over the original, nats a token |  | +0.2500 |",
        "| KV cache, bytes a token | 2,048 | 512 |",
        "On 65,536 tokens of `validation.jsonl`; 95% interval of the difference +0.2000 … +0.3000.",
        "| source | `acme/small` at `abc` |",
        "| calibration | 131,072 tokens of `books.jsonl` |",
        "| uptraining | 80 steps, 655,360 tokens (0.005 of the pretraining) |",
        "| distillation | from `acme/small`: 70% of the loss is KL(teacher ‖ student) on the whole "
        "distribution |",
    ):
        assert line in lines


def test_a_checkpoint_that_was_only_trained() -> None:
    same = UPTRAINED | {"num_key_value_heads": {"source": None, "target": None}, "method": "none"}
    lines = model_card(same).splitlines()
    assert "# small, uptrained" in lines
    assert "`acme/small`, trained further; its key/value heads are what they were." in lines


@pytest.mark.parametrize("name", ["a/<script>x</script>|`b`", "---\n- x: [", "a/b\u202e\x1b[31m"])
def test_a_name_is_text(name: str) -> None:
    source = {"name": name, "revision": "r|r", "card": {"license": f"x\n---\n{name}"}}
    text = model_card(UPTRAINED | {"source": source}, EVALUATION | {"data": name})
    card = ModelCard(text)
    assert card.data.get("base_model") in (name, None)
    assert card.data.license == source["card"]["license"]
    assert card.data.eval_results[0].dataset_name == name
    assert all(line.isprintable() for line in card.text.splitlines())
    title = next(line for line in card.text.splitlines() if line.startswith("# "))
    assert "<" not in title.replace("<br>", "")
    (row,) = (line for line in card.text.splitlines() if line.startswith("| source"))
    assert row.replace("\\|", "").count("|") == 3


def test_escapes() -> None:
    assert escape("a|b <i>\nc*d`[e](f)") == "a\\|b &lt;i><br>c\\*d\\`\\[e\\](f)"
    assert [code("a"), code("`a"), code("a``b")] == ["`a`", "`` `a ``", "```a``b```"]


def test_terms_come_from_the_source(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: acme\nlicense_link: [x]\ntags: [a]\n---\n# Small\n"
    )
    assert inherited_metadata(tmp_path) == {
        "license": "other", "license_name": "acme", "license_link": ["x"],
    }  # fmt: skip
    assert inherited_metadata(tmp_path / "none") == {}
