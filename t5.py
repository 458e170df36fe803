"""T5 (Raffel et al., 2020), the underlying model of HINT (section 3.2), in torch alone.

A plain encoder-decoder. Every layer also takes generated weights: a *prefix*, keys and values in front of those of the
tokens, and an *adapter* parallel to the feed-forward layer; for other systems, LoRA and serial adapters.

Axes: B batch, S source, T target, d model, f feed-forward, h heads, k per head, I = h*k, r bottleneck,
P prefix, L layers, V vocabulary, N target tokens without padding.
"""

from __future__ import annotations

import json
import math
import os
import re
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import BinaryIO, Callable, Iterator, NamedTuple, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

PAD, EOS, START = 0, 1, 0  # T5 starts its answers with the padding id
NO_LABEL = -100  # padding of labels
MASKED = -1e9  # added to the score of a hidden key: finite, so that a row that sees nothing is no row of NaN
Z_LOSS = 1e-4  # weight of (log Z)^2 in the authors' training loss


# --------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class T5Config:
    """Shape of a T5, named as in the `config.json` of public checkpoints; defaults: T5 v1.1 small."""

    vocab_size: int = 32128  # 32,000 pieces, 100 extra ids, 28 unused rows (a multiple of 128)
    d_model: int = 512
    d_kv: int = 64  # k; T5-3B has h*k = 4096 with d = 1024, so k is not always d/h
    d_ff: int = 1024
    num_layers: int = 8  # encoder layers
    num_decoder_layers: int = 8
    num_heads: int = 6
    feed_forward_proj: str = "gated-gelu"  # v1.1 and its descendants; v1.0: "relu"
    tie_word_embeddings: bool = False  # v1.0: the head is the embedding
    scale_decoder_outputs: bool = False  # v1.0: states * d^-0.5 before the head
    dropout_rate: float = 0.1  # embeddings, attention weights, hidden units, sublayers and final states
    layer_norm_epsilon: float = 1e-6
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128  # beyond it all distances share a bucket

    def __post_init__(self) -> None:
        bounds = dict.fromkeys(("num_layers", "num_decoder_layers", "num_heads"), (1, 1024))
        check_fields(self, bounds | dict.fromkeys(("dropout_rate", "layer_norm_epsilon"), (0, 0.99)))
        if self.feed_forward_proj not in ("relu", "gated-gelu"):
            raise ValueError(f"feed_forward_proj {self.feed_forward_proj!r:.40} is not one of relu, gated-gelu")

    @classmethod
    def from_json(cls, config: dict) -> T5Config:
        """Read a config of transformers 5, or 4, which scaled the states if embeddings were tied. Raises ValueError."""
        known = {field.name: config[field.name] for field in fields(cls) if config.get(field.name) is not None}
        required = {"vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"}
        if absent := required - known.keys():
            raise ValueError(f"lacks {', '.join(sorted(absent))}")
        if config.get("decoder_start_token_id", START) not in (START, None):
            raise ValueError(f"decoder_start_token_id must be {START}, as in every T5")
        tied = config.get("tie_word_embeddings", True)
        of_old_files = {  # the values that a file of T5 v1.0 leaves out
            "feed_forward_proj": "relu",
            "num_decoder_layers": known["num_layers"],
            "tie_word_embeddings": tied,
            "scale_decoder_outputs": tied,
        }
        return cls(**{**of_old_files, **known})


def check_fields(settings: object, bounds: dict[str, tuple[float, float]]) -> None:
    """Check the types of a dataclass, and the bounds of its numbers (default: 1 to 10,000,000). Raises ValueError."""
    kinds = {"int": int, "float": (int, float), "bool": bool, "str": str}
    for field in fields(settings):
        name, value = field.name, getattr(settings, field.name)
        kind, _, optional = field.type.partition(" | ")
        if kind not in kinds or (optional and value is None):
            continue
        if not isinstance(value, kinds[kind]) or isinstance(value, bool) != (kind == "bool"):
            raise ValueError(f"{name} must be of type {kind}, not {value!r:.40}")
        least, most = bounds.get(name, (1, 10**7))
        if kind in ("int", "float") and not least <= value <= most:  # no NaN either
            raise ValueError(f"{name} must be from {least:,} to {most:,}, not {value!r:.40}")


