"""HINT a second time, from its equations: read this file first, beside section 3 of the paper.

One example at a time, in the order of the paper: no batch, no padding, no cache, no dropout. `w` holds the weights in
doubles, by their names in `model.state_dict()`. `test_hint.py` compares loss, gradients and answers with the project.
Axes: S input, Li instruction, T answer, d model, h heads, k per head, I = h*k, r bottleneck, P prefix, V vocabulary.
"""

import math

import torch
from torch.nn.functional import gelu


def losses(w, instruction, inputs, answer):
    """Loss of each token of an answer [T] (section 3.3): cross-entropy + 1e-4 (log Z)^2."""
    logits = decoder(w, instruction, inputs)([0, *answer[:-1]])  # [T, V]; T5 starts with the padding id, 0
    log_z = logits.logsumexp(-1)
    return log_z - logits[range(len(answer)), answer] + 1e-4 * log_z**2


def greedy_answer(w, instruction, inputs, max_new_tokens):
    """Choose each token by a new pass over all earlier tokens, until `</s>`, id 1."""
    said, scores = [0], decoder(w, instruction, inputs)
    while len(said) <= max_new_tokens and said[-1] != 1:
        said.append(scores(said)[-1].argmax().item())
    return said[1:]


def decoder(w, instruction, inputs):
    """Section 3.1: read instruction and input -> a function from earlier tokens [T] to next scores [T, V]."""
    encoders = sum("encoder.blocks" in name and "feed_forward.wo" in name for name in w)
    states = stack(w, "encoder", instruction, [(None, None)] * encoders)  # without modules
    modules = generate(w, states, encoders)
    memory = torch.cat([states, stack(w, "encoder", inputs, modules[:encoders])])  # [Li + S, d]: instruction fusion
    return lambda said: stack(w, "decoder", said, modules[encoders:], memory) @ w["t5.lm_head.weight"].T


def generate(w, states, encoders):
    """Section 3.1.1: states [Li, d] -> (adapter, prefix) of each encoder layer, (adapter, prefix, cross-prefix) after.

    Embeddings C [N, d] of all columns of a kind of weight read the instruction by cross-attention; a two-layer network
    for the kind turns each row of the result Z [N, d] into a column.
    """
    layers, parts = len(w["hypernetwork.embeddings.adapter_up_bias"]), []
    for kind in ("adapter_down", "adapter_down_bias", "adapter_up", "adapter_up_bias", "prefix_key", "prefix_value"):
        z = attention(w, "hypernetwork.attention", w[f"hypernetwork.embeddings.{kind}"], states)
        first, second = (w[f"hypernetwork.networks.{kind}.{number}.weight"] for number in (0, 3))
        slots = layers if "adapter" in kind else 2 * layers - encoders  # a decoder layer has two attentions
        columns = gelu(z @ first.T, approximate="tanh") @ second.T / math.sqrt(z.shape[-1])
        parts.append(columns.chunk(slots))
    adapters, prefixes = list(zip(*parts[:4])), list(zip(*parts[4:]))
    own, cross = prefixes[encoders::2], prefixes[encoders + 1 :: 2]  # of the decoder
    return [*zip(adapters[:encoders], prefixes), *zip(adapters[encoders:], own, cross)]


def stack(w, name, ids, modules, memory=None):
    """T5's encoder, or its decoder, which reads a memory: ids [T] -> states [T, d]."""
    x, bias = w["t5.shared.weight"][ids], relative_bias(w, name, len(ids))
    for layer, (adapter, prefix, *cross_prefix) in enumerate(modules):
        block = f"t5.{name}.blocks.{layer}"
        u = norm(w, f"{block}.self_attention_norm", x)
        x = x + attention(w, f"{block}.self_attention", u, u, bias, prefix)
        if memory is not None:
            u = norm(w, f"{block}.cross_attention_norm", x)
            x = x + attention(w, f"{block}.cross_attention", u, memory, prefix=cross_prefix[0])
        u = norm(w, f"{block}.feed_forward_norm", x)
        wi_0, wi_1, wo = (w[f"{block}.feed_forward.{part}.weight"] for part in ("wi_0", "wi_1", "wo"))
        x = x + gelu(u @ wi_0.T, approximate="tanh") * (u @ wi_1.T) @ wo.T
        if adapter is not None:  # equation (1), in parallel to the feed-forward layer
            down, down_bias, up, up_bias = adapter  # [r, d], [1, r], [r, d], [1, d]
            x = x + gelu(u @ down.T + down_bias, approximate="tanh") @ up + up_bias
    return norm(w, f"t5.{name}.final_norm", x)


def attention(w, name, x, states, bias=0.0, prefix=None):
    """Queries from x [T, d], keys and values from states [S, d]; scores are not divided by sqrt(k). -> [T, d]"""
    q, k, v = (y @ w[f"{name}.{part}.weight"].T for part, y in zip("qkv", (x, states, states)))  # [., I]
    heads = w["t5.encoder.relative_bias.weight"].shape[1]
    q, k, v = (y.unflatten(-1, (heads, -1)).transpose(0, 1) for y in (q, k, v))  # [h, ., k]
    scores = q @ k.mT + bias  # [h, T, S]
    if prefix is not None:  # keys and values [P, I], without a bias
        keys, values = (y.unflatten(-1, (heads, -1)).transpose(0, 1) for y in prefix)  # [h, P, k]
        scores, v = torch.cat([q @ keys.mT, scores], -1), torch.cat([values, v], 1)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1) @ w[f"{name}.o.weight"].T


def relative_bias(w, name, length):
    """Bias [h, T, T] by distance (Raffel et al., 2020, section 2.1); the decoder's also hides the future."""
    distance = torch.arange(length) - torch.arange(length)[:, None]  # key - query
    side, steps = (16, distance.abs()) if name == "encoder" else (32, -distance.clamp(max=0))
    exact = side // 2  # the other buckets are logarithmic, up to a distance of 128
    far = exact + (torch.log(steps.double() / exact) / math.log(128 / exact) * (side - exact)).long()
    buckets = torch.where(steps < exact, steps, far.clamp(max=side - 1)) + (distance > 0) * (32 - side)
    future = torch.full((length, length), -math.inf if name == "decoder" else 0.0).triu(1)
    return w[f"t5.{name}.relative_bias.weight"][buckets].permute(2, 0, 1) + future


def norm(w, name, x):
    return w[f"{name}.weight"] * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
