"""Decode speed: what is reported, against sizes computed by hand and times that are given."""

import pytest
import torch
from test_full_batch import CONTEXT, llama, sliding

from uptrain.errors import DataError
from uptrain.evaluation import bandwidth, decode
from uptrain.evaluation.bandwidth import measure_bandwidth, read_weight_bytes, weight_bytes
from uptrain.evaluation.decode import measure_decode

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_ROUND_SECONDS", 0)
    monkeypatch.setitem(bandwidth._BUFFER_BYTES, "cpu", 2**20)


def test_figures_follow_from_sizes_and_times() -> None:
    models = {"target": llama(num_key_value_heads=1), "reference": llama(num_key_value_heads=4)}
    rows, conditions = measure_decode(models, [1, 2], [CONTEXT])
    assert [(row["batch"], row["model"]) for row in rows] == [
        (1, "target"), (1, "reference"), (2, "target"), (2, "reference"),
    ]  # fmt: skip
    assert conditions["left_out"] == []
    speed = conditions["bandwidth"]["bytes_per_second"]
    for row in rows:
        heads = 1 if row["model"] == "target" else 4
        cached = 2 * 2 * heads * 8 * 4  # keys and values, layers, heads, head size, float32
        assert row["kv_cache_bytes_per_token"] == cached
        read = read_weight_bytes(models[row["model"]]) + row["batch"] * CONTEXT * cached
        assert row["read_bytes_per_step"] == read
        assert (
            row["peak_bytes"]
            == weight_bytes(models[row["model"]]) + row["batch"] * CONTEXT * cached
        )
        assert row["bound_milliseconds"] == pytest.approx(1000 * read / speed)
        milliseconds = sorted(row["milliseconds_by_round"])
        assert len(milliseconds) == 5
        assert row["milliseconds_per_step"] == milliseconds[2] > 0
        assert row["tokens_per_second"] == pytest.approx(1000 * row["batch"] / milliseconds[2])
        assert row["bandwidth_fraction"] == pytest.approx(
            row["bound_milliseconds"] / milliseconds[2]
        )
        assert row["prefill_tokens_per_second"] > 0
        assert (row["interleaved"], row["cuda_graph"]) == (True, False)
    assert rows[1]["speedup"] == 1
    low, high = rows[0]["speedup_range"]
    assert low <= rows[0]["speedup"] <= high


def test_an_embedding_table_is_read_only_where_it_is_the_head() -> None:
    apart, tied = llama(), llama(tie_word_embeddings=True)
    table = 64 * 32 * 4
    assert read_weight_bytes(apart) == weight_bytes(apart) - table
    assert read_weight_bytes(tied) == weight_bytes(tied) == weight_bytes(apart) - table


def test_models_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    models = {"target": llama(), "reference": llama()}
    names = {id(model): name for name, model in models.items()}
    order: list[str] = []
    stock = decode._round

    def spy(batch: object, steps: int) -> float:
        order.append(names[id(batch.model)])
        return stock(batch, steps)

    monkeypatch.setattr(decode, "_round", spy)
    measure_decode(models, [1], [CONTEXT])
    assert order == ["target", "reference"] * 5


def test_what_does_not_fit_is_left_out_and_max_is_what_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = {"target": llama(num_key_value_heads=1), "reference": llama(num_key_value_heads=4)}
    one = 2 * 2 * 8 * 4 * CONTEXT  # bytes of a sequence with one KV head
    monkeypatch.setattr(
        decode, "free_bytes", lambda device: int(12.5 * one / decode._USABLE["cpu"])
    )
    rows, conditions = measure_decode(models, [8, "max"], [CONTEXT])
    found = [(row["model"], row["batch"], row["interleaved"]) for row in rows]
    assert found == [("target", 8, False), ("target", 12, False), ("reference", 3, False)]
    assert conditions["left_out"] == [{"model": "reference", "batch": 8, "context": CONTEXT}]
    # Alone, a model has the place of the other's weights as well.
    others, part = weight_bytes(models["reference"]), decode._USABLE["cpu"]
    alone = int(part * (int(12.5 * one / part) + others))
    assert rows[0]["largest_batch"] == alone // one
    assert rows[1]["speedup"] > 0


def test_memory_that_runs_out_leaves_a_setting_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(decode, "_time", run_out)
    rows, conditions = measure_decode({"target": llama()}, [2], [CONTEXT])
    assert rows == []
    assert conditions["left_out"] == [{"model": "target", "batch": 2, "context": CONTEXT}]


def test_contexts_are_those_of_the_models() -> None:
    rows, _ = measure_decode({"target": llama()}, [1])
    assert [row["context"] for row in rows] == [64]
    assert "speedup" not in rows[0]
    for context in (1, 65):
        with pytest.raises(DataError) as error:
            measure_decode({"target": llama()}, [1], [context])
        assert str(error.value) == (
            f"decode_contexts={context}: expected 2 tokens or more, and 64 at most, what the models "
            "were made for"
        )


def test_windows_that_slide_are_measured() -> None:
    rows, _ = measure_decode({"target": sliding()}, [2], [CONTEXT])
    assert rows[0]["kv_cache_bytes_per_token"] == 2 * 2 * 8 * 4 * (CONTEXT + 8) // CONTEXT


def test_bandwidth_is_what_a_copy_gives() -> None:
    found = measure_bandwidth(CPU)
    assert found["bytes_per_second"] == max(
        found["copy_bytes_per_second"], found["read_bytes_per_second"]
    )
    # No memory is slower than 10 MB/s or faster than 100 TB/s.
    assert all(1e7 < value < 1e14 for value in found.values())


@pytest.mark.gpu
def test_on_a_gpu_steps_are_graphs_below_the_bound() -> None:
    torch.manual_seed(0)
    shape = {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8,
        "num_attention_heads": 16, "head_dim": 128, "max_position_embeddings": 4096,
    }  # fmt: skip
    models = {
        name: llama(**shape, num_key_value_heads=heads).to("cuda", torch.bfloat16)
        for name, heads in (("target", 1), ("reference", 16))
    }
    rows, conditions = measure_decode(models, [8], [4096])
    assert conditions["left_out"] == []
    for row in rows:
        assert row["cuda_graph"]
        # Nothing beats the bandwidth, but for what stays in the caches of the chip.
        assert 0.1 < row["bandwidth_fraction"] < 1.1
        held = 2 * 8 * 128 * 2 * 8 * 4096 * (1 if row["model"] == "target" else 16)
        assert row["peak_bytes"] > weight_bytes(models[row["model"]]) + held
    assert rows[0]["speedup"] > 1.2  # reads 0.4 of the bytes, and the rest takes as long
