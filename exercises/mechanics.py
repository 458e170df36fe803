"""Mechanics of the exercises: cut functions from the source, put a student's in their place, compare values.

An exercise is one decorated generator function in `rebuild.py`, `puzzles.py`, `predict.py`, `bugs.py` or `ablate.py`.
Nothing else is registered. The name of the exercise is the name of the function with `-` for `_`.

    @exercise(
        "rebuild",                      # or "puzzle", "bug", "predict", "ablate"
        ["t5.Adapter.__call__"],        # the targets: functions of the five modules; of predict and ablate: []
        level=1, minutes=10, paper="HINT, equation (1)", hint="One line.", why="One line, with a measured number.",
        near={                          # near misses, filed under the sentence that their author should read
            "What your function does, in one sentence.": ("text in the source", "what a student might have written"),
            "Two ways to one behaviour.": [("old", "new"), ("old 1", "new 1", "old 2", "new 2")],
            "The whole body is another.": ("t5.Adapter.__call__", "return u"),  # old: a target's name; new: its body
        },
        also=[("text in the source", "another right way")],  # the same form; rebuild and puzzle need one at least
    )
    def adapter(t5):                    # parameters: the modules wanted, loaded with the student's functions in place
        '''The task, in a few plain sentences.'''
        u = torch.randn(2, 5, 24)       # draw all inputs before the first call of the student's function
        yield "what is compared", found, wanted         # or with a tolerance: yield what, found, wanted, 1e-2

An old text must occur exactly once in the project's text of the targets; quote as little as is unique. New bodies are
written without indentation. The mechanics sets the seed before the generator starts and after each `yield`, and copies
what is yielded at once. Shapes and types are compared too. The default tolerance is 1e-4, relative to the largest number.

More arguments, all optional:
    raises=["sentence"]                 near misses that may be caught by an exception; all others by a value
    calls=["pad", "masked_fill"]        puzzle: the functions and methods that may be called. A puzzle holds plain
                                        assignments and one `return`; no loop, comprehension, lambda or if statement
    bug=("old", "new")                  bug: the edit that is planted in the targets. Near misses are edits of the project's
                                        own text, not of the planted one; "still there" is added by the mechanics

Prediction and ablation: no targets; the generator measures the truth.

    @exercise("predict", [], ..., questions={"spread": "Standard deviation of ...?"},
              near={"You took ... for ...": ("spread", 8), "...": [("spread", 0.125), ("other", "fusion")]})
    def unscaled(t5):
        '''The situation, in a few plain sentences.'''
        yield "spread", truth, tolerance            # one per question; of a text: yield "name", "fusion", None

A parameter named `runs` is a folder: of the student's own runs (`runs/` of the project), in the audit `exercises/recorded/`,
which has the same layout. What is not there yet: raise NotYet("Run ... first."). Runs of `python exercises run NAME own 400`
lie in `runs/exercises/NAME-own-400/`, in the form of the demo's folder.

Numbers that stand in a task, hint, why or sentence are recomputed by the audit from a second generator:

    @adapter.facts
    def _(t5, hint):
        yield "share of p in N, percent", 100 * p / N, "4 %"    # the stated text; off by one in its last digit at most

`small.py` makes small models: `tiny_t5(t5, **changes)` and `tiny_hint(hint, **changes)`.
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
STILL_THERE = "The bug is still there: your functions compute what the planted ones compute."
sys.path.append(str(ROOT))


class Wrong(Exception):
    """A file cannot be checked; the message is the sentence for its author."""


class NotYet(Exception):
    """Something has to be done before a check; the message says what."""


# ------------------------------------------------------------------------------------------------- registry


@dataclass(eq=False)
class Exercise:
    """One exercise; the head of this file says what each field holds."""

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
        REGISTRY[self.name] = self
        return self

    def facts(self, numbers: Callable) -> None:
        """Register the generator that recomputes the numbers of the texts."""
        self.numbers = numbers

    @property
    def name(self) -> str:
        return self.cases.__name__.replace("_", "-")

    @property
    def task(self) -> str:
        return inspect.getdoc(self.cases)

    @property
    def near_misses(self) -> list[tuple[str, tuple]]:
        """Every near miss with its sentence, numbered from 1 by `run`."""
        planted = [(STILL_THERE, self.bug)] if self.bug else []
        lists = [(text, edits if isinstance(edits, list) else [edits]) for text, edits in self.near.items()]
        return planted + [(sentence, edit) for sentence, edits in lists for edit in edits]


exercise = Exercise  # read as a decorator: @exercise("rebuild", ...)


def all_exercises() -> dict[str, Exercise]:
    """Import the files of exercises -> every exercise by name."""
    for name in FILES:
        if (HERE / f"{name}.py").is_file():
            importlib.import_module(name)
    return REGISTRY


# ------------------------------------------------------------------------------------------------- source


def source(module: str) -> str:
    """Read the text of one of the five modules."""
    return (ROOT / f"{module}.py").read_text("utf-8")


parse = lru_cache(maxsize=64)(ast.parse)  # the trees are read alone


def locate(text: str, path: str) -> ast.FunctionDef:
    """Find a function by its dotted path in a module's text. Raises KeyError."""
    node = parse(text)
    for name in path.split("."):
        found = [child for child in getattr(node, "body", ()) if getattr(child, "name", None) == name]
        if not found:
            raise KeyError(path)
        node = found[-1]  # as in Python, the last definition counts
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


