"""Reports: what is read, what is said, what is drawn, and what a missing part leaves."""

import json
import math
from html import unescape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from tiny_results import (
    ORIGINAL_LOSS,
    SETTINGS,
    evaluation,
    make_distilled,
    make_run,
    write,
)

from uptrain.checkpoint.card import escape as markdown
from uptrain.errors import CheckpointError, UptrainError
from uptrain.report import plots, recovery, report, summary_table


def test_one_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    content = report([folder], folder / "report")
    assert content["runs"][0]["verdict"] == (
        "8 → 2 KV heads: KV cache 4.0× smaller (1,024 → 256 bytes a token); loss 3.351 → 5.500 "
        "after conversion → 3.900 after uptraining on 655,360 tokens (0.5% of the pretraining): "
        "74% of the lost quality won back."
    )
    assert content["plots"] == ["loss.svg"]
    assert json.loads((folder / "report" / "report.json").read_text()) == content
    page = (folder / "report" / "report.md").read_text()
    for line in (
        "| loss, nats a token | 3.3510 | 5.5000 | 3.9000 |",
        "| loss over the original, nats a token | – | +2.1490 | +0.5490 |",
        "| KV cache, bytes a token | 1,024 | 256 | 256 |",
        "| tokens trained on | 655,360 |",
        "| time, seconds | 80 |",
        "| speed, tokens a second | 8,192 |",
        "uptrain convert books converted --num-key-value-heads 2 --method mean --seed 0",
        "uptrain evaluate final --reference books --data validation.jsonl --max-tokens 65536 "
        "--sequence-length 256",
        "Versions: torch 2.13.0.",
        "![run, 655,360 tokens: training loss 5.312 → 3.911, validation loss 4.358 → 3.911, original "
        "3.351.](loss.svg)",
    ):
        assert line in page.splitlines()
    assert str(tmp_path) not in page
    assert str(tmp_path) not in json.dumps(content)
    assert ElementTree.parse(folder / "report" / "loss.svg").getroot().tag.endswith("}svg")
    assert not list((folder / "report").glob(".*"))


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    for name in ("a", "b"):
        report([folder], tmp_path / name)
    for name in ("report.json", "report.md", "report.html", "loss.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_several_runs_are_compared(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "g2" / "out"), make_run(tmp_path / "g4" / "out", 4.2, 3.5, 4)]
    content = report(folders, tmp_path / "report")
    assert [run["name"] for run in content["runs"]] == ["g2/out", "g4/out"]
    assert content["plots"] == ["loss.svg", "comparison.svg"]
    page = (tmp_path / "report" / "report.md").read_text()
    row = (
        "| g4/out | 4 | +0.8490 | +0.1490 | 0.5000 | 75.0% | 512 | 3.3510 | 655,360 | 80 s | mean |"
    )
    assert row in page.splitlines()
    table = summary_table(content).splitlines()
    assert table[0].startswith("run")
    assert [row.split()[0] for row in table[2:]] == ["g4/out", "g2/out"]  # the better one first
    assert len(table) == 4


def test_names_that_cannot_be_told_apart_get_numbers(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    content = report([folder, folder], tmp_path / "report")
    assert [run["name"] for run in content["runs"]] == ["run (1)", "run (2)"]


def test_summary_for_a_terminal(tmp_path: Path) -> None:
    summary = summary_table(report([make_run(tmp_path / "run")], tmp_path / "report"))
    verdict, quality, uptraining = summary.split("\n\n")
    assert verdict.startswith("8 → 2 KV heads")
    header, _, first, *_ = quality.splitlines()
    assert header.split() == ["original", "converted", "uptrained"]
    assert first == "loss, nats a token                       3.3510     5.5000     3.9000"
    assert "steps                         40" in uptraining.splitlines()


def test_what_finetune_leaves(tmp_path: Path) -> None:
    content = report([make_distilled(tmp_path / "run", exported=30)], tmp_path / "report")
    run = content["runs"][0]
    assert run["verdict"] == (
        "Trained on 40,000 tokens: validation loss 5.500 → 3.700, KL 2.000 → 0.667."
    )
    table = summary_table(content).partition("\n\n")[2].splitlines()
    assert [line.split("  ")[0] + "|" + line.split("  ")[-1].strip() for line in table[2:]] == [
        "steps|40",
        "tokens trained on|40,000",
        "loss minimised|0.3 cross-entropy + 0.7 KL to the teacher",
        "teacher|books",
        "trained parameters|all",
        "optimizer|adamw",
        "learning rate|0.0015, cosine",
        "validation loss|5.5000 → 3.7000",
        "KL to the teacher|2.0000 → 0.6667",
        "exported|step 30, the lowest validation loss",
        "steps with clipped gradients|3",
        "steps with a loss spike|1",
        "time, seconds|80",
        "speed, tokens a second|500",
    ]
    curves = run["training"]["curves"]
    # Cross-entropy, whatever was minimised: it is what validation measures.
    assert curves["loss"][-1] == [40000, pytest.approx(3.5 + 2 * math.exp(-5))]
    assert curves["kl"][0] == [1000, pytest.approx(2 * math.exp(-1 / 8))]
    assert curves["spikes"] == [[25000, 9.0]]
    assert [tokens for tokens, _ in curves["validation_kl"]] == [0, 10000, 20000, 30000, 40000]


def test_what_was_evaluated_is_not_said_twice(tmp_path: Path) -> None:
    taught = SETTINGS | {"teacher": "books", "distillation_weight": 1.0}
    folder = make_run(tmp_path / "run", **taught)
    rows = [{"step": step, "validation_loss": 4.0, "validation_kl": 1.0} for step in (0, 40)]
    log = (folder / "train.jsonl").read_text()
    (folder / "train.jsonl").write_text(log + "".join(json.dumps(row) + "\n" for row in rows))
    summary = summary_table(report([folder], tmp_path / "report"))
    assert "loss minimised                KL to the teacher" in summary
    assert "validation loss" not in summary
    assert summary.count("KL to the teacher") == 1
    record = json.loads((folder / "final" / "uptrain.json").read_text())
    record["uptraining"]["teacher"] = "other"  # of which the evaluations say nothing
    write(folder / "final" / "uptrain.json", record)
    summary = summary_table(report([folder], tmp_path / "report"))
    assert "KL to the teacher             1.0000 → 1.0000" in summary


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (0.0, "cross-entropy"),
        (0.25, "0.75 cross-entropy + 0.25 KL to the teacher"),
        (1.0, "KL to the teacher"),
    ],
)
def test_what_was_minimised_is_said(tmp_path: Path, weight: float, said: str) -> None:
    content = report([make_distilled(tmp_path / "run", weight)], tmp_path / "report")
    assert f"| loss minimised | {said} |" in (tmp_path / "report" / "report.md").read_text()
    assert "exported" not in summary_table(content)


