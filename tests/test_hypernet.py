"""The column-wise generator against a loop written from section 3.1.1, and what it must and must not contain."""

import pytest
import torch
from conftest import random_ids, tiny_config, tiny_hint

from hint import HINTConfig
from hypernet import GENERATORS, ColumnGenerator
from t5 import SIZES, T5, T5Config


def generator_of(kind: str, config: T5Config, **sizes):
    """A generator of its own, without dropout unless asked for."""
    return GENERATORS[kind](T5(config), HINTConfig(**{"generator_dropout": 0.0, **sizes}))


def loop_from_the_paper(generator, config, states, mask):
    """One column at a time, one head at a time, for one instruction [S, d]: name -> list of generated rows."""
    attention, k = generator.attention, config.d_kv
    keys, values = states @ attention.k.weight.T, states @ attention.v.weight.T
    rows = {}
    for name, embeddings in generator.embeddings.items():
        first, _, _, second = generator.networks[name]
        rows[name] = []
        for embedding in embeddings:
            query, heads = attention.q.weight @ embedding, []
            for head in range(config.num_heads):
                part = slice(head * k, (head + 1) * k)
                scores = torch.stack([query[part] @ key[part] for key, real in zip(keys, mask) if real])
                real_values = [value[part] for value, real in zip(values, mask) if real]
                heads.append(sum(w * v for w, v in zip(scores.softmax(0), real_values)))
            collected = attention.o.weight @ torch.cat(heads)
            hidden = torch.nn.functional.gelu(first.weight @ collected, approximate="tanh")
            rows[name].append(second.weight @ hidden / config.d_model**0.5)
    return rows


def test_every_generated_value_is_that_of_a_plain_loop():
    config = tiny_config()
    generator = generator_of("columns", config, bottleneck=5, prefix_length=4).eval()
    states, mask = torch.randn(2, 7, config.d_model), torch.ones(2, 7)
    mask[1, 4:] = 0
    modules = generator(states, mask)
    for b in range(2):
        rows = {
            name: iter(values) for name, values in loop_from_the_paper(generator, config, states[b], mask[b]).items()
        }
        for layer in (*modules.encoder, *modules.decoder):  # adapters: encoder layers, then decoder layers
            for j in range(5):
                close(layer.adapter.down[b, :, j], next(rows["adapter_down"]))  # embedding j wrote column j
                close(layer.adapter.up[b, j], next(rows["adapter_up"]))
            close(layer.adapter.down_bias[b, 0], next(rows["adapter_down_bias"]))
            close(layer.adapter.up_bias[b, 0], next(rows["adapter_up_bias"]))
        prefixes = [layer.prefix for layer in modules.encoder]
        prefixes += [prefix for layer in modules.decoder for prefix in (layer.prefix, layer.cross_prefix)]
        for prefix in prefixes:
            for token in range(4):
                close(prefix.key[b, :, token].flatten(), next(rows["prefix_key"]))  # heads side by side
                close(prefix.value[b, :, token].flatten(), next(rows["prefix_value"]))
        assert all(next(left, None) is None for left in rows.values()), "something is generated that nobody reads"
        assert all(layer.cross_prefix is None for layer in modules.encoder)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)
    assert wanted.abs().max() > 1e-4, "values near zero would agree by themselves"


def test_gradients_reach_every_embedding_and_every_weight_of_the_generator():
    model = tiny_hint().train()
    model(random_ids(3, 7), random_ids(3, 9), random_ids(3, 6)).loss.backward()
    for name, parameter in model.hypernetwork.named_parameters():
        rows = parameter.grad.flatten(1).abs().sum(1)
        assert (rows > 0).all(), f"{name}: {int((rows == 0).sum())} of {len(rows)} rows get no gradient"


