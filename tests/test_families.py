"""Every supported family, judged by stock transformers: equal heads merge without a trace."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from family_list import (
    COUNTS,
    FAMILIES,
    FLOAT32_INSIDE,
    FLOAT32_ONLY,
    IMPLEMENTATION,
    INPUTS,
    PARTS,
    TEXT,
)
from tiny import AUTO_CLASSES, D, H, save, tiny_config, tiny_model
from transformers import AutoConfig

import uptrain
from uptrain.checkpoint.reader import open_checkpoint
from uptrain.errors import HeadCountError, UnsupportedFamilyError
from uptrain.families import meta, registry
from uptrain.families.head_tensors import (
    all_head_tensors,
    head_tensors,
    kv_cache_bytes_per_token,
    possible_head_counts,
)
from uptrain.families.layouts import join_heads, split_heads
from uptrain.families.schema import Heads, HeadTensor, Layout
from uptrain.loading import load_config

LATENT = [
    "axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite",
    "glm_moe_dsa", "hy_v4", "longcat_flash", "minicpm3", "youtu",
]  # fmt: skip


_script = Path(__file__).parent.parent / "docs" / "make_families.py"
_spec = importlib.util.spec_from_file_location("make_families", _script)
assert _spec is not None
assert _spec.loader is not None
make_families = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_families)


def change_heads(
    folder: Path,
    tensors: list[HeadTensor],
    change: Callable[[torch.Tensor, HeadTensor], torch.Tensor],
) -> None:
    """Change the KV heads [K, …] of a checkpoint's tensors."""
    path = folder / "model.safetensors"
    state = safetensors.torch.load_file(path)
    for tensor in tensors:
        whole = torch.cat([state[member] for member in tensor.members])
        query, key_value = split_heads(whole, tensor.layout, tensor.heads)
        changed = [change(part, tensor) for part in key_value]
        rows = join_heads(query, changed, tensor.layout).split(len(state[tensor.members[0]]))
        state |= dict(zip(tensor.members, (r.contiguous() for r in rows), strict=True))
    safetensors.torch.save_file(state, path, {"format": "pt"})


