"""HINT (Ivison et al., ACL 2023): read a task's instruction once, then answer every input without it.

    instruction --> T5 encoder, plain --> states --> ColumnGenerator --> adapters and prefixes
                                            |                                    |
          input --> T5 encoder with them ---+--> [instruction states ; input states] --> T5 decoder with them --> answer

What the paper compares it with are other values of `HINTConfig`, or a `PlainT5`.

Axes: B examples, U distinct instructions, Li instruction tokens, S input tokens, T target tokens, d model.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, fields
from itertools import count
from pathlib import Path
from typing import NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hypernet import GENERATORS, HYPERENCODERS, HINTConfig, generated_kinds
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
    save_folder,
    select_rows,
    write_pickle,
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
        write_pickle(Path(path), map_tensors(torch.Tensor.detach, self))

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
        return map_tensors(_own_copy, task)


def _own_copy(tensor: Tensor) -> Tensor:
    """In fp32, as all that is read from files, though the task may have been encoded in bf16; the file may change."""
    return tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)


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

    @torch.no_grad()
    def rank(self, task: EncodedTask, input_ids: Tensor, labels: Tensor, owners: Tensor) -> Tensor:
        """Log-probabilities [N] of answers `labels` [N, T], each to that one of the inputs [B, S] that `owners` [N] says.

        So an input with many choices is encoded once.
        """
        sources, modules = select_rows((self._fuse(task, input_ids), task.modules), owners)
        return self.t5.log_probabilities(labels, sources, modules)

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
    def rank(self, task: None, input_ids: Tensor, labels: Tensor, owners: Tensor) -> Tensor:
        """Log-probabilities [N] of answers `labels` [N, T] to those of the inputs [B, S] that `owners` [N] says."""
        return self.t5.log_probabilities(labels, [select_rows(self.t5.read(input_ids), owners)])

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


# ------------------------------------------------------- what it costs: section 3.3 and appendix C
#
# The paper's symbols: n inputs of one task, of i tokens each; t tokens of instruction; o tokens of each answer;
# N parameters of T5; H FLOPs of the generator for one instruction; p numbers generated for it.
#
# The formulas let a token cost N FLOPs: two for each parameter of one stack, taken for half of all. That leaves out
# attention between tokens, which grows with the square of a length, and the decoder's keys and values of each token
# that the encoder read; and it counts the embedding, which is only looked up, and for every token the head.


def tk_instruct_flops(n: int, i: int, t: int, o: int, N: int) -> int:
    """Appendix C.1: the instruction is read with every input. Section 3.3 also drops o."""
    return n * N * (t + i + o)


def no_instruct_flops(n: int, i: int, o: int, N: int) -> int:
    """The inputs alone (table 1)."""
    return n * N * (i + o)


def hint_flops(n: int, i: int, t: int, o: int, N: int, H: int = 0, p: int = 0) -> int:
    """Appendix C.1; with H = p = 0 its short form, which section 3.3 has without o.

    That drops H as small beside N t, which it is not (`cost_table`), and p as small beside N (4 % at XL). Left out here
    too: the decoder reads the instruction with every input.
    """
    return N * t + H + n * (N + p) * (i + o)


def decoder_only_flops(n: int, i: int, t: int, o: int, N: int) -> int:
    """A decoder that keeps keys and values of the instruction (section 5.1); a token passes all N (appendix D)."""
    return 2 * N * (t + n * (i + o))


def decoder_cache_numbers(L: int, h: int, k: int, s: int) -> int:
    """Appendix C.2: keys and values of s tokens in L layers. Section 5.1 takes h k for d."""
    return 2 * L * h * k * s


def hint_cache_numbers(L: int, h: int, k: int, d: int, s: int, bottleneck: int = 512, prefix_length: int = 30) -> int:
    """Appendix C.2: states of s tokens, and an adapter and a prefix in each of L layers.

    It ignores biases, does not say whether L counts both stacks, and has one prefix where a decoder layer has two.
    """
    return d * s + 2 * bottleneck * L * d + 2 * prefix_length * L * h * k


def encoded_task_numbers(t5: T5Config, hint: HINTConfig, t: int) -> int:
    """What is kept here: all tensors of an EncodedTask of t tokens, its mask among them."""
    return generated_numbers(t5, hint) + t * t5.d_model + t


def generated_numbers(t5: T5Config, hint: HINTConfig) -> int:
    """p: adapters and prefixes of one task."""
    kinds = generated_kinds(t5, hint.bottleneck, hint.prefix_length, hint.modules).values()
    return sum(kind.slots * kind.columns * kind.width for kind in kinds)


def smaller_cache_from(t5: T5Config, hint: HINTConfig, L: int) -> tuple[int, int]:
    """The shortest instruction of which HINT keeps less than a decoder of L layers: by appendix C.2, and here.

    The decoder has the heads of T5, and what HINT keeps for one token must be less than what it keeps.
    """
    h, k, d = t5.num_heads, t5.d_kv, t5.d_model
    decoder = decoder_cache_numbers(L, h, k, s=1)
    formula = hint_cache_numbers(L, h, k, d, 0, hint.bottleneck, hint.prefix_length) // (decoder - d) + 1
    return formula, generated_numbers(t5, hint) // (decoder - d - 1) + 1


def t5_parameters(t5: T5Config) -> int:
    """N: embedding and head, attention, feed-forward layers, norms, relative biases."""
    d, inner, decoder_layers = t5.d_model, t5.num_heads * t5.d_kv, t5.num_decoder_layers
    layers, attentions = t5.num_layers + decoder_layers, t5.num_layers + 2 * decoder_layers
    matrices = 3 if t5.feed_forward_proj == "gated-gelu" else 2
    vocabulary = (1 if t5.tie_word_embeddings else 2) * t5.vocab_size * d
    norms = (attentions + layers + 2) * d
    biases = 2 * t5.relative_attention_num_buckets * t5.num_heads
    return vocabulary + attentions * 4 * d * inner + layers * matrices * d * t5.d_ff + norms + biases


@dataclass(frozen=True)
class ExactFlops:
    """FLOPs of all matrix products of this code, two for a multiplication and its addition; nothing else is counted.

    Each method is named after the one whose products it counts, for texts without padding and answers that do not end
    early. The sizes are those of the modules that T5 is given; with both at 0 it is plain. So Tk-Instruct costs
    `ExactFlops(t5).generate(n, t + i, o)`, No-Instruct `ExactFlops(t5).generate(n, i, o)`, and HINT
    `encode_instruction(t) + generate(n, i, o, t)`.
    """

    t5: T5Config
    bottleneck: int = 0
    prefix_length: int = 0

    def encode(self, tokens: int) -> int:
        """One text through the encoder."""
        own = self._attention(tokens, tokens, tokens * (self.prefix_length + tokens))
        return self.t5.num_layers * (own + self._feed_forward(tokens))

    def generate_modules(self, t: int, tasks: int = 1) -> int:
        """H: `ColumnGenerator.forward` for instructions of t tokens.

        W_q for the column embeddings is the same for all and computed once a call; for one at XL it is a fourth of H.
        """
        d, kinds = self.t5.d_model, generated_kinds(self.t5, self.bottleneck, self.prefix_length).values()
        columns = sum(kind.slots * kind.columns for kind in kinds)
        queries = 2 * columns * d * self.t5.num_heads * self.t5.d_kv
        networks = sum(2 * kind.slots * kind.columns * d * (d + kind.width) for kind in kinds)
        return queries + tasks * (self._attention(columns, t, columns * t) - queries + networks)

    def encode_instruction(self, t: int, tasks: int = 1) -> int:
        """Instructions of t tokens, by the plain encoder and the generator."""
        return tasks * ExactFlops(self.t5).encode(t) + self.generate_modules(t, tasks)

    def generate(self, n: int, i: int, o: int, t: int = 0) -> int:
        """o tokens for each of n inputs in one batch, which reads t encoded tokens that all of them share."""
        seen = o * self.prefix_length + o * (o + 1) // 2  # the token at each place and all before it
        each = self.encode(i) + self._project_sources(i) + self._decode(o, seen, t + i)
        return self._project_sources(t) + n * each

    def loss(self, n: int, i: int, o: int, t: int = 0) -> int:
        """The forward pass of training on labels of o tokens, where each row reads t encoded tokens of its own."""
        seen = o * (self.prefix_length + o)  # what is masked is multiplied too
        return n * (self.encode(i) + self._project_sources(t + i) + self._decode(o, seen, t + i))

    def _decode(self, tokens: int, seen: int, sources: int) -> int:
        """One answer through decoder and head: its tokens see `seen` of their own kind in all, and read the sources."""
        own = self._attention(tokens, tokens, seen)
        cross = self._attention(tokens, 0, tokens * (self.prefix_length + sources))
        head = 2 * tokens * self.t5.d_model * self.t5.vocab_size
        return self.t5.num_decoder_layers * (own + cross + self._feed_forward(tokens)) + head

    def _project_sources(self, tokens: int) -> int:
        """Keys and values of encoded tokens for all cross-attentions."""
        return self.t5.num_decoder_layers * self._attention(0, tokens, 0)

    def _attention(self, queries: int, keys: int, pairs: int) -> int:
        """W_q and W_o for queries, W_k and W_v for keys that are not generated, score and value for each pair."""
        return 4 * self.t5.num_heads * self.t5.d_kv * (self.t5.d_model * (queries + keys) + pairs)

    def _feed_forward(self, tokens: int) -> int:
        """The feed-forward layer and the adapter beside it."""
        matrices = 3 if self.t5.feed_forward_proj == "gated-gelu" else 2
        return 2 * tokens * self.t5.d_model * (matrices * self.t5.d_ff + 2 * self.bottleneck)


def flop_counter() -> FlopCounterMode:
    """Torch's own counter of the FLOPs of what is run within it; it is told of the product that it does not know."""
    unknown = {}
    if torch.backends.mkldnn.is_available():
        unknown[torch.ops.mkldnn._linear_pointwise] = lambda x, *_, out_shape: 2 * math.prod(x) * out_shape[-1]
    return FlopCounterMode(display=False, custom_mapping=unknown)


