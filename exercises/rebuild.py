"""Rebuild a function: its body is cut out, its signature and docstring stay, and you write it anew."""

import itertools
import json
import math
import random

import torch

from mechanics import copied, exercise
from small import tiny_hint, tiny_t5

BASE = dict(d_model=768, d_ff=2048, num_layers=12, num_decoder_layers=12, num_heads=12)  # T5 v1.1 base


@exercise(
    "rebuild", ["t5.Adapter.__call__"], level=1, minutes=10, paper="HINT, equation (1)",
    hint="Two products and an activation between them. The block adds the residual, so the adapter does not.",
    why="The numbers generated for one instruction, p, are 4 % of the N parameters of T5 XL, and new for each task.",
    near={
        "You add u to the result. The block has that residual already.": ("view_as(u)", "view_as(u) + u"),
        "Your activation is relu. Equation (1) has gelu.": ('F.gelu(hidden, approximate="tanh")', "F.relu(hidden)"),
        "Your first bias is added after the activation. It belongs inside.":
            (" + self.down_bias", "", '"tanh")', '"tanh").add(self.down_bias)'),
        "Your gelu is the exact one. T5 uses its tanh approximation.": ('(hidden, approximate="tanh")', "(hidden)"),
        "Your second bias is missing.": (" + self.up_bias", ""),
        "Both biases are missing.": (" + self.down_bias", "", " + self.up_bias", ""),
        "All rows get the first adapter. In a mixed batch each task has its own.":
            ("x = u", "self = Adapter(*(part[:1] for part in self))\n        x = u"),
        "Rows get the adapters in turn. The rows of a task stand side by side.":
            ("x = u", "self = Adapter(*(part.repeat(len(u) // len(part), 1, 1) for part in self))\n        x = u"),
        "There is no activation between your two products.": ('F.gelu(hidden, approximate="tanh")', "hidden"),
        "You change u itself. The feed-forward layer beside the adapter reads u too.": ("return (", "return x.copy_("),
    },
    also=[("x = u", "self = Adapter(*(part.repeat_interleave(len(u) // len(part), 0) for part in self))\n        x = u",
           'F.gelu(hidden, approximate="tanh")', "nn.GELU('tanh')(hidden)")],
)  # fmt: skip
def adapter(t5):
    """Write the adapter, a bottleneck beside the feed-forward layer: gelu(u W_down + b_down) W_up + b_up.

    The weights are those of U tasks. U divides the number of rows: the first task serves the first rows, and so on.
    """
    for batch in (4, 2, 1):
        u, wanted = torch.randn(4, 5, 6), torch.zeros(4, 5, 6)
        down, down_bias = torch.randn(batch, 6, 3), torch.randn(batch, 1, 3)
        up, up_bias = torch.randn(batch, 3, 6), torch.randn(batch, 1, 6)
        for row, place in itertools.product(range(4), range(5)):
            task = row * batch // 4
            hidden = [u[row, place] @ down[task, :, j] + down_bias[task, 0, j] for j in range(3)]
            gelu = [0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) for x in hidden]
            wanted[row, place] = up_bias[task, 0] + sum(gelu[j] * up[task, j] for j in range(3))
        before = u.clone()
        found = t5.Adapter(down, down_bias, up, up_bias)(u)
        yield f"adapters of {batch} tasks for four rows", found, wanted
        yield f"u after the call, adapters of {batch} tasks", u, before


@adapter.facts
def _(hint):
    config = hint.T5Config(d_model=2048, d_ff=5120, num_layers=24, num_decoder_layers=24, num_heads=32)
    model = hint.on_meta(config, hint.HINTConfig())
    size = sum(parameter.numel() for parameter in model.t5.parameters())
    kinds = model.hypernetwork.kinds.values()
    generated = sum(kind.slots * kind.columns * kind.width for kind in kinds)
    yield "p / N at XL, percent", 100 * generated / size, "4 %"


@exercise(
    "rebuild", ["t5.attend"], level=2, minutes=25, paper="Raffel et al., section 2.1; HINT, section 3.1.1",
    hint="Join the scores of all parts before the softmax, and cut the weights again after it.",
    why="A fresh score has a standard deviation of 1.0, because W_q starts small. Divided by sqrt(64), it has 0.12.",
    near={
        "You divide the scores by sqrt(k). T5 does not.": ("scores + bias", "scores / query.shape[-1] ** 0.5 + bias"),
        "You take a softmax for each part. One softmax runs over the keys of all parts.":
            ("zip(pieces, parts)", "zip([dropout(x.softmax(-1)) for x in scores.split(lengths, -1)], parts)"),
        "Your softmax runs over the queries, not over the keys.": ("dim=-1).type_as", "dim=-2).type_as"),
        "The bias is not added.": ("scores = scores + bias", "scores = scores"),
        "You add the bias to the weights. It belongs to the scores, before the softmax.":
            ("scores = scores + bias", "", "dropout(scores.softmax(dim=-1)", "dropout((scores.softmax(dim=-1) + bias)"),
        "You drop scores. Dropout is for the weights, after the softmax.":
            ("dropout(scores.softmax(dim=-1).type_as(query))", "dropout(scores).softmax(dim=-1).type_as(query)"),
        "Dropout is not called.":
            ("dropout(scores.softmax(dim=-1).type_as(query))", "scores.softmax(dim=-1).type_as(query)"),
        "The weights of one part meet the values of another.": ("zip(pieces, parts)", "zip(pieces, parts[::-1])"),
        "The prefix stands at the end of your bias. It is the first P keys.": ("(prefix, 0)", "(0, prefix)"),
        "Your prefix is hidden. Its bias is zero.": ("pad(bias, (prefix, 0))", "pad(bias, (prefix, 0), value=MASKED)"),
        "Your prefix has the bias of the first token. It has no position, so its bias is zero.":
            ("F.pad(bias, (prefix, 0))", "torch.cat([bias[..., :1].expand(*bias.shape[:-1], prefix), bias], -1)"),
    },
    also=[("scores = scores + bias", "scores[..., prefix:] += bias", "bias = F.pad(bias, (prefix, 0))", "pass")],
)  # fmt: skip
def attention(t5):
    """Write the attention of T5, over the keys and values of several parts (a prefix, an instruction, an input).

    Each part is a `KeyValue(key, value)`; one of batch 1 serves all rows. The scores are not divided by sqrt(k).
    The bias is for the last keys. The P keys in front of these are a prefix, whose bias is zero.
    `dropout` is a function of the weights. In the check it is a square, so that its place shows.
    """
    for sizes in ([(2, 5)], [(2, 3), (2, 3)], [(1, 2), (2, 4), (2, 1)]):  # batch and length of each part
        query = torch.randn(2, 2, 4, 3)
        parts = [t5.KeyValue(*torch.randn(2, batch, 2, length, 3)) for batch, length in sizes]
        for prefix in (0, 2):
            bias = torch.randn(2, 2, 4, sum(length for _, length in sizes) - prefix)
            wanted = attention_by_loop(query, parts, bias, prefix)
            yield f"{len(parts)} parts, {prefix} keys of a prefix", t5.attend(query, parts, bias, torch.square), wanted
    query, parts = query.bfloat16(), [t5.KeyValue(*(x.bfloat16() for x in part)) for part in parts]
    yield "queries, keys and values in bf16", t5.attend(query, parts, bias, torch.square), wanted.bfloat16(), 3e-2


def attention_by_loop(query, parts, bias, prefix):
    """Attention with squares for dropout, a query of a head and row at a time."""
    wanted = torch.zeros_like(query)
    for b, h, t in itertools.product(*map(range, query.shape[:3])):
        keys, values = ([pair for part in parts for pair in part[i][b % len(part[i]), h]] for i in (0, 1))
        scores = [sum(query[b, h, t] * key) for key in keys]
        powers = [math.exp(s + (bias[b, h, t, i - prefix] if i >= prefix else 0)) for i, s in enumerate(scores)]
        wanted[b, h, t] = sum((p / sum(powers)) ** 2 * value for p, value in zip(powers, values))
    return wanted


