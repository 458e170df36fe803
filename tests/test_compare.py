"""`train.py compare`: rows that train, results that are kept, tables and pictures made of them."""

import json
import re
import shlex
import shutil
import subprocess
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest
import torch

import train
from data import TkInstructFormat, load_tasks, load_tokenizer, toy_world, vague, write_toy_world
from hint import load_model

SHORT = "--steps 2 --batch-size 4 --dropout 0 --precision fp32 --bottleneck 3 --prefix-length 2".split()
ROWS = ["hint", "tk-instruct", "hyperformer++", "hint-caclm"]  # one that starts from a row, one from pretraining


@pytest.fixture
def toy(monkeypatch):
    """A toy world of twenty tasks, two steps a row, and one small table."""
    make_small(monkeypatch)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """What that table leaves behind."""
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        out = tmp_path_factory.mktemp("compare")
        train.main(["compare", "main", "shots", "--out", str(out), "--seeds", "5", "--jobs", "2"])
    return out


def make_small(patch):
    more = "--max-instruction 64 --max-input 96 --max-target 8 --eval-every 1 --max-instances 2".split()
    patch.setattr(train, "TOY_WORDS", {"finetune": SHORT + more, "pretrain": [*SHORT, "--max-input", "16"]})
    patch.setattr(train, "TOY_FROZEN", ["--steps", "1"])
    patch.setattr(train, "TABLES", {"main": ROWS, "shots": ["hint", "tk-instruct", "hint-vague"]})
    patch.setattr(train, "SEEDS", {"main": [5], "shots": [5]})
    patch.setattr(train, "toy_world", lambda seed: shrunk(toy_world(seed, tasks=20, instances=2)))


def shrunk(world):
    """The same with four tasks in each of its tests."""
    return world._replace(
        unseen_arguments=world.unseen_arguments[:4], unseen_compositions=world.unseen_compositions[:4]
    )


def test_rows_are_commands_that_start_from_one_another(compared, toy):
    for name in [*ROWS, "hint-caclm-text"]:
        first, *_ = Path(compared, name, "seed-5.log").read_text().splitlines()
        words = shlex.split(first)[3:]
        assert words[words.index("--seed") + 1] == "5" and "--resume" in words
    notes = {name: json.loads(Path(compared, name, "seed-5", "config.json").read_text())["run"] for name in ROWS}
    starts = {name: run["start"] for name, run in notes.items()}
    assert starts["hint"] is None and starts["hyperformer++"].endswith("tk-instruct/seed-5")
    assert starts["hint-caclm"].endswith("hint-caclm-text/seed-5")
    assert load_model(compared / "hyperformer++" / "seed-5").config.tasks == 20
    said = {
        world: {task.definition for task in load_tasks(compared / world, "train")} for world in ("world-5", "vague-5")
    }
    assert said["vague-5"] == {task.definition for task in vague(train.toy_world(5)).train} != said["world-5"]


