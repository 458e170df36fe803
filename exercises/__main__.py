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

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from audit import audit_all
from mechanics import HERE, MINE, ROOT, Exercise, all_exercises, edited, judge, load, read_attempt, source, working_file

PATHS = dict(path.split(":") for path in (HERE / "paths.txt").read_text("utf-8").split("\n\n"))


def show(exercises: list[Exercise]) -> None:
    """List exercises: done or not, kind, level, minutes, and the paper's section."""
    done = {path.stem for path in MINE.glob("*.done")}
    for exercise in exercises:
        about = f"{exercise.kind:8} level {exercise.level}  {exercise.minutes:3} min  {exercise.paper}"
        print(f"  [{'x' if exercise.name in done else ' '}] {exercise.name:28} {about}")
    left = [exercise.minutes for exercise in exercises if exercise.name not in done]
    print(f"\n{len(left)} of {len(exercises)} exercises to do, about {sum(left)} minutes: python exercises start NAME")


def start(exercise: Exercise) -> None:
    """Write the file of an exercise; never overwrite one."""
    path = own_file(exercise, begun=False)
    MINE.mkdir(exist_ok=True)
    path.write_text(working_file(exercise), "utf-8")
    print(f"{exercise.task}\n\nYour file: {path}\nThen: python exercises check {exercise.name}")


def own_file(exercise: Exercise, begun: bool = True) -> Path:
    """Path of the student's file of an exercise, which must be there already, or not yet."""
    path = MINE / f"{exercise.name}.py"
    if path.exists() != begun:
        no_file = f"There is no {path} yet: python exercises start {exercise.name}"
        sys.exit(no_file if begun else f"{path} is there already. To begin anew, rename or remove that file.")
    return path


def judged(exercise: Exercise, path: Path, limit: float = 60) -> tuple[bool, str]:
    """Check a file in a process of its own, for some seconds -> whether it passes, and what to tell its author."""
    with tempfile.TemporaryDirectory() as folder:
        verdict = Path(folder, "verdict.json")  # no exit status: that may come from the student's own code
        command = [sys.executable, str(HERE), "judge", exercise.name, str(path.resolve()), str(verdict)]
        try:
            status = subprocess.run(command, timeout=limit, stdin=subprocess.DEVNULL).returncode
        except subprocess.TimeoutExpired:
            return False, f"No result after {limit} seconds. Does a loop in your code never end?"
        if not verdict.is_file():
            return False, f"Your code ended the whole program (status {status}) before the check was over."
        return tuple(json.loads(verdict.read_text("utf-8")))


def judge_here(exercise: Exercise, path: str, verdict: str) -> None:
    """Check a file in this process, and write the verdict."""
    Path(verdict).write_text(json.dumps(judge(exercise, Path(path).read_text("utf-8-sig", "replace"))), "utf-8")


def check(exercise: Exercise) -> None:
    """Check a student's file, print the verdict, and keep a right one in mind."""
    right, text = judged(exercise, own_file(exercise))
    print(text or "All results are as wanted.")
    if not right:
        sys.exit(1)
    (MINE / f"{exercise.name}.done").touch()
    print(f"\n{exercise.name}: right. {exercise.why}")


def solution(exercise: Exercise) -> None:
    """Print the project's own lines of the targets, with file and line."""
    for target, text in edited(exercise).items():
        module = target.split(".")[0]
        line = source(module).partition(text)[0].count("\n") + 1
        print(f"{module}.py, line {line}:\n\n{text}\n")
    print(exercise.why)


def run(exercise: Exercise, which: str = "", steps: str = "400") -> None:
    """Train the demo with the project's own function, the student's, or a near miss in its place."""
    near = {"own": ("the project's own lines", ())}
    near |= {str(number): pair for number, pair in enumerate(exercise.near_misses, start=1) if exercise.targets}
    if which not in ("mine", *near) or not steps.isdecimal():
        misses = "".join(f"{number:>3}  {sentence}\n" for number, (sentence, _) in near.items())
        sys.exit(f"{misses}\npython exercises run {exercise.name} own|mine|NUMBER [STEPS]")
    if which == "mine":
        attempt = read_attempt(exercise, own_file(exercise).read_text("utf-8-sig", "replace"))
    else:
        attempt = edited(exercise, near[which][1])
    train = load(["train"], attempt)["train"]
    train.DEFAULTS["demo"]["steps"] = int(steps)  # the demo has no option for it
    train.main(["demo", "--out", str(ROOT / "runs" / "exercises" / f"{exercise.name}-{which}-{steps}")])


COMMANDS = {"start": start, "check": check, "judge": judge_here, "solution": solution, "run": run}
COMMANDS["hint"], COUNTS = lambda exercise: print(exercise.hint), {"run": (1, 2, 3), "judge": (3,)}  # of words


def main(command: str = "list", *words: str) -> None:
    """Run one command."""
    exercises = all_exercises()
    sys.stdout.reconfigure(errors="replace")  # a console need not know every letter
    if command == "list":
        show(list(exercises.values()))
    elif command == "path" and words and words[0] in PATHS:
        show([exercises[name] for name in PATHS[words[0]].split()])
    elif command == "audit":
        sys.exit(audit_all(words))
    elif words and words[0] in exercises and command in COMMANDS and len(words) in COUNTS.get(command, (1,)):
        COMMANDS[command](exercises[words[0]], *words[1:])
    else:
        sys.exit(f"{__doc__}\nNot understood: {' '.join((command, *words))}. NAME is one of the list.")


if __name__ == "__main__":
    main(*sys.argv[1:])
