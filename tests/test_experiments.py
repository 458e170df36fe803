"""`experiments/`: rows that train, results that are kept, tables and figures made of them, costs."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))

import costs
import report
import tables
import toy_settings
import train
from data import load_tasks, load_tokenizer, toy_world
from hint import count_flops, exact_flops, generator_flops, load_model, on_meta
from t5 import SIZES, T5

SMALL = {"main": ["tk-instruct", "hint-caclm"], "shots": ["tk-instruct"]}  # the second starts from a third, `pretrain`


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(tables, "TABLES", SMALL)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder of the rows of two small tables."""
    out = tmp_path_factory.mktemp("tables")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "TABLES", SMALL)
        tables.main(["main", "shots", "--smoke", "--out", str(out), "--seeds", "5"])
    return out


def result_of(made, name):
    return json.loads((made / name / "seed-5" / "result.json").read_text())


def test_rows_are_commands_that_start_from_one_another(made):
    for name, start in (("tk-instruct", None), ("hint-caclm-text", None), ("hint-caclm", "hint-caclm-text")):
        words = shlex.split((made / name / "seed-5.log").read_text().splitlines()[0])
        assert words[:2] == ["python", "train.py"] and train.settings_of(words[2:]).seed == 5
        run = json.loads((made / name / "seed-5" / "config.json").read_text())["run"]
        assert run["start"] == (start and str(made / start / "seed-5"))
    config = load_model(made / "hint-caclm" / "seed-5").config
    assert (config.bottleneck, config.prefix_length) == (4, 4)


