"""Text in, ids out: tokenizer, Super-NaturalInstructions, P3, prompt formats, pretraining chunks, a toy world, metrics.

Nothing here knows of a model. A task, real or toy, is a `Task`; a prompt format turns it into `Ids`; a source hands
out `Ids` one after the other; `collate` pads them to a `Batch`.

Axes: B examples, Li instruction tokens, S input tokens, T target tokens.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
import os
import random
import re
import string
import struct
import zlib
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, islice, product
from pathlib import Path
from typing import BinaryIO, Callable, Iterator, NamedTuple, Sequence

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

PAD, EOS, UNKNOWN = 0, 1, 2
NO_LABEL = -100
NOTHING = [EOS]  # an instruction that says nothing
EXTRA_IDS = 100  # of T5, behind the pieces of its SentencePiece model
MASK = "[MASK]"  # stands for a field of the instance in the instruction of a prompted example
LONGEST_LINE = 1 << 24  # bytes, 16 MiB: the pages that C4 is made of were cut at one MiB


class DataError(ValueError):
    """A file of the data cannot be used; the message is one sentence that names the file."""


def _reason(error: BaseException) -> str:
    """As much of a library's message as fits into a sentence."""
    return "".join(letter if letter.isprintable() else " " for letter in str(error)[:120])


# --------------------------------------------------------------------------------------------- tokenizer


