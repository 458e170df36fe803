"""HINT (Ivison et al., ACL 2023): read a task's instruction once, then answer every input without it.

    instruction --> T5 encoder, plain --> states --> ColumnGenerator --> adapters and prefixes
                                            |                                    |
          input --> T5 encoder with them ---+--> [instruction states ; input states] --> T5 decoder with them --> answer

Axes: B examples, U distinct instructions, Li instruction tokens, S input tokens, T target tokens, d model.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hypernet import ColumnGenerator
from t5 import (
    T5,
    Adapter,
    CheckpointError,
    KeyValue,
    LayerModules,
    Loss,
    Modules,
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


@dataclass(frozen=True)
class HINTConfig:
    """Sizes of what is generated (section 4, after He et al., 2022); one pair of values for all sizes of T5."""

    bottleneck: int = 512  # r, hidden width of each adapter
    prefix_length: int = 30  # P, generated keys and values of each attention
    generator_dropout: float = 0.1  # in the generating networks; the authors' code has 0.1 whatever T5 has
    embedding_scale: float = 1.0  # column embeddings begin with a std of this times d^-0.5, the authors' value

    def __post_init__(self) -> None:
        bounds = {
            "bottleneck": (int, 1, 1e5),
            "prefix_length": (int, 1, 1e5),
            "generator_dropout": (float, 0, 0.99),
            "embedding_scale": (float, 0, 1e3),
        }
        for name, (kind, least, most) in bounds.items():
            value = getattr(self, name)
            if type(value) not in (int, kind) or not least <= value <= most:
                raise CheckpointError(f"{name} must be from {least} to {most:g}, not {value!r:.40}")


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
        with torch.serialization.safe_globals([EncodedTask, Modules, LayerModules, Adapter, KeyValue]):
            task = read_pickle(path)
        tensors: list[Tensor] = []
        try:
            _check_shapes(task)
            map_tensors(tensors.append, task)
        except (AttributeError, TypeError, ValueError, IndexError):  # of a part that is not what stands in its place
            raise CheckpointError(f"{path}: is not an encoded task") from None
        check_sizes(path, tensors)
        return map_tensors(torch.clone, task)  # the file may change


def _check_shapes(task: EncodedTask) -> None:
    """The shapes of what a file holds must be those of one task. Raises whatever a wrong part leads to."""
    batch, length, d_model = task.states.shape
    wrong = not isinstance(task, EncodedTask) or task.attention_mask.shape != (batch, length)
    for adapter, *prefixes in (*task.modules.encoder, *task.modules.decoder):
        if adapter is not None:
            r = adapter.down.shape[2]
            shapes = [(batch, d_model, r), (batch, 1, r), (batch, r, d_model), (batch, 1, d_model)]
            wrong |= [part.shape for part in adapter] != shapes
        for prefix in prefixes:
            if prefix is not None:
                _, heads, columns, width = prefix.key.shape
                wrong |= [part.shape for part in prefix] != [(batch, heads, columns, width)] * 2
    if wrong:
        raise ValueError("parts that do not fit together")


class HINT(nn.Module):
    """The paper's model: T5, whose encoder is also the hyperencoder, and the generator of its modules.

    Ids are padded with 0, labels with -100. Where no attention mask is given, id 0 is padding.
    """

    def __init__(self, t5: T5, config: HINTConfig) -> None:
        super().__init__()
        self.config = config
        self.t5 = t5
        self.hypernetwork = ColumnGenerator(t5.config, **asdict(config))

    def encode_instruction(self, instruction_ids: Tensor, attention_mask: Tensor | None = None) -> EncodedTask:
        """Read instructions [B, Li], once: hyperencoder and generator (section 3.1).

        The hyperencoder is T5's own encoder with no modules inserted. The authors' code lets it attend to padding,
        so that a task depends on the padded length; here padding is masked.
        """
        mask = padding_mask(instruction_ids) if attention_mask is None else attention_mask
        states = self.t5.encode(instruction_ids, mask)
        return EncodedTask(self.hypernetwork(states, mask), states, mask)

    def forward(self, instruction_ids: Tensor, input_ids: Tensor, labels: Tensor) -> Loss:
        """Instructions [B, Li], inputs [B, S] and labels [B, T] of a mixed-task batch -> its loss (section 3.3).

        Each distinct instruction is encoded once and its modules serve all examples that have it. Without dropout the
        gradient is that of encoding it for each of them; with dropout they share one draw. The work is less.
        """
        distinct, example_of = torch.unique(instruction_ids, dim=0, return_inverse=True)  # [U, Li], [B]
        task = self.encode_instruction(distinct).rows(example_of)
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

    @torch.no_grad()
    def rank(self, task: EncodedTask, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Log-probabilities [B] of the answers `labels` [B, T] to inputs [B, S] of an encoded task."""
        return self.t5.log_probabilities(labels, self._fuse(task, input_ids), task.modules)

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

    @torch.no_grad()
    def rank(self, task: None, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Log-probabilities [B] of the answers `labels` [B, T] to inputs [B, S]."""
        return self.t5.log_probabilities(labels, [self.t5.read(input_ids)])

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
