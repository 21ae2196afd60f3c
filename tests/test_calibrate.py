"""Calibrated conversion from end to end, on the example model that lies in the repository."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from family_list import FAMILIES
from tiny import save, tiny_config, tiny_model

import uptrain
from uptrain.conversion import calibrate, repair
from uptrain.conversion.options import make_options
from uptrain.conversion.stream import LayerStream
from uptrain.conversion.verify import verify
from uptrain.errors import (
    CheckpointError,
    DataError,
    Interrupted,
    OptionError,
    UnsupportedFamilyError,
)

EXAMPLES = Path(__file__).parent.parent / "examples"
MODEL, TEXT = EXAMPLES / "books-1m", EXAMPLES / "books-train.jsonl"
VALIDATION = EXAMPLES / "books-validation.jsonl"
QUICK: dict[str, Any] = {"calibration": TEXT, "calibration_tokens": 2048, "device": "cpu"}
STEPS = {**QUICK, "reconstruct_steps": 3}

pytestmark = pytest.mark.usefixtures("one_thread")


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def increase(folder: Path) -> float:
    result = uptrain.evaluate(folder, VALIDATION, reference=MODEL, max_tokens=4096, device="cpu")
    return float(result["loss_increase"])


def partial_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.uptrain-partial")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated target with all steps; not to be changed."""
    folder = tmp_path_factory.mktemp("calibrate") / "target"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    uptrain.convert(MODEL, folder, 2, **STEPS)
    torch.set_num_threads(threads)
    return folder


def test_the_record_says_how_much_text_was_used(finished: Path, tmp_path: Path) -> None:
    record = json.loads((finished / "uptrain.json").read_text())
    assert record["calibration"]["tokens"] == QUICK["calibration_tokens"]
    assert record["calibration_used"] == {"tokens": 2048, "reconstruct_steps": 3}
    found = uptrain.convert(MODEL, tmp_path / "few", 2, **{**QUICK, "calibration_tokens": 10})
    assert found["calibration"]["tokens"] == 10
    assert found["calibration_used"] == {"tokens": 256, "reconstruct_steps": 6}
    assert "256 tokens of `books-train.jsonl`" in (tmp_path / "few" / "README.md").read_text()


def test_each_step_lowers_the_loss(tmp_path: Path) -> None:
    more = {**QUICK, "calibration_tokens": 4096}
    flags = {
        "mean": {"method": "mean"},
        "merged": {**more, "refit": False, "reconstruct_steps": 0},
        "refit": {**more, "reconstruct_steps": 0},
        "reconstruct": {**more, "reconstruct_steps": 12},
    }
    keys = {
        "merged": {"merged"},
        "refit": {"merged", "refit"},
        "reconstruct": {"merged", "refit", "attention", "layer"},
    }
    losses = []
    for name, options in flags.items():
        report = uptrain.convert(MODEL, tmp_path / name, 2, **options)
        losses.append(increase(tmp_path / name))
        if name in keys:
            assert all(set(layer["error"]) == keys[name] for layer in report["layers"])
            assert len(report["layers"]) == 4
    assert losses == sorted(losses, reverse=True), losses
    assert losses[1] < 0.5 * losses[0]
    assert losses[-1] < 0.8 * losses[1]


def test_reconstruct_without_refit(tmp_path: Path) -> None:
    report = uptrain.convert(MODEL, tmp_path / "target", 2, **STEPS, refit=False)
    assert all(
        set(layer["error"]) == {"merged", "attention", "layer"} for layer in report["layers"]
    )


def test_the_report_is_in_the_record(finished: Path) -> None:
    record = json.loads((finished / "uptrain.json").read_text())
    assert record["method"] == "factorize"
    assert record["grouping"] == "search"
    assert record["calibration"] == {
        "data": TEXT.name, "tokens": 2048, "refit": True, "reconstruct_steps": 3
    }  # fmt: skip
    for index, layer in enumerate(record["layers"]):
        assert layer["layer"] == index
        assert sorted(head for group in layer["groups"] for head in group) == list(range(8))
        assert [len(group) for group in layer["groups"]] == [4, 4]
        assert all(0 < part < 1 for part in layer["discarded_energy"].values())
        assert layer["error"]["refit"] < layer["error"]["merged"]
        assert layer["error"]["layer"] < layer["error"]["refit"]
    assert not partial_of(finished).exists()


