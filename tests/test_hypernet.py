"""Hypernetworks: every generator against a loop from its equations, and for each combination of choices what it
generates, what of it trains, and that answering, saving and keeping treat it as they treat HINT.
"""

import copy
import itertools
from dataclasses import replace

import pytest
import reference
import torch
import torch.nn.functional as F
from conftest import random_ids, tiny_config, tiny_t5

import t5
from hint import HINT, EncodedTask, HINTConfig, load_model, named_tensors
from hypernet import CHOICES, GENERATORS, MODULES, OwnEncoder, TaskTable
from t5 import EOS, PAD, SIZES, START, T5, InputError, select_rows

NO_FUSION, TABLE = {"fusion": False}, {"fusion": False, "hyperencoder": "table"}
CASES = {  # the systems of train.py, and the rows of the paper's ablations
    "hint": {},
    "tk-instruct+peft": {"generator": "direct", **NO_FUSION},
    "hyperformer": {"generator": "hyperformer", **TABLE},
    "hyperformer++": {"generator": "hyperformer++", **TABLE},
    "hyperformer-instruction": {"generator": "hyperformer", **NO_FUSION},
    "hyperformer++-instruction": {"generator": "hyperformer++", **NO_FUSION},
    "hyperformer, own": {"generator": "hyperformer", "hyperencoder": "own"},
    "hypter": {"generator": "pooled", "modules": "adapters", "hyperencoder": "own", **NO_FUSION},
    "hypertune": {"generator": "decoder", "modules": "prefixes", "hyperencoder": "own", **NO_FUSION},
    "no modules": {"generator": "none"},
    "own hyperencoder": {"hyperencoder": "own"},
    "full decoder": {"generator": "decoder"},
    **{modules: {"modules": modules, **NO_FUSION} for modules in MODULES},
}
GRID = {
    f"{generator}, {modules}": {"generator": generator, "modules": modules, **NO_FUSION}
    for generator in ("direct", "decoder", "pooled")
    for modules in MODULES
}
all_cases = pytest.mark.parametrize("case", CASES)
pytestmark = pytest.mark.usefixtures("quick_disk")


def model_of(case: str, t5_changes: dict | None = None, **changes) -> HINT:
    """A small model whose generated weights are large enough to be noticed, and of which no norm is the identity."""
    settings = {"bottleneck": 5, "prefix_length": 4, "generator_dropout": 0.0, **{**CASES, **GRID}[case], **changes}
    settings["tasks"] = 3 * (settings.get("hyperencoder") == "table")
    model = HINT(tiny_t5(**(t5_changes or {})), HINTConfig(**settings)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter.data, 0.5, 1.5)
        if ".networks." in name and parameter.ndim == 2 and not name.endswith(".0.weight"):
            parameter.data *= 8 if model.config.generator in ("columns", "direct") else 5
        if name.startswith("hypernetwork.stacks") and parameter.ndim < 2:
            torch.nn.init.uniform_(parameter.data, 0.2, 0.5)
        if ".heads." in name:
            torch.nn.init.normal_(parameter.data, std=0.05)
    return model


def instructions_of(model: HINT, count: int = 3) -> torch.Tensor:
    """Different texts, or numbers of different tasks, of which the first is 0, the id of padding."""
    return torch.arange(count)[:, None] % 3 if model.config.hyperencoder == "table" else random_ids(count, 7)


def logits_of(model: HINT, task: EncodedTask, inputs: torch.Tensor, said: torch.Tensor) -> torch.Tensor:
    """Scores of every next token, without any cache."""
    return model.t5.logits(model.t5.decode(said, model.fuse(task, inputs), task.modules))


# ------------------------------------------------------------------------ what every combination must have


def wanted_shapes(config: HINTConfig, cross: bool) -> dict[str, tuple]:
    """Tensors in the modules of one layer of the tiny T5, d = 24, 3 heads of 10; bottleneck 5, prefixes of 4 tokens."""
    adapter, prefix = [(2, 24, 5), (2, 1, 5), (2, 5, 24), (2, 1, 24)], [(2, 3, 4, 10)] * 2
    lora = [(2, 24, 5), (2, 5, 30)] * 2
    if config.generator.startswith("hyperformer"):
        return dict.fromkeys(("after_attention", "after_feed_forward"), [*adapter, (2, 1, 24), (2, 1, 24)])
    wanted = {"adapter": adapter, "prefix": prefix, "cross_prefix": prefix, "lora": lora, "cross_lora": lora}
    kinds = [*MODULES[config.modules], *(f"cross_{kind}" for kind in MODULES[config.modules] if cross)]
    return {kind: wanted[kind] for kind in kinds if kind in wanted}


