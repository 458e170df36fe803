"""How fast this project is, beside `transformers`: the same weights, inputs and threads, in one process, taking turns.

    python tests/bench.py                       every row, on T5 v1.1 small with random weights
    python tests/bench.py training answering    these rows alone

Medians and ratios are printed as they come. A ratio above 1 says that this project is faster. Nothing is asserted but
that both give the same answers: times are for reading, on a quiet machine.
"""

from __future__ import annotations

import argparse
import math
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Callable, Iterator

import numpy as np
import torch
from rouge_score import rouge_scorer
from transformers import T5Config as TheirConfig
from transformers import T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import train
from hint import (
    HINT,
    ExactFlops,
    HINTConfig,
    PlainT5,
    flop_counter,
    generated_numbers,
    hint_flops,
    t5_parameters,
    tk_instruct_flops,
)
from t5 import EOS, SIZES, T5, Loss, Source, T5Config, packed_weights

VOCABULARY = 32000  # random ids are drawn below it


def race(*runners: Callable[[], object], rounds: int = 5) -> list[float]:
    """Median seconds of each, after a warm-up; they take turns, so that what disturbs one disturbs all."""
    times: list[list[float]] = [[] for _ in runners]
    for runner in runners:
        runner()
    for _ in range(rounds):
        for runner, found in zip(runners, times):
            began = time.perf_counter()
            runner()
            found.append(time.perf_counter() - began)
    return [statistics.median(found) for found in times]


def row(*cells: object) -> None:
    """One row of a Markdown table."""
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def header(*names: str) -> None:
    """The head of a Markdown table."""
    print()
    row(*names)
    row(*["---"] * len(names))


def ids(rows: int, length: int) -> torch.Tensor:
    """Random ids without padding."""
    return torch.randint(2, VOCABULARY, (rows, length))


