"""Grouped-query attention for transformers models that have none of their own.

`GQA` before the name of a stock class, as in `GQAT5ForConditionalGeneration` or `GQAT5Config`, is that
class with `num_key_value_heads` heads for the keys and values of its attention, each shared by
consecutive query heads. In an encoder-decoder these are the decoder's attention to itself and to the
encoder; the encoder's own has `encoder_num_key_value_heads`. Without these numbers it is the stock
class, and everything else, the names of the weights included, is the stock class's anyway.

Written by uptrain (Apache-2.0), which copies this file beside the weights of checkpoints that need it.
For transformers 5, and 4.57.
"""

import functools
from typing import Any

import torch
import transformers
from torch import nn

_VERSION_5 = int(transformers.__version__.split(".")[0]) >= 5


class GroupedQueryAttention:
    """Replaces the forward of BartAttention and its copies in Marian, Whisper, OPT and others."""

    key_name, value_name = "k_proj", "v_proj"

    def keep_heads(self, config: Any, count: int) -> None:
        """Cut the projections of keys and values down to `count` heads."""
        self.config = config
        self.num_key_value_groups = self.num_heads // count
        _keep_outputs(getattr(self, self.key_name), count * self.head_dim)
        _keep_outputs(getattr(self, self.value_name), count * self.head_dim)

    def forward(
        self,
        hidden_states,
        key_value_states=None,
        past_key_values=None,
        attention_mask=None,
        output_attentions=False,
        **kwargs,
    ):
        query = self.split_heads(self.q_proj(hidden_states))
        key, value = self.keys_and_values(hidden_states, key_value_states, past_key_values, kwargs)
        dropout = self.dropout if self.training else 0.0
        output, weights = self.attend(
            query, key, value, attention_mask, self.scaling, dropout, **kwargs
        )
        return self.out_proj(output), weights

    def keys_and_values(self, hidden_states, key_value_states, cache, kwargs):
        """Of this text, or of the encoder's output, computed once; [batch, heads, length, head_dim]."""
        is_cross, own, states = key_value_states is not None, cache, hidden_states
        position = kwargs.pop("cache_position", None)
        if isinstance(cache, transformers.EncoderDecoderCache):
            own = cache.cross_attention_cache if is_cross else cache.self_attention_cache
        if is_cross:
            position, states = None, key_value_states
            if own is not cache and cache.is_updated.get(self.layer_idx):
                return own.layers[self.layer_idx].keys, own.layers[self.layer_idx].values
        key = self.split_heads(getattr(self, self.key_name)(states))
        value = self.split_heads(getattr(self, self.value_name)(states))
        if is_cross and own is not cache:
            cache.is_updated[self.layer_idx] = True
        return self.remember(key, value, own, position)

    def remember(self, key, value, cache, position):
        """Put them into the cache, with as many heads as they have."""
        if cache is None:
            return key, value
        more = () if position is None else ({"cache_position": position},)  # transformers 4
        return cache.update(key, value, self.layer_idx, *more)

    def split_heads(self, states):
        """From [batch, length, heads × head_dim]."""
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def attend(self, query, key, value, mask, scaling, dropout, **kwargs):
        """By transformers' own functions, which heed `num_key_value_groups`, or eagerly."""
        for name in ("head_mask", "layer_head_mask"):  # transformers 4
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"{name} is not supported by grouped-query attention")
        name = self.config._attn_implementation or "eager"
        if name != "eager":
            function = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS[name]
            output, weights = function(
                self, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
            )
            return output.flatten(2), weights
        key = key.repeat_interleave(self.num_key_value_groups, dim=1)
        value = value.repeat_interleave(self.num_key_value_groups, dim=1)
        scores = query @ key.mT * scaling
        if mask is not None:
            scores = scores + mask[..., : key.shape[-2]]
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights = scores.softmax(-1, dtype=wide).to(query.dtype)
        weights = nn.functional.dropout(weights, dropout, self.training)
        return (weights @ value).transpose(1, 2).flatten(2), weights