SIZES = {  # T5 v1.1 and LM-adapt as published (xl has 3 billion parameters, xxl 11), and two sizes for a CPU
    "toy": T5Config(d_model=64, d_kv=16, d_ff=128, num_layers=1, num_decoder_layers=2, num_heads=4),
    "tiny": T5Config(d_model=128, d_kv=32, d_ff=256, num_layers=2, num_decoder_layers=2, num_heads=4),
    "small": T5Config(),
    "base": T5Config(d_model=768, d_ff=2048, num_layers=12, num_decoder_layers=12, num_heads=12),
    "large": T5Config(d_model=1024, d_ff=2816, num_layers=24, num_decoder_layers=24, num_heads=16),
    "xl": T5Config(d_model=2048, d_ff=5120, num_layers=24, num_decoder_layers=24, num_heads=32),
    "xxl": T5Config(d_model=4096, d_ff=10240, num_layers=24, num_decoder_layers=24, num_heads=64),
}


# ------------------------------------------------------------------------ weights generated for one example


class KeyValue(NamedTuple):
    """Keys and values of one attention. A prefix is a generated key/value pair."""

    key: Tensor  # [B or 1, h, S, k]
    value: Tensor  # [B or 1, h, S, k]

    def before(self, new: KeyValue) -> KeyValue:
        """Prepend this prefix to keys and values [B, h, T, k], after projection (HINT, section 3.1.1)."""
        batch = len(new.key)
        return KeyValue(*(torch.cat([p.expand(batch, -1, -1, -1).type_as(x), x], dim=2) for p, x in zip(self, new)))


class Cache(NamedTuple):
    """The prefix of a decoding step: keys and values of all earlier tokens, and room for new ones at the end."""

    key: Tensor  # [B, h, P + tokens, k]
    value: Tensor  # [B, h, P + tokens, k]

    def before(self, new: KeyValue) -> KeyValue:
        """Write the keys and values [B, h, T, k] of new tokens into the last T places, and return all of them."""
        for room, x in zip(self, new):
            room[:, :, -x.shape[2] :] = x
        return KeyValue(*self)


class Adapter(NamedTuple):
    """A bottleneck parallel to the feed-forward layer, HINT equation (1): gelu(u W_down + b_down) W_up + b_up."""

    down: Tensor  # [U, d, r] of U tasks, each with B/U of the examples
    down_bias: Tensor  # [U, 1, r]
    up: Tensor  # [U, r, d]
    up_bias: Tensor  # [U, 1, d]

    def __call__(self, u: Tensor) -> Tensor:  # [B, S, d]
        x = u.reshape(len(self.down), -1, u.shape[-1])  # [U, B/U*S, d]: no weight is copied for an example
        hidden = x @ self.down + self.down_bias  # [U, B/U*S, r]
        return (F.gelu(hidden, approximate="tanh") @ self.up + self.up_bias).view_as(u)


class LoRA(NamedTuple):
    """Low-rank changes of W_q and W_v of one attention (Hu et al., 2022): x (W + down up), with alpha/r = 1/r in up."""

    query_down: Tensor  # [B or 1, d, r]
    query_up: Tensor  # [B or 1, r, I]
    value_down: Tensor  # [B or 1, d, r]
    value_up: Tensor  # [B or 1, r, I]


class SerialAdapter(NamedTuple):
    """A bottleneck after a sublayer, as in Hyperformer: y + LN(gelu(y W_down + b_down) W_up + b_up)."""

    down: Tensor  # [B or 1, d, r]
    down_bias: Tensor  # [B or 1, 1, r]
    up: Tensor  # [B or 1, r, d]
    up_bias: Tensor  # [B or 1, 1, d]
    norm_scale: Tensor  # [B or 1, 1, d], generated like the matrices
    norm_shift: Tensor  # [B or 1, 1, d]

    def __call__(self, y: Tensor) -> Tensor:  # [B, S, d]
        change = Adapter(*self[:4])(y)
        return y + F.layer_norm(change, change.shape[-1:], eps=1e-6) * self.norm_scale + self.norm_shift


class LayerModules(NamedTuple):
    """The generated weights of one layer. Every part may be absent."""

    adapter: Adapter | None = None
    prefix: KeyValue | Cache | None = None  # of the self-attention
    cross_prefix: tuple[KeyValue, ...] = ()  # read by the cross-attention before the sources; decoder only
    lora: LoRA | None = None  # of the self-attention
    cross_lora: LoRA | None = None  # of the cross-attention, decoder only
    after_attention: SerialAdapter | None = None
    after_feed_forward: SerialAdapter | None = None