@attention.facts
def _(t5):
    layer = t5.T5(t5.T5Config(vocab_size=8, num_layers=1, num_decoder_layers=1)).encoder.blocks[0].self_attention
    x = torch.randn(1, 500, 512)
    scores = layer.split(layer.q(x)) @ layer.project(x).key.mT
    yield "standard deviation of a fresh score", scores.std(), "1.0"
    yield "the same, divided by sqrt(k)", scores.std() / 8, "0.12"


@exercise(
    "rebuild", ["t5.KeyValue.before", "t5.Block.read"], level=1, minutes=15, paper="HINT, section 3.1.1 (prefixes)",
    hint="A prefix stands in front. It is not projected: it is generated as keys and values.",
    why="With the first token's bias in place of zero, the encoded states of a tiny model move by 0.15 of their size.",
    near={
        "Your prefix stands after the tokens. It stands before them.": (".type_as(x), x]", ".type_as(x), x][::-1]"),
        "Keys and values of the prefix have changed places.": ("zip(self, new)", "zip(self[::-1], new)"),
        "Only the keys get a prefix. The values need one too.": ("zip(self, new)))", "zip(self[:1], new)), new.value)"),
        "Every row gets the prefix of the first row.": ("p.expand(batch", "p[:1].expand(batch"),
        "Your cross-prefix comes last.": ("*modules.cross_prefix, *projected", "*projected, *modules.cross_prefix"),
        "You join the cross-prefix to each source. Its pairs are parts of their own, in front of the sources.":
            ("*modules.cross_prefix, *projected", "*(modules.cross_prefix[0].before(pair) for pair in projected),"),
        "Your first item is the tuple of cross-prefixes. Each of its pairs is an item.": ("(*modules", "(modules"),
    },
    also=[("torch.cat([p.expand(batch, -1, -1, -1).type_as(x), x], dim=2)",
           "torch.cat([p.to(x.dtype).repeat(batch // len(p), 1, 1, 1), x], dim=-2)")],
)  # fmt: skip
def prefix(t5):
    """Put a generated prefix in front of the keys and values of tokens, and list what a cross-attention reads.

    `before`: joined along the axis of places. A prefix of batch 1 serves all rows; the result has the tokens' type.
    `read`: a tuple, first the pairs of `modules.cross_prefix`, then one pair for each source:
    `self.cross_attention.project(states, lora)` makes it of `source.states`; this layer's LoRA is `modules.cross_lora`.
    """
    for batch, dtype in ((3, torch.float32), (1, torch.float32), (3, torch.bfloat16)):
        own, new = torch.randn(2, batch, 2, 4, 5), torch.randn(2, 3, 2, 4, 5).to(dtype)
        wanted = torch.zeros(2, 3, 2, 8, 5, dtype=dtype)
        for row, place in itertools.product(range(3), range(4)):
            wanted[:, row, :, place] = own[:, row % batch, :, place]
            wanted[:, row, :, 4 + place] = new[:, row, :, place]
        found = t5.KeyValue(*own).before(t5.KeyValue(*new))
        yield f"a prefix of batch {batch} before three rows of {dtype}", (found.key, found.value), tuple(wanted)
    block = tiny_t5(t5).decoder.blocks[1]
    lora, other = (t5.LoRA(*(torch.randn(1, *shape) for shape in 2 * [(24, 2), (2, 30)])) for _ in range(2))
    sources = [t5.Source(torch.randn(1, length, 24), torch.ones(1, length)) for length in (3, 2)]
    pairs = (t5.KeyValue(*torch.randn(2, 1, 3, 6, 10)),)
    wanted = [*pairs, *(projected_by_hand(block.cross_attention, states[0], lora) for states, _ in sources)]
    found = block.read(sources, t5.LayerModules(cross_prefix=pairs, cross_lora=lora, lora=other))
    yield "what a cross-attention reads", found, copied(wanted)
    yield "the same without modules", len(block.read(sources, t5.LayerModules())), 2


def projected_by_hand(attention, states, lora):
    """Keys and values of one row of states, a head of 10 numbers at a time. LoRA changes the values, not the keys."""
    key = states @ attention.k.weight.T
    value = states @ attention.v.weight.T + states @ lora.value_down[0] @ lora.value_up[0]
    return [torch.stack([x[:, 10 * h : 10 * h + 10] for h in range(3)])[None] for x in (key, value)]


@prefix.facts
def _(t5):
    model, ids = tiny_t5(t5), torch.randint(3, 53, (4, 12))
    layers = [t5.LayerModules(prefix=t5.KeyValue(*torch.randn(2, 1, 3, 4, 10))) for _ in range(2)]
    states, attend = model.read(ids, None, t5.Modules(tuple(layers), ())).states, t5.attend

    def with_first_bias(query, parts, bias, dropout):
        first = bias[..., :1].expand(*bias.shape[:-1], 4)
        return attend(query, parts, torch.cat([first, bias], dim=-1), dropout)

    t5.attend = with_first_bias
    moved = model.read(ids, None, t5.Modules(tuple(layers), ())).states
    yield "change of the states, relative to their size", (moved - states).norm() / states.norm(), "0.15"


@exercise(
    "rebuild", ["hypernet.ColumnGenerator.weights"], level=3, minutes=40,
    paper="HINT, section 3.1.1 (parameter generators)",
    hint="Join the embeddings in the order of `self.kinds`, attend once, split in that order, then call the networks.",
    why="At T5 base 26,784 embeddings become as many columns. "
        "The loss hardly shows if these are not divided: at step 400 of the demo it is 0.32, not 0.31 (one seed).",
    near={
        "Your columns are not divided by sqrt(d): multiply by `self.scale`.": (" * self.scale", ""),
        "Slots and columns have changed places.": ("(kind.slots, kind.columns)", "(kind.columns, kind.slots)"),
        "Padding is read. Hand the mask to the attention.": ("attention_mask, rec", "attention_mask * 0 + 1, rec"),
        "You add the embeddings to what the attention returns.": ("z = recomputable(", "z = z + recomputable("),
        "Nobody reads the instruction: Z is C itself.": ("if self.attention is None:", "if True:"),
        "All examples get the weights of the first instruction.":
            ("pieces = z.split", "pieces = z[:1].expand(len(states), -1, -1).split"),
        "The embeddings of one kind are used for another: join and split in the same order.":
            ("for name in self.kinds]).unsq", "for name in reversed(self.kinds)]).unsq"),
    },
    also=[(".unflatten(1, (kind.slots, kind.columns))", ".reshape(len(states), *kind)")],
)  # fmt: skip
def columns(hint):
    """Generate all columns: embeddings C -> attention to the instruction -> Z -> a network for each kind of weight.

    `self.kinds[name]` has slots, columns and width; `self.embeddings[name]` [slots * columns, d];
    `self.attention(C [1, N, d], states, attention_mask)` gives Z [B, N, d], or `self.attention` is None and Z is C;
    `self.networks[name]` makes columns of Z. All values are divided by sqrt(d): `self.scale`.
    The result is a dictionary: name -> [B, slots, columns, width].
    """
    states, mask = torch.randn(2, 5, 24), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    for reads in (True, False):
        generator = tiny_hint(hint, {"generator": "columns" if reads else "direct", "fusion": reads}).hypernetwork
        found = generator.weights(states, mask)
        for name, kind in generator.kinds.items():
            wanted = torch.zeros(2, *kind)
            first, last = generator.networks[name][0].weight, generator.networks[name][-1].weight
            for b, slot, column in itertools.product(range(2), range(kind.slots), range(kind.columns)):
                z = generator.embeddings[name][slot * kind.columns + column]
                z = read_by_heads(generator.attention, z, states[b, : int(mask[b].sum())]) if reads else z
                hidden = torch.nn.functional.gelu(first @ z, approximate="tanh")
                wanted[b, slot, column] = last @ hidden / math.sqrt(24)
            yield f"columns of {name}, where C reads the instruction: {reads}", found.get(name), wanted.detach()