class GroupedQueryT5Attention(GroupedQueryAttention):
    """Replaces the forward of T5Attention: no scaling, and a bias by relative position."""

    key_name, value_name = "k", "v"

    def keep_heads(self, config: Any, count: int) -> None:
        self.num_heads, self.head_dim = self.n_heads, self.key_value_proj_dim
        super().keep_heads(config, count)

    def forward(
        self,
        hidden_states,
        mask=None,
        key_value_states=None,
        position_bias=None,
        past_key_values=None,
        output_attentions=False,
        **kwargs,
    ):
        past = past_key_values.get_seq_length(self.layer_idx) if past_key_values is not None else 0
        past = past.clone() if isinstance(past, torch.Tensor) else past  # a static cache counts on
        query = self.split_heads(self.q(hidden_states))
        key, value = self.keys_and_values(hidden_states, key_value_states, past_key_values, kwargs)
        if position_bias is None and self.has_relative_attention_bias:
            position_bias = self.relative_bias(query.shape[2], key.shape[2], past)
        if position_bias is not None:
            mask = self.add_mask(position_bias, mask)
        dropout = self.dropout if self.training else 0.0
        output, weights = self.attend(query, key, value, mask, 1.0, dropout, **kwargs)
        outputs = self.o(output), position_bias, weights
        return outputs if _VERSION_5 or output_attentions else outputs[:2]

    def relative_bias(self, queries, keys, past):
        """For `queries` positions behind `past` ones, [1, query heads, queries, keys]."""
        device = self.relative_attention_bias.weight.device
        positions = torch.arange(queries, device=device)[:, None] + past
        buckets = self._relative_position_bucket(
            torch.arange(keys, device=device) - positions,
            bidirectional=not self.is_decoder,
            num_buckets=self.relative_attention_num_buckets,
            max_distance=self.relative_attention_max_distance,
        )
        return self.relative_attention_bias(buckets).permute(2, 0, 1)[None]

    def add_mask(self, bias, mask):
        """Both in one, to be added to the scores."""
        if mask is None and self.is_decoder and bias.shape[2] > 1:  # left to the shape
            mask = torch.ones(bias.shape[2:], dtype=torch.bool, device=bias.device).tril()
        if mask is None:
            return bias
        if mask.dtype == torch.bool:
            return bias.masked_fill(~mask, torch.finfo(bias.dtype).min)
        return bias + mask[..., : bias.shape[-1]]


class GroupedQueryBertAttention(GroupedQueryAttention):
    """Replaces the forward of BertSelfAttention and its copies; the output projection lies outside."""

    key_name, value_name = "key", "value"

    def keep_heads(self, config: Any, count: int) -> None:
        self.num_heads, self.head_dim = self.num_attention_heads, self.attention_head_size
        self.scaling, self.is_causal = self.head_dim**-0.5, self.is_decoder
        super().keep_heads(config, count)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, **kwargs):
        _only_itself(kwargs)
        query = self.split_heads(self.query(hidden_states))
        key, value = self.keys_and_values(hidden_states, None, past_key_values, kwargs)
        dropout = self.dropout.p if self.training else 0.0
        return self.attend(query, key, value, attention_mask, self.scaling, dropout, **kwargs)


class GroupedQueryGPT2Attention(GroupedQueryAttention):
    """Replaces the forward of GPT2Attention: queries, keys and values come from one projection."""

    def keep_heads(self, config: Any, count: int) -> None:
        self.config = config
        self.num_key_value_groups = self.num_heads // count
        self.split_size = [self.embed_dim, count * self.head_dim, count * self.head_dim]
        self.scaling = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        if self.scale_attn_by_inverse_layer_idx:
            self.scaling /= self.layer_idx + 1
        _keep_outputs(self.c_attn, sum(self.split_size))

    def forward(self, hidden_states, past_key_values=None, attention_mask=None, **kwargs):
        _only_itself(kwargs)
        query, key, value = map(
            self.split_heads, self.c_attn(hidden_states).split(self.split_size, -1)
        )
        key, value = self.remember(key, value, past_key_values, kwargs.pop("cache_position", None))
        dropout = self.attn_dropout.p if self.training else 0.0
        output, weights = self.attend(
            query, key, value, attention_mask, self.scaling, dropout, **kwargs
        )
        return self.resid_dropout(self.c_proj(output)), weights


