"""Puzzles: write a loop as products, sums and shapes. One `return`, no loop, and only the calls that are named."""

import random
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from mechanics import exercise
from small import tiny_hint


@exercise(
    "puzzle", ["t5.padding_bias"], level=1, minutes=10, paper="HINT, section 3.3 (batches of several lengths)",
    hint="Compare the mask with 0, then add two axes of length 1 by indexing with None.",
    why="A bias of -inf makes a row of padding alone NaN. With -1e9 each of its 5 keys gets a weight of 0.20.",
    calls=["unsqueeze", "where", "type", "float", "logical_not", "masked_fill", "zeros", "zeros_like", "eq"],
    near={
        "You hide the tokens and show the padding.": ("== 0", "!= 0"),
        "You hide the queries at the places of padding. Hide the keys, which are the last axis.":
            ("[:, None, None, :]", "[:, None, :, None]"),
        "Your bias is minus infinity. A row that sees nothing becomes NaN in the softmax.":
            ("(attention_mask == 0)[:, None, None, :] * MASKED",
             "torch.where(attention_mask[:, None, None, :] == 0, -torch.inf, 0.0)"),
        "One axis is missing: the bias must have an axis for heads and an axis for queries.": ("None, None", "None"),
        "The scores of padding go down by 1 only. Multiply by MASKED.": ("* MASKED", "* -1.0"),
        "Padding gets 1 and tokens 0, so that padding is preferred. Multiply by MASKED.": ("* MASKED", "* 1.0"),
        "Your bias is negative, but it is not MASKED: scores may be larger.": ("* MASKED", "* -1e4"),
        "A mask of integers is turned bit by bit: `~1` is -2, so your bias is positive.":
            ("(attention_mask == 0)", "(~attention_mask)"),
    },
    also=[("(attention_mask == 0)[:, None, None, :] * MASKED",
           "torch.where(attention_mask.unsqueeze(1).unsqueeze(1) == 0, MASKED, 0.0)")],
)  # fmt: skip
def hide_padding(t5):
    """Make the bias that is added to attention scores [B, h, T, S] to hide padding.

    for b in range(B):
        for s in range(S):
            bias[b, 0, 0, s] = 0.0 if attention_mask[b, s] else MASKED

    The mask [B, S] holds ones and zeros, as integers or as booleans. The bias is of type float32.
    """
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    scores = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    wanted = torch.tensor([[[[0.0 if seen else -1e9 for seen in row]]] for row in mask.tolist()])
    bias = t5.padding_bias(mask)
    yield "bias of a mask of integers", bias, wanted
    yield "bias of a mask of booleans", t5.padding_bias(mask.bool()), wanted
    weights = (scores + bias).softmax(-1)
    yield "weights of a row of padding alone", weights[2], torch.full((2, 4, 5), 0.2)
    yield "weights of a row of 2 tokens", weights[1], F.pad(scores[1, ..., :2].softmax(-1), (0, 3))


@hide_padding.facts
def _(t5):
    bias = t5.padding_bias(torch.zeros(1, 5))
    yield "weight of each key of a row of padding alone", bias.softmax(-1).max().item(), "0.20"


@exercise(
    "puzzle", ["hypernet.mean_of_tokens"], level=1, minutes=10, paper="HINT, section 4 (Hypter reads a mean)",
    hint="Multiply by the mask before the sum, and divide by the sum of the mask.",
    why="Divided by all places, the mean of 3 tokens in a row of 7 shrinks to 0.43 of its size.",
    calls=["unsqueeze", "sum", "clamp", "type_as", "einsum", "where", "masked_fill", "to", "float"],
    near={
        "You divide by all places. Divide by the number of tokens.": ("weight.sum(1).clamp(min=1)", "states.shape[1]"),
        "Padding is in your sum.": ("(states * weight).sum(1)", "states.sum(1)"),
        "Your mean is taken over everything, padding included.":
            ("(states * weight).sum(1) / weight.sum(1).clamp(min=1)", "states.mean(1)"),
        "You average over the examples of the batch. Average over the tokens of each example.":
            ("(states * weight).sum(1) / weight.sum(1).clamp(min=1)", "(states * weight).sum(0) / len(states)"),
        "A row without any token becomes NaN. Divide by at least 1.": (".clamp(min=1)", ""),
        "This is the sum. Divide by the number of tokens.": (" / weight.sum(1).clamp(min=1)", ""),
        "This is the state of the last place alone.":
            ("(states * weight).sum(1) / weight.sum(1).clamp(min=1)", "states[:, -1]"),
        "Your mean is float32 where the states are bfloat16.": (".type_as(states)", ".float()"),
    },
    also=[("return (states * weight).sum(1)", 'return torch.einsum("bsd,bs->bd", states, weight[..., 0])')],
)  # fmt: skip
def mean_without_padding(hypernet):
    """Average the states of the tokens of each row. Hypter knows an instruction only by this mean.

    for b in range(B):
        tokens = [states[b, s] for s in range(S) if attention_mask[b, s]]
        mean[b] = sum(tokens) / max(len(tokens), 1)

    states [B, S, d], a mask [B, S] of ones and zeros -> [B, d], of the type of the states.
    """
    states = torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(0))
    lengths = (7, 3, 1, 0)
    mask = torch.tensor([[1] * length + [0] * (7 - length) for length in lengths])
    wanted = [sum(states[b, :length]) / max(length, 1) + torch.zeros(5) for b, length in enumerate(lengths)]
    found = hypernet.mean_of_tokens(states, mask)
    for b, length in enumerate(lengths):
        yield f"mean of a row of {length} tokens and {7 - length} places of padding", found[b], wanted[b]
    yield "mean of bfloat16 states", hypernet.mean_of_tokens(states.bfloat16()[:1], mask[:1]).dtype, torch.bfloat16


