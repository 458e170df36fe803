"""T5 against transformers; prefixes, adapters, decoding, loss; checkpoints that are as they should be, and others."""

import json
import math
import os
import pickle
from collections import Counter
from itertools import product

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import random_ids, random_modules, tiny_config, tiny_t5
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers.models.t5.modeling_t5 import T5Attention

import t5
from t5 import EOS, NO_LABEL, PAD, START, T5, InputError, LayerModules

FAMILIES = {  # as the hub has them
    "v1.0": dict(feed_forward_proj="relu", tie_word_embeddings=True),
    "v1.1": {},
    "odd d_kv": dict(d_kv=7, num_heads=5, num_layers=2),
    "other buckets": dict(relative_attention_num_buckets=8, relative_attention_max_distance=9, layer_norm_epsilon=0.1),
    "32,100 rows": dict(vocab_size=100),  # no multiple of 128, as in Tk-Instruct
}


def model_of_transformers(family: str) -> transformers.T5ForConditionalGeneration:
    """A randomly initialised model, with a head of its own where the family has one."""
    config = dict(vocab_size=101, d_model=48, d_kv=20, d_ff=96, num_layers=3, num_decoder_layers=2, num_heads=4)
    config |= dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**{**config, **FAMILIES[family]})).eval()
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:  # its initial values are too small to matter
            torch.nn.init.normal_(parameter)
    if family != "v1.0":  # transformers 5 shares the head of a fresh model all the same
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight))
    else:  # a fresh tied model repeats its last token for ever: let the layers outweigh the embedding
        model.shared.weight.data *= 0.05
        model.decoder.final_layer_norm.weight.data *= 20
    return model


def as_transformers_4_wrote_it(folder) -> None:
    """The form of the hub: no `scale_decoder_outputs`, `tie_word_embeddings` false for v1.1 and absent for v1.0."""
    config = json.loads((folder / "config.json").read_text())
    is_old = config["feed_forward_proj"] == "relu"
    gone = {"scale_decoder_outputs", "tie_word_embeddings", "dtype", "feed_forward_proj" if is_old else ""}
    if config["num_decoder_layers"] == config["num_layers"]:
        gone.add("num_decoder_layers")  # v1.0 is older than this key
    config = {key: value for key, value in config.items() if key not in gone}
    (folder / "config.json").write_text(json.dumps(config if is_old else {**config, "tie_word_embeddings": False}))


def as_bin(folder, legacy: bool = False, tied: bool = False) -> None:
    """The same weights as pickles; older files name the embedding again and hold a bias that nobody reads."""
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        if legacy:
            aliases = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", *["lm_head.weight"] * tied]
            tensors |= dict.fromkeys(aliases, tensors["shared.weight"])
            tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.randn(32, 4)
        name = file.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        torch.save(tensors, folder / name, _use_new_zipfile_serialization=not legacy)
        file.unlink()
    for index in folder.glob("model.safetensors.index.json"):
        text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()


def ids_with_padding() -> tuple[torch.Tensor, torch.Tensor]:
    """Sources of three lengths and targets, all longer than the last relative bucket."""
    source, target = random_ids(3, 180, vocab=99), random_ids(3, 170, vocab=99)
    source[1, 140:], source[2, 5:] = PAD, PAD
    return source, target


FORMS = ("safetensors", "sharded safetensors", "bin", "sharded bin", "legacy bin")


