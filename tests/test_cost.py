"""What HINT costs: counts by torch against sums by hand, the paper's formulas against loops and against the counts."""

from functools import cache
from itertools import count

import pytest
import torch
from conftest import random_ids, tiny_config, tiny_hint

import hint
from hint import HINTConfig, exact_flops, on_meta
from t5 import SIZES, T5, T5Config

VERSION_1_0 = {"feed_forward_proj": "relu", "tie_word_embeddings": True, "scale_decoder_outputs": True}


def by_hand(c: T5Config, r: int, P: int, n: int, i: int, t: int, o: int) -> tuple[int, int, int]:
    """FLOPs of hyperencoder, generator and answers: 2abc for a product of [a, b] and [b, c]. Plain T5: r = P = 0."""
    d, inner, layers, decoders = c.d_model, c.num_heads * c.d_kv, c.num_layers, c.num_decoder_layers
    feed_forward = (6 if c.feed_forward_proj == "gated-gelu" else 4) * d * c.d_ff
    t = t if r else 0

    def encode(tokens: int, r: int, P: int) -> int:
        attention = 8 * d * inner + 4 * (P + tokens) * inner  # four projections, scores and sums of values
        return layers * tokens * (attention + feed_forward + 4 * d * r)

    each = 4 * d * inner + 4 * t * inner + 2 * d * d  # of a column: query and output, scores and sums, first layer
    generator = 4 * d * inner * t + sum(N * (each + 2 * d * width) for N, width in columns_of(c, r, P))
    sources = 4 * d * inner * (t + n * i)  # keys and values; all inputs share the instruction's
    scores = 4 * inner * (P + o + P + t + i)
    decode = decoders * (sources + n * o * (12 * d * inner + scores + feed_forward + 4 * d * r))
    return encode(t, 0, 0), generator if r else 0, n * encode(i, r, P) + decode + n * o * 2 * d * c.vocab_size


def columns_of(c: T5Config, r: int, P: int) -> list[tuple[int, int]]:
    slots, d = c.num_layers + c.num_decoder_layers, c.d_model
    prefixes = ((slots + c.num_decoder_layers) * P, c.num_heads * c.d_kv)
    return [(slots * r, d), (slots, r), (slots * r, d), (slots, d), prefixes, prefixes]


@pytest.mark.parametrize("changes", [{}, VERSION_1_0], ids=["v1.1", "v1.0"])
@pytest.mark.parametrize("n, i, t, o", [(1, 9, 7, 6), (7, 9, 7, 6), (7, 2, 13, 2), (7, 17, 2, 11)])
def test_every_product_of_reading_and_answering_is_counted(n, i, t, o, changes):
    c = tiny_config(**changes)
    encoder, generator, answers = by_hand(c, 5, 4, n, i, t, o)
    for model in (on_meta(c, HINTConfig(bottleneck=5, prefix_length=4)), tiny_hint(**changes)):
        assert exact_flops(model, n, i, t, o) == (encoder + generator, answers)
    assert exact_flops(on_meta(c, None), n, i, t, o) == (0, by_hand(c, 0, 0, n, i, t, o)[2])


def test_every_product_is_counted_at_the_size_of_the_paper():
    encoder, generator, answers = by_hand(SIZES["xl"], 512, 30, 2, 100, 25, 16)
    assert exact_flops(on_meta(SIZES["xl"], HINTConfig()), 2, 100, 25, 16) == (encoder + generator, answers)


def test_the_papers_formulas_count_every_token_that_passes_a_model():
    """Against a loop over tokens, with sizes that all differ; the numbers are small enough to add by hand."""
    n, i, t, o, N, H, p = 3, 5, 7, 2, 10, 4, 1
    assert hint.tk_instruct_flops(n, i, t, o, N) == sum(N for _ in range(n) for _ in range(t + i + o)) == 420
    assert hint.tk_instruct_flops(n, i, 0, o, N) == sum(N for _ in range(n) for _ in range(i + o)) == 210
    assert hint.hint_flops(n, i, t, o, N, H, p) == t * N + H + sum(N + p for _ in range(n * (i + o))) == 305
    assert hint.hint_flops(n, i, t, o, N) == N * (t + n * (i + o)) == 280
    assert hint.decoder_only_flops(n, i, t, o, N) == sum(2 * N for _ in range(t + n * (i + o))) == 560


def test_the_papers_caches_are_those_tensors_that_it_names():
    """States, adapter matrices and the prefixes of self-attention, in both stacks; keys and values of a decoder."""
    model = tiny_hint()
    c, task = model.t5.config, model.encode_instruction(random_ids(1, 7))
    layers = (*task.modules.encoder, *task.modules.decoder)
    named = [task.states] + [x for layer in layers for x in (layer.adapter.down, layer.adapter.up, *layer.prefix)]
    found = hint.hint_cache_numbers(len(layers), c.num_heads, c.d_kv, c.d_model, 7, bottleneck=5, prefix_length=4)
    assert found == sum(x.numel() for x in named)
    cache = [x for block in model.t5.decoder.blocks for x in block.self_attention.project(task.states)]
    assert hint.decoder_cache_numbers(3, c.num_heads, c.d_kv, 7) == sum(x.numel() for x in cache)


@cache
def parameters_of(c: T5Config) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in T5(c).parameters())


@pytest.mark.parametrize("t", [25, 100, 500, 1000])
@pytest.mark.parametrize("size", ["large", "xl", "xxl"])
def test_the_papers_formulas_are_near_the_counts_at_public_sizes(size, t):
    """100 inputs of 100 tokens, answers of 16, within 10 %; encoding alone is overrated by more, which the decoder's
    keys and values of the input make up for. At XL, t = 100: HINT 36.5 and 35.4 TFLOP, Tk-Instruct 61.6 and 59.8.
    """
    c, n, i, o = SIZES[size], 100, 100, 16
    N, p = parameters_of(c), sum(number * width for number, width in columns_of(c, 512, 30))
    parts = by_hand(c, 512, 30, n, i, t, o)
    assert hint.hint_flops(n, i, t, o, N, H=parts[1], p=p) == pytest.approx(sum(parts), rel=0.1)
    for t in (0, t):  # No-Instruct, Tk-Instruct
        assert hint.tk_instruct_flops(n, i, t, o, N) == pytest.approx(by_hand(c, 0, 0, n, t + i, 0, o)[2], rel=0.1)


def test_at_xl_an_instruction_costs_as_much_as_hundreds_of_tokens_and_pays_from_a_few_inputs_on():
    """So H << N t, by which the paper's short formula drops H, does not hold: six times N t where t is 100.

    With 100 tokens of input and 16 of answer, HINT is cheaper than Tk-Instruct from 34 inputs on where the instruction
    has 25 tokens, from 8 where it has 100, from 3 where it has 500. Without H, two inputs would do.
    """
    c, i, o = SIZES["xl"], 100, 16
    N, H = parameters_of(c), by_hand(c, 512, 30, 1, i, 100, o)[1]
    assert (N, H, round(H / N)) == (2_849_757_184, 1_797_141_823_488 + 455_606_272 * 100, 647)
    for t, inputs in ((25, 34), (100, 8), (500, 3)):
        pays = (n for n in count(1) if sum(by_hand(c, 512, 30, n, i, t, o)) < by_hand(c, 0, 0, n, t + i, 0, o)[2])
        short = (n for n in count(1) if hint.hint_flops(n, i, t, o, N) < hint.tk_instruct_flops(n, i, t, o, N))
        assert (next(pays), next(short)) == (inputs, 2)