@mean_without_padding.facts
def _(hypernet):
    mean = hypernet.mean_of_tokens(torch.ones(1, 7, 5), torch.tensor([[1, 1, 1, 0, 0, 0, 0]]))
    yield "sum of three ones over seven places, beside their mean", (3 / 7 / mean).mean().item(), "0.43"


@exercise(
    "puzzle", ["t5.Attention.split"], level=1, minutes=10, paper="Raffel et al., section 2.1 (heads)",
    hint="Cut the last axis into (heads, numbers of a head), then exchange two axes.",
    why="Cut into (k, h), T5 base leaves only 66 of its 768 numbers in their head. A fresh model trains as well so: "
        "only a published checkpoint shows the error.",
    calls=["unflatten", "transpose", "reshape", "view", "permute", "movedim", "swapaxes", "len"],
    near={
        "Head and number have changed places: a head is k neighbours of the last axis.":
            ("(self.heads, -1)).transpose(1, 2)", "(-1, self.heads)).permute(0, 3, 1, 2)"),
        "You reshaped without exchanging axes: a head gets the numbers of other tokens.":
            ("x.unflatten(-1, (self.heads, -1)).transpose(1, 2)",
             "x.reshape(len(x), self.heads, x.shape[1], -1)"),
        "The axes are [B, S, h, k]. Exchange S and h.": (".transpose(1, 2)", ""),
        "You exchanged the last two axes too: keys are [B, h, S, k], not [B, h, k, S].":
            (".transpose(1, 2)", ".permute(0, 2, 3, 1)"),
        "You exchanged the axes of heads and numbers, not those of tokens and heads.": ("(1, 2)", "(2, 3)"),
        "You exchanged the batch with the tokens.": (".transpose(1, 2)", ".transpose(0, 1)"),
        "You exchanged the batch with the heads.": (".transpose(1, 2)", ".permute(2, 0, 1, 3)"),
        "You cut into k heads of h numbers. There are h heads of k numbers.": ("(self.heads, -1)", "(-1, self.heads)"),
    },
    also=[("x.unflatten(-1, (self.heads, -1)).transpose(1, 2)",
           "x.reshape(len(x), x.shape[1], self.heads, -1).permute(0, 2, 1, 3)")],
)  # fmt: skip
def heads(t5):
    """Divide the numbers of each token among the heads of an attention: [B, S, h*k] -> [B, h, S, k].

    for b in range(B):
        for head in range(h):
            for s in range(S):
                for i in range(k):
                    y[b, head, s, i] = x[b, s, head * k + i]
    """
    attention = t5.Attention(t5.T5Config(d_model=8, d_kv=4, num_heads=3))
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    wanted = torch.empty(2, 3, 5, 4)
    for head in range(3):
        for i in range(4):
            wanted[:, head, :, i] = x[:, :, head * 4 + i]
    yield "x of 2 rows, 5 tokens, 3 heads of 4 numbers", attention.split(x), wanted
    yield "x of one token", attention.split(x[:, :1]), wanted[:, :, :1]


@heads.facts
def _(t5):
    numbers = torch.arange(768.0).expand(1, 1, -1)
    right = t5.Attention(t5.SIZES["base"]).split(numbers)[0, :, 0]
    wrong = numbers.unflatten(-1, (64, 12)).permute(0, 3, 1, 2)[0, :, 0]
    yield "numbers of T5 base in their head", sum(torch.isin(*pair).sum().item() for pair in zip(right, wrong)), "66"


