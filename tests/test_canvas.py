"""Figures as SVG: whole, the same each time, and text whatever a name holds."""

import re
from xml.etree import ElementTree

import pytest

from uptrain.report.canvas import (
    COLOURS,
    Figure,
    as_figure,
    colour,
    colour_rules,
    legend,
    panels,
    shown,
    styled,
)


def draw(name: str = "a", label: str = "line") -> Figure:
    with styled():
        drawing, (axes,) = panels("x", ["y"])
        axes.plot([1, 2, 3], [1, 3, 2], color=colour(0), marker="o", label=shown(label))
        legend(axes)
        return as_figure(drawing, name, "A line", 'goes "up" <and> down')


def texts(figure: Figure) -> list[str]:
    return [
        each.text or "" for each in ElementTree.fromstring(figure.standalone()).iter() if each.text
    ]


def test_no_two_roles_share_a_colour() -> None:
    for shade in (0, 1):
        assert len({pair[shade] for pair in COLOURS.values()}) == len(COLOURS)
    assert all(re.fullmatch("#[0-9a-f]{6}", each) for pair in COLOURS.values() for each in pair)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("shade", [0, 1])
def test_words_and_lines_stand_out_from_the_page(shade: int) -> None:
    """As WCAG 2.2 asks: 4.5 to 1 for words (1.4.3), 3 to 1 for what a picture is made of (1.4.11)."""
    paper = luminance(COLOURS["paper"][shade])
    for role, pair in COLOURS.items():
        pale, deep = sorted((luminance(pair[shade]), paper), reverse=True)
        least = {"ink": 4.5, "faint": 4.5, "grid": 1.0, "paper": 1.0}.get(role, 3.0)
        assert (pale + 0.05) / (deep + 0.05) >= least, role


def test_a_file_of_its_own_follows_light_and_dark() -> None:
    figure = draw()
    root = ElementTree.fromstring(figure.standalone())
    assert root.attrib["aria-label"] == 'goes "up" <and> down'
    assert colour_rules("svg") in figure.standalone()
    assert "prefers-color-scheme:dark" in figure.standalone()
    assert figure.svg == draw().svg


@pytest.mark.parametrize(
    "label",
    ["<script>x</script>", "$\\frac{", "_hidden", "#0b5cad", "日本語", 'a"b&c', 'id="x" 1.2345'],
)
def test_a_label_is_what_it_is(label: str) -> None:
    assert label in [text.removeprefix("\u200b") for text in texts(draw(label=label))]


def test_labels_are_printable_and_short() -> None:
    assert shown("a\x1b[31m\n") == "a�[31m�"
    assert len(shown("x" * 100)) == 37
    assert shown("ab" * 50).startswith("abab")


def test_ids_of_two_figures_do_not_meet() -> None:
    ids = [set(re.findall(r'id="([^"]*)"', draw(name).svg)) for name in ("a", "b")]
    assert ids[0]
    assert not ids[0] & ids[1]
