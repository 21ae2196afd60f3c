"""The paper's figures: what is measured, that it is measured once, and what the page says of it."""

import json
import signal
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from tiny_run import make_source, write_text

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks" / "paper"))

# Scripts beside one another, no package: they are found by the path just above.
import measure  # noqa: E402
import page  # noqa: E402
import points  # noqa: E402
from points import ALPHA, ALPHAS, COMPARED, HEADS, METHODS, RESULTS, Point  # noqa: E402

from uptrain.evaluation import bandwidth, decode  # noqa: E402
from uptrain.training import loop  # noqa: E402

PRETRAINING_TOKENS = 262_144_000
TINY = ["train.pretraining_tokens=10240", "train.batch_tokens=128", "train.sequence_length=32"]
BRIEF = ["convert.calibration_tokens=64", "convert.reconstruct_steps=1", "evaluate.max_tokens=256"]


def test_the_points_are_those_of_the_figures() -> None:
    found = points.all_points(12)
    assert len(set(found)) == len(found)
    figure_4 = {Point(m, g, a) for m in COMPARED for g in (1, 4) for a in (0, 0.05)}
    figure_5 = {Point(m, g, a) for m in ("mean", "ours") for g in (1, 4) for a in ALPHAS}
    figure_6 = {
        Point(m, g, a) for m in ("mean", "ours") for g in (1, 2, 3, 4, 6) for a in (0, 0.05)
    }
    assert (figure_4 | figure_5 | figure_6 | {Point("mean", 12, 0.05)}) <= set(found)
    assert (min(ALPHAS), max(ALPHAS)) == (0, 0.1)


