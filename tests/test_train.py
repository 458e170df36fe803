"""The command line as a user meets it: real runs on small data, what they leave behind, and what they refuse."""

import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import (
    FAST, SHARED, SIZES, TRAIN, before_call, config_of, ends_as, finetune, log_of, losses_of, make_sni, make_start,
    needs_shared, raising, refused, rows_of, run, said, settings, tiny_t5, weights_of, write_prompted, write_shards, write_task,
)  # fmt: skip

import t5
import train
from data import (
    NO_LABEL, Example, HINTFormat, Instance, NoInstructFormat, Task, TkInstructFormat, ToyWorld, load_tasks, load_tokenizer, pad, score,
    toy_tokenizer, toy_world,
)  # fmt: skip
from hint import HINT, HINTConfig, load_model
from t5 import T5

pytestmark = pytest.mark.usefixtures("quick_disk", "known_price")
NO_DROPOUT = "--dropout 0 --generator-dropout 0".split()
LONGER = "--max-instruction", 120  # with examples


class Small(NamedTuple):
    """Small data that tests read and do not change."""

    sni: Path
    start: Path  # a public T5
    run: Path  # a HINT trained for three steps with one example
    shards: list[Path]


@pytest.fixture(scope="module")
def small(tmp_path_factory, spiece) -> Small:
    folder = tmp_path_factory.mktemp("small")
    sni, start = make_sni(folder / "sni"), make_start(folder / "t5", spiece)
    finetune(sni, start, folder / "run", "--steps", 3, "--examples", 1, "--eval-every", 2, *NO_DROPOUT, *LONGER)
    return Small(sni, start, folder / "run", write_shards(folder, 300))


def answers_of(capsys, *words) -> list[str]:
    """The lines that `predict` prints."""
    capsys.readouterr()
    run("predict", *words)
    return capsys.readouterr().out.splitlines()


def scored(rows: list[dict]) -> dict[str, float]:
    return score([row["prediction"] for row in rows], [row["references"] for row in rows])


# ------------------------------------------------------------------------ runs and their folders


def test_a_run_leaves_model_log_scores_and_answers_and_nothing_else(small):
    names = "config.json lock log.jsonl metrics.json model.safetensors predictions.jsonl tokenizer.json training-3.safetensors"
    assert {path.name for path in small.run.iterdir()} == set(names.split())
    steps = [entry for entry in log_of(small.run) if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3] and {entry["learning_rate"] for entry in steps} == {1e-3}
    assert all(entry["tokens_per_second"] > 0 and entry["seconds"] >= 0 for entry in steps)
    assert [entry["step"] for entry in log_of(small.run) if "rougeL" in entry] == [2]
    rows = rows_of(small.run)
    assert len(rows) == 10 and all(set(row) == {"id", "task", "prediction", "references"} for row in rows)
    assert rows[7]["id"] == "test_2-2" and rows[7]["task"] == "test_2" and rows[7]["references"] == ["out 2", "other"]
    given = settings(
        "finetune", "--data", small.sni, "--start", small.start, "--out", small.run, "--max-target", 8,
        *LONGER, *SIZES, *FAST, "--steps", 3, "--examples", 1, "--eval-every", 2, *NO_DROPOUT,
    )  # fmt: skip
    assert config_of(small.run)["command"] == "finetune"
    assert train.Settings.from_json({"run": config_of(small.run)}) == replace(given, command="")  # all but the command


SIZES_OF = {"hint": SIZES, "tk-instruct": [], "no-instruct": [], "tk-instruct+peft": SIZES, "hypertune": SIZES[2:]}


@pytest.mark.parametrize("system", train.SYSTEMS)
def test_every_system_trains_goes_on_and_answers_from_its_folder(tmp_path, small, monkeypatch, system):
    """Stopped in step 3 and gone on with, it has all bytes of a run that never stopped; frozen weights never change."""
    monkeypatch.setattr(train, "FIT_STEPS", 8)
    sizes = SIZES_OF.get(system, SIZES[:2])
    options = ["--system", system, *sizes, *"--steps 3 --save-every 2 --examples 1 --dropout 0.1 --max-instances 2".split()]
    finetune(small.sni, small.start, tmp_path / "whole", *options)
    words = small.sni, small.start, tmp_path / "halves", *options
    with before_call(3, raising(MemoryError)):
        assert said(*words, by=finetune)[0] == 1
    assert (tmp_path / "halves" / "training-2.safetensors").is_file()
    finetune(*words, "--resume")
    ends_as(tmp_path / "whole", tmp_path / "halves")

    run("evaluate", "--model", tmp_path / "whole", "--data", small.sni, "--out", tmp_path / "again", "--max-instances", 2)
    assert rows_of(tmp_path / "again") == rows_of(tmp_path / "whole") and len(rows_of(tmp_path / "again")) == 4
    assert config_of(tmp_path / "again")["system"] == system

    model, preset = load_model(tmp_path / "whole"), train.SYSTEMS[system].hypernetwork
    if preset is not None:
        sizes = {name: value for name, value in (("bottleneck", 3), ("prefix_length", 2)) if f"--{name}".replace("_", "-") in sizes}
        tasks = 3 if preset.get("hyperencoder") == "table" else 0
        assert model.config == HINTConfig(**{**preset, **sizes, "tasks": tasks})
    trained, public = dict(model.t5.named_parameters()), dict(T5.from_pretrained(small.start).named_parameters())
    changed = {name for name in public if not torch.equal(public[name], trained[name])}
    norms, trains = {name for name in public if "norm" in name}, "all" if preset is None else model.config.trains
    assert changed == {"all": {*public}, "hypernetwork": set(), "hypernetwork+norms": norms}[trains]