def cost_table(t5: T5Config, hint: HINTConfig = HINTConfig(), n: int = 100, i: int = 100, o: int = 16) -> str:
    """TFLOP for instructions of several lengths, by the paper's formulas / exactly; H is exact in both.

    It is also told in tokens: so many of N FLOPs / so many as the plain encoder reads for it.
    """
    plain, ours = ExactFlops(t5), ExactFlops(t5, hint.bottleneck, hint.prefix_length)
    N, p = t5_parameters(t5), generated_numbers(t5, hint)
    lines = ["| t | H | H in tokens | HINT | Tk-Instruct | times cheaper |", "| --- | --- | --- | --- | --- | --- |"]
    for t in (25, 50, 100, 200, 500, 1000):
        H = ours.generate_modules(t)
        tokens = next(length for length in count(1) if plain.encode(length) >= H)
        once = hint_flops(n, i, t, o, N, H, p), ours.encode_instruction(t) + ours.generate(n, i, o, t)
        each = tk_instruct_flops(n, i, t, o, N), plain.generate(n, t + i, o)
        sums = [f"{formula / 1e12:.1f} / {exact / 1e12:.1f}" for formula, exact in (once, each)]
        cheaper = f"{each[0] / once[0]:.2f} / {each[1] / once[1]:.2f}"
        lines.append(f"| {t:,} | {H / 1e12:.2f} | {H / N:.0f} / {tokens} | {sums[0]} | {sums[1]} | {cheaper} |")
    return "\n".join(lines)
