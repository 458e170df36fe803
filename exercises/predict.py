"""Predictions: think first, write down a number, then see what is measured. The truth is measured at each check."""

import json
from dataclasses import replace

import torch

from mechanics import NotYet, exercise


@exercise(
    "predict", [], level=2, minutes=15, paper="Raffel et al., section 2.1 (attention)",
    hint="Numbers of q have a standard deviation of d^0.5 times that of W_q. A score is a sum of k products.",
    why="T5 has put 1/sqrt(k) into the first W_q: a score has a spread of 1 from the start, and is not divided again. "
        "Divided, the largest of 64 weights would be 0.02 in place of 0.11.",
    questions={
        "spread": "Standard deviation of the scores q k of a fresh T5 base, which does not divide them?",
        "divided": "Standard deviation of the same scores divided by sqrt(k)?",
        "largest": "Mean of the largest of a query's 64 attention weights, from the scores that are not divided?",
    },
    near={
        "8 is sqrt(k): the spread if W_q were drawn as other matrices are. Read T5.initialise once more.":
            ("spread", 8.0),
        "64 is k: the variance of a sum of k products, if W_q were drawn as other matrices are.": ("spread", 64.0),
        "27.7 is sqrt(d). Each product of W_q and W_k with a row is brought back to the size of the row.":
            ("spread", 27.7),
        "This is the spread after the division by sqrt(k). T5 does not divide.": ("spread", 0.125),
        "A spread of 1 after the division is that of other transformers. T5 has 1 without it.": ("divided", 1.0),
        "You divided by k. Other transformers divide by its root.": ("divided", 0.0157),
        "1/64 is the weight of each key if all scores are equal. A spread of 1 makes differences.": ("largest", 0.0156),
        "One key takes everything only where scores differ by much more than 1.": ("largest", 1.0),
        "This is the largest weight of divided scores. They are nearly equal.": ("largest", 0.0208),
    },
)  # fmt: skip
def unscaled(t5):
    """Most transformers divide their scores by sqrt(k). T5 does not. What are its scores like before any training?

    A self-attention of T5 base (d = 768, 12 heads, k = 64) has fresh weights. It reads 64 tokens, whose states are
    random with a standard deviation of 1, as after a norm. There is no bias. `T5.initialise` draws the weights.
    """
    scores = fresh_scores(t5)
    yield "spread", scores.std().item(), 0.15
    yield "divided", (scores / 8).std().item(), 0.02
    yield "largest", scores.softmax(-1).amax(-1).mean().item(), 0.04


def fresh_scores(t5):
    """Scores [B, h, T, S] of a fresh attention of T5 base."""
    config = t5.SIZES["base"]
    attention = t5.Attention(config).requires_grad_(False)
    small = t5.T5(replace(config, vocab_size=8, num_layers=1, num_decoder_layers=1, d_ff=8))
    attention.apply(small.initialise)
    x = torch.randn(4, 64, config.d_model)
    return attention.split(attention.q(x)) @ attention.split(attention.k(x)).mT


@unscaled.facts
def _(t5):
    scores = fresh_scores(t5)
    yield "largest weight, divided", (scores / 8).softmax(-1).amax(-1).mean().item(), "0.02"
    yield "largest weight", scores.softmax(-1).amax(-1).mean().item(), "0.11"


