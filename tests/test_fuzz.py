"""Whatever is written into the files that are read: a typed error or a sound result, in bounds.

Each example edits a sound file. They come in batches, each of a seed of its own: the first is tried by
the fast tests, the others by the slow ones, in any order and by any number of processes, up to
`UPTRAIN_FUZZ_EXAMPLES` of each target in all.
"""

import gc
import json
import os
import resource
import site
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import safetensors
import torch
from faults import note
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_run import EXAMPLE, write_text
from transformers import AutoTokenizer, FalconConfig, Gemma3Config, LlamaConfig

from uptrain.checkpoint.config import read_config
from uptrain.checkpoint.reader import open_checkpoint
from uptrain.checkpoint.tensors import read_header
from uptrain.data.shards import TokenShards
from uptrain.errors import UptrainError
from uptrain.families.registry import read_heads
from uptrain.training.recipe import load_recipe
from uptrain.training.saved import check_fingerprint, find_states

BATCH = 10_000
BATCHES = -(-int(os.environ.get("UPTRAIN_FUZZ_EXAMPLES", "1_000_000")) // BATCH)
TOGETHER = 50  # that Hypothesis draws at once: it takes longer than most of what is tried
MOST_SECONDS = 2.0  # of one example
MOST_BYTES = 256 * 2**20  # that all of them take

# Values of every kind, and what has broken parsers before.
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.5, 1e308, float("inf"),
    float("nan"), "", "0", "x", "F32", "O", "<i8", "..", "/etc/passwd", "../../etc/passwd", "secret.safetensors",
    "a\0b", "\ud800", "\U0001f600", "\x1b[31m\n", "model.safetensors", "a/" + "x" * 300, "x" * 5000,
    [], [0], [[]], [-1, 1], [2**62] * 40, ["x", None], {}, {"": {}}, {"a": 1},
    {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}, json.loads("[" * 200 + "]" * 200),
]  # fmt: skip
JSON_VALUES = [json.dumps(value) for value in VALUES]
SNIPPETS = [
    b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"{", b"}", b"[", b"]", b",", b'"', b"\\", b"\\ud800", b"\\u0000",
    b"NaN", b"-", b"1e999", b"9" * 5000, b"0x" + b"f" * 5000, b"1" + b":1" * 5000, b"[" * 1200, b"\n", b" " * 50,
    b"&a [*a]", b"*a", b"!!python/object:os.system", b"!!set ", b"<<", b"? ", b": ", b"<html>",
    b"version https://git-lfs", b"\xed\xa0\x80",
]  # fmt: skip

Edit = tuple[int, int]
EDIT_BYTES = 12
EDITS = st.binary(min_size=EDIT_BYTES * TOGETHER, max_size=EDIT_BYTES * TOGETHER)