class GroupedQueryModel:
    """Gives the attention modules of a stock model fewer key/value heads once it is built."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        for module in self.modules():
            if (attention := _attention_class(type(module))) is None:
                continue
            is_encoder = hasattr(config, "encoder_num_key_value_heads") and not module.is_decoder
            count = config.encoder_num_key_value_heads if is_encoder else config.num_key_value_heads
            if count is not None:
                module.__class__ = attention
                module.keep_heads(config, count)


ATTENTION = {
    "BartAttention": GroupedQueryAttention,
    "BertSelfAttention": GroupedQueryBertAttention,
    "BlenderbotAttention": GroupedQueryAttention,
    "BlenderbotSmallAttention": GroupedQueryAttention,
    "CamembertSelfAttention": GroupedQueryBertAttention,
    "ElectraSelfAttention": GroupedQueryBertAttention,
    "GPT2Attention": GroupedQueryGPT2Attention,
    "M2M100Attention": GroupedQueryAttention,
    "MBartAttention": GroupedQueryAttention,
    "MT5Attention": GroupedQueryT5Attention,
    "MarianAttention": GroupedQueryAttention,
    "OPTAttention": GroupedQueryAttention,
    "PLBartAttention": GroupedQueryAttention,
    "PegasusAttention": GroupedQueryAttention,
    "RobertaSelfAttention": GroupedQueryBertAttention,
    "T5Attention": GroupedQueryT5Attention,
    "WhisperAttention": GroupedQueryAttention,
    "XLMRobertaSelfAttention": GroupedQueryBertAttention,
}
"""Stock attention classes, and what replaces their forward."""


@functools.cache
def _attention_class(stock: type) -> type | None:
    for base in stock.__mro__:  # transformers 4 has subclasses for sdpa
        if base.__name__ in ATTENTION:
            return type(f"GQA{stock.__name__}", (ATTENTION[base.__name__], stock), {})
    return None


def _keep_outputs(projection: nn.Module, count: int) -> None:
    """Keep the first outputs of a linear layer, or of GPT-2's transposed one."""
    columns = not isinstance(projection, nn.Linear)
    weight = projection.weight[:, :count] if columns else projection.weight[:count]
    projection.weight = nn.Parameter(weight.detach().clone())
    if projection.bias is not None:
        projection.bias = nn.Parameter(projection.bias[:count].detach().clone())
    setattr(projection, "nf" if columns else "out_features", count)


def _only_itself(kwargs: dict[str, Any]) -> None:
    kwargs.pop("output_attentions", None)
    for name in ("encoder_hidden_states", "encoder_attention_mask"):
        if kwargs.pop(name, None) is not None:
            raise ValueError("attention to another model has no grouped-query form here")


@functools.cache
def grouped(stock: type) -> type:
    """Make the grouped-query version of a stock model or config class."""
    names = {"__module__": __name__, "__qualname__": f"GQA{stock.__name__}"}
    if not issubclass(stock, transformers.PretrainedConfig):
        names["config_class"] = grouped(stock.config_class)
        return type(f"GQA{stock.__name__}", (GroupedQueryModel, stock), names)
    keys = ["num_key_value_heads"]
    if stock().is_encoder_decoder:
        keys.append("encoder_num_key_value_heads")
    names |= dict.fromkeys(keys)
    names["__annotations__"] = dict.fromkeys(keys, int | None)
    names["model_type"] = f"gqa_{stock.model_type}"
    # Whisper's makes another name of the query heads from this key.
    names["attribute_map"] = {k: v for k, v in stock.attribute_map.items() if k not in keys}
    return type(f"GQA{stock.__name__}", (stock,), names)


def __getattr__(name: str) -> type:
    stock = (
        getattr(transformers, name.removeprefix("GQA"), None) if name.startswith("GQA") else None
    )
    if stock is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return grouped(stock)
