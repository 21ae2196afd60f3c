"""The exported checkpoint: in the form of its source, loaded by stock transformers."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import make_recipe, make_source
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from uptrain.checkpoint.reader import open_checkpoint
from uptrain.errors import TrainingError
from uptrain.loading import load_model
from uptrain.training.export import export_checkpoint
from uptrain.training.loop import finetune

UPTRAINING = {"steps": 1, "tokens": 10}


def load(folder: Path) -> torch.nn.Module:
    return load_model(open_checkpoint(folder), torch.device("cpu"), None, torch.float32)


def test_an_untrained_model_comes_out_as_it_went_in(tmp_path):
    source = make_source(tmp_path / "source")
    (source / "generation_config.json").write_text('{ "max_length":   7 }')
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"note": "kept"}))
    record = export_checkpoint(
        load(source), open_checkpoint(source), tmp_path / "final", UPTRAINING
    )
    for path in source.iterdir():
        if path.name != "model.safetensors":
            assert (tmp_path / "final" / path.name).read_bytes() == path.read_bytes()
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("source", "final"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor)
    assert record == json.loads((tmp_path / "final" / "uptrain.json").read_text())
    assert "README.md" not in record["files"]
    for name, digest in record["files"].items():
        content = (tmp_path / "final" / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest
    assert {"README.md", "uptrain.json", *record["files"]} == {
        path.name for path in (tmp_path / "final").iterdir()
    }


def test_the_record_of_the_conversion_is_carried_on(tmp_path):
    source = make_source(tmp_path / "source")
    record = {
        "uptrain_version": "0.0.1",
        "source": {"name": "books", "revision": None},
        "num_key_value_heads": {"source": 4, "target": 2},
        "method": "mean",
        "grouping": "contiguous",
        "seed": 0,
        "files": {"gone": "0"},
    }
    (source / "uptrain.json").write_text(json.dumps(record))
    model = load(source)
    first = export_checkpoint(model, open_checkpoint(source), tmp_path / "one", UPTRAINING)
    assert {key: first[key] for key in record if key != "files"} == {
        key: value for key, value in record.items() if key != "files"
    }
    assert first["uptraining"]["steps"] == 1
    again = export_checkpoint(
        model, open_checkpoint(tmp_path / "one"), tmp_path / "two", UPTRAINING
    )
    assert again["before"]["steps"] == 1
    assert "1 steps, 10 tokens" in (tmp_path / "two" / "README.md").read_text()


def test_a_trained_checkpoint_loads_whole_and_differs(tmp_path):
    recipe = make_recipe(tmp_path, steps=3)
    final = finetune(recipe)["final"]
    model, info = AutoModelForCausalLM.from_pretrained(final, output_loading_info=True)
    assert not any(info.values())
    assert model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(final).get_vocab()
    before = load_file(Path(recipe.source) / "model.safetensors")
    after = load_file(Path(final) / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    saved = load_file(tmp_path / "output/checkpoints/step-00000003/part-00000/model.safetensors")
    for name, tensor in load(Path(final)).named_parameters():
        (trained,) = (saved[key] for key in saved if key.endswith(name) and "/" not in key)
        assert torch.equal(tensor, trained.bfloat16().float())


def test_tensors_that_the_model_does_not_hold_are_copied(tmp_path):
    source = make_source(tmp_path / "source", torch.float32)
    path = source / "model.safetensors"
    stale = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tied = "lm_head.weight"
    tensors = load_file(path)
    tensors[stale] = torch.arange(4.0)
    tensors[tied] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path, {"format": "pt"})
    model = load(source)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    export_checkpoint(model, open_checkpoint(source), tmp_path / "final", UPTRAINING)
    after = load_file(tmp_path / "final" / "model.safetensors")
    assert torch.equal(after[stale], tensors[stale])
    assert torch.equal(after[tied], tensors[tied] + 1)
    assert torch.equal(after["model.embed_tokens.weight"], tensors[tied] + 1)


def test_what_transformers_merges_while_loading_is_taken_apart_again(tmp_path):
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=3,
        max_position_embeddings=16,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "source")
    before = load_file(tmp_path / "source" / "model.safetensors")
    assert any("experts.2." in name for name in before)
    model = load(tmp_path / "source")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    export_checkpoint(model, open_checkpoint(tmp_path / "source"), tmp_path / "final", UPTRAINING)
    after = load_file(tmp_path / "final" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name] * 2) for name in before)


def test_a_lost_parameter_is_refused(tmp_path):
    source = make_source(tmp_path / "source")
    model = load(source)
    model.extra = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(
        TrainingError, match="holds no tensor extra, which was trained; this family"
    ):
        export_checkpoint(model, open_checkpoint(source), tmp_path / "final", UPTRAINING)
    assert not (tmp_path / "final").exists()


def test_an_existing_export_is_replaced_and_nothing_else(tmp_path):
    source = make_source(tmp_path / "source")
    model, checkpoint = load(source), open_checkpoint(source)
    for _ in range(2):
        export_checkpoint(model, checkpoint, tmp_path / "final", UPTRAINING)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final", "source"]
