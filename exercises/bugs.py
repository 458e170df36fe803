"""Bugs: one line of the functions in your file is wrong. The task says what was noticed. Find it, and mend it."""

from contextlib import suppress
from dataclasses import replace

import torch
import torch.nn.functional as F

from mechanics import edited, exercise, load
from rebuild import read_by_heads
from small import tiny_hint


def with_the_bug(bug, module):
    """A module with the bug of an exercise in it, to measure what the bug does."""
    return load([module], edited(bug, bug.bug))[module]


@exercise(
    "bug", ["hint.HINT.encode_instruction", "hypernet.InstructionReader.forward", "t5.padding_bias"],
    level=2, minutes=20, paper="HINT, section 3.1.1 (the authors' code has this bug)",
    bug=("padding_bias(attention_mask)", "padding_bias(torch.ones_like(attention_mask))"),
    hint="Follow the mask: who reads the instruction's states, and does each reader know which of them are padding?",
    why="With the bug, W_down of the check's model moves by 71 % of its size when 4 places of padding follow 5 tokens.",
    near={
        "T5's encoder sees the padding of the instruction now.":
            ("read)(instruction_ids, attention_mask)", "read)(instruction_ids, torch.ones_like(instruction_ids))"),
        "The decoder reads the instruction's padding now.": ("modules, states, mask)", "modules, states, mask | 1)"),
        "Padding is only weighed less. Hide it.": ("* MASKED", "* -3"),
        "You hide the tokens and show the padding.":
            [("== 0", "!= 0"), ("padding_bias(attention_mask)", "padding_bias(1 - attention_mask)")],
        "Your mask has slipped by one place: the last token is hidden too.":
            ("padding_bias(attention_mask)", "padding_bias(attention_mask * attention_mask.roll(-1, 1))"),
        "The scores of your columns are divided by sqrt(k). As in T5, `scale=1.0` is right.": (", scale=1.0", ""),
    },
    also=[("padding_bias(attention_mask)", "padding_bias(attention_mask > 0)")],
)  # fmt: skip
def another_task_in_each_batch(t5, hypernet, hint):
    """An answer of HINT depends on the batch that its example is in. It should not.

    In the check, an example has a loss of 4.36 when it stands alone, and of 4.21 beside a longer instruction. The
    three functions encode an instruction, let the generator read it, and hide padding. One of them has a bug.
    """
    padded = torch.tensor([[5, 9, 7, 4, 1, 0, 0, 0, 0], [6, 3, 8, 8, 2, 11, 15, 13, 1]])
    inputs, labels = torch.tensor([[7, 12, 1], [9, 1, 0]]), torch.tensor([[8, 5, 1], [6, 1, -100]])
    columns = torch.randn(1, 6, 24)
    for fusion in (True, False):
        model, where = tiny_hint(hint, config={"fusion": fusion}).requires_grad_(False), f"fusion {fusion}"
        reader, states = model.hypernetwork.attention, model.t5.read(padded[:1, :5]).states
        wanted = torch.stack([read_by_heads(reader, column, states[0]) for column in columns[0]])[None]
        yield f"what the columns read of 5 tokens, {where}", reader(columns, states, torch.ones(1, 5)), wanted
        beside, alone = (model.encode_instruction(ids) for ids in (padded, padded[:1, :5]))
        yield f"mask that is kept, {where}", beside.attention_mask, (padded != 0).long()[:, : 9 * fusion]
        yield f"states that are kept, {where}", alone.states, states[:, : 5 * fusion]
        for row, (ids, *example) in enumerate(zip((padded[:1, :5], padded[1:]), inputs.split(1), labels.split(1))):
            task = hint.select_rows(beside, torch.tensor([row]))
            loss = model.t5.loss(example[1], model.fuse(task, example[0]), task.modules).loss
            yield f"loss of example {row + 1} beside another, {where}", loss, model(ids, *example).loss


