"""Every supported family, judged by stock transformers: equal heads merge without a trace."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from tiny import D, H, save, tiny_config, tiny_model
from transformers import AutoModelForCausalLM

import uptrain
from uptrain.errors import HeadCountError, UnsupportedFamilyError
from uptrain.families import meta, registry
from uptrain.families.head_tensors import (
    head_tensors,
    kv_cache_bytes_per_token,
    possible_head_counts,
)
from uptrain.families.layouts import join_heads, split_heads
from uptrain.families.schema import Heads, Layout

HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
CONVOLUTIONAL = {"layer_types": ["conv", "full_attention"]}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8}

# One line a family: what its config needs beyond the common small values, if anything.
FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "apertus": {},
    "arcee": {},
    "aria_text": {},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "beam": {},
    "bitnet": {},
    "cohere": {},
    "cohere2": {},
    "cohere2_moe": {},
    "cwm": {},
    "dbrx": {
        "attn_config": {"kv_n_heads": 4, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {
            "ffn_hidden_size": 48,
            "moe_num_experts": 2,
            "moe_top_k": 1,
            "hidden_size": 64,
        },
    },
    "diffllama": {},
    "dots1": {},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone4": {},
    "exaone_moe": {},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 4},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 128},
    "flex_olmo": {},
    "flint": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.0, 0.0],
        "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "intermediate_size": 48,
    },
    "gemma4_text": {
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 128,
    },
    "gemma4_unified_text": {
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "global_head_dim": 16,
        "num_global_key_value_heads": 4,
    },
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "gpt_bigcode": {"multi_query": False},
    "gpt_oss": {},
    "granite": {},
    "granite_swa": {},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention"]},
    "granitemoeshared": {},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "hyperclovax": {},
    "inkling_text": {
        "swa_num_key_value_heads": 4,
        "swa_num_attention_heads": 4,
        "swa_head_dim": 16,
    },
    "internlm3": {},
    "iquestcoder": {},
    "jais2": {},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "use_mamba_kernels": False,
    },
    "kolibri1": {},
    "laguna": {},
    "lfm2": {},
    "lfm2_moe": CONVOLUTIONAL,
    "lfm3": CONVOLUTIONAL,
    "llama": {},
    "llama4_text": {},
    "mellum": {},
    "minimax": {},
    "minimax_m2": {},
    "minimax_m3_vl_text": {},
    "ministral": {},
    "ministral3": {},
    "mistral": {},
    "mixtral": {},
    "moshi": {},
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 8, "n_groups": 1},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmo_hybrid": {},
    "olmoe": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_5_moe_text": HYBRID,
    "qwen3_5_text": HYBRID,
    "qwen3_moe": {},
    "qwen3_next": HYBRID,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 64},
    "seed_oss": {},
    "smollm3": {},
    "solar_open": {},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": {},
}
COUNTS = {"diffllama": [2], "gpt_bigcode": [1]}
# Their norms over the whole key compute in float32, whatever the model's dtype.
FLOAT32_INSIDE = {"flex_olmo", "minimax_m2", "olmo2", "olmo3", "olmo_hybrid", "olmoe"}

LATENT = [
    "axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite",
    "glm_moe_dsa", "hy_v4", "longcat_flash", "minicpm3", "youtu",
]  # fmt: skip


def make_heads_equal(folder: Path, config: dict[str, Any], count: int) -> None:
    """Give every KV head of a group the weights of the group's first."""
    path = folder / "model.safetensors"
    state = safetensors.torch.load_file(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    heads = registry.read_heads(config)
    for tensor in head_tensors(config, count, shapes):
        query, key_value = split_heads(state[tensor.name], tensor.layout, heads)
        equal = [
            part.unflatten(0, (count, -1))[:, :1]
            .expand(-1, H // count, *part.shape[1:])
            .flatten(0, 1)
            for part in key_value
        ]
        state[tensor.name] = join_heads(query, equal, tensor.layout).contiguous()
    safetensors.torch.save_file(state, path, {"format": "pt"})


def swap_groups(folder: Path, config: dict[str, Any]) -> None:
    """Rotate the KV heads by one: what a wrong order of groups would do."""
    path = folder / "model.safetensors"
    state = safetensors.torch.load_file(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    heads = registry.read_heads(config)
    other = H if heads.num_key_value_heads != H else 1
    for tensor in head_tensors(config, other, shapes):
        query, key_value = split_heads(state[tensor.name], tensor.layout, heads)
        rolled = [part.roll(1, 0) for part in key_value]
        state[tensor.name] = join_heads(query, rolled, tensor.layout).contiguous()
    safetensors.torch.save_file(state, path, {"format": "pt"})


def logits(folder: Path) -> torch.Tensor:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float64,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    ids = torch.randint(1, 100, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return result


@pytest.mark.filterwarnings("ignore")  # of the model classes themselves
@pytest.mark.parametrize("model_type", FAMILIES)
def test_equal_heads_merge_without_a_trace(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(tiny_config(model_type, **FAMILIES[model_type]))
    for count in COUNTS.get(model_type, [2, 1]):
        source = save(model, tmp_path / f"source{count}")
        config = json.loads((source / "config.json").read_text())
        make_heads_equal(source, config, count)
        target = tmp_path / f"target{count}"
        uptrain.convert(source, target, count)
        original, converted = logits(source), logits(target)
        # float64 throughout, except for families whose own code computes in float32.
        tolerance = 1e-6 if model_type in FLOAT32_INSIDE else 1e-10
        assert (converted - original).abs().max() <= tolerance * max(1, float(original.abs().max()))
        if count > 1:
            swap_groups(target, json.loads((target / "config.json").read_text()))
            assert (logits(target) - original).abs().max() > 1e-3 * original.abs().max()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", LATENT)
def test_latent_attention_is_refused(model_type: str) -> None:
    config = {**tiny_config(model_type).to_dict(), "model_type": model_type}
    shapes = dict(meta.tensor_shapes(config))
    with pytest.raises(UnsupportedFamilyError, match="no tensor follows its number of KV heads"):
        head_tensors(config, 1, shapes)


@pytest.mark.parametrize(
    ("model_type", "overrides", "message"),
    [
        ("moonshine", {}, "reshapes its queries by the number of KV heads"),
        ("jetmoe", {}, "mixture of experts whose query heads are tied"),
        ("gpt2", {}, "needs a rewrite into another one"),
        ("falcon", {"new_decoder_architecture": False}, "only falcon's new decoder architecture"),
        ("llava", {}, r"KV heads are set in text_config\.num_key_value_heads"),
        (
            "gemma4_text",
            {"attention_k_eq_v": True, "num_global_key_value_heads": 2},
            "its layers have different",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_families_that_cannot_are_refused_by_name(
    model_type: str, overrides: dict[str, Any], message: str
) -> None:
    config = {
        **transformers.CONFIG_MAPPING[model_type](**overrides).to_dict(),
        "model_type": model_type,
    }
    with pytest.raises(UnsupportedFamilyError, match=f"^{model_type}: .*{message}"):
        registry.read_heads(config)


def test_layers_with_twice_the_heads_are_refused() -> None:
    config = tiny_config("mimo_v2_flash", num_key_value_heads=2, v_head_dim=D).to_dict()
    config["layer_types"] = ["full_attention", "sliding_attention"]
    with pytest.raises(UnsupportedFamilyError, match="32 rows for each KV head"):
        head_tensors(config, 1, dict(meta.tensor_shapes(config)))


def test_a_tensor_without_a_rule_is_refused_by_name() -> None:
    config = tiny_config("doge").to_dict()
    with pytest.raises(
        UnsupportedFamilyError, match=r"tensor \S+dt_proj\.weight follows .* no rule"
    ):
        head_tensors(config, 2, dict(meta.tensor_shapes(config)))


def test_a_count_that_transformers_refuses_is_not_offered() -> None:
    config = tiny_config("diffllama").to_dict()
    assert possible_head_counts(config) == [2, 4]
    with pytest.raises(HeadCountError, match="choose one of 2, 4"):
        head_tensors(config, 1, dict(meta.tensor_shapes(config)))


def test_every_spelling_of_the_count_is_changed() -> None:
    config = tiny_config("falcon", **FAMILIES["falcon"]).to_dict() | {"n_head_kv": H}
    changed = registry.with_key_value_heads(config, 2)
    assert changed == config | {"num_kv_heads": 2, "n_head_kv": 2}


@pytest.mark.parametrize("layout", ["separate", "concatenated", "grouped"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_layouts_split_and_join(layout: str, count: int) -> None:
    rows = count * D if layout == "separate" else (H + 2 * count) * D
    tensor = torch.arange(rows * 3.0).reshape(rows, 3)
    query, key_value = split_heads(tensor, Layout(layout), Heads(H, count))
    assert torch.equal(join_heads(query, key_value, Layout(layout)), tensor)
    assert all(part.shape == (count, D, 3) for part in key_value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt_bigcode", "olmo2", "qwen3_next"])
def test_kv_cache_bytes_are_those_of_a_real_cache(model_type: str) -> None:
    config = tiny_config(model_type, **FAMILIES[model_type])
    model = tiny_model(config)
    cache = model(torch.arange(1, 11)[None], use_cache=True).past_key_values
    layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    held = sum(layer.keys.numel() + layer.values.numel() for layer in layers) // 10
    assert kv_cache_bytes_per_token(config.to_dict()) == held * 8  # float64
