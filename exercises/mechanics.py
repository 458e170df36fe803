"""Mechanics of the exercises: cut functions from the source, put a student's in their place, compare values.

An exercise is one decorated generator function in one of five files. `ADDING.md` says how to write one.
"""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import io
import itertools
import linecache
import random
import sys
import textwrap
import traceback
from contextlib import redirect_stderr, redirect_stdout
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
HELPERS = "helpers"  # the name under which an attempt holds what goes behind the text of the modules
YOUR_TURN = "your turn"
STILL_THERE = "The bug is still there: your functions do what the functions did when you got them."
sys.path.insert(0, str(ROOT))  # these five modules, whatever else is installed


class NotYet(Exception):
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
            rule = f"Write assignments and one return. You may call {', '.join(self.calls)}."
            self.task += f"\n\n{textwrap.fill(rule, 118)}"
        REGISTRY[self.name] = self
        return self

    def facts(self, numbers: Callable) -> None:
        """Register the generator that recomputes the numbers of the texts."""
        self.numbers = numbers

    @property
    def near_misses(self) -> list[tuple[str, tuple]]:
        """Every near miss with its sentence; `run` numbers them from 1."""
        planted = [(STILL_THERE, self.bug)] if self.bug else []
        lists = [(text, edits if isinstance(edits, list) else [edits]) for text, edits in self.near.items()]
        return planted + [(text, edit) for text, edits in lists for edit in edits]


exercise = Exercise  # read as a decorator: @exercise("rebuild", ...)


def all_exercises() -> dict[str, Exercise]:
    """Import the files of exercises -> every exercise by name."""
    for name in ("rebuild", "puzzles", "predict", "bugs", "ablate"):
        importlib.import_module(name)
    return REGISTRY


parse = lru_cache(maxsize=64)(ast.parse)  # the trees are only read


def source(module: str) -> str:
    """Read the text of one of the five modules."""
    return (ROOT / f"{module}.py").read_text("utf-8")


def locate(text: str, path: str) -> ast.FunctionDef:
    """Find a function or class by its dotted path in a module's text. Raises IndexError."""
    node = parse(text)
    for name in path.split("."):  # as in Python, the last definition counts
        node = [child for child in node.body if getattr(child, "name", None) == name][-1]
    return node


def span(node: ast.FunctionDef) -> slice:
    """Lines of a function, decorators included, as a slice of the text split at line ends."""
    return slice(min([node.lineno, *(item.lineno for item in node.decorator_list)]) - 1, node.end_lineno)


def cut(text: str, path: str, body: str | None = None) -> str:
    """Cut a function from a module's text, indentation included; `body`: in place of what follows its docstring."""
    lines, node = text.split("\n"), locate(text, path)
    if body is None:
        return "\n".join(lines[span(node)])
    last = node.returns if ast.get_docstring(node) is None else node.body[0]
    body = textwrap.indent(textwrap.dedent(body).strip("\n"), " " * (node.col_offset + 4))
    return "\n".join([*lines[span(node).start : last.end_lineno], body])


def put_back(text: str, path: str, function: str) -> str:
    """Put another text in the place of a function."""
    lines = text.split("\n")
    lines[span(locate(text, path))] = function.split("\n")
    return "\n".join(lines)


def own_functions(exercise: Exercise, body: str | None = None) -> dict[str, str]:
    """The project's text of every target; `body`: in place of its own."""
    return {target: cut(source(target.split(".")[0]), target.partition(".")[2], body) for target in exercise.targets}


def edited(exercise: Exercise, edit: tuple) -> dict[str, str]:
    """Apply a near miss, a bug or another right way to the targets. Raises ValueError if the edit is stale."""
    functions = own_functions(exercise)
    for old, new in zip(edit[::2], edit[1::2], strict=True):
        if old in functions:
            functions[old] = own_functions(exercise, new)[old]
            continue
        places = [target for target, text in functions.items() for _ in range(text.count(old))]
        if len(places) != 1:
            raise ValueError(f"stale edit: {old!r} occurs {len(places)} times in {', '.join(functions)}")
        functions[places[0]] = functions[places[0]].replace(old, new)
    return functions


def working_file(exercise: Exercise) -> str:
    """Write the file that a student edits: the task, and the targets as blanks or with the bug."""
    blank = f'raise NotImplementedError("{YOUR_TURN}")'
    functions = edited(exercise, exercise.bug) if exercise.bug else own_functions(exercise, blank)
    name, classes = exercise.name, set()
    about = f"{name} ({exercise.kind}, level {exercise.level}, about {exercise.minutes} minutes). {exercise.paper}."
    commands = f"python exercises check {name}\npython exercises hint {name}"
    parts = [f'"""{about}\n\n{exercise.task}\n\n{commands}\n"""\n\n']
    comment = "  # for your editor; the check puts your functions into the project's own modules\n"
    parts += [f"from {module} import *{comment}" for module in dict.fromkeys(path.split(".")[0] for path in functions)]
    for question, text in exercise.questions.items():
        parts.append(textwrap.indent(textwrap.fill(text, 117), "# ") + f"\n{question} = None\n\n")
    for target, text in functions.items():
        module, *owner, _ = target.split(".")
        if owner and owner[0] not in classes:  # the head of its class: docstring and fields
            node = locate(source(module), owner[0])
            first = next(item for item in node.body if isinstance(item, ast.FunctionDef))
            head = "\n".join(source(module).split("\n")[span(node).start : span(first).start])
            parts.append(f"\n\n{head.rstrip()}\n")
            classes.add(owner[0])
        parts.append(f"\n{text}\n" if owner else f"\n\n{text}\n")
    return "".join(parts)


