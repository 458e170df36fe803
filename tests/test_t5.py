"""T5 against transformers, and what prefixes and adapters must and must not do."""

import json
import math
import os
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import random_ids, random_modules, tiny_config, tiny_t5
from safetensors.torch import load_file, save_file
from transformers.models.t5.modeling_t5 import T5Attention

import t5
from hint import _map
from t5 import T5, CheckpointError, Modules, T5Config, relative_position_bucket, shift_right, token_loss

FAMILIES = {  # as the hub has them
    "v1.0": dict(feed_forward_proj="relu", tie_word_embeddings=True),
    "v1.1": dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "odd d_kv": dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False, d_kv=7, num_heads=5),
    "32,100 rows": dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False, vocab_size=100),
}


def reference(family: str) -> transformers.T5ForConditionalGeneration:
    """A randomly initialised model of transformers, with a head of its own where the family has one."""
    sizes = dict(vocab_size=101, d_model=48, d_kv=20, d_ff=96, num_layers=3, num_decoder_layers=2, num_heads=4)
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


def ids_with_padding(model) -> tuple[torch.Tensor, torch.Tensor]:
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
    source, target = ids_with_padding(theirs)
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
    source, _ = ids_with_padding(theirs)
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


def test_generation_stops_when_every_row_has_ended():
    """With the choice of tokens taken from a script: the second row ends two steps after the first."""
    model, steps = tiny_t5(), []
    script = [[7, 8], [t5.EOS, 9], [5, 6], [5, t5.EOS], [5, 6]]

    def scripted(states):
        steps.append(states.shape)
        return torch.nn.functional.one_hot(torch.tensor(script[len(steps) - 1]), 53).unsqueeze(1).float()

    model.logits = scripted
    found = model.generate(random_ids(2, 5), max_new_tokens=5)
    assert found.tolist() == [[7, t5.EOS, t5.PAD, t5.PAD], [8, 9, 6, t5.EOS]]
    assert steps == [(2, 1, 24)] * 4, "a token a step, and none after the last row has ended"


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
    logits, labels = torch.randn(3, 5, 11), torch.randint(0, 11, (3, 5))
    labels[1, 3:] = -100
    found = token_loss(logits, labels)
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(found.loss, wanted)
    torch.testing.assert_close(found.cross_entropy / 13, wanted)
    torch.testing.assert_close(found.z_loss, sum(logits[labels != -100].logsumexp(-1) ** 2))
    assert found.tokens == 13
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
    found = attention(x, attention.project(x).after(prefix), t5._past_prefix(bias, prefix))

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


def test_zero_adapters_and_no_prefix_are_plain_t5():
    model = tiny_t5()
    zero = _map(torch.zeros_like, random_modules(model.config, 2))
    zero = Modules(*(tuple(layer._replace(prefix=None, cross_prefix=None) for layer in stack) for stack in zero))
    source, target = random_ids(2, 9), random_ids(2, 6)
    mask = torch.ones_like(source)
    found = model.decode(target, model.encode(source, mask, zero), mask, zero)
    assert torch.equal(found, model(source, target))
    assert torch.equal(
        model.decode_greedily(model.encode(source), mask, zero, 9), model.generate(source, max_new_tokens=9)
    )


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
    mask = torch.ones_like(source)
    found = model.decode(target, model.encode(source, mask, modules), mask, modules)
    assert (found - model(source, target)).abs().amax(dim=(1, 2)).min() > 1e-3


def test_cached_decoding_equals_uncached_decoding_with_modules_and_padding():
    """Every step is decided again by a full pass over what was said so far; past 128 tokens, the last bucket."""
    model = tiny_t5()
    model.lm_head.weight.data[t5.EOS] = 0
    modules = random_modules(model.config, 3)
    source = random_ids(3, 9)
    source[1, 5:] = 0
    mask = (source != 0).long()
    memory = model.encode(source, mask, modules)
    found = model.decode_greedily(memory, mask, modules, 140)
    assert found.shape == (3, 140) and len(found.unique()) > 5
    with torch.inference_mode():
        again = model.decode(shift_right(found), memory, mask, modules).argmax(-1)
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
    assert (model(junk, target) - wanted).abs().max() > 1e-3, "unmasked ids must be read"
    longer = torch.cat([target, random_ids(2, 3)], dim=1)
    torch.testing.assert_close(model(source, longer)[:, :6], wanted, atol=1e-5, rtol=0)