@another_task_in_each_batch.facts
def _(hint):
    model = tiny_hint(hint).requires_grad_(False)
    padded = torch.tensor([[5, 9, 7, 4, 1, 0, 0, 0, 0], [6, 3, 8, 8, 2, 11, 15, 13, 1]])
    states, mask = model.t5.read(padded)
    losses, downs = [], []
    for seen in (mask, torch.ones_like(mask)):
        modules = model.hypernetwork(states, seen)
        task = hint.select_rows(hint.EncodedTask(modules, states, mask), torch.tensor([0]))
        sources = model.fuse(task, torch.tensor([[7, 12, 1]]))
        losses.append(model.t5.loss(torch.tensor([[8, 5, 1]]), sources, task.modules).loss.item())
        downs.append(modules.encoder[0].adapter.down[0])
    yield "loss alone", losses[0], "4.36"
    yield "loss beside a longer instruction", losses[1], "4.21"
    yield "how far W_down moves, percent", 100 * ((downs[1] - downs[0]).norm() / downs[0].norm()).item(), "71 %"


@exercise(
    "bug", ["t5.T5.decode_greedily", "t5.T5._with_caches", "t5.Cache.before"], level=3, minutes=30,
    paper="Raffel et al., section 2.1; HINT, section 3.1.1 (prefixes)",
    bug=("positions[..., unwritten:]", "positions[..., unwritten + 1 :]"),
    hint="Count the keys of the second step by hand: prefix, first token, second token. Which of them have a position?",
    why="With the bug the first token counts as part of the prefix. Without modules the check's answers go wrong from "
        "token 2 on, and 52 % of their tokens are wrong.",
    near={
        "Each step takes the biases of the first positions. Query t needs the last t + 1 columns.":
            ("positions[..., unwritten:]", "positions[..., : max_new_tokens - unwritten]"),
        "The biases are in the reverse order: the oldest token has that of the newest.":
            ("positions[..., unwritten:]", "positions[..., unwritten:].flip(-1)"),
        "Rows that have ended go on with other tokens. After </s> comes padding alone.":
            (".masked_fill(ended[:, None], PAD)", ""),
        "The cache has one place too few.": ("2, batch, heads, max_new_tokens", "2, batch, heads, max_new_tokens - 1"),
        "Rows are mixed up when others leave: an answer is written to a wrong row.":
            ("going, token, ended = going[rows], token[rows], ended[rows]",
             "going, token, ended = going[: len(rows)], token[rows], ended[rows]"),
    },
    also=[("positions[..., unwritten:]",
           "self.decoder.relative_bias(1, max_new_tokens - unwritten, max_new_tokens - unwritten - 1)")],
)  # fmt: skip
def drifting_answers(t5, hint):
    """Decoding with a cache gives other answers than decoding without a cache, but for plain T5's first token.

    The three functions are the loop of decoding, the making of the caches, and the writing into a cache. One of them
    has a bug. The cache may change the time that decoding takes, never its answers.
    """
    model, task, inputs = talkative_model(hint)
    for name, modules in (("without modules", None), ("with modules", task.modules)):
        sources = model.fuse(task, inputs)
        wanted = decoded_without_cache(model.t5, sources, modules, 8)
        found = model.t5.decode_greedily(sources, modules, 8)
        for token in range(8):
            yield f"token {token + 1} of every answer, {name}", found[:, token], wanted[:, token]
        yield f"answers of at most 3 tokens, {name}", model.t5.decode_greedily(sources, modules, 3), wanted[:, :3]
        ends = (wanted == 1).any(1).nonzero()[:, 0]
        found = model.t5.decode_greedily(t5.select_rows(sources, ends), modules, 8)
        longest = (wanted[ends] == 1).int().argmax(1).max() + 1
        yield f"answers of a batch whose rows all end, {name}", found, wanted[ends, :longest]


def talkative_model(hint):
    """A model whose answers have many different tokens and lengths, an encoded task, and six inputs."""
    model = tiny_hint(hint, vocab_size=13).requires_grad_(False)
    draw = torch.Generator().manual_seed(295)
    model.t5.lm_head.weight.data = torch.randn(13, 24, generator=draw)
    model.t5.decoder.relative_bias.weight.data = 3 * torch.randn(32, 3, generator=draw)
    inputs = torch.randint(2, 13, (6, 5), generator=draw)
    inputs[3, 2:] = 0
    return model, model.encode_instruction(torch.tensor([[5, 9, 7]])), inputs