@pytest.mark.parametrize("case", [*CASES, *GRID])
def test_each_layer_is_given_the_modules_of_its_system_and_no_others(case):
    model = model_of(case)
    task = model.encode_instruction(instructions_of(model, 2))
    if case != "no modules":
        assert (len(task.modules.encoder), len(task.modules.decoder)) == (2, 3)
        for cross, layer in ((stack is task.modules.decoder, layer) for stack in task.modules for layer in stack):
            found = {name: [x.shape for _, x in named_tensors(part)] for name, part in layer._asdict().items() if part}
            assert found == wanted_shapes(model.config, cross)
    assert task.states.shape == (2, 7 if model.config.fusion else 0, 24)
    assert task.attention_mask.shape == task.states.shape[:2]


@pytest.mark.parametrize(  # with no modules and a frozen T5, nothing would train
    "case, trains", set(itertools.product(CASES, CHOICES["trains"])) - {("no modules", "hypernetwork")}
)
def test_gradients_reach_every_row_of_every_parameter_that_trains_and_no_other(case, trains):
    model = model_of(case, trains=trains).train()
    norms = {id(p) for part in model.t5.modules() if isinstance(part, t5.RMSNorm) for p in part.parameters()}
    of_t5 = {id(p) for p in model.t5.parameters()}
    assert len(norms) == 2 * 2 + 3 * 3 + 2
    model(instructions_of(model), random_ids(3, 9), random_ids(3, 6)).loss.backward()
    for name, parameter in model.named_parameters():
        trained = trains == "all" or id(parameter) not in of_t5 or (trains.endswith("norms") and id(parameter) in norms)
        assert parameter.requires_grad == trained == (parameter.grad is not None), name
        if trained:
            assert parameter.grad.abs().sum() > 0, name
            if case == "hint" and ".embeddings." in name:  # the embedding of a column that nobody reads would get none
                assert (parameter.grad.abs().sum(1) > 0).all(), name


@all_cases
def test_a_mixed_batch_gives_each_example_what_it_gets_alone(case):
    """First in one loss, then with one input for all, so that answers differ by the task alone."""
    model = model_of(case)
    model.t5.lm_head.weight.data[EOS] = 0
    instructions, inputs, labels = instructions_of(model, 4), random_ids(4, 9), random_ids(4, 6)
    instructions[3] = instructions[1]
    if model.config.hyperencoder != "table":
        instructions[0, 5:] = PAD
    together = model(instructions, inputs, labels)
    alone = [model(*(part[b : b + 1] for part in (instructions, inputs, labels))).loss for b in range(4)]
    torch.testing.assert_close(together.loss, sum(alone) / 4, atol=1e-4, rtol=1e-5)
    task, inputs, labels = model.encode_instruction(instructions), inputs[:1].repeat(4, 1), labels[:1].repeat(4, 1)
    logits, answers = logits_of(model, task, inputs, labels), model.generate(task, inputs, max_new_tokens=8)
    for b in range(4):
        own = model.encode_instruction(instructions[b : b + 1])
        torch.testing.assert_close(logits_of(model, own, inputs[:1], labels[:1])[0], logits[b], atol=1e-4, rtol=1e-4)
        assert torch.equal(model.generate(own, inputs[:1], max_new_tokens=8)[0], answers[b])
    for one, other in itertools.combinations(range(3), 2):
        differ = (logits[one] - logits[other]).abs().max() > 1e-2
        assert differ != (model.config.generator == "direct"), "equal examples would agree by themselves"