def test_gradient_checkpointing_gives_the_same_gradient_with_dropout_and_modules():
    gradients = []
    for on in (False, True):
        torch.manual_seed(1)
        model = tiny_t5(dropout_rate=0.2).train()
        modules = random_modules(model.config, 2)
        prefix = modules.encoder[0].prefix.key.requires_grad_()
        model.set_gradient_checkpointing(on)
        source, target = random_ids(2, 9), random_ids(2, 6)
        passes = []
        model.encoder.blocks[0].feed_forward.register_forward_hook(lambda *_: passes.append(1))
        mask = torch.ones_like(source)
        torch.manual_seed(2)
        token_loss(model.decode(target, model.encode(source, mask, modules), mask, modules), target).loss.backward()
        gradients.append([prefix.grad, *(parameter.grad for parameter in model.parameters())])
        assert len(passes) == 1 + on
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_dropout_acts_wherever_t5_has_it():
    """Embeddings, attention weights, hidden units, each sublayer's output and the final states: counted by hooks."""
    model = tiny_t5(dropout_rate=0.5).train()
    acted = set()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(
                lambda _, x, y, name=name: acted.add(name) if not torch.equal(x[0], y) else None
            )
    model(random_ids(2, 9), random_ids(2, 6))
    places = {
        "encoder": ("", "self_attention.", "feed_forward."),
        "decoder": ("", "self_attention.", "cross_attention.", "feed_forward."),
    }
    wanted = {f"{stack}.dropout" for stack in places}
    for stack, layers in (("encoder", 2), ("decoder", 3)):
        wanted |= {f"{stack}.blocks.{layer}.{place}dropout" for layer in range(layers) for place in places[stack]}
    assert acted == wanted
    model.eval()
    source, target = random_ids(2, 9), random_ids(2, 6)
    assert torch.equal(model(source, target), model(source, target))


def test_softmax_and_norm_are_taken_in_fp32_under_bf16():
    x = torch.randn(2, 3, 24) * 100
    norm = t5.RMSNorm(24, 1e-6)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert (norm(x.bfloat16()).double() - exact).abs().max() < 0.02
    key = torch.randn(1, 1, 2000, 8).bfloat16()
    weights = t5.attend(torch.zeros(1, 1, 1, 8).bfloat16(), key, torch.ones_like(key), torch.zeros(1), lambda w: w)
    torch.testing.assert_close(weights, torch.ones_like(weights), atol=0.01, rtol=0)


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
        + layers * (8 * d * inner + 3 * d * f + 3 * d)
    )
    assert count == formula + 64 * config.num_heads + 2 * d
    published = {
        "small": 76_961_152,
        "base": 247_577_856,
        "large": 783_150_080,
        "xl": 2_849_757_184,
        "xxl": 11_135_332_352,
    }
    assert size == "tiny" or count == published[size]


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


def test_a_header_that_lies_is_refused_before_memory_is_asked_for(tmp_path):
    saved(tmp_path)
    for header in (
        {"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
        {"a": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}},
        {"a": {"dtype": "Q3", "shape": [2], "data_offsets": [0, 8]}},
        {"a": 3},
        [1],
    ):
        text = json.dumps(header).encode()
        (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
        complaint(tmp_path)


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
            (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"shared.weight": Attack()}))
        assert "pytorch_model.bin" in complaint(tmp_path)
        assert not proof.exists()
    pickle.loads(pickle.dumps(Attack()))
    assert proof.exists(), "the attack must work on a reader that is not careful"


def test_shards_that_are_missing_or_lie_outside_are_refused(tmp_path):
    theirs = reference("v1.1")
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    index = tmp_path / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    first = next(iter(found["weight_map"]))
    for shard in ("../elsewhere.safetensors", "absent.safetensors", 3):
        index.write_text(json.dumps({**found, "weight_map": {**found["weight_map"], first: shard}}))
        assert index.name in complaint(tmp_path)
    index.write_text(json.dumps({**found, "weight_map": {**found["weight_map"], "ghost": found["weight_map"][first]}}))
    assert "ghost" in complaint(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        dict(d_model=None), dict(d_model="24"), dict(d_model=-1), dict(d_model=10**12), dict(num_layers=10**6), dict(num_heads=True),
        dict(feed_forward_proj="gated-silu"), dict(dropout_rate=2), dict(layer_norm_epsilon="small"), dict(tie_word_embeddings=1),
        dict(relative_attention_num_buckets=1), dict(relative_attention_max_distance=3),
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