def read_by_heads(reader, column, states):
    """Let one column read the states of an instruction without padding, a head of 10 numbers at a time."""
    heads = []
    for head in (slice(0, 10), slice(10, 20), slice(20, 30)):
        scores = (states @ reader.k.weight[head].T) @ (reader.q.weight[head] @ column)
        heads.append((states @ reader.v.weight[head].T).T @ scores.softmax(0))
    return reader.o.weight @ torch.cat(heads)


@columns.facts
def _(hint, runs):
    kinds = hint.on_meta(hint.T5Config(**BASE), hint.HINTConfig()).hypernetwork.kinds.values()
    yield "columns at base", sum(kind.slots * kind.columns for kind in kinds), "26,784"
    yield "loss of the demo at step 400", last_loss(runs, "columns-own-400"), "0.31"
    yield "the same, not divided by sqrt(d)", last_loss(runs, "columns-1-400"), "0.32"


def last_loss(runs, name):
    """Loss at the end of a run of `python exercises run`."""
    log = (runs / "exercises" / name / "log.jsonl").read_text("utf-8")
    return json.loads(log.splitlines()[-1])["loss"]


@exercise(
    "rebuild", ["hypernet.Generator.layer"], level=2, minutes=20, paper="HINT, section 3.1.1 (scaling down parameters)",
    hint="What embedding j wrote is column j of W_down and row j of W_up. A matrix turned is not a matrix reshaped.",
    why="Training hardly tells: with W_down reshaped, the demo's loss at step 400 is 0.32, not 0.31 (one seed).",
    near={
        "You reshape W_down, as the authors' code does: an embedding then fills several rows. Turn it (`.mT`).":
            ("[layer].mT, weights", "[layer], weights", "Adapter(down,", "Adapter(down.reshape_as(down.mT),"),
        "You turn W_up in place of W_down. Vector j is row j of W_up and column j of W_down.":
            ("[layer].mT, weights[\"adapter_up\"][layer]", "[layer], weights[\"adapter_up\"][layer].mT"),
        "In your prefix, heads and their numbers have changed places: a head is k neighbours of a vector.":
            ("(self.heads, -1)).transpose(1, 2)", "(-1, self.heads)).permute(0, 3, 1, 2)"),
        "You reshape a prefix to [B, h, P, k] without exchanging axes: heads get numbers of other places.":
            (".unflatten(-1, (self.heads, -1)).transpose(1, 2)", ".reshape(len(part), self.heads, part.shape[1], -1)"),
        "The biases are exchanged.": ("down_bias", "up_bias", 'up, weights["adapter_up', 'up, weights["adapter_down'),
        "You take adapters by the number of the attention. They are numbered by layer.":
            ("prefixes, loras = None, [], []", "prefixes, loras, layer = None, [], [], attentions[0]"),
        "You change the generated columns themselves: who reads them next finds other numbers.":
            ("query_up * self.lora_scale", "query_up.mul_(self.lora_scale)"),
        "There is no cross-prefix.": ("tuple(prefixes[1:])", "()"),
    },
    also=[("part.unflatten(-1, (self.heads, -1)).transpose(1, 2)", "torch.stack(part.chunk(self.heads, -1), dim=1)")],
)  # fmt: skip
def hand_over(hint, hypernet):
    """Return LayerModules(adapter, prefix, cross_prefix, lora, cross_lora) of one layer, for T5 to read.

    `weights[name][number]` [B, columns, width] holds one generated vector a row. Names are prefix_key, prefix_value,
    and each field of Adapter or LoRA after adapter_ or lora_: adapter_down. Adapters are numbered by layer, the others
    by attention: `attentions` names the self-attention, then, in a decoder, the cross-attention. Every `down` becomes
    [B, d, r]. An `up` stays [B, r, ...]; that of LoRA is multiplied by `self.lora_scale`. Keys and values become
    [B, self.heads, P, k]. The cross-prefix is a tuple of pairs. A part without weights is None, or () for this tuple.
    """
    for chosen in ("adapters", "prefixes", "adapters+prefixes", "lora"):
        generator = tiny_hint(hint, {"modules": chosen}).hypernetwork
        weights = {name: torch.randn(8, 2, kind.columns, kind.width) for name, kind in generator.kinds.items()}
        for layer, attentions in ((1, [1]), (3, [4, 5])):
            before, wanted = copied(list(weights.values())), layer_by_hand(weights, layer, attentions)
            found = generator.layer(weights, layer, attentions)
            for name, part, right in zip(hypernet.LayerModules._fields, found, wanted):
                yield f"{name} of layer {layer}, of attentions {attentions}, with {chosen}", part, right
            yield f"columns after the call, with {chosen}", tuple(weights.values()), before


def layer_by_hand(weights, layer, attentions):
    """Parts of LayerModules, a column and a head of 10 numbers at a time."""

    def turned(x):
        return torch.stack([x[:, column] for column in range(x.shape[1])], dim=2)

    def heads(x):
        return torch.stack([x[:, :, 10 * h : 10 * h + 10] for h in range(3)], dim=1)

    adapter, pairs, loras = None, [None], [None, None]
    if "adapter_down" in weights:
        down, *others = (weights[f"adapter_{name}"][layer] for name in ("down", "down_bias", "up", "up_bias"))
        adapter = (turned(down), *others)
    if "prefix_key" in weights:
        pairs = [tuple(heads(weights[f"prefix_{name}"][slot]) for name in ("key", "value")) for slot in attentions]
    for place, slot in enumerate(attentions if "lora_query_down" in weights else ()):
        lora = [weights[f"lora_{name}"][slot] for name in ("query_down", "query_up", "value_down", "value_up")]
        loras[place] = (turned(lora[0]), lora[1] / 5, turned(lora[2]), lora[3] / 5)
    return copied((adapter, pairs[0], tuple(pairs[1:]), *loras))


@hand_over.facts
def _(runs):
    yield "loss of the demo at step 400", last_loss(runs, "columns-own-400"), "0.31"
    yield "the same, W_down reshaped", last_loss(runs, "hand-over-1-400"), "0.32"


@exercise(
    "rebuild", ["hint.HINT.fuse"], level=1, minutes=10, paper="HINT, section 3.1 (instruction fusion)",
    hint="A list of two sources: `Source(task.states, task.attention_mask)`, and what `self.t5.read` returns.",
    why="Joined to one source, as in the paper, the answers are the same. But 16 inputs then project the same "
        "instruction 16 times, for 1.2 times the FLOPs: instructions of 128 tokens, inputs of 64, answers of 16, two "
        "layers of base's width.",
    near={
        "The input is encoded without the generated modules.": ("attention_mask, task.modules", "attention_mask"),
        "The input stands before the instruction in your list. The instruction comes first.":
            ("[Source(task.states, task.attention_mask), source]",
             "[source, Source(task.states, task.attention_mask)]"),
        "The decoder reads the input twice, and the instruction never.":
            ("[Source(task.states, task.attention_mask), source]", "[source, source]"),
        "The padding of instructions is read. Hand on the instruction's mask.":
            ("states, task.attention_mask)", "states, torch.ones_like(task.attention_mask))"),
        "The mask that was given is not used.": ("input_ids, attention_mask, task", "input_ids, None, task"),
        "The input is not read, only the instruction.": ("task.attention_mask), source]", "task.attention_mask)]"),
    },
    also=[("hint.HINT.fuse", """
        source = self.t5.read(input_ids, attention_mask, task.modules)
        told = [part.expand(len(input_ids), *part.shape[1:]) for part in task[1:]]
        return [Source(*(torch.cat(pair, dim=1) for pair in zip(told, source)))]
    """)],
)  # fmt: skip
def fusion(hint):
    """Write instruction fusion: the decoder reads the instruction's states and the input's.

    `task` has modules, states and attention_mask. Encode inputs with its modules: `self.t5.read(ids, mask, modules)`
    makes a `Source(states, attention_mask)`. Return the list of sources that the decoder reads: first the instruction's
    states (if there are any), then the input's. A source of batch 1 serves all inputs.
    """
    inputs, hidden = torch.tensor([[11, 12, 13, 1], [14, 15, 1, 0]]), torch.tensor([[1, 1, 0, 1], [1, 0, 1, 0]])
    for fused, ids in itertools.product((True, False), ([[9, 8, 7, 6, 1], [5, 6, 1, 0, 0]], [[9, 8, 1]], [[1]])):
        model = tiny_hint(hint, {"fusion": fused})
        task = model.encode_instruction(torch.tensor(ids))
        for given, mask in ((None, (inputs != 0).long()), (hidden, hidden)):
            sources = model.fuse(task, inputs, given)
            for row in range(2):
                what = f"row {row} of two inputs, {len(ids)} instructions, fusion {fused}, mask {given is hidden}"
                yield f"states that the decoder sees: {what}", *seen_and_wanted(model, sources, ids, inputs, mask, row)


