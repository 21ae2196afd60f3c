"""View the rows of a tensor as heads, and put heads back into rows."""

import torch

from uptrain.families.schema import Heads, Layout


def split_heads(
    tensor: torch.Tensor, layout: Layout, heads: Heads
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """View a tensor of one layer as heads.

    Args:
        tensor: [rows, ...] in the given layout.
        layout: How its rows are ordered.
        heads: The head counts that the tensor was written for.

    Returns:
        The query heads [H, d, ...] (None in a tensor that holds none), and the tensors of key/value
        heads [K, rows of one head, ...] in the order of the layout: one, or keys and values.
    """
    H, K = heads.num_attention_heads, heads.num_key_value_heads
    tail = tensor.shape[1:]
    if layout is Layout.COLUMNS:
        return split_heads(tensor.movedim(-1, 0), Layout.CONCATENATED, heads)
    if layout not in (Layout.CONCATENATED, Layout.GROUPED):
        return None, [tensor.reshape(K, tensor.shape[0] // K, *tail)]
    d = tensor.shape[0] // (H + 2 * K)
    if layout is Layout.CONCATENATED:
        q, k, v = tensor.split([H * d, K * d, K * d])
        return q.reshape(H, d, *tail), [k.reshape(K, d, *tail), v.reshape(K, d, *tail)]
    grouped = tensor.reshape(K, H // K + 2, d, *tail)
    return grouped[:, :-2].reshape(H, d, *tail), [grouped[:, -2], grouped[:, -1]]


def join_heads(
    query: torch.Tensor | None, key_value: list[torch.Tensor], layout: Layout
) -> torch.Tensor:
    """Put heads back into rows; the inverse of `split_heads` for the same layout and counts.

    Args:
        query: [H, d, ...], or None where the layout holds no queries.
        key_value: Tensors [K, rows of one head, ...], as `split_heads` gives them.
        layout: The order of rows to produce.

    Returns:
        [rows, ...].
    """
    if layout is Layout.COLUMNS:
        return join_heads(query, key_value, Layout.CONCATENATED).movedim(0, -1).contiguous()
    if layout not in (Layout.CONCATENATED, Layout.GROUPED):
        return key_value[0].flatten(0, 1)
    assert query is not None
    key, value = key_value
    if layout is Layout.CONCATENATED:
        return torch.cat([query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)])
    K = key.shape[0]
    grouped = query.reshape(K, query.shape[0] // K, *query.shape[1:])
    return torch.cat([grouped, key[:, None], value[:, None]], dim=1).flatten(0, 2)
