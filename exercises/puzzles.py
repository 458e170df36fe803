"""Puzzles: write a loop as products, sums and shapes. One `return`, no loop, and only the calls that are named."""

import torch

from mechanics import exercise


@exercise(
    "puzzle", ["t5.padding_bias"], level=1, minutes=10, paper="HINT, section 3.3 (batches of several lengths)",
    hint="Compare the mask with 0, then add two axes of length 1 by indexing with None.",
    why="A bias of -inf makes a row of padding alone NaN. With -1e9 each of its {keys} keys gets the weight {weight:.2f}.",
    calls=["unsqueeze", "where", "type", "float", "logical_not", "masked_fill", "zeros", "zeros_like", "eq"],
    near={
        "You hide the tokens and show the padding.": ("== 0", "!= 0"),
        "You hide the queries at the places of padding. Hide the keys, which are the last axis.":
            ("[:, None, None, :]", "[:, None, :, None]"),
        "Your bias is minus infinity. A row that sees nothing becomes NaN in the softmax.":
            ("(attention_mask == 0)[:, None, None, :] * MASKED",
             "torch.where(attention_mask[:, None, None, :] == 0, -torch.inf, 0.0)"),
        "One axis is missing: the bias must have an axis for heads and an axis for queries.":
            ("[:, None, None, :]", "[:, None, :]"),
        "The scores of padding go down by 1 only. Multiply by MASKED.":
            ("(attention_mask == 0)[:, None, None, :] * MASKED", "(attention_mask - 1.0)[:, None, None, :]"),
        "Your bias is huge and positive: padding gets all the weight.": ("* MASKED", "* -MASKED"),
        "Rows and keys have changed places.": ("(attention_mask == 0)", "(attention_mask.T == 0)"),
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


@exercise(
    "puzzle", ["hypernet.mean_of_tokens"], level=1, minutes=10, paper="HINT, section 4 (Hypter reads a mean)",
    hint="Multiply by the mask before the sum, and divide by the sum of the mask.",
    why="Divided by all places, the mean of {tokens} tokens in a row of {places} shrinks to {share:.2f} of its size.",
    calls=["unsqueeze", "sum", "clamp", "type_as", "einsum", "where", "masked_fill", "to", "float"],
    near={
        "You divide by all places. Divide by the number of tokens.":
            ("weight.sum(1).clamp(min=1)", "states.shape[1]"),
        "Padding is in your sum.": ("(states * weight).sum(1)", "states.sum(1)"),
        "Your mean is taken over everything, padding included.":
            ("(states * weight).sum(1) / weight.sum(1).clamp(min=1)", "states.mean(1)"),
        "You average over the examples of the batch. Average over the tokens of each example.":
            ("(states * weight).sum(1) / weight.sum(1).clamp(min=1)", "(states * weight).sum(0) / len(states)"),
        "A row without any token becomes NaN. Divide by at least 1.": (".clamp(min=1)", ""),
        "You divide by at least 2, so a row of one token is halved.": ("clamp(min=1)", "clamp(min=2)"),
        "This is the sum. Divide by the number of tokens.": (" / weight.sum(1).clamp(min=1)", ""),
        "This is the state of the first token alone.":
            ("(states * weight).sum(1) / weight.sum(1).clamp(min=1)", "(states * weight)[:, 0]"),
        "This is the state of the last place alone.":
            ("(states * weight).sum(1) / weight.sum(1).clamp(min=1)", "states[:, -1]"),
        "You average over d, not over tokens.": ("(states * weight).sum(1)", "(states * weight).sum(2)"),
        "Your mean is float32 where the states are bfloat16.": (".type_as(states)", ".float()"),
        "You divide by the number of tokens in the whole batch.":
            ("weight.sum(1).clamp(min=1)", "weight.sum().clamp(min=1)"),
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
    wanted = torch.stack([sum(states[b, :length]) / length if length else torch.zeros(5) for b, length in enumerate(lengths)])
    found = hypernet.mean_of_tokens(states, mask)
    for b, length in enumerate(lengths):
        yield f"mean of a row of {length} tokens and {7 - length} places of padding", found[b], wanted[b]
    yield "mean of bfloat16 states", hypernet.mean_of_tokens(states.bfloat16()[:1], mask[:1]).dtype, torch.bfloat16


@exercise(
    "puzzle", ["t5.Attention.split"], level=1, minutes=10, paper="Raffel et al., section 2.1 (heads)",
    hint="Cut the last axis into (heads, numbers of a head), then exchange two axes.",
    why="Cut into (k, h), T5 base keeps only {kept} of its {inner} numbers in their head. Such a model trains as well as any: "
        "only a published checkpoint shows the error.",
    calls=["unflatten", "transpose", "reshape", "view", "permute", "movedim", "swapaxes"],
    near={
        "Head and number have changed places: a head is k neighbours of the last axis.":
            ("x.unflatten(-1, (self.heads, -1)).transpose(1, 2)", "x.unflatten(-1, (-1, self.heads)).permute(0, 3, 1, 2)"),
        "You reshaped without exchanging axes: a head gets the numbers of other tokens.":
            ("x.unflatten(-1, (self.heads, -1)).transpose(1, 2)",
             "x.reshape(len(x), self.heads, x.shape[1], -1)"),
        "The axes are [B, S, h, k]. Exchange S and h.": (".transpose(1, 2)", ""),
        "You exchanged the last two axes too: keys are [B, h, S, k], not [B, h, k, S].":
            (".transpose(1, 2)", ".permute(0, 2, 3, 1)"),
        "You exchanged the axes of heads and numbers, not those of tokens and heads.":
            (".transpose(1, 2)", ".transpose(2, 3)"),
        "You exchanged the batch with the heads.": (".transpose(1, 2)", ".permute(2, 0, 1, 3)"),
        "You cut into k heads of h numbers. There are h heads of k numbers.":
            ("(self.heads, -1)", "(-1, self.heads)"),
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


@exercise(
    "puzzle", ["t5.RelativeBias.forward"], level=3, minutes=25, paper="Raffel et al., section 2.1 (position bias)",
    hint="Row i of the bias is a window of one long list of distances. The windows of later queries begin further left.",
    why="{queries} queries and {keys} keys have {distances} distances, not {pairs:,}: so many buckets are computed.",
    calls=["arange", "relative_position_bucket", "to", "unfold", "flip", "unsqueeze", "len", "permute", "transpose"],
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
        "first_query has the wrong sign.":
            ("1 - first_query - queries, keys - first_query,", "1 + first_query - queries, keys + first_query,"),
        "You treat the decoder as an encoder, or the reverse. Use self.bidirectional.":
            ("self.bidirectional", "not self.bidirectional"),
        "The first axis, of length 1, is missing.": (".unsqueeze(0)", ""),
        "Your bias is right, but you looked up the bucket of every pair. Look up each distance once.":
            [("torch.arange(1 - first_query - queries, keys - first_query, device=\"cpu\")",
              "torch.arange(keys) - torch.arange(first_query, first_query + queries)[:, None]"),
             (".T  # [h, queries + keys - 1]", ".permute(2, 0, 1)"),
             ("bias.unfold(1, keys, 1).flip(1).unsqueeze(0)", "bias.unsqueeze(0)")],
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
            numbers.clear()
            yield name, layer(queries, keys, first), wanted
            yield f"distances looked up, {name}", sum(numbers), queries + keys - 1


@exercise(
    "puzzle", ["t5.T5._target_logits"], level=2, minutes=25, paper="HINT, section 3.3; Raffel et al., section 2.1",
    hint="Shift the labels right by padding on the left. Find the places of labels with nonzero on the flat labels.",
    why="A fresh T5 with a tied head that is shown the token itself has a loss of {shown:.2f}; shifted right, {shifted:.0f}. "
        "Whoever is shown the answer learns nothing.",
    calls=["flatten", "nonzero", "pad", "clamp", "decode", "logits", "index_select", "to", "where", "masked_fill"],
    near={
        "The decoder sees the token that it is to predict. Shift the labels right.":
            ("F.pad(labels[:, :-1], (1, 0), value=START).clamp", "labels.clamp"),
        "You shifted left: the decoder sees the token after the one that it is to predict.":
            ("F.pad(labels[:, :-1], (1, 0), value=START)", "F.pad(labels[:, 1:], (0, 1), value=START)"),
        "The last label came round to the front. The first decoder id is START.":
            ("F.pad(labels[:, :-1], (1, 0), value=START)", "labels.roll(1, 1)"),
        "The decoder starts with </s>. T5 starts with START, id 0.": ("value=START", "value=EOS"),
        "The decoder reads the labels' padding, -100, as another id. Make it PAD, id 0.": (".clamp(min=PAD)", ".abs()"),
        "You shifted by two places.": ("F.pad(labels[:, :-1], (1, 0)", "F.pad(labels[:, :-2], (2, 0)"),
        "Your decoder ids are one place too long, so the places of states and labels differ.":
            ("labels[:, :-1]", "labels"),
        "The logits of padding are there too. Select the places of labels.":
            ("states.index_select(0, places.to(states.device))", "states"),
        "You selected by the decoder's padding, not by the labels' padding.":
            ("(labels.flatten() != NO_LABEL)", "(labels.flatten() > PAD)"),
        "Targets and states are in different orders.": ("targets = labels.flatten()[places]", "targets = labels.flatten()[places].flip(0)"),
        "The generated modules are not used.": ("sources, modules).flatten", "sources, None).flatten"),
        "The targets are the decoder's input ids. They must be the labels.":
            ("targets.to(states.device)", "decoder_input_ids.flatten()[places].to(states.device)"),
    },
    also=[("F.pad(labels[:, :-1], (1, 0), value=START).clamp(min=PAD)",
           "torch.where(labels == NO_LABEL, PAD, labels).roll(1, 1).index_fill(1, torch.tensor([0]), START)")],
)  # fmt: skip
def teacher_forcing(t5):
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
    model, modules = small_model(t5)
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
