"""What stands on top of a report, and in what order runs are compared."""

from typing import Any

import pytest

from uptrain.report.sections import duration
from uptrain.report.summary import common_setting, points, ranked, tiles, title


def run(name: str, increase: float | None = None, *steps: tuple[int, int, float]) -> dict[str, Any]:
    stage: dict[str, Any] = {"kv_cache_bytes_per_token": 512, "num_key_value_heads": 2}
    stage |= {} if increase is None else {"loss_increase": increase}
    stage["decode"] = [
        {"model": "target", "context": context, "batch": batch, "milliseconds_per_step": took}
        for context, batch, took in steps
    ]
    return {
        "name": name, "evaluations": {"evaluated": stage}, "conversion": None, "training": None,
        "stages": {}, "serving": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (5, "5.0 s"), (59.6, "60 s"), (126, "2 min"), (7300, "2 h 2 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_what_was_not_compared_comes_last() -> None:
    runs = [run("none"), run("bad", 0.5), run("better than it was", -0.1), run("good", 0.0)]
    assert [each["name"] for each in ranked(runs)] == ["better than it was", "good", "bad", "none"]


def test_decoding_is_compared_where_most_runs_were_timed() -> None:
    runs = [
        run("a", 0.1, (1024, 1, 3.0), (4096, 16, 9.0)),
        run("b", 0.2, (1024, 1, 2.0), (4096, 16, 8.0)),
        run("c", 0.3, (1024, 1, 1.0)),
    ]
    assert common_setting(runs) == (1024, 1)
    assert common_setting(runs[:2]) == (4096, 16)
    assert common_setting(runs[2:]) is None
    assert [(point.name, point.x) for point in points(runs, (4096, 16))] == [("a", 9.0), ("b", 8.0)]
    assert [point.x for point in points(runs)] == [512, 512, 512]


def test_a_run_of_which_little_is_known() -> None:
    assert title(run("alone")) == "alone"
    assert tiles(run("alone")) == []
    assert [label for label, _, _ in tiles(run("alone", 0.1))] == ["loss over the original"]
