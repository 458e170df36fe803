"""The exercises: rebuild functions of HINT, solve puzzles, predict, find bugs, ablate.

    python exercises                          list all exercises: done or not, level, minutes
    python exercises path half-day            list those of a path: half-day, day, two-days
    python exercises start NAME               write exercises/mine/NAME.py, the file that you edit
    python exercises check NAME               check your file
    python exercises hint NAME                one line of help
    python exercises solution NAME            the project's own lines
    python exercises run NAME [own|mine|NUMBER] [STEPS]     train the demo with that function, or with a near miss
    python exercises audit [--mutants] [NAME ...]           for authors: prove that the checks find errors
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from mechanics import (
    HERE, MINE, ROOT, YOUR_TURN, Attempt, Exercise, NotYet, all_exercises, edited, judge, load, locate, own_functions,
    read_attempt, source, span, working_file,
)  # fmt: skip

LIMIT = 60  # seconds for a check
RIGHT = 42  # exit status of a check that passed; 0 may come from the student's own code
PATHS = {
    "half-day": "no-instruction attention prefix adapter hide-padding hand-over fusion another-task-in-each-batch cost",
    "day": "teacher-forcing heads norm unscaled attention hide-padding first-loss cache adapter prefix hand-over"
    " columns columns-not-matrices fusion another-task-in-each-batch cost no-instruction fusion-or-modules",
    "two-days": "teacher-forcing heads norm unscaled attention hide-padding first-loss cache buckets spread loss"
    " hide-the-future drifting-answers rank two-answers adapter prefix hand-over columns columns-not-matrices fusion"
    " another-task-in-each-batch cost no-instruction fusion-or-modules split whole-batch twice-and-never scoring"
    " still-learns hyperformer padded-tokens unfinished kept examples-that-matter",
}


def show(exercises: list[Exercise]) -> None:
    """List exercises: done or not, level, minutes, and the paper's section."""
    done, kind = done_before(), None
    for exercise in exercises:
        if exercise.kind != kind:
            kind = exercise.kind
            print(f"\n{kind}")
        mark = "x" if exercise.name in done else " "
        print(f"  [{mark}] {exercise.name:28} level {exercise.level}  {exercise.minutes:3} min  {exercise.paper}")
    left = [exercise.minutes for exercise in exercises if exercise.name not in done]
    print(f"\n{len(left)} of {len(exercises)} exercises to do, about {sum(left)} minutes: python exercises start NAME")


def done_before() -> list[str]:
    """Names of the exercises that have passed a check."""
    return json.loads((MINE / "done.json").read_text("utf-8")) if (MINE / "done.json").is_file() else []


def own_file(exercise: Exercise) -> Path:
    """Path of the student's file of an exercise."""
    return MINE / f"{exercise.name}.py"


def text_of(exercise: Exercise) -> str:
    """Read the student's file of an exercise; without one, say how to begin."""
    if not own_file(exercise).is_file():
        sys.exit(f"There is no {own_file(exercise)} yet: python exercises start {exercise.name}")
    return own_file(exercise).read_text("utf-8-sig", "replace")


def start(exercise: Exercise) -> None:
    """Write the file of an exercise; never overwrite one."""
    path = own_file(exercise)
    if path.exists():
        sys.exit(f"{path} is there already. To begin anew, rename or remove that file.")
    MINE.mkdir(exist_ok=True)
    path.write_text(working_file(exercise), "utf-8")
    print(f"{exercise.task}\n\nYour file: {path}\nThen: python exercises check {exercise.name}")


def check(exercise: Exercise, path: Path, limit: float = LIMIT) -> tuple[bool, str]:
    """Check a file in a process of its own -> whether it passes, and what to tell its author."""
    with tempfile.TemporaryDirectory() as folder:
        verdict = Path(folder, "verdict.json")
        command = [sys.executable, str(HERE), "judge", exercise.name, str(path.resolve()), str(verdict)]
        silent = {name: subprocess.DEVNULL for name in ("stdin", "stdout", "stderr")}
        try:
            status = subprocess.run(command, timeout=limit, **silent).returncode
        except subprocess.TimeoutExpired:
            return False, f"No result after {limit:g} seconds. Does a loop in your code never end?"
        if not verdict.is_file():
            return False, f"Your code ended the whole program (status {status}) before the check was over."
        return status == RIGHT, "\n".join(json.loads(verdict.read_text("utf-8")))