def load_tokenizer(name_or_dir_or_file: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a checkpoint: `tokenizer.json` where there is one, else built from `spiece.model`.

    Takes a public name, a folder or either file; `encode(text).ids` ends in `</s>`. Raises DataError.
    """
    path = Path(name_or_dir_or_file)
    if not path.is_file():
        path = _fetch(name_or_dir_or_file, "tokenizer.json") or _fetch(name_or_dir_or_file, "spiece.model")
    if path is None:
        raise DataError(f"{name_or_dir_or_file}: no tokenizer.json and no spiece.model there")
    try:
        tokenizer = _read_tokenizer_json(path) if path.suffix == ".json" else _read_spiece(path)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        ids = tokenizer.encode("two words, \u5b57 \u2603").ids  # some damage shows only in use, or at unknown letters
        tokenizer.decode(ids)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the library raises bare exceptions, and its panics are not even those
        raise DataError(f"{path}: is not a tokenizer that can be read ({_reason(error)})") from None
    if ids[-1:] != [EOS] or max(ids) > max(tokenizer.get_vocab().values(), default=0):
        raise DataError(f"{path}: is not a tokenizer of T5, whose texts end in </s> with id {EOS}")
    return tokenizer


def _fetch(name_or_dir: str | os.PathLike, filename: str) -> Path | None:
    if os.path.isdir(name_or_dir):
        path = Path(name_or_dir, filename)
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(str(name_or_dir), filename))
    except EntryNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"{name_or_dir}: neither a tokenizer nor a repository that can be read ({reason})") from None


def _read_tokenizer_json(path: Path) -> Tokenizer:
    text = path.read_text("utf-8")
    json.loads(text, object_pairs_hook=_check_charsmaps)
    return Tokenizer.from_str(text)


def _check_charsmaps(pairs: list[tuple[str, object]]) -> None:
    for name, value in pairs:
        if name == "precompiled_charsmap":
            _check_charsmap(base64.b64decode(value, validate=True))


def _check_charsmap(charsmap: bytes) -> None:
    """A character map is a trie (a double array, as darts-clone has it) and the texts that its leaves point at.

    The library follows both without looking, and panics where they lead outside; so each path is followed here first.
    Raises ValueError.
    """
    size = int.from_bytes(charsmap[:4], "little")
    if size % 4 or not 4 <= size <= min(len(charsmap) - 4, 1 << 20):  # T5's has 177 kB
        raise ValueError("its character map is cut short, or none")
    units, texts = np.frombuffer(charsmap, "<u4", size // 4, 4), np.frombuffer(charsmap, np.uint8, offset=4 + size)
    offsets = (units >> 10) << ((units & 512) >> 6)
    letters, fresh, reached = np.arange(1, 256, dtype=np.uint32), np.ones(len(units), bool), np.zeros(1, np.uint32)
    while len(reached):
        nodes = reached ^ offsets[reached]
        if (nodes | 255).max() >= len(units):
            raise ValueError("its character map leads outside")
        places = units[nodes[units[reached] & 256 > 0]] & 0x7FFFFFFF
        if (places >= len(texts)).any() or (texts[places] & 192 == 128).any():  # or into the middle of a character
            raise ValueError("its character map leads outside")
        children = nodes[:, None] ^ letters
        reached = np.unique(children[fresh[children] & (units[children] & 0x800000FF == letters)])
        fresh[reached] = False


def _read_spiece(path: Path) -> Tokenizer:
    """A SentencePiece model, the only tokenizer that T5 v1.1 and T0 ship, as a `tokenizers.Tokenizer`.

    T5 puts its extra ids behind the pieces in falling order: the last id of all is <extra_id_0>.
    """
    pieces, charsmap = _parse_spiece(path.read_bytes())
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=UNKNOWN, byte_fallback=False))
    tidy = []
    if charsmap:
        _check_charsmap(charsmap)
        tidy = [normalizers.Precompiled(charsmap)]
    squeeze = [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), "▁")]
    tokenizer.normalizer = normalizers.Sequence(tidy + squeeze)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    names = ["<pad>", "</s>", "<unk>"] + [f"<extra_id_{number}>" for number in reversed(range(EXTRA_IDS))]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    return tokenizer


UNIGRAM = b"\x01"


def _parse_spiece(data: bytes) -> tuple[list[tuple[str, float]], bytes]:
    """Pieces with their scores, and the normaliser's character map, out of a SentencePiece ModelProto."""
    pieces, charsmap = [], b""
    for number, value in _fields(data):
        if number == 1:  # SentencePiece: 1 piece, 2 score
            piece = dict(_fields(value))
            pieces.append((piece[1].decode("utf-8"), struct.unpack("<f", piece.get(2, b"\0\0\0\0"))[0]))
        elif number == 2 and dict(_fields(value)).get(3, UNIGRAM) != UNIGRAM:  # TrainerSpec: 3 model_type
            raise ValueError("it is of another kind")
        elif number == 3:  # NormalizerSpec: 2 precompiled_charsmap
            charsmap = dict(_fields(value)).get(2, b"")
    if [piece for piece, _ in pieces[:3]] != ["<pad>", "</s>", "<unk>"]:
        raise ValueError("it does not begin with <pad>, </s>, <unk>")
    return pieces, charsmap


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Fields of a protocol buffer message as (number, raw bytes)."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        wire = key & 7
        if wire == 0:
            start = position
            _, position = _varint(data, position)
            yield key >> 3, data[start:position]
            continue
        if wire == 2:
            size, position = _varint(data, position)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError("a wire type that protocol buffers do not have")
        if position + size > len(data):
            raise ValueError("it is cut short")
        yield key >> 3, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A number of seven bits a byte, lowest first, and the position behind it."""
    number = shift = 0
    while shift < 64:
        byte = data[position]
        number |= (byte & 127) << shift
        position += 1
        if byte < 128:
            return number, position
        shift += 7
    raise ValueError("a number that does not end")


# --------------------------------------------------------------------------------------------- tasks


class Example(NamedTuple):
    """A positive example of a task."""

    input: str
    output: str


class Instance(NamedTuple):
    """One input of a task with its references."""

    id: str
    input: str
    references: tuple[str, ...]
    choices: tuple[str, ...] = ()  # the answers there are, where not every text is one


@dataclass(frozen=True)
class Task:
    """A task as Super-NaturalInstructions has it: definition, positive examples, instances."""

    name: str
    definition: str
    examples: tuple[Example, ...]
    instances: tuple[Instance, ...]


def load_tasks(folder: str | os.PathLike, split: str, max_instances: int = 100, *, joint: bool = False) -> list[Task]:
    """Tasks of a split, as the data set's repository lays them out: `splits/default/SPLIT_tasks.txt`, `tasks/*.json`.
    Where there is no such folder, of prompted examples: `SPLIT.jsonl`.

    The first `max_instances` of each task, which is what published scores are taken on. `joint`: the input of a
    prompted example is its whole prompt, not the fields of the instance alone. Raises DataError.
    """
    listing, prompted = Path(folder, "splits", "default", f"{split}_tasks.txt"), Path(folder, f"{split}.jsonl")
    if prompted.is_file() and not listing.parent.is_dir():
        return _load_prompted(prompted, max_instances, joint)
    if joint:
        raise DataError(f"{folder}: holds no prompted examples ({prompted.name}), which alone have a joint setting")
    try:
        names = listing.read_text("utf-8").split()
    except FileNotFoundError:
        raise DataError(
            f"{listing}: no such file; {folder} must hold tasks/ and splits/default/, or {prompted.name}"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{listing}: cannot be read ({_reason(error)})") from None
    if not names:
        raise DataError(f"{listing}: the split is empty")
    paths = [Path(folder, "tasks", f"{name}.json") for name in names]
    for name, path in zip(names, paths):
        if name != Path(name).name or not _is_name(name):
            raise DataError(f"{listing}: {name!r:.80} is not the name of a task")
        if not path.is_file():
            raise DataError(f"{listing}: names a task that is not there ({path}: no such file)")
    return [_load_task(path, max_instances) for path in paths]


def _is_name(text: str) -> bool:
    return 0 < len(text) <= 200 and text.isprintable()


def _load_task(path: Path, max_instances: int) -> Task:
    found = _read_json(path)
    definition = found.get("Definition")
    definition = definition[0] if isinstance(definition, list) and definition else definition
    if not isinstance(definition, str):
        raise DataError(f"{path}: lacks a Definition")
    instances = found.get("Instances")
    if not isinstance(instances, list) or not instances:
        raise DataError(f"{path}: lacks Instances")
    examples = found.get("Positive Examples", [])
    if not isinstance(examples, list):
        raise DataError(f"{path}: Positive Examples is not a list")
    return Task(
        name=path.stem,
        definition=valid(definition),
        examples=tuple(Example(_text(path, e, "input"), _text(path, e, "output")) for e in examples),
        instances=tuple(_instance(path, number, i) for number, i in enumerate(instances[:max_instances])),
    )


def _instance(path: Path, number: int, found: object) -> Instance:
    text = _text(path, found, "input")
    references = found.get("output")
    references = [references] if isinstance(references, str) else references
    if not isinstance(references, list) or not references or not all(isinstance(r, str) for r in references):
        raise DataError(f"{path}: instance {number} has no output, a list of texts")
    name = found.get("id")
    return Instance(
        valid(name) if isinstance(name, str) else f"{path.stem}-{number}", text, tuple(map(valid, references))
    )


def _text(path: Path | str, entry: object, key: str) -> str:
    if not isinstance(entry, dict) or not isinstance(entry.get(key), str):
        raise DataError(f"{path}: an example or instance has no text as {key!r}")
    return valid(entry[key])


def _load_prompted(path: Path, max_instances: int, joint: bool) -> list[Task]:
    """Tasks of a file of prompted examples, a JSON object a line: those of one data set with one instruction are one.

    In the split setting the input is the instance's distinct fields, a line each (to T5's tokenizer, a space between).
    """
    tasks: dict[tuple[str, str], list[Instance]] = {}
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(_lines(file), start=1):
                name, instruction, instance = _prompted(f"{path}: line {number}", line, number, joint)
                instances = tasks.setdefault((name, instruction), [])
                if len(instances) < max_instances:
                    instances.append(instance)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({_reason(error)})") from None
    if not tasks:
        raise DataError(f"{path}: the split is empty")
    return [Task(name, instruction, (), tuple(found)) for (name, instruction), found in tasks.items()]


def _prompted(where: str, line: bytes, number: int, joint: bool) -> tuple[str, str, Instance]:
    """Data set, instruction and instance of a line."""
    try:
        found = _json_line(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} cannot be read as JSON ({_reason(error)})") from None
    name, instruction, target = (_text(where, found, key) for key in ("task", "instruction", "target"))
    values, choices = _texts(where, "input", found.get("input")), _texts(where, "choices", found.get("choices") or [])
    before, *behind = instruction.split(MASK)
    if not _is_name(name):
        raise DataError(f"{where}: {name!r:.80} is not the name of a task")
    if choices and target not in choices:
        raise DataError(f"{where}: the target is none of the choices")
    if joint and len(values) != len(behind):
        raise DataError(f"{where}: the instruction has {len(behind)} {MASK} for {len(values)} fields of input")
    text = before + "".join(chain(*zip(values, behind))) if joint else "\n".join(dict.fromkeys(values))
    own = found.get("id")
    own = valid(own) if isinstance(own, str) else f"{name}-{number}"
    return name, instruction, Instance(own, text.strip(), (target,), choices)


def _texts(where: str, key: str, found: object) -> tuple[str, ...]:
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise DataError(f"{where}: {key!r} is not a list of texts")
    return tuple(map(valid, found))


def valid(text: str) -> str:
    """A text as tokenizers and files take it: stripped, and with `?` for halves of characters, which JSON allows."""
    return text.encode("utf-8", "replace").decode("utf-8").strip()


def _read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not JSON ({_reason(error)})") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: is JSON, but not an object")
    return found


# --------------------------------------------------------------------------------------------- prompts


class Ids(NamedTuple):
    """One example as ids: what the hypernetwork reads, what T5 reads, what it must answer. Each ends in `</s>`."""

    instruction: list[int]
    input: list[int]
    target: list[int]


class PromptFormat:
    """Text of a task as a model reads it; how long it may be, and how many examples of the task it shows."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        examples: int = 0,
        max_instruction: int = 1024,
        max_input: int = 1024,
        tasks: Sequence[str] = (),
    ) -> None:
        """`tasks`: the names of those that the model is trained on."""
        self.tokenizer, self.examples = tokenizer, examples
        self.max_instruction, self.max_input = max_instruction, max_input
        self.trained = {name: number for number, name in enumerate(tasks)}

    def __call__(self, task: Task) -> list[tuple[list[int], list[int]]]:
        """(instruction ids, input ids) of each instance of a task; all of them share one list as the instruction."""
        raise NotImplementedError

    def _bare_inputs(self, task: Task) -> list[list[int]]:
        encodings = self.tokenizer.encode_batch([instance.input for instance in task.instances])
        return [cut(encoding.ids, self.max_input) for encoding in encodings]

    def _length(self, text: str) -> int:
        return len(self.tokenizer.encode(text).ids)


