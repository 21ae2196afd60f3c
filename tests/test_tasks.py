"""The lm-evaluation-harness: missing, without such a task, and on a task of our own."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from test_quality import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from uptrain.errors import UptrainError
from uptrain.evaluation.quality import evaluate
from uptrain.evaluation.tasks import check_tasks, run_tasks

is_here = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not is_here, reason="needs the lm-eval extra")

TASK = """\
task: uptrain_letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: [a, b]
target_delimiter: ""
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.skipif(is_here, reason="the lm-eval extra is installed")
def test_without_the_extra() -> None:
    with pytest.raises(UptrainError) as error:
        check_tasks(["arc_easy"])
    assert str(error.value) == (
        "tasks need the lm-evaluation-harness, which is not installed; "
        "pip install 'uptrain-gqa[lm-eval]'"
    )


@needs_harness
@pytest.mark.filterwarnings("default")
def test_an_unknown_task() -> None:
    with pytest.raises(UptrainError, match="uptrain_none: no task of lm-eval "):
        check_tasks(["uptrain_none"])


@needs_harness
@pytest.mark.filterwarnings("default")
def test_a_task_of_our_own_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    texts = [f"letter {i} is " for i in range(8)]
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(texts)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(TASK.format(file=tmp_path / "data.jsonl"))
    models = {
        name: AutoModelForCausalLM.from_pretrained(
            make_model(tmp_path / name, seed), dtype=torch.float32
        )
        for seed, name in enumerate(("target", "reference"))
    }
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "target")
    manager = check_tasks(["uptrain_letters"], tmp_path)
    found = run_tasks(models, tokenizer, ["uptrain_letters"], manager)
    choices = [tokenizer.encode(letter)[-1] for letter in "ab"]
    for name, model in models.items():
        right = 0
        for row in rows:
            tokens = torch.tensor([tokenizer.encode(row["text"])])
            with torch.no_grad():
                logits = model(tokens).logits[0, -1, choices]
            right += int(logits.argmax()) == row["label"]
        share = right / len(rows)
        assert found["uptrain_letters"]["acc"][name] == pytest.approx(share)
        error = math.sqrt(share * (1 - share) / (len(rows) - 1))
        assert found["uptrain_letters"]["acc"][f"{name}_stderr"] == pytest.approx(error)
    result = evaluate(
        tmp_path / "target",
        tmp_path / "data.jsonl",
        reference=tmp_path / "reference",
        tasks=["uptrain_letters"],
        tasks_folder=tmp_path,
        device="cpu",
    )
    assert result["tasks"] == found


@needs_harness
@pytest.mark.filterwarnings("default")
def test_a_task_whose_data_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(TASK.format(file=tmp_path / "none.jsonl"))
    folder = make_model(tmp_path / "model")
    manager = check_tasks(["uptrain_letters"], tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(UptrainError, match="tasks uptrain_letters: "):
        run_tasks(
            {"target": model},
            AutoTokenizer.from_pretrained(folder),
            ["uptrain_letters"],
            manager,
        )
