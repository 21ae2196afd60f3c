"""Exact rewrites into families with a number of KV heads, judged by stock transformers."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from click.testing import CliRunner
from tiny import save, tiny_config, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

import uptrain
from uptrain.checkpoint.reader import Checkpoint, open_checkpoint
from uptrain.cli import main
from uptrain.conversion.rewritten import RewrittenCheckpoint, as_architecture
from uptrain.conversion.verify import verify
from uptrain.errors import CheckpointError, HeadCountError, UnsupportedFamilyError
from uptrain.families.rewrites import find_rewrites

SEQUENTIAL = {"use_parallel_residual": False}
ROTARY = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
LINEAR = {**ROTARY, "rope_type": "linear", "factor": 4.0}
YARN = {**ROTARY, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
WHOLE = {**SEQUENTIAL, "rope_parameters": {**ROTARY, "partial_rotary_factor": 1.0}}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 64}

# One line a rewrite and variant: source, what its config needs, target.
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt_neox-phi": ("gpt_neox", {}, "phi"),
    "gpt_neox-phi-linear": ("gpt_neox", {"rope_parameters": LINEAR}, "phi"),
    "gpt_neox-phi-yarn": ("gpt_neox", {"rope_parameters": YARN}, "phi"),
    "gpt_neox-phi-tied": ("gpt_neox", {"tie_word_embeddings": True}, "phi"),
    "gpt_neox-phi-unbiased": ("gpt_neox", {"attention_bias": False}, "phi"),
    "gpt_neox-starcoder2": ("gpt_neox", WHOLE, "starcoder2"),
    "gpt_neox-starcoder2-unbiased": ("gpt_neox", {**WHOLE, "attention_bias": False}, "starcoder2"),
    "gpt_neox-nemotron": ("gpt_neox", {**SEQUENTIAL, "rope_parameters": ROTARY}, "nemotron"),
    "gpt_neox-nemotron-tied": ("gpt_neox", {**SEQUENTIAL, "tie_word_embeddings": True}, "nemotron"),
    "gptj-phi": ("gptj", {"rotary_dim": 8}, "phi"),
    "gptj-phi-tied": ("gptj", {"rotary_dim": 16, "tie_word_embeddings": True}, "phi"),
    "codegen-phi": ("codegen", {"rotary_dim": 6, "n_head": 8}, "phi"),
    "falcon": ("falcon", {"multi_query": False}, "falcon"),
    "falcon-alibi": ("falcon", {"multi_query": False, "alibi": True, "bias": True}, "falcon"),
    "gpt2-gpt_bigcode": ("gpt2", {}, "gpt_bigcode"),
    "gpt2-gpt_bigcode-unscaled": ("gpt2", {"scale_attn_weights": False}, "gpt_bigcode"),
    "opt-gpt_bigcode": ("opt", OPT, "gpt_bigcode"),
    "opt-gpt_bigcode-unbiased": ("opt", {**OPT, "enable_bias": False}, "gpt_bigcode"),
}  # fmt: skip
FLOAT32_ATTENTION = {"gptj", "codegen"}  # whatever the dtype of the weights
IDS = torch.arange(24).reshape(2, 12) * 5 % 128


def tolerance(model_type: str) -> float:
    """Rounding of float64 sums of logits of about 1, or of attention in float32."""
    return 1e-6 if model_type in FLOAT32_ATTENTION else 1e-10


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Make each source once; not to be changed."""
    root = tmp_path_factory.mktemp("sources")

    def make(case: str) -> Path:
        model_type, overrides, _ = CASES[case]
        if not (root / case).exists():
            save(tiny_model(tiny_config(model_type, **overrides)), root / case)
        return root / case

    return make


def load(folder: Path) -> Any:
    """Load as a user would, and refuse whatever does not fit."""
    has_sdpa = config_of(folder)["model_type"] not in FLOAT32_ATTENTION
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float64,
        # Eager attention takes its softmax in float32.
        attn_implementation="sdpa" if has_sdpa else "eager",
        output_loading_info=True,
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def config_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(safetensors.torch.load_file(folder / "model.safetensors"))


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    found: torch.Tensor = load(folder)(IDS).logits
    return found