class HINTFormat(PromptFormat):
    """The instruction for the hypernetwork and the bare input for T5, in the words of the authors' code.

    `Def`: the definition alone. `Def + 2 Pos`: the second example, the first, then `Definition: ...`. An example with
    which the instruction would be too long is left out, and the next one tried.
    """

    def instruction(self, task: Task) -> str:
        """What the hypernetwork reads of a task."""
        if self.examples == 0:
            return task.definition
        text = f"Definition: {task.definition}"
        for number, example in enumerate(task.examples[: self.examples], start=1):
            longer = _example(number, example) + text
            text = longer if self._length(longer) <= self.max_instruction else text
        return text

    def __call__(self, task: Task) -> list[tuple[list[int], list[int]]]:
        instruction = cut(self.tokenizer.encode(self.instruction(task)).ids, self.max_instruction)
        return [(instruction, ids) for ids in self._bare_inputs(task)]


class TkInstructFormat(PromptFormat):
    """All in the input, as Tk-Instruct has it: definition, examples, then the instance as a query.

    An example is added while all of it fits. The published code cuts an overlong text on the right, which loses the
    query; here what comes before the query gives way, and after that the end of the instance's text.
    """

    def prompt(self, task: Task, instance: Instance) -> tuple[str, str]:
        """What stands before the query, and the query."""
        definition = with_period(f"Definition: {task.definition}") + "\n\n"
        query = with_period(f"Now complete the following example -\nInput: {instance.input}") + "\nOutput: "
        examples = ""
        for number, example in enumerate(task.examples[: self.examples], start=1):
            longer = examples + _example(number, example) + "\n"
            if self._length(definition + longer + query) > self.max_input:
                break
            examples = longer
        return definition + examples, query

    def __call__(self, task: Task) -> list[tuple[list[int], list[int]]]:
        return [(NOTHING, self._ids(*self.prompt(task, instance))) for instance in task.instances]

    def _ids(self, before: str, query: str) -> list[int]:
        whole = self.tokenizer.encode(before + query).ids
        if len(whole) <= self.max_input:
            return whole
        question, output = query.rsplit("\n", 1)
        end = self.tokenizer.encode(output).ids
        ask = self.tokenizer.encode(question).ids[:-1][: self.max_input - len(end)] + end
        return self.tokenizer.encode(before).ids[:-1][: self.max_input - len(ask)] + ask


class NoInstructFormat(PromptFormat):
    """The bare input: what a model can do that is not told what to do."""

    def __call__(self, task: Task) -> list[tuple[list[int], list[int]]]:
        return [(NOTHING, ids) for ids in self._bare_inputs(task)]


