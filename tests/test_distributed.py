"""However a batch is cut, in microbatches or over processes of torchrun: gradients, weights and answers are the same.

Most of the time goes into starting processes. So one pair of them does nearly all of this file's runs, one after another
(`act`, below), and the tests look at what these left behind.
"""

import json
import random
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import (
    FAST, SENTENCES, SIZES, log_of, losses_of, make_start, refused, rows_of, run, tiny_hint, write_shards, write_task,
)  # fmt: skip

import train
from data import Ids, collate, microbatches
from t5 import read_safetensors, read_weights

ONE_EACH, ALL_AT_ONCE = 1, 100_000  # --microbatch: 5 for the 5 examples of a step, or a single one
SMALL = [*FAST, *"--batch-size 5 --learning-rate 0.02 --dropout 0".split()]
OF_HINT = [*SIZES, "--generator-dropout", 0]


def examples(count: int = 7) -> list[Ids]:
    """Examples of different lengths; no two instructions are equal."""
    draw = random.Random(0)
    return [Ids(*([*draw.choices(range(2, 53), k=draw.randint(2, 9)), 1] for _ in range(3))) for _ in range(count)]


# ------------------------------------------------------------------------ microbatches


def test_microbatches_of_any_size_give_the_gradient_of_the_whole_batch_with_its_z_loss():
    """Targets differ in length, so a mean over microbatches of means would be another gradient."""
    model, batch, logits = tiny_hint(), examples(), []
    batch += [example._replace(instruction=batch[0].instruction) for example in examples(3)]
    for one in batch:
        task = model.encode_instruction(torch.tensor([one.instruction]))
        sources = model.fuse(task, torch.tensor([one.input]))
        logits.append(model.t5.logits(model.t5.decode(torch.tensor([[0, *one.target[:-1]]]), sources, task.modules))[0])
    labels, logits = [token for one in batch for token in one.target], torch.cat(logits)
    log_z = logits.logsumexp(-1)
    cross_entropy = (log_z - logits[range(len(labels)), labels]).mean()
    (cross_entropy + 1e-4 * log_z.square().mean()).backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    counts = [len(microbatches(batch, tokens)) for tokens in (1000, 100, 50, 1)]
    assert counts == sorted(set(counts)) and (counts[0], counts[-1]) == (1, 10)
    for tokens in (1000, 100, 50, 1):
        model.zero_grad()
        loss = train.accumulate_gradient(model, batch, tokens, 0, nullcontext)
        assert loss == pytest.approx(cross_entropy.item(), abs=1e-5), "what is logged has no part of the z-loss"
        torch.testing.assert_close([parameter.grad for parameter in model.parameters()], wanted, atol=1e-6, rtol=1e-4)
    (alone,) = torch.autograd.grad(model(*collate(batch)).cross_entropy, [model.t5.shared.weight])
    assert (alone - wanted[0]).abs().max() > 1e-5, "the z-loss shows in the gradient"


# ------------------------------------------------------------------------ the runs


def finetune(folder: Path, out: str, *more) -> list[str]:
    """Command line of a run on the data of a folder, into a folder of its own in it."""
    sizes = [] if "tk-instruct" in more else OF_HINT
    words = "finetune", "--data", folder / "sni", "--start", folder / "t5", "--max-target", 8, "--max-instruction", 40, *SMALL, *sizes
    return [str(word) for word in (*words, "--steps", 4, "--save-every", 2, "--out", folder / out, *more)]


def pretrain(folder: Path, out: str) -> list[str]:
    """The same with text."""
    words = "pretrain", "--start", folder / "t5", "--corpus", *sorted(folder.glob("c4-*")), *SMALL, *OF_HINT, "--microbatch", ONE_EACH
    return [str(word) for word in (*words, "--steps", 2, "--out", folder / out)]


