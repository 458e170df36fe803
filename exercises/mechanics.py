"""Mechanics of the exercises: cut functions from the source, put a student's in their place, compare values.

An exercise is one decorated generator function in one of FILES. `ADDING.md` says how to write one.
"""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import io
import linecache
import random
import re
import sys
import textwrap
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Callable, Iterator, NamedTuple

import torch

HERE = Path(__file__).resolve().parent
ROOT, MINE = HERE.parent, HERE / "mine"
MODULES = ("t5", "data", "hypernet", "hint", "train")  # none imports another to its right
FILES = ("rebuild", "puzzles", "predict", "bugs", "ablate")
REGISTRY: dict[str, Exercise] = {}
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
    also: list[tuple] = field(default_factory=list)
    raises: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    bug: tuple = ()
    questions: dict[str, str] = field(default_factory=dict)
    cases: Callable = None
    numbers: Callable = None

    def __call__(self, cases: Callable) -> Exercise:
        self.cases = cases
        self.name, self.task = cases.__name__.replace("_", "-"), inspect.getdoc(cases)
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
    for name in FILES:
        if (HERE / f"{name}.py").is_file():
            importlib.import_module(name)
    return REGISTRY


# ------------------------------------------------------------------------------------------------- source

parse = lru_cache(maxsize=64)(ast.parse)  # the trees are only read


def source(module: str) -> str:
    """Read the text of one of the five modules."""
    return (ROOT / f"{module}.py").read_text("utf-8")


def locate(text: str, path: str) -> ast.FunctionDef:
    """Find a function or class by its dotted path in a module's text. Raises KeyError."""
    node = parse(text)
    for name in path.split("."):
        same_name = [child for child in getattr(node, "body", ()) if getattr(child, "name", None) == name]
        if not same_name:
            raise KeyError(path)
        node = same_name[-1]  # as in Python, the last definition counts
    return node


def span(node: ast.FunctionDef) -> slice:
    """Lines of a function, decorators included, as a slice of the text split at line ends."""
    return slice(min([node.lineno, *(item.lineno for item in node.decorator_list)]) - 1, node.end_lineno)


def cut(text: str, path: str) -> str:
    """Cut a function from a module's text, with the indentation that it has there."""
    return "\n".join(text.split("\n")[span(locate(text, path))])


def put_back(text: str, functions: dict[str, str]) -> str:
    """Put other texts in the places of functions, by their dotted paths in the module."""
    lines, spans = text.split("\n"), {path: span(locate(text, path)) for path in functions}
    for path in sorted(functions, key=lambda path: -spans[path].start):  # from the end, so that no line moves
        lines[spans[path]] = functions[path].split("\n")
    return "\n".join(lines)


def with_body(function: str, body: str) -> str:
    """Keep decorators, signature and docstring of a function, and give it another body."""
    lines = function.split("\n")
    margin = " " * (len(lines[0]) - len(lines[0].lstrip()))
    tree = parse(f"if True:\n{function}" if margin else f"if True:\n  pass\n{function}")
    node, first = (tree.body[0].body[0], 2) if margin else (tree.body[1], 3)  # the number of the first line
    if ast.get_docstring(node) is not None:
        end = node.body[0].end_lineno - first
    else:
        signature = range(node.lineno - first, node.body[0].lineno - first + 1)
        end = next(number for number in signature if re.search(r":\s*(#.*)?$", lines[number]))
    return "\n".join([*lines[: end + 1], textwrap.indent(textwrap.dedent(body).strip("\n"), margin + "    ")])


def own_functions(exercise: Exercise) -> dict[str, str]:
    """The project's text of every target."""
    return {target: cut(source(target.split(".")[0]), target.partition(".")[2]) for target in exercise.targets}


def edited(exercise: Exercise, edit: tuple) -> dict[str, str]:
    """Apply a near miss, a bug or another right way to the targets. Raises ValueError if the edit is stale."""
    functions = own_functions(exercise)
    for old, new in zip(edit[::2], edit[1::2], strict=True):
        if old in functions:
            functions[old] = with_body(functions[old], new)
            continue
        places = [target for target, text in functions.items() for _ in range(text.count(old))]
        if len(places) != 1:
            raise ValueError(f"stale edit: {old!r} occurs {len(places)} times in {', '.join(functions)}")
        functions[places[0]] = functions[places[0]].replace(old, new)
    return functions


# ------------------------------------------------------------------------------------------------- the working file