def test_pretraining_lowers_the_loss_and_its_model_can_be_finetuned(tmp_path, small):
    out, fine = tmp_path / "pre", tmp_path / "fine"
    run("pretrain", "--start", small.start, "--corpus", *small.shards, "--out", out, "--steps", 30, *SIZES, *FAST,
        "--learning-rate", 0.03, "--batch-size", 16, "--microbatch", 1000, "--log-every", 10)  # fmt: skip
    losses = [loss for _, loss in losses_of(out)]
    assert losses[-1] < losses[0] - 0.5, "the text has few words: learning them alone lowers the loss by more"
    run("finetune", "--data", small.sni, "--start", out, "--out", fine, "--steps", 1, *FAST)
    model = HINT.from_pretrained(fine)
    assert (model.config.bottleneck, model.config.prefix_length) == (3, 2), "the start's sizes stay"
    drift = (model.t5.shared.weight - HINT.from_pretrained(out).t5.shared.weight).abs().max()
    assert 0 < drift < 0.1, "finetuning must begin at the pretrained weights"


def test_a_resumed_pretraining_goes_on_in_the_text_and_its_objective_acts(tmp_path, small):
    """The text of step 5 lies after that of the checkpoint, so a run that read from the beginning would end otherwise."""
    words = ("pretrain", "--start", small.start, "--corpus", *small.shards, "--steps", 5, "--save-every", 2,
             "--prefix-length", 2, "--system", "hypertune", *FAST, "--out")  # fmt: skip
    run(*words, tmp_path / "hint")
    run(*words, tmp_path / "whole", "--objective", "caclm")
    assert losses_of(tmp_path / "hint")[0] != losses_of(tmp_path / "whole")[0]
    with before_call(4, raising(MemoryError)):
        said(*words, tmp_path / "halves", "--objective", "caclm")
    refused(*words, tmp_path / "halves", "--resume", names=["objective", "caclm"])
    run(*words, tmp_path / "halves", "--objective", "caclm", "--resume")
    ends_as(tmp_path / "whole", tmp_path / "halves")


def test_a_bad_line_of_a_shard_is_named_or_skipped_as_asked(tmp_path, small):
    """It stands after the first 128 texts, so a run has begun when it comes. What follows is the text without it."""
    good, bad = tmp_path / "good.json.gz", tmp_path / "bad.jsonl"  # a corpus need not be compressed
    lines = gzip.decompress(write_shards(tmp_path, 150, shards=1)[0].read_bytes()).splitlines(keepends=True)
    good.write_bytes(gzip.compress(b"".join(lines)))
    bad.write_bytes(b"".join([*lines[:140], b'{"text": \n', *lines[140:]]))
    words = ("pretrain", "--start", small.start, "--steps", 6, "--save-every", 1, *SIZES, *FAST)
    words = (*words, "--batch-size", 30, "--microbatch", 3000)
    run(*words, "--corpus", good, "--out", tmp_path / "good")
    status, text = said(*words, "--corpus", bad, "--out", tmp_path / "bad")
    assert status == 1 and f"{bad}: line 141" in text.splitlines()[-1] and 0 < log_of(tmp_path / "bad")[-1]["step"] < 6
    status, text = said(*words, "--corpus", bad, "--out", tmp_path / "bad", "--skip-bad-lines", "--resume")
    assert status == 0 and f"1; the first: {bad}: line 141" in text, "the shard is read often, and its line counted once"
    assert losses_of(tmp_path / "bad") == losses_of(tmp_path / "good")
    assert all(map(torch.equal, weights_of(tmp_path / "good"), weights_of(tmp_path / "bad")))


@pytest.mark.parametrize("system, prompts", [("hint", HINTFormat), ("no-instruct", NoInstructFormat)])
def test_prompted_examples_train_and_their_choices_are_ranked(tmp_path, small, system, prompts):
    """In both settings, an evaluation gives the choice that is the most probable one when each is scored alone."""
    p3, losses = write_prompted(write_prompted(tmp_path / "p3"), "test"), []
    for setting in ("split", "joint"):
        out, again = tmp_path / setting, tmp_path / f"{setting}-again"
        words = "--system", system, *SIZES_OF[system], "--setting", setting
        finetune(p3, small.start, out, "--steps", 1, "--dropout", 0, *words)
        losses += losses_of(out)
        run("evaluate", "--model", out, "--data", p3, "--eval-batch-size", 3, "--out", again)  # it knows its setting
        assert config_of(out)["setting"] == config_of(again)["setting"] == setting and rows_of(again) == rows_of(out)
        rows = {row["id"]: row for row in rows_of(out)}
        assert list(rows) == ["rte-1", "mine", "rte-2", "xsum-4"]
        tasks, metrics = load_tasks(p3, "test", joint=setting == "joint"), json.loads((again / "metrics.json").read_text())
        for task in tasks:
            best = answers_one_by_one(load_model(out), prompts(load_tokenizer(out), 0, 40, 40), task)
            assert [rows[instance.id]["prediction"] for instance in task.instances] == best
            assert metrics[task.name] == scored([row for row in rows.values() if row["task"] == task.name])
            (name,) = [name for name in metrics if name.startswith(f"{task.name}: ") and task.definition.strip() in name]
            assert metrics[name] == scored([rows[instance.id] for instance in task.instances]), "each template's own"
        assert len(metrics) == 2 + 3 + 1
    assert losses[0] != losses[1]