class TaskNumberFormat(PromptFormat):
    """What a Hyperformer reads: the number of a task, which is no text but a row of its table, and the bare input.

    A task that it was not trained on has a number in `fitted`, once there is an embedding for it.
    """

    fitted: dict[str, int] = {}

    def __call__(self, task: Task) -> list[tuple[list[int], list[int]]]:
        number = [{**self.trained, **self.fitted}[task.name]]
        return [(number, ids) for ids in self._bare_inputs(task)]

    def shots(self, tasks: Sequence[Task]) -> list[Ids]:
        """The positive examples of tasks, as many as are shown of each, as if they were instances."""
        return [
            Ids([self.fitted[task.name]], cut(source.ids, self.max_input), target.ids)
            for task in tasks
            for source, target in zip(
                self.tokenizer.encode_batch([example.input for example in task.examples[: self.examples]]),
                self.tokenizer.encode_batch([example.output for example in task.examples[: self.examples]]),
            )
        ]


def _example(number: int, example: Example) -> str:
    source, target = with_period(f"Input: {example.input}"), with_period(f"Output: {example.output}")
    return f" Positive Example {number} -\n{source}\n {target}\n"


def with_period(text: str) -> str:
    """Tk-Instruct ends every field in punctuation."""
    return text if text[-1] in string.punctuation else text + "."


def cut(ids: list[int], max_length: int) -> list[int]:
    """At most `max_length` ids, of which the last is still `</s>` (the authors' code loses it)."""
    return ids if len(ids) <= max_length else [*ids[: max_length - 1], EOS]


# --------------------------------------------------------------------------------------------- sources of examples


def encode_tasks(tasks: Sequence[Task], prompts: PromptFormat, max_target: int, seed: int) -> list[Ids]:
    """Training examples of tasks in a prompt format; of several references one is drawn, once."""
    draw = random.Random(seed)
    examples = []
    for task in tasks:
        answers = [draw.choice(instance.references) for instance in task.instances]
        targets = [cut(encoding.ids, max_target) for encoding in prompts.tokenizer.encode_batch(answers)]
        examples += [Ids(*ids, target) for ids, target in zip(prompts(task), targets)]
    return examples


class Shuffled:
    """Examples in a new random order each epoch, without end. The order depends on the seed alone.

    `group` neighbours stay together. They are of one task, but for the ends of tasks that `group` does not divide.
    """

    def __init__(
        self, examples: Sequence[Ids], seed: int, position: int = 0, group: int = 1, tasks: Sequence[Task] = ()
    ) -> None:
        self.examples, self.seed, self.group = examples, seed, group
        self.position = position  # examples handed out so far: all that a resumed run must know
        self._epoch, self._order = -1, []
        self._names = [task.name for task in tasks for _ in task.instances]
        self.names: list[str] = []  # the tasks of the examples taken last

    def take(self, count: int) -> list[Ids]:
        """The next `count` examples."""
        places = [self._next() for _ in range(count)]
        self.names = [self._names[place] if self._names else f"example {place}" for place in places]
        return [self.examples[place] for place in places]

    def _next(self) -> int:
        epoch, turn = divmod(self.position, len(self.examples))
        if epoch != self._epoch:
            size = len(self.examples)
            groups = [range(start, min(start + self.group, size)) for start in range(0, size, self.group)]
            random.Random(f"{self.seed}/{epoch}").shuffle(groups)
            self._epoch, self._order = epoch, [place for group in groups for place in group]
        self.position += 1
        return self._order[turn]


def split_for_hint(ids: list[int], draw: random.Random) -> Ids:
    """A segment split at two random points: for the hypernetwork, the input, the target; `</s>` ends each."""
    first = draw.randint(1, len(ids) - 3)
    second = draw.randint(first, len(ids) - 3)
    return Ids(*([*part, EOS] for part in (ids[:first], ids[first:second], ids[second:])))


def split_for_caclm(ids: list[int], draw: random.Random) -> Ids:
    """CACLM (Phang et al., 2022; Table 4): the hypernetwork also reads what follows the target, behind a `</s>`.

    The bounds are those of the authors' code, but for the target, which has at least one token of text.
    """
    first = draw.randint(1, len(ids) - 5)
    second = draw.randint(first, len(ids) - 4)
    third = draw.randint(second + 1, len(ids) - 3)
    around = [*ids[:first], EOS, *ids[third:]]
    return Ids(*([*part, EOS] for part in (around, ids[first:second], ids[second:third])))


OBJECTIVES = {"hint": split_for_hint, "caclm": split_for_caclm}


class PretrainingChunks:
    """Examples out of plain text for pretraining the hypernetwork (section 3.3), streamed from C4-style shards.

    128 documents at a time are tokenised, each ended by `</s>`, concatenated and cut to `length`; every segment is split
    by OBJECTIVES[split]. The text of a segment crosses documents, as in the authors' code; what is left of 128 documents
    behind their last segment is dropped. `skip_bad_lines`: a line of a shard that holds no text is left out, and counted
    in `skipped`.
    """

    documents = 128

    def __init__(
        self,
        paths: Sequence[str | os.PathLike],
        tokenizer: Tokenizer,
        length: int,
        seed: int,
        position: Sequence[int] = (0, 0),
        skip_bad_lines: bool = False,
        split: str = "hint",
    ) -> None:
        self._split = OBJECTIVES[split]
        self.paths, self.tokenizer, self.length, self.seed = [Path(path) for path in paths], tokenizer, length, seed
        for path in self.paths:
            if not path.is_file():
                raise DataError(f"{path}: no such file")
        self.position = tuple(position)  # (groups of documents used up, segments handed out of the next group)
        self.names: list[str] = []  # where the segments taken last come from
        self.skip_bad_lines, self.skipped, self.first_skipped = skip_bad_lines, 0, None
        stream = self._examples(*self.position)
        self._stream = chain([next(stream)], stream)  # a corpus that cannot be read is found before a run begins

    def take(self, count: int) -> list[Ids]:
        """The next `count` examples; after the last shard the first one follows again."""
        positions, examples = zip(*islice(self._stream, count))
        self.position = positions[-1]
        size = self.documents
        self.names = [f"documents {group * size + 1:,} to {group * size + size:,}" for group, _ in positions]
        return list(examples)

    def _examples(self, group: int, segment: int) -> Iterator[tuple[tuple[int, int], Ids]]:
        texts = self._texts()
        next(islice(texts, group * self.documents, group * self.documents), None)  # read past what is used up
        while True:
            ids = [
                i for encoding in self.tokenizer.encode_batch(list(islice(texts, self.documents))) for i in encoding.ids
            ]
            if len(ids) < self.length:
                raise DataError(
                    f"{self.paths[0]}: {self.documents} texts are shorter than one segment of {self.length} tokens"
                )
            draw = random.Random(f"{self.seed}/{group}")
            for number, start in enumerate(range(0, len(ids) - self.length + 1, self.length)):
                example = self._split(ids[start : start + self.length], draw)
                if number >= segment:
                    yield (group, number + 1), example
            group, segment = group + 1, 0

    def _texts(self) -> Iterator[str]:
        """The texts of all shards, again and again."""
        skip = self._count if self.skip_bad_lines else None
        while True:
            found = 0
            for path in self.paths:
                for text in read_shard(path, skip):
                    found += 1
                    yield text
            if found == 0:
                raise DataError(f"{self.paths[0]}: no text in this shard or any other")
            skip = skip and (lambda error: None)  # from now on the same lines come again

    def _count(self, error: DataError) -> None:
        self.skipped, self.first_skipped = self.skipped + 1, self.first_skipped or error