@pytest.mark.parametrize("case", [*MODULES, "hyperformer-instruction"])
def test_every_part_of_the_modules_of_every_layer_matters(case):
    """One after the other is taken from another instruction; that alone must change what is said."""
    model = model_of(case)
    task, other = (model.encode_instruction(random_ids(1, 7)) for _ in range(2))
    inputs, said = random_ids(2, 9), random_ids(2, 6)
    before, others = logits_of(model, task, inputs, said), dict(named_tensors(other))
    names = [name for name, _ in named_tensors(task) if name.startswith("modules")]
    for changed in names:
        taken = iter([others[name] if name == changed else tensor for name, tensor in named_tensors(task)])
        after = logits_of(model, t5.map_tensors(lambda _: next(taken), task), inputs, said)
        assert (after - before).abs().max() > 1e-4, changed
    assert len(names) == {"adapters+prefixes": 36, "adapters": 20, "prefixes": 16, "lora": 32}.get(case, 60)


@all_cases
def test_a_saved_model_and_kept_tasks_of_any_kind_are_read_as_they_were(case, tmp_path):
    model = model_of(case, trains="hypernetwork+norms")
    instructions, inputs, labels = instructions_of(model), random_ids(3, 9), random_ids(3, 6)
    model.save_pretrained(tmp_path)
    found = load_model(tmp_path)
    assert found.config == model.config and found.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(found(instructions, inputs, labels).loss, model(instructions, inputs, labels).loss)
    assert [p.requires_grad for p in found.parameters()] == [p.requires_grad for p in model.parameters()]
    for count in (1, 3):
        task = model.encode_instruction(instructions[:count])
        model.save_task(task, tmp_path / "task")
        kept = found.load_task(tmp_path / "task")
        assert not any(tensor.requires_grad for _, tensor in named_tensors(kept))
        assert torch.equal(logits_of(found, kept, inputs, labels), logits_of(model, task, inputs, labels))


@pytest.mark.parametrize("case, other", [("lora", "adapters"), ("hyperformer++-instruction", "hint"), ("hint", "lora")])
def test_a_kept_task_of_another_system_is_refused(case, other, tmp_path):
    model, stranger = model_of(case), model_of(other)
    stranger.fingerprint = model.fingerprint
    stranger.save_task(stranger.encode_instruction(random_ids(1, 7)), tmp_path / "task")
    with pytest.raises(InputError, match="task"):
        model.load_task(tmp_path / "task")


@pytest.mark.parametrize("case, count", [*zip(CASES, [5] * 99), ("hint", 1), ("lora", 1), ("hyperformer, own", 1)])
def test_cached_answers_are_those_of_a_loop_without_cache(case, count):
    """One row at a time, one pass a token; the rows end at different steps, so some go on without the others."""
    model = model_of(case)
    head = model.t5.lm_head.weight.data
    head[EOS] = 0
    task, inputs = model.encode_instruction(instructions_of(model, count)), random_ids(5, 9)
    inputs[1, 5:] = PAD
    endless = model.generate(task, inputs, max_new_tokens=10).tolist()
    ends = {token: [row.index(token) if token in row else 10 for row in endless] for row in endless for token in row}
    head[EOS] = 1.001 * head[max(ends, key=lambda token: len(set(ends[token])))]  # the end at the most different steps
    answers = model.generate(task, inputs, max_new_tokens=10)
    lengths = set()
    for b, answer in enumerate(answers.tolist()):
        own, row, said = select_rows(task, torch.tensor([b])), inputs[b : b + 1][:, inputs[b] > PAD], [START]
        while said[-1] != EOS and len(said) <= 10:
            said.append(logits_of(model, own, row, torch.tensor([said]))[0, -1].argmax().item())
        assert said[1:] + [PAD] * (answers.shape[1] - len(said) + 1) == answer
        lengths.add(len(said))
    assert len(lengths) > 1, "rows must end at different steps"


# ------------------------------------------------------------------------ generators against loops from the equations


def network_loop(w, kind, z, first=0):
    one, two = (w[f"hypernetwork.networks.{kind}.{number}.weight"] for number in (first, first + 3))
    return two @ F.gelu(one @ z, approximate="tanh") / 24**0.5


def columns_loop(w, kind, number, place, states):
    embedding = w[f"hypernetwork.embeddings.{kind}"][number]
    return network_loop(w, kind, reference.attention(w, "hypernetwork.attention", embedding[None], states)[0])


