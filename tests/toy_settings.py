"""The demo in other settings: is its result one of the recipe, or of one lucky place?

    python tests/toy_settings.py                              every setting, seed 0
    python tests/toy_settings.py "as in the demo" --seeds 0 1 2 3 4

Prints a row as soon as it is known: exact match on both test sets, and the seconds of training and answering.
"""

import argparse
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

import train
from data import toy_world

SETTINGS = {  # what differs from the demo: the recipe, T5, the generator, the world, the examples in the instruction
    "as in the demo": {},
    "two decoder layers": dict(t5=dict(num_decoder_layers=2)),
    "d_model 96": dict(t5=dict(d_model=96, d_kv=24, d_ff=192), hint=dict(embedding_scale=96**0.5)),
    "half the training tasks": dict(world=dict(tasks=2500)),
    "8 kinds of words, 20 arguments": dict(world=dict(kinds=8, arguments=20)),
    "one example beside the definition": dict(examples=1, recipe=dict(max_instruction=128)),
    "every example of another task": dict(recipe=dict(group=1)),
    "4,000 steps": dict(recipe=dict(steps=4000)),
    "column embeddings of d^-0.5": dict(hint=dict(embedding_scale=1.0)),
    "half the learning rate": dict(recipe=dict(learning_rate=0.015)),
}


def run_setting(seed: int, recipe=(), t5=(), hint=(), world=(), examples=0) -> tuple[float, float]:
    """Exact match on unseen arguments and on unseen compositions."""
    made = toy_world(seed, **dict(world))
    settings = replace(train.DEMO, seed=seed, **dict(recipe))
    with tempfile.TemporaryDirectory() as folder:
        run = train.Run(Path(folder, "run"), asdict(settings))
        answerer = train.learn_toy_world(
            made, settings, replace(train.DEMO_T5, **dict(t5)), replace(train.DEMO_HINT, **dict(hint)), run, examples
        )
        tests = (made.unseen_arguments, made.unseen_compositions)
        return tuple(train.scores(answerer.predictions(tasks))["exact_match"] for tasks in tests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("settings", nargs="*", help=f"of {', '.join(SETTINGS)}; all of them without it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| setting | seed | unseen arguments | unseen compositions | seconds |\n| --- | --- | --- | --- | --- |")
    for name in arguments.settings or SETTINGS:
        for seed in arguments.seeds:
            began = time.perf_counter()
            known, composed = run_setting(seed, **SETTINGS[name])
            print(f"| {name} | {seed} | {known:.1f} | {composed:.1f} | {time.perf_counter() - began:.0f} |", flush=True)


if __name__ == "__main__":
    main()
