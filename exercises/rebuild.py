"""Rebuild a function: its body is cut out, its signature and docstring stay, and you write it anew."""

import itertools
import math
import random

import torch

from mechanics import copied, exercise
from small import tiny_hint, tiny_t5

BASE = dict(d_model=768, d_ff=2048, num_layers=12, num_decoder_layers=12, num_heads=12)  # T5 v1.1 base


@exercise(
    "rebuild", ["t5.Adapter.__call__"], level=1, minutes=10, paper="HINT, equation (1)",
    hint="Two products and an activation between them. The block adds the residual, so the adapter does not.",
    why="p, all numbers generated for one instruction, is 4 % of the N parameters of T5 XL, and they are new for each task.",
    near={
        "You add u to the result. The block has that residual already.":
            ("self.up) + self.up_bias", "self.up) + self.up_bias + u"),
        "Your activation is relu. Equation (1) has gelu.": ('F.gelu(hidden, approximate="tanh")', "F.relu(hidden)"),
        "Your first bias is added after the activation. It belongs inside.":
            (" + self.down_bias", "", 'F.gelu(hidden, approximate="tanh")', 'F.gelu(hidden, approximate="tanh") + self.down_bias'),
        "Your gelu is the exact one. T5 uses its tanh approximation.": ('F.gelu(hidden, approximate="tanh")', "F.gelu(hidden)"),
        "Your second bias is missing.": (" + self.up_bias", ""),
        "Your first bias is missing.": (" + self.down_bias", ""),
        "Every row gets the adapter of the first row. In a mixed batch each row has its own.":
            ("u, self.down)", "u, self.down[:1].expand(len(u), -1, -1))", "self.up)", "self.up[:1].expand(len(u), -1, -1))"),
        "There is no activation between your two products, so that they are one product.":
            ('F.gelu(hidden, approximate="tanh")', "hidden"),
    },
    also=[("t5.Adapter.__call__", """
        hidden = u @ self.down + self.down_bias
        inner = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
        return (0.5 * hidden * (1 + torch.tanh(inner))) @ self.up + self.up_bias
    """)],
)  # fmt: skip
def adapter(t5):
    """Write the adapter, a bottleneck beside the feed-forward layer: gelu(u W_down + b_down) W_up + b_up.

    The weights are generated. They have a batch axis: either one adapter for all rows, or one for each row.
    """
    d, r = 6, 4
    for batch in (3, 1):
        u = torch.randn(3, 5, d)
        down, down_bias = torch.randn(batch, d, r), torch.randn(batch, 1, r)
        up, up_bias = torch.randn(batch, r, d), torch.randn(batch, 1, d)
        wanted = torch.zeros(3, 5, d)
        for row in range(3):
            b = row if batch == 3 else 0
            for place in range(5):
                for j in range(r):
                    h = sum(u[row, place, i] * down[b, i, j] for i in range(d)) + down_bias[b, 0, j]
                    gelu = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
                    wanted[row, place] += gelu * up[b, j]
                wanted[row, place] += up_bias[b, 0]
        found = t5.Adapter(down, down_bias, up, up_bias)(u)
        yield f"{'one adapter for each row' if batch == 3 else 'one adapter for all rows'}", found, wanted


@adapter.facts
def _(hint):
    config = hint.HINTConfig()
    model = hint.on_meta(hint.T5Config(d_model=2048, d_ff=5120, num_layers=24, num_decoder_layers=24, num_heads=32), config)
    size = sum(parameter.numel() for parameter in model.t5.parameters())
    kinds = model.hypernetwork.kinds.values()
    generated = sum(kind.slots * kind.columns * kind.width for kind in kinds)
    yield "p / N at XL, percent", 100 * generated / size, "4 %"