def class_head(module: str, name: str) -> str:
    """Cut the lines of a class before its first function: its docstring and its fields."""
    text = source(module)
    functions = [node for node in locate(text, name).body if isinstance(node, ast.FunctionDef)]
    return "\n".join(text.split("\n")[span(locate(text, name)).start : span(functions[0]).start]).rstrip()


def with_body(function: str, body: str) -> str:
    """Keep decorators, signature and docstring of a function, and give it another body."""
    lines = function.split("\n")
    margin = " " * (len(lines[0]) - len(lines[0].lstrip()))
    wrapped = f"class _:\n{function}" if margin else f"\n{function}"  # one line more, in both cases
    tree = ast.parse(wrapped)
    node = tree.body[0].body[0] if margin else tree.body[0]
    if ast.get_docstring(node) is not None:
        end = node.body[0].end_lineno - 1
    else:
        signature = range(node.lineno - 2, node.body[0].lineno)
        end = next(number for number in signature if re.search(r":\s*(#.*)?$", lines[number])) + 1
    return "\n".join([*lines[:end], textwrap.indent(body, margin + "    ")])


def own_functions(exercise: Exercise) -> dict[str, str]:
    """The project's text of every target."""
    return {target: cut(source(target.split(".")[0]), target.partition(".")[2]) for target in exercise.targets}


def edited(exercise: Exercise, edit: tuple) -> dict[str, str]:
    """Apply a near miss, a bug or another right way to the targets. Raises ValueError if the edit is stale."""
    functions = own_functions(exercise)
    for old, new in zip(edit[::2], edit[1::2], strict=True):
        if old in functions:
            functions[old] = with_body(functions[old], textwrap.dedent(new).strip("\n"))
            continue
        places = [target for target, text in functions.items() for _ in range(text.count(old))]
        if len(places) != 1:
            raise ValueError(f"stale edit: {old!r} occurs {len(places)} times in {', '.join(functions)}")
        functions[places[0]] = functions[places[0]].replace(old, new)
    return functions


# ------------------------------------------------------------------------------------------------- the working file


