"""Attention kept inside documents: positions that restart, and a model that heeds them."""

import inspect

import numpy as np
import numpy.typing as npt
import torch

from uptrain.errors import TrainingError

_PROBE_LENGTHS = ((5, 9), (8, 6))  # of two documents in a row of a batch
_SMALL = 0.01


def positions(starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
    """Number the tokens of a block from 0, and again from 0 where a document begins.

    Args:
        starts: Places in the block, [0, length), that documents begin at.
        length: Tokens of the block.

    Returns:
        [length], int64.
    """
    places = np.arange(length)
    begins = np.zeros(length, np.int64)
    begins[starts] = starts
    return places - np.maximum.accumulate(begins)


def check_packing(model: torch.nn.Module) -> None:
    """Refuse a model that looks beyond the documents that its position ids tell apart.

    transformers builds a mask from position ids that restart, but not every family uses it. So
    documents go through the model alone, one behind another, and so with position ids: these must
    undo what the company changes, for every row of a batch.

    Args:
        model: A causal language model, before it is compiled, sharded or wrapped.

    Raises:
        TrainingError: If the model takes no position ids, or they do not keep documents apart.
    """
    refusal = TrainingError(
        f"data.attention_within_documents: {type(model).__name__} does not keep documents apart "
        "by their positions; leave it out"
    )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise refusal
    device = next(model.parameters()).device
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    total = sum(_PROBE_LENGTHS[0])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(rows, (len(_PROBE_LENGTHS), total), generator=generator).to(device)
    restarting = [positions(np.array([first]), total) for first, _ in _PROBE_LENGTHS]
    ids = torch.from_numpy(np.stack(restarting)).to(device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            joined = model(input_ids=tokens, use_cache=False).logits
            packed = model(input_ids=tokens, position_ids=ids, use_cache=False).logits
            for row, (first, _) in enumerate(_PROBE_LENGTHS):
                alone = model(input_ids=tokens[row : row + 1, first:], use_cache=False).logits[0]
                company = (joined[row, first:] - alone).abs().max()
                if not (packed[row, first:] - alone).abs().max() <= _SMALL * company:
                    raise refusal
    finally:
        model.train(was_training)
