"""The systems that HINT is compared with: every generator against a loop from its equations, and in every combination
what it generates, what of it trains, and that answering, keeping and the command line treat it as they treat HINT.
"""

import copy
import itertools
import json
import math
import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import FAST, finetune, log_of, parsed, random_ids, run, tiny_config, tiny_t5, weights_of, write_shards
from test_hint import tensors_of

import hint
import t5
import train
from data import Example, Instance, Task, TaskNumberFormat, collate, microbatches
from hint import HINT, EncodedTask, HINTConfig, PlainT5
from hypernet import CHOICES, MODULES
from t5 import SIZES, T5, CheckpointError

CASES = {  # the systems of train.py, and the rows of the paper's ablations
    **{
        system: {name: value for name, value in preset.items() if name != "bottleneck"}
        for system, (_, preset) in train.SYSTEMS.items()
        if preset is not None
    },
    "no modules": {"generator": "none"},
    "own hyperencoder": {"hyperencoder": "own"},
    "full decoder": {"generator": "decoder"},
    **{modules: {"modules": modules, "fusion": False} for modules in MODULES},
    "hyperformer-instruction": {"generator": "hyperformer", "fusion": False},
    "hyperformer, own": {"generator": "hyperformer", "hyperencoder": "own"},
    "hypter, own": {"generator": "pooled", "modules": "adapters", "fusion": False, "hyperencoder": "own"},
    "hypertune, tied": {"generator": "decoder", "modules": "prefixes", "fusion": False},
}
GRID = {
    f"{generator}, {modules}": {"generator": generator, "modules": modules, "fusion": False}
    for generator in ("direct", "decoder", "pooled")
    for modules in MODULES
}
all_cases = pytest.mark.parametrize("case", CASES)
each_generator_and_modules = pytest.mark.parametrize("case", [*CASES, *GRID])


def model_of(case: str, t5_changes: dict | None = None, **changes) -> HINT:
    """A small model of a case. What is generated is large enough to be noticed, and no norm is the identity."""
    settings = {"bottleneck": 5, "prefix_length": 4, "generator_dropout": 0.0, **{**CASES, **GRID}[case], **changes}
    settings["tasks"] = 3 if settings.get("hyperencoder") == "table" else 0
    model = HINT(tiny_t5(**(t5_changes or {})), HINTConfig(**settings)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter.data, 0.5, 1.5)
        if ".networks." in name and name.endswith("3.weight"):
            of_columns = model.config.generator in ("columns", "direct") and model.config.modules != "lora"
            parameter.data *= 8 if of_columns else 3
        if name.startswith("hypernetwork.stacks") and parameter.ndim < 2:
            torch.nn.init.uniform_(parameter.data, 0.2, 0.5)
        if ".heads." in name:
            torch.nn.init.normal_(parameter.data, std=0.05)
    return model


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def few_steps(monkeypatch):
    """Of a fit, where how well it fits does not matter."""
    monkeypatch.setattr(train, "FIT_STEPS", 8)


def instructions_of(model: HINT, count: int = 3) -> torch.Tensor:
    """Different texts, or numbers of different tasks, of which the first is 0, the id of padding."""
    return torch.arange(count)[:, None] % 3 if model.config.hyperencoder == "table" else random_ids(count, 7)


def logits_of(model: HINT, task: EncodedTask, inputs: torch.Tensor, said: torch.Tensor) -> torch.Tensor:
    """Of every next token, without any cache."""
    return model.t5.logits(model.t5.decode(said, model._fuse(task, inputs), task.modules))


# ------------------------------------------------------------------------ what every combination must have


def wanted_shapes(config: HINTConfig, batch: int, cross: bool) -> dict[str, list]:
    """Of the parts of one layer of the tiny T5, d = 24, I = 30; bottleneck 5, prefixes of 4 tokens, 3 heads of 10."""
    adapter = [(batch, 24, 5), (batch, 1, 5), (batch, 5, 24), (batch, 1, 24)]
    prefix, lora = [(batch, 3, 4, 10)] * 2, [(batch, 24, 5), (batch, 5, 30)] * 2
    if config.generator.startswith("hyperformer"):
        return dict.fromkeys(("after_attention", "after_feed_forward"), [*adapter, (batch, 1, 24), (batch, 1, 24)])
    if config.generator == "none":
        return {}
    return {
        "adapters": {"adapter": adapter},
        "prefixes": {"prefix": prefix, **({"cross_prefix": prefix} if cross else {})},
        "adapters+prefixes": {"adapter": adapter, "prefix": prefix, **({"cross_prefix": prefix} if cross else {})},
        "lora": {"lora": lora, **({"cross_lora": lora} if cross else {})},
    }[config.modules]


@each_generator_and_modules
def test_each_layer_is_given_what_its_system_generates_and_nothing_else(case):
    model = model_of(case)
    task = model.encode_instruction(instructions_of(model, 2))
    assert (len(task.modules.encoder), len(task.modules.decoder)) == (2, 3)
    for layers, cross in ((task.modules.encoder, False), (task.modules.decoder, True)):
        for layer in layers:
            found = {name: [tuple(x.shape) for x in part] for name, part in layer._asdict().items() if part}
            assert found == wanted_shapes(model.config, 2, cross)
    assert task.states.shape == (2, 7 if model.config.fusion else 0, 24)
    assert task.attention_mask.shape == task.states.shape[:2]


@pytest.mark.parametrize(
    "case, trains",
    [pair for pair in itertools.product(CASES, CHOICES["trains"]) if pair != ("no modules", "hypernetwork")],  # refused
)
def test_gradients_reach_every_parameter_that_trains_and_no_other(case, trains):
    """Which ones those are is told here by the modules of T5 that they belong to, not by their names."""
    model = model_of(case, trains=trains).train()
    norms = {id(p) for part in model.t5.modules() if isinstance(part, t5.RMSNorm) for p in part.parameters()}
    of_t5 = {id(p) for p in model.t5.parameters()}
    assert len(norms) == 2 * 2 + 3 * 3 + 2
    model(instructions_of(model), random_ids(3, 9), random_ids(3, 6)).loss.backward()
    for name, parameter in model.named_parameters():
        trained = trains == "all" or id(parameter) not in of_t5 or (trains.endswith("norms") and id(parameter) in norms)
        assert parameter.requires_grad == trained, name
        assert (parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)) == trained, name


