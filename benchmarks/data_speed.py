"""How fast text becomes tokens beside the tokenizer library alone, and what loading costs a step.

    python benchmarks/data_speed.py MODEL TEXT.jsonl [--characters 8e6] [--rounds 5] [--json PATH]

Tokenising, in turns over the same documents, on all cores, after one turn of each that is not counted:

* the tokenizer library's own batch call, `encode_batch_fast`, on the texts in memory,
* `TokenShards.prepare`: read and hash the file, tokenise, write and sync the shards.

Loading: the batches of a run are taken one after another, each followed by a step of
`--step-milliseconds` in which the processor is free, as it is while a GPU works. What the loop waits for
a batch is the loader's share; the default is the step of books-14m on one H200.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MIN_RATIO, MAX_SHARE = 0.8, 0.02
STEPS = 50


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="folder with a tokenizer")
    parser.add_argument("text", type=Path, help="a .jsonl file with text")
    parser.add_argument("--characters", type=float, default=8e6, help="how much of the text")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each; the median counts")
    parser.add_argument("--step-milliseconds", type=float, default=71)
    parser.add_argument("--batch-tokens", type=int, default=65536)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    with tempfile.TemporaryDirectory(prefix="data-speed-") as folder:
        result = measure(Path(folder), options)
    result |= {"cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    show(result)
    ok = result["ratio"] >= MIN_RATIO and result["share"] <= MAX_SHARE
    print(
        f"\ngoal: at least {MIN_RATIO:.0%} of the library's speed, at most {MAX_SHARE:.0%} of a "
        f"step: {'reached' if ok else 'MISSED'}"
    )
    return 0 if ok else 1


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoTokenizer

    from uptrain.data.shards import TokenShards
    from uptrain.training.batches import Batches

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = take(options.text, int(options.characters))
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    library, ours = [], []
    for turn in range(options.rounds + 1):
        begun = time.perf_counter()
        tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        between = time.perf_counter()
        shards = TokenShards.prepare(folder / str(turn), [path], tokenizer)
        done = time.perf_counter()
        if turn:
            library.append(between - begun)
            ours.append(done - between)
    batch_sequences = options.batch_tokens // options.sequence_length
    batches = Batches(shards, options.sequence_length, batch_sequences, seed=0)
    batches.check(STEPS, repeat=True)
    return {
        "characters": sum(map(len, texts)),
        "documents": len(texts),
        "tokens": shards.tokens,
        "library_tokens_per_second": shards.tokens / statistics.median(library),
        "tokens_per_second": shards.tokens / statistics.median(ours),
        "ratio": statistics.median(
            theirs / mine for theirs, mine in zip(library, ours, strict=True)
        ),
        "step_milliseconds": options.step_milliseconds,
        **measure_loading(batches, options.step_milliseconds / 1000),
    }


def take(path: Path, characters: int) -> list[str]:
    """Read documents until they have so many characters."""
    with path.open() as file:
        texts = [json.loads(line)["text"] for line in itertools.islice(file, 1_000_000)]
    sizes = itertools.accumulate(map(len, texts))
    return [text for text, size in zip(texts, sizes, strict=True) if size <= characters]


def measure_loading(batches: Any, step_seconds: float) -> dict[str, float]:
    from uptrain.training.batches import read_ahead

    reads = []
    for step in range(STEPS):
        begun = time.perf_counter()
        batches.read(batches.indices(step))
        reads.append(time.perf_counter() - begun)
    waits = []
    with read_ahead(batches, range(STEPS), batches.batch_sequences) as steps:
        for _ in range(STEPS):
            begun = time.perf_counter()
            next(steps)
            waits.append(time.perf_counter() - begun)
            time.sleep(step_seconds)
    wait = mean(waits[1:])  # nothing can be read ahead of the first
    return {
        "read_milliseconds": 1000 * mean(reads),
        "wait_milliseconds": 1000 * wait,
        "share": wait / (wait + step_seconds),
    }


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def show(result: dict[str, Any]) -> None:
    for label, text in (
        ("text", f"{result['documents']:,} documents, {result['tokens']:,} tokens"),
        ("tokenizer library", f"{result['library_tokens_per_second']:,.0f} tokens/s"),
        ("uptrain, to shards", f"{result['tokens_per_second']:,.0f} tokens/s"),
        ("  ratio", f"{result['ratio']:.2f}"),
        ("reading a batch", f"{result['read_milliseconds']:.2f} ms"),
        ("waiting for it, read ahead", f"{result['wait_milliseconds']:.3f} ms"),
        ("  share of a step", f"{result['share']:.3%} of {result['step_milliseconds']:g} ms"),
    ):
        print(f"{label:<28}{text}")


if __name__ == "__main__":
    sys.exit(main())
