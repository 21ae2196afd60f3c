"""The GQA paper's figures 4 to 6 on a decoder: makes, uptrains and evaluates each of their points.

    python benchmarks/paper/measure.py SOURCE --train TEXT --validation TEXT --work DIR
        [--results DIR] [--minutes 9.5] [--heads N …] [--set KEY=VALUE …]
    python benchmarks/paper/draw.py

Settings are those of the recipe books-14m-gqa4-paper, with what a method changes (points.py) and `--set`
over all. Each point is stored as soon as it is there; a call does what is missing, stops after
`--minutes`, in the middle of an uptraining if need be, and the next one goes on from there. Exit code: 0
if all is stored, 130 if there is more to do, 1 if a point failed. DIR holds tokens, conversions and the
run at work; only the results are worth keeping. Calls with other `--heads` and DIR may run at once.
"""

import argparse
import json
import platform
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from points import (
    ALPHA,
    CONVERSIONS,
    DECODE,
    METHODS,
    RECIPE,
    RESULTS,
    Point,
    all_points,
    fewer_heads,
)

import uptrain
from uptrain.checkpoint.reader import open_checkpoint
from uptrain.checkpoint.staging import replace_file
from uptrain.errors import Interrupted
from uptrain.evaluation.bandwidth import device_name
from uptrain.evaluation.decode import measure_decode
from uptrain.families.registry import read_heads
from uptrain.loading import load_model, pick_device
from uptrain.training.recipe import Recipe, load_recipe

DECODE_BATCHES = (1, 16, 128, 1024)
"""A model of this size is bound by the memory's bandwidth with very many sequences only."""
TRAINING = ("steps", "tokens", "teacher", "loss", "seconds", "tokens_per_second", "precision")
SETTINGS = ("batch_tokens", "sequence_length", "learning_rate", "schedule", "floor", "optimizer")


def make_recipe(point: Point, options: argparse.Namespace) -> Recipe:
    method = METHODS[point.method]
    overrides = [
        "source={source}", "data.train=[{text}]", "data.validation=null", "data.repeat=true",
        "data.tokens={work}/tokens", "evaluate.data={validation}", "evaluate.dtype=float32",
        "output={work}/run",
        f"convert.num_key_value_heads={point.num_key_value_heads}",
        f"train.alpha={point.alpha or ALPHA}",
        *CONVERSIONS[method.conversion], *method.train, *options.overrides,
    ]  # fmt: skip
    paths = {
        key: json.dumps(str(getattr(options, key))) for key in ("source", "text", "validation")
    }
    return load_recipe(RECIPE, [each.format(**paths, work=options.work) for each in overrides])


def convert_once(point: Point, options: argparse.Namespace) -> tuple[Path, float | None]:
    """Convert for a point, unless an earlier one was made from the same; gives the seconds it took."""
    conversion = METHODS[point.method].conversion
    target = options.work / f"{conversion}-{point.num_key_value_heads}"
    if target.exists():
        return target, None
    begun = time.perf_counter()
    recipe = make_recipe(point, options)
    assert recipe.convert is not None
    uptrain.convert(recipe.source, target, **recipe.convert.model_dump())
    return target, time.perf_counter() - begun


def measure_point(point: Point, options: argparse.Namespace) -> dict[str, Any]:
    recipe = make_recipe(point, options)
    model, seconds = convert_once(point, options)
    training = None
    if point.alpha:
        run = recipe.model_copy(
            update={"source": str(model), "output": f"{recipe.output}-{point.name}"}
        )
        found = uptrain.finetune(run, resume=True)
        model = Path(found["final"])
        training = {key: found[key] for key in TRAINING}
        training |= {key: getattr(recipe.train, key) for key in SETTINGS}
        record = json.loads((model / "uptrain.json").read_text())
        training["text_tokens"] = record["uptraining"]["data"]["tokens"]
    assert recipe.evaluate is not None
    evaluation = uptrain.evaluate(model, reference=recipe.source, **recipe.evaluate.model_dump())
    for long in ("by_position", "by_document"):
        del evaluation[long]
    if training is not None:
        shutil.rmtree(run.output)
    return {
        **point._asdict(),
        "conversion_seconds": seconds,
        "training": training,
        "evaluation": evaluation,
    }


def measure_speed(heads: list[int], options: argparse.Namespace) -> dict[str, Any]:
    device = pick_device(None)
    dtype = torch.float32 if device.type == "cpu" else None
    models = {}
    for number in heads:
        folder, _ = convert_once(Point("mean", number, 0), options)
        models[str(number)] = load_model(open_checkpoint(folder), device, dtype=dtype)
    rows, conditions = measure_decode(
        models, options.decode_batches, options.decode_contexts, baseline=str(heads[-1])
    )
    return {"decode": rows, "conditions": conditions}


def list_work(options: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    """Give what is to be measured, by the names of the results."""
    source_heads = read_heads(open_checkpoint(options.source).config).num_key_value_heads
    points = [
        point
        for point in all_points(source_heads)
        if options.heads is None or point.num_key_value_heads in options.heads
    ]
    work: dict[str, Callable[[], dict[str, Any]]] = {}
    for point in points:
        if point.alpha and DECODE not in work and options.heads is None:
            heads = [*fewer_heads(source_heads), source_heads]
            work[DECODE] = partial(measure_speed, heads, options)
        work[point.name] = partial(measure_point, point, options)
    return work


def versions() -> dict[str, str]:
    return {
        "uptrain": uptrain.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": device_name(pick_device(None)),
    }


def interrupt_after(minutes: float) -> None:
    """Do then what Ctrl-C does: an uptraining finishes its step and saves, all else ends at once."""
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("--train", dest="text", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument(
        "--heads", type=int, nargs="+", help="only the points of these, beside other calls"
    )
    parser.add_argument("--decode-batches", type=int, nargs="+", default=DECODE_BATCHES)
    parser.add_argument("--decode-contexts", type=int, nargs="+", help="the model's own by default")
    parser.add_argument("--set", dest="overrides", nargs="+", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    work = list_work(options)
    until = time.monotonic() + 60 * options.minutes
    interrupt_after(options.minutes)
    failed = 0
    for name, measure in work.items():
        path = options.results / f"{name}.json"
        if path.is_file():
            continue
        if time.monotonic() > until:
            break
        begun = time.perf_counter()
        try:
            found = measure()
        except (Interrupted, KeyboardInterrupt):
            break
        except Exception:  # what the other points cost should not be lost
            traceback.print_exc()
            failed += 1
            continue
        found |= {"seconds": time.perf_counter() - begun, "versions": versions()}
        found["alone"] = options.heads is None  # or its times say little
        replace_file(path, (json.dumps(found, indent=1) + "\n").encode())
        loss = f", {found['evaluation']['loss_increase']:+.4f}" if "evaluation" in found else ""
        print(f"{name}{loss}, {found['seconds']:.1f} s", flush=True)
    signal.setitimer(signal.ITIMER_REAL, 0)
    stored = sum((options.results / f"{name}.json").is_file() for name in work)
    print(f"{stored} of {len(work)} stored in {options.results}; {failed} failed")
    return 1 if failed else 0 if stored == len(work) else 130


if __name__ == "__main__":
    sys.exit(main())
