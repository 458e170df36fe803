"""What holds when something goes wrong: kills, full disks, Ctrl-C, losses that are not finite, corpora without end."""

import gc
import gzip
import io
import json
import math
import os
import random
import resource
import signal
import stat
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
from conftest import FAST, TRAIN, log_of, run, tiny_hint, write_shards, write_task

import t5
import train
from data import Ids, PretrainingChunks, toy_tokenizer
from hint import load_model

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
SIZES = "--bottleneck 3 --prefix-length 2".split()


@pytest.fixture
def commands(tmp_path, sni, start):
    """The two commands that train, with dropout, but for --out; epochs and groups of documents end on the way."""
    shards = write_shards(tmp_path, 300)
    more = ["--dropout", 0.2, "--save-every", 1, *SIZES, *FAST]
    lengths = ["--max-target", 8, "--max-instruction", 40]
    return {
        "finetune": ["finetune", "--data", sni, "--start", start, *lengths, *more],
        "pretrain": ["pretrain", "--corpus", *shards, "--start", start, *more],
    }


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a run, but for what the log says of time."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    lines = [{**entry, "tokens_per_second": None} for entry in log_of(folder)]
    return {**found, "log.jsonl": json.dumps(lines).encode()}


def ends_as(one: Path, other: Path) -> None:
    """Two runs left the same files with the same bytes: weights, optimizer, random state, log, scores."""
    one, other = contents(one), contents(other)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


def step_of(folder: Path) -> int:
    """The step of the checkpoint in a folder, which is whole; 0 where there is none."""
    if not (folder / "model.safetensors").exists():
        return 0
    step = int(train.read_metadata(folder / "model.safetensors")["step"])
    assert load_model(folder) and torch.load(folder / f"training-{step}.pt")
    return step


# ------------------------------------------------------------------------ kills at every point


@contextmanager
def each_file_operation(action, folder: Path):
    """Call `action(event, path)` before each opening for writing, sync, renaming and removal in a folder.

    An audit hook cannot be taken away again, so this is for a process that ends soon.
    """

    def hook(event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in ("os.rename", "os.remove", "os.mkdir")) and str(folder) in str(arguments[0]):
            action(event, str(arguments[0]))

    os.fsync = lambda _: action("fsync", "")  # a kill loses nothing that has been written, synced or not
    sys.addaudithook(hook)
    yield


def in_a_fork(words: list, folder: Path, action) -> int:
    """Run a command in a copy of this process, with `action` before each file operation; its exit status."""
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            with each_file_operation(action, folder):
                run(*words)
            status = 0
        except SystemExit as error:
            status = 3 if str(error.code).endswith(("No space left on device", "File too large")) else 1
        finally:
            os._exit(locals().get("status", 2))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def at_operation(number: int, act):
    """An action that acts at the operation of that number and at all behind it."""
    seen = []

    def action(event: str, _: str) -> None:
        seen.append(event)
        if len(seen) >= number:
            act(event)

    return action


