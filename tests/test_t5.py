"""T5 against transformers, and what prefixes and adapters must and must not do."""

import json
import math
import os
import pickle
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import random_ids, random_modules, tiny_config, tiny_t5
from safetensors.torch import load_file, save_file
from transformers.models.t5.modeling_t5 import T5Attention

import t5
from hint import flop_counter
from t5 import (
    T5,
    CheckpointError,
    Modules,
    T5Config,
    relative_position_bucket,
    set_gradient_checkpointing,
    shift_right,
    token_loss,
)

FAMILIES = {  # as the hub has them
    "v1.0": dict(feed_forward_proj="relu", tie_word_embeddings=True),
    "v1.1": dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "odd d_kv": dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False, d_kv=7, num_heads=5),
    "other buckets": dict(
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        layer_norm_epsilon=1e-3,
    ),
    "32,100 rows": dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False, vocab_size=100),
}


def reference(family: str) -> transformers.T5ForConditionalGeneration:
    """A randomly initialised model of transformers, with a head of its own where the family has one."""
    sizes = dict(vocab_size=101, d_model=48, d_kv=20, d_ff=96, num_layers=3, num_heads=4)
    sizes["num_decoder_layers"] = 3 if family == "other buckets" else 2
    config = transformers.T5Config(**{**sizes, **FAMILIES[family]}, decoder_start_token_id=0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:  # its initial values are too small to matter
            torch.nn.init.normal_(parameter)
    if not FAMILIES[family]["tie_word_embeddings"]:  # transformers 5 shares the head of a fresh model all the same
        model.lm_head.weight = torch.nn.Parameter(torch.randn(config.vocab_size, config.d_model))
    else:  # a fresh tied model repeats its last token for ever: let the layers outweigh the embedding
        model.shared.weight.data *= 0.05
        model.decoder.final_layer_norm.weight.data *= 20
    return model


def as_transformers_4_wrote_it(folder) -> None:
    """The form of the hub: no `scale_decoder_outputs`, `tie_word_embeddings` false for v1.1 and absent for v1.0."""
    config = json.loads((folder / "config.json").read_text())
    gated = config["feed_forward_proj"] == "gated-gelu"
    for name in ("scale_decoder_outputs", "tie_word_embeddings", "dtype"):
        config.pop(name, None)
    if gated:
        config["tie_word_embeddings"] = False
    else:
        config.pop("feed_forward_proj")  # v1.0 is older than the key
    if config["num_decoder_layers"] == config["num_layers"]:
        config.pop("num_decoder_layers")  # and than this one
    (folder / "config.json").write_text(json.dumps(config))


def as_bin(folder, legacy: bool = False) -> None:
    """The same weights as pickles; older files name the embedding three times and hold a bias that nobody reads."""
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        if "shared.weight" in tensors and legacy:
            tensors["encoder.embed_tokens.weight"] = tensors["decoder.embed_tokens.weight"] = tensors["shared.weight"]
            tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.randn(32, 4)
        name = file.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        torch.save(tensors, folder / name, _use_new_zipfile_serialization=not legacy)
        file.unlink()
    index = folder / "model.safetensors.index.json"
    if index.exists():
        text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()


def ids_with_padding() -> tuple[torch.Tensor, torch.Tensor]:
    """Sources of three lengths and targets, all longer than the last relative bucket."""
    source, target = random_ids(3, 180, vocab=99), random_ids(3, 170, vocab=99)
    source[1, 140:], source[2, 5:] = 0, 0
    return source, target


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["safetensors", "sharded safetensors", "bin", "sharded bin", "legacy bin"])
@pytest.mark.parametrize("writer", ["transformers 4", "transformers 5"])
def test_logits_and_greedy_ids_are_those_of_transformers(tmp_path, family, form, writer):
    theirs = reference(family)
    theirs.save_pretrained(tmp_path, max_shard_size="60KB" if "sharded" in form else "1GB")
    if writer == "transformers 4":
        as_transformers_4_wrote_it(tmp_path)
    if "bin" in form:
        as_bin(tmp_path, legacy="legacy" in form)
    ours = T5.from_pretrained(tmp_path)
    source, target = ids_with_padding()
    mask = (source != 0).long()
    with torch.no_grad():
        wanted = theirs(input_ids=source, attention_mask=mask, decoder_input_ids=target).logits
        torch.testing.assert_close(ours(source, target), wanted, atol=1e-4, rtol=0)
        assert wanted.std() > 0.1, "logits near zero would agree by themselves"


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_ids_are_those_of_transformers_past_the_last_bucket(tmp_path, family):
    """150 tokens, so every relative bucket of the decoder is used. A zero row in the head keeps </s> from being chosen."""
    theirs = reference(family)
    theirs.lm_head.weight.data[t5.EOS] = 0
    theirs.save_pretrained(tmp_path)
    source, _ = ids_with_padding()
    wanted = theirs.generate(source, attention_mask=(source != 0).long(), max_new_tokens=150, do_sample=False)[:, 1:]
    assert wanted.shape == (3, 150) and len(wanted.unique()) > 5
    assert torch.equal(T5.from_pretrained(tmp_path).generate(source, max_new_tokens=150), wanted)