@exercise(
    "puzzle", ["t5.RelativeBias.forward"], level=3, minutes=25, paper="Raffel et al., section 2.1 (position bias)",
    hint="Row i of the bias is a window of one long list of distances. Windows of later queries begin further left.",
    why="100 queries and 100 keys have 10,000 pairs, but only 199 distances: so many buckets are computed.",
    calls=["arange", "relative_position_bucket", "to", "unfold", "flip", "unsqueeze", "len", "permute", "transpose"],
    near={
        "You took query minus key. Take key minus query.": ("bucket(relative,", "bucket(-relative,"),
        "You ignore first_query, where the queries begin.": ("bucket(relative,", "bucket(relative + first_query,"),
        "Each distance is too large by 1.": ("bucket(relative,", "bucket(relative + 1,"),
        "Your heads are the last axis, not the second.": (".unsqueeze(0)", ".permute(1, 2, 0).unsqueeze(0)"),
        "Your rows are in the wrong order: the last query sees the first window.": (".flip(1)", ""),
        "Your bias is right, but you looked up the bucket of every pair. Look up each distance once.":
            ("bucket(relative,", "bucket(relative.unfold(0, keys, 1),",
             ".T  #", ".permute(2, 0, 1)  #", "bias.unfold(1, keys, 1)", "bias"),
    },
    also=[("bias.unfold(1, keys, 1).flip(1).unsqueeze(0)",
           "bias[None, :, torch.arange(keys) - torch.arange(queries)[:, None] + queries - 1]")],
)  # fmt: skip
def spread(t5):
    """Spread the biases of all distances over queries and keys, and look up each distance once.

    for i in range(queries):
        for j in range(keys):
            bias[0, :, i, j] = self.weight[relative_position_bucket(j - (first_query + i), ...)]    # of all heads

    The other arguments are self.bidirectional, len(self.weight) and self.max_distance. Call the function once, with a
    tensor of the queries + keys - 1 distances that occur. The result is [1, h, queries, keys].
    """
    config = t5.T5Config(num_heads=3, relative_attention_num_buckets=8, relative_attention_max_distance=20)
    bucket_of, numbers = t5.relative_position_bucket, []
    t5.relative_position_bucket = lambda relative, *more: numbers.append(relative.numel()) or bucket_of(relative, *more)
    for bidirectional in (True, False):
        layer = t5.RelativeBias(config, bidirectional)
        layer.weight.data = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
        for queries, keys, first in ((5, 7, 0), (1, 6, 5), (4, 3, 2), (1, 1, 0)):
            distances = torch.tensor([[j - first - i for j in range(keys)] for i in range(queries)])
            wanted = layer.weight[bucket_of(distances, bidirectional, 8, 20)].permute(2, 0, 1)[None]
            name = f"{queries} queries from position {first}, {keys} keys, bidirectional {bidirectional}"
            yield name, layer(queries, keys, first), wanted
    yield "distances looked up in all", sum(numbers), 2 * (11 + 6 + 6 + 1)


@spread.facts
def _(t5):
    bias = t5.RelativeBias(t5.SIZES["toy"], bidirectional=True)
    bucket_of, numbers = t5.relative_position_bucket, []
    t5.relative_position_bucket = lambda relative, *more: numbers.append(relative.numel()) or bucket_of(relative, *more)
    yield "pairs", bias(100, 100)[0, 0].numel(), "10,000"
    yield "distances", numbers[0], "199"