@exercise(
    "rebuild", ["t5.attend"], level=2, minutes=25, paper="Raffel et al., section 2.1; HINT, section 3.1.1",
    hint="Join the scores of all parts before the softmax, and cut the weights again after it.",
    why="A fresh score has a standard deviation of 1.0, because W_q starts small. Divided by sqrt(64), it has 0.12.",
    near={
        "You divide the scores by sqrt(k). T5 does not.": ("scores = scores + bias", "scores = scores / query.shape[-1] ** 0.5 + bias"),
        "You take a softmax for each part. One softmax runs over the keys of all parts.": ("t5.attend", """
            lengths = [part.key.shape[2] for part in parts]
            bias = F.pad(bias, (sum(lengths) - bias.shape[-1], 0))
            scores = [query @ part.key.mT + piece for part, piece in zip(parts, bias.split(lengths, -1))]
            return sum(dropout(score.softmax(-1).type_as(query)) @ part.value for score, part in zip(scores, parts))
        """),
        "Your softmax runs over the queries. It runs over the keys, the last axis.": ("dim=-1).type_as", "dim=-2).type_as"),
        "The bias is not added.": ("scores = scores + bias", "scores = scores"),
        "You add the bias to the weights. It belongs to the scores, before the softmax.":
            ("scores = scores + bias", "", "dropout(scores.softmax(dim=-1)", "dropout((scores.softmax(dim=-1) + bias)"),
        "You drop scores. Dropout is for the weights, after the softmax.":
            ("dropout(scores.softmax(dim=-1).type_as(query))", "dropout(scores).softmax(dim=-1).type_as(query)"),
        "Dropout is not called.": ("dropout(scores.softmax(dim=-1).type_as(query))", "scores.softmax(dim=-1).type_as(query)"),
        "The weights of one part meet the values of another.": ("zip(pieces, parts)", "zip(pieces, parts[::-1])"),
        "The prefix stands at the end of your bias. It is the first P keys.": ("(prefix, 0)", "(0, prefix)"),
        "Your prefix is hidden. Its bias is zero.": ("F.pad(bias, (prefix, 0))", "F.pad(bias, (prefix, 0), value=MASKED)"),
        "Your prefix has the bias of the first token. It has no position, so its bias is zero.":
            ("F.pad(bias, (prefix, 0))", "torch.cat([bias[..., :1].expand(*bias.shape[:-1], prefix), bias], -1)"),
    },
    also=[("t5.attend", """
        batch = len(query)
        key, value = (torch.cat([part[i].expand(batch, -1, -1, -1) for part in parts], dim=2) for i in (0, 1))
        scores = query @ key.transpose(2, 3)
        scores[..., scores.shape[-1] - bias.shape[-1] :] += bias
        return dropout(scores.softmax(-1).to(query.dtype)) @ value
    """)],
)  # fmt: skip
def attention(t5):
    """Write the attention of T5, over the keys and values of several parts (a prefix, an instruction, an input).

    The scores are not divided by sqrt(k). The bias is one for the last keys; the P keys in front of these are a prefix.
    A batch of 1 in a part serves all rows. `dropout` is a function of the weights.
    """
    heads, queries, width = 2, 4, 3
    for what, sizes in (("one part", [(2, 5)]), ("two parts", [(2, 3), (2, 3)]), ("a shared part", [(1, 2), (2, 4), (2, 1)])):
        query, total = torch.randn(2, heads, queries, width), sum(length for _, length in sizes)
        parts = [t5.KeyValue(*torch.randn(2, batch, heads, length, width)) for batch, length in sizes]
        for prefix in (0, 2):
            bias, wanted = torch.randn(2, heads, queries, total - prefix), torch.zeros_like(query)
            for b, h, t in itertools.product(range(2), range(heads), range(queries)):
                keys, values = ([pair for part in parts for pair in part[i][b % len(part[i]), h]] for i in (0, 1))
                scores = [sum(query[b, h, t] * key) for key in keys]
                powers = [math.exp(s + (bias[b, h, t, i - prefix] if i >= prefix else 0)) for i, s in enumerate(scores)]
                wanted[b, h, t] = sum(p / sum(powers) * 0.5 * value for p, value in zip(powers, values))
            found = t5.attend(query, parts, bias, lambda weights: weights * 0.5)
            yield f"{what}, a prefix of {prefix}, and a dropout that halves", found, wanted
    query, parts = query.bfloat16(), [t5.KeyValue(*(x.bfloat16() for x in part)) for part in parts]
    yield "queries, keys and values in bf16", t5.attend(query, parts, bias, lambda x: x * 0.5), wanted.bfloat16(), 3e-2


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
        "Your prefix stands after the tokens. It stands before them.":
            ("[p.expand(batch, -1, -1, -1).type_as(x), x]", "[x, p.expand(batch, -1, -1, -1).type_as(x)]"),
        "Keys and values of the prefix have changed places.": ("zip(self, new)", "zip(self[::-1], new)"),
        "Only the keys got a prefix. The values need one too.":
            ("t5.KeyValue.before", "key = torch.cat([self.key.expand(len(new.key), -1, -1, -1).type_as(new.key), new.key], dim=2)\n"
             "return KeyValue(key, new.value)"),
        "Every row gets the prefix of the first row.": ("p.expand(batch", "p[:1].expand(batch"),
        "The type changes: the result has the type of the tokens' keys and values.": (".type_as(x), x", ", x"),
        "The tokens are gone: only the prefix is left.": (".type_as(x), x]", ".type_as(x)]"),
        "The cross-prefix stands after the sources.": ("(*modules.cross_prefix, *projected)", "(*projected, *modules.cross_prefix)"),
        "The cross-prefix is missing.": ("(*modules.cross_prefix, *projected)", "tuple(projected)"),
        "The sources come in the wrong order.": ("for source in sources]", "for source in sources[::-1]]"),
        "The LoRA of the self-attention is used. The cross-attention has its own.": ("modules.cross_lora", "modules.lora"),
        "The LoRA of the cross-attention is not used.": (", modules.cross_lora", ""),
        "The self-attention projects the sources. The cross-attention has weights of its own.":
            ("self.cross_attention.project", "self.self_attention.project"),
    },
    also=[("t5.KeyValue.before", """
        def join(prefix, tokens):
            rows = [torch.cat([prefix[b % len(prefix)].to(tokens.dtype), row], dim=1) for b, row in enumerate(tokens)]
            return torch.stack(rows)
        return KeyValue(join(self.key, new.key), join(self.value, new.value))
    """)],
)  # fmt: skip
def prefix(t5):
    """Put a generated prefix in front of the keys and values of tokens, and list what a cross-attention reads.

    `before`: along the axis of places. A prefix of batch 1 serves all rows; the result has the tokens' type.
    `read`: first the cross-prefixes, then each source, projected by `self.cross_attention`.
    """
    for batch, dtype in ((3, torch.float32), (1, torch.float32), (3, torch.bfloat16)):
        own, new = torch.randn(2, batch, 2, 4, 5), torch.randn(2, 3, 2, 4, 5).to(dtype)
        wanted = torch.zeros(2, 3, 2, 8, 5, dtype=dtype)
        for i, row, place in itertools.product(range(2), range(3), range(4)):
            wanted[i, row, :, place] = own[i, row if batch == 3 else 0, :, place]
            wanted[i, row, :, 4 + place] = new[i, row, :, place]
        found = t5.KeyValue(*own).before(t5.KeyValue(*new))
        yield f"a prefix of batch {batch} before three rows of {dtype}", found, tuple(wanted)
    block = tiny_t5(t5).decoder.blocks[1]
    lora, other = (t5.LoRA(*(torch.randn(1, *shape) for shape in 2 * [(24, 2), (2, 30)])) for _ in range(2))
    sources = [t5.Source(torch.randn(1, length, 24), torch.ones(1, length)) for length in (3, 2)]
    pairs = (t5.KeyValue(*torch.randn(2, 1, 3, 6, 10)),)
    wanted = []
    for states, _ in sources:
        key = states[0] @ block.cross_attention.k.weight.T
        value = states[0] @ block.cross_attention.v.weight.T + states[0] @ lora.value_down[0] @ lora.value_up[0]
        wanted.append([torch.stack([x[:, 10 * h : 10 * h + 10] for h in range(3)])[None] for x in (key, value)])
    found = block.read(sources, t5.LayerModules(cross_prefix=pairs, cross_lora=lora, lora=other))
    yield "what a cross-attention reads", found, copied([*pairs, *wanted])
    yield "the same without modules", len(block.read(sources, t5.LayerModules())), 2


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
    "rebuild", ["hypernet.ColumnGenerator.weights"], level=3, minutes=40, paper="HINT, section 3.1.1 (parameter generators)",
    hint="Join the embeddings in the order of `self.kinds`, attend once, split in the same order, then call the networks.",
    why="At T5 base 26,784 embeddings become as many columns. Undivided, the demo stands at a loss of X after 400 steps, not Y.",
    near={
        "Your columns are not divided by sqrt(d): multiply by `self.scale`.": (" * self.scale", ""),
        "Your columns are divided by d. Divide them by sqrt(d).": ("* self.scale", "* self.scale**2"),
        "The axes of slots and columns have changed places: [B, slots, columns, width].":
            ("(kind.slots, kind.columns)", "(kind.columns, kind.slots)"),
        "The columns of one slot are not neighbours in your Z: embeddings are listed slot by slot.":
            ("(kind.slots, kind.columns))", "(kind.columns, kind.slots)).transpose(1, 2)"),
        "Nobody reads the instruction: Z is C itself.": ("if self.attention is None:", "if True:"),
        "Padding is read. Hand the mask to the attention.": ("states, attention_mask, recompute", "states, attention_mask * 0 + 1, recompute"),
        "All examples get the weights of the first instruction.": ("pieces = z.split", "pieces = z[:1].expand(len(states), -1, -1).split"),
        "You add the embeddings to what the attention returns. There is no residual.":
            ("z = recomputable(self.attention,", "z = z + recomputable(self.attention,"),
        "The embeddings of one kind are used for another: join and split in the same order.":
            ("for name in self.kinds]).unsq", "for name in reversed(self.kinds)]).unsq"),
        "Without a reader, one set of columns is given for the batch. Expand it to all examples.":
            ("z = z.expand(len(states), -1, -1)", "z = z"),
    },
    also=[("hypernet.ColumnGenerator.weights", """
        weights = {}
        for name, kind in self.kinds.items():
            z = self.embeddings[name][None].repeat(len(states), 1, 1)
            if self.attention is not None:
                z = self.attention(self.embeddings[name][None], states, attention_mask)
            weights[name] = self.networks[name](z).reshape(len(states), *kind) * self.scale
        return weights
    """)],
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
        attention, wanted = generator.attention, {}
        for name, kind in generator.kinds.items():
            wanted[name] = torch.zeros(2, *kind)
            first, last = generator.networks[name][0].weight, generator.networks[name][-1].weight
            for b, slot, column in itertools.product(range(2), range(kind.slots), range(kind.columns)):
                z = generator.embeddings[name][slot * kind.columns + column]
                if reads:
                    seen, heads = states[b, : int(mask[b].sum())], []
                    for h in range(3):
                        head = slice(10 * h, 10 * h + 10)
                        scores = (seen @ attention.k.weight[head].T) @ (attention.q.weight[head] @ z)
                        heads.append((seen @ attention.v.weight[head].T).T @ scores.softmax(0))
                    z = attention.o.weight @ torch.cat(heads)
                hidden = torch.nn.functional.gelu(first @ z, approximate="tanh")
                wanted[name][b, slot, column] = last @ hidden / math.sqrt(24)
        found = generator.weights(states, mask)
        who = "columns for two instructions" if reads else "columns without a reader of the instruction"
        yield f"{who}: names", sorted(found), sorted(wanted)
        for name in wanted:
            yield f"{who}: {name}", found[name], wanted[name].detach()


