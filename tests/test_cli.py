"""The command line: exit codes, one line for every bad input, nothing written."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from damage import TO_2, assert_one_line, become, invoke, listing
from tiny import save, tiny_config, tiny_model
from tiny_run import make_recipe, make_source

import uptrain

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model(tiny_config("llama")), tmp_path_factory.mktemp("cli") / "source")


@pytest.fixture
def source(pristine: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may damage, alone in its folder."""
    return shutil.copytree(pristine, tmp_path / "source")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_inspect_offers_nothing_for_a_family_that_cannot(source: Path) -> None:
    become("deepseek_v3")(source)
    assert_one_line(invoke("inspect", source), source, "deepseek_v3: cannot be converted")


def test_a_count_that_does_not_divide(source: Path, tmp_path: Path) -> None:
    result = invoke("convert", source, tmp_path / "target", "--num-key-value-heads", "3")
    finding = "num_key_value_heads=3: cannot be had from the 4 KV heads of source; choose one of 1,"
    assert_one_line(result, Path("source"), f"{finding} 2, 4")
    assert names(tmp_path) == ["source"]


@pytest.mark.parametrize("options", [["--grouping", "search"], ["--encoder"]])
def test_choices_that_exclude_each_other(options: list[str], source: Path, tmp_path: Path) -> None:
    result = invoke("convert", source, tmp_path / "target", *TO_2, *options)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"uptrain: {options[0].strip('-')}")
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


def test_a_copy_is_called_one(source: Path, tmp_path: Path) -> None:
    result = invoke("convert", source, tmp_path / "target", "--num-key-value-heads", "4")
    assert re.search(r"KV heads +4 → 4, unchanged: there is nothing to merge\n", result.stdout)


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
    rows = [line.split() for line in result.stdout.splitlines() if "×" in line]
    assert [row[:3] for row in rows[:3]] == [
        ["4", "2,048", "1×"],
        ["2", "1,024", "2×"],
        ["1", "512", "4×"],
    ]


@pytest.mark.parametrize(
    "option",
    ["--calibration-tokens=9", "--no-refit", "--reconstruct-steps=0", "--activation-bytes=1GB"],
)
def test_options_of_a_calibration_need_one(option: str, tmp_path: Path) -> None:
    result = invoke("convert", "a", tmp_path / "b", "--num-key-value-heads", 2, option)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"{option.partition('=')[0]} needs --calibration" in result.stderr


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


def test_sigterm_ends_a_conversion_as_ctrl_c_does(tmp_path: Path) -> None:
    """With a word, and nothing half written."""
    code = (
        "import os, signal; from uptrain.cli import main; from uptrain.conversion import repair; "
    )
    code += "repair.repair_layer = lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM); main()"
    model, text = EXAMPLES / "books-1m", EXAMPLES / "books-train.jsonl"
    options = ["--calibration", text, "--calibration-tokens", "512", "--device", "cpu"]
    command = [sys.executable, "-c", code, "convert", model, tmp_path / "target", *TO_2, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 130
    lines = done.stderr.splitlines()
    assert lines[-1] == "uptrain: interrupted; nothing was left half done"
    assert list(tmp_path.iterdir()) == []


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