def read_shard(path: Path, skip: Callable[[DataError], None] | None = None) -> Iterator[str]:
    """The texts of a `.json.gz` shard, one JSON object with a `text` a line. Raises DataError, which names the line.

    A line of more than 16 MiB is a bad one, so that a line without an end does not fill the memory. With `skip` a bad
    line is not raised but handed to it, and the next one read; behind damage to the compression nothing can be.
    """
    number = 0
    try:
        with gzip.open(path) as file:
            for number, line in enumerate(_lines(file), start=1):
                try:
                    text = _c4_text(line)
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    bad = DataError(f"{path}: line {number} cannot be read as C4 text ({_reason(error)})")
                    if skip is None:
                        raise bad from None
                    skip(bad)
                else:
                    yield text
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be decompressed behind line {number} ({_reason(error)})") from None


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; of one that is too long no more than shows that."""
    while line := file.readline(LONGEST_LINE + 1):
        yield line
        while line and not line.endswith(b"\n"):
            line = file.readline(LONGEST_LINE + 1)


def _json_line(line: bytes) -> object:
    """What a line of JSON says. Raises ValueError, RecursionError."""
    if len(line) > LONGEST_LINE:
        raise ValueError(f"it is longer than {LONGEST_LINE:,} bytes")
    return json.loads(line.decode("utf-8"))


def _c4_text(line: bytes) -> str:
    """The text of a line. Raises ValueError, KeyError, TypeError, RecursionError."""
    text = _json_line(line)["text"]
    if not isinstance(text, str):
        raise TypeError("its text is no text")
    return valid(text)


class Batch(NamedTuple):
    """Examples as tensors: ids padded with 0, labels with -100."""

    instruction_ids: Tensor  # [B, Li]
    input_ids: Tensor  # [B, S]
    labels: Tensor  # [B, T]


def microbatches(examples: Sequence[Ids], tokens: int) -> list[list[Ids]]:
    """Examples of like lengths together, in parts of at most so many tokens each, padding counted (or of one example).

    A part that is too large is cut in two: ordered by instruction, by input or by target, at whatever place leaves the
    least padding. So one instruction seldom falls into two parts, each of which would encode it.
    """
    numbers: dict[tuple[int, ...], int] = {}
    sizes = np.array(
        [(numbers.setdefault(tuple(example.instruction), len(numbers)), *map(len, example)) for example in examples]
    )  # [B, 4]: which instruction, its length, that of the input, that of the target
    done, parts = [], [np.arange(len(examples))]
    while parts:
        part = parts.pop()
        if len(part) == 1 or _padded_tokens(sizes[part])[-1] <= tokens:
            done.append([examples[place] for place in part])
        else:
            parts += _cut_in_two(part, sizes[part])
    return done


def _cut_in_two(part: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    cuts = []
    for keys in ((2, 0, 1), (3, 2), (2, 3)):  # the last key is the first to be ordered by
        order = np.lexsort(sizes[:, keys].T)
        ordered = sizes[order]
        tokens = _padded_tokens(ordered)[:-1] + _padded_tokens(ordered[::-1])[-2::-1]
        cuts.append((tokens.min(), tokens.argmin() + 1, order))
    _, place, order = min(cuts, key=lambda cut: cut[0])
    return [part[order[:place]], part[order[place:]]]


def _padded_tokens(sizes: np.ndarray) -> np.ndarray:
    """Tokens of the first 1, 2, ..., B examples as a padded batch; each distinct instruction counts once."""
    first = np.zeros(len(sizes))
    first[np.unique(sizes[:, 0], return_index=True)[1]] = 1
    longest = np.maximum.accumulate(sizes[:, 1:])
    return first.cumsum() * longest[:, 0] + np.arange(1, len(sizes) + 1) * (longest[:, 1] + longest[:, 2])


def collate(examples: Sequence[Ids]) -> Batch:
    """Pad examples to the longest of each part."""
    instructions, inputs, targets = zip(*examples)
    return Batch(pad(instructions, PAD), pad(inputs, PAD), pad(targets, NO_LABEL))


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Lists of ids -> [B, longest], filled up on the right."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


# --------------------------------------------------------------------------------------------- a toy world

_KINDS = {
    "fruit": "apple pear lemon plum cherry melon", "animal": "tiger horse rabbit goat camel otter",
    "colour": "green purple orange silver brown yellow", "city": "london madrid cairo tokyo oslo paris",
    "tool": "hammer ladder shovel drill wrench saw", "food": "bread cheese pasta rice butter soup",
    "garment": "jacket shirt glove scarf boot hat", "sport": "tennis rugby chess golf hockey judo",
}  # fmt: skip
_KIND_OF = {word: kind for kind, words in _KINDS.items() for word in words.split()}
_ARGUMENTS = """
    pom zet quib larn voft mish drel tunk wob fep glim narv brask crell dorf ennet flin gruv hesk jilt