def test_the_same_seed_gives_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    uptrain.convert(MODEL, tmp_path / "same", 2, **STEPS)
    uptrain.convert(MODEL, tmp_path / "other", 2, **STEPS, seed=1)
    assert digest(tmp_path / "same") == digest(finished)
    assert digest(tmp_path / "other") != digest(finished)


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[int]]:
    """A target whose conversion was stopped in layer 2, and the layers that are repaired from then on."""
    repaired: list[int] = []
    right = repair.repair_layer
    alive = {"": True}

    def stop(streams: Any, index: int, *args: Any, **kwargs: Any) -> Any:
        if alive[""] and index == 2:
            raise KeyboardInterrupt
        if not alive[""]:
            repaired.append(index)
        return right(streams, index, *args, **kwargs)

    monkeypatch.setattr(repair, "repair_layer", stop)
    target = tmp_path / "target"
    said = f"interrupted; the same command goes on behind the layers in {partial_of(target)}"
    with pytest.raises(Interrupted, match=f"^{re.escape(said)}$"):
        uptrain.convert(MODEL, target, 2, **STEPS)
    alive[""] = False
    assert not target.exists()
    assert (partial_of(target) / "layer-00001.json").is_file()
    assert not (partial_of(target) / "layer-00002.json").exists()
    return target, repaired


def test_before_the_first_layer_nothing_is_left_of_interrupted_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(repair, "repair_layer", stop)
    with pytest.raises(KeyboardInterrupt):
        uptrain.convert(MODEL, tmp_path / "target", 2, **STEPS)
    assert list(tmp_path.iterdir()) == []


def test_finished_layers_are_kept_when_writing_is_interrupted(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    target = tmp_path / "target"
    with monkeypatch.context() as patch:
        patch.setattr("uptrain.conversion.convert.write_tensors", stop)
        with pytest.raises(Interrupted, match=r"goes on behind the layers in .*partial$"):
            uptrain.convert(MODEL, target, 2, **STEPS)
    monkeypatch.setattr(repair, "repair_layer", stop)  # nothing is repaired anew
    uptrain.convert(MODEL, target, 2, **STEPS)
    assert digest(target) == digest(finished)


def test_interrupted_work_goes_on_behind_its_last_layer(
    interrupted: tuple[Path, list[int]], finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, repaired = interrupted
    told: list[str] = []

    @contextmanager
    def record_progress(*_: object) -> Iterator[Any]:
        yield lambda amount, detail="": told.append(detail)

    monkeypatch.setattr(calibrate, "progress", record_progress)
    report = uptrain.convert(MODEL, target, 2, **STEPS)
    assert repaired == [2, 3]
    assert told[:2] == ["layer 0, done before", "layer 1, done before"]
    assert told[2].startswith("layer 2, attention, residual ")
    assert digest(target) == digest(finished)
    written = json.loads((finished / "uptrain.json").read_text())
    assert json.loads(json.dumps(report["layers"])) == written["layers"]
    assert not partial_of(target).exists()


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"reconstruct_steps": 2},
        {"method": "align"},
        {"refit": False},
        {"text": 1},
        {"G": 4},
    ],
)
def test_other_work_does_not_take_finished_layers_over(
    other: dict[str, Any], interrupted: tuple[Path, list[int]], tmp_path: Path
) -> None:
    target, repaired = interrupted
    count = other.pop("G", 2)
    if other.pop("text", None):
        lines = TEXT.read_text().splitlines()
        (tmp_path / TEXT.name).write_text("\n".join(lines[40:]))
        other = {"calibration": tmp_path / TEXT.name}
    options = {**STEPS, **other}
    uptrain.convert(MODEL, target, count, **options)
    assert repaired == [0, 1, 2, 3]
    assert not partial_of(target).exists()