def test_the_commands_repeat_a_calibrated_conversion(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    record = json.loads((folder / "converted" / "uptrain.json").read_text())
    asked = {"data": "my text.jsonl", "tokens": 4096, "refit": False, "reconstruct_steps": 0}
    record |= {"method": "factorize", "grouping": "search", "calibration": asked}
    write(folder / "converted" / "uptrain.json", record)
    report([folder], tmp_path / "report")
    assert (
        "uptrain convert books converted --num-key-value-heads 2 --method factorize --seed 0 "
        "--grouping search --calibration 'my text.jsonl' --calibration-tokens 4096 --no-refit "
        "--reconstruct-steps 0"
    ) in (tmp_path / "report" / "report.md").read_text().splitlines()


def drawn(monkeypatch: pytest.MonkeyPatch, folders: list[Path], output: Path) -> Any:
    """Give the drawing of loss.svg."""
    kept = []
    save = recovery.as_figure
    monkeypatch.setattr(
        recovery,
        "as_figure",
        lambda drawing, *rest: (kept.append(drawing), save(drawing, *rest))[1],
    )
    report(folders, output)
    return kept[0]


def lines_of(axes: Any) -> dict[str, list[float]]:
    return {
        line.get_label(): list(line.get_ydata())
        for line in axes.get_lines()
        if not line.get_label().startswith("_")
    }


def test_the_plot_of_a_run_with_a_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_distilled(tmp_path / "run", exported=30)
    write(folder / "report" / "original.json", evaluation("books", ORIGINAL_LOSS, 8, False))
    figure = drawn(monkeypatch, [folder], tmp_path / "report")
    loss, kl = figure.axes
    assert (loss.get_ylabel(), kl.get_ylabel()) == ("loss, nats a token", "KL to the teacher")
    assert lines_of(loss)["validation"] == [5.5, 3.9, 3.8, 3.7, 4.6]
    assert lines_of(loss)["spike"] == [9.0]
    assert lines_of(kl)["validation"] == pytest.approx([2, 2, 1, 2 / 3, 0.5])
    assert set(lines_of(kl)) == {"training, smoothed", "validation"}
    assert kl.get_ylim()[0] == 0  # what a student that equals its teacher has
    assert [text.get_text() for text in loss.texts] == ["exported", "original 3.351"]
    assert [text.xy for text in (loss.texts[0], kl.texts[0])] == [(30000, 3.7), (30000, 20 / 30)]


def test_the_plot_of_several_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [make_run(tmp_path / "plain"), make_distilled(tmp_path / "taught")]
    loss, kl = drawn(monkeypatch, folders, tmp_path / "report").axes
    assert set(lines_of(loss)) == {"plain", "taught"}
    assert lines_of(loss)["taught"] == [5.5, 3.9, 3.8, 3.7, 4.6]  # validation can be compared
    assert set(lines_of(kl)) == {"taught"}
    assert not loss.texts  # the runs have no original in common
    (only,) = drawn(monkeypatch, folders[:1], tmp_path / "report").axes
    assert set(lines_of(only)) == {"training, smoothed", "validation"}


def test_runs_of_one_size_stand_beside_each_other() -> None:
    points = [plots.Point(str(n), size, 1.0, 0.5) for n, size in enumerate((512, 1024, 512))]
    places = [plots.beside(points, number) for number in range(3)]
    assert places[0] < 512 < places[2] < places[1] == 1024


@pytest.mark.parametrize(
    ("converted", "final", "ending"),
    [
        (3.3, 3.2, ": nothing was lost, -0.151 over the original."),
        (5.5, 5.6, ": uptraining made it worse, +2.249 over the original."),
        (5.5, 3.251, ": 105% of the lost quality won back."),
    ],
)
def test_verdict_is_plain_about_the_outcome(
    tmp_path: Path, converted: float, final: float, ending: str
) -> None:
    content = report([make_run(tmp_path / "run", converted, final)], tmp_path / "report")
    assert content["runs"][0]["verdict"].endswith(ending)


def test_share_of_the_pretraining_from_its_tokens(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", pretraining_tokens=6553600)
    assert "tokens (10% of the pretraining)" in report([folder], tmp_path)["runs"][0]["verdict"]


def test_only_a_training_log(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    rows = [{"step": 1, "tokens": 8, "loss": 4.0}, {"step": 1, "tokens": 8, "loss": 3.0}]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 2, "lo')
    run = report([folder], tmp_path / "report")["runs"][0]
    assert run["verdict"] == "Trained for 1 steps to a training loss of 3.000."
    assert run["training"]["curves"]["loss"] == [[8, 3.0]]
    assert run["evaluations"] == {}


def test_only_an_evaluation(tmp_path: Path) -> None:
    write(tmp_path / "run" / "evaluation.json", evaluation("small", 4.0, 2))
    content = report([tmp_path / "run"], tmp_path / "report")
    assert content["plots"] == []
    assert content["runs"][0]["verdict"] == (
        "8 → 2 KV heads: KV cache 4.0× smaller (1,024 → 256 bytes a token); loss 3.351 → 4.000 now "
        "(+0.649 over the original)."
    )


def test_losses_on_different_texts_are_not_subtracted(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write(folder / "report" / "original.json", evaluation("books", 3.0, 8, False))
    elsewhere = evaluation("final", 4.0, 2, False) | {"data": "other.jsonl"}
    write(folder / "report" / "final.json", elsewhere)
    run = report([folder], tmp_path / "report")["runs"][0]
    assert "loss_increase" not in run["evaluations"]["uptrained"]
    assert run["verdict"].endswith("loss 3.000 → 4.000 after uptraining.")


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uptrain.report.can_draw", lambda: False)
    content = report([make_run(tmp_path / "run")], tmp_path / "report")
    note = "Plots need matplotlib: pip install 'uptrain-gqa[report]'"
    assert content["plots"] == []
    assert markdown(note) in (tmp_path / "report" / "report.md").read_text().splitlines()
    assert note in unescape((tmp_path / "report" / "report.html").read_text())
    assert summary_table(content).endswith(note)
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
    ]


def test_folders_without_results(tmp_path: Path) -> None:
    with pytest.raises(UptrainError) as error:
        report([tmp_path / "none"], tmp_path / "report")
    assert str(error.value) == (
        f"{tmp_path / 'none'}: does not exist; expected the output folder of a run"
    )
    with pytest.raises(UptrainError) as error:
        report([tmp_path], tmp_path / "report")
    assert str(error.value) == (
        f"{tmp_path}: holds no result; expected report/original.json, evaluation.json or "
        "train.jsonl, as `uptrain run`, `evaluate --output` and `finetune` leave them"
    )
    assert not (tmp_path / "report").exists()


def test_malformed_results(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    write(path, {"loss": "low"})
    with pytest.raises(UptrainError) as error:
        report([tmp_path], tmp_path / "report")
    assert str(error.value) == f"{path}: has no loss; expected what `uptrain evaluate` writes"
    path.write_text("{")
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        report([tmp_path], tmp_path / "report")


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UptrainError, match=r"file: cannot take the report \(.*\); choose another"):
        report([make_run(tmp_path / "run")], tmp_path / "file")


def test_smoothing_keeps_a_straight_line_straight() -> None:
    line = [float(i) for i in range(200)]
    assert recovery.smooth(line) == pytest.approx(line)
    assert recovery.smooth([1.0, 2.0]) == [1.0, 2.0]
    assert recovery.smooth([]) == []
