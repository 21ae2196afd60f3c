"""Draw calibration speech: recordings, and what is said in them."""

import json
import random
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from uptrain.checkpoint.reader import Checkpoint
from uptrain.conversion.options import Options
from uptrain.conversion.rewritten import tokenizer_of
from uptrain.conversion.sample import Sample, usable_length
from uptrain.errors import CheckpointError, DataError, one_line
from uptrain.families.registry import parse_config

# So many transcripts are cut at the end, so that the longest does not fill all others with padding.
_CUT = 0.1
_ROW = '{"audio": "speech.wav", "text": "what is said"}'


class _Row(NamedTuple):
    audio: Path
    text: str


def draw_speech(checkpoint: Checkpoint, options: Options, code: Path | None = None) -> Sample:
    """Draw the calibration speech of a conversion, from rows with `audio` and `text`.

    Rows in random order are joined to fill the window that the model hears at once (30 seconds), since
    silence teaches nothing. A transcript has the tokens that the tokenizer puts around a text; it is
    filled up behind its end with the token that ends it.

    Raises:
        CheckpointError: If the checkpoint has no tokenizer, or no feature extractor.
        DataError: If a row or recording is not as expected, or there is none.
    """
    path = options.calibration
    assert path is not None
    config: Any = parse_config(checkpoint.config, code)
    tokenizer = tokenizer_of(checkpoint, trust_remote_code=code is not None)
    extractor = _feature_extractor(checkpoint)
    rate, longest = extractor.sampling_rate, extractor.n_samples
    start, end = config.decoder_start_token_id, config.eos_token_id
    limit = usable_length(config) or 448
    rows = list(_rows(path))
    random.Random(options.seed).shuffle(rows)
    spectra, transcripts, tokens = [], [], 0
    for sound, text in _windows(rows, rate, longest):
        if tokens >= options.calibration_tokens:
            break
        made = extractor(sound, sampling_rate=rate, return_tensors="pt").input_features[0]
        found = tokenizer(text).input_ids[:limit]
        found = found if found[0] == start else [start, *found[:-1]]
        spectra.append(made.float())
        transcripts.append(found)
        tokens += len(found)
    if not spectra:
        raise DataError(f"{path}: has no rows; expected lines like {_ROW}")
    lengths = sorted(map(len, transcripts))
    length = lengths[int((len(lengths) - 1) * (1 - _CUT))]
    padded = [[*found, *[end] * length][:length] for found in transcripts]
    return Sample(torch.tensor(padded), torch.stack(spectra))


def _feature_extractor(checkpoint: Checkpoint) -> Any:
    from transformers import AutoFeatureExtractor

    try:
        return AutoFeatureExtractor.from_pretrained(checkpoint.folder)
    except Exception as error:  # transformers documents no closed set of errors
        raise CheckpointError(
            f"{checkpoint.folder}: its feature extractor cannot be loaded ({one_line(error)}); copy "
            "preprocessor_config.json of the original checkpoint into it"
        ) from error


def _rows(path: Path) -> Iterator[_Row]:
    """Read the rows; paths of recordings are relative to the file."""
    if not path.is_file():
        raise DataError(f"{path}: does not exist; expected lines like {_ROW}")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                yield _Row(path.parent / row["audio"], str(row["text"]))
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(
                    f"{path}: line {number} has no audio and text; this model hears speech, and text alone "
                    f"cannot calibrate it: expected lines like {_ROW}, or --method factorize without --calibration"
                ) from error


def _windows(
    rows: list[_Row], rate: int, longest: int
) -> Iterator[tuple[np.ndarray[Any, Any], str]]:
    """Join recordings, and their texts, as long as they fit together.

    Args:
        rows: Recordings in order.
        rate: Samples a second that the model expects.
        longest: Most samples.
    """
    sounds: list[np.ndarray[Any, Any]] = []
    text = ""
    for row in rows:
        sound = read_sound(row.audio, rate)
        if len(sound) > longest:
            raise DataError(
                f"{row.audio}: is {len(sound) / rate:.1f} seconds long, the model hears "
                f"{longest / rate:.0f} at once; cut it"
            )
        if sum(map(len, sounds)) + len(sound) > longest:
            yield np.concatenate(sounds), text
            sounds, text = [], ""
        sounds.append(sound)
        text += f" {row.text.strip()}"
    if sounds:
        yield np.concatenate(sounds), text


def read_sound(path: Path, rate: int) -> np.ndarray[Any, Any]:
    """Read a recording of 16-bit samples, its channels averaged.

    Args:
        path: A `.wav` file.
        rate: Samples a second that it must have.

    Returns:
        [samples], float32, from -1 to 1.

    Raises:
        DataError: If it is anything else.
    """
    try:
        with wave.open(str(path)) as sound:
            width, found, channels = (
                sound.getsampwidth(),
                sound.getframerate(),
                sound.getnchannels(),
            )
            frames = sound.readframes(sound.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise DataError(
            f"{path}: cannot be read ({one_line(error)}); expected a 16-bit .wav file"
        ) from error
    if (width, found) != (2, rate):
        raise DataError(
            f"{path}: has {8 * width} bits and {found} Hz, expected 16 bits and {rate} Hz; convert it, with "
            f"`ffmpeg -i {path.name} -ar {rate} -c:a pcm_s16le new.wav`, say"
        )
    samples = np.frombuffer(frames, "<i2").reshape(-1, channels)
    made: np.ndarray[Any, Any] = (samples.mean(axis=1) / 32768).astype(np.float32)
    return made
