"""The command line: options in, results out, exit codes. Everything else is in the library."""

import json
import logging
import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import click

from uptrain import __version__
from uptrain.errors import Interrupted, OptionError, RecipeError, UptrainError

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class Size(click.ParamType[int]):
    """A number of bytes such as 5GB."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """Read a size in bytes."""
        if isinstance(value, int):
            return value
        text = value.strip().upper()
        for unit in sorted(_UNITS, key=len, reverse=True):
            number = text.removesuffix(unit).strip()
            is_number = re.fullmatch(r"[0-9]+([.][0-9]+)?", number)
            if text.endswith(unit) and is_number and float(number) > 0:
                return int(float(number) * _UNITS[unit])
        self.fail(f"{value!r} is no size; write for example 500MB or 5GB", param, ctx)


class Several(click.ParamType[tuple[Any, ...]]):
    """Words, or positive numbers, with commas between them."""

    name = "list"

    def __init__(self, numbers: bool = False, word: str | None = None) -> None:
        self.numbers, self.word = numbers, word

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[Any, ...]:
        """Read a list."""
        if isinstance(value, tuple):
            return value
        parts = tuple(part.strip() for part in value.split(",") if part.strip())
        if not self.numbers:
            return parts
        for part in parts:
            if part != self.word and not re.fullmatch("[1-9][0-9]{0,8}", part):
                self.fail(f"{part!r} is no number; write for example 1,16", param, ctx)
        return tuple(part if part == self.word else int(part) for part in parts)


class Commands(click.Group):
    """The commands, with every error of the library turned into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; exit 1 on an error, 2 on a wrong choice or recipe, 130 when interrupted."""
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.ClickException):
            raise
        except BrokenPipeError:
            # Whoever read our output has seen enough; what is left goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(1)
        except (KeyboardInterrupt, Interrupted, click.Abort) as error:
            _fail(ctx, str(error) or "interrupted; nothing was left half done", 130)
        except (OptionError, RecipeError) as error:
            _fail(ctx, str(error), 2)
        except UptrainError as error:
            _fail(ctx, str(error), 1)
        except OSError as error:
            _fail(ctx, f"{error.filename or 'input/output'}: {error.strerror or error}", 1)
        except Exception as error:
            text = " ".join(str(error).split())
            _fail(
                ctx,
                f"unexpected {type(error).__name__}: {text}; --debug shows where it happened",
                1,
            )


def _fail(ctx: click.Context, message: str, code: int) -> None:
    if ctx.params.get("debug"):
        raise
    # Names in a checkpoint may hold anything, line ends and terminal codes too.
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in message)
    click.echo(f"uptrain: {line}", err=True)
    ctx.exit(code)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="uptrain %(version)s")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Turn multi-head attention checkpoints into grouped-query ones, and win their quality back."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        with suppress(ValueError):  # only the main thread can handle signals
            signal.signal(signal.SIGTERM, signal.default_int_handler)
    # The libraries' own remarks would bury ours.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for name in ("torchao", "torch.utils._pytree"):  # transformers imports it where it is installed
        logging.getLogger(name).setLevel(logging.ERROR)


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
trust_option = click.option(
    "--trust-remote-code", is_flag=True, help="Execute Python code that lies in the checkpoint."
)


@main.command()
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--num-key-value-heads",
    type=click.IntRange(min=1),
    required=True,
    metavar="G",
    help="KV heads of the target; 1 makes multi-query attention.",
)
@click.option(
    "--method",
    type=click.Choice(["mean", "first", "random", "align", "factorize"]),
    help="How the heads of a group become one.  [default: mean; with --calibration factorize]",
)
@click.option(
    "--grouping",
    type=click.Choice(["contiguous", "search"]),
    help="Which heads become one.  [default: contiguous; with --calibration search]",
)
@click.option(
    "--architecture",
    default="auto",
    show_default=True,
    metavar="auto|keep|NAME",
    help="Rewrite SOURCE exactly into a family that can have fewer KV heads: if it has to be, never, or "
    "into the model type NAME.",
)
@click.option("--encoder", is_flag=True, help="Convert the encoder of an encoder-decoder, too.")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Text or jsonl: repair every layer on it, which loses far less.",
)
@click.option(
    "--calibration-tokens",
    type=click.IntRange(min=1),
    default=262_144,
    show_default=True,
    help="Tokens that are drawn from that text.",
)
@click.option("--no-refit", is_flag=True, help="Do not solve output projections anew.")
@click.option(
    "--reconstruct-steps",
    type=click.IntRange(min=0),
    metavar="N",
    help="Steps in which each layer is fitted; 0 for none.  [default: six passes over the tokens]",
)
@click.option(
    "--activation-bytes", type=Size(), help="Most activations on the device, such as 8GB."
)
@click.option("--device", help="Where to calibrate: cpu, cuda, …  [default: a GPU if there is one]")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Of whatever is drawn: heads, text, bases.",
)
@click.option(
    "--max-shard-size",
    type=Size(),
    default="5GB",
    show_default=True,
    help="Most bytes of one weight file.",
)
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint at TARGET.")
@click.option("--dry-run", is_flag=True, help="Check everything, print the plan, write nothing.")
@trust_option
@json_option
def convert(
    source: str,
    target: Path,
    num_key_value_heads: int,
    method: str | None,
    grouping: str | None,
    architecture: str,
    encoder: bool,
    calibration: Path | None,
    calibration_tokens: int,
    no_refit: bool,
    reconstruct_steps: int | None,
    activation_bytes: int | None,
    device: str | None,
    seed: int,
    max_shard_size: int,
    overwrite: bool,
    dry_run: bool,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Merge the KV heads of checkpoint SOURCE (a folder or a hub id) into TARGET."""
    of_text = ("calibration_tokens", "no_refit", "reconstruct_steps", "activation_bytes")
    for option in of_text if calibration is None else ():
        _check_not_given(option, "calibration")
    from uptrain.conversion.convert import convert

    result = convert(
        source,
        target,
        num_key_value_heads,
        method=method,
        grouping=grouping,
        architecture=architecture,
        encoder=encoder,
        calibration=calibration,
        calibration_tokens=calibration_tokens,
        refit=not no_refit,
        reconstruct_steps=reconstruct_steps,
        activation_bytes=activation_bytes,
        device=device,
        seed=seed,
        max_shard_bytes=max_shard_size,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        dry_run=dry_run,
    )
    if as_json:
        _print_json(result)
        return
    heads, weights = result["num_key_value_heads"], result["weight_bytes"]
    cache, tensors = result["kv_cache_bytes_per_token"], result["tensors"]
    counted = "those of the layers; how many shows when they are done"
    if tensors is not None:
        kept = result["rewrite"] is None or result["rewrite"]["keeps_tensors"]
        others = "copied byte for byte" if kept else "rewritten"
        counted = f"{tensors['changed']} changed, {tensors['copied']} {others}"
    how = "unchanged: there is nothing to merge"
    if result["group_size"] > 1:
        how = f"{result['method']}, groups of {result['group_size']} ({result['grouping']})"
    rows = [
        *_rewrite_rows(result["rewrite"]),
        (
            "KV heads",
            f"{heads['source']} → {heads['target']}, {how}",
        ),
        (
            "KV cache",
            f"{cache['source']:,} → {cache['target']:,} bytes a token "
            f"({cache['source'] / cache['target']:.3g}× smaller)",
        ),
        ("weights", f"{_mib(weights['source'])} → {_mib(weights['target'])}"),
        ("tensors", counted),
    ]
    if result["left_out"]:
        rows.append(("left out", ", ".join(result["left_out"]) + " (weights in another format)"))
    if dry_run:
        rows.append(
            (
                "needs",
                f"at most {_mib(result['disk_bytes'])} of disk"
                if tensors is None
                else f"{_mib(result['disk_bytes'])} of disk, {_mib(result['working_memory_bytes'])} for tensors",
            )
        )
        title = f"{result['source']} → {target} (dry run, nothing written)"
    else:
        title = f"{result['source']} → {target}"
        check = f"uptrain evaluate {target} --reference {source} --data TEXT"
        needs_code = (result["rewrite"] or {}).get("source_needs_code")
        if needs_code or result["auto_class"] != "AutoModelForCausalLM":  # evaluate cannot load it
            check = f"uptrain verify {target} --source {source}"
        rows.append(("next", check))
    _print_rows(title, rows)
    if result.get("choices"):
        click.echo("\n  KV heads   KV cache a token   V discarded   K discarded")
        for choice in result["choices"]:
            lost, cached = choice["discarded_energy"], choice["kv_cache_bytes_per_token"]
            click.echo(
                f"  {choice['num_key_value_heads']:>8}   {cached:>10,} bytes   "
                f"{lost['value']:>11.1%}   {lost['key']:>11.1%}"
            )
    if result.get("layers"):
        click.echo()
        _print_layers(result["layers"])


