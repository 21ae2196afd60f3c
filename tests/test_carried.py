"""Models whose checkpoints carry a modeling file, judged by the stock classes that they replace."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_families import change_heads, shapes_of, swap_groups

import uptrain
from uptrain.conversion.verify import verify
from uptrain.errors import UnsupportedFamilyError
from uptrain.evaluation.quality import evaluate
from uptrain.families import carried, registry
from uptrain.families.head_tensors import head_tensors
from uptrain.families.rewrites import find_rewrites
from uptrain.families.schema import HeadTensor

pytestmark = pytest.mark.filterwarnings("ignore")  # of the model classes themselves

H, D, VOCAB = 4, 8, 99
T5 = {
    "vocab_size": VOCAB, "d_model": 24, "d_kv": D, "d_ff": 40, "num_layers": 2, "num_heads": H,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16,
    "decoder_start_token_id": 0, "eos_token_id": None,
}  # fmt: skip
BART = {
    "vocab_size": VOCAB, "d_model": H * D, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": H, "decoder_attention_heads": H, "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40, "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
WHISPER = {
    **BART, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 64,
    "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
OPT = {
    "vocab_size": VOCAB, "hidden_size": H * D, "num_hidden_layers": 2, "num_attention_heads": H,
    "ffn_dim": 40, "max_position_embeddings": 64, "word_embed_proj_dim": H * D,
}  # fmt: skip
GPT2 = {
    "vocab_size": VOCAB, "n_embd": H * D, "n_layer": 2, "n_head": H, "n_positions": 64,
    "bos_token_id": 0, "eos_token_id": None, "scale_attn_by_inverse_layer_idx": True,
}  # fmt: skip
BERT = {
    "vocab_size": VOCAB, "hidden_size": H * D, "num_hidden_layers": 2, "num_attention_heads": H,
    "intermediate_size": 40, "max_position_embeddings": 64, "pad_token_id": 1,
}  # fmt: skip
MODELS = {
    "bart": ("BartForConditionalGeneration", BART),
    "bert": ("BertForMaskedLM", BERT),
    "blenderbot": ("BlenderbotForConditionalGeneration", BART),
    "blenderbot-small": ("BlenderbotSmallForConditionalGeneration", BART),
    "camembert": ("CamembertForMaskedLM", BERT),
    "electra": ("ElectraForPreTraining", {**BERT, "embedding_size": 16}),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "m2m_100": ("M2M100ForConditionalGeneration", BART),
    "marian": ("MarianMTModel", BART),
    "mbart": ("MBartForConditionalGeneration", BART),
    "mt5": ("MT5ForConditionalGeneration", T5),
    "opt": ("OPTForCausalLM", OPT),
    "pegasus": ("PegasusForConditionalGeneration", BART),
    "plbart": ("PLBartForConditionalGeneration", BART),
    "roberta": ("RobertaForSequenceClassification", BERT),
    "t5": ("T5ForConditionalGeneration", T5),
    "whisper": ("WhisperForConditionalGeneration", WHISPER),
    "xlm-roberta": ("XLMRobertaForMaskedLM", BERT),
}
ENCODER_DECODERS = [name for name, (_, config) in MODELS.items() if config in (T5, BART, WHISPER)]
GENERATING = ["t5", "bart", "marian", "whisper", "opt", "gpt2"]
"""Looked at more closely; the others share their attention with one of these, or with bert."""


def make_source(model_type: str, folder: Path, **overrides: Any) -> Path:
    """Save a float64 model of transformers' own, whose every parameter matters."""
    name, settings = MODELS[model_type]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    config = cls.config_class(**{**settings, **overrides})
    config.architectures = [name]
    model = cls._from_config(config, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def carried_config(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    return find_rewrites(config, f"gqa_{config['model_type']}")[0].config


def make_equal(folder: Path, count: int, encoder: bool = False) -> None:
    """Give every KV head of a group the weights of the group's first."""

    def first_of_group(part: torch.Tensor, tensor: HeadTensor) -> torch.Tensor:
        first = part.unflatten(0, (tensor.num_key_value_heads, -1))[:, :1]
        return first.expand(-1, len(part) // len(first), *part.shape[1:]).flatten(0, 1)

    tensors = head_tensors(carried_config(folder), count, shapes_of(folder), encoder=encoder)
    change_heads(folder, tensors, first_of_group)


def load(folder: Path, implementation: str = "sdpa") -> Any:
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    cls = getattr(transformers, name, None) or carried.find_class(name)
    model, info = cls.from_pretrained(
        folder, dtype=torch.float64, attn_implementation=implementation, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def text() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def inputs(model_type: str) -> dict[str, torch.Tensor]:
    if model_type == "whisper":
        features = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(3)).double()
        return {"input_features": features}
    return text()


def logits(model: Any, model_type: str) -> torch.Tensor:
    given = inputs(model_type)
    if "attention_mask" in given:
        given["attention_mask"][1, 6:] = 0
    if model_type in ENCODER_DECODERS:
        given["decoder_input_ids"] = text()["input_ids"][:, :5]
    with torch.no_grad():
        result: torch.Tensor = model(**given).logits
    return result


def assert_same(left: torch.Tensor, right: torch.Tensor) -> None:
    # float64 throughout: the same sums, in another order at most.
    assert (left - right).abs().max() <= 1e-10 * max(1.0, float(right.abs().max()))


@pytest.mark.parametrize("model_type", MODELS)
def test_equal_heads_merge_without_a_trace(
    model_type: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    source = make_source(model_type, tmp_path / "source")
    as_it_was = logits(load(source), model_type)
    same = tmp_path / "same"
    uptrain.convert(source, same, H, architecture=f"gqa_{model_type}")
    for implementation in ("eager", "sdpa") if model_type in GENERATING else ("sdpa",):
        # opt computes eager softmaxes in float32, whatever the model's dtype.
        original = (
            as_it_was if model_type == "opt" else logits(load(source, implementation), model_type)
        )
        assert_same(logits(load(same, implementation), model_type), original)
    for count in (2, 1) if model_type in GENERATING else (2,):
        make_equal(source, count)  # of two equal pairs, then of four equal heads
        target = tmp_path / str(count)
        result = uptrain.convert(source, target, count, architecture=f"gqa_{model_type}")
        assert result["rewrite"]["target"] == f"gqa_{model_type}"
        original = logits(load(source), model_type)
        implementation = "eager" if count == 2 else "sdpa"
        assert_same(logits(load(target, implementation), model_type), original)
        if count > 1:
            assert verify(target, source)["problems"] == []
            swap_groups(target, json.loads((target / "config.json").read_text()))
            assert (logits(load(target), model_type) - original).abs().max() > 1e-3
    record_property("family", model_type)


@pytest.mark.parametrize("model_type", ["t5", "bart", "whisper"])
def test_the_encoder_is_converted_if_asked(model_type: str, tmp_path: Path) -> None:
    source = make_source(model_type, tmp_path / "source")
    make_equal(source, 2, encoder=True)
    target, alone = tmp_path / "target", tmp_path / "alone"
    both = uptrain.convert(source, target, 2, encoder=True)
    uptrain.convert(source, alone, 2)
    assert_same(logits(load(target), model_type), logits(load(source), model_type))
    assert verify(target, source)["problems"] == []
    config = json.loads((target / "config.json").read_text())
    assert (config["num_key_value_heads"], config["encoder_num_key_value_heads"]) == (2, 2)
    config = json.loads((alone / "config.json").read_text())
    assert (config["num_key_value_heads"], config["encoder_num_key_value_heads"]) == (2, H)
    kept = [n for n in shapes_of(alone) if ".encoder." in f".{n}" or n.startswith("encoder.")]
    assert all(shapes_of(alone)[name] == shapes_of(source)[name] for name in kept)
    # An encoder keeps nothing in the cache.
    cache = both["kv_cache_bytes_per_token"]
    assert (
        cache["source"] == 2 * cache["target"] == 2 * 2 * 2 * H * D * 8
    )  # two kinds in two layers


LENGTH = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", GENERATING)
def test_generates_what_the_stock_model_does(
    model_type: str, implementation: str, tmp_path: Path
) -> None:
    source = make_source(model_type, tmp_path / "source")
    make_equal(source, 2)
    uptrain.convert(source, tmp_path / "target", 2)
    stock = load(source, implementation)
    model = load(tmp_path / "target", implementation)
    given = inputs(model_type)
    whole = stock.generate(**given, **LENGTH, return_dict_in_generate=True)
    found = model.generate(**given, **LENGTH, return_dict_in_generate=True)
    assert torch.equal(found.sequences, whole.sequences)
    expected = stock.generate(**given, **LENGTH)
    assert torch.equal(model.generate(**given, **LENGTH, use_cache=False), expected)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(**given, **LENGTH, **static), expected)
    beams = stock.generate(**given, **LENGTH, num_beams=3)
    assert torch.equal(model.generate(**given, **LENGTH, num_beams=3), beams)
    cache = found.past_key_values
    parts = [cache]
    if model_type in ENCODER_DECODERS:
        parts = [cache.self_attention_cache, cache.cross_attention_cache]
    assert {layer.keys.shape[1] for part in parts for layer in part.layers} == {2}


def test_attention_weights_have_all_query_heads(tmp_path: Path) -> None:
    source = make_source("t5", tmp_path / "source")
    uptrain.convert(source, tmp_path / "target", 1)
    decoder = {"decoder_input_ids": text()["input_ids"][:, :5]}
    found = load(tmp_path / "target", "eager")(**text(), **decoder, output_attentions=True)
    assert found.decoder_attentions[1].shape == (2, H, 5, 5)
    assert found.cross_attentions[1].shape == (2, H, 5, 9)


def test_loads_by_its_own_file_and_never_as_something_else(tmp_path: Path) -> None:
    """In a process without uptrain: with its code it computes the same, without it is refused."""
    autos = {"t5": "AutoModelForSeq2SeqLM", "gpt2": "AutoModelForCausalLM"}
    for model_type in autos:
        uptrain.convert(
            make_source(model_type, tmp_path / f"s-{model_type}"), tmp_path / model_type, 2
        )
    script = f"""
import sys, torch, transformers
for name, auto in {autos!r}.items():
    folder, cls = {str(tmp_path)!r} + "/" + name, getattr(transformers, auto)
    try:
        cls.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        assert "trust_remote_code" in str(error) or "does not recognize" in str(error), error
    else:
        raise AssertionError("loaded without its code")
    model = cls.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64)
    ids = torch.arange(3, 12)[None]
    more = {{"decoder_input_ids": ids}} if name == "t5" else {{}}
    torch.save(model.eval()(input_ids=ids, **more).logits.detach(), folder + ".pt")
assert "uptrain" not in sys.modules
"""
    environment = {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "PATH": ""}
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, env=environment)
    for model_type in autos:
        ids = torch.arange(3, 12)[None]
        more = {"decoder_input_ids": ids} if model_type == "t5" else {}
        with torch.no_grad():
            expected = load(tmp_path / model_type)(input_ids=ids, **more).logits
        assert_same(torch.load(tmp_path / f"{model_type}.pt"), expected)


def test_importing_uptrain_is_enough_and_imports_nothing_else(tmp_path: Path) -> None:
    uptrain.convert(make_source("t5", tmp_path / "source"), tmp_path / "target", 2)
    script = f"""
import sys, uptrain
assert not {{"torch", "transformers"}} & sys.modules.keys()
from transformers import AutoModelForSeq2SeqLM
model = AutoModelForSeq2SeqLM.from_pretrained({str(tmp_path / "target")!r})
assert type(model).__module__ == "uptrain.families.carried.modeling_gqa", type(model)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)


def test_a_converted_checkpoint_goes_on_to_fewer_heads(tmp_path: Path) -> None:
    source = make_source("bart", tmp_path / "source")
    uptrain.convert(source, tmp_path / "two", 2)
    uptrain.convert(tmp_path / "two", tmp_path / "one", 1)
    uptrain.convert(source, tmp_path / "direct", 1)
    # A mean of means of equally many.
    assert_same(logits(load(tmp_path / "one"), "bart"), logits(load(tmp_path / "direct"), "bart"))
    assert verify(tmp_path / "one", tmp_path / "two")["problems"] == []


def test_a_changed_modeling_file_is_found(tmp_path: Path) -> None:
    source = make_source("opt", tmp_path / "source")
    uptrain.convert(source, tmp_path / "target", 2)
    file = tmp_path / "target" / carried.modeling_file().name
    assert file.read_bytes() == carried.modeling_file().read_bytes()
    file.write_text(file.read_text() + "\n")
    problems = verify(tmp_path / "target")["problems"]
    assert problems == [f"{file.name} was changed: its SHA-256 is not the recorded one"]


@pytest.mark.parametrize(
    ("model_type", "overrides", "message"),
    [
        ("gpt2", {"add_cross_attention": True}, "it attends to the output of another model"),
        ("bart", {"decoder_attention_heads": 2}, "its encoder has 4 heads, its decoder 2"),
        ("bert", {"position_embedding_type": "relative_key"}, "positions of the kind relative_key"),
    ],
)
def test_other_attention_is_refused_by_name(
    model_type: str, overrides: dict[str, Any], message: str
) -> None:
    config = getattr(transformers, MODELS[model_type][0]).config_class(
        **{**MODELS[model_type][1], **overrides}
    )
    with pytest.raises(UnsupportedFamilyError, match=f"^{model_type}: .*{message}"):
        find_rewrites({**config.to_dict(), **overrides}, f"gqa_{model_type}")


def test_an_encoder_decoder_is_not_evaluated_on_text(tmp_path: Path) -> None:
    uptrain.convert(make_source("t5", tmp_path / "source"), tmp_path / "target", 2)
    with pytest.raises(UnsupportedFamilyError, match="gqa_t5 is an encoder-decoder"):
        evaluate(str(tmp_path / "target"), tmp_path / "none.txt")


def test_every_family_of_the_file_is_tested_and_known() -> None:
    assert sorted(MODELS) == sorted(carried.FAMILIES)
    for model_type in MODELS:
        assert (
            registry.parse_config({"model_type": f"gqa_{model_type}"}).num_key_value_heads is None
        )


@pytest.mark.parametrize(
    ("model_type", "architecture", "expected"),
    [
        ("llama", "LlamaForCausalLM", "AutoModelForCausalLM"),
        ("t5gemma", "T5GemmaForConditionalGeneration", "AutoModelForSeq2SeqLM"),
        ("bert", "BertModel", "AutoModel"),
        ("unheard-of", "SomethingElse", "AutoModelForCausalLM"),
    ],
)
def test_the_card_names_the_class_that_loads(
    model_type: str, architecture: str, expected: str
) -> None:
    config = {"model_type": model_type, "architectures": [architecture]}
    assert carried.loading_class(config) == expected


def test_the_card_of_a_carried_model_says_how_to_load_it(tmp_path: Path) -> None:
    uptrain.convert(make_source("whisper", tmp_path / "source"), tmp_path / "target", 2)
    card = (tmp_path / "target" / "README.md").read_text()
    assert "AutoModelForSpeechSeq2Seq.from_pretrained(" in card
    assert "trust_remote_code=True" in card