def direct_loop(w, kind, number, place, states):
    return network_loop(w, kind, w[f"hypernetwork.embeddings.{kind}"][number])


def decoder_loop(w, kind, number, place, states):
    """Three layers of cross-attention and feed-forward, then two norms."""
    x = w[f"hypernetwork.embeddings.{kind}"][number][None]
    for layer in range(3):
        block = f"hypernetwork.attention.blocks.{layer}"
        u = reference.norm(w, f"{block}.cross_attention_norm", x)
        x = x + reference.attention(w, f"{block}.cross_attention", u, states)
        u = reference.norm(w, f"{block}.feed_forward_norm", x)
        wi_0, wi_1, wo = (w[f"{block}.feed_forward.{part}.weight"] for part in ("wi_0", "wi_1", "wo"))
        x = x + F.gelu(u @ wi_0.T, approximate="tanh") * (u @ wi_1.T) @ wo.T
    x = reference.norm(w, f"hypernetwork.networks.{kind}.0", reference.norm(w, "hypernetwork.attention.norm", x))
    return network_loop(w, kind, x[0], first=1)


def pooled_loop(w, kind, number, place, states):
    """One network a kind writes all vectors of all layers, side by side."""
    return network_loop(w, kind, states.mean(0))[place]


def vectors_of(modules: t5.Modules, b: int) -> dict[str, list[torch.Tensor]]:
    """All vectors of each kind, as section 3.1.1 cuts them, in the order of the slots."""
    layers = [*modules.encoder, *modules.decoder]
    prefixes = [prefix for layer in layers for prefix in (layer.prefix, *layer.cross_prefix) if prefix]
    loras = [lora for layer in layers for lora in (layer.lora, layer.cross_lora) if lora]
    adapters = [layer.adapter for layer in layers if layer.adapter]
    vectors = {
        "adapter_down": [column for a in adapters for column in a.down[b].T],
        "adapter_down_bias": [a.down_bias[b, 0] for a in adapters],
        "adapter_up": [row for a in adapters for row in a.up[b]],
        "adapter_up_bias": [a.up_bias[b, 0] for a in adapters],
        "prefix_key": [prefix.key[b, :, token].flatten() for prefix in prefixes for token in range(4)],
        "prefix_value": [prefix.value[b, :, token].flatten() for prefix in prefixes for token in range(4)],
        "lora_query_down": [column for lora in loras for column in lora.query_down[b].T],
        "lora_query_up": [row * 5 for lora in loras for row in lora.query_up[b]],  # alpha / rank, where alpha is 1
        "lora_value_down": [column for lora in loras for column in lora.value_down[b].T],
        "lora_value_up": [row * 5 for lora in loras for row in lora.value_up[b]],
    }
    return {kind: columns for kind, columns in vectors.items() if columns}


LOOPS = {"columns": columns_loop, "direct": direct_loop, "decoder": decoder_loop, "pooled": pooled_loop}


@pytest.mark.parametrize("modules, count", [("adapters+prefixes", 5 * 12 + 8 * 8), ("lora", 8 * 20)])
@pytest.mark.parametrize("generator", LOOPS)
def test_every_generated_value_is_that_of_a_plain_loop(generator, modules, count):
    """For one instruction at a time, without padding: encoder layers first, then self and cross of decoder layers."""
    model = model_of(modules if generator == "columns" else f"{generator}, {modules}")
    w = {name: weight.detach() for name, weight in model.named_parameters()}
    states, mask = torch.randn(2, 7, 24), torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    found = model.hypernetwork(states, mask)
    for b, length in enumerate((7, 4)):
        vectors = vectors_of(found, b)
        for kind, columns in vectors.items():
            for number, vector in enumerate(columns):
                place = slice(number * len(vector), (number + 1) * len(vector))
                wanted = LOOPS[generator](w, kind, number, place, states[b, :length])
                torch.testing.assert_close(vector, wanted, atol=1e-5, rtol=1e-4)
                assert wanted.abs().max() > 1e-2, "values near zero would agree by themselves"
        assert sum(len(columns) for columns in vectors.values()) == count


