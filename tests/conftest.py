"""What several test files share: small random models, public checkpoints made by transformers, and the real data."""

import os
from pathlib import Path

import pytest
import torch

from hint import HINT, HINTConfig
from t5 import T5, Adapter, KeyValue, LayerModules, Modules, T5Config

torch.set_num_threads(1)  # the models here are so small that a second thread costs more than it gives
os.environ["OMP_NUM_THREADS"] = "1"  # likewise for the command lines that tests run

SHARED = Path(__file__).resolve().parents[2] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real vocabulary and data in ../shared")


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


def tiny_config(**changes) -> T5Config:
    """A T5 whose sizes all differ, so that no axis can be taken for another."""
    sizes = dict(
        vocab_size=53, d_model=24, d_kv=10, d_ff=36, num_layers=2, num_decoder_layers=3, num_heads=3, dropout_rate=0.0
    )
    return T5Config(**{**sizes, **changes})


def tiny_t5(**changes) -> T5:
    """With a relative bias that is large enough to be noticed."""
    model = T5(tiny_config(**changes)).eval()
    for stack in (model.encoder, model.decoder):
        torch.nn.init.normal_(stack.relative_bias.weight)
    return model


def tiny_hint(**changes) -> HINT:
    """A HINT whose generated weights are large enough to be noticed."""
    model = HINT(tiny_t5(**changes), HINTConfig(bottleneck=5, prefix_length=4, generator_dropout=0.0)).eval()
    for network in model.hypernetwork.networks.values():
        network[-1].weight.data *= 8
    return model


def random_ids(*shape: int, vocab: int = 53) -> torch.Tensor:
    """Ids without padding and without `</s>`."""
    return torch.randint(2, vocab, shape)


def random_modules(config: T5Config, batch: int, bottleneck: int = 5, prefix: int = 4) -> Modules:
    """Adapters and prefixes for every layer, different in each example."""

    def pair() -> KeyValue:
        return KeyValue(*torch.randn(2, batch, config.num_heads, prefix, config.d_kv))

    def adapter() -> Adapter:
        d, r = config.d_model, bottleneck
        return Adapter(
            torch.randn(batch, d, r), torch.randn(batch, 1, r), torch.randn(batch, r, d), torch.randn(batch, 1, d)
        )

    return Modules(
        encoder=tuple(LayerModules(adapter(), pair()) for _ in range(config.num_layers)),
        decoder=tuple(LayerModules(adapter(), pair(), pair()) for _ in range(config.num_decoder_layers)),
    )