def working_file(exercise: Exercise, functions: dict[str, str] | None = None) -> str:
    """Write the file that a student edits; `functions`: texts in place of the blanks."""
    if functions is None and exercise.bug:
        functions = edited(exercise, exercise.bug)
    elif functions is None:
        blank = f'raise NotImplementedError("{YOUR_TURN}")'
        functions = {target: with_body(text, blank) for target, text in own_functions(exercise).items()}
    name, owners = exercise.name, []
    about = f"{name} ({exercise.kind}, level {exercise.level}, about {exercise.minutes} minutes). {exercise.paper}."
    rule = f"Write assignments and one return. You may call {', '.join(exercise.calls)}.\n\n" if exercise.calls else ""
    commands = f"python exercises check {name}\npython exercises hint {name}"
    parts = [f'"""{about}\n\n{exercise.task}\n\n{textwrap.fill(rule, 118)}{rule[-2:]}{commands}\n"""\n']
    modules = dict.fromkeys(target.split(".")[0] for target in functions)
    comment = "  # for your editor; the check puts your functions into the project's own modules\n"
    parts += ["\n"] * bool(modules) + [f"from {module} import *{comment}" for module in modules]
    for question, text in exercise.questions.items():
        comment = textwrap.fill(text, 117, initial_indent="# ", subsequent_indent="# ")
        parts.append(f"\n{comment}\n{question} = None\n")
    for target, text in functions.items():
        module, *owner, _ = target.split(".")
        if owner and owner not in owners:  # the head of its class: docstring and fields
            node = locate(source(module), owner[0])
            first = next(item for item in node.body if isinstance(item, ast.FunctionDef))
            text = "\n".join(source(module).split("\n")[span(node).start : span(first).start]).rstrip() + "\n\n" + text
        parts.append(f"\n{text}\n" if owner and owner in owners else f"\n\n{text}\n")
        owners.append(owner)
    return "".join(parts)


class Attempt(NamedTuple):
    """Functions to put in the place of the project's own, and helpers to put after the text of their modules."""

    functions: dict[str, str]
    helpers: str = ""


def tree_of(text: str) -> ast.Module:
    """Parse a student's file. Raises NotYet."""
    try:
        return parse(text)
    except (SyntaxError, ValueError) as error:
        place = f" in line {error.lineno}: {(error.text or '').strip()}" if isinstance(error, SyntaxError) else ""
        raise NotYet(f"Python cannot read your file ({getattr(error, 'msg', error)}){place}.") from None


def read_attempt(exercise: Exercise, text: str) -> Attempt:
    """Read the targets and the helpers in a student's file. Raises NotYet."""
    tree, functions, helpers = tree_of(text), {}, []
    targets = [target.split(".")[1:] for target in exercise.targets]
    for target, path in zip(exercise.targets, targets):
        try:
            margin, own = "    " * (len(path) - 1), cut(text, ".".join(path))
        except (KeyError, AttributeError):
            raise NotYet(f"The function {'.'.join(path)} is missing in your file.") from None
        functions[target] = own if locate(text, ".".join(path)).col_offset == len(margin) else \
            textwrap.indent(textwrap.dedent(own), margin)  # fmt: skip
    for node in tree.body:
        imported = {getattr(node, "module", None), *(alias.name for alias in getattr(node, "names", ()))}
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.ClassDef) and node.name in [path[0] for path in targets]:
            methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
            more = [ast.unparse(item) for item in methods if [node.name, item.name] not in targets]
            owner = next(target for target in functions if target.split(".")[1] == node.name)
            functions[owner] += "".join("\n\n" + textwrap.indent(method, "    ") for method in more)
        elif not is_docstring and [getattr(node, "name", None)] not in targets and not imported & set(MODULES):
            helpers.append(ast.unparse(node))
    return Attempt(functions, "\n\n".join(helpers))


def refuse_unless_puzzle(exercise: Exercise, attempt: Attempt) -> None:
    """Hold the rules of a puzzle: assignments, one return, and the calls that are named. Raises NotYet."""
    if attempt.helpers:
        raise NotYet("A puzzle is solved inside its function: no helpers, no imports.")
    for function in (ast.parse(textwrap.dedent(text)).body[0] for text in attempt.functions.values()):
        *before, last = function.body[ast.get_docstring(function) is not None :] or [None]
        if not isinstance(last, (ast.Return, ast.Raise)) or not all(isinstance(line, ast.Assign) for line in before):
            raise NotYet("A puzzle holds plain assignments and one return at its end: no loop and no if statement.")
        for node in (node for line in (*before, last) for node in ast.walk(line)):
            if isinstance(node, (ast.comprehension, ast.Lambda)):
                raise NotYet("A puzzle has no comprehension and no lambda: let tensors do the loop.")
            if isinstance(node, ast.Call) and isinstance(last, ast.Return):
                name = getattr(node.func, "attr", None) or getattr(node.func, "id", "this call")
                if name not in exercise.calls:
                    raise NotYet(f"{name} is not among the calls of this puzzle: {', '.join(exercise.calls)}.")


# ------------------------------------------------------------------------------------------------- running