def answers_one_by_one(model: HINT, prompts, task: Task) -> list[str]:
    """Answers to a task's instances: the most probable choices, each scored in a pass of its own, or free answers."""
    best, first = [], torch.tensor([0])
    with torch.no_grad():
        for (instruction, ids), instance in zip(prompts(task), task.instances, strict=True):
            encoded, source = model.encode_instruction(torch.tensor([instruction])), torch.tensor([ids])
            targets = [prompts.tokenizer.encode(choice).ids for choice in instance.choices]
            ranks = [model.rank(encoded, source, pad([target], NO_LABEL), first).item() for target in targets]
            free = prompts.tokenizer.decode(model.generate(encoded, source, max_new_tokens=8)[0].tolist())
            best.append(instance.choices[ranks.index(max(ranks))] if ranks else free)
    return best


def test_scores_are_those_of_each_task_of_each_category_and_of_all_rows(tmp_path, small):
    """Three answers of one task are right, because the references are what the model says; no other answer is."""
    sni = make_sni(tmp_path / "sni")
    path = sni / "tasks" / "test_1.json"
    content = json.loads(path.read_text())
    for instance, row in zip(content["Instances"][:3], rows_of(small.run)):
        instance["output"] = ["never", row["prediction"]]
    path.write_text(json.dumps(content))
    run("evaluate", "--model", small.run, "--data", sni, "--out", tmp_path / "out", "--max-instances", 4)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    exact = {name: scores["exact_match"] for name, scores in metrics.items()}
    assert exact == {"test_1": 75, "test_2": 0, "category Summing Up": 37.5, "overall": 37.5}
    assert metrics["overall"] == scored(rows_of(tmp_path / "out"))


def test_the_demo_shows_scores_and_answers_and_its_last_line_can_be_typed(tmp_path, monkeypatch, capsys):
    """The demo's own settings, but for fewer steps. Without --out, it takes the first free folder."""
    monkeypatch.chdir(tmp_path)
    Path("runs/demo").mkdir(parents=True)
    monkeypatch.setattr(train, "toy_world", lambda seed: ToyWorld(*(part[:9] for part in toy_world(seed, tasks=50)[:3]), {}))
    train.demo(replace(settings("demo"), steps=2, warmup=1))
    shown, out = capsys.readouterr().out.strip(), Path("runs/demo-2")
    metrics = json.loads((out / "metrics.json").read_text())
    groups = {f"unseen {what}{how}" for what in ("arguments", "compositions") for how in ("", ", no instruction")}
    assert set(metrics) == groups | {"overall"} and all(name in shown for name in metrics)
    assert len(rows_of(out)) == 2 * 9 * 4, "the control is no part of the answers"
    python, script, command, *words = shlex.split(shown.splitlines()[-1])
    assert (python, script, command) == ("python", "train.py", "predict") and len(answers_of(capsys, *words)) == 1


# ------------------------------------------------------------------------ runs that go on


def test_what_has_no_part_in_the_gradient_may_change_when_a_run_goes_on_and_nothing_else(tmp_path, small):
    """As after a message that the memory is full. A run that has no checkpoint begins."""
    words = small.sni, small.start, tmp_path / "run", "--dropout", 0, "--steps"
    finetune(*words, 1, "--resume")
    for name, value in (("--learning-rate", 0.5), ("--batch-size", 5), ("--seed", 1), ("--max-target", 9)):
        refused(*words, 3, "--resume", name, value, by=finetune, names=[tmp_path / "run", name[2:].replace("-", "_")])
    finetune(*words, 3, "--resume", "--microbatch", 1, "--save-every", 1, "--gradient-checkpointing", "--eval-batch-size", 2)
    assert [step for step, _ in losses_of(tmp_path / "run")] == [1, 2, 3]


def test_an_evaluation_on_the_way_changes_nothing(tmp_path, small):
    """Dropout must act again after it, and no random number may be used up; there is none at the last step."""
    for name, more in (("plain", ()), ("evaluated", ("--eval-every", 1))):
        finetune(small.sni, small.start, tmp_path / name, "--steps", 3, "--dropout", 0.3, *more)
    assert losses_of(tmp_path / "plain") == losses_of(tmp_path / "evaluated")
    assert [entry["step"] for entry in log_of(tmp_path / "evaluated") if "rougeL" in entry] == [1, 2]


OTHER_KIND = {
    "--bottleneck 4": "bottleneck", "--prefix-length 3": "prefix_length", "--no-fusion": "fusion", "--system tk-instruct": "tk-instruct",
    "--modules lora": "modules", "--generator pooled": "generator", "--trains hypernetwork": "trains", "--hyperencoder own": "hyperencoder",
}  # fmt: skip


def test_a_start_keeps_its_hypernetwork_and_may_change_its_dropout(tmp_path, small, monkeypatch):
    """The generating networks have a rate of their own; the generator's attention has that of T5."""
    def look(model, _):
        rates.update((name, part.p) for name, part in model.named_modules() if isinstance(part, torch.nn.Dropout))

    rates: dict[str, float] = {}
    monkeypatch.setattr(train, "set_gradient_checkpointing", look)
    words = "finetune", "--data", small.sni, "--start", small.run, "--out", tmp_path / "two", "--steps", 1, *FAST
    for more, name in OTHER_KIND.items():
        refused(*words, *more.split(), names=[small.run, name])
    assert not (tmp_path / "two").exists()
    run(*words, "--generator-dropout", 0.4, "--dropout", 0.3)
    assert all(rate == (0.4 if "networks" in name else 0.3) for name, rate in rates.items()) and len(set(rates.values())) == 2
    assert HINT.from_pretrained(tmp_path / "two").config == replace(load_model(small.run).config, generator_dropout=0.4)


