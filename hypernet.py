"""Hypernetworks: an encoded instruction in, adapters and prefixes for every layer of T5 out (HINT, section 3.1.1).

Axes: B instructions, S instruction tokens, d model, h heads, k per head, I = h*k, r bottleneck, P prefix, t task
embedding, L layers of a stack. A *slot* is a place of T5 that takes a weight; a *column* is one generated vector.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t5 import (
    T5, Adapter, Attention, KeyValue, LayerModules, LoRA, Modules, RMSNorm, SerialAdapter, Source, T5Config,
    check_fields, padding_bias, recomputable,
)  # fmt: skip


@dataclass(frozen=True)
class HINTConfig:
    """The generated modules, their generator, and the weights that train. The defaults are the paper's (section 4)."""

    bottleneck: int = 512  # r, hidden width of each adapter, or the rank of LoRA
    prefix_length: int = 30  # P, generated keys and values of each attention
    generator_dropout: float = 0.1  # in the generating networks; the authors' code has 0.1 whatever T5 has
    embedding_scale: float = 1.0  # standard deviation of new column embeddings, in units of d^-0.5 (the authors': 1)
    generator: str = "columns"  # a key of GENERATORS (Table 6: "decoder")
    modules: str = "adapters+prefixes"  # a key of MODULES (Table 5)
    fusion: bool = True  # the decoder also reads the instruction's states (Table 6)
    hyperencoder: str = "tied"  # who reads the instruction: T5's own encoder; "own": a copy; "table": a task embedding
    trains: str = "all"  # "hypernetwork": T5 is frozen; "hypernetwork+norms": T5 but for its norms is frozen
    tasks: int = 0  # rows of the table of task embeddings, for the hyperencoder "table"

    def __post_init__(self) -> None:
        bounds = {"bottleneck": (1, 1e5), "prefix_length": (1, 1e5), "tasks": (0, 1e6)}
        check_fields(self, {**bounds, "generator_dropout": (0, 0.99), "embedding_scale": (0, 1e3)})
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r:.40}")
        has_table, is_hyperformer = self.hyperencoder == "table", self.generator.startswith("hyperformer")
        if has_table != (self.tasks > 0) or has_table and (self.fusion or not is_hyperformer):
            raise ValueError("hyperencoder table: needs tasks, a hyperformer to read it, and no fusion")
        if self.modules != "adapters+prefixes" and (is_hyperformer or self.generator == "none"):
            raise ValueError(f"modules: the generator {self.generator} leaves no choice of them")
        unread = self.generator == "none" or self.generator == "direct" and self.hyperencoder == "own"
        if unread and not self.fusion:
            raise ValueError(f"with the generator {self.generator} and without fusion nothing reads the instruction")
        if (self.generator, self.hyperencoder, self.trains) == ("none", "tied", "hypernetwork"):
            raise ValueError("trains: with the generator none and a frozen T5, nothing does")


# --------------------------------------------------------------------------------------------- the paper's generator


class Kind(NamedTuple):
    """One kind of generated weight: `slots` places of T5 take it, each as `columns` vectors of `width` numbers."""

    slots: int
    columns: int
    width: int


MODULES = {  # Table 5
    "adapters+prefixes": ("adapter", "prefix"),
    "adapters": ("adapter",),
    "prefixes": ("prefix",),
    "lora": ("lora",),
}


def generated_kinds(t5: T5Config, config: HINTConfig) -> dict[str, Kind]:
    """List the generated weights of one instruction: an adapter per layer, a prefix (or LoRA) per attention.

    The authors' code also generates an adapter for every cross-attention and never uses it: 31 % of its columns at XL.
    """
    d, inner, r, prefix = t5.d_model, t5.num_heads * t5.d_kv, config.bottleneck, config.prefix_length
    layers = t5.num_layers + t5.num_decoder_layers
    attentions = t5.num_layers + 2 * t5.num_decoder_layers
    kinds = {
        "adapter_down": Kind(layers, r, d),
        "adapter_down_bias": Kind(layers, 1, r),
        "adapter_up": Kind(layers, r, d),
        "adapter_up_bias": Kind(layers, 1, d),
        "prefix_key": Kind(attentions, prefix, inner),
        "prefix_value": Kind(attentions, prefix, inner),
        "lora_query_down": Kind(attentions, r, d),
        "lora_query_up": Kind(attentions, r, inner),
        "lora_value_down": Kind(attentions, r, d),
        "lora_value_up": Kind(attentions, r, inner),
    }
    return {name: kind for name, kind in kinds.items() if name.startswith(MODULES[config.modules])}


