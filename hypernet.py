"""Hypernetworks: an encoded instruction in, the modules of every layer of T5 out.

`ColumnGenerator` is the one of HINT (section 3.1.1). Beside it stand those that the paper compares it with, a class
each: `DecoderGenerator` (HyperTune, and the ablation "full decoder"), `PooledGenerator` (Hypter), `DirectGenerator`
("+ PEFT": no instruction reaches the modules), `NoModules` (fusion alone) and `Hyperformer` (Karimi Mahabadi et al.,
ACL 2021), its ancestor, which reads the embedding of a task in place of a text.

Axes: B instructions, S instruction tokens, d model, h heads, k per head, I = h*k, r bottleneck, P prefix, t task
embedding, N columns (all that is generated for one instruction), L_e and L_d layers of the encoder and the decoder.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Callable, NamedTuple

import torch
from torch import Tensor, nn

from t5 import (
    T5,
    Adapter,
    Attention,
    CheckpointError,
    KeyValue,
    LayerModules,
    Linear,
    LoRA,
    Modules,
    SerialAdapter,
    T5Config,
    padding_bias,
)  # fmt: skip


@dataclass(frozen=True)
class HINTConfig:
    """What is generated, by what, and what of it all trains. The defaults are the paper's (section 4)."""

    bottleneck: int = 512  # r, hidden width of each adapter, or the rank of LoRA (He et al., 2022)
    prefix_length: int = 30  # P, generated keys and values of each attention
    generator_dropout: float = 0.1  # in the generating networks; the authors' code has 0.1 whatever T5 has
    embedding_scale: float = 1.0  # column embeddings begin with a std of this times d^-0.5, the authors' value
    generator: str = "columns"  # the class that generates, a key of GENERATORS (Table 6: "full decoder")
    modules: str = "adapters+prefixes"  # what it generates, a key of MODULES (Table 5)
    fusion: bool = True  # the decoder reads the instruction's states too (Table 6)
    hyperencoder: str = "tied"  # T5's own encoder reads the instruction; "own": a copy; "table": no text but a number
    trains: str = (
        "all"  # "hypernetwork": T5 is frozen (HyperTune); "hypernetwork+norms": but for its norms (Hyperformer)
    )
    tasks: int = 0  # rows of the table of task embeddings, for the hyperencoder "table"

    def __post_init__(self) -> None:
        bounds = {
            "bottleneck": (int, 1, 1e5),
            "prefix_length": (int, 1, 1e5),
            "generator_dropout": (float, 0, 0.99),
            "embedding_scale": (float, 0, 1e3),
            "tasks": (int, 0, 1e6),
        }
        for name, (kind, least, most) in bounds.items():
            value = getattr(self, name)
            if type(value) not in (int, kind) or not least <= value <= most:
                raise CheckpointError(f"{name} must be from {least} to {most:g}, not {value!r:.40}")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices or type(value) is not type(choices[0]):
                raise CheckpointError(f"{name} must be one of {', '.join(map(str, choices))}, not {value!r:.40}")
        if self.hyperencoder == "table" and not (self.generator.startswith("hyperformer") and self.tasks):
            raise CheckpointError("a table of tasks is for the generators hyperformer and hyperformer++, and has rows")
        if self.hyperencoder == "table" and self.fusion:
            raise CheckpointError("a table of tasks has no states of an instruction to fuse")
        if self.hyperencoder != "table" and self.tasks:
            raise CheckpointError(f"numbers of tasks are for the hyperencoder table, not {self.hyperencoder}")
        if self.modules != HINTConfig.modules and self.generator in ("none", "hyperformer", "hyperformer++"):
            raise CheckpointError(f"the generator {self.generator} leaves no choice of modules")
        unread = self.generator == "none" or self.generator == "direct" and self.hyperencoder == "own"
        if unread and not self.fusion:
            raise CheckpointError(
                f"with the generator {self.generator} and without fusion nothing reads the instruction"
            )
        if (self.generator, self.hyperencoder, self.trains) == ("none", "tied", "hypernetwork"):
            raise CheckpointError("the generator none has nothing to train where T5 is frozen")