def test_embeddings_are_those_of_the_tasks_that_they_were_trained_for(tmp_path, sni, small, monkeypatch):
    """As many tasks under other names are refused: row 0 would be another task's. Known tasks need no example."""
    monkeypatch.setattr(train, "FIT_STEPS", 2)
    one, system = tmp_path / "one", ("--system", "hyperformer++", "--examples", 1)
    finetune(sni, small.start, one, "--steps", 1, *system)
    evaluate = "evaluate", "--model", one, "--data", sni, "--examples", 0, "--out", tmp_path / "known"
    refused(*evaluate, names=["test_1"])
    run(*evaluate, "--split", "train")
    assert len(rows_of(tmp_path / "known")) == 15
    refused("predict", "--model", one, "--instruction", "x", "y", names=[one])
    split = sni / "splits" / "default" / "train_tasks.txt"
    split.write_text("\n".join(reversed(split.read_text().split())))
    refused(sni, one, tmp_path / "two", *system, "--steps", 1, by=finetune, names=[one])
    refused(sni, small.start, one, "--steps", 2, *system, "--resume", by=finetune, names=[one, "tasks"])
    config = json.loads((one / "config.json").read_text())
    for change in ({"tasks": ["train_1"]}, {"tasks": []}, {"system": "hint"}):
        (one / "config.json").write_text(json.dumps({**config, "run": {**config["run"], **change}}))
        refused(*evaluate, names=[one])


# ------------------------------------------------------------------------ evaluate and predict


def test_an_evaluation_made_again_replaces_its_own_files_and_touches_no_others(tmp_path, small):
    out = tmp_path / "scores"
    words = "evaluate", "--model", small.run, "--data", small.sni, "--out", out
    run(*words, "--max-instances", 1)
    assert len(rows_of(out)) == 2
    run(*words, "--max-instances", 3)
    assert len(rows_of(out)) == 6 and config_of(out)["max_instances"] == 3
    assert {path.name for path in out.iterdir()} == {"config.json", "metrics.json", "predictions.jsonl"}
    (out / "notes.txt").write_text("mine")
    (tmp_path / "vocabulary").mkdir()
    shutil.copy(small.run / "tokenizer.json", tmp_path / "vocabulary")
    folders = out, small.run, small.start, tmp_path / "vocabulary"
    before = {path: path.read_bytes() for folder in folders for path in folder.iterdir()}
    for folder in (*folders, out / "notes.txt"):
        refused(*words[:-1], folder, names=[folder])
    assert {path: path.read_bytes() for folder in folders for path in folder.iterdir()} == before


def test_a_public_t5_reads_as_tk_instruct_unless_told_otherwise(small, capsys):
    """Both formats must be able to give the answer, and give different ones."""
    tokenizer, model = load_tokenizer(small.start), T5.from_pretrained(small.start)
    task, wanted = Task("", "Give the book", (), (Instance("", "the cat and the dog", ()),)), []
    for prompts in (TkInstructFormat(tokenizer), NoInstructFormat(tokenizer)):
        ids = model.generate(torch.tensor([prompts(task)[0][1]]), max_new_tokens=6)
        wanted += tokenizer.decode_batch(ids.tolist())
    words = "--model", small.start, "--max-new-tokens", 6, "--instruction", "Give the book", "the cat and the dog"
    assert answers_of(capsys, *words) == wanted[:1] != wanted[1:]
    assert answers_of(capsys, *words, "--system", "tk-instruct") == wanted[:1]
    assert answers_of(capsys, *words, "--system", "no-instruct") == wanted[1:]
    refused("predict", *words, "--system", "hint", names=[small.start])


def test_tasks_are_kept_and_used_again_by_the_model_that_encoded_them(tmp_path, small, capsys):
    """A kept task gives the answers of its own instruction and examples, which are not those of another."""
    model, kept, out = ("--model", small.run), tmp_path / "a.task", tmp_path / "answers.txt"
    texts, told = ["the cat", "please give me the book", "dog"], ("--instruction", "Say it")
    shown = (*told, "--example", "in 1", "out 1", "--example", "in 2", "out 2")
    answers = answers_of(capsys, *model, *shown, "--save-task", kept, *texts)
    assert len(answers) == 3 and answers_of(capsys, *model, "--task", kept, *texts) == answers
    prompts = HINTFormat(load_tokenizer(small.run), 2, 120, 40)
    ids = prompts.instruction_ids(Task("", "Say it", (Example("in 1", "out 1"), Example("in 2", "out 2")), ()))
    states = load_model(small.run).encode_instruction(torch.tensor([ids])).states
    torch.testing.assert_close(t5.read_safetensors(kept)["states"], states.detach())
    others = [answers_of(capsys, *model, "--instruction", words, *texts) for words in ("Say it", "the dog sat")]
    assert answers != others[0] != others[1], "the instruction matters, and so do the examples"
    assert answers_of(capsys, *model, *told, "--save-task", kept) == [], "standard input is left alone"
    assert answers_of(capsys, *model, "--task", kept, "--out", out, *texts) == []
    assert out.read_text().splitlines() == others[0]
    finetune(small.sni, small.run, tmp_path / "other", "--steps", 1)
    refused("predict", "--model", tmp_path / "other", "--task", kept, "x", names=[kept])