def working_file(exercise: Exercise, functions: dict[str, str] | None = None) -> str:
    """Text of the file that a student edits; with `functions`, these stand in place of the blanks."""
    if functions is None and exercise.bug:
        functions = edited(exercise, exercise.bug)
    elif functions is None:
        blank = f'raise NotImplementedError("{YOUR_TURN}")'
        functions = {name: with_body(text, blank) for name, text in own_functions(exercise).items()}
    name = exercise.name
    about = f"{name} ({exercise.kind}, level {exercise.level}, about {exercise.minutes} minutes). {exercise.paper}."
    commands = f"python exercises check {name}\npython exercises hint {name}"
    parts = [f'"""{about}\n\n{exercise.task}\n\n{commands}\n"""']
    if modules := dict.fromkeys(target.split(".")[0] for target in exercise.targets):
        comment = "  # for your editor; the check puts your functions into the modules themselves"
        parts.append("\n".join(f"from {module} import *{comment}" for module in modules))
    parts += [f"# {textwrap.fill(text, 117, subsequent_indent='# ')}\n{key} = None" for key, text in
              exercise.questions.items()]  # fmt: skip
    last = None
    for target, text in functions.items():
        owner = target.split(".")[:-1]
        parts.append(f"{class_head(*owner)}\n\n{text}" if len(owner) == 2 and owner != last else text)
        last = owner
    return "\n\n\n".join(parts) + "\n"


class Attempt(NamedTuple):
    """Functions to put in the place of the project's own, and helpers to put behind the text of their modules."""

    functions: dict[str, str]
    helpers: str = ""


def read_attempt(exercise: Exercise, text: str) -> Attempt:
    """Read a student's file. Raises Wrong."""
    tree = parsed(text)
    functions, kept = {}, []
    targets = [target.split(".")[1:] for target in exercise.targets]
    for target, path in zip(exercise.targets, targets):
        try:
            node = locate(text, ".".join(path))
            functions[target] = cut(text, ".".join(path))
        except (KeyError, AttributeError):
            raise Wrong(f"The function {'.'.join(path)} is missing; `start` in an empty place writes it anew.") from None
        if node.col_offset != 4 * (len(path) - 1):
            functions[target] = textwrap.indent(textwrap.dedent(functions[target]), "    " * (len(path) - 1))
    classes = {path[0] for path in targets if len(path) == 2}
    for node in tree.body:
        imported = [getattr(node, "module", None), *(alias.name for alias in getattr(node, "names", ()))]
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.ClassDef) and node.name in classes:
            for item in node.body:  # a further method stands behind the first target of its class
                if isinstance(item, ast.FunctionDef) and [node.name, item.name] not in targets:
                    first = next(name for name in functions if name.split(".")[1] == node.name)
                    functions[first] += "\n\n" + textwrap.indent(ast.unparse(item), "    ")
        elif not (is_text or [getattr(node, "name", None)] in targets or set(imported) & set(MODULES)):
            kept.append(ast.unparse(node))
    return Attempt(functions, "\n\n".join(kept))


def parsed(text: str) -> ast.Module:
    """Parse a student's file. Raises Wrong."""
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        place = f" in line {line}: {text.split(chr(10))[line - 1].strip()}" if line else ""
        raise Wrong(f"Python cannot read your file ({getattr(error, 'msg', error)}){place}") from None


def refuse_unless_puzzle(exercise: Exercise, attempt: Attempt) -> None:
    """Hold the rules of a puzzle: assignments, one return, and the calls named. Raises Wrong."""
    allowed = ", ".join(exercise.calls)
    if attempt.helpers:
        raise Wrong("A puzzle is solved inside its function: no helpers, no imports.")
    for text in attempt.functions.values():
        function = ast.parse(textwrap.dedent(text)).body[0]
        body = function.body[ast.get_docstring(function) is not None :]
        if not body or any(not isinstance(line, ast.Assign) for line in body[:-1]) or not isinstance(body[-1], ast.Return):
            if YOUR_TURN not in text:
                raise Wrong("A puzzle holds plain assignments and one return at its end: no loop, no if statement.")
            continue
        for node in (node for line in body for node in ast.walk(line)):
            if isinstance(node, (ast.comprehension, ast.Lambda)):
                raise Wrong("A puzzle has no comprehension and no lambda: let tensors do the loop.")
            called = getattr(node, "func", None)
            name = getattr(called, "attr", None) or getattr(called, "id", None)
            if called is not None and name not in exercise.calls:
                raise Wrong(f"{name or 'that call'} is not among the calls of this puzzle: {allowed}.")


