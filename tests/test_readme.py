"""The commands of the README, on the example checkpoint."""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from uptrain.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
COMMANDS = [
    line.split("#")[0].split()
    for block in re.findall(r"```\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("uptrain ")
]
# `make quickstart` and `uptrain run` are what .ci/run executes.
SHORT = [command for command in COMMANDS if command[1] != "run"]
# A calibration in full takes minutes.
BRIEF = ["--calibration-tokens", "2048", "--reconstruct-steps", "3"]


def test_the_readme_shows_the_commands() -> None:
    assert {command[1] for command in COMMANDS} == {
        "convert", "evaluate", "inspect", "recipes", "run", "verify",
    }  # fmt: skip


def test_they_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {
        "SOURCE": str(ROOT / "examples" / "books-1m"),
        "meta-llama/Llama-2-7b-hf": str(ROOT / "examples" / "books-1m"),
        "TEXT.jsonl": str(ROOT / "examples" / "books-validation.jsonl"),
        "8": "2",
    }
    for words in SHORT:
        command = [names.get(word, word) for word in words[1:]]
        if command[0] == "convert":
            command += ["--overwrite", *(BRIEF if "--calibration" in command else [])]
        if command[0] == "evaluate":
            command += ["--max-tokens", "2048"]
        result = CliRunner().invoke(main, command)
        assert (result.exit_code, result.stdout != "") == (0, True), shlex.join(command)
    assert (tmp_path / "mine.yaml").is_file()


@pytest.mark.parametrize("command", ["quickstart", "test"])
def test_make_knows_the_targets(command: str) -> None:
    assert f"make {command}\n" in README
    assert f"\n{command}: .venv/installed\n" in (ROOT / "Makefile").read_text("utf-8")
