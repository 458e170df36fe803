"""The exercises: every check finds its near misses, and what a student may do to a check does not pass it."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parents[1] / "exercises"
sys.path.insert(0, str(HERE))

import mechanics  # noqa: E402
from audit import audit  # noqa: E402

spec = importlib.util.spec_from_file_location("exercises_main", HERE / "__main__.py")
main = importlib.util.module_from_spec(spec)
spec.loader.exec_module(main)
EXERCISES = mechanics.all_exercises()
ADAPTER = EXERCISES["adapter"]


@pytest.fixture(autouse=True)
def the_modules_of_other_tests():
    """A check loads the five modules anew. Other tests go on with theirs."""
    before = {name: sys.modules[name] for name in mechanics.MODULES if name in sys.modules}
    yield
    for name in mechanics.MODULES:
        sys.modules.pop(name, None)
    sys.modules.update(before)


@pytest.mark.parametrize("name", EXERCISES)
def test_audit(name):
    """The project's functions pass; every near miss is caught by a value and told apart; stated numbers are true."""
    assert audit(EXERCISES[name]).problems == []


def test_there_are_enough_of_them():
    kinds = [exercise.kind for exercise in EXERCISES.values()]
    for kind, least in (("rebuild", 10), ("puzzle", 5), ("predict", 5), ("bug", 4), ("ablate", 2)):
        assert kinds.count(kind) >= least
    assert len(kinds) >= 28
    assert sum(len(exercise.near_misses) for exercise in EXERCISES.values()) >= 120


def test_paths_name_exercises_and_the_readme_their_minutes():
    readme = (HERE / "README.md").read_text("utf-8")
    assert f"{len(EXERCISES)} exercises" in readme
    for path, names in main.PATHS.items():
        assert [name for name in names.split() if name not in EXERCISES] == []
        assert f"`{path}` ({sum(EXERCISES[name].minutes for name in names.split())} minutes)" in readme


def test_the_example_of_the_readme():
    example = (HERE / "README.md").read_text("utf-8").split("```python\n")[1].split("```")[0]
    names = {"exercise": mechanics.exercise}
    exec(example, names)
    mechanics.REGISTRY.pop("cut-ids")
    assert audit(names["cut_ids"]).problems == []


@pytest.mark.parametrize("module", mechanics.MODULES)
def test_cut_and_put_back_is_the_same_text(module):
    text, paths = mechanics.source(module), []

    def collect(node, path):
        for child in getattr(node, "body", ()):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                collect(child, [*path, child.name])
                if isinstance(child, ast.FunctionDef):
                    paths.append(".".join([*path, child.name]))

    collect(ast.parse(text), [])
    assert len(paths) > 20
    for path in paths:
        function = mechanics.cut(text, path)
        assert mechanics.put_back(text, path, function) == text
        blank = mechanics.cut(text, path, "raise NotImplementedError")
        ast.parse(f"if True:\n{blank}" if blank.startswith(" ") else blank)
        assert blank.split("\n")[0] == function.split("\n")[0] and blank.endswith("raise NotImplementedError")


def test_a_renamed_variable_makes_its_edits_stale_and_is_named(monkeypatch):
    source = mechanics.source
    monkeypatch.setattr(mechanics, "source", lambda module: source(module).replace("hidden", "inner"))
    problems = audit(ADAPTER).problems
    assert problems and all("stale edit" in problem and "hidden" in problem for problem in problems)


# ------------------------------------------------------------------------- what a student may do to a check

SIGNATURE = "class Adapter:\n    def __call__(self, u):\n"
RIGHT = SIGNATURE + (
    "        x = u.reshape(len(self.down), -1, u.shape[-1])\n"
    "        return (F.gelu(x @ self.down + self.down_bias, approximate='tanh') @ self.up + self.up_bias).view_as(u)\n"
)


def body(text: str) -> str:
    """A file whose adapter has this body."""
    return SIGNATURE + f"        {text}\n"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (body("return ("), "Python cannot read your file: '(' was never closed (your file, line 3)\n  return ("),
        ("class Adapter:", "Python cannot read your file"),
        ("return '\0'", "Python cannot read your file"),
        ("def other():\n    return 1\n", "The function Adapter.__call__ is missing in your file."),
        ("", "The function Adapter.__call__ is missing"),
        (body("raise SystemExit(0)"), "Your code stops with SystemExit"),
        (RIGHT.replace("x = u", "x = u if len(self.down) == 4 else exit(0)"), "Your code stops with SystemExit"),
        (body("return u.no_such_thing"), "Line 3 of your file: return u.no_such_thing"),
        (body("return u"), "Not yet right: adapters of 4 tasks for four rows."),
        (body("return 1.0"), "Found 1, wanted a tensor [4, 5, 6] of float32"),
        (body("pass"), "Found None, wanted a tensor"),
        (body("print('y' * 10**7); return u"), "Not yet right"),
        (RIGHT.replace("+ self.up_bias", "+ self.up_bias + x"), "The block has that residual already."),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(text, sentence):
    right, said = mechanics.judge(ADAPTER, text)
    assert not right and sentence in said and len(said) < 3000


