"""The pages: every command runs or is parsed, every key, option and page that they name exists."""

import contextlib
import io
import json
import os
import re
import shlex
import struct
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from click.testing import CliRunner
from torch.distributed.run import get_args_parser
from transformers import AutoConfig, AutoModelForCausalLM

from uptrain.cli import main
from uptrain.errors import UptrainError
from uptrain.training.options import SECTIONS
from uptrain.training.recipe import load_recipe

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {path.name: path for path in [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]}

FENCE = re.compile(
    r'^(?P<indent> *)```(?P<language>\w*)(?: title="(?P<title>[^"]*)")?\n(?P<body>.*?)^ *```$',
    re.MULTILINE | re.DOTALL,
)
# Of another project, or of the system: nothing here can parse what follows.
FOREIGN = {"ct2-transformers-converter", "llama-server", "tar", "vllm"}
SYSTEM = {"sudo", "."}
# In the text of the pages; options of other programs.
FOREIGN_OPTIONS = {"--model-impl", "--num_processes", "--logdir", "--help"}


@dataclass(frozen=True)
class Command:
    """A command of a page."""

    words: tuple[str, ...]
    executed: bool
    printed: str | None
    """What the page shows under it, if anything."""


def fences(page: str) -> Iterator[re.Match[str]]:
    return FENCE.finditer(page)


def commands(page: str) -> Iterator[Command]:
    """Give the commands of a page's bash and console blocks."""
    for fence in fences(page):
        language, executed = fence["language"], not (fence["title"] or "").startswith("not run")
        body = fence["body"].replace("\\\n", " ")
        lines = [line.removeprefix(fence["indent"]) for line in body.splitlines()]
        if language == "bash":
            for line in lines:
                if words := shlex.split(line, comments=True):
                    yield Command(tuple(words), executed, None)
        elif language == "console":
            for shown in "\n".join(lines).removeprefix("$ ").split("\n$ "):
                command, _, printed = shown.partition("\n")
                words = shlex.split(command, comments=True)
                yield Command(tuple(words), executed, printed.strip() or None)
        else:
            assert language != "" or not re.search(r"^(\$ )?uptrain ", body, re.MULTILINE), (
                f"a command outside of a bash or console block:\n{body}"
            )


def parse(group: click.Command, words: Sequence[str]) -> click.Context:
    """Let click parse a command, without running it."""
    context = group.make_context(words[0], list(words[1:]), resilient_parsing=False)
    while isinstance(context.command, click.Group):
        rest = [*context._protected_args, *context.args]
        name, command, rest = context.command.resolve_command(context, rest)
        assert name is not None
        assert command is not None
        context = command.make_context(name, rest, parent=context)
    return context


def check(words: Sequence[str], executed: bool) -> None:
    """Find out without running it whether there is such a command, with such options and keys."""
    program = words[0]
    if program == "uptrain":
        context = parse(main, words)
        if context.command.name in ("run", "finetune"):
            load_recipe(context.params["recipe"], context.params["overrides"])
    elif program in ("accelerate", "torchrun"):
        if program == "accelerate":
            assert words[1] == "launch"
            launched = launch_command_parser().parse_args(words[2:])
        else:
            launched = get_args_parser().parse_args(words[1:])
        assert launched.module
        check([launched.training_script, *launched.training_script_args], executed)
    elif program == "hf":
        from huggingface_hub.cli.hf import app

        parse(app, words)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
    elif program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
        for extras in re.findall(rf"{project['name']}\[(.*?)\]", " ".join(words)):
            assert set(extras.split(",")) <= set(project["optional-dependencies"])
    elif program in ("python", "pytest") and (executed or "/" in words[1]):
        assert (ROOT / words[1]).is_file()
    else:
        assert program in SYSTEM or (program in FOREIGN | {"python"} and not executed), program


