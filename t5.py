"""T5 (Raffel et al., 2020), the underlying model of HINT, in torch alone.

A plain encoder-decoder, with places in every layer where weights that are made for one example can be put: a
*prefix*, keys and values that stand before those of the real tokens, and an *adapter* parallel to the feed-forward
layer; and, for what HINT is compared with, LoRA and adapters behind a sublayer. This file knows nothing of the
networks that write them.

Axes: B batch, S source, T target, d model, f feed-forward, h heads, k per head, I = h*k, r bottleneck,
P prefix, L layers, V vocabulary.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import re
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import BinaryIO, Callable, Iterable, Iterator, NamedTuple, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

PAD, EOS, START = 0, 1, 0  # T5 starts its answers with the padding id
MASKED = -1e9  # added to the score of a key that must not be seen: finite, so that no row of scores is all -inf
Z_LOSS = 1e-4  # weight of (log Z)^2 in the loss of the authors' training


class CheckpointError(ValueError):
    """A checkpoint, its config or its weights cannot be read; the message is one sentence for the user."""


# --------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class T5Config:
    """Shape of a T5. The names are those of the `config.json` of public checkpoints; defaults: T5 v1.1 small."""

    vocab_size: int = 32128  # 32,000 pieces, 100 extra ids, 28 unused rows (a multiple of 128)
    d_model: int = 512
    d_kv: int = 64  # k; T5-3B has h*k = 4096 with d = 1024, so k is never d/h
    d_ff: int = 1024
    num_layers: int = 8  # encoder layers
    num_decoder_layers: int = 8
    num_heads: int = 6
    feed_forward_proj: str = "gated-gelu"  # v1.1 and all that came of it; v1.0: "relu"
    tie_word_embeddings: bool = False  # v1.0: the head is the embedding
    scale_decoder_outputs: bool = False  # v1.0: states * d^-0.5 before the head
    dropout_rate: float = 0.1  # embeddings, attention weights, hidden units, sublayers and final states
    layer_norm_epsilon: float = 1e-6
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128  # beyond it all distances share a bucket

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_field(field.name, field.type, getattr(self, field.name))
        if self.feed_forward_proj not in ("relu", "gated-gelu"):
            raise CheckpointError(f"feed_forward_proj {self.feed_forward_proj!r:.40} is not one of relu, gated-gelu")
        if self.relative_attention_num_buckets < 4 or self.relative_attention_num_buckets % 4:
            raise CheckpointError("relative_attention_num_buckets must be a multiple of 4")
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 2:
            raise CheckpointError("relative_attention_max_distance must exceed half the number of buckets")

    @classmethod
    def from_json(cls, found: dict) -> T5Config:
        """Read what transformers 4 (the hub) or transformers 5 wrote. Raises CheckpointError.

        Transformers 5 says `tie_word_embeddings: true` of every T5 and tells by `scale_decoder_outputs` whether
        the states are scaled; earlier versions scaled whenever the embeddings were tied.
        """
        known = {field.name: found[field.name] for field in fields(cls) if found.get(field.name) is not None}
        absent = {
            name for name in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads") if name not in known
        }
        if absent:
            raise CheckpointError(f"lacks {', '.join(sorted(absent))}")
        tied = found.get("tie_word_embeddings", True)
        as_old_files_mean = {  # what a file of T5 v1.0 leaves out
            "feed_forward_proj": "relu",
            "num_decoder_layers": known["num_layers"],
            "tie_word_embeddings": tied,
            "scale_decoder_outputs": tied,
        }
        return cls(**{**as_old_files_mean, **known})


def _check_field(name: str, kind: str, value: object) -> None:
    """A number out of a file may be of any type and size; the bounds are far beyond every T5 there is."""
    if kind == "int" and not (type(value) is int and 1 <= value <= 10**7):
        raise CheckpointError(f"{name} must be a whole number from 1 to 10,000,000, not {value!r:.40}")
    if name in ("num_layers", "num_decoder_layers", "num_heads") and value > 1024:
        raise CheckpointError(f"{name} must be at most 1,024, not {value}")
    if kind == "float" and not (type(value) in (int, float) and 0 <= value < 1):
        raise CheckpointError(f"{name} must be at least 0 and below 1, not {value!r:.40}")
    if kind == "bool" and type(value) is not bool:
        raise CheckpointError(f"{name} must be true or false, not {value!r:.40}")


SIZES = {  # T5 v1.1 and LM-adapt as published (3.0 billion parameters are called xl, 11 billion xxl), and two for a CPU
    "toy": T5Config(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_decoder_layers=1, num_heads=4),
    "tiny": T5Config(d_model=128, d_kv=32, d_ff=256, num_layers=2, num_decoder_layers=2, num_heads=4),
    "small": T5Config(),
    "base": T5Config(d_model=768, d_ff=2048, num_layers=12, num_decoder_layers=12, num_heads=12),
    "large": T5Config(d_model=1024, d_ff=2816, num_layers=24, num_decoder_layers=24, num_heads=16),
    "xl": T5Config(d_model=2048, d_ff=5120, num_layers=24, num_decoder_layers=24, num_heads=32),
    "xxl": T5Config(d_model=4096, d_ff=10240, num_layers=24, num_decoder_layers=24, num_heads=64),
}


# ------------------------------------------------------------------------ weights made for one example


class KeyValue(NamedTuple):
    """Keys and values of one attention, [B, h, S, k] each. A prefix is such a pair that no token wrote."""

    key: Tensor
    value: Tensor

    def laid_out(self) -> KeyValue:
        """The same with keys row by row and values column by column in memory, as a step of decoding reads them."""
        return KeyValue(self.key.contiguous(), self.value.mT.contiguous().mT)

    def after(self, prefix: KeyValue | None) -> KeyValue:
        """These behind a prefix [B or 1, h, P, k], in time and after projection (HINT, section 3.1.1)."""
        if prefix is None:
            return self
        batch = self.key.shape[0]
        return KeyValue(*(torch.cat([p.expand(batch, -1, -1, -1).type_as(x), x], dim=2) for p, x in zip(prefix, self)))


class Adapter(NamedTuple):
    """A bottleneck beside the feed-forward layer, HINT equation (1): gelu(u W_down + b_down) W_up + b_up."""

    down: Tensor  # [B or 1, d, r]
    down_bias: Tensor  # [B or 1, 1, r]
    up: Tensor  # [B or 1, r, d]
    up_bias: Tensor  # [B or 1, 1, d]

    def __call__(self, u: Tensor) -> Tensor:  # [B, S, d]
        hidden = F.gelu(_times(u, self.down) + self.down_bias, approximate="tanh")  # [B, S, r]
        return _times(hidden, self.up) + self.up_bias  # [B, S, d]


def _times(x: Tensor, weights: Tensor) -> Tensor:
    """x [B, S, n] times weights [B or 1, n, m], of which one for all rows makes one large product."""
    return linear(x, weights[0].T) if len(weights) == 1 else x @ weights


class LoRA(NamedTuple):
    """Low-rank changes of W_q and W_v of one attention (Hu et al., 2022): x (W + down up)."""

    query_down: Tensor  # [B or 1, d, r]
    query_up: Tensor  # [B or 1, r, I]
    value_down: Tensor  # [B or 1, d, r]
    value_up: Tensor  # [B or 1, r, I]


class SerialAdapter(NamedTuple):
    """A bottleneck behind a sublayer, as Hyperformer has it: y + LN(gelu(y W_down + b_down) W_up + b_up)."""

    down: Tensor  # [B or 1, d, r]
    down_bias: Tensor  # [B or 1, 1, r]
    up: Tensor  # [B or 1, r, d]
    up_bias: Tensor  # [B or 1, 1, d]
    norm_scale: Tensor  # [B or 1, 1, d], generated too: the norm is that of one task, place and layer
    norm_shift: Tensor  # [B or 1, 1, d]

    def __call__(self, y: Tensor) -> Tensor:  # [B, S, d]
        changed = Adapter(*self[:4])(y)
        return y + F.layer_norm(changed, changed.shape[-1:]) * self.norm_scale + self.norm_shift


class LayerModules(NamedTuple):
    """What one layer is given. Every part may be absent."""

    adapter: Adapter | None = None
    prefix: KeyValue | None = None  # of the self-attention
    cross_prefix: KeyValue | None = None  # of the cross-attention, decoder only
    lora: LoRA | None = None  # of the self-attention
    cross_lora: LoRA | None = None  # of the cross-attention, decoder only
    after_attention: SerialAdapter | None = None  # behind the self-attention
    after_feed_forward: SerialAdapter | None = None


class Source(NamedTuple):
    """Something for the cross-attention to read. One of one row is read by all rows, and projected once for them."""

    states: Tensor  # [B or 1, S, d], from an encoder
    attention_mask: Tensor  # [B or 1, S]


def map_tensors(function: Callable[[Tensor], Tensor], tree):
    """Apply a function to every tensor of nested tuples; None stays None."""
    if tree is None:
        return None
    if isinstance(tree, Tensor):
        return function(tree)
    items = [map_tensors(function, item) for item in tree]
    return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)


def select_rows(tree, rows: Tensor):
    """The rows of every tensor of nested tuples; a tensor of one row belongs to all rows and stays as it is."""
    return map_tensors(lambda tensor: tensor if len(tensor) == 1 else tensor.index_select(0, rows), tree)


class Modules(NamedTuple):
    """What a whole T5 is given: a LayerModules for each layer of the encoder and of the decoder."""

    encoder: tuple[LayerModules, ...]
    decoder: tuple[LayerModules, ...]

    @classmethod
    def none(cls, config: T5Config) -> Modules:
        """Plain T5."""
        return cls((LayerModules(),) * config.num_layers, (LayerModules(),) * config.num_decoder_layers)


# --------------------------------------------------------------------------------------------- the model


class RMSNorm(nn.Module):
    """x / RMS(x) * weight, without mean or bias; the statistics are taken in fp32. [..., d] -> [..., d]"""

    def __init__(self, d_model: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        # By way of the norm, because its gradient keeps no fp32 copy of bf16 states.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        return self.weight * (x * torch.rsqrt(norm.square() / x.shape[-1] + self.epsilon)).type_as(x)


def relative_position_bucket(
    relative_position: Tensor, bidirectional: bool, num_buckets: int, max_distance: int
) -> Tensor:
    """Bucket of each (key position - query position): exact when near, logarithmic when far, one beyond
    `max_distance` (Raffel et al., 2020, section 2.1). Any shape of integers -> the same shape in [0, num_buckets).

    The encoder spends half of its buckets on keys after the query; the decoder has no such keys.
    """
    if bidirectional:
        num_buckets //= 2
        offset = (relative_position > 0) * num_buckets
        distance = relative_position.abs()
    else:
        offset = 0
        distance = (-relative_position).clamp(min=0)
    exact = num_buckets // 2
    logarithm = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (logarithm * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return offset + torch.where(distance < exact, distance, far)


class RelativeBias(nn.Module):
    """The bias that a stack adds to all its self-attention scores: one table, shared by the layers."""

    def __init__(self, config: T5Config, bidirectional: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.relative_attention_num_buckets, config.num_heads))
        self.bidirectional = bidirectional
        self.max_distance = config.relative_attention_max_distance

    def forward(self, queries: int, keys: int, first_query: int = 0) -> Tensor:
        """[1, h, queries, keys], where query i stands at position first_query + i.

        Each distance is looked up once, and then spread along its diagonal.
        """
        # The logarithm is taken on the CPU: where it meets a whole number, another device may round it down.
        lowest = 1 - first_query - queries
        relative = torch.arange(lowest, keys - first_query, device="cpu")  # every key position - query position
        buckets = relative_position_bucket(relative, self.bidirectional, self.weight.shape[0], self.max_distance)
        bias = self.weight[buckets.to(self.weight.device)].T  # [h, queries + keys - 1]
        positions = torch.arange(first_query, first_query + queries, device=bias.device)
        index = torch.arange(keys, device=bias.device) - positions[:, None] - lowest  # [queries, keys]
        return bias[:, index].unsqueeze(0)


def padding_bias(attention_mask: Tensor) -> Tensor:
    """Scores to add for a mask [B, S] of ones (seen) and zeros (padding): [B, 1, 1, S]."""
    return (attention_mask == 0)[:, None, None, :] * MASKED


class Padded:
    """A batch [B, S, n] as it is."""

    def tokens(self, x: Tensor) -> Tensor:
        """What layers that act on each token alone are given."""
        return x

    def rows(self, x: Tensor) -> Tensor:
        """What attention and the modules of one example are given."""
        return x


class Unpadded(Padded):
    """A batch without its padding: layers that act on each token alone, nearly all of the work, see real ones only."""

    def __init__(self, mask: Tensor) -> None:
        self.shape, self.places = mask.shape, mask.flatten().nonzero()[:, 0]  # [N], of the real tokens

    def tokens(self, x: Tensor) -> Tensor:
        """[B, S, ...] -> [N, ...]"""
        return x.flatten(0, 1).index_select(0, self.places)

    def rows(self, x: Tensor) -> Tensor:
        """[N, n] -> [B, S, n], zero where there is padding."""
        zeros = x.new_zeros(self.shape.numel(), x.shape[-1])
        return zeros.index_copy(0, self.places, x).unflatten(0, self.shape)


def through(module: Callable[[Tensor], Tensor] | None, x: Tensor, layout: Padded) -> Tensor:
    """x [B, S, d] or [N, d] through a module of each example; where there is none, x as it is."""
    return x if module is None else layout.tokens(module(layout.rows(x)))


def layout_of(mask: Tensor) -> Padded:
    """How to hold a batch whose real tokens are where the mask [B, S] is not zero."""
    return Padded() if mask.all() else Unpadded(mask)


def attend(query: Tensor, parts: Sequence[KeyValue], bias: Tensor, dropout: Callable[[Tensor], Tensor]) -> Tensor:
    """Attention as T5 has it: scores are not divided by sqrt(k). (Softmax is taken in fp32 inside, whatever its type.)

    query [B, h, T, k]; keys and values in parts [B or 1, h, S_i, k] that are read as if they were one, S long;
    bias broadcastable to [B, h, T, S] -> [B, h, T, k]
    """
    scores = _joined([_product(query, part.key.transpose(-1, -2)) for part in parts]) + bias  # [B, h, T, S]
    weights = dropout(scores.softmax(dim=-1).type_as(query))
    lengths = [part.key.shape[2] for part in parts]
    return sum(_product(weight, part.value) for weight, part in zip(weights.split(lengths, dim=-1), parts))


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x [B, h, T, n] times y [B or 1, h, n, m]; a y that all rows share is read once, not once a row.

    A single query, a step of decoding, is multiplied from the right: a CPU then reads y nearly twice as fast, if it
    lies in memory column by column.
    """
    batch, _, length, _ = x.shape
    if length == 1 and batch == len(y):
        return (y.mT @ x.mT).mT
    if batch == 1 or len(y) > 1:
        return x @ y
    return (x.transpose(0, 1).flatten(1, 2) @ y[0]).unflatten(1, (batch, length)).transpose(0, 1)