def test_rows_that_end_early_are_padded_as_transformers_pads_them(tmp_path):
    theirs = reference("v1.1")
    theirs.lm_head.weight.data[t5.EOS] *= 2  # so that some rows end
    theirs.save_pretrained(tmp_path)
    source = random_ids(16, 12, vocab=99)
    wanted = theirs.generate(source, max_new_tokens=20, do_sample=False)[:, 1:]
    ends = (wanted == t5.EOS).any(1)
    assert ends.any() and len((wanted == t5.PAD).sum(1).unique()) > 1, "the rows must end at different steps"
    assert torch.equal(T5.from_pretrained(tmp_path).generate(source, max_new_tokens=20), wanted)


def test_generation_stops_when_every_row_has_ended_and_goes_on_without_most_of_those_that_have():
    """With the choice of tokens taken from a script, in which the rows end one after the other."""
    model, steps = tiny_t5(), []
    end = t5.EOS
    script = [[7, 8, 9], [end, 9, 6], [5, end, 5], [8], [end], [5]]

    def scripted(states):
        steps.append(states.shape)
        return torch.nn.functional.one_hot(torch.tensor(script[len(steps) - 1]), 53).unsqueeze(1).float()

    model.logits = scripted
    found = model.generate(random_ids(3, 5), max_new_tokens=9)
    assert found.tolist() == [[7, end, 0, 0, 0], [8, 9, end, 0, 0], [9, 6, 5, 8, end]]
    assert steps == [(3, 1, 24)] * 3 + [(1, 1, 24)] * 2, "a token a step, and none after the last row has ended"


@pytest.mark.parametrize("tasks", [1, 6])
def test_rows_that_go_on_without_the_others_answer_as_they_do_alone(tasks):
    """Row i is made to end after 3 + 2 i tokens, with padding and with modules that all rows share or of each row."""
    model, modules = tiny_t5(), random_modules(tiny_config(), tasks)
    model.lm_head.weight.data[t5.EOS] = 0
    source = random_ids(6, 9)
    source[::2, 5:] = 0
    alone = []
    for row in range(6):
        its_own = t5.map_tensors(lambda tensor: tensor[row : row + 1] if tasks > 1 else tensor, modules)
        alone.append(model.decode_greedily([model.read(source[row : row + 1], None, its_own)], its_own, 14)[0])
    logits, going = model.logits, []

    def ending(states):
        position, rows = len(going), torch.arange(6 - len(states), 6)  # the first rows are the first to end
        going.append(len(rows))
        return logits(states).index_put((torch.where(position == 3 + 2 * rows)[0],), logits(states)[0] + 99 * end)

    end = torch.nn.functional.one_hot(torch.tensor([t5.EOS]), 53).float()
    model.logits = ending
    found = model.decode_greedily([model.read(source, None, modules)], modules, 14)
    for row in range(6):
        length = 3 + 2 * row
        assert found[row].tolist() == [*alone[row][:length].tolist(), t5.EOS, *[0] * (10 - 2 * row)]
    assert going == [6] * 8 + [3] * 4 + [1] * 2


def test_packed_weights_answer_alike_and_are_taken_away_again():
    """On a machine whose torch has no oneDNN nothing is packed, and the answers are alike for that reason."""
    model = tiny_t5()
    model.lm_head.weight.data[t5.EOS] = 0
    source = random_ids(5, 9)
    plain, wanted = model.encode(source), model.generate(source, max_new_tokens=20)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    with t5.packed_weights(model, rows=5), torch.no_grad():
        packed = [name for name, module in model.named_modules() if isinstance(module, t5.PackedLinear)]
        torch.testing.assert_close(model.encode(source), plain, atol=1e-5, rtol=0)
        assert torch.equal(model.generate(source, max_new_tokens=20), wanted)
        assert torch.equal(model.generate(source[:1], max_new_tokens=20), wanted[:1]), "any number of rows is answered"
    assert packed == (linear if torch.backends.mkldnn.is_available() else [])
    assert torch.equal(model.encode(source), plain)
    with torch.autocast("cpu", torch.bfloat16), t5.packed_weights(model, rows=5):
        assert not any(isinstance(module, t5.PackedLinear) for module in model.modules())


