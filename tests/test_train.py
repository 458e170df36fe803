"""The command line as a user meets it: real runs on small data, what they leave behind, and what they refuse."""

import gzip
import json
import math
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import (
    FAST,
    SHARED,
    TASK,
    TRAIN,
    finetune,
    log_of,
    needs_shared,
    parsed,
    run,
    tiny_hint,
    tiny_t5,
    weights_of,
    write_prompted,
    write_shards,
)

import t5
import train
from data import NO_LABEL, HINTFormat, Ids, Instance, Task, load_tasks, pad, toy_tokenizer
from hint import HINT, PlainT5, load_model
from t5 import T5, T5Config


def command_line(*words, **settings) -> subprocess.CompletedProcess:
    """`python train.py ...` in a process of its own."""
    return subprocess.run([sys.executable, str(TRAIN), *map(str, words)], capture_output=True, text=True, **settings)


# ------------------------------------------------------------------------ runs


@pytest.mark.parametrize("system, kind", [("hint", HINT), ("tk-instruct", PlainT5), ("no-instruct", PlainT5)])
def test_finetune_evaluate_and_predict_work_on_each_other_s_folders(tmp_path, sni, start, system, kind, capsys):
    out = tmp_path / "run"
    finetune(sni, start, out, "--system", system, "--steps", 3, "--examples", 1, "--eval-every", 2)
    assert {path.name for path in out.iterdir()} == {
        "config.json", "log.jsonl", "metrics.json", "model.safetensors", "predictions.jsonl", "tokenizer.json", "training-3.pt",
    }  # fmt: skip
    assert isinstance(load_model(out), kind)
    steps = [entry for entry in log_of(out) if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3] and all(entry["tokens_per_second"] > 0 for entry in steps)
    assert [entry["step"] for entry in log_of(out) if "rougeL" in entry] == [2]
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 10 and set(rows[0]) == {"id", "task", "prediction", "references"}
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics) == {"test_1", "test_2", "overall"} and set(metrics["overall"]) == {"exact_match", "rougeL"}
    assert "overall" in capsys.readouterr().out

    run("evaluate", "--model", out, "--data", sni, "--out", tmp_path / "again", "--eval-batch-size", 3)
    assert (tmp_path / "again" / "predictions.jsonl").read_text() == (out / "predictions.jsonl").read_text()
    capsys.readouterr()
    run("predict", "--model", out, "--instruction", "Say it.", "in 0", "in 1", "in 2")
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_pretraining_lowers_the_loss_and_its_model_can_be_finetuned(tmp_path, sni, start):
    shards, out = write_shards(tmp_path, 300), tmp_path / "pre"
    run("pretrain", "--start", start, "--corpus", *shards, "--out", out, "--steps", 60, "--learning-rate", 0.02, "--bottleneck", 3,
                "--prefix-length", 2, *FAST, "--batch-size", 16, "--microbatch", 1000, "--log-every", 20)  # fmt: skip
    losses = [entry["loss"] for entry in log_of(out)]
    assert losses[-1] < losses[0] - 0.5, "the text has few words: learning them alone lowers the loss by more"
    run("finetune", "--data", sni, "--start", out, "--out", tmp_path / "fine", "--steps", 1, *FAST)
    fine = HINT.from_pretrained(tmp_path / "fine")
    assert (fine.config.bottleneck, fine.config.prefix_length) == (3, 2)
    drift = (fine.t5.shared.weight - HINT.from_pretrained(out).t5.shared.weight).abs().max()
    assert 0 < drift < 0.1, "finetuning must begin at the pretrained weights"


def test_the_objective_of_pretraining_acts_and_is_kept(tmp_path, start):
    words = ("pretrain", "--start", start, "--corpus", *write_shards(tmp_path, 300), "--steps", 2,
             "--bottleneck", 3, "--prefix-length", 2, *FAST)  # fmt: skip
    run(*words, "--out", tmp_path / "hint")
    run(*words, "--out", tmp_path / "caclm", "--objective", "caclm")
    assert log_of(tmp_path / "hint")[0]["loss"] != log_of(tmp_path / "caclm")[0]["loss"]
    assert settings_kept(tmp_path / "caclm")["objective"] == "caclm"
    with pytest.raises(SystemExit, match="had objective 'caclm'"):
        run(*words, "--out", tmp_path / "caclm", "--resume")