def seen_and_wanted(model, sources, ids, inputs, mask, row):
    """States that a decoder sees of one row; and those of its instruction alone, without padding, and of its input."""
    seen = torch.cat([states[row % len(states)][shown[row % len(shown)] > 0] for states, shown in sources])
    alone = model.encode_instruction(torch.tensor([[word for word in ids[row % len(ids)] if word > 0]]))
    read = model.t5.read(inputs[row : row + 1], mask[row : row + 1], alone.modules)
    return seen, torch.cat([alone.states[0], read.states[0][mask[row] > 0]])


@fusion.facts
def _(hint):
    config = hint.T5Config(**{**BASE, "num_layers": 2, "num_decoder_layers": 2})
    model = hint.on_meta(config, hint.HINTConfig()).requires_grad_(False)
    instruction, inputs, answers = (torch.ones(*shape, dtype=torch.long) for shape in ((1, 128), (16, 64), (16, 16)))
    task = model.encode_instruction(instruction)

    def answer(task):
        model.t5.logits(model.t5.decode(answers, model.fuse(task, inputs), task.modules))

    joined = task._replace(states=task.states.expand(16, -1, -1), attention_mask=task.attention_mask.expand(16, -1))
    costs = [hint.count_flops(lambda: answer(each)) for each in (joined, task)]
    yield "FLOPs if each input projects the instruction", costs[0] / costs[1], "1.2"


@exercise(
    "rebuild", ["hint.HINT.forward"], level=2, minutes=20, paper="HINT, sections 3.1 and 3.3",
    hint="`torch.unique(..., dim=0, return_inverse=True)` gives the distinct rows, and which of them each row is.",
    why="To encode the instruction of every example would cost 4.3 times the FLOPs: 16 examples of two tasks, "
        "instructions of 128 tokens, inputs of 64, answers of 16, two layers of base's width.",
    near={
        "The decoder has no modules.": ("self.fuse(task, input_ids), task.modules)", "self.fuse(task, input_ids))"),
        "Examples get the modules of others: `torch.unique` sorts, so the order is not that of the batch.":
            ("input_ids[order], labels[order], task_of", "input_ids, labels, task_of"),
        "You bring inputs into another order, but not their labels.": ("labels[order]", "labels"),
        "You encode the instruction of every example. Encode each distinct one once.":
            ("torch.unique(instruction_ids, dim=0, return_inverse=True, return_counts=True)",
             "instruction_ids, torch.arange(len(instruction_ids)), torch.ones(len(instruction_ids), dtype=torch.long)"),
        "All examples get the modules of one instruction.":
            ("mixed(split(part))", "Adapter(*(x[:1] for x in part))", "select(0, rows)", "select(0, 0 * rows)"),
        "You divide the examples evenly among the tasks. One task may have more examples than another.":
            ("[(len(list(run)), size) for size, run in groupby(counts.tolist())]",
             "[(len(counts), len(order) // len(counts))]"),
    },
    also=[("hint.HINT.forward", """
        distinct, task_of = torch.unique(instruction_ids, dim=0, return_inverse=True)
        task = map_tensors(lambda tensor: tensor[task_of], self.encode_instruction(distinct))
        return self.t5.loss(labels, self.fuse(task, input_ids), task.modules)
    """)],
)  # fmt: skip
def mixed_batch(hint):
    """Write the training pass of a batch in which each example has an instruction of its own.

    Encode each distinct instruction once, by `self.encode_instruction`. Give its modules, states and mask to all its
    examples: `map_tensors(function, task)` calls a function for every tensor of a task. Return
    `self.t5.loss(labels, self.fuse(task, inputs), modules)`.
    """
    for fused, rows in itertools.product((True, False), ([0, 1, 2, 4], [0, 1, 2, 0], [3, 0, 4, 1, 2], [2], [0, 2])):
        model, encoded = tiny_hint(hint, {"fusion": fused}), []
        examples = [torch.tensor(ids)[rows] for ids in MIXED]
        wanted, number = mean_loss_alone(hint, model, examples), len(examples[0].unique(dim=0))
        model.hypernetwork.register_forward_pre_hook(lambda module, arguments: encoded.append(len(arguments[0])))
        yield f"loss of {len(rows)} examples of {number} tasks, fusion {fused}", model(*examples).cross_entropy, wanted
        yield f"instructions encoded for {len(rows)} examples of {number} tasks", sum(encoded), number


MIXED = (  # instructions, inputs and labels of five examples
    [[9, 8, 7, 1, 0], [5, 6, 7, 8, 1], [9, 8, 7, 1, 0], [9, 9, 1, 0, 0], [5, 6, 7, 8, 1]],
    [[11, 12, 13, 1], [14, 15, 1, 0], [16, 17, 18, 1], [19, 1, 0, 0], [20, 27, 1, 0]],
    [[21, 22, 1], [23, 1, -100], [24, 25, 1], [26, 1, -100], [28, 29, 1]],
)


def mean_loss_alone(hint, model, examples):
    """Mean loss of the answers' tokens, where each example is alone and without padding."""
    losses = []
    for instruction, text, answer in ([ids[ids > 0] for ids in example] for example in zip(*examples)):
        told = model.t5.read(instruction[None])
        modules = model.hypernetwork(*told)
        read = model.t5.read(text[None], None, modules)
        both = [torch.cat(pair, dim=1) for pair in zip(told, read)] if model.config.fusion else read
        shifted = torch.tensor([[0, *answer[:-1].tolist()]])
        scores = model.t5.logits(model.t5.decode(shifted, [hint.Source(*both)], modules))[0].log_softmax(-1)
        losses += [-scores[place, word] for place, word in enumerate(answer)]
    return torch.stack(losses).mean().detach()


@mixed_batch.facts
def _(hint):
    config = hint.T5Config(**{**BASE, "num_layers": 2, "num_decoder_layers": 2})
    once, answers = hint.exact_flops(hint.on_meta(config, hint.HINTConfig()), 16, 64, 128, 16)
    yield "FLOPs of 16 encodings in place of two", (16 * once + answers) / (2 * once + answers), "4.3"