@each_generator_and_modules
def test_a_mixed_batch_gives_each_example_what_it_gets_alone(case):
    """Four examples, of which two share a task; then one input for all, so that answers differ by the task alone."""
    model = model_of(case)
    model.t5.lm_head.weight.data[t5.EOS] = 0
    instructions, inputs, labels = instructions_of(model, 4), random_ids(4, 9), random_ids(4, 6)
    instructions[3] = instructions[1]
    if model.config.hyperencoder != "table":
        instructions[0, 5:] = 0
    together = model(instructions, inputs, labels)
    alone = [model(*(part[b : b + 1] for part in (instructions, inputs, labels))).cross_entropy for b in range(4)]
    torch.testing.assert_close(together.cross_entropy, sum(alone), atol=1e-4, rtol=1e-5)
    task, inputs, labels = model.encode_instruction(instructions), inputs[:1].repeat(4, 1), labels[:1].repeat(4, 1)
    logits, answers = logits_of(model, task, inputs, labels), model.generate(task, inputs, max_new_tokens=12)
    for b in range(4):
        own = model.encode_instruction(instructions[b : b + 1])
        torch.testing.assert_close(logits_of(model, own, inputs[:1], labels[:1])[0], logits[b], atol=1e-4, rtol=1e-4)
        assert torch.equal(model.generate(own, inputs[:1], max_new_tokens=12)[0], answers[b])
    for one, other in ((0, 1), (1, 2), (0, 2)):
        differ = (logits[one] - logits[other]).abs().max() > 1e-2
        assert differ != (model.config.generator == "direct"), "equal examples would agree by themselves"


@pytest.mark.parametrize("case", [*MODULES, "hyperformer-instruction"])
def test_every_part_of_every_layer_s_modules_matters(case):
    """One after the other is taken from another instruction; that alone must change what is said."""
    model = model_of(case)
    task, other = (model.encode_instruction(random_ids(1, 7)) for _ in range(2))
    inputs, said = random_ids(2, 9), random_ids(2, 6)
    before = logits_of(model, task, inputs, said)
    changes = 0
    for stack in ("encoder", "decoder"):
        layers, others = getattr(task.modules, stack), getattr(other.modules, stack)
        for place, layer in enumerate(layers):
            for name, part in layer._asdict().items():
                for number in range(len(part or ())):
                    changed = part._replace(**{part._fields[number]: getattr(others[place], name)[number]})
                    new = (*layers[:place], layer._replace(**{name: changed}), *layers[place + 1 :])
                    after = logits_of(model, task._replace(modules=task.modules._replace(**{stack: new})), inputs, said)
                    assert (after - before).abs().max() > 1e-4, (stack, place, name, part._fields[number])
                    changes += 1
    wanted = {"adapters+prefixes": 36, "adapters": 20, "prefixes": 16, "lora": 32}
    assert changes == wanted.get(case, 60)


@all_cases
def test_a_saved_model_of_any_kind_is_read_as_it_was(case, tmp_path):
    model = model_of(case, trains="hypernetwork+norms")
    given = instructions_of(model), random_ids(3, 9), random_ids(3, 6)
    model.save_pretrained(tmp_path)
    found = hint.load_model(tmp_path)
    assert found.config == model.config and torch.equal(found(*given).loss, model(*given).loss)
    trained = [[name for name, p in m.named_parameters() if p.requires_grad] for m in (model, found)]
    assert trained[0] == trained[1] and 0 < len(trained[0]) < len(list(model.parameters()))


@all_cases
@pytest.mark.parametrize("count", [1, 3])
def test_kept_tasks_of_any_kind_answer_as_before(case, count, tmp_path):
    model = model_of(case)
    task, inputs, said = model.encode_instruction(instructions_of(model, count)), random_ids(3, 9), random_ids(3, 6)
    task.save(tmp_path / "task.pt")
    found = EncodedTask.load(tmp_path / "task.pt")
    assert torch.equal(logits_of(model, found, inputs, said), logits_of(model, task, inputs, said))
    assert not any(tensor.requires_grad for tensor in tensors_of(found))


def with_part(task: EncodedTask, **parts) -> EncodedTask:
    """The task with other parts in its last decoder layer."""
    *before, last = task.modules.decoder
    return task._replace(modules=task.modules._replace(decoder=(*before, last._replace(**parts))))


@pytest.mark.parametrize("case, part", [("lora", "cross_lora"), ("hyperformer++-instruction", "after_feed_forward")])
def test_a_kept_task_with_a_part_of_another_shape_or_kind_is_refused(case, part, tmp_path):
    """Each tensor one too wide in each axis, one too few tensors, a part of another kind, a part in another's place."""
    model = model_of(case)
    task = model.encode_instruction(random_ids(1, 7))
    good = getattr(task.modules.decoder[-1], part)
    adapter = model_of("adapters").encode_instruction(random_ids(1, 7)).modules.decoder[0].adapter
    wrong = [with_part(task, **{part: bad}) for bad in (good[:-1], tuple(good), good[0], adapter)]
    wrong += [with_part(task, adapter=good), with_part(task, cross_prefix=good)]
    for number, tensor in enumerate(good):
        for axis in range(3):
            wide = torch.cat([tensor, tensor.narrow(axis, 0, 1)], dim=axis)
            wrong.append(with_part(task, **{part: good._replace(**{good._fields[number]: wide})}))
        wrong.append(with_part(task, **{part: good._replace(**{good._fields[number]: tensor[0]})}))
        wrong.append(with_part(task, **{part: good._replace(**{good._fields[number]: None})}))
    for bad in wrong:
        bad.save(tmp_path / "task.pt")
        with pytest.raises(CheckpointError, match="task.pt: is not an encoded task"):
            EncodedTask.load(tmp_path / "task.pt")


@pytest.mark.parametrize("case, count", [*((case, 5) for case in CASES), ("lora", 1), ("hyperformer++-instruction", 1)])
def test_cached_answers_are_those_of_a_loop_without_cache(case, count):
    """One row at a time, one pass a token; the rows end at different steps, so some go on without the others."""
    model = model_of(case)
    model.t5.lm_head.weight.data[t5.EOS] = 0
    task, inputs = model.encode_instruction(instructions_of(model, count)), random_ids(5, 9)
    inputs[1, 5:] = 0
    endless = model.generate(task, inputs, max_new_tokens=10)
    head, token = model.t5.lm_head.weight.data, usual_end(endless)
    head[[t5.EOS, token]] = head[[token, t5.EOS]]
    answers = model.generate(task, inputs, max_new_tokens=10)
    lengths = []
    for b, answer in enumerate(answers.tolist()):
        own, said = task.rows(torch.tensor([b if count > 1 else 0])), [t5.START]
        row = inputs[b : b + 1][:, inputs[b] > 0]
        while said[-1] != t5.EOS and len(said) <= 10:
            said.append(logits_of(model, own, row, torch.tensor([said]))[0, -1].argmax().item())
        assert said[1:] + [0] * (answers.shape[1] - len(said) + 1) == answer
        lengths.append(len(said))
    assert len(set(lengths)) > 1, "rows must end at different steps"


