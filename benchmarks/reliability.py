"""Write docs/reliability.md: what is failed, killed, filled and fed to uptrain, and what comes of it.

    python benchmarks/reliability.py [--json PATH]                # runs the tests: hours on two cores
    python benchmarks/reliability.py --outcomes OUTCOMES.jsonl…   # of tests that ran in pieces, anywhere

The tests leave a line of what they did in the file that $UPTRAIN_OUTCOMES names, once they have passed; the
page is made of those lines and of tests/guards.toml. A test that ran twice counts as it ran last. Each line says
of what code it is and where it ran, and so does the page. It is written only if all tests passed.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import uptrain

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
# Which tests of which files, and how: the fast sweeps are a part of the slow ones.
TESTS: list[tuple[str, list[str], list[str]]] = [
    ("slow", ["faults", "guards", "load", "determinism"], []),
    ("slow or not slow", ["kills", "disk", "concurrency", "resume", "distributed"], []),
    ("slow or not slow", ["hostile", "fuzz"], ["-n", "auto"]),
]
Row = dict[str, Any]
"""`fault`, `operation`, `points` (how many), and how often each of its `outcomes` came."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--outcomes", type=Path, nargs="+", help="of tests that were run before")
    parser.add_argument("--json", type=Path, help="write the sums here too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = options.outcomes or [Path(folder) / "outcomes.jsonl"]
        if not options.outcomes and not run_tests(outcomes[0]):
            print("a test failed: the page stays as it was", file=sys.stderr)
            return 1
        lines = [line for path in outcomes for line in path.read_text("utf-8").splitlines()]
    found = last(json.loads(line) for line in lines)
    rows = sums(found)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", "utf-8")
    PAGE.write_text(page(rows, found), "utf-8")
    print(f"{PAGE}: {total(rows)}")
    return 0


def run_tests(outcomes: Path) -> bool:
    passed = True
    for chosen, names, how in TESTS:
        files = [f"tests/test_{name}.py" for name in names]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-m", chosen, *how, *files],
            cwd=ROOT,
            env=os.environ | {"UPTRAIN_OUTCOMES": str(outcomes)},
        )
        passed = passed and done.returncode == 0
    return passed


def last(lines: Iterable[Row]) -> list[Row]:
    """Keep the last line of each test on each operation."""
    return list({(row["test"], row["fault"], row["operation"]): row for row in lines}.values())


def sums(lines: Iterable[Row]) -> list[Row]:
    """Add up the lines of each fault and operation."""
    rows: dict[tuple[str, str], Row] = {}
    for line in lines:
        key = line["fault"], line["operation"]
        row = rows.setdefault(
            key, {"fault": key[0], "operation": key[1], "points": 0, "outcomes": Counter()}
        )
        points = line["points"]
        row["points"] += points if isinstance(points, int) else sum(points.values())
        if key[0] == "load":  # a measurement: the last one counts
            row["outcomes"] = line["outcomes"]
        else:
            row["outcomes"].update(line["outcomes"])
    return list(rows.values())


def total(rows: Sequence[Row]) -> str:
    """Say all of it in one line."""
    swept = [row for row in rows if row["fault"] == "sweep"]
    ways = sum(runs_of(row) for row in swept)
    counts = Counter[str]()
    for row in rows:
        counts[row["fault"]] += row["points"]
    killed = sum(
        count
        for row in swept
        for name, count in row["outcomes"].items()
        if name.startswith("SIGKILL")
    )
    inputs = counts["fuzz"] + counts["hostile input"]
    parts = [
        f"{counts['sweep']:,} operations on files failed or were killed, in {ways:,} runs",
        f"{killed + counts['random SIGKILL']:,} kills survived, "
        f"{counts['random SIGKILL']:,} of them at random times",
        f"{counts['disk full'] + counts['small disk']:,} disks too small",
    ]
    if inputs:
        parts.append(f"{inputs:,} inputs tried")
    return "; ".join(parts) + ": nothing lost"