def make_heads_equal(folder: Path, config: dict[str, Any], count: int) -> None:
    """Give every KV head of a group the weights of the group's first."""

    def first_of_group(part: torch.Tensor, tensor: HeadTensor) -> torch.Tensor:
        first = part.unflatten(0, (tensor.num_key_value_heads, -1))[:, :1]
        return first.expand(-1, len(part) // len(first), *part.shape[1:]).flatten(0, 1)

    change_heads(folder, head_tensors(config, count, shapes_of(folder)), first_of_group)


def swap_groups(folder: Path, config: dict[str, Any]) -> None:
    """Rotate the KV heads by one: what a wrong order of groups would do."""
    tensors = all_head_tensors(config, shapes_of(folder))
    change_heads(folder, tensors, lambda part, tensor: part.roll(1, 0))


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    state = safetensors.torch.load_file(folder / "model.safetensors")
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def logits(folder: Path) -> torch.Tensor:
    """Load a checkpoint as a user would, and run it on text, or on what else it needs."""
    config = AutoConfig.from_pretrained(folder)
    model_type = config.model_type
    cls = getattr(transformers, config.architectures[0])
    auto = (each for each in AUTO_CLASSES if each._model_mapping.get(type(config), None) is cls)
    model, info = next(auto, cls).from_pretrained(
        folder,
        dtype=torch.float32 if model_type in FLOAT32_ONLY else torch.float64,
        attn_implementation=IMPLEMENTATION.get(model_type, "eager"),
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    outputs = [run(model, INPUTS.get(model_type, {"input_ids": (1, 20)}))]
    if model_type in PARTS:
        part, shapes = PARTS[model_type]
        outputs.append(run(model.get_submodule(part), shapes))
    return torch.cat([output.flatten() for output in outputs])


def make_inputs(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randint(1, 100, shape, generator=generator)
        if name.endswith("_ids")
        else torch.randn(shape, generator=generator).to(dtype)
        for name, shape in shapes.items()
    }


def run(model: Any, shapes: dict[str, tuple[int, ...]]) -> torch.Tensor:
    given = make_inputs(shapes, model.dtype)
    torch.manual_seed(0)  # of models that fill a canvas with noise
    with torch.no_grad():
        output = model.eval()(**given, use_cache=False)
    result: torch.Tensor = output.logits if "logits" in output else output[0]
    return result


@pytest.mark.filterwarnings("ignore")  # of the model classes themselves
@pytest.mark.parametrize("name", FAMILIES)
def test_equal_heads_merge_without_a_trace(
    name: str, tmp_path: Path, record_property: Callable[[str, str], None]
) -> None:
    model_type = name.partition(":")[0]
    model = tiny_model(tiny_config(model_type, **FAMILIES[name]))
    # One number shows that a text model is found within another; what it can go to is its own line's.
    for count in COUNTS.get(name, [2, 1] if name in TEXT or ":" in name else [2]):
        source = save(model, tmp_path / f"source{count}")
        config = json.loads((source / "config.json").read_text())
        make_heads_equal(source, config, count)
        target = tmp_path / f"target{count}"
        uptrain.convert(source, target, count, architecture="keep")
        original, converted = logits(source), logits(target)
        # float64 throughout, except for families whose own code computes in float32.
        tolerance = 1e-6 if model_type in FLOAT32_INSIDE | FLOAT32_ONLY else 1e-10
        assert (converted - original).abs().max() <= tolerance * max(1, float(original.abs().max()))
        if count > 1:
            swap_groups(target, json.loads((target / "config.json").read_text()))
            assert (logits(target) - original).abs().max() > 1e-3 * original.abs().max()
    record_property("family", model_type)


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
        ("zaya", {}, "convolves queries and keys together"),
        ("pi0", {}, "two models attend to each other's keys"),
        ("qwen2_5_omni", {}, "several models in one"),
        ("zamba2", {"use_shared_attention_adapter": True}, "its shared attention has adapters"),
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
    config = {**tiny_config("neomme").to_dict(), "architectures": ["NeoMMEForMaskedLM"]}
    with pytest.raises(
        UnsupportedFamilyError, match=r"tensor \S+value_embeddings\.weight follows .* no rule"
    ):
        head_tensors(config, 2, dict(meta.tensor_shapes(config)))


HEADS = [
    "LlamaForSequenceClassification",
    "LlamaForTokenClassification",
    "LlamaForQuestionAnswering",
    "LlamaModel",
    "Qwen2ForSequenceClassification",
    "Qwen2Model",
    "Phi3ForTokenClassification",
    "FalconForSequenceClassification",
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", HEADS)
def test_classifiers_and_base_models_convert(architecture: str, tmp_path: Path) -> None:
    cls = getattr(transformers, architecture)
    model_type = cls.config_class.model_type
    config = tiny_config(model_type, **FAMILIES[model_type], architectures=[architecture])
    source = save(tiny_model(config), tmp_path / "source")
    make_heads_equal(source, json.loads((source / "config.json").read_text()), 2)
    target = tmp_path / "target"
    uptrain.convert(source, target, 2)
    torch.testing.assert_close(logits(target), logits(source), rtol=0, atol=1e-10)
    layer_names = [name for name in shapes_of(target) if ".k_proj." in name]
    if "For" in architecture:
        with pytest.raises(
            UnsupportedFamilyError, match=f"{architecture} does not continue a text"
        ):
            load_config(open_checkpoint(target))
    if architecture.endswith("Model"):  # saved without a prefix
        assert all(name.startswith("layers.") for name in layer_names)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llava", "exaone4_5", "qwen2_audio"])
def test_towers_stay_as_they_are(name: str, tmp_path: Path) -> None:
    source = save(tiny_model(tiny_config(name, **FAMILIES[name])), tmp_path / "source")
    target = tmp_path / "target"
    uptrain.convert(source, target, 1)
    before, after = (safetensors.torch.load_file(f / "model.safetensors") for f in (source, target))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert all("language_model" in key and ("k_proj" in key or "v_proj" in key) for key in changed)
    was, now = (json.loads((f / "config.json").read_text()) for f in (source, target))
    assert now.pop("text_config") == was.pop("text_config") | {"num_key_value_heads": 1}
    assert now == was  # the vision tower of exaone4_5 has a num_key_value_heads of its own


def test_a_wrapper_with_flat_keys_keeps_them_flat() -> None:
    config = tiny_config("qwen2_vl", **FAMILIES["qwen2_vl"]).to_dict()
    flat = {**config.pop("text_config"), **config, "model_type": "qwen2_vl"}
    assert registry.with_key_value_heads(flat, 2) == flat | {"num_key_value_heads": 2}


def test_a_default_that_is_not_written_is_written() -> None:
    config = tiny_config("llava").to_dict()
    config["text_config"].pop("num_key_value_heads")  # then there are as many as query heads
    changed = registry.with_key_value_heads(config, 2)
    assert changed["text_config"]["num_key_value_heads"] == 2


def test_parts_with_fewer_heads_keep_theirs() -> None:
    config = tiny_config("dia", **FAMILIES["dia:different"]).to_dict()
    assert [s.heads.num_key_value_heads for s in registry.kv_settings(config)] == [4, 2]
    changed = registry.with_key_value_heads(config, 2)["decoder_config"]
    assert (changed["num_key_value_heads"], changed["cross_num_key_value_heads"]) == (2, 2)
    assert registry.with_key_value_heads(config, 1)["decoder_config"]["num_key_value_heads"] == 1


def test_old_keys_of_gemma4_are_changed_where_they_are() -> None:
    config = tiny_config("gemma4_text", **FAMILIES["gemma4_text:keys-are-values"]).to_dict()
    del config["per_layer_config"]
    config |= {"num_global_key_value_heads": 2, "global_head_dim": 32}
    changed = registry.with_key_value_heads(config, 1)
    assert changed == config | {"num_key_value_heads": 1, "num_global_key_value_heads": 1}


def test_an_encoder_changes_only_if_asked() -> None:
    config = tiny_config("t5gemma").to_dict() | {"model_type": "t5gemma"}
    changed = registry.with_key_value_heads(config, 2)
    assert changed["decoder"]["num_key_value_heads"] == 2
    assert changed["encoder"] == config["encoder"]
    assert registry.with_key_value_heads(config, 2, encoder=True)["encoder"] == (
        config["encoder"] | {"num_key_value_heads": 2}
    )


@pytest.mark.filterwarnings("ignore")
def test_a_block_that_layers_share_may_be_stored_under_each_name(tmp_path: Path) -> None:
    source = save(tiny_model(tiny_config("zamba", **FAMILIES["zamba"])), tmp_path / "source")
    path = source / "model.safetensors"
    state = safetensors.torch.load_file(path)
    shared = {name: t for name, t in state.items() if ".shared_transf." in name}
    state |= {name.replace("layers.1.", "layers.3."): t.clone() for name, t in shared.items()}
    safetensors.torch.save_file(state, path, {"format": "pt"})
    uptrain.convert(source, tmp_path / "target", 1)
    after = safetensors.torch.load_file(tmp_path / "target" / "model.safetensors")
    first = "model.layers.1.shared_transf.self_attn.k_proj.weight"
    assert len(after[first]) * 4 == len(state[first])
    assert torch.equal(after[first], after[first.replace("layers.1.", "layers.3.")])


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
@pytest.mark.parametrize(
    "name",
    [
        *("llama", "phi3", "gpt_bigcode", "olmo2", "qwen3_next", "gemma3", "zamba"),
        *("gemma4_text:keys-are-values", "gemma4_text:shared", "gemma3n_text:shared"),
    ],
)
def test_kv_cache_bytes_are_those_of_a_real_cache(name: str) -> None:
    config = tiny_config(name.partition(":")[0], **FAMILIES[name])
    model = tiny_model(config)
    cache = model(torch.arange(1, 11)[None], use_cache=True).past_key_values
    layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    held = sum(layer.keys.numel() + layer.values.numel() for layer in layers) // 10
    assert kv_cache_bytes_per_token(config.to_dict()) == held * 8  # float64


@pytest.mark.filterwarnings("ignore")
def test_the_page_of_families_lists_them_all_as_they_are() -> None:
    # Layouts and methods need each model: `python docs/make_families.py` writes them.
    table = make_families.PAGE.read_text().removesuffix(make_families.rewritten())
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    written = {cells[0]: cells for cells in rows}
    for name in FAMILIES:
        family, keys, known, runs = make_families.described(name)
        assert family in written, f"{family} is not on the page: run python docs/make_families.py"
        assert written[family][1] == keys
        assert written[family][4:] == [known, runs]
    assert make_families.rewritten() in make_families.PAGE.read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_page_of_families_is_up_to_date() -> None:
    assert make_families.page() == make_families.PAGE.read_text()