def settings_kept(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["run"]


@pytest.mark.parametrize("system", ["hint", "no-instruct"])
def test_prompted_examples_train_and_their_choices_are_ranked(tmp_path, start, system):
    """In both settings; an evaluation gives the answers that the same model gives when it is asked for each alone."""
    p3, losses = write_prompted(write_prompted(tmp_path / "p3"), "test"), []
    for setting in ("split", "joint"):
        out, again = tmp_path / setting, tmp_path / f"{setting}-again"
        finetune(p3, start, out, "--steps", 1, "--system", system, "--setting", setting, "--dropout", 0)
        losses.append(log_of(out)[0]["loss"])
        run("evaluate", "--model", out, "--data", p3, "--eval-batch-size", 3, "--out", again)  # it knows its setting
        assert settings_kept(out)["setting"] == settings_kept(again)["setting"] == setting
        text = (again / "predictions.jsonl").read_text()
        assert text == (out / "predictions.jsonl").read_text()
        rows = {row["id"]: row for row in map(json.loads, text.splitlines())}
        assert list(rows) == ["rte-1", "mine", "rte-2", "xsum-4"]
        answerer = train.answerer_of(parsed("predict", "--model", out, "--instruction", ""))
        for task in load_tasks(p3, "test", joint=setting == "joint")[:2]:
            assert [rows[i.id]["prediction"] for i in task.instances] == best_of_each(answerer, task)
        right = [row["prediction"] in row["references"] for row in rows.values() if row["task"] == "rte"]
        metrics = json.loads((again / "metrics.json").read_text())
        assert metrics["rte"]["exact_match"] == pytest.approx(100 * sum(right) / 3) and len(metrics) == 3
    assert losses[0] != losses[1]


def best_of_each(answerer: train.Answerer, task: Task) -> list[str]:
    """The choices of a task that are the most probable ones, each pair of input and choice in a pass of its own."""
    best, first = [], torch.tensor([0])
    with torch.no_grad():
        for (instruction, ids), instance in zip(answerer.prompts(task), task.instances, strict=True):
            encoded = answerer.model.encode_instruction(torch.tensor([instruction]))
            targets = [answerer.prompts.tokenizer.encode(choice).ids for choice in instance.choices]
            ranks = [answerer.model.rank(encoded, pad([ids], 0), pad([t], NO_LABEL), first).item() for t in targets]
            best.append(instance.choices[ranks.index(max(ranks))])
    return best


def test_the_demo_shows_scores_answers_and_its_folder(tmp_path, monkeypatch, capsys):
    """The demo's own command, with fewer steps."""
    monkeypatch.setattr(train, "DEMO", replace(train.DEMO, steps=3, save_every=3))
    run("demo", "--out", tmp_path / "demo")
    text = capsys.readouterr().out
    for expected in (
        "unseen arguments",
        "unseen compositions",
        "no instruction",
        "exact match",
        "ROUGE-L",
        "wrong:",
        str(tmp_path / "demo"),
    ):
        assert expected in text
    metrics = json.loads((tmp_path / "demo" / "metrics.json").read_text())
    assert {"unseen arguments", "unseen compositions", "unseen compositions, no instruction"} <= set(metrics)
    shown = text.strip().splitlines()[-1]  # the command that the demo tells its user to type
    assert shown.strip().startswith("python train.py predict")
    done = subprocess.run(
        shown.replace("python train.py", f"{sys.executable} {TRAIN}"), shell=True, capture_output=True, text=True
    )
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1, done.stderr


def test_finetuning_sees_the_training_split_alone(tmp_path, sni, start, monkeypatch):
    seen, real = [], train.encode_tasks
    monkeypatch.setattr(
        train, "encode_tasks", lambda tasks, *rest: (seen.extend(t.name for t in tasks), real(tasks, *rest))[1]
    )
    finetune(sni, start, tmp_path / "run", "--steps", 1)
    assert seen == ["train_1", "train_2", "train_3"]
    rows = (tmp_path / "run" / "predictions.jsonl").read_text()
    assert "test_1" in rows and "test_2" in rows and "train" not in rows


def test_an_evaluation_on_the_way_changes_nothing(tmp_path, sni, start):
    """Dropout must act again after it, and no random number may be used up; there is none at the last step."""
    for name, more in (("plain", ()), ("evaluated", ("--eval-every", 1))):
        finetune(sni, start, tmp_path / name, "--steps", 3, "--dropout", 0.3, *more)
    losses = [
        [entry["loss"] for entry in log_of(tmp_path / name) if "loss" in entry] for name in ("plain", "evaluated")
    ]
    assert losses[0] == losses[1]
    assert [entry["step"] for entry in log_of(tmp_path / "evaluated") if "rougeL" in entry] == [1, 2]


def test_two_runs_of_one_seed_are_equal_and_another_seed_is_not(tmp_path, sni, start):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        finetune(sni, start, tmp_path / name, "--steps", 3, "--seed", seed)
    losses = {name: [entry["loss"] for entry in log_of(tmp_path / name)] for name in "abc"}
    assert losses["a"] == losses["b"] != losses["c"]


def test_a_resumed_run_ends_as_one_that_never_stopped(tmp_path, sni, start, monkeypatch):
    """Stopped by an error in the middle of step 5, after the checkpoint of step 4: same weights, same log."""
    options = (
        "--steps",
        7,
        "--save-every",
        2,
        "--dropout",
        0.2,
        "--log-every",
        3,
    )  # logged steps and checkpoints differ
    finetune(sni, start, tmp_path / "whole", *options)
    real, calls = train.accumulate_gradient, []

    def stop_in_step_5(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise MemoryError("stopped")
        return real(*arguments)

    monkeypatch.setattr(train, "accumulate_gradient", stop_in_step_5)
    with pytest.raises(MemoryError):
        finetune(sni, start, tmp_path / "halves", *options)
    monkeypatch.setattr(train, "accumulate_gradient", real)
    with open(tmp_path / "halves" / "log.jsonl", "a") as log:
        log.write('{"step": 5, "loss": 9}\n{"step": 6, "lo')  # killed after the checkpoint, while it wrote a line
    assert (tmp_path / "halves" / "training-4.pt").is_file()
    finetune(sni, start, tmp_path / "halves", *options, "--resume")
    one, other = (weights_of(tmp_path / name) for name in ("whole", "halves"))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    losses = [[(entry["step"], entry["loss"]) for entry in log_of(tmp_path / name)] for name in ("whole", "halves")]
    assert losses[0] == losses[1] and [step for step, _ in losses[0]] == [3, 6, 7]


def test_a_resumed_pretraining_goes_on_in_the_text(tmp_path, start, monkeypatch):
    shards = write_shards(tmp_path, 300)

    def pretrain(out, *more):
        run("pretrain", "--start", start, "--corpus", *shards, "--out", out, "--steps", 5, "--save-every", 2,
                    "--bottleneck", 3, "--prefix-length", 2, *FAST, *more)  # fmt: skip

    pretrain(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(
            train.Meter, "add", lambda *_: 1 / 0 if (tmp_path / "halves" / "training-2.pt").exists() else None
        )
        patch.setattr(train.Meter, "read", lambda _: {"loss": 0})
        with pytest.raises(ZeroDivisionError):
            pretrain(tmp_path / "halves")
    pretrain(tmp_path / "halves", "--resume")
    one, other = (weights_of(tmp_path / name) for name in ("whole", "halves"))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("lost", ["config or weights", "weights", "training state"])
def test_a_checkpoint_that_could_not_be_finished_leaves_the_last_one_whole(
    tmp_path, sni, start, monkeypatch, lost, first
):
    """The disk is full when a part of the first or second checkpoint is written: the one before must still be whole."""
    options = ("--steps", 6, "--save-every", 2)
    finetune(sni, start, tmp_path / "whole", *options)
    parts = {
        "config or weights": (HINT, "save_pretrained"),
        "weights": (t5, "write_safetensors"),
        "training state": (torch, "save"),
    }
    owner, name = parts[lost]
    real, calls = getattr(owner, name), []

    def full(*arguments, **settings):
        calls.append(1)
        if len(calls) == first:
            raise OSError(28, "No space left on device", "a file")
        return real(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        with pytest.raises(SystemExit, match="No space left"):
            finetune(sni, start, tmp_path / "halves", *options)
    finetune(sni, start, tmp_path / "halves", *options, "--resume")
    one, other = (weights_of(tmp_path / name) for name in ("whole", "halves"))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert [path.name for path in (tmp_path / "halves").glob("training-*")] == ["training-6.pt"]


def test_only_a_run_is_resumed_and_nothing_of_another_folder_is_touched(tmp_path, sni, start):
    before = {path.name: path.read_bytes() for path in start.iterdir()}
    for content in (before["config.json"], b'{"run": 3}', b"{"):
        (start / "config.json").write_bytes(content)
        with pytest.raises(SystemExit, match="public-t5"):
            finetune(sni, SHARED, start, "--steps", 1, "--resume")
        assert {path.name for path in start.iterdir()} == set(before) and (
            start / "config.json"
        ).read_bytes() == content


class MakesAFolder:
    """A pickle of it runs code wherever it is read without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_what_has_no_part_in_the_gradient_may_change_when_a_run_goes_on(tmp_path, sni, start):
    """As after a message that the memory is full."""
    finetune(sni, start, tmp_path / "run", "--steps", 1, "--dropout", 0)
    finetune(sni, start, tmp_path / "run", "--steps", 3, "--dropout", 0, "--resume", "--microbatch", 1, "--save-every", 1,
             "--gradient-checkpointing", "--eval-batch-size", 2)  # fmt: skip
    assert [entry["step"] for entry in log_of(tmp_path / "run")] == [1, 2, 3]


def test_foreign_lines_in_a_log_are_dropped_and_a_foreign_training_state_is_refused(tmp_path, sni, start):
    finetune(sni, start, tmp_path / "run", "--steps", 1)
    with open(tmp_path / "run" / "log.jsonl", "ab") as log:
        log.write(b'{"a": 1}\n[]\n\xff\n{"step": "x"}\n')
    finetune(sni, start, tmp_path / "run", "--steps", 2, "--resume")
    assert [entry["step"] for entry in log_of(tmp_path / "run")] == [1, 2]
    torch.save({"position": 3}, tmp_path / "run" / "training-2.pt")
    with pytest.raises(SystemExit, match="training-2.pt: is not the training state of a run"):
        finetune(sni, start, tmp_path / "run", "--steps", 3, "--resume")


def test_a_corpus_that_cannot_be_read_leaves_nothing_behind(tmp_path, start):
    (tmp_path / "bad.json.gz").write_bytes(b"not gzip")
    with pytest.raises(SystemExit, match="bad.json.gz"):
        run("pretrain", "--start", start, "--corpus", tmp_path / "bad.json.gz", "--out", tmp_path / "out", *FAST)
    assert not (tmp_path / "out").exists()


def test_a_bad_line_of_a_shard_is_named_or_skipped_as_asked(tmp_path, start):
    """It stands behind the first 128 texts, so a run has begun when it comes; what follows is the text without it."""
    (shard,) = write_shards(tmp_path, 150, shards=1)
    good = tmp_path / "good.json.gz"
    good.write_bytes(shard.read_bytes())
    lines = gzip.decompress(shard.read_bytes()).splitlines(keepends=True)
    shard.write_bytes(gzip.compress(b"".join([*lines[:140], b'{"text": \n', *lines[140:]])))
    sizes = ("--bottleneck", 3, "--prefix-length", 2, "--steps", 40, "--save-every", 1)
    words = ("pretrain", "--start", start, *sizes, *FAST)
    run(*words, "--corpus", good, "--out", tmp_path / "good")
    words = (*words, "--corpus", shard, "--out")

    stopped = command_line(*words, tmp_path / "stopped")
    assert stopped.returncode == 1 and f"{shard}: line 141 cannot be read as C4 text" in stopped.stderr
    assert 0 < log_of(tmp_path / "stopped")[-1]["step"] < 40
    for more in ((tmp_path / "stopped", "--resume"), (tmp_path / "whole",)):
        done = command_line(*words, *more, "--skip-bad-lines")
        assert done.returncode == 0 and done.stderr.splitlines()[-1].startswith(
            f"bad lines skipped: 1; the first: {shard}: line 141 "
        ), "the shard is read again and again, and its line counted once"
        one, other = (weights_of(folder) for folder in (tmp_path / "good", more[0]))
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    shard.write_bytes(gzip.compress(b"bad\n" * 1000))
    refused(command_line(*words, tmp_path / "none", "--skip-bad-lines", timeout=100), "no text in this shard")


def test_dropout_of_the_generator_may_change_after_pretraining(tmp_path, sni, start):
    finetune(sni, start, tmp_path / "one", "--steps", 1, "--generator-dropout", 0.1)
    run(
        "finetune",
        "--data",
        sni,
        "--start",
        tmp_path / "one",
        "--out",
        tmp_path / "two",
        "--steps",
        1,
        *FAST,
        "--generator-dropout",
        0.4,
    )
    assert HINT.from_pretrained(tmp_path / "two").config.generator_dropout == 0.4


@pytest.mark.parametrize(
    "change",
    [{"run": 5}, {"max_input": "x"}, {"max_input": 3}, {"max_target": 1e9}, {"examples": "x"}, {"system": "foo"}],
)
def test_settings_of_a_run_that_make_no_sense_are_refused(tmp_path, sni, start, change):
    finetune(sni, start, tmp_path / "run", "--steps", 1)
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(
        json.dumps({**config, "run": {**config["run"], **change}} if "run" not in change else {**config, **change})
    )
    with pytest.raises(SystemExit, match="config.json: its run"):
        run("predict", "--model", tmp_path / "run", "--instruction", "x", "y")


def test_models_that_cannot_answer_so_are_refused(tmp_path, sni, start, spiece):
    """A folder without a model, a system that the model is not of, a tokenizer that is too large for it."""
    finetune(sni, start, tmp_path / "run", "--steps", 1)
    run("evaluate", "--model", tmp_path / "run", "--data", sni, "--out", tmp_path / "scores")
    assert json.loads((tmp_path / "scores" / "config.json").read_text())["run"]["system"] == "hint"
    ask = ("--instruction", "x", "y")
    with pytest.raises(SystemExit, match="scores.*has saved no model"):
        run("predict", "--model", tmp_path / "scores", *ask)
    with pytest.raises(SystemExit, match="run is a HINT model .hint."):
        run("predict", "--model", tmp_path / "run", "--system", "tk-instruct", *ask)
    with pytest.raises(SystemExit, match="is not a HINT model"):
        run("predict", "--model", start, "--system", "hint", *ask)
    tiny_t5(vocab_size=64).save_pretrained(start)
    with pytest.raises(SystemExit, match="the model only 64"):
        run("predict", "--model", start, *ask)


def test_halves_of_characters_are_read_as_question_marks(tmp_path, sni, start, capsys):
    """JSON and command lines may hold them; tokenizers and files may not."""
    path = sni / "tasks" / "test_1.json"
    path.write_text(
        path.read_text()
        .replace("the cat sat", "the \\ud800 sat")
        .replace("out 0", "out \\ud83d")
        .replace('"id": "', '"id": "\\ud800')
    )
    assert "\\ud800" in path.read_text()
    finetune(sni, start, tmp_path / "run", "--steps", 1)
    assert "out ?" in (tmp_path / "run" / "predictions.jsonl").read_text()
    run("predict", "--model", tmp_path / "run", "--instruction", "a \udcff b", "in \udcff")


def test_a_reader_who_has_seen_enough_ends_the_answers_quietly(tmp_path, sni, start):
    finetune(sni, start, tmp_path / "run", "--steps", 1)
    ask = f"{sys.executable} {TRAIN} predict --model {tmp_path / 'run'} --instruction x " + "y " * 9
    done = subprocess.run(f"({ask}) | true", shell=True, capture_output=True, text=True)
    assert done.stderr == ""


def test_a_training_state_that_wants_to_run_code_is_refused(tmp_path, sni, start):
    finetune(sni, start, tmp_path / "run", "--steps", 1)
    torch.save(MakesAFolder(tmp_path / "it-ran"), tmp_path / "run" / "training-1.pt")
    with pytest.raises(SystemExit, match="training-1.pt"):
        finetune(sni, start, tmp_path / "run", "--steps", 2, "--resume")
    assert not (tmp_path / "it-ran").exists()


def test_a_run_without_a_checkpoint_resumes_from_its_beginning(tmp_path, sni, start):
    finetune(sni, start, tmp_path / "never", "--steps", 2, "--resume")
    assert [entry["step"] for entry in log_of(tmp_path / "never")] == [1, 2]


def test_inputs_come_from_arguments_a_file_or_standard_input(tmp_path, sni, start):
    out = tmp_path / "run"
    finetune(sni, start, out, "--steps", 1)
    (tmp_path / "inputs.txt").write_text("in 0\nin 1\n")
    ask = ("predict", "--model", out, "--instruction", "Say it.")
    answers = [
        command_line(*ask, "in 0", "in 1"),
        command_line(*ask, "--file", tmp_path / "inputs.txt"),
        command_line(*ask, input="in 0\nin 1\n"),
    ]
    assert {done.returncode for done in answers} == {0}
    assert len({done.stdout for done in answers}) == 1 and len(answers[0].stdout.splitlines()) == 2
    both = command_line(*ask, "--file", "-", "in 0", input="in 1\n")
    assert both.stdout == answers[0].stdout
    assert command_line(*ask, input="").stdout == ""


def test_evaluation_encodes_each_instruction_once(tokenizer):
    model = tiny_hint(vocab_size=300)
    seen = []
    model.hypernetwork.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    task = replace(TASK, instances=TASK.instances * 7)
    answerer = train.Answerer(model, HINTFormat(tokenizer), 4, batch_size=2, precision="fp32")
    assert len(answerer.predictions([task, task])) == 14 and seen == [1, 1]


def test_answers_are_computed_in_the_precision_asked_for(tokenizer):
    model, kinds = tiny_hint(vocab_size=300), set()
    model.t5.decoder.blocks[0].self_attention.q.register_forward_hook(lambda _, __, out: kinds.add(out.dtype))
    for precision, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        kinds.clear()
        train.Answerer(model, HINTFormat(tokenizer), 3, batch_size=2, precision=precision).answers(TASK)
        assert kinds == {kind}


def test_options_of_answering_act(tmp_path, sni, start, spiece, capsys):
    """A model without a tokenizer of its own, answers of one token, another number of examples."""
    out = tmp_path / "run"
    finetune(sni, start, out, "--steps", 1, "--tokenizer", spiece)
    (out / "tokenizer.json").unlink()
    evaluate = ("evaluate", "--model", out, "--data", sni, "--tokenizer", spiece)
    run(*evaluate, "--out", tmp_path / "long")
    run(*evaluate, "--out", tmp_path / "short", "--max-new-tokens", 1)
    said = {}
    for name in ("long", "short"):
        rows = [json.loads(line) for line in (tmp_path / name / "predictions.jsonl").read_text().splitlines()]
        said[name] = sum(len(row["prediction"]) for row in rows)
    assert said["short"] < said["long"]
    asked = []
    answerer = train.answerer_of(parsed(*evaluate, "--out", "x", "--examples", 1))
    asked.append(answerer.prompts.examples)
    answerer = train.answerer_of(parsed(*evaluate, "--out", "x"))
    assert asked + [answerer.prompts.examples] == [1, 0]


def test_a_model_answers_in_the_precision_it_was_trained_in_unless_told_otherwise(tmp_path, sni, start):
    finetune(sni, start, tmp_path / "run", "--steps", 1, "--precision", "bf16")
    ask = ("predict", "--model", tmp_path / "run", "--instruction", "x")
    for more, kind in (((), torch.bfloat16), (("--precision", "fp32"), torch.float32)):
        with train.answerer_of(parsed(*ask, *more)).context():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == kind


def test_a_tokenizer_that_is_named_is_used_in_place_of_the_model_s(tmp_path, sni, start):
    elsewhere = tmp_path / "elsewhere.model"
    (start / "spiece.model").rename(elsewhere)
    finetune(sni, start, tmp_path / "run", "--steps", 1, "--tokenizer", elsewhere)
    with pytest.raises(SystemExit, match="no tokenizer.json and no spiece.model"):
        finetune(sni, start, tmp_path / "other", "--steps", 1)


def test_a_public_t5_answers_as_tk_instruct_unless_told_otherwise(start):
    ask = ["predict", "--model", start, "--instruction", "x"]
    plain = train.answerer_of(parsed(*ask))
    told = train.answerer_of(parsed(*ask, "--system", "no-instruct"))
    assert isinstance(plain.prompts, train.TkInstructFormat) and isinstance(told.prompts, train.NoInstructFormat)


class Echo(torch.nn.Module):
    """Answers every input with itself."""

    def encode_instruction(self, instruction_ids):
        return None

    def generate(self, task, input_ids, max_new_tokens):
        return input_ids[:, :max_new_tokens]


def test_answers_come_back_in_the_order_of_the_inputs(tokenizer):
    """Inputs are sorted by length to be answered in batches, and their answers put back."""
    texts = ["the cat and " * n + "the dog" for n in (5, 1, 4, 2, 3)]
    task = replace(TASK, instances=tuple(TASK.instances[0]._replace(input=text) for text in texts))
    answerer = train.Answerer(Echo(), HINTFormat(tokenizer), 100, batch_size=2, precision="fp32")
    assert answerer.answers(task) == texts


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_choices_are_ranked_and_what_has_none_is_generated(tokenizer, batch_size):
    """Each instance has choices of its own, so that none can be given to another; not the first of all is the best."""
    texts = ["the cat and " * n + "the dog" for n in (5, 1, 4, 2, 3, 1)]
    words = "the cat sat on a mat and dog barked at it please give me book that lies table".split()
    choices = [tuple(" ".join(words[3 * n + k :][: 1 + k]) for k in (2, 0, 1)) for n in range(6)]
    choices[3] = ()
    task = replace(
        TASK, instances=tuple(Instance(str(n), *pair) for n, pair in enumerate(zip(texts, [("x",)] * 6, choices)))
    )
    answerer = train.Answerer(tiny_hint(vocab_size=300), HINTFormat(tokenizer), 5, batch_size, "fp32")
    ranked = replace(task, instances=task.instances[:3] + task.instances[4:])
    best = best_of_each(answerer, ranked)
    assert [place for place, choice in enumerate(best) if choice != ranked.instances[place].choices[0]]
    free = answerer.answers(replace(task, instances=(task.instances[3],)))
    assert answerer.answers(task) == best[:3] + free + best[3:]


def test_no_more_choices_are_ranked_at_once_than_asked_and_of_equal_ones_the_first_is_best(tokenizer):
    class Undecided(Echo):
        def rank(self, task, input_ids, labels, owners):
            sizes.append((len(labels), owners.tolist(), len(input_ids)))
            return torch.zeros(len(labels))

    sizes, instance = [], TASK.instances[0]._replace(choices=("the cat and the dog", "a cat", "it"))
    task = replace(TASK, instances=(instance,) * 3)
    answers = train.Answerer(Undecided(), HINTFormat(tokenizer), 5, batch_size=4, precision="fp32").answers(task)
    assert answers == ["the cat and the dog"] * 3, "and no input is read once for each of its choices"
    assert sizes == [(4, [0, 0, 0, 1], 2), (4, [0, 0, 1, 1], 2), (1, [0], 1)]


# ------------------------------------------------------------------------ the loop


def examples(count=7) -> list[Ids]:
    draw = torch.Generator().manual_seed(0)
    ids = lambda: torch.randint(2, 53, (int(torch.randint(2, 9, (1,), generator=draw)),), generator=draw).tolist() + [1]  # noqa: E731
    return [Ids(ids(), ids(), ids()) for _ in range(count)]


def test_microbatches_of_any_size_give_the_gradient_of_the_whole_batch():
    """Targets differ in length, so a mean over microbatches of means would be another gradient."""
    model, batch = tiny_hint(), examples()
    batch += [example._replace(instruction=batch[0].instruction) for example in examples(3)]
    wanted = gradient(model, batch, 1000)
    assert [len(train.microbatches(batch, tokens)) for tokens in (1000, 100, 50, 1)] == [1, 5, 7, 10]
    for tokens in (100, 50, 1):
        for found, right in zip(gradient(model, batch, tokens), wanted, strict=True):
            torch.testing.assert_close(found, right, atol=1e-6, rtol=1e-4)


def gradient(model, batch, microbatch):
    model.zero_grad()
    loss = train.accumulate_gradient(model, batch, microbatch, torch.device("cpu"), train.nullcontext)
    assert math.isfinite(loss)
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_z_loss_is_part_of_the_gradient(monkeypatch):
    model, batch = tiny_hint(), examples()
    with_it = gradient(model, batch, 1000)
    monkeypatch.setattr(train, "Z_LOSS", 0.0)
    without = gradient(model, batch, 1000)
    assert any((one - other).abs().max() > 1e-6 for one, other in zip(with_it, without))


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
        for parameter, found in zip(model, gradients[step - 1]):
            parameter.grad = found
        optimizer.step()
        matrix, vector = (found.double() for found in gradients[step - 1])
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
    constant = train.Recipe(steps=100)
    assert {train.learning_rate(step, constant) for step in (1, 50, 100)} == {1e-3}
    cosine = replace(constant, warmup=10, final_rate=0.1)
    rates = [train.learning_rate(step, cosine) for step in range(1, 101)]
    assert rates[4] == pytest.approx(5e-4) and rates[9] == max(rates) == 1e-3 and rates[-1] == pytest.approx(1e-4)
    assert rates[54] == pytest.approx(5.5e-4), "half-way down"
    assert train.learning_rate(5, replace(cosine, steps=5)) == pytest.approx(5e-4), "a run that ends in its warm-up"


def test_the_meter_means_losses_and_counts_real_tokens_of_training():
    meter = train.Meter()
    meter.add(1.0, [Ids([5, 1], [6, 1], [7, 1])], seconds=0.5)
    meter.add(3.0, [Ids([5, 5, 1], [1], [1]), Ids([1], [1], [1])], seconds=1.5)
    assert meter.read() == {"loss": 2.0, "tokens_per_second": 7.0} and meter.losses == []


def test_gradient_checkpointing_is_asked_of_t5(tmp_path, sni, start, monkeypatch):
    asked = []
    monkeypatch.setattr(train, "set_gradient_checkpointing", lambda _, on: asked.append(on))
    finetune(sni, start, tmp_path / "plain", "--steps", 1)
    finetune(sni, start, tmp_path / "checkpointed", "--steps", 1, "--gradient-checkpointing")
    assert asked == [False, True]


def test_a_compiled_pass_has_the_same_losses(tmp_path, sni, start, monkeypatch):
    """The graphs that are handed to the compiler are only counted and run as they are: a real one takes minutes."""
    graphs, real = [], torch.nn.Module.compile

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: real(self, backend=compiler, **how))
    for name, words in {"plain": [], "compiled": ["--compile"]}.items():
        finetune(sni, start, tmp_path / name, "--steps", 3, "--dropout", 0, "--system", "tk-instruct", *words)
        assert bool(graphs) == (name == "compiled")
    plain, compiled = ([entry["loss"] for entry in log_of(tmp_path / name)] for name in ("plain", "compiled"))
    assert plain == pytest.approx(compiled, abs=1e-5) and len(plain) == 3


def test_a_control_is_no_part_of_the_whole_and_is_told_nothing(tmp_path):
    row = {"id": "a", "task": "t", "references": ["yes"]}
    train.report({"seen": [{**row, "prediction": "yes"}]}, tmp_path, control={"blind": [{**row, "prediction": "no"}]})
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert {name: found["exact_match"] for name, found in metrics.items()} == {"seen": 100, "overall": 100, "blind": 0}
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 1
    told = train.without_instruction(TASK)
    assert (told.definition, told.examples, told.instances) == ("", (), TASK.instances) and isinstance(told, Task)


def test_the_first_free_name_is_taken(tmp_path):
    name = str(tmp_path / "demo")
    for wanted in (name, f"{name}-2", f"{name}-3"):
        assert train.first_free(name) == wanted
        Path(wanted).mkdir()


def test_dropout_of_the_recipe_reaches_t5_and_the_generator_s_attention():
    model = tiny_hint()
    train.set_dropout(model, 0.3)
    rates = {name: module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert {rate for name, rate in rates.items() if "networks" not in name} == {0.3}
    assert {rate for name, rate in rates.items() if "networks" in name} == {
        0.0
    } and "hypernetwork.attention.dropout" in rates


@pytest.mark.parametrize(
    "option, value",
    [("--learning-rate", 0.05), ("--warmup", 5), ("--final-rate", 0.1), ("--dropout", 0.4), ("--seed", 5), ("--batch-size", 2), ("--group", 2),
     ("--max-instruction", 8), ("--max-input", 8), ("--max-target", 2), ("--examples", 1), ("--max-instances", 1), ("--precision", "bf16"),
     ("--generator-dropout", 0.8), ("--embedding-scale", 8)],
)  # fmt: skip
def test_each_option_of_training_changes_the_run(tmp_path, sni, start, option, value):
    losses = []
    for name, more in (("plain", ()), ("changed", (option, value))):
        finetune(sni, start, tmp_path / name, "--steps", 3, *more)
        losses.append([entry["loss"] for entry in log_of(tmp_path / name)])
    assert losses[0] != losses[1]


def test_bf16_computes_in_bf16_over_fp32_weights():
    model = tiny_hint()
    _, context = train.device_and_precision("bf16")
    kinds = set()
    model.t5.encoder.blocks[0].self_attention.q.register_forward_hook(lambda _, __, out: kinds.add(out.dtype))
    with context():
        loss = model(torch.tensor([[5, 1]]), torch.tensor([[6, 1]]), torch.tensor([[7, 1]]))
    loss.loss.backward()
    assert kinds == {torch.bfloat16} and loss.loss.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}


# ------------------------------------------------------------------------ what is refused


def refused(done: subprocess.CompletedProcess, *expected: str) -> None:
    """One sentence, no traceback, a non-zero exit."""
    assert done.returncode in (1, 2), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("train.py"), done.stderr
    assert all(text in done.stderr for text in expected), done.stderr
    assert "Traceback" not in done.stderr


def test_bad_input_ends_in_one_sentence_and_leaves_nothing_behind(tmp_path, sni, start):
    """Each through the real command line; the library's own tests try every form of damage."""
    out = tmp_path / "out"
    run = ("finetune", "--out", out, "--steps", 1, *FAST)
    good = ("--data", sni, "--start", start)
    weights = (start / "model.safetensors").read_bytes()
    refused(command_line(*run, "--data", tmp_path / "absent", "--start", start), "absent", "tasks/")
    refused(command_line(*run, "--data", sni, "--start", tmp_path / "absent"), "absent")
    refused(command_line(*run, *good, "--precision", "fp16"), "fp16", "bf16")
    refused(command_line(*run, *good, "--no-such-option", 3), "--no-such-option")
    refused(command_line(*run, *good, "--steps", 0), "--steps")
    refused(command_line(*run, "--data", sni, "--size", "tiny"), "--tokenizer")
    refused(command_line(*run, *good, "--setting", "joint"), "holds no prompted examples")
    (start / "model.safetensors").write_bytes(weights[:-5])
    refused(command_line(*run, *good), "model.safetensors")
    (start / "model.safetensors").unlink()
    (start / "pytorch_model.bin").write_bytes(
        pickle.dumps({"shared.weight": MakesAFolder(tmp_path / "it-ran")}, protocol=2)
    )
    refused(command_line(*run, *good), "pytorch_model.bin")
    torch.save({"shared.weight": torch.ones(2)}, start / "pytorch_model.bin")
    refused(command_line(*run, *good), "lacks decoder.block.0", "and 61 more")
    assert not (tmp_path / "it-ran").exists()
    (start / "pytorch_model.bin").unlink()
    (start / "model.safetensors").write_bytes(weights)
    (sni / "tasks" / "train_2.json").write_text("{")
    refused(command_line(*run, *good), "train_2.json", "not JSON")
    assert not out.exists()
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    refused(command_line(*run, *good), str(out), "--resume")
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_other_commands_refuse_in_the_same_way(tmp_path, sni, start):
    out = tmp_path / "out"
    refused(command_line("evaluate", "--model", start, "--data", sni, "--split", "dev", "--out", out), "dev_tasks.txt")
    refused(command_line("predict", "--model", tmp_path, "--instruction", "x", "y"), "config.json")
    refused(command_line("predict", "--model", start, "--instruction", "x", "--file", tmp_path / "absent"), "absent")
    refused(
        command_line("pretrain", "--start", start, "--corpus", tmp_path / "absent.json.gz", "--out", out, *FAST),
        "absent.json.gz",
    )
    refused(command_line("no-such-command"), "no-such-command")
    assert not out.exists()


@pytest.mark.parametrize(
    "wrong",
    [
        dict(dropout=1.0),
        dict(final_rate=1.5),
        dict(steps=0),
        dict(learning_rate=-1.0),
        dict(max_input=3),
        dict(steps="many"),
        dict(seed=2**63),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(train.RunError, match="--" + next(iter(wrong)).replace("_", "-")):
        train.Recipe(**wrong)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path, sni, start, spiece):
    tiny_t5(vocab_size=64).save_pretrained(start)
    with pytest.raises(SystemExit, match="tokens, the model only 64"):
        finetune(sni, start, tmp_path / "run", "--steps", 1)
    few = json.loads(toy_tokenizer().to_str())
    few["model"]["vocab"] = {"<pad>": 0, "</s>": 1, "<unk>": 2, "the": 64}  # few enough, but one id is too high
    (start / "tokenizer.json").write_text(json.dumps(few))
    with pytest.raises(SystemExit, match="has 65 tokens, the model only 64"):
        finetune(sni, start, tmp_path / "run", "--steps", 1)


def test_resume_wants_the_same_options(tmp_path, sni, start):
    finetune(sni, start, tmp_path / "run", "--steps", 1)
    with pytest.raises(SystemExit, match="learning_rate"):
        finetune(sni, start, tmp_path / "run", "--steps", 2, "--resume", "--learning-rate", 0.5)
    finetune(sni, start, tmp_path / "run", "--steps", 2, "--resume")
    assert [entry["step"] for entry in log_of(tmp_path / "run")] == [1, 2]


def test_a_hint_folder_keeps_its_sizes_and_its_kind(tmp_path, sni, start):
    finetune(sni, start, tmp_path / "run", "--steps", 1)
    for more, message in ((("--bottleneck", "4"), "cannot be changed"), (("--system", "tk-instruct"), "cannot become")):
        with pytest.raises(SystemExit, match=message):
            run("finetune", "--data", sni, "--start", tmp_path / "run", "--out", tmp_path / "x", *FAST, *more)


def test_a_loss_that_is_not_finite_stops_before_the_step_and_keeps_the_checkpoint(tmp_path, sni, start, monkeypatch):
    finetune(sni, start, tmp_path / "run", "--steps", 2)
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    monkeypatch.setattr(train, "accumulate_gradient", lambda *_: math.nan)
    with pytest.raises(SystemExit, match="loss of step 3 is nan"):
        finetune(sni, start, tmp_path / "run", "--steps", 4, "--resume")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "error, sentence",
    [
        (torch.OutOfMemoryError("CUDA"), "--microbatch"),
        (OSError(28, "No space left on device", "x"), "x: No space"),
    ],
)
def test_what_no_one_can_foresee_also_ends_in_a_sentence(tmp_path, sni, start, monkeypatch, error, sentence):
    def fail(*_):
        raise error

    monkeypatch.setattr(train, "accumulate_gradient", fail)
    with pytest.raises(SystemExit, match=sentence):
        finetune(sni, start, tmp_path / "run", "--steps", 1)


def test_importing_a_module_does_nothing():
    program = "import sys; before = set(sys.modules); import t5, hypernet, hint, data, train; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=os.fspath(TRAIN.parent))
    assert (done.stdout.strip(), done.stderr) == ("False", "")


def test_help_of_every_command_fits_its_options():
    for command in ((), ("demo",), ("pretrain",), ("finetune",), ("evaluate",), ("predict",)):
        done = command_line(*command, "--help")
        assert done.returncode == 0 and "usage" in done.stdout


@needs_shared
def test_the_real_data_train_and_score_with_the_real_vocabulary(tmp_path):
    """Two tasks' worth of steps of a tiny model on Super-NaturalInstructions and its twelve unseen tasks."""
    out = tmp_path / "run"
    run("finetune", "--data", SHARED / "sni", "--size", "tiny", "--tokenizer", SHARED / "t5", "--out", out, "--steps", 2,
                "--max-instances", 2, "--max-instruction", 64, "--max-target", 4, "--bottleneck", 4, "--prefix-length", 2, *FAST)  # fmt: skip
    assert len((out / "predictions.jsonl").read_text().splitlines()) == 24
    assert len(json.loads((out / "metrics.json").read_text())) == 13
    assert T5Config(**HINT.from_pretrained(out).t5.config.__dict__).vocab_size == 32_100 and isinstance(
        load_model(out).t5, T5
    )
