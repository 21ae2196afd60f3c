"""Calibration on speech: rows of recordings, and what a model that hears makes of them."""

import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_carried import load, make_source
from test_encoder import EXAMPLES, make_reader

import uptrain
from uptrain.checkpoint.reader import open_checkpoint
from uptrain.conversion.options import make_options
from uptrain.conversion.rewritten import as_architecture
from uptrain.conversion.sample import Sample
from uptrain.conversion.speech import draw_speech, read_sound
from uptrain.errors import CheckpointError, DataError

pytestmark = pytest.mark.filterwarnings("ignore")  # of the model classes themselves

RATE, SECONDS = 16_000, 2
SAID = "It was the best of times, it was the worst of times."


def write_sound(path: Path, seconds: float, rate: int = RATE, channels: int = 1) -> Path:
    """Write a tone that is another in each channel."""
    time = np.arange(round(seconds * rate)) / rate
    tones = [np.sin(2 * np.pi * 220 * (1 + n) * time) / (2 + n) for n in range(channels)]
    with wave.open(str(path), "wb") as sound:
        sound.setparams((channels, 2, rate, 0, "NONE", "not compressed"))
        sound.writeframes((np.stack(tones, 1) * 32767).astype("<i2").tobytes())
    return path


@pytest.fixture(scope="module")
def listener(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny whisper that hears two seconds at once, with a real tokenizer."""
    from transformers import WhisperFeatureExtractor

    folder = make_reader(
        "whisper", tmp_path_factory.mktemp("speech") / "whisper", max_source_positions=100
    )
    WhisperFeatureExtractor(feature_size=8, chunk_length=SECONDS).save_pretrained(folder)
    return folder


def write_rows(folder: Path, count: int, seconds: float = 0.9) -> Path:
    rows = []
    for number in range(count):
        write_sound(folder / f"{number}.wav", seconds + number / 100)
        rows.append({"audio": f"{number}.wav", "text": f"{SAID} {number}"})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def draw(listener: Path, rows: Path, **options: Any) -> Sample:
    checkpoint = as_architecture(open_checkpoint(listener), "auto", 2)
    return draw_speech(checkpoint, make_options(calibration=rows, **options))


def test_rows_are_joined_to_windows(listener: Path, tmp_path: Path) -> None:
    sample = draw(listener, write_rows(tmp_path, 6))
    assert sample.encoder is not None
    assert sample.encoder.shape == (3, 8, 200)  # two recordings of 0.9 seconds each
    assert sample.tokens.shape[0] == 3
    assert (sample.tokens[:, 0] == 2).all()  # where a decoder starts
    fewer = draw(listener, write_rows(tmp_path, 6), calibration_tokens=1)
    assert len(fewer.tokens) == 1
    assert len(sample.first(2).tensors[1]) == 2


def test_channels_are_averaged(tmp_path: Path) -> None:
    one = read_sound(write_sound(tmp_path / "one.wav", 0.1), RATE)
    both = read_sound(write_sound(tmp_path / "both.wav", 0.1, channels=2), RATE)
    time = np.arange(1600) / RATE
    expected = (one + np.sin(2 * np.pi * 440 * time) / 3) / 2
    assert np.abs(both - expected).max() < 2 / 32768  # of 16 bits


def test_a_decoder_is_calibrated_by_what_the_encoder_hears(listener: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path, 24)
    for encoder in (False, True):
        report = uptrain.convert(
            listener,
            tmp_path / f"{encoder}",
            2,
            calibration=rows,
            reconstruct_steps=0,
            encoder=encoder,
        )
        assert len(report["layers"]) == (4 if encoder else 2)
        assert all(layer["error"]["refit"] < layer["error"]["merged"] for layer in report["layers"])
    uptrain.convert(listener, tmp_path / "mean", 2)
    sample = draw(listener, rows)
    assert sample.encoder is not None
    given = {"input_features": sample.encoder.double(), "decoder_input_ids": sample.tokens}
    with torch.no_grad():
        reference = load(listener)(**given).logits
        errors = {
            name: (load(tmp_path / name)(**given).logits - reference).square().mean()
            for name in ("False", "mean")
        }
    assert errors["False"] < errors["mean"]


def test_bad_rows_are_refused(listener: Path, tmp_path: Path) -> None:
    text = EXAMPLES / "books-train.jsonl"
    with pytest.raises(DataError, match="line 1 has no audio and text; this model hears speech"):
        uptrain.convert(listener, tmp_path / "target", 2, calibration=text)
    with pytest.raises(DataError, match=r"rows.jsonl: does not exist; expected lines like"):
        draw(listener, tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(DataError, match=r"has no rows; expected lines like"):
        draw(listener, tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match=r"0.wav: is 3.0 seconds long, the model hears 2 at once"):
        draw(listener, write_rows(tmp_path, 1, seconds=3))
    write_sound(tmp_path / "0.wav", 1, rate=8000)
    with pytest.raises(DataError, match="has 16 bits and 8000 Hz, expected 16 bits and 16000 Hz"):
        draw(listener, tmp_path / "rows.jsonl")
    (tmp_path / "0.wav").write_bytes(b"no sound")
    with pytest.raises(DataError, match=r"0.wav: cannot be read .*expected a 16-bit .wav file"):
        draw(listener, tmp_path / "rows.jsonl")


def test_a_model_without_a_feature_extractor_is_refused(listener: Path, tmp_path: Path) -> None:
    source = make_source("whisper", tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((listener / name).read_bytes())
    with pytest.raises(CheckpointError, match=r"copy preprocessor_config\.json of the original"):
        draw(source, write_rows(tmp_path, 1))
    assert torch.is_tensor(draw(listener, write_rows(tmp_path, 1)).tokens)