def kill(_: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fill_the_disk(event: str) -> None:
    """Files can still be removed."""
    if event != "os.remove":
        raise OSError(28, "No space left on device")


POINTS = [
    ("finetune", kill, -signal.SIGKILL),
    pytest.param("finetune", fill_the_disk, 3, marks=pytest.mark.long),
    pytest.param("pretrain", kill, -signal.SIGKILL, marks=pytest.mark.long),
    pytest.param("pretrain", fill_the_disk, 3, marks=pytest.mark.long),
]


@needs_fork
@pytest.mark.parametrize("command, act, status", POINTS)
def test_a_run_that_is_ended_before_any_of_its_file_operations_resumes_to_the_same_end(
    tmp_path, commands, monkeypatch, command, act, status
):
    """From the making of the folder through two checkpoints to the scores, at each operation in turn.

    That none was left out is known by the first number at which the run is not harmed any more. The step that is kept
    never falls from one number to the next: what was saved is not lost, or made again from the beginning.
    """
    words, whole = [*commands[command], "--steps", 2, "--out"], tmp_path / "whole"
    monkeypatch.setattr(os, "fsync", lambda _: None)  # of the runs that go on: only for speed
    run(*words, whole)
    steps = []
    for number in count(1):
        out = tmp_path / f"out-{number}"
        found = in_a_fork([*words, out], out, at_operation(number, act))
        if found == 0:
            break
        assert found == status
        steps.append(step_of(out))
        run(*words, out, "--resume")
        ends_as(whole, out)
    ends_as(whole, out)
    assert steps == sorted(steps) and {0, 1} <= set(steps), "a checkpoint stands until the next one is whole"


@needs_fork
@pytest.mark.parametrize("cut", ["config.json", "tokenizer.json", "training-1.pt", "model.safetensors"])
def test_a_file_of_which_the_disk_takes_only_half_ends_the_run_in_a_sentence(tmp_path, commands, cut):
    """It is the system that refuses the other half. What has been written of it goes, and the run goes on."""
    words, whole, out = [*commands["finetune"], "--steps", 1, "--out"], tmp_path / "whole", tmp_path / "out"
    run(*words, whole)
    half = (whole / cut).stat().st_size // 2

    def limit(event: str, path: str) -> None:
        if event == "open" and Path(path).name.startswith(cut):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (half, half))

    assert in_a_fork([*words, out], out, limit) == 3
    assert not list(out.glob(f"{cut}*"))
    run(*words, out, "--resume")
    ends_as(whole, out)


class SmallDisk(io.BytesIO):
    """A file of which 10,000 bytes fit on the disk."""

    def write(self, content) -> int:
        if self.tell() + len(content) > 10_000:
            raise OSError(28, "No space left on device")
        return super().write(content)


def test_a_disk_that_fills_up_under_the_training_state_is_said_to_be_full(tmp_path, commands, monkeypatch):
    """`torch.save` onto such a disk would end in a RuntimeError about positions."""
    real = t5.replacing
    monkeypatch.setattr(t5, "replacing", lambda path: SmallDisk() if path.suffix == ".pt" else real(path))
    with pytest.raises(SystemExit, match="out: No space left"):
        run(*commands["finetune"], "--steps", 1, "--out", tmp_path / "out")


def test_what_a_checkpoint_counts_on_is_on_disk_before_it(tmp_path, monkeypatch):
    """A file before its name, its name before the next file, and a line of the log at once, for a power cut."""
    events, sync, rename = [], os.fsync, os.replace

    def noted_sync(descriptor: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("rename"), rename(*paths)))
    train.Run(tmp_path, {}).log(step=1)
    train.write(tmp_path / "x", "text")
    assert events == ["file", "file", "rename", "folder"]