# --------------------------------------------------------------------------------------------- what is generated


class Kind(NamedTuple):
    """One kind of generated weight: `slots` places of the model have it, each as `columns` vectors of `width`."""

    slots: int
    columns: int
    width: int


MODULES = {  # Table 5
    "adapters+prefixes": ("adapter", "prefix"),
    "adapters": ("adapter",),
    "prefixes": ("prefix",),
    "lora": ("lora",),
}


def generated_kinds(
    config: T5Config, bottleneck: int, prefix_length: int, modules: str = "adapters+prefixes"
) -> dict[str, Kind]:
    """What is generated for one instruction: an adapter a layer, a prefix (or LoRA) an attention.

    The authors' code also makes an adapter for every cross-attention and never uses it: 31 % of its columns at XL.
    """
    d, inner = config.d_model, config.num_heads * config.d_kv
    layers = config.num_layers + config.num_decoder_layers
    attentions = config.num_layers + 2 * config.num_decoder_layers
    kinds = {
        "adapter_down": Kind(layers, bottleneck, d),
        "adapter_down_bias": Kind(layers, 1, bottleneck),
        "adapter_up": Kind(layers, bottleneck, d),
        "adapter_up_bias": Kind(layers, 1, d),
        "prefix_key": Kind(attentions, prefix_length, inner),
        "prefix_value": Kind(attentions, prefix_length, inner),
        "lora_query_down": Kind(attentions, bottleneck, d),
        "lora_query_up": Kind(attentions, bottleneck, inner),
        "lora_value_down": Kind(attentions, bottleneck, d),
        "lora_value_up": Kind(attentions, bottleneck, inner),
    }
    return {name: kind for name, kind in kinds.items() if name.startswith(MODULES[modules])}