@exercise(
    "predict", [], level=2, minutes=15, paper="Raffel et al., section 2.1; T5 v1.1",
    hint="Equal probabilities give ln V. Logits of spread 1 add half of their variance. A tied head compares a state "
         "with embeddings, whose numbers have a spread of 1.",
    why="A first loss tells a broken initialisation in a second. Far above 11, a head lacks its scale (here: 75). Far "
        "below 11, the model sees its answer.",
    questions={
        "first_loss": "Loss of a fresh T5 v1.1 of size tiny, on random labels?",
        "tied": "Loss with a tied head whose states are not scaled? (a number on the right side of 30 will do)",
        "scaled": "Loss with a tied head whose states are scaled by d^-0.5, as in T5 v1.0?",
    },
    near={
        "This is ln V: the loss of equal logits. Fresh logits have a spread of about 1, which costs 1/2.":
            [("first_loss", 10.38), ("scaled", 10.38)],
        "0 is the loss of a model that knows the answer.": ("first_loss", 0.0),
        "1/V is a probability. The loss is its negative logarithm, and a little more.": ("first_loss", 1 / 32128),
        "This is log2 V, in bits. Losses are in nats.": ("first_loss", 14.97),
        "Without the scale, logits have a spread of sqrt(d), and the model is sure of wrong tokens.":
            [("tied", 10.9), ("tied", 10.4), ("tied", 11.0)],
        "This is the loss without the scale. The scale brings the logits back to a spread of 1.": ("scaled", 74.0),
    },
)  # fmt: skip
def first_loss(t5):
    """A model has learned nothing yet. What is its first loss?

    The vocabulary has V = 32,128 ids and d is 128. The labels are random. The head is a matrix of its own (v1.1), drawn
    with a standard deviation of d^-0.5; or it is the embedding (tied), drawn with 1. The loss is in nats.
    """
    tied = replace(t5.SIZES["tiny"], tie_word_embeddings=True)
    losses = []
    for config in (t5.SIZES["tiny"], tied, replace(tied, scale_decoder_outputs=True)):
        torch.manual_seed(0)
        model = t5.T5(config).eval().requires_grad_(False)
        ids, labels = torch.randint(2, 32128, (2, 8, 16))
        losses.append(model.loss(labels, [model.read(ids)]).loss.item())
    yield "first_loss", losses[0], 0.2
    yield "tied", losses[1], losses[1] - 30
    yield "scaled", losses[2], 0.3


@first_loss.facts
def _(t5):
    truths = {name: truth for name, truth, _ in first_loss.cases(t5)}
    yield "loss of the tied head without its scale", truths["tied"], "75"
    yield "loss of a fresh T5 v1.1", truths["first_loss"], "11"


@exercise(
    "predict", [], level=2, minutes=20, paper="HINT, section 3.3 and appendix C.1",
    hint="hint.py ends with the formulas. H is the work of the generator for one instruction; the paper leaves it out.",
    why="The paper drops H as small beside N t. It is the price of 647 tokens, more than six instructions of 100.",
    questions={
        "price": "The generator's work H for this instruction, in tokens of N FLOPs each?",
        "from_inputs": "From how many inputs on is HINT cheaper than Tk-Instruct?",
        "times": "How many times cheaper is HINT for 100 inputs?",
    },
    near={
        "100 is the price of reading the instruction, N t. The generator's own work comes on top.": ("price", 100.0),
        "16 is the price of an answer. The generator writes a column for each row of every adapter.": ("price", 16.0),
        "The generator is not free: each of its columns reads the instruction and passes a network.":
            [("price", 0.0), ("price", 1.0)],
        "This is the short formula's answer: it leaves out H.": ("from_inputs", 2.0),
        "One input pays for the whole generator: HINT loses.": ("from_inputs", 1.0),
        "33 inputs are needed if the instruction has 25 tokens. This one has 100.": ("from_inputs", 33.0),
        "You left out H and p, as the short formula does.": ("times", 1.85),
        "This is 200 tokens over 100: you forgot the answers and H.": ("times", 2.0),
        "6.5 is H over the price of reading the instruction. It is paid once, not for each input.": ("times", 6.5),
    },
)  # fmt: skip
def cost(hint):
    """HINT reads an instruction once, and pays for its generator. Tk-Instruct reads the instruction with every input.

    T5 XL, HINT as in the paper. The instruction has t = 100 tokens, inputs i = 100, answers o = 16. Use the formulas of
    appendix C.1 with H and p: Tk-Instruct n N (t + i + o); HINT N t + H + n (N + p)(i + o).
    """
    N, H, p = costs_of_xl(hint)
    yield "price", H / N, 65
    yield "from_inputs", next(n for n in range(1, 100) if times_cheaper(hint, n, 100, N, H, p) > 1), 2
    yield "times", times_cheaper(hint, 100, 100, N, H, p), 0.1


def times_cheaper(hint, n, t, N, H=0, p=0):
    """FLOPs of Tk-Instruct over those of HINT, for inputs of 100 and answers of 16 tokens."""
    return hint.tk_instruct_flops(n, 100, t, 16, N) / hint.hint_flops(n, 100, t, 16, N, H, p)


def costs_of_xl(hint):
    """N, H at 100 tokens, and p, of T5 XL with the paper's HINT."""
    model = hint.on_meta(xl(hint), hint.HINTConfig())
    N = sum(weight.numel() for weight in hint.on_meta(xl(hint), None).parameters())
    one, two = (numbers_kept(hint, model, t) for t in (1, 2))
    return N, hint.generator_flops(model, 100), 2 * one - two


