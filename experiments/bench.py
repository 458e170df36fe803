"""Measure this project beside `transformers`: the same weights, inputs and threads, in one process, in turns.

    python experiments/bench.py                       every row, on T5 v1.1 small with random weights
    python experiments/bench.py training answering    these rows alone
    python experiments/bench.py epoch evaluation --data natural-instructions --tokenizer google/t5-v1_1-small

A ratio above 1 says that this project is faster. Nothing is asserted but that both give the same answers.
"""

from __future__ import annotations

import argparse
import random
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Callable, Iterator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rouge_score import rouge_scorer
from torch import nn
from transformers import T5Config as TheirConfig
from transformers import T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging

import data
from costs import answering_times, time_lines
from hint import HINT, HINTConfig, PlainT5, price_in_tokens
from report import machine, markdown
from t5 import EOS, SIZES, T5, Source
from train import Answerer, Settings, accumulate_gradient

VOCABULARY = 32000  # random ids are drawn below it


def race(*runners: Callable[[], object], rounds: int = 3) -> list[float]:
    """Median seconds of each runner after a warm-up. They take turns, so that a disturbance meets all of them."""
    times: list[list[float]] = [[] for _ in runners]
    for runner in runners:
        runner()
    for _ in range(rounds):
        for runner, seconds in zip(runners, times):
            began = time.perf_counter()
            runner()
            seconds.append(time.perf_counter() - began)
    return [median(seconds) for seconds in times]


def ids(rows: int, length: int) -> torch.Tensor:
    """Random ids without padding."""
    return torch.randint(2, VOCABULARY, (rows, length))