@exercise(
    "rebuild", ["hypernet.Generator.layer"], level=2, minutes=20, paper="HINT, section 3.1.1 (scaling down parameters)",
    hint="What embedding j wrote is column j of W_down and row j of W_up. A matrix turned is not a matrix reshaped.",
    why="Training does not find this error: reshaped as in the authors' code, W_down learns as well.",
    near={
        "You reshape W_down, as the authors' code does: an embedding then fills several rows. Turn it (`.mT`).":
            ("weights[\"adapter_down\"][layer].mT", "weights[\"adapter_down\"][layer].reshape_as(weights[\"adapter_down\"][layer].mT)"),
        "You turn W_up in place of W_down. Vector j is row j of W_up and column j of W_down.":
            ("[layer].mT, weights[\"adapter_up\"][layer]", "[layer], weights[\"adapter_up\"][layer].mT"),
        "In your prefix, heads and their numbers have changed places: a head is k neighbours of a vector.":
            ("part.unflatten(-1, (self.heads, -1)).transpose(1, 2)", "part.unflatten(-1, (-1, self.heads)).permute(0, 3, 1, 2)"),
        "You reshape a prefix to [B, h, P, k] without exchanging axes: heads get numbers of other places.":
            ("part.unflatten(-1, (self.heads, -1)).transpose(1, 2)", "part.reshape(len(part), self.heads, part.shape[1], -1)"),
        "The biases have changed places.": ("weights[\"adapter_down_bias\"][layer], up, weights[\"adapter_up_bias\"][layer]",
                                            "weights[\"adapter_up_bias\"][layer], up, weights[\"adapter_down_bias\"][layer]"),
        "The prefix of the cross-attention is given to the self-attention: the first number is that of the self-attention.":
            ("own, cross = prefixes[:1], prefixes[1:]", "own, cross = prefixes[-1:], prefixes[:-1]"),
        "Keys and values of the prefix have changed places.":
            ("weights[\"prefix_key\"][slot], weights[\"prefix_value\"][slot]", "weights[\"prefix_value\"][slot], weights[\"prefix_key\"][slot]"),
        "You take prefixes by the number of the layer. They are numbered by attention.":
            ("weights[\"prefix_key\"][slot], weights[\"prefix_value\"][slot]", "weights[\"prefix_key\"][layer], weights[\"prefix_value\"][layer]"),
        "LoRA is not divided by its rank: multiply W_up by `self.lora_scale`.": (" * self.lora_scale", ""),
        "LoRA of queries and of values have changed places.":
            ("LoRA(query_down, query_up, value_down, value_up)", "LoRA(value_down, value_up, query_down, query_up)"),
        "There is no cross-prefix.": ("tuple(cross)", "()"),
    },
    also=[("[layer].mT, weights", "[layer].transpose(1, 2), weights",
           "part.unflatten(-1, (self.heads, -1)).transpose(1, 2)", "torch.stack(part.chunk(self.heads, dim=-1), dim=1)")],
)  # fmt: skip
def hand_over(hint):
    """Hand the generated columns of one layer to T5, as adapter, prefixes and LoRA.

    `weights[name][number]` [B, columns, width] holds one vector a row. Adapters are numbered by layer, prefixes and
    LoRA by attention: `attentions` names the self-attention, then, in a decoder, the cross-attention.
    W_down and its like are [B, d, r], W_up [B, r, ...]; LoRA's W_up is multiplied by `self.lora_scale`.
    The names are those of `generated_kinds`. What is not in `weights` is absent: None, or () for the cross-prefix.
    """
    generator = tiny_hint(hint).hypernetwork
    kinds = {**generator.kinds, **tiny_hint(hint, {"modules": "lora"}).hypernetwork.kinds}
    weights = {name: torch.randn(8, 2, kind.columns, kind.width) for name, kind in kinds.items()}

    def turned(x):
        return torch.stack([torch.stack([x[b, :, i] for i in range(x.shape[2])]) for b in range(2)])

    def heads(x):
        wanted = torch.zeros(2, 3, 4, 10)
        for b, h, place, i in itertools.product(range(2), range(3), range(4), range(10)):
            wanted[b, h, place, i] = x[b, place, 10 * h + i]
        return wanted

    for what, layer, attentions in (("an encoder layer", 1, [1]), ("a decoder layer", 3, [4, 5])):
        found = generator.layer(weights, layer, attentions)
        adapter = [weights[f"adapter_{name}"][layer] for name in ("down", "down_bias", "up", "up_bias")]
        yield f"adapter of {what}", found.adapter, (turned(adapter[0]), *adapter[1:])
        pairs = [tuple(heads(weights[f"prefix_{name}"][slot]) for name in ("key", "value")) for slot in attentions]
        yield f"prefix of the self-attention of {what}", found.prefix, pairs[0]
        yield f"prefixes of the cross-attention of {what}", found.cross_prefix, tuple(pairs[1:])
        for slot, own in zip(attentions, (found.lora, found.cross_lora)):
            parts = [weights[f"lora_{name}"][slot] for name in ("query_down", "query_up", "value_down", "value_up")]
            yield f"LoRA {slot} of {what}", own, (turned(parts[0]), parts[1] / 5, turned(parts[2]), parts[3] / 5)
    chosen = {name: weights[name] for name in ("prefix_key", "prefix_value")}
    found = generator.layer(chosen, 0, [0])
    yield "prefixes alone: no adapter, no LoRA", (found.adapter, found.lora), (None, None)
    chosen = {name: weights[name] for name in weights if name.startswith("adapter")}
    yield "adapters alone: no prefixes, no LoRA", generator.layer(chosen, 0, [0])[1:4], (None, (), None)