@exercise(
    "rebuild", ["t5.Cache.before"], level=1, minutes=15, paper="HINT, section 3.3 (inference); cached decoding",
    hint="`room[:, :, -T:]` are the last T places. Assigning to them writes into the cache itself.",
    why="Without a cache each step reads all earlier tokens again: 64 times as many positions for an answer of 128.",
    near={
        "You write into the first places. New tokens belong to the last ones.":
            ("room[:, :, -x.shape[2] :] = x", "room[:, :, : x.shape[2]] = x"),
        "You give back the new tokens alone. The attention needs the earlier ones too.": ("KeyValue(*self)", "new"),
        "You give back a joined copy, and the cache itself stays empty: the next step finds zeros.":
            ("room[:, :, -x.shape[2] :] = x", "pass",
             "*self", "*(torch.cat([room[:, :, : -x.shape[2]], x], dim=2) for room, x in zip(self, new))"),
        "You put the new tokens behind the room. The room has their places already.":
            ("t5.Cache.before", "return KeyValue(*(torch.cat([room, x], dim=2) for room, x in zip(self, new)))"),
        "Your tokens stand one place too early.": ("[:, :, -x.shape[2] :] = x", "[:, :, -x.shape[2] - 1 : -1] = x"),
        "The values are written over the keys.": ("room, x in zip(self, new)", "room, x in zip(self[:1] * 2, new)"),
    },
    also=[("t5.Cache.before", """
        length = new.key.shape[2]
        first = self.key.shape[2] - length
        for place in range(length):
            self.key[:, :, first + place] = new.key[:, :, place]
            self.value[:, :, first + place] = new.value[:, :, place]
        return KeyValue(self.key, self.value)
    """)],
)  # fmt: skip
def cache(t5):
    """Write the keys and values of new tokens into the cache, and return all keys and values so far.

    A step of the decoder gets a cache whose last T places are for its T tokens; before them stand the prefix and all
    earlier tokens. The tensors of the cache are parts of one large tensor: later steps must find what you have written.
    """
    prefix, tokens = torch.randn(2, 2, 3, 2, 5), torch.randn(2, 2, 3, 6, 5)
    rooms = [torch.cat([part, torch.full((2, 3, 6, 5), 9.0)], dim=2) for part in prefix]
    begin = 0
    for end in (1, 2, 5, 6):
        step = t5.Cache(*(room[:, :, : 2 + end] for room in rooms))
        found = step.before(t5.KeyValue(*tokens[:, :, :, begin:end]))
        wanted = tuple(torch.cat([prefix[i], tokens[i, :, :, :end]], dim=2) for i in range(2))
        yield f"keys and values after token {end}, {end - begin} of them new", (found.key, found.value), wanted
        begin = end


@cache.facts
def _(t5):
    length = 128
    yield "positions read without a cache, over those with", sum(range(1, length + 1)) / length, "64"


@exercise(
    "rebuild", ["t5.RMSNorm.forward"], level=1, minutes=10, paper="Raffel et al., section 2.1 (layer normalization)",
    hint="A LayerNorm subtracts the mean and adds a bias. This norm does neither.",
    why="Taken in bf16, the length of a row of 4,096 numbers is off by up to 0.2 %.",
    near={
        "You subtract the mean. T5's norm does not.":
            ("return self.weight * (x *", "return self.weight * ((x - x.mean(-1, True)) *"),
        "Your epsilon is added to the root. It belongs under the root.":
            ("torch.rsqrt(norm.square() / x.shape[-1] + self.epsilon)",
             "1 / (norm / x.shape[-1] ** 0.5 + self.epsilon)"),
        "You divide by the length of the row. Divide by its RMS: the length over sqrt(d).": ("/ x.shape[-1]", ""),
        "You take the statistics in bf16. Take them in fp32.":
            (", dtype=torch.promote_types(x.dtype, torch.float32)", ""),
        "The weight is not used.": ("self.weight * (", "("),
        "You divide the sum of squares by d - 1. Divide it by d.": ("x.shape[-1] +", "(x.shape[-1] - 1) +"),
    },
    also=[("t5.RMSNorm.forward", """
        square = (x.float() * x.float()).mean(dim=-1, keepdim=True)
        return self.weight * (x.float() / torch.sqrt(square + self.epsilon)).to(x.dtype)
    """)],
)  # fmt: skip
def norm(t5):
    """Write T5's norm: x / RMS(x) * weight, over the last axis, without mean and without bias.

    RMS(x) is the root of (the mean of the squares + epsilon). Take it in fp32, whatever the type of x.
    """
    layer = t5.RMSNorm(6, 0.05)
    layer.weight.data = torch.randn(6)
    x = 1 + torch.randn(2, 3, 6)
    x[1, 2] = 0
    wanted = torch.zeros(2, 3, 6)
    for row, place in itertools.product(range(2), range(3)):
        rms = math.sqrt(sum(number**2 for number in x[row, place].tolist()) / 6 + 0.05)
        wanted[row, place] = x[row, place] / rms * layer.weight.data
    yield "six rows, one of them zeros", layer(x), wanted
    long, states = t5.RMSNorm(4096, 1e-6).bfloat16(), (1.3 * torch.randn(8, 4096)).bfloat16()
    found = long(states)
    yield "type of normed bf16 states", found.dtype, torch.bfloat16
    rms = states.double().square().mean(-1).sqrt()
    yield "mean of found / x, over 4,096 bf16 numbers", (found.double() / states.double()).mean(-1), 1 / rms, 3e-4


@norm.facts
def _(t5):
    x = torch.randn(64, 4096).bfloat16()
    true = x.double().square().mean(-1)
    error = ((x.square().mean(-1) / true).sqrt() - 1).abs().max()
    yield "largest error of an RMS taken in bf16, percent", 100 * error, "0.2 %"


@exercise(
    "rebuild", ["t5.relative_position_bucket"], level=3, minutes=30, paper="Raffel et al., section 2.1 (position bias)",
    hint="Half of the buckets are exact. The others are logarithmic: one more would begin at max_distance.",
    why="32 numbers a head are enough for texts of any length: beyond a distance of 128 all keys share a bucket.",
    near={
        "Keys before and after the query have changed places.": ("(relative > 0)", "(relative < 0)"),
        "Your decoder tells later keys apart. For the decoder they all have distance 0.":
            ("(-relative).clamp(min=0)", "relative.abs()"),
        "Your last exact bucket is a logarithmic one already.": ("distance < exact,", "distance < exact - 1,"),
        "Far keys run over the last bucket. Clamp them.": (".clamp(max=num_buckets - 1)", ""),
        "You round to the nearest bucket. Round down.": (").long())", ").round().long())"),
        "Your logarithmic part has num_buckets buckets. It has num_buckets - exact.":
            ("(num_buckets - exact)).long", "num_buckets).long"),
        "Both directions share their buckets. In the encoder each direction has its half.":
            ("(relative > 0) * num_buckets", "0"),
    },
    also=[("distance < exact,", "distance <= exact,", "num_buckets //= 2", "num_buckets = num_buckets // 2")],
)  # fmt: skip
def buckets(t5):
    """Give each relative position (key position - query position) the number of its bucket.

    Bidirectional: the second half of the buckets is for keys after the query. Otherwise these have distance 0.
    In each direction, of n buckets, n // 2 are exact: bucket j for distance j. Of the others, bucket number
    n // 2 + j begins at the distance n/2 * (max_distance / (n/2)) ** (j / (n - n/2)). The last one has no end.
    """
    relative = torch.arange(-300, 301)[None]

    def bucket(position, both, size, furthest):
        size = size // 2 if both else size
        distance = abs(position) if both else max(-position, 0)
        first, offset = size // 2, size if both and position > 0 else 0
        if distance < first:
            return offset + distance
        rest = size - first  # compare whole powers, so that no rounding can err
        return offset + first + max(j for j in range(rest) if distance**rest * first**j >= furthest**j * first**rest)

    for both, size, furthest in ((True, 32, 128), (False, 32, 128), (True, 8, 20), (False, 12, 50)):
        found = t5.relative_position_bucket(relative, both, size, furthest)
        wanted = torch.tensor([[bucket(position, both, size, furthest) for position in relative[0].tolist()]])
        yield f"{size} buckets to {furthest}, bidirectional {both}, positions -300 to 300", found, wanted


@buckets.facts
def _(t5):
    config = t5.T5Config()
    yield "buckets", config.relative_attention_num_buckets, "32"
    yield "distance from which all share one", config.relative_attention_max_distance, "128"


