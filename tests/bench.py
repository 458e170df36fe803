"""How fast this project is, beside `transformers`: the same weights, inputs and threads, in one process, taking turns.

    python tests/bench.py                       every row, on T5 v1.1 small with random weights
    python tests/bench.py training answering    these rows alone

Medians and ratios are printed as they come. A ratio above 1 says that this project is faster. Nothing is asserted but
that both give the same answers: times are for reading, on a quiet machine.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Callable, Iterator

import torch
from transformers import T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import train
from hint import HINT, HINTConfig, PlainT5
from t5 import EOS, SIZES, T5

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

                a, b, c = race(ours, lambda: theirs("sdpa"), lambda: theirs("eager"))
                row(name, kind, f"{a:.3f}", f"{b:.3f}", f"{c:.3f}", f"{min(b, c) / a:.2f}")


def generation(size: str) -> None:
    """Greedy decoding; the time of a step is the difference of a long and a short answer."""
    both = Contestants(size)
    header("greedy decoding", "source", "ours (ms a step)", "transformers sdpa", "eager", "times as fast as the faster")
    short, long = 4, 36
    for rows in (1, 8, 32):
        for length in (256, 1024):
            inputs = ids(rows, length)
            mask = torch.ones_like(inputs)

            with torch.no_grad():
                memory = both.ours.encode(inputs, mask)

            def ours(tokens: int) -> torch.Tensor:
                return both.ours.decode_greedily(memory, mask, None, tokens)

            def theirs(attention: str, tokens: int) -> torch.Tensor:
                states = BaseModelOutput(last_hidden_state=memory)
                generate = both.theirs[attention].generate
                return generate(encoder_outputs=states, attention_mask=mask, max_new_tokens=tokens, do_sample=False)

            whole = both.theirs["eager"].generate(inputs, attention_mask=mask, max_new_tokens=long, do_sample=False)
            assert torch.equal(both.ours.generate(inputs, mask, long), whole[:, 1:]), "the answers differ"
            runners = [
                lambda tokens=tokens, run=run: run(tokens)
                for run in (ours, lambda n: theirs("sdpa", n), lambda n: theirs("eager", n))
                for tokens in (short, long)
            ]
            times = race(*runners, rounds=3)
            a, b, c = (1000 * (times[i + 1] - times[i]) / (long - short) for i in (0, 2, 4))
            row(f"{rows} rows", length, f"{a:.1f}", f"{b:.1f}", f"{c:.1f}", f"{min(b, c) / a:.2f}")


ROWS = {function.__name__: function for function in (training, generation)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", nargs="*", choices=[[], *ROWS], help="all of them without any")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(f"torch {torch.__version__}, {arguments.threads} thread(s), T5 v1.1 {arguments.size}, random weights")
    for name in arguments.rows or ROWS:
        ROWS[name](arguments.size)
        gc.collect()


if __name__ == "__main__":
    main()
