"""HINT (Ivison et al., ACL 2023): read a task's instruction once, then answer every input without it.

    instruction --> T5 encoder, plain --> states --> ColumnGenerator --> adapters and prefixes
                                            |                                    |
          input --> T5 encoder with them ---+--> [instruction states ; input states] --> T5 decoder with them --> answer

What the paper compares it with are other values of `HINTConfig`, or a `PlainT5`.

Axes: B examples, U distinct instructions, Li instruction tokens, S input tokens, T target tokens, d model.
"""

from __future__ import annotations

import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor, nn

from hypernet import GENERATORS, HYPERENCODERS, HINTConfig
from t5 import (
    T5,
    Adapter,
    CheckpointError,
    KeyValue,
    LayerModules,
    LoRA,
    Loss,
    Modules,
    SerialAdapter,
    Source,
    T5Config,
    check_sizes,
    fill,
    map_tensors,
    padding_mask,
    read_config,
    read_pickle,
    read_weights,
    replacing,
    save_folder,
)  # fmt: skip


class EncodedTask(NamedTuple):
    """All that is kept of an instruction. One task (B = 1) serves any number of inputs; B tasks serve B inputs."""

    modules: Modules  # the generated weights
    states: Tensor  # the encoded instruction [B, Li, d], for instruction fusion
    attention_mask: Tensor  # [B, Li]

    def rows(self, index: Tensor) -> EncodedTask:
        """The tasks at `index` [B], where one task may stand several times."""
        return map_tensors(lambda tensor: tensor.index_select(0, index), self)

    def to(self, device: torch.device | str) -> EncodedTask:
        """The task on a device."""
        return map_tensors(lambda tensor: tensor.to(device), self)

    def save(self, path: str | os.PathLike) -> None:
        """Keep the task; with the model that encoded it, its instruction is never needed again."""
        with replacing(Path(path)) as file:
            torch.save(map_tensors(torch.Tensor.detach, self), file)

    @classmethod
    def load(cls, path: str | os.PathLike) -> EncodedTask:
        """Read a kept task, to the CPU. Nothing in the file is executed. Raises CheckpointError."""
        with torch.serialization.safe_globals([EncodedTask, Modules, LayerModules, *_SHAPES]):
            task = read_pickle(path)
        tensors: list[Tensor] = []
        try:
            _check_shapes(task)
            map_tensors(tensors.append, task)
        except (AttributeError, TypeError, ValueError, IndexError):  # of a part that is not what stands in its place
            raise CheckpointError(f"{path}: is not an encoded task") from None
        check_sizes(path, tensors)
        return map_tensors(torch.clone, task)  # the file may change


_SHAPES = {  # of what a layer may be given, in the axes of t5.py; a letter means the same size in all tensors of a part
    Adapter: ("Bdr", "B1r", "Brd", "B1d"),
    KeyValue: ("BhPk", "BhPk"),
    LoRA: ("Bdr", "BrI", "Bdr", "BrI"),
    SerialAdapter: ("Bdr", "B1r", "Brd", "B1d", "B1d", "B1d"),
}


def _check_shapes(task: EncodedTask) -> None:
    """The shapes of what a file holds must be those of one task. Raises whatever a wrong part leads to."""
    batch, length, d_model = task.states.shape
    if not isinstance(task, EncodedTask) or task.attention_mask.shape != (batch, length):
        raise ValueError("no task")
    kinds = get_type_hints(LayerModules)
    for layer in (*task.modules.encoder, *task.modules.decoder):
        for part, kind in zip(layer, kinds.values(), strict=True):
            if part is None:
                continue
            if type(part) not in get_args(kind):
                raise ValueError("a part in the place of another")
            sizes = {"B": batch, "d": d_model, "1": 1}
            for tensor, axes in zip(part, _SHAPES[type(part)], strict=True):
                if any(sizes.setdefault(axis, size) != size for axis, size in zip(axes, tensor.shape, strict=True)):
                    raise ValueError("parts that do not fit together")


