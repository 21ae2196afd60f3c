"""Verifying: what was done to a converted checkpoint is found and named."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny import save, tiny_config, tiny_model

import uptrain
from uptrain.conversion.verify import verify
from uptrain.errors import CheckpointError


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source and its conversion; not to be changed."""
    root = tmp_path_factory.mktemp("verify")
    source = save(tiny_model(tiny_config("llama")), root / "source")
    (source / "tokenizer.json").write_text("{}")
    uptrain.convert(source, root / "target", 2)
    return source, root / "target"


@pytest.fixture
def source(pair: tuple[Path, Path]) -> Path:
    return pair[0]


@pytest.fixture
def target(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    return shutil.copytree(pair[1], tmp_path / "target")


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2))


def edit_weight(folder: Path, part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    path = folder / "model.safetensors"
    state = safetensors.torch.load_file(path)
    name = next(name for name in state if part in name)
    state[name] = change(state[name]).contiguous()
    safetensors.torch.save_file(state, path, {"format": "pt"})


def rehash(folder: Path) -> None:
    """Make the record agree with the files again, as a forger would."""
    record = json.loads((folder / "uptrain.json").read_text())
    files = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name not in ("uptrain.json", "README.md")
    }
    edit_json(folder / "uptrain.json", files=dict(sorted(files.items())), x=record["files"])


@pytest.mark.parametrize("method", ["mean", "first", "random"])
@pytest.mark.parametrize("count", [4, 2, 1])
def test_a_conversion_is_right(source: Path, tmp_path: Path, method: str, count: int) -> None:
    uptrain.convert(source, tmp_path / "target", count, method=method, seed=5)
    result = verify(tmp_path / "target", source)
    merged = 0 if count == 4 else 4
    assert result == {
        "target": str(tmp_path / "target"),
        "problems": [],
        "checks": [
            "4 files have the recorded SHA-256, none is missing or added",
            "21 tensors have the shapes that transformers expects",
            "config.json differs from the source's only in the number of KV heads",
            "2 companion files equal the source's",
            f"{21 - merged} tensors equal the source's byte for byte",
            *([f"{merged} tensors equal the source's merged heads"] if merged else []),
        ],
    }


def test_the_card_may_be_rewritten(target: Path) -> None:
    (target / "README.md").write_text("# Mine")
    assert verify(target)["problems"] == []


K_PROJ = "model.layers.0.self_attn.k_proj.weight"
CHANGED = "was changed: its SHA-256 is not the recorded one"
TAMPERED: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "weight": (
        lambda t: edit_weight(t, K_PROJ, lambda w: w + 1),
        [f"model.safetensors {CHANGED}"],
    ),
    "companion": (
        lambda t: (t / "tokenizer.json").write_text("{ }"),
        [f"tokenizer.json {CHANGED}"],
    ),
    "missing": (lambda t: (t / "tokenizer.json").unlink(), ["tokenizer.json is missing"]),
    "extra": (lambda t: (t / "x.py").write_text(""), ["x.py is not in the record"]),
    "heads": (
        lambda t: edit_json(t / "config.json", num_key_value_heads=4),
        [
            f"config.json {CHANGED}",
            "config.json says 4 KV heads, the record 2",
            f"{K_PROJ} has shape (32, 64), transformers expects (64, 64)",
        ],
    ),
    "broken heads": (
        lambda t: edit_json(t / "config.json", num_key_value_heads=3),
        [f"config.json {CHANGED}", "3 KV heads do not divide 4 query heads"],
    ),
    "layers": (
        lambda t: edit_json(t / "config.json", num_hidden_layers=3),
        [f"config.json {CHANGED}", "model.layers.2"],
    ),
    "folder": (
        lambda t: [(t / "tokenizer.json").unlink(), (t / "tokenizer.json").mkdir()],
        ["tokenizer.json"],
    ),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_tampering_is_found(target: Path, case: str) -> None:
    tamper, expected = TAMPERED[case]
    tamper(target)
    problems = verify(target)["problems"]
    for finding in expected:
        assert any(finding in problem for problem in problems), problems


FORGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "merged": (
        lambda t: edit_weight(t, K_PROJ, lambda w: w.flip(0)),
        f"{K_PROJ} is not what mean makes of the source",
    ),
    "copied": (
        lambda t: edit_weight(t, "q_proj", lambda w: w + 1),
        "model.layers.0.self_attn.q_proj.weight is not what mean makes of the source",
    ),
    "dtype": (lambda t: edit_weight(t, "model.norm", torch.Tensor.half), "model.norm.weight is"),
    "companion": (
        lambda t: (t / "tokenizer.json").write_text("[]"),
        "tokenizer.json differs from the source's",
    ),
    "companion gone": (
        lambda t: (t / "tokenizer.json").unlink(),
        "tokenizer.json of the source is missing",
    ),
    "config": (
        lambda t: edit_json(t / "config.json", rope_parameters=None),
        "config.json differs from the source's in more than the number of KV heads",
    ),
    "method": (
        lambda t: edit_json(t / "uptrain.json", method="first"),
        f"{K_PROJ} is not what first makes of the source",
    ),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_record_does_not_agree_with_the_source(
    source: Path, target: Path, case: str
) -> None:
    forge, expected = FORGED[case]
    forge(target)
    rehash(target)
    assert verify(target)["problems"] == []
    problems = verify(target, source)["problems"]
    assert any(expected in problem for problem in problems), problems


@pytest.mark.parametrize(
    "record",
    [
        {"files": []},
        {"files": {"config.json": 3}},
        {"files": {"../config.json": "0" * 64}},
        {"num_key_value_heads": 2},
        {"num_key_value_heads": {"target": "two"}},
        {"num_key_value_heads": {"target": None}},
        {"method": "median"},
        {"method": 7},
        {"seed": "x"},
    ],
)
def test_a_damaged_record_is_never_right(
    source: Path, target: Path, record: dict[str, Any]
) -> None:
    edit_json(target / "uptrain.json", **record)
    try:
        assert verify(target, source)["problems"]
    except CheckpointError as error:  # some damage is listed, some is refused: both are right
        assert str(target / "uptrain.json") in str(error)  # noqa: PT017


def test_another_model_is_not_the_source(source: Path, target: Path, tmp_path: Path) -> None:
    other = save(tiny_model(tiny_config("qwen2")), tmp_path / "other")
    assert verify(target, other)["problems"] == [
        "other is not the source: it is qwen2, the record says llama"
    ]
    other = save(tiny_model(tiny_config("llama", num_hidden_layers=1)), tmp_path / "small")
    (problem,) = verify(target, other)["problems"]
    assert re.fullmatch(
        r"small is not the source: it is [\d,]+ bytes, the record says [\d,]+ bytes", problem
    )


def test_what_has_no_record_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no uptrain\.json; expected a checkpoint that"):
        verify(source)
    with pytest.raises(CheckpointError, match="does not exist; expected a checkpoint folder"):
        verify(tmp_path / "none")
