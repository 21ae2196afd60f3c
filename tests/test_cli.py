"""The command line: exit codes, one line for every bad input, nothing written."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result
from tiny import save, tiny_config, tiny_model
from tiny_run import make_recipe, make_source

import uptrain
from uptrain.cli import main

K_PROJ = "model.layers.0.self_attn.k_proj.weight"
TO_2 = ("--num-key-value-heads", "2")


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model(tiny_config("llama")), tmp_path_factory.mktemp("cli") / "source")


@pytest.fixture
def source(pristine: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may damage, alone in its folder."""
    return shutil.copytree(pristine, tmp_path / "source")


# How a checkpoint can be bad.


def edit_config(**changes: Any) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def config_of(model_type: str, **overrides: Any) -> Callable[[Path], object]:
    def replace(folder: Path) -> None:
        config = tiny_config(model_type, **overrides).to_dict() | {"model_type": model_type}
        (folder / "config.json").write_text(json.dumps(config))

    return replace


def become(model_type: str) -> Callable[[Path], object]:
    return lambda folder: save(tiny_model(tiny_config(model_type)), folder)


def text(name: str, content: str | bytes) -> Callable[[Path], object]:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(data)


def edit_header(edit: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    def rewrite(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = edit(data[8 : 8 + length])
        path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])

    return rewrite


