"""Ablations: take a part away, train, and say what your own runs show, and what they do not."""

import json
import re

from mechanics import REGISTRY, ROOT, NotYet, exercise


def table(runs, name):
    """Read a table that experiments/tables.py has written -> its rows, each a dictionary by heads, and its text."""
    recorded = runs.name == "recorded"  # the audit reads the results that the project shows
    path = (ROOT / "experiments" / "results" if recorded else runs / "tables") / f"{name}.md"
    if not path.is_file():
        raise NotYet(f"There is no finished table yet. Make it with: python experiments/tables.py {name}")
    text = path.read_text("utf-8")
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    heads, *rows = [line for line in lines if "---" not in line[0]]
    return {row[0]: dict(zip(heads[1:], map(mean_and_error, row[1:]))) for row in rows}, text


def mean_and_error(cell):
    """Read `93.9 ± 6.0`, or a number without its error."""
    numbers = [float(number) for number in re.findall(r"[\d.]+", cell.replace(",", ""))]
    return (*numbers, 0.0)[:2]


@exercise(
    "ablate", [], level=2, minutes=40, paper="HINT, section 6 and Table 6",
    hint="± is the standard error of a mean. That of a difference is the root of the sum of both squares.",
    why="A part may change what is learned, or only how soon: look at the end and on the way. And a gap between two "
        "rows says something only beside the gaps between their seeds.",
    questions={
        "without_fusion": "Points of exact match on unseen compositions that are lost without fusion?",
        "without_modules": "Points of exact match on unseen compositions that are lost without modules?",
        "early_fusion": "Points that no-fusion is behind hint at step 400, on all unseen tasks?",
        "early_modules": "Points that no-modules is behind hint at step 400? (negative if it is ahead)",
        "lower": "Which row is clearly lower than hint on unseen compositions: no-fusion, no-modules, both or neither?",
    },
    near={
        "HINT without fusion still has modules that were written from the instruction, and time to learn them.":
            [("without_fusion", 100.0), ("without_fusion", 50.0)],
        "HINT without modules still reads the instruction's states.":
            [("without_modules", 100.0), ("without_modules", 50.0)],
        "At step 400, HINT itself has not learned so much.": [("early_fusion", 100.0), ("early_modules", 100.0)],
        "Modules alone learn the same, but they need longer for it.": ("early_fusion", 0.0),
    },
)  # fmt: skip
def fusion_or_modules(runs):
    """HINT gives an instruction to T5 in two ways: as generated modules, and as states for the decoder (fusion).

    Train it without one, and without the other: python experiments/tables.py architecture. The machine needs 10 to 20
    minutes on two cores. You need the rows `hint`, `no-fusion` and `no-modules` of runs/tables/architecture.md. Call a
    difference clear if it is more than 4.3 of its standard errors with two seeds, or 2.8 with three.
    """
    rows, text = table(runs, "architecture")
    if (seeds := re.search(r"(\d+) seeds; ±", text)) is None:
        raise NotYet("One seed has no error. Make the table with the two seeds that it has without --seeds.")
    hint, fusion, modules = (rows[name]["unseen compositions"] for name in ("hint", "no-fusion", "no-modules"))
    parts = {"no-fusion": fusion, "no-modules": modules}
    lower = [name for name, row in parts.items() if clearly_lower(row, hint, seeds[1])]
    early = [rows["hint"]["at step 400"][0] - rows[name]["at step 400"][0] for name in parts]
    yield "without_fusion", hint[0] - fusion[0], 5.0
    yield "without_modules", hint[0] - modules[0], 5.0
    yield "early_fusion", early[0], 10.0
    yield "early_modules", early[1], 10.0
    yield "lower", "both" if len(lower) == 2 else (*lower, "neither")[0], None


def clearly_lower(row, other, seeds):
    """Tell whether a mean is lower than another by more than 95 % of the t distribution allows."""
    return other[0] - row[0] > (4.3 if seeds == "2" else 2.8) * (row[1] ** 2 + other[1] ** 2) ** 0.5