def small(command: Command) -> list[str]:
    """Take the same path on less text."""
    words = list(command.words[1:])
    if command.printed is not None:
        return words
    words = [{"1048576": "2048", "65536": "2048"}.get(word, word) for word in words]
    if words[0] == "convert" and "--calibration" in words:
        words += ["--calibration-tokens", "2048", "--reconstruct-steps", "3"]
    if words[0] == "evaluate":
        words += ["--max-tokens", "2048"]
    if "--decode" in words:
        words += ["--decode-batches", "1", "--decode-contexts", "16"]
    if words[0] in ("run", "finetune"):
        words += [
            "train.alpha=null", "train.pretraining_tokens=null", "train.steps=2",
            "train.batch_tokens=256", "train.sequence_length=128", "train.micro_batch_tokens=null",
            "train.compile=false", "train.evaluate_every_steps=null",
            "convert.num_key_value_heads=2", "convert.calibration_tokens=2048",
            "convert.reconstruct_steps=2", "convert.calibration=train.jsonl",
            "data.train=[train.jsonl]", "data.validation=validation.jsonl",
            "evaluate.data=validation.jsonl", "evaluate.max_tokens=2048",
        ]  # fmt: skip
    return words


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where the names that the pages use stand for the example and its text."""
    for name in ("examples", "docs", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("SOURCE", "books-14m", "meta-llama/Llama-2-7b-hf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(ROOT / "examples" / "books-1m")
    for name, size in (("train", 40_000), ("validation", 4_000)):
        with (ROOT / "examples" / f"books-{name}.jsonl").open(encoding="utf-8") as file:
            text = "".join(json.loads(line)["text"] for line in file)[:size]
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": text}), encoding="utf-8")
    (tmp_path / "TEXT.jsonl").symlink_to("validation.jsonl")
    # Pictures are half of the work of a small run, and have tests of their own.
    monkeypatch.setattr("uptrain.report.can_draw", lambda: False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def hollow_checkpoint(shape: Path, folder: Path) -> None:
    """Make a checkpoint of a shape whose weights take no disk: all of them are a hole."""
    folder.mkdir()
    (folder / "config.json").write_bytes((shape / "config.json").read_bytes())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(shape))
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        begin, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": [*tensor.shape], "data_offsets": [begin, end]}
    packed = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(packed)) + packed)
        file.truncate(8 + len(packed) + end)


def run(words: Sequence[str]) -> str:
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, f"uptrain {shlex.join(words)}\n{result.stderr}"
    assert result.stdout, f"uptrain {shlex.join(words)} prints nothing"
    return result.stdout


def stand_in(words: list[str]) -> list[str]:
    """Take the example where the weights of a 7B model are read, and 2 heads where they had 8."""
    if words[0] == "inspect":
        return words
    text = "\0".join(words).replace("--num-key-value-heads\x008", "--num-key-value-heads\x002")
    return re.sub(r"(?<![\w/-])Llama-2-7b-hf", "SOURCE", text).split("\0")


@pytest.mark.parametrize("name", PAGES)
def test_the_commands_of_a_page_run(name: str, user_folder: Path) -> None:
    """In the order of the page, in one folder; what is marked as not run is parsed."""
    page = PAGES[name].read_text("utf-8")
    if name == "guide-7b.md":
        hollow_checkpoint(DOCS / "shapes" / "llama2-7b", user_folder / "Llama-2-7b-hf")
    for command in commands(page):
        check(command.words, command.executed)
        if not command.executed or command.words[0] != "uptrain":
            continue
        words = stand_in(small(command))
        if words[0] == "convert" and Path(words[2]).exists():
            words.append("--overwrite")
        printed = run(words)
        if command.printed is not None:
            lines = [
                r"(?:.*\n)*?" if line.strip() == "…" else re.escape(line.rstrip()) + " *\n"
                for line in command.printed.splitlines()
            ]
            assert re.fullmatch("".join(lines), printed.strip() + "\n"), (
                f"{name} shows for {shlex.join(words)}\n{command.printed}\n\nit prints\n{printed}"
            )
    for fence in fences(page):
        if fence["language"] == "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(fence["body"], {})


@pytest.mark.parametrize(
    "line",
    [
        "uptrain convert SOURCE TARGET --num-kv-heads 2",
        "uptrain convert SOURCE --num-key-value-heads 2",
        "uptrain transmogrify SOURCE",
        "uptrain run quickstart train.learningrate=1",
        "uptrain run quickstart train.steps=1",
        "accelerate launch --num_gpus 8 -m uptrain run quickstart",
        "accelerate launch --num_processes 8 -m uptrain run quickstart train.stepz=1",
        "torchrun --nproc-per-node 8 -m uptrain finetune quickstart --again",
        "hf download owner/name --into folder",
        "make quickstrat",
        "pip install 'uptrain-gqa[reprot]'",
        "python docs/make_nothing.py",
        "vllm serve",
    ],
)
def test_a_wrong_command_is_noticed(line: str) -> None:
    (command,) = commands(f"```bash\n{line}\n```\n")
    with pytest.raises((click.ClickException, UptrainError, AssertionError, SystemExit)):
        check(command.words, command.executed)


def test_a_command_cannot_hide() -> None:
    with pytest.raises(AssertionError, match="outside of a bash or console block"):
        list(commands("```\nuptrain convert a b\n```\n"))


def spans(page: str) -> list[str]:
    """Give what stands between single backticks."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", FENCE.sub("", page))