@pytest.mark.parametrize(
    "rows, has_bias, routine", [(1, False, "bmm"), (1, True, "oneDNN"), (5, False, "oneDNN"), (5, True, "oneDNN")]
)
def test_without_a_gradient_a_faster_routine_gives_the_same_product(monkeypatch, rows, has_bias, routine):
    """Which routine ran is seen in the operations that torch counts."""
    monkeypatch.setattr(t5, "WORTHWHILE", 1)
    monkeypatch.setattr(t5, "WORTHWHILE_ONEDNN", 1)
    x, weight, bias = torch.randn(rows, 1, 6), torch.randn(8, 6), torch.randn(8) if has_bias else None
    wanted = torch.einsum("rtn,mn->rtm", x, weight) + (bias if has_bias else 0)
    with torch.no_grad(), flop_counter() as counter:
        torch.testing.assert_close(t5.linear(x, weight, bias), wanted, atol=1e-6, rtol=1e-5)
    operations = {"bmm": torch.ops.aten.bmm}
    if torch.backends.mkldnn.is_available():
        operations["oneDNN"] = torch.ops.mkldnn._linear_pointwise
        assert counter.get_flop_counts()["Global"] == {operations[routine]: 2 * rows * 6 * 8}
    learned = weight.clone().requires_grad_()
    t5.linear(x, learned, bias).sum().backward()
    torch.testing.assert_close(learned.grad, x.sum((0, 1)).expand(8, 6))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert t5.linear(x, weight, bias).dtype == torch.bfloat16


@pytest.mark.parametrize("kind, error", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2**-7.95)])
def test_the_norm_has_its_statistics_in_fp32_or_better(kind, error):
    """So bf16 states are rounded once, which is an error of at most 2^-8; a second one in the statistics would show."""
    x, norm = torch.randn(3, 1000).to(kind), t5.RMSNorm(1000, 1e-6).to(kind)
    wanted = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert norm(x).dtype == kind
    torch.testing.assert_close(norm(x).double(), wanted, atol=0, rtol=error)


def test_what_a_cache_keeps_lies_as_a_step_reads_it_after_rows_have_gone_too():
    made = t5.KeyValue(torch.randn(4, 2, 7, 3), torch.randn(4, 2, 7, 3))
    cache = t5.LayerCache(made.laid_out(), None, [made.laid_out()])
    cache.keep(torch.tensor([0, 2]))
    for found in (cache.own, *cache.sources):
        assert found.key.is_contiguous() and found.value.mT.is_contiguous()
        assert all(torch.equal(x, y[[0, 2]]) for x, y in zip(found, made))


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_are_those_of_transformers_for_every_distance(bidirectional):
    distance = torch.arange(-3000, 3001)
    theirs = T5Attention._relative_position_bucket(distance, bidirectional, num_buckets=32, max_distance=128)
    assert torch.equal(relative_position_bucket(distance, bidirectional, 32, 128), theirs)


def test_a_saved_t5_is_read_by_transformers_and_by_us(tmp_path):
    for name, changes in {
        "gated": {},
        "tied": dict(feed_forward_proj="relu", tie_word_embeddings=True, scale_decoder_outputs=True),
    }.items():
        model = tiny_t5(num_decoder_layers=2, **changes)
        model.save_pretrained(tmp_path / name)
        source, target = random_ids(2, 9), random_ids(2, 6)
        theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / name).eval()
        with torch.no_grad():
            wanted = model(source, target)
            torch.testing.assert_close(
                theirs(input_ids=source, decoder_input_ids=target).logits, wanted, atol=1e-4, rtol=0
            )
            assert torch.equal(T5.from_pretrained(tmp_path / name)(source, target), wanted)


def test_loss_is_the_cross_entropy_over_real_targets():
    model, source, labels = tiny_t5(), random_ids(3, 9), random_ids(3, 5)
    labels[1, 3:] = -100
    found = model.loss(labels, [model.read(source)])
    logits = model(source, shift_right(labels))
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(found.loss, wanted)
    torch.testing.assert_close(found.cross_entropy / 13, wanted)
    torch.testing.assert_close(found.z_loss, sum(logits[labels != -100].logsumexp(-1) ** 2))
    assert found.tokens == 13
    assert model.loss(torch.full_like(labels, -100), [model.read(source)]).loss == 0
    assert shift_right(labels)[1].tolist() == [0, *labels[1, :3].tolist(), 0]


# ------------------------------------------------------------------------ prefixes and adapters