def test_answers_are_written_batch_by_batch(tmp_path, small):
    """Stopped in the third batch, the file holds the answers of the first two."""
    words = "predict", "--model", small.run, "--instruction", "x", "--out", tmp_path / "out", "--eval-batch-size", 2
    with before_call(3, raising(MemoryError), HINT, "generate"):
        assert said(*words, *"abcdefg")[0] == 1
    assert len((tmp_path / "out").read_text().splitlines()) == 4


def test_inputs_come_from_arguments_a_file_or_standard_input(tmp_path, small, capsys):
    """A byte order mark is no part of a text, and a missing line end at the end begins no line of its own."""
    ask, texts = ("--model", small.run, "--instruction", "Say it."), ["the cat", "", "a dog é"]
    answers = answers_of(capsys, *ask, *texts)
    assert answers == [answers_of(capsys, *ask, text)[0] for text in texts] and len(set(answers)) == 3
    (tmp_path / "inputs.txt").write_text("\ufeff" + "\n".join(texts), "utf-8")
    assert answers_of(capsys, *ask, "--file", tmp_path / "inputs.txt") == answers
    typed = subprocess.run([sys.executable, TRAIN, "predict", *map(str, ask)], input="\ufeff" + "\n".join(texts) + "\n",
                           capture_output=True, encoding="utf-8", env={**os.environ, "PYTHONUTF8": "1"})  # fmt: skip
    assert (typed.returncode, typed.stdout.splitlines(), typed.stderr) == (0, answers, "")


def test_closed_standard_streams_do_no_harm(tmp_path, small, monkeypatch):
    """A reader who has seen enough, and a run without standard output and error."""
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", open(writer, "w"))
        assert said("predict", "--model", small.run, "--instruction", "x", "y") == (1, "")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        patch.setattr(sys, "stderr", None)
        finetune(small.sni, small.start, tmp_path / "run", "--steps", 2, "--eval-every", 1)
    assert rows_of(tmp_path / "run")


def test_options_of_answering_act(tmp_path, small, spiece, monkeypatch):
    """Answers of one token, another number of examples, and a tokenizer for a model that has none."""
    model, read, real = tmp_path / "model", [], HINT.encode_instruction
    shutil.copytree(small.run, model, ignore=shutil.ignore_patterns("tokenizer.json"))
    evaluate = "evaluate", "--model", model, "--data", small.sni, "--out"
    refused(*evaluate, tmp_path / "no", names=[model])
    monkeypatch.setattr(HINT, "encode_instruction", lambda self, ids, *more: read.append(ids.tolist()) or real(self, ids, *more))
    for name, more in (("long", ()), ("short", ("--max-new-tokens", 1)), ("none", ("--examples", 0))):
        run(*evaluate, tmp_path / name, "--tokenizer", spiece, *more)
    long, short = (sum(len(row["prediction"]) for row in rows_of(tmp_path / name)) for name in ("long", "short"))
    assert short < long
    assert len(read) == 6 and read[0] == read[2] != read[4], "each instruction is read once, with its examples"