def xl(hint):
    """T5Config of T5 XL."""
    return hint.T5Config(d_model=2048, d_ff=5120, num_layers=24, num_decoder_layers=24, num_heads=32)


def numbers_kept(hint, model, t):
    """Numbers that are kept of an instruction of t tokens."""
    task = model.encode_instruction(torch.ones(1, t, dtype=torch.long))
    return sum(tensor.numel() for _, tensor in hint.named_tensors(task))


@cost.facts
def _(hint):
    N, H, p = costs_of_xl(hint)
    yield "price of the generator", H / N, "647"
    yield "inputs needed at t = 25", next(n for n in range(1, 100) if times_cheaper(hint, n, 25, N, H, p) > 1), "33"


@exercise(
    "predict", [], level=2, minutes=15, paper='HINT, section 3.1.1 ("Scaling Down Parameters")',
    hint="Count embeddings and networks apart. Only the embeddings of the adapters' columns grow with r.",
    why="One linear layer that writes one whole W_down has 1.2 times the numbers of T5 base. HINT's whole generator "
        "has 0.12 of them.",
    questions={
        "share": "Numbers of HINT's hypernetwork (r = 512) over those of T5 base?",
        "growth": "Numbers of the hypernetwork at r = 1,024 over those at r = 512?",
        "whole": "Numbers of one linear layer from d to a whole W_down, d r outputs, over those of T5 base?",
    },
    near={
        "The six networks are shared by all layers; a column costs an embedding of d numbers.": ("share", 1.2),
        "0.0016 is one W_down over T5 base. The layer that writes it has d inputs.":
            [("whole", 0.0016), ("share", 0.0016)],
        "Twice the columns are twice the embeddings, but the networks stay nearly as they are.": ("growth", 2.0),
        "The networks stay nearly as they are, but each new column needs an embedding.": ("growth", 1.0),
        "Nothing here grows with the square of r.": ("growth", 4.0),
        "You took W_down itself, d r, twice. The layer has d inputs and d r outputs.": ("whole", 0.0032),
        "Half of this was forgotten: d d r is 302 million.": ("whole", 0.6),
        "This is such a layer for each of the 24 layers of T5. The question is about one.": ("whole", 29.3),
    },
)  # fmt: skip
def columns_not_matrices(hint):
    """HINT's generator writes matrices column by column. How large is it, and what does a whole matrix cost at once?

    T5 base has d = 768 and 24 layers in its two stacks. Each layer gets an adapter of bottleneck r. Prefixes have 30
    tokens. `hypernet.generated_kinds` lists what is generated.
    """
    sizes = sizes_at_base(hint)
    yield "share", sizes[512] / sizes["T5"], 0.03
    yield "growth", sizes[1024] / sizes[512], 0.12
    yield "whole", 768 * 768 * 512 / sizes["T5"], 0.25


def sizes_at_base(hint):
    """Numbers of T5 base, and of its hypernetworks by bottleneck."""
    base = hint.T5Config(d_model=768, d_ff=2048, num_layers=12, num_decoder_layers=12, num_heads=12)
    models = {r: hint.on_meta(base, hint.HINTConfig(bottleneck=r)).hypernetwork for r in (512, 1024)}
    models["T5"] = hint.on_meta(base, None)
    return {name: sum(weight.numel() for weight in model.parameters()) for name, model in models.items()}


@columns_not_matrices.facts
def _(hint):
    sizes = sizes_at_base(hint)
    yield "a layer for one W_down", 768 * 768 * 512 / sizes["T5"], "1.2"
    yield "the generator", sizes[512] / sizes["T5"], "0.12"
    yield "one W_down", 768 * 512 / sizes["T5"], "0.0016"
    yield "d d r, in millions", 768 * 768 * 512 / 1e6, "302"


