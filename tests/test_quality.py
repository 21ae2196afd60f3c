"""Evaluation against direct computations with transformers and dense formulas in float64."""

import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from uptrain.errors import CheckpointError, DataError, UnsupportedFamilyError, UptrainError
from uptrain.evaluation import decode, tally
from uptrain.evaluation.quality import evaluate

VOCABULARY = 260
CONTEXT = 16
TEXTS = ["Ein Text über Köpfe.", "and another one, in plain letters", "μῆνιν ἄειδε θεά " * 6]


def save_tokenizer(folder: Path, bos: bool = True) -> None:
    """A tokenizer of bytes: token i is byte i, 256 is bos."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    by_byte = {letter: number for number, letter in enumerate(letters)}
    core = Tokenizer(models.BPE(vocab=by_byte, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>"} if bos else {}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)


def make_model(folder: Path, seed: int = 0, **overrides: object) -> Path:
    torch.manual_seed(seed)
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.3,
        "bos_token_id": 256,
        "dtype": "bfloat16",
    }
    model = LlamaForCausalLM(LlamaConfig(**{**options, **overrides})).to(torch.bfloat16)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "one")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "two", seed=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return path


def stream() -> list[int]:
    """The stream by hand: 256 before each text, then its bytes in the alphabet's order."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    order = {letter: number for number, letter in enumerate(sorted(letters))}
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return [
        token
        for text in TEXTS
        for token in [256, *(order[c] for piece, _ in pre.pre_tokenize_str(text) for c in piece)]
    ]


