"""Train, evaluate and use HINT from the command line.

    python train.py                 the demo: a tiny HINT learns a toy world of instructions, from scratch
    python train.py pretrain ...    pretrain the hypernetwork on plain text (section 3.3)
    python train.py finetune ...    train on the tasks of Super-NaturalInstructions (section 4)
    python train.py evaluate ...    score a model on tasks that it has not seen
    python train.py compare ...     train the rows of the paper's tables and draw its figures
    python train.py predict ...     answer inputs of one's own

    torchrun --nproc-per-node 8 -- train.py ...    pretrain, finetune or evaluate on eight GPUs

Training writes the model, `config.json` and `log.jsonl` into a folder of its own, `--out`; an evaluation writes
`metrics.json` and `predictions.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import cached_property
from itertools import chain, count
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import (
    NO_LABEL,
    OBJECTIVES,
    PAD,
    Batch,
    DataError,
    HINTFormat,
    Ids,
    Instance,
    NoInstructFormat,
    PretrainingChunks,
    PromptFormat,
    Shuffled,
    Task,
    TaskNumberFormat,
    TkInstructFormat,
    ToyWorld,
    collate,
    encode_tasks,
    load_tasks,
    load_tokenizer,
    microbatches,
    pad,
    score,
    toy_tokenizer,
    toy_world,
    vague,
    valid,
    write_toy_world,
)  # fmt: skip
from hint import (
    HINT,
    ExactFlops,
    HINTConfig,
    PlainT5,
    decoder_only_flops,
    flop_counter,
    generated_numbers,
    hint_flops,
    load_model,
    no_instruct_flops,
    t5_parameters,
    tk_instruct_flops,
)  # fmt: skip
from hypernet import CHOICES
from t5 import (
    EOS,
    SIZES,
    T5,
    Z_LOSS,
    CheckpointError,
    T5Config,
    first_line,
    packed_weights,
    read_config,
    read_json,
    read_metadata,
    read_pickle,
    replacing,
    set_gradient_checkpointing,
    write_pickle,
)


class RunError(ValueError):
    """A run cannot start or go on; the message is one sentence for the user."""


class Stopped(KeyboardInterrupt):
    """SIGINT (Ctrl-C) or SIGTERM, `number`, ended a command; the message says how far it came."""

    def __init__(self, number: int, how: str = "stopped") -> None:
        super().__init__(how)
        self.number = number


# --------------------------------------------------------------------------------------------- settings


def option(default, why: str):
    """A field that is also an option of the command line; `why` is its help there."""
    return field(default=default, metadata={"help": why})


def check_precision(precision: str) -> None:
    """Raises RunError for a precision that is none, or that T5 does not bear."""
    if precision == "fp16":
        raise RunError("--precision fp16: T5 overflows in fp16 (its feed-forward layers pass 65,504); use bf16 or fp32")
    if precision not in ("auto", "fp32", "bf16"):
        raise RunError(f"--precision {first_line(precision)}: must be auto, fp32 or bf16")


LONGEST = 100_000  # tokens of a text: far beyond what T5 is used for


@dataclass(frozen=True)
class Recipe:
    """How a run trains. The defaults are those of section 4 for Super-NaturalInstructions."""

    steps: int = option(1000, "optimizer steps")
    batch_size: int = option(1024, "examples a step")
    group: int = option(
        1, "neighbours in the data (examples of a task) that stay together: fewer instructions to encode a step"
    )
    microbatch: int = option(
        4096, "tokens at once on the device, padding counted: fewer take less memory; the gradient is that of the batch"
    )
    learning_rate: float = option(
        1e-3, "of Adafactor, relative to the size of each parameter, and at most 1/sqrt(step)"
    )
    warmup: int = option(0, "steps over which the learning rate rises; a model from scratch wants some")
    final_rate: float = option(
        1.0, "what a cosine lets the learning rate fall to, as a part of it; 1 keeps it constant"
    )
    dropout: float = option(0.1, "of T5 and the generator's attention; the paper has 0 in pretraining, 0.1 after it")
    max_instruction: int = option(1024, "longest instruction in tokens; it is cut or loses examples, never its </s>")
    max_input: int = option(1024, "longest input in tokens; in pretraining the length of a whole segment")
    max_target: int = option(256, "longest answer in tokens, in training and in evaluation")
    seed: int = option(0, "of new weights, the order of the data, dropout and every other draw")
    precision: str = option(
        "auto", "fp32 or bf16 (over fp32 weights); auto: bf16 on a GPU that has it; fp16 overflows in T5"
    )
    gradient_checkpointing: bool = option(
        False, "recompute each layer in the backward pass: more time, much less memory"
    )
    compile: bool = option(
        False, "compile the training pass (torch.compile): its steps are faster, but for the first, which takes minutes"
    )
    shard: bool = option(
        False, "under torchrun: spread weights and gradients over the processes, where a GPU cannot hold all of them"
    )
    log_every: int = option(10, "steps between lines of log.jsonl")
    save_every: int = option(200, "steps between checkpoints, each in place of the last")
    eval_every: int = option(0, "steps between evaluations during training; 0: only at the end")

    def __post_init__(self) -> None:
        may_be_zero = ("seed", "warmup", "eval_every", "learning_rate", "final_rate", "dropout")
        least = {**dict.fromkeys(may_be_zero, 0), "max_input": 8}
        kinds = {"int": (int,), "float": (int, float)}
        for item in fields(self):
            value, minimum = getattr(self, item.name), least.get(item.name, 1)
            if item.type in kinds and not (type(value) in kinds[item.type] and value >= minimum):
                raise RunError(f"{flag(item)} {value!r:.40}: must be a number of at least {minimum}")
            if item.name.startswith("max_") and value > LONGEST:
                raise RunError(f"{flag(item)} {value}: must be at most {LONGEST:,} tokens")
        if self.seed >= 2**63:
            raise RunError(f"--seed {self.seed!r:.40}: must be below 2^63")
        check_precision(self.precision)
        if self.dropout >= 1 or self.final_rate > 1:
            raise RunError(f"--dropout {self.dropout} must be below 1 and --final-rate {self.final_rate} at most 1")


RECIPES = {
    "pretrain": Recipe(steps=10_000, dropout=0.0, max_instruction=512, max_input=512, max_target=512),
    "finetune": Recipe(),
}
DEMO = Recipe(
    steps=2000, batch_size=64, group=2,  # two instances of each of 32 tasks
    learning_rate=0.03, warmup=100, final_rate=0.05,  # the paper's 1e-3 is for a pretrained model
    dropout=0.0, max_instruction=64, max_input=64, max_target=16, log_every=50, save_every=1000,
)  # fmt: skip
DEMO_T5 = replace(SIZES["toy"], dropout_rate=0.0)
DEMO_HINT = HINTConfig(bottleneck=4, prefix_length=4, generator_dropout=0.0, embedding_scale=8.0)
# There are no tasks in pretraining, and --max-input is the length of a whole segment.
NOT_IN_PRETRAINING = ("group", "max_instruction", "max_target", "eval_every")


SETTINGS = ("split", "joint")  # of P3: what the instance's text is


class System(NamedTuple):
    """What a name of `--system` stands for: the texts that a model reads, and its hypernetwork, if it has one."""

    prompts: type[PromptFormat]
    hypernetwork: dict | None  # fields of HINTConfig that are not the defaults; None: T5 alone


_HYPERFORMER = {"fusion": False, "hyperencoder": "table", "trains": "hypernetwork+norms", "bottleneck": 24}
SYSTEMS = {
    "hint": System(HINTFormat, {}),
    "tk-instruct": System(TkInstructFormat, None),
    "tk-instruct+peft": System(TkInstructFormat, {"generator": "direct", "fusion": False}),
    "no-instruct": System(NoInstructFormat, None),
    "hyperformer": System(TaskNumberFormat, {**_HYPERFORMER, "generator": "hyperformer"}),
    "hyperformer++": System(TaskNumberFormat, {**_HYPERFORMER, "generator": "hyperformer++"}),
    "hyperformer++-instruction": System(
        HINTFormat, {**_HYPERFORMER, "generator": "hyperformer++", "hyperencoder": "tied"}
    ),
    "hypter": System(HINTFormat, {"generator": "pooled", "modules": "adapters", "fusion": False, "bottleneck": 8}),
    "hypertune": System(
        HINTFormat,
        {
            "generator": "decoder", "modules": "prefixes", "fusion": False, "hyperencoder": "own",
            "trains": "hypernetwork",
        },
    ),
}  # fmt: skip


# --------------------------------------------------------------------------------------------- several processes


@contextmanager
def processes() -> Iterator[None]:
    """What is done in it is done by all processes that torchrun started, of which the first alone prints.

    Without torchrun, nothing is changed. Those that wait for another, which writes a checkpoint or has longer answers
    to give, do so for an hour at most; one that fails is noticed by torchrun, which ends the others.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    gpus, place = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
    try:
        if gpus and place >= gpus:
            sys.exit(f"train.py: a process needs a GPU of its own; --nproc-per-node can be at most {gpus}")
        if gpus:
            torch.cuda.set_device(place)
        dist.init_process_group("nccl" if gpus else "gloo", timeout=timedelta(hours=1))
        with redirect_stdout(open(os.devnull, "w") if rank() else sys.stdout):
            yield
        dist.destroy_process_group()
    except SystemExit as end:
        if isinstance(end.code, str) and not first_to_fail():
            end.code = 1
        raise


def rank() -> int:
    """The place of this process among those of torchrun; the first, 0, is the one that writes, and the only one
    without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def from_all(value) -> list:
    """The values of all processes, in order, which each of them is given."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def first_to_fail() -> bool:
    """Whether no other process has asked this before: most errors meet all of them, and one sentence is enough."""
    if not dist.is_torchelastic_launched():
        return True
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return store.add("train.py has failed", 1) == 1


def spread(model: nn.Module, shard: bool, device: torch.device) -> nn.Module:
    """The model as all processes train it: each has all of it, or (`shard`) a part of each of its weights."""
    if not dist.is_initialized():
        if shard:
            raise RunError("--shard: spreads a model over the processes of torchrun, and this is the only one")
        return model.to(device)
    if not shard:
        return DistributedDataParallel(model.to(device))
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing writes into what is returned
    generator = [model.hypernetwork] if isinstance(model, HINT) else []
    for part in (*model.t5.encoder.blocks, *model.t5.decoder.blocks, *generator):
        if list(part.parameters()):
            fully_shard(part)
    return fully_shard(model)


