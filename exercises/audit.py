"""The proof that the checks find errors: near misses, numbers in the texts, and small changes made by a machine."""

from __future__ import annotations

import ast
import copy
import faulthandler
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterator

from mechanics import (
    HERE, HELPERS, Exercise, NotYet, Outcome, agreement, all_exercises, edited, judge, judge_answer, observe, put_back,
    read_attempt, stream, working_file,
)  # fmt: skip

RECORDED = HERE / "recorded"  # results of runs, for the audit of ablations
MUTANTS = 30  # for each target


@dataclass
class Audit:
    """What the audit of one exercise found."""

    problems: list[str] = field(default_factory=list)
    caught: int = 0
    told_apart: int = 0
    seconds: float = 0.0


def audit(exercise: Exercise) -> Audit:
    """Prove one exercise: right answers pass, every near miss is caught by a value and gets its own sentence."""
    result, began = Audit(), time.perf_counter()
    if len(exercise.near_misses) < 3:
        result.problems.append("fewer than three near misses")
    if exercise.kind in ("rebuild", "puzzle") and not exercise.also:
        result.problems.append("no other right way (also)")
    if not all((exercise.task, exercise.hint, exercise.why, exercise.paper)):
        result.problems.append("task, hint, why or paper is missing")
    if judge(exercise, working_file(exercise))[0]:
        result.problems.append("the untouched file passes")
    try:
        (audit_answers if exercise.questions else audit_functions)(exercise, result)
        result.problems += stale_numbers(exercise)
    except (Exception, NotYet) as error:  # one exercise that cannot be audited leaves the others as they are
        result.problems.append(f"{type(error).__name__}: {error}")
    result.seconds = time.perf_counter() - began
    return result


def audit_functions(exercise: Exercise, result: Audit) -> None:
    """Try the project's own functions, the other right ways, and every near miss."""
    ways = [("the project's own functions", edited(exercise))]
    ways += [(f"right way {number}", edited(exercise, edit)) for number, edit in enumerate(exercise.also, start=1)]
    for name, functions in ways:
        text = working_file(exercise)
        for target, function in functions.items():
            text = put_back(text, target.partition(".")[2], function)
        attempt = read_attempt(exercise, text)
        if attempt != {**functions, HELPERS: ""}:
            result.problems.append(f"{name}: not the same text after the working file")
        outcome = observe(exercise, attempt)
        if not outcome.passed:
            result.problems.append(f"{name}: refused ({outcome.error!r:.200} {outcome.cases[outcome.right:]!r:.200})")
    outcomes = []
    for sentence, edit in exercise.near_misses:
        try:
            outcomes.append((sentence, observe(exercise, edited(exercise, edit))))
        except ValueError as error:
            result.problems.append(str(error))
    for sentence, outcome in outcomes:
        others = {other for other, seen in outcomes if other != sentence and alike(outcome, seen)}
        caught = outcome.right < len(outcome.cases)  # by a value, not only by an exception
        if not caught:
            result.problems.append(f"not caught by a value ({outcome.error!r:.150}): {sentence}")
        if others:
            result.problems.append(f"not told apart: {sentence} AND {' AND '.join(others)}")
        result.caught += caught
        result.told_apart += caught and not others


def alike(first: Outcome, second: Outcome) -> bool:
    """Tell whether two attempts behaved alike, in every case and in how they ended."""
    ends = {(len(outcome.cases), type(outcome.error)) for outcome in (first, second)}
    return len(ends) == 1 and agreement(first.cases, second.cases) == len(first.cases)


