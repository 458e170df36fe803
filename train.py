"""Train, evaluate and use HINT from the command line.

    python train.py                 the demo: a tiny HINT learns a toy world of instructions, from scratch
    python train.py pretrain ...    pretrain the hypernetwork on plain text (section 3.3)
    python train.py finetune ...    train on the tasks of Super-NaturalInstructions (section 4)
    python train.py evaluate ...    score a model on unseen tasks
    python train.py predict ...     answer inputs of one's own
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import signal
import sys
import threading
import time
import warnings
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from statistics import mean
from typing import Callable, Iterable, Iterator, NamedTuple, Sequence

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import (
    NO_LABEL, OBJECTIVES, PAD, Example, HINTFormat, Ids, Instance, NoInstructFormat, PretrainingChunks, PromptFormat,
    Shuffled, Task, TaskNumberFormat, TkInstructFormat, collate, encode_tasks, groups_of, load_tasks, load_tokenizer,
    microbatches, pad, read_lines, report, scores, show_answers, toy_tokenizer, toy_world, valid,
)  # fmt: skip
from hint import HINT, EncodedTask, HINTConfig, PlainT5, load_model, on_meta, price_in_tokens
from hypernet import CHOICES
from t5 import (
    SIZES, T5, InputError, check_fields, read_config, read_json, read_metadata, read_safetensors, reading,
    replacing, set_gradient_checkpointing, write_safetensors,
)  # fmt: skip

# --------------------------------------------------------------------------------------------- settings


class System(NamedTuple):
    """A name of `--system`: the prompt format, and the hypernetwork as changes of HINTConfig (None: T5 alone)."""

    prompts: type[PromptFormat]
    hypernetwork: dict | None


_TABLE = {"fusion": False, "hyperencoder": "table", "trains": "hypernetwork+norms", "bottleneck": 24}
_OWN = {"fusion": False, "hyperencoder": "own"}
SYSTEMS = {
    "hint": System(HINTFormat, {}),
    "tk-instruct": System(TkInstructFormat, None),
    "tk-instruct+peft": System(TkInstructFormat, {"generator": "direct", "fusion": False}),
    "no-instruct": System(NoInstructFormat, None),
    "hypter": System(HINTFormat, {**_OWN, "generator": "pooled", "modules": "adapters", "bottleneck": 8}),
    "hypertune": System(HINTFormat, {**_OWN, "generator": "decoder", "modules": "prefixes", "trains": "hypernetwork"}),
    "hyperformer": System(TaskNumberFormat, {**_TABLE, "generator": "hyperformer"}),
    "hyperformer++": System(TaskNumberFormat, {**_TABLE, "generator": "hyperformer++"}),
    "hyperformer++-instruction": System(HINTFormat, {**_TABLE, "generator": "hyperformer++", "hyperencoder": "tied"}),
}

TRAIN, ANSWER, DATA = ("pretrain", "finetune"), ("evaluate", "predict"), ("finetune", "evaluate")
PRECISIONS = ["auto", "fp32", "bf16"]
RUN, MODEL, ABLATION, SPEED = "the run", "the model", "ablations (default: those of --system)", "memory and speed"


def option(default, text: str, commands: Sequence[str] = TRAIN, group: str = RUN, least=1, most=10**7, **more):
    """Define a field of `Settings` that is an option of some commands: its help, bounds, and more for argparse."""
    about = {"help": text, "commands": commands, "group": group, "bounds": (least, most), "argparse": more}
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Settings:
    """All settings of a command, which `config.json` keeps. The defaults are those of section 4 for SNI."""

    command: str = ""
    model: str | None = option(None, "folder of a run, or a public T5", ANSWER)
    start: str | None = option(None, "model to start from: folder, or public name such as google/t5-base-lm-adapt")
    size: str | None = option(None, "fresh weights of this size, in place of --start", choices=list(SIZES))
    tokenizer: str | None = option(None, "folder, file or public name; default: that of the model", TRAIN + ANSWER)
    data: str | None = option(None, "folder of SNI, or of SPLIT.jsonl (P3)", DATA)
    split: str = option("test", "tasks to score: splits/default/SPLIT_tasks.txt, or SPLIT.jsonl", ("evaluate",))
    corpus: tuple | None = option(None, "shards, .json.gz or .jsonl", ("pretrain",), nargs="+", metavar="FILE")
    out: str | None = option(None, "folder to write to; of predict: a file of answers", (*TRAIN, *ANSWER, "demo"))
    system: str | None = option("hint", "HINT, or a system compared with it", TRAIN + ANSWER, choices=list(SYSTEMS))
    examples: int | None = option(0, "positive examples in the instruction", DATA, least=0)
    instruction: str | None = option(None, "instruction of the task", ("predict",))
    example: tuple = option((), "positive example", ("predict",), nargs=2, action="append", metavar=("IN", "OUT"))
    task: str | None = option(None, "encoded task, in place of --instruction", ("predict",))
    save_task: str | None = option(None, "file for the encoded task", ("predict",))
    file: str | None = option(None, "inputs, one a line; -: standard input", ("predict",))
    inputs: tuple = option((), "inputs; without them and --file, standard input is read", ("predict",), nargs="*")
    steps: int = option(1000, "optimizer steps")
    batch_size: int = option(1024, "examples a step", most=10**6)
    learning_rate: float = option(1e-3, "of Adafactor, relative to the size of each parameter", least=0)
    warmup: int = option(0, "steps of linear warm-up", least=0)
    final_rate: float = option(1.0, "end of a cosine, as a part of the learning rate; 1: constant", least=0, most=1)
    dropout: float = option(0.1, "of T5 and of the generator's attention", least=0, most=0.99)
    max_instances: int = option(100, "instances of a task, or of a template of P3", DATA)
    max_instruction: int = option(1024, "longest instruction, tokens", ("finetune",), most=10**5)
    max_input: int = option(1024, "longest input, tokens; in pretraining a segment", least=8, most=10**5)
    max_target: int = option(256, "longest answer, tokens", ("finetune",), most=10**5)
    max_new_tokens: int | None = option(None, "longest answer, tokens; default: as in training", ANSWER, most=10**5)
    setting: str | None = option(None, "of P3: the input is the instance, or all", DATA, choices=["split", "joint"])
    objective: str = option("hint", "split of a segment (Table 4)", ("pretrain",), choices=list(OBJECTIVES))
    skip_bad_lines: bool = option(False, "leave out lines of a corpus without text, and count them", ("pretrain",))
    resume: bool = option(False, "go on with the run in --out")
    seed: int = option(0, "of weights, data order and dropout", (*TRAIN, "demo"), least=0, most=2**63 - 1)
    log_every: int = option(10, "steps between lines of log.jsonl")
    save_every: int = option(200, "steps between checkpoints")
    eval_every: int = option(0, "steps between evaluations; 0: only at the end", ("finetune",), least=0)
    bottleneck: int | None = option(None, "width of adapters, rank of LoRA; hint: 512", group=MODEL)
    prefix_length: int | None = option(None, "length of prefixes; hint: 30", group=MODEL)
    generator_dropout: float | None = option(None, "in the generating networks; hint: 0.1", group=MODEL, least=0)
    embedding_scale: float | None = option(None, "of column embeddings, in units of d^-0.5; 1", group=MODEL, least=0)
    generator: str | None = option(None, "writer of the modules", group=ABLATION, choices=CHOICES["generator"])
    modules: str | None = option(None, "generated modules", group=ABLATION, choices=CHOICES["modules"])
    fusion: bool | None = option(None, "decoder reads the instruction's states", group=ABLATION)
    hyperencoder: str | None = option(None, "reads the instruction", group=ABLATION, choices=CHOICES["hyperencoder"])
    trains: str | None = option(None, "weights that train", group=ABLATION, choices=CHOICES["trains"])
    microbatch: int = option(4096, "tokens at once, with padding and the generator's price", group=SPEED)
    group: int = option(1, "neighbours in the data that share a batch", ("finetune",), SPEED)
    precision: str | None = option("auto", "auto: bf16 on GPUs", TRAIN + ANSWER, SPEED, choices=PRECISIONS)
    gradient_checkpointing: bool = option(False, "recompute layers in the backward pass", group=SPEED)
    compile: bool = option(False, "compile the training pass; the first step takes minutes", group=SPEED)
    shard: bool = option(False, "spread weights over the processes of torchrun", group=SPEED)
    eval_batch_size: int = option(32, "inputs answered at once", ("finetune", *ANSWER), SPEED, most=10**5)
    tasks: tuple = ()  # names of the tasks of a table of task embeddings, in its order

    def __post_init__(self) -> None:
        check_fields(self, {item.name: item.metadata["bounds"] for item in fields(self) if "bounds" in item.metadata})
        for item in fields(self):
            choices = item.metadata.get("argparse", {}).get("choices")
            if choices and getattr(self, item.name) not in (None, *choices):
                raise ValueError(f"{item.name} {getattr(self, item.name)!r:.40} is not one of {', '.join(choices)}")
        if self.warmup > self.steps:
            raise ValueError(f"warmup {self.warmup} must not exceed steps {self.steps}")
        for name in REQUIRED.get(self.command, ["model"] * (self.command == "predict")):
            if not getattr(self, name):
                raise ValueError(f"{self.command} needs --{name}")
        if self.command in TRAIN and bool(self.start) == bool(self.size):
            raise ValueError("exactly one of --start and --size says where to start")
        if self.command in TRAIN and self.size and not self.tokenizer:
            raise ValueError("--size needs a --tokenizer")
        if self.command == "predict" and (self.instruction is None) == (self.task is None):
            raise ValueError("exactly one of --instruction and --task says what to do")
        if self.command in (*TRAIN, "demo"):
            self.hint_config()

    def hint_config(self) -> HINTConfig | None:
        """Make the HINTConfig of the system with the given changes; None for a plain T5. Raises ValueError."""
        preset = SYSTEMS[self.system].hypernetwork
        names = [item.name for item in fields(HINTConfig) if item.name != "tasks"]
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if preset is None and given:
            raise ValueError(f"{min(given)} is for systems with a hypernetwork, not for {self.system}")
        if preset is None:
            return None
        tasks = max(len(self.tasks), 1) if preset.get("hyperencoder") == "table" else 0  # known once the data is read
        config = HINTConfig(**{**preset, **given, "tasks": tasks})
        without = {"prefix_length": ("adapters", "lora", "none", "hyperformer", "hyperformer++")}
        for name, unused_by in {**without, "bottleneck": ("prefixes", "none")}.items():
            if name in given and {config.modules, config.generator} & set(unused_by):
                raise ValueError(f"{name} is not used by generator {config.generator} with modules {config.modules}")
        return config

    @classmethod
    def from_json(cls, config: dict) -> Settings | None:
        """Read the settings in a `config.json`; a public model has none. Raises ValueError."""
        if (run := config.get("run")) is None:
            return None
        known = {item.name: run[item.name] for item in fields(cls)[1:] if item.name in run}  # all but the command
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in known.items()})


REQUIRED = {"pretrain": ["corpus", "out"], "finetune": ["data", "out"], "evaluate": ["model", "data", "out"]}
AS_TRAINED = dict(system=None, examples=None, precision=None)
DEFAULTS: dict[str, dict] = {
    "pretrain": dict(steps=10_000, dropout=0.0, max_instruction=512, max_input=512, max_target=512),
    "finetune": {}, "evaluate": AS_TRAINED, "predict": AS_TRAINED,
    "demo": dict(
        size="toy", bottleneck=4, prefix_length=4, generator_dropout=0.0, embedding_scale=8.0, dropout=0.0,
        steps=1200, batch_size=64, group=2,  # two instances of each of 32 tasks
        learning_rate=0.03, warmup=100, final_rate=0.05,  # the paper's 1e-3 is for a pretrained model
        max_instruction=64, max_input=64, max_target=16, log_every=50, save_every=1000, eval_batch_size=64,
    ),
}  # fmt: skip
FIT_STEPS = 50  # of a new task's embedding
FILES = r"((config|metrics|tokenizer)\.json|(log|predictions)\.jsonl|(model|training-\d+)\.safetensors)(\.partial)?"
MAY_CHANGE = (  # when a run is resumed: its length, and settings that leave the gradient as it is
    "out", "resume", "steps", "microbatch", "gradient_checkpointing", "compile", "shard", "skip_bad_lines",
    "log_every", "save_every", "eval_every", "eval_batch_size",
)  # fmt: skip


# --------------------------------------------------------------------------------------------- training


def train(model: HINT, tokenizer: Tokenizer, source, settings: Settings, run: Run, evaluate=None) -> None:
    """Train for `settings.steps` steps, on from the checkpoint of the run; `source` hands out examples (section 3.3).

    The first signal lets the step end and be saved; a second one, or one in `evaluate() -> predictions`, stops at once.
    """
    device, precision = device_and_precision(settings.precision, keep_casts=not settings.shard)  # no whole bf16 copies
    price = price_in_tokens(model)
    if settings.compile:
        model.compile(dynamic=True)  # microbatches differ in all their lengths
    trained = spread(model, settings.shard, device)
    set_gradient_checkpointing(model, settings.gradient_checkpointing)
    optimizer = adafactor(model, settings.learning_rate)
    run.begin(tokenizer)
    run.restore(model, optimizer)
    began, stopped_by = time.perf_counter(), []
    steps = range(run.step + 1, settings.steps + 1)
    evaluated = range(settings.eval_every, settings.steps, settings.eval_every) if settings.eval_every else ()
    with progress_bar(steps, initial=run.step, total=settings.steps) as bar, signals(stopped_by):
        for step in bar:
            if evaluate and step - 1 in evaluated:  # after its checkpoint, and again after resuming there
                with signals():
                    overall = scores(evaluate())
                run.log(step=step - 1, **overall)
                tqdm.write(f"step {step - 1}: " + ", ".join(f"{name} {value:.1f}" for name, value in overall.items()))
            model.train()
            start = time.perf_counter()
            rate = learning_rate(step, settings)
            optimizer.param_groups[0]["lr"] = rate
            examples = source.take(settings.batch_size)
            loss = accumulate_gradient(trained, examples, settings.microbatch, price, precision)
            if not is_finite(loss, trained):
                where = not_finite_in(trained, examples, source.names, precision)
                raise InputError(f"loss or gradient of step {step} is not finite, in {where}; {run.kept()}")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.losses.append(loss)
            run.tokens += sum(len(ids) for example in examples for ids in example)
            run.seconds += time.perf_counter() - start
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            last = step == settings.steps
            if step % settings.log_every == 0 or last:
                means = {"loss": mean(run.losses), "tokens_per_second": run.tokens / run.seconds}
                run.log(step=step, **means, learning_rate=rate, seconds=round(time.perf_counter() - began, 1))
                run.losses, run.tokens, run.seconds = [], 0, 0.0
            stopping = [number for numbers in from_all(stopped_by) for number in numbers]  # all processes stop, or none
            if stopping or last or step % settings.save_every == 0 or step in evaluated:
                run.save(step, model, optimizer, source.position)
            if stopping:
                raise Stopped(stopping[0], f"stopped; {run.kept()}")


def accumulate_gradient(model: nn.Module, examples: list[Ids], microbatch: int, price: int, precision) -> float:
    """Accumulate the gradient of the mean loss of the *whole* batch, whatever the microbatch -> mean cross-entropy.

    Each process takes every world-th microbatch; without one, it runs a dummy of weight 0.
    """
    tokens = sum(len(example.target) for example in examples)
    total = 0.0  # becomes a tensor, and is read once at the end: a GPU need not wait between microbatches
    parts = microbatches(examples, microbatch, price)
    for first in range(0, len(parts), world()):
        mine = first + rank()
        counts = mine < len(parts)
        batch = collate(parts[mine if counts else first])  # on the CPU; the model moves ids where it needs them
        sums_later = isinstance(model, DistributedDataParallel) and first + world() < len(parts)
        with model.no_sync() if sums_later else nullcontext():
            with precision():
                out = model(*batch)
            share = counts * out.tokens / tokens
            (out.loss * share * world()).backward()  # processes take the mean of their gradients: make it the sum
        total = total + out.cross_entropy.detach() * share
    if world() > 1:
        dist.all_reduce(total)
    return total.item()


def adafactor(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Make the paper's Adafactor: steps relative to the RMS of each parameter (at least 1e-3), updates clipped to an
    RMS of 1, no momentum, no weight decay, second moments that decay with 1 - t^-0.8.

    The authors' first epsilon is 1e-30. PyTorch squares it, which underflows and makes NaN of unused embeddings. Its
    default, 1e-7, exceeds the squared gradients of a large model. PyTorch also keeps the rate below 1/sqrt(step).
    """
    kind = ShardedAdafactor if isinstance(model, FSDPModule) else torch.optim.Adafactor
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return kind(trained, lr=rate, beta2_decay=-0.8, eps=(1e-18, 1e-3), d=1.0, weight_decay=0.0)


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine down to `final_rate` of the peak; constant with the defaults, as in the paper."""
    if step <= settings.warmup:
        return settings.learning_rate * step / settings.warmup
    fall = 0.5 * (1 + math.cos(math.pi * (step - settings.warmup) / (settings.steps - settings.warmup)))
    return settings.learning_rate * (settings.final_rate + (1 - settings.final_rate) * fall)


def is_finite(loss: float, model: nn.Module) -> bool:
    """Check a loss, its gradient, and the squares of the gradient that Adafactor sums."""
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    return math.isfinite(loss + nn.utils.get_total_norm(gradients).item())


def not_finite_in(model: nn.Module, examples: Sequence[Ids], names: Sequence[str], precision: Callable) -> str:
    """Name the examples of a batch that are not finite alone, or all of them."""
    alone = []
    for example, name in zip(examples, names):
        model.zero_grad(set_to_none=True)
        if not is_finite(accumulate_gradient(model, [example], 1, 0, precision), model):
            alone.append(name)
    distinct = list(dict.fromkeys(alone or names))
    return ", ".join(distinct[:8]) + (f" and {len(distinct) - 8:,} more" if len(distinct) > 8 else "")


def device_and_precision(precision: str, keep_casts: bool = True) -> tuple[torch.device, Callable]:
    """Choose the GPU if there is one, and the context of forward passes: fp32, or bf16 over fp32 weights."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    has_bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16" and not has_bf16:
        raise InputError("--precision bf16: this GPU has no bf16; use fp32")
    if precision == "bf16" or (precision == "auto" and device.type == "cuda" and has_bf16):
        return device, lambda: torch.autocast(device.type, torch.bfloat16, cache_enabled=keep_casts)
    return device, nullcontext