def whole(model: nn.Module, device: torch.device | str | None = None) -> nn.Module:
    """The model itself, or, of one whose weights are spread over the processes, a copy that is not.

    All processes must call it. With the device "meta" one gets no weights, and needs no memory for them.
    """
    if not isinstance(model, FSDPModule):
        return model
    weights = {name: part.full_tensor().detach().to(device) for name, part in model.named_parameters()}
    with torch.device("meta"):
        t5 = T5(model.t5.config)
        copy = HINT(t5, model.config) if isinstance(model, HINT) else PlainT5(t5)
    copy.load_state_dict(weights, assign=True)
    return copy


class ShardedAdafactor(torch.optim.Adafactor):
    """Adafactor for weights that are spread over the processes, at which that of PyTorch stops with an error.

    Its row, column and RMS statistics are those of whole matrices. So each matrix is put together in all processes,
    takes the step that it would take in one, and is spread again: one at a time, once a batch. The state, which is
    small, is that of an Adafactor without processes.
    """

    @torch.no_grad()
    def step(self) -> None:
        """Take a step with the gradients that are there."""
        for group in self.param_groups:
            for part in group["params"]:
                matrix = part.full_tensor()
                matrix.grad = part.grad.full_tensor()
                alone = torch.optim.Adafactor([{**group, "params": [matrix]}])
                alone.state[matrix] = self.state[part]
                alone.step()
                matrix = DTensor.from_local(matrix, part.device_mesh, [Replicate()], run_check=False)
                part.copy_(matrix.redistribute(placements=part.placements))


# --------------------------------------------------------------------------------------------- a run and its folder


MAY_CHANGE = (  # when a run goes on: its length, and what leaves the gradient as it is, but for the draws of dropout
    "steps", "microbatch", "gradient_checkpointing", "compile", "shard", "skip_bad_lines",
    "log_every", "save_every", "eval_every", "eval_batch_size",
)  # fmt: skip


class Run:
    """The folder of a run: settings, log, checkpoints. Weights and training state of one step belong together."""

    def __init__(self, out: str, settings: dict, resume: bool = False) -> None:
        self.out, self.settings = Path(out), settings
        if resume:
            self._check_same_settings()
        elif self.out.exists() and not self._is_new():
            raise RunError(f"{out}: holds something already; name another --out, or go on with that run by --resume")
        weights = self.out / "model.safetensors"
        self.step = 0  # of the last checkpoint
        if weights.is_file():
            step = read_metadata(weights).get("step")
            if not isinstance(step, str) or not re.fullmatch("[1-9][0-9]{0,17}", step):
                raise RunError(f"{weights}: does not say of which step of the run it is")
            self.step = int(step)

    def begin(self) -> None:
        """Make the folder, now that all that the run needs has been read, by all processes."""
        from_all("ready")
        if rank() > 0:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        self._tidy(self.step)
        self._forget_log_behind(self.step)
        if self.step == 0:
            write(self.out / "config.json", json.dumps({"run": self.settings}, indent=2) + "\n")

    def _is_new(self) -> bool:
        """Whether the folder holds nothing, or what a kill left of the very first file."""
        return self.out.is_dir() and all(path.name == "config.json.partial" for path in self.out.iterdir())

    def _tidy(self, step: int) -> None:
        """Remove training states that belong to no weights of `step`, and what a kill left half written."""
        for path in (*self.out.glob("*.partial"), *self.out.glob("training-*.pt")):
            if path.name != f"training-{step}.pt":
                path.unlink()

    def _check_same_settings(self) -> None:
        """Only a run can be gone on with, and only with the options that it had, but for MAY_CHANGE."""
        path = self.out / "config.json"
        if not self.out.exists() or self._is_new():
            return
        before = read_json(path).get("run") if path.is_file() else None
        if not isinstance(before, dict):
            raise RunError(f"{self.out}: is not the folder of a run, which --resume could go on with")
        for name, value in self.settings.items():
            if name not in MAY_CHANGE and name in before and before[name] != value:
                raise RunError(
                    f"{path}: that run had {name} {before[name]!r:.80}, not {value!r}; --resume wants the same options"
                )

    def _forget_log_behind(self, step: int) -> None:
        path = self.out / "log.jsonl"
        if path.is_file():
            lines = path.read_text("utf-8", "replace").splitlines(keepends=True)
            write(path, "".join(line for line in lines if _place_of(line) <= step))

    def log(self, **entry) -> None:
        """One more line of `log.jsonl`, on disk before the checkpoint that counts on it."""
        if rank() > 0:
            return
        with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, source, meter: Meter) -> None:
        """A checkpoint: first the training state, then config and weights, which name the step whose state is theirs.

        Each file is written beside and renamed, so at any moment the folder holds one whole checkpoint. It is the same
        whatever the number of processes, but for their random numbers: the first one writes, all must call.
        """
        model = whole(model, "meta" if rank() else "cpu")
        state = {
            "optimizer": optimizer.state_dict(),
            "position": source.position,
            "losses": meter.losses,
            "streams": from_all(random_state()),
        }
        if rank() > 0:
            self.step = step
            return
        write_pickle(self.out / f"training-{step}.pt", state)
        model.save_pretrained(self.out, notes={"run": self.settings}, metadata={"step": str(step)})
        self.step = step
        self._tidy(step)

    def kept(self) -> str:
        """What there is to go on from, for a message."""
        return f"{self.out} keeps the checkpoint of step {self.step}" if self.step else "there is no checkpoint yet"

    @cached_property
    def state(self) -> dict:
        """The training state that belongs to the weights in the folder; of a run that has none yet, no position."""
        if self.step == 0:
            return {"position": None}
        path = self.out / f"training-{self.step}.pt"
        state = read_pickle(path)
        if not isinstance(state, dict) or not {"optimizer", "position", "losses", "streams"} <= set(state):
            raise RunError(f"{path}: is not the training state of a run")
        pretrains = self.settings["command"] == "pretrain"
        position = state["position"] if pretrains else (state["position"],)
        most = self.step * self.settings["batch_size"]  # no source counts anything that is more than its examples
        if not isinstance(position, tuple) or [type(n) for n in position] != [int] * (1 + pretrains):
            raise RunError(f"{path}: does not say where in its data the run was")
        if not all(0 <= number <= most for number in position):
            raise RunError(f"{path}: says that the run was in its data where {self.step:,} steps do not lead")
        return state


def _place_of(line: str) -> float:
    """The step of a line of `log.jsonl`; infinite where the line is no entry, or only half of one.

    The evaluation of a step is made behind its checkpoint, and made again where a run goes on from there.
    """
    try:
        entry = json.loads(line) if line.endswith("\n") else {}
        step, is_evaluation = entry["step"], "loss" not in entry
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step + 0.5 * is_evaluation if type(step) is int and step < 2**53 else math.inf


def write(path: Path, text: str) -> None:
    """Write a text file whole or not at all; of several processes the first one does."""
    if rank() > 0:
        return
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


# --------------------------------------------------------------------------------------------- training


def train(
    model: nn.Module, tokenizer: Tokenizer, source: Shuffled | PretrainingChunks, recipe: Recipe, run: Run,
    evaluate: Callable[[int], None] | None = None,
) -> None:  # fmt: skip
    """The loop. `source` hands out examples; `evaluate(step)` is called where the recipe asks for it.

    The first signal lets the step end and its checkpoint be written, then raises Stopped; a second one stops at once.
    So does one in an evaluation, in front of which a checkpoint is written. Raises RunError where the loss or the
    gradient is not finite, before the optimizer has seen it.
    """
    device, context = device_and_precision(recipe.precision, keep_casts=not recipe.shard)
    if recipe.compile:
        model.compile(dynamic=True)  # microbatches differ in all their lengths
    trained = spread(model, recipe.shard, device)
    run.begin()
    write(run.out / "tokenizer.json", tokenizer.to_str())  # the folder must answer without any other
    optimizer, meter = optimizer_and_meter(model, recipe, run)
    with progress(run.step, recipe.steps) as bar, noting_signals() as signals:
        for step in bar:
            if evaluate and evaluation_is_due(step - 1, recipe):
                with on_signals(stop_at_once):
                    evaluate(step - 1)
            model.train()
            began = time.perf_counter()
            optimizer.param_groups[0]["lr"] = learning_rate(step, recipe)
            examples = source.take(recipe.batch_size)
            loss = accumulate_gradient(trained, examples, recipe.microbatch, device, context)
            if not is_finite(loss, optimizer):
                where = not_finite_in(trained, optimizer, examples, source.names, device, context)
                what = f"the loss of step {step} is {loss} and its gradient not finite"
                raise RunError(f"{what}, in {where}; {run.kept()}")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            meter.add(loss, examples, time.perf_counter() - began)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            last = step == recipe.steps
            if step % recipe.log_every == 0 or last:
                run.log(step=step, **meter.read())
            stopped_by = [number for noted in from_all(signals[:1]) for number in noted]  # all processes stop, or none
            if stopped_by or last or step % recipe.save_every == 0 or (evaluate and evaluation_is_due(step, recipe)):
                run.save(step, model, optimizer, source, meter)
            if stopped_by:
                raise Stopped(stopped_by[0], f"stopped; {run.kept()}")


def optimizer_and_meter(model: nn.Module, recipe: Recipe, run: Run) -> tuple[torch.optim.Optimizer, Meter]:
    """New ones, or those of the run's checkpoint, with its random numbers."""
    set_gradient_checkpointing(model, recipe.gradient_checkpointing)
    optimizer, meter = adafactor(model, recipe.learning_rate), Meter()
    if rank() > 0:
        torch.manual_seed(recipe.seed + rank())  # its own dropout; weights and data have been drawn
    if run.step:
        restore(optimizer, meter, run)
    return optimizer, meter


def progress(done: int, steps: int) -> tqdm:
    """The steps that are left, as a bar."""
    often = 0.5 if sys.stderr.isatty() else 10
    return tqdm(range(done + 1, steps + 1), initial=done, total=steps, mininterval=often, disable=rank() > 0)


def evaluation_is_due(step: int, recipe: Recipe) -> bool:
    """Whether the recipe wants an evaluation behind a step; behind the last one it comes by itself."""
    return recipe.eval_every > 0 and 0 < step < recipe.steps and step % recipe.eval_every == 0