def edit_state(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def rewrite(folder: Path) -> None:
        path = folder / "model.safetensors"
        state = safetensors.torch.load_file(path)
        edit(state)
        safetensors.torch.save_file(state, path, {"format": "pt"})

    return rewrite


def resize(change: int) -> Callable[[Path], object]:
    def rewrite(folder: Path) -> None:
        path = folder / "model.safetensors"
        os.truncate(path, path.stat().st_size + change)

    return rewrite


def overlap(header: bytes) -> bytes:
    content = json.loads(header)
    spans = sorted(v["data_offsets"] for k, v in content.items() if k != "__metadata__")
    for value in content.values():
        if value.get("data_offsets") == spans[1]:
            value["data_offsets"] = [spans[1][0] - 8, spans[1][1] - 8]
    return json.dumps(content).encode()


def shard(edit: Callable[[Path, dict[str, str]], object]) -> Callable[[Path], object]:
    """Split the weights in two, then damage the folder or the index's weight_map."""

    def split(folder: Path) -> None:
        single = folder / "model.safetensors"
        state = safetensors.torch.load_file(single)
        single.unlink()
        home = {name: f"model-{1 + ('layers.1' in name)}.safetensors" for name in state}
        for path in set(home.values()):
            part = {name: tensor for name, tensor in state.items() if home[name] == path}
            safetensors.torch.save_file(part, folder / path)
        edit(folder, home)
        index = {"metadata": {}, "weight_map": home}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return split


def link_out(name: str) -> Callable[[Path], object]:
    def move(folder: Path) -> None:
        # Into the test's own folder, which a conversion must leave as it was.
        (folder / name).rename(folder.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent / "elsewhere")

    return move


Damage = Callable[[Path], object]

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
        text("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "model.safetensors",
        "is a Git LFS pointer, not the weights; run `git lfs pull` in the folder",
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
    "linked config": (link_out("config.json"), "config.json", "leads out of the folder"),
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
    "escape codes": (edit_config(model_type="a\nb\x1b[31m"), "is not a model type of transformers"),
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
    "negative size": (edit_config(hidden_size=-64), "-64"),
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
    "packed k_proj": (
        edit_state(lambda s: s.update({K_PROJ: s[K_PROJ].to(torch.int8)})),
        f"tensor {K_PROJ} is stored as I8, expected 16-bit or wider floats",
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


def assert_one_line(result: Result, file: Path, finding: str, code: int = 1) -> None:
    """One printable line that names the file, the finding and the way out; no traceback."""
    assert result.exit_code == code
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    line = result.stderr.removesuffix("\n")
    assert line.startswith("uptrain: ")
    assert line.isprintable(), line
    assert finding in line
    assert "unexpected" not in line
    assert str(file) in line
    # A family that cannot be converted leaves no way out.
    assert ";" in line or "cannot be converted" in line


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def listing(folder: Path) -> dict[str, Any]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


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


@pytest.mark.parametrize("case", INCONVERTIBLE)
def test_an_inconvertible_checkpoint(source: Path, tmp_path: Path, case: str) -> None:
    damage, finding = INCONVERTIBLE[case]
    damage(source)
    before = listing(tmp_path)
    begun = time.monotonic()
    result = invoke("convert", source, tmp_path / "target", *TO_2)
    assert_one_line(result, source, finding)
    assert listing(tmp_path) == before
    assert time.monotonic() - begun < 10


def test_inspect_offers_nothing_for_a_family_that_cannot(source: Path) -> None:
    become("deepseek_v3")(source)
    assert_one_line(invoke("inspect", source), source, "deepseek_v3: cannot be converted")


def test_a_count_that_does_not_divide(source: Path, tmp_path: Path) -> None:
    result = invoke("convert", source, tmp_path / "target", "--num-key-value-heads", "3")
    finding = "num_key_value_heads=3: cannot be had from the 4 KV heads of source; choose one of 1,"
    assert_one_line(result, Path("source"), f"{finding} 2, 4")
    assert names(tmp_path) == ["source"]


def test_an_existing_target(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine").write_text("")
    result = invoke("convert", source, target, *TO_2)
    assert_one_line(result, target, "exists already; choose another target or add --overwrite")
    result = invoke("convert", source, target, *TO_2, "--overwrite")
    assert_one_line(result, target, "is no checkpoint folder, so --overwrite will not replace it")
    assert names(target) == ["mine"]


def test_overwriting_a_checkpoint(source: Path, tmp_path: Path) -> None:
    for count in ("4", "2"):
        result = invoke(
            "convert", source, tmp_path / "t", "--num-key-value-heads", count, "--overwrite"
        )
        assert result.exit_code == 0, result.stderr
    assert json.loads((tmp_path / "t/config.json").read_text())["num_key_value_heads"] == 2


@pytest.mark.parametrize(
    ("target", "finding"),
    [
        (".", "is the source itself; choose another target"),
        ("../source", "is the source itself; choose another target"),
        ("../link", "is the source itself; choose another target"),
        ("inside", "source and target lie inside one another"),
        ("..", "source and target lie inside one another"),
    ],
)
def test_a_target_that_touches_the_source(
    source: Path, tmp_path: Path, target: str, finding: str
) -> None:
    (tmp_path / "link").symlink_to(source)
    before = listing(source)
    result = invoke("convert", source, source / target, *TO_2, "--overwrite")
    assert_one_line(result, source / target, finding)
    assert listing(source) == before


@pytest.mark.parametrize("name", ["nowhere/at/all", "../nowhere"])
@pytest.mark.parametrize("command", ["convert", "inspect", "verify"])
def test_no_such_folder(tmp_path: Path, command: str, name: str) -> None:
    arguments = [tmp_path / "t", *TO_2] if command == "convert" else []
    result = invoke(command, tmp_path / name, *arguments)
    assert_one_line(result, tmp_path / name, "does not exist; expected a checkpoint folder")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert"], "Missing argument 'SOURCE'"),
        (["convert", "a", "b"], "Missing option '--num-key-value-heads'"),
        (["convert", "a", "b", "--num-key-value-heads", "0"], "0 is not in the range x>=1"),
        (["convert", "a", "b", "--num-key-value-heads", "two"], "'two' is not a valid integer"),
        (["convert", "a", "b", *TO_2, "--method", "median"], "'median' is not one of 'mean', "),
        (["convert", "a", "b", *TO_2, "--seed", "-1"], "-1 is not in the range x>=0"),
        *(
            (["convert", "a", "b", *TO_2, "--max-shard-size", size], f"'{size}' is no size; write")
            for size in ("5", "0GB", "-1GB", "GB", "5XB", "1.2.3GB", "²GB", "nanGB")
        ),
        (["convert", "a", "b", *TO_2, "--nonsense"], "No such option: --nonsense"),
        (["conver"], "No such command 'conver'"),
        (["verify"], "Missing argument 'TARGET'"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr.replace("No such option '--nonsense'", message)
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("size", "nbytes"), [("5GB", 5 * 10**9), ("1.5kb", 1500), (" 7 MB ", 7 * 10**6), ("9B", 9)]
)
def test_sizes(size: str, nbytes: int) -> None:
    from uptrain.cli import Size

    assert Size().convert(size, None, None) == nbytes


# What the commands print.


def test_convert_prints_what_changed(source: Path, tmp_path: Path) -> None:
    result = invoke("convert", source, tmp_path / "target", *TO_2)
    assert (result.exit_code, result.stderr) == (0, "")
    assert re.sub(r" {2,}", "  ", result.stdout).splitlines() == [
        f"source → {tmp_path / 'target'}",
        "  KV heads  4 → 2, mean, groups of 2 (contiguous)",
        "  KV cache  2,048 → 1,024 bytes a token (2× smaller)",
        "  weights  0.5 MiB → 0.5 MiB",
        "  tensors  4 changed, 17 copied byte for byte",
        f"  next  uptrain evaluate {tmp_path / 'target'} --reference {source} --data TEXT",
    ]


def test_a_dry_run_writes_nothing(source: Path, tmp_path: Path) -> None:
    result = invoke("convert", source, tmp_path / "target", *TO_2, "--dry-run")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "(dry run, nothing written)" in result.stdout
    assert re.search(r"needs +0\.5 MiB of disk, 0\.1 MiB for tensors", result.stdout)
    assert names(tmp_path) == ["source"]


def test_json_is_one_object(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    printed = {}
    for command, *arguments in (
        ("convert", source, target, *TO_2),
        ("inspect", target),
        ("verify", target, "--source", source),
    ):
        result = invoke(command, *arguments, "--json")
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout.count("\n") == 1
        printed[command] = json.loads(result.stdout)
    assert printed["convert"]["num_key_value_heads"] == {"source": 4, "target": 2}
    assert printed["inspect"]["num_key_value_heads"] == 2
    assert printed["verify"]["problems"] == []


def test_inspect_lists_the_possible_counts(source: Path) -> None:
    result = invoke("inspect", source)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "4 query heads, 4 KV heads (multi-head), 2 layers" in result.stdout
    rows = [line.split() for line in result.stdout.splitlines() if "GPU" in line]
    assert [row[:3] for row in rows[:3]] == [
        ["4", "2,048", "1×"],
        ["2", "1,024", "2×"],
        ["1", "512", "4×"],
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--decode-batches", "1,16"], "--decode-batches needs --decode"),
        (["--decode-contexts", "64"], "--decode-contexts needs --decode"),
        (["--tasks-folder", "."], "--tasks-folder needs --tasks"),
        (["--decode", "--decode-batches", "1,many"], "'many' is no number; write for example 1,16"),
        (["--decode", "--decode-contexts", "max"], "'max' is no number; write for example 1,16"),
        (["--dtype", "float8"], "'float8' is not one of 'auto', 'float32', 'bfloat16'"),
    ],
)
def test_evaluate_refuses_options_that_do_not_fit(arguments: list[str], message: str) -> None:
    result = invoke("evaluate", "a", "--data", "b", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_lists_of_options() -> None:
    from uptrain.cli import Several

    assert Several(numbers=True, word="max").convert("1, 16,max", None, None) == (1, 16, "max")
    assert Several().convert("arc_easy,piqa", None, None) == ("arc_easy", "piqa")


def test_verify_names_every_problem(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    uptrain.convert(source, target, 2)
    result = invoke("verify", target)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "ok  3 files have the recorded SHA-256" in result.stdout
    (target / "generation_config.json").write_text("{}")
    (target / "notes.txt").write_text("")
    for options in ([], ["--json"]):
        result = invoke("verify", target, *options)
        assert result.exit_code == 1
        assert result.stderr.splitlines() == [
            f"uptrain: {target}: notes.txt is not in the record",
            f"uptrain: {target}: generation_config.json was changed: its SHA-256 is not the "
            "recorded one",
        ]
    assert len(json.loads(result.stdout)["problems"]) == 2


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of 4 steps that distils from the original and measures it."""
    original = make_source(tmp_path / "original", num_key_value_heads=4, initializer_range=0.2)
    text = str(tmp_path / "validation.jsonl")
    made = make_recipe(
        tmp_path, source=str(original), steps=4, teacher=str(original), validation=text
    )
    content = made.model_dump(mode="json", exclude_unset=True)
    content |= {"convert": {"num_key_value_heads": 2}, "evaluate": {"data": text}}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(content))
    return path


def words(line: str) -> list[str]:
    return re.split(r" {2,}", line.strip())


def test_finetune_prints_what_came_of_it(recipe: Path, tmp_path: Path) -> None:
    uptrain.convert(tmp_path / "original", tmp_path / "converted", 2)
    result = invoke("finetune", recipe, f"source={tmp_path / 'converted'}")
    assert (result.exit_code, result.stderr) == (0, "")
    verdict, table, written = result.stdout.split("\n\n")
    rows = dict(words(line) for line in table.splitlines()[2:])
    again = invoke("finetune", recipe, f"source={tmp_path / 'converted'}", "--resume", "--json")
    assert (again.exit_code, again.stdout.count("\n")) == (0, 1)
    found = json.loads(again.stdout)
    for label, key in (("validation loss", "loss"), ("KL to the teacher", "kl")):
        before, after = found[f"initial_validation_{key}"], found[f"validation_{key}"]
        assert rows[label] == f"{before:.4f} → {after:.4f}"
        assert f"{before:.3f} → {after:.3f}" in verdict
    assert rows["teacher"] == found["teacher"] == "original"
    assert rows["speed, tokens a second"] == f"{found['tokens_per_second']:,.0f}"
    assert (rows["steps"], rows["tokens trained on"]) == ("4", "512")
    assert [words(line) for line in written.splitlines()] == [
        ["written"],
        ["model", found["final"]],
        ["report", found["report"]],
    ]
    assert Path(found["report"]).is_file()


def test_run_prints_its_report(recipe: Path, tmp_path: Path) -> None:
    result = invoke("run", recipe)
    assert (result.exit_code, result.stderr) == (0, "")
    verdict, quality, uptraining, written = result.stdout.split("\n\n")
    assert verdict.startswith("4 → 2 KV heads: KV cache 2.0× smaller")
    assert words(quality.splitlines()[0]) == ["original", "converted", "uptrained"]
    # The quality says it already, of the same text.
    assert "validation loss" not in uptraining
    assert ["loss minimised", "KL to the teacher"] in map(words, uptraining.splitlines())
    assert invoke("report", tmp_path / "output").stdout.startswith(
        result.stdout.split("written")[0]
    )
    found = json.loads(invoke("run", recipe, "--json").stdout)
    # The same model on the same text, in chunks of another size.
    before = found["training"]["initial_validation_kl"]
    assert before == pytest.approx(found["evaluations"]["converted"]["kl"], rel=1e-5)
    assert words(written.splitlines()[1]) == ["model", found["final"]]


def test_the_code_of_a_checkpoint_is_not_executed(source: Path, tmp_path: Path) -> None:
    edit_config(auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})(source)
    (source / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'executed')!r})")
    assert invoke("convert", source, tmp_path / "target", *TO_2).exit_code == 0
    assert not (tmp_path / "executed").exists()
    assert (tmp_path / "target" / "evil.py").is_file()


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


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = invoke("--debug", "inspect", tmp_path)
    assert type(result.exception).__name__ == "CheckpointError"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted; nothing was left half done"),
        (OSError(28, "No space left on device", "x"), 1, "x: No space left on device"),
        (ValueError("two\nlines"), 1, "unexpected ValueError: two lines; --debug shows where"),
    ],
)
def test_every_error_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("uptrain.conversion.convert.convert", fail)
    result = invoke("convert", "a", "b", *TO_2)
    assert result.exit_code == code
    assert result.stderr.startswith(f"uptrain: {message}")
    assert result.stderr.count("\n") == 1


# As a program.


def test_help_is_quick_and_imports_no_torch() -> None:
    code = "import sys; from uptrain.cli import main; main(['--help'], standalone_mode=False); "
    code += "print(*(m for m in ('torch', 'transformers', 'numpy', 'rich') if m in sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == ""
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        command = [sys.executable, "-m", "uptrain", "--help"]
        out = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - begun)
    for name in (
        "convert",
        "evaluate",
        "finetune",
        "inspect",
        "recipes",
        "report",
        "run",
        "verify",
    ):
        assert re.search(rf"^  {name} ", out.stdout, re.MULTILINE)
    if os.getloadavg()[0] <= 2 * (os.cpu_count() or 1):  # else the clock says nothing of us
        assert min(seconds) < 0.4


def test_the_module_is_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "uptrain"]
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout == f"uptrain {uptrain.__version__}\n"
    bad = subprocess.run(
        [*command, "inspect", tmp_path / "none"], capture_output=True, text=True, check=False
    )
    assert (bad.returncode, bad.stdout) == (1, "")
    assert bad.stderr == (
        f"uptrain: {tmp_path / 'none'}: does not exist; "
        "expected a checkpoint folder or a hub id like owner/name\n"
    )