def judge_and_exit(exercise: Exercise, path: str, verdict: str) -> None:
    """Check a file in this process: write the sentences, and leave the verdict as exit status."""
    right, lines = judge(exercise, Path(path).read_text("utf-8-sig", "replace"))
    Path(verdict).write_text(json.dumps(lines), "utf-8")
    os._exit(RIGHT if right else 1)  # nothing that the student's code has registered runs at the end


def show_check(exercise: Exercise) -> None:
    """Check a student's file, print the verdict, and keep a right one in mind."""
    text_of(exercise)
    right, text = check(exercise, own_file(exercise))
    print(text or "All results are as wanted.")
    if not right:
        sys.exit(1)
    (MINE / "done.json").write_text(json.dumps(sorted({*done_before(), exercise.name})), "utf-8")
    print(f"\n{exercise.name}: right. {exercise.why}")


def solution(exercise: Exercise) -> None:
    """Print the project's own lines of the targets, with file and line."""
    for target, text in own_functions(exercise).items():
        module, _, path = target.partition(".")
        print(f"{module}.py, line {span(locate(source(module), path)).start + 1}:\n\n{text}\n")
    print(exercise.why)


def run(exercise: Exercise, which: str = "", steps: str = "400") -> None:
    """Train the demo with the project's own function, the student's, or a near miss in its place."""
    near = {str(number): pair for number, pair in enumerate(exercise.near_misses, start=1) if exercise.targets}
    if which in near:
        attempt = Attempt(edited(exercise, near[which][1]))
    elif which == "mine":
        attempt = read_attempt(exercise, text_of(exercise))
    elif which == "own":
        attempt = Attempt({})
    else:
        sys.exit("\n".join(f"{number:>3}  {sentence}" for number, (sentence, _) in near.items())
                 + f"\n\npython exercises run {exercise.name} own|mine|NUMBER [STEPS]")  # fmt: skip
    out = ROOT / "runs" / "exercises" / f"{exercise.name}-{which}-{steps}"
    if out.exists() or any(YOUR_TURN in text for text in attempt.functions.values()):
        sys.exit(f"{out} is there already." if out.exists() else f"{own_file(exercise)} still has to be written.")
    train = load(["train"], attempt)["train"]
    train.DEFAULTS["demo"]["steps"] = int(steps)  # the demo has no option for it
    train.main(["demo", "--out", str(out)])


def hint(exercise: Exercise) -> None:
    """Print the hint."""
    print(exercise.hint)


COMMANDS = {"start": start, "check": show_check, "hint": hint, "solution": solution, "run": run}
COMMANDS["judge"] = judge_and_exit  # of the process that `check` starts


def main(command: str = "list", *words: str) -> None:
    """Run one command."""
    exercises = all_exercises()
    sys.stdout.reconfigure(errors="replace")  # a console need not know every letter
    if command == "list":
        show(list(exercises.values()))
    elif command == "path" and words and words[0] in PATHS:
        show([exercises[name] for name in PATHS[words[0]].split() if name in exercises])
    elif command == "audit":
        from audit import audit_all

        chosen = [exercises[word] for word in words if word in exercises]
        sys.exit(audit_all(chosen or list(exercises.values()), "--mutants" in words))
    elif command in COMMANDS and words and words[0] in exercises:
        try:
            COMMANDS[command](exercises[words[0]], *words[1:])
        except NotYet as error:
            sys.exit(str(error))
    else:
        sys.exit(__doc__ if command not in COMMANDS else f"{command}: name an exercise of the list: python exercises")


if __name__ == "__main__":
    main(*sys.argv[1:])