@exercise(
    "rebuild", ["hint.HINT.fuse", "hint.HINT.forward"], level=2, minutes=30, paper="HINT, sections 3.1 and 3.3",
    hint="`torch.unique(..., dim=0, return_inverse=True)` names the distinct instructions, and which one each example has.",
    why="16 examples of two tasks would cost 4.6 times the FLOPs (T5 base, instructions of 128 tokens, inputs of 64, answers of 16) "
        "if each encoded its own instruction.",
    near={
        "The input is encoded without the generated modules.": ("input_ids, attention_mask, task.modules)", "input_ids, attention_mask)"),
        "The decoder reads the input twice, and the instruction never.": ("[Source(task.states, task.attention_mask), source]", "[source, source]"),
        "The decoder does not read the instruction: there is no fusion.": ("[Source(task.states, task.attention_mask), source]", "[source]"),
        "The padding of instructions is read. Hand on the instruction's mask.":
            ("Source(task.states, task.attention_mask)", "Source(task.states, torch.ones_like(task.attention_mask))"),
        "The decoder has no modules.": ("self.fuse(task, input_ids), task.modules)", "self.fuse(task, input_ids))"),
        "Examples get the modules of others: `torch.unique` sorts, so the order is not that of the batch.":
            ("example_of.to(task", "example_of.sort().values.to(task"),
        "You encode the instruction of every example. Encode each distinct one once.":
            ("distinct, example_of = torch.unique(instruction_ids, dim=0, return_inverse=True)",
             "distinct, example_of = instruction_ids, torch.arange(len(instruction_ids))"),
        "All examples get the modules of one instruction.": ("index_select(0, index)", "index_select(0, 0 * index)"),
        "The mask that was given is not used.": ("input_ids, attention_mask, task.modules)", "input_ids, None, task.modules)"),
        "The input is not read, only the instruction.": ("[Source(task.states, task.attention_mask), source]", "[Source(task.states, task.attention_mask)]"),
    },
    also=[("hint.HINT.fuse", """
        source = self.t5.read(input_ids, attention_mask, task.modules)
        rows = len(source.states)
        states = torch.cat([task.states.expand(rows, -1, -1), source.states], dim=1)
        return [Source(states, torch.cat([task.attention_mask.expand(rows, -1), source.attention_mask], dim=1))]
    """)],
)  # fmt: skip
def fusion(hint):
    """Write instruction fusion, and the training pass of a mixed-task batch.

    `fuse`: encode the inputs with the task's modules -> the list of sources that the decoder reads: first the
    instruction's states (if there are any), then the input's. `Source(states, attention_mask)`.
    `forward`: encode each distinct instruction once (`self.encode_instruction`), give its modules and states to all its
    examples, and return `self.t5.loss(labels, sources, modules)`. Rows of nested tensors: `map_tensors`.
    """
    model = tiny_hint(hint)
    instructions = torch.tensor([[9, 8, 7, 1, 0], [5, 6, 7, 8, 1], [9, 8, 7, 1, 0], [5, 6, 7, 8, 1]])
    inputs = torch.tensor([[11, 12, 13, 1], [14, 15, 1, 0], [16, 17, 18, 1], [19, 1, 0, 0]])
    labels = torch.tensor([[21, 22, 1], [23, 1, -100], [24, 25, 1], [26, 1, -100]])

    def loss_alone(row, fused=True):
        instruction, text, answer = (ids[row][ids[row] > 0].tolist() for ids in (instructions, inputs, labels))
        told = model.t5.read(torch.tensor([instruction]))
        modules = model.hypernetwork(*told)
        read = model.t5.read(torch.tensor([text]), None, modules)
        both = [torch.cat(pair, dim=1) for pair in zip(told, read)] if fused else read
        states = model.t5.decode(torch.tensor([[0, *answer[:-1]]]), [hint.Source(*both)], modules)
        scores = model.t5.logits(states)[0].log_softmax(-1)
        return -sum(scores[place, i] for place, i in enumerate(answer)), len(answer)

    encoded = []
    model.hypernetwork.register_forward_pre_hook(lambda module, arguments: encoded.append(len(arguments[0])))
    for rows in ([0, 1, 2, 3], [1, 0], [2], [0, 2]):
        losses, tokens = zip(*(loss_alone(row) for row in rows))
        encoded.clear()
        found = model(*(ids[rows] for ids in (instructions, inputs, labels)))
        number = len(set(instructions[rows, 0].tolist()))
        yield f"loss of {len(rows)} examples of {number} tasks", found.cross_entropy, (sum(losses) / sum(tokens)).detach()
        yield f"instructions encoded for {len(rows)} examples of {number} tasks", sum(encoded), number
    told = model.encode_instruction(instructions[:1, :4])
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 0]])
    seen = [model.t5.read(inputs[:2], mask, told.modules).states, mask]
    wanted = [torch.cat([part.expand(2, *part.shape[1:]), own], 1) for part, own in zip(told[1:], seen)]
    found = [[part.expand(2, *part.shape[1:]) for part in source] for source in model.fuse(told, inputs[:2], mask)]
    yield "sources of one task and two inputs, some tokens hidden", [torch.cat(x, 1) for x in zip(*found)], copied(wanted)
    model = tiny_hint(hint, {"fusion": False})
    losses, tokens = zip(*(loss_alone(row, fused=False) for row in range(4)))
    yield "a model without fusion", model(instructions, inputs, labels).cross_entropy, (sum(losses) / sum(tokens)).detach()


@fusion.facts
def _(hint):
    once, answers = hint.exact_flops(hint.on_meta(hint.T5Config(**BASE), hint.HINTConfig()), 16, 64, 128, 16)
    yield "FLOPs of 16 encodings in place of two", (16 * once + answers) / (2 * once + answers), "4.6"