def usual_end(answers: torch.Tensor) -> int:
    """The token whose first places in the rows differ most: as an end it stops them at different steps."""
    places = {t: {(row == t).nonzero()[:1].sum().item() for row in answers} for t in set(answers.flatten().tolist())}
    return max(places, key=lambda token: (len(places[token]), token))


# ------------------------------------------------------------------------ against plain loops from the equations


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert wanted.abs().max() > 1e-2, "values near zero would agree by themselves"


def attention_loop(w: dict, name: str, x, states, mask, bias=None):
    """x [T, d] asks the states [S, d], of which some are real; 3 heads of 10, scores not divided by anything."""
    heads = []
    for head in range(3):
        q, k, v = (
            F.linear(y, w[f"{name}.{which}.weight"][10 * head : 10 * head + 10])
            for which, y in (("q", x), ("k", states), ("v", states))
        )
        scores = q @ k.T + (0 if bias is None else bias[head])
        heads.append(scores.masked_fill(mask == 0, -math.inf).softmax(-1) @ v)
    return F.linear(torch.cat(heads, dim=-1), w[f"{name}.o.weight"])


def norm_loop(w: dict, name: str, x):
    return w[f"{name}.weight"] * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def feed_forward_loop(w: dict, name: str, x):
    gate = F.gelu(F.linear(x, w[f"{name}.wi_0.weight"]), approximate="tanh")
    return F.linear(gate * F.linear(x, w[f"{name}.wi_1.weight"]), w[f"{name}.wo.weight"])


def network_loop(w: dict, kind: str, z):
    """W_2 gelu(W_1 z) / sqrt(d), without biases."""
    hidden = F.gelu(F.linear(z, w[f"networks.{kind}.0.weight"]), approximate="tanh")
    return F.linear(hidden, w[f"networks.{kind}.3.weight"]) / 24**0.5


def pooled_loop(w, kind, slot, number, width, columns, states, mask):
    """One network a kind writes all vectors of all layers; those of a slot lie side by side."""
    mean = sum(state for state, real in zip(states, mask) if real) / mask.sum()
    return network_loop(w, kind, mean)[(slot * columns + number) * width :][:width]


def direct_loop(w, kind, slot, number, width, columns, states, mask):
    return network_loop(w, kind, w[f"embeddings.{kind}"][slot * columns + number])


def decoder_loop(w, kind, slot, number, width, columns, states, mask):
    """The embedding of one column alone through three layers of cross-attention and feed-forward."""
    x = w[f"embeddings.{kind}"][slot * columns + number][None]
    for layer in range(3):
        name = f"blocks.{layer}"
        x = x + attention_loop(
            w, f"{name}.cross_attention", norm_loop(w, f"{name}.cross_attention_norm", x), states, mask
        )
        x = x + feed_forward_loop(w, f"{name}.feed_forward", norm_loop(w, f"{name}.feed_forward_norm", x))
    return network_loop(w, kind, norm_loop(w, "norm", x)[0])


def vectors_of(modules: t5.Modules, b: int):
    """(kind, slot, number, vector) of all vectors that modules are made of, as section 3.1.1 cuts them."""
    layers = [*modules.encoder, *modules.decoder]
    attentions = [(layer.prefix, layer.lora) for layer in modules.encoder]
    for layer in modules.decoder:
        attentions += [(layer.prefix, layer.lora), (layer.cross_prefix, layer.cross_lora)]
    for slot, adapter in enumerate(layer.adapter for layer in layers):
        if adapter:
            yield from (("adapter_down", slot, j, adapter.down[b, :, j]) for j in range(5))
            yield from (("adapter_up", slot, j, adapter.up[b, j]) for j in range(5))
            yield "adapter_down_bias", slot, 0, adapter.down_bias[b, 0]
            yield "adapter_up_bias", slot, 0, adapter.up_bias[b, 0]
    for slot, (prefix, lora) in enumerate(attentions):
        if prefix:
            yield from (("prefix_key", slot, j, prefix.key[b, :, j].flatten()) for j in range(4))
            yield from (("prefix_value", slot, j, prefix.value[b, :, j].flatten()) for j in range(4))
        if lora:
            yield from (("lora_query_down", slot, j, lora.query_down[b, :, j]) for j in range(5))
            yield from (("lora_query_up", slot, j, lora.query_up[b, j]) for j in range(5))
            yield from (("lora_value_down", slot, j, lora.value_down[b, :, j]) for j in range(5))
            yield from (("lora_value_up", slot, j, lora.value_up[b, j]) for j in range(5))


@pytest.mark.parametrize(
    "generator, loop", [("pooled", pooled_loop), ("direct", direct_loop), ("decoder", decoder_loop)]
)
@pytest.mark.parametrize("modules, vectors", [("adapters+prefixes", 5 * 12 + 8 * 8), ("lora", 8 * 20)])
def test_every_vector_that_a_generator_writes_is_that_of_a_plain_loop(generator, loop, modules, vectors):
    model = model_of(f"{generator}, {modules}")
    w = dict(model.hypernetwork.named_parameters())
    states, mask = torch.randn(2, 7, 24), torch.ones(2, 7)
    mask[1, 4:] = 0
    found = model.hypernetwork(states, mask)
    with torch.no_grad():
        for b in range(2):
            seen = set()
            for kind, slot, number, vector in vectors_of(found, b):
                columns = {"prefix": 4, "adapter": 5, "lora": 5}[kind.split("_")[0]] if "bias" not in kind else 1
                close(vector, loop(w, kind, slot, number, len(vector), columns, states[b], mask[b]))
                seen.add((kind, slot, number))
            assert len(seen) == vectors