def test_a_model_answers_in_the_precision_it_was_trained_in_unless_told_otherwise(tmp_path, small, monkeypatch):
    seen, real = set(), torch.nn.Linear.forward

    def forward(layer, x):
        seen.add((layer.weight.dtype, real(layer, x).dtype))
        return real(layer, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    finetune(small.sni, small.start, tmp_path / "run", "--steps", 1, "--precision", "bf16")
    for more, kind in ((), torch.bfloat16), (("--precision", "fp32"), torch.float32):
        run("predict", "--model", tmp_path / "run", "--instruction", "x", "y", *more)
        assert seen == {(torch.float32, kind)}, "of the first, in training and in answering"
        seen.clear()


# ------------------------------------------------------------------------ the loop


def test_adafactor_steps_as_the_paper_says():
    """Two steps of a matrix and a vector, computed from Shazeer and Stern (2018) with parameter scaling, in fp64."""
    torch.manual_seed(3)
    model = torch.nn.ParameterList([torch.randn(5, 4) * 0.3, torch.randn(6) * 1e-5])
    gradients = [[torch.randn(5, 4), torch.randn(6)], [torch.randn(5, 4), torch.randn(6)]]
    gradients[1][0] *= 10  # a sudden gradient, whose update is clipped
    gradients[1][0][2] = 0  # an unused row of an embedding
    wanted = [parameter.detach().double().clone() for parameter in model]
    rows, columns, squares = torch.zeros(5), torch.zeros(4), torch.zeros(6)
    optimizer, clipped = train.adafactor(model, 1e-2), []
    for step in (1, 2):
        for parameter, grad in zip(model, gradients[step - 1]):
            parameter.grad = grad
        optimizer.step()
        matrix, vector = (grad.double() for grad in gradients[step - 1])
        beta = 1 - step**-0.8
        rows = beta * rows + (1 - beta) * matrix.square().mean(1)
        columns = beta * columns + (1 - beta) * matrix.square().mean(0)
        squares = beta * squares + (1 - beta) * vector.square()
        updates = [matrix / (rows[:, None] * columns / rows.mean()).sqrt().clamp(min=1e-18), vector / squares.sqrt()]
        for number, update in enumerate(updates):
            clipped.append(update.square().mean().sqrt().item() > 1)
            update = update / max(1.0, update.square().mean().sqrt().item())
            size = max(1e-3, wanted[number].square().mean().sqrt().item())
            wanted[number] = wanted[number] - 1e-2 * size * update
    assert clipped[2], "the clipping must act"
    for parameter, right in zip(model, wanted):
        assert parameter.isfinite().all()
        torch.testing.assert_close(parameter.double(), right, atol=1e-6, rtol=1e-4)


def test_the_learning_rate_is_constant_or_rises_and_falls_as_asked():
    constant = train.Settings(steps=100)
    assert {train.learning_rate(step, constant) for step in (1, 50, 100)} == {1e-3}
    cosine = replace(constant, warmup=10, final_rate=0.1)
    rates = [train.learning_rate(step, cosine) for step in range(1, 101)]
    assert rates[4] == pytest.approx(5e-4) and rates[9] == max(rates) == 1e-3 and rates[-1] == pytest.approx(1e-4)
    assert rates[54] == pytest.approx(5.5e-4), "half-way down"
    assert [train.learning_rate(step, replace(constant, warmup=100)) for step in (50, 100)] == [5e-4, 1e-3]


def test_the_log_means_losses_and_counts_the_tokens_and_time_of_training_alone(tmp_path, small, monkeypatch):
    """A clock goes on by a second for each gradient, and by a hundred for each task that is answered."""
    clock, tokens, gradient, answers = [0.0], [], train.accumulate_gradient, train.Answerer.answers

    def tick(seconds: float, real):
        clock[0] += seconds
        return real

    def counted(model, batch, *rest):
        tokens.append(sum(len(ids) for example in batch for ids in example))
        return tick(1, gradient)(model, batch, *rest)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(train, "accumulate_gradient", counted)
    monkeypatch.setattr(train.Answerer, "answers", lambda *given: tick(100, answers)(*given))
    for name, more in (("each", ()), ("seldom", ("--log-every", 3, "--eval-every", 2))):
        finetune(small.sni, small.start, tmp_path / name, "--steps", 5, *NO_DROPOUT, *more)
    each, seldom = [[entry for entry in log_of(tmp_path / name) if "loss" in entry] for name in ("each", "seldom")]
    assert [entry["tokens_per_second"] for entry in each] == tokens[:5]
    assert [entry["step"] for entry in seldom] == [3, 5], "the end is logged too"
    for entry, part in zip(seldom, (each[:3], each[3:])):
        for name in ("loss", "tokens_per_second"):
            assert entry[name] == pytest.approx(sum(one[name] for one in part) / len(part))
    assert [entry["seconds"] for entry in each] == [1, 2, 3, 4, 5] and [entry["seconds"] for entry in seldom] == [203, 405]


CHANGES = [  # options that change the gradient of a run
    "learning-rate 0.05", "warmup 2", "final-rate 0.1", "dropout 0.4", "seed 5", "batch-size 2", "group 2", "max-instances 1", "max-input 8",
    "max-instruction 8", "max-target 2", "examples 1", "precision bf16", "bottleneck 4", "prefix-length 3", "generator-dropout 0.8",
    "embedding-scale 8.0", "system hypter", "generator pooled", "modules lora", "no-fusion", "hyperencoder own", "trains hypernetwork", "steps 1",
]  # fmt: skip
KEEPS = ["microbatch 1", "gradient-checkpointing", "log-every 1", "save-every 1", "eval-every 1", "eval-batch-size 1"]
OF_OTHER_TESTS = set("help data out start size tokenizer setting resume compile shard fusion".split())


def test_the_help_is_grouped_and_every_option_in_it_is_tried(capsys):
    with pytest.raises(SystemExit):
        run("finetune", "--help")
    text = capsys.readouterr().out
    options = set(re.findall(r"--([a-z-]+)", text.partition("\n\n")[2])) - set("help start system".split())
    tried = {words.split()[0] for words in CHANGES + KEEPS} | OF_OTHER_TESTS
    assert options <= tried and len(options) > 35, options - tried
    assert text.count(":\n  -") >= 5 and "(default: 0.001)" in text


@pytest.fixture(scope="module")
def plain(small) -> list[float]:
    """Losses of a run without dropout, which could hide a change, or make one that is none."""
    finetune(small.sni, small.start, small.run.with_name("plain"), "--steps", 2, *NO_DROPOUT)
    return [loss for _, loss in losses_of(small.run.with_name("plain"))]


@pytest.mark.parametrize("words", CHANGES)
def test_each_option_of_training_changes_the_run_and_is_kept(tmp_path, small, plain, words):
    finetune(small.sni, small.start, tmp_path / "run", "--steps", 2, *NO_DROPOUT, *f"--{words}".split())
    assert [loss for _, loss in losses_of(tmp_path / "run")] != pytest.approx(plain, abs=1e-5)
    name, _, value = words.replace("no-fusion", "fusion False").partition(" ")
    assert str(config_of(tmp_path / "run")[name.replace("-", "_")]) == value


@pytest.mark.parametrize("words", KEEPS)
def test_options_of_speed_and_of_the_log_change_no_loss(tmp_path, small, plain, monkeypatch, words):
    asked, real = [], train.set_gradient_checkpointing
    monkeypatch.setattr(train, "set_gradient_checkpointing", lambda model, on: asked.append(on) or real(model, on))
    finetune(small.sni, small.start, tmp_path / "run", "--steps", 2, *NO_DROPOUT, *f"--{words}".split())
    assert [loss for _, loss in losses_of(tmp_path / "run")] == pytest.approx(plain, abs=1e-5)
    assert asked == [words == "gradient-checkpointing"]


@pytest.mark.long
def test_a_compiled_pass_has_the_same_losses(tmp_path, small, plain, monkeypatch):
    """The graphs that are handed to the compiler are only counted and run as they are: a real one takes minutes."""
    graphs, real = [], torch.nn.Module.compile
    backend = lambda graph, inputs: graphs.append(graph) or graph  # noqa: E731
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: real(self, backend=backend, **how))
    finetune(small.sni, small.start, tmp_path / "run", "--steps", 2, *NO_DROPOUT, "--compile")
    assert graphs and [loss for _, loss in losses_of(tmp_path / "run")] == pytest.approx(plain, abs=1e-5)