def audit_answers(exercise: Exercise, result: Audit) -> None:
    """Hold the recorded truths against their tolerances, and every wrong answer against its sentence."""
    answers = "\n".join(f"{name} = 'no answer'" for name in exercise.questions)
    outcome = observe(exercise, {HELPERS: answers}, RECORDED)
    if outcome.error:
        raise outcome.error
    truths = {name: (truth, margin) for name, _, truth, margin in outcome.cases}
    if truths.keys() != exercise.questions.keys():
        result.problems.append(f"questions {list(exercise.questions)}, but truths of {list(truths)}")
    for name, (truth, margin) in truths.items():
        if not judge_answer(exercise, name, truth, truth, margin)[0]:
            result.problems.append(f"the truth of {name} is refused")
    for sentence, (name, value) in exercise.near_misses:
        right, said = judge_answer(exercise, name, value, *truths[name])
        if right:
            result.problems.append(f"{name} = {value!r} passes, near {truths[name]}: {sentence}")
        elif not said.endswith(sentence):
            result.problems.append(f"not told apart: {name} = {value!r}: {sentence}")
        result.caught += not right
        result.told_apart += not right and said.endswith(sentence)


def stale_numbers(exercise: Exercise) -> list[str]:
    """Recompute the numbers of the texts -> those that are not as stated."""
    if exercise.numbers is None:
        return []
    texts = " ".join([exercise.task, exercise.hint, exercise.why, *exercise.near, *exercise.questions.values()])
    problems = []
    for what, value, stated in stream(exercise.numbers, {}, RECORDED):
        digits = re.search(r"-?\d[\d,]*(\.\d+)?", stated).group().replace(",", "")
        unit = 10.0 ** -len(digits.partition(".")[2])
        if stated not in texts:
            problems.append(f"{what}: {stated!r} stands in no text")
        if not abs(float(value) - float(digits)) <= unit:
            problems.append(f"{what}: stated {stated!r}, measured {float(value):.6g}")
    return problems


def audit_all(words: tuple[str, ...]) -> int:
    """Audit the exercises that are named, or all, print what was found, and return the number of problems."""
    registry, results = all_exercises(), []
    exercises = [registry[word] for word in words if word in registry] or list(registry.values())
    for exercise in exercises:
        result = audit(exercise)
        caught = f"{result.caught}/{len(exercise.near_misses)} caught"
        print(f"{exercise.name:28} {caught}, {result.told_apart} told apart, {result.seconds:.1f} s")
        print("".join(f"    {problem}\n" for problem in result.problems), end="", flush=True)
        results.append(result)
    near = sum(len(exercise.near_misses) for exercise in exercises)
    caught, told = sum(result.caught for result in results), sum(result.told_apart for result in results)
    print(f"{len(exercises)} exercises, {near} near misses, {caught} caught, {told} told apart, "
          f"{sum(len(exercise.also) for exercise in exercises)} other right ways, "
          f"{sum(result.seconds for result in results):.0f} s")  # fmt: skip
    if "--mutants" in words:
        audit_mutants([exercise for exercise in exercises if exercise.targets])
    return sum(len(result.problems) for result in results)


# ------------------------------------------------------------------------------------------------- mutants

OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.MatMult: ast.Mult, ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.Lt: ast.LtE,
    ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.And: ast.Or,
    ast.Or: ast.And,
}  # fmt: skip
SYMMETRIC = ("max", "min", "transpose", "promote_types")  # their first two arguments can change places


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield small changes of one node of a function: operators, constants, arguments, dropped lines."""
    for name in ("op", "ops"):
        operator = getattr(node, name, None)
        operator = operator[0] if isinstance(operator, list) else operator
        if type(operator) in OPERATORS:
            other = OPERATORS[type(operator)]()
            yield copy_with(node, **{name: [other] if name == "ops" else other})
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield ast.Constant(node.value + 1)
        yield ast.Constant(node.value - 1)
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.IfExp):
        yield from (node.body, node.orelse)
    elif isinstance(node, ast.Call):
        called = getattr(node.func, "attr", None) or getattr(node.func, "id", "")
        if len(node.args) > 1 and called not in SYMMETRIC and not isinstance(node.args[1], ast.Starred):
            yield copy_with(node, args=[node.args[1], node.args[0], *node.args[2:]])
        for number, keyword in enumerate(node.keywords):
            if keyword.arg != "device":  # there is one device
                yield copy_with(node, keywords=node.keywords[:number] + node.keywords[number + 1 :])
        if isinstance(node.func, ast.Attribute) and called != "to":
            yield node.func.value  # x.f(y) -> x
    elif isinstance(node, (ast.Assign, ast.AugAssign, ast.Expr, ast.For, ast.If)):
        yield ast.Pass()


def copy_with(node: ast.AST, **fields) -> ast.AST:
    """Copy a node with some fields changed."""
    node = copy.deepcopy(node)
    for name, value in fields.items():
        setattr(node, name, value)
    return node


class Replace(ast.NodeTransformer):
    """Replace one node of a tree."""

    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


def mutants(exercise: Exercise) -> list[tuple[str, dict[str, str]]]:
    """Make up to 30 mutants of each target -> the line that was changed, and the functions."""
    made = []
    for target, text in edited(exercise).items():
        plain = ast.unparse(ast.parse(textwrap.dedent(text)))
        margin = " " * (len(text) - len(text.lstrip()))
        number, found = 0, {}
        while True:
            tree = ast.parse(plain)
            function = tree.body[0]
            body = function.body[ast.get_docstring(function) is not None :]
            pairs = [(node, new) for line in body for node in ast.walk(line) for new in changes(node)]
            if number == len(pairs):
                break
            mutant = ast.unparse(ast.fix_missing_locations(Replace(*pairs[number]).visit(tree)))
            lines = [pair for pair in zip(plain.split("\n"), mutant.split("\n")) if pair[0] != pair[1]]
            if mutant != plain:
                found[mutant] = f"{target}: {lines[0][0].strip()}  ->  {lines[0][1].strip()}" if lines else target
            number += 1
        step = max(1, len(found) / MUTANTS)
        chosen = [list(found)[int(place * step)] for place in range(min(MUTANTS, len(found)))]
        own = edited(exercise)
        made += [(found[mutant], {**own, target: textwrap.indent(mutant, margin)}) for mutant in chosen]
    return made


def try_mutants(exercise: Exercise, first: int, report: Path) -> None:
    """Try the mutants from a number on; each writes a line. One that does not end takes the process with it."""
    with open(report, "a", encoding="utf-8") as file:
        for about, functions in mutants(exercise)[first:]:
            faulthandler.dump_traceback_later(20, exit=True)
            alive = observe(exercise, functions).passed
            faulthandler.cancel_dump_traceback_later()
            file.write(("alive  " + about if alive else "killed") + "\n")
            file.flush()
    os._exit(0)


def audit_mutants(exercises: list[Exercise]) -> None:
    """Try all mutants, each exercise in processes of its own; print the survivors."""
    killed = alive = 0
    for exercise in exercises:
        with tempfile.TemporaryDirectory() as folder:
            report, total = Path(folder, "report"), len(mutants(exercise))
            report.touch()
            while len(lines := report.read_text("utf-8").splitlines()) < total:
                program = "import sys; sys.path.insert(0, sys.argv[1]); import audit, mechanics, pathlib; "
                program += "exercise = mechanics.all_exercises()[sys.argv[2]]; "
                program += "audit.try_mutants(exercise, int(sys.argv[3]), pathlib.Path(sys.argv[4]))"
                words = [str(HERE), exercise.name, str(len(lines)), str(report)]
                ended = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
                if "Traceback" in ended.stderr:
                    sys.exit(ended.stderr)
                if len(report.read_text("utf-8").splitlines()) < total:
                    with open(report, "a", encoding="utf-8") as file:
                        file.write("killed (it did not end)\n")
        survivors = [line for line in lines if line.startswith("alive")]
        killed, alive = killed + total - len(survivors), alive + len(survivors)
        print(f"{exercise.name:28} {total - len(survivors)}/{total} mutants killed")
        print("".join(f"    {line}\n" for line in survivors), end="", flush=True)
    print(f"{killed + alive} mutants, {killed} killed, {alive} alive")
