"""Mechanics of the exercises: cut functions from the source, put a student's in their place, compare values.

An exercise is one decorated generator function in one of five files. `ADDING.md` says how to write one.
"""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import itertools
import linecache
import random
import re
import sys
import textwrap
import traceback
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Callable, Iterator, NamedTuple, Sequence

import torch

HERE = Path(__file__).resolve().parent
ROOT, MINE = HERE.parent, HERE / "mine"
MODULES = ("t5", "data", "hypernet", "hint", "train")  # none imports another to its right
REGISTRY: dict[str, Exercise] = {}
HELPERS = "helpers"  # key of an attempt: the text that is appended to the modules
BLANK = 'raise NotImplementedError("your turn")'
STILL_THERE = "The bug is still there: your functions do what the functions did when you got them."
parse = lru_cache(maxsize=64)(ast.parse)  # the trees are only read
sys.path.insert(0, str(ROOT))  # these five modules, whatever else is installed


class NotYet(SystemExit):
    """A file cannot be judged yet; the message says what to do first."""


@dataclass(eq=False)
class Exercise:
    """One exercise; `ADDING.md` says what each field holds."""

    kind: str
    targets: list[str]
    level: int
    minutes: int
    paper: str
    hint: str
    why: str
    near: dict[str, tuple | list[tuple]]
    also: Sequence[tuple] = ()
    calls: Sequence[str] = ()
    bug: tuple = ()
    questions: dict[str, str] = field(default_factory=dict)
    numbers: Callable = None

    def __call__(self, cases: Callable) -> Exercise:
        self.cases, self.name, self.task = cases, cases.__name__.replace("_", "-"), inspect.getdoc(cases)
        if self.calls:
            self.task += f"\n\nUse assignments, a return, and these calls:\n{textwrap.fill(', '.join(self.calls), 118)}"
        REGISTRY[self.name] = self
        return self

    def facts(self, numbers: Callable) -> None:
        """Register the generator that recomputes the numbers of the texts."""
        self.numbers = numbers

    @property
    def near_misses(self) -> list[tuple[str, tuple]]:
        """Every near miss with its sentence; `run` numbers them from 1."""
        near = {STILL_THERE: self.bug, **self.near} if self.bug else self.near
        lists = [(text, edits if isinstance(edits, list) else [edits]) for text, edits in near.items()]
        return [(text, edit) for text, edits in lists for edit in edits]


exercise = Exercise  # read as a decorator: @exercise("rebuild", ...)


def all_exercises() -> dict[str, Exercise]:
    """Import the files of exercises -> every exercise by name."""
    for name in ("rebuild", "puzzles", "predict", "bugs", "ablate"):
        importlib.import_module(name)
    return REGISTRY


def source(module: str) -> str:
    """Read the text of one of the five modules."""
    return (ROOT / f"{module}.py").read_text("utf-8")


def locate(text: str, path: str) -> tuple[ast.FunctionDef, slice]:
    """Find a function or class by its dotted path -> its node, and its lines with decorators. Raises NotYet."""
    node = parse(text)
    for name in path.split("."):
        if not (found := [child for child in node.body if getattr(child, "name", None) == name]):
            raise NotYet(f"The function {path} is missing in your file.")
        node = found[-1]  # as in Python, the last definition counts
    return node, slice(min([node.lineno, *(item.lineno for item in node.decorator_list)]) - 1, node.end_lineno)


def cut(text: str, path: str, body: str | None = None) -> str:
    """Cut a function from a module's text, indentation included; `body`: in place of what follows its docstring."""
    lines, (node, place) = text.split("\n"), locate(text, path)
    if body is None:
        return "\n".join(lines[place])
    last = node.returns if ast.get_docstring(node) is None else node.body[0]
    body = textwrap.indent(textwrap.dedent(body).strip("\n"), " " * (node.col_offset + 4))
    return "\n".join([*lines[place.start : last.end_lineno], body])


def put_back(text: str, path: str, function: str) -> str:
    """Put another text in the place of a function."""
    lines = text.split("\n")
    lines[locate(text, path)[1]] = function.split("\n")
    return "\n".join(lines)


def own_function(target: str, body: str | None = None) -> str:
    """Cut a target from the project's text; `body`: in place of its own."""
    module, _, path = target.partition(".")
    return cut(source(module), path, body)


def edited(exercise: Exercise, edit: Sequence[str] = ()) -> dict[str, str]:
    """Cut the targets and apply a near miss, a bug or another right way. Raises ValueError if the edit is stale."""
    functions = {target: own_function(target) for target in exercise.targets}
    for old, new in zip(edit[::2], edit[1::2], strict=True):
        if old in functions:
            functions[old] = own_function(old, new)
            continue
        places = [target for target, text in functions.items() for _ in range(text.count(old))]
        if len(places) != 1:
            raise ValueError(f"stale edit: {old!r} occurs {len(places)} times in {', '.join(functions)}")
        functions[places[0]] = functions[places[0]].replace(old, new)
    return functions