def ragged_ids(rows: int, length: int) -> torch.Tensor:
    """Random ids whose rows end at lengths spread evenly from a quarter to the whole."""
    ends = torch.linspace(length // 4, length, rows).long()
    return ids(rows, length) * (torch.arange(length) < ends[:, None])


@contextmanager
def matrix_products(kind: str) -> Iterator[Callable]:
    """Set `fp32`, fp32 at precision `medium`, or `bf16`: yields the context for forward passes."""
    torch.set_float32_matmul_precision("medium" if kind == "medium" else "highest")
    try:
        yield (lambda: torch.autocast("cpu", torch.bfloat16)) if kind == "bf16" else nullcontext
    finally:
        torch.set_float32_matmul_precision("highest")


class Contestants:
    """A T5 of this project and of `transformers`, with the same random weights, which never end an answer."""

    def __init__(self, size: str) -> None:
        torch.manual_seed(0)
        self.ours = T5(replace(SIZES[size], dropout_rate=0.0)).eval()
        nn.init.zeros_(self.ours.lm_head.weight.data[EOS])
        with tempfile.TemporaryDirectory() as folder:
            self.ours.save_pretrained(folder)
            self.theirs = {
                kind: T5ForConditionalGeneration.from_pretrained(folder, attn_implementation=kind).eval()
                for kind in ("sdpa", "eager")
            }


def compared(ours: float, theirs: dict[str, float], unit: str = "s") -> dict[str, str]:
    """Cells of a table."""
    cells = {f"here ({unit})": ours, **{f"transformers, {kind} ({unit})": value for kind, value in theirs.items()}}
    return {name: f"{x:.3g}" for name, x in cells.items()} | {"times as fast": f"{min(theirs.values()) / ours:.2f}"}


# --------------------------------------------------------------------------------------------- rows


def training(given: argparse.Namespace) -> Iterator[dict[str, str]]:
    """Forward and backward pass of a batch, without an optimizer."""
    both = Contestants(given.size)
    model = PlainT5(both.ours)
    for name, make in (("no padding", ids), ("3/8 of it padding", ragged_ids)):
        inputs, labels = make(8, 256), make(8, 64)
        labels = labels.masked_fill(labels == 0, -100)
        for kind in ("fp32", "medium", "bf16"):
            with matrix_products(kind) as context:

                def ours() -> None:
                    model.zero_grad()
                    with context():
                        loss = model(None, inputs, labels).loss
                    loss.backward()

                def theirs(attention: str) -> None:
                    other = both.theirs[attention]
                    other.zero_grad()
                    with context():
                        loss = other(input_ids=inputs, attention_mask=(inputs != 0).long(), labels=labels).loss
                    loss.backward()

                a, b, c = race(ours, lambda: theirs("sdpa"), lambda: theirs("eager"))
            yield {"8 x 256 -> 64": name, "products": kind, **compared(a, {"sdpa": b, "eager": c})}


def generation(given: argparse.Namespace) -> Iterator[dict[str, str]]:
    """Greedy decoding. The time of a step is the difference between a long and a short answer."""
    both, (short, long) = Contestants(given.size), (4, 36)
    for rows in (1, 8, 32):
        for length in (256, 1024):
            mask = torch.ones(rows, length, dtype=torch.long)
            source = Source(torch.randn(rows, length, both.ours.config.d_model), mask)

            def ours(tokens: int) -> torch.Tensor:
                return both.ours.decode_greedily([source], None, tokens)

            def theirs(attention: str, tokens: int) -> torch.Tensor:
                states = BaseModelOutput(last_hidden_state=source.states)
                generate = both.theirs[attention].generate
                return generate(encoder_outputs=states, attention_mask=mask, max_new_tokens=tokens, do_sample=False)

            assert torch.equal(ours(long), theirs("eager", long)[:, 1:]), "the answers differ"
            runners = [ours, lambda n: theirs("sdpa", n), lambda n: theirs("eager", n)]
            times = race(*(lambda n=n, run=run: run(n) for run in runners for n in (short, long)))
            a, b, c = (1000 * (times[i + 1] - times[i]) / (long - short) for i in (0, 2, 4))
            yield {"rows": f"{rows}", "source": f"{length:,}", **compared(a, {"sdpa": b, "eager": c}, "ms a step")}


def answering(given: argparse.Namespace) -> Iterator[dict[str, str]]:
    """100 inputs of one task: HINT against the instruction in every input, both in this code."""
    for new_tokens, lengths in ((16, (0, 25, 50, 100, 200, 500, 1000)), (64, (200,)), (128, (200,))):
        for line in time_lines(answering_times(given.size, lengths, new_tokens)):
            yield {"new tokens": f"{new_tokens}", **line}


def epoch(given: argparse.Namespace) -> Iterator[dict[str, str]]:
    """A batch of 256 examples of real tasks: microbatches of like lengths, or 16 in random order."""
    tokenizer, tasks = data.load_tokenizer(given.tokenizer), data.load_tasks(given.data, "train")
    formats = {"tk-instruct": data.TkInstructFormat(tokenizer, 2), "hint": data.HINTFormat(tokenizer, 0)}
    for name, prompts in formats.items():
        batch = data.Shuffled(data.encode_tasks(tasks, prompts, 256, seed=0), seed=0).take(256)
        t5 = T5(replace(SIZES[given.size], dropout_rate=0.0))
        model = PlainT5(t5) if name == "tk-instruct" else HINT(t5, HINTConfig(16, 8, generator_dropout=0.0))
        price, losses = price_in_tokens(model), []

        def cut() -> None:
            model.zero_grad()
            losses.append(accumulate_gradient(model, batch, 8192, price, nullcontext))

        def random_order() -> None:
            model.zero_grad()
            tokens = sum(len(example.target) for example in batch)
            for start in range(0, len(batch), 16):
                part = data.collate(batch[start : start + 16])
                out = model(*part)
                (out.loss * (out.tokens / tokens)).backward()

        a, b = race(cut, random_order, rounds=1)
        parts = len(data.microbatches(batch, 8192, price))
        yield {
            "256 examples": name, "microbatches": f"{parts}", "like lengths (s)": f"{a:.1f}",
            "16 in random order (s)": f"{b:.1f}", "times as fast": f"{b / a:.2f}", "loss": f"{losses[0]:.4f}",
        }  # fmt: skip


def groups(given: argparse.Namespace) -> Iterator[dict[str, str]]:
    """Seconds an example of a step on 16 real examples with `--group` 1, 2, 4, 8, the defaults of HINT, fp32."""
    tokenizer, tasks = data.load_tokenizer(given.tokenizer), data.load_tasks(given.data, "train", 8)
    formats = {"hint": data.HINTFormat(tokenizer), "tk-instruct": data.TkInstructFormat(tokenizer)}
    t5 = T5(SIZES[given.size])
    models = {"hint": HINT(t5, HINTConfig()).train(), "tk-instruct": PlainT5(t5).train()}
    prices = {name: price_in_tokens(model) for name, model in models.items()}
    for group in (1, 2, 4, 8):
        runners = []
        for name, model in models.items():
            chosen = random.Random(0).sample(tasks, 16 // group)
            examples = data.encode_tasks(chosen, formats[name], 256, seed=0)
            batch = [examples[8 * task + place] for task in range(len(chosen)) for place in range(group)]
            runners.append(partial(accumulate_gradient, model, batch, 4096, prices[name], nullcontext))
        a, b = race(*runners, rounds=1)
        line = {"group": f"{group}", "hint (s)": f"{a / 16:.2f}", "tk-instruct (s)": f"{b / 16:.2f}"}
        yield {**line, "hint / tk-instruct": f"{a / b:.2f}"}


def evaluation(given: argparse.Namespace) -> Iterator[dict[str, str]]:
    """20 inputs of each test task, 16 new tokens: HINT here, Tk-Instruct in `transformers`."""
    both, tokenizer = Contestants(given.size), data.load_tokenizer(given.tokenizer)
    tasks, prompts = data.load_tasks(given.data, "test", max_instances=20), data.TkInstructFormat(tokenizer, 2)
    settings = Settings(max_new_tokens=16, eval_batch_size=20, precision="fp32")
    answerer = Answerer(HINT(both.ours, HINTConfig()).eval(), data.HINTFormat(tokenizer, 2), settings)

    def theirs(model: T5ForConditionalGeneration) -> None:
        for task in tasks:
            inputs = data.pad([input_ids for _, input_ids in prompts(task)], 0)
            out = model.generate(inputs, attention_mask=(inputs != 0).long(), max_new_tokens=16, do_sample=False)
            tokenizer.decode_batch(out.tolist())

    models = both.theirs
    a, b = race(lambda: answerer.predictions(tasks), lambda: theirs(models["sdpa"]), rounds=2)
    yield {"tasks": f"{len(tasks)}", **compared(a, {"sdpa": b})}


def scoring(given: argparse.Namespace) -> Iterator[dict[str, str]]:
    """ROUGE-L of 12,000 made answers, beside rouge-score."""
    draw = random.Random(0)
    stems = "relat condit organis gener hop fil plant run fly happi care nation act form direct sens".split()
    endings = ["", *"s ed ing ation ational ness ful fulness ly er able ement ive y".split()]
    words = [draw.choice(stems) + draw.choice(endings) for _ in range(3000)]
    texts = [" ".join(draw.choices(words, k=1 + int(draw.expovariate(1 / 12)))) for _ in range(24000)]
    pairs = [(said, f"{wanted} {said[:40]}") for said, wanted in zip(texts[::2], texts[1::2])]
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    values: dict[str, list[float]] = {}

    def ours() -> None:
        values["ours"] = [data.rouge_l(said, wanted) for said, wanted in pairs]

    def theirs() -> None:
        values["theirs"] = [scorer.score(wanted, said)["rougeL"].fmeasure for said, wanted in pairs]

    a, b = race(ours, theirs, rounds=2)
    assert values["ours"] == values["theirs"], "the scores differ"
    yield {"here (s)": f"{a:.2f}", "rouge-score (s)": f"{b:.2f}", "times as fast": f"{b / a:.1f}"}


def memory(given: argparse.Namespace) -> Iterator[dict[str, str]]:
    """Peak memory of a process that takes one training step, as the operating system counts it."""
    for size, rows, kind in (("base", 4, "float32"), ("xl", 2, "bfloat16")):
        peaks = []
        for contestant in ("here", "sdpa", "eager"):
            code = f"import bench; bench.one_step({size!r}, {contestant!r}, {rows}, {kind!r})"
            folder = Path(__file__).parent
            out = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
            peaks.append(float(out.stdout.split()[-1]))
        cells = dict(zip(("here (GB)", "transformers, sdpa (GB)", "eager (GB)"), (f"{peak:.2f}" for peak in peaks)))
        yield {"512 -> 64": f"{size}, {rows} examples, {kind} weights", **cells}


def one_step(size: str, contestant: str, rows: int, kind: str) -> None:
    """Take a training step, and print the largest memory that this process ever had, in GB."""
    torch.set_default_dtype(getattr(torch, kind))
    config = replace(SIZES[size], dropout_rate=0.0)
    inputs, labels = ids(rows, 512), ids(rows, 64)
    if contestant == "here":
        loss = PlainT5(T5(config))(None, inputs, labels).loss
    else:
        theirs = TheirConfig(**asdict(config), decoder_start_token_id=0, attn_implementation=contestant)
        model = T5ForConditionalGeneration(theirs)
        loss = model(input_ids=inputs, attention_mask=torch.ones_like(inputs), labels=labels).loss
    loss.backward()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


ROWS = (training, generation, answering, evaluation, epoch, groups, scoring, memory)


def main() -> None:
    """Measure the rows that are asked for, and print them as Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [function.__name__ for function in ROWS]
    parser.add_argument("rows", nargs="*", metavar="row", help=f"of {', '.join(names)}; default: all")
    parser.add_argument("--size", choices=SIZES, default="small", help="size of T5 v1.1 (default: small)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of torch (default: 1)")
    parser.add_argument("--data", help="Super-NaturalInstructions, for epoch, groups and evaluation")
    parser.add_argument("--tokenizer", help="T5's vocabulary, for epoch, groups and evaluation")
    given = parser.parse_args()
    if unknown := set(given.rows) - set(names):
        parser.error(f"no row is called {', '.join(unknown)}")
    torch.set_num_threads(given.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(f"`{shlex.join(['python', 'experiments/bench.py', *sys.argv[1:]])}`; {machine()}, {given.threads} thread(s).")
    for function in ROWS:
        needs_data = function in (epoch, groups, evaluation)
        if function.__name__ in given.rows or (not given.rows and (given.data or not needs_data)):
            if needs_data and not (given.data and given.tokenizer):
                parser.error(f"{function.__name__} needs --data and --tokenizer")
            print(f"\n{function.__name__}: {function.__doc__}\n\n{markdown(list(function(given)))}", flush=True)


if __name__ == "__main__":
    main()