def all_options(command: click.Command) -> set[str]:
    if isinstance(command, click.Group):
        return {name for each in command.commands.values() for name in all_options(each)}
    return {name for each in command.params for name in (*each.opts, *each.secondary_opts)}


@pytest.mark.parametrize("name", PAGES)
def test_options_and_keys_in_the_text_exist(name: str) -> None:
    text = "\n".join(spans(PAGES[name].read_text("utf-8")))
    options = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
    scripts = "".join(path.read_text("utf-8") for path in (ROOT / "benchmarks").rglob("*.py"))
    known = {*all_options(main), *FOREIGN_OPTIONS, *re.findall(r"\"(--[a-z][\w-]*)\"", scripts)}
    assert options <= known | {"--debug", "--version"}
    for section, key in re.findall(r"\b(convert|data|train|evaluate)\.([a-z_]+)\b", text):
        is_file = key in ("jsonl", "json", "md", "png", "py", "yaml")
        assert is_file or key in SECTIONS[section].model_fields, f"{section}.{key}"


def generator(name: str) -> ModuleType:
    spec = spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_what_the_code_says() -> None:
    """Else run `python docs/make_reference.py`."""
    reference = generator("make_reference")
    assert PAGES["recipes.md"].read_text("utf-8") == reference.recipes_page()
    assert PAGES["command-line.md"].read_text("utf-8") == reference.commands_page()


def entries(nav: Any) -> Iterator[str]:
    for item in nav if isinstance(nav, list) else nav.values():
        if isinstance(item, str):
            yield item
        else:
            yield from entries(item)


def test_every_page_can_be_reached() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    assert {*entries(site["nav"])} == {*PAGES} - {"README.md"}


def test_the_readme_shows_the_commands() -> None:
    shown = {
        words[1]
        for words in (each.words for each in commands(PAGES["README.md"].read_text("utf-8")))
        if words[0] == "uptrain"
    }
    assert shown >= {"convert", "evaluate", "inspect", "recipes", "run", "verify"}


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#:]+)[^):]*\)", PAGES["README.md"].read_text("utf-8"))
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_fetches_nothing(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings", reason="the extra docs is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    foreign = re.compile(
        r'<(?:script|img|source|iframe)[^>]+src="?https?:|<link[^>]+href="?https?:'
    )
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) >= len(PAGES) - 1
    for page in pages:
        assert not foreign.search(page.read_text("utf-8")), page
    for sheet in tmp_path.rglob("*.css"):
        assert not re.search(r"url\(['\"]?https?:", sheet.read_text("utf-8")), sheet