def progress_bar(steps: Iterable, **about) -> tqdm:
    """Show progress, from the first process alone, and seldom where no terminal is looked at."""
    seen = sys.stderr is not None and sys.stderr.isatty()
    return tqdm(steps, mininterval=0.5 if seen else 10, disable=rank() > 0 or sys.stderr is None, **about)


# --------------------------------------------------------------------------------------------- the folder of a run


class Run:
    """The folder of a run. Weights and the training state of the same step make a checkpoint."""

    def __init__(self, settings: Settings) -> None:
        self.out, self.settings = Path(settings.out), replace(settings, resume=False)
        self.step = 0  # of the checkpoint
        self.position = None  # in the data
        self.losses, self.tokens, self.seconds = [], 0, 0.0  # since the last line of the log
        self.lock, first_checkpoint = None, settings.save_every
        weights = self.out / "model.safetensors"
        files = {path.name for path in self.out.iterdir()} if self.out.is_dir() else set()
        if self.out.is_file() or files - {"config.json.partial", "lock"}:
            if not settings.resume:
                raise InputError(f"{self.out}: holds something already; name another --out, or --resume that run")
            config = self.out / "config.json"
            before = read_json(config).get("run") if config.is_file() else None
            if not isinstance(before, dict):
                raise InputError(f"{self.out}: is not the folder of a run, which --resume could go on with")
            for name, value in json.loads(json.dumps(asdict(settings))).items():
                if name not in MAY_CHANGE and before.get(name, value) != value:
                    raise InputError(f"{config}: that run had {name} {before[name]!r:.80}, not {value!r:.80}")
            first_checkpoint = before.get("save_every", first_checkpoint)
            self._hold()  # from here on, no other run can outdate the step read below
        if weights.name in files:
            with reading(weights):
                self.step = int(read_metadata(weights)["step"])
            with reading(self.state()):
                about = read_metadata(self.state())
                self.position, self.losses = json.loads(about["position"]), json.loads(about["losses"])
        elif any(first_checkpoint < _step_of(line) < math.inf for line in self._log()):
            raise InputError(f"{weights}: is missing, though the log tells of its checkpoint; put it back")

    def _hold(self) -> None:
        if rank() == 0 and self.lock is None:
            self.lock = locked(self.out / "lock")

    def state(self) -> Path:
        """File of the training state that belongs to the weights."""
        return self.out / f"training-{self.step}.safetensors"

    def _log(self) -> list[str]:
        path = self.out / "log.jsonl"
        return path.read_text("utf-8", "replace").splitlines(keepends=True) if path.is_file() else []

    def begin(self, tokenizer: Tokenizer) -> None:
        """Make the folder, once all processes have read all that the run needs."""
        from_all("ready")
        if rank() > 0:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        self._hold()
        self._tidy()
        if lines := self._log():  # forget the lines after the checkpoint
            write(self.out / "log.jsonl", "".join(line for line in lines if _step_of(line) <= self.step))
        if self.step == 0:
            write(self.out / "config.json", json.dumps({"run": asdict(self.settings)}, indent=2) + "\n")
        write(self.out / "tokenizer.json", tokenizer.to_str())  # so that the folder answers without any other

    def _tidy(self) -> None:
        """Remove the run's half-written files, and training states of other steps than that of the weights."""
        for path in self.out.iterdir():
            is_old = path.name.startswith("training-") and path != self.state()
            if re.fullmatch(FILES, path.name) and (is_old or path.name.endswith(".partial")):
                path.unlink()

    def log(self, **entry) -> None:
        """Append a line to `log.jsonl`, on disk before the checkpoint that follows."""
        if rank() > 0:
            return
        with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def save(self, step: int, model: HINT, optimizer: torch.optim.Optimizer, position) -> None:
        """Write a checkpoint: the training state, then config and weights, which name the step of their state.

        Files are replaced atomically, so at any moment the folder holds a whole checkpoint. All processes must call.
        """
        trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
        gpu = {"gpu": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
        random_states = from_all({"cpu": torch.get_rng_state(), **gpu})
        weights = whole(model, "meta" if rank() else "cpu")
        self.step = step
        if rank() > 0:
            return
        state = {f"optimizer.{name}.{key}": x for name, weight in trained for key, x in optimizer.state[weight].items()}
        state |= {f"random.{place}.{key}": x for place, states in enumerate(random_states) for key, x in states.items()}
        about = {"position": json.dumps(position), "losses": json.dumps(self.losses)}
        write_safetensors(self.state(), state, about)
        weights.save_pretrained(self.out, notes={"run": asdict(self.settings)}, step=step)
        self._tidy()

    def restore(self, model: HINT, optimizer: torch.optim.Optimizer) -> None:
        """Set optimizer and random numbers to those of the checkpoint, whose weights the model has already."""
        if rank() > 0:
            torch.manual_seed(self.settings.seed + rank())  # for dropout; weights and data have been drawn
        if self.step == 0:
            return
        with reading(self.state()):
            saved = read_safetensors(self.state())
            for name, weight in model.named_parameters():
                if weight.requires_grad:
                    factors = {"row_var": (*weight.shape[:-1], 1), "col_var": (1, weight.shape[-1])}
                    shapes = {"step": (), **(factors if weight.ndim > 1 else {"variance": weight.shape})}
                    state = {key: saved[f"optimizer.{name}.{key}"] for key in shapes}
                    if state["step"] != self.step or any(state[key].shape != shape for key, shape in shapes.items()):
                        raise ValueError("its optimizer is that of another model or step")
                    step = state.pop("step").clone()  # stays on the CPU, and first, as in a run that never stopped
                    state = {key: x.to(weight.device, copy=True) for key, x in state.items()}
                    optimizer.state[weight] = {"step": step, **state}
            if f"random.{rank()}.cpu" in saved:
                torch.set_rng_state(saved[f"random.{rank()}.cpu"].clone())
            if f"random.{rank()}.gpu" in saved and torch.cuda.is_available():
                torch.cuda.set_rng_state(saved[f"random.{rank()}.gpu"].clone())

    def kept(self) -> str:
        """Say which checkpoint there is."""
        return f"{self.out} keeps the checkpoint of step {self.step}" if self.step else "there is no checkpoint yet"


def _step_of(line: str) -> float:
    """Step of a line of `log.jsonl`, half a step later for an evaluation, which is made again; infinite if damaged."""
    try:
        entry = json.loads(line if line.endswith("\n") else "")
        return int(entry["step"]) + 0.5 * ("loss" not in entry)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf


def locked(path: Path):
    """Hold a lock on a file until this process ends, however it ends. Raises InputError if another run holds it."""
    file = open(path, "w")
    with suppress(ImportError):  # Windows has no such locks
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{path.parent}: another run is writing here; name another --out") from None
    return file


def write(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


# --------------------------------------------------------------------------------------------- answering


class Answerer:
    """A model with its prompt format: tasks in, texts out. Each instruction is read once."""

    def __init__(self, model: HINT, prompts: PromptFormat, settings: Settings) -> None:
        self.model, self.prompts, self.settings = model, prompts, settings
        self.longest = settings.max_new_tokens or settings.max_target
        self.device, self.precision = device_and_precision(settings.precision)
        self.model.to(self.device)

    @torch.inference_mode()
    def encode(self, instruction_ids: list[int]) -> EncodedTask:
        """Read an instruction."""
        with self.precision():
            return self.model.eval().encode_instruction(torch.tensor([instruction_ids]))

    @torch.inference_mode()
    def answers(self, task: Task, encoded: EncodedTask | None = None) -> list[str]:
        """Answer each instance of a task; inputs of like length are answered together."""
        ids = self.prompts(task)
        encoded = encoded or self.encode(ids[0][0])
        answers, size = [""] * len(ids), self.settings.eval_batch_size
        for has_choices in (False, True):
            order = [place for place, instance in enumerate(task.instances) if bool(instance.choices) == has_choices]
            order.sort(key=lambda place: len(ids[place][1]))
            for places in (order[start : start + size] for start in range(0, len(order), size)):
                inputs = pad([ids[place][1] for place in places], PAD)
                with self.precision():
                    if has_choices:
                        texts = self.choose(encoded, inputs, [task.instances[place] for place in places])
                    else:
                        texts = self.model.eval().generate(encoded, inputs, max_new_tokens=self.longest)
                        texts = self.prompts.tokenizer.decode_batch(texts.tolist())
                for place, text in zip(places, texts):
                    answers[place] = text
        return answers

    def choose(self, encoded: EncodedTask, inputs: Tensor, instances: list[Instance]) -> list[str]:
        """Rank classification (section 5.2): answer by the most probable choice, the first of equal ones."""
        pairs = [(owner, choice) for owner, instance in enumerate(instances) for choice in instance.choices]
        owners = torch.tensor([owner for owner, _ in pairs], device=self.device)
        encodings = self.prompts.tokenizer.encode_batch([choice for _, choice in pairs])
        labels = pad([encoding.ids for encoding in encodings], NO_LABEL)
        ranks = dict(zip(pairs, self.model.eval().rank(encoded, inputs, labels, owners).tolist()))
        return [max(one.choices, key=lambda choice: ranks[owner, choice]) for owner, one in enumerate(instances)]

    def predictions(self, tasks: Sequence[Task]) -> list[dict]:
        """Answer all tasks: a row per instance with id, task, prediction, references. Processes share the tasks."""
        if isinstance(self.prompts, TaskNumberFormat):
            fit_new_tasks(self.model, tasks, self.prompts, self.precision)
        mine = [
            [
                {"id": instance.id, "task": task.name, "prediction": answer, "references": list(instance.references)}
                for instance, answer in zip(task.instances, self.answers(task))
            ]
            for task in progress_bar(tasks[rank() :: world()], desc="answering", leave=False)
        ]
        shares = from_all(mine)
        return [row for place in range(len(tasks)) for row in shares[place % world()][place // world()]]


def fit_new_tasks(model: HINT, tasks: Sequence[Task], prompts: TaskNumberFormat, precision: Callable) -> None:
    """Fit an embedding of each new task to its positive examples, from the mean of the trained embeddings, with all
    else frozen (Karimi Mahabadi et al., few-shot domain generalization).
    """
    new = prompts.number_new(tasks)
    if not new:
        return
    table = model.eval().hyperencoder
    table.fitted = table.weight.detach().mean(0).repeat(len(new), 1).requires_grad_()
    optimizer = torch.optim.Adam([table.fitted], lr=0.1)  # embeddings have a size of about 1
    parts = [collate(part) for part in microbatches(prompts.shots(new), 16384)]
    for _ in range(FIT_STEPS):
        table.fitted.grad = torch.zeros_like(table.fitted)
        for part in parts:
            with precision():
                out = model(*part)
            table.fitted.grad += torch.autograd.grad(out.cross_entropy * out.tokens, [table.fitted])[0]
        optimizer.step()
    table.fitted = table.fitted.detach()


# --------------------------------------------------------------------------------------------- commands


def demo(settings: Settings) -> None:
    """Train a tiny HINT on the toy world, score it on unseen tasks, and show what it says."""
    torch.set_num_threads(1)  # a second one gains a quarter in so small a model, and loses tenfold on a busy core
    free = chain(["runs/demo"], (f"runs/demo-{number}" for number in count(2)))
    settings = replace(settings, out=settings.out or next(name for name in free if not Path(name).exists()))
    run, world, tokenizer = Run(settings), toy_world(settings.seed), toy_tokenizer()
    print(f"A tiny HINT learns {len(world.train):,} toy tasks, such as")
    for task in world.train[:2]:
        print(f"  {task.definition}\n      {task.instances[0].input}  ->  {task.instances[0].references[0]}")
    model = initial_model(settings, tokenizer, run)
    prompts = prompt_format(settings, tokenizer)
    examples = encode_tasks(world.train, prompts, settings.max_target, settings.seed)
    train(model, tokenizer, Shuffled(examples, settings.seed, 0, settings.group, world.train), settings, run)
    answerer = Answerer(model, prompts, settings)
    rows, told = {}, []
    for name, tasks in (("arguments", world.unseen_arguments), ("compositions", world.unseen_compositions)):
        rows[f"unseen {name}"] = answerer.predictions(tasks)
        told += rows[f"unseen {name}"]
        untold = [replace(task, definition="") for task in tasks]
        rows[f"unseen {name}, no instruction"] = answerer.predictions(untold)
    report(told, rows, run.out)
    show_answers([*world.unseen_arguments, *world.unseen_compositions], told)
    print("\nTen seeds gave 96 to 100 on unseen compositions; a machine that rounds otherwise is like another seed.")
    task = world.unseen_compositions[0]
    words = ["--model", str(run.out), "--instruction", task.definition, task.instances[0].input]
    print(f"\nAll of it lies in {run.out}. Ask it yourself:\n  python train.py predict {shlex.join(words)}")


def pretrain(settings: Settings) -> None:
    """Pretrain on plain text: the hypernetwork reads the beginning, T5 the middle, and the end is the answer."""
    run = Run(settings)
    tokenizer = load_tokenizer(settings.tokenizer or settings.start or "")
    model = initial_model(settings, tokenizer, run)
    position, skip = run.position or (0, 0), settings.skip_bad_lines
    shape = settings.max_input, settings.seed
    source = PretrainingChunks(settings.corpus, tokenizer, *shape, position, skip, settings.objective)
    train(model, tokenizer, source, settings, run)
    if source.skipped:
        print(f"bad lines skipped: {source.skipped:,}; the first: {source.first_skipped}", file=sys.stderr)
    print(f"The pretrained model lies in {run.out}. Next: python train.py finetune --start {run.out} ...")


def finetune(settings: Settings) -> None:
    """Train on the `train` split of Super-NaturalInstructions or the like, then score on its `test` split."""
    joint = settings.setting == "joint"
    tasks = {name: load_tasks(settings.data, name, settings.max_instances, joint=joint) for name in ("train", "test")}
    has_numbers = SYSTEMS[settings.system].prompts is TaskNumberFormat
    if has_numbers:
        settings = replace(settings, tasks=tuple(dict.fromkeys(task.name for task in tasks["train"])))
    run = Run(settings)
    tokenizer = load_tokenizer(settings.tokenizer or settings.start or "")
    model = initial_model(settings, tokenizer, run)
    prompts = prompt_format(settings, tokenizer)
    if has_numbers:
        prompts.number_new(tasks["test"])  # refuse now what could not be scored in the end
    examples = encode_tasks(tasks["train"], prompts, settings.max_target, settings.seed)
    source = Shuffled(examples, settings.seed, run.position or 0, settings.group, tasks["train"])

    def predictions() -> list[dict]:
        return Answerer(whole(model), prompts, settings).predictions(tasks["test"])

    train(model, tokenizer, source, settings, run, predictions)
    rows = predictions()
    if rank() == 0:
        report(rows, groups_of(rows, tasks["test"]), run.out)
    print(f"\nModel, log, scores and predictions lie in {run.out}. Next: python train.py predict --model {run.out} ...")


def evaluate(settings: Settings) -> None:
    """Score a model on a split: a folder of this project, or a public T5 such as Tk-Instruct."""
    out = Path(settings.out)
    files = {path.name.removesuffix(".partial") for path in out.iterdir()} if out.is_dir() else set()
    if out.is_file() or not files <= {"config.json", "metrics.json", "predictions.jsonl"}:
        raise InputError(f"{out}: holds something else than an evaluation; name another --out")
    answerer = answerer_of(settings)
    settings = answerer.settings
    tasks = load_tasks(settings.data, settings.split, settings.max_instances, joint=settings.setting == "joint")
    out.mkdir(parents=True, exist_ok=True)
    rows = answerer.predictions(tasks)
    if rank() == 0:
        write(out / "config.json", json.dumps({"run": asdict(settings)}, indent=2) + "\n")
        report(rows, groups_of(rows, tasks), out)
    print(f"\nScores and predictions lie in {out}.")


def predict(settings: Settings) -> None:
    """Answer inputs given as arguments, in a file or on standard input, one a line."""
    answerer = answerer_of(settings)
    if isinstance(answerer.prompts, TaskNumberFormat):
        raise InputError(f"{settings.model}: knows tasks by number and reads no instruction; use evaluate")
    examples = tuple(Example(valid(source), valid(target)) for source, target in settings.example)
    answerer.prompts.examples = max(answerer.prompts.examples, len(examples))
    task = Task("predict", valid(settings.instruction or ""), examples, (Instance("", "", ()),))
    model, ids = answerer.model, answerer.prompts(task)[0][0]
    encoded = model.load_task(settings.task) if settings.task else answerer.encode(ids)
    if settings.save_task:
        model.save_task(encoded, settings.save_task)
    file = settings.file or (None if settings.inputs or settings.save_task else "-")
    lines = chain(settings.inputs, read_lines(file) if file else ())
    with open(settings.out, "x", encoding="utf-8") if settings.out else nullcontext(sys.stdout) as out:
        while texts := list(islice(lines, settings.eval_batch_size)):
            instances = tuple(Instance(str(number), valid(text), ()) for number, text in enumerate(texts))
            for answer in answerer.answers(replace(task, instances=instances), encoded):
                print(answer, file=out, flush=True)


def prompt_format(settings: Settings, tokenizer: Tokenizer) -> PromptFormat:
    """Make the prompt format of a system, with the examples, lengths and training tasks of a run."""
    prompts = SYSTEMS[settings.system].prompts
    return prompts(tokenizer, settings.examples, settings.max_instruction, settings.max_input, settings.tasks)


def initial_model(settings: Settings, tokenizer: Tokenizer, run: Run) -> HINT:
    """Load the model that a run starts from: its checkpoint, a folder or public name, or fresh weights of a size."""
    torch.manual_seed(settings.seed)
    start = run.out if run.step else settings.start
    rows = max(tokenizer.get_vocab().values()) + 1
    model = load_model(start) if start else PlainT5(T5(replace(SIZES[settings.size], vocab_size=rows)))
    model = with_hypernetwork(model, settings, start)
    check_vocabulary(tokenizer, model, settings.tokenizer or start)
    for name, module in model.named_modules():  # the generating networks have a rate of their own
        if isinstance(module, nn.Dropout):
            module.p = model.config.generator_dropout if name.startswith("hypernetwork.networks") else settings.dropout
    return model


def with_hypernetwork(model: HINT, settings: Settings, start: object) -> HINT:
    """Give a T5 the hypernetwork of `--system`; one that is there already keeps its sizes and must be of that kind."""
    wanted = settings.hint_config()
    if isinstance(model, PlainT5):
        return model if wanted is None else HINT(model.t5, wanted)
    if wanted is None:
        raise InputError(f"{start}: is a HINT model, which cannot become --system {settings.system}")
    before = None if settings.command == "demo" else read_config(start, Settings.from_json)
    if settings.tasks and before.tasks != settings.tasks:
        raise InputError(f"{start}: has embeddings of other tasks")
    kept = [name for name in ("bottleneck", "prefix_length", "embedding_scale") if getattr(settings, name) is None]
    for name, value in asdict(wanted).items():
        if name not in (*kept, "generator_dropout") and getattr(model.config, name) != value:
            raise InputError(f"{start}: has a hypernetwork whose {name} is {getattr(model.config, name)}, not {value}")
    if settings.generator_dropout is not None:
        model.config = replace(model.config, generator_dropout=settings.generator_dropout)
    return model


def check_vocabulary(tokenizer: Tokenizer, model: HINT, source: object) -> None:
    """Refuse a tokenizer with ids that the model has no embedding for."""
    tokens, rows = max(tokenizer.get_vocab().values()) + 1, model.t5.config.vocab_size
    if tokens > rows:
        raise InputError(f"{source}: its tokenizer has {tokens:,} tokens, the model only {rows:,}")


def answerer_of(settings: Settings) -> Answerer:
    """Load a model, with the settings that it was trained with where they are known and not given again."""
    model = load_model(settings.model)
    trained = read_config(settings.model, Settings.from_json)
    is_plain = isinstance(model, PlainT5)
    system = (trained and trained.system) or settings.system or ("tk-instruct" if is_plain else "hint")
    if settings.system not in (None, system) or (SYSTEMS[system].hypernetwork is None) != is_plain:
        raise InputError(f"--system {settings.system or system}: {settings.model} is another system's model")
    names = [item.name for item in fields(Settings) if settings.command in item.metadata.get("commands", ())]
    given = {name: getattr(settings, name) for name in names if getattr(settings, name) is not None}
    settings = replace(trained or Settings(), **{**given, "command": settings.command, "system": system})
    numbers = max(len(settings.tasks), 1) if SYSTEMS[system].prompts is TaskNumberFormat else 0
    if numbers != (0 if is_plain else model.config.tasks):
        raise InputError(f"{settings.model}: does not name the tasks of its embeddings")
    tokenizer = load_tokenizer(given.get("tokenizer") or settings.model)
    check_vocabulary(tokenizer, model, given.get("tokenizer") or settings.model)
    return Answerer(model, prompt_format(settings, tokenizer), settings)


# --------------------------------------------------------------------------------------------- several processes


@contextmanager
def processes() -> Iterator[None]:
    """Run the body in every process that torchrun started, of which the first alone prints."""
    if not dist.is_torchelastic_launched():
        yield
        return
    gpus, place = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
    if gpus and place >= gpus:
        fail(f"a process needs a GPU of its own; --nproc-per-node can be at most {gpus}")
    if gpus:
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if gpus else "gloo", timeout=timedelta(hours=1))
    with redirect_stdout(open(os.devnull, "w") if rank() else sys.stdout):
        yield
    dist.destroy_process_group()


def rank() -> int:
    """Number of this process; the first, 0, is the one that writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def from_all(value) -> list:
    """Gather the values of all processes, in order, in each of them."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def fail(sentence: str, status: int = 1) -> None:
    """End the program with a sentence, which the first process to fail says: most errors meet all of them."""
    if dist.is_torchelastic_launched():
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        sentence = sentence if store.add("train.py has failed", 1) == 1 else ""
    if sentence:
        print(f"train.py: {sentence}", file=sys.stderr)
    sys.exit(status)


def spread(model: HINT, shard: bool, device: torch.device) -> nn.Module:
    """Give every process a copy of the model, or (`shard`) a part of each of its weights."""
    if not dist.is_initialized():
        if shard:
            raise InputError("--shard: spreads a model over the processes of torchrun, and this is the only one")
        return model.to(device)
    if not shard:
        return DistributedDataParallel(model.to(device))
    if device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise InputError(f"--shard: on a CPU needs a newer torch than {torch.__version__}, such as 2.13")
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing writes into what is returned
    for part in (*model.t5.encoder.blocks, *model.t5.decoder.blocks, model.hypernetwork):
        if part is not None:
            fully_shard(part)
    return fully_shard(model)


def whole(model: HINT, device: torch.device | str | None = None) -> HINT:
    """Return the model, or an unsharded copy if its weights are sharded. All processes must call it."""
    if not isinstance(model, FSDPModule):
        return model
    weights = {name: part.full_tensor().detach().to(device) for name, part in model.named_parameters()}
    copy = on_meta(model.t5.config, model.config)
    copy.load_state_dict(weights, assign=True)
    return copy


class ShardedAdafactor(torch.optim.Adafactor):
    """Adafactor for sharded weights, at which PyTorch's own stops: its statistics are those of whole matrices.

    So each matrix in turn is gathered in all processes, takes its step, and is sharded again. The state is unsharded.
    """

    @torch.no_grad()
    def step(self) -> None:
        """Take a step with the present gradients."""
        for group in self.param_groups:
            for part in group["params"]:
                matrix = part.full_tensor()
                matrix.grad = part.grad.full_tensor()
                alone = torch.optim.Adafactor([{**group, "params": [matrix]}])
                alone.state[matrix] = self.state[part]
                alone.step()
                matrix = DTensor.from_local(matrix, part.device_mesh, [Replicate()], run_check=False)
                part.copy_(matrix.redistribute(placements=part.placements))


# --------------------------------------------------------------------------------------------- command line


class Stopped(KeyboardInterrupt):
    """A signal ended a command; the arguments are its number (of SIGINT, Ctrl-C, or SIGTERM) and a sentence."""


@contextmanager
def signals(noted: list[int] | None = None) -> Iterator[None]:
    """Let SIGINT and SIGTERM raise Stopped; with a list, the first signal is only added to it."""

    def handle(number: int, frame: object) -> None:
        if noted is None or noted:
            raise Stopped(number, "stopped")
        noted.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Parser(argparse.ArgumentParser):
    """Answer a wrong command line with one sentence, not a page of usage."""

    def error(self, message: str) -> None:
        fail(f"{message} (see {self.prog} --help)", status=2)


def parser() -> Parser:
    """Make the command line: every option is a field of `Settings`."""
    shape = partial(argparse.HelpFormatter, max_help_position=30, width=110)
    top = Parser(prog="train.py", description=__doc__.partition("\n")[0])
    commands = top.add_subparsers(title="commands", dest="command", required=True, parser_class=Parser)
    types = {"int": (int, "N"), "float": (float, "X"), "str": (str, "NAME")}
    for name, function in COMMANDS.items():
        about = dict(help=function.__doc__, description=function.__doc__, allow_abbrev=False, formatter_class=shape)
        command = commands.add_parser(name, **about)
        options = [item for item in fields(Settings) if name in item.metadata.get("commands", ())]
        titles = dict.fromkeys(item.metadata["group"] for item in options)
        groups = {title: command.add_argument_group(title) for title in titles}
        for item in options:
            default = DEFAULTS[name].get(item.name, item.default)
            text, more = item.metadata["help"], dict(item.metadata["argparse"])
            text += "" if default in (None, False, ()) else f" (default: {default})"
            kind = item.type.partition(" | ")[0]
            if kind == "bool":
                more["action"] = "store_true" if default is False else argparse.BooleanOptionalAction
            elif kind in types:
                more |= {"type": types[kind][0]} | ({} if "choices" in more else {"metavar": types[kind][1]})
            words = item.name if item.name == "inputs" else "--" + item.name.replace("_", "-")
            groups[item.metadata["group"]].add_argument(words, help=text, default=argparse.SUPPRESS, **more)
    return top


def settings_of(words: Sequence[str]) -> Settings:
    """Read a command line; a wrong one ends the program with status 2."""
    top = parser()
    given = vars(top.parse_args(words or ["demo"]))
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    command = given["command"]
    if command == "pretrain" and "xxl" in f"{given.get('size')} {given.get('start')}":
        given.setdefault("steps", 7000)  # as in the paper, for 11 billion parameters
    try:
        return Settings(**{**DEFAULTS[command], **given})
    except ValueError as error:
        top.error(str(error))


COMMANDS = {function.__name__: function for function in (demo, pretrain, finetune, evaluate, predict)}


@processes()
def main(words: Sequence[str] | None = None) -> None:
    """Run one command; a mistake ends in a sentence and status 1 (wrong options: 2; a signal: 130 or 143)."""
    settings = settings_of(sys.argv[1:] if words is None else words)
    try:
        if world() > 1 and settings.command in ("demo", "predict"):
            raise InputError(f"{settings.command}: is for one process; start it without torchrun")
        with signals():
            COMMANDS[settings.command](settings)
    except InputError as error:
        fail(str(error))
    except BrokenPipeError:  # the reader of the answers has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        fail(f"{error.filename or settings.out or 'a file'}: {error.strerror or error}")
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        fail("the memory is full; take a smaller --microbatch (or --eval-batch-size, in answering)")
    except Stopped as stop:
        number, sentence = stop.args
        fail(sentence + ", and the same command with --resume goes on" * (settings.command in TRAIN), 128 + number)


if __name__ == "__main__":
    main()