def read_attempt(exercise: Exercise, text: str) -> dict[str, str]:
    """Read the targets in a student's file, and its helpers. Raises NotYet."""
    try:
        tree, attempt, helpers = parse(text, "your file"), {}, []
    except (SyntaxError, ValueError) as error:
        raise NotYet(f"Python cannot read your file: {error}\n  {(getattr(error, 'text', '') or '').strip()}") from None
    for target in exercise.targets:
        path = target.partition(".")[2]
        try:
            function = locate(text, path)
        except (IndexError, AttributeError):
            raise NotYet(f"The function {path} is missing in your file.") from None
        if YOUR_TURN in ast.unparse(function):
            raise NotYet(f'Your turn: write code in place of `raise NotImplementedError("{YOUR_TURN}")` in {path}.')
        attempt[target] = cut(text, path)
    heads = [target.split(".")[1] for target in exercise.targets]  # functions, and classes of methods
    for node in tree.body:
        names = {getattr(node, "name", None), getattr(node, "module", None)}
        if not isinstance(node, ast.Expr) and not names & {*heads, *MODULES}:
            helpers.append(ast.unparse(node))
    if exercise.kind == "puzzle" and helpers:
        raise NotYet("A puzzle is solved inside its function: no helpers, no imports.")
    for function in attempt.values() if exercise.kind == "puzzle" else ():
        refuse_unless_puzzle(exercise, ast.parse(textwrap.dedent(function)).body[0])
    return {**attempt, HELPERS: "\n\n".join(helpers)}


def refuse_unless_puzzle(exercise: Exercise, function: ast.FunctionDef) -> None:
    """Hold the rules of a puzzle: plain lines, and the calls that are named. Raises NotYet."""
    for node in (node for line in function.body for node in ast.walk(line)):
        plain = isinstance(node, (ast.Assign, ast.Return, ast.Expr))  # an Expr: the docstring
        if isinstance(node, (ast.stmt, ast.comprehension, ast.Lambda)) and not plain:
            raise NotYet("A puzzle holds assignments and one return: no loop, comprehension, lambda or if statement.")
        called = getattr(node, "func", None)
        name = getattr(called, "attr", None) or getattr(called, "id", "this call")
        if called and name not in exercise.calls:
            raise NotYet(f"{name} is not among the calls of this puzzle: {', '.join(exercise.calls)}.")


def load(names: list[str], attempt: dict[str, str]) -> dict[str, ModuleType]:
    """Load modules fresh, with the functions of an attempt in place. Modules imported before stay as they were."""
    imported = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    try:
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
    finally:
        for name in MODULES:
            sys.modules.pop(name, None)
        sys.modules.update(imported)


class Outcome(NamedTuple):
    """What a check saw: its cases, the exception that ended it early, and the beginning of what was printed."""

    cases: list[tuple]  # what, found, wanted, tolerance
    error: BaseException | None
    printed: str

    @property
    def wrong(self) -> tuple | None:
        """The first case that is not as wanted."""
        return next((case for case in self.cases if difference(*case[1:])), None)

    @property
    def passed(self) -> bool:
        return bool(self.cases) and self.error is None and self.wrong is None


class Listener(io.StringIO):
    """Keep the first 2,000 characters that are printed, and drop the rest."""

    def write(self, text: str) -> int:
        return super().write(text[: max(0, 2000 - self.tell())])


def stream(generator: Callable, attempt: dict[str, str], runs: Path = ROOT / "runs") -> Iterator[tuple]:
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


def observe(exercise: Exercise, attempt: dict[str, str]) -> Outcome:
    """Run the check of an exercise on an attempt."""
    cases, error, printed = [], None, Listener()
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            for item in stream(exercise.cases, attempt):
                cases.append((*item, 1e-4)[:4])  # the tolerance may be left out
    except BaseException as ended:  # SystemExit too
        error = ended
    return Outcome(cases, error, printed.getvalue().rstrip())


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
        if len(found) != len(wanted):
            return f"{len(found)} values, wanted {len(wanted)}"
        texts = [difference(*pair, tolerance) for pair in zip(found, wanted)]
        return next((f"at [{number}]: {text}" for number, text in enumerate(texts) if text), "")
    if not isinstance(found, torch.Tensor) or not isinstance(wanted, torch.Tensor):
        same = type(found) is type(wanted) and found == wanted
        return "" if same else f"{shown(found)}, wanted {shown(wanted)}"
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return f"{shown(found)}, wanted {shown(wanted)}"
    first, second = found.double(), wanted.double()
    sizes = second[second.isfinite()].abs().tolist()
    same = torch.isclose(first, second, rtol=0, atol=tolerance * max([*sizes, 1e-6]), equal_nan=True)
    if same.all():
        return ""
    place = tuple((~same).nonzero()[0].tolist())
    values = f"{shown(found[place].item())}, wanted {shown(wanted[place].item())}"
    return f"{values}, at {list(place)}" if place else values


