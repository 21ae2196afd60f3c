"""Hostile checkpoints, recipes and texts: one line, exit 1 or 2, nothing written, nothing executed."""

import gzip
import json
import os
import shutil
import struct
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import (
    K_PROJ,
    TO_2,
    Damage,
    as_bin,
    as_shards,
    assert_one_line,
    become,
    config_of,
    edit_config,
    edit_entry,
    edit_header,
    edit_state,
    evil_bin,
    invoke,
    link_out,
    listing,
    overlap,
    pack,
    resize,
    shard,
    sparse,
    text,
    then,
)
from faults import note
from tiny import save, tiny_config, tiny_model
from tiny_run import EXAMPLE, make_source, write_text
from transformers import AutoTokenizer

from uptrain.data.shards import TokenShards
from uptrain.errors import DataError


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model(tiny_config("llama")), tmp_path_factory.mktemp("hostile") / "source")


@pytest.fixture
def source(pristine: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may damage, alone in its folder."""
    return shutil.copytree(pristine, tmp_path / "source")


def note_inputs(kind: str, refused: int = 0, read: int = 0) -> None:
    """Leave a line of how many inputs a test has shown to be refused, or read and nothing more."""
    note(
        fault="hostile input",
        operation=kind,
        points=refused + read,
        outcomes={
            "refused in one line, nothing written": refused,
            "read as data, nothing executed": read,
        },
    )


INDEX = "model.safetensors.index.json"
EXTRA = "model-00003-of-00003.safetensors"
TEMPLATES = "additional_chat_templates"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"

# What any command that opens a checkpoint refuses: how it is made, the file named, the finding.
UNREADABLE: dict[str, tuple[Damage, str, str]] = {
    "no config": (
        lambda f: (f / "config.json").unlink(),
        "",
        "has no config.json; expected a checkpoint folder as save_pretrained writes it",
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "",
        "has no weights; expected model.safetensors, pytorch_model.bin or an index of shards",
    ),
    "broken config": (text("config.json", '{"a": 1'), "config.json", "is not valid JSON"),
    "config of bytes": (text("config.json", b"\xff{}"), "config.json", "is not valid JSON"),
    "config twice": (text("config.json", '{"a":1,"a":2}'), "config.json", "a key occurs twice"),
    "config list": (text("config.json", "[1]"), "config.json", "expected a JSON object"),
    "config bomb": (text("config.json", '{"a":' * 200_000), "config.json", "is not valid JSON"),
    "config digits": (text("config.json", '{"a":' + "9" * 9999 + "}"), "config.json", "not valid"),
    "no model_type": (edit_config(model_type=None), "config.json", "model_type is null, expected"),
    "quantised": (
        edit_config(quantization_config={"quant_method": "gptq"}),
        "config.json",
        "the weights are quantised (gptq), packed rows are not heads; dequantize the checkpoint",
    ),
    "LFS pointer": (
        text("model.safetensors", LFS),
        "model.safetensors",
        "is a Git LFS pointer, not the file itself; run `git lfs pull` in the folder",
    ),
    "web page": (
        text("model.safetensors", "<!doctype html>\n<title>Sign in</title>"),
        "model.safetensors",
        "is a web page, not the weights; download the file itself",
    ),
    "truncated": (resize(-1), "model.safetensors", "is truncated or has trailing bytes, fetch it"),
    "trailing": (resize(+1), "model.safetensors", "is truncated or has trailing bytes, fetch it"),
    "overlap": (edit_header(overlap), "model.safetensors", "overlap or leave a hole"),
    "header twice": (
        edit_header(lambda h: h.rstrip()[:-1] + b"," + h.rstrip()[1:]),
        "model.safetensors",
        "a key occurs twice",
    ),
    "header length": (
        text("model.safetensors", struct.pack("<Q", 2**62) + b"{}"),
        "model.safetensors",
        f"a header of {2**62} bytes in a file of 10",
    ),
    "missing shard": (
        shard(lambda f, home: (f / "model-2.safetensors").unlink()),
        "model-2.safetensors",
        "is missing, model.safetensors.index.json names it for 9 tensors; fetch the missing shard",
    ),
    "shard above": (
        shard(lambda f, home: home.update({K_PROJ: "../x.safetensors"})),
        "model.safetensors.index.json",
        f'puts tensor {K_PROJ} in "../x.safetensors", outside the folder',
    ),
    "shard absolute": (
        shard(lambda f, home: home.update({K_PROJ: "/etc/passwd"})),
        "model.safetensors.index.json",
        f'puts tensor {K_PROJ} in "/etc/passwd", outside the folder',
    ),
    "shard number": (
        shard(lambda f, home: home.update({K_PROJ: 3})),
        "model.safetensors.index.json",
        f"puts tensor {K_PROJ} in 3, outside the folder",
    ),
    "shard suffix": (
        shard(lambda f, home: home.update({K_PROJ: "config.json"})),
        "model.safetensors.index.json",
        "expected a name that ends in .safetensors",
    ),
    "empty index": (
        shard(lambda f, home: home.clear()),
        "model.safetensors.index.json",
        "has no weight_map; fetch the file again",
    ),
    "stale index, tensor gone": (
        shard(lambda f, home: home.update(gone="model-1.safetensors")),
        "model-1.safetensors",
        "does not hold tensor gone, which the index puts there",
    ),
    "stale index, tensor unknown": (
        shard(lambda f, home: home.pop(K_PROJ)),
        "model-1.safetensors",
        f"holds tensor {K_PROJ}, which the index does not name",
    ),
    "linked weights": (
        link_out("model.safetensors"),
        "model.safetensors",
        "is a link that leads out of the folder; replace it by the file itself",
    ),
    "linked config": (
        then(text("config.json", "a secret"), link_out("config.json")),
        "config.json",
        "leads out of the folder",
    ),
    "adapter": (
        text("adapter_config.json", "{}"),
        "",
        "is an adapter (it has adapter_config.json); merge it into its base model first",
    ),
    "linked companion": (
        link_out("generation_config.json"),
        "generation_config.json",
        "leads out of the folder",
    ),
    "escape codes": (
        shard(lambda f, home: home.update({"a\nb\x1b[31m": "/etc/passwd"})),
        "model.safetensors.index.json",
        "outside the folder",
    ),
    "shard dots": (
        shard(lambda f, home: home.update({K_PROJ: ".."})),
        INDEX,
        f"puts tensor {K_PROJ} in .., expected a name that ends in .safetensors",
    ),
    **{
        f"shard {name!r}": (
            shard(lambda f, home, name=name: home.update({K_PROJ: name})),
            INDEX,
            "outside the folder; expected the plain name of a file beside the index",
        )
        for name in (
            "a/../b.safetensors",
            "..\\b.safetensors",
            "a\0.safetensors",
            "a/b.safetensors",
        )
    },
    "shard that is a folder": (
        shard(
            lambda f, home: (
                (f / "model-2.safetensors").unlink() or (f / "model-2.safetensors").mkdir()
            )
        ),
        "model-2.safetensors",
        "is missing",
    ),
    "extra shard": (
        then(as_shards, lambda f: shutil.copy(f / "model-1.safetensors", f / EXTRA)),
        EXTRA,
        "is named by no index, but lies beside other weights; remove it, or what it replaces",
    ),
    "weights beside shards": (
        then(as_shards, lambda f: shutil.copy(f / "model-1.safetensors", f / "model.safetensors")),
        "model.safetensors",
        "is named by no index, but lies beside other weights; remove it, or what it replaces",
    ),
    "tensor in two shards": (
        then(
            as_shards, lambda f: shutil.copy(f / "model-2.safetensors", f / "model-1.safetensors")
        ),
        "model-1.safetensors",
        "does not hold tensor",
    ),
    "linked shard": (
        then(as_shards, link_out("model-2.safetensors")),
        "model-2.safetensors",
        "leads out of the folder",
    ),
    "linked index": (
        then(as_shards, text(INDEX, "a secret"), link_out(INDEX)),
        INDEX,
        "leads out of the folder",
    ),
    "linked card": (
        then(text("README.md", "---\nlicense: x\n---\n"), link_out("README.md")),
        "README.md",
        "leads out of the folder",
    ),
    "linked templates": (
        then(
            lambda f: (f / TEMPLATES).mkdir(),
            text(f"{TEMPLATES}/a.jinja", "{{ x }}"),
            link_out(TEMPLATES),
        ),
        f"{TEMPLATES}/a.jinja",
        "leads out of the folder",
    ),
    "linked to nothing": (
        lambda f: (f / "tokenizer.json").symlink_to("never-fetched"),
        "tokenizer.json",
        "is a link to a file that does not exist; fetch it",
    ),
    "pipe": (
        lambda f: (f / "model.safetensors").unlink() or os.mkfifo(f / "model.safetensors"),
        "",
        "has no weights",
    ),
    "LFS tokenizer": (
        text("tokenizer.json", LFS),
        "tokenizer.json",
        "is a Git LFS pointer, not the",
    ),
    "LFS config": (text("config.json", LFS), "config.json", "is not valid JSON"),
    "LFS index": (then(as_shards, text(INDEX, LFS)), INDEX, "is not valid JSON"),
    "web page as index": (then(as_shards, text(INDEX, "<html>")), INDEX, "is not valid JSON"),
    "huge index": (then(as_shards, sparse(INDEX, 2**25 + 1)), INDEX, "is too large to be JSON"),
    "huge header": (
        sparse("model.safetensors", 100_000_008, struct.pack("<Q", 100_000_000)),
        "model.safetensors",
        "a header of 100000000 bytes in a file of 100000008",
    ),
    "deep header": (
        edit_header(lambda h: b"[" * 2**20),
        "model.safetensors",
        "its safetensors header is malformed",
    ),
    "unknown dtype": (edit_entry(dtype="F4"), "model.safetensors", "has the unknown dtype 'F4'"),
    "shape that lies": (edit_entry(shape=[64, 65]), "model.safetensors", "its shape needs 33280"),
    "huge shape": (edit_entry(shape=[2**62, 2**62]), "model.safetensors", "its shape needs"),
    "negative shape": (edit_entry(shape=[-64, -64]), "model.safetensors", "not a natural number"),
    "hole": (
        edit_entry(data_offsets=[2**40, 2**40 + 2**15]),
        "model.safetensors",
        "overlap or leave a hole",
    ),
    "integer weights": (
        edit_state(lambda s: s.update({K_PROJ: s[K_PROJ].to(torch.int8)})),
        "model.safetensors",
        f"tensor {K_PROJ} is stored as I8, expected floats; packed or quantised weights cannot",
    ),
    "pickle with code": (
        evil_bin,
        "pytorch_model.bin",
        "it holds other Python objects, which might",
    ),
    "LFS pickle": (
        then(as_bin(), text("pytorch_model.bin", LFS)),
        "pytorch_model.bin",
        "is a Git LFS pointer",
    ),
    "web page as pickle": (
        then(as_bin(), text("pytorch_model.bin", " <html>")),
        "pytorch_model.bin",
        "is a web page",
    ),
    "packed pickle": (
        then(as_bin(), pack),
        "pytorch_model.bin",
        "plain tensors (it is compressed)",
    ),
    "truncated pickle": (
        then(as_bin(), lambda f: os.truncate(f / "pytorch_model.bin", 9000)),
        "pytorch_model.bin",
        "cannot be loaded as plain tensors",
    ),
    "pickle of one number": (
        as_bin({"a": torch.ones(1).expand(2**30)}),
        "pytorch_model.bin",
        f"tensor a takes {2**32} bytes, the file has",
    ),
    "model_type of lines": (
        edit_config(model_type="a\nb\x1b[31m"),
        "config.json",
        'model_type is "a\\nb',
    ),
    "model_type list": (
        edit_config(model_type=["llama"]),
        "config.json",
        'model_type is ["llama"]',
    ),
    "architectures": (
        edit_config(architectures=[1]),
        "config.json",
        "expected names of model classes",
    ),
    "auto_map list": (
        edit_config(auto_map=["x.Y"]),
        "config.json",
        'auto_map is ["x.Y"], expected',
    ),
    "text_config list": (
        edit_config(text_config=[1]),
        "config.json",
        "text_config is [1], expected an",
    ),
    "text_config of no type": (
        edit_config(text_config={"model_type": [1]}),
        "config.json",
        "expected a model_type that is a",
    ),
    "NaN": (edit_config(rms_norm_eps=float("nan")), "config.json", "rms_norm_eps is NaN, expected"),
    "negative size": (edit_config(hidden_size=-64), "config.json", "hidden_size is -64, expected"),
    "negative part": (
        edit_config(text_config={"vocab_size": -1}),
        "config.json",
        "vocab_size is -1, expected",
    ),
    "huge integer": (
        edit_config(vocab_size=10**30),
        "config.json",
        "an integer of more than 64 bits",
    ),
    "huge number of parts": (
        edit_config(x={"num_local_experts": 10**12}),
        "config.json",
        "num_local_experts is 10000000000",
    ),
}


# What a conversion refuses beyond that: how it is made, and the finding.
INCONVERTIBLE: dict[str, tuple[Damage, str]] = {
    "bloom": (
        config_of("bloom"),
        "bloom: cannot be converted yet: transformers has no number of KV",
    ),
    "deepseek_v3": (
        become("deepseek_v3"),
        "deepseek_v3: cannot be converted: no tensor follows",
    ),
    "moonshine": (config_of("moonshine"), "moonshine: cannot be converted: transformers reshapes"),
    "unknown": (edit_config(model_type="llama99"), "llama99: is not a model type of transformers"),
    "own code": (
        edit_config(model_type="mine", auto_map={"AutoConfig": "evil.Config"}),
        "mine: is not a model type of transformers",
    ),
    "negative heads": (
        edit_config(num_attention_heads=-4),
        "num_attention_heads is -4, expected a",
    ),
    "no heads": (edit_config(num_attention_heads=0), "rejects it as llama"),
    "text heads": (edit_config(num_attention_heads="4"), "rejects it as llama"),
    "huge heads": (edit_config(num_attention_heads=2**62), "rejects it as llama"),
    "fractional heads": (edit_config(num_attention_heads=4.5), "rejects it as llama"),
    "negative KV heads": (
        edit_config(num_key_value_heads=-2),
        "num_key_value_heads is -2, expected",
    ),
    "no KV heads": (edit_config(num_key_value_heads=0), "num_key_value_heads is 0, expected"),
    "text KV heads": (edit_config(num_key_value_heads="4"), "rejects it as llama"),
    "odd KV heads": (edit_config(num_key_value_heads=3), "3 KV heads do not divide 4 query heads"),
    "huge layers": (edit_config(num_hidden_layers=3000), "num_hidden_layers"),
    "more layers": (edit_config(num_hidden_layers=3), "lacks tensor model.layers.2"),
    "lone surrogate": (edit_config(x="\ud800"), "is not valid JSON"),
    "no k_proj": (edit_state(lambda s: s.pop(K_PROJ)), f"lacks tensor {K_PROJ}, which its config"),
    "narrow k_proj": (
        edit_state(lambda s: s.update({K_PROJ: s[K_PROJ][:32].clone()})),
        f"tensor {K_PROJ} has shape 32 × 64, config.json asks for 64 × 64",
    ),
    "wide q_proj": (
        edit_state(lambda s: s.update({K_PROJ.replace("k_", "q_"): torch.zeros(80, 64)})),
        "has shape 80 × 64, config.json asks for 64 × 64",
    ),
    "narrow floats": (
        edit_state(lambda s: s.update({K_PROJ: s[K_PROJ].to(torch.float8_e4m3fn)})),
        f"tensor {K_PROJ} is stored as F8_E4M3, expected 16-bit or wider floats",
    ),
    "NaN": (
        edit_state(lambda s: s[K_PROJ].view(-1)[7:8].fill_(float("nan"))),
        f"model.safetensors: tensor {K_PROJ} has NaN or infinite values; the checkpoint is damaged",
    ),
    "infinity": (
        edit_state(lambda s: s[K_PROJ].view(-1)[7:8].fill_(float("inf"))),
        f"model.safetensors: tensor {K_PROJ} has NaN or infinite values; the checkpoint is damaged",
    ),
}


def kind_of(file: str) -> str:
    """Say what kind of input is hostile, by the file that the message names."""
    kinds = {"": "folder", "config.json": "config", INDEX: "index", "pytorch_model.bin": "pickle"}
    other = "weights" if file.endswith(".safetensors") else "tokenizer, model card and the like"
    return kinds.get(file, other)


@pytest.mark.parametrize("command", ["convert", "inspect", "verify"])
@pytest.mark.parametrize("case", UNREADABLE)
def test_an_unreadable_checkpoint(source: Path, tmp_path: Path, case: str, command: str) -> None:
    damage, file, finding = UNREADABLE[case]
    damage(source)
    if command == "verify":
        (source / "uptrain.json").write_text("{}")
    before = listing(tmp_path)
    arguments = [tmp_path / "new" / "target", *TO_2] if command == "convert" else []
    result = invoke(command, source, *arguments)
    assert_one_line(result, source / file, finding)
    assert listing(tmp_path) == before
    note_inputs(kind_of(file), refused=1)


@pytest.mark.parametrize("case", INCONVERTIBLE)
def test_an_inconvertible_checkpoint(
    source: Path, pristine: Path, tmp_path: Path, case: str
) -> None:
    damage, finding = INCONVERTIBLE[case]
    damage(source)
    before = listing(tmp_path)
    begun = time.monotonic()
    result = invoke("convert", source, tmp_path / "target", *TO_2)
    assert_one_line(result, source, finding)
    assert listing(tmp_path) == before
    assert time.monotonic() - begun < 10
    config, sound = ((folder / "config.json").read_bytes() for folder in (source, pristine))
    note_inputs("weights" if config == sound else "config", refused=1)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_no_kernel_is_fetched(
    source: Path, tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where the package `kernels` is installed, transformers would fetch code from the hub.
    asked: list[Any] = []
    monkeypatch.setattr(
        "transformers.modeling_utils.lazy_import_flash_attention",
        lambda *args, **kwargs: asked.append(args),
    )
    edit_config(**{key: "kernels-community/evil"})(source)
    assert invoke("convert", source, tmp_path / "target", *TO_2).exit_code == 0
    assert asked == []
    note_inputs("config", read=1)


def test_a_card_cannot_grow(source: Path, tmp_path: Path) -> None:
    card = f"a: &a {'x' * 40_000}\nlicense: mit\nlanguage: [{', '.join(['*a'] * 100)}]\n"
    (source / "README.md").write_text(f"---\n{card}---\n")
    assert invoke("convert", source, tmp_path / "target", *TO_2).exit_code == 0
    written = (tmp_path / "target" / "README.md").read_text()
    assert "license: mit" in written
    assert len(written) < 10_000
    note_inputs("tokenizer, model card and the like", read=1)


def test_token_shards_do_not_lead_out_of_their_folder(tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    text = write_text(tmp_path / "text.jsonl", 3)
    TokenShards.prepare(folder, [text], AutoTokenizer.from_pretrained(EXAMPLE))
    link_out("tokens-00000.bin")(folder)
    with pytest.raises(DataError, match="leads out of the folder"):
        TokenShards.open(folder)
    note_inputs("token shards", refused=1)


WRONG = (
    -1,
    2**62,
    10**30,
    "x",
    float("nan"),
    float("inf"),
    None,
    [],
    [[1]],
    {},
    {"a": "b"},
    True,
    "",
)


def test_any_value_of_a_config_is_taken_or_refused(source: Path, tmp_path: Path) -> None:
    path = source / "config.json"
    before = listing(tmp_path)
    sound = path.read_bytes()
    config = json.loads(sound)
    outcomes = {0: 0, 1: 0}
    for key in config:
        for value in WRONG:
            path.write_text(json.dumps(config | {key: value}))
            result = invoke("convert", source, tmp_path / "target", *TO_2, "--dry-run")
            outcomes[result.exit_code] += 1
            if result.exit_code:
                assert_one_line(result, source, "")
    assert min(outcomes.values()) > 30
    path.write_bytes(sound)
    assert listing(tmp_path) == before
    note_inputs("any value of a config", refused=outcomes[1], read=outcomes[0])


# Code that lies in a checkpoint.


@pytest.fixture
def speaking(tmp_path: Path) -> Path:
    """A checkpoint with a tokenizer, whose every file names code that makes a folder."""
    source = make_source(tmp_path / "source", num_key_value_heads=4)
    (source / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'executed')!r})")
    edit_config(auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})(source)
    path = source / "tokenizer_config.json"
    content = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}
    path.write_text(json.dumps(content))
    return source


@pytest.mark.parametrize("command", ["convert", "convert --calibration", "inspect", "evaluate"])
def test_code_is_executed_only_when_it_is_trusted(
    command: str, speaking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where transformers copies code to before it imports it.
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "code")
    )
    monkeypatch.setattr("sys.path", list(sys.path))
    text = write_text(tmp_path / "text.jsonl", 12)
    arguments = {
        "convert": (tmp_path / "target", *TO_2),
        "convert --calibration": (
            tmp_path / "target", *TO_2, "--calibration", text, "--calibration-tokens", 128,
            "--reconstruct-steps", 0, "--device", "cpu",
        ),
        "inspect": (),
        "evaluate": ("--data", text, "--max-tokens", 64, "--device", "cpu"),
    }[command]  # fmt: skip
    run = (command.split()[0], speaking, *arguments)
    result = invoke(*run)
    assert (result.exit_code, result.stderr) == (0, "")
    assert not (tmp_path / "executed").exists()
    note_inputs("code in a checkpoint", read=1)
    invoke(*run, "--overwrite", "--trust-remote-code") if "convert" in command else invoke(
        *run, "--trust-remote-code"
    )
    assert (tmp_path / "executed").exists()


# Recipes.

RECIPE = "source: a\ndata: {train: [b]}\ntrain: {steps: 1, batch_tokens: 8, learning_rate: 1}\noutput: c\n"
BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"
RECIPES: dict[str, tuple[str | bytes, str]] = {
    "code": ("source: !!python/object/apply:os.mkdir [executed]\n", "line 1: tags are refused"),
    "code in a key": ("!!python/name:os.mkdir x: 1\n", "line 1: tags are refused"),
    "harmless tag": (RECIPE + "x: !!set {a}\n", "line 5: tags are refused"),
    "own tag": (RECIPE + "x: !mine 1\n", "line 5: tags are refused"),
    "bomb": (BOMB, "line 2: aliases are refused"),
    "itself": ("a: &a [*a]\n", "line 1: aliases are refused"),
    "deep": ("[" * 20_000, "line 1: nested too deeply"),
    "deep braces": ("{a: " * 5_000, "line 1: nested too deeply"),
    "twice": (RECIPE + "source: d\n", "has the key source twice"),
    "many keys": ("".join(f"k{i}: 1\n" for i in range(5_000)), "unknown key k"),
    "list as key": (RECIPE + "? [a]\n: 1\n", "has a key that is no word"),
    "two documents": (f"{RECIPE}---\n{RECIPE}", "but found another document"),
    "long number": (RECIPE.replace("steps: 1", "steps: 0x" + "f" * 9000), "a number of 9002 char"),
    "sixties": (RECIPE.replace("steps: 1", "steps: 1" + ":1" * 90_000), "a number of 180001 char"),
    "date": (RECIPE.replace("steps: 1", "steps: 2001-99-99"), "is no plain YAML (month must be"),
    "NaN": (RECIPE.replace("rate: 1", "rate: .nan"), "train.learning_rate is nan; expected a fin"),
    "text": (RECIPE.replace("rate: 1", "rate: fast"), "train.learning_rate is 'fast'; expected a"),
    "negative": (RECIPE.replace("steps: 1", "steps: -1"), "train.steps is -1; expected greater"),
    "section": (RECIPE.replace("output: c", "output: {c: d}"), "output is a section; expected a"),
    "NUL": (RECIPE.replace("output: c", 'output: "a\\0b"'), "a NUL or half a surrogate pair"),
    "surrogate": (RECIPE.replace("output: c", 'output: "\\ud800"'), "a NUL or half a surrogate pair"),
    "escape codes": (RECIPE + '"a\\n\\e[31m": 1\n', "unknown key a"),
    "number as key": (RECIPE + "1: 2\n", "1"),
    "not text": (b"\xff\xfe" + RECIPE.encode(), "cannot be read as UTF-8 text"),
    "large": ("#" * (2**18 + 1), "is too large for a recipe"),
    "empty": ("", "holds no keys; expected source, data, train and output"),
}  # fmt: skip


@pytest.mark.parametrize("command", ["finetune", "run"])
@pytest.mark.parametrize("case", RECIPES)
def test_a_hostile_recipe(
    case: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, finding = RECIPES[case]
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = listing(tmp_path)
    begun = time.process_time()
    result = invoke(command, path)
    assert_one_line(result, path, finding, code=2)
    assert listing(tmp_path) == before
    assert time.process_time() - begun < 5
    note_inputs("recipe", refused=1)


# Texts.

GOOD = b'{"text": "one"}\n'
NOT_JSON = "text.jsonl: line 3 is not JSON ("
ENDLESS = "line 1 is longer than 1 MiB; expected one document on every line, cut it"
TEXTS: dict[str, tuple[str, bytes, str]] = {
    "broken UTF-8": ("text.jsonl", GOOD * 2 + b'{"text": "\xff"}\n', "line 3 is not UTF-8 (byte 0xff)"),
    "broken UTF-8, plain": ("text.txt", b"one\ntwo\n\xc3\n", "line 3 is not UTF-8 (byte 0xc3)"),
    "NUL": ("text.jsonl", GOOD * 2 + b'{"text": "a\0b"}\n', NOT_JSON),
    "NUL, plain": ("text.txt", b"one\ntwo\na\0b\n", "text.txt: line 3 holds a NUL, which no text does"),
    "UTF-16": ("text.txt", "one\n".encode("utf-16"), "line 1 is not UTF-8 (byte 0xff)"),
    "one endless line": ("text.jsonl", b"x" * (2**20 + 2), ENDLESS),
    "one endless line, packed": ("text.jsonl.gz", gzip.compress(bytes(2**20 + 2)), ENDLESS),
    "cut": ("text.jsonl", GOOD * 2 + b'{"text": "on', NOT_JSON),
    "deep": ("text.jsonl", GOOD * 2 + b"[" * 200_000, NOT_JSON),
    "list": ("text.jsonl", GOOD * 2 + b"[1]\n", "text.jsonl: line 3 holds a JSON list, no object"),
    "no text": ("text.jsonl", GOOD * 2 + b'{"a\\u001b[31m": 1}\n', "line 3 has neither text nor messages"),
    "number": ("text.jsonl", GOOD * 2 + b'{"text": 3}\n', "line 3: text is a int, no string"),
    "surrogate": ("text.jsonl", GOOD * 2 + b'{"text": "\\ud800"}\n', "line 3 holds half a surrogate"),
    "not packed": ("text.jsonl.gz", GOOD, "text.jsonl.gz: cannot be read (Not a gzipped file"),
    "packed and cut": ("text.jsonl.gz", gzip.compress(GOOD * 9)[:-9], "text.jsonl.gz: cannot be read ("),
    "empty": ("text.jsonl", b"", ""),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("hostile") / "model", num_key_value_heads=4)


@pytest.mark.parametrize("command", ["convert", "evaluate", "finetune"])
@pytest.mark.parametrize("case", TEXTS)
def test_a_hostile_text(
    case: str, command: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("uptrain.data.files._MAX_LINE_BYTES", 2**20)
    name, content, finding = TEXTS[case]
    path = tmp_path / name
    path.write_bytes(content)
    recipe = RECIPE.replace("source: a", f"source: {model}").replace("[b]", f"[{path}]")
    recipe = recipe.replace("batch_tokens: 8", "batch_tokens: 32")
    (tmp_path / "recipe.yaml").write_text(recipe)
    before = listing(tmp_path)
    arguments: dict[str, tuple[Any, ...]] = {
        "convert": (model, tmp_path / "target", *TO_2, "--calibration", path, "--device", "cpu"),
        "evaluate": (model, "--data", path, "--device", "cpu"),
        "finetune": (tmp_path / "recipe.yaml",),
    }
    result = invoke(command, *arguments[command])
    assert_one_line(result, tmp_path, finding)
    assert listing(tmp_path) == before
    note_inputs("text", refused=1)
