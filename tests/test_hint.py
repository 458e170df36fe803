"""HINT as a whole: against its equations; one instruction or many, once or each time, padded or not, kept or new."""

import json
import os
import pickle
from functools import partial

import pytest
import reference
import torch
from conftest import random_ids, tiny_config, tiny_hint, tiny_t5
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, pad

from hint import HINT, HINTConfig, PlainT5, load_model, named_tensors, on_meta
from t5 import EOS, NO_LABEL, PAD, START, T5, InputError, map_tensors, read_metadata


padded = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)


def never_ending(model: HINT) -> HINT:
    """Without `</s>` the answers are long enough to differ."""
    model.t5.lm_head.weight.data[EOS] = 0
    return model


# ------------------------------------------------------------------------ against HINT written a second time

LENGTHS = [(150, 12, 6), (150, 9, 4), (131, 12, 5), (150, 3, 2), (20, 7, 1)]  # instruction, input, answer


def mixed_batch() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Five examples of three tasks; two instructions are longer than the 128 tokens of the last relative bucket."""
    instructions = {length: random_ids(length) for length in (150, 131, 20)}
    return [(instructions[i], random_ids(s), random_ids(t)) for i, s, t in LENGTHS]


def model_and_weights() -> tuple[HINT, dict[str, torch.Tensor]]:
    """A model of which no norm is the identity, and its weights in doubles."""
    model = tiny_hint()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter.data, 0.5, 1.5)
    # `</s>` takes the place of token 14, which comes at another step in every answer.
    model.t5.lm_head.weight.data[EOS] = 1.001 * model.t5.lm_head.weight[14]
    return model, {name: weight.double().requires_grad_() for name, weight in model.state_dict().items()}


def test_the_loss_and_every_gradient_of_a_mixed_batch_are_those_of_the_equations(monkeypatch):
    """All in doubles, the loss too: the two agree to ten digits or not at all. All three parts are padded."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    (model, w), batch = model_and_weights(), mixed_batch()
    losses = torch.cat([reference.losses(w, *(part.tolist() for part in example)) for example in batch])
    losses.mean().backward()
    instructions, inputs, labels = zip(*batch)
    found = model.double()(padded(instructions), padded(inputs), padded(labels, padding_value=NO_LABEL))
    found.loss.backward()
    assert found.tokens == len(losses) == sum(t for _, _, t in LENGTHS)
    torch.testing.assert_close(found.loss, losses.mean(), atol=0, rtol=1e-12)
    for name, parameter in model.named_parameters():
        wanted = w[name].grad
        assert wanted.norm() > 1e-6, f"{name}: gradients of zero would agree by themselves"
        assert (parameter.grad - wanted).norm() <= 1e-10 * wanted.norm(), name


@pytest.mark.parametrize("precision", [torch.float64, torch.float32])
def test_greedy_answers_of_a_mixed_batch_are_those_of_the_equations(precision):
    (model, w), batch = model_and_weights(), mixed_batch()
    wanted = [reference.greedy_answer(w, *(part.tolist() for part in example[:2]), 25) for example in batch]
    assert len({len(answer) for answer in wanted}) > 2, "rows end at different steps, so some go on without the others"
    instructions, inputs, _ = zip(*batch)
    model = model.to(precision)
    found = model.generate(model.encode_instruction(padded(instructions)), padded(inputs), max_new_tokens=25)
    assert found.tolist() == [answer + [PAD] * (found.shape[1] - len(answer)) for answer in wanted]
    model.to(torch.float32)(found, found, found).loss.backward()  # ordinary tensors, which may be trained on


# ------------------------------------------------------------------------ instruction, input, answer


def test_encoding_once_equals_encoding_each_time():
    """One task for five inputs, against its instruction repeated for each of them."""
    model, (instruction, other), inputs = never_ending(tiny_hint()), random_ids(2, 1, 7), random_ids(5, 9)
    tasks = (model.encode_instruction(ids) for ids in (instruction, instruction.repeat(5, 1), other))
    once, each, different = (model.generate(task, inputs, max_new_tokens=12) for task in tasks)
    assert torch.equal(once, each) and len(once.unique(dim=0)) == 5 and not torch.equal(once, different)