class Modules(NamedTuple):
    """The generated weights of a whole T5, a LayerModules for each layer."""

    encoder: tuple[LayerModules, ...]
    decoder: tuple[LayerModules, ...]


class Source(NamedTuple):
    """Encoded text for the cross-attention to read. A batch of 1 is broadcast to all rows and projected once."""

    states: Tensor  # [B or 1, S, d]
    attention_mask: Tensor  # [B or 1, S]


def map_tensors(function: Callable, tree, leaf=Tensor):
    """Apply a function to every tensor (or other kind of leaf) of nested tuples; None stays None."""
    if tree is None or isinstance(tree, leaf):
        return tree if tree is None else function(tree)
    items = [map_tensors(function, item, leaf) for item in tree]
    return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)


def select_rows(tree, rows: Tensor):
    """Select rows of every tensor of nested tuples; a batch of 1, which all rows share, stays as it is."""
    return map_tensors(lambda tensor: tensor if len(tensor) == 1 else tensor.index_select(0, rows), tree)


# --------------------------------------------------------------------------------------------- the model


class RMSNorm(nn.Module):
    """x / RMS(x) * weight, without mean or bias; the statistics are taken in fp32. [..., d] -> [..., d]"""

    def __init__(self, d_model: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        # Use vector_norm: autograd then saves no fp32 copy of x.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        return self.weight * (x * torch.rsqrt(norm.square() / x.shape[-1] + self.epsilon)).type_as(x)


def relative_position_bucket(relative: Tensor, bidirectional: bool, num_buckets: int, max_distance: int) -> Tensor:
    """Bucket of each (key position - query position): exact when near, logarithmic when far, one beyond max_distance.

    Half of the encoder's buckets are for keys after the query, which the decoder never sees (Raffel et al., 2.1).
    """
    if bidirectional:
        num_buckets //= 2
        offset = (relative > 0) * num_buckets
        distance = relative.abs()
    else:
        offset = 0
        distance = (-relative).clamp(min=0)
    exact = num_buckets // 2
    logarithm = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (logarithm * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return offset + torch.where(distance < exact, distance, far)


class RelativeBias(nn.Module):
    """The position bias of a stack's self-attention scores: one table [buckets, h], shared by all layers."""

    def __init__(self, config: T5Config, bidirectional: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.relative_attention_num_buckets, config.num_heads))
        self.bidirectional = bidirectional
        self.max_distance = config.relative_attention_max_distance

    def forward(self, queries: int, keys: int, first_query: int = 0) -> Tensor:
        """Bias [1, h, queries, keys], where query i stands at position first_query + i."""
        # Compute buckets on the CPU: a GPU's logarithm may fall just below an integer.
        relative = torch.arange(1 - first_query - queries, keys - first_query, device="cpu")  # all distances
        buckets = relative_position_bucket(relative, self.bidirectional, len(self.weight), self.max_distance)
        bias = self.weight[buckets.to(self.weight.device)].T  # [h, queries + keys - 1]
        return bias.unfold(1, keys, 1).flip(1).unsqueeze(0)  # the last query sees the first window


def padding_bias(attention_mask: Tensor) -> Tensor:
    """Bias [B, 1, 1, S] that hides padding, for a mask [B, S] of ones (tokens) and zeros (padding)."""
    return (attention_mask == 0)[:, None, None, :] * MASKED


def attend(query: Tensor, parts: Sequence[KeyValue], bias: Tensor, dropout: Callable[[Tensor], Tensor]) -> Tensor:
    """Attention of T5, whose scores are not divided by sqrt(k), over several parts under one softmax.

    query [B, h, T, k]; parts [B or 1, h, S_i, k], S long together; bias broadcastable to [B, h, T, S - P]
    -> [B, h, T, k]. A prefix, the first P keys, is always visible and has no position: its bias is zero.
    """
    scores = [torch.einsum("bhtk,bhsk->bhts", query, part.key) for part in parts]  # a batch of 1 is broadcast
    scores = scores[0] if len(parts) == 1 else torch.cat(scores, dim=-1)  # [B, h, T, S]
    if prefix := scores.shape[-1] - bias.shape[-1]:
        bias = F.pad(bias, (prefix, 0))
    scores = scores + bias
    weights = dropout(scores.softmax(dim=-1).type_as(query))
    lengths = [part.key.shape[2] for part in parts]
    pieces = weights.split(lengths, dim=-1) if len(parts) > 1 else [weights]
    return sum(torch.einsum("bhts,bhsk->bhtk", piece, part.value) for piece, part in zip(pieces, parts))


class Attention(nn.Module):
    """Multi-head attention without biases; d -> I -> d, where I = h*k need not be d."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        inner = config.num_heads * config.d_kv
        self.heads = config.num_heads
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        self.dropout = nn.Dropout(config.dropout_rate)

    def split(self, x: Tensor) -> Tensor:
        """[B, S, I] -> [B, h, S, k]"""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def project(self, states: Tensor, lora: LoRA | None = None) -> KeyValue:
        """Project states [B, S, d] to keys and values [B, h, S, k]."""
        key, value = self.k(states), self.v(states)
        if lora is not None:
            value = value + states @ lora.value_down @ lora.value_up
        return KeyValue(self.split(key), self.split(value))

    def forward(self, x: Tensor, parts: Sequence[KeyValue], bias: Tensor, lora: LoRA | None = None) -> Tensor:
        """Queries come from x [B, T, d], keys and values from `parts` -> [B, T, d]"""
        query = self.q(x)
        if lora is not None:
            query = query + x @ lora.query_down @ lora.query_up
        mixed = attend(self.split(query), parts, bias, self.dropout)  # [B, h, T, k]
        return self.o(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """v1.1: W_o (gelu(W_0 x) * W_1 x); v1.0: W_o relu(W_i x). No biases. [B, S, d] -> [B, S, d]"""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.gated = config.feed_forward_proj == "gated-gelu"
        for name in ("wi_0", "wi_1") if self.gated else ("wi",):
            setattr(self, name, nn.Linear(config.d_model, config.d_ff, bias=False))
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x) if self.gated else F.relu(self.wi(x))
        return self.wo(self.dropout(hidden))


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

    def forward(self, x: Tensor, bias: Tensor, modules: LayerModules, sources=(), source_bias=None) -> Tensor:
        """x [B, T, d] -> the same; a decoder layer, which has a `source_bias`, also reads the sources."""
        u = self.self_attention_norm(x)
        own = self.self_attention.project(u, modules.lora)
        if modules.prefix is not None:
            own = modules.prefix.before(own)
        y = self.self_attention(u, [own], bias, modules.lora)
        x = x + self.dropout(y if modules.after_attention is None else modules.after_attention(y))
        if source_bias is not None:
            u = self.cross_attention_norm(x)
            parts = self.read(sources, modules)
            x = x + self.dropout(self.cross_attention(u, parts, source_bias, modules.cross_lora))
        u = self.feed_forward_norm(x)
        y = self.feed_forward(u)
        x = x + self.dropout(y if modules.after_feed_forward is None else modules.after_feed_forward(y))
        return x if modules.adapter is None else x + modules.adapter(u)

    def read(self, sources: Sequence[Source], modules: LayerModules) -> tuple[KeyValue, ...]:
        """Keys and values for the cross-attention: of the prefix, then of each source."""
        projected = [self.cross_attention.project(source.states, modules.cross_lora) for source in sources]
        return (*modules.cross_prefix, *projected)


class Stack(nn.Module):
    """Encoder or decoder: blocks, one relative bias for all of them, a final norm."""

    def __init__(self, config: T5Config, is_decoder: bool) -> None:
        super().__init__()
        layers = config.num_decoder_layers if is_decoder else config.num_layers
        self.relative_bias = RelativeBias(config, bidirectional=not is_decoder)
        self.blocks = nn.ModuleList(Block(config, is_decoder) for _ in range(layers))
        self.final_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, bias: Tensor, layers=None, sources=(), source_bias=None) -> Tensor:
        """Embeddings [B, S, d] -> states [B, S, d], with the LayerModules of all `layers`; without, plain T5."""
        x = self.dropout(x)
        for block, modules in zip(self.blocks, layers or [LayerModules()] * len(self.blocks), strict=True):
            inputs = (x, bias, modules, sources, source_bias)
            x = recomputable(block, *inputs, recompute=self.gradient_checkpointing)
        return self.dropout(self.final_norm(x))


class T5(nn.Module):
    """The encoder-decoder. Ids are padded with 0; without an `attention_mask`, id 0 is padding."""

    def __init__(self, config: T5Config) -> None:
        """Draw fresh weights; `from_pretrained` loads published ones."""
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, is_decoder=False)
        self.decoder = Stack(config, is_decoder=True)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.apply(self.initialise)

    def initialise(self, module: nn.Module) -> None:
        """Draw the weights of one module: fan-in scaling, where W_q takes the 1/sqrt(k) that T5's scores lack.

        The relative bias starts larger than in transformers: Adafactor steps in proportion to a parameter's size.
        """
        if isinstance(module, Attention):
            nn.init.normal_(module.q.weight, std=(self.config.d_model * self.config.d_kv) ** -0.5)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1.0)
        elif isinstance(module, RelativeBias):
            nn.init.normal_(module.weight, std=0.5)

    def read(self, input_ids: Tensor, attention_mask: Tensor | None = None, modules: Modules | None = None) -> Source:
        """Encode ids [B, S] to states [B, S, d], with their mask, for the decoder to read."""
        mask = (input_ids != PAD) if attention_mask is None else attention_mask
        mask = mask.to(self.shared.weight.device)
        length = input_ids.shape[1]
        bias = self.encoder.relative_bias(length, length) + padding_bias(mask)  # [B, h, S, S]
        x = self.shared(input_ids.to(mask.device))  # ids may lie on the CPU
        return Source(self.encoder(x, bias, modules and modules.encoder), mask.long())

    def decode(self, decoder_input_ids: Tensor, sources: Sequence[Source], modules: Modules | None = None) -> Tensor:
        """Decoder ids [B, T] and the sources that they read -> states [B, T, d], after the final norm."""
        x = self.shared(decoder_input_ids.to(self.shared.weight.device))
        length = decoder_input_ids.shape[1]
        future = torch.ones(length, length, device=x.device).triu(1) * MASKED
        bias = self.decoder.relative_bias(length, length) + future  # [1, h, T, T]
        return self.decoder(x, bias, modules and modules.decoder, sources, source_bias(sources))

    def logits(self, states: Tensor) -> Tensor:
        """Decoder states [..., d] -> scores of the next token [..., V]."""
        if self.config.scale_decoder_outputs:
            states = states * self.config.d_model**-0.5
        return F.linear(states, self.shared.weight) if self.lm_head is None else self.lm_head(states)

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Input ids [B, S], decoder ids [B, T] (the labels shifted right) -> logits [B, T, V]."""
        return self.logits(self.decode(decoder_input_ids, [self.read(input_ids, attention_mask)]))

    def loss(self, labels: Tensor, sources: Sequence[Source], modules: Modules | None = None) -> Loss:
        """Loss of the answers `labels` [B, T], padded with -100, given the sources."""
        return token_loss(*self._target_logits(labels, sources, modules))

    def log_probabilities(self, labels: Tensor, sources: Sequence[Source], modules: Modules | None = None) -> Tensor:
        """Log-probability [B] of each answer of `labels` [B, T], padded with -100, in fp32.

        Choices are ranked by this sum over tokens and `</s>`; it is not divided by the length.
        """
        logits, targets = self._target_logits(labels, sources, modules)
        chosen = -F.cross_entropy(logits.float(), targets, reduction="none")  # [N]
        return chosen.new_zeros(labels.shape).masked_scatter(labels.to(chosen.device) != NO_LABEL, chosen).sum(1)

    def _target_logits(self, labels: Tensor, sources: Sequence[Source], modules: Modules | None) -> tuple:
        """Logits [N, V] and ids [N] of the target tokens. Apply the head, the largest matrix, to no padding."""
        places = (labels.flatten() != NO_LABEL).nonzero()[:, 0]  # [N]; for labels on the CPU no GPU is waited for
        targets = labels.flatten()[places]
        decoder_input_ids = F.pad(labels[:, :-1], (1, 0), value=START).clamp(min=PAD)  # shifted right
        states = self.decode(decoder_input_ids, sources, modules).flatten(0, 1)  # [B*T, d]
        return self.logits(states.index_select(0, places.to(states.device))), targets.to(states.device)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, max_new_tokens: int = 128) -> Tensor:
        """Answer greedily: [B, <= max_new_tokens] without the start token; `</s>`, then padding at the end."""
        return self.decode_greedily([self.read(input_ids, attention_mask)], None, max_new_tokens)

    @torch.no_grad()
    def decode_greedily(self, sources: Sequence[Source], modules: Modules | None, max_new_tokens: int) -> Tensor:
        """Take the most probable next token until every row has ended: [B, <= max_new_tokens].

        A cache is a prefix that earlier tokens wrote. When half of the rows have ended, the others go on alone.
        """
        batch, bias = max(len(source.states) for source in sources), source_bias(sources)
        layers = self._with_caches(sources, modules, batch, max_new_tokens)
        positions = self.decoder.relative_bias(1, max_new_tokens, first_query=max_new_tokens - 1)  # [1, h, 1, T]
        going = torch.arange(batch, device=bias.device)  # rows that have not ended, B at first
        token = torch.full((batch, 1), START, device=bias.device)
        ended = torch.zeros(batch, dtype=torch.bool, device=bias.device)
        answer = torch.full((batch, max_new_tokens), PAD, device=bias.device)
        for unwritten in reversed(range(max_new_tokens)):
            seen = layers[0].prefix.key.shape[2] - unwritten  # P + t + 1
            step = [layer._replace(prefix=Cache(*(room[:, :, :seen] for room in layer.prefix))) for layer in layers]
            # The bias depends on distance alone: query t uses the last t+1 columns of the final query's bias.
            states = self.decoder(self.shared(token), positions[..., unwritten:], step, source_bias=bias)
            token = self.logits(states).argmax(-1).masked_fill(ended[:, None], PAD)  # [B, 1]
            position = max_new_tokens - 1 - unwritten
            answer[going, position] = token[:, 0]
            ended = ended | (token[:, 0] == EOS)
            count = int(ended.sum())
            if count == len(ended):
                return answer[:, : position + 1]
            if 2 * count >= len(ended):
                rows = (~ended).nonzero()[:, 0]
                going, token, ended = going[rows], token[rows], ended[rows]
                bias, layers = select_rows((bias, layers), rows)
        return answer

    def _with_caches(self, sources, modules: Modules | None, batch: int, max_new_tokens: int) -> list[LayerModules]:
        """Compute keys and values of the sources once, and make room for those of all tokens after the prefix."""
        layers = []
        for number, block in enumerate(self.decoder.blocks):
            layer = modules.decoder[number] if modules else LayerModules()
            parts = tuple(map_tensors(Tensor.contiguous, part) for part in block.read(sources, layer))
            _, heads, _, width = parts[0].key.shape
            room = KeyValue(*parts[0].key.new_zeros(2, batch, heads, max_new_tokens, width))
            cache = Cache(*(room if layer.prefix is None else layer.prefix.before(room)))
            layers.append(layer._replace(prefix=cache, cross_prefix=parts))
        return layers

    @classmethod
    def from_pretrained(cls, name_or_dir: str | os.PathLike) -> T5:
        """Load a T5 from the hub, by its public name, or from a folder, in fp32 and eval mode. Raises InputError.

        Every tensor of the checkpoint is used once, but for copies of the embedding and an unused old table.
        """
        config = read_config(name_or_dir, T5Config.from_json)
        tensors = _without_aliases(read_weights(name_or_dir), config.tie_word_embeddings)
        config = replace(config, tie_word_embeddings="lm_head.weight" not in tensors)
        with torch.device("meta"):
            model = cls(config)
        fill(model, tensors, public_name, source=name_or_dir)
        return model.eval()

    def save_pretrained(self, folder: str | os.PathLike, notes: dict | None = None, step: int = 0) -> None:
        """Write `config.json` (with `notes` added) and `model.safetensors` under public names, for transformers too."""
        kind = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "decoder_start_token_id": START}
        tensors = {public_name(name): parameter for name, parameter in self.named_parameters()}
        save_folder(folder, {**kind, **asdict(self.config), **(notes or {})}, tensors, step)


