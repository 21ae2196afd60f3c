"""A guard counts only if a test fails without it: each of tests/guards.toml is removed once."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults import note

ROOT = Path(__file__).parents[1]
GUARDS = tomllib.loads((ROOT / "tests" / "guards.toml").read_text("utf-8")).get("guard", [])
NAMES = [f"{guard['where'].removeprefix('uptrain/')}: {guard['what']}" for guard in GUARDS]


def without(guard: dict[str, str], root: Path) -> str:
    text = (root / guard["where"]).read_text("utf-8")
    assert text.count(guard["old"]) == 1, f"{guard['where']} has {text.count(guard['old'])} of it"
    return text.replace(guard["old"], guard["new"])


@pytest.mark.parametrize("guard", GUARDS, ids=NAMES)
def test_a_guard_can_be_removed_and_its_test_is_there(guard: dict[str, str]) -> None:
    ast.parse(without(guard, ROOT))
    file, _, name = guard["test"].partition("::")
    tests = ast.parse((ROOT / file).read_text("utf-8")).body
    names = [each.name for each in tests if isinstance(each, ast.FunctionDef)]
    assert name.partition("[")[0] in names


# Imports what takes long, but nothing that a guard is in, then runs a test for each line it is told.
SERVER = """
import multiprocessing, os, sys
import accelerate, pytest, torch.distributed, transformers.models.llama.modeling_llama
fork = multiprocessing.get_context("fork")
multiprocessing.get_context = lambda kind: fork  # what is here need not be imported by others again
for line in sys.stdin:
    if (child := os.fork()) == 0:
        code = -1
        try:
            sys.stdin = open(os.devnull)
            os.dup2(2, 1)
            # Plugins that are imported already are nothing to warn of.
            arguments = ["-x", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestWarning"]
            code = pytest.main([*arguments, "-m", "slow or not slow", line.strip()])
        finally:
            os._exit(code)  # an error of pytest is no failure of the test
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree, of which only the package and the tests can be changed."""
    folder = tmp_path_factory.mktemp("tree")
    ignored = shutil.ignore_patterns("__pycache__")
    for path in ROOT.iterdir():
        if path.name in ("uptrain", "tests"):
            shutil.copytree(path, folder / path.name, ignore=ignored)
        elif not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def outcome_of(copy: Path) -> Iterator[Callable[[str], int]]:
    """Give the exit code of pytest for a test, as it is in the copy."""
    with subprocess.Popen(
        [sys.executable, "-B", "-c", SERVER],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy), "UPTRAIN_OUTCOMES": ""},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:

        def run(test: str) -> int:
            assert server.stdin is not None
            assert server.stdout is not None
            print(test, file=server.stdin, flush=True)
            return int(server.stdout.readline())

        yield run
        server.kill()


@pytest.mark.slow
@pytest.mark.parametrize("test", sorted({guard["test"] for guard in GUARDS}))
def test_with_all_guards_their_tests_pass(test: str, outcome_of: Callable[[str], int]) -> None:
    assert outcome_of(test) == pytest.ExitCode.OK


@pytest.mark.slow
@pytest.mark.parametrize("guard", GUARDS, ids=NAMES)
def test_without_a_guard_its_test_fails(
    guard: dict[str, str], copy: Path, outcome_of: Callable[[str], int]
) -> None:
    changed = copy / guard["where"]
    before = changed.read_text("utf-8")
    changed.write_text(without(guard, copy), "utf-8")
    try:
        code = outcome_of(guard["test"])
    finally:
        changed.write_text(before, "utf-8")
    assert code == pytest.ExitCode.TESTS_FAILED
    note(fault="guard", operation=guard["what"], points=1, outcomes={"test failed": 1})