@pytest.mark.parametrize("tasks, instructions_read", [([0] * 6, 1), ([1, 0, 1, 1, 0, 0], 2), ([*range(6)], 6)])
def test_each_distinct_instruction_of_a_batch_is_encoded_once(tasks, instructions_read):
    """The gradient is the same all the same: see the equations above, where three examples share a task.

    Nor is an adapter kept for each example: what the backward pass keeps of W_down has a row for each task.
    """
    model, counts, kept = tiny_hint(), [], []
    shape = (model.t5.config.d_model, model.config.bottleneck)  # of no other tensor here
    model.t5.encoder.register_forward_hook(lambda _, given, __: counts.append(len(given[0])))
    model.hypernetwork.register_forward_hook(lambda _, given, __: counts.append(len(given[0])))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        model(random_ids(6, 7)[tasks], random_ids(6, 9), random_ids(6, 6))
    assert counts == [instructions_read, instructions_read, 6], "hyperencoder, hypernetwork, encoder of the inputs"
    layers = model.t5.config.num_layers + model.t5.config.num_decoder_layers
    assert sum(rows[0] for rows in kept if rows[1:] == shape) == layers * instructions_read


def test_padding_of_instruction_input_and_target_changes_nothing_and_a_mask_hides_like_padding():
    model = never_ending(tiny_hint())
    instructions, inputs, labels = random_ids(2, 7), random_ids(2, 9), random_ids(2, 6)
    wanted = model(instructions, inputs, labels).loss
    torch.testing.assert_close(model(pad(instructions, (0, 3)), inputs, labels).loss, wanted)
    torch.testing.assert_close(model(instructions, pad(inputs, (0, 3)), labels).loss, wanted)
    torch.testing.assert_close(model(instructions, inputs, pad(labels, (0, 3), value=NO_LABEL)).loss, wanted)
    plain, mask = model.encode_instruction(instructions), torch.tensor([[1] * 9 + [0] * 3] * 2)
    unmasked, junk = (torch.cat([ids, random_ids(2, 3)], dim=1) for ids in (instructions, inputs))
    answers = model.generate(plain, inputs, None, 12)
    for task in (model.encode_instruction(pad(instructions, (0, 3))), model.encode_instruction(unmasked, mask[:, 2:])):
        for (name, one), (_, other) in zip(named_tensors(task.modules), named_tensors(plain.modules), strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5, msg=name)
        assert torch.equal(model.generate(task, pad(inputs, (0, 3)), None, 12), answers)
        assert torch.equal(model.generate(task, junk, mask, 12), answers)
    assert not torch.equal(model.generate(plain, junk, None, 12), answers)
    assert not torch.equal(model.generate(model.encode_instruction(unmasked), inputs, None, 12), answers)


@pytest.mark.parametrize("kind", [HINT, PlainT5])
def test_an_answer_is_ranked_by_the_log_probability_of_all_its_tokens(kind):
    """Against a plain loop over examples without padding, and over tokens, each by the softmax over the vocabulary."""
    model = tiny_hint() if kind is HINT else PlainT5(tiny_t5())
    task, inputs, labels = model.encode_instruction(random_ids(1, 7)), random_ids(4, 9), random_ids(4, 6)
    labels[:, -1] = labels[1, 2] = EOS
    labels[1, 3:], inputs[2, 4:] = NO_LABEL, PAD
    wanted, owners = [], torch.tensor([2, 0, 3, 2])  # an input has two answers, another none
    for row, answer in zip(inputs[owners], labels):
        sources, said, total = model.fuse(task, row[row > 0][None]), [START], 0.0
        for token in answer[answer >= 0].tolist():
            states = model.t5.decode(torch.tensor([said]), sources, task.modules)
            total += model.t5.logits(states)[0, -1].log_softmax(-1)[token].item()
            said.append(token)
        wanted.append(total)
    for longer in (0, 3):  # more padding changes nothing
        found = model.rank(task, pad(inputs, (0, longer)), pad(labels, (0, longer), value=NO_LABEL), owners)
        torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-4, rtol=1e-5)
    assert not found.requires_grad