def test_finetuning_sees_the_training_split_alone_and_a_task_listed_twice_once(tmp_path, sni, small, monkeypatch):
    seen, real = [], train.accumulate_gradient
    monkeypatch.setattr(train, "accumulate_gradient", lambda model, batch, *rest: seen.extend(batch) or real(model, batch, *rest))
    for name, text in (("train_1", "a cat"), ("train_2", "a dog")):
        write_task(sni, name, Instances=[{"id": "a", "input": text, "output": ["a"]}])
    (sni / "splits" / "default" / "train_tasks.txt").write_text("train_1\ntrain_2\ntrain_1\n\n")
    finetune(sni, small.start, tmp_path / "run", "--steps", 2)  # of 4 examples: four epochs of two
    tokenizer = load_tokenizer(small.start)
    assert sorted(tokenizer.decode(example.input) for example in seen) == ["a cat"] * 4 + ["a dog"] * 4
    assert {row["task"] for row in rows_of(tmp_path / "run")} == {"test_1", "test_2"}


# ------------------------------------------------------------------------ what is refused

TRAINING = "finetune --data {sni} --start {start} --out {out} --steps 2"
OF_TRAINING = {  # words behind these, and what the sentence names
    "--no-such-option 3": "--no-such-option", "--step 3": "--step", "--size tiny": "--size", "--steps 0": "steps", "--steps many": "--steps",
    "--warmup 3": "warmup", "--learning-rate -1": "learning_rate", "--learning-rate inf": "learning_rate", "--final-rate 1.5": "final_rate",
    "--dropout 1": "dropout", "--max-input 3": "max_input", "--precision fp16": "bf16", "--precision fp8": "precision", "--system t0": "t0",
    f"--seed {2**63}": "seed", "--embedding-scale inf": "embedding_scale", "--examples -1": "examples",
    "--system tk-instruct --bottleneck 3": "bottleneck", "--system no-instruct --trains hypernetwork": "trains",
    "--system tk-instruct --no-fusion": "fusion", "--system tk-instruct --generator pooled": "generator",
    "--modules adapters --prefix-length 3": "prefix_length", "--system hypertune --bottleneck 3": "bottleneck",
    "--generator none --bottleneck 3": "bottleneck", "--modules lora --prefix-length 3": "prefix_length", "--hyperencoder table": "table",
    "--system hyperformer++ --generator columns": "table", "--system hyperformer --fusion": "table",
    "--system hyperformer --hyperencoder tied": "table", "--generator none --no-fusion": "instruction",
    "--generator none --modules adapters": "modules", "--generator none --trains hypernetwork": "trains",
    **{f"--{name} nan": name.replace("-", "_") for name in "learning-rate final-rate dropout generator-dropout embedding-scale".split()},
    **{f"--{name} {10**9}": name.replace("-", "_") for name in """eval-batch-size batch-size steps max-input max-target max-instruction
        bottleneck prefix-length microbatch group save-every max-instances examples""".split()},
}  # fmt: skip
WRONG_OPTIONS = {
    **{f"{TRAINING} {words}": named for words, named in OF_TRAINING.items()},
    "finetune --data {sni} --size tiny --out {out}": "--tokenizer", "no-such-command": "no-such-command", "finetune": "--data", "finetune --data x --start y": "--out", "pretrain --out x --size tiny": "--corpus",
    "predict --model x y": "--instruction", "predict --instruction x y": "--model", "evaluate --model x --out y": "--data",
    "predict --model x --instruction x --task x": "--task", "evaluate --model {run} --data {sni} --out {out} --warmup 1": "--warmup",
    f"predict --model {{run}} --instruction x y --max-new-tokens {10**9}": "max_new_tokens", "predict --model {run} --steps 3 y": "--steps",
    f"predict --model {{run}} --instruction x y --eval-batch-size {10**9}": "eval_batch_size",
}  # fmt: skip
WRONG_INPUTS = {  # the paths or options that the sentence names
    "finetune --data {no} --start {start} --out {out}": "{no}", "finetune --data {sni} --start {no} --out {out}": "{no}",
    "finetune --data {sni} --start {sni} --out {out}": "{sni}", "finetune --data {sni} --start {run} --out {start}": "{start}",
    "finetune --data {sni} --start {start} --tokenizer {no} --out {out}": "{no}",
    TRAINING + " --setting joint": "{sni}", TRAINING + " --system hyperformer": "test_1", TRAINING + " --shard": "--shard",
    "finetune --data {sni} --start {start} --out {start} --resume": "{start}", "finetune --data {sni} --start {start} --out {file}": "{file}",
    "finetune --data {sni} --start {start} --out {file} --resume": "{file}",
    "finetune --data {sni} --start {start} --out {file}/sub --steps 1": "{file}", "evaluate --model {run} --data {sni} --out {file}/sub": "{file}",
    "evaluate --model {start} --data {sni} --split dev --out {out}": "dev", "evaluate --model {no} --data {sni} --out {out}": "{no}",
    "evaluate --model {run} --data {no} --out {out}": "{no}", "evaluate --model {run} --data {sni} --system hypter --out {out}": "{run}",
    "predict --model {run} --instruction x --system tk-instruct y": "{run}", "predict --model {run} --instruction x --out {no}/y y": "{no}",
    "predict --model {sni} --instruction x y": "{sni}", "predict --model {no} --instruction x y": "{no}",
    "predict --model {run} --instruction x --file {no}": "{no}", "predict --model {run} --instruction x --file {sni}": "{sni}",
    "predict --model {run} --instruction x --save-task {no}/y": "{no}", "predict --model {run} --task {no} y": "{no}",
    "predict --model {run} --task {file} y": "{file}", "predict --model {run} --tokenizer {file} --instruction x y": "{file}",
    "pretrain --start {start} --corpus {no} --out {out}": "{no}", "pretrain --start {start} --corpus {file} --out {out}": "{file}",
    "pretrain --start {start} --corpus {sni} --out {out}": "{sni}",
}  # fmt: skip