class HINT(nn.Module):
    """The paper's model: T5, whose encoder is also the hyperencoder, and the generator of its modules.

    Ids are padded with 0, labels with -100. Where no attention mask is given, id 0 is padding.
    """

    def __init__(self, t5: T5, config: HINTConfig) -> None:
        super().__init__()
        self.config = config
        self.t5 = t5
        hyperencoder = HYPERENCODERS[config.hyperencoder]
        self.hyperencoder = hyperencoder and hyperencoder(t5, config)
        self.hypernetwork = GENERATORS[config.generator](t5, config)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(self._trains(name))

    def _trains(self, name: str) -> bool:
        """Whether a parameter trains, by its name: in HINT all of them do."""
        is_norm = "norm" in name and self.config.trains == "hypernetwork+norms"
        return self.config.trains == "all" or is_norm or not name.startswith("t5.")

    def encode_instruction(self, instruction_ids: Tensor, attention_mask: Tensor | None = None) -> EncodedTask:
        """Read instructions [B, Li], once: hyperencoder and generator (section 3.1).

        The hyperencoder is T5's own encoder with no modules inserted. The authors' code lets it attend to padding,
        so that a task depends on the padded length; here padding is masked. Without fusion no states are kept.
        """
        mask = padding_mask(instruction_ids) if attention_mask is None else attention_mask
        states = (self.hyperencoder or self.t5.encode)(instruction_ids, mask)
        modules = self.hypernetwork(states, mask)
        if not self.config.fusion:
            states, mask = states.new_zeros(len(states), 0, self.t5.config.d_model), mask[:, :0]
        return EncodedTask(modules, states, mask)

    def forward(self, instruction_ids: Tensor, input_ids: Tensor, labels: Tensor) -> Loss:
        """Instructions [B, Li], inputs [B, S] and labels [B, T] of a mixed-task batch -> its loss (section 3.3).

        Each distinct instruction is encoded once and its modules serve all examples that have it. Without dropout the
        gradient is that of encoding it for each of them; with dropout they share one draw. The work is less.
        """
        distinct, example_of = torch.unique(instruction_ids, dim=0, return_inverse=True)  # [U, Li], [B]
        task = self.encode_instruction(distinct)
        task = task if len(distinct) == 1 else task.rows(example_of)  # one task serves all examples as it is
        return self.t5.loss(labels, self._fuse(task, input_ids), task.modules)

    def _fuse(self, task: EncodedTask, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[Source]:
        """Instruction fusion: the decoder reads the states of the instruction and of the input (section 3.1).

        The paper concatenates them. Cross-attention has no position bias, so their order means nothing, and the
        states of one task can stay one row that all inputs [B, S] share.
        """
        instruction = Source(task.states, task.attention_mask)  # [B or 1, Li, d]
        return [instruction, self.t5.read(input_ids, attention_mask, task.modules)]

    @torch.no_grad()
    def generate(
        self, task: EncodedTask, input_ids: Tensor, attention_mask: Tensor | None = None, max_new_tokens: int = 128
    ) -> Tensor:
        """Greedy answers [B, <= max_new_tokens] to inputs [B, S] of an encoded task: `</s>`, then padding at the end.

        The authors decode with a beam search of one beam, which can also end on an `</s>` that ranks second.
        """
        sources = self._fuse(task, input_ids, attention_mask)
        return self.t5.decode_greedily(sources, task.modules, max_new_tokens)

    @classmethod
    def from_t5(cls, name_or_dir: str | os.PathLike, config: HINTConfig | None = None) -> HINT:
        """A public T5 with a new hypernetwork, in eval mode. Raises CheckpointError."""
        return cls(T5.from_pretrained(name_or_dir), config or HINTConfig()).eval()

    def save_pretrained(
        self, folder: str | os.PathLike, notes: dict | None = None, metadata: dict[str, str] | None = None
    ) -> None:
        """Write `config.json` (with `notes` added) and `model.safetensors`: all that `from_pretrained` needs."""
        config = {"model_type": "hint", **asdict(self.config), "t5": asdict(self.t5.config), **(notes or {})}
        save_folder(folder, config, dict(self.named_parameters()), metadata or {})

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> HINT:
        """Read what `save_pretrained` wrote, in eval mode. Raises CheckpointError."""
        t5_config, config = read_config(folder, _hint_configs)
        with torch.device("meta"):
            model = cls(T5(t5_config), config)
        fill(model, read_weights(folder), str, source=folder)
        return model.eval()


def _hint_configs(found: dict) -> tuple[T5Config, HINTConfig]:
    """The two parts of a HINT model's `config.json`."""
    if found.get("model_type") != "hint" or not isinstance(found.get("t5"), dict):
        raise CheckpointError("is not of a HINT model (model_type is not 'hint')")
    known = {field.name: found[field.name] for field in fields(HINTConfig) if field.name in found}
    return T5Config.from_json(found["t5"]), HINTConfig(**known)


class PlainT5(nn.Module):
    """What HINT is compared with: a T5 that is told everything with the input, or nothing at all.

    It trains, answers and is kept like HINT. Whether it is Tk-Instruct or No-Instruct is a matter of the text.
    """

    def __init__(self, t5: T5) -> None:
        super().__init__()
        self.t5 = t5

    def encode_instruction(self, instruction_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """There is nothing to keep of an instruction: it is part of the input."""

    def forward(self, instruction_ids: Tensor, input_ids: Tensor, labels: Tensor) -> Loss:
        """Inputs [B, S] and labels [B, T] -> loss; the instructions are not read."""
        return self.t5.loss(labels, [self.t5.read(input_ids)])

    def generate(
        self, task: None, input_ids: Tensor, attention_mask: Tensor | None = None, max_new_tokens: int = 128
    ) -> Tensor:
        """Greedy answers [B, <= max_new_tokens] to inputs [B, S]."""
        return self.t5.generate(input_ids, attention_mask, max_new_tokens)

    def save_pretrained(
        self, folder: str | os.PathLike, notes: dict | None = None, metadata: dict[str, str] | None = None
    ) -> None:
        """A folder that this project and transformers read as a T5."""
        self.t5.save_pretrained(folder, notes, metadata)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> PlainT5:
        """Read such a folder, in eval mode. Raises CheckpointError."""
        return cls(T5.from_pretrained(folder)).eval()


def load_model(name_or_dir: str | os.PathLike) -> HINT | PlainT5:
    """A saved HINT, or any T5, by what its `config.json` says it is. Raises CheckpointError."""
    kind = read_config(name_or_dir, _kind_of_model)
    return HINT.from_pretrained(name_or_dir) if kind == "hint" else PlainT5.from_pretrained(name_or_dir)


def _kind_of_model(found: dict) -> object:
    """The `model_type` of a `config.json`, which a run has as soon as it has saved a model."""
    if "run" in found and "model_type" not in found:
        raise CheckpointError("is of an evaluation, or of a run that has saved no model yet")
    return found.get("model_type")