def test_plain_t5_reads_the_input_alone():
    model = PlainT5(tiny_t5())
    inputs, labels = random_ids(3, 9), random_ids(3, 6)
    found = model(random_ids(3, 7), inputs, labels)
    assert torch.equal(found.loss, model(random_ids(3, 5), inputs, labels).loss)
    logits = model.t5(inputs, pad(labels[:, :-1], (1, 0), value=START))
    torch.testing.assert_close(found.cross_entropy, cross_entropy(logits.flatten(0, 1), labels.flatten()))
    task = model.encode_instruction(random_ids(1, 7))
    for mask in (None, torch.tensor([[1] * 5 + [0] * 4] * 3)):
        assert torch.equal(model.generate(task, inputs, mask, 9), model.t5.generate(inputs, mask, 9))
    assert task.modules is None and task.states.numel() == 0


@pytest.mark.parametrize("distinct", [1, 3])
@pytest.mark.parametrize("config", [HINTConfig(bottleneck=5, prefix_length=4), None])
def test_a_training_pass_takes_ids_on_the_cpu_and_waits_for_no_value_of_the_device(config, distinct):
    """The meta device has no values: anything that asked for one, as `.item()` and `nonzero` do, would raise."""
    model = on_meta(tiny_config(dropout_rate=0.1), config).train()
    instructions, labels = random_ids(3, 7)[torch.arange(3) % distinct], random_ids(3, 6)
    labels[1, 3:] = NO_LABEL
    found = model(instructions, random_ids(3, 9), labels)
    found.loss.backward()
    assert found.loss.device.type == "meta" and found.tokens == 15
    assert all(parameter.grad.device.type == "meta" for parameter in model.parameters())


# ------------------------------------------------------------------------ models and tasks that are kept


def refused(read, path) -> None:
    """The complaint is one line that names the file or folder."""
    with pytest.raises(InputError) as caught:
        read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_the_names_of_weights_in_saved_models_stay_as_they_are():
    names = {name for name, _ in tiny_hint().named_parameters()}
    kinds = ("adapter_down", "adapter_down_bias", "adapter_up", "adapter_up_bias", "prefix_key", "prefix_value")
    assert {name for name in names if name.startswith("hypernetwork.")} == {
        *(f"hypernetwork.embeddings.{kind}" for kind in kinds),
        *(f"hypernetwork.attention.{part}.weight" for part in "qkvo"),
        *(f"hypernetwork.networks.{kind}.{number}.weight" for kind in kinds for number in (0, 3)),
    }
    block = ("self_attention_norm", "self_attention.q", "cross_attention_norm", "cross_attention.o", "feed_forward.wo")
    rest = ("shared", "lm_head", "encoder.relative_bias", "decoder.final_norm")
    assert names > {f"t5.{name}.weight" for name in (*rest, *(f"decoder.blocks.2.{part}" for part in block))}


@pytest.mark.parametrize("old", [False, True])  # v1.1 and v1.0
def test_a_saved_model_is_read_as_it_was(tmp_path, old):
    model = tiny_hint(tie_word_embeddings=old, feed_forward_proj="relu" if old else "gated-gelu")
    model.save_pretrained(tmp_path, notes={"of the loop": 3}, step=7)
    for found in (HINT.from_pretrained(tmp_path), load_model(tmp_path)):
        assert type(found) is HINT and not found.training
        assert found.config == model.config and found.t5.config == model.t5.config
        for (name, one), (other_name, other) in zip(model.named_parameters(), found.named_parameters(), strict=True):
            assert name == other_name and torch.equal(one, other)
    assert json.loads((tmp_path / "config.json").read_text())["of the loop"] == 3
    assert read_metadata(tmp_path / "model.safetensors")["step"] == "7" and len(list(tmp_path.iterdir())) == 2