def test_verify_knows_a_calibrated_target(finished: Path, tmp_path: Path) -> None:
    result = verify(finished, MODEL)
    assert result["problems"] == []
    assert any("were fitted to text or to each other" in check for check in result["checks"])
    damaged = shutil.copytree(finished, tmp_path / "damaged")
    record = json.loads((damaged / "uptrain.json").read_text())
    state = safetensors.torch.load_file(damaged / "model.safetensors")
    name = "model.embed_tokens.weight"
    assert name not in record["changed"]
    state[name][3, 3] += 1
    safetensors.torch.save_file(state, damaged / "model.safetensors", {"format": "pt"})
    problems = verify(damaged, MODEL)["problems"]
    assert any(problem.startswith("model.safetensors was changed") for problem in problems)
    assert f"{name} is not what factorize makes of the source" in problems


def changed_model(folder: Path, name: str, value: float) -> Path:
    shutil.copytree(MODEL, folder)
    state = safetensors.torch.load_file(folder / "model.safetensors")
    state[name].view(-1)[7] = value
    safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.1.self_attn.q_proj.weight", float("nan")),
        ("model.layers.1.mlp.up_proj.weight", float("inf")),
        ("model.embed_tokens.weight", float("nan")),
        ("model.norm.weight", float("-inf")),
    ],
)
@pytest.mark.parametrize("options", [STEPS, {"method": "factorize"}], ids=["text", "no text"])
def test_a_weight_that_is_no_number_is_named(
    name: str, value: float, options: dict[str, Any], tmp_path: Path
) -> None:
    source = changed_model(tmp_path / "source", name, value)
    with pytest.raises(CheckpointError, match=f"tensor {name} has NaN or infinite values"):
        uptrain.convert(source, tmp_path / "target", 2, **options)
    assert not (tmp_path / "target").exists()


def test_activations_that_overflow_are_an_error(tmp_path: Path) -> None:
    source = changed_model(tmp_path / "source", "model.layers.0.mlp.down_proj.weight", 1.0)
    state = safetensors.torch.load_file(source / "model.safetensors")
    for part in ("gate_proj", "up_proj", "down_proj"):
        state[f"model.layers.0.mlp.{part}.weight"] *= 1e16
    safetensors.torch.save_file(state, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="layer 0 gives activations that are not finite"):
        uptrain.convert(source, tmp_path / "target", 2, **QUICK, reconstruct_steps=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("hello world", r"gives \d+ tokens, calibration needs at least one block of 256; add text"),
        ("\n" * 5000, "every token is the same; expected ordinary text"),
        (None, "does not exist"),
    ],
)
def test_text_of_no_use_is_refused_before_any_work(
    content: str | None, message: str, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_text(content)
    with pytest.raises(DataError, match=f"^{text}: {message}"):
        uptrain.convert(MODEL, tmp_path / "target", 2, calibration=text, calibration_tokens=1024)
    assert {path.name for path in tmp_path.iterdir()} <= {"text.txt"}


def test_messages_without_a_template_are_refused(tmp_path: Path) -> None:
    text = tmp_path / "chat.jsonl"
    text.write_text('{"messages": [{"role": "user", "content": "Good day"}]}\n' * 50)
    with pytest.raises(
        DataError, match="line 1 has messages, but the model's tokenizer has no chat template"
    ):
        uptrain.convert(MODEL, tmp_path / "target", 2, calibration=text)


def test_messages_go_through_the_template(tmp_path: Path) -> None:
    source = shutil.copytree(MODEL, tmp_path / "source")
    (source / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }} {% endfor %}"
    )
    text = tmp_path / "chat.jsonl"
    words = "It was the best of times, it was the worst of times. " * 30
    text.write_text(json.dumps({"messages": [{"role": "user", "content": words}]}) + "\n")
    uptrain.convert(
        source,
        tmp_path / "target",
        2,
        calibration=text,
        calibration_tokens=256,
        reconstruct_steps=0,
    )
    assert (tmp_path / "target" / "config.json").is_file()


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    source = shutil.copytree(MODEL, tmp_path / "source")
    for path in source.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer; copy tokenizer\.json"):
        uptrain.convert(source, tmp_path / "target", 2, **QUICK)