@pytest.mark.parametrize("family, form", [*product(("v1.0", "v1.1"), FORMS), *product(list(FAMILIES)[2:], FORMS[:1])])
@pytest.mark.parametrize("writer", ["transformers 4", "transformers 5"])
def test_logits_are_those_of_transformers_from_every_form_of_checkpoint(tmp_path, family, form, writer):
    theirs = model_of_transformers(family)
    theirs.save_pretrained(tmp_path, max_shard_size="60KB" if "sharded" in form else "1GB")
    if writer == "transformers 4":
        as_transformers_4_wrote_it(tmp_path)
    if "bin" in form:
        as_bin(tmp_path, legacy="legacy" in form, tied=family == "v1.0")
    ours, (source, target) = T5.from_pretrained(tmp_path), ids_with_padding()
    with torch.no_grad():
        wanted = theirs(input_ids=source, attention_mask=(source != PAD).long(), decoder_input_ids=target).logits
        found = ours(source, target)
    assert wanted.std() > 0.1, "logits near zero would agree by themselves"
    assert (found - wanted).abs().max() < 1e-4 * wanted.std()
    assert not ours.training and (ours.lm_head is None) == (family == "v1.0")


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_ids_are_those_of_transformers_past_the_last_bucket_and_after_rows_have_ended(tmp_path, family):
    """First without `</s>`: 150 tokens, so that every bucket is used. Then it comes in place of a token of row 0."""
    theirs, (source, _) = model_of_transformers(family), ids_with_padding()
    head, mask, answers = theirs.lm_head.weight.data, (source != PAD).long(), []
    head[EOS] = 0
    for folder in (tmp_path / "endless", tmp_path / "ending"):
        theirs.save_pretrained(folder)
        answers.append(theirs.generate(source, attention_mask=mask, max_new_tokens=150, do_sample=False)[:, 1:])
        assert torch.equal(T5.from_pretrained(folder).generate(source, max_new_tokens=150), answers[-1])
        head[EOS] = 1.001 * head[answers[0][0, 3]]
    assert answers[0].shape == (3, 150) and len(answers[0].unique()) > 5
    assert len({tuple(row.tolist()).index(EOS) if EOS in row else 150 for row in answers[1]}) > 1


