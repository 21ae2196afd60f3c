"""Converting: oracles on tiny llamas, judged by stock transformers."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from tiny import save, tiny_config, tiny_model
from transformers import AutoModelForCausalLM

import uptrain
from uptrain.checkpoint.reader import open_checkpoint
from uptrain.conversion.pooling import pool_heads
from uptrain.errors import CheckpointError, HeadCountError, OptionError, UptrainError

SHARED = {"num_hidden_layers": 2, "attention_bias": True}
KEY_VALUE = ("k_proj", "v_proj")
COMPANIONS = {
    "tokenizer.json": b'{"version": "1.0", "t": "\xc3\xa4\\u00e4"}\r\n',
    "tokenizer_config.json": b"{ }",
    "chat_template.jinja": b"{% for m in messages %}\n",
    "generation_config.json": b'{"temperature":  0.70,"bos_token_id":0}',
}

State = dict[str, torch.Tensor]


def make(folder: Path, dtype: torch.dtype = torch.float64, **overrides: Any) -> Path:
    save(tiny_model(tiny_config("llama", **SHARED, **overrides)).to(dtype), folder)
    for name, content in COMPANIONS.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 query and 4 KV heads of 16, in float64; not to be changed."""
    return make(tmp_path_factory.mktemp("convert") / "source")


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    """A source that a test may change."""
    return shutil.copytree(source, tmp_path / "source")


def load(folder: Path) -> State:
    """Read all weights of a folder with safetensors' own library."""
    state: State = {}
    for path in folder.glob("*.safetensors"):
        state |= safetensors.torch.load_file(path)
    return state


def store(state: State, folder: Path) -> None:
    safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


def is_key_value(name: str) -> bool:
    return any(part in name for part in KEY_VALUE)


def heads(tensor: torch.Tensor, count: int) -> torch.Tensor:
    return tensor.unflatten(0, (count, -1))


