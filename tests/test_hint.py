"""HINT as a whole: one instruction or many, once or each time, padded or not, kept or new."""

import os
import pickle

import pytest
import torch
from conftest import random_ids, tiny_config, tiny_hint, tiny_t5

import t5
from hint import HINT, EncodedTask, HINTConfig, PlainT5, load_model
from t5 import T5, CheckpointError


def tensors_of(tree) -> list[torch.Tensor]:
    found = []
    t5.map_tensors(lambda tensor: found.append(tensor), tree)
    return found


def with_padding(ids: torch.Tensor, count: int, value: int = 0) -> torch.Tensor:
    return torch.nn.functional.pad(ids, (0, count), value=value)


def never_ending(model: HINT) -> HINT:
    """Without `</s>` the answers are long enough to differ."""
    model.t5.lm_head.weight.data[t5.EOS] = 0
    return model


def test_a_mixed_batch_gives_each_example_what_it_gets_alone():
    model = never_ending(tiny_hint())
    instructions, inputs, labels = random_ids(4, 7), random_ids(4, 9), random_ids(4, 6)
    instructions[3] = instructions[1]
    instructions[0, 5:], inputs[2, 4:], labels[1, 2:] = 0, 0, -100
    together = model(instructions, inputs, labels)
    alone = [model(*(part[b : b + 1] for part in (instructions, inputs, labels))) for b in range(4)]
    torch.testing.assert_close(together.cross_entropy, sum(loss.cross_entropy for loss in alone))
    assert together.tokens == 4 * 6 - 4
    answers = model.generate(model.encode_instruction(instructions), inputs, max_new_tokens=12)
    for b in range(4):
        task = model.encode_instruction(instructions[b : b + 1])
        assert torch.equal(model.generate(task, inputs[b : b + 1], max_new_tokens=12)[0], answers[b])
    assert len({tuple(answer) for answer in answers.tolist()}) == 4, "equal answers would agree by themselves"


def test_encoding_once_equals_encoding_each_time():
    """One task for five inputs, against its instruction repeated for each of them."""
    model = never_ending(tiny_hint())
    instruction, inputs = random_ids(1, 7), random_ids(5, 9)
    once = model.generate(model.encode_instruction(instruction), inputs, max_new_tokens=12)
    each = model.generate(model.encode_instruction(instruction.repeat(5, 1)), inputs, max_new_tokens=12)
    assert torch.equal(once, each)
    other = model.generate(model.encode_instruction(random_ids(1, 7)), inputs, max_new_tokens=12)
    assert not torch.equal(once, other), "the instruction must matter"


def test_generation_says_what_the_training_pass_would_say_next():
    """Every token of an answer, decided again by one pass with the modules in both stacks."""
    model = never_ending(tiny_hint())
    task, inputs = model.encode_instruction(random_ids(3, 7)), random_ids(3, 9)
    answers = model.generate(task, inputs, max_new_tokens=12)
    states = model.t5.decode(t5.shift_right(answers), model._fuse(task, inputs), task.modules)
    assert torch.equal(model.t5.logits(states).argmax(-1), answers)


def test_answers_are_ordinary_tensors():
    """They may be trained on, or changed in place."""
    model = tiny_hint()
    answers = model.generate(model.encode_instruction(random_ids(2, 7)), random_ids(2, 9), max_new_tokens=5)
    answers[:, -1] = 1
    model(random_ids(2, 7), answers, answers).loss.backward()


def test_each_distinct_instruction_of_a_batch_is_encoded_once_with_the_same_gradient():
    model = tiny_hint()
    instructions, inputs, labels = random_ids(2, 7).repeat_interleave(3, 0), random_ids(6, 9), random_ids(6, 6)
    seen = []
    hook = model.hypernetwork.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    model(instructions, inputs, labels).loss.backward()
    hook.remove()
    assert seen == [2]
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for b in range(6):
        (model(*(part[b : b + 1] for part in (instructions, inputs, labels))).loss / 6).backward()
    for parameter, gradient in zip(model.parameters(), found, strict=True):
        assert (parameter.grad - gradient).norm() <= 1e-4 * gradient.norm()