@pytest.mark.parametrize("version_1_0", [False, True])
def test_a_saved_t5_is_read_by_transformers_and_by_us(tmp_path, version_1_0):
    kind = dict(tie_word_embeddings=True, scale_decoder_outputs=True, feed_forward_proj="relu") if version_1_0 else {}
    model, source, target = tiny_t5(num_decoder_layers=2, **kind), random_ids(2, 9), random_ids(2, 6)
    model.save_pretrained(tmp_path)
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        wanted = model(source, target)
        found = theirs(input_ids=source, decoder_input_ids=target).logits
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
        assert torch.equal(T5.from_pretrained(tmp_path)(source, target), wanted)
    in_bf16 = {name: tensor.bfloat16() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file(in_bf16, tmp_path / "model.safetensors")
    found = T5.from_pretrained(tmp_path).shared.weight
    assert found.dtype == torch.float32 and torch.equal(found, model.shared.weight.bfloat16().float())


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_are_those_of_transformers_for_every_distance(bidirectional):
    distance = torch.arange(-3000, 3001)
    theirs = T5Attention._relative_position_bucket(distance, bidirectional, num_buckets=32, max_distance=128)
    assert torch.equal(t5.relative_position_bucket(distance, bidirectional, 32, 128), theirs)


# ------------------------------------------------------------------------ decoding


def test_generation_stops_when_every_row_has_ended_and_goes_on_without_most_of_the_ended_rows():
    """With the choice of tokens taken from a script, in which the rows end one after the other."""
    model, steps = tiny_t5(), []
    script = [[7, 8, 9], [EOS, 9, 6], [5, EOS, 5], [8], [EOS], [5]]

    def scripted(states):
        steps.append(states.shape)
        return F.one_hot(torch.tensor(script[len(steps) - 1]), 53).unsqueeze(1).float()

    model.logits = scripted
    found = model.generate(random_ids(3, 5), max_new_tokens=9)
    assert found.tolist() == [[7, EOS, 0, 0, 0], [8, 9, EOS, 0, 0], [9, 6, 5, 8, EOS]]
    assert steps == [(3, 1, 24)] * 3 + [(1, 1, 24)] * 2, "a token a step, and none after the last row has ended"


@pytest.mark.parametrize("tasks", [3, 1, None])
def test_cached_decoding_equals_uncached_decoding_with_modules_and_padding(tasks):
    """Every step is decided again by a full pass over what was said so far; past 128 tokens, the last bucket."""
    model, modules = tiny_t5(), tasks and random_modules(tiny_config(), tasks)
    model.lm_head.weight.data[EOS] = 0
    source = random_ids(3, 9)
    source[1, 5:] = PAD
    sources = [model.read(source, None, modules)]
    found = model.decode_greedily(sources, modules, 140)
    assert found.shape == (3, 140) and len(found.unique()) > 5
    again = model.logits(model.decode(F.pad(found[:, :-1], (1, 0), value=START), sources, modules)).argmax(-1)
    assert torch.equal(found, again)


def test_cross_keys_and_values_are_computed_once_an_answer_and_one_shared_source_once_for_all_rows():
    model, inputs = tiny_t5(), random_ids(4, 5)
    model.lm_head.weight.data[EOS] = 0
    shared, own, rows = model.read(random_ids(1, 7)), model.read(inputs), []
    for block in model.decoder.blocks:
        block.cross_attention.k.register_forward_hook(lambda _, given, __: rows.append(given[0].shape[:2]))
    assert model.decode_greedily([shared, own], None, 7).shape == (4, 7)
    assert rows == [(1, 7), (4, 5)] * 3
    rows_that_go_on = t5.select_rows((torch.ones(1, 2), torch.ones(4, 2)), torch.tensor([3, 0]))
    assert [len(part) for part in rows_that_go_on] == [1, 2], "a shared source is copied for no row"


# ------------------------------------------------------------------------ prefixes and adapters


def test_a_prefix_is_seen_by_every_query_with_no_bias_and_shifts_no_position():
    """The encoder's self-attention, computed head by head and query by query with a loop over the keys."""
    encoder, prefix, x = tiny_t5().encoder, random_modules(tiny_config(), 1).encoder[0].prefix, torch.randn(1, 6, 24)
    attention, bias = encoder.blocks[0].self_attention, encoder.relative_bias(6, 6)
    found = attention(x, [prefix.before(attention.project(x))], bias)
    queries, keys, values = attention.q(x)[0], attention.k(x)[0], attention.v(x)[0]
    rows = []
    for i in range(6):
        heads = []
        for h in range(3):
            part = slice(10 * h, 10 * h + 10)
            scores = [queries[i, part] @ prefix.key[0, h, j] for j in range(4)]
            scores += [queries[i, part] @ keys[j, part] + bias[0, h, i, j] for j in range(6)]
            seen = [*prefix.value[0, h], *values[:, part]]
            heads.append(sum(weight * value for weight, value in zip(torch.stack(scores).softmax(0), seen)))
        rows.append(torch.cat(heads))
    torch.testing.assert_close(found[0], attention.o(torch.stack(rows)), atol=1e-5, rtol=0)


def test_an_adapter_is_equation_1_beside_the_feed_forward_and_outside_of_its_dropout():
    model = tiny_t5(dropout_rate=0.9).train()
    adapter, u = random_modules(model.config, 2).encoder[0].adapter, torch.randn(2, 7, 24)
    for b, (down, down_bias, up, up_bias) in enumerate(zip(*adapter)):
        wanted = F.gelu(u[b] @ down + down_bias, approximate="tanh") @ up + up_bias
        torch.testing.assert_close(adapter(u)[b], wanted, atol=1e-5, rtol=1e-5)
    block, bias, entered, results = model.encoder.blocks[0], torch.zeros(1, 1, 1, 1), {}, []
    block.feed_forward.register_forward_pre_hook(lambda _, inputs: entered.update(u=inputs[0]))
    for layer in (LayerModules(), LayerModules(adapter)):
        torch.manual_seed(1)
        results.append(block(u, bias, layer))
    torch.testing.assert_close(results[1] - results[0], adapter(entered["u"]), atol=1e-3, rtol=1e-4)


def test_padding_changes_nothing_and_a_mask_means_what_padding_means():
    model, source, target = tiny_t5(), random_ids(2, 9), random_ids(2, 6)
    wanted = model(source, target)
    torch.testing.assert_close(model(F.pad(source, (0, 5)), target), wanted, atol=1e-5, rtol=0)
    junk = torch.cat([source, random_ids(2, 5)], dim=1)
    mask = torch.cat([torch.ones(2, 9), torch.zeros(2, 5)], dim=1)
    for given in (mask, mask.long(), mask.bool()):
        torch.testing.assert_close(model(junk, target, given), wanted, atol=1e-5, rtol=0)
    assert torch.equal(model.generate(junk, mask, 9), model.generate(source, None, 9))
    assert (model(junk, target) - wanted).abs().max() > 1e-3, "unmasked ids must be read"
    longer = torch.cat([target, random_ids(2, 3)], dim=1)
    torch.testing.assert_close(model(source, longer)[:, :6], wanted, atol=1e-5, rtol=0)
    for block in (*model.encoder.blocks, *model.decoder.blocks):  # scores of thousands bring no padding back
        block.self_attention.q.weight.data *= 1e3
    loud = model(source, target)
    torch.testing.assert_close(model(junk, target, mask), loud, atol=1e-3, rtol=0)
    torch.testing.assert_close(model(source, longer)[:, :6], loud, atol=1e-3, rtol=0)


# ------------------------------------------------------------------------ loss, norm, dropout, gradients


def test_the_loss_is_the_mean_over_real_targets_of_cross_entropy_and_squared_log_z():
    model, source, labels = tiny_t5(), random_ids(3, 9), random_ids(3, 5)
    labels[1, 3:] = labels[0, 1] = NO_LABEL  # also in the middle of an answer, which is still read there
    sources, said = [model.read(source)], F.pad(labels, (1, 0), value=START)[:, :-1].clamp(min=PAD)
    found = model.loss(labels, sources)
    logits, targets = model(source, said)[labels != NO_LABEL], labels[labels != NO_LABEL]
    wanted = F.cross_entropy(logits, targets)
    torch.testing.assert_close(found.cross_entropy, wanted)
    torch.testing.assert_close(found.loss, wanted + 1e-4 * logits.logsumexp(-1).square().mean())
    assert found.tokens == 12 and found.loss - found.cross_entropy > 1e-4
    parts = [model.loss(labels[b : b + 1], [model.read(source[b : b + 1])]) for b in range(3)]
    assert [part.tokens for part in parts] == [4, 3, 5]
    torch.testing.assert_close(sum(part.loss * part.tokens for part in parts) / 12, found.loss)
    in_bf16 = t5.token_loss(logits.bfloat16(), targets)
    assert in_bf16.loss.dtype == torch.float32 and in_bf16 == t5.token_loss(logits.bfloat16().float(), targets)
    empty = model.loss(torch.full_like(labels, NO_LABEL), sources)
    empty.loss.backward()
    assert empty.loss == empty.cross_entropy == empty.tokens == 0
    chosen = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].split([4, 3, 5])
    torch.testing.assert_close(model.log_probabilities(labels, sources), torch.stack([part.sum() for part in chosen]))