def equal_within_groups(folder: Path, count: int, target_count: int) -> None:
    state = load(folder)
    for name in filter(is_key_value, state):
        first = heads(state[name], count)[:: count // target_count]
        state[name] = first.repeat_interleave(count // target_count, 0).flatten(0, 1)
    store(state, folder)


def same(left: State, right: State) -> bool:
    """Whether names, dtypes, shapes and bytes agree (a NaN equals itself)."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and torch.equal(
            left[name].reshape(-1).view(torch.uint8), right[name].reshape(-1).view(torch.uint8)
        )
        for name in left
    )


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    ids = torch.randint(1, 100, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return result


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


# What the numbers must be.


@pytest.mark.parametrize("method", ["mean", "first", "random"])
def test_the_same_number_of_heads_is_the_identity(
    source: Path, tmp_path: Path, method: str
) -> None:
    uptrain.convert(source, tmp_path / "target", 4, method=method)
    assert same(load(tmp_path / "target"), load(source))
    assert json.loads((tmp_path / "target/config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("group_size", [2, 3, 4, 5, 6, 7, 8, 11, 13, 32])
def test_the_mean_of_equal_heads_is_the_head(dtype: torch.dtype, group_size: int) -> None:
    head = torch.randn(3, 16, 64, generator=torch.Generator().manual_seed(group_size)).to(dtype)
    pooled = pool_heads(head.repeat_interleave(group_size, 0), 3, "mean")
    assert torch.equal(pooled, head)
    assert pooled.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group_size", [3, 5, 7])
def test_repeating_and_converting_gives_back_the_same_checkpoint(
    tmp_path: Path, dtype: torch.dtype, group_size: int
) -> None:
    count = 2 * group_size
    shape = {"num_attention_heads": count, "hidden_size": count * 4, "head_dim": 4}
    grouped = make(tmp_path / "grouped", dtype, num_key_value_heads=2, **shape)
    repeated = shutil.copytree(grouped, tmp_path / "repeated")
    edit_config(repeated, num_key_value_heads=count)
    state = load(grouped)
    for name in filter(is_key_value, state):
        state[name] = heads(state[name], 2).repeat_interleave(group_size, 0).flatten(0, 1)
    store(state, repeated)
    uptrain.convert(repeated, tmp_path / "target", 2)
    assert same(load(tmp_path / "target"), load(grouped))
    assert json.loads((tmp_path / "target/config.json").read_text()) == json.loads(
        (grouped / "config.json").read_text()
    )


def test_the_mean_by_hand() -> None:
    tensor = torch.tensor([[1.0, 5.0], [3.0, 7.0], [10.0, 0.0], [20.0, -2.0]])
    assert pool_heads(tensor, 2, "mean").tolist() == [[2.0, 6.0], [15.0, -1.0]]
    assert pool_heads(tensor, 2, "first").tolist() == [[1.0, 5.0], [10.0, 0.0]]
    assert pool_heads(tensor, 1, "mean").tolist() == [[8.5, 2.5]]


def test_the_mean_of_float32_is_taken_in_float64() -> None:
    tensor = torch.tensor([1e8, 1.0, -1e8, 1.0]).reshape(4, 1)
    assert pool_heads(tensor, 1, "mean").item() == 0.5


def test_first_keeps_the_first_head_of_each_group(source: Path, tmp_path: Path) -> None:
    uptrain.convert(source, tmp_path / "target", 2, method="first")
    original, converted = load(source), load(tmp_path / "target")
    for name in filter(is_key_value, original):
        assert torch.equal(heads(converted[name], 2), heads(original[name], 4)[::2])


def test_random_is_drawn_anew_from_its_seed(source: Path, tmp_path: Path) -> None:
    states = []
    for number, seed in enumerate([0, 0, 1]):
        target = tmp_path / str(number)
        uptrain.convert(source, target, 2, method="random", seed=seed)
        states.append(load(target))
    assert same(states[0], states[1])
    weights = [name for name in states[0] if is_key_value(name) and name.endswith("weight")]
    assert len({tuple(states[n][name].flatten().tolist()) for n in (0, 2) for name in weights}) == 8
    for name in filter(is_key_value, states[0]):
        if name.endswith("bias"):
            assert not states[0][name].any()
        else:
            assert states[0][name].std() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("method", ["median", "Mean", ""])
def test_an_unknown_method_is_refused(source: Path, tmp_path: Path, method: str) -> None:
    with pytest.raises((UptrainError, ValueError), match="mean, first"):
        uptrain.convert(source, tmp_path / "target", 2, method=method)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(("count", "target_count"), [(4, 2), (4, 1), (2, 1)])
def test_equal_heads_give_equal_logits(tmp_path: Path, count: int, target_count: int) -> None:
    folder = make(tmp_path / "source", num_key_value_heads=count)
    equal_within_groups(folder, count, target_count)
    uptrain.convert(folder, tmp_path / "target", target_count)
    original = logits(folder)
    assert (logits(tmp_path / "target") - original).abs().max() < 1e-10


def test_strided_groups_would_be_noticed(copy: Path, tmp_path: Path) -> None:
    equal_within_groups(copy, 4, 2)
    uptrain.convert(copy, tmp_path / "target", 2)
    original, state = logits(copy), load(copy)
    for name in filter(is_key_value, state):
        # Heads 0 and 2, 1 and 3: what the mean over the wrong axis makes.
        state[name] = state[name].unflatten(0, (2, 2, -1)).mean(0).flatten(0, 1)
    store(state, tmp_path / "target")
    assert (logits(tmp_path / "target") - original).abs().max() > 1e-3 * original.abs().max()


# What must stay as it is.


@pytest.mark.parametrize("method", ["mean", "first", "random"])
def test_the_rest_is_copied_byte_for_byte(copy: Path, tmp_path: Path, method: str) -> None:
    state = load(copy)
    state["model.norm.weight"][0] = float("nan")  # not ours to judge
    state["extra.of.another.kind"] = torch.arange(3, dtype=torch.int8)
    store(state, copy)
    result = uptrain.convert(copy, tmp_path / "target", 2, method=method)
    converted = load(tmp_path / "target")
    rest = [name for name in state if not is_key_value(name)]
    assert same({n: state[n] for n in rest}, {n: converted[n] for n in rest})
    assert state.keys() == converted.keys()
    assert result["tensors"] == {"changed": 8, "copied": len(rest)}
    assert (
        digests(tmp_path / "target").items()
        >= {
            name: hashlib.sha256(content).hexdigest() for name, content in COMPANIONS.items()
        }.items()
    )


@pytest.mark.parametrize("key", [4, None, "absent"])
def test_only_the_key_changes_in_the_config(copy: Path, tmp_path: Path, key: Any) -> None:
    edit_config(copy, num_key_value_heads=key, ours={"x": [1e-5, None, "ü"]}, rms_norm_eps=1e-6)
    uptrain.convert(copy, tmp_path / "target", 2)
    original = json.loads((copy / "config.json").read_text())
    converted = json.loads((tmp_path / "target/config.json").read_text())
    assert converted == original | {"num_key_value_heads": 2}
    assert list(converted)[: len(original)] == list(original)


def test_the_source_is_untouched(copy: Path, tmp_path: Path) -> None:
    before = digests(copy)
    uptrain.convert(copy, tmp_path / "target", 2)
    assert digests(copy) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_the_same_input_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        uptrain.convert(source, tmp_path / name, 2, method="random", seed=3)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_the_record_holds_every_hash(source: Path, tmp_path: Path) -> None:
    uptrain.convert(source, tmp_path / "target", 1)
    record = json.loads((tmp_path / "target/uptrain.json").read_text())
    found = digests(tmp_path / "target")
    assert record["files"] == {
        name: digest for name, digest in found.items() if name not in ("uptrain.json", "README.md")
    }
    assert record["num_key_value_heads"] == {"source": 4, "target": 1}
    assert (record["method"], record["grouping"], record["seed"]) == ("mean", "contiguous", 0)


@pytest.mark.parametrize(
    ("front_matter", "inherited"),
    [
        ("license: apache-2.0\nlanguage: [en, no]\nmodel-index: []", ("apache-2.0", ["en", "no"])),
        ("license: mit\nlanguage: no", ("mit", "no")),
        ("license: 2020-01-01\nlanguage: [2020-01-01]", ("2020-01-01", ["2020-01-01"])),
        ("license: &a [*a]", (None, None)),
        ("license: " + "[" * 500 + "]" * 500, (None, None)),
        ("license: [[a, b], [c]]\nlanguage: {a: b}", (None, None)),
        ("license: !!python/object/apply:os.getcwd []", (None, None)),
        ("license: [", (None, None)),
    ],
)
def test_the_card_inherits_plain_terms_only(
    copy: Path, tmp_path: Path, front_matter: str, inherited: tuple[Any, Any]
) -> None:
    (copy / "README.md").write_text(f"---\n{front_matter}\n---\n# Model\n")
    uptrain.convert(copy, tmp_path / "target", 2)
    card = json.loads((tmp_path / "target/uptrain.json").read_text())["source"]["card"]
    assert (card.get("license"), card.get("language")) == inherited


# What stock transformers makes of it.


@pytest.mark.parametrize("count", [4, 2, 1])
def test_transformers_loads_and_generates(source: Path, tmp_path: Path, count: int) -> None:
    uptrain.convert(source, tmp_path / "target", count)
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "target", dtype=torch.float64, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(
        ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **options
    )
    uncached = ids
    with torch.no_grad():
        for _ in range(12):
            last = model(uncached, use_cache=False).logits[:, -1:]
            uncached = torch.cat([uncached, last.argmax(-1)], 1)
    assert cached.sequences.tolist() == uncached.tolist()
    for layer in cached.past_key_values.layers:
        assert layer.keys.shape == layer.values.shape == (1, count, 14, 16)


# Shards, in and out.


def test_shards_in_and_out(source: Path, tmp_path: Path) -> None:
    uptrain.convert(source, tmp_path / "single", 2)
    uptrain.convert(source, tmp_path / "shards", 2, max_shard_bytes=50_000)
    uptrain.convert(source, tmp_path / "source", 4, max_shard_bytes=50_000)
    uptrain.convert(tmp_path / "source", tmp_path / "again", 2)
    single = load(tmp_path / "single")
    assert len(list((tmp_path / "shards").glob("model-*-of-*.safetensors"))) > 3
    index = json.loads((tmp_path / "shards/model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in single.values())}
    for name, shard in index["weight_map"].items():
        assert name in safetensors.torch.load_file(tmp_path / "shards" / shard)
    assert same(load(tmp_path / "shards"), single)
    assert same(load(tmp_path / "again"), single)
    assert torch.equal(logits(tmp_path / "shards"), logits(tmp_path / "single"))


@pytest.mark.parametrize("sharded", [False, True])
def test_bin_sources(source: Path, tmp_path: Path, sharded: bool) -> None:
    folder = shutil.copytree(source, tmp_path / "source")
    (folder / "model.safetensors").unlink()
    state = load(source)
    if sharded:
        home = {name: f"pytorch_model-{len(name) % 2 + 1}.bin" for name in state}
        for shard in set(home.values()):
            torch.save({n: t for n, t in state.items() if home[n] == shard}, folder / shard)
        index = folder / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": home}))
    else:
        torch.save(state, folder / "pytorch_model.bin")
    uptrain.convert(source, tmp_path / "wanted", 2)
    uptrain.convert(folder, tmp_path / "target", 2)
    assert same(load(tmp_path / "target"), load(tmp_path / "wanted"))
    assert digests(tmp_path / "target").keys() == digests(tmp_path / "wanted").keys()


def test_a_snapshot_of_the_hub_cache(source: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    blobs = shutil.copytree(source, tmp_path / "models--owner--name" / "blobs")
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    uptrain.convert(snapshot, tmp_path / "target", 2)
    assert not any(path.is_symlink() for path in (tmp_path / "target").iterdir())
    uptrain.convert(source, tmp_path / "wanted", 2)
    assert same(load(tmp_path / "target"), load(tmp_path / "wanted"))
    record = json.loads((tmp_path / "target/uptrain.json").read_text())
    assert record["source"]["revision"] == "abc123"


# What is refused, and what a failure leaves.


@pytest.mark.parametrize(
    ("kv_heads", "wanted", "possible"), [(4, 3, "1, 2, 4"), (4, 8, "1, 2, 4"), (2, 4, "1, 2")]
)
def test_a_count_that_does_not_divide_is_refused(
    tmp_path: Path, kv_heads: int, wanted: int, possible: str
) -> None:
    folder = make(tmp_path / "source", num_key_value_heads=kv_heads)
    message = (
        f"^num_key_value_heads={wanted}: cannot be had from the {kv_heads} KV heads of source; "
        f"choose one of {possible}$"
    )
    with pytest.raises(HeadCountError, match=message):
        uptrain.convert(folder, tmp_path / "target", wanted)


def test_weights_of_other_layers_than_the_config_names_are_refused(
    copy: Path, tmp_path: Path
) -> None:
    # Else their KV heads would be copied as they are, beside a config that says otherwise.
    edit_config(copy, num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\."):
        uptrain.convert(copy, tmp_path / "target", 2)


@pytest.mark.parametrize("method", ["mean", "first", "random"])
def test_a_value_that_is_not_finite_is_named(copy: Path, tmp_path: Path, method: str) -> None:
    state = load(copy)
    state["model.layers.1.self_attn.k_proj.weight"][-1, 3] = float("nan")
    store(state, copy)
    message = r"model\.safetensors: tensor model\.layers\.1\.self_attn\.k_proj\.weight has NaN"
    with pytest.raises(CheckpointError, match=message):
        uptrain.convert(copy, tmp_path / "target", 2, method=method)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_disk_that_is_too_small_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 0, 400_000))
    with pytest.raises(CheckpointError, match=r"target: needs .*, its disk has .* free; make room"):
        uptrain.convert(source, tmp_path / "new" / "target", 4, dry_run=True)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_counts_as_free(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "target.uptrain-staging").mkdir()
    (tmp_path / "target.uptrain-staging" / "model.safetensors").write_bytes(bytes(600_000))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 0, 100_000))
    uptrain.convert(source, tmp_path / "target", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_dry_run_writes_nothing(copy: Path, tmp_path: Path) -> None:
    shutil.copy(copy / "model.safetensors", copy / "model.ckpt")
    with pytest.raises(OptionError, match=r"^encoder: .* is no encoder-decoder; leave it out$"):
        uptrain.convert(copy, tmp_path / "new" / "target", 2, encoder=True)
    result = uptrain.convert(copy, tmp_path / "new" / "target", 2, dry_run=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert result["num_key_value_heads"] == {"source": 4, "target": 2}
    assert result["kv_cache_bytes_per_token"] == {"source": 2048, "target": 1024}
    assert result["left_out"] == ["model.ckpt"]
    weights = uptrain.convert(copy, tmp_path / "target", 2)["weight_bytes"]
    assert weights == result["weight_bytes"]
    assert weights["target"] == open_checkpoint(tmp_path / "target").nbytes


def test_a_full_disk_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, left = os.write, 200_000

    def fill(descriptor: int, data: memoryview) -> int:
        nonlocal left
        left -= len(data)
        if left < 0:
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", fill)
    message = r"target: cannot be written \(No space left on device\); make room"
    with pytest.raises(CheckpointError, match=message):
        uptrain.convert(source, tmp_path / "target", 2)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    uptrain.convert(source, tmp_path / "target", 2)


KILLED = """
import os, signal, sys
from uptrain.conversion import convert as module

pool, calls = module.pool_tensor, 0

def pool_tensor(*args, **kwargs):
    global calls
    calls += 1
    if calls == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return pool(*args, **kwargs)

module.pool_tensor = pool_tensor
module.convert(sys.argv[1], sys.argv[2], 2)
"""


def test_a_kill_leaves_no_target(copy: Path, tmp_path: Path) -> None:
    before = digests(copy)
    target = tmp_path / "target"
    killed = subprocess.run([sys.executable, "-c", KILLED, copy, target], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not target.exists()
    assert (tmp_path / "target.uptrain-staging" / "model.safetensors").exists()
    assert digests(copy) == before
    uptrain.convert(copy, target, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]
    uptrain.convert(copy, tmp_path / "wanted", 2)
    assert digests(target) == digests(tmp_path / "wanted")


def test_two_processes_to_one_target(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "uptrain", "convert", source, tmp_path / "target"]
    command += ["--num-key-value-heads", "2"]
    running = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    errors = [process.communicate()[1] for process in running]
    assert sorted(process.returncode for process in running) == [0, 1]
    assert ("exists already" in "".join(errors)) or ("another process is" in "".join(errors))
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    uptrain.convert(source, tmp_path / "wanted", 2)
    assert digests(tmp_path / "target") == digests(tmp_path / "wanted")


@pytest.mark.parametrize("suffix", ["", ".uptrain-staging", ".uptrain-replaced"])
def test_the_source_is_never_taken_for_litter(copy: Path, tmp_path: Path, suffix: str) -> None:
    source = copy.rename(tmp_path / f"target{suffix}")
    before = digests(source)
    with pytest.raises(CheckpointError, match=r"choose another target"):
        uptrain.convert(source, tmp_path / "target", 2, overwrite=True)
    assert digests(source) == before


@pytest.fixture(autouse=True)
def _no_bars() -> Iterator[None]:
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
