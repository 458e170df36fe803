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
        "Your bias is huge and positive: padding gets all the weight.": ("* MASKED", "* -MASKED"),
        "Rows and keys have changed places.": ("(attention_mask == 0)", "(attention_mask.T == 0)"),
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
        "You divide by at least 2, so a row of one token is halved.": ("clamp(min=1)", "clamp(min=2)"),
        "You divide by one token too many.": (".clamp(min=1)", " + 1"),
        "This is the sum. Divide by the number of tokens.": (" / weight.sum(1).clamp(min=1)", ""),
        "This is the state of the first token alone.":
            ("(states * weight).sum(1) / weight.sum(1).clamp(min=1)", "(states * weight)[:, 0]"),
        "This is the state of the last place alone.":
            ("(states * weight).sum(1) / weight.sum(1).clamp(min=1)", "states[:, -1]"),
        "You average over d, not over tokens.": ("(states * weight).sum(1)", "(states * weight).sum(2)"),
        "Your mean is float32 where the states are bfloat16.": (".type_as(states)", ".float()"),
        "You divide by the number of tokens in the whole batch.": ("sum(1).clamp(min=1)", "sum().clamp(min=1)"),
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
    calls=["arange", "relative_position_bucket", "to", "unfold", "flip", "unsqueeze", "len", "permute", "transpose",
           "index_select"],
    near={
        "You took query minus key. Take the position of the key minus that of the query.":
            ("relative_position_bucket(relative,", "relative_position_bucket(-relative,"),
        "You ignore first_query: query i stands at position first_query + i.":
            ("torch.arange(1 - first_query - queries, keys - first_query, ", "torch.arange(1 - queries, keys, "),
        "Your rows are in the wrong order: the last query sees the first window.": (".flip(1)", ""),
        "Your keys are in the wrong order.": (".flip(1)", ".flip(1).flip(2)"),
        "The heads are the last axis. They must be the second: [1, h, queries, keys].":
            (".flip(1).unsqueeze(0)", ".flip(1).permute(1, 2, 0).unsqueeze(0)"),
        "Each distance is too large by 1.":
            ("1 - first_query - queries, keys - first_query,", "2 - first_query - queries, keys - first_query + 1,"),
        "Each distance is too small by 1.":
            ("1 - first_query - queries, keys - first_query,", "-first_query - queries, keys - first_query - 1,"),
        "first_query has the wrong sign.": ("1 - first_query - queries, keys -", "1 + first_query - queries, keys +"),
        "You treat the decoder as an encoder, or the reverse. Use self.bidirectional.":
            ("self.bidirectional", "not self.bidirectional"),
        "The first axis, of length 1, is missing.": (".unsqueeze(0)", ""),
        "Your bias is right, but you looked up the bucket of every pair. Look up each distance once.":
            ("torch.arange(1 - first_query - queries, keys - first_query, device=\"cpu\")",
             "torch.arange(keys) - torch.arange(first_query, first_query + queries)[:, None]",
             ".T  # [h, queries + keys - 1]", ".permute(2, 0, 1)",
             "bias.unfold(1, keys, 1).flip(1).unsqueeze(0)", "bias.unsqueeze(0)"),
    },
    also=[("bias.unfold(1, keys, 1).flip(1).unsqueeze(0)",
           "bias[None, :, torch.arange(keys) - torch.arange(queries)[:, None] + queries - 1]")],
)  # fmt: skip
def spread(t5):
    """Spread the biases of all distances over queries and keys, and look up each distance once.

    for i in range(queries):
        for j in range(keys):
            distance = j - (first_query + i)
            bucket = relative_position_bucket(distance, self.bidirectional, len(self.weight), self.max_distance)
            bias[0, :, i, j] = self.weight[bucket]      # of all heads

    queries + keys - 1 distances occur. `relative_position_bucket` takes a tensor of any shape: call it once, for each
    distance once. The result is [1, h, queries, keys].
    """
    config = t5.T5Config(num_heads=3, relative_attention_num_buckets=8, relative_attention_max_distance=20)
    bucket_of, numbers = t5.relative_position_bucket, []
    t5.relative_position_bucket = lambda relative, *more: numbers.append(relative.numel()) or bucket_of(relative, *more)
    for bidirectional in (True, False):
        layer = t5.RelativeBias(config, bidirectional)
        layer.weight.data = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
        for queries, keys, first in ((5, 7, 0), (1, 6, 5), (4, 3, 2), (1, 1, 0)):
            distances = torch.tensor([[j - first - i for j in range(keys)] for i in range(queries)])
            buckets = bucket_of(distances, bidirectional, 8, 20)
            wanted = torch.stack([torch.stack([layer.weight[b] for b in row], 1) for row in buckets], 1)[None]
            name = f"{'encoder' if bidirectional else 'decoder'}: {queries} queries from position {first}, {keys} keys"
            yield name, layer(queries, keys, first), wanted
    numbers.clear()
    layer(5, 7)
    yield "distances looked up for 5 queries and 7 keys", sum(numbers), 11


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
    why="A fresh tiny T5 with a tied head has a loss of 74. If it is shown the token itself, the loss is 0.00: it "
        "copies, and there is nothing to learn.",
    calls=["flatten", "nonzero", "pad", "clamp", "decode", "logits", "index_select", "to", "where", "masked_fill",
           "roll", "cat", "index_fill", "tensor", "full", "new_full", "zeros", "new_zeros", "clone", "len"],
    near={
        "The decoder sees the token that it is to predict. Shift the labels right.":
            ("F.pad(labels[:, :-1], (1, 0), value=START).clamp", "labels.clamp"),
        "You shifted left: the decoder sees the token after the one that it is to predict.":
            ("F.pad(labels[:, :-1], (1, 0), value=START)", "F.pad(labels[:, 1:], (0, 1), value=START)"),
        "The last label came round to the front. The first decoder id is START.":
            ("F.pad(labels[:, :-1], (1, 0), value=START)", "labels.roll(1, 1)"),
        "The decoder starts with </s>. T5 starts with START, id 0.": ("value=START", "value=EOS"),
        "The decoder reads the labels' padding, -100, as another id. Make it PAD, id 0.":
            (".clamp(min=PAD)", ".remainder(self.config.vocab_size)"),
        "You shifted by two places.": ("F.pad(labels[:, :-1], (1, 0)", "F.pad(labels[:, :-2], (2, 0)"),
        "Your decoder ids are one place too long, so the places of states and labels differ.":
            ("labels[:, :-1]", "labels"),
        "The logits of padding are there too. Select the places of labels.":
            ("states.index_select(0, places.to(states.device))", "states"),
        "You selected by the decoder's padding, not by the labels' padding.": ("!= NO_LABEL", "> PAD"),
        "Targets and states are in different orders.": ("labels.flatten()[places]", "labels.flatten()[places].flip(0)"),
        "The generated modules are not used.": ("sources, modules).flatten", "sources, None).flatten"),
        "The targets are the decoder's input ids. They must be the labels.":
            ("targets.to(states.device)", "decoder_input_ids.flatten()[places].to(states.device)"),
    },
    also=[("F.pad(labels[:, :-1], (1, 0), value=START).clamp(min=PAD)",
           "torch.where(labels == NO_LABEL, PAD, labels).roll(1, 1).index_fill(1, torch.tensor([0]), START)")],
)  # fmt: skip
def teacher_forcing(t5, hint):
    """Give the decoder the true answer shifted right, and return the logits and ids of the target tokens.

    for b in range(B):
        shown = [START, *labels[b, :-1]]        # of these, -100 becomes PAD
        states = self.decode(shown, ...)
        for t in range(T):
            if labels[b, t] != NO_LABEL:
                append self.logits(states[t]) and labels[b, t]

    labels [B, T] -> (logits [N, V], ids [N]), N labels, row by row. Call `self.decode` and `self.logits` once.
    A label of -100 may stand anywhere, also between others.
    """
    told = tiny_hint(hint, num_decoder_layers=2).requires_grad_(False)
    model, modules = told.t5, told.encode_instruction(torch.tensor([[3, 8, 2]])).modules
    labels = torch.tensor([[5, 9, 7, 0, 1], [8, -100, 6, 1, -100], [1, -100, -100, -100, -100]])
    sources = [model.read(torch.tensor([[4, 6, 3], [7, 7, 0], [9, 0, 0]]))]
    for name, used in (("without modules", None), ("with modules", modules)):
        logits, ids = [], []
        for b, row in enumerate(labels.tolist()):
            source = t5.Source(sources[0].states[b : b + 1], sources[0].attention_mask[b : b + 1])
            shown = [0, *(0 if label == -100 else label for label in row[:-1])]
            states = model.decode(torch.tensor([shown]), [source], used)[0]
            logits += [model.logits(states[t]) for t, label in enumerate(row) if label != -100]
            ids += [label for label in row if label != -100]
        found = model._target_logits(labels, sources, used)
        yield f"ids of the target tokens, {name}", found[1], torch.tensor(ids)
        yield f"their logits, {name}", found[0], torch.stack(logits)


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
        "A query sees one place too many: the next token.": (".triu(1)", ".triu(2)"),
        "The scores of later tokens go down by 1 only. Multiply by MASKED.": (".triu(1) * MASKED", ".triu(1) * -1"),
        "The position bias is missing, so the decoder does not know the order.":
            ("self.decoder.relative_bias(length, length) + future", "future.expand(1, self.config.num_heads, -1, -1)"),
        "This is the position bias of the encoder. The decoder has its own.":
            ("self.decoder.relative_bias", "self.encoder.relative_bias"),
        "The generated modules are not used.": ("modules and modules.decoder", "None"),
        "These are the modules of the encoder.": ("modules and modules.decoder", "modules and modules.encoder"),
        "The padding of the sources is visible.": ("source_bias(sources))", "source_bias(sources) * 0)"),
        "One source alone is read. Hand over all of them.":
            ("sources, source_bias(sources))", "sources[:1], source_bias(sources[:1]))"),
        "The embeddings are scaled. T5 does not scale them.": ("x = self.shared(", "x = 2 * self.shared("),
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
    positions = model.decoder.relative_bias(5, 5)
    for name, used in (("without modules", None), ("with modules", modules)):
        bias = positions.clone()
        for i in range(5):
            for j in range(i + 1, 5):
                bias[:, :, i, j] += -1e9
        padding = torch.tensor([[0.0] * 5, [0.0, 0.0, 0.0, -1e9, -1e9]])[:, None, None]
        wanted = model.decoder(model.shared.weight[ids], bias, used and used.decoder, sources, padding)
        found = model.decode(ids, sources, used)
        for t in range(5):
            yield f"state of token {t} of 5, {name}", found[:, t], wanted[:, t]


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
        "No instruction is counted.": ("first[np.unique(rows[:, 0], return_index=True)[1]] = 1", "first[:0] = 1"),
        "The first instruction alone is counted.": ("np.unique(rows[:, 0], return_index=True)[1]", "0"),
        "You count an instruction where it comes last, not where it comes first.":
            ("first[np.unique(rows[:, 0], return_index=True)[1]] = 1",
             "first[len(rows) - 1 - np.unique(rows[::-1, 0], return_index=True)[1]] = 1"),
        "Take the longest row so far. You take each row's own length.":
            ("np.maximum.accumulate(rows[:, 2:])", "rows[:, 2:]"),
        "You pad to the longest row of all, also when it comes later.":
            ("np.maximum.accumulate(rows[:, 2:])", "np.maximum.accumulate(rows[:, 2:]) * 0 + rows[:, 2:].max(0)"),
        "You pad to the shortest row so far.": ("np.maximum.accumulate", "np.minimum.accumulate"),
        "The targets are not counted.": ("(longest[:, 1] + longest[:, 2])", "longest[:, 1]"),
        "The inputs are not counted.": ("(longest[:, 1] + longest[:, 2])", "longest[:, 2]"),
        "The generator's price is missing.": ("(longest[:, 0] + price)", "longest[:, 0]"),
        "You pay the price once. Pay it for each distinct instruction.":
            ("first.cumsum() * (longest[:, 0] + price)", "first.cumsum() * longest[:, 0] + price"),
        "A row may stand for several examples: the second column says how many.":
            ("rows[:, 1].cumsum()", "np.arange(1, len(rows) + 1)"),
        "These are costs of single rows. Return the cost of the first 1, 2, ... rows together.":
            ("first.cumsum() * (longest[:, 0] + price) + rows[:, 1].cumsum()",
             "first * (longest[:, 0] + price) + rows[:, 1]"),
        "Input and target are padded apart. You padded to the longest of input and target together.":
            ("(longest[:, 1] + longest[:, 2])", "np.maximum.accumulate(rows[:, 3] + rows[:, 4])"),
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
        numbers, sizes = draw.integers(0, 4, count), draw.integers(1, 40, (count, 3))
        rows = np.column_stack([numbers, draw.integers(1, 5, count), sizes])
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