@exercise(
    "rebuild", ["t5.token_loss"], level=1, minutes=15, paper="Raffel et al., section 3.1.2; the authors' z-loss",
    hint="`logits.logsumexp(-1)` is log Z, computed so that large logits do not overflow.",
    why="At the first step of a fresh T5, (log Z)^2 is about 119, so the z-loss adds 0.012 to a loss of 11.0.",
    near={
        "You take the exponential of the logits as they are, so large ones overflow. Use logsumexp.":
            ("logits.logsumexp(-1)", "logits.exp().sum(-1).log()"),
        "Your log Z is not squared.": ("log_z.square()", "log_z"),
        "You compute in the type of the logits. Compute in fp32.": ("logits.float()", "logits"),
        "You give sums. Give means over the tokens.": ("count = max(len(labels), 1)", "count = 1"),
        "You divide by the number of logits. Divide by the number of tokens.": ("len(labels), 1", "logits.numel(), 1"),
        "Without a single label your loss is NaN. Divide by at least 1.": ("max(len(labels), 1)", "len(labels)"),
        "Your cross-entropy holds the z-loss too. Give it without.":
            ("cross_entropy, len(labels))", "cross_entropy + Z_LOSS * log_z.square().sum() / count, len(labels))"),
    },
    also=[("t5.token_loss", """
        logs = F.log_softmax(logits.float(), dim=-1)
        entropy = F.nll_loss(logs, labels) if len(labels) else logs.sum()
        log_z = (logits.float() - logs)[:, 0]
        return Loss(entropy + (Z_LOSS * log_z**2).sum() / max(len(labels), 1), entropy, len(labels))
    """)],
)  # fmt: skip
def loss(t5):
    """Write the loss of N tokens: logits [N, V] and labels [N] -> Loss(loss, cross_entropy, tokens).

    cross_entropy: the mean of log Z - (logit of the label), where Z is the sum of exp(logit) over the vocabulary.
    loss: cross_entropy + Z_LOSS * (the mean of (log Z)^2). tokens: N. Compute in fp32; for no labels both are zero.
    """
    labels, logits = torch.tensor([3, 0, 6, 2, 2]), torch.randn(5, 7)
    for what, given in (("small", logits), ("large", 100 * logits), ("bf16", (9 * logits).bfloat16())):
        logs = [max(row) + math.log(sum(math.exp(number - max(row)) for number in row)) for row in given.tolist()]
        wanted = sum(log - float(given[n, labels[n]]) for n, log in enumerate(logs)) / 5
        square = sum(log**2 for log in logs) / 5
        found = t5.token_loss(given, labels)
        yield f"cross-entropy of {what} logits", found.cross_entropy, torch.tensor(wanted)
        yield f"10,000 * z-loss of {what} logits", 1e4 * (found.loss - wanted), torch.tensor(square), 1e-2
        yield "tokens", found.tokens, 5
    found = t5.token_loss(logits[:1], labels[:1])
    yield "cross-entropy of one label", found.cross_entropy, -logits[:1].log_softmax(1)[0, 3]
    yield "no labels", t5.token_loss(logits[:0], labels[:0]), (torch.tensor(0.0), torch.tensor(0.0), 0)


@loss.facts
def _(t5):
    model = t5.T5(t5.T5Config(num_layers=1, num_decoder_layers=1))
    labels = torch.randint(3, 32000, (4, 16))
    found = model.loss(labels, [model.read(torch.randint(3, 32000, (4, 16)))])
    yield "(log Z)^2 at the first step", 1e4 * (found.loss - found.cross_entropy), "119"
    yield "z-loss at the first step", found.loss - found.cross_entropy, "0.012"
    yield "loss at the first step", found.loss, "11.0"


@exercise(
    "rebuild", ["t5.T5.log_probabilities"], level=2, minutes=20, paper="HINT, section 5.2 (rank classification)",
    hint="`F.cross_entropy(..., reduction=\"none\")` of the target tokens, then back to [B, T], then a sum.",
    why="A mean over tokens changes the order: -3.0 of two tokens beats -4.0 of five, but -1.5 a token loses to -0.8.",
    near={
        "You take the mean over tokens. The probability of an answer is a product, so its log is a sum.":
            ("chosen).sum(1)", "chosen).sum(1) / (labels != NO_LABEL).sum(1)"),
        "`</s>` is left out. It is a token of the answer: it says that the answer ends there.":
            ("reduction=\"none\")", "reduction=\"none\") * (targets != EOS)"),
        "Your sign is wrong: log-probabilities are negative.": ("-F.cross_entropy", "F.cross_entropy"),
        "Every answer gets the mean of the batch.": ("chosen).sum(1)", "chosen).sum(1) * 0 + chosen.mean()"),
        "Tokens of one answer are counted for another: you deal them out in order, as if no answer had padding.":
            ("labels.to(chosen.device) != NO_LABEL", "torch.arange(labels.numel()).view_as(labels) < len(chosen)"),
        "You add up logits. A log-probability is the logit less log Z.":
            ("-F.cross_entropy(logits.float(), targets, reduction=\"none\")",
             "logits.float().gather(1, targets[:, None])[:, 0]"),
    },
    also=[('-F.cross_entropy(logits.float(), targets, reduction="none")',
           "logits.float().log_softmax(-1)[torch.arange(len(targets)), targets]")],
)  # fmt: skip
def rank(t5):
    """Write the log-probability [B] of each answer of `labels` [B, T], padded with -100, in fp32.

    It is the sum over all tokens of the answer, `</s>` among them. `self._target_logits(labels, sources, modules)`
    gives the logits [N, V] and the ids [N] of all N tokens of all answers, row after row, without padding.
    """
    model = tiny_t5(t5)
    labels = torch.tensor([[5, 1, -100, -100], [6, 7, 8, 1], [9, 10, 1, -100]])
    sources = [model.read(torch.tensor([[11, 12, 13], [14, 15, 0], [16, 0, 0]]))]
    modules = t5.Modules((), 3 * (t5.LayerModules(prefix=t5.KeyValue(*torch.randn(2, 1, 3, 4, 10))),))
    for what, given in (("three answers", None), ("three answers, with generated modules", modules)):
        wanted = torch.zeros(3)
        for row, answer in enumerate(labels.tolist()):
            own = [t5.Source(*(part[row : row + 1] for part in sources[0]))]
            for place, token in enumerate([token for token in answer if token >= 0]):
                states = model.decode(torch.tensor([[0, *answer[:place]]]), own, given)
                wanted[row] += math.log(model.logits(states)[0, -1].softmax(-1)[token].item())
        yield f"log-probabilities of {what}", model.log_probabilities(labels, sources, given), wanted
    sources = [model.bfloat16().read(torch.tensor([[11, 12, 13], [14, 15, 0], [16, 0, 0]]))]
    yield "their type, of a model in bf16", model.log_probabilities(labels, sources).dtype, torch.float32


@rank.facts
def _():
    yield "two tokens", 2 * -1.5, "-3.0"
    yield "five tokens", 5 * -0.8, "-4.0"