@exercise(
    "predict", [], level=3, minutes=15, paper="HINT, section 5.1 and appendix C.2",
    hint="HINT keeps d numbers per token, and p that do not depend on the length. A decoder keeps 2 L h k per token.",
    why="That HINT keeps less than a decoder is true at XL from 564 tokens of instruction on. A shorter one takes less "
        "room in a decoder's cache.",
    questions={
        "per_token": "Numbers that HINT keeps of each token of an instruction?",
        "decoder": "Numbers that the decoder keeps of each token?",
        "from_tokens": "From how many tokens of instruction on does HINT keep less than the decoder?",
    },
    near={
        "These are the decoder's numbers. HINT keeps the encoder's last states alone.": ("per_token", 196608.0),
        "Modules do not grow with the instruction, but the states for instruction fusion do.": ("per_token", 0.0),
        "Half is missing: keys and values are two, and there are 48 layers.": ("decoder", 98304.0),
        "This is one layer. Every layer keeps its keys and values.": ("decoder", 4096.0),
        "This is the answer for a decoder of 24 layers. Here it has 48.": ("from_tokens", 1139.0),
        "The modules have a size of their own, p = 110 million numbers, however short the instruction is.":
            ("from_tokens", 1.0),
        "30 is the length of the prefixes. The adapters are far larger.": ("from_tokens", 30.0),
        "512 is the bottleneck. Count prefixes and biases too, and the states that are kept.": ("from_tokens", 512.0),
    },
)  # fmt: skip
def kept(hint):
    """What must be kept of an instruction, so that it is never read again? HINT, beside a decoder with a cache.

    T5 XL (d = 2,048, 32 heads of k = 64, two stacks of 24 layers) with the paper's HINT: r = 512, prefixes of 30. The
    decoder has the same widths and 48 layers. Only numbers count, not their precision.
    """
    model = hint.on_meta(xl(hint), hint.HINTConfig())
    one, two = (numbers_kept(hint, model, t) for t in (1, 2))
    decoder = hint.decoder_cache_numbers(L=48, h=32, k=64, s=1)
    yield "per_token", two - one, 10
    yield "decoder", decoder, 100
    yield "from_tokens", next(t for t in range(1, 10**6) if 2 * one - two + t * (two - one) < t * decoder), 30


@kept.facts
def _(hint):
    model = hint.on_meta(xl(hint), hint.HINTConfig())
    one, two = (numbers_kept(hint, model, t) for t in (1, 2))
    yield "p in millions", (2 * one - two) / 1e6, "110"
    yield "first length", (2 * one - two) // (hint.decoder_cache_numbers(48, 32, 64, 1) - (two - one)) + 1, "564"


@exercise(
    "predict", [], level=1, minutes=10, paper="HINT, section 5.1 (No-Instruct)",
    hint="Exact match wants every word. ROUGE-L gives a share for every word that is right, and the answers are short.",
    why="Told nothing, the same model has 0.0 % of its answers right. So it reads its instructions, and inputs alone "
        "do not say what to answer.",
    questions={
        "exact_told": "Exact match in percent on unseen compositions, with the instruction?",
        "exact_untold": "Exact match in percent, told nothing? (mean of both test sets)",
        "rouge_untold": "ROUGE-L in percent, told nothing? (mean of both test sets)",
    },
    near={
        "These compositions were never trained, but their parts were, and the modules are written from the words.":
            [("exact_told", 0.0), ("exact_told", 10.0), ("exact_told", 25.0)],
        "You give a share of 1. The answer is in percent.": ("exact_told", 1.0),
        "One in two would be a guess between two answers. There are far more answers than two.":
            [("exact_untold", 50.0), ("exact_untold", 25.0)],
        "So many words can be right only if the task is known.": [("rouge_untold", 50.0), ("rouge_untold", 90.0)],
    },
)  # fmt: skip
def no_instruction(runs):
    """The demo trains a tiny HINT, then asks it unseen tasks twice: with their instructions, and told nothing.

    Start the demo now, in another window: python train.py. It takes two minutes or so on an idle laptop. Meanwhile read
    what its tasks are, and write down your answers. The check reads the scores of your own run.
    """
    folders = sorted(runs.glob("demo*/metrics.json"))
    if not folders:
        raise NotYet("There is no finished demo yet. Start it with: python train.py")
    scores = json.loads(folders[-1].read_text("utf-8"))
    untold = [scores[name] for name in scores if name.endswith(", no instruction")]
    yield "exact_told", scores["unseen compositions"]["exact_match"], 20
    yield "exact_untold", sum(score["exact_match"] for score in untold) / len(untold), 2
    yield "rouge_untold", sum(score["rougeL"] for score in untold) / len(untold), 10  # seeds have 1 to 25


@no_instruction.facts
def _(runs):
    truths = {name: truth for name, truth, _ in no_instruction.cases(runs)}
    yield "exact match, told nothing", truths["exact_untold"], "0.0"
