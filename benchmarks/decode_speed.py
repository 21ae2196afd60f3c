"""How fast a 7B shape decodes with 32, 8 and 1 KV heads, against what the memory's bandwidth allows.

    python benchmarks/decode_speed.py [--batches 16,max] [--contexts 4096] [--output decode.json]

Random weights of the Llama 2 7B shape in bfloat16, all models in one process and in turns, as
`uptrain evaluate --decode` does it: a static cache, CUDA graphs. Beside it a step of stock transformers
as it comes, eager and with a growing cache. Needs a GPU of 80 GB; `--layers 2 --hidden 256` tries it
anywhere.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from uptrain.evaluation.bandwidth import seconds
from uptrain.evaluation.decode import measure_decode

HEADS = {"MHA-32": 32, "GQA-8": 8, "MQA": 1}
BASELINE = "MHA-32"
STOCK_STEPS = 10


def make_model(kv_heads: int, layers: int, hidden: int, device: torch.device) -> Any:
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,  # 11008 of 4096
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=kv_heads,
        head_dim=hidden // 32,
        max_position_embeddings=8192,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    with device:
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


@torch.inference_mode()
def time_stock(model: Any, batch: int, context: int) -> float:
    """Time a step of stock transformers: eager, with the cache that generate grows; milliseconds."""
    tokens = torch.randint(32000, (batch, context - STOCK_STEPS), device=model.device)
    cache = DynamicCache()
    model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def step() -> None:
        model(input_ids=tokens[:, -1:], past_key_values=cache, use_cache=True)

    step()
    return 1000 * statistics.median(seconds(step, model.device) for _ in range(STOCK_STEPS - 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", default="16")
    parser.add_argument("--contexts", default="4096")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--no-stock", action="store_true")
    parser.add_argument("--output", type=Path, help="Where to leave everything as JSON.")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches: list[Any] = [n if n == "max" else int(n) for n in options.batches.split(",")]
    contexts = [int(n) for n in options.contexts.split(",")]
    models = {
        name: make_model(heads, options.layers, options.hidden, device)
        for name, heads in HEADS.items()
    }
    rows, conditions = measure_decode(models, batches, contexts, baseline=BASELINE)
    for row in () if options.no_stock else rows:
        if row["batch"] in batches:  # as many as fit leave no room for a cache that is copied
            model = models[row["model"]]
            row["stock_milliseconds_per_step"] = time_stock(model, row["batch"], row["context"])
    bandwidth = conditions["bandwidth"]
    print(
        f"{conditions['device']}, {conditions['dtype']}: "
        f"reads {bandwidth['read_bytes_per_second'] / 1e9:,.0f} GB/s, "
        f"copies {bandwidth['copy_bytes_per_second'] / 1e9:,.0f} GB/s"
    )
    print(
        f"{'context':>8}{'batch':>7}{'model':>8}{'ms/step':>9}{'bound':>8}{'of bound':>10}"
        f"{'tokens/s':>10}{'speed-up':>10}{'stock ms':>10}{'GiB':>7}{'graph':>7}"
    )
    for row in rows:
        stock = row.get("stock_milliseconds_per_step")
        print(
            f"{row['context']:>8}{row['batch']:>7}{row['model']:>8}"
            f"{row['milliseconds_per_step']:>9.2f}{row['bound_milliseconds']:>8.2f}"
            f"{row['bandwidth_fraction']:>10.0%}{row['tokens_per_second']:>10,.0f}"
            f"{row['speedup']:>9.2f}×{'' if stock is None else f'{stock:.1f}':>10}"
            f"{row['peak_bytes'] / 2**30:>7.1f}{'yes' if row['cuda_graph'] else 'no':>7}"
        )
    for each in conditions["left_out"]:
        print(f"left out for lack of memory: {each}")
    if options.output:
        options.output.write_text(json.dumps({"decode": rows, "conditions": conditions}, indent=2))


if __name__ == "__main__":
    main()