@pytest.mark.parametrize("kind, error", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2**-7.95)])
def test_the_norm_has_its_statistics_in_fp32_or_better_so_that_bf16_states_are_rounded_once(kind, error):
    x, norm = torch.randn(3, 1000).to(kind), t5.RMSNorm(1000, 1e-6).to(kind)
    wanted = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert norm(x).dtype == kind
    torch.testing.assert_close(norm(x).double(), wanted, atol=0, rtol=error)


def test_gradient_checkpointing_gives_the_same_gradient_with_dropout_and_modules():
    gradients = []
    for on in (False, True):
        torch.manual_seed(1)
        model, modules = tiny_t5(dropout_rate=0.2).train(), random_modules(tiny_config(), 2)
        prefix = modules.encoder[0].prefix.key.requires_grad_()
        model.encoder.gradient_checkpointing = model.decoder.gradient_checkpointing = on
        source, target, passes = random_ids(2, 9), random_ids(2, 6), Counter()
        for name, module in model.named_modules():
            if name.endswith("feed_forward"):
                module.register_forward_hook(lambda *_, name=name: passes.update([name]))
        torch.manual_seed(2)
        model.loss(target, [model.read(source, None, modules)], modules).loss.backward()
        gradients.append([prefix.grad, *(parameter.grad for parameter in model.parameters())])
        assert len(passes) == 5 and set(passes.values()) == {1 + on}, "blocks are computed again in the backward pass"
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_dropout_acts_wherever_t5_has_it():
    model, acted = tiny_t5(dropout_rate=0.5).train(), Counter()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda _, x, y, name=name: acted.update([name] * (not torch.equal(x[0], y))))
    model(random_ids(2, 9), random_ids(2, 6))
    stacks, blocks = ("encoder.dropout", "decoder.dropout"), [f"encoder.blocks.{layer}" for layer in range(2)]
    blocks += [f"decoder.blocks.{layer}" for layer in range(3)]
    wanted = {**dict.fromkeys(stacks, 2), **{f"{block}.dropout": 2 + (block[0] == "d") for block in blocks}}
    wanted |= {f"{block}.{part}.dropout": 1 for block in blocks for part in ("self_attention", "feed_forward")}
    assert acted == wanted | {f"{block}.cross_attention.dropout": 1 for block in blocks[2:]}
    assert torch.equal(*(model.eval()(torch.full((2, 9), 5), torch.full((2, 6), 7)) for _ in range(2)))


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