# ------------------------------------------------------------------------------------------------- running


def load(names: list[str], attempt: Attempt) -> dict[str, ModuleType]:
    """Load modules fresh with the functions of an attempt in place. Modules that were imported before stay as they were."""
    before = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    try:
        for name in MODULES:
            own = {target.partition(".")[2]: text for target, text in attempt.functions.items() if target.startswith(f"{name}.")}
            if not own:
                continue
            text = put_back(source(name), own)
            text += f"\n\n{attempt.helpers}\n" if attempt.helpers else ""
            module = ModuleType(name)
            module.__file__ = f"<{name} with your functions>"
            linecache.cache[module.__file__] = (len(text), None, text.splitlines(keepends=True), module.__file__)
            sys.modules[name] = module
            exec(compile(text, module.__file__, "exec"), module.__dict__)
        return {name: importlib.import_module(name) for name in names}
    finally:
        for name in MODULES:
            sys.modules.pop(name, None)
        sys.modules.update(before)


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
        return next((case for case in self.cases if difference(case.found, case.wanted, case.tolerance)), None)

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
    modules = load([name for name in names if name != "runs"], attempt)
    items = generator(*(runs if name == "runs" else modules[name] for name in names))
    for number in range(1_000_000):
        torch.manual_seed(number)
        random.seed(number)
        try:
            item = next(items)
        except StopIteration:
            return
        yield tuple(copied(value) for value in item)


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
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, (list, tuple)):
        return tuple(copied(item) for item in value)
    return copy.deepcopy(value)


def difference(found: object, wanted: object, tolerance: float = 1e-4, nan: bool = False) -> str:
    """Say how two values differ; an empty text if they do not. `nan`: two NaNs are equal."""
    if isinstance(wanted, tuple) and isinstance(found, tuple):
        if len(found) != len(wanted):
            return f"{len(found)} values, wanted {len(wanted)}"
        texts = [difference(*pair, tolerance, nan) for pair in zip(found, wanted)]
        return next((f"at [{number}]: {text}" for number, text in enumerate(texts) if text), "")
    if not isinstance(wanted, torch.Tensor) or not isinstance(found, torch.Tensor):
        return _difference_of_plain(found, wanted, tolerance, nan)
    if found.shape != wanted.shape:
        return f"shape {list(found.shape)}, wanted {list(wanted.shape)}"
    if found.dtype != wanted.dtype:
        return f"{found.dtype}, wanted {wanted.dtype}"
    if not found.numel():
        return ""
    first, second = found.double(), wanted.double()
    finite = second[second.isfinite()].abs()
    scale = finite.max().item() if finite.numel() else 0.0
    near = torch.isclose(first, second, rtol=0, atol=tolerance * max(scale, 1e-6), equal_nan=nan)
    if near.all():
        return ""
    gap = (first - second).abs().nan_to_num(float("inf"), float("inf")).masked_fill(near, -1)
    place = [int(i) for i in torch.unravel_index(gap.argmax(), gap.shape)]
    where = f"at {place}: " if place else ""
    return f"{where}{shown(found[tuple(place)])}, wanted {shown(wanted[tuple(place)])}"


def _difference_of_plain(found: object, wanted: object, tolerance: float, nan: bool) -> str:
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (found, wanted))
    if numbers:
        same = found == wanted or abs(found - wanted) <= tolerance * max(abs(wanted), 1e-6)
        same = same or (nan and found != found and wanted != wanted)
    else:
        same = type(found) is type(wanted) and not isinstance(found, torch.Tensor) and found == wanted
    return "" if same else f"{shown(found)}, wanted {shown(wanted)}"


