"""Every message of the page on troubleshooting is really raised, by what the page says."""

import importlib.util
import json
import re
import shlex
import shutil
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result
from family_list import TEXT
from tiny import save, tiny_config, tiny_model
from tiny_run import CONTEXT, make_source, write_text

from uptrain.checkpoint.staging import staged_folder
from uptrain.cli import main
from uptrain.training.guard import locked
from uptrain.training.objective import Objective

PAGE = Path(__file__).parents[1] / "docs" / "troubleshooting.md"
ENTRIES = re.findall(r"^#### `(.*)`$", PAGE.read_text("utf-8"), re.MULTILINE)

SOURCE = Path("source")
CONVERT = "convert source target --num-key-value-heads 2"
CALIBRATE = f"{CONVERT} --calibration train.jsonl"
EVALUATE = "evaluate source --data validation.jsonl"
TRAIN = "finetune recipe.yaml"
RECIPE = {
    "source": "source",
    "convert": {"num_key_value_heads": 2},
    "data": {"train": ["train.jsonl"]},
    "train": {"steps": 2, "learning_rate": 0.01, "batch_tokens": 2 * CONTEXT},
    "evaluate": {"data": "validation.jsonl"},
    "output": "output",
}


class Hands(NamedTuple):
    """What a case may do to the world before its command runs."""

    patch: pytest.MonkeyPatch
    stack: ExitStack


Case = tuple[Callable[[Hands], object], str]


def nothing(_: Hands) -> None:
    """Leave all as it is."""


def config(**changes: Any) -> Callable[[Hands], object]:
    def edit(_: Hands) -> None:
        path = SOURCE / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def without(*names: str) -> Callable[[Hands], object]:
    return lambda _: [(SOURCE / name).unlink() for name in names]


def text(name: str, content: str | bytes) -> Callable[[Hands], object]:
    raw = content.encode() if isinstance(content, str) else content
    return lambda _: Path(name).write_bytes(raw)


def recipe(**changes: Any) -> Callable[[Hands], object]:
    content = {key: value for key, value in (RECIPE | changes).items() if value is not None}
    return lambda _: Path("recipe.yaml").write_text(json.dumps(content))


def weights(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Hands], object]:
    def apply(_: Hands) -> None:
        state = safetensors.torch.load_file(SOURCE / "model.safetensors")
        edit(state)
        safetensors.torch.save_file(state, SOURCE / "model.safetensors", {"format": "pt"})

    return apply