class Attention(nn.Module):
    """Multi-head attention without biases; d -> I -> d, with I = h*k of its own, whatever d is."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.heads = config.num_heads
        self.q = Linear(config.d_model, inner, bias=False)
        self.k = Linear(config.d_model, inner, bias=False)
        self.v = Linear(config.d_model, inner, bias=False)
        self.o = Linear(inner, config.d_model, bias=False)
        self.dropout = nn.Dropout(config.dropout_rate)

    def split(self, x: Tensor) -> Tensor:
        """[B, S, I] -> [B, h, S, k]"""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def project(self, states: Tensor, layout: Padded = Padded(), lora: LoRA | None = None) -> KeyValue:
        """Keys and values of the states [B, S, d], or [N, d] of the real tokens alone."""
        value = layout.rows(self.v(states))
        if lora is not None:
            value = value + layout.rows(states) @ lora.value_down @ lora.value_up
        return KeyValue(self.split(layout.rows(self.k(states))), self.split(value))

    def forward(
        self, x: Tensor, parts: Sequence[KeyValue], bias: Tensor, layout: Padded = Padded(), lora: LoRA | None = None
    ) -> Tensor:
        """x [B, T, d] asks, keys and values answer -> [B, T, d]; or [N, d] each"""
        query = layout.rows(self.q(x))
        if lora is not None:
            query = query + layout.rows(x) @ lora.query_down @ lora.query_up
        mixed = attend(self.split(query), parts, bias, self.dropout)  # [B, h, T, k]
        return self.o(layout.tokens(mixed.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """v1.1: W_o (gelu(W_0 x) * W_1 x); v1.0: W_o relu(W_i x). No biases. [B, S, d] -> [B, S, d]"""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.gated = config.feed_forward_proj == "gated-gelu"
        for name in ("wi_0", "wi_1") if self.gated else ("wi",):
            setattr(self, name, Linear(config.d_model, config.d_ff, bias=False))
        self.wo = Linear(config.d_ff, config.d_model, bias=False)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x) if self.gated else F.relu(self.wi(x))
        return self.wo(self.dropout(hidden))


class LayerCache:
    """What one decoder layer keeps from step to step: its keys and values so far, and those of the sources."""

    def __init__(self, own: KeyValue, prefix: KeyValue | None, sources: list[KeyValue]) -> None:
        """`own`: room for all tokens to come; a prefix takes the first P places, so real positions do not shift."""
        self.own, self.sources, self.filled = own, sources, 0
        if prefix is not None:
            self.extend(prefix)

    def extend(self, new: KeyValue) -> KeyValue:
        """Add the keys and values of new tokens [B or 1, h, T, k]; all that there are now [B, h, filled, k]."""
        end = self.filled + new.key.shape[2]
        for room, x in zip(self.own, new):
            room[:, :, self.filled : end] = x
        self.filled = end
        return KeyValue(*(room[:, :, :end] for room in self.own))

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these [at most B]; what all rows share stays."""
        self.own, *self.sources = (part.laid_out() for part in select_rows((self.own, *self.sources), rows))