def test_less_text_than_wanted_is_used_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(TEXT.read_text().splitlines()[:1])[:20_000] + '"}\n')
    uptrain.convert(MODEL, tmp_path / "target", 2, calibration=text, reconstruct_steps=0)
    assert "262,144 were wanted; calibrating with what is there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "random", "calibration": TEXT},
            "'random' draws heads anew and has nothing to calibrate",
        ),
        (
            {"method": "mean", "grouping": "search"},
            "needs heads in a common basis.*choose align or factorize",
        ),
        (
            {"method": "best"},
            "method 'best': is unknown; choose one of mean, first, random, align, factorize",
        ),
        ({"grouping": "best"}, "grouping 'best': is unknown; choose contiguous or search"),
        (
            {"calibration": TEXT, "calibration_tokens": 0},
            "calibration_tokens 0: expected 1 or more",
        ),
        (
            {"calibration": TEXT, "reconstruct_steps": -1},
            "reconstruct_steps -1: expected 0 or more",
        ),
        ({"calibration": TEXT, "activation_bytes": -1}, "activation_bytes -1: expected 0 or more"),
    ],
)
def test_choices_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make_options(**options)


def test_the_best_known_choices_are_the_default() -> None:
    with_text, without = make_options(calibration=TEXT), make_options()
    assert (with_text.method, with_text.grouping, with_text.refit) == ("factorize", "search", True)
    assert (without.method, without.grouping) == ("mean", "contiguous")
    assert with_text.by_layer
    assert not without.by_layer


@pytest.mark.filterwarnings("ignore")  # of the model classes themselves
@pytest.mark.parametrize("method", ["align", "factorize"])
@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        # Known; seen by running a layer.
        ("blt", "source: blt cuts bytes into patches and joins six lists of layers as it goes, "),
        (
            "gemma3n_text",
            "source: gemma3n_text: its layers pass on 4 streams of hidden states, expected one, ",
        ),
    ],
)
def test_a_dry_run_refuses_what_the_run_refuses(
    method: str, model_type: str, message: str, tmp_path: Path
) -> None:
    model = tiny_model(tiny_config(model_type, **FAMILIES[model_type]))
    source = save(model, tmp_path / "source")
    for dry_run in (True, False):
        with pytest.raises(UnsupportedFamilyError, match=f"^{re.escape(message)}"):
            uptrain.convert(source, tmp_path / "target", 2, method=method, dry_run=dry_run)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]
    uptrain.convert(source, tmp_path / "target", 2, dry_run=True)  # the mean can be had


def test_a_dry_run_without_text_reads_one_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[int] = []
    layer = LayerStream.layer

    def record(self: LayerStream, index: int) -> Any:
        loaded.append(index)
        return layer(self, index)

    monkeypatch.setattr(LayerStream, "layer", record)
    result = uptrain.convert(MODEL, tmp_path / "target", 2, method="factorize", dry_run=True)
    assert set(loaded) == {0}
    assert "choices" not in result
    assert result["tensors"] is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", [2, 8])
def test_a_dry_run_says_what_each_number_of_heads_discards(count: int, tmp_path: Path) -> None:
    result = uptrain.convert(MODEL, tmp_path / "target", count, **QUICK, dry_run=True)
    is_merged = count != 8
    assert (result["tensors"] is None) is is_merged
    weights, copied = result["weight_bytes"]["target"], result["disk_bytes"]
    assert (2 if is_merged else 1) * weights < copied < (3 if is_merged else 2) * weights
    choices = result["choices"]
    assert [choice["num_key_value_heads"] for choice in choices] == [8, 4, 2, 1]
    for part in ("value", "key"):
        lost = [choice["discarded_energy"][part] for choice in choices]
        assert lost[0] < 1e-9
        assert lost == sorted(lost)
    saved = [choice["kv_cache_bytes_per_token"] for choice in choices]
    assert saved == [2048, 1024, 512, 256]
    assert list(tmp_path.iterdir()) == []