def ending(row: Row, name: str) -> int:
    """Count the runs that ended in one way: outcomes are named `fault: ending`, or by it alone."""
    return sum(n for key, n in row["outcomes"].items() if key.split(": ")[-1] == name)


def runs_of(row: Row) -> int:
    return sum(row["outcomes"].values())


def table(heads: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    def text(cell: object) -> str:
        return f"{cell:,}" if isinstance(cell, int) else str(cell)

    rows = [heads, ["---"] + ["--:"] * (len(heads) - 1), *lines]
    return "\n".join("| " + " | ".join(text(cell) for cell in row) + " |" for row in rows)


def section(
    title: str,
    words: str,
    rows: Sequence[Row],
    fault: str,
    columns: dict[str, Callable[[Row], Any]],
) -> str:
    """Give a section with a line for each operation; nothing if none was tried."""
    found = [row for row in rows if row["fault"] == fault]
    if not found:
        return ""
    lines = [[row["operation"], *(column(row) for column in columns.values())] for row in found]
    return f"## {title}\n\n{fill(words, 110)}\n\n{table(['', *columns], lines)}\n"


def endings(*names: str) -> dict[str, Callable[[Row], Any]]:
    """Columns for endings, and one for what ended otherwise."""

    def other(row: Row) -> int:
        return runs_of(row) - sum(ending(row, name) for name in names)

    def column(name: str) -> Callable[[Row], Any]:
        return lambda row: ending(row, name)

    return {**{name: column(name) for name in names}, "anything else": other}


def page(rows: Sequence[Row], lines: Sequence[Row]) -> str:
    points = {"operations": lambda row: row["points"]}
    runs = {"runs": runs_of}
    whole = endings("absent", "old", "new")
    peak = {
        "seconds": lambda row: f"{row['outcomes']['seconds']:.0f}",
        "largest memory, GiB": lambda row: f"{row['outcomes']['peak_bytes'] / 2**30:.2f}",
    }
    parts = [
        f"""# Reliability

{fill(total(rows) + ".", 110)}

Written by `python benchmarks/reliability.py` from the tests of uptrain {uptrain.__version__}, which ran
[with what is listed below](#where-they-ran).

Whatever happens, a target is absent, the old one or the new one, and whole; the source is not touched;
the next run ends as if nothing had happened, to the byte, and leaves no litter; an error is one line
that names a file. What stands in the way of anything else is listed [below](#guards), with the test
that fails without it.
""",
        section(
            "Every operation on files",
            "Each open, read, write, fsync, rename, unlink, mkdir and rmdir is failed once (writes half done) with "
            "ENOSPC, EIO and EDQUOT, once with EIO for it and all behind it, and once the process gets SIGKILL "
            "there. Where one run takes a second (`convert --calibration`, `finetune`, `run`) the three errors "
            "take turns from operation to operation. `run` counts the files of evaluation and report. How the "
            "target was found before the next run:",
            rows,
            "sweep",
            points | runs | whole,
        ),
        section(
            "Killed at random times",
            "SIGKILL at a time drawn between the first and the last moment of a run; the next run ends to the "
            "bit as one that was never killed, a training's checkpoints with all that the optimizer remembers "
            "included.",
            rows,
            "random SIGKILL",
            {"kills": lambda row: row["points"], **whole},
        ),
        section(
            "Disks that fill",
            "The disk is full after a number of bytes, at equal distances from none to all that is written.",
            rows,
            "disk full",
            {"sizes": lambda row: row["points"], **endings("absent", "old")},
        ),
        section(
            "Disks that are too small",
            "A tmpfs of its own for each run, of a growing number of pages; each size once as it is, so that "
            "what does not fit is refused before the first byte, and once as if another process filled it "
            "after that was looked at.",
            rows,
            "small disk",
            {"disks": lambda row: row["points"], **endings("refused", "full", "new")},
        ),
        section(
            "Two at once",
            "Two conversions begin within 30 ms of each other, every other time with `--overwrite`. A training "
            "locks its output; a crash releases every lock.",
            rows,
            "two at once",
            {
                "pairs": lambda row: row["points"],
                **endings("one whole, the other refused", "both whole, in turn"),
            },
        ),
        section(
            "The same bytes",
            "Processes with different hash seeds write the same conversions, checkpoints and exports. The five ways: "
            "the mean, at random, factorized, searched and aligned, calibrated.",
            rows,
            "hash seeds",
            {"processes": lambda row: row["points"], **endings("same bytes")},
        ),
        section(
            "Hostile input",
            "Each is a way to make an input wrong or malicious, and is counted for each command that is given it. "
            "It is refused in one line that names the file, with nothing written; or what is hostile in it "
            "(a name of code, a value that transformers takes) is read as data.",
            rows,
            "hostile input",
            {
                "inputs": lambda row: row["points"],
                **endings("refused in one line, nothing written", "read as data, nothing executed"),
            },
        ),
        section(
            "Random input",
            "Edits of a sound file drawn by Hypothesis, in batches of 10,001 with a seed each: typed errors of one line "
            "only, no file opened outside the source, bounded memory and time.",
            rows,
            "fuzz",
            {"inputs": lambda row: row["points"], **endings("refused", "accepted")},
        ),
        section(
            "Load",
            "Data-free conversions to one KV head of sparse Llama checkpoints, in bfloat16; what they write is "
            "written in full.",
            rows,
            "load",
            peak,
        ),
        guards(rows),
        where(lines),
        """## By hand

```bash title="not run: takes hours"
make test-slow                                 # everything
python -m pytest -m slow tests/test_faults.py  # the sweeps
python -m pytest -m slow tests/test_kills.py   # 200 conversions and 100 trainings killed at random
python -m pytest -m slow tests/test_guards.py  # every guard removed once
python -m pytest -m "slow or not slow" tests/test_fuzz.py -n auto  # a million inputs of each reader
python benchmarks/reliability.py               # this page
```
""",
    ]
    return "\n".join(part for part in parts if part)


def guards(rows: Sequence[Row]) -> str:
    """List the guards, where each is, and the test that failed when it was removed."""
    listed = tomllib.loads((ROOT / "tests" / "guards.toml").read_text("utf-8"))["guard"]
    removed = {row["operation"] for row in rows if row["fault"] == "guard"}
    lines = [
        f"| {each['what']} | `{each['where'].removeprefix('uptrain/')}` "
        f"| `{each['test'].removeprefix('tests/')}` | {'yes' if each['what'] in removed else 'no'} |"
        for each in listed
    ]
    return "\n".join(
        [
            "## Guards",
            "",
            "Each is removed once from a copy of the tree, by `tests/test_guards.py`, and its test must then fail:"
            f" {len(removed):,} of {len(listed):,} in this run.",
            "",
            "| guard | where | test | fails without it |",
            "| --- | --- | --- | --- |",
            *lines,
            "",
        ]
    )


def where(lines: Sequence[Row]) -> str:
    """List which tests ran with what, and the modules that have changed since."""
    sys.path.insert(0, str(ROOT / "tests"))
    code = importlib.import_module("faults").ran()["code"]
    counts = Counter(
        (
            row["test"].partition("::")[0].removeprefix("tests/"),
            row["where"],
            ", ".join(
                f"`{name}`"
                for name in sorted(code.keys() | row["code"].keys())
                if code.get(name) != row["code"].get(name)
            ),
        )
        for row in lines
    )
    cells = [
        [f"`{test}`", count, with_what, changed or "nothing"]
        for (test, with_what, changed), count in sorted(counts.items())
    ]
    heads = ("tests", "lines left", "with", "changed since")
    return f"## Where they ran\n\n{table(heads, cells)}\n"


if __name__ == "__main__":
    sys.exit(main())