def decoded_without_cache(model, sources, modules, length):
    """Choose each token by a new pass over all earlier tokens, until every row has ended."""
    ids = torch.zeros(len(sources[-1].states), 1, dtype=torch.long)  # the start token
    while ids.shape[1] <= length and not (ids == 1).any(1).all():
        chosen = model.logits(model.decode(ids, sources, modules)[:, -1]).argmax(-1)
        ids = torch.cat([ids, chosen.where((ids != 1).all(1), 0)[:, None]], 1)
    return ids[:, 1:]


@drifting_answers.facts
def _(hint):
    answers = []
    for module in (hint, with_the_bug(drifting_answers, "hint")):
        model, task, inputs = talkative_model(module)
        answers.append(model.t5.decode_greedily(model.fuse(task, inputs), None, 8))
    yield "wrong tokens without modules, percent", 100 * (answers[0] != answers[1]).float().mean().item(), "52 %"
    yield "first wrong token", (answers[0] != answers[1]).any(0).nonzero()[0].item() + 1, "token 2"


# Parts of the prompts in the next two checks.
FIRST = "Positive Example 1 - Input : pear oslo saw . Output : pear ."  # 14 tokens
SECOND = "Positive Example 2 - Input : lemon . Output : lemon saw ."  # 13 tokens
DEFINITION = "Definition : give the fruit ."  # 6 tokens


def task_with_examples(data):
    """Make the toy tokenizer, a task with two examples, and a function from instruction and input ids to words."""
    tokenizer = data.toy_tokenizer()
    examples = data.Example("pear oslo saw", "pear"), data.Example("lemon", "lemon saw")
    task = data.Task("", "give the fruit.", examples, (data.Instance("", "plum paris judo golf", ("plum",)),))
    return tokenizer, task, lambda pair: [" ".join(map(tokenizer.id_to_token, ids)) for ids in pair]


@exercise(
    "bug", ["data.cut", "data.HINTFormat.instruction", "data.HINTFormat.instruction_ids"], level=2, minutes=15,
    paper="HINT, section 4 (texts cut to 1,024 tokens; the authors' code has this bug)",
    bug=("[*ids[: max_length - 1], EOS]", "ids[:max_length]"),
    hint="What is the last token of every text that T5 has seen in its training?",
    why="T5 has learned that a text ends with </s>. Another word in its place moves the states of the other tokens by "
        "36 % of their size, in a fresh tiny T5.",
    near={
        "A text that is cut has one token too many.": ("[*ids[: max_length - 1], EOS]", "[*ids[:max_length], EOS]"),
        "A text that fits has lost a token, or has two </s>.":
            ("ids if len(ids) <= max_length else [*ids[: max_length - 1], EOS]", "[*ids[: max_length - 1], EOS]"),
        "The beginning of the text is lost, not its end.": ("[*ids[: max_length - 1], EOS]", "ids[-max_length:]"),
        "An example too many is shown, and the definition is cut.": ("<= self.max_ins", "<= 1 + self.max_ins"),
        "An example that fits exactly is left out.": ("<= self.max_ins", "< self.max_ins"),
        "Examples stand after the definition. They stand before it.":
            ("_example(number, example) + text", "text + _example(number, example)"),
    },
    also=[("[*ids[: max_length - 1], EOS]", "ids[: max_length - 1] + ids[-1:]")],
)  # fmt: skip
def unfinished(data):
    """A model gives poor answers to tasks with long texts only.

    The ids of such texts do not end as those of short texts do. The functions cut ids, and write HINT's instruction.
    """
    for limit, wanted in ((6, [5, 6, 7, 8, 1]), (5, [5, 6, 7, 8, 1]), (4, [5, 6, 7, 1]), (2, [5, 1]), (1, [1])):
        yield f"five ids cut to {limit}", data.cut([5, 6, 7, 8, 1], limit), wanted
    tokenizer, task, words = task_with_examples(data)
    for limit, wanted in (
        (34, f"{SECOND} {FIRST} {DEFINITION} </s>"), (33, f"{FIRST} {DEFINITION} </s>"), (7, f"{DEFINITION} </s>"),
        (21, f"{FIRST} {DEFINITION} </s>"), (20, f"{SECOND} {DEFINITION} </s>"), (5, "Definition : give the </s>"),
    ):  # fmt: skip
        found = words(data.HINTFormat(tokenizer, 2, limit, 3)(task)[0])
        yield f"an instruction of at most {limit} tokens, an input of 3", found, [wanted, "plum paris </s>"]
    yield "a definition cut to 4", words(data.HINTFormat(tokenizer, 0, 4)(task)[0])[0], "give the fruit </s>"
    found = words(data.HINTFormat(tokenizer, 2, 7)(replace(task, prompted=True))[0])[0]
    yield "a data set with examples that do not fit", found, f"{DEFINITION} </s>"
    with suppress(data.InputError):
        yield "no examples to show", data.HINTFormat(tokenizer, 2)(replace(task, prompted=True, examples=())), "refused"


