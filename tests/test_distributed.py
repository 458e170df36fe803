"""Two processes of torchrun, on a CPU, against one: the same gradients, losses, weights, checkpoints and answers.

Most of the time goes into starting processes. So one pair of them does nearly all of this file's runs, one after another
(`act`, below), and the tests look at what these left behind.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SENTENCES, log_of, tiny_hint, tiny_t5, write_shards, write_task
from test_train import examples

import train
from t5 import read_weights

ONE_EACH, ALL_AT_ONCE = 1, 100_000  # --microbatch: 5 for the 5 examples of a step, or a single one
FINETUNE = """--bottleneck 3 --prefix-length 2 --max-target 8 --max-instruction 40 --max-input 40 --batch-size 5 --steps 4
    --save-every 2 --log-every 1 --learning-rate 0.02 --precision fp32 --dropout 0 --generator-dropout 0""".split()
PRETRAIN = """--bottleneck 3 --prefix-length 2 --max-input 40 --batch-size 5 --microbatch 1 --steps 2 --log-every 1
    --precision fp32 --generator-dropout 0""".split()


class Commands:
    """Command lines of runs on the data of a folder, each into a folder of its own in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _of(self, command, out, *words) -> list[str]:
        return [command, "--out", str(self.folder / out), *map(str, words)]

    def finetune(self, out, *more) -> list[str]:
        return self._of("finetune", out, "--data", self.folder / "sni", "--start", self.folder / "t5", *FINETUNE, *more)

    def pretrain(self, out, *more) -> list[str]:
        shards = sorted(self.folder.glob("c4-*"))
        return self._of("pretrain", out, "--start", self.folder / "t5", "--corpus", *shards, *PRETRAIN, *more)

    def evaluate(self, out, model) -> list[str]:
        return self._of("evaluate", out, "--data", self.folder / "sni", "--model", self.folder / model)