""".split()
_OR_LAST = " or last"  # "fruit or last" selects the fruit, or the last word where there is no fruit
_OTHERWISE = ["(else the last word)", "or else the final word", "(without one, the last word)"]
_SELECTIONS = {  # how an instruction may name each word that can be selected
    "first": ["the first word", "the word in front", "the word at the start"],
    "last": ["the last word", "the final word", "the word at the end"],
    **{kind: [f"the {kind}", f"the {kind} in it", f"the word for the {kind}"] for kind in _KINDS},
    **{
        kind + _OR_LAST: [f"the {kind} {otherwise}" for otherwise in _OTHERWISE]
        for kind in _KINDS
    },
}  # fmt: skip
_TRANSFORMATIONS = {  # what is made of a selected word, and how an instruction may say so
    "copy": (lambda word: word, ["{}", "{} as it is", "just {}"]),
    "twice": (lambda word: f"{word} {word}", ["{} twice", "{} two times", "{} repeated once"]),
    "negate": (lambda word: f"not {word}", ["{} negated", "the negation of {}", "{} with not before it"]),
    "praise": (lambda word: f"good {word}", ["{} praised", "praise for {}", "{} with good before it"]),
    "greet": (lambda word: f"hello {word}", ["{} greeted", "a greeting to {}", "{} with hello before it"]),
    "plural": (lambda word: f"{word}s", ["the plural of {}", "{} in the plural", "{} with an s at its end"]),
    "initial": (lambda word: word[0], ["the initial of {}", "the first letter of {}", "the letter that begins {}"]),
    "length": (lambda word: str(len(word)), ["the length of {}", "how long {} is", "the number of letters in {}"]),
    "kind": (_KIND_OF.__getitem__, ["the kind of {}", "what sort of thing {} is", "the category of {}"]),
}  # fmt: skip
_FRAMES = {  # where the argument goes, and how an instruction may say so
    "none": [""],
    "begin": [", but start with {}", ", after the word {}", ", with {} in front"],
    "end": [", and end with {}", ", followed by {}", ", with {} behind it"],
    "both": [", between {0} and {0}", ", with {} on both sides", ", inside a pair of {}"],
}
_VERBS = ["write", "give", "print"]
_JOINS = ["{}, then {}", "first {} and then {}", "{} and {}"]


class Slot(NamedTuple):
    """One word of the input and what is made of it."""

    selection: str
    transformation: str


class Rule(NamedTuple):
    """What a toy task asks for: one or two slots, and an argument in front, behind or on both sides."""

    slots: tuple[Slot, ...]
    frame: str
    argument: str

    def answer(self, words: list[str]) -> str:
        """The output for an input."""
        parts = [_TRANSFORMATIONS[slot.transformation][0](_select(slot.selection, words)) for slot in self.slots]
        before = [self.argument] if self.frame in ("begin", "both") else []
        behind = [self.argument] if self.frame in ("end", "both") else []
        return " ".join(before + parts + behind)

    def definition(self, draw: random.Random) -> str:
        """One of the ways to say it."""
        parts = [
            draw.choice(_TRANSFORMATIONS[slot.transformation][1]).format(draw.choice(_SELECTIONS[slot.selection]))
            for slot in self.slots
        ]
        said = parts[0] if len(parts) == 1 else draw.choice(_JOINS).format(*parts)
        return f"{draw.choice(_VERBS)} {said}{draw.choice(_FRAMES[self.frame]).format(self.argument)}."

    def draw_input(self, draw: random.Random, kinds: list[str]) -> list[str]:
        """Words of different kinds: those that the slots select, half the time those that have a fallback, and more."""
        selected = [slot.selection for slot in self.slots]
        needed = [kind for kind in kinds if kind in selected]
        doubtful = [kind for kind in kinds if kind + _OR_LAST in selected and kind not in needed]
        there = needed + [kind for kind in doubtful if draw.random() < 0.5]
        others = [kind for kind in kinds if kind not in needed + doubtful]
        there += draw.sample(others, min(len(others), max(0, draw.randint(3, 5) - len(there))))
        draw.shuffle(there)
        return [draw.choice(_KINDS[kind].split()) for kind in there]


def _select(selection: str, words: list[str]) -> str:
    if selection in ("first", "last"):
        return words[0] if selection == "first" else words[-1]
    found = [word for word in words if _KIND_OF[word] == selection.removesuffix(_OR_LAST)]
    return found[0] if found else words[-1]


class ToyWorld(NamedTuple):
    """Tasks to train on, and two sets of tasks that ask for something never trained."""

    train: list[Task]
    unseen_arguments: list[Task]  # an argument together with a selection that it never met
    unseen_compositions: list[Task]  # a transformation before another that it never preceded
    rules: dict[str, Rule]  # what the definition of each task means, by the task's name


def toy_world(seed: int, tasks: int = 5000, instances: int = 12, kinds: int = 6, arguments: int = 12) -> ToyWorld:
    """Short lists of words, and instructions such as "give the plural of the fruit, then the first word twice"."""
    draw = random.Random(f"toy/{seed}")
    held_out = _HeldOut(draw, list(_KINDS)[:kinds], _ARGUMENTS[:arguments])

    rules: dict[str, Rule] = {}

    def some(part: str, count: int, size: int) -> list[Task]:
        names = [f"{part}-{number}" for number in range(count)]
        rules.update((name, held_out.draw_rule(part)) for name in names)
        return [_task(name, rules[name], draw, held_out.kinds, size) for name in names]

    return ToyWorld(
        some("train", tasks, instances), some("unseen-arguments", 64, 4), some("unseen-compositions", 64, 4), rules
    )


class _HeldOut:
    """What is kept from training: a fifth of the pairs (argument, selection), and pairs of transformations in a row.

    Each transformation precedes `successors` others, and follows as many, only in the unseen compositions.
    """

    successors = 2

    def __init__(self, draw: random.Random, kinds: list[str], arguments: list[str]) -> None:
        self.draw, self.kinds, self.arguments = draw, kinds, arguments
        self.selections = ["first", "last", *kinds, *(kind + _OR_LAST for kind in kinds)]
        ring = draw.sample(list(_TRANSFORMATIONS), len(_TRANSFORMATIONS))
        self.compositions = {
            (ring[i - step], ring[i]) for i in range(len(ring)) for step in range(1, 1 + self.successors)
        }
        pairs = list(product(arguments, self.selections))
        self.pairs = set(draw.sample(pairs, len(pairs) // 5))

    def draw_rule(self, part: str) -> Rule:
        """A rule of a part of the world: of which kind it is decides which of the held-out pairs it must have."""
        while True:
            rule = self._any_rule()
            composed = tuple(slot.transformation for slot in rule.slots) in self.compositions
            paired = any((rule.argument, slot.selection) in self.pairs for slot in rule.slots)
            if (paired, composed) == (part == "unseen-arguments", part == "unseen-compositions"):
                return rule

    def _any_rule(self) -> Rule:
        count = 1 if self.draw.random() < 0.3 else 2
        slots = tuple(
            Slot(self.draw.choice(self.selections), self.draw.choice(list(_TRANSFORMATIONS))) for _ in range(count)
        )
        frame = self.draw.choice(list(_FRAMES))
        return Rule(slots, frame, "" if frame == "none" else self.draw.choice(self.arguments))


def _task(name: str, rule: Rule, draw: random.Random, kinds: list[str], instances: int) -> Task:
    """A task with five positive examples and so many instances, no input twice."""
    texts: dict[str, str] = {}  # in the order drawn
    while len(texts) < 5 + instances:
        words = rule.draw_input(draw, kinds)
        texts[" ".join(words)] = rule.answer(words)
    pairs = list(texts.items())
    shown = tuple(Example(*pair) for pair in pairs[:5])
    asked = tuple(Instance(f"{name}-{number}", text, (answer,)) for number, (text, answer) in enumerate(pairs[5:]))
    return Task(name, rule.definition(draw), shown, asked)


def vague(world: ToyWorld) -> ToyWorld:
    """The same tasks; definitions say "what" in place of the argument ("..., followed by what."), which examples tell."""

    def without_argument(task: Task) -> Task:
        argument = world.rules[task.name].argument
        return replace(task, definition=re.sub(rf"\b{argument}\b", "what", task.definition)) if argument else task

    parts = (world.train, world.unseen_arguments, world.unseen_compositions)
    return ToyWorld(*(list(map(without_argument, tasks)) for tasks in parts), world.rules)


def write_toy_world(folder: str | os.PathLike, world: ToyWorld) -> None:
    """A toy world in the layout of Super-NaturalInstructions, with `tokenizer.json`, and `corpus.json.gz` in that of
    C4: a text for each training task, which says what it asks for and then works through its instances.
    """
    folder = Path(folder)
    splits = {"train": world.train, "test": world.unseen_arguments + world.unseen_compositions}
    for path in (folder / "tasks", folder / "splits" / "default"):
        path.mkdir(parents=True, exist_ok=True)
    for split, tasks in splits.items():
        Path(folder, "splits", "default", f"{split}_tasks.txt").write_text("\n".join(task.name for task in tasks))
        for task in tasks:
            found = {
                "Definition": [task.definition],
                "Positive Examples": [example._asdict() for example in task.examples],
                "Instances": [{"id": i.id, "input": i.input, "output": i.references} for i in task.instances],
            }
            Path(folder, "tasks", f"{task.name}.json").write_text(json.dumps(found))
    with gzip.open(folder / "corpus.json.gz", "wt") as file:
        for task in world.train:
            lines = [f"Input: {i.input}. Output: {i.references[0]}." for i in task.instances]
            file.write(json.dumps({"text": " ".join([task.definition, *lines])}) + "\n")
    toy_tokenizer().save(str(folder / "tokenizer.json"))  # last, so that where it is, all of it is


def toy_tokenizer() -> Tokenizer:
    """Every word of the toy world and of the prompt formats is a token, and so is every punctuation mark."""
    words = list(_KIND_OF)
    texts = [
        *words,
        *_ARGUMENTS,
        *_VERBS,
        *_JOINS,
        *(text for said in (*_SELECTIONS.values(), *_FRAMES.values()) for text in said),
    ]
    for transform, said in _TRANSFORMATIONS.values():
        texts += [*said, *map(transform, words)]
    texts.append("Definition: Positive Example 1 2 3 4 - Now complete the following example - Input: Output: , .")
    split = pre_tokenizers.BertPreTokenizer()  # at spaces and punctuation
    known = sorted({token for text in texts for token, _ in split.pre_tokenize_str(text)} - {"{", "}"})
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(
        models.WordLevel({token: number for number, token in enumerate(special + known)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(special)
    return tokenizer


# --------------------------------------------------------------------------------------------- metrics


def exact_match(prediction: str, reference: str) -> bool:
    """Equal but for case, ASCII punctuation and runs of spaces."""
    return _plain(prediction) == _plain(reference)


def _plain(text: str) -> str:
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


def rouge_l(prediction: str, reference: str) -> float:
    """F1 of the longest common subsequence of stemmed words, in 0...1; equal to rouge-score with use_stemmer=True."""
    said, wanted = _words(prediction), _words(reference)
    common = _longest_common_subsequence(said, wanted)
    if common == 0:
        return 0.0
    precision, recall = common / len(said), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def score(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Exact match and ROUGE-L in percent: the best over the references of each example, the mean over examples."""
    if len(predictions) != len(references) or not predictions:
        raise ValueError(f"{len(predictions)} predictions and {len(references)} lists of references do not match")

    def mean(metric: Callable[[str, str], float]) -> float:
        best = [max(metric(said, reference) for reference in wanted) for said, wanted in zip(predictions, references)]
        return 100 * math.fsum(best) / len(best)

    return {"exact_match": mean(exact_match), "rougeL": mean(rouge_l)}