def decoded(data: bytes) -> list[Edit]:
    """Read one to three edits from twelve bytes: of which kind, and which place gets what."""
    numbers = struct.unpack("<3I", data)[: 1 + data[0] % 3]
    return [(number % 6, number // 6) for number in numbers]


def damaged(sound: Any, edits: list[Edit]) -> bytes:
    """Edit a document: its values first, then its bytes."""
    content = json.loads(json.dumps(sound))
    for kind, number in edits:
        if kind <= 2:
            content = _edit_value(content, kind, number)
    data = json.dumps(content).encode("utf-8", "surrogatepass")
    for kind, number in edits:
        if kind > 2:
            place, what = divmod(number, len(SNIPPETS))
            at = place % (len(data) + 1)
            end = at + (0 if kind == 3 else place % 7 if kind == 4 else len(data))
            data = data[:at] + SNIPPETS[what] + data[end:]
    return data


def _edit_value(content: Any, kind: int, number: int) -> Any:
    """Replace, remove or add one value, found by its number in the order of the document."""
    places: list[tuple[Any, Any]] = []

    def collect(owner: Any) -> None:
        for key in list(owner) if isinstance(owner, dict) else range(len(owner)):
            places.append((owner, key))
            if isinstance(owner[key], dict | list):
                collect(owner[key])

    place, what = divmod(number, len(VALUES))
    value = json.loads(JSON_VALUES[what])
    if isinstance(content, dict | list) and place:
        collect(content)
    if not places:
        return value
    owner, key = places[place % len(places)]
    if kind == 0:
        owner[key] = value
    elif kind == 1:
        del owner[key]
    elif isinstance(owner, dict):
        owner[str(value)] = owner[key]
    else:
        owner.append(value)
    return content


# What libraries open for themselves.
PACKAGES = (sys.prefix, sys.base_prefix, *site.getsitepackages(), site.getusersitepackages())
OWN = tuple(f"{os.path.realpath(path)}/" for path in (*PACKAGES, Path(__file__).parents[1]))
OWN += ("/proc/", "/sys/", "/dev/")


class Opened:
    """What is opened outside a folder; a hook cannot be taken away again."""

    within: str | None = None
    outside: ClassVar[list[str]] = []

    @classmethod
    def watch(cls, event: str, arguments: Any) -> None:
        if cls.within is None or event != "open" or not isinstance(arguments[0], str | bytes):
            return
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if not path.startswith((cls.within, *OWN)):
            cls.outside.append(path)


sys.addaudithook(Opened.watch)


@contextmanager
def bounded(folder: Path) -> Iterator[None]:
    """Let nothing outside a folder be opened, and no more memory be taken than a file needs."""
    Opened.within, Opened.outside = f"{os.path.realpath(folder)}/", []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
    finally:
        Opened.within = None
    # Hypothesis reads the source of what other tests have imported.
    imported = {vars(module).get("__file__") for module in [*sys.modules.values()]}
    assert not {*Opened.outside} - {os.path.realpath(path) for path in imported if path}
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < MOST_BYTES, f"{grown} bytes more"


def fuzz(target: str, folder: Path, batch: int, attempt: Callable[[list[Edit]], object]) -> None:
    """Try a batch of edits; only typed errors of one line may come of them, and soon."""
    tried = refused = 0

    def try_edits(data: bytes) -> None:
        nonlocal tried, refused
        pieces = (data[at : at + EDIT_BYTES] for at in range(0, len(data), EDIT_BYTES))
        for piece in dict.fromkeys(pieces):  # the first of all examples is nothing but zeros
            tried += 1
            begun = time.process_time()
            try:
                attempt(decoded(piece))
            except UptrainError as error:
                refused += 1
                lines = str(error).splitlines()
                assert len(lines) == 1
            assert time.process_time() - begun < MOST_SECONDS

    attempt([])  # what is sound is read, and imports what is imported late
    some = settings(
        max_examples=BATCH // TOGETHER + 1,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    gc.collect()
    gc.freeze()  # what is imported is not looked through for garbage, again and again
    try:
        with bounded(folder):
            seed(batch)(some(given(EDITS)(try_edits)))()
    finally:
        gc.unfreeze()
    assert tried >= BATCH
    assert 0 < refused < tried
    outcomes = {"refused": refused, "accepted": tried - refused}
    note(fault="fuzz", operation=target, points=tried, outcomes=outcomes)


@pytest.fixture(
    params=[pytest.param(n, marks=pytest.mark.slow if n else ()) for n in range(BATCHES)]
)
def batch(request: Any) -> int:
    return int(request.param)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder beside which lies what is not to be read."""
    secret = {"a": torch.zeros(2, 3)}
    save_file(secret, tmp_path / "secret.safetensors")
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


def test_headers(batch: int, folder: Path) -> None:
    bf16 = torch.zeros(3, dtype=torch.bfloat16)
    path = folder / "model.safetensors"
    save_file({"a": torch.zeros(2, 3), "b.0": bf16, "c": torch.tensor(1)}, path, {"format": "pt"})
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])

    def attempt(edits: list[Edit]) -> None:
        text = damaged(header, edits)
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
        entries = read_header(path)
        # What is accepted is what the library reads.
        with safetensors.safe_open(path, "pt") as file:
            names = file.keys()  # of what is no mapping
            found = {name: file.get_slice(name) for name in names}
            shapes = {
                name: (each.get_dtype(), tuple(each.get_shape())) for name, each in found.items()
            }
        assert shapes == {entry.name: (entry.dtype, entry.shape) for entry in entries.values()}

    fuzz("header", folder, batch, attempt)


def test_indexes(batch: int, folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    weight_map = {}
    for number, names in enumerate((["a", "b"], ["c"]), 1):
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file({name: torch.zeros(2) for name in names}, folder / shard)
        weight_map |= dict.fromkeys(names, shard)
    (folder / "link.safetensors").symlink_to(folder.parent / "secret.safetensors")
    index = folder / "model.safetensors.index.json"
    outside = (
        "../secret.safetensors",
        str(folder.parent / "secret.safetensors"),
        "link.safetensors",
    )

    def attempt(edits: list[Edit]) -> None:
        # One in four leads outside, whatever else is edited.
        place = edits[0][1] % (4 * len(outside)) if edits else len(outside)
        named = {"a": outside[place]} if place < len(outside) else {}
        content = {"metadata": {"total_size": 24}, "weight_map": weight_map | named}
        index.write_bytes(damaged(content, edits))
        found = open_checkpoint(folder)
        assert {entry.path.parent for entry in found.tensors.values()} == {folder}

    fuzz("index", folder, batch, attempt)


def test_configs(batch: int, folder: Path) -> None:
    small = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2}
    sound = [
        LlamaConfig(**small, hidden_size=64, architectures=["LlamaForCausalLM"]).to_dict(),
        FalconConfig(
            num_attention_heads=4, num_kv_heads=4, new_decoder_architecture=True
        ).to_dict(),
        Gemma3Config(text_config=small).to_dict(),
    ]

    def attempt(edits: list[Edit]) -> None:
        content = sound[edits[0][1] % len(sound)] if edits else sound[0]
        (folder / "config.json").write_bytes(damaged(content, edits))
        heads = read_heads(read_config(folder))
        assert heads.num_attention_heads % heads.num_key_value_heads == 0

    fuzz("config", folder, batch, attempt)


def test_recipes(batch: int, folder: Path) -> None:
    path = folder / "recipe.yaml"
    recipe = {
        "source": "a/b",
        "data": {"train": [{"path": "b", "weight": 1}]},
        "train": {"steps": 2, "batch_tokens": 8, "learning_rate": 1e-3},
        "output": "out",
    }

    def attempt(edits: list[Edit]) -> None:
        path.write_bytes(damaged(recipe, edits))
        assert load_recipe(path).train.total_steps > 0

    fuzz("recipe", folder, batch, attempt)


def test_token_shards(batch: int, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    text = write_text(folder / "text.jsonl", 3)
    TokenShards.prepare(folder / "tokens", [text], tokenizer, shard_tokens=200)
    path = folder / "tokens" / "manifest.json"
    manifest = json.loads(path.read_text())

    def attempt(edits: list[Edit]) -> None:
        path.write_bytes(damaged(manifest, edits))
        shards = TokenShards.open(folder / "tokens")
        assert len(shards.read(0, shards.tokens)) == shards.tokens
        shards.document_starts(0, shards.tokens)

    fuzz("token shards", folder, batch, attempt)


def test_checkpoint_manifests(batch: int, folder: Path) -> None:
    state = folder / "step-000002"
    files = {}
    for rank in range(2):
        part = state / f"part-{rank:05d}"
        part.mkdir(parents=True)
        save_file({"a": torch.zeros(2)}, part / "model.safetensors")
        size = (part / "model.safetensors").stat().st_size
        files[f"{part.name}/model.safetensors"] = {"bytes": size, "sha256": "0" * 64}
    run = {"seed": 0, "betas": [0.9, 0.95], "source": "0" * 64, "teacher": None}
    manifest = {"format": 2, "step": 2, "processes": 2, "files": files, "run": run}

    def attempt(edits: list[Edit]) -> None:
        (state / "manifest.json").write_bytes(damaged(manifest, edits))
        for found in find_states(folder):
            assert all((state / name).is_file() for name in found.parts)
            check_fingerprint(found, run)

    fuzz("checkpoint manifest", folder, batch, attempt)