class Block(nn.Module):
    """One layer: x + f(norm(x)) for self-attention, cross-attention (in a decoder) and feed-forward."""

    def __init__(self, config: T5Config, is_decoder: bool) -> None:
        super().__init__()
        self.self_attention_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.self_attention = Attention(config)
        if is_decoder:
            self.cross_attention_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
            self.cross_attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(
        self, x: Tensor, bias: Tensor, modules: LayerModules, layout: Padded = Padded(),
        sources: Sequence[Source] = (), source_bias: Tensor | None = None, cache: LayerCache | None = None,
    ) -> Tensor:  # fmt: skip
        """x [B, T, d] or [N, d] -> the same. A decoder layer also reads the sources, or the cache made of them."""
        u = self.self_attention_norm(x)
        own = self.self_attention.project(u, layout, modules.lora)
        own = cache.extend(own) if cache else own.after(modules.prefix)
        y = self.self_attention(u, [own], bias, layout, modules.lora)
        x = x + self.dropout(through(modules.after_attention, y, layout))
        if source_bias is not None:
            parts = cache.sources if cache else self.project_sources(sources, modules)
            u = self.cross_attention_norm(x)
            x = x + self.dropout(self.cross_attention(u, parts, source_bias, layout, modules.cross_lora))
        u = self.feed_forward_norm(x)
        y = self.feed_forward(u)
        x = x + self.dropout(through(modules.after_feed_forward, y, layout))
        return x if modules.adapter is None else x + through(modules.adapter, u, layout)

    def project_sources(self, sources: Sequence[Source], modules: LayerModules) -> list[KeyValue]:
        """The keys and values that the cross-attention reads: of the prefix, [B or 1, h, P, k], and of each source."""
        prefix = [] if modules.cross_prefix is None else [modules.cross_prefix]
        return prefix + [self.cross_attention.project(source.states, lora=modules.cross_lora) for source in sources]