def source_bias(sources: Sequence[Source]) -> Tensor:
    """Bias [B or 1, 1, 1, S] of the cross-attention, which hides the padding of all sources."""
    batch = max(len(source.attention_mask) for source in sources)
    return padding_bias(torch.cat([source.attention_mask.expand(batch, -1) for source in sources], dim=1))


class Loss(NamedTuple):
    """The loss of N target tokens. Weighted by N, the losses of parts of a batch add up to that of the batch."""

    loss: Tensor  # the trained objective: mean of cross-entropy + 1e-4 (log Z)^2
    cross_entropy: Tensor  # mean, in nats
    tokens: int  # N


def token_loss(logits: Tensor, labels: Tensor) -> Loss:
    """Loss of logits [N, V] for labels [N], in fp32. The authors' (log Z)^2 keeps the logits from drifting."""
    logits = logits.float()
    log_z = logits.logsumexp(-1)  # [N]
    chosen = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)  # [N]
    count = max(len(labels), 1)
    cross_entropy = (log_z - chosen).sum() / count
    return Loss(cross_entropy + Z_LOSS * log_z.square().sum() / count, cross_entropy, len(labels))


def recomputable(module: nn.Module, *inputs, recompute: bool) -> Tensor:
    """Call a module; `recompute` its activations in the backward pass instead of keeping them (same gradient)."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(module, *inputs, use_reentrant=False)
    return module(*inputs)


def set_gradient_checkpointing(model: nn.Module, on: bool) -> None:
    """Recompute T5's blocks and the generator's parts in the backward pass; the gradient is the same."""
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = on


# ------------------------------------------------------------------------ reading and writing checkpoints

_RENAMES = (  # name in this file -> name in public checkpoints
    (r"^(encoder|decoder)\.relative_bias\.weight", r"\1.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
    (r"^(encoder|decoder)\.final_norm", r"\1.final_layer_norm"),
    (r"\.self_attention", ".layer.0.SelfAttention"),
    (r"\.cross_attention", ".layer.1.EncDecAttention"),
    (r"^(encoder.*)\.feed_forward", r"\1.layer.1.DenseReluDense"),
    (r"^(decoder.*)\.feed_forward", r"\1.layer.2.DenseReluDense"),
    (r"\w+(Attention|Dense)_norm", "layer_norm"),
    (r"\.blocks\.", ".block."),
)
_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"  # in old files; no T5 reads it


def public_name(name: str) -> str:
    """Name of a parameter of this file in public checkpoints."""
    for pattern, public in _RENAMES:
        name = re.sub(pattern, public, name)
    return name


def _without_aliases(tensors: dict[str, Tensor], tied: bool) -> dict[str, Tensor]:
    """Drop second names of the embedding, after comparing the tensors, and the unused table."""
    aliases = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"] + ["lm_head.weight"] * tied
    shared = tensors.get("shared.weight")
    copies = {name for name in aliases if name in tensors and shared is not None and torch.equal(tensors[name], shared)}
    return {name: tensor for name, tensor in tensors.items() if name not in copies and name != _UNUSED}


def fill(model: nn.Module, tensors: dict[str, Tensor], name_in_file: Callable[[str], str], source: object) -> None:
    """Give each parameter of a model on the meta device its tensor, in fp32. Raises InputError."""
    expected = {name_in_file(name): (name, parameter) for name, parameter in model.named_parameters()}
    known = tensors.keys() & expected.keys()
    wrong = {
        "lacks": expected.keys() - known,
        "has no place in this model for": tensors.keys() - known,
        "and its config differ in the shape of": {n for n in known if tensors[n].shape != expected[n][1].shape},
        "has whole, infinite or missing numbers in": {
            n for n in known if not (tensors[n].is_floating_point() and tensors[n].isfinite().all())
        },
    }
    for complaint, names in wrong.items():
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise InputError(f"{source}: the checkpoint {complaint} {one_line(', '.join(sorted(names)[:3]))}{more}")
    for name, (own_name, parameter) in expected.items():
        owner, _, leaf = own_name.rpartition(".")
        tensor = tensors[name].to(torch.float32, copy=True)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=parameter.requires_grad))


def read_config(name_or_dir: str | os.PathLike, parse: Callable[[dict], object]):
    """Parse the `config.json` of a folder or repository. Raises InputError."""
    path = fetch(name_or_dir, "config.json")
    if path is None:
        raise InputError(f"{name_or_dir}: holds no config.json; name the folder of a model, or a public name")
    with reading(path):
        return parse(read_json(path))


def read_weights(name_or_dir: str | os.PathLike) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint by name: safetensors or .bin, single or sharded. Raises InputError."""
    for name, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_bin)):
        if path := fetch(name_or_dir, name):
            return read(path)
        if index := fetch(name_or_dir, f"{name}.index.json"):
            break
    else:
        raise InputError(f"{name_or_dir}: holds no model.safetensors and no pytorch_model.bin")
    tensors: dict[str, Tensor] = {}
    with reading(index):
        shard_of = read_json(index)["weight_map"]
        for shard in sorted(set(shard_of.values())):
            path = fetch(name_or_dir, shard) if shard == Path(shard).name else None  # never outside the folder
            if path is None:
                raise ValueError(f"names the shard {shard!r:.80}, which is not there")
            tensors |= {name: tensor for name, tensor in read(path).items() if shard_of.get(name, shard) == shard}
        if astray := shard_of.keys() ^ tensors.keys():
            raise ValueError(f"the index and its shards differ in {min(astray)}")
    return tensors