def shown(value: object) -> str:
    """Show a value in a few words."""
    if isinstance(value, torch.Tensor) and value.dim() == 0:
        value = value.item()
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return f"{value!r:.70}"


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
            return judge_answers(exercise, text, ROOT / "runs")
        attempt = read_attempt(exercise, text)
        if exercise.kind == "puzzle":
            refuse_unless_puzzle(exercise, attempt)
    except (Wrong, NotYet) as error:
        return False, [str(error)]
    printed = Listener()
    outcome = observe(exercise, attempt, printed)
    said = [f"Your functions printed:\n{textwrap.indent(printed.getvalue().rstrip(), '  ')}"] * bool(printed.tell())
    if outcome.passed:
        return True, said
    untouched = isinstance(outcome.error, NotImplementedError) and str(outcome.error) == YOUR_TURN
    sentences = [] if untouched else diagnosed(exercise, outcome)[:1]
    return False, [explained(exercise, outcome, text), *sentences, *said]


def explained(exercise: Exercise, outcome: Outcome, text: str) -> str:
    """Name the first wrong case with its values, or the exception with the student's own line."""
    if wrong := outcome.wrong:
        return f"Not yet right: {wrong.what}.\n  Found {difference(wrong.found, wrong.wanted, wrong.tolerance)}."
    error = outcome.error
    if error is None:
        return "Nothing was compared."
    if isinstance(error, NotImplementedError) and str(error) == YOUR_TURN:
        return f'{exercise.name} still has to be written: replace `raise NotImplementedError("{YOUR_TURN}")`.'
    lines = [line.strip() for line in text.split("\n")]
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame.line for frame in frames if "with your functions" in frame.filename and frame.line in lines]
    place = f"\n  Line {lines.index(own[-1]) + 1} of your file: {own[-1]}" if own else ""
    message = str(error).strip().partition("\n")[0][:200]
    where = f" after {len(outcome.cases)} right results" if outcome.cases else ""
    return f"Your code stops{where} with {type(error).__name__}{': ' if message else ''}{message}{place}"


def diagnosed(exercise: Exercise, outcome: Outcome) -> list[str]:
    """Sentences of all near misses that behave as an attempt did."""
    sentences = []
    for sentence, edit in exercise.near_misses:
        if sentence not in sentences and alike(outcome, observe(exercise, Attempt(edited(exercise, edit)))):
            sentences.append(sentence)
    return sentences


def judge_answers(exercise: Exercise, text: str, runs: Path) -> tuple[bool, list[str]]:
    """Hold the answers of a prediction against the truths, which are measured now. Raises Wrong, NotYet."""
    answers: dict[str, object] = {}
    try:
        exec(compile(parsed(text), "your file", "exec"), answers)
    except Exception as error:
        raise Wrong(f"Your file stops with {type(error).__name__}: {error}") from None
    if missing := [name for name in exercise.questions if answers.get(name) is None]:
        raise Wrong(f"Answer every question first; still None: {', '.join(missing)}.")
    lines, passed = [], True
    for name, truth, tolerance in stream(exercise.cases, Attempt({}), runs):
        right, sentence = judge_answer(exercise, name, answers[name], truth, tolerance)
        passed &= right
        about = "right" if right else "not this time"
        lines.append(f"{name}: {about}. You: {shown(answers[name])}. Measured: {shown(truth)}. {sentence}".rstrip())
    return passed, lines


def judge_answer(exercise: Exercise, name: str, answer: object, truth: object, tolerance) -> tuple[bool, str]:
    """Judge one answer -> whether it is right, and the sentence of the near miss next to it."""
    if isinstance(truth, str):
        return str(answer).strip().lower() == truth.lower(), _sentence_for(exercise, name, answer)
    if isinstance(answer, bool) or not isinstance(answer, (int, float)):
        raise Wrong(f"{name}: a number is wanted, not {shown(answer)}.")
    right = abs(answer - truth) <= tolerance
    return right, "" if right else _sentence_for(exercise, name, answer)


def _sentence_for(exercise: Exercise, name: str, answer: object) -> str:
    for sentence, (question, value) in exercise.near_misses:
        if isinstance(value, str) or isinstance(answer, str):
            same = str(value).lower() == str(answer).strip().lower()
        else:
            same = abs(answer - value) <= 0.03 * abs(value)
        if question == name and same:
            return sentence
    return ""