def test_a_prefix_is_seen_by_every_query_with_no_bias_and_shifts_no_position():
    """The encoder's self-attention, computed head by head and query by query with a loop over the keys."""
    model = tiny_t5()
    block, config = model.encoder.blocks[0], model.config
    x = torch.randn(1, 6, config.d_model)
    prefix = random_modules(config, 1).encoder[0].prefix
    bias = model.encoder.relative_bias(6, 6)
    attention = block.self_attention
    found = attention(x, [attention.project(x).after(prefix)], t5._past_prefix(bias, prefix))

    queries, keys, values = attention.q(x)[0], attention.k(x)[0], attention.v(x)[0]
    rows = []
    for i in range(6):
        heads = []
        for h in range(config.num_heads):
            part = slice(h * config.d_kv, (h + 1) * config.d_kv)
            scores = [queries[i, part] @ prefix.key[0, h, j] for j in range(4)]
            scores += [queries[i, part] @ keys[j, part] + bias[0, h, i, j] for j in range(6)]
            weights = torch.stack(scores).softmax(0)
            seen = [*prefix.value[0, h], *values[:, part]]
            heads.append(sum(weight * value for weight, value in zip(weights, seen)))
        rows.append(torch.cat(heads))
    torch.testing.assert_close(found[0], attention.o(torch.stack(rows)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_blocks_are_given_the_bias_of_unshifted_positions_behind_zeros(stack):
    """What the loop above is given by hand, seen in a real pass: real tokens keep their positions behind a prefix."""
    model = tiny_t5()
    modules, ids = random_modules(model.config, 2), random_ids(2, 9)
    ids[1, 6:] = 0
    given = {}
    getattr(model, stack).blocks[0].register_forward_pre_hook(lambda _, inputs: given.update(bias=inputs[1]))
    source = model.read(ids, None, modules)
    if stack == "encoder":
        wanted = model.encoder.relative_bias(9, 9) + t5.padding_bias(t5.padding_mask(ids))
    else:
        model.decode(ids, [source], modules)
        wanted = model.decoder.relative_bias(9, 9) + torch.ones(9, 9).triu(1) * t5.MASKED
    zeros = torch.zeros(*wanted.shape[:3], 4)
    assert torch.equal(given["bias"], torch.cat([zeros, wanted], dim=-1))


def test_padding_is_masked_so_far_that_no_score_brings_it_back():
    assert t5.padding_bias(torch.tensor([[1, 0]])).tolist() == [[[[0, t5.MASKED]]]] and t5.MASKED <= -1e9


def test_an_adapter_is_equation_1_beside_the_feed_forward():
    model = tiny_t5()
    adapter = random_modules(model.config, 2).encoder[0].adapter
    u = torch.randn(2, 7, model.config.d_model)
    for b in range(2):
        for s in range(7):
            hidden = torch.nn.functional.gelu(adapter.down[b].T @ u[b, s] + adapter.down_bias[b, 0], approximate="tanh")
            wanted = adapter.up[b].T @ hidden + adapter.up_bias[b, 0]
            torch.testing.assert_close(adapter(u)[b, s], wanted, atol=1e-5, rtol=1e-5)
    block, bias = model.encoder.blocks[0], torch.zeros(1, 1, 1, 1)
    plain = block(u, bias, t5.LayerModules())
    entered = {}
    block.feed_forward.register_forward_pre_hook(lambda _, inputs: entered.update(u=inputs[0]))
    with_adapter = block(u, bias, t5.LayerModules(adapter))
    torch.testing.assert_close(with_adapter - plain, adapter(entered["u"]), atol=1e-4, rtol=1e-4)


def test_an_adapter_stands_outside_the_dropout_of_its_layer():
    model = tiny_t5(dropout_rate=0.9).train()
    block, bias = model.encoder.blocks[0], torch.zeros(1, 1, 1, 1)
    adapter = random_modules(model.config, 2).encoder[0].adapter
    u, entered, results = torch.randn(2, 7, model.config.d_model), {}, []
    block.feed_forward.register_forward_pre_hook(lambda _, inputs: entered.update(u=inputs[0]))
    for layer in (t5.LayerModules(), t5.LayerModules(adapter)):
        torch.manual_seed(1)
        results.append(block(u, bias, layer))
    torch.testing.assert_close(results[1] - results[0], adapter(entered["u"]), atol=1e-3, rtol=1e-4)


def test_zero_adapters_and_no_prefix_are_plain_t5():
    model = tiny_t5()
    zero = t5.map_tensors(torch.zeros_like, random_modules(model.config, 2))
    zero = Modules(*(tuple(layer._replace(prefix=None, cross_prefix=None) for layer in stack) for stack in zero))
    source, target = random_ids(2, 9), random_ids(2, 6)
    found = model.logits(model.decode(target, [model.read(source, None, zero)], zero))
    assert torch.equal(found, model(source, target))
    assert torch.equal(model.decode_greedily([model.read(source)], zero, 9), model.generate(source, max_new_tokens=9))


PARTS = [
    ("encoder", "adapter"),
    ("encoder", "prefix"),
    ("decoder", "adapter"),
    ("decoder", "prefix"),
    ("decoder", "cross_prefix"),
]


@pytest.mark.parametrize("stack, part", PARTS)
def test_each_kind_of_module_changes_the_result_in_each_stack(stack, part):
    model = tiny_t5()
    full, none = random_modules(model.config, 2), Modules.none(model.config)
    only = tuple(
        plain._replace(**{part: getattr(layer, part)})
        for plain, layer in zip(getattr(none, stack), getattr(full, stack))
    )
    modules = none._replace(**{stack: only})
    source, target = random_ids(2, 9), random_ids(2, 6)
    found = model.logits(model.decode(target, [model.read(source, None, modules)], modules))
    assert (found - model(source, target)).abs().amax(dim=(1, 2)).min() > 1e-3


def test_cached_decoding_equals_uncached_decoding_with_modules_and_padding():
    """Every step is decided again by a full pass over what was said so far; past 128 tokens, the last bucket."""
    model = tiny_t5()
    model.lm_head.weight.data[t5.EOS] = 0
    modules = random_modules(model.config, 3)
    source = random_ids(3, 9)
    source[1, 5:] = 0
    sources = [model.read(source, None, modules)]
    found = model.decode_greedily(sources, modules, 140)
    assert found.shape == (3, 140) and len(found.unique()) > 5
    with torch.inference_mode():
        again = model.logits(model.decode(shift_right(found), sources, modules)).argmax(-1)
    assert torch.equal(found, again)


def test_cross_keys_and_values_are_computed_once_an_answer():
    model = tiny_t5()
    calls = []
    for block in model.decoder.blocks:
        block.cross_attention.k.register_forward_hook(lambda *_: calls.append(1))
    assert model.generate(random_ids(2, 5), max_new_tokens=7).shape[1] > 1
    assert len(calls) == model.config.num_decoder_layers


def test_padding_changes_nothing_and_a_mask_means_what_padding_means():
    model = tiny_t5()
    source, target = random_ids(2, 9), random_ids(2, 6)
    wanted = model(source, target)
    padded = torch.cat([source, torch.zeros(2, 5, dtype=torch.long)], dim=1)
    torch.testing.assert_close(model(padded, target), wanted, atol=1e-5, rtol=0)
    junk = torch.cat([source, random_ids(2, 5)], dim=1)
    mask = torch.cat([torch.ones(2, 9), torch.zeros(2, 5)], dim=1)
    torch.testing.assert_close(model(junk, target, mask), wanted, atol=1e-5, rtol=0)
    assert torch.equal(model.generate(junk, mask, 9), model.generate(source, None, 9))
    assert not torch.equal(model.generate(junk, None, 9), model.generate(source, None, 9))
    assert (model(junk, target) - wanted).abs().max() > 1e-3, "unmasked ids must be read"
    longer = torch.cat([target, random_ids(2, 3)], dim=1)
    torch.testing.assert_close(model(source, longer)[:, :6], wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_leaving_out_padding_changes_neither_loss_nor_gradient(monkeypatch, checkpointing):
    """With modules in every layer, and with a label missing in the middle of an answer, which is still read there."""
    model, modules = tiny_t5(), random_modules(tiny_config(), 3)
    set_gradient_checkpointing(model, checkpointing)
    inputs, labels = random_ids(3, 9), random_ids(3, 6)
    inputs[0, 5:], inputs[1, 2:], labels[0, 2:], labels[2, 3:], labels[1, 3] = 0, 0, -100, -100, -100
    seen, results = [], []
    for stack in (model.encoder, model.decoder):
        stack.blocks[1].feed_forward.register_forward_pre_hook(
            lambda _, given: seen.append(given[0].shape[:-1].numel())
        )
    for layout in (t5.layout_of, lambda mask: t5.Padded()):
        monkeypatch.setattr(t5, "layout_of", layout)
        model.zero_grad()
        loss = model.loss(labels, [model.read(inputs, None, modules)], modules).loss
        loss.backward()
        results.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    assert seen[:2] == [16, 11] and seen[-2:] == ([18, 27] if checkpointing else [27, 18])
    for unpadded, padded in zip(*results, strict=True):
        torch.testing.assert_close(unpadded, padded, atol=2e-5, rtol=1e-4)


def test_gradient_checkpointing_gives_the_same_gradient_with_dropout_and_modules():
    gradients = []
    for on in (False, True):
        torch.manual_seed(1)
        model = tiny_t5(dropout_rate=0.2).train()
        modules = random_modules(model.config, 2)
        prefix = modules.encoder[0].prefix.key.requires_grad_()
        set_gradient_checkpointing(model, on)
        source, target = random_ids(2, 9), random_ids(2, 6)
        passes = {"encoder": 0, "decoder": 0}

        def count(module, *_, passes=passes, model=model):
            passes["encoder" if module is model.encoder.blocks[0].feed_forward else "decoder"] += 1

        for stack in (model.encoder, model.decoder):
            stack.blocks[0].feed_forward.register_forward_hook(count)
        torch.manual_seed(2)
        model.loss(target, [model.read(source, None, modules)], modules).loss.backward()
        gradients.append([prefix.grad, *(parameter.grad for parameter in model.parameters())])
        assert passes == {"encoder": 1 + on, "decoder": 1 + on}, "each block is computed again in the backward pass"
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_dropout_acts_wherever_t5_has_it():
    """Counted in one pass: embeddings and final states of a stack, the output of each sublayer, attention weights and
    hidden units."""
    model = tiny_t5(dropout_rate=0.5).train()
    acted = Counter()

    def count(name):
        return lambda _, x, y: acted.update([name] if not torch.equal(x[0], y) else [])

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(count(name))
    model(random_ids(2, 9), random_ids(2, 6))
    wanted = {"encoder.dropout": 2, "decoder.dropout": 2}
    for stack, layers, inside in (
        ("encoder", 2, ("self_attention", "feed_forward")),
        ("decoder", 3, ("self_attention", "cross_attention", "feed_forward")),
    ):
        for layer in range(layers):
            wanted[f"{stack}.blocks.{layer}.dropout"] = len(inside)
            wanted |= {f"{stack}.blocks.{layer}.{part}.dropout": 1 for part in inside}
    assert acted == wanted
    model.eval()
    source, target = random_ids(2, 9), random_ids(2, 6)
    assert torch.equal(model(source, target), model(source, target))


def test_fresh_weights_are_scaled_by_what_goes_into_them():
    """W_q also has the 1/sqrt(k) that the scores lack; a fresh model has scores, hidden units and logits of about 1."""
    model = T5(tiny_config(vocab_size=300, d_model=256, d_kv=64, d_ff=512))
    attention, feed_forward = model.decoder.blocks[0].cross_attention, model.decoder.blocks[0].feed_forward
    wanted = {
        attention.q: (256 * 64) ** -0.5, attention.k: 256**-0.5, attention.v: 256**-0.5, attention.o: 192**-0.5,
        feed_forward.wi_0: 256**-0.5, feed_forward.wi_1: 256**-0.5, feed_forward.wo: 512**-0.5,
        model.lm_head: 256**-0.5, model.shared: 1.0,
    }  # fmt: skip
    for module, std in wanted.items():
        assert module.weight.std().item() == pytest.approx(std, rel=0.05)
    assert model.encoder.relative_bias.weight.std().item() == pytest.approx(0.5, rel=0.3)


def test_norm_and_loss_are_taken_in_fp32_under_bf16():
    x = torch.randn(2, 3, 24) * 100
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert (t5.RMSNorm(24, 1e-6)(x.bfloat16()).double() - exact).abs().max() < 0.02
    logits, labels = torch.randn(8, 5000).bfloat16(), torch.randint(0, 5000, (8,))
    found = token_loss(logits, labels)
    assert found.loss.dtype == torch.float32
    torch.testing.assert_close(found.loss, token_loss(logits.float(), labels).loss, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", t5.SIZES)
def test_parameter_counts_are_those_of_the_formula(size):
    """The published formula for v1.1, with 32 buckets in each of two stacks; xl is known as 2.85 billion."""
    config = t5.SIZES[size]
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in T5(config).parameters())
    d, f, inner, layers = config.d_model, config.d_ff, config.num_heads * config.d_kv, config.num_layers
    formula = (
        2 * config.vocab_size * d
        + layers * (4 * d * inner + 3 * d * f + 2 * d)
        + config.num_decoder_layers * (8 * d * inner + 3 * d * f + 3 * d)
    )
    assert count == formula + 64 * config.num_heads + 2 * d
    published = {
        "small": 76_961_152,
        "base": 247_577_856,
        "large": 783_150_080,
        "xl": 2_849_757_184,
        "xxl": 11_135_332_352,
    }
    assert size in ("toy", "tiny") or count == published[size]


# ------------------------------------------------------------------------ checkpoints that are not as they should be


def saved(folder, **changes) -> T5:
    model = tiny_t5(**changes)
    model.save_pretrained(folder)
    return model


def complaint(folder) -> str:
    with pytest.raises(CheckpointError) as caught:
        T5.from_pretrained(folder)
    text = str(caught.value)
    assert "\n" not in text and str(folder) in text
    return text


def test_bf16_weights_are_read_as_fp32(tmp_path):
    model = saved(tmp_path)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    found = T5.from_pretrained(tmp_path)
    assert torch.equal(found.shared.weight, model.shared.weight.bfloat16().float())


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_missing_a_left_over_and_a_misshapen_tensor_are_named(tmp_path, form):
    saved(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()

    def complaint_of(changed):
        save_file(changed, tmp_path / "model.safetensors") if form == "safetensors" else torch.save(
            changed, tmp_path / "pytorch_model.bin"
        )
        return complaint(tmp_path)

    name = "decoder.block.1.layer.2.DenseReluDense.wo.weight"
    assert name in complaint_of({n: t for n, t in tensors.items() if n != name})
    assert "surplus.weight" in complaint_of({**tensors, "surplus.weight": torch.ones(2)})
    assert name in complaint_of({**tensors, name: tensors[name].T.contiguous()})
    assert "encoder.embed_tokens.weight" in complaint_of(
        {**tensors, "encoder.embed_tokens.weight": tensors["shared.weight"] + 1}
    )


def test_a_head_equal_to_the_embedding_is_tied_where_the_config_says_so(tmp_path):
    theirs = reference("v1.0")
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["shared.weight"].clone()}, tmp_path / "model.safetensors")
    assert T5.from_pretrained(tmp_path).lm_head is None


@pytest.mark.parametrize("length", [0, 7, 8, 100, -40, -1])
def test_a_truncated_safetensors_file_is_refused(tmp_path, length):
    saved(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    assert "model.safetensors" in complaint(tmp_path)


@pytest.mark.parametrize(
    "header, body, message",
    [
        (
            {"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}},
            8,
            "holds 8 bytes of tensors where",
        ),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, 12, "holds 12 bytes of tensors where"),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, 8, "does not fit its bytes"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, 8, "does not fit its bytes"),
        ({"a": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}}, 8, "no whole number"),
        ({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, 8, "no whole number"),
        ({"a": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}}, 0, "no whole number"),
        ({"a": {"dtype": "Q3", "shape": [2], "data_offsets": [0, 8]}}, 8, "Q3"),
        ({n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ab"}, 8, "overlap or leave a gap"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, 8, "overlap or leave a gap"),
        ({"a": 3}, 8, "no safetensors header"),
        ([1], 8, "not a JSON object"),
    ],
)
def test_a_header_that_lies_is_refused_before_memory_is_asked_for(tmp_path, header, body, message):
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(body))
    with pytest.raises(CheckpointError, match=f"x.safetensors.*{message}"):
        t5.read_safetensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "content", [b"", b"1234567", (10**15).to_bytes(8, "little") + b"{}", (3).to_bytes(8, "little") + b"{}"]
)
def test_a_file_shorter_than_its_header_is_refused(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="is cut short"):
        t5.read_safetensors(tmp_path / "x.safetensors")


def test_what_is_written_is_aligned_and_says_what_it_is(tmp_path):
    """Other readers map tensors in place, and transformers asks for `format: pt` and the start token."""
    saved(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0 and json.loads(content[8 : 8 + length])["__metadata__"] == {"format": "pt"}
    assert json.loads((tmp_path / "config.json").read_text())["decoder_start_token_id"] == 0
    assert t5.read_metadata(tmp_path / "model.safetensors") == {"format": "pt"}


def test_both_files_of_a_folder_are_replaced_whole(tmp_path, monkeypatch):
    real, seen = t5.replacing, []
    monkeypatch.setattr(t5, "replacing", lambda path: (seen.append(path.name), real(path))[1])
    saved(tmp_path)
    assert seen == ["config.json", "model.safetensors"], "weights without a config could not be read"


def test_a_file_that_is_being_replaced_keeps_its_content_until_the_new_one_is_whole(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(OSError), t5.replacing(tmp_path / "file") as file:
        file.write(b"half of the n")
        raise OSError(28, "No space left on device")
    assert (tmp_path / "file").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with t5.replacing(tmp_path / "file") as file:
        file.write(b"new")
        assert (tmp_path / "file").read_text() == "old"
    assert (tmp_path / "file").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("content", [[torch.ones(2)], {"a": 3}, {1: torch.ones(2)}])
def test_a_bin_file_that_is_no_dictionary_of_tensors_is_refused(tmp_path, content):
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(content, tmp_path / "pytorch_model.bin")
    assert "not a dictionary of tensors" in complaint(tmp_path)


def test_weights_that_are_no_floating_point_numbers_are_refused(tmp_path):
    saved(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save({**tensors, "shared.weight": tensors["shared.weight"].long()}, tmp_path / "pytorch_model.bin")
    assert "shared.weight does not hold floating-point numbers" in complaint(tmp_path)


def test_a_pickle_that_wants_to_run_code_is_refused_and_does_not_run(tmp_path):
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    proof = tmp_path / "it-ran"

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(proof),)

    for protocol_file in ("zip", "plain"):
        if protocol_file == "zip":
            torch.save({"shared.weight": Attack()}, tmp_path / "pytorch_model.bin")
        else:
            (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"shared.weight": Attack()}, protocol=2))
        assert "pytorch_model.bin" in complaint(tmp_path)
        assert not proof.exists()
    pickle.loads(pickle.dumps(Attack()))
    assert proof.exists(), "the attack must work on a reader that is not careful"


def test_shards_that_are_missing_or_lie_outside_are_refused(tmp_path):
    folder = tmp_path / "checkpoint"
    reference("v1.1").save_pretrained(folder, max_shard_size="60KB")
    index = folder / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    first, shard = next(iter(found["weight_map"].items()))
    (tmp_path / "elsewhere.safetensors").write_bytes((folder / shard).read_bytes())  # whole, but not of this folder

    def with_map(**changes):
        index.write_text(json.dumps({**found, "weight_map": {**found["weight_map"], **changes}}))
        return complaint(folder)

    inside = {name: "../elsewhere.safetensors" for name, place in found["weight_map"].items() if place == shard}
    assert "'../elsewhere.safetensors', which is not there" in with_map(**inside)
    assert "absent.safetensors" in with_map(**{first: "absent.safetensors"})
    assert "no weight_map" in with_map(**{first: 3})
    assert "differ in ghost" in with_map(ghost=shard)
    hidden = {name: place for name, place in found["weight_map"].items() if name != first}
    index.write_text(json.dumps({**found, "weight_map": hidden}))
    assert f"differ in {first}" in complaint(folder)
    (folder / "twin.safetensors").write_bytes((folder / shard).read_bytes())
    assert "which another shard holds too" in with_map(**{first: "twin.safetensors"})


@pytest.mark.parametrize(
    "change",
    [
        dict(d_model=None), dict(d_model="24"), dict(d_model=-1), dict(d_model=10**12), dict(num_layers=10**6), dict(num_heads=True),
        dict(feed_forward_proj="gated-silu"), dict(dropout_rate=2), dict(layer_norm_epsilon="small"), dict(tie_word_embeddings=1),
        dict(relative_attention_num_buckets=1), dict(relative_attention_num_buckets=6), dict(relative_attention_max_distance=16),
    ],
)  # fmt: skip
def test_a_config_that_makes_no_sense_is_refused(tmp_path, change):
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    text = complaint(tmp_path)
    assert "config.json" in text and next(iter(change)) in text


def test_a_folder_without_config_or_weights_says_so(tmp_path):
    assert "config.json" in complaint(tmp_path)
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "pytorch_model.bin" in complaint(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    assert "config.json" in complaint(tmp_path)


def test_a_public_name_is_read_offline_from_the_hub_s_cache_and_only_what_is_needed(tmp_path):
    """The cache as the hub client lays it: refs, snapshots of links, blobs; in a process that may not use the network."""
    repository = tmp_path / "models--someone--tiny-t5"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    made = tmp_path / "made"
    model = saved(made)
    as_bin(made)
    (repository / "blobs").mkdir()
    for number, name in enumerate(("config.json", "pytorch_model.bin")):
        (made / name).rename(repository / "blobs" / f"{number}")
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    program = (
        "import t5; model = t5.T5.from_pretrained('someone/tiny-t5'); print(model.shared.weight.sum().item())\n"
        "try: t5.T5.from_pretrained('someone/absent')\n"
        "except t5.CheckpointError as error: print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    first, second = done.stdout.strip().splitlines()
    assert math.isclose(float(first), model.shared.weight.sum().item(), abs_tol=1e-3)
    assert second.startswith("someone/absent: no config.json there")


def test_by_name_no_file_is_fetched_that_is_not_read(tmp_path, monkeypatch):
    """A repository also holds TensorFlow and Flax weights; the download is replaced by a record of what it was asked for."""
    theirs = reference("v1.1")
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    (tmp_path / "pytorch_model.bin").touch()
    (tmp_path / "tf_model.h5").touch()
    asked = []

    def download(name, filename):
        asked.append(filename)
        if not (tmp_path / filename).is_file():
            raise t5.EntryNotFoundError(filename)
        return str(tmp_path / filename)

    monkeypatch.setattr(t5, "hf_hub_download", download)
    T5.from_pretrained("someone/else")
    shards = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert asked == ["config.json", "model.safetensors", "model.safetensors.index.json", *shards] and len(shards) > 2


def test_configs_are_frozen_and_sizes_may_be_changed_by_replace():
    config = tiny_config()
    with pytest.raises(AttributeError):
        config.d_model = 3
    assert replace(config, d_model=8).d_model == 8 and isinstance(config, T5Config)