def test_a_public_t5_gets_a_new_hypernetwork(tmp_path):
    tiny_t5(d_kv=40).save_pretrained(tmp_path)  # as in T5-3B, heads need not divide the model: 3 * 40 is not 24
    model = HINT.from_t5(tmp_path, HINTConfig(bottleneck=3, prefix_length=2))
    assert torch.equal(model.t5.shared.weight, T5.from_pretrained(tmp_path).shared.weight) and not model.training
    assert model.encode_instruction(random_ids(1, 4)).modules.decoder[0].prefix.key.shape == (1, 3, 2, 40)
    assert HINT.from_t5(tmp_path).config == HINTConfig(bottleneck=512, prefix_length=30)
    plain = load_model(tmp_path)
    plain.save_pretrained(tmp_path / "again", {"note": 1})
    assert type(plain) is type(load_model(tmp_path / "again")) is PlainT5 and not plain.training


def test_a_folder_of_another_kind_is_refused_by_its_name(tmp_path):
    for config in ('{"model_type": "t5"}', '{"model_type": "hint"}', '{"run": {}}', "[1]", "{"):
        (tmp_path / "config.json").write_text(config)
        refused(HINT.from_pretrained, tmp_path)
        refused(load_model, tmp_path)


@pytest.mark.parametrize("kind, in_bf16", [(HINT, False), (HINT, True), (PlainT5, False)])
def test_a_kept_task_answers_without_its_instruction_in_fp32(tmp_path, kind, in_bf16):
    model = never_ending(tiny_hint()) if kind is HINT else PlainT5(tiny_t5())
    with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
        task = model.encode_instruction(random_ids(1, 7))
    model.save_task(task, tmp_path / "task")
    model.save_pretrained(tmp_path)
    found, inputs = load_model(tmp_path).load_task(tmp_path / "task"), random_ids(3, 9)
    saved = dict(named_tensors(found))
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32, torch.int64}
    assert not any(tensor.requires_grad for tensor in saved.values())
    for name, tensor in named_tensors(task):
        assert torch.equal(tensor.float(), saved.pop(name).float())
    wanted = model.generate(map_tensors(lambda x: x.float() if x.is_floating_point() else x, task), inputs, None, 9)
    assert torch.equal(model.generate(found, inputs, max_new_tokens=9), wanted) and not saved


def test_a_file_that_is_no_task_of_this_model_is_refused_and_not_executed(tmp_path):
    """Junk, a pickle that wants to run code, a tensor too few, too many or of another shape, one changed weight."""
    model, path, proof = tiny_hint(), tmp_path / "task", tmp_path / "it-ran"

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(proof),)

    refused(model.load_task, path)
    model.save_task(model.encode_instruction(random_ids(1, 7)), path)
    good = {name: tensor.clone() for name, tensor in load_file(path).items()}  # not mapped: the file is replaced
    metadata, name = {"model": model.fingerprint()}, "modules.decoder.2.cross_prefix.0.value"
    for content in (
        b"", b"junk", pickle.dumps(Attack(), protocol=2), {"a": torch.ones(2)}, {**good, "more": torch.ones(2)},
        {other: good[other] for other in good if other != name}, {**good, name: good[name].repeat(2, 1, 1, 1)},
        {**good, name: good[name][0]}, {**good, "states": good[name] + 1},
    ):  # fmt: skip
        path.write_bytes(content) if isinstance(content, bytes) else save_file(content, path, metadata)
        refused(model.load_task, path)
    assert not proof.exists()
    save_file(good, path, metadata)
    model.load_task(path)
    model.hypernetwork.networks["prefix_key"][3].weight.data[0, 0] += 1e-3
    refused(model.load_task, path)