class Stack(nn.Module):
    """Encoder or decoder: blocks, one relative bias for all of them, a final norm."""

    def __init__(self, config: T5Config, is_decoder: bool) -> None:
        super().__init__()
        layers = config.num_decoder_layers if is_decoder else config.num_layers
        self.relative_bias = RelativeBias(config, bidirectional=not is_decoder)
        self.blocks = nn.ModuleList(Block(config, is_decoder) for _ in range(layers))
        self.final_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.gradient_checkpointing = False  # recompute a block in the backward pass instead of keeping its insides

    def forward(
        self, x: Tensor, bias: Tensor, layers: tuple[LayerModules, ...], layout: Padded = Padded(),
        sources: Sequence[Source] = (), source_bias: Tensor | None = None, caches: Iterable[LayerCache] | None = None,
    ) -> Tensor:  # fmt: skip
        """Embeddings [B, S, d] or [N, d] -> states; `bias` and `source_bias` know nothing of prefixes."""
        bias = _past_prefix(bias, layers[0].prefix)
        source_bias = None if source_bias is None else _past_prefix(source_bias, layers[0].cross_prefix)
        x = self.dropout(x)
        for block, modules, cache in zip(self.blocks, layers, caches or [None] * len(layers), strict=True):
            inputs = (x, bias, modules, layout, sources, source_bias, cache)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x = block(*inputs)
        return self.dropout(self.final_norm(x))


def _past_prefix(bias: Tensor, prefix: KeyValue | None) -> Tensor:
    """Prefixes are always visible and have no position: a bias of exactly zero on P more columns to the left."""
    return bias if prefix is None else F.pad(bias, (prefix.key.shape[2], 0))


