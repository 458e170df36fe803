"""The hypernetwork: an encoded instruction in, adapters and prefixes for every layer of T5 out (HINT, section 3.1).

Axes: B instructions, S instruction tokens, d model, h heads, k per head, I = h*k, r bottleneck, P prefix,
N columns (all that is generated for one instruction), L_e and L_d layers of the encoder and the decoder.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from t5 import Adapter, Attention, KeyValue, LayerModules, Modules, T5Config, padding_bias


class Kind(NamedTuple):
    """One kind of generated weight: `slots` places of the model have it, each as `columns` vectors of `width`."""

    slots: int
    columns: int
    width: int


def generated_kinds(config: T5Config, bottleneck: int, prefix_length: int) -> dict[str, Kind]:
    """What is generated for one instruction: an adapter a layer, a prefix an attention, and nothing that nobody reads.

    The authors' code also makes an adapter for every cross-attention and never uses it: 31 % of its columns at XL.
    """
    d, inner = config.d_model, config.num_heads * config.d_kv
    layers = config.num_layers + config.num_decoder_layers
    attentions = config.num_layers + 2 * config.num_decoder_layers
    return {
        "adapter_down": Kind(layers, bottleneck, d),
        "adapter_down_bias": Kind(layers, 1, bottleneck),
        "adapter_up": Kind(layers, bottleneck, d),
        "adapter_up_bias": Kind(layers, 1, d),
        "prefix_key": Kind(attentions, prefix_length, inner),
        "prefix_value": Kind(attentions, prefix_length, inner),
    }


class ColumnGenerator(nn.Module):
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

    def __init__(
        self,
        config: T5Config,
        bottleneck: int,
        prefix_length: int,
        generator_dropout: float = 0.0,
        embedding_scale: float = 1.0,
    ) -> None:
        super().__init__()
        d = config.d_model
        self.heads, self.scale = config.num_heads, d**-0.5
        self.kinds = generated_kinds(config, bottleneck, prefix_length)
        self.encoder_layers = config.num_layers
        self.embeddings = nn.ParameterDict(
            {
                name: nn.Parameter(torch.randn(kind.slots * kind.columns, d) * embedding_scale * d**-0.5)
                for name, kind in self.kinds.items()
            }
        )
        self.attention = Attention(config)
        self.networks = nn.ModuleDict(
            {name: _network(d, kind.width, generator_dropout) for name, kind in self.kinds.items()}
        )
        self._initialise(config)

    def _initialise(self, config: T5Config) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        nn.init.normal_(self.attention.q.weight, std=(config.d_model * config.d_kv) ** -0.5)

    def forward(self, states: Tensor, attention_mask: Tensor) -> Modules:
        """Encoded instructions [B, S, d] with their mask [B, S] -> modules for B examples."""
        columns = torch.cat([self.embeddings[name] for name in self.kinds]).unsqueeze(0)  # C [1, N, d]
        source = self.attention.project(states)
        collected = self.attention(columns, [source], padding_bias(attention_mask))  # Z [B, N, d]
        pieces = collected.split([kind.slots * kind.columns for kind in self.kinds.values()], dim=1)
        weights = {}
        for (name, kind), piece in zip(self.kinds.items(), pieces):
            weights[name] = self.networks[name](piece).unflatten(1, (kind.slots, kind.columns)) * self.scale
        return self._assemble(**weights)  # each [B, slots, columns, width]

    def _assemble(
        self, adapter_down: Tensor, adapter_down_bias: Tensor, adapter_up: Tensor, adapter_up_bias: Tensor,
        prefix_key: Tensor, prefix_value: Tensor,
    ) -> Modules:  # fmt: skip
        """Hand the columns to their layers: encoder layers first, then for each decoder layer self and cross."""
        adapters = [
            Adapter(down.transpose(1, 2), down_bias, up, up_bias)  # column j of W_down, row j of W_up
            for down, down_bias, up, up_bias in zip(
                adapter_down.unbind(1), adapter_down_bias.unbind(1), adapter_up.unbind(1), adapter_up_bias.unbind(1)
            )
        ]
        prefixes = [
            KeyValue(self._by_head(key), self._by_head(value))
            for key, value in zip(prefix_key.unbind(1), prefix_value.unbind(1))
        ]
        first = self.encoder_layers
        return Modules(
            encoder=tuple(map(LayerModules, adapters[:first], prefixes[:first])),
            decoder=tuple(map(LayerModules, adapters[first:], prefixes[first::2], prefixes[first + 1 :: 2])),
        )

    def _by_head(self, prefix: Tensor) -> Tensor:
        """[B, P, I] -> [B, h, P, k]"""
        return prefix.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _network(d_model: int, width: int, dropout: float) -> nn.Sequential:
    """W_2 dropout(gelu(W_1 z)): [..., d] -> [..., width], without biases."""
    return nn.Sequential(
        nn.Linear(d_model, d_model, bias=False),
        nn.GELU(approximate="tanh"),
        nn.Dropout(dropout),
        nn.Linear(d_model, width, bias=False),
    )
