"""Train the demo with other settings: does its result depend on one lucky place?

    python experiments/toy_settings.py                              every setting, seed 0
    python experiments/toy_settings.py "as in the demo" --seeds 0 1 2 3 4

Prints a line as soon as it is known: exact match on both test sets, and the seconds of training and answering.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from data import Shuffled, encode_tasks, scores, toy_tokenizer, toy_world
from hint import HINT
from report import machine
from t5 import SIZES, T5
from train import Answerer, Run, prompt_format, settings_of, train

SETTINGS = {  # changes of the demo: its settings, its T5, its world
    "as in the demo": {},
    "two encoder layers": dict(t5=dict(num_layers=2)),
    "d_model 96": dict(t5=dict(d_model=96, d_kv=24, d_ff=192), embedding_scale=96**0.5),
    "half the training tasks": dict(world=dict(tasks=2500)),
    "8 kinds of words, 20 arguments": dict(world=dict(kinds=8, arguments=20)),
    "one example beside the definition": dict(examples=1, max_instruction=128),
    "every example of another task": dict(group=1),
    "groups of 4 examples of a task": dict(group=4),
    "groups of 8 examples of a task": dict(group=8),
    "3,000 steps": dict(steps=3000),
    "column embeddings of d^-0.5": dict(embedding_scale=1.0),
    "half the learning rate": dict(learning_rate=0.015),
}


def run_setting(seed: int, t5: dict = {}, world: dict = {}, **changes) -> list[float]:
    """Exact match on unseen arguments and on unseen compositions."""
    toy, tokenizer = toy_world(seed, **world), toy_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        settings = replace(settings_of(["demo", "--seed", str(seed), "--out", f"{folder}/run"]), **changes)
        torch.manual_seed(seed)
        rows = tokenizer.get_vocab_size()
        config = replace(SIZES["toy"], vocab_size=rows, dropout_rate=settings.dropout, **t5)
        model, prompts = HINT(T5(config), settings.hint_config()), prompt_format(settings, tokenizer)
        examples = encode_tasks(toy.train, prompts, settings.max_target, seed)
        train(model, tokenizer, Shuffled(examples, seed, 0, settings.group, toy.train), settings, Run(settings))
        answerer = Answerer(model, prompts, settings)
        tests = (toy.unseen_arguments, toy.unseen_compositions)
        return [scores(answerer.predictions(tasks))["exact_match"] for tasks in tests]


def main() -> None:
    """Run the settings that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("settings", nargs="*", choices=[[], *SETTINGS], help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}\n\n| setting | seed | unseen arguments | unseen compositions | seconds |\n{'| --- ' * 5}|")
    for name in given.settings or SETTINGS:
        for seed in given.seeds:
            began = time.perf_counter()
            arguments, compositions = run_setting(seed, **SETTINGS[name])
            seconds = time.perf_counter() - began
            print(f"| {name} | {seed} | {arguments:.1f} | {compositions:.1f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