def load(names: list[str], attempt: Attempt) -> dict[str, ModuleType]:
    """Load modules fresh, with the functions of an attempt in place. Modules imported before stay as they were."""
    imported = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    try:
        for name in MODULES:
            targets = {target: text for target, text in attempt.functions.items() if target.split(".")[0] == name}
            if targets:
                text = put_back(source(name), {target.partition(".")[2]: own for target, own in targets.items()})
                text += f"\n\n{attempt.helpers}\n" if attempt.helpers else ""
                module = sys.modules[name] = ModuleType(name)
                module.__file__ = f"<{name} with your functions>"
                linecache.cache[module.__file__] = (len(text), None, text.splitlines(keepends=True), module.__file__)
                exec(compile(text, module.__file__, "exec"), module.__dict__)
        return {name: importlib.import_module(name) for name in names}
    finally:
        for name in MODULES:
            sys.modules.pop(name, None)
        sys.modules.update(imported)


class Case(NamedTuple):
    """One comparison of a check."""

    what: str
    found: object
    wanted: object
    tolerance: float = 1e-4


class Outcome(NamedTuple):
    """What a check saw: its cases, and the exception that ended it early."""

    cases: list[Case]
    error: BaseException | None

    @property
    def wrong(self) -> Case | None:
        """The first case that is not as wanted."""
        return next((case for case in self.cases if difference(*case[1:])), None)

    @property
    def passed(self) -> bool:
        return bool(self.cases) and self.error is None and self.wrong is None


class Listener(io.StringIO):
    """Keep the first 2,000 characters that are printed, and drop the rest."""

    def write(self, text: str) -> int:
        super().write(text[: max(0, 2000 - self.tell())])
        return len(text)


def stream(generator: Callable, attempt: Attempt, runs: Path) -> Iterator[tuple]:
    """Call a generator of an exercise with the modules that it names; the seed is set before each step."""
    names = list(inspect.signature(generator).parameters)
    modules = {**load([name for name in names if name != "runs"], attempt), "runs": runs}
    items = generator(*(modules[name] for name in names))
    for number in range(1_000_000):
        torch.manual_seed(number)
        random.seed(number)
        try:
            yield tuple(copied(value) for value in next(items))
        except StopIteration:
            return


def observe(exercise: Exercise, attempt: Attempt, printed: Listener | None = None) -> Outcome:
    """Run the check of an exercise on an attempt."""
    cases, printed = [], printed or Listener()
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            for item in stream(exercise.cases, attempt, ROOT / "runs"):
                cases.append(Case(*item))
    except BaseException as error:  # SystemExit too
        return Outcome(cases, error)
    return Outcome(cases, None)


# ------------------------------------------------------------------------------------------------- values


def copied(value: object) -> object:
    """Copy a value that a check has yielded, so that nothing can change it later."""
    if isinstance(value, (list, tuple)):
        return tuple(copied(item) for item in value)
    return value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)


def difference(found: object, wanted: object, tolerance: float = 1e-4, nan: bool = False) -> str:
    """Say how two values differ; an empty text if they do not. `nan`: two NaNs are equal."""
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (found, wanted)):
        found, wanted = torch.tensor(float(found)), torch.tensor(float(wanted))
    if isinstance(found, tuple) and isinstance(wanted, tuple):
        if len(found) != len(wanted):
            return f"{len(found)} values, wanted {len(wanted)}"
        texts = [difference(*pair, tolerance, nan) for pair in zip(found, wanted)]
        return next((f"at [{number}]: {text}" for number, text in enumerate(texts) if text), "")
    if not isinstance(found, torch.Tensor) or not isinstance(wanted, torch.Tensor):
        same = type(found) is type(wanted) and found == wanted
        kind = " in a tensor" if isinstance(found, torch.Tensor) and not found.dim() else ""
        return "" if same else f"{shown(found)}{kind}, wanted {shown(wanted)}"
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return f"{shown(found)}, wanted {shown(wanted)}"
    first, second = found.double(), wanted.double()
    sizes = second[second.isfinite()].abs().tolist()
    same = torch.isclose(first, second, rtol=0, atol=tolerance * max([*sizes, 1e-6]), equal_nan=nan)
    if same.all():
        return ""
    place = tuple((~same).nonzero()[0].tolist())
    return f"{shown(found[place])}, wanted {shown(wanted[place])}" + (f", at {list(place)}" if place else "")


def shown(value: object) -> str:
    """Show a value in a few words."""
    if isinstance(value, torch.Tensor) and value.dim():
        return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    value = value.item() if isinstance(value, torch.Tensor) else value
    if isinstance(value, tuple):
        return f"({', '.join(map(shown, value)):.120})"
    return f"{value:.4g}" if isinstance(value, float) else f"{value!r:.70}"