def shown(value: object) -> str:
    """Show a value in a few words."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, tuple):
        return f"({', '.join(map(shown, value)):.120})"
    return f"{value:.4g}" if isinstance(value, float) else f"{value!r:.70}"


def alike(first: Outcome, second: Outcome, until: int | None = None) -> bool:
    """Tell whether two attempts behaved alike, in every case and in how they ended, or in the first `until` cases."""
    pairs = list(zip(first.cases[:until], second.cases))
    same_end = len(first.cases) == len(second.cases) and type(first.error) is type(second.error)
    if not same_end if until is None else len(pairs) < until:
        return False
    return not any(difference(one[1], other[1], one[3]) for one, other in pairs)


def judge(exercise: Exercise, text: str) -> tuple[bool, str]:
    """Check a student's file -> whether it passes, and what to tell its author."""
    try:
        if exercise.questions:
            return judge_answers(exercise, text)
        text = text.expandtabs(4)
        outcome = observe(exercise, read_attempt(exercise, text))
    except NotYet as error:
        return False, str(error)
    said = [] if outcome.passed else [explained(outcome, text), *diagnosed(exercise, outcome)]
    if outcome.printed:
        said.append(f"Your functions printed:\n{textwrap.indent(outcome.printed, '  ')}")
    return outcome.passed, "\n".join(said)


def explained(outcome: Outcome, text: str) -> str:
    """Name the first wrong case with its values, or the exception with the student's own line."""
    if wrong := outcome.wrong:
        what, found, *_ = wrong
        forgotten = " Does your function return its result?" if found is None else ""
        return f"Not yet right: {what}.\n  Found {difference(*wrong[1:])}.{forgotten}"
    lines, error = [line.strip() for line in text.split("\n")], outcome.error
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame.line for frame in frames if "with your functions" in frame.filename and frame.line in lines]
    place = f"\n  Line {lines.index(own[-1]) + 1} of your file: {own[-1]}" if own else ""
    return f"Your code stops with {type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.200}{place}"


def diagnosed(exercise: Exercise, outcome: Outcome) -> list[str]:
    """Sentence of the near miss that behaves as an attempt did, in all cases or else up to the first wrong one."""
    near = [(text, observe(exercise, edited(exercise, edit))) for text, edit in exercise.near_misses]
    exact = [text for text, other in near if alike(outcome, other)]
    if exact or outcome.wrong is None:
        return exact[:1]
    until = next(number for number, case in enumerate(outcome.cases, start=1) if case is outcome.wrong)
    begun = {text for text, other in near if alike(outcome, other, until)}
    return list(begun) if len(begun) == 1 else []


def judge_answers(exercise: Exercise, text: str) -> tuple[bool, str]:
    """Hold the answers of a prediction against the truths, which are measured now. Raises NotYet."""
    answers: dict[str, object] = {}
    try:
        exec(compile(text, "your file", "exec"), answers)
    except Exception as error:
        raise NotYet(f"Your file stops with {error!r:.200}") from None
    if missing := [name for name in exercise.questions if answers.get(name) is None]:
        raise NotYet(f"Answer every question first; still None: {', '.join(missing)}.")
    lines, verdicts = [], []
    for name, truth, tolerance in stream(exercise.cases, {}):
        right, sentence = judge_answer(exercise, name, answers[name], truth, tolerance)
        verdicts.append(right)
        verdict = "right" if right else "not this time"
        lines.append(f"{name}: {verdict}. You: {shown(answers[name])}. Measured: {shown(truth)}. {sentence}".rstrip())
    return all(verdicts), "\n".join(lines)


def judge_answer(exercise: Exercise, name: str, answer: object, truth: object, tolerance) -> tuple[bool, str]:
    """Judge one answer -> whether it is right, and the sentence of the near miss next to it."""

    def near(value: object, margin: float | None) -> bool:
        if isinstance(value, str) or not isinstance(answer, (int, float)):
            return str(answer).strip().lower() == value
        return abs(answer - value) <= (0.03 * abs(value) if margin is None else margin)

    if near(truth, tolerance):
        return True, ""
    misses = [(text, value) for text, (question, value) in exercise.near_misses if question == name]
    return False, next((text for text, value in misses if near(value, None)), "")