@contextmanager
def on_signals(action: Callable[[int], None]) -> Iterator[None]:
    """SIGINT (Ctrl-C) and SIGTERM (a scheduler's) call `action` with their number, where this is the main thread."""
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, lambda number, _: action(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def noting_signals() -> Iterator[list[int]]:
    """The first signal is only noted, in the list that this gives; a second one stops at once."""
    noted: list[int] = []

    def note(number: int) -> None:
        if noted:
            stop_at_once(number)
        noted.append(number)

    with on_signals(note):
        yield noted


def stop_at_once(number: int) -> None:
    """End the command where it stands."""
    raise Stopped(number)


def is_finite(loss: float, optimizer: torch.optim.Optimizer) -> bool:
    """Whether a loss, its gradient and the squares of that, which Adafactor sums, are finite."""
    gradients = [weight.grad for weight in optimizer.param_groups[0]["params"] if weight.grad is not None]
    return math.isfinite(loss + nn.utils.get_total_norm(gradients).item())


def not_finite_in(
    model: nn.Module, optimizer: torch.optim.Optimizer, examples: Sequence[Ids], names: Sequence[str],
    device: torch.device, context: Callable,
) -> str:  # fmt: skip
    """Where a batch that is not finite comes from: those of its examples that are not so alone, or else all of them."""
    found = []
    for example, name in zip(examples, names):
        optimizer.zero_grad(set_to_none=True)
        if not is_finite(accumulate_gradient(model, [example], 1, device, context), optimizer):
            found.append(name)
    distinct = list(dict.fromkeys(found or names))
    return ", ".join(distinct[:8]) + (f" and {len(distinct) - 8:,} more" if len(distinct) > 8 else "")


def adafactor(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Adafactor as the paper used it: steps relative to the RMS of each parameter (at least 1e-3), update clipped to
    an RMS of 1, no momentum, no weight decay, second moments that forget with 1 - t^-0.8.

    The first epsilon is 1e-30 in the authors' code. PyTorch squares it, which is zero in fp32 and makes NaN of the
    unused rows of an embedding; its default, 1e-7, is larger than the mean squared gradients of a large model.
    1e-18 is neither. PyTorch also keeps the rate below 1/sqrt(step), which bites above 0.03 in a thousand steps.
    """
    kind = ShardedAdafactor if isinstance(model, FSDPModule) else torch.optim.Adafactor
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return kind(trained, lr=rate, beta2_decay=-0.8, eps=(1e-18, 1e-3), d=1.0, weight_decay=0.0)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to `final_rate` of the peak; constant with the defaults, as in the paper."""
    if step <= recipe.warmup:
        return recipe.learning_rate * step / recipe.warmup
    fall = 0.5 * (1 + math.cos(math.pi * (step - recipe.warmup) / (recipe.steps - recipe.warmup)))
    return recipe.learning_rate * (recipe.final_rate + (1 - recipe.final_rate) * fall)


def accumulate_gradient(model: nn.Module, examples: list[Ids], microbatch: int, device: torch.device, context) -> float:
    """Gradient of the mean loss per target token of the *whole* batch, whatever the microbatch; returns that mean.

    Of several processes each takes every world-th microbatch of the same batch. They add up their gradients in every
    pass (`fully_shard`, which keeps no whole gradient) or in the last (DDP), so all must have as many passes: where
    there is no microbatch left for a process, it repeats one that counts nothing.
    """
    tokens = sum(len(example.target) for example in examples)
    total = torch.zeros((), device=device)  # read once, at the end: a GPU need not wait for Python between microbatches
    parts = microbatches(examples, microbatch)
    for first in range(0, len(parts), world()):
        mine = first + rank()
        counts = mine < len(parts)
        batch = to(device, collate(parts[mine if counts else first]))
        alone = isinstance(model, DistributedDataParallel) and first + world() < len(parts)
        with model.no_sync() if alone else nullcontext():
            with context():
                out = model(*batch)
            loss = (out.cross_entropy + Z_LOSS * out.z_loss) / tokens
            (loss * (world() * counts)).backward()  # the mean over the processes, which both take, becomes the sum
        total += out.cross_entropy.detach() * counts
    if world() > 1:
        dist.all_reduce(total)
    return total.item() / tokens


def restore(optimizer: torch.optim.Optimizer, meter: Meter, run: Run) -> None:
    """Optimizer, losses not logged yet and random numbers as they were; weights and data have been read before.

    A process that was not there at the checkpoint goes on with the random numbers that it begins with. Raises
    RunError where the state is not one of this model.
    """
    state = run.state
    try:
        kept, parameters = state["optimizer"]["state"], optimizer.param_groups[0]["params"]
        if [_shapes(kept[number]) for number in range(len(kept))] != [_adafactor_shapes(p.shape) for p in parameters]:
            raise ValueError("the optimizer's numbers are of another model")
        if any(entry["step"] != run.step for entry in kept.values()):
            raise ValueError("the optimizer's numbers are of another step")
        copies = {number: {name: tensor.clone() for name, tensor in entry.items()} for number, entry in kept.items()}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": copies})
        meter.losses = [loss for loss in state["losses"] if math.isfinite(loss)]
        if rank() < len(state["streams"]):
            of_cpu, of_gpu = state["streams"][rank()]
            torch.set_rng_state(of_cpu)
            if of_gpu is not None and torch.cuda.is_available():
                torch.cuda.set_rng_state(of_gpu)
    except Exception as error:  # a foreign state can lead to anything
        path = run.out / f"training-{run.step}.pt"
        raise RunError(f"{path}: is not the training state of this run ({first_line(error)})") from None


def random_state() -> tuple[torch.Tensor, torch.Tensor | None]:
    """Where the random numbers of this process have come to, on the CPU and on its GPU."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def _shapes(entry: dict) -> dict:
    return {name: (tensor.dtype, *tensor.shape) for name, tensor in entry.items()}


def _adafactor_shapes(shape: Sequence[int]) -> dict:
    """What Adafactor keeps of a parameter, in fp32: of a vector its second moments, of a matrix their two factors."""
    moments = {"variance": shape} if len(shape) < 2 else {"row_var": (*shape[:-1], 1), "col_var": (1, shape[-1])}
    return {name: (torch.float32, *sizes) for name, sizes in {"step": (), **moments}.items()}


class Meter:
    """Since the last reading: mean loss, and real tokens (instruction, input and target) per second of training."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.losses, self._tokens, self._seconds = [], 0, 0.0

    def add(self, loss: float, examples: Iterable[Ids], seconds: float) -> None:
        """Count one step."""
        self.losses.append(loss)
        self._tokens += sum(map(len, (ids for example in examples for ids in example)))
        self._seconds += seconds

    def read(self) -> dict[str, float]:
        """What `log.jsonl` says of these steps."""
        entry = {"loss": sum(self.losses) / len(self.losses), "tokens_per_second": self._tokens / self._seconds}
        self._clear()
        return entry


def device_and_precision(precision: str, keep_casts: bool = True) -> tuple[torch.device, Callable]:
    """The GPU where there is one, and the context that forward passes run in: fp32, or bf16 over fp32 weights.

    Weights are cast to bf16 once a pass (`keep_casts`), or whenever they are used, so that they are not all there.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_precision(precision)
    has_bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16" and not has_bf16:
        raise RunError("--precision bf16: this GPU has no bf16; use fp32")
    if precision == "bf16" or (precision == "auto" and device.type == "cuda" and has_bf16):
        return device, lambda: torch.autocast(device.type, torch.bfloat16, cache_enabled=keep_casts)
    return device, nullcontext


def to(device: torch.device, batch: Batch) -> Batch:
    """The batch on a device."""
    return Batch(*(tensor.to(device) for tensor in batch))


def set_dropout(model: nn.Module, rate: float) -> None:
    """The rate of a recipe, in T5 and in the generator's attention; its networks have their own, of the HINTConfig."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.p = model.config.generator_dropout if name.startswith("hypernetwork.networks") else rate


# --------------------------------------------------------------------------------------------- answering


class Answerer:
    """A model with its prompt format: tasks in, texts out. Each instruction is read once."""

    def __init__(
        self, model: nn.Module, prompts: PromptFormat, max_new_tokens: int, batch_size: int, precision: str,
        notes: Notes | None = None,
    ) -> None:  # fmt: skip
        """`notes`: how the model was trained, where that was read with it."""
        self.model, self.prompts, self.notes = model, prompts, notes
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.device, self.context = device_and_precision(precision)

    @torch.inference_mode()
    def answers(self, task: Task) -> list[str]:
        """An answer to each instance of a task: the best of its choices, or what the model says where it has none.

        Inputs of like length are answered together.
        """
        self.model.to(self.device).eval()
        ids = self.prompts(task)
        inputs = [input_ids for _, input_ids in ids]
        answers = [""] * len(ids)
        with self.context():
            encoded = self.model.encode_instruction(torch.tensor([ids[0][0]], device=self.device))
            free = [place for place, instance in enumerate(task.instances) if not instance.choices]
            for places in self._batches(free, key=lambda place: len(inputs[place])):
                rows = pad([inputs[place] for place in places], PAD).to(self.device)
                texts = self.model.generate(encoded, rows, max_new_tokens=self.max_new_tokens)
                for place, text in zip(places, self.prompts.tokenizer.decode_batch(texts.tolist())):
                    answers[place] = text
            for place, choice in self._best_choices(encoded, inputs, task.instances).items():
                answers[place] = choice
        return answers

    def _best_choices(self, encoded, inputs: list[list[int]], instances: Sequence[Instance]) -> dict[int, str]:
        """Rank classification: of each instance that has choices the most probable one, the first of equal ones."""
        rows = [(place, choice) for place, instance in enumerate(instances) for choice in instance.choices]
        encodings = self.prompts.tokenizer.encode_batch([choice for _, choice in rows])
        targets = {row: encoding.ids for row, encoding in zip(rows, encodings)}
        ranks = {}
        for batch in self._batches(targets, key=lambda row: (len(inputs[row[0]]), row[0], len(targets[row]))):
            places = list(dict.fromkeys(place for place, _ in batch))
            input_ids = pad([inputs[place] for place in places], PAD).to(self.device)
            labels = pad([targets[row] for row in batch], NO_LABEL).to(self.device)
            owners = torch.tensor([places.index(place) for place, _ in batch], device=self.device)
            ranks |= zip(batch, self.model.rank(encoded, input_ids, labels, owners).tolist())
        return {
            place: max(instance.choices, key=lambda choice: ranks[place, choice])
            for place, instance in enumerate(instances)
            if instance.choices
        }

    def _batches(self, rows: Iterable, key: Callable) -> Iterator[list]:
        """Rows in the order of a key, at most `batch_size` at a time."""
        order = sorted(rows, key=key)
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    def predictions(self, tasks: Iterable[Task]) -> list[dict]:
        """One row for each instance: id, task, prediction, references. Processes share the tasks, and get all rows."""
        tasks = list(tasks)
        if isinstance(self.prompts, TaskNumberFormat):
            fit_new_tasks(self.model, tasks, self.prompts, self.device, self.context)
        often = 0.5 if sys.stderr.isatty() else 10
        bar = tqdm(tasks[rank() :: world()], "answering", mininterval=often, leave=False, disable=rank() > 0)
        self.model.to(self.device)
        with bar, self.context(), packed_weights(self.model, self.batch_size):
            mine = [self._rows(task) for task in bar]
        shares = from_all(mine)
        return [row for place in range(len(tasks)) for row in shares[place % world()][place // world()]]

    def _rows(self, task: Task) -> list[dict]:
        return [
            {"id": instance.id, "task": task.name, "prediction": answer, "references": list(instance.references)}
            for instance, answer in zip(task.instances, self.answers(task))
        ]


FIT_STEPS, FIT_RATE, FIT_TOKENS = 50, 0.1, 16384  # of Adam, for new task embeddings, which have a size of about 1


def new_tasks(tasks: Sequence[Task], prompts: TaskNumberFormat) -> list[Task]:
    """Those that a Hyperformer has not been trained on. Raises RunError where one has no example to fit it to."""
    new = [task for task in tasks if task.name not in prompts.trained]
    if empty := [task.name for task in new if not task.examples[: prompts.examples]]:
        raise RunError(f"{empty[0]}: was not trained on, and has no example to fit an embedding to; see --examples")
    return new


def fit_new_tasks(
    model: HINT, tasks: Sequence[Task], prompts: TaskNumberFormat, device: torch.device, context: Callable
) -> None:
    """Give each task that a Hyperformer has not been trained on an embedding: fitted to its positive examples, as many
    as the prompts show, with all else frozen (Karimi Mahabadi et al., few-shot domain generalization).

    All new tasks are fitted at once, from the mean of those trained. Raises RunError where there is no example.
    """
    new = new_tasks(tasks, prompts)
    prompts.fitted = {task.name: len(prompts.trained) + number for number, task in enumerate(new)}
    if not new:
        return
    table = model.to(device).eval().hyperencoder
    table.fitted = table.weight.detach().mean(0).repeat(len(new), 1).requires_grad_()
    optimizer = torch.optim.Adam([table.fitted], lr=FIT_RATE)
    parts = [to(device, collate(part)) for part in microbatches(prompts.shots(new), FIT_TOKENS)]
    for _ in range(FIT_STEPS):
        table.fitted.grad = torch.zeros_like(table.fitted)
        for part in parts:
            with context():
                loss = model(*part).cross_entropy
            table.fitted.grad += torch.autograd.grad(loss, [table.fitted])[0]
        optimizer.step()
    table.fitted = table.fitted.detach()


def scores(rows: Sequence[dict]) -> dict[str, float]:
    """Exact match and ROUGE-L of predictions, in percent."""
    return score([row["prediction"] for row in rows], [row["references"] for row in rows])


def by_task(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """Predictions grouped by the task they belong to."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["task"], []).append(row)
    return groups


def report(groups: dict[str, list[dict]], out: Path, control: dict[str, list[dict]] | None = None) -> None:
    """Write `predictions.jsonl` and `metrics.json`, and print the scores of each group and of all of them.

    `control` holds groups to be scored beside them that are no part of the whole.
    """
    rows = [row for group in groups.values() for row in group]
    table = {name: scores(group) for name, group in groups.items()} | {"overall": scores(rows)}
    table |= {name: scores(group) for name, group in (control or {}).items()}
    write(out / "predictions.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write(out / "metrics.json", json.dumps(table, indent=2) + "\n")
    print_scores(table)


def print_scores(table: dict[str, dict[str, float]]) -> None:
    """Exact match and ROUGE-L, a row a name."""
    width = max(map(len, table))
    print(f"\n{'':{width}}  exact match  ROUGE-L")
    for name, row in table.items():
        print(f"{name:{width}}  {row['exact_match']:11.1f}  {row['rougeL']:7.1f}")


# --------------------------------------------------------------------------------------------- commands


def demo(arguments: argparse.Namespace) -> None:
    """Train a tiny HINT on the toy world, score it on what it has never seen, and show what it says."""
    recipe = replace(DEMO, seed=arguments.seed)
    torch.set_num_threads(1)  # a second one gains a quarter in so small a model, and loses tenfold on a busy core
    settings = {"command": "demo", "system": "hint", "examples": 0, **asdict(recipe)}
    run = Run(arguments.out or first_free("runs/demo"), settings)
    world = toy_world(recipe.seed)
    print(f"A tiny HINT learns {len(world.train):,} toy tasks, such as")
    show(world.train[:2])
    answerer = learn_toy_world(world, recipe, DEMO_T5, DEMO_HINT, run)
    tests = {"unseen arguments": world.unseen_arguments, "unseen compositions": world.unseen_compositions}
    rows = {name: answerer.predictions(tasks) for name, tasks in tests.items()}
    blind = {
        f"{name}, no instruction": answerer.predictions(list(map(without_instruction, tasks)))
        for name, tasks in tests.items()
    }
    report(rows, run.out, control=blind)
    show_answers(world.unseen_arguments + world.unseen_compositions, list(chain(*rows.values())))
    task = world.unseen_compositions[0]
    print(f"\nAll of it lies in {run.out}. Ask it yourself:")
    words = ["--model", str(run.out), "--instruction", task.definition, task.instances[0].input]
    print(f"  python train.py predict {shlex.join(words)}")


def learn_toy_world(
    world: ToyWorld, recipe: Recipe, t5_config: T5Config, hint_config: HINTConfig, run: Run, examples: int = 0
) -> Answerer:
    """Train a HINT from scratch on the training tasks of a toy world."""
    tokenizer = toy_tokenizer()
    prompts = prompt_format("hint", tokenizer, examples, recipe)
    torch.manual_seed(recipe.seed)
    model = HINT(T5(replace(t5_config, vocab_size=tokenizer.get_vocab_size())), hint_config)
    examples = encode_tasks(world.train, prompts, recipe.max_target, recipe.seed)
    source = Shuffled(examples, recipe.seed, group=recipe.group, tasks=world.train)
    train(model, tokenizer, source, recipe, run)
    return Answerer(model, prompts, recipe.max_target, 64, recipe.precision)


def without_instruction(task: Task) -> Task:
    """The same inputs, and nothing said of what to do with them."""
    return replace(task, definition="", examples=())


def show(tasks: Iterable[Task]) -> None:
    """An instruction and an instance of each task."""
    for task in tasks:
        print(f"  {task.definition}\n      {task.instances[0].input}  ->  {task.instances[0].references[0]}")


def show_answers(tasks: Sequence[Task], rows: Sequence[dict]) -> None:
    """A few right and a few wrong answers, with the instruction and input of each."""
    said = {task.name: task.definition for task in tasks}
    inputs = {instance.id: instance.input for task in tasks for instance in task.instances}
    for title, exact in (("right", 100), ("wrong", 0)):
        chosen = [row for row in rows if scores([row])["exact_match"] == exact]
        print(f"\n{title}: {len(chosen)} of {len(rows)}")
        chosen = list({row["task"]: row for row in chosen}.values())  # one of a task
        for row in chosen[:: max(1, len(chosen) // 3)][:3]:
            wanted = "" if exact else f"   (wanted: {row['references'][0]})"
            print(f"  {said[row['task']]}\n      {inputs[row['id']]}  ->  {row['prediction']}{wanted}")


def first_free(name: str) -> str:
    """`name`, or name-2, name-3, ... where it is taken."""
    names = chain([name], (f"{name}-{number}" for number in count(2)))
    return next(free for free in names if not Path(free).exists())


def pretrain(arguments: argparse.Namespace) -> None:
    """Pretrain on plain text: the hypernetwork reads the beginning, T5 the middle, and the end is the answer."""
    recipe = recipe_of(arguments)
    run = Run(arguments.out, {**settings_of(arguments, recipe), "examples": 0}, arguments.resume)
    model, tokenizer = model_and_tokenizer(arguments, recipe, run)
    position = run.state["position"] or (0, 0)
    source = PretrainingChunks(
        arguments.corpus, tokenizer, recipe.max_input, recipe.seed, position,
        arguments.skip_bad_lines, arguments.objective,
    )  # fmt: skip
    train(model, tokenizer, source, recipe, run)
    if source.skipped:
        print(f"bad lines skipped: {source.skipped:,}; the first: {source.first_skipped}", file=sys.stderr)
    print(f"The pretrained model lies in {run.out}; finetune it with --start {run.out}")


def finetune(arguments: argparse.Namespace) -> None:
    """Train on the `train` split of Super-NaturalInstructions or the like, then score on its `test` split."""
    recipe = recipe_of(arguments)
    run = Run(arguments.out, settings_of(arguments, recipe), arguments.resume)
    tasks = {split: tasks_of(arguments, split) for split in ("train", "test")}
    numbered = SYSTEMS[arguments.system].prompts is TaskNumberFormat
    names = list(dict.fromkeys(task.name for task in tasks["train"])) if numbered else []
    run.settings["tasks"] = names
    model, tokenizer = model_and_tokenizer(arguments, recipe, run, names)
    prompts = prompt_format(arguments.system, tokenizer, arguments.examples, recipe, names)
    if numbered:
        new_tasks(tasks["test"], prompts)  # what could not be scored in the end is refused now
    examples = encode_tasks(tasks["train"], prompts, recipe.max_target, recipe.seed)
    source = Shuffled(examples, recipe.seed, run.state["position"] or 0, recipe.group, tasks["train"])

    def predictions() -> list[dict]:
        answerer = Answerer(whole(model), prompts, recipe.max_target, arguments.eval_batch_size, recipe.precision)
        return answerer.predictions(tasks["test"])

    def evaluate_at(step: int) -> None:
        overall = scores(predictions())
        run.log(step=step, **overall)
        tqdm.write(f"step {step}: exact match {overall['exact_match']:.1f}, ROUGE-L {overall['rougeL']:.1f}")

    train(model, tokenizer, source, recipe, run, evaluate_at)
    report(by_task(predictions()), run.out)


def tasks_of(arguments: argparse.Namespace, split: str) -> list[Task]:
    """The tasks of a split of --data."""
    return load_tasks(arguments.data, split, arguments.max_instances, joint=arguments.setting == "joint")


def evaluate(arguments: argparse.Namespace) -> None:
    """Score a model on a split: a folder of this project, or a public T5 such as Tk-Instruct."""
    answerer = answerer_of(arguments)
    arguments.setting = arguments.setting or answerer.notes.setting
    run = Run(arguments.out, settings_of(arguments))
    tasks = tasks_of(arguments, arguments.split)
    run.settings |= {"system": answerer.notes.system, "examples": answerer.prompts.examples}
    run.begin()
    report(by_task(answerer.predictions(tasks)), run.out)


def predict(arguments: argparse.Namespace) -> None:
    """Print an answer a line to inputs given as arguments, in a file or on standard input, an input a line."""
    file = arguments.file or (None if arguments.inputs else "-")
    inputs = arguments.inputs + (read_lines(file) if file else [])
    instances = tuple(Instance(str(number), valid(text), ()) for number, text in enumerate(inputs))
    answerer = answerer_of(arguments)
    if isinstance(answerer.prompts, TaskNumberFormat):
        raise RunError(f"{arguments.model}: knows tasks by their numbers and reads no instruction; use evaluate")
    if instances:
        print("\n".join(answerer.answers(Task("predict", valid(arguments.instruction), (), instances))))


def read_lines(file: str) -> list[str]:
    """The lines of a file; of standard input where the file is `-`."""
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: cannot be read ({first_line(error)})") from None
    return text.removesuffix("\n").split("\n") if text else []


# --------------------------------------------------------------------------------------------- the paper's tables


class Row(NamedTuple):
    """A line of a table: what it adds to the command line, and the row whose model it starts from."""

    words: str = ""
    start: str = ""
    command: str = "finetune"
    frozen: bool = False  # T5 does not train, so in the toy world, which has no public T5, it is that of `tk-instruct`
    vague: bool = False  # in the toy world whose definitions leave something to the examples


ROWS = {
    "hint": Row("--system hint"),
    "tk-instruct": Row("--system tk-instruct"),
    "tk-instruct+peft": Row("--system tk-instruct+peft"),
    "no-instruct": Row("--system no-instruct"),
    "hypter": Row("--system hypter"),
    "hypertune": Row("--system hypertune", frozen=True),
    "hyperformer": Row("--system hyperformer --examples 5", frozen=True),
    "hyperformer++": Row("--system hyperformer++ --examples 5", frozen=True),
    "hyperformer++-instruction": Row("--system hyperformer++-instruction", frozen=True),
    "no-fusion": Row("--no-fusion"),
    "no-modules": Row("--generator none"),
    "adapters": Row("--no-fusion --modules adapters"),
    "prefixes": Row("--no-fusion --modules prefixes"),
    "lora": Row("--no-fusion --modules lora"),
    "own-hyperencoder": Row("--hyperencoder own"),
    "full-decoder": Row("--generator decoder"),
    "hint-text": Row("--system hint", command="pretrain"),
    "hint-pretrained": Row("--system hint", start="hint-text"),
    "hint-caclm-text": Row("--system hint --objective caclm", command="pretrain"),
    "hint-caclm": Row("--system hint", start="hint-caclm-text"),
    "no-fusion-text": Row("--no-fusion", command="pretrain"),
    "no-fusion-pretrained": Row("--no-fusion", start="no-fusion-text"),
    "no-fusion-caclm-text": Row("--no-fusion --objective caclm", command="pretrain"),
    "no-fusion-caclm": Row("--no-fusion", start="no-fusion-caclm-text"),
    "adapters-text": Row("--no-fusion --modules adapters", command="pretrain"),
    "adapters-pretrained": Row("--no-fusion --modules adapters", start="adapters-text"),
    "prefixes-text": Row("--no-fusion --modules prefixes", command="pretrain"),
    "prefixes-pretrained": Row("--no-fusion --modules prefixes", start="prefixes-text"),
    "hypertune-text": Row("--system hypertune --objective caclm", command="pretrain", frozen=True),
    "hypertune-caclm": Row("--system hypertune", start="hypertune-text", frozen=True),
    "hint-1": Row("--system hint --examples 1"),
    "hint-2": Row("--system hint --examples 2"),
    "hint-5": Row("--system hint --examples 5"),
    "tk-instruct-1": Row("--system tk-instruct --examples 1"),
    "tk-instruct-2": Row("--system tk-instruct --examples 2"),
    "tk-instruct-5": Row("--system tk-instruct --examples 5"),
    "hint-vague": Row("--system hint", vague=True),
    "hint-vague-2": Row("--system hint --examples 2", vague=True),
    "tk-instruct-vague": Row("--system tk-instruct", vague=True),
    "tk-instruct-vague-2": Row("--system tk-instruct --examples 2", vague=True),
}
TABLES = {  # which rows each has; what they start from is trained too
    "main": [
        "hint", "tk-instruct", "tk-instruct+peft", "no-instruct", "hypter", "hypertune", "hyperformer", "hyperformer++",
        "hyperformer++-instruction",
    ],  # Table 1
    "pretraining": [
        "hint", "hint-pretrained", "hint-caclm", "no-fusion", "no-fusion-pretrained", "no-fusion-caclm", "hypertune",
        "hypertune-caclm",
    ],  # Table 4
    "modules": [
        "no-fusion", "adapters", "prefixes", "lora", "no-fusion-pretrained", "adapters-pretrained", "prefixes-pretrained",
    ],  # Table 5
    "architecture": ["hint", "no-fusion", "no-modules", "own-hyperencoder", "full-decoder"],  # Table 6
    "shots": [
        "hint", "hint-1", "hint-2", "hint-5", "tk-instruct", "tk-instruct-1", "tk-instruct-2", "tk-instruct-5",
    ],  # Figure 3
    "vague": ["hint-vague", "hint-vague-2", "tk-instruct-vague", "tk-instruct-vague-2"],  # of the toy world alone
}  # fmt: skip
SEEDS = {table: [0, 1, 2] if table == "main" else [0, 1] for table in TABLES}  # all of it takes about an hour so
TOY = "--steps 2000 --batch-size 64 --learning-rate 0.03 --warmup 100 --final-rate 0.05 --dropout 0 --log-every 50 \
--save-every 10000 --precision fp32 --bottleneck 4 --prefix-length 4 --generator-dropout 0 --embedding-scale 8"
TOY_WORDS = {  # the recipe of the demo
    "finetune": f"{TOY} --group 2 --max-instruction 256 --max-input 320 --max-target 16 --eval-every 500".split(),
    "pretrain": f"{TOY} --steps 500 --batch-size 32 --max-input 64".split(),
}
TOY_FROZEN = ["--steps", "600"]  # beside the 2,000 of the T5 that it starts from


def compare(arguments: argparse.Namespace) -> None:
    """Train and score the rows of the paper's tables, on the toy world or on the data and model that are named.

    Each row is a `finetune` (or `pretrain`) of its own, in a process of its own, and can be run again by the command
    that its log begins with. A row that has its result is not trained again; one that was stopped goes on.
    """
    check_comparison(arguments)
    rows = Rows(arguments)
    asked = arguments.tables or [*(table for table in TABLES if rows.toy or table != "vague"), "time"]
    seeds = {table: arguments.seeds or SEEDS[table] for table in TABLES if table in asked}
    wanted = [(name, seed) for table in seeds for seed in seeds[table] for name in rows.with_starts(TABLES[table])]
    rows.train(list(dict.fromkeys(wanted)))
    texts = {table: table_text({name: rows.results(name, seeds[table]) for name in TABLES[table]}) for table in seeds}
    if "main" in seeds:
        texts["cost"] = costs_at_medians(rows.folder("hint", seeds["main"][0]))
        lines = {name: curve(rows.results(name, seeds["main"])) for name in TABLES["main"]}
        draw(rows.out / "learning-curves.svg", lines, "steps", "exact match on all unseen tasks")
    if "shots" in seeds:
        lines = scores_by_flops({name: rows.results(name, seeds["shots"]) for name in TABLES["shots"]})
        draw(rows.out / "score-and-compute.svg", lines, "GFLOP for 100 inputs", "exact match on all unseen tasks")
    if "time" in asked:
        texts["time"], lines = answering_times(arguments.time_size)
        draw(rows.out / "time-and-length.svg", lines, "tokens of instruction", "seconds for 100 inputs")
    for name, text in texts.items():
        write(rows.out / f"{name}.md", text)
        print(f"\n{name}\n\n{text}")


def check_comparison(arguments: argparse.Namespace) -> None:
    """Raises RunError for tables that there are not, and for options without those that they need."""
    if unknown := set(arguments.tables) - set(TABLES) - {"time"}:
        raise RunError(f"no table is called {min(unknown)}; there are {', '.join(TABLES)} and time")
    real = arguments.start or arguments.size or arguments.tokenizer or arguments.corpus or arguments.words
    if arguments.data is None and real:
        raise RunError("--start, --size, --tokenizer, --corpus and --words are for --data; the toy world has its own")
    if arguments.data and not (arguments.start or arguments.size):
        raise RunError("--data: needs --start or --size, the model that rows start from")
    if arguments.data and "vague" in arguments.tables:
        raise RunError("vague: is a table of the toy world, not of --data")
    pretraining = {"pretraining", "modules"}
    if arguments.data and not arguments.corpus and (not arguments.tables or pretraining & set(arguments.tables)):
        raise RunError("--corpus: pretrained rows need some, where --data takes the place of the toy world")


class Rows:
    """The rows of a comparison: the command of each, its folder, and the result that it leaves there."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.given, self.out, self.toy = arguments, Path(arguments.out), arguments.data is None

    def folder(self, name: str, seed: int) -> Path:
        """Where a row is trained."""
        return self.out / name / f"seed-{seed}"

    def world(self, name: str, seed: int) -> Path:
        """The toy world that a row is trained on."""
        return self.out / f"{'vague' if ROWS[name].vague else 'world'}-{seed}"

    def start(self, name: str) -> str:
        """The row whose model a row starts from, if any."""
        return ROWS[name].start or ("tk-instruct" if ROWS[name].frozen and self.toy else "")

    def with_starts(self, names: Sequence[str]) -> list[str]:
        """Rows, each once, in an order in which what a row starts from stands before it."""
        found: dict[str, None] = {}
        for name in names:
            start = self.start(name)
            found |= dict.fromkeys([*(self.with_starts([start]) if start else []), name])
        return list(found)

    def words(self, name: str, seed: int) -> list[str]:
        """The command line of a row."""
        row, given, world = ROWS[name], self.given, str(self.world(name, seed))
        data, corpus = (world, [f"{world}/corpus.json.gz"]) if self.toy else (given.data, given.corpus)
        tokenizer = world if self.toy else given.tokenizer
        start = str(self.folder(self.start(name), seed)) if self.start(name) else given.start
        return [
            row.command,
            *(["--data", data] if row.command == "finetune" else ["--corpus", *corpus]),
            *(["--tokenizer", tokenizer] if tokenizer else []),
            *(["--start", start] if start else ["--size", "toy" if self.toy else given.size]),
            *(self.toy_words(row) if self.toy else given.words),
            *row.words.split(),
            *["--seed", str(seed), "--out", str(self.folder(name, seed)), "--resume"],
        ]  # fmt: skip

    def toy_words(self, row: Row) -> list[str]:
        """The recipe of a row in the toy world."""
        return TOY_WORDS[row.command] + TOY_FROZEN * (row.frozen and row.command == "finetune")

    def train(self, rows: Sequence[tuple[str, int]]) -> None:
        """Train those that have no result yet, so many at a time; raises RunError where one fails."""
        for row in rows:
            parser().parse_args(self.words(*row))  # a word that a row does not know ends it all now, not in an hour
        done = {row for row in rows if self._has_result(*row)}
        waiting = [row for row in rows if row not in done]
        running: dict[tuple[str, int], tuple[subprocess.Popen, float]] = {}
        bar = tqdm(total=len(rows), initial=len(done), desc="rows", disable=not rows)
        try:
            while waiting or running:
                now = time.time()
                for row in [row for row, (process, _) in running.items() if process.poll() is not None]:
                    process, began = running.pop(row)
                    self._finish(*row, process.returncode, round(now - began))
                    done.add(row)
                    bar.update()
                ready = [row for row in waiting if not self.start(row[0]) or (self.start(row[0]), row[1]) in done]
                for row in ready[: self.given.jobs - len(running)]:
                    running[row] = self._begin(*row), time.time()
                    waiting.remove(row)
                time.sleep(0.2)
        finally:
            for process, _ in running.values():
                process.terminate()  # it ends its step and keeps a checkpoint
            for process, _ in running.values():
                process.wait()
            bar.close()

    def _has_result(self, name: str, seed: int) -> bool:
        path = self.folder(name, seed) / "result.json"
        if path.exists() and read_json(path).get("words") != self.words(name, seed):
            raise RunError(f"{path}: is of a row with other options; name another --out")
        return path.exists()

    def _begin(self, name: str, seed: int) -> subprocess.Popen:
        """The process that trains a row; what it prints goes into a log beside its folder."""
        if self.toy and not (self.world(name, seed) / "tokenizer.json").exists():
            write_toy_world(self.world(name, seed), vague(toy_world(seed)) if ROWS[name].vague else toy_world(seed))
        words = [sys.executable, __file__, *self.words(name, seed)]
        place = self.folder(name, seed)
        place.parent.mkdir(parents=True, exist_ok=True)
        one_thread = {"OMP_NUM_THREADS": "1"} if self.toy else {}
        with open(f"{place}.log", "w", encoding="utf-8") as log:
            log.write(shlex.join(words) + "\n")
            log.flush()
            # In a session of its own, so that Ctrl-C reaches it once, from here: a second signal would stop it at once.
            return subprocess.Popen(
                words, stdout=log, stderr=log, env={**os.environ, **one_thread}, start_new_session=True
            )

    def _finish(self, name: str, seed: int, status: int, seconds: int) -> None:
        """Write the result of a row whose process has ended; of one that was stopped, the seconds of its last part."""
        place = self.folder(name, seed)
        if status:
            raise RunError(f"{place}.log: ended with status {status}; its end says why")
        found = result_of(place, self.toy) if ROWS[name].command == "finetune" else {}
        result = {"words": self.words(name, seed), "seconds": seconds, **found}
        write(place / "result.json", json.dumps(result, indent=2) + "\n")
        tqdm.write(f"{place}: {seconds} s", file=sys.stderr)

    def results(self, name: str, seeds: Sequence[int]) -> list[dict]:
        """What is known of a finished row, for each seed."""
        return [read_json(self.folder(name, seed) / "result.json") for seed in seeds]


def result_of(place: Path, toy: bool) -> dict:
    """What the tables need of a run, from the files that it wrote: scores (in the toy world of both test sets), those
    during the training, steps, and costs.
    """
    with open(place / "predictions.jsonl", encoding="utf-8") as file:
        rows = list(map(json.loads, file))
    groups = {"overall": rows}
    for row in rows if toy else []:
        groups.setdefault(re.sub(r"-\d+$", "", row["task"]).replace("-", " "), []).append(row)
    log = map(json.loads, (place / "log.jsonl").read_text("utf-8").splitlines())
    return {
        "scores": {name: scores(group) for name, group in groups.items()},
        "curve": [[entry["step"], entry["exact_match"]] for entry in log if "exact_match" in entry],
        "steps": read_json(place / "config.json")["run"]["steps"],
        **cost_of(place),
    }


def cost_of(place: Path) -> dict[str, int]:
    """Numbers that train; FLOPs of all products for one instruction, and for one input, by torch's own counter.

    They are means over at most 16 training tasks, evenly chosen, four inputs each, and end where the answers end.
    """
    settings = read_json(place / "config.json")["run"]
    given = {"max_new_tokens": None, "precision": "fp32", "system": None, "tokenizer": None, "examples": None}
    answerer = answerer_of(argparse.Namespace(model=place, eval_batch_size=64, **given))
    tasks = load_tasks(settings["data"], "train", 4)
    tasks = tasks[:: math.ceil(len(tasks) / 16)]
    with flop_counter() as reading, torch.no_grad(), answerer.context():
        answerer.model.to(answerer.device)
        for task in tasks:
            answerer.model.encode_instruction(torch.tensor([answerer.prompts(task)[0][0]], device=answerer.device))
    with flop_counter() as all_of_it:
        count = sum(len(answerer.answers(task)) for task in tasks)
    once, each = reading.get_total_flops(), all_of_it.get_total_flops() - reading.get_total_flops()
    trained = sum(part.numel() for part in answerer.model.parameters() if part.requires_grad)
    return {"trained": trained, "flops_once": once // len(tasks), "flops_each": each // count}


def costs_at_medians(place: Path) -> str:
    """FLOPs for 100 inputs of one task, at the median lengths of the training tasks: by the paper's formulas, and exact.

    `place`: a run of HINT with the definition. As in appendix A.1, each format has medians of its own.
    """
    settings, model, tokenizer = read_json(place / "config.json")["run"], load_model(place), load_tokenizer(place)
    tasks, t5, hint = load_tasks(settings["data"], "train", settings["max_instances"]), model.t5.config, model.config
    N, p, n = t5_parameters(t5), generated_numbers(t5, hint), 100
    ours, plain = ExactFlops(t5, hint.bottleneck, hint.prefix_length), ExactFlops(t5)

    def medians(system: str) -> list[int]:
        prompts = prompt_format(system, tokenizer, 0, notes_of_run({"run": settings}).recipe)
        lengths = zip(*(map(len, ids) for ids in encode_tasks(tasks, prompts, settings["max_target"], 0)))
        return [sorted(part)[len(part) // 2] for part in map(list, lengths)]

    t, i, o = medians("hint")
    whole_input = medians("tk-instruct")[1]
    H = ours.generate_modules(t)
    found = {
        "hint": (hint_flops(n, i, t, o, N, H, p), ours.encode_instruction(t) + ours.generate(n, i, o, t)),
        "tk-instruct": (tk_instruct_flops(n, i, whole_input - i, o, N), plain.generate(n, whole_input, o)),
        "no-instruct": (no_instruct_flops(n, i, o, N), plain.generate(n, i, o)),
        "decoder alone, keys and values kept": (decoder_only_flops(n, i, whole_input - i, o, N), None),
    }
    first = f"Median tokens: instruction {t}, input {i}, answer {o}; all in one input {whole_input}.\n\n"
    lines = []
    for name, (formula, exact) in found.items():
        cells = {"by formula (GFLOP)": f"{formula / 1e9:.3g}", "exact": f"{exact / 1e9:.3g}" if exact else ""}
        lines.append({"100 inputs": name, **cells})
    return first + markdown(lines)


def flops_of_100(result: dict) -> float:
    """GFLOP for 100 inputs of one task."""
    return (result["flops_once"] + 100 * result["flops_each"]) / 1e9


def table_text(rows: dict[str, list[dict]]) -> str:
    """A table in Markdown of the results of rows: exact match, mean (lowest to highest) over the seeds; costs of the
    first seed.
    """
    lines = []
    for name, found in rows.items():
        groups = list(found[0]["scores"])[1:] or ["overall"]
        cells = {group: spread_of([one["scores"][group]["exact_match"] for one in found]) for group in groups}
        cells["ROUGE-L"] = spread_of([one["scores"]["overall"]["rougeL"] for one in found])
        steps = [step for step, _ in found[0]["curve"]]
        cells |= {f"at step {step:,}": spread_of([dict(one["curve"])[step] for one in found]) for step in steps}
        cells["numbers trained"] = f"{found[0]['trained']:,}"
        cells["GFLOP for 100 inputs"] = f"{flops_of_100(found[0]):.3g}"
        cells["seconds"] = f"{mean(one['seconds'] for one in found):.0f}"
        lines.append({"row": name, **cells})
    return markdown(lines)


def markdown(lines: Sequence[dict[str, str]]) -> str:
    """A table, a column for each key that a line has."""
    heads = list(dict.fromkeys(head for line in lines for head in line))
    rows = [heads, ["---"] * len(heads), *([line.get(head, "") for head in heads] for line in lines)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def spread_of(values: Sequence[float]) -> str:
    """Mean (lowest to highest)."""
    return f"{mean(values):.1f}" + (f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else "")


Line = list[tuple[float, float]]  # points of a line of a picture


def curve(found: Sequence[dict]) -> Line:
    """Exact match on all unseen tasks over the steps of training, mean over the seeds; the end counts as the last."""
    steps = [step for step, _ in found[0]["curve"]]
    points = [(step, mean(dict(one["curve"])[step] for one in found)) for step in steps]
    return [*points, (found[0]["steps"], overall(found))]


def overall(found: Sequence[dict]) -> float:
    """Exact match on all unseen tasks at the end, mean over the seeds."""
    return mean(one["scores"]["overall"]["exact_match"] for one in found)


def scores_by_flops(rows: dict[str, list[dict]]) -> dict[str, Line]:
    """Figure 3: score against compute, from no example in the instruction to five; a line for each system."""
    lines: dict[str, Line] = {}
    for name, found in rows.items():
        lines.setdefault(ROWS[name].words.split()[1], []).append((flops_of_100(found[0]), overall(found)))
    return lines


def answering_times(size: str, lengths: Sequence[int] = (0, 50, 100, 200, 400, 700, 1000)) -> tuple[str, dict]:
    """Figure 4: seconds for 100 inputs of one task (100 tokens each, 16 new ones), by the length of its instruction.

    HINT, the hypernetwork included, against the instruction in every input; random weights that never end an answer;
    medians of three rounds in which both take turns.
    """
    model = HINT(T5(SIZES[size]), HINTConfig()).to(device_and_precision("fp32")[0]).eval()
    nn.init.zeros_(model.t5.lm_head.weight.data[EOS])
    device = model.t5.shared.weight.device
    inputs = torch.randint(2, 32000, (100, 100), device=device)
    table, lines = [], {"hint": [], "tk-instruct": []}
    for length in tqdm(lengths, "time", leave=False):
        instruction = torch.randint(2, 32000, (1, length + 1), device=device)  # `</s>` at least
        whole_inputs = torch.cat([instruction[:, 1:].expand(100, -1), inputs], dim=1)
        seconds: dict[str, list[float]] = {name: [] for name in lines}
        for _ in range(3):
            for name in lines:
                began = time.perf_counter()
                with torch.inference_mode():
                    if name == "hint":
                        model.generate(model.encode_instruction(instruction), inputs, max_new_tokens=16).cpu()
                    else:
                        model.t5.generate(whole_inputs, max_new_tokens=16).cpu()
                seconds[name].append(time.perf_counter() - began)
        medians = {name: sorted(found)[1] for name, found in seconds.items()}
        for name, median in medians.items():
            lines[name].append((length, median))
        cells = {name: f"{median:.2f} s" for name, median in medians.items()}
        faster = f"{medians['tk-instruct'] / medians['hint']:.2f}"
        table.append({"tokens of instruction": f"{length:,}", **cells, "times as fast": faster})
    return markdown(table), lines


COLOURS = ("#2f81f7", "#d9730d", "#1a9850", "#8957e5", "#c93c37", "#768390", "#b08800", "#0e8a8a", "#d14fa3")


def draw(path: Path, lines: dict[str, Line], across: str, up: str) -> None:
    """A picture of lines with a point for each value, as SVG, in colours that show on light and dark pages."""
    width, height, left, right, top, bottom = 720, 360, 60, 210, 20, 310  # of the picture; of the field of the lines
    wide, high = (ticks(max(values)) for values in zip(*(point for line in lines.values() for point in line)))

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x / wide[-1] * (width - right - left), bottom - y / high[-1] * (bottom - top)

    def text(x: float, y: float, words: str, anchor: str = "middle", more: str = "") -> str:
        return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}"{more}>{words}</text>'

    middle = (top + bottom) / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">',
        "<style>text{fill:#57606a}@media(prefers-color-scheme:dark){text{fill:#adbac7}}</style>",
        f'<path d="M{left} {top}V{bottom}H{width - right}" fill="none" stroke="#768390"/>',
        text((left + width - right) / 2, height - 10, across),
        text(16, middle, up, more=f' transform="rotate(-90 16 {middle})"'),
        *(text(place(tick, 0)[0], bottom + 18, f"{tick:,g}") for tick in wide),
        *(text(left - 6, place(0, tick)[1] + 4, f"{tick:,g}", "end") for tick in high),
    ]
    for number, (name, line) in enumerate(lines.items()):
        colour, row = COLOURS[number % len(COLOURS)], top + 14 + 20 * number
        points = [place(*point) for point in line]
        route = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        parts.append(f'<path d="M{route}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in points]
        parts.append(f'<rect x="{width - right + 14}" y="{row - 10}" width="12" height="12" fill="{colour}"/>')
        parts.append(text(width - right + 32, row, name, "start"))
    write(path, "\n".join([*parts, "</svg>"]) + "\n")


def ticks(highest: float) -> list[float]:
    """Round numbers from 0 to `highest` or a little more, at most seven of them."""
    size = 10 ** math.floor(math.log10(highest or 1))
    step = next(size * part for part in (0.2, 0.5, 1.0, 2.0) if highest <= 6 * size * part)
    return [round(step * number, 9) for number in range(math.ceil((highest or 1) / step) + 1)]


# --------------------------------------------------------------------------------------------- command line


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """The recipe of a command with the options given to it."""
    given = {item.name: getattr(arguments, item.name) for item in fields(Recipe) if hasattr(arguments, item.name)}
    return replace(RECIPES[arguments.command], **given)


def settings_of(arguments: argparse.Namespace, recipe: Recipe | None = None) -> dict:
    """What `config.json` keeps of the command line."""
    given = {name: value for name, value in vars(arguments).items() if name not in ("function", "resume", "out")}
    return {**given, **(asdict(recipe) if recipe else {})}


def prompt_format(
    system: str, tokenizer: Tokenizer, examples: int, recipe: Recipe, tasks: Sequence[str] = ()
) -> PromptFormat:
    """The texts of a system, with the examples, lengths and training tasks of a run."""
    return SYSTEMS[system].prompts(tokenizer, examples, recipe.max_instruction, recipe.max_input, tasks)


def model_and_tokenizer(
    arguments: argparse.Namespace, recipe: Recipe, run: Run, tasks: Sequence[str] = ()
) -> tuple[nn.Module, Tokenizer]:
    """The model that a run starts from: its own checkpoint, a folder or public name, or fresh weights of a size.

    `tasks`: the names of those that a table of task embeddings is for.
    """
    torch.manual_seed(recipe.seed)
    start = run.out if run.step else arguments.start
    if start is None and arguments.tokenizer is None:
        raise RunError("--size starts from fresh weights and has no tokenizer of its own; name one with --tokenizer")
    tokenizer = load_tokenizer(arguments.tokenizer or start)
    model = load_model(start) if start else PlainT5(T5(size_for(arguments.size, tokenizer)))
    model = with_hypernetwork(model, arguments, tasks, start)
    check_vocabulary(tokenizer, model, arguments.tokenizer or start)
    set_dropout(model, recipe.dropout)
    return model, tokenizer


def size_for(size: str, tokenizer: Tokenizer) -> T5Config:
    """A size of T5 with a row for every token."""
    return replace(SIZES[size], vocab_size=tokens_of(tokenizer))


def with_hypernetwork(
    model: HINT | PlainT5, arguments: argparse.Namespace, tasks: Sequence[str], start: object
) -> HINT | PlainT5:
    """A model as what `--system` says. A hypernetwork that it has already keeps its sizes; one of another kind, and
    options of one that the system does not have, raise RunError.
    """
    preset = SYSTEMS[arguments.system].hypernetwork
    given = {item.name: getattr(arguments, item.name) for item in fields(HINTConfig) if hasattr(arguments, item.name)}
    given = {name: value for name, value in given.items() if value is not None}
    if preset is None:
        if isinstance(model, HINT):
            raise RunError(f"{start}: is a HINT model, which cannot become --system {arguments.system}")
        if kinds := sorted(given.keys() & CHOICES):
            raise RunError(f"--system {arguments.system}: has no hypernetwork whose {kinds[0]} could be chosen")
        return model
    given["tasks"] = len(tasks)
    if not isinstance(model, HINT):
        return HINT(model.t5, HINTConfig(**{**preset, **given}))
    of_hint = {name: getattr(HINTConfig, name) for name in CHOICES}
    fixed = {name: value for name, value in {**of_hint, **preset, **given}.items() if name != "generator_dropout"}
    if "bottleneck" not in given:  # that of a preset is for a new hypernetwork
        fixed.pop("bottleneck", None)
    for name, value in fixed.items():
        if (found := getattr(model.config, name)) != value:
            raise RunError(f"{start}: has a hypernetwork already, whose {name} of {found} cannot be changed")
    if tasks and read_config(start, notes_of_run).tasks != list(tasks):
        raise RunError(f"{start}: has embeddings of other tasks")
    if "generator_dropout" in given:
        model.config = replace(model.config, generator_dropout=given["generator_dropout"])
    return model


def tokens_of(tokenizer: Tokenizer) -> int:
    """How many ids a tokenizer may give."""
    return max(tokenizer.get_vocab().values()) + 1


def check_vocabulary(tokenizer: Tokenizer, model: nn.Module, source: object) -> None:
    """A model must have an embedding for every token, up to the highest id; `source` is where the tokenizer is from."""
    tokens, rows = tokens_of(tokenizer), model.t5.config.vocab_size
    if tokens > rows:
        raise RunError(f"{source}: its tokenizer has {tokens:,} tokens, the model only {rows:,}")


class Notes(NamedTuple):
    """What a run's `config.json` tells of how it was trained; of a public model, the defaults."""

    system: str | None
    examples: int
    tasks: list[str]  # the rows of a table of task embeddings
    setting: str | None  # of prompted examples
    recipe: Recipe


def notes_of_run(found: dict) -> Notes:
    """The notes in a `config.json`. Raises CheckpointError."""
    notes = found.get("run", {})
    if not isinstance(notes, dict):
        raise CheckpointError("its run is not an object")
    system, examples, tasks = notes.get("system"), notes.get("examples", 0), notes.get("tasks", [])
    if system not in (None, *SYSTEMS) or type(examples) is not int or examples < 0:
        raise CheckpointError(
            f"its run has a system {system!r:.40} and {examples!r:.40} examples, which makes no sense"
        )
    if not isinstance(tasks, list) or not all(isinstance(name, str) for name in tasks):
        raise CheckpointError("its run has tasks that are no list of names")
    if (setting := notes.get("setting")) not in (None, *SETTINGS):
        raise CheckpointError(f"its run has a setting {setting!r:.40}, which there is not")
    try:
        recipe = Recipe(**{item.name: notes[item.name] for item in fields(Recipe) if item.name in notes})
    except RunError as error:
        raise CheckpointError(f"its run makes no sense ({error})") from None
    return Notes(system, examples, tasks, setting, recipe)


def answerer_of(arguments: argparse.Namespace) -> Answerer:
    """A saved model with the prompt format that it was trained on, where its `config.json` tells that."""
    model = load_model(arguments.model)
    notes = read_config(arguments.model, notes_of_run)
    generates = isinstance(model, HINT)
    system = (notes.system or "hint") if generates else arguments.system or notes.system or "tk-instruct"
    if (SYSTEMS[system].hypernetwork is not None) != generates or arguments.system not in (None, system):
        what = f"a HINT model ({system})" if generates else "not a HINT model"
        raise RunError(f"--system {arguments.system or system}: {arguments.model} is {what}")
    tokenizer = load_tokenizer(arguments.tokenizer or arguments.model)
    check_vocabulary(tokenizer, model, arguments.tokenizer or arguments.model)
    examples = notes.examples if arguments.examples is None else arguments.examples
    prompts = prompt_format(system, tokenizer, examples, notes.recipe, notes.tasks)
    has_table = generates and model.config.hyperencoder == "table"
    if has_table != isinstance(prompts, TaskNumberFormat) or has_table and model.config.tasks != len(notes.tasks):
        raise RunError(f"{arguments.model}: does not name the tasks that its embeddings are of")
    longest = arguments.max_new_tokens or notes.recipe.max_target
    precision = arguments.precision or notes.recipe.precision
    return Answerer(model, prompts, longest, arguments.eval_batch_size, precision, notes._replace(system=system))


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help that shows a default where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_none = action.default is None or action.default is False
        return action.help if has_none else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """One sentence for a wrong command line, in place of a page of usage."""

    def __init__(self, **settings) -> None:
        super().__init__(allow_abbrev=False, formatter_class=Help, **settings)

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n" if first_to_fail() else None)


def parser() -> Parser:
    """The command line. Every option of `Recipe` is one of `pretrain` and `finetune`."""
    top = Parser(description=__doc__.partition("\n")[0])
    commands = top.add_subparsers(title="commands", dest="command", parser_class=Parser)
    command = add_command(commands, demo)
    command.add_argument("--seed", type=int, default=0, help="of the toy world and of the model")
    command.add_argument("--out", help="folder of the run; the first free runs/demo, runs/demo-2, ... without it")
    command = add_command(commands, pretrain)
    command.add_argument(
        "--corpus", required=True, nargs="+", help="shards of C4 or the like: .json.gz, an object with a text a line"
    )
    command.add_argument(
        "--skip-bad-lines", action="store_true", help="leave out lines of a shard that hold no text, and say how many"
    )
    reading = [name for name, system in SYSTEMS.items() if system.prompts is HINTFormat]
    command.add_argument("--system", choices=reading, default="hint", help="HINT, or another that reads an instruction")
    command.add_argument(
        "--objective", choices=OBJECTIVES, default="hint", help="how a segment is split: as in section 3.3, or CACLM"
    )
    add_training_options(command, RECIPES["pretrain"], left_out=NOT_IN_PRETRAINING)
    command = add_command(commands, finetune)
    add_data_options(command)
    command.add_argument("--system", choices=SYSTEMS, default="hint", help="HINT, or what it is compared with")
    command.add_argument(
        "--examples",
        type=at_least(0),
        default=0,
        help="positive examples in the instruction: 0 (Def) or 2 (Def + 2 Pos)",
    )
    command.add_argument("--eval-batch-size", type=at_least(1), default=32, help="inputs answered at once")
    add_training_options(command, RECIPES["finetune"])
    command = add_command(commands, evaluate)
    add_data_options(command)
    command.add_argument("--split", default="test", help="which splits/default/SPLIT_tasks.txt, or SPLIT.jsonl")
    command.add_argument("--out", required=True, help="folder for metrics.json and predictions.jsonl")
    add_answering_options(command)
    command = add_command(commands, compare)
    add_comparison_options(command)
    command = add_command(commands, predict)
    command.add_argument("--instruction", required=True, help="what to do with each input")
    command.add_argument("--file", help="more inputs, one a line; -: standard input")
    command.add_argument("inputs", nargs="*", help="inputs; without any, and without --file, standard input is read")
    add_answering_options(command)
    return top


def add_command(commands, function: Callable) -> Parser:
    """A command named as the function that carries it out, which also tells what it does."""
    text = function.__doc__
    command = commands.add_parser(function.__name__, help=text, description=text)
    command.set_defaults(function=function)
    return command


def add_data_options(command: Parser) -> None:
    """The options that say which tasks."""
    command.add_argument(
        "--data",
        required=True,
        help="Super-NaturalInstructions, a folder with tasks/ and splits/; or one of prompted examples, SPLIT.jsonl",
    )
    command.add_argument(
        "--max-instances",
        type=at_least(1),
        default=100,
        help="the first so many instances of each task (of prompted examples: of each instruction)",
    )
    command.add_argument(
        "--setting",
        choices=SETTINGS,
        help="of prompted examples only: the input is the instance's fields (split: so without it, but in an evaluation "
        "as in training), or the whole prompt",
    )


def add_training_options(command: Parser, recipe: Recipe, left_out: Sequence[str] = ()) -> None:
    """The options of a run that trains: where it starts, the sizes of a new hypernetwork, and its recipe."""
    start = command.add_mutually_exclusive_group(required=True)
    start.add_argument(
        "--start", help="model to start from: a folder, or a public name such as google/t5-base-lm-adapt"
    )
    start.add_argument("--size", choices=SIZES, help="fresh weights of this size, in place of --start")
    command.add_argument("--tokenizer", help="folder, file or public name; that of --start without it")
    for item in fields(HINTConfig):
        text = f"of a new hypernetwork (without it that of --system: {item.default} for hint)"
        if item.type == "bool":
            command.add_argument(flag(item), action=argparse.BooleanOptionalAction, help=text)
        elif item.name != "tasks":  # which the data tells
            kind = {"int": int, "float": float, "str": str}[item.type]
            command.add_argument(flag(item), type=kind, choices=CHOICES.get(item.name), help=text)
    for item in fields(Recipe):
        default, text = getattr(recipe, item.name), item.metadata["help"]
        if item.name in left_out:
            continue
        if item.type == "bool":
            command.add_argument(flag(item), action="store_true", help=text)
        else:
            command.add_argument(
                flag(item), type={"int": int, "float": float, "str": str}[item.type], default=default, help=text
            )
    command.add_argument("--out", required=True, help="folder of the run")
    command.add_argument("--resume", action="store_true", help="go on with the run in --out, with the same options")


def add_comparison_options(command: Parser) -> None:
    """The options of `compare`: which rows, and the data and model that take the place of the toy world."""
    command.add_argument("tables", nargs="*", metavar="table", help=f"of {', '.join(TABLES)}, time; all without any")
    command.add_argument("--out", default="runs/compare", help="folder of all rows, tables and pictures")
    command.add_argument(
        "--seeds", type=at_least(0), nargs="+", help="each row is trained with each; 0 1 2 for main, 0 1 for others"
    )
    command.add_argument("--time-size", choices=SIZES, default="tiny", help="of the model whose time is measured")
    command.add_argument("--jobs", type=at_least(1), default=2, help="rows trained at a time")
    command.add_argument("--data", help="Super-NaturalInstructions, in place of the toy world")
    command.add_argument("--corpus", nargs="+", help="shards of C4, with --data")
    start = command.add_mutually_exclusive_group()
    start.add_argument("--start", help="with --data: the T5 that rows start from, a folder or a public name")
    start.add_argument("--size", choices=SIZES, help="with --data: fresh weights of this size, in place of --start")
    command.add_argument("--tokenizer", help="with --data: folder, file or public name; that of --start without it")
    command.add_argument(
        "--words",
        nargs=argparse.REMAINDER,
        default=[],
        help="with --data: more options of all rows, `pretrain` ones too",
    )


def add_answering_options(command: Parser) -> None:
    """The options of a command that answers with a saved model."""
    command.add_argument("--model", required=True, help="folder of a run, or a public T5")
    command.add_argument("--tokenizer", help="folder, file or public name; that of --model without it")
    command.add_argument(
        "--system", choices=SYSTEMS, help="prompt format of a T5 that does not tell its own: tk-instruct without it"
    )
    command.add_argument(
        "--examples", type=at_least(0), help="positive examples in the instruction; as in training without it"
    )
    command.add_argument("--max-new-tokens", type=at_least(1), help="longest answer; as in training without it")
    command.add_argument("--eval-batch-size", type=at_least(1), default=32, help="inputs answered at once")
    command.add_argument("--precision", help="auto, fp32 or bf16; as in training without it")


def flag(item) -> str:
    """The option of a field."""
    return "--" + item.name.replace("_", "-")


def at_least(minimum: int) -> Callable[[str], int]:
    """A reader of whole numbers for argparse."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {minimum}")
        return int(text)

    return number


@processes()
def main(words: Sequence[str] | None = None) -> None:
    """Run one command; what a user can mend ends in one sentence and exit status 1 (2 for the command line).

    A signal has the status that shells give it: 130 for Ctrl-C, 143 for SIGTERM.
    """
    words = sys.argv[1:] if words is None else words
    arguments = parser().parse_args(words or ["demo"])
    try:
        if world() > 1 and arguments.function in (demo, compare, predict):
            raise RunError(f"{arguments.command}: is for one process; start it without torchrun")
        with on_signals(stop_at_once):
            arguments.function(arguments)
    except (RunError, CheckpointError, DataError) as error:
        sys.exit(f"train.py: {error}")
    except BrokenPipeError:  # the reader of the answers has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        name = error.filename or getattr(arguments, "out", None) or "a file"  # a full disk tells no name
        sys.exit(f"train.py: {name}: {error.strerror or error}")
    except torch.OutOfMemoryError:
        sys.exit("train.py: the GPU's memory is full; take a smaller --microbatch (or --eval-batch-size, in answering)")
    except Stopped as stop:
        more = ", and the same command with --resume goes on" if hasattr(arguments, "resume") else ""
        if first_to_fail():
            print(f"train.py: {stop}{more}", file=sys.stderr)
        sys.exit(128 + stop.number)


if __name__ == "__main__":
    main()