def torchrun(folder: Path, script: str, *words: str) -> subprocess.CompletedProcess:
    """`torchrun --standalone --nproc-per-node 2 -- SCRIPT ...`, which writes into the folder.

    The threads of torch's gloo crash now and then, in the middle or at the end of a process (2 of some 60 runs on two
    busy cores: SIGSEGV, SIGABRT, without a Python frame). Such a run, and no other, is made again, from the same start.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    environment = {**os.environ, "PYTHONFAULTHANDLER": "1"}  # a crash in torch's own code names its place
    before = folder.with_name(folder.name + "-before")
    shutil.copytree(folder, before)
    for _ in range(3):
        done = subprocess.run([*launcher, script, *words], capture_output=True, text=True, timeout=120, env=environment)
        if not re.search("SIGSEGV|SIGABRT", done.stderr):
            break
        shutil.rmtree(folder)
        shutil.copytree(before, folder)
    shutil.rmtree(before)
    return done


@pytest.fixture(scope="module")
def commands(tmp_path_factory, spiece) -> Commands:  # noqa: F811
    """Texts, a tiny T5, three tasks to train on and three to be scored on, none like another."""
    folder, draw = tmp_path_factory.mktemp("distributed"), random.Random(0)
    (folder / "sni").mkdir()
    names = {split: [f"{split}_{n}" for n in range(3)] for split in ("train", "test")}
    for name in names["train"] + names["test"]:
        texts = [" ".join(draw.choices(SENTENCES[0].split(), k=draw.randint(1, 8))) for _ in range(11)]
        instances = [{"id": f"{name}-{n}", "input": texts[n], "output": [texts[n + 5]]} for n in range(5)]
        write_task(folder / "sni", name, Definition=[texts[10]], Instances=instances)
    for split, tasks in names.items():
        (folder / "sni" / "splits" / "default" / f"{split}_tasks.txt").write_text("\n".join(tasks))
    torch.manual_seed(0)
    tiny_t5(vocab_size=300).save_pretrained(folder / "t5")
    (folder / "t5" / "spiece.model").write_bytes(spiece.read_bytes())
    write_shards(folder, 300)
    return Commands(folder)


@pytest.fixture(scope="module")
def runs(commands) -> Path:
    """The folder of all runs: those of one process have "one" in their name, the others are of two."""
    finetune, goes_on, noise = commands.finetune, ("--resume", "--microbatch", ONE_EACH), ("--dropout", 0.3)
    for words in (
        finetune("one"),
        finetune("one-plain", "--system", "tk-instruct"),
        finetune("one-bf16", "--microbatch", ONE_EACH, "--precision", "bf16"),
        commands.pretrain("one-pretrain"),
        finetune("chain", "--steps", 1),
    ):
        train.main(words)
    done = torchrun(
        commands.folder,
        __file__,
        str(commands.folder),
        json.dumps(
            [
                finetune("shard-5", "--microbatch", ONE_EACH, "--shard", "--eval-every", 2),
                finetune("ddp-1", "--microbatch", ALL_AT_ONCE, "--eval-every", 2),
                finetune("shard-1", "--microbatch", ALL_AT_ONCE, "--shard", "--gradient-checkpointing"),
                finetune("shard-plain", "--microbatch", ONE_EACH, "--shard", "--system", "tk-instruct"),
                finetune("shard-bf16", "--microbatch", ONE_EACH, "--shard", "--precision", "bf16"),
                commands.pretrain("ddp-pretrain"),
                commands.evaluate("scores", "one"),
                finetune("chain", "--steps", 2, *goes_on),
                finetune("chain", "--steps", 3, *goes_on, "--shard"),
                finetune("noise", *noise, "--steps", 3, "--microbatch", ONE_EACH),
                finetune("noise-halves", *noise, "--steps", 2, "--microbatch", ONE_EACH),
                finetune("noise-halves", *noise, "--steps", 3, *goes_on, "--shard"),
            ]
        ),
    )
    assert done.returncode == 0, done.stderr
    train.main(finetune("chain", "--resume"))
    return commands.folder


def act(folder: Path, command_lines: list[list[str]]) -> None:
    """What each of the two processes does: some gradients, then the runs."""
    with train.processes():
        for shard in (False, True):
            found = gradients(shard)
            if train.rank() == 0:
                torch.save(found, folder / f"gradients-{shard}.pt")
        for words in command_lines:
            train.main.__wrapped__(words)  # `main` without the processes, which are there


def gradients(shard: bool) -> list[dict[str, torch.Tensor]]:
    """Those of 7 examples in 1, 3 and 7 microbatches, each added to the one before."""
    torch.manual_seed(0)
    device, batch, found = torch.device("cpu"), examples(), []
    trained = train.spread(model := tiny_hint(), shard, device)
    for tokens, count in ((1000, 1), (80, 3), (1, 7)):
        assert len(train.microbatches(batch, tokens)) == count
        train.accumulate_gradient(trained, batch, tokens, device, train.nullcontext)
        grads = {name: weight.grad for name, weight in model.named_parameters()}
        found.append({name: grad.full_tensor() if shard else grad.clone() for name, grad in grads.items()})
    return found


# ------------------------------------------------------------------------ training


@pytest.mark.parametrize("shard", [False, True])
def test_the_gradient_is_that_of_one_process(runs, shard):
    """Of sums: it is here, and not by the weights, that a wrong factor shows, since Adafactor's steps hardly have one.

    The counts of microbatches are odd, and once there are fewer than processes.
    """
    found, wanted = torch.load(runs / f"gradients-{shard}.pt"), gradients(shard=False)
    assert len(found) == 3 and all(grad.any() for grad in wanted[0].values())
    for some, right in zip(found, wanted):
        torch.testing.assert_close(some, right, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "name, one",
    [
        ("ddp-1", "one"),
        ("shard-5", "one"),
        ("shard-1", "one"),
        ("shard-plain", "one-plain"),
        ("ddp-pretrain", "one-pretrain"),
        ("chain", "one"),  # a step in one process, one with DDP, one with --shard, and again one in one process
    ],
)
def test_losses_and_weights_are_those_of_one_process(runs, name, one):
    """Whatever the number of microbatches, and over checkpoints that another number of processes wrote."""
    assert_same_run(runs / name, runs / one, loss=1e-5, weight=1e-5)
    assert {path.name for path in (runs / name).iterdir()} == {path.name for path in (runs / one).iterdir()}


def test_shards_compute_in_bf16_too(runs):
    """The loss of a first step is that of one process in bf16, and not in fp32; gradients add up in another precision."""
    first = {name: log_of(runs / name)[0]["loss"] for name in ("shard-bf16", "one-bf16", "one")}
    assert first["shard-bf16"] == pytest.approx(first["one-bf16"], abs=1e-5)
    assert first["shard-bf16"] != pytest.approx(first["one"], abs=2e-5)
    assert_same_run(runs / "shard-bf16", runs / "one-bf16", loss=1e-2, weight=3e-2)


def assert_same_run(found: Path, wanted: Path, loss: float, weight: float) -> None:
    """The losses of all steps, and the final weights, within these bounds."""
    logs = [[(line["step"], line["loss"]) for line in log_of(run) if "loss" in line] for run in (found, wanted)]
    assert logs[0] == [(step, pytest.approx(right, abs=loss)) for step, right in logs[1]]
    torch.testing.assert_close(read_weights(found), read_weights(wanted), atol=weight, rtol=0)


def test_a_process_has_dropout_of_its_own_which_a_resumed_run_goes_on_with(runs):
    """In `ddp-1` both pass the same microbatch, so that they have drawn as often, and differ by their seeds alone."""
    one, other = (of_cpu for of_cpu, _ in torch.load(runs / "ddp-1" / "training-4.pt")["streams"])
    assert not torch.equal(one, other)
    assert_same_run(runs / "noise-halves", runs / "noise", loss=1e-5, weight=1e-5)
    losses = [log_of(runs / name)[-1]["loss"] for name in ("noise", "one")]
    assert losses[0] != pytest.approx(losses[1], abs=1e-3)


# ------------------------------------------------------------------------ answering


def test_processes_share_the_tasks_and_give_the_answers_of_one(runs, tmp_path):
    """The same rows in the same order; and what a spread model answers is what its folder answers."""
    answers = (runs / "one" / "predictions.jsonl").read_text()
    assert len({json.loads(line)["prediction"] for line in answers.splitlines()}) > 3
    assert (runs / "scores" / "predictions.jsonl").read_text() == answers
    train.main(
        ["evaluate", "--data", str(runs / "sni"), "--model", str(runs / "shard-5"), "--out", str(tmp_path / "out")]
    )
    for file in ("predictions.jsonl", "metrics.json"):
        assert (tmp_path / "out" / file).read_text() == (runs / "shard-5" / file).read_text()


@pytest.mark.parametrize("name", ["ddp-1", "shard-5"])
def test_an_evaluation_on_the_way_is_logged_once_and_changes_nothing(runs, name):
    assert [line["step"] for line in log_of(runs / name) if "rougeL" in line] == [2]
    assert_same_run(runs / name, runs / "one", loss=1e-5, weight=1e-5)


# ------------------------------------------------------------------------ the command line


def test_torchrun_runs_the_command_line_and_one_process_speaks(commands, runs):
    done = torchrun(commands.folder, train.__file__, *commands.finetune("ddp-5", "--microbatch", str(ONE_EACH)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("overall") == 1 and done.stderr.count("4/4") == 1
    assert_same_run(runs / "ddp-5", runs / "one", loss=1e-5, weight=1e-5)


def test_an_error_of_all_processes_is_said_once(commands):
    done = torchrun(commands.folder, train.__file__, *commands.finetune("none", "--start", "/no/such/model"))
    assert done.returncode != 0 and done.stderr.count("train.py: /no/such/model") == 1, done.stderr
    assert not (commands.folder / "none").exists()


def test_nothing_is_written_before_all_processes_have_read_what_they_need(commands, monkeypatch):
    """Else one that looks at --out a little later finds it in use."""
    out, there = commands.folder / "early", []
    monkeypatch.setattr(train, "from_all", lambda value: there.append(out.exists()) or [value])
    train.main(commands.finetune("early", "--steps", 1))
    assert there[0] is False and there[-1] is True


@pytest.mark.parametrize("more, kept", [((), True), (("--shard",), False)])
def test_shards_keep_no_bf16_copies_of_whole_weights(commands, monkeypatch, more, kept):
    """Autocast would, till the end of a pass: 2 bytes for each weight of the whole model in each process."""
    seen = []

    def look(_model, _examples, _microbatch, _device, context):
        with context():
            seen.append(torch.is_autocast_cache_enabled())
        raise train.RunError("seen enough")

    monkeypatch.setattr(train, "accumulate_gradient", look)
    monkeypatch.setattr(train, "spread", lambda model, shard, device: model)
    with pytest.raises(SystemExit, match="seen enough"):
        train.main(commands.finetune(f"copies-{kept}", "--precision", "bf16", *more))
    assert seen == [kept]


def test_what_needs_other_processes_than_there_are_is_refused(commands, monkeypatch):
    with pytest.raises(SystemExit, match="--shard: .* torchrun"):
        train.main(commands.finetune("none", "--shard"))
    assert not (commands.folder / "none").exists()
    monkeypatch.setattr(train, "world", lambda: 2)
    for words in (["demo"], ["compare"], ["predict", "--model", "x", "--instruction", "x", "y"]):
        with pytest.raises(SystemExit, match=f"{words[0]}: is for one process"):
            train.main(words)
    monkeypatch.setattr(train.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(train, "first_to_fail", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(SystemExit, match="at most 2"):
        train.main(["demo"])


if __name__ == "__main__":
    act(Path(sys.argv[1]), json.loads(sys.argv[2]))
