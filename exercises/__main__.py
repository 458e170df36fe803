"""The exercises: rebuild functions of HINT, solve puzzles, predict, find bugs.

    python exercises                          list all exercises: kind, level, minutes, done or not
    python exercises path half-day            list those of a path: half-day, day, two-days
    python exercises start NAME               write exercises/mine/NAME.py, for you to edit
    python exercises check NAME               check your file
    python exercises hint NAME                one line
    python exercises solution NAME            the project's own lines
    python exercises run NAME [own|mine|NUMBER] [STEPS]     train the demo with that function, or with a near miss
    python exercises audit [--mutants] [NAME ...]           for authors: prove that the checks find errors
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from mechanics import HERE, MINE, REGISTRY, ROOT, Attempt, Exercise, Wrong
from mechanics import all_exercises, edited, judge, load, locate, own_functions, read_attempt, source, span, working_file

LIMIT = 60  # seconds for a check
RIGHT = 42  # exit status of a check that passed; 0 may come from the student's own code
PATHS = {
    "half-day": "no-instruction attention prefix adapter hide-padding hand-over fusion another-task-in-each-batch cost",
    "day": "teacher-forcing heads norm unscaled attention hide-padding first-loss cache adapter prefix hand-over columns "
    "columns-not-matrices fusion another-task-in-each-batch cost no-instruction fusion-or-modules",
    "two-days": "teacher-forcing heads norm unscaled attention hide-padding first-loss cache buckets spread loss "
    "back-to-rows drifting-answers rank two-answers adapter prefix hand-over columns columns-not-matrices fusion "
    "another-task-in-each-batch cost no-instruction fusion-or-modules split whole-batch twice-and-never scoring "
    "still-learns hyperformer padded-tokens unfinished kept examples-that-matter",
}


def listing(exercises: list[Exercise]) -> None:
    """List exercises: done or not, kind, level, minutes, and the paper's section."""
    done, kind = done_before(), None
    for exercise in exercises:
        if exercise.kind != kind:
            kind = exercise.kind
            print(f"\n{kind}")
        mark = "x" if exercise.name in done else " "
        print(f"  [{mark}] {exercise.name:28} level {exercise.level}  {exercise.minutes:3} min  {exercise.paper}")
    left = sum(exercise.minutes for exercise in exercises if exercise.name not in done)
    print(f"\n{len(exercises)} exercises, about {left} minutes to go. Begin one with: python exercises start NAME")


def done_before() -> list[str]:
    """Names of the exercises that have passed a check."""
    return json.loads((MINE / "done.json").read_text("utf-8")) if (MINE / "done.json").is_file() else []


def start(exercise: Exercise) -> None:
    """Write the working file of an exercise; never overwrite one."""
    path = MINE / f"{exercise.name}.py"
    if path.exists():
        sys.exit(f"{path}: is there already; rename or remove that file to begin anew.")
    MINE.mkdir(exist_ok=True)
    path.write_text(working_file(exercise), "utf-8")
    print(f"{exercise.task}\n\nYour file: {path}\nThen: python exercises check {exercise.name}")


def check(exercise: Exercise, path: Path, limit: float = LIMIT) -> tuple[bool, str]:
    """Check a file in a process of its own -> whether it passes, and what to tell its author."""
    with tempfile.TemporaryDirectory() as folder:
        verdict = Path(folder, "verdict.json")
        command = [sys.executable, str(HERE), "judge", exercise.name, str(path.resolve()), str(verdict)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8"}
        silent = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            status = subprocess.run(command, timeout=limit, env=environment, **silent).returncode
        except subprocess.TimeoutExpired:
            return False, f"No result after {limit:g} seconds. Does a loop in your code never end?"
        if not verdict.is_file():
            return False, f"Your code ended the whole program before its check was over (status {status})."
        return status == RIGHT, "\n".join(json.loads(verdict.read_text("utf-8")))


def judge_and_exit(name: str, path: str, verdict: str) -> None:
    """Check a file in this process: write the sentences, and leave the verdict as exit status."""
    right, lines = judge(REGISTRY[name], Path(path).read_text("utf-8-sig", "replace"))
    Path(verdict).write_text(json.dumps(lines), "utf-8")
    os._exit(RIGHT if right else 1)  # nothing that the student's code has registered runs at the end


def show_check(exercise: Exercise) -> int:
    """Check a student's file, and print the verdict."""
    path = MINE / f"{exercise.name}.py"
    if not path.is_file():
        sys.exit(f"{path}: is not there yet; begin with: python exercises start {exercise.name}")
    right, text = check(exercise, path)
    print(text)
    if right:
        done = [name for name in done_before() if name != exercise.name]
        (MINE / "done.json").write_text(json.dumps([*done, exercise.name]), "utf-8")
        print(f"{exercise.name}: right. {exercise.why}")
    return 0 if right else 1


def solution(exercise: Exercise) -> None:
    """Print the project's own lines of the targets, with file and line."""
    for target, text in own_functions(exercise).items():
        module, _, path = target.partition(".")
        print(f"{module}.py, line {span(locate(source(module), path)).start + 1}:\n\n{text}\n")
    print(exercise.why)


def run(exercise: Exercise, which: str | None, steps: int) -> None:
    """Train the demo with the project's own function, the student's, or a near miss in its place."""
    near = exercise.near_misses
    if which is None:
        print("\n".join(f"{number:3} {sentence}" for number, (sentence, _) in enumerate(near, start=1)))
        print(f"\npython exercises run {exercise.name} own|mine|NUMBER [STEPS]")
        return
    if which == "mine":
        attempt = read_attempt(exercise, (MINE / f"{exercise.name}.py").read_text("utf-8-sig"))
    elif which == "own":
        attempt = Attempt({})
    elif which.isdigit() and 1 <= int(which) <= len(near):
        attempt = Attempt(edited(exercise, near[int(which) - 1][1]))
    else:
        sys.exit(f"run: {which!r} is none of own, mine and 1 to {len(near)}.")
    train = load(["train"], attempt)["train"]
    train.DEFAULTS["demo"]["steps"] = steps
    train.main(["demo", "--out", str(ROOT / "runs" / "exercises" / f"{exercise.name}-{which}-{steps}")])


def main() -> int:
    """Run one command."""
    parser = argparse.ArgumentParser("python exercises", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = ("list", "start", "check", "hint", "solution", "run", "path", "audit", "judge")
    parser.add_argument("command", nargs="?", default="list", choices=commands, metavar="COMMAND")
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--mutants", action="store_true", help="audit: also plant small changes made by a machine")
    given = parser.parse_args()
    exercises, words = all_exercises(), given.names
    if given.command == "list":
        listing(list(exercises.values()))
    elif given.command == "path":
        if not words or words[0] not in PATHS:
            sys.exit(f"path: name one of {', '.join(PATHS)}.")
        listing([exercises[name] for name in PATHS[words[0]].split() if name in exercises])
    elif given.command == "audit":
        from audit import audit_all

        return audit_all([exercises[name] for name in words or exercises], given.mutants)
    elif not words or words[0] not in exercises:
        sys.exit(f"{given.command}: name an exercise of the list: python exercises")
    elif given.command == "judge":
        judge_and_exit(*words)
    elif given.command == "run":
        run(exercises[words[0]], *(words[1:2] or [None]), int((words[2:3] or [400])[0]))
    elif given.command == "hint":
        print(exercises[words[0]].hint)
    else:
        return {"start": start, "check": show_check, "solution": solution}[given.command](exercises[words[0]]) or 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