def working_file(exercise: Exercise) -> str:
    """Write the file that a student edits: the task, its questions, and the targets as blanks or with the bug."""
    functions = edited(exercise, exercise.bug or [text for target in exercise.targets for text in (target, BLANK)])
    about = f"{exercise.kind}, level {exercise.level}, about {exercise.minutes} minutes"
    text = f'"""{exercise.name} ({about}). {exercise.paper}.\n\n{exercise.task}\n\n'
    text += f'python exercises check {exercise.name}\npython exercises hint {exercise.name}\n"""\n\n'
    for module in dict.fromkeys(target.split(".")[0] for target in functions):
        text += f"from {module} import *  # for your editor; the check puts your functions into the project's modules\n"
    for question, words in exercise.questions.items():
        text += f"{textwrap.indent(textwrap.fill(words, 117), '# ')}\n{question} = None\n\n"
    for target, function in functions.items():
        owner = target.rpartition(".")[0]
        if owner not in MODULES and f"\nclass {owner.partition('.')[2]}" not in text:  # its docstring and fields
            text += "\n\n" + re.split(r"\n    (?=@|def )", own_function(owner))[0].rstrip() + "\n"
        text += f"\n{function}\n" if owner not in MODULES else f"\n\n{function}\n"
    return text


def read_attempt(exercise: Exercise, text: str) -> dict[str, str]:
    """Read a student's file: the targets, and the other lines that are needed. Raises NotYet."""
    try:
        tree = parse(text, "your file")
    except (SyntaxError, ValueError) as error:
        raise NotYet(f"Python cannot read your file: {error}\n  {(getattr(error, 'text', '') or '').strip()}") from None
    paths = {target: target.partition(".")[2] for target in exercise.targets}
    attempt = {target: cut(text, path) for target, path in paths.items()}
    if any(BLANK in function for function in attempt.values()):
        raise NotYet(f"Your turn: write code in place of `{BLANK}`.")
    heads = {*MODULES, *(path.partition(".")[0] for path in paths.values())}  # functions, and classes of methods
    others = [node for node in tree.body if not {getattr(node, "name", ""), getattr(node, "module", "")} & heads]
    helpers = [node for node in others if not isinstance(node, ast.Expr)]
    if exercise.kind == "puzzle":
        lines = helpers + [line for path in paths.values() for line in locate(text, path)[0].body]
        nodes = [node for line in lines for node in ast.walk(line)]
        used = {type(node).__name__ for node in nodes if isinstance(node, (ast.stmt, ast.comprehension, ast.Lambda))}
        used |= {ast.unparse(node.func).rpartition(".")[2] for node in nodes if isinstance(node, ast.Call)}
        if refused := used - {"Assign", "Return", "Expr", *exercise.calls}:
            raise NotYet(f"A puzzle holds assignments, one return and the calls it names, not {', '.join(refused)}.")
    return {**attempt, HELPERS: "\n\n".join(map(ast.unparse, helpers))}


def load(names: list[str], attempt: dict[str, str]) -> dict[str, ModuleType]:
    """Load modules fresh, with the functions of an attempt in place."""
    for name in MODULES:
        sys.modules.pop(name, None)
    for name in MODULES:
        text = source(name)
        for target in [target for target in attempt if target.startswith(f"{name}.")]:
            text = put_back(text, target.partition(".")[2], attempt[target])
        if text != source(name):
            text += f"\n\n{attempt.get(HELPERS, '')}\n"
            module = sys.modules[name] = ModuleType(name)
            module.__file__ = f"<{name} with your functions>"
            linecache.cache[module.__file__] = (len(text), None, text.splitlines(keepends=True), module.__file__)
            exec(compile(text, module.__file__, "exec"), module.__dict__)
    return {name: importlib.import_module(name) for name in names}


class Outcome(NamedTuple):
    """What a check saw: its cases, how many are right before the first wrong one, and an exception that ended it."""

    passed: bool
    cases: list[tuple]  # what, found, wanted, tolerance
    right: int
    error: BaseException | None


def stream(generator: Callable, attempt: dict[str, object], runs: Path = ROOT / "runs") -> Iterator[tuple]:
    """Call a generator of an exercise with the modules that it names; the seed is set before each step."""
    names = list(inspect.signature(generator).parameters)
    modules = {**load([name for name in names if name != "runs"], attempt), "runs": runs}
    items = generator(*(modules[name] for name in names))
    for number in itertools.count():
        torch.manual_seed(number)
        random.seed(number)
        if (item := next(items, None)) is None:
            return
        yield copied(item)