def kv_heads(model_type: str, name: str, tensor: torch.Tensor, heads: int) -> list[list[Any]]:
    """View the key heads and the value heads of a source's tensor, whatever its layout."""
    d = 64 // heads
    if name.split(".")[-2] in ("k_proj", "v_proj"):
        return [list(tensor.view(heads, d, -1))]
    if "query_key_value" in name:
        by_head = tensor.view(heads, 3, d, -1)
        return [list(by_head[:, part]) for part in (1, 2)]
    if model_type == "codegen" and "qkv_proj" in name:
        blocks = tensor.view(4, 3, heads // 4, d, -1)
        return [[head for block in blocks for head in block[part]] for part in (1, 2)]
    if model_type == "gpt2" and "c_attn" in name:
        by_head = tensor.view(-1, 3, heads, d)
        return [[by_head[:, part, head] for head in range(heads)] for part in (1, 2)]
    return []


def change_heads(source: Path, folder: Path, count: int, shift: int) -> Path:
    """Copy a source with KV heads equal within `count` groups, and groups moved on by `shift`."""
    shutil.copytree(source, folder)
    config, state = config_of(folder), state_of(folder)
    heads = config.get("num_attention_heads") or config["n_head"]
    group_size = heads // count
    changed = 0
    for name, tensor in state.items():
        for views in kv_heads(config["model_type"], name, tensor, heads):
            groups = [views[place].clone() for place in range(0, heads, group_size)]
            for head, view in enumerate(views):
                view.copy_(groups[(head // group_size + shift) % count])
            changed += 1
    assert changed >= 4  # keys and values of two layers
    safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_rewritten_checkpoint_computes_the_same(
    case: str, sources: Any, tmp_path: Path, record_property: Any
) -> None:
    model_type, _, expected = CASES[case]
    source, target = sources(case), tmp_path / "target"
    heads = load(source).config.num_attention_heads
    result = uptrain.convert(source, target, heads)
    assert result["rewrite"]["source"] == model_type
    assert result["rewrite"]["target"] == expected == config_of(target)["model_type"]
    original, rewritten = load(source), load(target)
    with torch.no_grad():
        difference = (rewritten(IDS).logits - original(IDS).logits).abs().max()
        assert difference <= tolerance(model_type)
        # One prompt is padded on the left; without a cache every step sees the whole text.
        options = {
            "attention_mask": (torch.arange(12) >= torch.tensor([[3], [0]])).long(),
            "max_new_tokens": 6,
            "do_sample": False,
            "pad_token_id": 0,
            "eos_token_id": None,
        }
        wanted = original.generate(IDS, **options)
        for use_cache in (True, False):
            found = rewritten.generate(IDS, use_cache=use_cache, **options)
            assert torch.equal(found, wanted)
    assert verify(target, source)["problems"] == []
    record_property("family", f"{model_type} → {expected}")


@pytest.mark.parametrize("case", [case for case in CASES if case.count("-") < 2])
def test_equal_heads_merge_without_a_trace(case: str, sources: Any, tmp_path: Path) -> None:
    model_type, _, expected = CASES[case]
    for count in [1] if expected == "gpt_bigcode" else [2, 1]:
        source = change_heads(sources(case), tmp_path / f"source{count}", count, shift=0)
        target = tmp_path / f"target{count}"
        uptrain.convert(source, target, count)
        original = logits(source)
        assert (logits(target) - original).abs().max() <= tolerance(model_type)
        assert verify(target, source)["problems"] == []
        if count > 1:  # moving groups on shows that each query head has its own
            moved = change_heads(sources(case), tmp_path / "moved", count, shift=1)
            uptrain.convert(moved, tmp_path / "other", count)
            assert (logits(tmp_path / "other") - original).abs().max() > 0.1


def test_rotary_settings_are_those_of_both_transformers(sources: Any, tmp_path: Path) -> None:
    uptrain.convert(sources("gpt_neox-phi-linear"), tmp_path / "target", 2)
    config = config_of(tmp_path / "target")
    assert config["rope_parameters"] == LINEAR
    assert config["rope_theta"] == 5000.0
    assert config["partial_rotary_factor"] == 0.5
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    # The older spelling alone, as transformers 4 wrote it, leads to the same.
    older = tmp_path / "older"
    shutil.copytree(sources("gpt_neox-phi-linear"), older)
    content = config_of(older)
    del content["rope_parameters"]
    content |= {"rotary_emb_base": 5000.0, "rotary_pct": 0.5}
    content["rope_scaling"] = {"type": "linear", "factor": 4.0}
    (older / "config.json").write_text(json.dumps(content))
    again = as_architecture(open_checkpoint(older)).config
    assert again["rope_scaling"].items() >= config["rope_scaling"].items()
    for key in ("rope_theta", "partial_rotary_factor"):
        assert again[key] == again["rope_parameters"][key] == config[key]


@pytest.mark.parametrize(("rotary_dim", "head_dim"), [(64, 80), (64, 256), (1, 49), (98, 98)])
def test_a_part_of_each_head_is_rotated_to_the_channel(rotary_dim: int, head_dim: int) -> None:
    config = {"model_type": "gptj", "n_embd": head_dim, "n_head": 1, "n_layer": 0}
    made = find_rewrites({**config, "rotary_dim": rotary_dim})[0].config
    # As transformers counts them; 49 · (1 / 49) is less than 1.
    assert int(head_dim * made["partial_rotary_factor"]) == rotary_dim


def test_folded_norms_are_rounded_once(sources: Any, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(sources("gpt_neox-phi"), source)
    (source / "config.json").write_text(json.dumps({**config_of(source), "dtype": "bfloat16"}))
    state = {name: tensor.bfloat16() for name, tensor in state_of(source).items()}
    safetensors.torch.save_file(state, source / "model.safetensors", {"format": "pt"})
    result = uptrain.convert(source, target, 4)
    assert "rounded to bfloat16 once more" in result["rewrite"]["lost"][0]
    layer, made = "gpt_neox.layers.1", state_of(target)
    weight, bias = (
        state[f"{layer}.mlp.dense_h_to_4h.{leaf}"].double() for leaf in ("weight", "bias")
    )
    gain, shift = (
        state[f"{layer}.post_attention_layernorm.{leaf}"].double() for leaf in ("weight", "bias")
    )
    assert torch.equal(made["model.layers.1.mlp.fc1.weight"], (weight * gain).bfloat16())
    assert torch.equal(made["model.layers.1.mlp.fc1.bias"], (weight @ shift + bias).bfloat16())
    assert made["lm_head.bias"].dtype == torch.bfloat16


def test_tensors_are_made_one_by_one(
    sources: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    right = Checkpoint.read

    def read(self: Checkpoint, name: str) -> torch.Tensor:
        reads.append(name)
        return right(self, name)

    monkeypatch.setattr(Checkpoint, "read", read)
    checkpoint = as_architecture(open_checkpoint(sources("gpt_neox-phi")))
    assert isinstance(checkpoint, RewrittenCheckpoint)
    assert not reads
    for name in checkpoint.tensors:
        assert sum(map(len, checkpoint.chunks(name))) == checkpoint.tensors[name].nbytes
        assert len(checkpoint._held) <= 3  # a weight, its bias, a norm's shift
    fused = [name for name in reads if "query_key_value.weight" in name]
    assert len(fused) == 2  # once a layer: queries, keys and values are made one after the other
    assert not any("embed" in name for name in reads)  # copied in chunks


def test_files_of_base_models_and_old_buffers(sources: Any, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(sources("gpt2-gpt_bigcode"), source)
    state = {name.removeprefix("transformer."): t for name, t in state_of(source).items()}
    state["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
    safetensors.torch.save_file(state, source / "model.safetensors", {"format": "pt"})
    uptrain.convert(source, tmp_path / "target", 4)
    difference = logits(tmp_path / "target") - logits(sources("gpt2-gpt_bigcode"))
    assert difference.abs().max() <= tolerance("gpt2")  # a transposed product may round otherwise


@pytest.mark.parametrize(
    ("case", "kind"),
    [("gpt_neox-phi", "ForSequenceClassification"), ("opt-gpt_bigcode", "ForSequenceClassification"),
     ("gpt_neox-nemotron", "Model"), ("codegen-phi", "Model"), ("gpt2-gpt_bigcode", "Model")],
)  # fmt: skip
def test_classifiers_and_base_models_stay_what_they_are(
    case: str, kind: str, tmp_path: Path
) -> None:
    model_type, overrides, _ = CASES[case]
    config = tiny_config(model_type, **overrides, pad_token_id=0)
    stem = {"gpt_neox": "GPTNeoX", "opt": "OPT", "codegen": "CodeGen", "gpt2": "GPT2"}[model_type]
    config.architectures = [stem + kind]
    source, target = tmp_path / "source", tmp_path / "target"
    model = save(tiny_model(config), source)
    uptrain.convert(source, target, config.num_attention_heads)
    assert verify(target, source)["problems"] == []
    outputs = []
    for folder in (model, target):
        cls = getattr(transformers, config_of(folder)["architectures"][0])
        assert cls.__name__.endswith(kind)
        attention = "eager" if config_of(folder)["model_type"] in FLOAT32_ATTENTION else "sdpa"
        loaded, info = cls.from_pretrained(
            folder, dtype=torch.float64, attn_implementation=attention, output_loading_info=True
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        with torch.no_grad():
            outputs.append(loaded.eval()(IDS)[0])
    assert (outputs[0] - outputs[1]).abs().max() <= tolerance(model_type)


@pytest.mark.parametrize(
    ("model_type", "overrides", "architecture", "message"),
    [
        ("gpt_neox", {}, "keep", "needs a rewrite into another one"),
        ("gpt_neox", {}, "llama", "no exact rewrite into llama; choose one of auto, keep, phi, starcoder2"),
        ("gpt_neox", {}, "starcoder2", "starcoder2 has sequential residuals, this checkpoint parallel"),
        ("gpt_neox", {}, "nemotron", "nemotron has sequential residuals, this checkpoint parallel"),
        ("gpt_neox", SEQUENTIAL, "phi", "phi has parallel residuals, this checkpoint sequential ones"),
        ("gpt_neox", SEQUENTIAL, "starcoder2", "(starcoder2 rotates whole heads, this checkpoint 0.25 of each)"),
        ("gptj", {"rotary_dim": 17}, "auto", "has one (rotary_dim is 17, expected 1 to 16 channels of a head); use it as"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "gpt_bigcode",
         "nothing like scale_attn_by_inverse_layer_idx, which is set"),
        ("opt", {**OPT, "do_layer_norm_before": False}, "gpt_bigcode", "norms stand behind attention"),
        ("opt", {**OPT, "word_embed_proj_dim": 32}, "gpt_bigcode", "embeddings from 32 to 64 dimens"),
        ("llama", {}, "phi", "llama: has no exact rewrite into phi; choose one of auto, keep"),
        ("gptj", {"rotary_dim": 8, "architectures": ["GPTJForQuestionAnswering"]}, "auto",
         "GPTJForQuestionAnswering cannot be rewritten, expected GPTJForCausalLM, GPTJForSeq"),
    ],
)  # fmt: skip
def test_what_is_not_exact_is_refused_by_name(
    model_type: str, overrides: dict[str, Any], architecture: str, message: str, tmp_path: Path
) -> None:
    source = save(tiny_model(tiny_config(model_type, **overrides)), tmp_path / "source")
    with pytest.raises(UnsupportedFamilyError) as caught:
        uptrain.convert(source, tmp_path / "target", 2, architecture=architecture)
    assert f"{source}: {model_type}: " in str(caught.value)
    assert message in str(caught.value)
    assert not (tmp_path / "target").exists()


def test_a_count_that_the_target_cannot_have_is_refused(sources: Any, tmp_path: Path) -> None:
    with pytest.raises(HeadCountError, match="choose one of 1, 4"):
        uptrain.convert(
            sources("gpt2-gpt_bigcode"), tmp_path / "target", 2, architecture="gpt_bigcode"
        )


def test_an_architecture_can_be_demanded(sources: Any, tmp_path: Path) -> None:
    source = sources("gpt_neox-starcoder2")
    uptrain.convert(source, tmp_path / "target", 4, architecture="nemotron")
    assert config_of(tmp_path / "target")["architectures"] == ["NemotronForCausalLM"]
    assert (logits(tmp_path / "target") - logits(source)).abs().max() <= 1e-10
    assert verify(tmp_path / "target", source)["problems"] == []


@pytest.mark.parametrize("change", ["missing", "surplus", "shape"])
def test_weights_that_are_not_the_configs_are_refused(
    change: str, sources: Any, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(sources("gptj-phi"), source)
    state, config = state_of(source), config_of(source)
    if change == "missing":
        del state["transformer.h.1.attn.k_proj.weight"]
        message = r"lacks tensor transformer\.h\.1\.attn\.k_proj\.weight, which its config"
    elif change == "shape":
        state["transformer.h.1.attn.k_proj.weight"] = torch.ones(64, 60)
        message = r"k_proj\.weight has shape .*, config.json asks for \(64, 64\)"
    else:
        config |= {"n_layer": 1}
        message = r"transformer\.h\.1\.\S+ belongs to a layer that config.json does not have"
    safetensors.torch.save_file(state, source / "model.safetensors", {"format": "pt"})
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        uptrain.convert(source, tmp_path / "target", 4)


def test_verify_sees_through_a_rewrite(sources: Any, tmp_path: Path) -> None:
    source, target = sources("codegen-phi"), tmp_path / "target"
    uptrain.convert(source, target, 2)
    checks = verify(target, source)["checks"]
    assert (
        "config.json differs from the rewritten source's only in the number of KV heads" in checks
    )
    assert "8 tensors equal the rewritten source's merged heads" in checks
    other = save(
        tiny_model(tiny_config("codegen", **CASES["codegen-phi"][1]), seed=1), tmp_path / "o"
    )
    problems = verify(target, other)["problems"]
    assert any("q_proj.weight is not what mean makes" in problem for problem in problems)
    # One that stayed what it is, compared with a source that would have to be rewritten.
    record = json.loads((target / "uptrain.json").read_text())
    (target / "uptrain.json").write_text(json.dumps({**record, "rewrite": {"target": 3}}))
    with pytest.raises(CheckpointError, match="is damaged"):
        verify(target, source)


def byte_tokenizer(folder: Path, *, whole: bool, **settings: Any) -> None:
    """A byte-level tokenizer as GPT-2's: as `tokenizer.json`, or as vocabulary and merges only."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    letters = [chr(code) for code in range(97, 123)]
    trainer = trainers.BpeTrainer(
        vocab_size=100, special_tokens=["</s>", "<pad>"], initial_alphabet=[*letters, "Ġ", "Ċ"]
    )
    made.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 9], trainer)
    made.save(str(folder / "tokenizer.json")) if whole else made.model.save(str(folder))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


OPTS = {
    "tokenizer_class": "GPT2Tokenizer", "add_bos_token": True,
    "bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>",
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "whole", "settings", "stays"),
    [
        # transformers takes gpt_bigcode's and nemotron's tokenizers for other classes than gpt2's
        # and opt's: they would have no special tokens, or not load at all.
        ("opt-gpt_bigcode", False, OPTS, False),
        ("gpt2-gpt_bigcode", True, {"model_max_length": 64}, False),
        ("gpt2-gpt_bigcode", True, {**OPTS, "additional_special_tokens": ["<|im_end|>"]}, False),
        ("gpt_neox-nemotron", False, {"tokenizer_class": "GPTNeoXTokenizer"}, False),
        ("gpt_neox-phi", True, {**OPTS, "tokenizer_class": "GPTNeoXTokenizer"}, True),
        ("codegen-phi", False, {**OPTS, "tokenizer_class": "CodeGenTokenizer"}, True),
    ],
)
def test_a_tokenizer_stays_what_it_is(
    case: str, whole: bool, settings: dict[str, Any], stays: bool, sources: Any, tmp_path: Path
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(sources(case), source)
    byte_tokenizer(source, whole=whole, **settings)
    uptrain.convert(source, target, 4 if "gpt" in case else 8, architecture="auto")
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (source, target))
    text = "the lazy  fox\n jumps</s> over"
    assert after(text)["input_ids"] == before(text)["input_ids"]
    assert after.decode(after(text)["input_ids"]) == before.decode(before(text)["input_ids"])
    assert after.special_tokens_map == before.special_tokens_map
    assert after.all_special_tokens == before.all_special_tokens
    assert after.model_max_length == before.model_max_length
    names = ["tokenizer_config.json", "tokenizer.json" if whole else "merges.txt"]
    same = [(source / name).read_bytes() == (target / name).read_bytes() for name in names]
    assert all(same) if stays else not same[0]
    assert verify(target, source)["problems"] == []


@pytest.mark.parametrize("case", ["gpt_neox-phi", "gpt2-gpt_bigcode", "gpt_neox-starcoder2"])
def test_calibration_repairs_a_rewritten_model(case: str, sources: Any, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(sources(case), source)
    byte_tokenizer(source, whole=True, **OPTS)
    text = tmp_path / "text.txt"
    text.write_text("the lazy dog jumps over the quick brown fox and over the fox " * 80)
    count = 1 if "bigcode" in case else 2
    uptrain.convert(source, tmp_path / "mean", count)
    result = uptrain.convert(
        source,
        tmp_path / "calibrated",
        count,
        calibration=text,
        calibration_tokens=1024,
        reconstruct_steps=4,
        device="cpu",
    )
    assert result["method"] == "factorize"
    assert all(layer["error"]["layer"] < layer["error"]["merged"] for layer in result["layers"])
    assert verify(tmp_path / "calibrated", source)["problems"] == []
    ids = torch.tensor([AutoTokenizer.from_pretrained(source)(text.read_text())["input_ids"][:64]])
    with torch.no_grad():
        wanted, *found = (load(tmp_path / n)(ids).logits for n in ("source", "mean", "calibrated"))
    losses = [(each - wanted).square().mean() for each in found]
    assert losses[1] < 0.5 * losses[0]


def test_the_command_line_says_what_becomes_of_a_family(sources: Any, tmp_path: Path) -> None:
    source, target = str(sources("gpt_neox-phi")), str(tmp_path / "target")
    heads = ["--num-key-value-heads", "2"]
    shown = CliRunner().invoke(main, ["convert", source, target, *heads, "--dry-run"])
    assert shown.exit_code == 0
    assert "rewrite   gpt_neox → phi, which computes the same" in shown.stdout
    assert "vLLM: its own class ignores the number of KV heads" in shown.stdout
    assert "llama.cpp: its converter writes as many KV heads as query heads" in shown.stdout
    assert "8 changed, 25 rewritten" in shown.stdout
    assert not (tmp_path / "target").exists()
    arguments = ["convert", source, target, *heads, "--architecture", "keep"]
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 1
    assert "it needs a rewrite into another one" in refused.stderr
    done = CliRunner().invoke(main, ["convert", source, target, *heads, "--json"])
    record = json.loads((tmp_path / "target" / "uptrain.json").read_text())
    assert json.loads(done.stdout)["rewrite"] == record["rewrite"]
    assert record["architecture"] == "auto"
    assert "gpt_neox rewritten as phi" in (tmp_path / "target" / "README.md").read_text()
    inspected = json.loads(CliRunner().invoke(main, ["inspect", source, "--json"]).stdout)
    found = [(each["num_key_value_heads"], each["model_type"]) for each in inspected["targets"]]
    assert found == [(4, "phi"), (2, "phi"), (1, "phi")]
    printed = CliRunner().invoke(main, ["inspect", str(sources("gpt2-gpt_bigcode"))]).stdout
    assert "rewritten as gpt_bigcode" in printed
