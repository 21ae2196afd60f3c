"""Calibration of every kind of layer that stock transformers runs on plain text, wrappers among them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from family_list import COUNTS, FAMILIES, POOLED_ONLY, UNHEARD
from test_families import logits as logits_with_all
from test_merge import ROUNDING, Kind, changed, distance
from tiny import give_tokenizer, model_class, save, tiny_config, tiny_model
from transformers import AutoConfig

import uptrain
from uptrain.checkpoint.reader import open_checkpoint
from uptrain.conversion.attention import read_heads, write_heads
from uptrain.conversion.options import make_options
from uptrain.conversion.plan import plan_conversion
from uptrain.conversion.sample import draw_text
from uptrain.conversion.stacks import find_stacks
from uptrain.conversion.verify import verify
from uptrain.conversion.walk import Walk
from uptrain.errors import Interrupted

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # of the model classes themselves
]

DATA = Path(__file__).parent.parent / "examples" / "books-train.jsonl"
OPTIONS: dict[str, Any] = {"calibration": DATA, "calibration_tokens": 1024, "device": "cpu"}
# One of each kind of layer, and of wrapper; the others are much like them.
FAST = [
    "llava", "qwen2_vl", "qwen3_vl", "gemma3", "mllama", "idefics3", "paligemma", "qwen2_audio", "t5gemma2",
    "gemma4", "gemma4_text:keys-are-values", "zamba", "zamba2", "moshi", "inkling_text", "doge",
    "stablelm:norms", "qwen4_exp_text", "molmo2", "ernie4_5_vl_moe",
]  # fmt: skip


def make_reader(name: str, folder: Path) -> Path:
    model = tiny_model(tiny_config(name.partition(":")[0], **FAMILIES[name])).float()
    return give_tokenizer(save(model, folder))


def outputs(folder: Path, source: Path) -> torch.Tensor:
    """Run a model, as transformers loads it, on the text that the source is calibrated on."""
    sample = draw_text(open_checkpoint(source), make_options(**OPTIONS))
    cls = model_class(AutoConfig.from_pretrained(folder))
    model, info = cls.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    given = {"input_ids": sample.tokens}
    if sample.encoder is not None:
        given = {"input_ids": sample.encoder, "decoder_input_ids": sample.tokens}
    with torch.no_grad():
        output = model.eval()(**given, use_cache=False)
    found: torch.Tensor = output.logits if "logits" in output else output[0]
    return found


def error(found: torch.Tensor, reference: torch.Tensor) -> float:
    """KL(reference ‖ found), in nats a token."""
    wanted = reference.log_softmax(-1)
    return float((wanted.exp() * (wanted - found.log_softmax(-1))).sum(-1).mean())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
        for name in FAMILIES
        if name not in POOLED_ONLY and name not in UNHEARD
    ],
)
def test_a_calibration_is_never_worse_than_its_start(name: str, tmp_path: Path) -> None:
    source, count = make_reader(name, tmp_path / "source"), COUNTS.get(name, [2])[0]
    options = {**OPTIONS, "architecture": "keep"}
    none = {"refit": False, "reconstruct_steps": 0}
    uptrain.convert(source, tmp_path / "start", count, **options, **none)
    report = uptrain.convert(source, tmp_path / "target", count, **options, reconstruct_steps=12)
    for layer in report["layers"]:
        if layer["error"]:
            assert layer["error"]["layer"] <= layer["error"]["merged"]
    original = outputs(source, source)
    start, end = (error(outputs(tmp_path / n, source), original) for n in ("start", "target"))
    assert 0 < end < start


SCALED, SIGNED, FREE = Kind("", "scaled", 16), Kind("", "signed", 16), Kind("", "full", 0)


@pytest.mark.parametrize(
    ("model_type", "kinds"),
    [
        ("mllama", {"self_attn": SCALED, "cross_attn": SIGNED}),
        ("t5gemma", {"self_attn": SCALED, "cross_attn": FREE}),
        ("t5gemma2", {"self_attn": SIGNED}),  # one attention to both
        ("cohere_asr", {"self_attn": FREE, "encoder_attn": FREE}),
    ],
)
def test_what_attends_to_something_else_is_merged_without_a_trace(
    model_type: str, kinds: dict[str, Kind], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model(tiny_config(model_type, **FAMILIES[model_type]))
    plain = save(model, tmp_path / "plain")
    checkpoint = open_checkpoint(plain)
    tensors = plan_conversion(checkpoint, 2).head_tensors
    ((stack, blocks),) = find_stacks(checkpoint, tensors, None).items()
    state = model.state_dict()
    found = [(index, names) for index, several in blocks.items() for names in several]
    for seed, (index, names) in enumerate(found):
        prefix = f"{stack}.{index}."
        layer = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        parts, first = read_heads(layer, names, names.heads), torch.tensor([0, 0, 2, 2])
        parts = replace(parts, key=parts.key[first], value=parts.value[first])
        made = changed(parts, kinds[names.module], rigid=False, seed=seed)
        state |= {prefix + n: t for n, t in write_heads(made, names).items()}
    model.load_state_dict(state)
    source = save(model, tmp_path / "source")
    ways: dict[str, dict[str, Any]] = {"mean": {}, "factorize": {"method": "factorize"}}
    if model_type not in UNHEARD:
        give_tokenizer(source)
        ways["calibrated"] = {**OPTIONS, "refit": False, "reconstruct_steps": 0}
    reference = logits_with_all(source)
    for name, options in ways.items():
        uptrain.convert(source, tmp_path / name, 2, **options)
        lost = distance(logits_with_all(tmp_path / name), reference)
        assert lost > 100 * ROUNDING if name == "mean" else lost < ROUNDING, name
        is_told = (
            "source: text does not reach layers 1, which attend to images"
            in capsys.readouterr().err
        )
        assert is_told == (model_type == "mllama" and name == "calibrated")


@pytest.mark.parametrize("copies", [1, 2])
def test_a_block_that_layers_share_stays_one(copies: int, tmp_path: Path) -> None:
    source = make_reader("zamba", tmp_path / "source")
    if copies == 2:
        make_two_copies(source)
    before = safetensors.torch.load_file(source / "model.safetensors")
    shared = [name for name in before if ".layers.1.shared_transf." in name]
    assert (shared[0].replace("layers.1.", "layers.3.") in before) == (copies == 2)
    uptrain.convert(source, tmp_path / "target", 2, **OPTIONS, reconstruct_steps=3)
    after = safetensors.torch.load_file(tmp_path / "target" / "model.safetensors")
    assert after.keys() == before.keys()
    assert not verify(tmp_path / "target", source)["problems"]
    key = "model.layers.1.shared_transf.self_attn.k_proj.weight"
    assert 2 * len(after[key]) == len(before[key])
    for name in shared if copies == 2 else ():
        assert torch.equal(after[name], after[name.replace("layers.1.", "layers.3.")])
    # It is merged where it first stands; what each of its layers has of its own is fitted.
    feed_forward = "model.layers.1.shared_transf.feed_forward.up_proj.weight"
    assert torch.equal(after[feed_forward], before[feed_forward])
    for layer in (1, 3):
        linear = f"model.layers.{layer}.linear.weight"
        assert not torch.equal(after[linear], before[linear])


def make_two_copies(source: Path) -> None:
    """Store zamba's shared block with each of its layers."""
    path = source / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    shared = {name: tensor for name, tensor in tensors.items() if ".shared_transf." in name}
    tensors |= {n.replace("layers.1.", "layers.3."): t.clone() for n, t in shared.items()}
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(
            (name, {**OPTIONS, "reconstruct_steps": 3})
            for name in ("zamba", "molmo2", "gemma4_text")
        ),
        ("zamba", {"method": "factorize"}),
    ],
    ids=["zamba", "molmo2", "gemma4_text", "zamba, twice in the file, no text"],
)
def test_interrupted_work_goes_on_to_the_same_bytes(
    name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_reader(name, tmp_path / "source")
    if "method" in options:
        make_two_copies(source)
    uptrain.convert(source, tmp_path / "whole", 2, **options)
    layer = Walk._layer
    last = {"zamba": 3}.get(name, 1)

    def stop(self: Walk, index: int) -> Any:
        if index == last:
            raise KeyboardInterrupt
        return layer(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(Walk, "_layer", stop)
        with pytest.raises(Interrupted):
            uptrain.convert(source, tmp_path / "target", 2, **options)
    uptrain.convert(source, tmp_path / "target", 2, **options)
    whole, target = (tmp_path / n / "model.safetensors" for n in ("whole", "target"))
    assert whole.read_bytes() == target.read_bytes()
