"""Ablations: take a part away, train, and say what your own runs show, and what they do not."""

import json
import re

from mechanics import REGISTRY, ROOT, NotYet, exercise


def table(runs, name):
    """Read a table that experiments/tables.py has written -> its rows, each a dictionary of (mean, standard error)."""
    recorded = runs.name == "recorded"  # the audit reads the results that the project shows
    path = (ROOT / "experiments" / "results" if recorded else runs / "tables") / f"{name}.md"
    if not path.is_file():
        raise NotYet(f"There is no finished table yet. Make it with: python experiments/tables.py {name}")
    lines = [line.strip("| ").split(" | ") for line in path.read_text("utf-8").splitlines() if line.startswith("| ")]
    names, *rows = [line for line in lines if "---" not in line[0]]
    return {row[0]: dict(zip(names[1:], map(mean_and_error, row[1:]))) for row in rows}


def mean_and_error(cell):
    """Read `93.9 ± 6.0`, or a number without its error."""
    numbers = [float(number) for number in re.findall(r"[\d.]+", cell.replace(",", ""))]
    return (*numbers, 0.0)[:2]


@exercise(
    "ablate", [], level=2, minutes=40, paper="HINT, section 6 and Table 6",
    hint="± is the standard error of the mean. The two seeds of a row lie 2 x ± apart.",
    why="Both parts help on average. But two seeds of a row may lie further apart than two rows, so two seeds do not "
        "tell which part helps more.",
    questions={
        "without_fusion": "Points of exact match on unseen compositions that are lost without fusion?",
        "without_modules": "Points of exact match on unseen compositions that are lost without modules?",
        "helps": "What raises the mean of the two seeds: fusion, modules, both or neither?",
        "seeds": "Of these three rows, how far apart are the two seeds of the row whose seeds differ most, in points?",
        "more": "Which of the two is lost more: fusion, modules, or cannot tell?",
    },
    near={
        "HINT without fusion still has modules that were written from the instruction: not all is lost.":
            ("without_fusion", 100.0),
        "HINT without modules still reads the instruction's states: not all is lost.": ("without_modules", 100.0),
        "The row without fusion is lower too.": ("helps", "modules"),
        "The row without modules is lower too.": ("helps", "fusion"),
        "Both rows are lower than that of HINT.": ("helps", "neither"),
        "Seeds differ in first weights and in the order of examples, and early luck grows: look at the errors.":
            [("seeds", 0.0), ("seeds", 1.0)],
        "The rows differ by less than their seeds do. From two seeds, ask for more than four standard errors.":
            [("more", "fusion"), ("more", "modules")],
    },
)  # fmt: skip
def fusion_or_modules(runs):
    """HINT gives an instruction to T5 in two ways: as generated modules, and as states for the decoder (fusion).

    Train it without one, and without the other: python experiments/tables.py architecture. The machine needs 10 to 20
    minutes on two cores, so start it before a break. The table, runs/tables/architecture.md, has five rows of two seeds
    each. You need `hint`, `no-fusion` and `no-modules`. Scores are means ± standard errors.
    """
    rows, score = table(runs, "architecture"), "unseen compositions"
    full = rows["hint"][score]
    less = {name: rows[f"no-{name}"][score] for name in ("fusion", "modules")}
    lost = {name: full[0] - mean for name, (mean, _) in less.items()}
    helping = [name for name in lost if lost[name] > 0]
    error = sum(error**2 for _, error in less.values()) ** 0.5  # of the difference of the two rows
    can_tell = abs(lost["fusion"] - lost["modules"]) > 4.3 * error > 0  # 95 % of the t distribution for two seeds each
    yield "without_fusion", lost["fusion"], 2.0
    yield "without_modules", lost["modules"], 2.0
    yield "helps", "both" if len(helping) == 2 else (*helping, "neither")[0], None
    yield "seeds", max(2 * error for _, error in (full, *less.values())), 2.0
    yield "more", max(lost, key=lost.get) if can_tell else "cannot tell", None


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
        "This is about what HINT pays. Tk-Instruct pays with every input.": ("price_tk", 1.17),
    },
)  # fmt: skip
def examples_that_matter(runs):
    """In a vague world, a definition says "followed by what" where it should name a word. Examples show the word.

    Train HINT and Tk-Instruct with and without two examples: python experiments/tables.py vague. The machine needs 10
    to 20 minutes on two cores. The table is runs/tables/vague.md. Every task of the unseen arguments has such a word.
    """
    rows, score, flops = table(runs, "vague"), "unseen arguments", "GFLOP for 100 inputs"
    yield "untold", rows["hint-vague"][score][0], 10.0
    yield "gain", rows["hint-vague-2"][score][0] - rows["hint-vague"][score][0], 10.0
    yield "price_hint", rows["hint-vague-2"][flops][0] / rows["hint-vague"][flops][0], 0.1
    yield "price_tk", rows["tk-instruct-vague-2"][flops][0] / rows["tk-instruct-vague"][flops][0], 0.3


CHANGES = {"reshaped": "hand-over", "divided": "attention", "undivided": "columns"}  # near miss 1 of an exercise each


@exercise(
    "ablate", [], level=2, minutes=40, paper="HINT, section 3.1.1; Raffel et al., section 2.1",
    hint="Compare the first and the last line of each run's log.jsonl, then the last lines of all runs.",
    why="A falling loss proves little: 2 of these 3 errors train as well as the right code. So check code.",
    questions={
        "falls": "In how many of the four runs is the last loss less than half of the first that is logged?",
        "twice": "How many of the three errors end with at least twice the loss of the right code?",
        "worst": "Which error ends with the highest loss: reshaped, divided or undivided?",
        "reshaped_ratio": "Last loss with W_down reshaped over that of the right code?",
    },
    near={
        "Reshaped, each embedding still writes a part of W_down of its own: training does not mind.":
            [("worst", "reshaped"), ("reshaped_ratio", 2.0), ("reshaped_ratio", 5.0)],
        "T5 starts with scores of spread 1 and learns others where they help. Divided, it learns as well.":
            ("worst", "divided"),
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
    yield "worst", max(ratios, key=ratios.get), None
    yield "reshaped_ratio", ratios["reshaped"], 0.15


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
    yield "errors that train as well", sum(ratio < 1.1 for ratio in ratios), "2 of these 3"