class Generator(nn.Module):
    """What all generators share: the kinds of weights, and the way from their columns to the layers of T5."""

    def __init__(self, t5: T5, config: HINTConfig) -> None:
        super().__init__()
        self.heads, self.scale = t5.config.num_heads, t5.config.d_model**-0.5
        self.encoder_layers, self.decoder_layers = t5.config.num_layers, t5.config.num_decoder_layers
        self.kinds = generated_kinds(t5.config, config.bottleneck, config.prefix_length, config.modules)

    def forward(self, states: Tensor, attention_mask: Tensor) -> Modules:
        """Encoded instructions [B, S, d] with their mask [B, S] -> modules for B examples, or for all (B = 1)."""
        return self._assemble(self.weights(states, attention_mask))

    def weights(self, states: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """All that is generated, by kind: [B, slots, columns, width]."""
        raise NotImplementedError

    def _assemble(self, weights: dict[str, Tensor]) -> Modules:
        """Hand the columns to their layers: encoder layers first, then for each decoder layer self and cross."""
        first, layers = self.encoder_layers, self.encoder_layers + self.decoder_layers

        def in_slots(kind: str, slots: int, make: Callable) -> list:
            parts = [weight.unbind(1) for name, weight in weights.items() if name.startswith(kind)]
            return [make(*slot) for slot in zip(*parts)] or [None] * slots

        adapters = in_slots("adapter", layers, _adapter)
        prefixes = in_slots("prefix", layers + self.decoder_layers, self._prefix)
        loras = in_slots("lora", layers + self.decoder_layers, _lora)
        encoder = [
            LayerModules(adapter, prefix, lora=lora) for adapter, prefix, lora in zip(adapters[:first], prefixes, loras)
        ]
        own, cross = slice(first, None, 2), slice(first + 1, None, 2)
        decoder = map(LayerModules, adapters[first:], prefixes[own], prefixes[cross], loras[own], loras[cross])
        return Modules(tuple(encoder), tuple(decoder))

    def _prefix(self, key: Tensor, value: Tensor) -> KeyValue:
        """[B, P, I] each -> [B, h, P, k]"""
        return KeyValue(*(part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (key, value)))


def _adapter(down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor) -> Adapter:
    """Vector j is column j of W_down, and row j of W_up."""
    return Adapter(down.transpose(1, 2), down_bias, up, up_bias)


def _lora(query_down: Tensor, query_up: Tensor, value_down: Tensor, value_up: Tensor) -> LoRA:
    return LoRA(query_down.transpose(1, 2), query_up, value_down.transpose(1, 2), value_up)


# --------------------------------------------------------------------------------------------- HINT


class ColumnGenerator(Generator):
    """The parameter generator of section 3.1.1, which decomposes every matrix into its columns.

    1. Each column of each adapter matrix, each bias and each prefix token has an embedding of its own, in each
       layer: C [N, d].
    2. Multi-head cross-attention from C to the encoded instruction collects what each needs: Z [N, d].
    3. A two-layer network for each kind of weight, shared by all layers, turns a row of Z into a column.

    So a matrix of d x r costs r embeddings and a share of one d x d network; one embedding that wrote the whole
    matrix would need a network of d x (d*r) ("Scaling Down Parameters").

    In what the paper leaves open this follows the authors' code: no norm, residual or position in the attention, and
    every value divided by sqrt(d). So it does in the number of networks, six (two for the matrices, two for the
    biases, one each for prefix keys and values), where the paper has one for adapters and one for prefixes. Unlike
    that code, `W_down[:, j]` is what embedding j wrote (there a reshape spreads it over rows), and the padding of the
    instruction is masked.
    """

    def __init__(self, t5: T5, config: HINTConfig) -> None:
        super().__init__(t5, config)
        d = t5.config.d_model
        self.embeddings = nn.ParameterDict(
            {
                name: nn.Parameter(torch.randn(kind.slots * kind.columns, d) * config.embedding_scale * d**-0.5)
                for name, kind in self.kinds.items()
            }
        )
        self._add_reader(t5)
        self.networks = nn.ModuleDict(
            {name: _network(d, kind.width, config.generator_dropout) for name, kind in self.kinds.items()}
        )

    def _add_reader(self, t5: T5) -> None:
        self.attention = Attention(t5.config)
        self.attention.apply(t5.initialise)

    def collect(self, columns: Tensor, states: Tensor, attention_mask: Tensor) -> Tensor:
        """C [1, N, d] and an encoded instruction [B, S, d] -> Z [B, N, d]."""
        return self.attention(columns, [self.attention.project(states)], padding_bias(attention_mask))

    def weights(self, states: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """C -> Z -> columns, all layers at once."""
        columns = torch.cat([self.embeddings[name] for name in self.kinds]).unsqueeze(0)  # C [1, N, d]
        collected = self.collect(columns, states, attention_mask)  # Z [B, N, d]
        pieces = collected.split([kind.slots * kind.columns for kind in self.kinds.values()], dim=1)
        return {
            name: self.networks[name](piece).unflatten(1, (kind.slots, kind.columns)) * self.scale
            for (name, kind), piece in zip(self.kinds.items(), pieces)
        }


def _network(d_model: int, width: int, dropout: float) -> nn.Sequential:
    """W_2 dropout(gelu(W_1 z)): [..., d] -> [..., width], without biases."""
    network = nn.Sequential(
        Linear(d_model, d_model, bias=False),
        nn.GELU(approximate="tanh"),
        nn.Dropout(dropout),
        Linear(d_model, width, bias=False),
    )
    for layer in (network[0], network[3]):
        nn.init.normal_(layer.weight, std=d_model**-0.5)
    return network


# --------------------------------------------------------------------------------------------- what it is compared with


class DirectGenerator(ColumnGenerator):
    """Tk-Instruct + PEFT: the column embeddings feed the networks directly, so the modules are the same for all."""

    def _add_reader(self, t5: T5) -> None:
        """Nothing is read."""

    def collect(self, columns: Tensor, states: Tensor, attention_mask: Tensor) -> Tensor:
        """C [1, N, d], as it is, for each of B instructions."""
        return columns.expand(len(states), -1, -1)


class DecoderGenerator(ColumnGenerator):
    """A full decoder in place of the one cross-attention: the ablation of section 6.3, and HyperTune (Phang et al.,
    2022).

    As in the authors' code it is a copy of T5's decoder without its self-attention: cross-attention and feed-forward
    in every layer, and the final norm. (That attention would be quadratic in N, 78,192 columns at XL.)
    """

    def _add_reader(self, t5: T5) -> None:
        self.blocks, self.norm = copy.deepcopy(t5.decoder.blocks), copy.deepcopy(t5.decoder.final_norm)
        for block in self.blocks:
            del block.self_attention, block.self_attention_norm

    def collect(self, columns: Tensor, states: Tensor, attention_mask: Tensor) -> Tensor:
        """C [1, N, d] through the layers, each of which reads the instruction [B, S, d] -> Z [B, N, d]."""
        x, bias = columns, padding_bias(attention_mask)
        for block in self.blocks:
            source = block.cross_attention.project(states)
            x = x + block.dropout(block.cross_attention(block.cross_attention_norm(x), [source], bias))
            x = x + block.dropout(block.feed_forward(block.feed_forward_norm(x)))
        return self.norm(x)


class PooledGenerator(Generator):
    """Hypter (Ye and Ren, 2021): the mean of the instruction's states, through one network for each kind of weight,
    which writes all of that kind, in all layers, at once.

    This is how the authors of HINT rebuilt it; the original has a network for each layer, and a frozen RoBERTa.
    """

    def __init__(self, t5: T5, config: HINTConfig) -> None:
        super().__init__(t5, config)
        sizes = {name: kind.slots * kind.columns * kind.width for name, kind in self.kinds.items()}
        self.networks = nn.ModuleDict(
            {name: _network(t5.config.d_model, size, config.generator_dropout) for name, size in sizes.items()}
        )

    def weights(self, states: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Mean [B, d] -> each kind of weight, whole."""
        pooled = mean_of_tokens(states, attention_mask)
        return {name: self.networks[name](pooled).unflatten(1, kind) * self.scale for name, kind in self.kinds.items()}


def mean_of_tokens(states: Tensor, attention_mask: Tensor) -> Tensor:
    """The mean of the states [B, S, d] of real tokens -> [B, d]."""
    weight = attention_mask.unsqueeze(-1).type_as(states)
    return (states * weight).sum(1) / weight.sum(1).clamp(min=1)


class NoModules(Generator):
    """Nothing is generated: what remains of HINT is instruction fusion (Table 6, "- PEFT Gen.")."""

    def forward(self, states: Tensor, attention_mask: Tensor) -> Modules:
        """Modules that are not there, for any instructions."""
        return Modules((LayerModules(),) * self.encoder_layers, (LayerModules(),) * self.decoder_layers)


# --------------------------------------------------------------------------------------------- Hyperformer

TASK = 64  # t, size of the embeddings of task, layer and place, and of what the generating layers read
HIDDEN = 128  # of the network that joins them
PLACES = ("after_attention", "after_feed_forward")


class Hyperformer(Generator):
    """Karimi Mahabadi et al. (2021): adapters behind self-attention and feed-forward, generated from embeddings of
    task and layer; a hypernetwork each for encoder and decoder.

    What it reads is the embedding of a task, [B, 1, t] from a `TaskTable`; or, so that it can meet tasks that it has
    no embedding of, an encoded instruction [B, S, d], whose mean is projected to t.
    """

    shares_places = False

    def __init__(self, t5: T5, config: HINTConfig) -> None:
        super().__init__(t5, config)
        d = t5.config.d_model
        self.project = None if config.hyperencoder == "table" else nn.Linear(d, TASK)
        self.stacks = nn.ModuleList(
            StackHypernetwork(d, config.bottleneck, layers, self.shares_places)
            for layers in (self.encoder_layers, self.decoder_layers)
        )

    def forward(self, states: Tensor, attention_mask: Tensor) -> Modules:
        """A task embedding [B, 1, t] or an encoded instruction [B, S, d] -> modules for B examples."""
        task = states[:, 0] if self.project is None else self.project(mean_of_tokens(states, attention_mask))
        return Modules(*(stack(task) for stack in self.stacks))


class HyperformerPlusPlus(Hyperformer):
    """Hyperformer++: one set of generating layers for both places, told apart by an embedding of the place."""

    shares_places = True


class StackHypernetwork(nn.Module):
    """z = LN(W_2 relu(W_1 [task; layer; place])), and a linear layer from z for each part of an adapter.

    With `shares_places` (++) one set of linear layers writes the adapters of both places. Without it z knows nothing
    of the place, and each place has a set of its own.
    """

    def __init__(self, d_model: int, bottleneck: int, layers: int, shares_places: bool) -> None:
        super().__init__()
        self.layers = nn.Parameter(torch.randn(layers, TASK))
        self.places = nn.Parameter(torch.randn(len(PLACES), TASK)) if shares_places else None
        read = 3 * TASK if shares_places else 2 * TASK
        self.join = nn.Sequential(nn.Linear(read, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, TASK), nn.LayerNorm(TASK))
        d, r = d_model, bottleneck
        self.shapes = [(d, r), (1, r), (r, d), (1, d), (1, d), (1, d)]  # of the parts of a SerialAdapter
        self.heads = nn.ModuleList(
            nn.ModuleList(_head(rows * columns) for rows, columns in self.shapes)
            for _ in range(1 if shares_places else len(PLACES))
        )

    def forward(self, task: Tensor) -> tuple[LayerModules, ...]:
        """Task embeddings [B, t] -> the two adapters of each layer."""
        adapters = [self._adapters(task, place) for place in range(len(PLACES))]
        return tuple(LayerModules(**dict(zip(PLACES, pair))) for pair in zip(*adapters))

    def _adapters(self, task: Tensor, place: int) -> list[SerialAdapter]:
        """The adapters of one place, in all layers."""
        batch, layers = len(task), len(self.layers)
        read = [task.unsqueeze(1).expand(-1, layers, -1), self.layers.expand(batch, -1, -1)]
        read += [] if self.places is None else [self.places[place].expand(batch, layers, -1)]
        z = self.join(torch.cat(read, dim=-1))  # [B, L, t]
        heads = self.heads[place % len(self.heads)]
        parts = [head(z).unflatten(-1, shape).unbind(1) for head, shape in zip(heads, self.shapes)]
        return [SerialAdapter(*layer) for layer in zip(*parts)]


def _head(width: int) -> nn.Linear:
    """So small at first that the adapters, whose norm it also scales, change next to nothing."""
    head = nn.Linear(TASK, width)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    return head


GENERATORS: dict[str, Callable[[T5, HINTConfig], Generator]] = {
    "columns": ColumnGenerator,
    "direct": DirectGenerator,
    "decoder": DecoderGenerator,
    "pooled": PooledGenerator,
    "none": NoModules,
    "hyperformer": Hyperformer,
    "hyperformer++": HyperformerPlusPlus,
}


# --------------------------------------------------------------------------------------------- who reads the instruction


class OwnEncoder(nn.Module):
    """A hyperencoder of its own: a copy of T5's embedding and encoder that trains apart from them (section 3.1)."""

    def __init__(self, t5: T5, config: HINTConfig) -> None:
        super().__init__()
        self.config, self.shared, self.encoder = t5.config, copy.deepcopy(t5.shared), copy.deepcopy(t5.encoder)

    forward = T5.encode


class TaskTable(nn.Module):
    """Hyperformer's: no text is read; an instruction is the number of its task [B, 1], its states [B, 1, t] a row."""

    def __init__(self, t5: T5, config: HINTConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(config.tasks, TASK))
        self.fitted: Tensor | None = None  # rows of tasks that were not trained, made for one evaluation, never saved

    def forward(self, numbers: Tensor, attention_mask: Tensor) -> Tensor:
        """Numbers of tasks [B, 1] -> [B, 1, t]; those behind the table are of tasks fitted later."""
        weight = self.weight if self.fitted is None else torch.cat([self.weight, self.fitted])
        return weight[numbers]


HYPERENCODERS = {"tied": None, "own": OwnEncoder, "table": TaskTable}
CHOICES = {
    "generator": tuple(GENERATORS),
    "modules": tuple(MODULES),
    "fusion": (True, False),
    "hyperencoder": tuple(HYPERENCODERS),
    "trains": ("all", "hypernetwork", "hypernetwork+norms"),
}