@exercise(
    "ablate", [], level=2, minutes=40, paper="HINT, section 5.1 (Def + 2 Pos) and Figure 3",
    hint="FLOPs stand in the last columns. HINT reads the examples once a task, Tk-Instruct with every input.",
    why="Examples help where they say what the definition does not. HINT pays for them once, Tk-Instruct every time.",
    questions={
        "untold": "Exact match of HINT on unseen arguments, without examples (row hint-vague)?",
        "gain": "Points that two examples add to it (row hint-vague-2)?",
        "price_hint": "FLOPs of HINT for 100 inputs with two examples, over those without?",
        "price_tk": "FLOPs of Tk-Instruct for 100 inputs with two examples, over those without?",
    },
    near={
        "No definition says the word that these tasks ask for: without examples it can only be guessed.":
            [("untold", 50.0), ("untold", 100.0)],
        "These examples are the only place where the word stands. They are worth more than that.":
            [("gain", 0.0), ("gain", 10.0), ("gain", 30.0)],
        "HINT reads the examples as well, but once for all 100 inputs.": ("price_hint", 1.0),
        "That is the price if every input carried the examples. HINT reads them once a task.": ("price_hint", 2.0),
        "Tk-Instruct reads the examples with every input.": ("price_tk", 1.0),
        "This is about what HINT pays. Tk-Instruct pays with every input.": ("price_tk", 1.2),
    },
)  # fmt: skip
def examples_that_matter(runs):
    """In a vague world, a definition says "followed by what" where it should name a word. Examples show the word.

    Train HINT and Tk-Instruct with and without two examples: python experiments/tables.py vague. The machine needs 10
    to 20 minutes on two cores. The table is runs/tables/vague.md. Every task of the unseen arguments has such a word.
    """
    (rows, _), score, flops = table(runs, "vague"), "unseen arguments", "GFLOP for 100 inputs"
    yield "untold", rows["hint-vague"][score][0], 10.0
    yield "gain", rows["hint-vague-2"][score][0] - rows["hint-vague"][score][0], 10.0
    yield "price_hint", rows["hint-vague-2"][flops][0] / rows["hint-vague"][flops][0], 0.1
    yield "price_tk", rows["tk-instruct-vague-2"][flops][0] / rows["tk-instruct-vague"][flops][0], 0.3


CHANGES = {"reshaped": "hand-over", "divided": "attention", "undivided": "columns"}  # near miss 1 of an exercise each


@exercise(
    "ablate", [], level=2, minutes=40, paper="HINT, section 3.1.1; Raffel et al., section 2.1",
    hint="Compare the first and the last line of each run's log.jsonl, then the last lines of all runs.",
    why="A falling loss proves little: the worst of these errors ends at 1.0 times the right code's loss. Check code.",
    questions={
        "falls": "In how many of the four runs is the last loss less than half of the first that is logged?",
        "twice": "How many of the three errors end with at least twice the loss of the right code?",
        "reshaped_ratio": "Last loss with W_down reshaped over that of the right code?",
        "divided_ratio": "Last loss with divided scores over that of the right code?",
    },
    near={
        "Reshaped, each embedding still writes a part of W_down of its own: training does not mind.":
            [("reshaped_ratio", 2.0), ("reshaped_ratio", 5.0)],
        "T5 starts with scores of spread 1 and learns others where they help. Divided, it learns no worse.":
            [("divided_ratio", 1.5), ("divided_ratio", 2.0)],
        "A loss falls with wrong code too: the model learns what it can with what it is given.":
            [("falls", 0.0), ("falls", 1.0), ("falls", 2.0)],
        "An error in the code is seldom so loud. Compare the last losses once more.":
            [("twice", 1.0), ("twice", 2.0), ("twice", 3.0)],
    },
)  # fmt: skip
def still_learns(runs):
    """Three errors in the code of HINT. Which of them would you notice from the loss of a training?

    Train the demo for 400 steps with the right code, and with each error (a minute or two each):

        python exercises run columns own 400          the right code
        python exercises run hand-over 1 400          reshaped: W_down is reshaped, not turned
        python exercises run attention 1 400          divided: scores are divided by sqrt(k)
        python exercises run columns 1 400            undivided: generated columns are not divided by sqrt(d)

    The losses stand in runs/exercises/, a folder for each run, in log.jsonl. Compare the first lines and the last.
    """
    first, own = losses(runs, "columns-own-400")
    runs_with_errors = {change: losses(runs, f"{name}-1-400") for change, name in CHANGES.items()}
    ratios = {change: last / own for change, (_, last) in runs_with_errors.items()}
    yield "falls", sum(last < first / 2 for first, last in [(first, own), *runs_with_errors.values()]), 0.0
    yield "twice", sum(ratio >= 2 for ratio in ratios.values()), 0.0
    yield "reshaped_ratio", ratios["reshaped"], 0.25
    yield "divided_ratio", ratios["divided"], 0.25


def losses(runs, name):
    """First and last loss that a run of the demo has logged, each a mean over some steps."""
    path = runs / "exercises" / name / "log.jsonl"
    if not path.is_file():
        exercise_name, which, steps = name.rsplit("-", 2)
        raise NotYet(f"This run is not finished yet: python exercises run {exercise_name} {which} {steps}")
    lines = path.read_text("utf-8").splitlines()
    return json.loads(lines[0])["loss"], json.loads(lines[-1])["loss"]


@still_learns.facts
def _(runs):
    """The commands of the task name near misses by number: they must still be the first."""
    for change, words in {"reshaped": "reshape", "divided": "sqrt(k)", "undivided": "sqrt(d)"}.items():
        sentence, _ = REGISTRY[CHANGES[change]].near_misses[0]
        if words not in sentence:
            raise ValueError(f"near miss 1 of {CHANGES[change]} is not {change}, but: {sentence}")
    ratios = [losses(runs, f"{name}-1-400")[1] / losses(runs, "columns-own-400")[1] for name in CHANGES.values()]
    yield "highest of the three ratios", max(ratios), "1.0 times"