def log_probs(
    folder: Path, blocks: int, length: int = CONTEXT
) -> tuple[torch.Tensor, torch.Tensor]:
    """All log-probabilities of the first blocks, block by block, and the labels; float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokens = torch.tensor(stream())
    rows = []
    with torch.no_grad():
        for i in range(blocks):
            logits = model(tokens[i * length : (i + 1) * length][None]).logits[0]
            rows.append(logits.log_softmax(-1))
    return torch.cat(rows), tokens[1 : blocks * length + 1]


def test_loss_equals_a_direct_computation(model: Path, data: Path) -> None:
    blocks = (len(stream()) - 1) // CONTEXT
    dense, labels = log_probs(model, blocks)
    expected = -dense.gather(-1, labels[:, None]).mean().item()
    result = evaluate(model, data, device="cpu")
    assert result["tokens"] == blocks * CONTEXT
    assert result["loss"] == pytest.approx(expected, abs=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert set(result) == {
        "model", "loss", "perplexity", "bits_per_byte", "tokens", "documents", "parameters",
        "num_key_value_heads", "kv_cache_bytes_per_token", "data", "sequence_length", "device",
        "dtype", "by_position", "by_document",
    }  # fmt: skip


def test_bits_per_byte_counts_the_text_without_special_tokens(model: Path, data: Path) -> None:
    result = evaluate(model, data, device="cpu")
    predicted = stream()[1 : result["tokens"] + 1]
    text_bytes = sum(token != 256 for token in predicted)
    assert text_bytes < result["tokens"]
    bits = result["loss"] * result["tokens"] / math.log(2)
    assert result["bits_per_byte"] == pytest.approx(bits / text_bytes, rel=1e-12)


def test_comparison_equals_dense_formulas(model: Path, other: Path, data: Path) -> None:
    blocks = (len(stream()) - 1) // CONTEXT
    student, labels = log_probs(model, blocks)
    teacher, _ = log_probs(other, blocks)
    result = evaluate(model, data, reference=other, device="cpu")
    kl = (teacher.exp() * (teacher - student)).sum(-1).mean().item()
    agreement = (teacher.argmax(-1) == student.argmax(-1)).double().mean().item()
    reference_loss = -teacher.gather(-1, labels[:, None]).mean().item()
    assert result["kl"] == pytest.approx(kl, rel=1e-5)
    assert result["kl"] > 0
    assert result["top1_agreement"] == agreement
    assert result["reference_loss"] == pytest.approx(reference_loss, abs=1e-5)
    alone = evaluate(other, data, device="cpu")
    for key in ("loss", "perplexity", "bits_per_byte"):
        assert result[f"reference_{key}"] == pytest.approx(alone[key], rel=1e-6)
    assert result["loss_increase"] == result["loss"] - result["reference_loss"]
    assert result["reference"] == other.name
    assert result["reference_parameters"] == result["parameters"]


def test_a_model_is_no_distance_from_itself(model: Path, data: Path) -> None:
    result = evaluate(model, data, reference=model, device="cpu")
    assert result["kl"] == 0
    assert result["top1_agreement"] == 1
    assert result["loss_increase"] == 0


def test_a_constant_output_has_the_loss_of_a_uniform_guess(tmp_path: Path, data: Path) -> None:
    folder = make_model(tmp_path / "zero")
    blank = AutoModelForCausalLM.from_pretrained(folder)
    blank.lm_head.weight.data.zero_()
    blank.save_pretrained(folder)
    assert evaluate(folder, data)["loss"] == pytest.approx(math.log(VOCABULARY), abs=1e-6)


def test_no_more_text_is_read_than_is_needed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("uptrain.data.encoding._BATCH_CHARACTERS", 100)
    path = tmp_path / "long.jsonl"
    path.write_text(
        (json.dumps({"text": "a" * 100}) + "\n") * 4 + "this line is not JSON\n", encoding="utf-8"
    )
    assert evaluate(model, path, max_tokens=32)["tokens"] == 32


def test_tied_parameters_count_once(tmp_path: Path, data: Path) -> None:
    tied = make_model(tmp_path / "tied", tie_word_embeddings=True)
    apart = make_model(tmp_path / "apart", tie_word_embeddings=False)
    counts = [evaluate(folder, data)["parameters"] for folder in (tied, apart)]
    assert counts[1] - counts[0] == VOCABULARY * 32


def test_cache_bytes_and_heads(model: Path, data: Path) -> None:
    result = evaluate(model, data)
    assert result["num_key_value_heads"] == 2
    assert result["kv_cache_bytes_per_token"] == 2 * 2 * 2 * 8 * 2  # k v, layers, heads, dim, bf16


def test_result_is_left_in_output(model: Path, data: Path, tmp_path: Path) -> None:
    result = evaluate(model, data, output=tmp_path / "new" / "folder")
    written = tmp_path / "new" / "folder" / "evaluation.json"
    assert json.loads(written.read_text()) == result
    assert list(written.parent.iterdir()) == [written]
    with pytest.raises(
        UptrainError, match=r"cannot take the result \(.*\); choose another --output"
    ):
        evaluate(model, data, output=written)


def test_nothing_is_printed_to_standard_output(
    model: Path, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    evaluate(model, data)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_pickled_weights_are_evaluated_alike(model: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    state = AutoModelForCausalLM.from_pretrained(model).state_dict()
    torch.save(state, folder / "pytorch_model.bin")
    assert evaluate(folder, data)["loss"] == evaluate(model, data)["loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"sequence_length": 17},
            "sequence_length=17: one was made for 16 tokens; choose --sequence-length 16 or less",
        ),
        ({"sequence_length": 0}, "sequence_length=0: expected at least 1 token"),
        (
            {"max_tokens": 15},
            "max_tokens=15: expected at least one block of 16 tokens; raise --max-tokens or lower "
            "--sequence-length",
        ),
    ],
)
def test_impossible_lengths(model: Path, data: Path, options: dict, message: str) -> None:
    with pytest.raises(DataError) as error:
        evaluate(model, data, **options)
    assert str(error.value) == message


def test_text_without_token(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.write_text("")
    with pytest.raises(DataError) as error:
        evaluate(model, path)
    assert str(error.value) == f"{path}: its text has no token; expected text to predict"


def test_text_shorter_than_a_block(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("short")
    with pytest.raises(DataError) as error:
        evaluate(model, path)
    assert str(error.value) == (
        f"{path}: has 6 tokens, expected at least 17 to fill one block; "
        "give more text, or choose a --sequence-length below 6"
    )
    assert evaluate(model, path, sequence_length=5)["tokens"] == 5


def test_no_tokenizer(model: Path, data: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    with pytest.raises(CheckpointError) as error:
        evaluate(tmp_path, data)
    assert str(error.value) == (
        f"{tmp_path}: has no tokenizer; copy tokenizer.json and tokenizer_config.json of the "
        "original checkpoint into it"
    )


def test_reference_with_another_vocabulary(model: Path, data: Path, tmp_path: Path) -> None:
    wider = make_model(tmp_path / "wider", vocab_size=VOCABULARY + 4)
    with pytest.raises(CheckpointError) as error:
        evaluate(model, data, reference=wider)
    assert str(error.value) == (
        f"{wider}: the reference has a vocabulary of 264 tokens, one one of 260; only models with "
        "one tokenizer can be compared token by token"
    )
    foreign = make_model(tmp_path / "foreign")
    save_tokenizer(foreign, bos=False)
    with pytest.raises(CheckpointError, match="the reference has other tokens than one; only"):
        evaluate(model, data, reference=foreign)


def test_tokenizer_wider_than_the_model(tmp_path: Path, data: Path) -> None:
    narrow = make_model(tmp_path / "narrow", vocab_size=200, bos_token_id=None)
    with pytest.raises(CheckpointError) as error:
        evaluate(narrow, data)
    assert str(error.value) == (
        f"{narrow}: its tokenizer gives token 256, its vocabulary has 200; "
        "take the tokenizer files of the original checkpoint"
    )


def edit_config(folder: Path, **changes: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_weights_that_do_not_fit_the_config(tmp_path: Path, data: Path) -> None:
    folder = edit_config(make_model(tmp_path / "a"), num_key_value_heads=4)
    with pytest.raises(CheckpointError) as error:
        evaluate(folder, data)
    assert str(error.value) == (
        f"{folder}: tensor model.layers.0.self_attn.k_proj.weight is [16, 32], LlamaForCausalLM "
        "expects [32, 32] by its config.json; weights and config belong to different checkpoints"
    )
    folder = edit_config(make_model(tmp_path / "b"), num_hidden_layers=3)
    with pytest.raises(CheckpointError) as error:
        evaluate(folder, data)
    assert str(error.value) == (
        f"{folder}: lacks tensor model.layers.2.input_layernorm.weight and 8 more, which "
        "LlamaForCausalLM expects; weights and config.json belong to different checkpoints"
    )
    folder = edit_config(make_model(tmp_path / "c"), num_hidden_layers=1)
    with pytest.raises(CheckpointError) as error:
        evaluate(folder, data)
    assert str(error.value) == (
        f"{folder}: holds tensor model.layers.1.input_layernorm.weight and 8 more, which "
        "LlamaForCausalLM does not know; weights and config.json belong to different checkpoints"
    )


def test_class_is_the_causal_one_whatever_architectures_says(tmp_path: Path, data: Path) -> None:
    folder = make_model(tmp_path / "a")
    expected = evaluate(folder, data)["loss"]
    for names in (["LlamaModel"], ["AutoModel"], ["os"], None, ["MistralForCausalLM"]):
        assert evaluate(edit_config(folder, architectures=names), data)["loss"] == expected


def test_attention_kernel_named_in_config_is_not_fetched(tmp_path: Path, data: Path) -> None:
    folder = make_model(tmp_path / "a")
    expected = evaluate(folder, data)["loss"]
    edit_config(folder, attn_implementation="some-owner/some-kernel")
    assert evaluate(folder, data)["loss"] == expected


def test_unknown_and_unsuitable_architectures(tmp_path: Path, data: Path) -> None:
    folder = edit_config(make_model(tmp_path / "a"), model_type="no-such-model")
    with pytest.raises(UnsupportedFamilyError, match="no-such-model: is not a model type"):
        evaluate(folder, data)
    folder = edit_config(make_model(tmp_path / "b"), model_type="t5")
    with pytest.raises(UnsupportedFamilyError) as error:
        evaluate(folder, data)
    assert str(error.value) == (
        f"{folder}: t5 is an encoder-decoder; expected a model that continues a text"
    )


def test_loss_that_is_not_finite(tmp_path: Path, data: Path) -> None:
    folder = make_model(tmp_path / "nan")
    broken = AutoModelForCausalLM.from_pretrained(folder)
    broken.model.embed_tokens.weight.data[256] = math.nan
    broken.save_pretrained(folder)
    with pytest.raises(UptrainError) as error:
        evaluate(folder, data)
    assert str(error.value) == (
        "the loss of the model is nan at token 0 of block 0, expected a finite number; the weights "
        "are damaged, or their dtype overflows (then evaluate with --dtype float32)"
    )


def test_no_such_device(model: Path, data: Path) -> None:
    with pytest.raises(
        UptrainError, match="device abacus: not available here; expected one of cpu"
    ):
        evaluate(model, data, device="abacus")


def test_bfloat16_is_another_arithmetic_and_float32_that_of_a_cpu(model: Path, data: Path) -> None:
    plain, exact, coarse = (
        evaluate(model, data, device="cpu", dtype=name) for name in ("auto", "float32", "bfloat16")
    )
    assert exact == plain
    assert (plain["dtype"], coarse["dtype"]) == ("float32", "bfloat16")
    # Logits of bfloat16 have 8 bits: far from equal, and not far.
    assert 1e-7 < abs(coarse["loss"] - plain["loss"]) < 0.05
    with pytest.raises(UptrainError, match="dtype=int8: expected auto, float32 or bfloat16"):
        evaluate(model, data, dtype="int8")


def test_float32_is_not_rounded_to_tf32(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    stock = tally.score

    def spy(*args: object) -> object:
        seen.append(torch.get_float32_matmul_precision())
        return stock(*args)

    monkeypatch.setattr(tally, "score", spy)
    torch.set_float32_matmul_precision("high")
    try:
        evaluate(model, data, device="cpu")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {"highest"}


def test_long_context_measures_whole_contexts(model: Path, data: Path) -> None:
    result = evaluate(model, data, device="cpu", sequence_length=4, max_tokens=8, long_context=True)
    whole = evaluate(model, data, device="cpu", max_tokens=CONTEXT)
    assert (result["tokens"], result["long_context"]["tokens"]) == (8, CONTEXT)
    assert result["long_context"]["sequence_length"] == CONTEXT
    assert result["long_context"]["loss"] == pytest.approx(whole["loss"], abs=1e-6)
    assert result["long_context"]["by_position"] == whole["by_position"]
    again = evaluate(model, data, device="cpu", long_context=True)
    assert again["long_context"]["by_position"] == again["by_position"]


def test_intervals_hold_what_was_measured(model: Path, other: Path, tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    texts = [f"document {i} says {i * i} and {i**3}" for i in range(12)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    result = evaluate(model, path, reference=other, device="cpu")
    assert result["documents"] == 12
    assert set(result["intervals"]) == {
        "loss", "reference_loss", "loss_increase", "kl", "top1_agreement",
    }  # fmt: skip
    for key, (low, high) in result["intervals"].items():
        assert low <= result[key] <= high
    low, high = result["intervals"]["loss_increase"]
    assert (result["loss_increase_p"] > 0.05) == (low < 0 < high)
    same = evaluate(model, path, reference=model, device="cpu")
    assert same["loss_increase_p"] == 1
    assert same["intervals"]["loss_increase"] == [0, 0]


def test_everything_else_is_asked_for(
    model: Path, other: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "_ROUND_SECONDS", 0)
    result = evaluate(
        model,
        data,
        reference=other,
        device="cpu",
        copying=True,
        continuations=True,
        decode=True,
        decode_batches=[1],
        decode_contexts=[CONTEXT],
    )
    assert [row["distance"] for row in result["copying"]] == [8]
    assert len(result["continuations"]["prompts"]) == 5
    assert [row["model"] for row in result["decode"]] == ["target", "reference"]
    assert result["decode_conditions"]["dtype"] == "float32"
    assert json.loads(json.dumps(result)) is not None