@pytest.mark.parametrize(
    ("lines", "refused"),
    [
        ("return sum([attention_mask])", "not sum"),
        ("for b in attention_mask:\n        return b", "not For"),
        ("return [b for b in attention_mask]", "not comprehension"),
        ("return float(attention_mask)\ndef float(mask):\n    return mask", "not FunctionDef"),
    ],
)
def test_a_puzzle_refuses(lines, refused):
    text = f"def padding_bias(attention_mask):\n    {lines}\n"
    assert refused in mechanics.judge(EXERCISES["hide-padding"], text)[1]


@pytest.mark.parametrize(
    ("answers", "right", "sentence"),
    [
        ("spread = 1\ndivided = largest = 1 / 8", True, "divided: right. You: 0.125. Measured: 0.124"),
        ("spread = 64\ndivided = largest = 1 / 8", False, "spread: not this time. You: 64."),
        ("spread = 64\ndivided = largest = 1 / 8", False, "64 is k: the variance"),
        ("spread = 1\ndivided = largest = 'a'", False, "You: 'a'"),
        ("spread = 1\ndivided = None", False, "Answer every question first; still None: divided, largest."),
        ("spread = sqrt(64)", False, "Your code stops with NameError: name 'sqrt' is not defined"),
    ],
)
def test_answers_are_compared_with_what_is_measured(answers, right, sentence):
    found, said = mechanics.judge(EXERCISES["unscaled"], answers)
    assert found == right and sentence in said


@pytest.mark.parametrize(
    "text",
    [
        RIGHT,
        RIGHT.replace("    ", "\t"),
        "import math\n\n" + RIGHT.replace("F.gelu(", "smooth(").replace(", approximate='tanh'", "") + """
def smooth(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
""",
        RIGHT.replace("return", "# return u\n        return") + "print(Adapter)\n",
    ],
    ids=["plain", "tabs", "helper and import", "comment, and a line outside of functions"],
)
def test_other_ways_of_writing_pass(text):
    assert mechanics.judge(ADAPTER, text) == (True, "")


@pytest.mark.parametrize(
    ("text", "right", "sentence"),
    [
        (body("import os; os._exit(0)"), False, "ended the whole program (status 0)"),
        (body("import os; os._exit(42)"), False, "ended the whole program (status 42)"),
        ("import atexit, os\natexit.register(os._exit, 42)\n" + body("raise SystemExit(0)"), False, "SystemExit"),
        (RIGHT.replace("\n", "\r\n"), True, ""),
    ],
    ids=["_exit", "_exit with the status of success", "exit", "Windows line ends"],
)
def test_a_check_runs_in_a_process_of_its_own(tmp_path, text, right, sentence):
    path = tmp_path / "adapter.py"
    path.write_bytes(("\ufeff" + text).encode())
    found, said = main.judged(ADAPTER, path)
    assert found == right and sentence in said


def test_a_loop_without_an_end_that_prints_without_an_end(tmp_path):
    path = tmp_path / "adapter.py"
    text = body("import time\n        while True:\n            print('x' * 10**4, time.sleep(0.001))")
    path.write_text(text, "utf-8")
    assert main.judged(ADAPTER, path, limit=6) == (
        False, "No result after 6 seconds. Does a loop in your code never end?"
    )  # fmt: skip


def test_a_student_goes_from_start_to_done(tmp_path, monkeypatch, capsys):
    for module in (mechanics, main):
        monkeypatch.setattr(module, "MINE", tmp_path / "mine")
    main.main("start", "adapter")
    with pytest.raises(SystemExit, match="is there already"):
        main.main("start", "adapter")
    monkeypatch.setattr(main, "judged", lambda exercise, path: mechanics.judge(exercise, path.read_text("utf-8")))
    with pytest.raises(SystemExit, match="1"):
        main.main("check", "adapter")
    assert "Your turn" in capsys.readouterr().out
    monkeypatch.setattr(main, "judged", lambda exercise, path: (True, ""))
    main.main("check", "adapter")
    main.main("path", "half-day")
    assert "[x] adapter" in capsys.readouterr().out
    for words in (["hint"], ["hint", "nothing"], ["path", "week"], ["nonsense"]):
        with pytest.raises(SystemExit):
            main.main(*words)