@main.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--resume", is_flag=True, help="Go on from the newest whole checkpoint.")
@json_option
def finetune(recipe: str, overrides: Sequence[str], resume: bool, as_json: bool) -> None:
    """Uptrain a converted checkpoint as RECIPE (a file, or a shipped recipe's name) says."""
    from uptrain.report import report
    from uptrain.training.loop import finetune
    from uptrain.training.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    with redirect_stdout(sys.stderr):  # trackers speak there, but it is for results
        result = finetune(loaded, resume=resume)
    if not result:  # only the main process reports
        return
    folder = Path(loaded.output) / "report"
    content = report([Path(loaded.output)], folder)
    result["report"] = str(folder / "report.html")
    if as_json:
        _print_json(result)
    else:
        _print_report(content, [("model", result["final"]), ("report", result["report"])])


@main.command()
@click.argument("model")
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Text or jsonl.")
@click.option("--reference", help="Compare with this checkpoint, usually the original.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Tokens to predict.  [default: all]")
@click.option(
    "--sequence-length",
    type=click.IntRange(min=1),
    help="Tokens of a block.  [default: the model's context, at most 2048]",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    help="Of weights and arithmetic.  [default: float32 on a CPU, else the checkpoint's own]",
)
@click.option("--long-context", is_flag=True, help="Also the loss by position in a whole context.")
@click.option("--copying", is_flag=True, help="Also the loss on a random span that comes again.")
@click.option("--continuations", is_flag=True, help="Also how the models go on from five prompts.")
@click.option(
    "--tasks",
    type=Several(),
    default=(),
    metavar="NAME,…",
    help="Also tasks of the lm-evaluation-harness, which is an extra.",
)
@click.option(
    "--tasks-folder", type=click.Path(path_type=Path), help="Where more tasks are, as YAML files."
)
@click.option("--decode", is_flag=True, help="Also the speed of prefill and decoding.")
@click.option(
    "--decode-batches",
    type=Several(numbers=True, word="max"),
    metavar="N,…",
    help="Sequences at once; max for as many as fit.  [default: 1,4,16 on a GPU, else 1,4]",
)
@click.option(
    "--decode-contexts",
    type=Several(numbers=True),
    metavar="N,…",
    help="Tokens of the full context.  [default: 1024,4096 on a GPU, else 256]",
)
@click.option("--device", help="cpu, cuda, …  [default: a GPU if there is one]")
@click.option("--output", type=click.Path(path_type=Path), help="Folder for evaluation.json.")
@trust_option
@json_option
def evaluate(model: str, data: Path, as_json: bool, **options: Any) -> None:
    """Measure the loss of MODEL on text, and how far it is from a reference."""
    for option, needed in (
        ("tasks_folder", "tasks"),
        ("decode_batches", "decode"),
        ("decode_contexts", "decode"),
    ):
        if not options[needed]:
            _check_not_given(option, needed)
    from uptrain.evaluation.quality import evaluate
    from uptrain.evaluation.tables import evaluation

    result = evaluate(model, data, **options)
    _print_json(result) if as_json else click.echo(evaluation(result))


