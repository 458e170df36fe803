"""Small random models for the checks. All sizes differ, so that no axis can be taken for another."""

import torch

SIZES = dict(
    vocab_size=53, d_model=24, d_kv=10, d_ff=36, num_layers=2, num_decoder_layers=3, num_heads=3, dropout_rate=0.0
)


def tiny_t5(t5, **changes):
    """A T5 in eval mode, whose relative bias is large enough to be noticed."""
    torch.manual_seed(0)
    model = t5.T5(t5.T5Config(**{**SIZES, **changes})).eval()
    for stack in (model.encoder, model.decoder):
        torch.nn.init.normal_(stack.relative_bias.weight)
    return model


def tiny_hint(hint, config=None, **changes):
    """A HINT in eval mode, whose generated weights are large enough to be noticed; `config`: changes of HINTConfig."""
    settings = {"bottleneck": 5, "prefix_length": 4, "generator_dropout": 0.0, **(config or {})}
    model = hint.HINT(tiny_t5(hint, **changes), hint.HINTConfig(**settings)).eval()
    for network in getattr(model.hypernetwork, "networks", {}).values():
        network[-1].weight.data *= 8
    return model