def torchrun(folder: Path, script: str, *words: str) -> subprocess.CompletedProcess:
    """`torchrun --standalone --nproc-per-node 2 -- SCRIPT ...`, which writes into the folder.

    The threads of torch's gloo crash now and then, in the middle or at the end of a process (2 of some 60 runs on two
    busy cores: SIGSEGV, SIGABRT, without a Python frame). Such a run, and no other, is made again, from the same start.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    before = shutil.copytree(folder, folder.with_name(folder.name + "-before"))
    for _ in range(3):
        done = subprocess.run([*launcher, script, *words], capture_output=True, text=True, timeout=300)
        if not re.search("SIGSEGV|SIGABRT", done.stderr):
            break
        shutil.rmtree(folder)
        shutil.copytree(before, folder)
    shutil.rmtree(before)
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory, spiece) -> Path:
    """Texts, a tiny T5, three tasks to train on and three to be scored on, none like another."""
    folder, draw = tmp_path_factory.mktemp("distributed"), random.Random(0)
    (folder / "sni").mkdir()
    for name in (names := [f"{split}_{n}" for split in ("train", "test") for n in range(3)]):
        texts = [" ".join(draw.choices(SENTENCES[0].split(), k=draw.randint(1, 8))) for _ in range(11)]
        instances = [{"id": f"{name}-{n}", "input": texts[n], "output": [texts[n + 5]]} for n in range(5)]
        write_task(folder / "sni", name, Definition=[texts[10]], Instances=instances)
    for split, tasks in (("train", names[:3]), ("test", names[3:])):
        (folder / "sni" / "splits" / "default" / f"{split}_tasks.txt").write_text("\n".join(tasks))
    make_start(folder / "t5", spiece)
    write_shards(folder, 300)
    return folder


@pytest.fixture(scope="module")
def runs(folder) -> Path:
    """The folder of all runs: those of one process have "one" in their name, the others are of two."""
    words, each, noise = partial(finetune, folder), ("--microbatch", ONE_EACH), ("--dropout", 0.3, "--microbatch", ONE_EACH)
    at_once, plain, bf16 = ("--microbatch", ALL_AT_ONCE), ("--system", "tk-instruct"), ("--precision", "bf16")
    shortly, once = ("--steps", 2), ("--steps", 1)  # where weights are spread, a step takes seconds
    of_one = words("one"), words("one-short", *shortly), words("one-plain", *plain, *shortly), words("one-bf16", *each, *bf16, *once)
    for command in (*of_one, words("chain", *once), pretrain(folder, "one-pretrain")):
        run(*command)
    of_two = [
        words("shard-5", *each, "--shard", *shortly, "--eval-every", 1),
        words("ddp-1", *at_once, "--eval-every", 2),
        words("shard-plain", *each, "--shard", *plain, *shortly, "--gradient-checkpointing"),
        words("shard-bf16", *each, "--shard", *bf16, *once),
        pretrain(folder, "ddp-pretrain"),
        ["evaluate", "--data", f"{folder}/sni", "--model", f"{folder}/one", "--out", f"{folder}/scores"],
        words("chain", *shortly, "--resume", *each),
        words("chain", "--steps", 3, "--resume", *each, "--shard"),
        words("noise", *noise, "--steps", 3),
        words("noise-halves", *noise, *shortly),
        words("noise-halves", *noise, "--steps", 3, "--resume"),
    ]
    done = torchrun(folder, __file__, str(folder), json.dumps(of_two))
    assert done.returncode == 0, done.stderr
    run(*words("chain", "--resume"))
    return folder


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
    """Gradients of 7 examples in an odd number of microbatches, once fewer than processes, each added to the one before."""
    torch.manual_seed(0)
    batch, found, model = examples(), [], tiny_hint()
    trained = train.spread(model, shard, torch.device("cpu"))
    for tokens in (1000, 70, 1):
        assert len(microbatches(batch, tokens)) % 2
        train.accumulate_gradient(trained, batch, tokens, 0, nullcontext)
        grads = {name: weight.grad for name, weight in model.named_parameters()}
        found.append({name: grad.full_tensor() if shard else grad.clone() for name, grad in grads.items()})
    return found


# ------------------------------------------------------------------------ two processes against one


@pytest.mark.parametrize("shard", [False, True])
def test_the_gradient_is_that_of_one_process(runs, shard):
    """It is here, and not by the weights, that a wrong factor shows, since Adafactor's steps hardly have one."""
    wanted = gradients(shard=False)
    assert len(wanted) == 3 and all(grad.any() for grad in wanted[0].values())
    torch.testing.assert_close(torch.load(runs / f"gradients-{shard}.pt"), wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name, one", [
    ("ddp-1", "one"), ("shard-5", "one-short"), ("shard-plain", "one-plain"), ("ddp-pretrain", "one-pretrain"),
    ("chain", "one"),  # a step in one process, one with DDP, one with --shard, and again one in one process
])  # fmt: skip
def test_losses_and_weights_are_those_of_one_process(runs, name, one):
    """Whatever the number of microbatches, and over checkpoints that another number of processes wrote."""
    assert_same_run(runs / name, runs / one, loss=1e-5, weight=1e-5)
    assert {path.name for path in (runs / name).iterdir()} == {path.name for path in (runs / one).iterdir()}
    evaluated = [entry["step"] for entry in log_of(runs / name) if "rougeL" in entry]
    assert evaluated == {"ddp-1": [2], "shard-5": [1]}.get(name, []), "an evaluation is logged once"