@exercise(
    "rebuild", ["data.split_for_hint"], level=1, minutes=15, paper="HINT, section 3.3 (hypernetwork pretraining)",
    hint="`draw.randint(a, b)` may give both a and b. The second point depends on the first.",
    why="Two points drawn at once and sorted make instructions short: of 512 ids 170 on average, in place of 255.",
    near={
        "Your parts do not end in `</s>`.": ("[*part, EOS]", "[*part]"),
        "Your target may be too short: three ids at least belong to it.": ("first, len(ids) - 3", "first, len(ids)"),
        "Your instruction may be empty: it has one id at least.": ("(1, len(ids) - 3)", "(0, len(ids) - 3)"),
        "You draw both points from the whole range and sort them. The second is drawn from what the first has left.":
            ("first = draw.randint(1, len(ids) - 3)",
             "first, second = sorted(draw.randint(1, len(ids) - 3) for _ in range(2))",
             "second = draw.randint(first, len(ids) - 3)", ""),
        "An id is lost at a point.": ("ids[second:])", "ids[second + 1:])"),
        "Your points are always at thirds. Draw them.":
            ("draw.randint(1, len(ids) - 3)", "len(ids) // 3", "draw.randint(first, len(ids) - 3)", "2 * first"),
        "Your input is never empty, though the second point may be the first.":
            ("draw.randint(first, len(ids) - 3)", "draw.randint(min(first + 1, len(ids) - 3), len(ids) - 3)"),
    },
    also=[("draw.randint(1, len(ids) - 3)", "1 + int(draw.random() * (len(ids) - 3))",
           "draw.randint(first, len(ids) - 3)", "draw.choice(range(first, len(ids) - 2))")],
)  # fmt: skip
def split(data):
    """Split a segment of n ids at two random points into instruction, input and target, each ended by `</s>`.

    The first point is drawn from 1 to n - 3, the second from the first point to n - 3, both ends included. All values
    of a range are equally likely. So the input may be empty, and the target has three ids or more.
    """
    ids, (firsts, seconds), draw = list(range(10, 17)), torch.zeros(2, 8), random.Random(0)
    for number in range(4000):
        parts = data.split_for_hint(list(ids), draw)
        if number < 5:
            yield "the three parts joined", [i for part in parts for i in part[:-1]], ids
            yield "the last ids of the parts", [part[-1:] for part in parts], [[1], [1], [1]]
        lengths = [len(part) - 1 for part in parts]
        firsts[lengths[0]] += 1 / 4000
        seconds[lengths[0] + lengths[1]] += 1 / 4000
    yield "how often the first point is 0, 1, 2, ...", firsts, torch.tensor([0, 1, 1, 1, 1, 0, 0, 0]) / 4, 0.12
    # The second point is j if the first is i <= j, each with a probability of 1/4, and then one of 5 - i points.
    sums = list(itertools.accumulate([1 / 16, 1 / 12, 1 / 8, 1 / 4]))
    yield "how often the second point is 0, 1, 2, ...", seconds, torch.tensor([0, *sums, 0, 0, 0]), 0.06


@split.facts
def _(data):
    draw = random.Random(0)
    sizes = [len(data.split_for_hint([3] * 512, draw).instruction) - 1 for _ in range(100_000)]
    yield "mean length of an instruction", sum(sizes) / len(sizes), "255"
    smaller = [min(draw.randint(1, 509), draw.randint(1, 509)) for _ in range(100_000)]
    yield "mean of the smaller of two points", sum(smaller) / len(smaller), "170"


@exercise(
    "rebuild", ["data.rouge_l"], level=2, minutes=20, paper="HINT, table 1 (metrics)",
    hint="A table of (len(a) + 1) x (len(b) + 1) numbers gives the longest common subsequence of a and b.",
    why="'the red cat sat' and 'the cat sat down' share 'the cat sat': 3 of the 4 words of each, a ROUGE-L of 75.",
    near={
        "You stem words of three letters. Only longer ones are stemmed.": ("if len(word) > 3 else word for", "for"),
        "You do not stem: 'walking' and 'walked' are one word.": ("_stem(word) if len(word) > 3 else word", "word"),
        "Your ROUGE-L minds capital letters.": ('findall("[a-z0-9]+", text.lower())', 'findall("[A-Za-z0-9]+", text)'),
        "You keep accented letters. Words are of a-z and 0-9 alone.": ('"[a-z0-9]+"', r'r"\w+"'),
        "You give the recall alone. ROUGE-L is the F1.": ("2 * precision * recall / (precision + recall)", "recall"),
        "You give the precision alone, or take one length for both.": ("/ len(expected)", "/ len(predicted)"),
        "You count common words in any order. A subsequence keeps the order.":
            ("len(predicted) - row.bit_count()", "sum((Counter(predicted) & Counter(expected)).values())"),
    },
    also=[("common = len(predicted) - row.bit_count()", """
    table = [[0] * (len(expected) + 1) for _ in range(len(predicted) + 1)]
    for i, one in enumerate(predicted):
        for j, two in enumerate(expected):
            table[i + 1][j + 1] = table[i][j] + 1 if one == two else max(table[i][j + 1], table[i + 1][j])
    common = table[-1][-1]""")],
)  # fmt: skip
def rouge(data):
    """Write ROUGE-L of two texts, from 0 to 1, by the longest common subsequence of their words.

    Lower case; words are runs of a-z and 0-9; words of more than three letters are stemmed by `_stem`. The result is
    the F1 of precision (share of the prediction) and recall (share of the reference), and 0 where nothing is common.
    """
    for one, two, wanted in (
        ("The red cat sat", "the cat sat down", 3 / 4), ("walking", "he walked", 2 / 3), ("his", "hi", 0.0),
        ("a b c d e", "c", 1 / 3), ("cats", "cat", 1.0), ("", "word", 0.0), ("caf\u00e9 bar", "caf bar", 1.0),
        ("d c b a", "a b c d", 1 / 4), ("Word word", "word", 2 / 3), ("p q a b c", "a x b x c p q", 1 / 2),
    ):  # fmt: skip
        yield f"rouge_l({one!r}, {two!r})", data.rouge_l(one, two), wanted
    draw = random.Random(0)
    for number in range(6):
        texts = [[draw.choice("abcd") for _ in range(draw.randint(3, 9))] for _ in range(2)]
        one, two = ({part for n in range(10) for part in itertools.combinations(words, n)} for words in texts)
        wanted = 2 * max(map(len, one & two)) / sum(map(len, texts))  # of all subsequences the longest
        yield f"rouge_l of random words, {number}", data.rouge_l(*map(" ".join, texts)), wanted


@rouge.facts
def _(data):
    yield "ROUGE-L of the two sentences", 100 * data.rouge_l("the red cat sat", "the cat sat down"), "75"


@exercise(
    "rebuild", ["data.exact_match", "data.score"], level=1, minutes=10, paper="HINT, table 1 (metrics)",
    hint="`str.translate` drops punctuation, `str.split` drops runs of spaces.",
    why="The check's three answers have an exact match of 33.3 and a ROUGE-L of 58.3: one counts answers that are half "
        "right, the other does not.",
    near={
        "You average over references. Take the best one.": ("max(metric", "1 / len(several) * sum(metric"),
        "You use the first reference alone.": ("for wanted in several)", "for wanted in several[:1])"),
        "Both metrics have one reference. Each takes its own best.": (
            "max(metric(text, wanted) for wanted in several)",
            "metric(text, max(several, key=lambda wanted: exact_match(text, wanted)))"),
        "Your scores run from 0 to 1. Give percent.": ("100 * math.fsum", "math.fsum"),
        "Your exact match minds capital letters.": ("text.lower().translate", "text.translate"),
        "Your exact match minds punctuation.": ('.translate(str.maketrans("", "", string.punctuation))', ""),
        "Your exact match minds runs of spaces.": ("[0].split() == texts[1].split", "[0].strip() == texts[1].strip"),
    },
    also=[('.translate(str.maketrans("", "", string.punctuation))', "",
           "texts[0].split() == texts[1].split()",
           "len({' '.join(''.join(c for c in t if c not in string.punctuation).split()) for t in texts}) == 1")],
)  # fmt: skip
def scoring(data):
    """Write exact match, and the means of both metrics of Super-NaturalInstructions over examples.

    `exact_match`: equal but for capital letters, ASCII punctuation and runs of spaces.
    `score`: {"exact_match": ..., "rougeL": ...} in percent; of several references the best, the mean over examples.
    No predictions, or fewer or more than lists of references, are a ValueError.
    """
    for one, two, wanted in (
        ("Paris.", " paris", True), ("new  york", "New York!", True), ("york new", "new york", False),
        ("", "...", True), ("(a) b", "a b", True), ("ab", "a b", False),
    ):  # fmt: skip
        yield f"exact_match({one!r}, {two!r})", data.exact_match(one, two), wanted
    found = data.score(["the cat", "a b c d", "x"], [["a dog", "The cat!"], ["b d", "a c d e"], ["y"]])
    yield "scores of three examples", sorted(found.items()), [("exact_match", 100 / 3), ("rougeL", 175 / 3)]
    for predictions, references in ((["a", "b"], [["a"]]), ([], [])):
        try:
            found = data.score(predictions, references)
        except ValueError:
            found = "ValueError"
        yield f"score of {len(predictions)} predictions and {len(references)} references", found, "ValueError"