class Generator(nn.Module):
    """Base of the generators whose `weights` writes columns, by kind [B, slots, columns, width]: hands them to T5."""

    def __init__(self, t5: T5, config: HINTConfig) -> None:
        super().__init__()
        self.heads, self.scale, self.lora_scale = t5.config.num_heads, t5.config.d_model**-0.5, 1 / config.bottleneck
        self.encoder_layers, self.decoder_layers = t5.config.num_layers, t5.config.num_decoder_layers
        self.kinds = generated_kinds(t5.config, config)

    def forward(self, states: Tensor, attention_mask: Tensor) -> Modules:
        """Encoded instructions [B, S, d] with their mask [B, S] -> modules for B examples, or for all (B = 1)."""
        weights = {name: weight.unbind(1) for name, weight in self.weights(states, attention_mask).items()}
        first = self.encoder_layers
        encoder = [self.layer(weights, number, [number]) for number in range(first)]
        decoder = [
            self.layer(weights, first + number, [first + 2 * number, first + 2 * number + 1])  # self and cross
            for number in range(self.decoder_layers)
        ]
        return Modules(tuple(encoder), tuple(decoder))

    def layer(self, weights: dict[str, tuple[Tensor, ...]], layer: int, attentions: list[int]) -> LayerModules:
        """Hand over the columns [B, columns, width] of one layer and of its attentions, by kind and slot."""
        adapter, prefixes, loras = None, [], []
        if "adapter_down" in weights:  # column j of W_down and row j of W_up are vector j
            down, up = weights["adapter_down"][layer].mT, weights["adapter_up"][layer]
            adapter = Adapter(down, weights["adapter_down_bias"][layer], up, weights["adapter_up_bias"][layer])
        for slot in attentions:
            if "prefix_key" in weights:
                pair = weights["prefix_key"][slot], weights["prefix_value"][slot]  # [B, P, I] each
                prefixes.append(KeyValue(*(part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in pair)))
            if "lora_query_down" in weights:
                query_down, query_up, value_down, value_up = (weights[name][slot] for name in self.kinds)
                loras.append(LoRA(query_down.mT, query_up * self.lora_scale, value_down.mT, value_up * self.lora_scale))
        return LayerModules(adapter, prefixes[0] if prefixes else None, tuple(prefixes[1:]), *loras)


class InstructionReader(Attention):
    """The generator's cross-attention: no norm, residual or position, as in the authors' code; padding is masked."""

    def __init__(self, t5: T5) -> None:
        super().__init__(t5.config)
        self.apply(t5.initialise)

    def forward(self, columns: Tensor, states: Tensor, attention_mask: Tensor) -> Tensor:
        """C [1, N, d], an encoded instruction [B, S, d] and its mask [B, S] -> Z [B, N, d]"""
        query = self.split(self.q(columns)).expand(len(states), -1, -1, -1)  # [B, h, N, k]
        bias, dropout = padding_bias(attention_mask).type_as(query), self.dropout.p * self.training
        # Use torch's fused attention: on a GPU it keeps no scores [B, h, N, S], and N is in the ten thousands.
        z = F.scaled_dot_product_attention(query, *self.project(states), bias, dropout, scale=1.0)  # [B, h, N, k]
        return self.o(z.transpose(1, 2).flatten(2))