def alike(first: Outcome, second: Outcome) -> bool:
    """Tell whether two attempts behaved alike: the same values in every case, and the same kind of error."""
    if len(first.cases) != len(second.cases) or type(first.error) is not type(second.error):
        return False
    pairs = zip(first.cases, second.cases)
    return all(not difference(one.found, other.found, one.tolerance, nan=True) for one, other in pairs)


# ------------------------------------------------------------------------------------------------- verdicts


def judge(exercise: Exercise, text: str) -> tuple[bool, list[str]]:
    """Check a student's file -> whether it passes, and the sentences for its author."""
    try:
        if exercise.questions:
            return judge_answers(exercise, text)
        attempt, printed = read_attempt(exercise, text), Listener()
        if exercise.kind == "puzzle":
            refuse_unless_puzzle(exercise, attempt)
    except NotYet as error:
        return False, [str(error)]
    outcome = observe(exercise, attempt, printed)
    said = [f"Your functions printed:\n{textwrap.indent(printed.getvalue().rstrip(), '  ')}"] * bool(printed.tell())
    if outcome.passed:
        return True, said
    if isinstance(outcome.error, NotImplementedError) and str(outcome.error) == YOUR_TURN:
        return False, [f'Your turn: write code in place of `raise NotImplementedError("{YOUR_TURN}")`.', *said]
    return False, [explained(outcome, text), *diagnosed(exercise, outcome)[:1], *said]


def explained(outcome: Outcome, text: str) -> str:
    """Name the first wrong case with its values, or the exception with the student's own line."""
    if wrong := outcome.wrong:
        forgotten = " Does your function return its result?" if wrong.found is None else ""
        return f"Not yet right: {wrong.what}.\n  Found {difference(*wrong[1:])}.{forgotten}"
    lines, error = [line.strip() for line in text.split("\n")], outcome.error
    frames = traceback.extract_tb(error.__traceback__) if error else []
    own = [frame.line for frame in frames if "with your functions" in frame.filename and frame.line in lines]
    place = f"\n  Line {lines.index(own[-1]) + 1} of your file: {own[-1]}" if own else ""
    return f"Your code stops with {type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.200}{place}"


def diagnosed(exercise: Exercise, outcome: Outcome) -> list[str]:
    """List the sentences of near misses that behave as an attempt did, in all cases or up to the first wrong one."""
    near = [(text, observe(exercise, Attempt(edited(exercise, edit)))) for text, edit in exercise.near_misses]
    if sentences := [text for text, other in near if alike(outcome, other)]:
        return sentences
    begin = outcome.cases[: outcome.cases.index(outcome.wrong) + 1] if outcome.wrong else []
    first = Outcome(begin, None)
    sentences = [text for text, other in near if begin and alike(first, Outcome(other.cases[: len(begin)], None))]
    return sentences if len(set(sentences)) == 1 else []


def judge_answers(exercise: Exercise, text: str) -> tuple[bool, list[str]]:
    """Hold the answers of a prediction against the truths, which are measured now. Raises NotYet."""
    answers: dict[str, object] = {}
    try:
        exec(compile(tree_of(text), "your file", "exec"), answers)
    except Exception as error:
        raise error if isinstance(error, NotYet) else NotYet(f"Your file stops with {error!r:.200}") from None
    if missing := [name for name in exercise.questions if answers.get(name) is None]:
        raise NotYet(f"Answer every question first; still None: {', '.join(missing)}.")
    lines, verdicts = [], []
    for name, truth, tolerance in stream(exercise.cases, Attempt({}), ROOT / "runs"):
        right, sentence = judge_answer(exercise, name, answers[name], truth, tolerance)
        verdicts.append(right)
        verdict = "right" if right else "not this time"
        lines.append(f"{name}: {verdict}. You: {shown(answers[name])}. Measured: {shown(truth)}. {sentence}".rstrip())
    more = ["Explain the difference, aloud if you can. Then write what was measured, and check again."]
    return all(verdicts), lines + more * (not all(verdicts))


def judge_answer(exercise: Exercise, name: str, answer: object, truth: object, tolerance) -> tuple[bool, str]:
    """Judge one answer -> whether it is right, and the sentence of the near miss next to it. Raises NotYet."""
    if isinstance(answer, bool) or not isinstance(answer, str if isinstance(truth, str) else (int, float)):
        raise NotYet(f"{name}: {'a text' if isinstance(truth, str) else 'a number'} is wanted, not {shown(answer)}.")

    def same(value: object, margin: float) -> bool:
        return abs(answer - value) <= margin if margin is not None else answer.strip().lower() == value.lower()

    near = [(text, value) for text, (question, value) in exercise.near_misses if question == name]
    sentences = [text for text, value in near if same(value, None if isinstance(truth, str) else 0.03 * abs(value))]
    right = same(truth, tolerance)
    return right, "" if right or not sentences else sentences[0]