@scoring.facts
def _(data):
    found = data.score(["the cat", "a b c d", "x"], [["a dog", "The cat!"], ["b d", "a c d e"], ["y"]])
    yield "exact match of three answers", found["exact_match"], "33.3"
    yield "their ROUGE-L", found["rougeL"], "58.3"


@exercise(
    "rebuild", ["train.accumulate_gradient"], level=2, minutes=30, paper="HINT, section 3.3 (training)",
    hint="The denominator, all target tokens of the batch, is known before the first part is read.",
    why="The mean of the parts' means is off by 1.1 times the norm of the right gradient, at 20 tokens a part.",
    near={
        "You take the mean of the parts' means. Weight each part by its target tokens.":
            ("share = counts * out.tokens / tokens", "share = counts / len(parts)"),
        "You weight a part by its examples. Weight it by its target tokens.":
            ("share = counts * out.tokens / tokens", "share = counts * len(batch.labels) / len(examples)"),
        "Each part counts fully, so more parts give a larger gradient.": ("counts * out.tokens / tokens", "counts"),
        "The z-loss is left out: train on `loss`, report `cross_entropy`.": ("out.loss *", "out.cross_entropy *"),
        "You report the loss with its z-loss. Report the cross-entropy.": ("cross_entropy.detach()", "loss.detach()"),
        "Your denominator counts the input's tokens too.":
            ("sum(len(example.target) for", "sum(len(example.target) + len(example.input) for"),
        "You report the last part alone.": ("total = total + out", "total = 0.0 + out"),
        "The gradient of a part replaces that of the parts before.":
            ("with precision():", "model.zero_grad()\n            with precision():"),
    },
    also=[("out.cross_entropy.detach() * share", "share * out.cross_entropy.item()", "total.item()", "total")],
)  # fmt: skip
def whole_batch(train, hint):
    """Accumulate the gradient of the mean loss of a whole batch, and return its mean cross-entropy as a number.

    `microbatches(examples, microbatch, price)` divides the batch into parts; `collate` pads a part. Within
    `with precision():`, `model(*batch)` gives loss, cross_entropy (means over a part's target tokens) and tokens.
    Call `backward()` for each part. Write it for one process: leave out `rank`, `world` and `dist`.
    """
    examples, model = example_ids(train), tiny_hint(hint, num_layers=1, num_decoder_layers=1)
    whole = model(*train.collate(examples))
    whole.loss.backward()
    wanted, passes = gradient_of(model), []
    model.register_forward_hook(lambda module, arguments, out: passes.append(len(arguments[2])))
    for size in (1000, 30, 20):
        model.zero_grad()
        passes.clear()
        found = train.accumulate_gradient(model, examples, size, 0, train.nullcontext)
        yield f"mean cross-entropy, {size} tokens at once", found, whole.cross_entropy.item()
        yield f"gradient, {size} tokens at once", gradient_of(model), wanted
        yield f"parts, {size} tokens at once", len(passes), len(train.microbatches(examples, size, 0))


@whole_batch.facts
def _(train, hint):
    examples, gradients = example_ids(train), []
    model = tiny_hint(hint, num_layers=1, num_decoder_layers=1)
    parts = train.microbatches(examples, 20, 0)
    for mean_of_means in (False, True):
        model.zero_grad()
        for part in parts:
            out = model(*train.collate(part))
            share = 1 / len(parts) if mean_of_means else out.tokens / sum(len(example.target) for example in examples)
            (out.loss * share).backward()
        gradients.append(gradient_of(model))
    yield "error of the mean of means", (gradients[1] - gradients[0]).norm() / gradients[0].norm(), "1.1"


def example_ids(train):
    """Make eight examples of three instructions, with targets of 1 to 9 tokens."""
    draw = random.Random(0)
    sizes = [(number % 3, draw.randint(2, 6), (1, 9, 2, 5, 1, 8)[number % 6]) for number in range(8)]
    return [train.Ids([20 + task, 30, 1], [draw.randint(3, 52) for _ in range(size)],
                      [draw.randint(3, 52) for _ in range(target)]) for task, size, target in sizes]  # fmt: skip


def gradient_of(model):
    """Join the gradients of all weights of a model."""
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


@exercise(
    "rebuild", ["hypernet.StackHypernetwork.adapters"], level=3, minutes=30,
    paper="Karimi Mahabadi et al. (2021), section 3",
    hint="z [B, L, t] comes first: one for each example and layer. Then one linear layer for each part of an adapter.",
    why="Hyperformer++ adds 0.29 % of T5 base's parameters for each of eight tasks, as its abstract says.",
    near={
        "All layers get the adapter of the first one.":
            ("self.layers.expand(batch, -1, -1)", "self.layers[:1].expand(batch, layers, -1)"),
        "Your linear layers are those of the other place.": ("place % len", "(place + 1) % len"),
        "Both places have the embedding of the first one.": ("self.places[place]", "self.places[0]"),
        "Task and layer have changed places in what you join.": ("cat(read,", "cat([read[1], read[0], *read[2:]],"),
        "Scale and shift of the norm have changed places.": ("(*layer)", "(*layer[:4], layer[5], layer[4])"),
        "Your matrices are filled column by column. Fill them row by row.": ("(-1, shape)", "(-1, shape[::-1]).mT"),
    },
    also=[("[place % len(self.heads)]", "[place if self.places is None else 0]",
           ".unflatten(-1, shape).unbind(1)", ".view(batch, layers, *shape).transpose(0, 1)")],
)  # fmt: skip
def hyperformer(hypernet):
    """Generate the serial adapters of one place (0: after attention, 1: after feed-forward), one for each layer.

    z = `self.join`([task; layer embedding; place embedding]); `self.places` is None in the plain form, whose z knows
    nothing of the place. A set of linear layers, one for each part of an adapter, turns z into parts of the shapes
    `self.shapes`: `self.heads[place]`, or `self.heads[0]` for both places where these share it (Hyperformer++).
    """
    task = torch.randn(2, hypernet.TASK)
    for shares in (False, True):
        stack = hypernet.StackHypernetwork(6, 4, 3, shares)
        for weight in stack.heads.parameters():
            torch.nn.init.normal_(weight)
        for place in (0, 1):
            adapters = stack.adapters(task, place)
            yield "number of adapters", len(adapters), 3
            for layer in range(3):
                own = stack.layers[layer].tolist() + (stack.places[place].tolist() if shares else [])
                z, wanted = stack.join(torch.tensor([[*row, *own] for row in task.tolist()])), []
                for head, (height, width) in zip(stack.heads[0 if shares else place], stack.shapes):
                    flat = z @ head.weight.T + head.bias
                    wanted.append(torch.stack([flat[:, width * i : width * i + width] for i in range(height)], 1))
                form = "Hyperformer++" if shares else "Hyperformer"
                yield f"{form}: place {place}, layer {layer}", adapters[layer], copied(wanted)


@hyperformer.facts
def _(hint):
    config = hint.T5Config(**{**BASE, "d_ff": 3072}, feed_forward_proj="relu", tie_word_embeddings=True)  # v1.0
    about = hint.HINTConfig(bottleneck=24, generator="hyperformer++", hyperencoder="table", tasks=8, fusion=False)
    model = hint.on_meta(config, about)
    size, added = (sum(p.numel() for p in part.parameters()) for part in (model.t5, model.hypernetwork))
    yield "parameters for each of eight tasks, percent of T5", 100 * added / size / 8, "0.29 %"
