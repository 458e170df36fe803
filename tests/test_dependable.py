"""What holds when something goes wrong: kills, full disks, Ctrl-C, two runs at once, losses that are not finite."""

import math
import os
import random
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
import torch
from conftest import (
    FAST, SIZES, TRAIN, before_call, ends_as, log_of, losses_of, raising, refused, run, said, write_shards, write_task,
)  # fmt: skip

import t5
import train
from hint import load_model

pytestmark = pytest.mark.usefixtures("quick_disk")
long = pytest.mark.long
NUMBERS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture
def commands(tmp_path, sni, start):
    """The two commands that train, with dropout, but for --out; epochs and groups of documents end on the way."""
    more = ["--start", start, "--dropout", 0.2, "--save-every", 1, *SIZES, *FAST]
    return {
        "finetune": ["finetune", "--data", sni, "--max-target", 8, "--max-instruction", 40, *more],
        "pretrain": ["pretrain", "--corpus", *write_shards(tmp_path, 300), *more],
    }


def step_of(folder: Path) -> int:
    """The step of the checkpoint in a folder, which is whole; 0 where there is none."""
    if not (folder / "model.safetensors").exists():
        return 0
    step = int(t5.read_metadata(folder / "model.safetensors")["step"])
    assert load_model(folder) and t5.read_safetensors(folder / f"training-{step}.safetensors")
    return step


# ------------------------------------------------------------------------ ends at every point