class T5(nn.Module):
    """The encoder-decoder. Ids are padded with 0; where no `attention_mask` is given, id 0 is padding."""

    def __init__(self, config: T5Config) -> None:
        """Fresh weights, drawn as T5's were but for the relative bias; `from_pretrained` loads published ones."""
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, is_decoder=False)
        self.decoder = Stack(config, is_decoder=True)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.d_model, config.vocab_size, bias=False)
        self.apply(self.initialise)

    def initialise(self, module: nn.Module) -> None:
        """Draw the weights of one module: fan-in scaling; W_q also takes the 1/sqrt(k) that T5's scores lack.

        The relative bias begins larger than the d^-0.5 of transformers: Adafactor steps in proportion to a parameter's
        size, and a draft of the toy world was learned worse with the smaller one (README).
        """
        if isinstance(module, Attention):
            nn.init.normal_(module.q.weight, std=(self.config.d_model * self.config.d_kv) ** -0.5)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1.0)
        elif isinstance(module, RelativeBias):
            nn.init.normal_(module.weight, std=0.5)

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None, modules: Modules | None = None) -> Tensor:
        """Input ids [B, S] -> states [B, S, d], after the final norm."""
        mask = padding_mask(input_ids) if attention_mask is None else attention_mask
        modules = modules or Modules.none(self.config)
        length = input_ids.shape[1]
        bias = self.encoder.relative_bias(length, length) + padding_bias(mask)  # [B, h, S, S]
        layout = layout_of(mask)
        return layout.rows(self.encoder(self.shared(layout.tokens(input_ids)), bias, modules.encoder, layout))

    def decode(
        self, decoder_input_ids: Tensor, sources: Sequence[Source], modules: Modules | None = None,
        layout: Padded = Padded(),
    ) -> Tensor:  # fmt: skip
        """Decoder ids [B, T] and what they are to read -> states [B, T, d] or [N, d], after the final norm."""
        modules = modules or Modules.none(self.config)
        length = decoder_input_ids.shape[1]
        future = torch.ones(length, length, device=decoder_input_ids.device).triu(1) * MASKED
        bias = self.decoder.relative_bias(length, length) + future  # [1, h, T, T]
        x = self.shared(layout.tokens(decoder_input_ids))
        return self.decoder(x, bias, modules.decoder, layout, sources, source_bias(sources))

    def logits(self, states: Tensor) -> Tensor:
        """Decoder states [..., d] -> scores of the next token [..., V]."""
        if self.config.scale_decoder_outputs:
            states = states * self.config.d_model**-0.5
        return linear(states, self.shared.weight) if self.lm_head is None else self.lm_head(states)

    def loss(self, labels: Tensor, sources: Sequence[Source], modules: Modules | None = None) -> Loss:
        """Loss of the answers `labels` [B, T], padded with -100, to what the decoder reads."""
        return token_loss(*self._real_targets(labels, sources, modules))

    def log_probabilities(self, labels: Tensor, sources: Sequence[Source], modules: Modules | None = None) -> Tensor:
        """Log-probability [B] of each answer of `labels` [B, T], padded with -100, in fp32.

        The sum over its tokens and its `</s>`, not divided by their number, is what choices are ranked by.
        """
        logits, targets = self._real_targets(labels, sources, modules)
        chosen = -F.cross_entropy(logits.float(), targets, reduction="none")  # [N]
        return chosen.new_zeros(labels.shape).masked_scatter(labels != -100, chosen).sum(1)

    def _real_targets(
        self, labels: Tensor, sources: Sequence[Source], modules: Modules | None
    ) -> tuple[Tensor, Tensor]:
        """Logits [N, V] and labels [N] of the N real target tokens: the head, the largest matrix of all, sees no other."""
        read = (labels != -100).flip(1).cumsum(1).flip(1)  # up to the last label of each row
        layout = layout_of(read)
        states, labels = self.decode(shift_right(labels), sources, modules, layout), layout.tokens(labels)
        return self.logits(states[labels != -100]), labels[labels != -100]

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Input ids [B, S], decoder ids [B, T] (the labels shifted right) -> logits [B, T, V]."""
        return self.logits(self.decode(decoder_input_ids, [self.read(input_ids, attention_mask)]))

    def read(self, input_ids: Tensor, attention_mask: Tensor | None = None, modules: Modules | None = None) -> Source:
        """Input ids [B, S], encoded, as something for the decoder to read."""
        mask = padding_mask(input_ids) if attention_mask is None else attention_mask
        return Source(self.encode(input_ids, mask, modules), mask)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, max_new_tokens: int = 128) -> Tensor:
        """Greedy answers [B, <= max_new_tokens] without the start token; `</s>`, then padding at the end."""
        return self.decode_greedily([self.read(input_ids, attention_mask)], None, max_new_tokens)

    @torch.no_grad()
    def decode_greedily(self, sources: Sequence[Source], modules: Modules | None, max_new_tokens: int) -> Tensor:
        """The most probable next token, again and again, until every row has ended: [B, <= max_new_tokens].

        When half of the rows have ended, the others go on alone.
        """
        layers = (modules or Modules.none(self.config)).decoder
        caches = self._caches(sources, layers, max_new_tokens)
        bias = source_bias(sources)
        self_bias = self.decoder.relative_bias(1, max_new_tokens, first_query=max_new_tokens - 1)  # of the last query
        going = torch.arange(max(len(source.states) for source in sources), device=bias.device)  # rows, B at first
        answer = torch.full((len(going), max_new_tokens), PAD, device=bias.device)
        token = torch.full((len(going), 1), START, device=bias.device)
        ended = torch.zeros(len(going), dtype=torch.bool, device=bias.device)
        for position in range(max_new_tokens):
            # The bias depends on distance alone, so each query finds its own at the end of that of the last.
            distances = self_bias[..., max_new_tokens - 1 - position :]
            states = self.decoder(self.shared(token), distances, layers, sources=(), source_bias=bias, caches=caches)
            token = self.logits(states).argmax(-1).masked_fill(ended[:, None], PAD)  # [B, 1]
            answer[going, position] = token[:, 0]
            ended = ended | (token[:, 0] == EOS)
            count = int(ended.sum())
            if count == len(ended):
                return answer[:, : position + 1]
            if 2 * count >= len(ended):
                rows = (~ended).nonzero()[:, 0]
                going, token, ended = going[rows], token[rows], ended[rows]
                bias, layers = select_rows((bias, layers), rows)
                for cache in caches:
                    cache.keep(rows)
        return answer

    def _caches(
        self, sources: Sequence[Source], layers: tuple[LayerModules, ...], max_new_tokens: int
    ) -> list[LayerCache]:
        """One cache a layer. Keys and values of the sources are computed here, once for the whole answer."""
        caches, batch = [], max(len(source.states) for source in sources)
        for block, layer in zip(self.decoder.blocks, layers):
            parts = [part.laid_out() for part in block.project_sources(sources, layer)]
            _, heads, _, width = parts[0].key.shape
            room = max_new_tokens + (0 if layer.prefix is None else layer.prefix.key.shape[2])
            own = KeyValue(*(parts[0].key.new_empty(batch, heads, room, width) for _ in range(2))).laid_out()
            caches.append(LayerCache(own, layer.prefix, parts))
        return caches

    @classmethod
    def from_pretrained(cls, name_or_dir: str | os.PathLike) -> T5:
        """A T5 of the hub, by its public name or from a folder, in fp32 and eval mode.

        Reads T5 v1.0, v1.1, LM-adapt, Flan-T5, T0 and Tk-Instruct as transformers 4 or 5 wrote them. Every
        tensor of the checkpoint is used exactly once, or CheckpointError names it; but for copies of the embedding,
        and for one table that old files hold and no T5 reads.
        """
        config = read_config(name_or_dir, T5Config.from_json)
        tensors = _without_aliases(read_weights(name_or_dir), config.tie_word_embeddings)
        config = replace(config, tie_word_embeddings="lm_head.weight" not in tensors)
        with torch.device("meta"):
            model = cls(config)
        fill(model, tensors, public_name, source=name_or_dir)
        return model.eval()

    def save_pretrained(
        self, folder: str | os.PathLike, notes: dict | None = None, metadata: dict[str, str] | None = None
    ) -> None:
        """Write `config.json` (with `notes` added) and `model.safetensors` (with `metadata` in its header).

        Tensors go under their public names, so that transformers reads the folder too.
        """
        kind = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "decoder_start_token_id": START}
        tensors = {public_name(name): parameter for name, parameter in self.named_parameters()}
        save_folder(folder, {**kind, **asdict(self.config), **(notes or {})}, tensors, metadata or {})


def set_gradient_checkpointing(model: nn.Module, on: bool) -> None:
    """Trade a second forward pass of each block for the memory of its insides; the gradient is the same."""
    for module in model.modules():
        if isinstance(module, Stack):
            module.gradient_checkpointing = on


def source_bias(sources: Sequence[Source]) -> Tensor:
    """Scores to add for all sources together, [B or 1, 1, 1, S]: padding is not seen."""
    batch = max(len(source.attention_mask) for source in sources)
    return padding_bias(torch.cat([source.attention_mask.expand(batch, -1) for source in sources], dim=1))


def padding_mask(ids: Tensor) -> Tensor:
    """One where there is a token, zero where there is padding, for ids [B, S]."""
    return (ids != PAD).long()


def shift_right(labels: Tensor) -> Tensor:
    """Decoder input of labels [B, T]: the start token first, padding (-100) as 0."""
    return F.pad(labels[:, :-1], (1, 0), value=START).clamp(min=PAD)


class Loss(NamedTuple):
    """A loss, and the sums over target tokens that make it, so that parts of a batch can be added up."""

    loss: Tensor  # mean cross-entropy of a target token, in nats
    cross_entropy: Tensor  # its sum
    z_loss: Tensor  # sum of (log Z)^2, which keeps the logits from drifting
    tokens: int  # how many target tokens there are


def token_loss(logits: Tensor, labels: Tensor) -> Loss:
    """Loss of logits [N, V] against the labels [N] of N real tokens; in fp32."""
    logits = logits.float()
    log_z = logits.logsumexp(-1)
    chosen = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    cross_entropy = (log_z - chosen).sum()
    return Loss(cross_entropy / max(len(labels), 1), cross_entropy, log_z.square().sum(), len(labels))


# ------------------------------------------------------------------------------ answering on a CPU

WORTHWHILE = 2**17  # multiplications from which `linear`'s routine for one row makes up for what a call costs
WORTHWHILE_ONEDNN = 2**20  # likewise, for many rows


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., n] times weight [m, n] -> [..., m], as `F.linear`; answers in fp32 on a CPU take torch's faster routines.

    Those know no gradient. Beside `F.linear` on a core of an AMD EPYC, they read the weights for one row twice as fast
    (as two halves in one batched product), and multiply many rows 1.8 times as fast (oneDNN in place of MKL).
    """
    work = x.numel() * len(weight)
    answers = not torch.is_grad_enabled() and x.device.type == "cpu" and x.dtype == torch.float32
    if not answers or work < WORTHWHILE or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    if x.numel() == x.shape[-1] and bias is None and len(weight) % 2 == 0 and weight.is_contiguous():
        column = x.reshape(1, 1, -1).expand(2, -1, -1).mT  # [2, n, 1]
        return torch.bmm(weight.view(2, -1, x.shape[-1]), column).view(*x.shape[:-1], -1)
    if work >= WORTHWHILE_ONEDNN and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """nn.Linear, but answers on a CPU take the faster routines of `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., m]"""
        return linear(x, self.weight, self.bias)