def serial_adapter(w, stack, layer, place, shares_places, task):
    """y + LN(W_up gelu(W_down y + b_down) + b_up) * scale + shift, all linear in z = LN(MLP([task; layer; place]))."""

    def linear(name, x):
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    own = f"hypernetwork.stacks.{stack}"
    read = [task, w[f"{own}.layers"][layer]] + ([w[f"{own}.places"][place]] if shares_places else [])
    z = linear(f"{own}.join.2", linear(f"{own}.join.0", torch.cat(read)).relu())
    z = F.layer_norm(z, (64,), w[f"{own}.join.3.weight"], w[f"{own}.join.3.bias"])
    heads = f"{own}.heads.{0 if shares_places else place}"
    down, down_bias, up, up_bias, scale, shift = (linear(f"{heads}.{n}", z) for n in range(6))

    def adapted(y):
        change = F.gelu(y @ down.view(24, 5) + down_bias, approximate="tanh") @ up.view(5, 24) + up_bias
        return y + F.layer_norm(change, (24,), eps=1e-6) * scale + shift

    return adapted


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("hyperformer") and "own" not in case])
def test_hyperformer_is_a_t5_of_which_each_sublayer_but_cross_attention_is_changed_as_its_equations_say(case):
    """Three tasks, some with padding, against one example at a time in a T5 whose sublayers are changed by hooks."""
    model = model_of(case)
    w = dict(model.named_parameters())
    instructions, inputs, said = instructions_of(model), random_ids(3, 8), random_ids(3, 6)
    inputs[2, 6:] = PAD
    if "instruction" in case:
        instructions[1, 5:] = PAD
    found = logits_of(model, model.encode_instruction(instructions), inputs, said)
    for b in range(3):
        if "instruction" in case:
            states = model.t5.read(instructions[b : b + 1, instructions[b] > PAD]).states[0]
            task = w["hypernetwork.project.weight"] @ states.mean(0) + w["hypernetwork.project.bias"]
        else:
            task = w["hyperencoder.weight"][b]
        changed = copy.deepcopy(model.t5)
        for s, stack in enumerate((changed.encoder, changed.decoder)):
            for number, block in enumerate(stack.blocks):
                for place, sublayer in enumerate((block.self_attention, block.feed_forward)):
                    adapted = serial_adapter(w, s, number, place, "++" in case, task)
                    sublayer.register_forward_hook(lambda _, __, y, adapted=adapted: adapted(y))
        row = inputs[b : b + 1, inputs[b] > PAD]
        torch.testing.assert_close(found[b], changed(row, said[b : b + 1])[0], atol=1e-5, rtol=1e-4)
        assert (model.t5(row, said[b : b + 1])[0] - found[b]).abs().max() > 0.1


@pytest.mark.parametrize("generator", ["hyperformer", "hyperformer++"])
def test_a_fresh_hyperformer_has_adapters_that_change_little(generator):
    """After the norm, the generated scale and shift alone decide how much: both have a std of 0.08."""
    model = HINT(tiny_t5(), HINTConfig(bottleneck=5, generator=generator, fusion=False))
    y, modules = torch.randn(2, 50, 24), model.encode_instruction(random_ids(2, 7)).modules
    for adapter in (part for layer in modules.encoder for part in (layer.after_attention, layer.after_feed_forward)):
        assert 0.05 < (adapter(y) - y).square().mean().sqrt() < 0.2


def test_lora_of_a_task_is_a_t5_whose_weights_have_been_changed():
    """x (W + down up) for queries and values of every attention, with padded inputs."""
    model = model_of("lora")
    task, inputs, said = model.encode_instruction(random_ids(1, 7)), random_ids(3, 9), random_ids(3, 6)
    inputs[1, 4:] = PAD
    changed, layers = copy.deepcopy(model.t5), [*task.modules.encoder, *task.modules.decoder]
    blocks = [*changed.encoder.blocks, *changed.decoder.blocks]
    pairs = [(block.self_attention, layer.lora) for block, layer in zip(blocks, layers)]
    pairs += [(block.cross_attention, layer.cross_lora) for block, layer in zip(blocks[2:], layers[2:])]
    for attention, lora in pairs:
        attention.q.weight.data += (lora.query_down @ lora.query_up)[0].T
        attention.v.weight.data += (lora.value_down @ lora.value_up)[0].T
    found = logits_of(model, task, inputs, said)
    torch.testing.assert_close(found, changed(inputs, said), atol=2e-5, rtol=1e-4)
    assert (found - model.t5(inputs, said)).abs().max() > 0.1