@pytest.mark.parametrize("size", t5.SIZES)
def test_parameter_counts_are_those_of_the_formula_and_of_the_published_models(size):
    c = t5.SIZES[size]
    with torch.device("meta"):
        model = T5(c)
    d, inner, layers = c.d_model, c.num_heads * c.d_kv, c.num_layers
    formula = 2 * c.vocab_size * d + layers * (4 * d * inner + 3 * d * c.d_ff + 2 * d) + 64 * c.num_heads + 2 * d
    formula += c.num_decoder_layers * (8 * d * inner + 3 * d * c.d_ff + 3 * d)
    published = dict(small=76_961_152, base=247_577_856, large=783_150_080, xl=2_849_757_184, xxl=11_135_332_352)
    assert sum(parameter.numel() for parameter in model.parameters()) == formula == published.get(size, formula)
    if size == "small":
        assert model(random_ids(2, 9), random_ids(2, 6), torch.ones(2, 9)).device.type == "meta"


# ------------------------------------------------------------------------ checkpoints that are not as they should be


def saved(folder, **notes) -> T5:
    model = tiny_t5()
    model.save_pretrained(folder, **notes)
    return model


def complaint(read, path) -> str:
    """One line that names the file or folder."""
    with pytest.raises(InputError) as caught:
        read(path)
    assert str(caught.value).isprintable() and str(path) in str(caught.value)
    return str(caught.value)


