"""A step on a full static cache against a stock forward over the whole context."""

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.llama import modeling_llama

from uptrain.errors import UptrainError
from uptrain.evaluation import full_batch
from uptrain.evaluation.full_batch import (
    FullBatch,
    cache_bytes,
    compiled_parts,
    unmasked_steps,
)

CONTEXT, VOCABULARY = 24, 64
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


def llama(**overrides: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **overrides})).eval()


def sliding() -> Gemma3ForCausalLM:
    torch.manual_seed(0)
    layers = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**SHAPE, sliding_window=8, layer_types=layers)
    return Gemma3ForCausalLM(config).eval()


def fill(model: torch.nn.Module, batch: int) -> FullBatch:
    full = FullBatch(model, batch, CONTEXT)
    full.prefill()
    full.widen()
    return full


@pytest.mark.parametrize("heads", [4, 2, 1])
@torch.inference_mode()
def test_a_step_is_the_last_of_a_whole_forward_however_often(heads: int) -> None:
    model = llama(num_key_value_heads=heads)
    with unmasked_steps():
        full = fill(model, 3)
        found = []
        for _ in range(3):
            full.step()
            found.append(full.logits.clone())
    expected = model(full.tokens).logits[:, -1]
    for logits in found:  # sums of float32 in another order
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(expected[0], expected[1])


@torch.inference_mode()
def test_a_large_batch_repeats_what_was_prefilled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(full_batch._PREFILL_TOKENS, "cpu", 2 * CONTEXT)
    model = llama()
    with unmasked_steps():
        full = fill(model, 6)
        full.step()
    assert (full.prefill_batch, full.batch) == (2, 6)
    expected = model(full.tokens).logits[:, -1].repeat_interleave(3, 0)
    torch.testing.assert_close(full.logits, expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_windows_that_slide_do_not_move_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sliding()
    with unmasked_steps():
        full = fill(model, 2)
        shapes = [layer.keys.shape[2] for layer in full.cache.layers]
        for _ in range(3):
            full.step()
    assert shapes == [8, CONTEXT]
    assert int(full.cache.layers[1].cumulative_length) == CONTEXT - 1
    assert full.cache.layers[0].cumulative_length_int == CONTEXT - 1


@torch.inference_mode()
def test_steps_have_no_mask_and_prefills_keep_theirs() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS

    before = MASKS["sdpa"]
    with unmasked_steps():
        assert MASKS["sdpa"](batch_size=1, q_length=1, kv_length=5) is None
        mask = MASKS["sdpa"](
            batch_size=1, q_length=3, kv_length=5, allow_is_causal_skip=False, device="cpu"
        )
        assert mask.shape[-2:] == (3, 5)
    assert MASKS["sdpa"] is before


@torch.inference_mode()
def test_cache_bytes_are_those_of_the_tensors() -> None:
    # keys and values, layers, heads, head size, float32
    assert cache_bytes(llama(), CONTEXT) == 2 * 2 * 2 * 8 * 4 * CONTEXT
    assert cache_bytes(llama(num_key_value_heads=1), CONTEXT) == 2 * 2 * 1 * 8 * 4 * CONTEXT
    assert cache_bytes(sliding(), CONTEXT) == 2 * 2 * 8 * 4 * (CONTEXT + 8)
    cache = DynamicCache()
    llama()(torch.zeros(1, CONTEXT, dtype=torch.int64), past_key_values=cache, use_cache=True)
    grown = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(llama(), CONTEXT) == grown


def test_a_model_without_a_static_cache_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()

    def refuse(**_: object) -> None:
        raise ValueError("no such cache")

    monkeypatch.setattr(model, "forward", refuse)
    with pytest.raises(UptrainError) as error:
        cache_bytes(model, CONTEXT)
    assert str(error.value) == (
        "llama: cannot decode from a static cache (no such cache); leave out --decode"
    )


@pytest.mark.gpu
@torch.inference_mode()
def test_a_graph_does_what_the_step_does() -> None:
    model = llama(num_key_value_heads=1).to("cuda", torch.bfloat16)
    with unmasked_steps():
        full = fill(model, 4)
        full.step()
        eager = full.logits.float().clone()
        full.capture()
        assert full.is_graph
        for _ in range(3):
            full.step()
        torch.cuda.synchronize()
    # Compiled, what is between two matrices is not rounded to bfloat16's 8 bits at every operation.
    torch.testing.assert_close(full.logits.float(), eager, rtol=5e-2, atol=0.1)
    places = [int(layer.cumulative_length) for layer in full.cache.layers]
    assert places == [CONTEXT - 1] * 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit")  # of the compiler itself
@torch.inference_mode()
def test_compiled_parts_do_what_the_stock_ones_do() -> None:
    rotary = modeling_llama.apply_rotary_pos_emb
    for heads in (2, 1):
        model = llama(num_key_value_heads=heads)
        with unmasked_steps():
            full = fill(model, 4)
            full.step()
            stock = full.logits
            with compiled_parts(model):
                for _ in range(2):
                    full.step()
        # Fused sums round in another order.
        torch.testing.assert_close(full.logits, stock, rtol=1e-5, atol=1e-5)
        assert not any("forward" in vars(module) for module in model.modules())
        assert modeling_llama.apply_rotary_pos_emb is rotary