# ------------------------------------------------------------------------ hyperencoders, options, start


def test_an_own_hyperencoder_starts_as_a_copy_of_t5_s_and_trains_apart_from_it():
    model, ids = tiny_t5(), F.pad(random_ids(2, 7), (0, 3))
    own, before = OwnEncoder(model, HINTConfig()), model.read(ids)
    assert all(torch.equal(*pair) for pair in zip(own(ids), before))
    for parameter in model.parameters():
        parameter.data += 1
    assert torch.equal(own(ids).states, before.states)


def test_a_table_of_tasks_knows_fitted_rows_after_its_own_and_never_saves_them():
    table = TaskTable(T5(tiny_config()), HINTConfig(tasks=3, generator="hyperformer", **TABLE))
    table.fitted = torch.randn(2, 64)
    states, mask = table(torch.tensor([[2], [4]]))
    assert torch.equal(states, torch.stack([table.weight[2:], table.fitted[1:]])) and mask.tolist() == [[1], [1]]
    assert table.state_dict().keys() == {"weight"}


@pytest.mark.parametrize("case", ["hint", "full decoder", "lora"])
def test_gradient_checkpointing_computes_the_generator_again_and_gives_the_same_gradient(case):
    results = []  # with dropout, which must fall alike the second time
    for on in (False, True):
        torch.manual_seed(1)
        model, passes = model_of(case, {"dropout_rate": 0.2}, generator_dropout=0.2).train(), []
        model.hypernetwork.gradient_checkpointing = on
        for network in (model.hypernetwork.attention, *model.hypernetwork.networks.values()):
            network.register_forward_pre_hook(lambda *_: passes.append(1))
        torch.manual_seed(2)
        model(random_ids(3, 7), random_ids(3, 9), random_ids(3, 6)).loss.backward()
        results.append([parameter.grad for parameter in model.parameters()])
        assert len(passes) == (1 + on) * (1 + len(model.hypernetwork.networks))
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=0, rtol=1e-5)


def test_the_attention_of_the_generator_keeps_no_scores_where_torch_fuses_it():
    """On a CPU torch fuses attention without dropout. 64 columns and 200 tokens: scores would be the largest by far."""
    reader, kept = model_of("hint").hypernetwork.attention, []
    columns, states = torch.randn(1, 64, 24, requires_grad=True), torch.randn(2, 200, 24)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        reader(columns, states, torch.ones(2, 200, dtype=torch.long))
    assert 0 < max(kept) < 2 * reader.heads * 64 * 200 / 2


def test_dropout_and_scale_of_the_config_reach_the_generator():
    def generator_of(**changes):
        torch.manual_seed(1)
        return GENERATORS["columns"](T5(tiny_config()), HINTConfig(bottleneck=4, prefix_length=3, **changes))

    small, large = generator_of(), generator_of(embedding_scale=3.0, generator_dropout=0.3)
    assert all(torch.allclose(large.embeddings[name], 3 * embedding) for name, embedding in small.embeddings.items())
    assert torch.cat([*small.embeddings.values()]).std().item() == pytest.approx(24**-0.5, rel=0.1)
    assert [p.p for p in large.networks.modules() if isinstance(p, torch.nn.Dropout)] == [0.3] * 6
    given = torch.randn(1, 7, 24), torch.ones(1, 7, dtype=torch.long)
    for training in (True, False):
        large.train(training)
        assert torch.equal(*(large(*given).encoder[0].prefix.key for _ in range(2))) != training


def test_fresh_weights_are_scaled_by_what_goes_into_them():
    """W_q also has the 1/sqrt(k) that the scores lack."""
    generator = GENERATORS["columns"](T5(tiny_config(d_model=256, d_kv=64)), HINTConfig(bottleneck=16, prefix_length=8))
    q, k, v, o = (getattr(generator.attention, part) for part in "qkvo")
    wanted = {q: (256 * 64) ** -0.5, k: 256**-0.5, v: 256**-0.5, o: 192**-0.5}
    wanted |= {layer: 256**-0.5 for network in generator.networks.values() for layer in (network[0], network[-1])}
    for layer, std in wanted.items():
        assert layer.weight.std().item() == pytest.approx(std, rel=0.05)