def assert_same_run(found: Path, wanted: Path, loss: float, weight: float) -> None:
    """The losses of all steps, and the final weights, within these bounds."""
    assert losses_of(found) == [(step, pytest.approx(right, abs=loss)) for step, right in losses_of(wanted)]
    torch.testing.assert_close(read_weights(found), read_weights(wanted), atol=weight, rtol=0)


def test_shards_compute_in_bf16_too(runs):
    """The loss of the first step is that of one process in bf16, and not in fp32; gradients add up in another precision."""
    first = {name: losses_of(runs / name)[0][1] for name in ("shard-bf16", "one-bf16", "one")}
    assert first["shard-bf16"] == pytest.approx(first["one-bf16"], abs=1e-5)
    assert first["shard-bf16"] != pytest.approx(first["one"], abs=2e-5)
    assert_same_run(runs / "shard-bf16", runs / "one-bf16", loss=1e-2, weight=3e-2)


def test_a_process_has_dropout_of_its_own_which_a_resumed_run_goes_on_with(runs):
    """In `ddp-1` both pass the same microbatch, so that they have drawn as often, and differ by their seeds alone."""
    saved = read_safetensors(runs / "ddp-1" / "training-4.safetensors")
    assert not torch.equal(saved["random.0.cpu"], saved["random.1.cpu"])
    assert_same_run(runs / "noise-halves", runs / "noise", loss=1e-5, weight=1e-5)
    assert losses_of(runs / "noise")[-1][1] != pytest.approx(losses_of(runs / "one")[2][1], abs=1e-3)


def test_processes_share_the_tasks_and_give_the_answers_of_one(runs, tmp_path):
    """The same rows in the same order; and what a spread model answers is what its folder answers."""
    assert len({row["prediction"] for row in rows_of(runs / "one")}) > 3 and rows_of(runs / "scores") == rows_of(runs / "one")
    run("evaluate", "--data", runs / "sni", "--model", runs / "shard-5", "--out", tmp_path / "out")
    for file in ("predictions.jsonl", "metrics.json"):
        assert (tmp_path / "out" / file).read_text() == (runs / "shard-5" / file).read_text()


def test_an_error_of_all_processes_is_said_once_and_leaves_nothing_behind(runs):
    done = torchrun(runs, train.__file__, *finetune(runs, "none", "--start", "/no/such/model"))
    assert done.returncode != 0 and done.stderr.count("train.py: ") == 1 and "/no/such/model" in done.stderr, done.stderr
    assert not (runs / "none").exists()


def test_what_is_for_one_process_is_refused(monkeypatch):
    monkeypatch.setattr(train, "world", lambda: 2)
    for words in (["demo"], ["predict", "--model", "x", "--instruction", "x", "y"]):
        refused(*words, names=words[:1])


if __name__ == "__main__":
    act(Path(sys.argv[1]), json.loads(sys.argv[2]))