def options(tmp_path: Path, *overrides: str) -> Any:
    given = {"source": tmp_path / "source", "work": tmp_path / "work", "overrides": overrides}
    texts = {"text": tmp_path / "train.jsonl", "validation": tmp_path / "validation.jsonl"}
    return measure.argparse.Namespace(**given, **texts)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_changes_what_it_says_and_the_budget_stays(method: str, tmp_path: Path) -> None:
    given = options(tmp_path)
    for alpha in ALPHAS[1:]:
        recipe = measure.make_recipe(Point(method, 4, alpha), given)
        tokens = recipe.train.total_steps * recipe.train.batch_tokens
        assert abs(tokens - alpha * PRETRAINING_TOKENS) <= recipe.train.batch_tokens / 2
    is_ours = METHODS[method].conversion == "calibrated"
    assert recipe.convert.calibration == (str(given.text) if is_ours else None)
    assert recipe.convert.method == (None if is_ours else METHODS[method].conversion)
    is_taught = method.startswith("ours") or method.endswith("distilled")
    assert recipe.train.teacher == (str(given.source) if is_taught else None)
    assert recipe.train.batch_tokens == (16_384 if method.endswith("small") else 65_536)
    assert recipe.evaluate.dtype == "float32"


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Measure a few points of a tiny model; gives the exit code."""
    monkeypatch.setattr(decode, "_ROUND_SECONDS", 0)
    monkeypatch.setitem(bandwidth._BUFFER_BYTES, "cpu", 2**20)
    few = [Point("mean", 4, 0), Point("ours", 1, ALPHA)]
    monkeypatch.setattr(measure, "all_points", lambda heads: few)
    shape = {"num_attention_heads": 8, "num_key_value_heads": 8, "initializer_range": 0.2}
    make_source(tmp_path / "source", **shape)
    for name, documents in (("train", 40), ("validation", 6)):
        write_text(tmp_path / f"{name}.jsonl", documents, seed=documents)

    def run(work: str = "work", minutes: str = "5") -> int:
        places = ["--work", str(tmp_path / work), "--results", str(tmp_path / f"{work}-results")]
        texts = [f"--{name}={tmp_path / name}.jsonl" for name in ("train", "validation")]
        sizes = ["--minutes", minutes, "--decode-batches", "1", "--decode-contexts", "16"]
        command = [str(tmp_path / "source"), *texts, *places, *sizes, "--set", *TINY, *BRIEF]
        monkeypatch.setattr(sys, "argv", ["measure.py", *command])
        return measure.main()

    return run


def evaluation(path: Path) -> Any:
    return json.loads(path.read_text())["evaluation"]


def test_each_point_is_measured_once_also_when_time_is_up_in_its_middle(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(minutes="0") == 130
    assert not list((tmp_path / "work-results").iterdir())
    steps = []

    def step(*given: Any) -> Any:
        steps.append(given[2])
        if len(steps) == 2:
            signal.raise_signal(signal.SIGALRM)  # as the timer does
        return train_step(*given)

    train_step = loop.train_step
    monkeypatch.setattr(loop, "train_step", step)
    assert call() == 130
    assert "2 of 3 stored" in capsys.readouterr().out
    assert call() == 0
    assert steps == [0, 1, 2, 3]  # alpha 0.05 of 10,240 tokens
    stored = tmp_path / "work-results"
    assert {path.stem for path in stored.iterdir()} == {"mean-4-0", "decode", f"ours-1-{ALPHA}"}
    before = {path: path.stat().st_mtime_ns for path in stored.iterdir()}
    assert call() == 0
    assert {path: path.stat().st_mtime_ns for path in stored.iterdir()} == before
    assert call("whole") == 0  # a resume is exact
    ours = f"ours-1-{ALPHA}.json"
    assert evaluation(tmp_path / "whole-results" / ours) == evaluation(stored / ours)
    results = points.read_results(stored)
    assert [row["model"] for row in results["decode"]["decode"]] == ["1", "2", "4", "8"]
    assert page.increase(results, "ours", 1, ALPHA) == evaluation(stored / ours)["loss_increase"]


def test_a_point_that_fails_does_not_stop_the_others(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [Point("mean", 3, 0), Point("mean", 4, 0)]  # 3 does not divide 8
    monkeypatch.setattr(measure, "all_points", lambda heads: few)
    assert call() == 1
    found = capsys.readouterr()
    assert "1 of 2 stored" in found.out
    assert "HeadCountError" in found.err


def result(method: str, heads: int, alpha: float, increase: float) -> dict[str, Any]:
    steps = {"tokens": 26_214_400, "text_tokens": 14_000_000, "batch_tokens": 65_536}
    steps["seconds"] = 30.0 if method == "ours" else 20.0
    how = {"optimizer": "adamw", "learning_rate": 1e-3, "schedule": "cosine", "floor": 0.1}
    return {
        **Point(method, heads, alpha)._asdict(),
        "conversion_seconds": 15.0,
        "training": {**steps, **how} if alpha else None,
        "evaluation": {
            "loss_increase": increase,
            "reference": "books",
            "reference_loss": 3.0,
            "reference_num_key_value_heads": 12,
            "tokens": 65_536,
            "dtype": "float32",
            "kv_cache_bytes_per_token": 768 * heads,
        },
        "seconds": 6.0,
        "alone": True,
        "versions": {"device": "a GPU", "torch": "2", "transformers": "5"},
    }


def stored(*found: tuple[str, int, float, float]) -> page.Results:
    return {Point(*each[:3]).name: result(*each) for each in found}


def speeds() -> dict[str, Any]:
    rows = [
        {
            "model": str(heads),
            "batch": batch,
            "context": 512,
            "milliseconds_per_step": 0.1 + batch * heads / 1000,
            "speedup": 1.5,
            "bandwidth_fraction": 0.5,
        }
        for batch in (1, 64)
        for heads in (1, 2, 3, 4, 6, 12)
    ]
    versions = result("mean", 1, 0, 0)["versions"]
    return {"decode": rows, "seconds": 6.0, "alone": True, "versions": versions}


@pytest.mark.parametrize(
    ("first", "sentence"),
    [
        (
            0.2,
            "the paper's order, mean > first > random; mean +0.100, first +0.200, random +0.300.",
        ),
        (0.05, "**not** the paper's order: first > mean > random; first +0.050, mean +0.100, "),
        (
            0.099,
            "**not** the paper's order: first > mean > random (first and mean are too close to tell apart)",
        ),
    ],
)
def test_the_order_of_the_methods_is_said_as_it_is(first: float, sentence: str) -> None:
    results = stored(("mean", 4, ALPHA, 0.1), ("first", 4, ALPHA, first), ("random", 4, ALPHA, 0.3))
    text = page.make_page(results)
    assert f"* 4 KV heads, after alpha 0.05: {sentence}" in text
    assert "* 1 KV head, after" not in text  # nothing is known of it


def test_a_missing_point_is_shown_as_missing() -> None:
    text = page.make_page(stored(("mean", 4, ALPHA, 0.1), ("ours", 4, 0, 0.05)))
    assert "| mean (paper) | – | – | – | +0.100 |" in text
    assert "| calibrated, not distilled | – | – | +0.050 | – |" in text  # the same conversion
    assert "2 of " in text


def test_what_did_not_help_is_said() -> None:
    text = page.make_page(
        stored(
            ("mean", 12, ALPHA, 0.01), ("ours", 4, 0, 0.05), ("ours", 4, 0.005, 0.07),
            ("ours", 4, 0.01, 0.08), ("ours-small", 4, 0.005, 0.06), ("ours-small", 4, 0.01, 0.09),
            ("mean", 4, 0, 3.0), ("mean", 4, 0.005, 0.06), ("mean", 4, 0.01, 0.04),
        )
    )  # fmt: skip
    ours = METHODS["ours"].label
    for sentence in (
        "The original itself (12 KV heads), trained on with the paper's recipe for alpha 0.05, loses: +0.0100",
        f"{ours}, 4 KV heads: worse than without uptraining (+0.050) at alpha 0.005 (+0.070), 0.01 (+0.080).",
        f"{ours}, 4 KV heads: alpha 0.01 is worse than 0.005, +0.070 to +0.080.",
        f"{ours}, 4 KV heads, alpha 0.01: small batches are worse, +0.080 to +0.090.",
        "4 KV heads: the paper's method gets below a calibration without uptraining (+0.050) from alpha 0.01 on.",
    ):
        assert f"* {sentence}" in text
    assert "alpha 0.005: small batches" not in text
    assert f"* {METHODS['mean'].label}, 4" not in text


def draw_all(folder: Path, results: page.Results, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    pytest.importorskip("matplotlib", reason="the figures need the extra report")
    import draw

    kept = folder / "results"
    kept.mkdir(parents=True)
    for name, found in results.items():
        (kept / f"{name}.json").write_text(json.dumps(found))
    docs = folder / "docs"
    monkeypatch.setattr(sys, "argv", ["draw.py", "--results", str(kept), "--docs", str(docs)])
    draw.main()
    assert (docs / "results.md").read_text("utf-8") == page.make_page(results)
    return [(docs / "paper" / name).read_bytes() for name in page.FIGURES]


def test_the_figures_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(*each, 0.1 + each[2]) for each in points.all_points(12)]
    results = stored(*found) | {points.DECODE: speeds()}
    for image in draw_all(tmp_path, results, monkeypatch):
        assert ElementTree.fromstring(image).tag == "{http://www.w3.org/2000/svg}svg"
    text = page.make_page(results)
    assert "–" not in text.partition("## Figure 5")[0]  # nothing is missing
    for sentence in (
        "4 KV heads: the calibration took 15 s.",
        "4 KV heads: with the original beside it as teacher, the same tokens took 1.50 times as long",
        "Batch 64, context 512: 1 KV head decodes 1.50 times as many tokens a second as 12",
    ):
        assert f"* {sentence}" in text


def test_times_of_points_that_were_not_alone_are_not_compared() -> None:
    results = stored(*((*each, 0.1) for each in points.all_points(12)))
    results["ours-4-0.05"]["alone"] = False
    text = page.make_page(results)
    assert "1 points beside others, whose times are not compared" in text
    assert "1 KV head: with the original" in text
    assert "4 KV heads: with the original" not in text


def test_few_points_are_drawn_too_and_the_same_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = stored(("mean", 4, 0, 0.1), ("mean", 4, ALPHA, 0.05))
    one, two = (draw_all(tmp_path / name, results, monkeypatch) for name in ("one", "two"))
    assert one == two


def test_the_page_follows_from_what_is_stored() -> None:
    results = points.read_results(RESULTS)
    if not results:
        pytest.skip("nothing is stored yet; run benchmarks/paper/measure.py")
    docs = ROOT / "docs"
    assert (docs / "results.md").read_text("utf-8") == page.make_page(results), (
        "run `python benchmarks/paper/draw.py`"
    )
    assert all((docs / "paper" / name).is_file() for name in page.FIGURES)
    assert HEADS == (1, 4)