@pytest.mark.parametrize("words, status", [*[(words, 2) for words in WRONG_OPTIONS], *[(words, 1) for words in WRONG_INPUTS]])
def test_what_cannot_be_done_ends_at_once_in_one_sentence_and_leaves_nothing_behind(tmp_path, small, monkeypatch, words, status):
    """Wrong options with status 2, before anything is read; input with 1. The hub is not asked for a mistyped folder."""
    monkeypatch.setattr(t5, "hf_hub_download", raising(AssertionError, "the hub was asked"))
    places = small._asdict() | {"no": tmp_path / "no-such", "out": tmp_path / "out", "file": tmp_path / "file"}
    places["file"].write_text("text")
    named, began = {**WRONG_OPTIONS, **WRONG_INPUTS}[words].format(**places), time.process_time()
    refused(*(word.format(**places) for word in words.split()), status=status, names=[named])
    assert time.process_time() - began < 5
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and places["file"].read_text() == "text"


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused_and_fresh_weights_fit_theirs(tmp_path, sni, start):
    size = load_tokenizer(start).get_vocab_size()
    finetune(sni, start, tmp_path / "fresh", "--steps", 1)
    run("finetune", "--data", sni, "--size", "toy", "--tokenizer", start, "--out", tmp_path / "toy", "--steps", 1, "--max-target", 4,
        *SIZES, *FAST)  # fmt: skip
    assert load_model(tmp_path / "toy").t5.config == replace(t5.SIZES["toy"], vocab_size=size)
    tiny_t5(vocab_size=64).save_pretrained(start)
    refused(sni, start, tmp_path / "run", "--steps", 1, by=finetune, names=[start, size, 64])
    few = json.loads(toy_tokenizer().to_str())
    for highest in (64, 63):
        few["model"]["vocab"] = {"<pad>": 0, "</s>": 1, "<unk>": 2, "the": highest}  # few tokens, but an id is too high
        (start / "tokenizer.json").write_text(json.dumps(few))
        if highest == 64:
            refused("predict", "--model", start, "--instruction", "x", "y", names=[start, 65, 64])
    finetune(sni, start, tmp_path / "run", "--steps", 1)


def test_importing_a_module_does_nothing():
    """And a refusal is all that a command line writes, in a process of its own."""
    program = "import sys, t5, hypernet, hint, data, train; print('transformers' in sys.modules); train.main(['finetune'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=TRAIN.parent)
    assert (done.stdout, done.stderr.count("\n"), done.returncode) == ("False\n", 1, 2)


@needs_shared
def test_the_real_data_train_and_score_with_the_real_vocabulary(tmp_path):
    """Two steps of a small model on Super-NaturalInstructions, and its twelve unseen tasks."""
    out = tmp_path / "run"
    run("finetune", "--data", SHARED / "sni", "--size", "toy", "--tokenizer", SHARED / "t5", "--out", out, "--steps", 2, *FAST,
        "--max-instances", 2, "--max-instruction", 64, "--max-target", 4, *SIZES)  # fmt: skip
    tasks = load_tasks(SHARED / "sni", "test", 2)
    assert [row["id"] for row in rows_of(out)] == [instance.id for task in tasks for instance in task.instances]
    categories, metrics = {f"category {task.category}" for task in tasks}, json.loads((out / "metrics.json").read_text())
    assert set(metrics) == {task.name for task in tasks} | categories | {"overall"} and len(categories) > 1
    assert load_model(out).t5.config.vocab_size == 32_100


def test_a_folder_that_keeps_fewer_settings_still_answers_and_trains_on(tmp_path, sni, start):
    """Folders of earlier versions name the command, but not all that the command needs today."""
    finetune(sni, start, tmp_path / "run", "--steps", 1)
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    for name in ("out", "start", "data"):
        del config["run"][name]
    path.write_text(json.dumps(config))
    run("evaluate", "--model", tmp_path / "run", "--data", sni, "--out", tmp_path / "scores")
    assert "overall" in json.loads((tmp_path / "scores" / "metrics.json").read_text())
    finetune(sni, tmp_path / "run", tmp_path / "next", "--steps", 1)
    assert (tmp_path / "next" / "model.safetensors").is_file()
