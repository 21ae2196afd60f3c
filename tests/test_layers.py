"""The tree is the pipeline: a module imports only from those above its own."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "uptrain"

# In the order of README's tree. `cli`, `__init__` and `__main__` of the package stand apart.
ORDER = [
    "errors", "progress",
    "checkpoint.files", "checkpoint.tensors", "checkpoint.config", "checkpoint.reader",
    "checkpoint.card", "checkpoint.staging", "checkpoint.writer",
    "families.schema", "families.rules", "families.carried.modeling_gqa", "families.carried",
    "families.layouts", "families.registry", "families.meta",
    "families.head_tensors", "families.runtimes",
    "families.rewrites.recipe", "families.rewrites.gpt_neox", "families.rewrites.gptj",
    "families.rewrites.gpt_bigcode", "families.rewrites.falcon", "families.rewrites.carried",
    "families.rewrites.stated", "families.rewrites.baichuan", "families.rewrites.chatglm",
    "families.rewrites.internlm", "families.rewrites.qwen",
    "families.rewrites",
    "loading", "data.source", "data.files", "data.tables", "data", "data.encoding",
    "data.tokenise", "data.shards", "training.order", "training.packing", "training.batches",
    "conversion.remote_tokenizers", "conversion.tokenizer_files", "conversion.rewritten",
    "conversion.plan", "conversion.pooling", "conversion.options", "conversion.finished",
    "conversion.grouping", "conversion.rotary", "conversion.energy", "conversion.align",
    "conversion.factorize", "conversion.attention", "conversion.stacks", "conversion.freedom",
    "conversion.merge", "conversion.sample", "conversion.speech", "conversion.weights",
    "conversion.arguments", "conversion.frame", "conversion.stream",
    "conversion.refit", "conversion.fit",
    "conversion.partway", "conversion.residual", "conversion.repair", "conversion.moments",
    "conversion.encoder", "conversion.walk", "conversion.calibrate", "conversion.convert", "conversion.verify",
    "evaluation.blocks", "evaluation.scoring", "evaluation.bootstrap", "evaluation.tally",
    "evaluation.copying", "evaluation.continuations", "evaluation.tasks", "evaluation.bandwidth",
    "evaluation.full_batch", "evaluation.decode", "evaluation.quality", "evaluation.serving",
    "evaluation.tables",
    "training.strict_yaml", "training.shipped", "training.options", "training.recipe",
    "training.log", "training.watch", "training.guard", "training.processes",
    "training.head", "training.loss", "training.objective", "training.trainable",
    "training.optimizer", "training.flops", "training.shard", "training.memory", "training.models",
    "training.saved", "training.parts", "training.export", "training.state", "training.inputs", "training.setup", "training.step",
    "training.loop",
    "report.runs", "report.text", "report.canvas", "report.recovery", "report.plots",
    "report.evaluated", "report.sections", "report.making", "report.summary", "report.page", "report",
    "run",
]  # fmt: skip

ABOUT_300 = 330
# Longer ones, each with its reason.
LONG = {
    "cli": "the options and the printed rows of nine commands, no logic",
}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def is_empty(path: Path) -> bool:
    body = ast.parse(path.read_text("utf-8")).body
    return not body[1:] and (not body or isinstance(body[0], ast.Expr))


MODULES = {
    name_of(path): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if not (path.name == "__init__.py" and is_empty(path))
}
APART = {"", "cli", "__main__"}


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a file imports, at its top or within functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports relatively"
            base = node.module or ""
            full = {f"{base}.{alias.name}" for alias in node.names}
            modules = {name for name in full if name.removeprefix("uptrain.") in MODULES}
            found |= modules or {base}
    return {name.removeprefix("uptrain.") for name in found if name.startswith("uptrain.")}


@pytest.mark.parametrize("module", sorted(MODULES.keys() - APART))
def test_a_module_imports_only_from_above(module: str) -> None:
    assert module in ORDER, f"{module} has no place in README's tree and in ORDER"
    above = ORDER[: ORDER.index(module)]
    below = imports_of(MODULES[module]) - set(above)
    assert not below, f"{module} imports {', '.join(sorted(below))}, which is not above it"


def test_only_the_command_line_knows_click() -> None:
    for module, path in MODULES.items():
        imported = {
            alias.name
            for node in ast.walk(ast.parse(path.read_text("utf-8")))
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        assert "click" not in imported or module == "cli"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_module_is_long_without_a_reason(module: str) -> None:
    lines = MODULES[module].read_text("utf-8").count("\n")
    assert lines <= ABOUT_300 or module in LONG, f"{module} has {lines} lines"


def test_every_reason_is_still_needed() -> None:
    for module in LONG:
        assert MODULES[module].read_text("utf-8").count("\n") > ABOUT_300