@main.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@json_option
def run(recipe: str, overrides: Sequence[str], as_json: bool) -> None:
    """Convert, uptrain, evaluate and report as RECIPE says; picks up where it stopped."""
    from uptrain.run import run
    from uptrain.training.recipe import load_recipe

    with redirect_stdout(sys.stderr):  # trackers speak there, but it is for results
        command = shlex.join(["uptrain", "run", recipe, *overrides])
        result = run(load_recipe(recipe, overrides), command)
    if not result:  # only the main process reports
        return
    if as_json:
        _print_json(result)
    else:
        written = [("model", result["final"]), ("report", result["report_path"])]
        _print_report(result["report"], written)


@main.command()
@click.argument("model")
@click.option(
    "--train-plan",
    is_flag=True,
    help="Show what training would take instead, which needs no more of MODEL than config.json. "
    "The options below belong to it.",
)
@click.option("--recipe", metavar="RECIPE", help="Take what the options below leave out from it.")
@click.option(
    "--devices", type=click.IntRange(min=1), help="GPUs that share the model.  [default: 1]"
)
@click.option(
    "--num-key-value-heads",
    type=click.IntRange(min=1),
    metavar="G",
    help="KV heads of the model that is trained.  [default: as MODEL]",
)
@click.option(
    "--optimizer",
    type=click.Choice(["adamw", "adafactor", "muon", "adamw8bit"]),
    help="What it is trained by.  [default: adamw]",
)
@click.option(
    "--trainable",
    type=click.Choice(["all", "attention", "attention-first"]),
    help="What is trained.  [default: all]",
)
@click.option(
    "--teacher/--no-teacher", default=None, help="Distil from MODEL or not.  [default: --teacher]"
)
@click.option(
    "--sequence-length",
    type=click.IntRange(min=1),
    help="Tokens of one sequence.  [default: the model's context, at most 2048]",
)
@click.option(
    "--micro-batch-tokens",
    type=click.IntRange(min=1),
    help="Tokens that go through a device at once.  [default: as many as a run would take]",
)
@click.option("--tokens", type=click.IntRange(min=1), help="Of the whole run, to give its days.")
@click.option(
    "--flops-per-second",
    type=click.FloatRange(min=0, min_open=True),
    help="What a device really does.  [default: 4e14]",
)
@trust_option
@json_option
@click.pass_context
def inspect(
    ctx: click.Context,
    /,
    model: str,
    train_plan: bool,
    trust_remote_code: bool,
    as_json: bool,
    **plan_options: Any,
) -> None:
    """Show the heads of MODEL, what it can go to, and which runtimes will accept that."""
    given = {key: value for key, value in plan_options.items() if value is not None}
    if train_plan:
        from uptrain.training.memory import inspect_training

        result = inspect_training(model, given, trust_remote_code=trust_remote_code)
        _print_json(result) if as_json else _print_train_plan(result)
        return
    if given:
        flag = next(p for p in ctx.command.params if p.name == next(iter(given))).opts[0]
        raise click.UsageError(f"{flag} needs --train-plan")
    from uptrain.checkpoint.reader import open_checkpoint
    from uptrain.conversion.plan import inspect
    from uptrain.evaluation.serving import describe_serving
    from uptrain.evaluation.tables import inspection

    checkpoint = open_checkpoint(model)
    code = checkpoint.folder if trust_remote_code else None
    result = describe_serving(inspect(checkpoint, code), checkpoint, code)
    _print_json(result) if as_json else click.echo(inspection(result))