def observe(exercise: Exercise, attempt: dict[str, str], runs: Path = ROOT / "runs") -> Outcome:
    """Run the check of an exercise on an attempt. Raises NotYet."""
    cases, error, answers = [], None, {}
    try:
        if exercise.questions:
            exec(attempt[HELPERS], answers)
            if missing := [name for name in exercise.questions if answers.get(name) is None]:
                raise NotYet(f"Answer every question first; still None: {', '.join(missing)}.")
        for what, *values in stream(exercise.cases, attempt, runs):
            if exercise.questions:
                answer, truth, margin = answers[what], *values
                answer = answer.strip().lower() if isinstance(answer, str) else answer
                values = (answer, truth, margin and margin / max(abs(truth), 1e-6))
            cases.append((what, *values, 1e-4)[:4])  # the tolerance may be left out
    except NotYet:
        raise
    except BaseException as ended:  # SystemExit too
        error = ended
    right = agreement(cases, [(what, wanted) for what, _, wanted, _ in cases])
    return Outcome(bool(cases) and right == len(cases) and error is None, cases, right, error)


def copied(value: object) -> object:
    """Copy a value that a check has yielded, so that nothing can change it later."""
    if isinstance(value, (list, tuple)):
        return tuple(copied(item) for item in value)
    return value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)


def difference(found: object, wanted: object, tolerance: float) -> str:
    """Say how two values differ; an empty text if they do not."""
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (found, wanted)):
        found, wanted = torch.tensor(float(found)), torch.tensor(float(wanted))
    if isinstance(found, tuple) and isinstance(wanted, tuple):
        texts = [difference(*pair, tolerance) for pair in itertools.zip_longest(found, wanted, fillvalue="nothing")]
        return next((f"at [{number}]: {text}" for number, text in enumerate(texts) if text), "")
    tensors, place = [value for value in (found, wanted) if isinstance(value, torch.Tensor)], ()
    if len(tensors) == 2 and found.shape == wanted.shape and found.dtype == wanted.dtype:
        first, second = found.double(), wanted.double()
        sizes = second[second.isfinite()].abs().tolist()
        same = torch.isclose(first, second, rtol=0, atol=tolerance * max([*sizes, 1e-6]), equal_nan=True)
        if same.all():
            return ""
        place = tuple((~same).nonzero()[0].tolist())
        found, wanted = found[place].item(), wanted[place].item()
    elif not tensors and type(found) is type(wanted) and found == wanted:
        return ""
    return f"{shown(found)}, wanted {shown(wanted)}" + (f", at {list(place)}" if place else "")


def shown(value: object) -> str:
    """Show a value in a few words."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, tuple):
        return f"({', '.join(map(shown, value)):.120})"
    return f"{value:.4g}" if isinstance(value, float) else f"{value!r:.70}"


def agreement(cases: list[tuple], others: list[tuple]) -> int:
    """Count the cases, from the first on, in which two attempts found the same."""
    same = [not difference(one[1], other[1], one[3]) for one, other in zip(cases, others)]
    return [*same, False].index(False)


def judge(exercise: Exercise, text: str) -> tuple[bool, str]:
    """Check a student's file -> whether it passes, and what to tell its author."""
    try:
        outcome = observe(exercise, read_attempt(exercise, text.expandtabs(4)))
    except NotYet as error:
        return False, str(error)
    said = [stopped(outcome.error, text)] if outcome.error else []
    if exercise.questions:
        said += [judge_answer(exercise, *case)[1] for case in outcome.cases]
    elif outcome.right < len(outcome.cases):
        what, *values = outcome.cases[outcome.right]
        said = [f"Not yet right: {what}.\n  Found {difference(*values)}.", *diagnosed(exercise, outcome)]
    return outcome.passed, "\n".join(said)


def stopped(error: BaseException, text: str) -> str:
    """Name an exception, with the student's own line."""
    lines, frames = [line.strip() for line in text.split("\n")], traceback.extract_tb(error.__traceback__)
    own = [frame.line for frame in frames if "with your functions" in frame.filename and frame.line in lines]
    place = f"\n  Line {lines.index(own[-1]) + 1} of your file: {own[-1]}" if own else ""
    return f"Your code stops with {type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.200}{place}"


def diagnosed(exercise: Exercise, outcome: Outcome) -> list[str]:
    """Sentence of the near miss that agrees with an attempt for most cases, the first wrong one included."""
    others = [(observe(exercise, edited(exercise, edit)), text) for text, edit in exercise.near_misses]
    near = [(agreement(outcome.cases, other.cases), text) for other, text in others if other.right == outcome.right]
    sentences = {text for length, text in near if length == max(near)[0] > outcome.right}
    return list(sentences) if len(sentences) == 1 else []


def judge_answer(exercise: Exercise, question: str, answer: object, truth: object, margin: float) -> tuple[bool, str]:
    """Judge an answer -> whether it is right, and what to tell its author."""
    right = not difference(answer, truth, margin)
    misses = [(text, value) for text, (name, value) in exercise.near_misses if name == question and not right]
    near = [text for text, value in misses if not difference(answer, value, 0.03)]
    verdict = "right" if right else "not this time"
    return right, " ".join([f"{question}: {verdict}. You: {shown(answer)}. Measured: {shown(truth)}.", *near[:1]])