def relative_bias_loop(w: dict, stack: str, length: int):
    """[h, T, S]: the table of Raffel et al. (2020), one pair of positions at a time; exact to half of the buckets."""
    table, buckets = w[f"t5.{stack}.relative_bias.weight"], 32 if stack == "decoder" else 16
    bias = torch.zeros(3, length, length)
    for query in range(length):
        for key in range(length):
            distance = query - key if stack == "encoder" else max(query - key, 0)
            assert abs(distance) < buckets // 2, "short texts need no logarithm"
            bias[:, query, key] = table[abs(distance) + (16 if distance < 0 else 0)]
    return bias


def t5_loop(w: dict, ids, said, behind):
    """Logits [T, V] of an example without padding; `behind(stack, layer, place, y)` stands behind a sublayer."""
    everything = torch.ones(len(ids))
    x, bias = w["t5.shared.weight"][ids], relative_bias_loop(w, "encoder", len(ids))
    for layer in range(2):
        name = f"t5.encoder.blocks.{layer}"
        u = norm_loop(w, f"{name}.self_attention_norm", x)
        x = x + behind(0, layer, 0, attention_loop(w, f"{name}.self_attention", u, u, everything, bias))
        x = x + behind(
            0, layer, 1, feed_forward_loop(w, f"{name}.feed_forward", norm_loop(w, f"{name}.feed_forward_norm", x))
        )
    read = norm_loop(w, "t5.encoder.final_norm", x)
    x, bias = w["t5.shared.weight"][said], relative_bias_loop(w, "decoder", len(said))
    seen = torch.ones(len(said), len(said)).tril()
    for layer in range(3):
        name = f"t5.decoder.blocks.{layer}"
        u = norm_loop(w, f"{name}.self_attention_norm", x)
        x = x + behind(1, layer, 0, attention_loop(w, f"{name}.self_attention", u, u, seen, bias))
        x = x + attention_loop(
            w, f"{name}.cross_attention", norm_loop(w, f"{name}.cross_attention_norm", x), read, everything
        )
        x = x + behind(
            1, layer, 1, feed_forward_loop(w, f"{name}.feed_forward", norm_loop(w, f"{name}.feed_forward_norm", x))
        )
    return F.linear(norm_loop(w, "t5.decoder.final_norm", x), w["t5.lm_head.weight"])


def hyperformer_loop(w: dict, shares_places: bool, task):
    """y + LN(W_up gelu(W_down y + b_down) + b_up) * scale + shift, all linear in z = LN(MLP([task; layer; place]))."""

    def behind(stack, layer, place, y):
        own = f"hypernetwork.stacks.{stack}"
        read = [task, w[f"{own}.layers"][layer]] + ([w[f"{own}.places"][place]] if shares_places else [])
        hidden = F.relu(F.linear(torch.cat(read), w[f"{own}.join.0.weight"], w[f"{own}.join.0.bias"]))
        z = F.linear(hidden, w[f"{own}.join.2.weight"], w[f"{own}.join.2.bias"])
        z = F.layer_norm(z, (64,), w[f"{own}.join.3.weight"], w[f"{own}.join.3.bias"])
        heads = f"{own}.heads.{0 if shares_places else place}"
        down, down_bias, up, up_bias, scale, shift = (
            F.linear(z, w[f"{heads}.{n}.weight"], w[f"{heads}.{n}.bias"]) for n in range(6)
        )
        hidden = F.gelu(y @ down.view(24, 5) + down_bias, approximate="tanh")
        return y + F.layer_norm(hidden @ up.view(5, 24) + up_bias, (24,)) * scale + shift

    return behind


@pytest.mark.parametrize(
    "case", ["hyperformer", "hyperformer++", "hyperformer-instruction", "hyperformer++-instruction"]
)
def test_hyperformer_in_a_whole_t5_is_that_of_a_plain_loop(case):
    """A batch of three tasks, some with padding, against one example at a time without any."""
    model = model_of(case)
    w = dict(model.named_parameters())
    instructions, inputs, said = instructions_of(model), random_ids(3, 8), random_ids(3, 6)
    inputs[2, 6:] = 0
    if "instruction" in case:
        instructions[1, 5:] = 0
    task = model.encode_instruction(instructions)
    found = logits_of(model, task, inputs, said)
    with torch.no_grad():
        for b in range(3):
            embedding = w["hyperencoder.weight"][b] if case in train.SYSTEMS and "instruction" not in case else None
            if embedding is None:
                ids = instructions[b][instructions[b] > 0]
                embedding = (
                    encoder_loop(w, ids).mean(0) @ w["hypernetwork.project.weight"].T + w["hypernetwork.project.bias"]
                )
            wanted = t5_loop(w, inputs[b][inputs[b] > 0], said[b], hyperformer_loop(w, "++" in case, embedding))
            torch.testing.assert_close(found[b], wanted, atol=1e-5, rtol=1e-4)
            plain = t5_loop(w, inputs[b][inputs[b] > 0], said[b], lambda stack, layer, place, y: y)
            assert (plain - wanted).abs().max() > 0.1, "what stands behind the sublayers must be felt"


def encoder_loop(w: dict, ids):
    """The states of a text: what the encoder of `t5_loop` gives, with nothing behind its sublayers."""
    x, bias = w["t5.shared.weight"][ids], relative_bias_loop(w, "encoder", len(ids))
    for layer in range(2):
        name = f"t5.encoder.blocks.{layer}"
        u = norm_loop(w, f"{name}.self_attention_norm", x)
        x = x + attention_loop(w, f"{name}.self_attention", u, u, torch.ones(len(ids)), bias)
        x = x + feed_forward_loop(w, f"{name}.feed_forward", norm_loop(w, f"{name}.feed_forward_norm", x))
    return norm_loop(w, "t5.encoder.final_norm", x)


@pytest.mark.parametrize("generator", ["hyperformer", "hyperformer++"])
def test_a_fresh_hyperformer_has_adapters_that_change_little(generator):
    """Behind the norm, the generated scale and shift alone decide how much: both have a std of 0.08."""
    model = HINT(tiny_t5(), HINTConfig(bottleneck=5, generator=generator, fusion=False))
    y = torch.randn(2, 50, 24)
    for layer in model.encode_instruction(random_ids(2, 7)).modules.encoder:
        for adapter in (layer.after_attention, layer.after_feed_forward):
            assert 0.05 < (adapter(y) - y).square().mean().sqrt() < 0.2


