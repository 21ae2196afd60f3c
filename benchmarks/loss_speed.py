"""Cross-entropy and KL from hidden states: all logits at once, uptrain's chunks, and Liger's kernels.

    python benchmarks/loss_speed.py [--tokens 8192] [--hidden 2048] [--vocabularies 32000,128256]

Forward and backward of the loss alone, from the hidden states of the last layer to the gradients of
those and of the head, whose float32 weights work in bfloat16 as under autocast. The variants take
turns; times are medians. Liger (`pip install liger-kernel`) is left out where it is not installed; its
fused KL is `LigerFusedLinearJSD` with jsd_beta = 0, the forward KL. Needs a GPU; `--tokens 64` tries it.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from uptrain.evaluation.bandwidth import seconds
from uptrain.training.loss import chunked_loss, even_chunk

ROUNDS = 12

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of hidden states, head, targets, the teacher's hidden states and head: the mean over tokens."""


def dense(
    distils: bool, hidden: Tensor, head: Tensor, targets: Tensor, of: Tensor, teacher: Tensor
) -> Tensor:
    logits = functional.linear(hidden, head).float()
    if not distils:
        return functional.cross_entropy(logits, targets)
    likely = functional.linear(of, teacher).float().log_softmax(-1)
    return functional.kl_div(logits.log_softmax(-1), likely, reduction="batchmean", log_target=True)


def ours(
    distils: bool, hidden: Tensor, head: Tensor, targets: Tensor, of: Tensor, teacher: Tensor
) -> Tensor:
    sums = chunked_loss(
        lambda entering: functional.linear(entering, head),
        hidden[None],
        targets[None],
        [head],
        even_chunk(len(targets), len(head), hidden.device),
        teacher_head=(lambda entering: functional.linear(entering, teacher)) if distils else None,
        teacher_hidden=of[None] if distils else None,
        distillation_weight=float(distils),
        fused=hidden.is_cuda,
    )
    return sums[0] / len(targets)


def liger() -> dict[bool, Loss]:
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD
    except ImportError:
        return {}
    cross_entropy = LigerFusedLinearCrossEntropyLoss()
    divergence = LigerFusedLinearJSD(jsd_beta=0.0)
    return {
        False: lambda hidden, head, targets, of, teacher: cross_entropy(
            head.to(hidden.dtype), hidden, targets
        ),
        True: lambda hidden, head, targets, of, teacher: divergence(
            hidden, head.to(hidden.dtype), of, teacher, None
        ),
    }


def measure(losses: dict[str, Loss], vocabulary: int, tokens: int, width: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    half = partial(torch.randn, device=device, dtype=torch.bfloat16)
    hidden = half(tokens, width).requires_grad_()
    head = (torch.randn(vocabulary, width, device=device) / width**0.5).requires_grad_()
    of_teacher, teacher = half(tokens, width), half(vocabulary, width)
    teacher /= width**0.5
    targets = torch.randint(vocabulary, (tokens,), device=device)
    times: dict[str, list[float]] = {name: [] for name in losses}
    gib, values = {}, {}

    def step(name: str) -> None:
        hidden.grad = head.grad = None
        with torch.autocast(device.type, torch.bfloat16):
            value = losses[name](hidden, head, targets, of_teacher, teacher)
        value.backward()
        values[name] = value.item()

    for _ in range(ROUNDS):
        for name in losses:
            hidden.grad = head.grad = None
            before = 0
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            times[name].append(seconds(partial(step, name), device))
            if device.type == "cuda":
                gib[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
    base = statistics.median(times["dense"][2:])
    for name in losses:
        middle = statistics.median(times[name][2:])
        print(
            f"  {name:<8}{1000 * middle:>9.2f} ms{base / middle:>8.2f} of the dense speed"
            f"{gib.get(name, 0.0):>8.2f} GiB   loss {values[name]:.5f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabularies", default="32000,128256")
    options = parser.parse_args()
    of_liger = liger()
    for vocabulary in map(int, options.vocabularies.split(",")):
        for distils in (False, True):
            losses: dict[str, Loss] = {
                "dense": torch.compile(partial(dense, distils)),
                "ours": partial(ours, distils),
            }
            if distils in of_liger:
                losses["Liger"] = of_liger[distils]
            kind = "KL" if distils else "cross-entropy"
            print(f"{kind}, {options.tokens:,} tokens, vocabulary {vocabulary:,}")
            measure(losses, vocabulary, options.tokens, options.hidden)


if __name__ == "__main__":
    main()
