"""Ablations: take a part away, train, and say what your own runs show, and what they do not."""

import json
import re

from mechanics import REGISTRY, NotYet, exercise


def table(runs, name):
    """Read a table that experiments/tables.py has written -> its rows, each a dictionary of (mean, standard error)."""
    path = runs / "tables" / f"{name}.md"
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
    hint="Two seeds of a row may lie further apart than two rows. Compare the rows' difference with their errors ±.",
    why="HINT needs both. Which part it needs more, two seeds do not tell; a part of each gap is one of speed.",
    questions={
        "without_fusion": "Points of exact match on unseen compositions that are lost without fusion?",
        "without_modules": "Points of exact match on unseen compositions that are lost without modules?",
        "needed": "What does HINT need to be at its best here: fusion, modules, both, neither?",
        "missed_more": "Which of the two is missed more on unseen compositions: fusion, modules, cannot tell?",
        "gap": "Mean of both test sets: does HINT's lead over no-modules shrink or grow from step 1,000 to the end?",
    },
    near={
        "HINT without fusion still has modules that were written from the instruction: not all is lost.":
            ("without_fusion", 100.0),
        "HINT without modules still reads the instruction's states: not all is lost.": ("without_modules", 100.0),
        "Without fusion the modules alone must carry every word of the instruction. Look at the table once more.":
            ("needed", "modules"),
        "Without modules the encoder reads the input without knowing the task. Look at the table once more.":
            ("needed", "fusion"),
        "Both rows are lower than that of HINT.": ("needed", "neither"),
        "The rows differ by less than their errors allow. With two seeds, ask for four standard errors and more.":
            [("missed_more", "fusion"), ("missed_more", "modules")],
        "The row without modules catches up late. Compare `at step 1,000` with the mean of the two test sets.":
            ("gap", "grow"),
    },
)  # fmt: skip
def fusion_or_modules(runs):
    """HINT gives an instruction to T5 in two ways: as generated modules, and as states for the decoder (fusion).

    Train it without one, and without the other: python experiments/tables.py architecture. The machine needs 10 to 20
    minutes on two cores, so start it before a break. The table, runs/tables/architecture.md, has five rows, two seeds
    each; you need `hint`, `no-fusion` and `no-modules`. "At step" is exact match on both test sets together.
    """
    rows, score = table(runs, "architecture"), "unseen compositions"
    full, lost = rows["hint"], {}
    for name in ("fusion", "modules"):
        lost[name] = full[score][0] - rows[f"no-{name}"][score][0]
        yield f"without_{name}", lost[name], 2.0
    named = [name for name in lost if lost[name] > 5]
    yield "needed", "both" if len(named) == 2 else (*named, "neither")[0], None
    error = sum(rows[f"no-{name}"][score][1] ** 2 for name in lost) ** 0.5
    more = max(lost, key=lost.get) if error and abs(lost["fusion"] - lost["modules"]) > 4.3 * error else "cannot tell"
    yield "missed_more", more, None
    early, *late = (
        full[column][0] - rows["no-modules"][column][0] for column in ("at step 1,000", "unseen arguments", score)
    )
    yield "gap", "shrink" if sum(late) / 2 < early else "grow", None


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
    hint="Compare the last line of each run's log.jsonl with that of the run `own`.",
    why="A falling loss proves little: two of these three errors train as well as the right code. So check code.",
    questions={
        "worst": "Which change ends with the highest loss: reshaped, divided or undivided?",
        "clear": "How many of the three end with a loss of at least 1.15 times that of the right code?",
        "reshaped_ratio": "Last loss with W_down reshaped over that of the right code?",
    },
    near={
        "Reshaped, each embedding still writes a part of W_down of its own: training does not mind.":
            [("worst", "reshaped"), ("reshaped_ratio", 2.0), ("reshaped_ratio", 5.0)],
        "T5 starts with scores of spread 1 and learns others where they help. Divided, it learns as well.":
            ("worst", "divided"),
        "Not every error stops the learning. Compare the last losses once more.": ("clear", 3.0),
        "One of them is clearly worse than the right code. Compare the last losses once more.": ("clear", 0.0),
        "A wrong shape is not a worse start: the model learns with it from the beginning.": ("reshaped_ratio", 10.0),
    },
)  # fmt: skip
def still_learns(runs):
    """Three errors in the code of HINT. Which of them would you notice from the loss of a training?

    Train the demo for 400 steps with the right code, and with each error (a minute or two each):

        python exercises run columns own 400          the right code
        python exercises run hand-over 1 400          reshaped: W_down is reshaped, not turned
        python exercises run attention 1 400          divided: scores are divided by sqrt(k)
        python exercises run columns 1 400            undivided: generated columns are not divided by sqrt(d)

    The losses stand in runs/exercises/, a folder for each run, in log.jsonl. Compare the last ones.
    """
    own = last_loss(runs, "columns-own-400")
    ratios = {change: last_loss(runs, f"{name}-1-400") / own for change, name in CHANGES.items()}
    yield "worst", max(ratios, key=ratios.get), None
    yield "clear", sum(ratio >= 1.15 for ratio in ratios.values()), 0.0
    yield "reshaped_ratio", ratios["reshaped"], 0.15


def last_loss(runs, name):
    """Loss over the last steps of a run of the demo."""
    path = runs / "exercises" / name / "log.jsonl"
    if not path.is_file():
        exercise_name, which, steps = name.rsplit("-", 2)
        raise NotYet(f"This run is not finished yet: python exercises run {exercise_name} {which} {steps}")
    return json.loads(path.read_text("utf-8").splitlines()[-1])["loss"]


@still_learns.facts
def _():
    words = {"reshaped": "reshape", "divided": "sqrt(k)", "undivided": "sqrt(d)"}
    for change, name in CHANGES.items():
        sentences = [sentence for sentence, _ in REGISTRY[name].near_misses]
        number = next(number for number, sentence in enumerate(sentences, start=1) if words[change] in sentence)
        yield f"number of the near miss `{change}`", number, "1"