def sharded(_: Hands) -> None:
    (SOURCE / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (SOURCE / "model.safetensors.index.json").write_text(json.dumps(index))


def pickled(_: Hands) -> None:
    (SOURCE / "model.safetensors").unlink()
    torch.save({"a": Path("an object")}, SOURCE / "pytorch_model.bin")


def cut(_: Hands) -> None:
    raw = (SOURCE / "model.safetensors").read_bytes()
    (SOURCE / "model.safetensors").write_bytes(raw[:-100])


def foreign_target(_: Hands) -> None:
    Path("target").mkdir()
    Path("target", "thesis.tex").touch()


def small_disk(hands: Hands) -> None:
    usage = shutil.disk_usage(".")._replace(free=1000)
    hands.patch.setattr(shutil, "disk_usage", lambda _: usage)


def out_of_memory(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError


def gemma3n(_: Hands) -> None:
    shutil.rmtree(SOURCE)
    save(tiny_model(tiny_config("gemma3n_text", **TEXT["gemma3n_text"])), SOURCE)


def other_tokens(_: Hands) -> None:
    shutil.copytree(SOURCE, "other")
    config(vocab_size=2047)(_)


def not_installed(package: str) -> Callable[[Hands], object]:
    def hide(hands: Hands) -> None:
        find = importlib.util.find_spec
        hands.patch.setattr(
            importlib.util, "find_spec", lambda name: None if name == package else find(name)
        )
        hands.patch.setitem(__import__("sys").modules, package, None)

    return hide


def first(*commands: str) -> Callable[[Hands], object]:
    return lambda _: [invoke(command) for command in commands]


def damaged_state(_: Hands) -> None:
    invoke(TRAIN)
    path = next(Path("output/checkpoints").glob("step-*/*/*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"\0")


def in_the_loss(do: Callable[[], object]) -> Callable[[Hands], object]:
    """Let something happen in each training step."""
    forward = Objective.forward

    def replaced(self: Objective, *arguments: Any) -> Any:
        factor = do() if self.training else None
        sums = forward(self, *arguments)
        return sums if factor is None else sums * factor

    return lambda hands: hands.patch.setattr(Objective, "forward", replaced)


def fail(*_: object, **__: object) -> None:
    raise ZeroDivisionError("of nobody's making")


CASES: list[Case] = [
    # Opening a checkpoint
    (nothing, "inspect nowhere"),
    (
        lambda hands: hands.patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True),
        "inspect nobody/nothing-at-all",
    ),
    (without("config.json"), "inspect source"),
    (
        lambda _: (SOURCE / "config.json").rename(SOURCE / "adapter_config.json"),
        "inspect source",
    ),
    (without("model.safetensors"), "inspect source"),
    (
        text(
            "source/model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0"
        ),
        "inspect source",
    ),
    (cut, "inspect source"),
    (sharded, "inspect source"),
    (config(quantization_config={"quant_method": "gptq"}), CONVERT),
    (pickled, CONVERT),
    (config(intermediate_size=47), CONVERT),
    (weights(lambda state: state.pop("model.layers.1.self_attn.k_proj.weight")), CONVERT),
    (config(model_type="unheard_of"), "inspect source"),
    (without("tokenizer.json", "tokenizer_config.json"), EVALUATE),
    (nothing, f"{CALIBRATE} --device cuda:99"),
    # Converting
    (nothing, "convert source target --num-key-value-heads 3"),
    (config(model_type="jetmoe", architectures=["JetMoeForCausalLM"]), CONVERT),
    (first(CONVERT), CONVERT),
    (foreign_target, f"{CONVERT} --overwrite"),
    (nothing, "convert source source --num-key-value-heads 2 --overwrite"),
    (small_disk, CONVERT),
    (lambda hands: hands.stack.enter_context(staged_folder(Path("target").absolute())), CONVERT),
    (weights(lambda s: s["model.layers.0.self_attn.k_proj.weight"].fill_(torch.nan)), CONVERT),
    (nothing, f"{CONVERT} --method mean --grouping search"),
    (nothing, f"{CALIBRATE} --method random"),
    # Calibrating
    (text("train.jsonl", '{"text": "the"}\n'), CALIBRATE),
    (
        lambda hands: hands.patch.setattr("uptrain.conversion.walk.Walk.run", out_of_memory),
        CALIBRATE,
    ),
    (gemma3n, f"{CONVERT} --method align"),
    # Text
    (nothing, "evaluate source --data nowhere.jsonl"),
    (text("validation.jsonl", b'{"text": "caf\xe9"}\n'), EVALUATE),
    (text("validation.jsonl", '{"text": "the house"\n'), EVALUATE),
    (text("validation.jsonl", '{"content": "the house"}\n'), EVALUATE),
    (text("validation.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n'), EVALUATE),
    # Evaluating
    (text("validation.jsonl", '{"text": "the"}\n'), EVALUATE),
    (nothing, f"{EVALUATE} --sequence-length 4096"),
    (nothing, f"{EVALUATE} --max-tokens 3"),
    (other_tokens, f"{EVALUATE} --reference other"),
    (not_installed("lm_eval"), f"{EVALUATE} --tasks anything"),
    (nothing, "report source"),
    # Recipes
    (nothing, f"{TRAIN} train.learningrate=1"),
    (recipe(train={"steps": 2, "batch_tokens": 64}), TRAIN),
    (nothing, f"{TRAIN} train.tokens=1000"),
    (text("recipe.yaml", "a: b: c"), TRAIN),
    (nothing, "run nowhere.yaml"),
    (recipe(convert=None), "run recipe.yaml"),
    (
        first("convert source output/converted --num-key-value-heads 1"),
        "run recipe.yaml",
    ),
    # Training
    (nothing, f"{TRAIN} train.batch_tokens=33"),
    (nothing, f"{TRAIN} train.micro_batch_tokens=33"),
    (nothing, f"{TRAIN} train.sequence_length=4096"),
    (nothing, f"{TRAIN} train.steps=100000"),
    (first(TRAIN), TRAIN),
    (first(TRAIN), f"{TRAIN} train.learning_rate=0.1 --resume"),
    (damaged_state, f"{TRAIN} --resume"),
    (lambda hands: hands.stack.enter_context(locked(Path("output").absolute())), TRAIN),
    (in_the_loss(lambda: signal.raise_signal(signal.SIGTERM)), f"{TRAIN} train.steps=3"),
    (in_the_loss(out_of_memory), TRAIN),
    (in_the_loss(lambda: float("nan")), TRAIN),
    (nothing, f"{TRAIN} train.keep_best=true"),
    (
        lambda hands: hands.patch.setattr("torch.amp.is_autocast_available", lambda _: False),
        f"{TRAIN} train.precision=bfloat16",
    ),
    (not_installed("torchao"), f"{TRAIN} train.optimizer=adamw8bit"),
    (not_installed("trackio"), f"{TRAIN} train.trackers=[trackio]"),
    # Anything else
    (lambda hands: hands.patch.setattr("uptrain.conversion.plan.inspect", fail), "inspect source"),
]


def invoke(command: str) -> Result:
    return CliRunner().invoke(main, shlex.split(command))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    make_source(folder / "source", num_key_value_heads=4)
    write_text(folder / "train.jsonl")
    write_text(folder / "validation.jsonl", 4, seed=1)
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE))
    return folder


@pytest.fixture(scope="module")
def raised(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Run every case in a folder of its own; gives the error line of each."""
    lines = {}
    for number, (prepare, command) in enumerate(CASES):
        folder = shutil.copytree(pristine, tmp_path_factory.mktemp("case") / "work")
        with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
            patch.chdir(folder)
            try:
                prepare(Hands(patch, stack))
            except Exception as error:  # one case that cannot be made is one failure
                lines[number] = f"not made: {error!r}"
            else:
                lines[number] = invoke(command).stderr.rpartition("uptrain: ")[2].strip()
    return lines


def matches(entry: str, message: str) -> bool:
    """Say whether an entry, with anything for `…` and any place named before it, is a message."""
    pattern = ".+".join(map(re.escape, entry.split("…")))
    return re.fullmatch(f"(?:.+: )?{pattern}", message) is not None


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_is_really_raised(entry: str, raised: dict[int, str]) -> None:
    assert len(entry.replace("…", "")) > 20
    assert any(matches(entry, message) for message in raised.values())


@pytest.mark.parametrize("number", range(len(CASES)), ids=[command for _, command in CASES])
def test_every_case_is_on_the_page(number: int, raised: dict[int, str]) -> None:
    assert any(matches(entry, raised[number]) for entry in ENTRIES), raised[number]
