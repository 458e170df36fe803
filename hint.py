"""HINT (Ivison et al., ACL 2023): read a task's instruction once, then answer every input without it.

    instruction --> T5 encoder, plain --> states --> ColumnGenerator --> adapters and prefixes
                                            |                                    |
          input --> T5 encoder with them ---+--> [instruction states ; input states] --> T5 decoder with them --> answer

Axes: B examples, U distinct instructions, Li instruction tokens, S input tokens, T target tokens, d model.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import asdict, fields
from itertools import groupby
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hypernet import GENERATORS, HYPERENCODERS, HINTConfig
from t5 import (
    T5, Adapter, InputError, Loss, Modules, Source, T5Config, fill, map_tensors, read_config, read_metadata,
    read_safetensors, read_weights, reading, save_folder, select_rows, write_safetensors,
)  # fmt: skip


class EncodedTask(NamedTuple):
    """All that is kept of an instruction. One task (B = 1) serves any number of inputs; B tasks serve B inputs."""

    modules: Modules | None  # the generated weights
    states: Tensor  # the encoded instruction [B, Li, d] for instruction fusion; without fusion, Li = 0
    attention_mask: Tensor  # [B, Li]


class HINT(nn.Module):
    """The paper's model: T5, whose encoder is also the hyperencoder, and the generator of its modules.

    Ids are padded with 0, labels with -100. Without an attention mask, id 0 is padding.
    """

    def __init__(self, t5: T5, config: HINTConfig) -> None:
        super().__init__()
        self.config = config
        self.t5 = t5
        self.hyperencoder = HYPERENCODERS[config.hyperencoder](t5, config)  # None: T5's own encoder
        self.hypernetwork = GENERATORS[config.generator](t5, config)  # None: no modules
        for name, parameter in self.named_parameters():
            is_trained_norm = "norm" in name and config.trains == "hypernetwork+norms"
            parameter.requires_grad_(config.trains == "all" or is_trained_norm or not name.startswith("t5."))

    def encode_instruction(self, instruction_ids: Tensor, attention_mask: Tensor | None = None) -> EncodedTask:
        """Read instructions [B, Li] once, by hyperencoder and generator (section 3.1).

        The hyperencoder is T5's own encoder with no modules inserted. Unlike in the authors' code, padding is masked.
        """
        states, mask = (self.hyperencoder or self.t5.read)(instruction_ids, attention_mask)
        modules = self.hypernetwork and self.hypernetwork(states, mask)
        if not self.config.fusion:
            states, mask = states.new_zeros(len(states), 0, self.t5.config.d_model), mask[:, :0]
        return EncodedTask(modules, states, mask)

    def fuse(self, task: EncodedTask, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[Source]:
        """Instruction fusion: the decoder reads the states of the instruction and of the input (section 3.1).

        The paper concatenates them. Here the states of one task stay a batch of 1 that all inputs [B, S] share.
        """
        source = self.t5.read(input_ids, attention_mask, task.modules)
        return [Source(task.states, task.attention_mask), source] if task.states.shape[1] else [source]

    def forward(self, instruction_ids: Tensor, input_ids: Tensor, labels: Tensor) -> Loss:
        """Instructions [B, Li], inputs [B, S] and labels [B, T] of a mixed-task batch -> its loss (section 3.3).

        Each distinct instruction is encoded once; the paper encodes it for each example. Without dropout the gradient
        is the same. Tasks with equally many examples share one product of adapters. Ids may stay on the CPU.
        """
        distinct, task_of, counts = torch.unique(instruction_ids, dim=0, return_inverse=True, return_counts=True)
        task = self.encode_instruction(distinct)  # distinct [U, Li], task_of [B], counts [U]
        if len(distinct) > 1:
            order = task_of.argsort()  # examples of a task side by side
            input_ids, labels, rows = input_ids[order], labels[order], task_of[order].to(task.states.device)
            runs = [(len(list(run)), size) for size, run in groupby(counts.tolist())]  # tasks of `size` examples each
            tasks, examples = [n for n, _ in runs], [n * size for n, size in runs]
            split = lambda adapter: [Adapter(*part) for part in zip(*(weight.split(tasks) for weight in adapter))]
            mixed = lambda adapters: lambda u: torch.cat([f(x) for f, x in zip(adapters, u.split(examples))])
            serve = lambda part: mixed(split(part)) if isinstance(part, Adapter) else part.index_select(0, rows)
            task = map_tensors(serve, task, Tensor | Adapter)  # U tasks -> B examples; no adapter is copied
        return self.t5.loss(labels, self.fuse(task, input_ids), task.modules)

    @torch.no_grad()
    def generate(
        self, task: EncodedTask, input_ids: Tensor, attention_mask: Tensor | None = None, max_new_tokens: int = 128
    ) -> Tensor:
        """Answer inputs [B, S] of an encoded task greedily: [B, <= max_new_tokens], `</s>`, then padding at the end.

        The authors decode by a beam search of one beam, which can also end on an `</s>` that ranks second.
        """
        sources = self.fuse(task, input_ids, attention_mask)
        return self.t5.decode_greedily(sources, task.modules, max_new_tokens)

    @torch.no_grad()
    def rank(self, task: EncodedTask, input_ids: Tensor, labels: Tensor, owners: Tensor) -> Tensor:
        """Log-probabilities [N] of answers `labels` [N, T]; `labels[n]` is scored as the answer to input `owners[n]`.

        Rank classification (section 5.2): an input [B, S] with many choices is encoded once.
        """
        sources, modules = select_rows((self.fuse(task, input_ids), task.modules), owners)
        return self.t5.log_probabilities(labels, sources, modules)

    def save_task(self, task: EncodedTask, path: str | os.PathLike) -> None:
        """Write a task as safetensors; with this model, its instruction is never needed again."""
        write_safetensors(Path(path), dict(named_tensors(task)), {"model": self.fingerprint()})

    def load_task(self, path: str | os.PathLike) -> EncodedTask:
        """Read a task that this model encoded, in fp32. Raises InputError."""
        tensors = read_safetensors(Path(path))
        with reading(path):
            if read_metadata(Path(path)).get("model") != self.fingerprint():
                raise ValueError("another model encoded this task")
            batch, length = tensors["attention_mask"].shape
            ids = torch.ones(batch, max(length, 1), dtype=torch.long)
            blank = on_meta(self.t5.config, self.config).encode_instruction(ids)  # the shape of every tensor
            shapes = {name: tensor.shape for name, tensor in named_tensors(blank)}
            if shapes != {name: tensor.shape for name, tensor in tensors.items()}:
                raise ValueError("its tensors are not those of an encoded task")
        saved = (tensors[name] for name, _ in named_tensors(blank))
        return map_tensors(lambda blank: next(saved).to(self.t5.shared.weight.device, blank.dtype, copy=True), blank)

    def fingerprint(self) -> str:
        """Tell models apart: a checksum of the first numbers of every parameter."""
        check = 0
        for parameter in self.parameters():
            check = zlib.crc32(parameter.detach().flatten()[:256].float().cpu().numpy().tobytes(), check)
        return f"{check:08x}"

    @classmethod
    def from_t5(cls, name_or_dir: str | os.PathLike, config: HINTConfig | None = None) -> HINT:
        """Put a new hypernetwork on a public T5, in eval mode. Raises InputError."""
        return cls(T5.from_pretrained(name_or_dir), config or HINTConfig()).eval()

    def save_pretrained(self, folder: str | os.PathLike, notes: dict | None = None, step: int = 0) -> None:
        """Write `config.json` (with `notes` added) and `model.safetensors`."""
        config = {"model_type": "hint", **asdict(self.config), "t5": asdict(self.t5.config), **(notes or {})}
        save_folder(folder, config, dict(self.named_parameters()), step)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> HINT:
        """Read a saved model, in eval mode. Raises InputError."""
        model = on_meta(*read_config(folder, _configs))
        fill(model, read_weights(folder), str, source=folder)
        return model.eval()


def _configs(config: dict) -> tuple[T5Config, HINTConfig]:
    if config.get("model_type") != "hint":
        raise ValueError("is not of a HINT model: its model_type is not hint")
    known = {field.name: config[field.name] for field in fields(HINTConfig) if field.name in config}
    return T5Config.from_json(config["t5"]), HINTConfig(**known)


def on_meta(t5: T5Config, config: HINTConfig | None) -> HINT:
    """Make a model without memory or values on the meta device; without a HINTConfig, a plain T5."""
    with torch.device("meta"):
        model = T5(t5)
        return PlainT5(model) if config is None else HINT(model, config)


def named_tensors(tree, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """List the tensors of nested tuples, named by fields and places: `modules.encoder.0.adapter.down`."""
    if isinstance(tree, Tensor):
        yield prefix, tree
    elif tree is not None:
        for name, branch in tree._asdict().items() if hasattr(tree, "_fields") else enumerate(tree):
            yield from named_tensors(branch, f"{prefix}.{name}" if prefix else str(name))


class PlainT5(HINT):
    """HINT without a hypernetwork: a T5 that is told everything with the input (Tk-Instruct), or nothing at all."""

    def __init__(self, t5: T5) -> None:
        nn.Module.__init__(self)
        self.t5, self.config, self.hypernetwork = t5, None, None

    def encode_instruction(self, instruction_ids: Tensor, attention_mask: Tensor | None = None) -> EncodedTask:
        """Return a task without modules and states; the instruction is not read."""
        states = self.t5.shared.weight.new_zeros(1, 0, self.t5.config.d_model)
        return EncodedTask(None, states, states[..., 0].long())

    def forward(self, instruction_ids: Tensor, input_ids: Tensor, labels: Tensor) -> Loss:
        """Inputs [B, S] and labels [B, T] -> loss."""
        return self.t5.loss(labels, [self.t5.read(input_ids)])

    def save_pretrained(self, folder: str | os.PathLike, notes: dict | None = None, step: int = 0) -> None:
        """Write a folder that this project and transformers read as a T5."""
        self.t5.save_pretrained(folder, notes, step)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> PlainT5:
        """Read a T5, in eval mode. Raises InputError."""
        return cls(T5.from_pretrained(folder)).eval()


def load_model(name_or_dir: str | os.PathLike) -> HINT:
    """Read a saved HINT, or any T5, as its `config.json` says. Raises InputError."""
    config = read_config(name_or_dir, dict)
    if "run" in config and "model_type" not in config:
        raise InputError(f"{name_or_dir}: holds an evaluation, or a run that has not saved a model yet")
    return (HINT if config.get("model_type") == "hint" else PlainT5).from_pretrained(name_or_dir)


# ------------------------------------------------------- costs: section 3.3 and appendix C
#
# The paper's symbols: n inputs of one task, of i tokens each; t tokens of instruction; o tokens of each answer;
# N parameters of T5; H FLOPs of the generator for one instruction; p numbers generated for it. A token costs N FLOPs:
# 2 per parameter times N/2 parameters (one stack). That leaves out attention between tokens.


def tk_instruct_flops(n: int, i: int, t: int, o: int, N: int) -> int:
    """Appendix C.1: the instruction is read with every input. With t = 0, No-Instruct. Section 3.3 also drops o."""
    return n * N * (t + i + o)


def hint_flops(n: int, i: int, t: int, o: int, N: int, H: int = 0, p: int = 0) -> int:
    """Appendix C.1; with H = p = 0 its short form, which section 3.3 has without o.

    The short form drops p, 4 % of N at XL, and H as small beside N t, which it is not.
    """
    return N * t + H + n * (N + p) * (i + o)


def decoder_only_flops(n: int, i: int, t: int, o: int, N: int) -> int:
    """A decoder that caches the instruction (section 5.1); each token passes all N (appendix D)."""
    return 2 * N * (t + n * (i + o))


def decoder_cache_numbers(L: int, h: int, k: int, s: int) -> int:
    """Appendix C.2: keys and values of s tokens in L layers. Section 5.1 takes h k for d."""
    return 2 * L * h * k * s


def hint_cache_numbers(L: int, h: int, k: int, d: int, s: int, bottleneck: int = 512, prefix_length: int = 30) -> int:
    """Appendix C.2: states of s tokens, and an adapter and a prefix in each of L layers.

    It ignores biases and the second prefix of decoder layers, and does not say whether L counts both stacks.
    """
    return d * s + 2 * bottleneck * L * d + 2 * prefix_length * L * h * k


def count_flops(work: Callable[[], object]) -> int:
    """Count the FLOPs of all matrix products in `work()` with torch's own counter, which knows no fused attention."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def exact_flops(model: HINT, n: int, i: int, t: int, o: int) -> tuple[int, int]:
    """Count the FLOPs of this code, on a model on the meta device -> for one instruction, for n answers.

    Answers are counted in one pass over all o tokens; a loop with a cache saves the masked half of their o x o scores.
    """
    instruction, inputs, answers = (torch.ones(*shape, dtype=torch.long) for shape in ((1, t), (n, i), (n, o)))
    task = model.eval().requires_grad_(False).encode_instruction(instruction)
    return count_flops(lambda: model.encode_instruction(instruction)), count_flops(
        lambda: model.t5.logits(model.t5.decode(answers, model.fuse(task, inputs), task.modules))
    )


def generator_flops(model: HINT, t: int) -> int:
    """Count H: the FLOPs of the generator for one instruction of t tokens, on a model on the meta device."""
    if model.hypernetwork is None:
        return 0
    model.eval().requires_grad_(False)
    source = (model.hyperencoder or model.t5.read)(torch.ones(1, t, dtype=torch.long))
    return count_flops(lambda: model.hypernetwork(*source))


def price_in_tokens(model: HINT, t: int = 64) -> int:
    """Express the generator's work for one instruction of t tokens in tokens of N FLOPs each: H / N."""
    N = sum(parameter.numel() for parameter in model.t5.parameters())
    return round(generator_flops(on_meta(model.t5.config, model.config), t) / N)