def test_a_finished_row_is_not_trained_again(made, small, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a row is trained again"))
    names = ("main.md", "shots.md", "learning-curves.svg", "score-and-compute.svg")
    before = {name: (made / name).read_text() for name in names}
    for name in names:
        (made / name).unlink()
    command = ["main", "shots", "--smoke", "--out", str(made), "--seeds", "5"]
    tables.main(command)
    assert {name: (made / name).read_text() for name in names} == before
    head, _, *lines = before["main.md"].splitlines()
    assert shlex.join(command) in head and torch.__version__ in head and "cores" in head
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| tk-instruct", "| hint-caclm"]
    monkeypatch.setitem(tables.SMOKE_WORDS, "finetune", "--steps 3 --warmup 2 --batch-size 8")
    with pytest.raises(SystemExit, match="result.json"):
        tables.main(command)


def test_a_result_is_what_the_files_of_its_run_say(made):
    place, result = made / "tk-instruct" / "seed-5", result_of(made, "tk-instruct")
    metrics = json.loads((place / "metrics.json").read_text())
    assert result["scores"]["overall"] == metrics["overall"]
    for group in ("unseen arguments", "unseen compositions"):
        of_tasks = [row["rougeL"] for name, row in metrics.items() if name.startswith(group.replace(" ", "-"))]
        assert len(of_tasks) == 4 and result["scores"][group]["rougeL"] == pytest.approx(sum(of_tasks) / 4)
    assert [step for step, _ in result["curve"]] == [2] and result["steps"] == 4
    assert result["trained"] == sum(weight.numel() for weight in load_model(place).parameters())


def test_scores_are_also_known_for_each_held_out_pair(made, tmp_path):
    result = result_of(made, "hint-caclm")
    pairs, whole = result["pairs"], result["scores"]["overall"]
    count = sum(pair["answers"] for pair in pairs.values())
    assert sum(pair["rougeL"] * pair["answers"] for pair in pairs.values()) / count == pytest.approx(whole["rougeL"])
    world = toy_world(3, tasks=1000, instances=1)
    tables.write_world(tmp_path, world, is_vague=True)
    pair_of = json.loads((tmp_path / "pairs.json").read_text())
    trained = [[slot.transformation for slot in world.rules[task.name].slots] for task in world.train]
    for task in world.unseen_compositions:
        assert pair_of[task.name].split(", ") not in trained
        assert pair_of[task.name].split(", ") == [slot.transformation for slot in world.rules[task.name].slots]
    for task, told in zip(world.unseen_arguments, load_tasks(tmp_path, "test")):
        argument = world.rules[task.name].argument
        assert pair_of[task.name].startswith(f"{argument} + ") and argument not in told.definition.split()
        assert told.examples == task.examples and all(argument in example.output for example in told.examples)


def test_costs_of_a_row_are_those_that_torch_counts_on_the_meta_device(made):
    place, result = made / "hint-caclm" / "seed-5", result_of(made, "hint-caclm")
    model, tokenizer = load_model(place), load_tokenizer(place)
    tasks = load_tasks(made / "small-world-5", "train", 4)[::2]
    lengths = [len(tokenizer.encode(task.definition).ids) for task in tasks]
    meta = on_meta(model.t5.config, model.config)
    once = [exact_flops(meta, 1, 1, t, 1)[0] for t in lengths]
    assert result["flops_once"] == sum(once) // len(once)
    assert generator_flops(meta, 9) < exact_flops(meta, 1, 1, 9, 1)[0]
    assert result["flops_each"] < result_of(made, "tk-instruct")["flops_each"]
    task, inputs = model.encode_instruction(torch.ones(1, 7, dtype=torch.long)), torch.ones(3, 5, dtype=torch.long)
    for o in (1, 6):
        answers = torch.ones(3, o, dtype=torch.long)
        counted = count_flops(lambda: model.t5.loss(answers, model.fuse(task, inputs), task.modules))
        assert counted == exact_flops(meta, 3, 5, 7, o)[1]


def test_hint_keeps_less_than_a_decoder_where_the_instruction_is_long():
    model, t5 = on_meta(SIZES["toy"], costs.HINTConfig()), SIZES["toy"]
    _, shortest = costs.smaller_cache_from(t5, costs.HINTConfig(), L=40)
    decoder = costs.decoder_cache_numbers(40, t5.num_heads, t5.d_kv, s=1)
    assert costs.kept_numbers(model, shortest) < decoder * shortest
    assert costs.kept_numbers(model, shortest - 1) >= decoder * (shortest - 1)
    kept = model.encode_instruction(torch.ones(1, 3, dtype=torch.long))
    assert costs.generated_numbers(model) == costs.kept_numbers(model, 3) - kept.states.numel() - 3
    assert costs.cost_text("toy", lengths=(7,)).count("\n| 7 | ") == 1


def test_a_row_that_fails_is_named(tmp_path, monkeypatch):
    words = ["main", "--data", str(tmp_path), "--size", "toy", "--tokenizer", "t", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(tables, "TABLES", {"main": ["hint"]})
    with pytest.raises(SystemExit, match="hint/seed-4.log"):
        tables.main([*words, "--seeds", "4"])
    log = (tmp_path / "out" / "hint" / "seed-4.log").read_text()
    assert str(tmp_path) in log.splitlines()[-1] and not (tmp_path / "out" / "main.md").exists()


def test_rows_stop_with_the_command(tmp_path, small, monkeypatch, capsys):
    started = []

    class Noted(subprocess.Popen):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            started.append(self)

    def interrupt(_):
        raise train.Stopped(signal.SIGTERM, "stopped")

    monkeypatch.setattr(subprocess, "Popen", Noted)
    monkeypatch.setattr(tables.time, "sleep", interrupt)
    with pytest.raises(SystemExit) as end:
        tables.main(["main", "--smoke", "--out", str(tmp_path), "--jobs", "2"])
    assert end.value.code == 128 + signal.SIGTERM and "same command" in capsys.readouterr().err
    assert len(started) == 2 and all(process.returncode not in (None, 0) for process in started)


def test_rows_stop_when_the_command_is_killed(tmp_path):
    """The row has 100,000 steps. It writes a checkpoint and gives its folder free."""
    code = (
        f"import sys; sys.path.insert(0, {str(EXPERIMENTS)!r}); import tables\n"
        "tables.SMOKE_WORDS['finetune'] += ' --steps 100000 --eval-every 0 --log-every 1'\n"
        f"tables.main(['main', '--smoke', '--jobs', '1', '--out', {str(tmp_path)!r}])"
    )
    command = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    run = tmp_path / "hint" / "seed-0"
    try:
        wait_until(lambda: (run / "log.jsonl").exists() or command.poll() is not None)
        assert command.poll() is None and not (run / "model.safetensors").exists()
    finally:
        command.kill()
        command.wait()
    wait_until(lambda: is_free(run / "lock"))
    assert (run / "model.safetensors").exists()


def wait_until(happened):
    for _ in range(600):
        if happened():
            return
        time.sleep(0.1)
    pytest.fail("nothing happened for a minute")


def is_free(lock) -> bool:
    with suppress(ValueError):
        return bool(train.locked(lock))
    return False


@pytest.mark.parametrize(
    "words, said",
    [
        ("tables", "tables"),
        ("pretraining --data x --start t5", "--corpus"),
        ("main --size toy", "--data"),
        ("vague --data x --start t5", "vague"),
        ("main --data x", "--start"),
        ("main --jobs 0", "--jobs"),
        ("pretraining --data x --start t5 --corpus y --words --max-target 9", "--max-target"),  # not of `pretrain`
    ],
)
def test_what_cannot_be_compared_is_refused_before_any_row_is_trained(words, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        tables.main([words.split()[0], "--out", str(tmp_path), *words.split()[1:]])
    message = capsys.readouterr().err + str(end.value)
    assert said in message and message.count("\n") <= 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", ["", "--smoke", "--data sni --corpus c4 --start t5 --words --precision bf16"])
def test_every_row_of_every_table_is_a_command_line_that_can_be_read(words):
    given = tables.parser().parse_args(["--out", "x", *words.split()])
    rows, names = tables.Rows(given), [name for table in tables.TABLES.values() for name in table]
    ordered = rows.with_starts(names)
    assert set(names) <= set(ordered) and len(ordered) == len(set(ordered))
    for name in ordered:
        settings = train.settings_of(rows.words(name, 3))
        before = rows.start(name)
        assert settings.resume and settings.seed == 3 and (not before or before in ordered[: ordered.index(name)])
        assert settings.start == (f"x/{before}/seed-3" if before else given.start)
        if settings.command == "finetune":
            small = "small-" if given.smoke else ""
            assert settings.data == (given.data or f"x/{small}{'vague' if 'vague' in name else 'world'}-3")


def test_results_become_cells_and_points():
    """Two seeds of one row: means over both, costs of the first, and the end of the training as the last point."""
    results = [
        {"scores": {"overall": {"exact_match": e, "rougeL": 50.0}, "unseen arguments": {"exact_match": e + 1}},
         "curve": [[1, c], [2, c + 2]], "steps": 3, "trained": 1234, "flops_once": 5 * 10**9, "flops_each": 10**9,
         "pairs": {"copy, kind": {"exact_match": e}, "pom + first": {"exact_match": 0.0}}, "seconds": s}
        for e, c, s in ((40.0, 10.0, 7), (60.0, 30.0, 9))
    ]  # fmt: skip
    assert tables.curve(results) == [(1, 20), (2, 22), (3, 50)]
    points = tables.scores_by_flops({"hint": results, "hint-1": results[:1], "tk-instruct": results[1:]})
    assert points == {"hint": [(105, 50), (105, 40)], "tk-instruct": [(105, 60)]}
    head, _, row, *_ = tables.table_text({"hint": results}).splitlines()
    cells = dict(zip(head.strip("| ").split(" | "), row.strip("| ").split(" | "), strict=True))
    assert cells == {
        "row": "hint", "unseen arguments": "51.0 ± 10.0", "pairs mostly wrong, of 1": "0.5 ± 0.5",
        "ROUGE-L": "50.0 ± 0.0", "at step 1": "20.0 ± 10.0", "at step 2": "22.0 ± 10.0",
        "numbers trained": "1,234", "GFLOP for 100 inputs": "105", "seconds": "8",
    }  # fmt: skip


def test_scores_come_with_their_standard_error_and_the_seeds_that_tell_rows_apart():
    assert tables.with_error([1.0, 3.0, 8.0]) == "4.0 ± 2.1" and tables.with_error([2.5]) == "2.5"
    ten = [96.5, 98.4, 100, 98.1, 100, 99.2, 96.9, 98.1, 99.2, 98.8]  # by hand: 2 (1.96 * 1.16 / k)^2
    rows = {"hint": [{"scores": {"overall": {"exact_match": value}}} for value in ten]}
    assert "11, 3, 2, 1 seeds" in tables.seeds_needed(rows)


def test_pictures_are_svg_with_a_line_and_its_points_for_each_name(tmp_path):
    """Higher values stand higher, and nothing is drawn outside of the picture."""
    report.draw(tmp_path / "x.svg", {"a": [(0, 1), (10, 4)], "b": [(5, 2)]}, "steps", "score", "`x --out <y>`")
    root, space = xml.parse(tmp_path / "x.svg").getroot(), {"": "http://www.w3.org/2000/svg"}
    circles = [(float(circle.get("cx")), float(circle.get("cy"))) for circle in root.findall("circle", space)]
    assert len(circles) == 3 and circles[1][1] < circles[2][1] < circles[0][1] and circles[0][0] < circles[2][0]
    assert all(0 <= x <= 720 and 0 <= y <= 360 for x, y in circles)
    assert {"a", "b", "steps", "score"} <= {text.text for text in root.findall("text", space)}
    assert root.find("desc", space).text == "`x --out <y>`"
    for highest in (0, 0.011, 0.37, 1.9, 6.1, 99.9, 1001):
        marks = report.ticks(highest)
        assert 3 <= len(marks) <= 7 and marks[-2] <= highest <= marks[-1] or highest == 0


def test_times_are_of_the_same_inputs_with_and_without_their_instruction(monkeypatch):
    """Seconds are not asserted; that each side reads what it should is."""
    read, seen = T5.read, []
    monkeypatch.setattr(T5, "read", lambda self, ids, *more: seen.append(tuple(ids.shape)) or read(self, ids, *more))
    times = costs.answering_times("toy", (3,), new_tokens=2)
    assert seen == [(1, 3), *[(25, 100)] * 4, *[(25, 103)] * 4] * 3
    assert [line["tokens of instruction"] for line in costs.time_lines(times)] == ["3"]


def test_the_demo_can_be_trained_with_every_setting():
    demo = train.settings_of(["demo"])
    for changes in toy_settings.SETTINGS.values():
        replace(SIZES["toy"], **changes.get("t5", {}))
        replace(demo, **{name: value for name, value in changes.items() if name not in ("t5", "world")})
    small = dict(t5=dict(num_layers=2), world=dict(tasks=20, instances=2), steps=2, warmup=1, max_new_tokens=1)
    assert [0 <= score <= 100 for score in toy_settings.run_setting(0, **small)] == [True, True]


@pytest.mark.skipif(sys.platform != "linux", reason="reads what a process ever held as Linux counts it")
@pytest.mark.parametrize("words", [
    "--size tiny --microbatch 4096 --system hint",
    "--size tiny --microbatch 8192 --system tk-instruct",
    pytest.param("--size small --microbatch 600 --gradient-checkpointing", marks=pytest.mark.long),
])  # fmt: skip
def test_the_counted_memory_of_a_step_is_within_15_percent_of_what_a_process_takes(words):
    """Half a GB and more, so that the few MB that torch itself takes at its first product do not matter."""
    command = [sys.executable, EXPERIMENTS / "memory.py", *"--precision fp32 --measure --lengths 64 64 16".split()]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "100000", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *words.split()], env=environment, capture_output=True, text=True, check=True)
    counted, measured = (float(cell) for cell in done.stdout.split("\n")[2].split("|")[-3:-1])
    assert counted > 0.5 and abs(counted / measured - 1) < 0.15