def complaint_of_t5(folder, named: str) -> str:
    text = complaint(T5.from_pretrained, folder)
    assert named in text
    return text


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_missing_a_left_over_a_misshapen_and_a_tensor_that_is_not_finite_are_named(tmp_path, form):
    saved(tmp_path)
    tensors = {name: tensor.clone() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    (tmp_path / "model.safetensors").unlink()
    name, shared = "decoder.block.1.layer.2.DenseReluDense.wo.weight", tensors["shared.weight"]
    for named, changed in (
        (name, {other: tensors[other] for other in tensors if other != name}),
        (name, tensors | {name: tensors[name].T.contiguous()}),
        *((name, tensors | {name: tensors[name].index_fill(0, torch.tensor(3), x)}) for x in (math.nan, -math.inf)),
        ("surplus", tensors | {"surplus\n.weight": torch.ones(2)}),
        ("encoder.embed_tokens.weight", tensors | {"encoder.embed_tokens.weight": shared + 1}),
    ):
        if form == "bin":
            torch.save(changed, tmp_path / "pytorch_model.bin")
        else:
            save_file(changed, tmp_path / "model.safetensors")
        complaint_of_t5(tmp_path, named)


def a_file(body: int, **entries) -> bytes:
    """A safetensors file with `body` bytes of tensors, of which the entries say dtype, shape, begin and end."""
    fields = ("dtype", "shape", "data_offsets")
    header = {name: dict(zip(fields, (*entry[:2], list(entry[2:])))) for name, entry in entries.items()}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(body)


WHOLE = a_file(16, a=("F32", [1], 0, 4), b=("F32", [3], 4, 16))
LIES = [  # dtype, shape, begin, end, bytes that there are
    ("F32", [10**12], 0, 4 * 10**12, 8), ("F32", [2], 0, 8, 12), ("F32", [3], 0, 8, 8), ("F32", [2], 8, 0, 8),
    ("F32", [-2, -1], 0, 8, 8), ("F32", [2.0], 0, 8, 8), ("F32", [0, 2**63], 0, 0, 0), ("Q3", [2], 0, 8, 8),
    ("F32", [1], 4, 8, 8),
]  # fmt: skip


def test_a_safetensors_file_that_is_cut_short_or_lies_is_refused(tmp_path):
    """Before memory is asked for: a header may promise any number of bytes."""
    path, half = tmp_path / "x.safetensors", ("F32", [2], 0, 8)
    contents = [*(WHOLE[:end] for end in (0, 7, 8, 60, -9, -1)), *(a_file(size, a=entry) for *entry, size in LIES)]
    contents += [a_file(8, a=half, b=half), a_file(8, a=()), (3).to_bytes(8, "little") + b"[1]" + bytes(8)]
    for content in contents:
        path.write_bytes(content)
        complaint(t5.read_safetensors, path)
    path.write_bytes(WHOLE)
    assert {name: tensor.shape for name, tensor in t5.read_safetensors(path).items()} == {"a": (1,), "b": (3,)}


def test_a_written_file_is_aligned_and_says_what_it_is(tmp_path):
    """Other readers map tensors in place, and transformers asks for `format: pt` and the start token."""
    saved(tmp_path, notes={"of the loop": 1}, step=3)
    assert int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little") % 8 == 0
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["decoder_start_token_id"] == 0 and config["of the loop"] == 1
    assert t5.read_metadata(tmp_path / "model.safetensors") == {"format": "pt", "step": "3"}
    tensors = {"i": torch.arange(3), "b": torch.randn(2, 3).bfloat16(), "e": torch.ones(0, 4), "t": torch.randn(4, 3).T}
    t5.write_safetensors(tmp_path / "x", tensors, {})
    for found in (t5.read_safetensors(tmp_path / "x"), load_file(tmp_path / "x")):
        assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_file_that_is_being_replaced_keeps_its_content_until_the_new_one_is_whole(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("old")
    with pytest.raises(OSError), t5.replacing(tmp_path / "file") as file:
        file.write(b"half of the n")
        raise OSError(28, "No space left on device")
    assert (tmp_path / "file").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with open(tmp_path / "file") as old:  # like a model whose tensors are mapped from a file that is replaced
        with t5.replacing(tmp_path / "file") as file:
            file.write(b"new")
        assert (old.read(), (tmp_path / "file").read_text()) == ("old", "new") and len(list(tmp_path.iterdir())) == 1
    real, seen = t5.replacing, []
    monkeypatch.setattr(t5, "replacing", lambda path: seen.append(path.name) or real(path))
    saved(tmp_path)
    assert seen == ["config.json", "model.safetensors"], "weights without a config could not be read"


def test_a_bin_file_that_is_no_dictionary_of_tensors_is_refused_and_code_in_it_does_not_run(tmp_path):
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    path, proof = tmp_path / "pytorch_model.bin", tmp_path / "it-ran"

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(proof),)

    for content in ([torch.ones(2)], {"a": 3}, {1: torch.ones(2)}, {"shared.weight": Attack()}):
        torch.save(content, path)
        complaint_of_t5(tmp_path, path.name)
    attack = pickle.dumps({"shared.weight": Attack()}, protocol=2)
    for content in (b"", b"PK\3\4junk", b"\x80\2junk", attack):
        path.write_bytes(content)
        complaint_of_t5(tmp_path, path.name)
    assert not proof.exists()
    pickle.loads(attack)
    assert proof.exists(), "the attack must work on a reader that is not careful"


def test_shards_that_are_missing_or_lie_outside_are_refused(tmp_path):
    folder = tmp_path / "checkpoint"
    model_of_transformers("v1.1").save_pretrained(folder, max_shard_size="60KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    places = content["weight_map"]
    first, shard = next(iter(places.items()))
    outside = tmp_path / "elsewhere.safetensors"
    outside.write_bytes((folder / shard).read_bytes())  # whole, but not of this folder
    inside = [name for name, place in places.items() if place == shard]
    for named, changed in (
        ("elsewhere", places | dict.fromkeys(inside, "../elsewhere.safetensors")),
        ("elsewhere", places | dict.fromkeys(inside, str(outside))),
        ("absent", places | {first: "absent.safetensors"}), ("", places | {first: 3}), ("", 3),
        ("ghost", places | {"ghost": shard}), (first, {name: places[name] for name in places if name != first}),
    ):  # fmt: skip
        index.write_text(json.dumps({**content, "weight_map": changed}))
        assert index.name in complaint_of_t5(folder, named)
    index.write_text(json.dumps(content))
    T5.from_pretrained(folder)


NONSENSE = {
    "d_model": ("24", -1, 10**12), "num_layers": (10**6,), "num_heads": (True,), "vocab_size": (2.5,),
    "feed_forward_proj": ("gated-silu",), "dropout_rate": (2, math.nan), "layer_norm_epsilon": ("small",),
    "tie_word_embeddings": (1,), "relative_attention_num_buckets": (0,), "relative_attention_max_distance": (-1,),
}  # fmt: skip


def test_a_config_that_makes_no_sense_is_refused_by_the_name_of_the_field(tmp_path):
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    changes = [(field, value) for field, values in NONSENSE.items() for value in values]
    for field, value in (*changes, ("d_model", None), ("decoder_start_token_id", 2)):
        (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
        assert field in complaint_of_t5(tmp_path, "config.json")
    for field, value in changes:
        with pytest.raises(ValueError, match=field):
            tiny_config(**{field: value})


def test_a_folder_without_config_or_weights_says_so(tmp_path):
    complaint_of_t5(tmp_path, "config.json")
    for content in ("[" * 100_000, "[1]", "", "\0"):
        (tmp_path / "config.json").write_text(content)
        complaint_of_t5(tmp_path, "config.json")
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    complaint_of_t5(tmp_path, "pytorch_model.bin")


def test_a_mistyped_folder_is_answered_at_once_without_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(t5, "hf_hub_download", lambda *_: pytest.fail("the hub was asked"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in (str(tmp_path / "absent"), "runs/absent", "../absent", "runs/a/b", "a/b/c"):
        complaint(T5.from_pretrained, name)
    with pytest.raises(pytest.fail.Exception):
        T5.from_pretrained("google/absent")


def test_a_public_name_is_read_offline_from_the_hub_s_cache(tmp_path, monkeypatch):
    """The cache as the hub client lays it: refs, snapshots of links, blobs."""
    repository = tmp_path / "models--someone--tiny-t5"
    snapshot = repository / "snapshots" / ("a" * 40)
    for folder in (snapshot, repository / "refs", repository / "blobs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    model = saved(tmp_path / "made")
    as_bin(tmp_path / "made")
    for number, name in enumerate(("config.json", "pytorch_model.bin")):
        (tmp_path / "made" / name).rename(repository / "blobs" / f"{number}")
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert torch.equal(T5.from_pretrained("someone/tiny-t5").shared.weight, model.shared.weight)
    complaint(T5.from_pretrained, "someone/absent")


def test_by_name_no_file_is_fetched_that_is_not_read(tmp_path, monkeypatch):
    """A repository may hold the weights in other forms too; the download is replaced by a record of its requests."""
    model_of_transformers("v1.1").save_pretrained(tmp_path, max_shard_size="60KB")
    (tmp_path / "pytorch_model.bin").touch()
    asked = []

    def download(name, filename):
        asked.append(filename)
        if (tmp_path / filename).is_file():
            return str(tmp_path / filename)
        raise EntryNotFoundError(filename)

    monkeypatch.setattr(t5, "hf_hub_download", download)
    T5.from_pretrained("someone/else")
    shards = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert asked == ["config.json", "model.safetensors", "model.safetensors.index.json", *shards] and len(shards) > 2


def test_whatever_goes_wrong_while_a_file_is_read_becomes_one_line_that_names_it_but_for_an_interruption():
    for error in (OSError(5, "I/O error"), KeyError("a\nb"), RecursionError(), ValueError("\x1b[2J")):
        with pytest.raises(InputError) as caught, t5.reading("some/file"):
            raise error
        assert str(caught.value).isprintable() and "some/file" in str(caught.value)
    for error in (KeyboardInterrupt, SystemExit):
        with pytest.raises(error), t5.reading("some/file"):
            raise error