def read_bin(path: Path) -> dict[str, Tensor]:
    """Read a `pytorch_model.bin`; `weights_only` executes nothing. Raises InputError."""
    with reading(path):
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()):
            raise ValueError("is not a dictionary of tensors")
    return tensors


_SAFETENSORS_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "U8": torch.uint8,
}  # fmt: skip


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, mapped from disk: 8 bytes of length, a JSON header, raw data. Raises InputError."""
    with reading(path):
        header, data = _open_safetensors(path)
        header.pop("__metadata__", None)
        tensors, end = {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, next_end = entry["data_offsets"]
            if begin != end:
                raise ValueError(f"tensors overlap or leave a gap at byte {end}")
            tensor = torch.from_numpy(data[begin:next_end]).view(_SAFETENSORS_TYPES[entry["dtype"]])
            tensors[name], end = tensor.reshape(entry["shape"]), next_end
        if end != len(data):
            raise ValueError(f"holds {len(data):,} bytes of tensors where its header promises {end:,}")
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """Read the texts in the header of a safetensors file. Raises InputError."""
    with reading(path):
        return dict(_open_safetensors(path)[0].get("__metadata__", {}))


def _open_safetensors(path: Path) -> tuple[dict, np.ndarray]:
    data = np.memmap(path, dtype=np.uint8, mode="c")
    length = int.from_bytes(data[:8].tobytes(), "little")
    return json.loads(data[8 : 8 + length].tobytes()), data[8 + length :]


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors in the safetensors format, atomically."""
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
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def save_folder(folder: str | os.PathLike, config: dict, tensors: dict[str, Tensor], step: int) -> None:
    """Write a model's `config.json`, then its `model.safetensors`, which names the step of its training."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "config.json") as file:
        file.write(json.dumps(config, indent=2).encode() + b"\n")
    write_safetensors(folder / "model.safetensors", tensors, {"step": str(step)})


# --------------------------------------------------------------------------------------------- files


class InputError(ValueError):
    """A file, name or option that the user gave cannot be used; the message is one sentence."""


def one_line(text: object) -> str:
    """Shorten a library's message, or a name found in a file, to fit into a sentence."""
    line = str(text).strip().partition("\n")[0][:160]
    return "".join(letter if letter.isprintable() else "?" for letter in line)