def ragged_ids(rows: int, length: int) -> torch.Tensor:
    """Random ids whose rows end at lengths spread evenly from a quarter to the whole."""
    ragged = ids(rows, length)
    for place, end in enumerate(torch.linspace(length // 4, length, rows).long().tolist()):
        ragged[place, end:] = 0
    return ragged


def endless(model: T5) -> T5:
    """Never the most probable next token is `</s>`, so that all answers have full length."""
    model.lm_head.weight.data[EOS] = 0
    return model


@contextmanager
def matrix_products(kind: str) -> Iterator[Callable]:
    """`fp32`, fp32 at precision `medium`, or `bf16`: yields the context for forward passes."""
    torch.set_float32_matmul_precision("medium" if kind == "medium" else "highest")
    try:
        yield (lambda: torch.autocast("cpu", torch.bfloat16)) if kind == "bf16" else nullcontext
    finally:
        torch.set_float32_matmul_precision("highest")


class Contestants:
    """One T5 as this project and `transformers` have it: the same random weights."""

    def __init__(self, size: str) -> None:
        torch.manual_seed(0)
        self.ours = endless(T5(replace(SIZES[size], dropout_rate=0.0))).eval()
        with tempfile.TemporaryDirectory() as folder:
            self.ours.save_pretrained(folder)
            self.theirs = {
                kind: T5ForConditionalGeneration.from_pretrained(folder, attn_implementation=kind).eval()
                for kind in ("sdpa", "eager")
            }


def training(size: str) -> None:
    """Forward and backward pass of a batch, without an optimizer."""
    both = Contestants(size)
    header("training step", "products", "ours (s)", "transformers sdpa (s)", "eager (s)", "times as fast as the faster")
    for name, batch in (
        ("8 x 256 -> 64, no padding", (ids(8, 256), ids(8, 64))),
        ("8 x 256 -> 64, 3/8 padding", (ragged_ids(8, 256), ragged_ids(8, 64))),
    ):
        inputs, labels = batch[0], batch[1].masked_fill(batch[1] == 0, -100)
        for kind in ("fp32", "medium", "bf16"):
            with matrix_products(kind) as context:

                def ours() -> None:
                    model = PlainT5(both.ours)
                    model.zero_grad()
                    with context():
                        loss = model(None, inputs, labels).loss
                    loss.backward()

                def theirs(attention: str) -> None:
                    model = both.theirs[attention]
                    model.zero_grad()
                    with context():
                        loss = model(input_ids=inputs, attention_mask=(inputs != 0).long(), labels=labels).loss
                    loss.backward()

                a, b, c = race(ours, lambda: theirs("sdpa"), lambda: theirs("eager"), rounds=3)
                row(name, kind, f"{a:.3f}", f"{b:.3f}", f"{c:.3f}", f"{min(b, c) / a:.2f}")


def generation(size: str) -> None:
    """Greedy decoding; the time of a step is the difference of a long and a short answer."""
    both = Contestants(size)
    header(
        "greedy decoding",
        "source",
        "ours (ms a step)",
        "packed",
        "transformers sdpa",
        "eager",
        "times as fast",
        "packed",
    )
    short, long = 4, 36
    for rows in (1, 8, 32):
        for length in (256, 1024):
            mask = torch.ones(rows, length, dtype=torch.long)

            source = Source(torch.randn(rows, length, both.ours.config.d_model), mask)

            def ours(tokens: int, packed: bool = True) -> torch.Tensor:
                with packed_weights(both.ours, rows) if packed else nullcontext():
                    return both.ours.decode_greedily([source], None, tokens)

            def theirs(attention: str, tokens: int) -> torch.Tensor:
                states = BaseModelOutput(last_hidden_state=source.states)
                generate = both.theirs[attention].generate
                return generate(encoder_outputs=states, attention_mask=mask, max_new_tokens=tokens, do_sample=False)

            for packed in (False, True):
                assert torch.equal(ours(long, packed), theirs("eager", long)[:, 1:]), "the answers differ"
            runners = [
                lambda tokens=tokens, run=run: run(tokens)
                for run in (lambda n: ours(n, False), ours, lambda n: theirs("sdpa", n), lambda n: theirs("eager", n))
                for tokens in (short, long)
            ]
            times = race(*runners, rounds=3)
            a, b, c, d = (1000 * (times[i + 1] - times[i]) / (long - short) for i in (0, 2, 4, 6))
            best = min(c, d)
            row(f"{rows} rows", length, *(f"{x:.1f}" for x in (a, b, c, d)), f"{best / a:.2f}", f"{best / b:.2f}")


def answering(size: str) -> None:
    """100 instances of one task: HINT against the instruction concatenated to every input, in the same code."""
    torch.manual_seed(0)
    t5 = endless(T5(replace(SIZES[size], dropout_rate=0.0)))
    hint, plain = HINT(t5, HINTConfig()).eval(), PlainT5(t5).eval()
    inputs, ratios = ids(100, 100), {}
    header(
        "tokens of instruction", "new tokens", "HINT (s)", "of it, reading the instruction", "concatenated (s)",
        "times as fast", "by FLOPs", "by the paper's formula",
    )  # fmt: skip
    for length, new in (*((length, 16) for length in (0, 25, 50, 100, 200, 500, 1000)), (200, 64), (200, 128)):
        instruction = ids(1, max(length, 1))
        read: list[float] = []

        def once() -> None:
            with torch.no_grad(), packed_weights(hint, 25):
                began = time.perf_counter()
                task = hint.encode_instruction(instruction)
                read.append(time.perf_counter() - began)
                for part in inputs.split(25):
                    hint.generate(task, part, max_new_tokens=new)

        def each_time() -> None:
            concatenated = torch.cat([instruction[:, :length].expand(100, -1), inputs], dim=1)
            with packed_weights(t5, 25):
                for part in concatenated.split(25):
                    plain.generate(None, part, max_new_tokens=new)

        a, b = race(once, each_time, rounds=3 if new == 16 else 1)
        if new == 16:
            ratios[length] = b / a
        counted = [f"{ratio:.1f}" for ratio in times_cheaper(t5.config, length, new)]
        row(length, new, f"{a:.2f}", f"{statistics.median(read[1:]):.2f}", f"{b:.2f}", f"{b / a:.1f}", *counted)
    crossing = np.interp(1, list(ratios.values()), list(ratios))
    by_flops = next(t for t in range(1001) if times_cheaper(t5.config, t, 16)[0] >= 1)
    print(f"\nHINT is faster from {crossing:.0f} tokens of instruction on; by FLOPs, from {by_flops}.")


def times_cheaper(t5: T5Config, t: int, o: int, n: int = 100, i: int = 100) -> tuple[float, float]:
    """FLOPs of Tk-Instruct over those of HINT: exactly, and by the paper's formulas."""
    config = HINTConfig()
    ours, plain = ExactFlops(t5, config.bottleneck, config.prefix_length), ExactFlops(t5)
    N, p, H = t5_parameters(t5), generated_numbers(t5, config), ours.generate_modules(max(t, 1))
    exact = plain.generate(n, t + i, o) / (ours.encode_instruction(max(t, 1)) + ours.generate(n, i, o, max(t, 1)))
    return exact, tk_instruct_flops(n, i, t, o, N) / hint_flops(n, i, max(t, 1), o, N, H, p)


def flops(runner: Callable[[], object]) -> int:
    """Floating-point operations of matrix products in one call."""
    with flop_counter() as counter:
        runner()
    return counter.get_total_flops()


class EncodesEachTime(HINT):
    """HINT as the paper writes it: the hypernetwork runs once for every example of a batch."""

    def forward(self, instruction_ids: torch.Tensor, input_ids: torch.Tensor, labels: torch.Tensor) -> Loss:
        task = self.encode_instruction(instruction_ids)
        return self.t5.loss(labels, self._fuse(task, input_ids), task.modules)


def mixed(size: str) -> None:
    """A HINT training step on 16 examples of few tasks: each instruction encoded once, or once for each example."""
    torch.manual_seed(0)
    t5, config = T5(replace(SIZES[size], dropout_rate=0.0)), HINTConfig(bottleneck=64, generator_dropout=0.0)
    once = HINT(t5, config)
    each = EncodesEachTime(t5, config)
    each.hypernetwork = once.hypernetwork
    inputs, labels = ids(16, 64), ids(16, 16)
    header(
        "16 examples of",
        "instructions encoded (rows)",
        "once (s)",
        "rows",
        "each time (s)",
        "times as fast",
        "loss differs by",
    )
    for tasks in (1, 2, 4, 8, 16):
        instructions = ids(tasks, 200).repeat_interleave(16 // tasks, dim=0)
        encoded: list[int] = []
        hook = once.hypernetwork.register_forward_hook(lambda _, given, __: encoded.append(len(given[0])))
        losses = []

        def step(model: HINT) -> None:
            model.zero_grad()
            loss = model(instructions, inputs, labels).loss
            loss.backward()
            losses.append(loss.item())

        a, b = race(lambda: step(once), lambda: step(each), rounds=3)
        hook.remove()
        row(
            f"{tasks} tasks",
            min(encoded),
            f"{a:.2f}",
            max(encoded),
            f"{b:.2f}",
            f"{b / a:.2f}",
            f"{abs(losses[0] - losses[1]):.0e}",
        )


def epoch(size: str, folder: str | None, tokenizer: str | None) -> None:
    """Training batches of Super-NaturalInstructions as they come: microbatches of like lengths, or in random order."""
    prompts = data.load_tokenizer(tokenizer)
    tasks = data.load_tasks(folder, "train")
    header(
        "one epoch, batches of 1,024",
        "microbatches",
        "padded tokens / real",
        "what layers see / real",
        "seconds for 1,024",
        "loss",
        "times as fast",
    )
    for name, form, examples in (("tk-instruct", data.TkInstructFormat, 2), ("hint", data.HINTFormat, 0)):
        encoded = data.encode_tasks(tasks, form(prompts, examples), 256, seed=0)
        source = data.Shuffled(encoded, seed=0)
        batches = [source.take(1024) for _ in range(len(encoded) // 1024)]
        t5 = T5(replace(SIZES[size], dropout_rate=0.0))
        model = PlainT5(t5) if name == "tk-instruct" else HINT(t5, HINTConfig(16, 8, generator_dropout=0.0))
        real = sum(tokens(batch)[0] for batch in batches)
        results = []
        for how, cut in (
            ("at most 8,192 tokens of like lengths", lambda batch: data.microbatches(batch, 8192)),
            ("16 in random order", lambda batch: [batch[start : start + 16] for start in range(0, 1024, 16)]),
        ):
            seen, padded = map(sum, zip(*(tokens(part) for batch in batches for part in cut(batch))))
            began = time.perf_counter()
            loss = step(model, cut(batches[0]))
            results.append(time.perf_counter() - began)
            row(
                name,
                how,
                f"{padded / real:.2f}",
                f"{seen / real:.2f}",
                f"{results[-1]:.1f}",
                f"{loss:.6f}",
                f"{results[-1] / results[0]:.2f}",
            )


def tokens(examples: list[data.Ids]) -> tuple[int, int]:
    """Real tokens of some examples, and tokens of the batch they are padded to; each instruction counts once."""
    instructions = {tuple(example.instruction) for example in examples}
    longest = [max(map(len, part)) for part in zip(*examples)]
    real = sum(map(len, instructions)) + sum(len(example.input) + len(example.target) for example in examples)
    return real, len(instructions) * longest[0] + len(examples) * (longest[1] + longest[2])


def step(model: torch.nn.Module, parts: list[list[data.Ids]]) -> float:
    """Forward and backward pass of a whole batch in parts; its loss."""
    model.train().zero_grad()
    total, count = 0.0, sum(len(example.target) for part in parts for example in part)
    for part in parts:
        out = model(*data.collate(part))
        (out.cross_entropy / count).backward()
        total += out.cross_entropy.item()
    return total / count


def evaluation(size: str, folder: str | None, tokenizer: str | None) -> None:
    """The test tasks: HINT reads each instruction once; transformers reads it with every input, as Tk-Instruct does."""
    both = Contestants(size)
    words = data.load_tokenizer(tokenizer)
    tasks = data.load_tasks(folder, "test", max_instances=20)
    hint = HINT(both.ours, HINTConfig()).eval()
    answerer = train.Answerer(hint, data.HINTFormat(words, 2), 16, 20, "fp32")
    prompts = data.TkInstructFormat(words, 2)

    def ours() -> None:
        answerer.predictions(tasks)

    def theirs(model: T5ForConditionalGeneration = both.theirs["sdpa"]) -> None:
        for task in tasks:
            inputs = data.pad([ids for _, ids in prompts(task)], 0)
            out = model.generate(inputs, attention_mask=(inputs != 0).long(), max_new_tokens=16, do_sample=False)
            words.decode_batch(out.tolist())

    a, b = race(ours, theirs, rounds=2)
    ratio = flops(lambda: theirs(both.theirs["eager"])) / flops(ours)  # torch does not count sdpa on a CPU
    header(f"{len(tasks)} tasks, 20 inputs each, 16 new tokens", "seconds", "times as fast", "by FLOPs")
    row("HINT here", f"{a:.1f}", f"{b / a:.2f}", f"{ratio:.2f}")
    row("Tk-Instruct in transformers (sdpa)", f"{b:.1f}", "", "")


def scoring(size: str) -> None:
    """ROUGE-L of 12,000 made answers, beside rouge-score."""
    draw = random.Random(0)
    words = [draw.choice(STEMS) + draw.choice(ENDINGS) for _ in range(3000)]
    sentence = lambda: " ".join(draw.choices(words, k=1 + int(draw.expovariate(1 / 12))))  # noqa: E731
    pairs = [(said, sentence() + " " + said[:40]) for said in (sentence() for _ in range(12000))]
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    found: dict[str, list[float]] = {}

    def ours() -> None:
        data._stem.cache_clear()
        found["ours"] = [data.rouge_l(said, wanted) for said, wanted in pairs]

    def theirs() -> None:
        found["theirs"] = [scorer.score(wanted, said)["rougeL"].fmeasure for said, wanted in pairs]

    a, b = race(ours, theirs, rounds=2)
    assert found["ours"] == found["theirs"], "the scores differ"
    header("scoring 12,000 answers", "ours (s)", "rouge-score (s)", "times as fast")
    row("ROUGE-L, every digit the same", f"{a:.2f}", f"{b:.2f}", f"{b / a:.1f}")


STEMS = "relat condit ration organis gener hop fil plant run fly happi care nation act form direct press sens".split()
ENDINGS = ["", "s", "ed", "ing", "ation", "ational", "ness", "ful", "fulness", "ly", "er", "able", "ement", "ive", "y"]


def memory(size: str) -> None:
    """Peak memory of a process that takes one training step, by what the operating system says of it."""
    header("training step, peak memory", "ours (GB)", "transformers sdpa (GB)", "eager (GB)", "ours / the smaller")
    for name, shape, kind in (("base", (4, 512, 64), "float32"), ("xl", (2, 512, 64), "bfloat16")):
        found = []
        for contestant in ("ours", "sdpa", "eager"):
            code = f"import bench; bench.one_step({name!r}, {contestant!r}, {shape}, {kind!r})"
            out = subprocess.run(
                [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True
            )
            found.append(float(out.stdout.split()[-1]) if out.returncode == 0 else math.nan)
        a, b, c = found
        row(
            f"{name}, {kind} weights, {shape[0]} x {shape[1]} -> {shape[2]}",
            *(f"{x:.2f}" for x in found),
            f"{a / min(b, c):.2f}",
        )


def one_step(size: str, contestant: str, shape: tuple[int, int, int], kind: str) -> None:
    """Take a training step, and print the largest memory that this process ever had, in GB."""
    torch.set_default_dtype(getattr(torch, kind))
    config, (rows, source, target) = replace(SIZES[size], dropout_rate=0.0), shape
    inputs, labels = ids(rows, source), ids(rows, target)
    if contestant == "ours":
        loss = PlainT5(T5(config))(None, inputs, labels).loss
    else:
        theirs = TheirConfig(**asdict(config), decoder_start_token_id=0)
        model = T5ForConditionalGeneration._from_config(theirs, attn_implementation=contestant)
        loss = model(input_ids=inputs, attention_mask=torch.ones_like(inputs), labels=labels).loss
    loss.backward()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


ROWS = (training, generation, epoch, mixed, answering, evaluation, scoring, memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [function.__name__ for function in ROWS]
    parser.add_argument("rows", nargs="*", metavar="row", help=f"of {', '.join(names)}; all of them without any")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", help="Super-NaturalInstructions, for epoch and evaluation")
    parser.add_argument("--tokenizer", help="T5's vocabulary, for epoch and evaluation")
    arguments = parser.parse_args()
    if unknown := set(arguments.rows) - set(names):
        parser.error(f"no row is called {', '.join(unknown)}")
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(f"torch {torch.__version__}, {arguments.threads} thread(s), T5 v1.1 {arguments.size}, random weights")
    for function in ROWS:
        if not arguments.rows or function.__name__ in arguments.rows:
            if function not in (epoch, evaluation):
                function(arguments.size)
            elif arguments.data and arguments.tokenizer:
                function(arguments.size, arguments.data, arguments.tokenizer)
            else:
                print(f"\n{function.__name__}: needs --data and --tokenizer")


if __name__ == "__main__":
    main()