@unfinished.facts
def _(t5):
    torch.manual_seed(0)
    model = t5.T5(t5.SIZES["tiny"]).eval().requires_grad_(False)
    ids = torch.randint(2, 50, (64, 8))
    states = model.read(F.pad(ids[:, :7], (0, 1), value=t5.EOS)).states[:, :7]
    moved = model.read(ids).states[:, :7] - states
    yield "how far the states move, percent", 100 * (moved.norm() / states.norm()).item(), "36 %"


@exercise(
    "bug", ["data.TkInstructFormat.prompt", "data.TkInstructFormat.__call__"], level=2, minutes=15,
    paper="HINT, section 4 (texts cut to 1,024 tokens; the published code of Tk-Instruct has this bug)",
    bug=("ids = self.tokenizer.encode(before).ids[:-1][: self.max_input - len(ids)] + ids",
         "ids = cut(self.tokenizer.encode(before + query).ids, self.max_input)"),
    hint="Which part of the prompt can the model least do without, and where does it stand?",
    why="Cut on the right, a long prompt first loses `Output:`, then the words of the instance: nothing is asked.",
    near={
        "The text before the query is lost where a part of it has room.":
            ("self.tokenizer.encode(before).ids[:-1][: self.max_input - len(ids)] + ids", "ids"),
        "You keep the end of the text before the query. Keep its beginning.":
            ("encode(before).ids[:-1][: self.max_input - len(ids)]",
             "encode(before).ids[:-1][len(self.tokenizer.encode(before).ids) - 1 - self.max_input + len(ids) :]"),
        "`Output:` is lost where the query alone is too long.":
            ("question[:-1][: self.max_input - len(output)] + output", "cut(question[:-1] + output, self.max_input)"),
        "A </s> stands inside the prompt, before `Output:`.": ("question[:-1]", "question"),
        "An example too many is shown, and the text before the query is cut.":
            ("> self.max_input:\n                break", "> self.max_input + 1:\n                break"),
    },
)  # fmt: skip
def lost_query(data):
    """Tk-Instruct gives poor answers to tasks with long definitions only. Some answer no question at all.

    Its prompt is the definition, examples, and the query: the instance and `Output:`. Examples that do not fit are left
    out. Then the text before the query is cut at its end, and last of all the instance. One of the methods has a bug.
    """
    tokenizer, task, words = task_with_examples(data)
    query = "Now complete the following example - Input : plum paris judo golf ."  # 13 tokens
    for limit, wanted in (
        (49, f"{DEFINITION} {FIRST} {SECOND} {query} Output : </s>"), (22, f"{DEFINITION} {query} Output : </s>"),
        (48, f"{DEFINITION} {FIRST} {query} Output : </s>"), (19, f"Definition : give {query} Output : </s>"),
        (16, f"{query} Output : </s>"), (12, "Now complete the following example - Input : plum Output : </s>"),
    ):  # fmt: skip
        found = words(data.TkInstructFormat(tokenizer, 2, max_input=limit)(task)[0])
        yield f"a prompt of at most {limit} tokens", found, ["</s>", wanted]
    with suppress(data.InputError):
        yield "a data set of prompts", data.TkInstructFormat(tokenizer)(replace(task, prompted=True)), "refused"