def test_a_system_that_cannot_sync_folders_writes_all_the_same(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    train.write(tmp_path / "x", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_text() == "text"


# ------------------------------------------------------------------------ kills at random moments


def started(words: list, **settings) -> subprocess.Popen:
    """`python train.py ...` in a process of its own, for which Ctrl-C is not switched off as in background jobs."""
    heeding = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    words = [sys.executable, str(TRAIN), *map(str, words)]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True, preexec_fn=heeding, **settings)


def changes(folder: Path) -> list:
    """What differs between two moments in which a file of a folder has been written, renamed or removed."""
    try:
        return sorted((entry.name, entry.stat().st_mtime_ns) for entry in os.scandir(folder))
    except FileNotFoundError:  # the folder, or a file between listing and looking
        return []


def wait_for_changes(process: subprocess.Popen, folder: Path, count: int) -> None:
    """Return when a folder has changed so many times, or its process has ended."""
    seen = changes(folder)
    while count and process.poll() is None:
        time.sleep(0.001)
        now = changes(folder)
        count, seen = count - (now != seen), now


@pytest.mark.parametrize("command", ["finetune", "pretrain"])
@pytest.mark.parametrize("kills, steps", [(2, 60), pytest.param(20, 300, marks=pytest.mark.long)])
def test_a_run_killed_at_random_moments_ends_as_one_that_never_was(tmp_path, commands, command, kills, steps):
    """The clock of a kill begins where files of the run change, so that it falls into training and checkpoints.

    A run that ends before its last kill fails the test. Where the kills fell is printed (`pytest -s`).
    """
    words, whole, out = [*commands[command], "--steps", steps, "--out"], tmp_path / "whole", tmp_path / "killed"
    draw, in_checkpoints, at = random.Random(), 0, []
    for number in range(kills):
        process = started([*words, out, *["--resume"] * (number > 0)])
        wait_for_changes(process, out, draw.randint(3, 60))
        time.sleep(draw.uniform(0, 0.03))
        process.kill()
        assert process.communicate() and process.returncode == -signal.SIGKILL, "it ended before it could be killed"
        at.append(step_of(out))
        in_checkpoints += any(path.suffix == ".partial" for path in out.iterdir()) or len([*out.glob("training-*")]) > 1
    run(*words, out, "--resume")
    run(*words, whole)
    ends_as(whole, out)
    assert at == sorted(at), "no checkpoint is lost"
    print(f"\n{command}: {kills} kills behind the checkpoints of steps {at}, {in_checkpoints} of them in a checkpoint")


# ------------------------------------------------------------------------ Ctrl-C


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def calling_first(monkeypatch, owner, name: str, call: int, action) -> None:
    """Let `action()` go before a certain call of a function."""
    real, calls = getattr(owner, name), []

    def patched(*arguments, **settings):
        calls.append(1)
        if len(calls) == call:
            action()
        return real(*arguments, **settings)

    monkeypatch.setattr(owner, name, patched)


@pytest.fixture
def stopped(tmp_path, commands, monkeypatch, capsys):
    """A run of five steps that signals reach at a call of a function, and what it said; then it goes on to its end."""

    def check(owner, name, call, numbers, status, step, *more):
        words, out = [*commands["finetune"], "--steps", 5, *more, "--out"], tmp_path / "stopped"
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        with monkeypatch.context() as patch:
            calling_first(patch, owner, name, call, lambda: send(*numbers))
            with pytest.raises(SystemExit) as stop:
                run(*words, out)
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
        said = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == status and said.startswith("train.py: stopped") and "--resume" in said
        assert step_of(out) == step
        run(*words, out, "--resume")
        run(*words, tmp_path / "whole")
        ends_as(tmp_path / "whole", out)
        return said

    return check


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("owner, name", [(train, "accumulate_gradient"), (torch.optim.Adafactor, "step")])
def test_a_first_signal_lets_the_step_end_and_saves_it(stopped, number, status, owner, name):
    """In the middle of the third step, where no checkpoint is due; two of five steps are not logged at the end."""
    said = stopped(owner, name, 3, [number], status, 3, "--save-every", 4, "--log-every", 2)
    assert "checkpoint of step 3" in said


@pytest.mark.parametrize(
    "owner, name", [(train, "accumulate_gradient"), (torch.optim.Adafactor, "step"), (torch, "save")]
)
def test_a_second_signal_stops_at_once(stopped, owner, name):
    """Before the third step, in it or in its checkpoint: that of the second is the last."""
    stopped(owner, name, 3, [signal.SIGINT, signal.SIGINT], 130, 2)


@pytest.mark.parametrize("owner, name, call, numbers", [
    (train.Answerer, "answers", 2, [signal.SIGINT]), (train, "accumulate_gradient", 3, [signal.SIGINT, signal.SIGINT]),
])  # fmt: skip
def test_a_signal_in_an_evaluation_on_the_way_or_behind_it_stops_at_once_and_loses_no_step(
    stopped, tmp_path, owner, name, call, numbers
):
    """Its step has been saved before; the evaluation is made when the run goes on, and stands in the log once."""
    stopped(owner, name, call, numbers, 130, 2, "--save-every", 9, "--eval-every", 2)
    assert [entry["step"] for entry in log_of(tmp_path / "stopped")] == [1, 2, 2, 3, 4, 4, 5]


def test_a_signal_in_the_closing_evaluation_stops_at_once_and_the_run_can_be_scored(stopped):
    stopped(train.Answerer, "answers", 2, [signal.SIGTERM], 143, 5)


@pytest.mark.parametrize("command, number", [("finetune", signal.SIGINT), ("pretrain", signal.SIGTERM)])
def test_a_process_that_is_asked_to_stop_says_so_in_one_sentence(tmp_path, commands, command, number):
    out, whole = tmp_path / "out", tmp_path / "whole"
    process = started([*commands[command], "--steps", 100_000, "--out", out])
    wait_for_changes(process, out, 40)
    process.send_signal(number)
    said = process.communicate()[1]
    step = step_of(out)
    sentence = (
        f"train.py: stopped; {out} keeps the checkpoint of step {step}, and the same command with --resume goes on"
    )
    assert process.returncode == 128 + number and said.splitlines()[-1] == sentence and "Traceback" not in said
    run(*commands[command], "--steps", step + 2, "--out", out, "--resume")
    run(*commands[command], "--steps", step + 2, "--out", whole)
    ends_as(whole, out)


def test_a_run_outside_the_main_thread_leaves_signals_alone(tmp_path, commands):
    with ThreadPoolExecutor() as threads:
        threads.submit(run, *commands["finetune"], "--steps", 1, "--out", tmp_path / "out").result()
    assert (tmp_path / "out" / "metrics.json").is_file()


# ------------------------------------------------------------------------ losses that are not finite


@pytest.fixture
def poisoned(tmp_path, sni, commands, monkeypatch):
    """A run of which the third step meets poison in the examples of one task, and what it says."""
    write_task(sni, "train_2", Definition=["Drink this."])
    (sni / "splits" / "default" / "train_tasks.txt").write_text("train_1 train_2 train_3")

    def check(poison):
        words, out = [*commands["finetune"], "--batch-size", 15, "--out", tmp_path / "out"], tmp_path / "out"
        run(*words, "--steps", 2)
        before = (out / "model.safetensors").read_bytes()
        real, steps = train.accumulate_gradient, []

        def meet(model, examples, *rest):
            loss = real(model, examples, *rest)
            return poison(model, loss) if min(map(len, (e.instruction for e in examples))) < 20 else loss

        with monkeypatch.context() as patch:
            patch.setattr(train, "accumulate_gradient", meet)
            patch.setattr(torch.optim.Adafactor, "step", lambda _: steps.append(1))
            with pytest.raises(SystemExit) as stop:
                run(*words, "--steps", 4, "--resume")
        assert steps == [] and (out / "model.safetensors").read_bytes() == before
        run(*words, "--steps", 3, "--resume")
        return stop.value.code

    return check


def test_a_loss_that_is_not_finite_names_step_and_task_and_keeps_the_checkpoint(poisoned, tmp_path):
    said = poisoned(lambda model, loss: math.nan)
    assert said == (
        "train.py: the loss of step 3 is nan and its gradient not finite, in train_2; "
        f"{tmp_path / 'out'} keeps the checkpoint of step 2"
    )


@pytest.mark.parametrize("value", [math.nan, -math.inf, 1e25])
def test_a_gradient_that_is_not_finite_or_has_no_square_does_not_reach_the_weights(poisoned, value):
    """Adafactor sums squares of gradients: that of 1e25 is infinite in fp32, and would make NaN of the weights."""

    def poison(model, loss):
        list(model.parameters())[-1].grad[0] = value
        return loss

    said = poisoned(poison)
    assert "loss of step 3 is" in said and "gradient not finite, in train_2;" in said and "nan and" not in said


def test_poison_that_no_example_holds_alone_is_looked_for_in_all_of_them(tmp_path, commands, monkeypatch):
    """Of two tasks with one instance each, and before any checkpoint."""
    real = train.accumulate_gradient
    monkeypatch.setattr(train, "accumulate_gradient", lambda m, e, *r: math.inf if len(e) > 1 else real(m, e, *r))
    with pytest.raises(SystemExit, match="loss of step 1 is inf .*, in .*train_3.*; there is no checkpoint yet"):
        run(*commands["finetune"], "--steps", 1, "--out", tmp_path / "out", "--batch-size", 15)


def test_in_pretraining_the_documents_are_named(tmp_path, commands, monkeypatch):
    monkeypatch.setattr(train, "accumulate_gradient", lambda *_: math.nan)
    with pytest.raises(SystemExit, match="in documents 1 to 128;"):
        run(*commands["pretrain"], "--steps", 1, "--out", tmp_path / "out")


def test_of_many_tasks_eight_are_named():
    model, context = tiny_hint(), nullcontext
    examples = [Ids([5, 1], [6, 1], [7, 1])] * 12
    names = [f"task {number // 2}" for number in range(20)]
    said = train.not_finite_in(model, train.adafactor(model, 1.0), examples[:0], names, torch.device("cpu"), context)
    assert said == ", ".join(f"task {number}" for number in range(8)) + " and 2 more"


# ------------------------------------------------------------------------ the same again


DEMO = """
import sys
import data
import t5
import train
from dataclasses import replace
train.DEMO = replace(train.DEMO, steps=5, log_every=1, save_every=2)
world = data.toy_world
train.toy_world = lambda seed: data.ToyWorld(*(part[:9] for part in world(seed, tasks=100)[:3]), {})
train.main(["demo", "--seed", sys.argv[1], "--out", sys.argv[2]])
"""


def test_two_demos_of_one_seed_are_equal_in_every_byte_and_one_of_another_seed_is_not(tmp_path):
    """Processes of their own, whose sets of texts have different orders."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DEMO, str(seed), str(tmp_path / name)],
            env={**os.environ, "PYTHONHASHSEED": name, "PYTHONPATH": str(TRAIN.parent)},
            stdout=subprocess.DEVNULL,
        )
        for name, seed in (("1", 0), ("2", 0), ("3", 1))
    ]
    assert [process.wait() for process in processes] == [0, 0, 0]
    ends_as(tmp_path / "1", tmp_path / "2")
    losses = [[entry["loss"] for entry in log_of(tmp_path / name)] for name in ("1", "3")]
    assert len(losses[0]) == 5 and not set(losses[0]) & set(losses[1])


# ------------------------------------------------------------------------ text without end


def write_corpus(path: Path, documents: int) -> Path:
    """A shard of documents of 100 words each, made one after the other."""
    draw = random.Random(0)
    with gzip.open(path, "wt", compresslevel=1) as file:
        for _ in range(documents):
            file.write(json.dumps({"text": " ".join(f"{draw.random():.6f}" for _ in range(100))}) + "\n")
    return path


def peak_of(action) -> int:
    """The most bytes of Python objects that there were at once in an action."""
    tracemalloc.reset_peak()
    action()
    return tracemalloc.get_traced_memory()[1]


def read_to(source: PretrainingChunks, group: int) -> None:
    """Take segments up to a group of documents."""
    while source.position[0] < group:
        source.take(8)


def test_memory_does_not_grow_with_the_text_that_has_streamed_through(tmp_path):
    """A hundred groups of documents out of one shard, given five times over: eleven times the bytes of the first peak.

    So a run that kept a twentieth of what it reads, or reads past when it goes on, would pass the bound.
    """
    shard = write_corpus(tmp_path / "c4.json.gz", 20 * PretrainingChunks.documents)
    chunks = partial(PretrainingChunks, [shard] * 5, toy_tokenizer(), 512, 0)
    tracemalloc.start()
    try:
        source = chunks()
        first, rest = (peak_of(partial(read_to, source, group)) for group in (10, 100))
        del source
        gc.collect()  # a source and its stream hold each other
        resumed = peak_of(lambda: read_to(chunks((90, 0)), 92))
    finally:
        tracemalloc.stop()
    assert rest < 1.5 * first and resumed < 1.5 * first