@exercise(
    "puzzle", ["t5.T5._target_logits"], level=2, minutes=25, paper="HINT, section 3.3; Raffel et al., section 2.1",
    hint="Shift the labels right by padding on the left. Find the places of labels with nonzero on the flat labels.",
    why="A fresh tiny T5 with a tied head has a loss of 74. Shown the token itself, it copies with a loss of 0.00.",
    calls=["flatten", "nonzero", "pad", "clamp", "decode", "logits", "index_select", "to", "where", "masked_fill",
           "roll", "cat", "index_fill", "tensor", "full", "new_full", "zeros", "new_zeros", "clone", "len"],
    near={
        "You did not shift the labels right.": ("F.pad(labels[:, :-1], (1, 0), value=START).clamp", "labels.clamp"),
        "You shifted left: the decoder sees the token after the one that it is to predict.":
            ("F.pad(labels[:, :-1], (1, 0), value=START)", "F.pad(labels[:, 1:], (0, 1), value=START)"),
        "The last label came round to the front. The first decoder id is START.":
            ("F.pad(labels[:, :-1], (1, 0), value=START)", "labels.roll(1, 1)"),
        "The decoder starts with </s>. T5 starts with START, id 0.": ("value=START", "value=EOS"),
        "The decoder reads -100 as another id. Make it PAD.": (".clamp(min=PAD)", ".remainder(self.config.vocab_size)"),
        "Your decoder ids are one place too long.": ("labels[:, :-1]", "labels"),
    },
    also=[("F.pad(labels[:, :-1], (1, 0), value=START).clamp(min=PAD)",
           "torch.where(labels == NO_LABEL, PAD, labels).roll(1, 1).index_fill(1, torch.tensor([0]), START)")],
)  # fmt: skip
def teacher_forcing(t5, hint):
    """Give the decoder the true answer shifted right, and return the logits and ids of the target tokens.

    for b in range(B):
        shown = [START, *labels[b, :-1]]        # of these, -100 becomes PAD
        states = self.decode(shown, ...)
        append self.logits(states[t]) and labels[b, t] for each t whose label is not NO_LABEL

    labels [B, T] -> (logits [N, V], ids [N]), N labels, row by row. Call `self.decode` and `self.logits` once.
    A label of -100 may stand anywhere, also between others.
    """
    told = tiny_hint(hint, num_decoder_layers=2).requires_grad_(False)
    model, modules = told.t5, told.encode_instruction(torch.tensor([[3, 8, 2]])).modules
    labels = torch.tensor([[5, 9, 7, 0, 1], [8, -100, 6, 1, -100], [1, -100, -100, -100, -100]])
    sources = [model.read(torch.tensor([[4, 6, 3], [7, 7, 0], [9, 0, 0]]))]
    shown = [[0, *(max(label, 0) for label in row[:-1])] for row in labels.tolist()]
    states = model.decode(torch.tensor(shown), sources, modules)
    wanted = [model.logits(states[b, t]) for b in range(3) for t in range(5) if labels[b, t] != -100]
    logits, ids = model._target_logits(labels, sources, modules)
    yield "ids of the target tokens", ids, labels[labels != -100]
    yield "their logits", logits, torch.stack(wanted)


@teacher_forcing.facts
def _(t5):
    torch.manual_seed(0)
    model = t5.T5(replace(t5.SIZES["tiny"], tie_word_embeddings=True)).eval().requires_grad_(False)
    ids, labels = torch.randint(2, 32128, (2, 8, 16))
    sources = [model.read(ids)]
    copied = model.logits(model.decode(labels, sources)).flatten(0, 1)
    yield "loss of a fresh tiny T5 with a tied head", model.loss(labels, sources).cross_entropy.item(), "74"
    yield "its loss where it is shown the token", t5.token_loss(copied, labels.flatten()).cross_entropy.item(), "0.00"


@exercise(
    "puzzle", ["t5.T5.decode"], level=2, minutes=20, paper="Raffel et al., section 2.1 (causal mask)",
    hint="torch.ones(T, T).triu(1) is 1 where the key comes after the query.",
    why="With triu(0) in place of triu(1) no token sees itself: states of a fresh tiny T5 move by 44 % of their size.",
    calls=["shared", "decoder", "relative_bias", "source_bias", "ones", "triu", "tril", "to", "arange", "where",
           "full", "masked_fill", "zeros", "float", "unsqueeze", "len"],
    near={
        "No token is hidden: queries see tokens that come later.": (".triu(1) * MASKED", ".triu(1) * 0"),
        "You hide the past and show the future.": (".triu(1)", ".tril(-1)"),
        "You hide each token from itself. A query sees its own place.": (".triu(1)", ".triu(0)"),
        "The scores of later tokens go down by 1 only. Multiply by MASKED.": (".triu(1) * MASKED", ".triu(1) * -1"),
        "The position bias is missing, so the decoder does not know the order.":
            ("self.decoder.relative_bias(length, length) + future", "future.expand(1, self.config.num_heads, -1, -1)"),
        "The generated modules are not used.": ("modules and modules.decoder", "None"),
    },
    also=[("torch.ones(length, length, device=x.device).triu(1) * MASKED",
           "torch.where(torch.arange(length) > torch.arange(length)[:, None], MASKED, 0.0)")],
)  # fmt: skip
def hide_the_future(t5, hint):
    """Decode ids [B, T] that read sources: each token sees itself and the tokens before it.

    for i in range(T):
        for j in range(T):
            bias[0, head, i, j] = self.decoder.relative_bias(T, T)[0, head, i, j] + (MASKED if j > i else 0.0)
    states = self.decoder(embeddings, bias, the decoder's modules or None, sources, source_bias(sources))

    `self.shared` embeds ids. The result is states [B, T, d].
    """
    told = tiny_hint(hint, num_decoder_layers=2).requires_grad_(False)
    model, modules = told.t5, told.encode_instruction(torch.tensor([[3, 8, 2]])).modules
    ids = torch.tensor([[0, 4, 8, 5, 6], [0, 9, 9, 7, 3]])
    sources = [model.read(torch.tensor([[5, 2]])), model.read(torch.tensor([[4, 6, 3], [7, 0, 0]]))]
    for name, used in (("without modules", None), ("with modules", modules)):
        bias = model.decoder.relative_bias(5, 5)
        for i in range(5):
            bias[:, :, i, i + 1 :] -= 1e9
        padding = torch.tensor([[0.0] * 5, [0.0, 0.0, 0.0, -1e9, -1e9]])[:, None, None]
        wanted = model.decoder(model.shared.weight[ids], bias, used and used.decoder, sources, padding)
        yield f"states of 5 tokens, {name}", model.decode(ids, sources, used), wanted