def _words(text: str) -> list[str]:
    words = (_stem(word) if len(word) > 3 else word for word in re.findall("[a-z0-9]+", text.lower()))
    return [word for word in words if word]


def _longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Its length, one row of the table a step, held in the bits of one whole number (Hyyrö, 2004).

    Bit i of `row` is zero where the common length of a[:i+1] and the part of b read so far exceeds that of a[:i].
    """
    places: dict[str, int] = defaultdict(int)
    for place, word in enumerate(a):
        places[word] |= 1 << place
    full = row = (1 << len(a)) - 1
    for word in b:
        matched = row & places.get(word, 0)
        row = ((row + matched) | (row - matched)) & full
    return len(a) - row.bit_count()


# The stemmer of Porter (1980) with the departures of NLTK, which the benchmark's scorer calls.

_IRREGULAR = {
    "skies": "sky", "dying": "die", "lying": "lie", "tying": "tie", "news": "news", "innings": "inning",
    "inning": "inning", "outings": "outing", "outing": "outing", "cannings": "canning", "canning": "canning",
    "howe": "howe", "proceed": "proceed", "exceed": "exceed", "succeed": "succeed",
}  # fmt: skip
_STEP_2 = (
    ("ational", "ate"), ("tional", "tion"), ("enci", "ence"), ("anci", "ance"), ("izer", "ize"), ("bli", "ble"),
    ("alli", "al"), ("entli", "ent"), ("eli", "e"), ("ousli", "ous"), ("ization", "ize"), ("ation", "ate"),
    ("ator", "ate"), ("alism", "al"), ("iveness", "ive"), ("fulness", "ful"), ("ousness", "ous"), ("aliti", "al"),
    ("iviti", "ive"), ("biliti", "ble"), ("fulli", "ful"),
)  # fmt: skip
_STEP_3 = (
    ("icate", "ic"), ("ative", ""), ("alize", "al"), ("iciti", "ic"), ("ical", "ic"), ("ful", ""), ("ness", ""),
)  # fmt: skip
_STEP_4 = (
    "al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ion", "ou", "ism", "ate", "iti",
    "ous", "ive", "ize",
)  # fmt: skip


def _shape(word: str) -> str:
    """A `c` for each consonant and a `v` for each vowel; y is a vowel behind a consonant."""
    shape = ""
    for letter in word:
        shape += "v" if letter in "aeiou" or letter == "y" and shape.endswith("c") else "c"
    return shape


def _measure(stem: str) -> int:
    """How often vowels are followed by consonants: the m of Porter's rules."""
    return _shape(stem).count("vc")