def in_a_fork(words: list, folder: Path, action) -> int:
    """Run a command in a copy of this process -> its exit status; 3 where the disk was said to be full.

    `action(event, path)` goes before each opening for writing, sync, renaming and removal in the folder. An audit hook
    cannot be taken away again, which does not matter in a process that ends soon.
    """

    def hook(event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in ("os.rename", "os.remove", "os.mkdir")) and str(folder) in str(arguments[0]):
            action(event, str(arguments[0]))

    child = os.fork()
    if child == 0:
        status = 2
        try:
            os.fsync = lambda _: action("fsync", "")  # a kill loses nothing that has been written, synced or not
            sys.addaudithook(hook)
            status, text = said(*words)
            status = 3 if text.endswith(("No space left on device", "File too large")) else status
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill(_: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fill_the_disk(event: str) -> None:
    """Files can still be removed."""
    if event != "os.remove":
        raise OSError(28, "No space left on device")


def let_files_be_small(_: str) -> None:
    """It is the system that refuses to write more than a part of a file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("act, status", [(kill, -signal.SIGKILL), (fill_the_disk, 3), (let_files_be_small, 3)])
@pytest.mark.parametrize("command, stride", [("finetune", 17), *[pytest.param(name, 1, marks=long) for name in ("finetune", "pretrain")]])
def test_a_run_that_is_ended_before_any_of_its_file_operations_resumes_to_the_same_end(
    tmp_path, commands, command, stride, act, status
):  # fmt: skip
    """From the making of the folder through two checkpoints to the scores, at each operation (`long`) or every 17th.

    That none was left out is known by the first number at which the run is not harmed any more. The step that is kept
    never falls from one number to the next: no checkpoint is lost, or made again from the beginning.
    """
    words, whole, steps = [*commands[command], "--steps", 2, "--out"], tmp_path / "whole", []
    run(*words, whole)
    for number in count(1 + len(act.__name__) % stride, stride):  # not all at the same ones
        out, operations = tmp_path / f"out-{number}", count(1)
        found = in_a_fork([*words, out], out, lambda event, _: next(operations) >= number and act(event))
        if found == 0:
            break
        assert found == status
        steps.append(step_of(out))
        run(*words, out, "--resume")
        ends_as(whole, out)
    ends_as(whole, out)
    assert steps == sorted(steps) and {0, 1, 2} >= set(steps) >= {0, 1} and len(steps) >= 30 // stride


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc to name an open file")
def test_what_a_checkpoint_counts_on_is_on_disk_before_it(tmp_path, commands, monkeypatch):
    """A file before its name, its name before the next file, and a line of the log before its checkpoint: a power cut."""
    events, rename = [], os.replace

    def synced(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append("folder" if path.is_dir() else path.name)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append(f"-> {Path(new).name}"), rename(old, new)))
    run(*commands["pretrain"], "--steps", 1, "--out", tmp_path / "out")
    wanted = []
    for name in ("config.json", "tokenizer.json", "log.jsonl", "training-1.safetensors", "config.json", "model.safetensors"):
        wanted += [name] if name == "log.jsonl" else [f"{name}.partial", f"-> {name}", "folder"]
    assert events == wanted


# ------------------------------------------------------------------------ ends at random moments


def started(words: list) -> subprocess.Popen:
    """`python train.py ...` in a process of its own, for which Ctrl-C is not switched off as in background jobs."""
    heeding = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    words = [sys.executable, str(TRAIN), *map(str, words)]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True, preexec_fn=heeding)


def wait_for_changes(process: subprocess.Popen, folder: Path, number: int) -> None:
    """Return when files of a folder have been written, renamed or removed so many times, or its process has ended."""

    seen = now = []
    while number and process.poll() is None:
        with suppress(FileNotFoundError):  # the folder, or a file between listing and looking
            now = sorted((entry.name, entry.stat().st_mtime_ns) for entry in os.scandir(folder))
        number, seen = number - (now != seen), now


@pytest.mark.parametrize("command, signals, steps", [
    ("finetune", [signal.SIGINT, signal.SIGKILL], 20),
    *[pytest.param(name, [signal.SIGTERM] + [signal.SIGKILL] * 19, 300, marks=long) for name in ("finetune", "pretrain")],
])  # fmt: skip
def test_a_run_that_is_ended_at_random_moments_ends_as_one_that_never_was(tmp_path, commands, command, signals, steps):
    """A signal waits for changes of files, so that it falls into training and checkpoints; one that comes late fails.

    The processes are others than the one of the whole run, so that their sets of texts have other orders.
    """
    words, whole, out = [*commands[command], "--steps", steps, "--out"], tmp_path / "whole", tmp_path / "ended"
    draw, at = random.Random(), [0]
    for number in signals:
        process = started([*words, out, *["--resume"] * (number == signal.SIGKILL)])
        wait_for_changes(process, out, draw.randint(8, 30))
        process.send_signal(number)
        text, step = process.communicate()[1], step_of(out)
        sentence = text.rpartition("train.py: ")[2]
        if number != signal.SIGKILL:
            assert all(part in sentence for part in (str(out), f"step {step}", "--resume")) and "Traceback" not in text
        assert process.returncode == (-number if number == signal.SIGKILL else 128 + number), "it ended before its signal"
        at.append(step)
    run(*words, out, "--resume")
    run(*words, whole)
    ends_as(whole, out)
    assert at == sorted(at), "no checkpoint is lost"


# ------------------------------------------------------------------------ Ctrl-C


@pytest.fixture
def stopped(tmp_path, commands):
    """A run of four steps that signals reach at a call of a function, and what it said; then it goes on to its end."""

    def check(owner, name, call, numbers, status, step, *more):
        words, out = [*commands["finetune"], "--steps", 4, *more, "--out"], tmp_path / "stopped"
        handlers = list(map(signal.getsignal, NUMBERS))
        with before_call(call, lambda: [os.kill(os.getpid(), number) for number in numbers], owner, name):
            found, text = said(*words, out)
        sentence = text.rpartition("train.py: ")[2].splitlines()[0]  # a bar of progress may follow
        assert found == status and "--resume" in sentence and "Traceback" not in text
        assert list(map(signal.getsignal, NUMBERS)) == handlers and step_of(out) == step
        run(*words, out, "--resume")
        run(*words, tmp_path / "whole")
        ends_as(tmp_path / "whole", out)
        return sentence

    return check


@pytest.mark.parametrize("number, owner, name", [(signal.SIGINT, train, "accumulate_gradient"), (signal.SIGTERM, torch.optim.Adafactor, "step")])
def test_a_first_signal_lets_the_step_end_and_saves_it(stopped, number, owner, name):
    """In the middle of the third step, where no checkpoint is due, and a line of the log neither."""
    assert "step 3" in stopped(owner, name, 3, [number], 128 + number, 3, "--save-every", 4, "--log-every", 2)


@pytest.mark.parametrize("owner, name, call", [(torch.optim.Adafactor, "step", 3), (train, "write_safetensors", 3)])
def test_a_second_signal_stops_at_once(stopped, owner, name, call):
    """In the third step, or in its checkpoint: that of the second is the last."""
    stopped(owner, name, call, [signal.SIGINT, signal.SIGINT], 130, 2)


@pytest.mark.parametrize("owner, name, call, numbers", [
    (train.Answerer, "answers", 2, [signal.SIGINT]), (train, "accumulate_gradient", 3, [signal.SIGINT] * 2),
])  # fmt: skip
def test_a_signal_in_or_after_an_evaluation_on_the_way_loses_no_step(stopped, tmp_path, owner, name, call, numbers):
    """Its step has been saved before; the evaluation is made when the run goes on, and stands in the log once."""
    stopped(owner, name, call, numbers, 130, 2, "--save-every", 4, "--eval-every", 2)
    assert [entry["step"] for entry in log_of(tmp_path / "stopped")] == [1, 2, 2, 3, 4]


def test_a_signal_in_the_closing_evaluation_stops_at_once_and_the_run_can_be_scored(stopped):
    stopped(train.Answerer, "answers", 2, [signal.SIGTERM], 143, 4)


def test_a_run_outside_the_main_thread_leaves_signals_alone(tmp_path, commands):
    with ThreadPoolExecutor() as threads:
        threads.submit(run, *commands["pretrain"], "--steps", 1, "--out", tmp_path / "out").result()


# ------------------------------------------------------------------------ the folder of a run


def test_a_second_run_in_a_folder_is_refused_and_the_first_goes_on(tmp_path, commands):
    """It comes in the third step of the first; the random numbers of this process, in which both run, are put back."""
    words, out = [*commands["finetune"], "--steps", 4, "--out"], tmp_path / "out"

    def second() -> None:
        with torch.random.fork_rng():
            refused(*words, out, "--resume", names=[out])
            refused(*words, out, names=[out])

    run(*words, tmp_path / "whole")
    with before_call(3, second):
        run(*words, out)
    ends_as(tmp_path / "whole", out)


def test_a_run_that_another_one_overtakes_while_it_starts_does_not_undo_its_steps(tmp_path, commands):
    """The other one ends between the moment when the first reads which step there is and the moment when it begins."""
    words, out = [*commands["finetune"], "--out", tmp_path / "out", "--steps"], tmp_path / "out"
    run(*words, 1)
    with before_call(1, lambda: said(*words, 2, "--resume"), train, "load_model"):
        said(*words, 3, "--resume")
    run(*words, 3, "--resume")
    run(*words[:-3], "--out", tmp_path / "whole", "--steps", 3)
    ends_as(tmp_path / "whole", out)


@pytest.mark.parametrize("more", [[], ["--save-every", 100]])
def test_a_run_whose_weights_are_gone_is_not_begun_anew(tmp_path, commands, more):
    """Its log tells of steps after the first checkpoint. Nothing is deleted, so that the weights can be put back."""
    words, out = [*commands["finetune"], "--out", tmp_path / "out", "--steps"], tmp_path / "out"
    run(*words, 2)
    (out / "model.safetensors").rename(tmp_path / "elsewhere")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    refused(*words, 3, "--resume", *more, names=[out / "model.safetensors"])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (tmp_path / "elsewhere").rename(out / "model.safetensors")
    run(*words, 3, "--resume", *more)
    assert [step for step, _ in losses_of(out)] == [1, 2, 3]


def test_only_the_run_s_own_files_are_removed(tmp_path, commands):
    """Half-written files and old training states go; whatever is called otherwise stays as it is."""
    words, out = [*commands["finetune"], "--out", tmp_path / "out", "--steps"], tmp_path / "out"
    run(*words, 1)
    foreign = "notes.partial my-training-1.safetensors training-1.safetensors.bak training-best.safetensors model.safetensors.partial.txt"
    own = "model.safetensors.partial training-7.safetensors training-7.safetensors.partial log.jsonl.partial"
    for name in (foreign + " " + own).split():
        (out / name).write_text("mine")
    (out / "training-x").mkdir()
    run(*words, 2, "--resume")
    assert [(out / name).read_text() for name in foreign.split()] == ["mine"] * 5 and (out / "training-x").is_dir()
    assert not any((out / name).exists() for name in own.split())


# ------------------------------------------------------------------------ numbers and memory


@pytest.fixture
def poisoned(tmp_path, sni, commands):
    """A run of which the third step meets poison in the examples of one task, and what it says."""
    write_task(sni, "train_2", Definition=["Drink this."])
    (sni / "splits" / "default" / "train_tasks.txt").write_text("train_1\ntrain_2\ntrain_3")

    def check(poison):
        words, out = [*commands["finetune"], "--batch-size", 15, "--out", tmp_path / "out"], tmp_path / "out"
        run(*words, "--steps", 2)
        before = (out / "model.safetensors").read_bytes()
        real, steps = train.accumulate_gradient, []

        def meet(model, examples, *rest):
            loss = real(model, examples, *rest)
            return poison(model, loss) if min(len(example.instruction) for example in examples) < 20 else loss

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "accumulate_gradient", meet)
            patch.setattr(torch.optim.Adafactor, "step", lambda _: steps.append(1))
            status, text = said(*words, "--steps", 4, "--resume")
        sentence = text.splitlines()[-1]
        assert (status, steps) == (1, []) and (out / "model.safetensors").read_bytes() == before
        assert all(name in sentence for name in ("step 3", "train_2", str(out), "step 2")) and "train_1" not in sentence
        run(*words, "--steps", 3, "--resume")

    return check


@pytest.mark.parametrize("value", [None, 1e25])
def test_a_loss_or_gradient_that_is_not_finite_or_has_no_square_does_not_reach_the_weights(poisoned, value):
    """Adafactor sums squares of gradients: that of 1e25 is infinite in fp32, and would make NaN of the weights."""

    def poison(model, loss):
        list(model.parameters())[-1].grad[0] = value or 0
        return loss if value else math.nan

    poisoned(poison)


def test_poison_that_no_example_holds_alone_is_looked_for_in_all_of_them(tmp_path, commands, monkeypatch):
    """Of three tasks, before any checkpoint; in pretraining the documents are named."""
    real = train.accumulate_gradient
    monkeypatch.setattr(train, "accumulate_gradient", lambda m, e, *rest: math.inf if len(e) > 1 else real(m, e, *rest))
    words = (*commands["finetune"], "--steps", 1, "--batch-size", 15, "--out", tmp_path / "out")
    sentence = said(*words)[1].splitlines()[-1]
    assert all(f"train_{number}" in sentence for number in (1, 2, 3))
    assert " 1 to 128" in said(*commands["pretrain"], "--steps", 1, "--out", tmp_path / "text")[1].splitlines()[-1]


def test_full_memory_is_said_in_a_sentence_that_names_the_options(tmp_path, commands):
    """Errors of a GPU, of Python, and of a CPU; any other error keeps its traceback."""
    errors = (torch.OutOfMemoryError, "CUDA"), (MemoryError, ""), (RuntimeError, "DefaultCPUAllocator: can't allocate memory: x")
    for kind, text in errors:
        with before_call(1, raising(kind, text)):
            status, sentence = said(*commands["finetune"], "--out", tmp_path / kind.__name__)
        assert status == 1 and "--microbatch" in sentence.splitlines()[-1] and "--eval-batch-size" in sentence
    with before_call(1, raising(RuntimeError, "a bug")), pytest.raises(RuntimeError, match="a bug"):
        run(*commands["finetune"], "--out", tmp_path / "bug")


DEMO = """
import data, sys, train
from dataclasses import replace
world = data.toy_world
train.toy_world = lambda seed: data.ToyWorld(*(part[:9] for part in world(seed, tasks=100)[:3]), {})
settings = train.settings_of(["demo", "--out", sys.argv[1]])
train.demo(replace(settings, steps=5, warmup=2, log_every=1, save_every=2))
"""


@long
def test_two_demos_of_one_seed_are_equal_in_every_byte(tmp_path):
    """Processes of their own, whose sets of texts have different orders."""
    for name in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": name, "PYTHONPATH": str(TRAIN.parent)}
        subprocess.run([sys.executable, "-c", DEMO, tmp_path / name], env=environment, check=True)
    ends_as(tmp_path / "1", tmp_path / "2")
    assert len(losses_of(tmp_path / "1")) == 5
