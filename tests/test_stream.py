"""Running a checkpoint layer by layer, judged by stock transformers running it whole."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from family_list import COUNTS, FAMILIES, POOLED_ONLY, TEXT, UNHEARD
from tiny import model_class, save, tiny_config, tiny_model
from transformers import AutoConfig

import uptrain
from uptrain.checkpoint.reader import open_checkpoint
from uptrain.conversion.plan import plan_conversion
from uptrain.conversion.stacks import find_stacks
from uptrain.conversion.stream import LayerStream
from uptrain.errors import UnsupportedFamilyError

CPU = torch.device("cpu")
# Models that also see or hear, and are read plain text here; and what else differs from a plain stack.
WRAPPERS = [
    "llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "gemma4", "mllama", "paligemma", "idefics3", "janus",
    "zamba", "zamba2", "doge", "stablelm:norms", "gemma4_text:keys-are-values", "qwen4_exp_text", "ernie4_5_vl_moe", "molmo2",
    *(name for name in POOLED_ONLY if ":" not in name),
]  # fmt: skip


def stream_of(folder: Path, count: int = 1) -> LayerStream:
    checkpoint = open_checkpoint(folder)
    plan = plan_conversion(checkpoint, count)
    (stack,) = find_stacks(checkpoint, plan.head_tensors, None)
    return LayerStream(checkpoint, checkpoint.config, stack, CPU)


def through(stream: LayerStream, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        hidden = stream.embed(tokens)
        for index in range(len(stream)):
            hidden = stream.run(stream.layer(index), index, hidden, inputs=tokens)
        return stream.logits(hidden) if stream.vocabulary else stream.encoded(hidden)


def ids(batch: int = 2, length: int = 20) -> torch.Tensor:
    return torch.randint(10, 100, (batch, length), generator=torch.Generator().manual_seed(0))


def whole(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    cls = model_class(AutoConfig.from_pretrained(folder))
    model = cls.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    with torch.no_grad():
        output = model.eval()(input_ids=tokens, use_cache=False)
    found: torch.Tensor = output.logits if "logits" in output else output[0]
    return found


@pytest.mark.filterwarnings("ignore")  # of the model classes themselves
@pytest.mark.parametrize(
    "name",
    [
        # A wrapper with a language model in it is much like another; these differ.
        pytest.param(name, marks=() if name in TEXT or name in WRAPPERS else pytest.mark.slow)
        for name in FAMILIES
        if not name.startswith("t5gemma") and name not in UNHEARD  # see test_encoder.py
    ],
)
def test_layer_by_layer_is_the_whole(name: str, tmp_path: Path) -> None:
    model_type, count = name.partition(":")[0], COUNTS.get(name, [2])[0]
    source = save(
        tiny_model(tiny_config(model_type, **FAMILIES[name])).float(), tmp_path / "source"
    )
    if name in POOLED_ONLY:
        message = f"source: .*{POOLED_ONLY[name]}.*use --method mean"
        with pytest.raises(UnsupportedFamilyError, match=message):
            uptrain.convert(source, tmp_path / "target", count, method="factorize")
        assert not (tmp_path / "target").exists()
        return
    stream = stream_of(source, count)
    reference = whole(source, ids())
    assert torch.isfinite(reference).all()
    found = through(stream, ids())
    assert (found - reference).abs().max() <= 1e-5 * reference.abs().max()
    # A changed layer is written under these names: each must lie in the files as it does in memory.
    files = {
        name: tensor
        for path in source.glob("*.safetensors")
        for name, tensor in safetensors.torch.load_file(path).items()
    }
    for index in range(len(stream)):
        state = stream.layer(index).state_dict()
        for name, disk in stream.names(index).items():
            assert torch.equal(state[name].double(), files[disk].double()), disk


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama in float32; not to be changed."""
    folder = tmp_path_factory.mktemp("stream")
    return save(tiny_model(tiny_config("llama")).float(), folder)


def test_any_shape_of_batch(llama: Path) -> None:
    stream = stream_of(llama)
    for batch, length in [(1, 5), (3, 20), (2, 5), (1, 1)]:
        tokens = ids(batch, length)
        assert (through(stream, tokens) - whole(llama, tokens)).abs().max() < 1e-5


def test_a_layer_with_other_tensors_leaves_the_stream_as_it_is(llama: Path) -> None:
    stream = stream_of(llama)
    hidden = stream.embed(ids())
    weight = torch.zeros_like(stream.layer(0).self_attn.o_proj.weight)
    other = stream.layer(0, {"self_attn.o_proj.weight": weight})
    with torch.no_grad():
        before = stream.run(stream.layer(0), 0, hidden)
        changed = stream.run(other, 0, hidden)
        after = stream.run(stream.layer(0), 0, hidden)
    assert torch.equal(before, after)
    assert not torch.equal(before, changed)


def test_layers_come_in_float32_and_only_one_is_held(llama: Path, tmp_path: Path) -> None:
    source = save(tiny_model(tiny_config("llama")).bfloat16(), tmp_path / "source")
    stream = stream_of(source)
    layer = stream.layer(1)
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    held = [n for n, p in stream._model.named_parameters() if not p.is_meta]
    assert held == ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]


def test_the_target_shares_what_lies_outside_its_layers(llama: Path) -> None:
    checkpoint = open_checkpoint(llama)
    plan = plan_conversion(checkpoint, 1)
    source = LayerStream(checkpoint, checkpoint.config, "model.layers", CPU)
    target = LayerStream(checkpoint, plan.config, "model.layers", CPU, None, source)
    outside = [
        (s, t)
        for (n, s), t in zip(
            source._model.named_parameters(), target._model.parameters(), strict=True
        )
        if not n.startswith("model.layers.")
    ]
    assert len(outside) == 3
    assert all(s.data_ptr() == t.data_ptr() for s, t in outside)
    assert target._layers[0].self_attn.k_proj.weight.shape == (16, 64)
    assert source.vocabulary == 128
    assert len(source) == 2


def test_a_missing_tensor_of_a_layer_is_named(llama: Path, tmp_path: Path) -> None:
    state = safetensors.torch.load_file(llama / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    stream = stream_of(tmp_path)
    stream.layer(0)
    with pytest.raises(
        UnsupportedFamilyError,
        match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight is not in the files",
    ):
        stream.layer(1)