@exercise(
    "bug", ["data.Shuffled.__init__", "data.Shuffled.take"], level=2, minutes=20,
    paper="HINT, section 3.3 (mixed-task batches); a run that is stopped and resumed",
    bug=("{self.seed}/{epoch}", "{self.seed}/{self._epoch + 1}"),
    hint="Write down what a new object knows that is made at position 17. Which order does it draw first?",
    why="Of 1,000 examples, a run that is resumed in the middle of its second epoch sees 236 twice, and 236 never.",
    near={
        "Every epoch has the same order.": ("{self.seed}/{epoch}", "{self.seed}"),
        "The order does not depend on the seed.": ("{self.seed}/{epoch}", "{epoch}"),
        "Groups are torn apart: examples are shuffled, not groups.":
            ("list(chain(*groups))", 'random.Random(f"{self.seed}/{epoch}").sample(range(size), size)'),
        "Some examples come twice in an epoch, and some never: groups are drawn with replacement.":
            ("list(chain(*groups))", 'list(chain(*random.Random(f"{self.seed}/{epoch}").choices(groups, k=size)))'),
        "The last group, which is shorter, never comes.":
            ("list(chain(*groups))", "2 * list(chain(*(run for run in groups if len(run) == self.group)))"),
        "The position stands still, so that every call takes the same examples.": ("self.position += count", "pass"),
    },
    also=[('random.Random(f"{self.seed}/{epoch}")', "random.Random(1000 * self.seed + epoch)")],
)  # fmt: skip
def twice_and_never(data):
    """A run was stopped and resumed. Since then some examples of the epoch have come twice, and others never.

    `Shuffled` draws a new order each epoch. A resumed run is given its `position` alone. One of the methods has a bug.
    """
    everything, instance = list(range(17)), data.Instance("", "", ("",))
    tasks = [data.Task("a", "", (), (instance,) * 5), data.Task("b", "", (), (instance,) * 12)]
    for group, named, names in ((1, (), [f"example {i}" for i in everything]), (3, tasks, ["a"] * 5 + ["b"] * 12)):
        source = data.Shuffled(everything, 5, 0, group, named)
        first, whole, name = source.names, source.take(51), f"in groups of {group}"
        yield f"names of the examples taken last, {name}", (first, source.names), ([], [names[i] for i in whole])
        epochs = [whole[start : start + 17] for start in (0, 17, 34)]
        yield f"all examples of each epoch, sorted, {name}", [sorted(epoch) for epoch in epochs], [everything] * 3
        orders = [*epochs, everything, data.Shuffled(everything, 6, 0, group).take(17)]
        yield f"different orders: 3 epochs, not shuffled, another seed, {name}", len(set(map(tuple, orders))), 5
        torn = [i for order in epochs for i in everything if i % group and order[order.index(i) - 1] != i - 1]
        yield f"examples that do not follow the one before in their group, {name}", torn, []
        for position in (0, 3, 17, 20, 40):
            source = data.Shuffled(everything, 5, position, group)
            found = source.take(5) + source.take(46 - position)
            yield f"resumed at position {position}, {name}", (found, source.position), (whole[position:], 51)


@twice_and_never.facts
def _(data):
    seen = data.Shuffled(range(1000), 0).take(1500)[1000:]
    rest = with_the_bug(twice_and_never, "data").Shuffled(range(1000), 0, position=1500).take(500)
    yield "examples that come twice", len(set(seen) & set(rest)), "236"