def test_a_finished_row_is_not_trained_again(compared, toy, capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a row is trained again"))
    names = ("main.md", "shots.md", "cost.md", "learning-curves.svg", "score-and-compute.svg")
    texts = {name: (compared / name).read_text() for name in names}
    for name in names:
        (compared / name).unlink()
    train.main(["compare", "main", "shots", "--out", str(compared)])
    assert {name: (compared / name).read_text() for name in names} == texts
    text = texts["main.md"]
    assert text in capsys.readouterr().out
    assert "unseen arguments | unseen compositions" in text
    assert [line.split(" | ")[0] for line in text.splitlines()[2:]] == [f"| {name}" for name in ROWS]
    monkeypatch.setattr(train, "TOY_FROZEN", ["--steps", "2"])
    with pytest.raises(SystemExit, match="is of a row with other options"):
        train.main(["compare", "main", "--out", str(compared)])


def test_a_row_s_result_is_what_its_files_say(compared):
    place = compared / "tk-instruct" / "seed-5"
    result = json.loads((place / "result.json").read_text())
    metrics = json.loads((place / "metrics.json").read_text())
    assert result["scores"]["overall"] == metrics["overall"]
    for group in ("unseen arguments", "unseen compositions"):
        of_tasks = [row["rougeL"] for name, row in metrics.items() if name.startswith(group.replace(" ", "-"))]
        assert len(of_tasks) == 4 and result["scores"][group]["rougeL"] == pytest.approx(sum(of_tasks) / 4)
    assert [step for step, _ in result["curve"]] == [1]
    assert result["trained"] == sum(part.numel() for part in load_model(place).parameters())
    hint = json.loads((compared / "hint" / "seed-5" / "result.json").read_text())
    assert result["flops_once"] == 0 < hint["flops_once"] and result["flops_each"] > 2 * hint["flops_each"]


def test_costs_are_told_at_the_median_lengths_of_the_training_tasks(compared):
    text = (compared / "cost.md").read_text()
    tasks, tokenizer = load_tasks(compared / "world-5", "train", 2), load_tokenizer(compared / "world-5")

    def median(texts) -> int:
        return sorted(len(tokenizer.encode(text).ids) for text in texts)[len(tasks)]  # two instances of each

    instances = [(task, instance) for task in tasks for instance in task.instances]
    t, i = median(task.definition for task, _ in instances), median(one.input for _, one in instances)
    o = median(one.references[0] for _, one in instances)
    whole = median("".join(TkInstructFormat(tokenizer).prompt(task, one)) for task, one in instances)
    assert text.startswith(f"Median tokens: instruction {t}, input {i}, answer {o}; all in one input {whole}.\n")
    found = {row.split(" | ")[0]: row.split(" | ")[1:] for row in text.splitlines() if row.startswith("| ")}
    for name in ("| hint", "| tk-instruct", "| no-instruct"):
        formula, exact = (float(cell.strip(" |")) for cell in found[name])
        assert 0.5 < exact / formula < 2, "the two count different things, but not so different"


def test_a_row_that_fails_is_named(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "TABLES", {"main": ROWS[1:3]})
    monkeypatch.setattr(train, "TOY_FROZEN", ["--steps", "0"])
    with pytest.raises(SystemExit, match=r"hyperformer\+\+/seed-0.log: ended with status"):
        train.main(["compare", "main", "--out", str(tmp_path), "--seeds", "0"])
    assert "must be a number of at least 1" in (tmp_path / "hyperformer++" / "seed-0.log").read_text()
    assert (tmp_path / "tk-instruct" / "seed-0" / "result.json").exists() and not (tmp_path / "main.md").exists()


def test_rows_that_run_are_stopped_with_the_comparison(toy, tmp_path, monkeypatch):
    started = []

    class Noted(subprocess.Popen):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            started.append(self)

    def interrupt(_):
        raise train.Stopped(2)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    monkeypatch.setattr(train.time, "sleep", interrupt)
    with pytest.raises(SystemExit) as end:
        train.main(["compare", "main", "--out", str(tmp_path), "--seeds", "0", "--jobs", "2"])
    assert end.value.code == 130 and len(started) == 2
    assert all(process.returncode not in (None, 0) for process in started), "none runs on, none has finished"


def test_what_cannot_be_compared_is_refused_in_one_sentence(tmp_path):
    for words, message in (
        (["tables"], "no table is called tables"),
        (["pretraining", "--data", "x", "--size", "toy"], "--corpus"),
        (["main", "--data", str(tmp_path), "--jobs", "1", "--size", "toy"], "ended with status"),
        (["main", "--size", "toy"], "are for --data"),
        (["vague", "--data", "x", "--size", "toy"], "is a table of the toy world"),
        (["main", "--data", "x"], "needs --start or --size"),
    ):
        with pytest.raises(SystemExit, match=message):
            train.main(["compare", *words[:1], "--out", str(tmp_path / "out"), "--seeds", "0", *words[1:]])


def test_words_that_a_row_does_not_know_are_refused_before_any_row_is_trained(tmp_path, capsys):
    """`pretrain` has no --max-target, but the rows that stand before it in the table have."""
    words = ["--data", "x", "--size", "toy", "--corpus", "y", "--words", "--max-target", "9"]
    with pytest.raises(SystemExit) as end:
        train.main(["compare", "pretraining", "--out", str(tmp_path), *words])
    assert end.value.code == 2 and "--max-target" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_results_become_cells_and_points():
    """Two seeds of one row: means over both, costs of the first, and the end of the training as the last point."""
    found = [
        {"scores": {"overall": {"exact_match": e, "rougeL": 50.0}, "unseen arguments": {"exact_match": e + 1}},
         "curve": [[1, c], [2, c + 2]], "steps": 3, "trained": 1234, "flops_once": 5 * 10**9, "flops_each": 10**9,
         "seconds": s} for e, c, s in ((40.0, 10.0, 7), (60.0, 30.0, 9))
    ]  # fmt: skip
    assert train.curve(found) == [(1, 20), (2, 22), (3, 50)]
    assert train.scores_by_flops({"hint": found, "hint-1": found[:1], "tk-instruct": found[1:]}) == {
        "hint": [(105, 50), (105, 40)],
        "tk-instruct": [(105, 60)],
    }
    head, _, row = train.table_text({"hint": found}).splitlines()
    cells = dict(zip(head.strip("| ").split(" | "), row.strip("| ").split(" | "), strict=True))
    assert cells == {
        "row": "hint", "unseen arguments": "51.0 (41.0 to 61.0)", "ROUGE-L": "50.0 (50.0 to 50.0)",
        "at step 1": "20.0 (10.0 to 30.0)", "at step 2": "22.0 (12.0 to 32.0)", "numbers trained": "1,234",
        "GFLOP for 100 inputs": "105", "seconds": "8",
    }  # fmt: skip


def test_an_answer_may_hold_any_letter(compared, tmp_path):
    """U+2028 ends a line for Python's `splitlines`, not in JSON."""
    copy = tmp_path / "copy"
    shutil.copytree(compared / "hint" / "seed-5", copy)
    path = copy / "predictions.jsonl"
    path.write_text(path.read_text().replace('"prediction": "', '"prediction": "\u2028', 1))
    assert train.result_of(copy, toy=True)["curve"] == train.result_of(compared / "hint" / "seed-5", toy=True)["curve"]


def test_every_row_of_every_table_is_a_command_line_that_can_be_read(tmp_path):
    """Each row's words are options that exist; a row starts from another that stands before it."""
    for data in (None, "natural-instructions"):
        given = [
            "compare",
            *["--out", str(tmp_path)],
            *(["--data", data, "--corpus", "c4.json.gz", "--start", "t5", "--words", "--steps", "7"] if data else []),
        ]
        arguments = train.parser().parse_args(given)
        names = [name for table in train.TABLES.values() for name in table]
        rows = train.Rows(arguments)
        ordered = rows.with_starts(names)
        assert set(names) <= set(ordered) and len(ordered) == len(set(ordered))
        for name in ordered:
            parsed = train.parser().parse_args(rows.words(name, 3))
            before = rows.start(name)
            assert parsed.seed == 3 and (not before or before in ordered[: ordered.index(name)])
            assert parsed.start == (str(tmp_path / before / "seed-3") if before else data and "t5")
            assert data is None or parsed.steps == 7
            if parsed.command == "finetune":
                assert parsed.data == (data or str(tmp_path / ("vague-3" if "vague" in name else "world-3")))


def test_a_toy_world_on_disk_is_the_one_in_memory(tmp_path):
    world = shrunk(toy_world(1, tasks=5, instances=3))
    write_toy_world(tmp_path, world)
    assert load_tasks(tmp_path, "train") == world.train
    assert load_tasks(tmp_path, "test") == world.unseen_arguments + world.unseen_compositions
    tokenizer = load_tokenizer(tmp_path)
    source = train.PretrainingChunks([tmp_path / "corpus.json.gz"] * 30, tokenizer, 32, seed=0)
    text = tokenizer.decode([i for example in source.take(20) for part in example for i in part])
    assert "Input" in text and "<unk>" not in text


def test_in_a_vague_world_the_argument_is_told_by_the_examples_alone():
    world = toy_world(2, tasks=60, instances=3)
    told, left_out = world.train + world.unseen_arguments, vague(world).train + vague(world).unseen_arguments
    for clear, unclear in zip(told, left_out, strict=True):
        argument = world.rules[clear.name].argument
        assert (clear.instances, clear.examples) == (unclear.instances, unclear.examples)
        assert unclear.definition == (clear.definition.replace(argument, "what") if argument else clear.definition)
        assert all(argument in example.output.split() for example in unclear.examples if argument)
    assert sum(clear != unclear for clear, unclear in zip(told, left_out)) > len(told) / 2


def test_means_come_with_the_lowest_and_the_highest():
    assert train.spread_of([1.0, 3.0, 8.0]) == "4.0 (1.0 to 8.0)" and train.spread_of([2.5]) == "2.5"


def test_pictures_are_svg_with_a_line_and_its_points_for_each_name(tmp_path):
    """Higher values stand higher, and nothing is drawn outside of the picture."""
    train.draw(tmp_path / "x.svg", {"a": [(0, 1), (10, 4)], "b": [(5, 2)]}, "steps", "score")
    root = xml.parse(tmp_path / "x.svg").getroot()
    space = {"": "http://www.w3.org/2000/svg"}
    circles = [(float(c.get("cx")), float(c.get("cy"))) for c in root.findall("circle", space)]
    assert len(circles) == 3 and circles[1][1] < circles[2][1] < circles[0][1] and circles[0][0] < circles[2][0]
    _, _, width, height = map(float, root.get("viewBox").split())
    assert all(0 <= x <= width and 0 <= y <= height for x, y in circles)
    texts = [text.text for text in root.findall("text", space)]
    assert {"a", "b", "steps", "score"} <= set(texts) and "prefers-color-scheme:dark" in root.find("style", space).text


def test_times_are_of_the_same_inputs_with_and_without_their_instruction(monkeypatch):
    """Seconds are not asserted; that each side reads what it should is."""
    seen = []
    monkeypatch.setattr(
        train.T5, "encode", lambda self, ids, *more: seen.append(tuple(ids.shape)) or encode(self, ids, *more)
    )
    monkeypatch.setattr(train, "HINTConfig", lambda: train.DEMO_HINT)
    torch.manual_seed(0)
    text, lines = train.answering_times("toy", lengths=(3,))
    assert seen[:3] == [(1, 4), (100, 100), (100, 103)] and len(seen) == 9
    assert [name for name in lines] == ["hint", "tk-instruct"] and lines["hint"][0][0] == 3
    assert re.search(r"\| 3 \| [\d.]+ s \| [\d.]+ s \| [\d.]+ \|", text)


encode = train.T5.encode


def test_ticks_are_few_round_and_reach_the_highest_value():
    assert train.ticks(100) == [0, 20, 40, 60, 80, 100] and train.ticks(2000) == [0, 500, 1000, 1500, 2000]
    assert train.ticks(0.37) == [0, 0.1, 0.2, 0.3, 0.4] and train.ticks(0) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    for highest in (0.011, 1.9, 6.1, 99.9, 1001):
        found = train.ticks(highest)
        assert 3 <= len(found) <= 7 and found[-2] < highest <= found[-1]
