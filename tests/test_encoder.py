"""Models with an encoder: layer by layer, absorbed changes of basis, and calibration on text.

The oracle for attention to another input: heads that are equal within groups up to a change of basis
merge without a trace, judged by the stock classes of transformers.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from family_list import FAMILIES, POOLED_ONLY, UNHEARD
from test_carried import ENCODER_DECODERS, MODELS, inputs, load, logits, make_source, text
from test_families import logits as native_logits
from test_families import make_heads_equal
from test_merge import ROUNDING, Kind, changed, distance
from tiny import save, tiny_config, tiny_model

import uptrain
from uptrain.checkpoint.reader import open_checkpoint
from uptrain.conversion.attention import read_heads, write_heads
from uptrain.conversion.plan import plan_conversion
from uptrain.conversion.rewritten import as_architecture
from uptrain.conversion.stacks import find_stacks
from uptrain.conversion.stream import LayerStream
from uptrain.errors import UnsupportedFamilyError

pytestmark = pytest.mark.filterwarnings("ignore")  # of the model classes themselves

CPU = torch.device("cpu")
FREE = Kind("any", "full", 0, shift=False)
# One of each kind of attention; the others are copies of these.
KINDS = ["t5", "bart", "marian", "pegasus", "whisper", "bert", "gpt2", "opt"]


def blocks_of(folder: Path, model_type: str, encoder: bool) -> Any:
    checkpoint = as_architecture(open_checkpoint(folder), f"gqa_{model_type}", 2)
    plan = plan_conversion(checkpoint, 2, encoder=encoder)
    for stack, blocks in find_stacks(checkpoint, plan.head_tensors, None).items():
        for index, several in blocks.items():
            for names in several:
                yield f"{stack}.{index}.", names


def make_source_with_changed_bases(
    model_type: str, folder: Path, encoder: bool, rigid: bool
) -> Path:
    """Save a model whose heads are equal within two groups but for their bases."""
    source = make_source(model_type, folder)
    model = load(source)
    state = model.state_dict()
    for seed, (prefix, names) in enumerate(blocks_of(source, model_type, encoder)):
        layer = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        parts = read_heads(layer, names, names.heads)
        first = torch.tensor([0, 0, 2, 2])
        parts.key[:], parts.value[:] = parts.key[first], parts.value[first]
        written = write_heads(changed(parts, FREE, rigid, seed), names)
        state |= {f"{prefix}{name}": tensor for name, tensor in written.items()}
    model.load_state_dict(state)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("model_type", "encoder"),
    [*((name, False) for name in KINDS), *((name, True) for name in ("t5", "bart", "whisper"))],
)
def test_heads_equal_up_to_their_basis_merge_without_a_trace(
    model_type: str, encoder: bool, tmp_path: Path
) -> None:
    source = make_source_with_changed_bases(model_type, tmp_path / "source", encoder, rigid=False)
    options = {"architecture": f"gqa_{model_type}", "encoder": encoder}
    report = uptrain.convert(source, tmp_path / "free", 2, method="factorize", **options)
    uptrain.convert(source, tmp_path / "mean", 2, method="mean", **options)
    reference = logits(load(source), model_type)
    assert distance(logits(load(tmp_path / "free"), model_type), reference) < ROUNDING
    assert distance(logits(load(tmp_path / "mean"), model_type), reference) > 100 * ROUNDING
    freedoms = [
        block["freedom"]
        for layer in report["layers"]
        for block in layer["blocks"].values() or [layer]
    ]
    kinds = 1 + (model_type in ENCODER_DECODERS) + encoder
    assert len(freedoms) == 2 * kinds
    for number, freedom in enumerate(freedoms):
        assert (freedom["value"], freedom["key"], freedom["shift"]) == ("full", "full", True)
        # A bias by position for each query head keeps T5's heads in place, not in attention to the
        # encoder, which has none.
        is_cross = model_type == "t5" and number >= 2 * encoder and (number - 2 * encoder) % 2 == 1
        assert freedom["reorder"] == (model_type != "t5" or is_cross)


@pytest.mark.parametrize("model_type", ["t5", "bart", "whisper", "bert"])
def test_heads_equal_up_to_a_turn_are_aligned_without_a_trace(
    model_type: str, tmp_path: Path
) -> None:
    # To one head of two: aligning more is a search for the best turns, which may end beside it.
    source = make_source_with_changed_bases(model_type, tmp_path / "source", False, rigid=True)
    uptrain.convert(source, tmp_path / "target", 2, method="align")
    reference = logits(load(source), model_type)
    assert distance(logits(load(tmp_path / "target"), model_type), reference) < ROUNDING


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, marks=() if name in (*KINDS, "m2m_100", "roberta") else pytest.mark.slow)
        for name in MODELS
    ],
)
def test_layer_by_layer_is_the_whole(model_type: str, tmp_path: Path) -> None:
    source = make_source(model_type, tmp_path / "source")
    checkpoint = as_architecture(open_checkpoint(source), f"gqa_{model_type}", 2)
    plan = plan_conversion(checkpoint, 2)
    (stack,) = find_stacks(checkpoint, plan.head_tensors, None)
    stream = LayerStream(checkpoint, checkpoint.config, stack, CPU)
    given, encoded = inputs(model_type), None
    tokens = next(iter(given.values()))
    with torch.no_grad():
        if stream.encoder is not None:
            encoder = LayerStream(checkpoint, checkpoint.config, stream.encoder, CPU)
            hidden = encoder.embed(tokens.float() if model_type == "whisper" else tokens)
            for index in range(len(encoder)):
                hidden = encoder.run(encoder.layer(index), index, hidden)
            encoded = encoder.encoded(hidden)
            tokens = given["decoder_input_ids"] = text()["input_ids"][:, :5]
        hidden = stream.embed(tokens)
        for index in range(len(stream)):
            hidden = stream.run(stream.layer(index), index, hidden, encoded)
        reference = load(source)(**given, output_hidden_states=True)
        if stream.vocabulary:
            found, expected = stream.logits(hidden), reference.logits
        else:
            found, expected = hidden, reference.hidden_states[-1]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


EXAMPLES = Path(__file__).parent.parent / "examples"
TEXT = EXAMPLES / "books-train.jsonl"
SMALL = {"calibration": TEXT, "calibration_tokens": 2048, "reconstruct_steps": 15}


def make_reader(model_type: str, folder: Path, **overrides: Any) -> Path:
    """Save a model with the tokenizer of a real one."""
    tokenizer = json.loads((EXAMPLES / "books-1m" / "tokenizer.json").read_text("utf-8"))
    size = len(tokenizer["model"]["vocab"]) + len(tokenizer["added_tokens"])
    folder = make_source(model_type, folder, vocab_size=size, n_positions=64, **overrides)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((EXAMPLES / "books-1m" / name).read_bytes())
    return folder


@pytest.mark.parametrize(
    ("model_type", "encoder", "steps"),
    [
        ("t5", True, ["merged", "refit", "attention", "layer"]),
        pytest.param(
            "bart", False, ["merged", "refit", "attention", "layer"], marks=pytest.mark.slow
        ),
        ("roberta", False, ["merged", "attention", "layer"]),  # its attention ends in a norm
        pytest.param(
            "gpt2", False, ["merged", "refit", "attention", "layer"], marks=pytest.mark.slow
        ),
    ],
)
def test_a_calibration_repairs_each_layer(
    model_type: str, encoder: bool, steps: list[str], tmp_path: Path
) -> None:
    source = make_reader(model_type, tmp_path / "source")
    report = uptrain.convert(source, tmp_path / "target", 2, encoder=encoder, **SMALL)
    assert [layer["layer"] for layer in report["layers"]] == list(range(4 if encoder else 2))
    for layer in report["layers"]:
        assert list(layer["error"]) == steps
        assert layer["error"]["layer"] < 0.9 * layer["error"]["merged"]
    uptrain.convert(source, tmp_path / "free", 2, method="factorize", encoder=encoder)
    reference = logits(load(source), model_type)
    calibrated = logits(load(tmp_path / "target"), model_type)
    free = logits(load(tmp_path / "free"), model_type)
    assert (calibrated - reference).square().mean() < 0.9 * (free - reference).square().mean()


def test_a_family_with_kv_heads_of_its_own_merges_without_a_trace(tmp_path: Path) -> None:
    source = save(tiny_model(tiny_config("t5gemma", **FAMILIES["t5gemma"])), tmp_path / "source")
    make_heads_equal(source, json.loads((source / "config.json").read_text()), 2)
    report = uptrain.convert(source, tmp_path / "target", 2, method="factorize")
    found, reference = native_logits(tmp_path / "target"), native_logits(source)
    assert (found - reference).abs().max() <= ROUNDING * reference.abs().max()
    # Rotary embedding turns what attends to itself, and nothing that attends to the encoder.
    for layer in report["layers"]:
        assert [block["freedom"]["key"] for block in layer["blocks"].values()] == ["scaled", "full"]


@pytest.mark.parametrize("model_type", UNHEARD)
def test_an_encoder_that_cannot_be_run_leaves_its_decoder_free(
    model_type: str, tmp_path: Path
) -> None:
    source = save(tiny_model(tiny_config(model_type, **FAMILIES[model_type])), tmp_path / "source")
    make_heads_equal(source, json.loads((source / "config.json").read_text()), 2)
    report = uptrain.convert(source, tmp_path / "target", 2, method="factorize")
    found, reference = native_logits(tmp_path / "target"), native_logits(source)
    assert (found - reference).abs().max() <= ROUNDING * reference.abs().max()
    assert {
        block["freedom"]["key"] for each in report["layers"] for block in each["blocks"].values()
    } == {"full"}
    message = f"source: {model_type}: its encoder, parakeet_encoder, takes input_features in a form"
    for options in ({"calibration": TEXT}, {"method": "factorize", "encoder": True}):
        with pytest.raises(
            UnsupportedFamilyError, match=f"{message}.*decoder without --calibration"
        ):
            uptrain.convert(source, tmp_path / "other", 2, **options)
    assert not (tmp_path / "other").exists()


def test_a_decoder_of_audio_codes_is_refused(tmp_path: Path) -> None:
    source = save(tiny_model(tiny_config("dia", **FAMILIES["dia"])), tmp_path / "source")
    with pytest.raises(UnsupportedFamilyError, match=f"{POOLED_ONLY['dia']}.*use --method mean"):
        uptrain.convert(source, tmp_path / "target", 2, method="factorize")
    assert not (tmp_path / "target").exists()


def test_a_dry_run_says_what_each_number_of_heads_would_lose(tmp_path: Path) -> None:
    source = make_reader("bart", tmp_path / "source")
    result = uptrain.convert(
        source, tmp_path / "target", 2, calibration=TEXT, calibration_tokens=512, dry_run=True
    )
    lost = [choice["discarded_energy"] for choice in result["choices"]]
    assert [choice["num_key_value_heads"] for choice in result["choices"]] == [4, 2, 1]
    for part in ("value", "key"):
        assert lost[0][part] < 1e-9 < lost[1][part] < lost[2][part]