def _ends_short(stem: str) -> bool:
    """Porter's *o: consonant, vowel, consonant other than w, x, y; NLTK also takes two letters, vowel and consonant."""
    shape = _shape(stem)
    return shape == "vc" or shape.endswith("cvc") and stem[-1] not in "wxy"


@lru_cache(maxsize=1 << 16)
def _stem(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    word = _without_plural(word)  # step 1a
    word = _without_ed_and_ing(word)  # step 1b
    if word.endswith("y") and len(word) > 2 and _shape(word[:-1]).endswith("c"):  # step 1c
        word = word[:-1] + "i"
    word = _step_2(word)
    word = _replace(word, _STEP_3)
    word = _step_4(word)
    if word.endswith("e"):  # step 5a
        stem = word[:-1]
        if _measure(stem) > 1 or _measure(stem) == 1 and not _ends_short(stem):
            word = stem
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word


def _without_plural(word: str) -> str:
    if word.endswith("ies"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("sses"):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _without_ed_and_ing(word: str) -> str:
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    for suffix in ("ed", "ing"):
        stem = word.removesuffix(suffix)
        if stem != word and "v" in _shape(stem):
            return _mended(stem)
    return word


def _mended(stem: str) -> str:
    """Give back what -ed and -ing took: hop(p)ing -> hop, fil(e)ing -> file."""
    if stem.endswith(("at", "bl", "iz")):
        return stem + "e"
    if stem[-2:-1] == stem[-1] and _shape(stem).endswith("c"):
        return stem if stem[-1] in "lsz" else stem[:-1]
    return stem + "e" if _measure(stem) == 1 and _ends_short(stem) else stem


def _step_2(word: str) -> str:
    if word.endswith("alli") and _measure(word[:-4]) > 0:
        return _step_2(word[:-2])
    if word.endswith("logi") and not any(word.endswith(suffix) for suffix, _ in _STEP_2):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    return _replace(word, _STEP_2)


def _replace(word: str, rules: Sequence[tuple[str, str]]) -> str:
    """The first rule whose suffix fits decides; it acts where something with a measure above 0 remains."""
    for suffix, replacement in rules:
        if word.endswith(suffix):
            stem = word.removesuffix(suffix)
            return stem + replacement if _measure(stem) > 0 else word
    return word


def _step_4(word: str) -> str:
    for suffix in _STEP_4:
        if word.endswith(suffix):
            stem = word.removesuffix(suffix)
            removable = _measure(stem) > 1 and (suffix != "ion" or stem[-1] in "st")
            return stem if removable else word
    return word
