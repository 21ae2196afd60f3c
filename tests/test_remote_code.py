"""Families that transformers knows only by code of their own, judged by what their papers and files say.

Each original is written down here in a few lines of float64 torch. As stock transformers does, norms are
taken and angles are computed in float32, so that the two can be compared to the last digits.
"""

import base64
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from torch import Tensor
from torch.nn.functional import linear, normalize, scaled_dot_product_attention, silu
from transformers import AutoModelForCausalLM, AutoTokenizer

import uptrain
from uptrain.cli import main
from uptrain.conversion.verify import verify
from uptrain.errors import CheckpointError, UnsupportedFamilyError

H, D, E, MLP, LAYERS, VOCAB = 4, 16, 64, 48, 2, 128
IDS = torch.arange(24).reshape(2, 12) * 5 % VOCAB
State = dict[str, Tensor]

_SIZES = {
    "vocab_size": VOCAB, "hidden_size": E, "intermediate_size": MLP, "num_hidden_layers": LAYERS,
    "num_attention_heads": H, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
    "hidden_act": "silu", "initializer_range": 0.02, "tie_word_embeddings": False,
    "torch_dtype": "float64", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def own_code(name: str, model: str) -> dict[str, Any]:
    """What a config says of the code beside it, which the tests make fail if it is run."""
    auto_map = {
        "AutoConfig": f"configuration_{name}.X",
        "AutoModelForCausalLM": f"modeling_{name}.{model}",
    }
    return {"model_type": name, "architectures": [model], "auto_map": auto_map}


BAICHUAN = {**own_code("baichuan", "BaiChuanForCausalLM"), **_SIZES}
BAICHUAN2 = {
    **BAICHUAN, "architectures": ["BaichuanForCausalLM"], "model_max_length": 64, "z_loss_weight": 0,
}  # fmt: skip
INTERNLM = {**own_code("internlm", "InternLMForCausalLM"), **_SIZES, "bias": True}
INTERNLM2 = {
    **own_code("internlm2", "InternLM2ForCausalLM"), **_SIZES, "bias": False, "num_key_value_heads": H,
    "rope_theta": 5000.0, "rope_scaling": None,
}  # fmt: skip
QWEN = {
    **own_code("qwen", "QWenLMHeadModel"), "vocab_size": VOCAB, "hidden_size": E, "kv_channels": D,
    "intermediate_size": 2 * MLP, "num_hidden_layers": LAYERS, "num_attention_heads": H,
    "layer_norm_epsilon": 1e-6, "max_position_embeddings": 256, "seq_length": 64, "no_bias": True,
    "rotary_emb_base": 10000, "rotary_pct": 1.0, "use_dynamic_ntk": True, "use_logn_attn": True,
    "bf16": False, "fp16": False, "fp32": False, "tie_word_embeddings": False,
    "tokenizer_class": "QWenTokenizer", "torch_dtype": "float64",
}  # fmt: skip
CHATGLM = {
    **own_code("chatglm", "ChatGLMModel"), "hidden_size": E, "ffn_hidden_size": MLP, "num_layers": LAYERS,
    "num_attention_heads": H, "kv_channels": D, "multi_query_attention": True, "multi_query_group_num": 2,
    "padded_vocab_size": VOCAB, "seq_length": 64, "layernorm_epsilon": 1e-5, "add_bias_linear": False,
    "add_qkv_bias": True, "rmsnorm": True, "post_layer_norm": True, "original_rope": True,
    "apply_residual_connection_post_layernorm": False, "apply_query_key_layer_scaling": True,
    "tie_word_embeddings": False, "torch_dtype": "float64", "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def rms(x: Tensor, gain: Tensor, eps: float = 1e-6) -> Tensor:
    short = x.float()
    return gain * (short * torch.rsqrt(short.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def angles(length: int, size: int, base: float, divisor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine of what each pair of channels is turned by, [length, size / 2]."""
    frequencies = 1.0 / (base ** (torch.arange(0, size, 2).float() / size)) / divisor
    turned = torch.outer(torch.arange(length).float(), frequencies)
    return turned.cos().double(), turned.sin().double()


def turn_halves(x: Tensor, base: float = 10000.0, divisor: float = 1.0) -> Tensor:
    """Turn channel i together with channel i + d/2; x is [batch, heads, length, d]."""
    cos, sin = angles(x.shape[-2], x.shape[-1], base, divisor)
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def turn_neighbours(x: Tensor) -> Tensor:
    """Turn channel 2i together with channel 2i + 1 in the first half of each head."""
    size = x.shape[-1] // 2
    cos, sin = angles(x.shape[-2], size, 10000.0)
    even, odd = x[..., 0:size:2], x[..., 1:size:2]
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    return torch.cat([turned, x[..., size:]], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, turn: Callable[[Tensor], Tensor]) -> Tensor:
    """Causal attention over heads [batch, length, heads, d]; fewer KV heads serve neighbouring queries."""
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (each.repeat_interleave(group, dim=1) for each in (turn(k), v))
    out = scaled_dot_product_attention(turn(q), k, v, is_causal=True)
    return out.transpose(1, 2).flatten(2)


def heads_of(x: Tensor) -> Tensor:
    heads: Tensor = x.unflatten(-1, (-1, D))
    return heads


def baichuan(config: Mapping[str, Any], w: State, ids: Tensor) -> Tensor:
    x = w["model.embed_tokens.weight"][ids]
    for n in range(LAYERS):
        at = f"model.layers.{n}."
        packed = linear(rms(x, w[at + "input_layernorm.weight"]), w[at + "self_attn.W_pack.weight"])
        q, k, v = map(heads_of, packed.split(E, dim=-1))
        x = x + linear(attend(q, k, v, turn_halves), w[at + "self_attn.o_proj.weight"])
        y = rms(x, w[at + "post_attention_layernorm.weight"])
        gate, up = (linear(y, w[f"{at}mlp.{part}_proj.weight"]) for part in ("gate", "up"))
        x = x + linear(silu(gate) * up, w[at + "mlp.down_proj.weight"])
    head = w["lm_head.weight"]
    is_second = config["architectures"] == ["BaichuanForCausalLM"]
    return linear(rms(x, w["model.norm.weight"]), normalize(head) if is_second else head)


def internlm(config: Mapping[str, Any], w: State, ids: Tensor) -> Tensor:
    x = w["model.embed_tokens.weight"][ids]
    base = float((config.get("rotary") or {"base": 10000})["base"])
    for n in range(LAYERS):
        at = f"model.layers.{n}."
        y = rms(x, w[at + "input_layernorm.weight"])
        parts = {
            part: (w[f"{at}self_attn.{part}_proj.weight"], w.get(f"{at}self_attn.{part}_proj.bias"))
            for part in "qkvo"
        }
        q, k, v = (heads_of(linear(y, *parts[part])) for part in "qkv")
        x = x + linear(attend(q, k, v, lambda each: turn_halves(each, base)), *parts["o"])
        y = rms(x, w[at + "post_attention_layernorm.weight"])
        gate, up = (linear(y, w[f"{at}mlp.{part}_proj.weight"]) for part in ("gate", "up"))
        x = x + linear(silu(gate) * up, w[at + "mlp.down_proj.weight"])
    return linear(rms(x, w["model.norm.weight"]), w["lm_head.weight"])


def internlm2(config: Mapping[str, Any], w: State, ids: Tensor) -> Tensor:
    x, K = w["model.tok_embeddings.weight"][ids], config["num_key_value_heads"]
    scaling = config["rope_scaling"] or {"type": "none"}
    divisor = scaling["factor"] if scaling["type"] == "linear" else 1.0
    for n in range(LAYERS):
        at = f"model.layers.{n}."
        qkv = linear(
            rms(x, w[at + "attention_norm.weight"]),
            w[at + "attention.wqkv.weight"],
            w.get(at + "attention.wqkv.bias"),
        ).unflatten(-1, (K, H // K + 2, D))
        q, k, v = qkv[..., :-2, :].flatten(-3, -2), qkv[..., -2, :], qkv[..., -1, :]
        out = attend(q, k, v, lambda each: turn_halves(each, config["rope_theta"], divisor))
        x = x + linear(out, w[at + "attention.wo.weight"], w.get(at + "attention.wo.bias"))
        y = rms(x, w[at + "ffn_norm.weight"])
        gate, down, up = (w[f"{at}feed_forward.w{part}.weight"] for part in (1, 2, 3))
        x = x + linear(silu(linear(y, gate)) * linear(y, up), down)
    return linear(rms(x, w["model.norm.weight"]), w["output.weight"])


def qwen(config: Mapping[str, Any], w: State, ids: Tensor) -> Tensor:
    """Also beyond `seq_length`, where it stretches the rotary base and scales queries."""
    x, length, trained = w["transformer.wte.weight"][ids], ids.shape[1], config["seq_length"]
    base = float(config["rotary_emb_base"])
    if config["use_dynamic_ntk"] and length > trained:
        alpha = 2 ** math.ceil(math.log2(length / trained) + 1) - 1
        base *= alpha ** (D / (D - 2))
    scale = torch.ones(length, dtype=torch.float64)
    if config["use_logn_attn"]:
        scale = (torch.arange(1, length + 1).double().log() / math.log(trained)).clamp(min=1)
    for n in range(LAYERS):
        at = f"transformer.h.{n}."
        fused = linear(
            rms(x, w[at + "ln_1.weight"]), w[at + "attn.c_attn.weight"], w[at + "attn.c_attn.bias"]
        )
        q, k, v = map(heads_of, fused.split(E, dim=-1))
        q = q * scale[:, None, None]
        out = attend(q, k, v, lambda each: turn_halves(each, base))
        x = x + linear(out, w[at + "attn.c_proj.weight"])
        y = rms(x, w[at + "ln_2.weight"])
        up, gate = (linear(y, w[f"{at}mlp.w{part}.weight"]) for part in (1, 2))
        x = x + linear(up * silu(gate), w[at + "mlp.c_proj.weight"])
    return linear(rms(x, w["transformer.ln_f.weight"]), w["lm_head.weight"])


def chatglm(config: Mapping[str, Any], w: State, ids: Tensor) -> Tensor:
    x, eps = w["transformer.embedding.word_embeddings.weight"][ids], config["layernorm_epsilon"]
    K = config["multi_query_group_num"]
    for n in range(LAYERS):
        at = f"transformer.encoder.layers.{n}."
        fused = linear(
            rms(x, w[at + "input_layernorm.weight"], eps),
            w[at + "self_attention.query_key_value.weight"],
            w.get(at + "self_attention.query_key_value.bias"),
        )
        if config["multi_query_attention"]:
            q, k, v = map(heads_of, fused.split([H * D, K * D, K * D], dim=-1))
        else:
            q, k, v = fused.unflatten(-1, (H, 3, D)).unbind(-2)
        out = attend(q, k, v, turn_neighbours)
        x = x + linear(out, w[at + "self_attention.dense.weight"])
        y = linear(
            rms(x, w[at + "post_attention_layernorm.weight"], eps),
            w[at + "mlp.dense_h_to_4h.weight"],
        )
        gate, up = y.chunk(2, dim=-1)
        x = x + linear(silu(gate) * up, w[at + "mlp.dense_4h_to_h.weight"])
    x = rms(x, w["transformer.encoder.final_layernorm.weight"], eps)
    return linear(x, w["transformer.output_layer.weight"])


ORIGINALS = {
    "baichuan": baichuan, "internlm": internlm, "internlm2": internlm2, "qwen": qwen, "chatglm": chatglm,
}  # fmt: skip
# One line a form: its config, the family that it becomes.
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "baichuan": (BAICHUAN, "llama"),
    "baichuan2": (BAICHUAN2, "llama"),
    "internlm": (INTERNLM, "llama"),
    "internlm-unbiased": ({**INTERNLM, "bias": False}, "llama"),
    "internlm-dynamic": ({**INTERNLM, "rotary": {"base": 5000, "type": "dynamic"}}, "llama"),
    "internlm2": (INTERNLM2, "llama"),
    "internlm2-biased": ({**INTERNLM2, "bias": True}, "llama"),
    "internlm2-linear": ({**INTERNLM2, "rope_scaling": {"type": "linear", "factor": 4.0}}, "llama"),
    "internlm2-grouped": (
        {**INTERNLM2, "num_key_value_heads": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "llama",
    ),
    "qwen": (QWEN, "qwen2"),
    "qwen-older": (
        {
            **{k: v for k, v in QWEN.items() if k not in
               ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                "max_position_embeddings")},
            "n_embd": E, "n_layer": LAYERS, "n_head": H, "ffn_hidden_size": 2 * MLP, "n_positions": 192,
        },
        "qwen2",
    ),
    "qwen-plain": (
        {**QWEN, "rotary_emb_base": 1000000, "use_dynamic_ntk": False, "use_logn_attn": False}, "qwen2",
    ),
    "chatglm": (CHATGLM, "glm"),
    "chatglm-unbiased": ({**CHATGLM, "add_qkv_bias": False}, "glm"),
    "chatglm-all-heads": ({**CHATGLM, "multi_query_attention": False}, "glm"),
}  # fmt: skip


def shapes_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an original's tensors, as its own code saves them."""
    family, found = config["model_type"], {}
    K = config.get("num_key_value_heads", H)
    if family == "chatglm":
        K = config["multi_query_group_num"] if config["multi_query_attention"] else H
    fused = (H + 2 * K) * D
    layer: dict[str, tuple[int, ...]]
    if family in ("baichuan", "internlm"):
        layer = {
            "self_attn.o_proj.weight": (E, E), "mlp.gate_proj.weight": (MLP, E), "mlp.up_proj.weight": (MLP, E),
            "mlp.down_proj.weight": (E, MLP), "input_layernorm.weight": (E,),
            "post_attention_layernorm.weight": (E,),
        }  # fmt: skip
        if family == "baichuan":
            layer["self_attn.W_pack.weight"] = (fused, E)
        else:
            layer |= {f"self_attn.{part}_proj.weight": (E, E) for part in "qkv"}
            layer |= {f"self_attn.{part}_proj.bias": (E,) for part in "qkvo" if config["bias"]}
        ends, at = ("model.embed_tokens", "model.norm", "lm_head"), "model.layers"
    elif family == "internlm2":
        layer = {
            "attention.wqkv.weight": (fused, E), "attention.wo.weight": (E, E), "attention_norm.weight": (E,),
            "ffn_norm.weight": (E,), "feed_forward.w1.weight": (MLP, E), "feed_forward.w2.weight": (E, MLP),
            "feed_forward.w3.weight": (MLP, E),
        }  # fmt: skip
        if config["bias"]:
            layer |= {"attention.wqkv.bias": (fused,), "attention.wo.bias": (E,)}
        ends, at = ("model.tok_embeddings", "model.norm", "output"), "model.layers"
    elif family == "qwen":
        layer = {
            "attn.c_attn.weight": (fused, E), "attn.c_attn.bias": (fused,), "attn.c_proj.weight": (E, E),
            "ln_1.weight": (E,), "ln_2.weight": (E,), "mlp.w1.weight": (MLP, E), "mlp.w2.weight": (MLP, E),
            "mlp.c_proj.weight": (E, MLP),
        }  # fmt: skip
        ends, at = ("transformer.wte", "transformer.ln_f", "lm_head"), "transformer.h"
    else:
        layer = {
            "self_attention.query_key_value.weight": (fused, E), "self_attention.dense.weight": (E, E),
            "mlp.dense_h_to_4h.weight": (2 * MLP, E), "mlp.dense_4h_to_h.weight": (E, MLP),
            "input_layernorm.weight": (E,), "post_attention_layernorm.weight": (E,),
        }  # fmt: skip
        if config["add_qkv_bias"]:
            layer["self_attention.query_key_value.bias"] = (fused,)
        ends, at = (
            ("transformer.embedding.word_embeddings", "transformer.encoder.final_layernorm",
             "transformer.output_layer"), "transformer.encoder.layers",
        )  # fmt: skip
    found = {f"{at}.{n}.{name}": shape for n in range(LAYERS) for name, shape in layer.items()}
    embedding, norm, head = ends
    return found | {
        f"{embedding}.weight": (VOCAB, E), f"{norm}.weight": (E,), f"{head}.weight": (VOCAB, E),
    }  # fmt: skip


def make_state(config: Mapping[str, Any], seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...]) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return drawn / math.sqrt(E) if len(shape) == 2 else 1 + 0.3 * drawn

    return {name: draw(shape) for name, shape in shapes_of(config).items()}


def write(folder: Path, config: Mapping[str, Any], state: State) -> Path:
    """Write an original as it is published, with code that would be noticed if it were run."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
    for kind in ("modeling", "configuration", "tokenization"):
        (folder / f"{kind}_{config['model_type']}.py").write_text("raise SystemExit('was run')\n")
    return folder


def load(folder: Path) -> Any:
    """Load as a user would, and refuse whatever does not fit."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="sdpa", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@torch.no_grad()
def logits(folder: Path, ids: Tensor = IDS) -> Tensor:
    found: Tensor = load(folder)(ids).logits
    return found


def original(config: Mapping[str, Any], state: State, ids: Tensor = IDS) -> Tensor:
    return ORIGINALS[config["model_type"]](config, state, ids)


def source_heads(config: Mapping[str, Any]) -> int:
    if config["model_type"] == "chatglm":
        return int(config["multi_query_group_num"]) if config["multi_query_attention"] else H
    return int(config.get("num_key_value_heads", H))


@pytest.mark.parametrize("case", CASES)
def test_a_rewritten_original_computes_the_same(
    case: str, tmp_path: Path, record_property: Any
) -> None:
    config, expected = CASES[case]
    state = make_state(config)
    source, target = write(tmp_path / "source", config, state), tmp_path / "target"
    result = uptrain.convert(source, target, source_heads(config))
    assert result["rewrite"]["target"] == expected
    made = json.loads((target / "config.json").read_text())
    assert made["model_type"] == expected
    assert "auto_map" not in made
    assert not list(target.glob("*.py"))
    assert (logits(target) - original(config, state)).abs().max() <= 1e-10
    # Greedy generation with a cache goes the way of the original, which sees the whole text each time.
    wanted = IDS
    for _ in range(5):
        wanted = torch.cat([wanted, original(config, state, wanted)[:, -1:].argmax(-1)], dim=1)
    options = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None}
    found = load(target).generate(IDS, attention_mask=torch.ones_like(IDS), **options)
    assert torch.equal(found, wanted)
    assert verify(target, source)["problems"] == []
    record_property("family", f"{config['model_type']} → {expected}")


def change_heads(config: Mapping[str, Any], state: State, count: int, shift: int) -> State:
    """Make KV heads equal within `count` groups, and move the groups on by `shift`."""
    K, changed, places = source_heads(config), {}, 0
    for name, tensor in state.items():
        copy = tensor.clone()
        module = name.split(".")[-2]
        if module in ("k_proj", "v_proj"):
            views = [copy.view(K, D, -1)]
        elif module in ("wqkv", "query_key_value") and (
            module == "wqkv" or not config["multi_query_attention"]
        ):
            grouped = copy.view(K, H // K + 2, D, -1)
            views = [grouped[:, -2], grouped[:, -1]]
        elif module in ("W_pack", "c_attn", "query_key_value"):
            views = [part.view(K, D, -1) for part in copy[H * D :].split(K * D)]
        else:
            views = []
        for view in views:
            groups = [view[place].clone() for place in range(0, K, K // count)]
            for head in range(K):
                view[head] = groups[(head // (K // count) + shift) % count]
            places += 1
        changed[name] = copy
    assert places >= 2 * LAYERS
    return changed


# The other forms differ in biases and positions, which the test above sees.
FORMS = [
    "baichuan",
    "internlm",
    "internlm2",
    "internlm2-grouped",
    "qwen",
    "chatglm",
    "chatglm-all-heads",
]


@pytest.mark.parametrize("case", FORMS)
def test_equal_heads_merge_without_a_trace(case: str, tmp_path: Path) -> None:
    config, _ = CASES[case]
    for count in [n for n in (2, 1) if n < source_heads(config)]:
        state = change_heads(config, make_state(config), count, shift=0)
        source, target = write(tmp_path / f"s{count}", config, state), tmp_path / f"t{count}"
        uptrain.convert(source, target, count)
        wanted = original(config, state)
        assert (logits(target) - wanted).abs().max() <= 1e-10
        assert verify(target, source)["problems"] == []
        if count > 1:  # moving groups on shows that each query head has its own
            moved = change_heads(config, make_state(config), count, shift=1)
            uptrain.convert(write(tmp_path / "moved", config, moved), tmp_path / "other", count)
            assert (logits(tmp_path / "other") - wanted).abs().max() > 0.1


@pytest.mark.parametrize("case", ["internlm2-linear", "qwen-plain", "chatglm", "internlm-dynamic"])
def test_rotary_settings_are_those_of_both_transformers(case: str, tmp_path: Path) -> None:
    config, _ = CASES[case]
    state = make_state(config)
    target = tmp_path / "target"
    uptrain.convert(write(tmp_path / "source", config, state), target, source_heads(config))
    made = json.loads((target / "config.json").read_text())
    rope = made["rope_parameters"]
    assert made["rope_theta"] == rope["rope_theta"]
    assert made["partial_rotary_factor"] == (0.5 if case == "chatglm" else 1.0)
    wanted = original(config, state)
    older = {key: value for key, value in made.items() if key != "rope_parameters"}
    mirrors = ("rope_theta", "rope_scaling", "partial_rotary_factor")
    newer = {key: value for key, value in made.items() if key not in mirrors}
    for form in (older, newer):
        (target / "config.json").write_text(json.dumps(form))
        assert (logits(target) - wanted).abs().max() <= 1e-10


def test_what_qwen_loses_beyond_its_training_length(tmp_path: Path) -> None:
    """Up to it the two agree; beyond, they do not, which the plan says, and the config ends there."""
    state = make_state(QWEN)
    source, target = write(tmp_path / "source", QWEN, state), tmp_path / "target"
    result = uptrain.convert(source, target, H)
    lost = " ".join(result["rewrite"]["lost"])
    assert (
        "beyond 64 tokens Qwen stretches its rotary positions (use_dynamic_ntk) and scales" in lost
    )
    assert json.loads((target / "config.json").read_text())["max_position_embeddings"] == 64
    text = torch.arange(80)[None] * 7 % VOCAB
    within, beyond = text[:, :64], text
    assert (logits(target, within) - original(QWEN, state, within)).abs().max() <= 1e-10
    assert (logits(target, beyond) - original(QWEN, state, beyond)).abs().max() > 1e-2
    plain = CASES["qwen-plain"][0]  # nothing changes at any length
    state = make_state(plain)
    result = uptrain.convert(write(tmp_path / "plain", plain, state), tmp_path / "t", H)
    assert "beyond" not in " ".join(result["rewrite"]["lost"])
    assert (logits(tmp_path / "t", beyond) - original(plain, state, beyond)).abs().max() <= 1e-10


def test_internlm_stretches_its_base_as_llama_does(tmp_path: Path) -> None:
    """Beyond its length, for a text that is read at once: dynamic scaling by the factor 1."""
    config = {**CASES["internlm-dynamic"][0], "max_position_embeddings": 32}
    state = make_state(config)
    target = tmp_path / "target"
    result = uptrain.convert(write(tmp_path / "source", config, state), target, H)
    assert (
        "beyond 32 tokens, keys in the cache keep the rotary base" in result["rewrite"]["lost"][2]
    )
    text = torch.arange(48)[None] * 7 % VOCAB
    stretched = {**config, "rotary": {"base": 5000 * (48 / 32) ** (D / (D - 2))}}
    # transformers rounds the stretched base to float32.
    assert (logits(target, text) - original(stretched, state, text)).abs().max() <= 1e-4
    assert (logits(target, text) - original(config, state, text)).abs().max() > 1e-2


def test_the_head_of_baichuan2_is_normalised_once(tmp_path: Path) -> None:
    config = {**BAICHUAN2, "torch_dtype": "bfloat16"}
    state = {name: tensor.bfloat16() for name, tensor in make_state(config).items()}
    source, target = write(tmp_path / "source", config, state), tmp_path / "target"
    result = uptrain.convert(source, target, 2)
    assert (
        "divided by their lengths, as Baichuan2 does, and rounded to bfloat16"
        in (result["rewrite"]["lost"][2])
    )
    made = safetensors.torch.load_file(target / "model.safetensors")
    wanted = normalize(state["lm_head.weight"].double()).bfloat16()
    assert torch.equal(made["lm_head.weight"], wanted)
    assert torch.equal(made["model.norm.weight"], state["model.norm.weight"])
    # A converted one, taken for an original again, stays what it is to rounding.
    assert (normalize(wanted.double()) - wanted.double()).abs().max() < 2**-9


@pytest.mark.parametrize(
    ("config", "message"),
    [
        # 13B states model_max_length only.
        ({k: v for k, v in BAICHUAN2.items() if k != "max_position_embeddings"},
         "baichuan: has no class in transformers and no exact rewrite into a family that has one (its "
         "positions are linear biases (ALiBi), as in all Baichuan models of 13B"),
        ({**BAICHUAN2, "num_attention_heads": 40, "hidden_size": 640}, "linear biases (ALiBi)"),
        ({**BAICHUAN, "architectures": ["BaiChuanForSequenceClassification"]},
         "names BaiChuanForSequenceClassification, known are BaiChuanForCausalLM, BaichuanForCausalLM"),
        ({**BAICHUAN, "architectures": None, "auto_map": {}}, "its config.json names no class, known"),
        ({**INTERNLM, "rope_theta": 20000}, "its rope_theta is 20000, which its own code does not read"),
        ({**INTERNLM, "num_key_value_heads": 2}, "its num_key_value_heads is 2, which its own code"),
        ({**INTERNLM, "rotary": {"type": "xpos", "base": 1}}, 'its rotary positions are {"type": "xpos"'),
        ({**INTERNLM2, "rope_scaling": {"type": "yarn", "factor": 2}}, 'scaled by {"type": "yarn"'),
        ({**QWEN, "no_bias": False}, "qwen2 cannot express no_bias=false: its output and MLP maps have"),
        ({**QWEN, "rotary_pct": 0.5}, "rotary_pct=0.5: only a part of each head is rotated"),
        ({**QWEN, "visual": {"layers": 48}}, "it sees images, too"),
        ({**QWEN, "kv_channels": 8}, "its 4 heads of 8 channels do not make up its hidden size, 64"),
        ({**CHATGLM, "rope_ratio": 50}, "rope_ratio=50: ChatGLM2's code divides positions by it, ChatGLM3"),
        ({**CHATGLM, "pre_seq_len": 128}, "pre_seq_len=128: it has a learned prefix"),
        ({**CHATGLM, "post_layer_norm": False}, "post_layer_norm=false: it has no last norm"),
        ({k: v for k, v in CHATGLM.items() if "multi" not in k} | {"position_encoding_2d": True},
         "it is the first ChatGLM, whose positions are two-dimensional"),
    ],
)  # fmt: skip
def test_what_is_not_exact_is_refused_by_name(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = write(tmp_path / "source", config, {"x": torch.ones(1)})
    with pytest.raises(UnsupportedFamilyError) as caught:
        uptrain.convert(source, tmp_path / "target", 2)
    assert str(caught.value).startswith(f"{source}: {config['model_type']}: ")
    assert message in str(caught.value)
    assert str(caught.value).endswith("; use it as it is")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (QWEN, {"seq_length": None}, "seq_length is null, expected a positive integer"),
        (QWEN, {"use_logn_attn": "yes"}, 'use_logn_attn is "yes", expected true or false'),
        (QWEN, {"rotary_emb_base": -1}, "rotary_emb_base is -1, expected a positive number"),
        (INTERNLM2, {"bias": None}, "bias is null, expected true or false"),
        (INTERNLM2, {"rope_scaling": [1]}, r"rope_scaling is \[1\], expected an object"),
        (
            INTERNLM2,
            {"rope_scaling": {"type": "linear"}},
            "factor is null, expected a positive number",
        ),
        (INTERNLM, {"rotary": {"type": "dynamic"}}, "base is null, expected a positive number"),
        (CHATGLM, {"kv_channels": True}, "kv_channels is true, expected a positive integer"),
        (BAICHUAN, {"intermediate_size": 40}, r"has shape 48 × 64, config.json asks for 40 × 64"),
        (
            BAICHUAN,
            {"num_hidden_layers": 3},
            r"lacks tensor model\.layers\.2\.self_attn\.W_pack\.weight",
        ),
        (INTERNLM, {"bias": False}, r"tensor model\S+bias has no place in llama"),
        (
            INTERNLM2,
            {"num_attention_heads": 8, "num_key_value_heads": 1},
            r"cannot be made from tensor \S+wqkv\.weight of shape",
        ),
        (
            CHATGLM,
            {"num_attention_heads": 5, "multi_query_group_num": 1},
            r"cannot be made from tensor \S+query_key_value\.weight",
        ),
    ],
)
def test_configs_that_are_not_the_weights_are_refused(
    config: dict[str, Any], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = write(tmp_path / "source", {**config, **change}, make_state(config))
    with pytest.raises((CheckpointError, UnsupportedFamilyError), match=message):
        uptrain.convert(source, tmp_path / "target", 1)


def test_pickled_shards_are_rewritten_as_well(tmp_path: Path) -> None:
    """As Baichuan and InternLM were published."""
    state = make_state(BAICHUAN2)
    source = write(tmp_path / "source", BAICHUAN2, state)
    (source / "model.safetensors").unlink()
    shards: dict[str, State] = {
        "pytorch_model-00001-of-00002.bin": {},
        "pytorch_model-00002-of-00002.bin": {},
    }
    for place, name in enumerate(state):
        shards[list(shards)[place % 2]][name] = state[name]
    for name, content in shards.items():
        torch.save(content, source / name)
    index = {name: shard for shard, content in shards.items() for name in content}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    uptrain.convert(source, tmp_path / "target", H)
    assert (logits(tmp_path / "target") - original(BAICHUAN2, state)).abs().max() <= 1e-10
    assert verify(tmp_path / "target", source)["problems"] == []


def test_buffers_of_older_versions_are_left_behind(tmp_path: Path) -> None:
    for case, names in {
        "baichuan": ["model.layers.0.self_attn.rotary_emb.inv_freq"],
        "chatglm": ["transformer.rotary_pos_emb.inv_freq"],
        "qwen": ["transformer.h.0.attn.masked_bias", "transformer.rotary_emb.inv_freq"],
    }.items():
        config, state = CASES[case][0], make_state(CASES[case][0])
        buffers = {name: torch.ones(8) for name in names}
        uptrain.convert(write(tmp_path / case, config, state | buffers), tmp_path / f"t{case}", 1)
        load(tmp_path / f"t{case}")


def vocabulary(folder: Path) -> None:
    """Write Qwen's tokenizer with single bytes and a few words."""
    tokens = [bytes([n]) for n in range(256)] + [b"th", b"the", b" th", b" the"]
    lines = [f"{base64.b64encode(token).decode()} {n}" for n, token in enumerate(tokens)]
    (folder / "qwen.tiktoken").write_text("\n".join(lines))
    settings = {
        "tokenizer_class": "QWenTokenizer", "model_max_length": 64,
        "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A Qwen as it is published: bfloat16 that its config does not state, its code, its tokenizer."""
    config = {key: value for key, value in QWEN.items() if key != "torch_dtype"} | {
        "vocab_size": 512
    }
    state = {name: tensor.bfloat16() for name, tensor in make_state(config).items()}
    for name in ("transformer.wte.weight", "lm_head.weight"):
        state[name] = state[name].repeat(4, 1)
    folder = write(tmp_path / "published", config, state)
    vocabulary(folder)
    return folder


def test_a_user_goes_from_a_published_checkpoint_to_a_plain_one(
    published: Path, tmp_path: Path
) -> None:
    """None of the original's code is run; what results needs none, its tokenizer included."""
    target = tmp_path / "target"
    run = CliRunner().invoke
    shown = run(main, ["inspect", str(published)]).stdout
    assert "4 query heads, 4 KV heads (multi-head)" in shown
    assert "in bfloat16" in shown
    assert "rewritten as qwen2" in shown
    arguments = ["convert", str(published), str(target), "--num-key-value-heads", "2"]
    plan = run(main, [*arguments, "--dry-run"]).stdout
    assert "qwen → qwen2, which computes the same" in plan
    assert "accepted by transformers, vLLM, llama.cpp" in plan
    assert "methods of the original's own code, such as chat(), stay behind with it" in plan
    assert "convert it with all of its KV heads, too" in plan
    assert "tokenizer" not in plan
    done = run(main, arguments)
    assert done.exit_code == 0, done.output
    assert f"uptrain verify {target} --source {published}" in done.stdout
    assert run(main, ["verify", str(target), "--source", str(published)]).exit_code == 0
    assert json.loads((target / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert not list(target.glob("*.py"))
    tokenizer = AutoTokenizer.from_pretrained(target)
    ids = tokenizer("the other<|im_end|>")["input_ids"]
    assert ids == [257, *b" o", 257, *b"r", 262]
    assert tokenizer.decode(ids) == "the other<|im_end|>"
    assert (tokenizer.eos_token_id, tokenizer.model_max_length) == (260, 64)
    assert AutoModelForCausalLM.from_pretrained(target).config.num_key_value_heads == 2
    # Where its code is not needed, leave to run it changes nothing.
    trusting = [*arguments, "--overwrite", "--trust-remote-code"]
    assert run(main, trusting).exit_code == 0
    assert run(main, ["inspect", str(published), "--trust-remote-code"]).stdout == shown


def test_a_calibration_reads_text_by_the_new_tokenizer(published: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the other thing the others think of there and then " * 60)
    result = uptrain.convert(
        published, tmp_path / "target", 2, calibration=text, calibration_tokens=1024,
        reconstruct_steps=2, device="cpu",
    )  # fmt: skip
    assert all(layer["error"]["layer"] < layer["error"]["merged"] for layer in result["layers"])
    assert verify(tmp_path / "target", published)["problems"] == []


def test_a_tokenizer_that_stays_what_it_is_brings_its_code(tmp_path: Path) -> None:
    source = write(tmp_path / "source", CHATGLM, make_state(CHATGLM))
    settings = {"auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    result = uptrain.convert(source, tmp_path / "target", 1)
    assert result["rewrite"]["lost"][2] == (
        "its tokenizer still needs its own code (ChatGLMTokenizer is not known): load it with "
        "trust_remote_code=True, or put a tokenizer.json beside the weights"
    )
    assert [path.name for path in (tmp_path / "target").glob("*.py")] == ["tokenization_chatglm.py"]
    for name in ("tokenizer_config.json", "tokenization_chatglm.py"):
        assert (tmp_path / "target" / name).read_bytes() == (source / name).read_bytes()
    assert verify(tmp_path / "target", source)["problems"] == []


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("keep", "known to transformers only by code of the checkpoint's own, which has no number of KV "
         "heads; choose one of auto, qwen2"),
        ("qwen", "choose one of auto, qwen2"),
        ("llama", "qwen: has no exact rewrite into llama; choose one of auto, keep, qwen2"),
    ],
)  # fmt: skip
def test_an_architecture_that_cannot_be_had_is_refused(
    architecture: str, message: str, tmp_path: Path
) -> None:
    source = write(tmp_path / "source", QWEN, make_state(QWEN))
    with pytest.raises(UnsupportedFamilyError) as caught:
        uptrain.convert(source, tmp_path / "target", 2, architecture=architecture)
    assert message in str(caught.value)
    result = uptrain.convert(source, tmp_path / "target", 2, architecture="qwen2")
    assert result["architecture"] == "qwen2"