@pytest.mark.parametrize(
    "size, bottleneck, prefix", [("small", 8, 7), ("base", 64, 30), ("xl", 512, 30), ("xxl", 512, 30)]
)
def test_parameter_counts_are_those_of_the_formula(size, bottleneck, prefix):
    """By hand, for h*k = d: embeddings of L adapters and A prefixes, the attention, six networks of two layers."""
    config = SIZES[size]
    with torch.device("meta"):
        found = sum(
            p.numel() for p in generator_of("columns", config, bottleneck=bottleneck, prefix_length=prefix).parameters()
        )
    d, inner = config.d_model, config.num_heads * config.d_kv
    adapters, prefixes = 2 * config.num_layers, 3 * config.num_layers
    embeddings = (adapters * (2 * bottleneck + 2) + prefixes * 2 * prefix) * d
    networks = 3 * 2 * d * d + d * d + d * bottleneck + 2 * (d * d + d * inner)
    assert found == embeddings + 4 * d * inner + networks
    if size == "xl":
        assert embeddings == pytest.approx(109.7e6, rel=1e-3)


def test_a_wider_adapter_costs_embeddings_and_no_wider_network():
    """ "Scaling Down Parameters": r columns cost r*d, where one embedding for the whole matrix would cost d*d*r."""
    config = tiny_config()
    narrow, wide = (generator_of("columns", config, bottleneck=bottleneck, prefix_length=4) for bottleneck in (8, 64))
    assert wide.embeddings["adapter_up"].numel() == 8 * narrow.embeddings["adapter_up"].numel()
    for name in ("adapter_down", "adapter_up"):
        sizes = [sum(p.numel() for p in generator.networks[name].parameters()) for generator in (narrow, wide)]
        assert sizes[0] == sizes[1] == 2 * config.d_model**2


def test_fresh_weights_are_scaled_by_what_goes_into_them():
    """W_q also has the 1/sqrt(k) that the scores lack."""
    generator = generator_of("columns", tiny_config(d_model=256, d_kv=64), bottleneck=16, prefix_length=8)
    wanted = {
        generator.attention.q: (256 * 64) ** -0.5,
        generator.attention.k: 256**-0.5,
        generator.attention.o: 192**-0.5,
    }
    wanted |= {layer: 256**-0.5 for network in generator.networks.values() for layer in (network[0], network[-1])}
    for layer, std in wanted.items():
        assert layer.weight.std().item() == pytest.approx(std, rel=0.05)


def test_each_size_and_rate_changes_what_is_generated():
    config, states, mask = tiny_config(), torch.randn(1, 7, 24), torch.ones(1, 7)
    for bottleneck, prefix in ((1, 9), (6, 2)):
        layer = generator_of("columns", config, bottleneck=bottleneck, prefix_length=prefix)(states, mask).decoder[0]
        assert layer.adapter.down.shape == (1, 24, bottleneck) and layer.adapter.up.shape == (1, bottleneck, 24)
        assert layer.adapter.down_bias.shape == (1, 1, bottleneck) and layer.adapter.up_bias.shape == (1, 1, 24)
        assert layer.prefix.key.shape == layer.cross_prefix.value.shape == (1, 3, prefix, 10)
    t5 = T5(config)
    torch.manual_seed(1)
    small = ColumnGenerator(t5, HINTConfig(4, 3))
    torch.manual_seed(1)
    large = ColumnGenerator(t5, HINTConfig(4, 3, embedding_scale=3.0))
    for name, embedding in small.embeddings.items():
        torch.testing.assert_close(large.embeddings[name], 3 * embedding)
    assert torch.cat([*small.embeddings.values()]).std().item() == pytest.approx(24**-0.5, rel=0.1)
    generator = ColumnGenerator(t5, HINTConfig(4, 3))
    twice = [generator(states, mask).encoder[0].prefix.key for _ in range(2)]
    assert not torch.equal(*twice)
    twice = [generator.eval()(states, mask).encoder[0].prefix.key for _ in range(2)]
    assert torch.equal(*twice)