class PackedLinear(nn.Module):
    """A linear layer for many answers, whose weight lies in memory in the order in which oneDNN reads it, and is not
    laid out anew each time. These are the operations to which `torch.compile` turns linear layers on a CPU.
    """

    def __init__(self, layer: nn.Linear, rows: int) -> None:
        super().__init__()
        self.plain, self.packed = layer, torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., m]"""
        if x.numel() == x.shape[-1]:  # one row is faster by the weight as it is
            return self.plain(x)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.plain.bias, "none", [], "")


@contextmanager
def packed_weights(model: nn.Module, rows: int) -> Iterator[None]:
    """Within it, linear layers of a model on a CPU (a tied head is none) are packed for batches of about so many rows.

    It takes a second copy of the weights, made once, so it pays where many answers follow. Not for training or
    saving. Does nothing for single rows, on a GPU, under autocast, or where torch has no oneDNN.
    """
    on_cpu = next(model.parameters()).device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    parents = list(model.modules()) if on_cpu and rows > 1 and torch.backends.mkldnn.is_available() else []
    layers = [(m, name, child) for m in parents for name, child in m.named_children() if isinstance(child, nn.Linear)]
    try:
        for parent, name, layer in layers:
            setattr(parent, name, PackedLinear(layer, rows))
        yield
    finally:
        for parent, name, layer in layers:
            setattr(parent, name, layer)


# ------------------------------------------------------------------------ reading and writing checkpoints

_RENAMES = (  # name in this file -> name in public checkpoints
    (r"^(encoder|decoder)\.relative_bias\.weight", r"\1.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
    (r"^(encoder|decoder)\.final_norm", r"\1.final_layer_norm"),
    (r"\.self_attention_norm", ".layer.0.layer_norm"),
    (r"\.self_attention", ".layer.0.SelfAttention"),
    (r"\.cross_attention_norm", ".layer.1.layer_norm"),
    (r"\.cross_attention", ".layer.1.EncDecAttention"),
    (r"^(encoder.*)\.feed_forward_norm", r"\1.layer.1.layer_norm"),
    (r"^(encoder.*)\.feed_forward", r"\1.layer.1.DenseReluDense"),
    (r"^(decoder.*)\.feed_forward_norm", r"\1.layer.2.layer_norm"),
    (r"^(decoder.*)\.feed_forward", r"\1.layer.2.DenseReluDense"),
    (r"\.blocks\.", ".block."),
)
_EMBEDDING_ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"  # in old files; no T5 reads it


def public_name(name: str) -> str:
    """The name that public checkpoints give to a parameter of this file."""
    for pattern, public in _RENAMES:
        name = re.sub(pattern, public, name)
    return name


def _without_aliases(tensors: dict[str, Tensor], tied: bool) -> dict[str, Tensor]:
    """Drop the second names that files give to the embedding, once they are seen to be equal to it."""
    tensors = {name: tensor for name, tensor in tensors.items() if name != _UNUSED}
    shared = tensors.get("shared.weight")
    for name in (*_EMBEDDING_ALIASES, "lm_head.weight") if tied else _EMBEDDING_ALIASES:
        if name in tensors and shared is not None and torch.equal(tensors[name], shared):
            del tensors[name]
    return tensors


def fill(model: nn.Module, tensors: dict[str, Tensor], name_in_file: Callable[[str], str], source: object) -> None:
    """Give each parameter of a model on the meta device its tensor, in fp32. Raises CheckpointError."""
    expected = {name_in_file(name): (name, parameter.shape) for name, parameter in model.named_parameters()}
    missing, left_over = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    misshapen = {
        f"{name} {list(tensors[name].shape)}, which should be {list(shape)}"
        for name, (_, shape) in expected.items()
        if name in tensors and tensors[name].shape != shape
    }
    for names, complaint in (
        (missing, "the checkpoint lacks"),
        (left_over, "the checkpoint holds what this model has no place for:"),
        (misshapen, "the checkpoint and its config differ in"),
    ):
        if names:
            raise CheckpointError(f"{source}: {complaint} {_few(names)}")
    for name, (own_name, _) in expected.items():
        owner, _, leaf = own_name.rpartition(".")
        if not tensors[name].is_floating_point():
            raise CheckpointError(f"{source}: {name} does not hold floating-point numbers")
        module, tensor = model.get_submodule(owner), tensors[name].to(torch.float32, copy=True)
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=getattr(module, leaf).requires_grad))


def _few(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(map(first_line, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def first_line(text: object) -> str:
    """As much of a library's message, or of a name in a file, as fits into a sentence."""
    line = str(text).strip().partition("\n")[0][:160]
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def fetch(name_or_dir: str | os.PathLike, filename: str) -> Path | None:
    """A file of a folder, or of a repository of the hub (downloaded alone, and kept); None where there is none."""
    if os.path.isdir(name_or_dir):
        path = Path(name_or_dir, filename)
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(str(name_or_dir), filename))
    except EntryNotFoundError:
        return None
    except (OSError, ValueError) as error:  # no such repository, no access, no network, not a name
        raise CheckpointError(
            f"{name_or_dir}: neither a folder nor a repository that can be read ({first_line(error)})"
        ) from None