def test_choices_and_sizes_that_make_no_sense_are_refused():
    for field, values in {
        "bottleneck": (0, "8", 2.5, True), "prefix_length": (10**9,), "generator_dropout": (1.5, "0"), "tasks": (-1,),
        "embedding_scale": (float("nan"),), "generator": ("deep",), "modules": ("all", None), "fusion": (1,),
        "hyperencoder": ("none",), "trains": ("nothing",),
    }.items():  # fmt: skip
        for value in values:
            with pytest.raises(ValueError, match=field):
                HINTConfig(**{field: value})
    for refused in ({"tasks": 3}, {"hyperencoder": "table", "tasks": 3}, TABLE | {"generator": "hyperformer"}):
        with pytest.raises(ValueError):
            HINTConfig(**refused)


def test_a_combination_that_is_not_refused_has_a_use_for_each_parameter_that_trains():
    """All combinations, but that two stand for all kinds of modules. Adafactor could not resume without a gradient."""
    allowed, texts = 0, (random_ids(2, 5), random_ids(2, 4), random_ids(2, 3))
    choices = {**CHOICES, "modules": ("adapters+prefixes", "lora"), "fusion": (True, False)}
    for values in itertools.product(*choices.values()):
        chosen = dict(zip(choices, values))
        table = chosen["hyperencoder"] == "table"
        try:
            config = HINTConfig(bottleneck=2, prefix_length=2, tasks=2 * table, **chosen)
        except ValueError:
            continue
        allowed += 1
        model = HINT(T5(tiny_config(num_layers=1, num_decoder_layers=1, d_model=8, d_ff=8, num_heads=1)), config)
        model(torch.tensor([[0], [1]]) if table else texts[0], *texts[1:]).loss.backward()
        grads = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        assert grads and all(grad is not None for grad in grads), chosen
    assert allowed == 72 + 18 + 5 + 30, "columns, decoder and pooled; direct; none; the two hyperformers"


# ------------------------------------------------------------------------ how many parameters


PARAMETERS = {"small": 12_943_360, "base": 29_810_688, "large": 71_106_560, "xl": 173_670_400, "xxl": 473_169_920}


def parameters(model: torch.nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameters_at_public_sizes_are_those_of_a_formula_and_do_not_grow_with_the_whole_of_a_matrix(size):
    """An embedding for each column, cross-attention, six networks; one adapter a layer, one prefix an attention."""
    c, r, P = SIZES[size], 512, 30
    d, inner = c.d_model, c.num_heads * c.d_kv
    columns = 2 * c.num_layers * (2 * r + 2) + 3 * c.num_layers * 2 * P
    networks = 6 * d * d + (d * d + d * r) + 2 * (d * d + d * inner)
    with torch.device("meta"):
        model = HINT(T5(c), HINTConfig(trains="hypernetwork+norms"))
    assert parameters(model, trained=True) - (5 * c.num_layers + 2) * d == parameters(model.hypernetwork)
    assert parameters(model.hypernetwork) == columns * d + 4 * d * inner + networks == PARAMETERS[size]


@pytest.mark.parametrize("generator, count", [("hyperformer++", 5_163_440), ("hyperformer", 10_241_760)])
def test_a_hyperformer_trains_as_many_parameters_as_that_of_its_authors(generator, count):
    """T5-base of 2020, bottleneck 24, 8 tasks; of Hyperformer++ a task costs the 0.29 % of T5 that the paper names."""
    old = dict(feed_forward_proj="relu", tie_word_embeddings=True, scale_decoder_outputs=True)
    with torch.device("meta"):
        config = HINTConfig(bottleneck=24, tasks=8, trains="hypernetwork", **CASES[generator])
        model = HINT(T5(replace(SIZES["base"], d_ff=3072, **old)), config)
    assert parameters(model.t5) == 222_903_552 and parameters(model, trained=True) == count
    assert generator == "hyperformer" or round(100 * count / 8 / 222_903_552, 2) == 0.29