@main.command()
@click.argument("target")
@click.option("--source", help="The checkpoint that TARGET was converted from: compare with it.")
@trust_option
@json_option
@click.pass_context
def verify(
    ctx: click.Context, target: str, source: str | None, trust_remote_code: bool, as_json: bool
) -> None:
    """Check that TARGET is whole, unchanged, and what its record says."""
    from uptrain.conversion.verify import verify

    result = verify(target, source, trust_remote_code=trust_remote_code)
    if as_json:
        _print_json(result)
    else:
        _print_rows(target, [("ok", check) for check in result["checks"]])
    for problem in result["problems"]:
        click.echo(f"uptrain: {target}: {problem}", err=True)
    if result["problems"]:
        ctx.exit(1)


@main.command()
@click.argument(
    "folders", nargs=-1, required=True, metavar="DIR...", type=click.Path(path_type=Path)
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Folder to write to.  [default: report/ of a single DIR, else ./report]",
)
@json_option
def report(folders: tuple[Path, ...], output: Path | None, as_json: bool) -> None:
    """Put the results of a run on one page, or compare several."""
    from uptrain.report import report

    if output is None:
        output = folders[0] / "report" if len(folders) == 1 else Path("report")
    result = report(folders, output)
    if as_json:
        _print_json(result)
    else:
        _print_report(result, [("report", str(output / "report.html"))])


@main.group()
def recipes() -> None:
    """The recipes shipped with uptrain."""


@recipes.command("list")
@json_option
def list_recipes(as_json: bool) -> None:
    """List the shipped recipes."""
    from uptrain.training.recipe import shipped_recipes

    found = shipped_recipes()
    if as_json:
        _print_json({"recipes": found})
        return
    width = max(len(entry["name"]) for entry in found)
    for entry in found:
        click.echo(f"{entry['name']:<{width}}  {entry['description']}")


@recipes.command("copy")
@click.argument("name")
@click.argument("path", type=click.Path(path_type=Path), required=False)
@json_option
def copy_recipe(name: str, path: Path | None, as_json: bool) -> None:
    """Copy recipe NAME to PATH, to change it (default: NAME.yaml here)."""
    from uptrain.training.recipe import copy_recipe

    written = copy_recipe(name, path or Path(f"{name}.yaml"))
    if as_json:
        _print_json({"path": str(written)})
    else:
        click.echo(f"{written}; change it, then: uptrain run {written}")