class ColumnGenerator(Generator):
    """The parameter generator of section 3.1.1, which decomposes every matrix into its columns.

    1. Each column of each adapter matrix, each bias and each prefix token has an embedding of its own in each layer:
       N of them per kind, C [N, d].
    2. Cross-attention from C to the encoded instruction collects what each column needs: Z [N, d].
    3. A two-layer network for each kind of weight, shared by all layers, turns each row of Z into a column.

    A matrix of d x r costs r embeddings and a share of one d x d network; a single embedding for the whole matrix would
    need a network of d x (d*r) ("Scaling Down Parameters"). Every value is divided by sqrt(d), and there are six
    networks, as in the authors' code; the paper has one for adapters and one for prefixes.
    """

    def __init__(self, t5: T5, config: HINTConfig, reader: nn.Module | None, normed: bool = False) -> None:
        """`reader`: from C, states and mask to Z; without a reader, Z is C and the instruction is ignored.

        `normed`: a norm stands before each network, which the authors have only after a full decoder.
        """
        super().__init__(t5, config)
        d = t5.config.d_model
        self.embeddings, self.networks = nn.ParameterDict(), nn.ModuleDict()
        for name, kind in self.kinds.items():
            columns = torch.randn(kind.slots * kind.columns, d) * config.embedding_scale * d**-0.5
            self.embeddings[name] = nn.Parameter(columns)
        self.attention = reader
        for name, kind in self.kinds.items():
            before = [RMSNorm(d, t5.config.layer_norm_epsilon)] if normed else []
            self.networks[name] = nn.Sequential(*before, *two_layer_network(d, kind.width, config.generator_dropout))
        self.gradient_checkpointing = False

    def weights(self, states: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """C -> Z -> columns, all layers at once."""
        z = torch.cat([self.embeddings[name] for name in self.kinds]).unsqueeze(0)  # C [1, N, d]
        if self.attention is None:
            z = z.expand(len(states), -1, -1)
        else:
            z = recomputable(self.attention, z, states, attention_mask, recompute=self.gradient_checkpointing)
        pieces = z.split([kind.slots * kind.columns for kind in self.kinds.values()], dim=1)  # Z [B, N, d]
        weights = {}
        for (name, kind), piece in zip(self.kinds.items(), pieces):
            columns = recomputable(self.networks[name], piece, recompute=self.gradient_checkpointing)
            weights[name] = columns.unflatten(1, (kind.slots, kind.columns)) * self.scale
        return weights


def two_layer_network(d_model: int, width: int, dropout: float) -> nn.Sequential:
    """Make W_2 dropout(gelu(W_1 z)): [..., d] -> [..., width], without biases."""
    network = nn.Sequential(
        nn.Linear(d_model, d_model, bias=False),
        nn.GELU(approximate="tanh"),
        nn.Dropout(dropout),
        nn.Linear(d_model, width, bias=False),
    )
    for layer in (network[0], network[3]):
        nn.init.normal_(layer.weight, std=d_model**-0.5)
    return network


# The paper's model ends here. What follows are the systems and ablations that it is compared with.


class DecoderReader(nn.Module):
    """A copy of T5's decoder without self-attention: HyperTune (Phang et al., 2022), "full decoder" (Table 6)."""

    def __init__(self, t5: T5) -> None:
        super().__init__()
        self.blocks, self.norm = copy.deepcopy(t5.decoder.blocks), copy.deepcopy(t5.decoder.final_norm)
        self.dropout = nn.Dropout(t5.config.dropout_rate)
        for block in self.blocks:
            del block.self_attention, block.self_attention_norm

    def forward(self, columns: Tensor, states: Tensor, attention_mask: Tensor) -> Tensor:
        """C [1, N, d] through the layers, each of which reads the instruction [B, S, d] -> Z [B, N, d]"""
        x, bias = columns, padding_bias(attention_mask)
        for block in self.blocks:
            parts = [block.cross_attention.project(states)]
            x = x + block.dropout(block.cross_attention(block.cross_attention_norm(x), parts, bias))
            x = x + block.dropout(block.feed_forward(block.feed_forward_norm(x)))
        return self.dropout(self.norm(x))


class PooledGenerator(Generator):
    """Hypter (Ye and Ren, 2021), as rebuilt for HINT: a network per kind reads the mean of the instruction's states."""

    def __init__(self, t5: T5, config: HINTConfig) -> None:
        super().__init__(t5, config)
        self.networks = nn.ModuleDict()
        for name, kind in self.kinds.items():
            size = kind.slots * kind.columns * kind.width
            self.networks[name] = two_layer_network(t5.config.d_model, size, config.generator_dropout)

    def weights(self, states: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Generate each kind of weight from the pooled mean [B, d]: [B, slots, columns, width]."""
        pooled = mean_of_tokens(states, attention_mask)
        return {name: self.networks[name](pooled).unflatten(1, kind) * self.scale for name, kind in self.kinds.items()}


def mean_of_tokens(states: Tensor, attention_mask: Tensor) -> Tensor:
    """Average the states [B, S, d] of tokens that are no padding -> [B, d]."""
    weight = attention_mask.unsqueeze(-1).type_as(states)
    return (states * weight).sum(1) / weight.sum(1).clamp(min=1)


# --------------------------------------------------------------------------------------------- Hyperformer

TASK = 64  # t, width of the embeddings of task, layer and place, and of z
HIDDEN = 128  # of the network that joins them
PLACES = ("after_attention", "after_feed_forward")


class Hyperformer(nn.Module):
    """Karimi Mahabadi et al. (2021): a hypernetwork per stack generates serial adapters from embeddings.

    It reads the embedding of a task [B, 1, t] from a `TaskTable`. With another hyperencoder it reads an encoded
    instruction, whose mean is projected to t. In Hyperformer++ both places of adapters share the generating layers.
    """

    def __init__(self, t5: T5, config: HINTConfig, shares_places: bool = False) -> None:
        super().__init__()
        d = t5.config.d_model
        self.project = None if config.hyperencoder == "table" else nn.Linear(d, TASK)
        self.stacks = nn.ModuleList(
            StackHypernetwork(d, config.bottleneck, layers, shares_places)
            for layers in (t5.config.num_layers, t5.config.num_decoder_layers)
        )

    def forward(self, states: Tensor, attention_mask: Tensor) -> Modules:
        """A task embedding [B, 1, t] or an encoded instruction [B, S, d] -> modules for B examples."""
        task = states[:, 0] if self.project is None else self.project(mean_of_tokens(states, attention_mask))
        return Modules(*(stack(task) for stack in self.stacks))


class StackHypernetwork(nn.Module):
    """z = LN(W_2 relu(W_1 [task; layer; place])), and a linear layer from z for each part of an adapter.

    With `shares_places` (++) one set of linear layers writes the adapters of both places. Otherwise z knows nothing of
    the place, and each place has its own set.
    """

    def __init__(self, d: int, r: int, layers: int, shares_places: bool) -> None:
        super().__init__()
        self.layers = nn.Parameter(torch.randn(layers, TASK))
        self.places = nn.Parameter(torch.randn(len(PLACES), TASK)) if shares_places else None
        read = nn.Linear((3 if shares_places else 2) * TASK, HIDDEN)
        self.join = nn.Sequential(read, nn.ReLU(), nn.Linear(HIDDEN, TASK), nn.LayerNorm(TASK))
        self.shapes = [(d, r), (1, r), (r, d), (1, d), (1, d), (1, d)]  # of the parts of a SerialAdapter
        self.heads = nn.ModuleList(
            nn.ModuleList(nn.Linear(TASK, rows * columns) for rows, columns in self.shapes)
            for _ in range(1 if shares_places else len(PLACES))
        )
        for head in self.heads.modules():
            if isinstance(head, nn.Linear):  # so small that the adapters, with their norms, start near the identity
                nn.init.normal_(head.weight, std=0.01)
                nn.init.zeros_(head.bias)

    def forward(self, task: Tensor) -> tuple[LayerModules, ...]:
        """Task embeddings [B, t] -> the two adapters of each layer."""
        adapters = [self.adapters(task, place) for place in range(len(PLACES))]
        return tuple(LayerModules(**dict(zip(PLACES, pair))) for pair in zip(*adapters))

    def adapters(self, task: Tensor, place: int) -> list[SerialAdapter]:
        """Generate the adapters of one place, for all layers."""
        batch, layers = len(task), len(self.layers)
        read = [task.unsqueeze(1).expand(-1, layers, -1), self.layers.expand(batch, -1, -1)]
        if self.places is not None:
            read.append(self.places[place].expand(batch, layers, -1))
        z = self.join(torch.cat(read, dim=-1))  # [B, L, t]
        heads = self.heads[place % len(self.heads)]
        parts = [head(z).unflatten(-1, shape).unbind(1) for head, shape in zip(heads, self.shapes)]
        return [SerialAdapter(*layer) for layer in zip(*parts)]


# ------------------------------------------------------------------------------- hyperencoders and choices


class OwnEncoder(nn.Module):
    """A hyperencoder of its own: a copy of T5's embedding and encoder that trains apart from them (section 3.1)."""

    def __init__(self, t5: T5, config: HINTConfig) -> None:
        super().__init__()
        self.config, self.shared, self.encoder = t5.config, copy.deepcopy(t5.shared), copy.deepcopy(t5.encoder)

    forward = T5.read


class TaskTable(nn.Module):
    """Hyperformer's embeddings of tasks: an instruction is the number of its task, and no text is read."""

    def __init__(self, t5: T5, config: HINTConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(config.tasks, TASK))
        self.fitted: Tensor | None = None  # rows of new tasks, fitted for one evaluation and never saved

    def forward(self, numbers: Tensor, attention_mask: Tensor | None = None) -> Source:
        """Numbers of tasks [B, 1] -> states [B, 1, t]; indices past the table are new tasks, fitted at evaluation."""
        weight = self.weight if self.fitted is None else torch.cat([self.weight, self.fitted])
        numbers = numbers.to(weight.device)
        return Source(weight[numbers], torch.ones_like(numbers))


HYPERENCODERS: dict[str, Callable[[T5, HINTConfig], nn.Module | None]] = {
    "tied": lambda t5, config: None,
    "own": OwnEncoder,
    "table": TaskTable,
}
GENERATORS: dict[str, Callable[[T5, HINTConfig], nn.Module | None]] = {
    "columns": lambda t5, config: ColumnGenerator(t5, config, InstructionReader(t5)),
    "direct": lambda t5, config: ColumnGenerator(t5, config, None),  # Tk-Instruct + PEFT: the same modules for all
    "decoder": lambda t5, config: ColumnGenerator(t5, config, DecoderReader(t5), normed=True),
    "pooled": PooledGenerator,
    "none": lambda t5, config: None,  # instruction fusion alone remains of HINT (Table 6, "- PEFT Gen.")
    "hyperformer": Hyperformer,
    "hyperformer++": partial(Hyperformer, shares_places=True),
}
CHOICES = {
    "generator": tuple(GENERATORS),
    "modules": tuple(MODULES),
    "hyperencoder": tuple(HYPERENCODERS),
    "trains": ("all", "hypernetwork", "hypernetwork+norms"),
}
