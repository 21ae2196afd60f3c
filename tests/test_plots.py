"""What the pictures of a report hold, read back from what was drawn."""

from typing import Any

import pytest

from uptrain.report import plots


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Keep the drawings that become figures."""
    kept: list[Any] = []
    save = plots.as_figure
    monkeypatch.setattr(
        plots, "as_figure", lambda drawing, *rest: (kept.append(drawing), save(drawing, *rest))[1]
    )
    return kept


def row(model: str, took: float, bound: float) -> dict[str, Any]:
    return {
        "model": model, "batch": 16, "context": 4096, "milliseconds_per_step": took,
        "bound_milliseconds": bound,
    }  # fmt: skip


def test_a_bar_is_a_step_and_its_full_part_the_bound(drawn: list[Any]) -> None:
    # The last is faster than memory: its weights lie in the processor's cache.
    rows = [row("target", 5.0, 4.0), row("reference", 12.5, 9.0)]
    plots.draw_decode([*rows, row("target", 2.0, 3.0) | {"batch": 1}])
    (axes,) = drawn[0].axes
    widths = [bar.get_width() for bar in axes.patches if bar.get_width() == bar.get_width()]
    assert widths[:6] == [5.0, 4.0, 12.5, 9.0, 2.0, 2.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["16 × 4,096", "1 × 4,096"]
    assert [text.get_text() for text in axes.texts] == ["5", "12.5", "2"]


def test_layers_without_repair_have_one_panel(drawn: list[Any]) -> None:
    layer = {"discarded_energy": {"value": 0.25, "key": 0.05}, "error": {}}
    figure = plots.draw_layers(
        [{"layer": 0, **layer}, {"layer": 1, "discarded_energy": {}, "error": {}}]
    )
    assert len(drawn[0].axes) == 1
    assert (
        figure.alt == "Energy discarded in layers 0 to 0: values 25.0% to 25.0%; keys 5.0% to 5.0%."
    )


def test_a_step_that_one_layer_lacks_leaves_a_gap(drawn: list[Any]) -> None:
    lost = {"value": 0.25, "key": 0.05}
    layers = [{"layer": n, "discarded_energy": lost, "error": error}
              for n, error in enumerate(({"merged": 0.2, "refit": 0.1}, {"merged": 0.4}))]  # fmt: skip
    figure = plots.draw_layers(layers)
    merged, refit = (list(line.get_ydata()) for line in drawn[0].axes[1].get_lines())
    assert merged == [0.2, 0.4]
    assert refit[0] == 0.1
    assert refit[1] != refit[1]
    assert "merged 0.3000, refit 0.1000" in figure.alt


@pytest.mark.parametrize(("costs", "scale"), [((256, 1024), "log"), ((15.9, 18.1), "linear")])
def test_the_scale_follows_the_costs(
    costs: tuple[float, float], scale: str, drawn: list[Any]
) -> None:
    points = [plots.Point("a", costs[0], 0.2, 0.1), plots.Point("b", costs[1], 0.1, None)]
    figure = plots.draw_comparison(points, "cost", "comparison")
    (axes,) = drawn[0].axes
    assert axes.get_xscale() == scale
    assert axes.get_xlim()[0] < costs[0] < costs[1] < axes.get_xlim()[1]
    assert [text.get_text() for text in axes.texts] == ["+0.100", "+0.100"]  # where each ended
    assert figure.alt.endswith(f"a at {costs[0]:g}: +0.200 → +0.100; b at {costs[1]:,g}: +0.100.")