def test_padding_of_instruction_input_and_target_changes_nothing():
    model = never_ending(tiny_hint())
    instructions, inputs, labels = random_ids(2, 7), random_ids(2, 9), random_ids(2, 6)
    wanted = model(instructions, inputs, labels).loss
    torch.testing.assert_close(model(with_padding(instructions, 3), inputs, labels).loss, wanted)
    torch.testing.assert_close(model(instructions, with_padding(inputs, 3), labels).loss, wanted)
    torch.testing.assert_close(model(instructions, inputs, with_padding(labels, 3, -100)).loss, wanted)
    plain, padded = model.encode_instruction(instructions), model.encode_instruction(with_padding(instructions, 3))
    for one, other in zip(tensors_of(plain.modules), tensors_of(padded.modules), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    found = model.generate(padded, with_padding(inputs, 4), max_new_tokens=12)
    assert torch.equal(found, model.generate(plain, inputs, max_new_tokens=12))
    mask = torch.cat([torch.ones(2, 9), torch.zeros(2, 4)], dim=1)
    junk = torch.cat([inputs, random_ids(2, 4)], dim=1)
    assert torch.equal(model.generate(plain, junk, mask, 12), model.generate(plain, inputs, None, 12))
    junk = torch.cat([instructions, random_ids(2, 3)], dim=1)
    masked = model.encode_instruction(junk, torch.cat([torch.ones(2, 7), torch.zeros(2, 3)], dim=1))
    for one, other in zip(tensors_of(plain.modules), tensors_of(masked.modules), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_the_hyperencoder_is_the_t5_encoder_without_modules():
    model = tiny_hint()
    instruction = random_ids(1, 7)
    assert torch.equal(model.encode_instruction(instruction).states, model.t5.encode(instruction))
    names = [name for name, _ in model.named_parameters() if not name.startswith("t5.")]
    assert all(name.startswith("hypernetwork.") for name in names) and not any("blocks" in name for name in names)


@pytest.mark.parametrize("kept", ["modules", "states"])
def test_modules_and_fused_states_each_carry_the_instruction(kept):
    """With one of the two of another instruction, the answers are those of neither."""
    model = tiny_hint()
    one, other = model.encode_instruction(random_ids(1, 7)), model.encode_instruction(random_ids(1, 7))
    inputs, labels = random_ids(3, 9), random_ids(3, 6)

    def logits(task):
        return model.t5.logits(model.t5.decode(t5.shift_right(labels), model._fuse(task, inputs), task.modules))

    mixed = logits(other._replace(**{kept: getattr(one, kept)}))
    assert (mixed - logits(one)).abs().max() > 1e-3 and (mixed - logits(other)).abs().max() > 1e-3


def test_the_decoder_reads_instruction_and_input_states_side_by_side():
    model = tiny_hint()
    task, inputs = model.encode_instruction(random_ids(1, 7)), random_ids(3, 9)
    inputs[0, 6:] = 0
    instruction, read = model._fuse(task, inputs)
    assert torch.equal(instruction.states, task.states) and instruction.attention_mask.tolist() == [[1] * 7]
    assert torch.equal(read.states, model.t5.encode(inputs, None, task.modules))
    bias = t5.source_bias([instruction, read])
    assert bias.shape == (3, 1, 1, 16) and (bias[0, 0, 0] == 0).tolist() == [True] * 13 + [False] * 3
    concatenated = t5.Source(
        torch.cat([task.states.expand(3, -1, -1), read.states], dim=1), (bias[:, 0, 0] == 0).long()
    )
    answers = random_ids(3, 6)
    found = model.t5.decode(answers, [instruction, read], task.modules)
    torch.testing.assert_close(found, model.t5.decode(answers, [concatenated], task.modules), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "changes", [{}, dict(tie_word_embeddings=True, scale_decoder_outputs=True, feed_forward_proj="relu")]
)
def test_a_saved_model_answers_as_before(tmp_path, changes):
    model = tiny_hint(**changes)
    model.save_pretrained(tmp_path)
    found = HINT.from_pretrained(tmp_path)
    assert found.config == model.config and found.t5.config == model.t5.config and not found.training
    for (name, one), (other_name, other) in zip(model.named_parameters(), found.named_parameters(), strict=True):
        assert name == other_name and torch.equal(one, other)
    assert isinstance(load_model(tmp_path), HINT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_public_t5_gets_a_new_hypernetwork(tmp_path):
    tiny_t5().save_pretrained(tmp_path)
    model = HINT.from_t5(tmp_path, HINTConfig(bottleneck=3, prefix_length=2))
    assert torch.equal(model.t5.shared.weight, T5.from_pretrained(tmp_path).shared.weight) and not model.training
    assert model.encode_instruction(random_ids(1, 4)).modules.decoder[0].prefix.key.shape == (1, 3, 2, 10)
    assert HINT.from_t5(tmp_path).config == HINTConfig(bottleneck=512, prefix_length=30)
    assert isinstance(load_model(tmp_path), PlainT5)
    with pytest.raises(CheckpointError, match="not of a HINT model"):
        HINT.from_pretrained(tmp_path)


def test_a_kept_task_answers_without_its_instruction(tmp_path):
    model = never_ending(tiny_hint())
    task, inputs = model.encode_instruction(random_ids(1, 7)), random_ids(3, 9)
    task.save(tmp_path / "task.pt")
    found = EncodedTask.load(tmp_path / "task.pt")
    assert torch.equal(model.generate(found, inputs, max_new_tokens=9), model.generate(task, inputs, max_new_tokens=9))
    assert not any(tensor.requires_grad for tensor in tensors_of(found))
    assert {tensor.device.type for tensor in tensors_of(found.to("meta"))} == {"meta"}


def test_a_task_encoded_in_bf16_answers_in_fp32_once_it_is_read_back(tmp_path):
    model = tiny_hint()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        task = model.encode_instruction(random_ids(1, 7))
    task.save(tmp_path / "task.pt")
    assert torch.bfloat16 in {tensor.dtype for tensor in tensors_of(task)}
    assert model.generate(EncodedTask.load(tmp_path / "task.pt"), random_ids(3, 9), max_new_tokens=4).shape[0] == 3


def test_a_file_that_is_no_task_is_refused_and_not_executed(tmp_path):
    path, proof = tmp_path / "task.pt", tmp_path / "it-ran"

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(proof),)

    for content in (b"", b"junk", pickle.dumps(Attack(), protocol=2), pickle.dumps({"a": 1}, protocol=2)):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="task.pt"):
            EncodedTask.load(path)
    torch.save([torch.ones(2)], path)
    with pytest.raises(CheckpointError, match="is not an encoded task"):
        EncodedTask.load(path)
    assert not proof.exists()


def test_the_baseline_reads_the_input_alone():
    model = PlainT5(tiny_t5())
    inputs, labels = random_ids(3, 9), random_ids(3, 6)
    found = model(random_ids(3, 7), inputs, labels).loss
    assert torch.equal(found, model(random_ids(3, 5), inputs, labels).loss)
    wanted = torch.nn.functional.cross_entropy(model.t5(inputs, t5.shift_right(labels)).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(found, wanted)
    assert torch.equal(model.generate(model.encode_instruction(inputs), inputs), model.t5.generate(inputs))
    mask = torch.cat([torch.ones(3, 5), torch.zeros(3, 4)], dim=1)
    assert torch.equal(model.generate(None, inputs, mask, 9), model.t5.generate(inputs, mask, 9))
    assert not torch.equal(model.generate(None, inputs, mask, 9), model.t5.generate(inputs, None, 9))


@pytest.mark.parametrize("kind", [HINT, PlainT5])
def test_an_answer_is_ranked_by_the_log_probability_of_all_its_tokens(kind):
    """Against a plain loop over examples without padding, and over tokens, each by the softmax over the vocabulary."""
    model = tiny_hint() if kind is HINT else PlainT5(tiny_t5())
    task, inputs, labels = model.encode_instruction(random_ids(1, 7)), random_ids(4, 9), random_ids(4, 6)
    labels[:, -1] = labels[1, 2] = t5.EOS
    labels[1, 3:], inputs[2, 4:] = -100, 0
    wanted, owners = [], torch.tensor([2, 0, 3, 2])  # an input has two answers, another none
    for row, answer in zip(inputs[owners], labels):
        row = row[row > 0][None]
        sources, modules = ([model.t5.read(row)], None) if task is None else (model._fuse(task, row), task.modules)
        said, total = [t5.START], 0.0
        for token in answer[answer >= 0].tolist():
            states = model.t5.decode(torch.tensor([said]), sources, modules)
            total += model.t5.logits(states)[0, -1].log_softmax(-1)[token].item()
            said.append(token)
        wanted.append(total)
    found = model.rank(task, inputs, labels, owners)
    torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-4, rtol=1e-5)
    assert not found.requires_grad
    padded = model.rank(task, with_padding(inputs, 3), with_padding(labels, 2, -100), owners)
    torch.testing.assert_close(padded, found, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    "wrong", [dict(bottleneck=0), dict(bottleneck="8"), dict(prefix_length=10**9), dict(generator_dropout=1.5)]
)
def test_sizes_that_make_no_sense_are_refused(wrong):
    with pytest.raises(CheckpointError, match=next(iter(wrong))):
        HINTConfig(**wrong)


def test_the_dropout_of_the_config_is_that_of_the_generating_networks():
    model = HINT(tiny_t5(), HINTConfig(2, 2, generator_dropout=0.3))
    assert {network[2].p for network in model.hypernetwork.networks.values()} == {0.3}


def test_heads_need_not_divide_the_model():
    """T5-3B has h*k = 4 d: prefixes take k of the config, never d/h."""
    config = tiny_config(d_kv=40)
    model = HINT(T5(config), HINTConfig(bottleneck=2, prefix_length=3))
    assert model.encode_instruction(random_ids(1, 4)).modules.encoder[0].prefix.key.shape == (1, 3, 3, 40)
    assert model(random_ids(2, 4), random_ids(2, 5), random_ids(2, 3)).loss.isfinite()