@hide_the_future.facts
def _(t5):
    torch.manual_seed(0)
    model = t5.T5(t5.SIZES["tiny"]).eval().requires_grad_(False)
    ids = torch.randint(2, 50, (4, 10))
    sources = [model.read(torch.randint(2, 50, (4, 8)))]
    bias = model.decoder.relative_bias(10, 10) + torch.ones(10, 10).triu(0) * t5.MASKED
    blind = model.decoder(model.shared(ids), bias, None, sources, t5.source_bias(sources))
    states = model.decode(ids, sources)
    yield "how far the states move", 100 * ((blind - states).norm() / states.norm()).item(), "44 %"


@exercise(
    "puzzle", ["data._costs"], level=3, minutes=25, paper="HINT, section 3.3 (mixed-task batches)",
    hint="np.maximum.accumulate is the longest so far. np.unique with return_index=True finds where a number is first.",
    why="64 rows of 1 to 100 tokens in one padded batch take 1.9 times their tokens.",
    calls=["len", "zeros", "ones", "unique", "accumulate", "cumsum", "astype", "arange", "sum", "max", "isin"],
    near={
        "Each example pays for its own instruction. Count a distinct instruction once.": ("np.zeros", "np.ones"),
        "Take the longest row so far. You take each row's own length.":
            ("np.maximum.accumulate(rows[:, 2:])", "rows[:, 2:]"),
        "You pad to the longest row of all, also when it comes later.":
            ("np.maximum.accumulate(rows[:, 2:])", "np.maximum.accumulate(rows[:, 2:]) * 0 + rows[:, 2:].max(0)"),
        "The targets are not counted.": ("(longest[:, 1] + longest[:, 2])", "longest[:, 1]"),
        "You pay the price once. Pay it for each distinct instruction.":
            ("first.cumsum() * (longest[:, 0] + price)", "first.cumsum() * longest[:, 0] + price"),
    },
    also=[("first = np.zeros(len(rows), dtype=int)\n    first[np.unique(rows[:, 0], return_index=True)[1]] = 1",
           "first = np.isin(np.arange(len(rows)), np.unique(rows[:, 0], return_index=True)[1]).astype(int)")],
)  # fmt: skip
def padded_tokens(data):
    """Return what the first 1, 2, ... rows cost as one padded part of a batch.

    for count in range(1, len(rows) + 1):
        part = rows[:count]
        instructions = len(set(part[:, 0]))                        # distinct
        examples = sum(part[:, 1])
        cost[count - 1] = instructions * (max(part[:, 2]) + price) + examples * (max(part[:, 3]) + max(part[:, 4]))

    rows [B, 5], integers: number of the instruction, examples, longest instruction, input and target.
    """
    draw = np.random.default_rng(0)
    for count, price in ((1, 0), (7, 0), (7, 10), (20, 3)):
        rows = draw.integers([0, 1, 1, 1, 1], [4, 5, 40, 40, 40], (count, 5))
        wanted = []
        for end in range(1, count + 1):
            part = rows[:end].tolist()
            longest = [max(row[column] for row in part) for column in (2, 3, 4)]
            instructions, examples = len({row[0] for row in part}), sum(row[1] for row in part)
            wanted.append(instructions * (longest[0] + price) + examples * (longest[1] + longest[2]))
        yield f"costs of {count} rows at a price of {price}", data._costs(rows, price).tolist(), wanted


@padded_tokens.facts
def _(data):
    draw = random.Random(0)
    sizes = [draw.randint(1, 100) for _ in range(64)]
    rows = np.array([(0, 1, 0, size, 0) for size in sizes])
    yield "padded tokens over tokens", data._costs(rows, 0)[-1] / sum(sizes), "1.9"