@contextmanager
def reading(path: object) -> Iterator[None]:
    """Turn whatever goes wrong while a file is read into one sentence that names the file. Raises InputError."""
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic inside the tokenizers library is no Exception
        reason = error.strerror if isinstance(error, OSError) else error
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise InputError(f"{path}: cannot be read ({kind}{one_line(reason)})") from None


def read_json(path: Path) -> dict:
    """Read a JSON object. Raises InputError."""
    with reading(path):
        content = json.loads(path.read_text("utf-8-sig"))
        if not isinstance(content, dict):
            raise ValueError("is JSON, but not an object")
    return content


def fetch(name_or_dir: str | os.PathLike, filename: str) -> Path | None:
    """Find a file of a folder, or download it from a repository of the hub; None if there is no such file."""
    if os.path.isdir(name_or_dir):
        path = Path(name_or_dir, filename)
        return path if path.is_file() else None
    parent = Path(name_or_dir).parent
    if len(parent.parts) > 1 or (parent.parts and parent.is_dir()):  # public names have one slash at most
        raise InputError(f"{name_or_dir}: no such folder")
    try:
        return Path(hf_hub_download(str(name_or_dir), filename))
    except EntryNotFoundError:
        return None
    except (OSError, ValueError) as error:  # no such repository, no access, no network, not a name
        raise InputError(f"{name_or_dir}: is no folder, and no repository could be read ({one_line(error)})") from None


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` once it is whole and on disk; until then `path` is untouched."""
    beside = path.with_name(path.name + ".partial")
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        with suppress(OSError):  # sync the folder's names too, where the system can
            descriptor = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    finally:
        beside.unlink(missing_ok=True)