def test_lora_of_a_task_is_a_t5_whose_weights_have_been_changed():
    """x (W + down up) for queries and values of every attention; with padded inputs, in one pass and in answers."""
    model = model_of("lora")
    task, inputs, said = model.encode_instruction(random_ids(1, 7)), random_ids(3, 9), random_ids(3, 6)
    inputs[1, 4:] = 0
    changed = copy.deepcopy(model.t5)
    pairs = [(b.self_attention, m.lora) for b, m in zip(changed.encoder.blocks, task.modules.encoder)]
    for block, layer in zip(changed.decoder.blocks, task.modules.decoder):
        pairs += [(block.self_attention, layer.lora), (block.cross_attention, layer.cross_lora)]
    assert len(pairs) == 8
    for attention, lora in pairs:
        attention.q.weight.data += (lora.query_down @ lora.query_up)[0].T
        attention.v.weight.data += (lora.value_down @ lora.value_up)[0].T
    found = logits_of(model, task, inputs, said)
    torch.testing.assert_close(found, changed(inputs, said), atol=2e-5, rtol=1e-4)
    assert (found - model.t5(inputs, said)).abs().max() > 0.1
    for head in (changed.lm_head, model.t5.lm_head):
        head.weight.data[t5.EOS] = 0
    assert torch.equal(model.generate(task, inputs, max_new_tokens=12), changed.generate(inputs, max_new_tokens=12))


# ------------------------------------------------------------------------ how many parameters


