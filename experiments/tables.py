"""Train the rows of the paper's tables, and write its tables and figures.

    python experiments/tables.py                    all of them, on the toy world: an hour on two cores
    python experiments/tables.py main               Table 1, learning curves
    python experiments/tables.py pretraining modules architecture shots        Tables 4, 5 and 6, Figure 3
    python experiments/tables.py vague              examples that tell what the definition does not
    python experiments/tables.py time costs         Figure 4; section 3.3 and appendix C
    python experiments/tables.py --smoke            every row in four steps, to see that all of it runs
    python experiments/tables.py main --data natural-instructions --start google/t5-base-lm-adapt --jobs 1

Each row is a `train.py finetune` (or `pretrain`) in a process of its own. Its log begins with its command. A finished
row is not trained again, and a stopped one goes on.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from argparse import REMAINDER, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from statistics import mean, stdev, variance
from typing import NamedTuple, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

import train
from costs import answering_times, cost_text, time_lines
from data import ToyWorld, load_tasks, scores, toy_world, vague, write_toy_world
from hint import HINTConfig, count_flops
from report import Line, draw, machine, markdown
from t5 import SIZES, InputError, read_json
from train import settings_of, write

# --------------------------------------------------------------------------------------------- rows


class Row(NamedTuple):
    """A line of a table: its options of `train.py`, and the row whose model it starts from."""

    words: str
    start: str = ""
    command: str = "finetune"
    frozen: bool = False  # T5 does not train; the toy world has no public T5, so it is that of `tk-instruct`
    vague: bool = False  # in the toy world whose definitions leave the argument to the examples


ROWS = {
    "hint": Row("--system hint"),
    "tk-instruct": Row("--system tk-instruct"),
    "tk-instruct+peft": Row("--system tk-instruct+peft"),
    "no-instruct": Row("--system no-instruct"),
    "hypter": Row("--system hypter"),
    "hypertune": Row("--system hypertune", frozen=True),
    "hyperformer": Row("--system hyperformer --examples 5", frozen=True),
    "hyperformer++": Row("--system hyperformer++ --examples 5", frozen=True),
    "hyperformer++-instruction": Row("--system hyperformer++-instruction", frozen=True),
    "no-fusion": Row("--no-fusion"),
    "no-modules": Row("--generator none"),
    "adapters": Row("--no-fusion --modules adapters"),
    "prefixes": Row("--no-fusion --modules prefixes"),
    "lora": Row("--no-fusion --modules lora"),
    "own-hyperencoder": Row("--hyperencoder own"),
    "full-decoder": Row("--generator decoder"),
    "hint-text": Row("--system hint", command="pretrain"),
    "hint-pretrained": Row("--system hint", start="hint-text"),
    "hint-caclm-text": Row("--system hint --objective caclm", command="pretrain"),
    "hint-caclm": Row("--system hint", start="hint-caclm-text"),
    "no-fusion-text": Row("--no-fusion", command="pretrain"),
    "no-fusion-pretrained": Row("--no-fusion", start="no-fusion-text"),
    "no-fusion-caclm-text": Row("--no-fusion --objective caclm", command="pretrain"),
    "no-fusion-caclm": Row("--no-fusion", start="no-fusion-caclm-text"),
    "adapters-text": Row("--no-fusion --modules adapters", command="pretrain"),
    "adapters-pretrained": Row("--no-fusion --modules adapters", start="adapters-text"),
    "prefixes-text": Row("--no-fusion --modules prefixes", command="pretrain"),
    "prefixes-pretrained": Row("--no-fusion --modules prefixes", start="prefixes-text"),
    "hypertune-text": Row("--system hypertune --objective caclm", command="pretrain", frozen=True),
    "hypertune-caclm": Row("--system hypertune", start="hypertune-text", frozen=True),
    "hint-1": Row("--system hint --examples 1"),
    "hint-2": Row("--system hint --examples 2"),
    "hint-5": Row("--system hint --examples 5"),
    "tk-instruct-1": Row("--system tk-instruct --examples 1"),
    "tk-instruct-2": Row("--system tk-instruct --examples 2"),
    "tk-instruct-5": Row("--system tk-instruct --examples 5"),
    "hint-vague": Row("--system hint", vague=True),
    "hint-vague-2": Row("--system hint --examples 2", vague=True),
    "tk-instruct-vague": Row("--system tk-instruct", vague=True),
    "tk-instruct-vague-2": Row("--system tk-instruct --examples 2", vague=True),
}
TABLES = {
    "main": [
        "hint", "tk-instruct", "tk-instruct+peft", "no-instruct", "hypter", "hypertune", "hyperformer", "hyperformer++",
        "hyperformer++-instruction",
    ],  # Table 1
    "pretraining": [
        "hint", "hint-pretrained", "hint-caclm", "no-fusion", "no-fusion-pretrained", "no-fusion-caclm", "hypertune",
        "hypertune-caclm",
    ],  # Table 4
    "modules": [
        "no-fusion", "adapters", "prefixes", "lora", "no-fusion-pretrained", "adapters-pretrained",
        "prefixes-pretrained",
    ],  # Table 5
    "architecture": ["hint", "no-fusion", "no-modules", "own-hyperencoder", "full-decoder"],  # Table 6
    "shots": [
        "hint", "hint-1", "hint-2", "hint-5", "tk-instruct", "tk-instruct-1", "tk-instruct-2", "tk-instruct-5",
    ],  # Figure 3
    "vague": ["hint-vague", "hint-vague-2", "tk-instruct-vague", "tk-instruct-vague-2"],  # of the toy world alone
}  # fmt: skip
WITHOUT_ROWS = ("time", "costs")
TOY = "--learning-rate 0.03 --warmup 100 --final-rate 0.05 --dropout 0 --precision fp32 --log-every 50"
TOY_WORDS = {  # the recipe of the demo
    "finetune": f"{TOY} --steps 1200 --batch-size 64 --group 2 --max-instruction 256 --max-input 320 --max-target 16 "
    "--eval-every 400",
    "pretrain": f"{TOY} --steps 500 --batch-size 32 --max-input 64",
}
TOY_FROZEN = "--steps 600"  # after the 1,200 of the T5 that the row starts from
SMOKE_WORDS = {
    "finetune": "--steps 4 --warmup 2 --batch-size 8 --eval-every 2 --max-instances 2",
    "pretrain": "--steps 4 --warmup 2 --batch-size 8",
}


class Rows:
    """The command of each row, the folder of its run, and the result that it leaves there."""

    def __init__(self, given: Namespace) -> None:
        self.given, self.out, self.toy = given, Path(given.out), given.data is None

    def folder(self, name: str, seed: int) -> Path:
        """Folder of a run."""
        return self.out / name / f"seed-{seed}"

    def world(self, name: str, seed: int) -> Path:
        """Folder of the toy world that a row is trained on."""
        return self.out / f"{'small-' * self.given.smoke}{'vague' if ROWS[name].vague else 'world'}-{seed}"

    def start(self, name: str) -> str:
        """Name of the row whose model a row starts from; empty if there is none."""
        return ROWS[name].start or ("tk-instruct" if ROWS[name].frozen and self.toy else "")

    def with_starts(self, names: Sequence[str]) -> list[str]:
        """List rows, each once, after the rows that they start from."""
        ordered: dict[str, None] = {}
        for name in names:
            start = self.start(name)
            ordered |= dict.fromkeys([*(self.with_starts([start]) if start else []), name])
        return list(ordered)

    def words(self, name: str, seed: int) -> list[str]:
        """Make the command line of a row."""
        row, given, world = ROWS[name], self.given, str(self.world(name, seed))
        data, corpus = (world, [f"{world}/corpus.json.gz"]) if self.toy else (given.data, given.corpus)
        tokenizer = world if self.toy else given.tokenizer
        start = str(self.folder(self.start(name), seed)) if self.start(name) else given.start
        words = [
            row.command,
            *(["--data", data] if row.command == "finetune" else ["--corpus", *corpus]),
            *(["--tokenizer", tokenizer] if tokenizer else []),
            *(["--start", start] if start else ["--size", "toy" if self.toy else given.size]),
            *(TOY_WORDS[row.command].split() if self.toy else given.words),
            *(TOY_FROZEN.split() * (self.toy and row.frozen and row.command == "finetune")),
            *(SMOKE_WORDS[row.command].split() * given.smoke),
            *row.words.split(),
            *["--seed", str(seed), "--out", str(self.folder(name, seed)), "--resume"],
        ]  # fmt: skip
        config = settings_of(words).hint_config()  # a wrong option ends the command here
        return words + (toy_sizes(config) if self.toy else [])

    def train(self, rows: Sequence[tuple[str, int]]) -> None:
        """Train the rows without a result, `--jobs` at a time. Raises InputError if one fails."""
        waiting = [row for row in rows if not self.has_result(*row)]
        running: dict[tuple[str, int], tuple[subprocess.Popen, float]] = {}
        with tqdm(total=len(rows), initial=len(rows) - len(waiting), desc="rows", disable=not waiting) as bar:
            try:
                while waiting or running:
                    for row in [row for row, (process, _) in running.items() if process.poll() is not None]:
                        process, began = running.pop(row)
                        self.finish(*row, process.returncode, round(time.time() - began))
                        bar.update()
                    unfinished = {*waiting, *running}
                    ready = [(name, seed) for name, seed in waiting if (self.start(name), seed) not in unfinished]
                    for row in ready[: self.given.jobs - len(running)]:
                        running[row] = self.begin(*row), time.time()
                        waiting.remove(row)
                    time.sleep(0.1)
            finally:
                for process, _ in running.values():
                    process.terminate()  # the run ends its step and writes a checkpoint
                for process, _ in running.values():
                    process.wait()

    def has_result(self, name: str, seed: int) -> bool:
        """Check for a result of this very command. Raises InputError if there is one of another."""
        words, path = self.words(name, seed), self.folder(name, seed) / "result.json"
        if path.exists() and read_json(path).get("words") != words:
            raise InputError(f"{path}: is of a row with other options; name another --out")
        return path.exists()

    def begin(self, name: str, seed: int) -> subprocess.Popen:
        """Start the process of a row. Its output goes into a log beside its folder."""
        if self.toy and not (self.world(name, seed) / "tokenizer.json").exists():
            world = toy_world(seed, tasks=20, instances=2) if self.given.smoke else toy_world(seed)
            if self.given.smoke:
                world = world._replace(unseen_arguments=world[1][:4], unseen_compositions=world[2][:4])
            write_world(self.world(name, seed), world, ROWS[name].vague)
        words, place = self.words(name, seed), self.folder(name, seed)
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{place}.log", "w", encoding="utf-8") as log:
            log.write(shlex.join(["python", "train.py", *words]) + "\n")
            log.flush()
            # In a session of its own: Ctrl-C reaches it once, from this process. A second signal would stop it at once.
            return subprocess.Popen(
                [sys.executable, __file__, "row", *words], stdin=subprocess.PIPE, stdout=log, stderr=log,
                env={**os.environ, **({"OMP_NUM_THREADS": "1"} if self.toy else {})}, start_new_session=True,
            )  # fmt: skip

    def finish(self, name: str, seed: int, status: int, seconds: int) -> None:
        """Write the result of a row whose process has ended. A resumed row has the seconds of its last part."""
        place = self.folder(name, seed)
        if status:
            raise InputError(f"{place}.log: ended with status {status}; its end says why")
        result = {"words": self.words(name, seed), "seconds": seconds, "machine": machine()}
        if ROWS[name].command == "finetune":
            result |= result_of(place, self.world(name, seed) if self.toy else None)
        write(place / "result.json", json.dumps(result, indent=2) + "\n")
        tqdm.write(f"{place}: {seconds} s", file=sys.stderr)

    def results(self, names: Sequence[str], seeds: Sequence[int]) -> dict[str, list[dict]]:
        """Read the results of finished rows, one for each seed."""
        return {name: [read_json(self.folder(name, seed) / "result.json") for seed in seeds] for name in names}


def toy_sizes(config: HINTConfig | None) -> list[str]:
    """Sizes of the toy world for the parts that a hypernetwork has."""
    if config is None:
        return []
    has_prefixes = "prefixes" in config.modules and config.generator in ("columns", "direct", "pooled", "decoder")
    has_bottleneck = config.generator != "none" and config.modules != "prefixes"
    sizes = "--generator-dropout 0 --embedding-scale 8" + " --bottleneck 4" * has_bottleneck
    return (sizes + " --prefix-length 4" * has_prefixes).split()


def run_row(words: Sequence[str]) -> None:
    """Run `train.py`, and stop it when standard input ends.

    The command that started the row holds the other end of that pipe. So the row stops however that command ends.
    """

    def wait_for_the_end() -> None:
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    train.main(words)


def write_world(folder: Path, world: ToyWorld, is_vague: bool) -> None:
    """Write a toy world, and `pairs.json`: the pair held out from training that each test task asks for."""
    pairs: dict[str, set[str]] = {}
    for name, rule in world.rules.items():
        pairs[name] = {f"{rule.argument} + {slot.selection}" for slot in rule.slots if rule.argument}
        pairs[name] |= {f"{first[1]}, {second[1]}" for first, second in zip(rule.slots, rule.slots[1:])}
    trained = set().union(*(pairs[task.name] for task in world.train))
    held_out = {task.name: " and ".join(sorted(pairs[task.name] - trained)) for task in world[1] + world[2]}
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "pairs.json", json.dumps(held_out, indent=2) + "\n")
    write_toy_world(folder, vague(world) if is_vague else world)


# --------------------------------------------------------------------------------------------- results


def result_of(place: Path, world: Path | None) -> dict:
    """Collect what the tables need from the files of a run: scores, scores during the training, costs.

    In the toy world also the scores of both test sets, and of each held-out pair: answers of one pair are right or
    wrong together.
    """
    with open(place / "predictions.jsonl", encoding="utf-8") as file:
        predictions = list(map(json.loads, file))
    groups, pairs = {"overall": predictions}, {}
    if world:
        pair_of = read_json(world / "pairs.json")
        for row in predictions:
            groups.setdefault(re.sub(r"-\d+$", "", row["task"]).replace("-", " "), []).append(row)
            pairs.setdefault(pair_of[row["task"]], []).append(row)
    log = list(map(json.loads, (place / "log.jsonl").read_text("utf-8").splitlines()))
    return {
        "scores": {name: scores(group) for name, group in groups.items()},
        "pairs": {name: {**scores(group), "answers": len(group)} for name, group in pairs.items()},
        "curve": [[entry["step"], entry["exact_match"]] for entry in log if "exact_match" in entry],
        "steps": log[-1]["step"],
        **cost_of(place),
    }


def cost_of(place: Path) -> dict[str, int]:
    """Count the numbers that train, and the FLOPs of real passes for one instruction, and for one input.

    Means over at most 16 training tasks, evenly chosen, four inputs each. Answers end where the model ends them.
    """
    data = read_json(place / "config.json")["run"]["data"]
    words = ["evaluate", "--model", str(place), "--data", data, "--out", "-", "--precision", "fp32"]
    answerer = train.answerer_of(settings_of(words))
    tasks = load_tasks(data, "train", 4)
    tasks = tasks[:: math.ceil(len(tasks) / 16)]
    instructions = [answerer.prompts(task)[0][0] for task in tasks]
    once = count_flops(lambda: [answerer.encode(instruction) for instruction in instructions])
    answers = count_flops(lambda: [answerer.answers(task) for task in tasks]) - once
    trained = sum(parameter.numel() for parameter in answerer.model.parameters() if parameter.requires_grad)
    inputs = sum(len(task.instances) for task in tasks)
    return {"trained": trained, "flops_once": once // len(tasks), "flops_each": answers // inputs}


def gflop_of_100(result: dict) -> float:
    """GFLOP for 100 inputs of one task."""
    return (result["flops_once"] + 100 * result["flops_each"]) / 1e9


def overall(results: Sequence[dict]) -> list[float]:
    """Exact match on all unseen tasks, for each seed."""
    return [result["scores"]["overall"]["exact_match"] for result in results]


def table_text(rows: dict[str, list[dict]]) -> str:
    """Results of rows as a Markdown table: exact match, mean ± standard error over seeds; FLOPs of the first seed."""
    lines = []
    for name, results in rows.items():
        groups = list(results[0]["scores"])[1:] or ["overall"]
        cells = {group: with_error([one["scores"][group]["exact_match"] for one in results]) for group in groups}
        if results[0]["pairs"]:  # answers of a held-out pair of transformations are right or wrong together
            fallen = [[p["exact_match"] < 50 for name, p in one["pairs"].items() if ", " in name] for one in results]
            cells[f"pairs mostly wrong, of {len(fallen[0])}"] = with_error([sum(pairs) for pairs in fallen])
        cells["ROUGE-L"] = with_error([one["scores"]["overall"]["rougeL"] for one in results])
        for step, _ in results[0]["curve"]:
            cells[f"at step {step:,}"] = with_error([dict(one["curve"])[step] for one in results])
        cells["numbers trained"] = f"{results[0]['trained']:,}"
        cells["GFLOP for 100 inputs"] = f"{gflop_of_100(results[0]):.3g}"
        cells["seconds"] = f"{mean(one['seconds'] for one in results):.0f}"
        lines.append({"row": name, **cells})
    return f"{markdown(lines)}\n{seeds_needed(rows)}\n"


def with_error(values: Sequence[float]) -> str:
    """Mean ± standard error; one value has no error."""
    return f"{mean(values):.1f}" + (f" ± {stdev(values) / math.sqrt(len(values)):.1f}" if len(values) > 1 else "")


def seeds_needed(rows: dict[str, list[dict]]) -> str:
    """Say how many seeds tell two rows k points apart: 2 (1.96 s / k)^2, where s is the deviation between seeds."""
    seeds = {len(results) for results in rows.values()}
    if min(seeds) == 1:
        return "One seed: the error of these scores is not known."
    s = math.sqrt(mean(variance(overall(results)) for results in rows.values()))
    needed = {k: max(1, math.ceil(2 * (1.96 * s / k) ** 2)) for k in (1, 2, 3, 5)}
    points, several = (", ".join(map(str, numbers)) for numbers in (needed, needed.values()))
    return (
        f"{max(seeds)} seeds; ± is the standard error. Between seeds, exact match on all unseen tasks has a standard "
        f"deviation of {s:.1f}, pooled over the rows. To tell two rows {points} points apart (at 95 %) takes {several} "
        "seeds each."
    )


def curve(results: Sequence[dict]) -> Line:
    """Exact match on all unseen tasks over the steps of training, mean over seeds; the last point is the end."""
    steps = [step for step, _ in results[0]["curve"]]
    points = [(step, mean(dict(one["curve"])[step] for one in results)) for step in steps]
    return [*points, (results[0]["steps"], mean(overall(results)))]


def scores_by_flops(rows: dict[str, list[dict]]) -> dict[str, Line]:
    """Figure 3: score against compute, from no example in the instruction to five; a line for each system."""
    lines: dict[str, Line] = {}
    for name, results in rows.items():
        point = (gflop_of_100(results[0]), mean(overall(results)))
        lines.setdefault(ROWS[name].words.split()[1], []).append(point)
    return lines


# --------------------------------------------------------------------------------------------- command line


def make_tables(given: Namespace, command: str) -> None:
    """Train all rows that the tables need, then write tables and figures."""
    rows = Rows(given)
    asked = given.tables or [*(table for table in TABLES if rows.toy or table != "vague"), *WITHOUT_ROWS]
    default = {table: [0] if given.smoke else [0, 1, 2] if table == "main" else [0, 1] for table in TABLES}
    seeds = {table: given.seeds or default[table] for table in TABLES if table in asked}
    wanted = [(name, seed) for table in seeds for seed in seeds[table] for name in rows.with_starts(TABLES[table])]
    rows.train(list(dict.fromkeys(wanted)))
    rows.out.mkdir(parents=True, exist_ok=True)
    for table in asked:
        results = rows.results(TABLES[table], seeds[table]) if table in TABLES else {}
        machines = sorted({one["machine"] for several in results.values() for one in several}) or [machine()]
        about, score = f"`{command}`; {'; '.join(machines)}.", "exact match on all unseen tasks"
        if table == "costs":
            text = cost_text(given.cost_size)
        elif table == "time":
            times = answering_times(given.time_size, (0, 20) if given.smoke else (0, 50, 100, 200, 400, 700, 1000))
            text = f"T5 {given.time_size}, random weights, one thread.\n\n{markdown(time_lines(times))}"
            lines = {name: [(t, times[t][name]) for t in times] for name in ("hint", "tk-instruct")}
            draw(rows.out / "time-and-length.svg", lines, "tokens of instruction", "seconds for 100 inputs", about)
        else:
            text = table_text(results)
        if table == "main":
            lines = {name: curve(several) for name, several in results.items()}
            draw(rows.out / "learning-curves.svg", lines, "steps", score, about)
        if table == "shots":
            draw(rows.out / "score-and-compute.svg", scores_by_flops(results), "GFLOP for 100 inputs", score, about)
        write(rows.out / f"{table}.md", f"{about}\n\n{text}")
        print(f"\n{table}\n\n{text}")


def check(given: Namespace) -> None:
    """Raises InputError for an unknown table, and for options without those that they need."""
    if unknown := set(given.tables) - {*TABLES, *WITHOUT_ROWS}:
        raise InputError(f"no table is called {min(unknown)}; there are {', '.join((*TABLES, *WITHOUT_ROWS))}")
    if not given.data and (given.start or given.size or given.tokenizer or given.corpus or given.words):
        raise InputError("--start, --size, --tokenizer, --corpus and --words are for --data; the toy world has its own")
    if given.data and bool(given.start) == bool(given.size):
        raise InputError("--data: needs --start or --size, the model that rows start from")
    if given.data and "vague" in given.tables:
        raise InputError("vague: is a table of the toy world, not of --data")
    if given.jobs < 1:
        raise InputError("--jobs: must be at least 1")
    if given.data and not given.corpus and (not given.tables or {"pretraining", "modules"} & set(given.tables)):
        raise InputError("--corpus: pretrained rows need one, with --data")


def parser() -> ArgumentParser:
    """Make the command line."""
    command = ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=RawDescriptionHelpFormatter)
    add = command.add_argument
    add("tables", nargs="*", metavar="table", help=f"of {', '.join((*TABLES, *WITHOUT_ROWS))}; default: all")
    add("--out", help="folder of all rows, tables and figures (default: runs/tables, or runs/smoke)")
    add("--seeds", type=int, nargs="+", metavar="N", help="seeds of each row (default: 0 1 2 for main, 0 1 for others)")
    add("--jobs", type=int, default=2, metavar="N", help="rows trained at a time (default: 2)")
    add("--smoke", action="store_true", help="four steps a row, in a small toy world")
    add("--data", help="Super-NaturalInstructions, in place of the toy world")
    add("--corpus", nargs="+", metavar="FILE", help="with --data: text to pretrain on")
    add("--start", help="with --data: the T5 that rows start from, a folder or a public name")
    add("--size", choices=SIZES, help="with --data: fresh weights of this size, in place of --start")
    add("--tokenizer", help="with --data: folder, file or public name; default: that of --start")
    add("--time-size", choices=SIZES, help="T5 of the table time (default: tiny)")
    add("--cost-size", choices=SIZES, help="T5 of the table costs (default: xl)")
    add("--words", nargs=REMAINDER, default=[], help="with --data: options of train.py for all rows; stands last")
    return command


def main(words: Sequence[str] | None = None) -> None:
    """Make tables. A mistake of the user ends in one sentence and status 1 (2: of the command line)."""
    words = sys.argv[1:] if words is None else list(words)
    if words[:1] == ["row"]:
        return run_row(words[1:])
    given = parser().parse_args(words)
    given.out = given.out or ("runs/smoke" if given.smoke else "runs/tables")
    given.time_size = given.time_size or ("toy" if given.smoke else "tiny")
    given.cost_size = given.cost_size or ("toy" if given.smoke else "xl")
    torch.set_num_threads(1)
    try:
        with train.signals():
            check(given)
            make_tables(given, shlex.join(["python", "experiments/tables.py", *words]))
    except InputError as error:
        sys.exit(f"tables.py: {error}")
    except OSError as error:
        sys.exit(f"tables.py: {error.filename or given.out}: {error.strerror or error}")
    except train.Stopped as stop:
        print("tables.py: stopped; the same command goes on", file=sys.stderr)
        sys.exit(128 + stop.args[0])


if __name__ == "__main__":
    main()