def _print_train_plan(result: dict[str, Any]) -> None:
    """Show what training takes on each device, by part, without and with checkpointed layers."""
    devices, teacher = result["devices"], result["teacher_parameters"]
    counts = [(part, count) for part, count in result["parameters"].items() if count]
    rows = [(f"  {part.replace('_', ' ')}", f"{count:,}") for part, count in counts[:-1]]
    rows = [("parameters", f"{result['parameters']['total']:,}"), *rows]
    rows += [
        (
            "trained",
            f"{result['trained_parameters']:,} ({result['trainable']}) by {result['optimizer']}",
        ),
        ("teacher", f"{teacher:,} in bfloat16" if teacher else "none"),
        ("devices", f"{devices:,}" + (", everything sharded over them" if devices > 1 else "")),
        (
            "at once",
            f"{result['micro_batch_tokens']:,} tokens on a device, in sequences of "
            f"{result['sequence_length']:,}",
        ),
    ]
    heads = result["num_key_value_heads"]
    _print_rows(f"{result['model']} ({result['model_type']}), {heads} KV heads", rows)
    plans = result["plans"]
    table = [
        (part.replace("_", " "), [plan["bytes_per_device"][part] / 2**30 for plan in plans], 2)
        for part in plans[0]["bytes_per_device"]
    ]
    table += [
        ("total", [plan["total_bytes_per_device"] / 2**30 for plan in plans], 2),
        ("GFLOP a token", [plan["flops_per_token"] / 1e9 for plan in plans], 1),
        ("tokens/s", [plan["tokens_per_second"] for plan in plans], 0),
    ]
    if result["tokens"]:
        label = f"days for {result['tokens']:.3g} tokens"
        table.append((label, [plan["days"] for plan in plans], 2))
    width = max(len(label) for label, _, _ in table)
    click.echo(f"\n  {'GiB on each device':<{width}}  {'plain':>12}  {'checkpointed':>12}")
    for label, values, digits in table:
        if label in ("total", "GFLOP a token"):
            click.echo()
        click.echo(f"  {label:<{width}}" + "".join(f"  {value:>12,.{digits}f}" for value in values))
    click.echo(
        f"\n  Speed and time are assumed: {result['flops_per_second']:.3g} operations a second on a device.\n"
        "  Its context and the allocator's gaps come on top of the memory, 1 to 3 GiB."
    )


def _rewrite_rows(rewrite: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Say what a source is rewritten into, and what that costs."""
    if rewrite is None:
        return []
    made = f"{rewrite['source']} → {rewrite['target']}, which computes the same"
    accepted = f"accepted by {', '.join(rewrite['accepted_by'])}"
    return [("rewrite", made), *(("", sentence) for sentence in (accepted, *rewrite["lost"]))]


def _print_layers(layers: Sequence[dict[str, Any]]) -> None:
    """Show what each layer lost and how much of it was repaired."""
    steps = list(dict.fromkeys(step for layer in layers for step in layer["error"]))
    heading = "  layer   V discarded   K discarded"
    click.echo(
        heading
        + "".join(f"{step:>12}" for step in steps)
        + ("   relative error on the calibration text" * bool(steps))
    )
    for layer in layers:
        lost, error = layer["discarded_energy"], layer["error"]
        if not lost and not error:
            click.echo(f"  {layer['layer']:>5}   no attention")
            continue
        parts = [f"{lost[part]:.1%}" if lost else "–" for part in ("value", "key")]
        left = [f"{error[step]:.4f}" if step in error else "–" for step in steps]
        row = "".join(f"   {part:>11}" for part in parts) + "".join(f"{e:>12}" for e in left)
        click.echo(f"  {layer['layer']:>5}{row}")


def _print_report(content: dict[str, Any], written: Sequence[tuple[str, str]]) -> None:
    """Show the figures of a report, and where things are."""
    from uptrain.report import summary_table

    click.echo(summary_table(content))
    click.echo()
    _print_rows("written", written)


def _print_rows(title: str, rows: Sequence[tuple[str, str]]) -> None:
    click.echo(title)
    width = max((len(label) for label, _ in rows), default=0)
    for label, text in rows:
        click.echo(f"  {label:<{width}}  {text}")


def _check_not_given(option: str, needed: str) -> None:
    """Refuse an option that does nothing without another one."""
    context = click.get_current_context()
    if context.get_parameter_source(option) is click.core.ParameterSource.COMMANDLINE:
        flags = [f"--{name.replace('_', '-')}" for name in (option, needed)]
        raise click.UsageError(f"{flags[0]} needs {flags[1]}", context)


def _print_json(content: dict[str, Any]) -> None:
    click.echo(json.dumps(content, ensure_ascii=False))


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**30:,.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:,.1f} MiB"