@exercise(
    "bug", ["t5.Attention.__init__", "t5.attend", "t5.FeedForward.forward"], level=1, minutes=20,
    paper="Raffel et al., section 2.1 (dropout)",
    bug=("self.wo(self.dropout(hidden))", "self.wo(F.dropout(hidden, self.dropout.p))"),
    hint="A module knows whether it trains: eval() switches every nn.Dropout off. What does F.dropout know?",
    why="With the bug, states of a fresh tiny T5 in eval mode differ by 34 % of their size from one call to the next.",
    near={
        "The feed-forward layer drops nothing, not even in training.": ("self.dropout(hidden)", "hidden"),
        "Dropout falls on the hidden units and again on the output of the feed-forward layer.":
            ("self.wo(self.dropout(hidden))", "self.dropout(self.wo(self.dropout(hidden)))"),
        "Dropout falls on scores, before the softmax.": ("dropout(scores.softmax(", "(dropout(scores).softmax("),
        "The attention's rate is 0.1, whatever the config says.": ("Dropout(config.dropout_rate)", "Dropout(0.1)"),
    },
    also=[("self.wo(self.dropout(hidden))", "self.wo(F.dropout(hidden, self.dropout.p, self.training))")],
)  # fmt: skip
def two_answers(t5):
    """A trained model gives two different answers to one question, although it is in eval mode.

    One of the three functions has a bug. In training, weights after the softmax and hidden units must still be dropped.
    """
    config = t5.T5Config(d_model=24, d_kv=5, d_ff=24, num_heads=3, dropout_rate=0.25)
    x, layer = torch.randn(40, 50, 24), t5.FeedForward(config).eval().requires_grad_(False)
    layer.wo.weight.copy_(torch.linalg.qr(torch.randn(24, 24))[0])  # orthogonal: its transpose undoes the product
    hidden = torch.nn.functional.gelu(layer.wi_0(x), approximate="tanh") * layer.wi_1(x)
    yield "two calls of the feed-forward layer in eval mode", (layer(x), layer(x)), 2 * (hidden @ layer.wo.weight.T,)
    units = layer.train()(x) @ layer.wo.weight
    dropped = units.abs() < 1e-4 * hidden.abs().max()
    yield "hidden units dropped in training, in steps of 5 percent", round(20 * dropped.float().mean().item()) * 5, 25
    yield "hidden units that stay in training", torch.where(dropped, 0, units), torch.where(dropped, 0, hidden / 0.75)
    old, attention = t5.FeedForward(replace(config, feed_forward_proj="relu")).eval(), t5.Attention(config)
    yield "feed-forward layer of T5 v1.0 in eval mode", old(x), old.wo(old.wi(x).relu())
    found = attention(x, [attention.project(x)], torch.zeros(1, 1, 1, 50)).shape, attention.dropout.p
    yield "shape that an attention returns, and its rate of dropout", found, ((40, 50, 24), 0.25)
    yield "its parameters", sorted(name for name, _ in attention.named_parameters()), [f"{i}.weight" for i in "koqv"]
    query, (key, value) = torch.randn(2, 3, 4, 5), torch.randn(2, 2, 3, 5, 5)
    keep, bias = (torch.rand(2, 3, 4, 5) < 0.7).float(), torch.randn(1, 3, 4, 4)
    wanted = ((query @ key.mT + torch.cat([torch.zeros(1, 3, 4, 1), bias], -1)).softmax(-1) * keep) @ value
    for lengths in ([5], [2, 3], [4, 1]):
        parts = [t5.KeyValue(*pair) for pair in zip(key.split(lengths, 2), value.split(lengths, 2))]
        yield f"parts of {lengths} keys, with a given dropout", t5.attend(query, parts, bias, keep.mul), wanted


@two_answers.facts
def _(t5):
    torch.manual_seed(0)
    model = with_the_bug(two_answers, "t5").T5(t5.SIZES["tiny"]).eval().requires_grad_(False)
    ids = torch.randint(2, 50, (8, 16))
    first, second = (model.read(ids).states for _ in range(2))
    yield "how far the states move, percent", 100 * ((first - second).norm() / first.norm()).item(), "34 %"