def parameters(model: torch.nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def stack_hypernetwork(d: int, r: int, layers: int, shares_places: bool) -> int:
    """Embeddings of layers and places, two layers and a norm that give z, linear layers from z with biases."""
    read, sets = (3, 1) if shares_places else (2, 2)
    join = (read * 64 * 128 + 128) + (128 * 64 + 64) + 2 * 64
    heads = 65 * (2 * d * r + r + d + 2 * d)
    return layers * 64 + (2 * 64 if shares_places else 0) + join + sets * heads


def hyperformer_count(c: t5.T5Config, r: int, shares_places: bool, reader: int) -> int:
    return reader + sum(
        stack_hypernetwork(c.d_model, r, n, shares_places) for n in (c.num_layers, c.num_decoder_layers)
    )


def columns_count(c: t5.T5Config, modules: str, r: int, P: int) -> int:
    """Embeddings and networks for the columns of modules."""
    return sum(
        slots * columns * c.d_model + c.d_model * (c.d_model + width)
        for slots, columns, width in kinds_of(c, modules, r, P)
    )


def kinds_of(c: t5.T5Config, modules: str, r: int, P: int) -> list[tuple[int, int, int]]:
    """(places in the model, vectors in each, their width)"""
    d, inner, layers = c.d_model, c.num_heads * c.d_kv, c.num_layers + c.num_decoder_layers
    attentions = layers + c.num_decoder_layers
    adapters = [(layers, r, d), (layers, 1, r), (layers, r, d), (layers, 1, d)]
    prefixes = [(attentions, P, inner)] * 2
    lora = [(attentions, r, d), (attentions, r, inner)] * 2
    return {"adapters": adapters, "prefixes": prefixes, "adapters+prefixes": adapters + prefixes, "lora": lora}[modules]


def cross_attention_and_feed_forward(c: t5.T5Config) -> int:
    """HyperTune's reader: a decoder without self-attention, so with two norms a layer, and a final one."""
    d, inner = c.d_model, c.num_heads * c.d_kv
    return c.num_decoder_layers * (4 * d * inner + 3 * d * c.d_ff + 2 * d) + d


def encoder_count(c: t5.T5Config) -> int:
    d, inner = c.d_model, c.num_heads * c.d_kv
    blocks = c.num_layers * (4 * d * inner + 3 * d * c.d_ff + 2 * d)
    return c.vocab_size * d + blocks + 32 * c.num_heads + d


def norms_of(c: t5.T5Config) -> int:
    return (2 * c.num_layers + 3 * c.num_decoder_layers + 2) * c.d_model


FORMULAS = {  # of what a system adds to T5, as `--system` has it, for 8 tasks
    "tk-instruct+peft": lambda c: columns_count(c, "adapters+prefixes", 512, 30),
    "hypter": lambda c: sum(c.d_model * (c.d_model + s * n * w) for s, n, w in kinds_of(c, "adapters", 8, 0)),
    "hypertune": lambda c: columns_count(c, "prefixes", 0, 30) + cross_attention_and_feed_forward(c) + encoder_count(c),
    "hyperformer": lambda c: hyperformer_count(c, 24, False, reader=8 * 64),
    "hyperformer++": lambda c: hyperformer_count(c, 24, True, reader=8 * 64),
    "hyperformer++-instruction": lambda c: hyperformer_count(c, 24, True, reader=64 * (c.d_model + 1)),
    "hint, full decoder": lambda c: (
        columns_count(c, "adapters+prefixes", 512, 30) + cross_attention_and_feed_forward(c)
    ),
    "hint, lora": lambda c: columns_count(c, "lora", 512, 0) + 4 * c.d_model * c.num_heads * c.d_kv,
    "hint, own": lambda c: (
        columns_count(c, "adapters+prefixes", 512, 30) + 4 * c.d_model * c.num_heads * c.d_kv + encoder_count(c)
    ),
    "hint, none": lambda c: 0,
}
ABLATIONS = {
    "full decoder": {"generator": "decoder"},
    "lora": {"modules": "lora"},
    "own": {"hyperencoder": "own"},
    "none": {"generator": "none"},
}


@pytest.mark.parametrize("size", ["small", "base", "large", "xl", "xxl"])
def test_parameters_of_every_system_at_public_sizes_are_those_of_a_formula(size):
    """All of them, and those that train."""
    config = SIZES[size]
    with torch.device("meta"):
        model = T5(config)
    of_t5 = parameters(model)
    assert of_t5 == hint.t5_parameters(config)
    for name, formula in FORMULAS.items():
        system, _, ablation = name.partition(", ")
        settings = {**train.SYSTEMS[system].hypernetwork, **ABLATIONS.get(ablation, {})}
        settings["tasks"] = 8 if settings.get("hyperencoder") == "table" else 0
        with torch.device("meta"):
            whole = HINT(model, HINTConfig(**settings))
        added = formula(config)
        assert parameters(whole) == of_t5 + added, name
        frozen = {"all": 0, "hypernetwork": of_t5, "hypernetwork+norms": of_t5 - norms_of(config)}[whole.config.trains]
        assert parameters(whole, trained=True) == of_t5 + added - frozen, name


@pytest.mark.parametrize("generator, count", [("hyperformer++", 5_163_440), ("hyperformer", 10_241_760)])
def test_a_hyperformer_trains_as_many_parameters_as_that_of_its_authors(generator, count):
    """T5-base of 2020, bottleneck 24, 8 tasks; of Hyperformer++ a task costs the 0.29 % of T5 that the paper names."""
    config = replace(
        SIZES["base"], d_ff=3072, feed_forward_proj="relu", tie_word_embeddings=True, scale_decoder_outputs=True
    )
    system = train.SYSTEMS[generator].hypernetwork
    with torch.device("meta"):
        model = HINT(T5(config), HINTConfig(tasks=8, **{**system, "trains": "hypernetwork"}))
        with_norms = HINT(T5(config), HINTConfig(tasks=8, **system))
    assert parameters(model.t5) == 222_903_552
    assert parameters(model, trained=True) == hyperformer_count(config, 24, "++" in generator, 8 * 64) == count
    assert parameters(with_norms, trained=True) == count + 62 * 768
    if "++" in generator:
        assert round(100 * count / 8 / 222_903_552, 2) == 0.29


# ------------------------------------------------------------------------ embeddings for tasks that were not trained


WORDS = "the cat sat on a mat and dog barked at it please give me book that lies table".split()


def task_called(name: str, number: int, examples: int = 4) -> Task:
    """A task that answers any two words with a word of its own."""
    pairs = [(f"{WORDS[n]} {WORDS[n + 3]}", WORDS[10 + number]) for n in range(6)]
    shown = tuple(Example(*pair) for pair in pairs[:examples])
    return Task(name, "", shown, (Instance(f"{name}-0", *pairs[4]), Instance(f"{name}-1", *pairs[5])))


KNOWN, NEW = [task_called(f"known-{n}", n) for n in range(3)], [task_called(f"new-{n}", 3 + n) for n in range(2)]


def fitting(tokenizer, examples: int = 3) -> tuple[HINT, TaskNumberFormat]:
    """A Hyperformer of three tasks, and its format."""
    model = model_of("hyperformer++", {"vocab_size": 300})
    return model, TaskNumberFormat(tokenizer, examples, tasks=[task.name for task in KNOWN])


def fit(model: HINT, prompts: TaskNumberFormat, tasks: list[Task]) -> torch.Tensor:
    train.fit_new_tasks(model, tasks, prompts, torch.device("cpu"), train.nullcontext)
    return model.hyperencoder.fitted


def loss_on_shots(model: HINT, prompts: TaskNumberFormat, task: Task, row: torch.Tensor) -> float:
    """Of the examples that a task shows, with an embedding of it, one example at a time."""
    model.hyperencoder.fitted, prompts.fitted = row[None], {task.name: 3}
    with torch.no_grad():
        return sum(model(*collate([shot])).cross_entropy.item() for shot in prompts.shots([task]))


def test_fitting_a_new_task_lowers_the_loss_on_its_examples_and_changes_no_weight(tokenizer):
    """Each task's own row fits it better than the mean that it began with, and than the row of the other task."""
    model, prompts = fitting(tokenizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = fit(model, prompts, [KNOWN[1], *NEW])
    assert prompts.fitted == {"new-0": 3, "new-1": 4} and rows.shape == (2, 64) and not rows.requires_grad
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None, name
    mean = model.hyperencoder.weight.mean(0)
    for task, own, other in zip(NEW, rows, rows.flip(0)):
        losses = [loss_on_shots(model, prompts, task, row) for row in (own, mean, other)]
        assert losses[0] < 0.9 * losses[1] and losses[0] < 0.9 * losses[2]


def test_only_as_many_examples_as_are_shown_are_fitted_to(tokenizer, few_steps):
    model, prompts = fitting(tokenizer, examples=2)
    rows = fit(model, prompts, NEW)
    assert len(prompts.shots(NEW)) == 4
    assert torch.equal(fit(model, prompts, [replace(task, examples=task.examples[:2]) for task in NEW]), rows)
    assert not torch.equal(fit(model, prompts, [replace(task, examples=task.examples[1:]) for task in NEW]), rows)


def test_the_fit_is_that_of_all_examples_however_they_are_cut_and_whatever_else_is_fitted(
    tokenizer, few_steps, monkeypatch
):
    model, prompts = fitting(tokenizer)
    rows = fit(model, prompts, NEW)
    shots = prompts.shots(NEW)
    assert [len(microbatches(shots, tokens)) for tokens in (train.FIT_TOKENS, 1)] == [1, 6]
    monkeypatch.setattr(train, "FIT_TOKENS", 1)
    torch.testing.assert_close(fit(model, prompts, NEW), rows, atol=1e-2, rtol=0)
    torch.testing.assert_close(fit(model, prompts, NEW[1:]), rows[1:], atol=1e-2, rtol=0)
    assert (rows[0] - rows[1]).abs().max() > 0.1 and (rows - model.hyperencoder.weight.mean(0)).abs().max() > 0.2


def test_known_tasks_keep_their_answers_and_new_ones_have_those_of_their_rows(tokenizer, few_steps):
    """In whatever order they come; in a second evaluation too, in which other tasks are new."""
    model, prompts = fitting(tokenizer)
    answerer = train.Answerer(model, prompts, 6, batch_size=2, precision="fp32")

    def answers(tasks):
        return {row["id"]: row["prediction"] for row in answerer.predictions(tasks)}

    alone, together = answers(KNOWN), answers([NEW[0], KNOWN[0], NEW[1], KNOWN[1], KNOWN[2]])
    assert {name: together[name] for name in alone} == alone
    assert together == answers([*KNOWN, *NEW]) and answers(NEW[1:]).items() <= together.items()
    assert len(set(together.values())) > 3, "tasks must differ"
    row, ids = model.hyperencoder.fitted[0], tokenizer.encode(NEW[1].instances[0].input).ids
    model.hyperencoder.weight.data[2], model.hyperencoder.fitted = row, None
    said = model.generate(model.encode_instruction(torch.tensor([[2]])), torch.tensor([ids]), max_new_tokens=6)
    assert tokenizer.decode(said[0].tolist()) == together["new-1-0"]


def test_an_evaluation_packs_linear_layers_with_their_biases(tokenizer, monkeypatch):
    """A Hyperformer has some; T5 has none."""
    model, prompts = fitting(tokenizer)
    packed = []

    def encode(answerer, task):
        assert not torch.backends.mkldnn.is_available() or any(isinstance(m, t5.PackedLinear) for m in model.modules())
        packed.append(answerer.model.encode_instruction(torch.tensor([[0]])))
        return [{}]

    monkeypatch.setattr(train.Answerer, "_rows", encode)
    train.Answerer(model, prompts, 6, batch_size=2, precision="fp32").predictions(KNOWN[:1])
    plain = model.encode_instruction(torch.tensor([[0]]))
    for one, other in zip(tensors_of(packed[0].modules), tensors_of(plain.modules), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("examples, shown", [(0, 4), (3, 0)])
def test_a_new_task_without_an_example_is_refused(tokenizer, examples, shown):
    model, prompts = fitting(tokenizer, examples)
    bare = replace(NEW[1], examples=NEW[1].examples[:shown])
    with pytest.raises(train.RunError, match="^new-1: was not trained on, and has no example .*--examples$"):
        fit(model, prompts, [KNOWN[0], *([NEW[0]] if examples else []), bare])
    assert fit(model, prompts, KNOWN) is None and prompts.fitted == {}


def test_a_model_saved_after_an_evaluation_has_no_fitted_rows(tokenizer, few_steps, tmp_path):
    model, prompts = fitting(tokenizer)
    before = [name for name, _ in model.named_parameters()]
    train.Answerer(model, prompts, 2, batch_size=2, precision="fp32").predictions(NEW)
    model.save_pretrained(tmp_path)
    found = HINT.from_pretrained(tmp_path)
    assert [name for name, _ in found.named_parameters()] == before and found.hyperencoder.fitted is None
    assert torch.equal(found.hyperencoder.weight, model.hyperencoder.weight) and len(found.hyperencoder.weight) == 3
    assert not any("fitted" in name for name in model.state_dict())


# ------------------------------------------------------------------------ the command line


def settings_of(folder) -> HINTConfig:
    return hint.load_model(folder).config


@pytest.mark.parametrize("system", train.SYSTEMS)
def test_every_system_trains_goes_on_and_answers_from_its_folder(system, tmp_path, sni, start, monkeypatch, few_steps):
    """Stopped in step 3 and gone on with, it has the weights of a run that never stopped; frozen ones never change."""
    options = f"--steps 3 --save-every 2 --examples 1 --dropout 0.1 --max-instances 2 --system {system}".split()
    finetune(sni, start, tmp_path / "whole", *options)
    real, calls = train.accumulate_gradient, []

    def stop_in_step_3(*arguments):
        calls.append(1)
        return real(*arguments) if len(calls) < 3 else 1 / 0

    with monkeypatch.context() as patch:
        patch.setattr(train, "accumulate_gradient", stop_in_step_3)
        with pytest.raises(ZeroDivisionError):
            finetune(sni, start, tmp_path / "halves", *options)
    finetune(sni, start, tmp_path / "halves", *options, "--resume")
    one, other = (dict(hint.load_model(tmp_path / name).named_parameters()) for name in ("whole", "halves"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    losses = [[entry["loss"] for entry in log_of(tmp_path / name) if "loss" in entry] for name in ("whole", "halves")]
    assert losses[0] == losses[1]

    run("evaluate", "--model", tmp_path / "whole", "--data", sni, "--out", tmp_path / "again", "--max-instances", 2)
    said = [(tmp_path / name / "predictions.jsonl").read_text() for name in ("whole", "halves", "again")]
    assert said[0] == said[1] == said[2] and len(said[0].splitlines()) == 4
    assert json.loads((tmp_path / "again" / "config.json").read_text())["run"]["system"] == system

    preset, trains = train.SYSTEMS[system].hypernetwork, "all"
    if preset is not None:
        tasks = 3 if preset.get("hyperencoder") == "table" else 0
        wanted = HINTConfig(**{**preset, "bottleneck": 3, "prefix_length": 2, "tasks": tasks})
        assert hint.load_model(tmp_path / "whole").config == wanted
        trains = wanted.trains
    public = T5.from_pretrained(start)
    changed = {name for name, p in public.named_parameters() if not torch.equal(p, one["t5." + name])}
    norms = {name for name, _ in public.named_parameters() if "norm" in name}
    everything = {name for name, _ in public.named_parameters()}
    assert changed == {"all": everything, "hypernetwork": set(), "hypernetwork+norms": norms}[trains]


@pytest.mark.parametrize(
    "words, field, value",
    [
        (("--generator", "pooled"), "generator", "pooled"),
        (("--modules", "lora"), "modules", "lora"),
        (("--no-fusion",), "fusion", False),
        (("--hyperencoder", "own"), "hyperencoder", "own"),
        (("--trains", "hypernetwork"), "trains", "hypernetwork"),
        (("--system", "hypertune", "--fusion"), "fusion", True),
        (("--system", "hyperformer++", "--trains", "all", "--examples", 1), "trains", "all"),
    ],
)
def test_each_option_of_a_hypernetwork_acts_and_is_kept(tmp_path, sni, start, words, field, value):
    """Over that of the system. The model is another one: other parameters, or others that train, or another loss."""
    system = words[: 2 * (words[0] == "--system")] + words[4:]
    for name, more in (("plain", system), ("changed", words)):
        finetune(
            sni,
            start,
            tmp_path / name,
            "--steps",
            2,
            "--dropout",
            0,
            "--generator-dropout",
            0,
            "--max-instances",
            1,
            *more,
        )
    plain, changed = (hint.load_model(tmp_path / name) for name in ("plain", "changed"))
    assert changed.config == replace(plain.config, **{field: value}) != plain.config

    def what_it_is(model):
        return [(name, p.shape, p.requires_grad) for name, p in model.named_parameters()]

    losses = [[entry["loss"] for entry in log_of(tmp_path / name)] for name in ("plain", "changed")]
    assert what_it_is(plain) != what_it_is(changed) or field == "fusion"
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("--hyperencoder table", "a table of tasks is for the generators"),
        ("--generator hyperformer --hyperencoder table --no-fusion", "a table of tasks is for the generators"),
        ("--system hyperformer++ --generator columns", "a table of tasks is for the generators"),
        ("--system hyperformer --fusion", "no states of an instruction to fuse"),
        ("--system hyperformer --hyperencoder tied", "numbers of tasks are for the hyperencoder table"),
        ("--system hyperformer++ --hyperencoder own", "numbers of tasks are for the hyperencoder table"),
        ("--system hyperformer++ --modules lora", "hyperformer.. leaves no choice of modules"),
        ("--generator none --modules adapters", "none leaves no choice of modules"),
        ("--generator none --no-fusion", "nothing reads the instruction"),
        ("--generator direct --no-fusion --hyperencoder own", "nothing reads the instruction"),
        ("--generator none --trains hypernetwork", "nothing to train"),
        ("--system tk-instruct --generator pooled", "tk-instruct: has no hypernetwork whose generator could be chosen"),
        ("--system no-instruct --trains hypernetwork", "has no hypernetwork whose trains could be chosen"),
        ("--system tk-instruct --no-fusion", "has no hypernetwork whose fusion could be chosen"),
        ("--system hyperformer --examples 0", "test_1: was not trained on, and has no example"),
    ],
)
def test_options_that_make_no_sense_together_are_refused_before_anything_is_written(
    tmp_path, sni, start, words, sentence
):
    examples = [] if "--examples" in words else ["--examples", 1]
    with pytest.raises(SystemExit, match=f"^train.py: .*{sentence}") as caught:
        finetune(sni, start, tmp_path / "run", "--steps", 1, *examples, *words.split())
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_what_is_not_refused_has_a_use_for_each_parameter_that_trains():
    """All combinations of choices, but that two stand for all kinds of modules. A parameter without a gradient has no
    state in Adafactor, and its run could not go on.
    """
    allowed = 0
    given = random_ids(2, 5), random_ids(2, 4), random_ids(2, 3)
    for values in itertools.product(*{**CHOICES, "modules": ("adapters+prefixes", "lora")}.values()):
        choices = dict(zip(CHOICES, values))
        table = choices["hyperencoder"] == "table"
        try:
            config = HINTConfig(bottleneck=2, prefix_length=2, tasks=2 * table, **choices)
        except CheckpointError:
            continue
        allowed += 1
        model = HINT(T5(tiny_config(num_layers=1, num_decoder_layers=1, d_model=8, d_ff=8, num_heads=1)), config)
        model(torch.tensor([[0], [1]]) if table else given[0], *given[1:]).loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert grads and all(grad is not None for grad in grads.values()), choices
    assert allowed > 100


@pytest.mark.parametrize(
    "first, second, what",
    [
        ("--system hypter", "", "generator of pooled"),
        ("", "--system hypter", "generator of columns"),
        ("--no-fusion", "", "fusion of False"),
        ("--modules lora", "--modules adapters", "modules of lora"),
        ("--system hypertune", "--system hypertune --hyperencoder tied", "hyperencoder of own"),
        ("--trains hypernetwork", "", "trains of hypernetwork"),
        ("--system hyperformer --examples 1", "--system hyperformer++ --examples 1", "generator of hyperformer"),
    ],
)
def test_a_start_with_another_hypernetwork_is_refused_and_its_own_goes_on(first, second, what):
    """Without options of sizes, those of the start stay, also where the system has a size of its own."""

    def on(model, words):
        words = ["finetune", "--data", "x", "--start", "one", "--out", "x", *words.split()]
        return train.with_hypernetwork(model, parsed(*words), ["a"] if "hyperformer" in words else [], "one")

    model = on(PlainT5(tiny_t5()), f"{first} --bottleneck 3 --prefix-length 2")
    with pytest.raises(train.RunError, match=f"^one: has a hypernetwork already, whose {what} cannot be changed$"):
        on(model, second)
    if model.config.tasks == 0:
        assert on(model, first) is model and (model.config.bottleneck, model.config.prefix_length) == (3, 2)


def test_a_start_with_embeddings_of_other_tasks_is_refused(tmp_path, sni, start):
    """As many, but under other names: row 0 would be another task's."""
    system = ("--system", "hyperformer++", "--examples", 1)
    finetune(sni, start, tmp_path / "one", "--steps", 1, *system)
    split = sni / "splits" / "default" / "train_tasks.txt"
    split.write_text("\n".join(reversed(split.read_text().split())))
    with pytest.raises(SystemExit, match="one: has embeddings of other tasks"):
        finetune(sni, tmp_path / "one", tmp_path / "two", "--steps", 2, *system)
    with pytest.raises(SystemExit, match="one: has embeddings of other tasks"):
        finetune(sni, start, tmp_path / "one", "--steps", 2, *system, "--resume")
    assert not (tmp_path / "two").exists()


def test_a_model_that_knows_tasks_by_number_takes_no_instruction(tmp_path, sni, start, few_steps):
    finetune(sni, start, tmp_path / "run", "--steps", 1, "--system", "hyperformer++", "--examples", 1)
    with pytest.raises(SystemExit, match="run: knows tasks by their numbers and reads no instruction") as caught:
        run("predict", "--model", tmp_path / "run", "--instruction", "Say it.", "in 0")
    assert "\n" not in str(caught.value)
    with pytest.raises(SystemExit, match="test_1: was not trained on, and has no example"):
        run("evaluate", "--model", tmp_path / "run", "--data", sni, "--out", tmp_path / "again", "--examples", 0)
    run(
        "evaluate",
        "--model",
        tmp_path / "run",
        "--data",
        sni,
        "--out",
        tmp_path / "known",
        "--examples",
        0,
        "--split",
        "train",
    )
    assert len((tmp_path / "known" / "predictions.jsonl").read_text().splitlines()) == 15
    path = tmp_path / "run" / "config.json"
    found = json.loads(path.read_text())
    for change in ({"tasks": ["train_1"]}, {"tasks": []}, {"system": "hint"}):
        path.write_text(json.dumps({**found, "run": {**found["run"], **change}}))
        with pytest.raises(SystemExit, match="does not name the tasks that its embeddings are of"):
            run("evaluate", "--model", tmp_path / "run", "--data", sni, "--out", tmp_path / "no")


def test_hypertune_is_pretrained_on_text_and_then_finetuned(tmp_path, sni, start):
    words = ("--system", "hypertune", "--prefix-length", 2, "--steps", 2, *FAST)
    run(
        "pretrain",
        "--start",
        start,
        "--corpus",
        *write_shards(tmp_path, 300),
        "--out",
        tmp_path / "text",
        "--objective",
        "caclm",
        *words,
    )
    before, after = T5.from_pretrained(start), hint.load_model(tmp_path / "text")
    assert all(torch.equal(p, q) for p, q in zip(before.parameters(), after.t5.parameters(), strict=True))
    assert not torch.equal(after.hyperencoder.shared.weight, before.shared.weight)
    run("finetune", "--data", sni, "--start", tmp_path / "text", "--out", tmp_path / "fine", *words)
    assert settings_of(tmp_path / "fine") == after.config
    assert not torch.equal(weights_of(tmp_path / "fine")[-1], weights_of(tmp_path / "text")[-1])