def read_json(path: Path) -> dict:
    """A JSON object out of a file. Raises CheckpointError."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({first_line(error)})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: is JSON, but not an object")
    return found


def read_config(name_or_dir: str | os.PathLike, parse: Callable[[dict], object]):
    """What `parse` makes of the `config.json` of a folder or repository; its CheckpointError gets the file's name."""
    path = fetch(name_or_dir, "config.json")
    if path is None:
        raise CheckpointError(
            f"{name_or_dir}: no config.json there (neither a checkpoint's folder nor a public name in reach)"
        )
    found = read_json(path)
    try:
        return parse(found)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def read_weights(name_or_dir: str | os.PathLike) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name, mapped from disk where the format allows. Raises CheckpointError.

    Of the forms that a repository may hold, the first of these is read and no other is fetched.
    """
    for name, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_bin)):
        if path := fetch(name_or_dir, name):
            return read(path)
        if index := fetch(name_or_dir, f"{name}.index.json"):
            return _read_shards(name_or_dir, index, read)
    raise CheckpointError(f"{name_or_dir}: no model.safetensors and no pytorch_model.bin there, or in reach")


def _read_shards(
    name_or_dir: str | os.PathLike, index: Path, read: Callable[[Path], dict[str, Tensor]]
) -> dict[str, Tensor]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise CheckpointError(f"{index}: has no weight_map of tensor names to file names")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        plain = shard == Path(shard).name and shard.isascii() and len(shard) <= 200
        path = fetch(name_or_dir, shard) if plain else None
        if path is None:
            raise CheckpointError(f"{index}: names the shard {shard!r:.80}, which is not there")
        found = read(path)
        if twice := found.keys() & tensors.keys():
            raise CheckpointError(f"{path}: holds {_few(twice)}, which another shard holds too")
        tensors.update(found)
    if astray := places.keys() ^ tensors.keys():
        raise CheckpointError(f"{index}: the index and its shards differ in {_few(astray)}")
    return tensors


def read_bin(path: Path) -> dict[str, Tensor]:
    """Tensors of a `pytorch_model.bin`. Raises CheckpointError."""
    found = read_pickle(path)
    if not isinstance(found, dict) or not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in found.items()):
        raise CheckpointError(f"{path}: is not a dictionary of tensors")
    check_sizes(path, found.values())
    return found


def read_pickle(path: str | os.PathLike) -> object:
    """What `torch.save` wrote, once its checksums are found right, mapped from disk where its form allows.

    `weights_only` refuses a pickle that wants to run anything. Raises CheckpointError.
    """
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            with zipfile.ZipFile(path) as archive:
                if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                    raise ValueError("its records are compressed, which torch.save never does")
                if damaged := archive.testzip():
                    raise ValueError(f"the checksum of its record {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError:  # its text tells how to load it without care
        raise CheckpointError(f"{path}: is damaged, or holds more than plain tensors") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            f"{path}: is not a file of plain tensors that torch.load can read ({first_line(error)})"
        ) from None


def check_sizes(path: str | os.PathLike, tensors: Iterable[Tensor]) -> None:
    """No tensor out of a pickle may claim more numbers than the file has bytes for. Raises CheckpointError.

    A pickle can also give a tensor strides that repeat its numbers, or leave it unfilled; a copy would fill the memory.
    """
    stored = {}
    for tensor in tensors:
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise CheckpointError(f"{path}: holds a tensor that is not plain")
        storage = tensor.untyped_storage()
        stored[storage.data_ptr()] = storage.nbytes()
        if tensor.nbytes > storage.nbytes():
            raise CheckpointError(f"{path}: holds a tensor with fewer numbers than its shape {list(tensor.shape)} has")
    if sum(stored.values()) > os.path.getsize(path):
        raise CheckpointError(f"{path}: holds fewer bytes than its tensors")


_SAFETENSORS_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LONGEST_HEADER = 100_000_000  # the limit that the format's own library sets


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file (8 bytes of length, a JSON header, raw data), mapped from disk.

    Raises CheckpointError.
    """
    header, body = _open_safetensors(path)
    header.pop("__metadata__", None)
    try:
        placed = {name: _placed(entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: has a header that is no safetensors header ({first_line(error)})") from None
    end = 0
    for begin, next_end, _, _ in sorted(placed.values(), key=lambda place: place[:2]):
        if begin != end:
            raise CheckpointError(f"{path}: tensors overlap or leave a gap at byte {end}")
        end = next_end
    if end != len(body):
        raise CheckpointError(f"{path}: holds {len(body):,} bytes of tensors where its header promises {end:,}")
    return {
        name: torch.from_numpy(body[begin:end]).view(dtype).reshape(shape)
        for name, (begin, end, dtype, shape) in placed.items()
    }  # fmt: skip


def read_metadata(path: Path) -> dict:
    """The `__metadata__` of a safetensors file. Raises CheckpointError."""
    metadata = _open_safetensors(path)[0].get("__metadata__", {})
    return metadata if isinstance(metadata, dict) else {}


def _open_safetensors(path: Path) -> tuple[dict, np.ndarray]:
    """The header of a safetensors file and, mapped from disk, the bytes behind it."""
    try:
        data = np.memmap(path, dtype=np.uint8, mode="c") if path.stat().st_size else np.zeros(0, np.uint8)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    length = int.from_bytes(data[:8].tobytes(), "little")
    if len(data) < 8 or length > min(len(data) - 8, _LONGEST_HEADER):
        raise CheckpointError(f"{path}: is cut short, or no safetensors file")
    try:
        header = json.loads(data[8 : 8 + length].tobytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: has a header that is not JSON ({first_line(error)})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: has a header that is not a JSON object")
    return header, data[8 + length :]


def _placed(entry: dict) -> tuple[int, int, torch.dtype, tuple[int, ...]]:
    """Begin, end, type and shape of one tensor of a safetensors header. Raises ValueError, KeyError, TypeError."""
    dtype, shape, (begin, end) = _SAFETENSORS_TYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int and 0 <= number < 2**63 for number in (*shape, begin, end)):
        raise ValueError("a size that is no whole number")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError("a shape that does not fit its bytes")
    return begin, end, dtype, shape


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors in the safetensors format; no half-written file ever bears the name `path`."""
    names = {dtype: name for name, dtype in _SAFETENSORS_TYPES.items()}
    header, end = {"__metadata__": {"format": "pt", **metadata}}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that every tensor begins at a multiple of 8 bytes
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)


def write_pickle(path: Path, value: object) -> None:
    """`torch.save`, in memory first: a full disk under it would be a RuntimeError about positions, not an OSError."""
    content = io.BytesIO()
    torch.save(value, content)
    with replacing(path) as file:
        file.write(content.getbuffer())


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` once it is whole and on disk; until then `path` is untouched."""
    beside = path.with_name(path.name + ".partial")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        _sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Let the names of a folder outlast a power cut, where the system can sync folders at all."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_folder(folder: str | os.PathLike, config: dict, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """`config.json` and `model.safetensors`, the form of every model that this project writes.

    The config comes first: weights without one could not be read.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "config.json") as file:
        file.write(json.dumps(config, indent=2).encode() + b"\n")
    write_safetensors(folder / "model.safetensors", tensors, metadata)
