"""The page of a report: whole, self-contained, accessible, and text whatever a name holds."""

import json
import re
import shutil
import subprocess
from collections import Counter
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tiny_results import make_distilled, make_measured, make_run, write

from uptrain.report import report

VOID = {"meta", "link", "br", "hr", "img", "input"}
EVIL = "<script>alert(1)</script>\"'|`x`[y](z)&amp;"


class Page(HTMLParser):
    """Checks that every element ends where it should, and keeps elements and texts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text("utf-8")
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the report of a run of which everything was measured."""
    folder = make_measured(tmp_path_factory.mktemp("all") / "run")
    report([folder], folder / "report")
    return folder / "report"


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the report of five runs, the worst of them named first."""
    folder = tmp_path_factory.mktemp("several")
    runs = [make_measured(folder / name, scale) for name, scale in (("bad", 3), ("good", 0.5))]
    runs += [
        make_run(folder / "middle", 3.8, 3.5),
        make_distilled(folder / "a_rather_long_name" / "_x$"),
    ]
    (folder / "page").mkdir()
    write(
        folder / "alone" / "evaluation.json",
        json.loads((runs[1] / "report/final.json").read_text()),
    )
    report([*runs, folder / "alone"], folder / "page")
    return folder / "page"


def test_every_part_is_told(written: Path) -> None:
    page = Page(written / "report.html")
    titles = re.findall(r"<h2>(.*?)</h2>", page.source)
    assert titles == [
        "Quality", "Recovery", "Layers", "Where it is lost", "Copying", "Tasks", "Continuations",
        "Decoding", "Cost", "How it was made",
    ]  # fmt: skip
    assert re.findall("^## (.*)", (written / "report.md").read_text(), re.M) == titles
    for text in (
        "books: 8 → 2 KV heads", "4× smaller", "+0.1000", "50%", "2.50× as fast",
        "nats a token, +0.0900 … +0.1100, p &lt; 0.001",
        "+0.1000<small>+0.0900 … +0.1100, p &lt; 0.001</small>",
        "3.3510<small>3.2000 … 3.5000</small>",
        "batch 16 at 4,096 tokens: 5 ms a step, 80% of the bound",
        "uptrain run quickstart output=run",
    ):  # fmt: skip
        assert text in page.source, text


def test_figures_say_what_they_show_and_follow_the_page(written: Path) -> None:
    page = Page(written / "report.html")
    pictures = page.all("svg")
    assert [each["role"] for each in pictures] == ["img"] * 5
    labels = " ".join(each["aria-label"] or "" for each in pictures)
    for text in (
        "values 25.0% to 25.0%; keys 5.0% to 5.0%",
        "converted: +0.200 on the first token, +0.200 behind 4 tokens",
        "original 2.00 at 8 to 2.00 at 16",
        "batch 16 at 4,096, original: 12.5 ms, bound 4",
    ):
        assert text in labels
    inside = "".join(re.findall(r"<svg.*?</svg>", page.source))
    assert "var(--ink)" in inside
    assert not re.search(r"#[0-9a-f]{6}", inside)  # no colour but those of the page
    ids = Counter(attributes["id"] for _, attributes in page.elements if "id" in attributes)
    assert set(ids.values()) == {1}
    used = {each["xlink:href"] for each in page.all("use")}
    assert used <= {f"#{name}" for name in ids}


def test_it_needs_nothing_else_and_runs_nothing(written: Path, compared: Path) -> None:
    for folder in (written, compared):
        page = Page(folder / "report.html")
        assert "://" not in page.source
        assert not page.all("script")
        policies = [each["content"] for each in page.all("meta") if "http-equiv" in each]
        assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
        assert [each["href"] for each in page.all("link")] == ["data:,"]


def test_tables_have_headers_and_can_be_scrolled(written: Path) -> None:
    page = Page(written / "report.html")
    assert {each["scope"] for each in page.all("th")} == {"col", "row"}
    scrolled = [each for each in page.all("div") if each.get("class") == "scroll"]
    assert len(scrolled) == len(page.all("table")) > 8
    assert all(each["tabindex"] == "0" and each["aria-label"] for each in scrolled)
    assert [page.all("html")[0]["lang"], len(page.all("h1"))] == ["en", 1]


def test_runs_are_compared_from_the_best_on(compared: Path) -> None:
    page = Page(compared / "report.html")
    rows = re.findall(r'<th scope="row" class="words">([^<]*)</th>', page.source)
    best = ["good", "alone", "middle", "bad", "_x$"]
    assert [row.strip() for row in rows[:5]] == best
    assert re.findall(r'class="run"><summary>(.*?)</summary>', page.source) == best
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page.source)
    assert [caption.split(":")[0] for caption in captions] == [
        "Recovery over the tokens trained on",
        "Loss over the original against KV cache, bytes a token",
        "Loss over the original against milliseconds a decoding step",
    ]
    assert "A step decodes 16 tokens at once, each behind 4,096." in page.source
    lines = (compared / "report.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.count("|") > 10][2:7] == best


def test_every_name_is_text(tmp_path: Path) -> None:
    said = {"greedy": EVIL, "sampled": EVIL}
    spoken = {
        "prompts": [{"prompt": EVIL, "text": EVIL, "target": said, "reference": said}],
        "repetition": {"text": 0.0, "target": {"greedy": 0.5, "sampled": 0.25}},
    }
    folder = make_measured(
        tmp_path / EVIL.replace("/", "_"),
        reference=EVIL, model=EVIL, data=EVIL, device=EVIL, continuations=spoken,
        tasks={EVIL: {EVIL: {"target": 0.5}}},
    )  # fmt: skip
    for path in (folder / "converted/uptrain.json", folder / "final/uptrain.json"):
        record = json.loads(path.read_text()) | {"source": {"name": EVIL}}
        record["versions"] = {EVIL: EVIL}
        write(path, record)
    kept = {"command": f"uptrain run\n```\n{EVIL}", "stages": {EVIL: {"seconds": 1.0}}}
    write(folder / "report/run.json", kept)
    for runs, output in (([folder], "one"), ([folder, folder], "two")):
        report(runs, tmp_path / output)
        page = Page(tmp_path / output / "report.html")
        assert not page.all("script")
        assert not any(name.startswith("on") for _, each in page.elements for name in each)
        assert any(EVIL in text for text in page.texts)
        text = (tmp_path / output / "report.md").read_text()
        outside, inside = text.split("```bash\n")[0], text.split("```bash\n")[1]
        assert "<script>" not in outside
        assert "[y](z)" not in outside
        # What is a command stays within its fence.
        assert "uptrain run�```�<script>" in inside.split("\n```\n")[0]
        for path in (tmp_path / output).glob("*.svg"):
            assert "<script>" not in path.read_text()


def test_what_is_missing_is_absent(tmp_path: Path) -> None:
    write(tmp_path / "run" / "evaluation.json", {
        "loss": 3.0, "tokens": 10, "num_key_value_heads": 2, "kv_cache_bytes_per_token": 512,
    })  # fmt: skip
    report([tmp_path / "run"], tmp_path / "report")
    page = Page(tmp_path / "report" / "report.html")
    assert re.findall(r"<h2>(.*?)</h2>", page.source) == ["Quality", "How it was made"]
    assert not page.all("svg")
    assert not page.all("dl")


def test_a_checkpoint_tells_how_it_can_be_served(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    example = Path(__file__).parents[1] / "examples" / "books-1m"
    for path in example.iterdir():
        shutil.copy(path, folder / "final")
    content = report([folder], tmp_path / "report")
    serving = content["runs"][0]["serving"]
    assert (serving["num_key_value_heads"], serving["kv_cache_bytes_per_token"]) == (8, 2048)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "KV cache of a sequence of 4,096 tokens: 8.0 MiB; of 32,768: 64.0 MiB." in text
    assert "| transformers | yes | 1 2 4 8 | stock class, no remote code |" in text.splitlines()


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
MEASURE = """<script>
document.querySelectorAll("details").forEach(each => { each.open = true })
const root = document.documentElement
Object.assign(parent.document.documentElement.dataset, {
  width: innerWidth,
  overflow: root.scrollWidth - innerWidth,
  page: getComputedStyle(document.body).backgroundColor,
  ink: getComputedStyle(document.querySelector("svg text")).fill,
  smallest: Math.min(...[...document.querySelectorAll("svg text")].map(
    each => each.getBoundingClientRect().height)),
})
</script></body>"""
FRAME = """<!doctype html><html><head><meta name="color-scheme" content="light dark"></head>
<body><iframe style="border:0;width:{width}px;height:844px" srcdoc="{page}"></iframe></body></html>"""


def browse(page: Path, dark: bool, profile: Path) -> tuple[str, str]:
    """Open a page in Chromium; returns its elements, and what it says on the way."""
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            f"--user-data-dir={profile}", "--window-size=1400,844", "--hide-scrollbars",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize("kind", ["written", "compared"])
def test_chromium_shows_it(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    page = request.getfixturevalue(kind) / "report.html"
    dom, said = browse(page, False, tmp_path / "profile")
    assert "</footer>" in dom
    assert "CONSOLE" not in said
    # It runs no script itself: a copy measures, in a frame, for a window is never that narrow.
    source = re.sub("<meta http-equiv[^>]*>", "", page.read_text("utf-8"))
    measuring = escape(source.replace("</body>", MEASURE))
    for width in (360, 390, 1280):
        seen = []
        for dark in (False, True):
            frame = tmp_path / "frame.html"
            frame.write_text(FRAME.format(width=width, page=measuring), "utf-8")
            dom, said = browse(frame, dark, tmp_path / "profile")
            assert "CONSOLE" not in said
            found = dict(re.findall(r'data-(\w+)="([^"]*)"', dom.split("<head>")[0]))
            assert found["width"] == str(width)
            assert int(found["overflow"]) <= 0
            assert float(found["smallest"]) >= 9  # pixels: what is drawn can be read
            seen.append((found["page"], found["ink"]))
        assert all(light != dark for light, dark in zip(*seen, strict=True))
