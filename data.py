"""Text in, ids out: prompt formats, Super-NaturalInstructions, P3, pretraining chunks, batches, metrics, a toy world.

Nothing here knows of a model. A task, real or toy, is a `Task`, and a prompt format turns a task into `Ids`.
A source hands out `Ids` without end, `microbatches` groups them, and `collate` pads a group to a `Batch`.

Axes: B examples, Li instruction tokens, S input tokens, T target tokens.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import random
import re
import string
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, count, islice, product
from pathlib import Path
from typing import Iterator, NamedTuple, Sequence

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from t5 import InputError, fetch, one_line, read_json, reading, replacing

PAD, EOS, UNKNOWN, NO_LABEL = 0, 1, 2, -100
NOTHING = [EOS]  # the ids of an empty instruction
MASK = "[MASK]"  # marks each field of the instance in the instruction of a prompted example (P3)


# --------------------------------------------------------------------------------------------- what a model reads


class Ids(NamedTuple):
    """One example as ids. Each part ends in `</s>`."""

    instruction: list[int]  # read by the hypernetwork
    input: list[int]  # read by T5
    target: list[int]  # to be answered


class PromptFormat:
    """Text of a task as a system reads it, its limits in tokens, and the number of positive examples shown."""

    def __init__(
        self, tokenizer: Tokenizer, examples: int = 0, max_instruction: int = 1024, max_input: int = 1024,
        tasks: Sequence[str] = (),  # names of the training tasks, for TaskNumberFormat
    ) -> None:  # fmt: skip
        self.tokenizer, self.examples = tokenizer, examples
        self.max_instruction, self.max_input = max_instruction, max_input
        self.trained = {name: number for number, name in enumerate(tasks)}

    def __call__(self, task: Task) -> list[tuple[list[int], list[int]]]:
        """Return (instruction ids, input ids) per instance. All instances share one list as the instruction."""
        instruction = self.instruction_ids(task)
        encodings = self.tokenizer.encode_batch([instance.input for instance in task.instances])
        return [(instruction, cut(encoding.ids, self.max_input)) for encoding in encodings]

    def instruction_ids(self, task: Task) -> list[int]:
        """Return the ids that the hypernetwork reads."""
        return NOTHING


class NoInstructFormat(PromptFormat):
    """The bare input without an instruction. On P3 in the joint setting, this is the prompt of T0."""


class HINTFormat(PromptFormat):
    """The instruction for the hypernetwork and the bare input for T5, in the words of the authors' code.

    `Def`: the definition alone. `Def + 2 Pos`: the second example, the first, then `Definition: ...`.
    An example is left out if the instruction would become too long, and the next example is tried.
    """

    def instruction(self, task: Task) -> str:
        """Return the text for the hypernetwork. Raises InputError for few-shot P3, whose files hold no examples."""
        if self.examples == 0:
            return task.definition
        if task.prompted and not task.examples:
            raise InputError(f"{task.name}: P3 files hold no positive examples; show 0 examples")
        text = f"Definition: {task.definition}"
        for number, example in enumerate(task.examples[: self.examples], start=1):
            longer = _example(number, example) + text
            if len(self.tokenizer.encode(longer).ids) <= self.max_instruction:
                text = longer
        return text

    def instruction_ids(self, task: Task) -> list[int]:
        return cut(self.tokenizer.encode(self.instruction(task)).ids, self.max_instruction)


class TkInstructFormat(PromptFormat):
    """Tk-Instruct's prompt: definition, examples and the instance as a query, all in the input of T5.

    Examples are added as long as the prompt fits. The published code cuts an overlong prompt on the right, which loses
    the query. Here the text before the query is cut first, then the end of the instance's text.
    """

    def prompt(self, task: Task, instance: Instance) -> tuple[str, str]:
        """Return the text before the query, and the query. Raises InputError for P3, where the prompt is nonsense."""
        if task.prompted:
            raise InputError(f"{task.name}: Tk-Instruct's prompt does not suit P3; use the joint setting without it")
        definition = with_period(f"Definition: {task.definition}") + "\n\n"
        query = with_period(f"Now complete the following example -\nInput: {instance.input}") + "\nOutput: "
        examples = ""
        for number, example in enumerate(task.examples[: self.examples], start=1):
            longer = examples + _example(number, example) + "\n"
            if len(self.tokenizer.encode(definition + longer + query).ids) > self.max_input:
                break
            examples = longer
        return definition + examples, query

    def __call__(self, task: Task) -> list[tuple[list[int], list[int]]]:
        inputs = []
        for before, query in (self.prompt(task, instance) for instance in task.instances):
            ids = self.tokenizer.encode(before + query).ids
            if len(ids) > self.max_input:
                question, output = (self.tokenizer.encode(text).ids for text in query.rsplit("\n", 1))
                ids = question[:-1][: self.max_input - len(output)] + output
                ids = self.tokenizer.encode(before).ids[:-1][: self.max_input - len(ids)] + ids
            inputs.append((NOTHING, ids))
        return inputs


class TaskNumberFormat(PromptFormat):
    """Hyperformer's format: the bare input, and the number of the task as a row of an embedding table, not as text."""

    fitted: dict[str, int] = {}  # numbers of the tasks whose embeddings were fitted after training

    def instruction_ids(self, task: Task) -> list[int]:
        return [{**self.trained, **self.fitted}[task.name]]

    def number_new(self, tasks: Sequence[Task]) -> list[Task]:
        """Number the tasks that were not trained on, and return them. Raises InputError if one shows no example."""
        new = [task for task in tasks if task.name not in self.trained]
        if empty := [task.name for task in new if not task.examples[: self.examples]]:
            raise InputError(f"{empty[0]}: was not trained on and shows no example to fit an embedding to")
        self.fitted = {task.name: len(self.trained) + number for number, task in enumerate(new)}
        return new

    def shots(self, tasks: Sequence[Task]) -> list[Ids]:
        """Encode the positive examples shown of each task as if they were instances."""
        encode = self.tokenizer.encode
        return [
            Ids([self.fitted[task.name]], cut(encode(example.input).ids, self.max_input), encode(example.output).ids)
            for task in tasks
            for example in task.examples[: self.examples]
        ]


def _example(number: int, example: Example) -> str:
    source, target = with_period(f"Input: {example.input}"), with_period(f"Output: {example.output}")
    return f" Positive Example {number} -\n{source}\n {target}\n"


def with_period(text: str) -> str:
    """Append a period unless the text ends in punctuation, as Tk-Instruct does for every field."""
    return text if text[-1] in string.punctuation else text + "."


def cut(ids: list[int], max_length: int) -> list[int]:
    """Keep at most `max_length` ids, the last still `</s>`, which the authors' code loses."""
    return ids if len(ids) <= max_length else [*ids[: max_length - 1], EOS]


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
    choices: tuple[str, ...] = ()  # the possible answers, if their number is limited


@dataclass(frozen=True)
class Task:
    """A task of Super-NaturalInstructions, of the toy world, or a template of a P3 data set."""

    name: str  # P3: the data set, shared by all of its templates
    definition: str  # P3: the template, which tells tasks of one name apart
    examples: tuple[Example, ...]
    instances: tuple[Instance, ...]
    category: str = ""  # Super-NaturalInstructions: the first of `Categories`
    prompted: bool = False  # True for P3


def load_tasks(
    folder: str | os.PathLike, split: str, max_instances: int = 100, *, joint: bool = False, cap: int = 500_000
) -> list[Task]:
    """Read the tasks of a split. Raises InputError.

    Super-NaturalInstructions: `splits/default/SPLIT_tasks.txt`, `tasks/*.json`. As in the authors' code, instances of
    a training task are shuffled with a fixed seed, then `max_instances` taken. Other splits take the first ones.

    P3: `SPLIT.jsonl`, if there is no `splits/default`. A template takes its first `max_instances`. As in T0, each of a
    data set's k templates takes at most cap // k. `joint`: an input is the whole prompt, not its fields alone.
    """
    listing, prompted = Path(folder, "splits", "default", f"{split}_tasks.txt"), Path(folder, f"{split}.jsonl")
    if prompted.is_file() and not listing.parent.is_dir():
        return _load_prompted(prompted, max_instances, joint, cap)
    if not listing.is_file():
        raise InputError(f"{folder}: holds neither splits/default/{listing.name} (and tasks/) nor {prompted.name}")
    if joint:
        raise InputError(f"{folder}: is not P3 ({prompted.name}), which alone has a joint setting")
    with reading(listing):
        lines = listing.read_bytes().decode("utf-8-sig").split("\n")
        names = dict.fromkeys(line.strip() for line in lines if line.strip())  # a task listed twice counts once
        if not names:
            raise ValueError("the split is empty")
        if absent := [name for name in names if not Path(folder, "tasks", f"{name}.json").is_file()]:
            raise ValueError(f"tasks/ has no file of {absent[0]!r}")
    return [_load_task(Path(folder, "tasks", f"{name}.json"), max_instances, split == "train") for name in names]


def _load_task(path: Path, max_instances: int, shuffled: bool) -> Task:
    content = read_json(path)
    with reading(path):
        positive = content.get("Positive Examples", [])
        examples = [Example(valid(example["input"]), valid(example["output"])) for example in positive]
        numbered = list(enumerate(content["Instances"]))
        if shuffled:
            random.Random(42).shuffle(numbered)
        instances = []
        for number, instance in numbered[:max_instances]:
            name = valid(str(instance.get("id") or f"{path.stem}-{number}"))
            instances.append(Instance(name, valid(instance["input"]), _texts(instance["output"])))
        if not instances or not all(instance.references for instance in instances):
            raise ValueError("no instances, or one without an output")
        definition, category = _texts(content["Definition"])[0], "".join(_texts(content.get("Categories", ""))[:1])
    return Task(path.stem, definition, tuple(examples), tuple(instances), category)


def _load_prompted(path: Path, max_instances: int, joint: bool, cap: int) -> list[Task]:
    """Read prompted examples, a JSON object a line. Examples of one data set and one instruction form a task."""
    templates: dict[tuple[str, str], list[Instance]] = {}
    with reading(path), open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            with reading(f"{path}: line {number}"):
                content = json.loads(line.decode("utf-8-sig"))
                name, instruction, target = (valid(content[key]) for key in ("task", "instruction", "target"))
                fields, choices = _texts(content["input"]), _texts(content.get("choices") or [])
                if choices and target not in choices:
                    raise ValueError("the target is none of the choices")
                text = "\n".join(dict.fromkeys(fields))  # to T5's tokenizer a line end is a space
                if joint:
                    before, *after = instruction.split(MASK)
                    if len(fields) != len(after):
                        raise ValueError(f"the instruction has {len(after)} {MASK} for {len(fields)} fields of input")
                    text = before + "".join(chain(*zip(fields, after)))
                own_id = valid(str(content.get("id") or f"{name}-{number}"))
            instances = templates.setdefault((name, instruction), [])
            if len(instances) < max_instances:
                instances.append(Instance(own_id, text.strip(), (target,), choices))
        if not templates:
            raise ValueError("the split is empty")
    sharing = Counter(name for name, _ in templates)
    return [
        Task(name, instruction, (), tuple(instances[: cap // sharing[name]]), prompted=True)
        for (name, instruction), instances in templates.items()
    ]


def _texts(content: object) -> tuple[str, ...]:
    """Return a text, or a list of texts, as a tuple of texts."""
    texts = [content] if isinstance(content, str) else content
    if not isinstance(texts, list):
        raise ValueError(f"{texts!r:.80} stands where a list of texts is expected")
    return tuple(map(valid, texts))


def read_lines(file: str) -> Iterator[str]:
    """Yield the lines of a text file, or of standard input if the file is `-`. Raises InputError."""
    place, is_file = (0, False) if file == "-" else (file, True)
    with reading(file), open(place, encoding="utf-8-sig", newline="\n", closefd=is_file) as lines:
        yield from (line.removesuffix("\n") for line in lines)


def valid(text: str) -> str:
    """Strip a text, and put `?` for halves of characters, which JSON allows and tokenizers refuse."""
    if not isinstance(text, str):
        raise ValueError(f"{text!r:.80} stands where a text is expected")
    return text.encode("utf-8", "replace").decode("utf-8").strip()


# --------------------------------------------------------------------------------------------- sources of examples


def encode_tasks(tasks: Sequence[Task], prompts: PromptFormat, max_target: int, seed: int) -> list[Ids]:
    """Encode all instances of tasks as training examples. Of several references one is drawn, once."""
    draw = random.Random(seed)
    examples = []
    for task in tasks:
        answers = [draw.choice(instance.references) for instance in task.instances]
        targets = [cut(encoding.ids, max_target) for encoding in prompts.tokenizer.encode_batch(answers)]
        examples += [Ids(*ids, target) for ids, target in zip(prompts(task), targets)]
    return examples


class Shuffled:
    """Examples in a new random order each epoch, without end. The order depends on the seed alone.

    Runs of `group` consecutive examples stay together. Such a run is of one task if `group` divides the task's size.
    """

    def __init__(
        self, examples: Sequence[Ids], seed: int, position: int = 0, group: int = 1, tasks: Sequence[Task] = ()
    ) -> None:
        self.examples, self.seed, self.group = examples, seed, group
        self.position = position  # number of examples taken so far, all that a resumed run needs
        self._epoch, self._order = -1, []
        self._names = [task.name for task in tasks for _ in task.instances]
        self.names: list[str] = []  # the tasks of the examples taken last

    def take(self, count: int) -> list[Ids]:
        """Return the next `count` examples."""
        places, size = [], len(self.examples)
        for position in range(self.position, self.position + count):
            epoch, place = divmod(position, size)
            if epoch != self._epoch:
                groups = [range(start, min(start + self.group, size)) for start in range(0, size, self.group)]
                random.Random(f"{self.seed}/{epoch}").shuffle(groups)
                self._epoch, self._order = epoch, list(chain(*groups))
            places.append(self._order[place])
        self.position += count
        self.names = [self._names[place] if self._names else f"example {place}" for place in places]
        return [self.examples[place] for place in places]


def split_for_hint(ids: list[int], draw: random.Random) -> Ids:
    """Split a segment at two random points into instruction, input and target, each ended by `</s>` (section 3.3)."""
    first = draw.randint(1, len(ids) - 3)
    second = draw.randint(first, len(ids) - 3)
    return Ids(*([*part, EOS] for part in (ids[:first], ids[first:second], ids[second:])))


def split_for_caclm(ids: list[int], draw: random.Random) -> Ids:
    """Split a segment as in CACLM (Phang et al., 2022; Table 4): the instruction goes on after the target."""
    first = draw.randint(1, len(ids) - 5)
    second = draw.randint(first, len(ids) - 4)
    third = draw.randint(second + 1, len(ids) - 3)  # the authors' bounds, except that no target is empty
    around = [*ids[:first], EOS, *ids[third:]]
    return Ids(*([*part, EOS] for part in (around, ids[first:second], ids[second:third])))


OBJECTIVES = {"hint": split_for_hint, "caclm": split_for_caclm}


class PretrainingChunks:
    """Examples from plain text for pretraining the hypernetwork (section 3.3), streamed from shards in the form of C4.

    As in the authors' code, 128 documents at a time are concatenated, each ended by `</s>`, and cut into segments of
    `length` tokens. The rest is dropped. OBJECTIVES[split] splits each segment.
    `skip_bad_lines`: leave out lines without text, counted in `skipped`.
    """

    documents = 128

    def __init__(
        self, paths: Sequence[str | os.PathLike], tokenizer: Tokenizer, length: int, seed: int,
        position: Sequence[int] = (0, 0), skip_bad_lines: bool = False, split: str = "hint",
    ) -> None:  # fmt: skip
        self.paths, self.tokenizer, self.length, self.seed = [Path(path) for path in paths], tokenizer, length, seed
        if absent := [path for path in self.paths if not path.is_file()]:  # or the last shard fails after hours
            raise InputError(f"{absent[0]}: is not a file; name the files of the corpus one by one")
        self._split = OBJECTIVES[split]
        self.position = tuple(position)  # (groups of documents used up, segments taken from the next group)
        self.names: list[str] = []  # the documents of the segments taken last
        self.skip_bad_lines, self.skipped, self.first_skipped = skip_bad_lines, 0, None
        stream = self._examples(*self.position)
        self._stream = chain([next(stream)], stream)  # an unreadable corpus is refused before the run begins

    def take(self, count: int) -> list[Ids]:
        """Return the next `count` examples. The first shard follows the last."""
        positions, examples = zip(*islice(self._stream, count))
        self.position = positions[-1]
        ends = [self.documents * (group + 1) for group, _ in positions]
        self.names = [f"documents {end - self.documents + 1:,} to {end:,}" for end in ends]
        return list(examples)

    def _examples(self, group: int, segment: int) -> Iterator[tuple[tuple[int, int], Ids]]:
        texts = self._texts()
        next(islice(texts, group * self.documents, group * self.documents), None)  # skip the documents used up
        while True:
            encodings = self.tokenizer.encode_batch(list(islice(texts, self.documents)))
            ids = [i for encoding in encodings for i in encoding.ids]
            if len(ids) < self.length:
                raise InputError(f"{self.paths[0]}: {self.documents} texts hold fewer than {self.length} tokens")
            draw = random.Random(f"{self.seed}/{group}")
            for number, start in enumerate(range(0, len(ids) - self.length + 1, self.length)):
                example = self._split(ids[start : start + self.length], draw)
                if number >= segment:
                    yield (group, number + 1), example
            group, segment = group + 1, 0

    def _texts(self) -> Iterator[str]:
        """Yield the texts of all shards, again and again."""
        for epoch in count():
            empty = True
            for text in chain.from_iterable(map(read_shard, self.paths)):
                if isinstance(text, str):
                    empty = False
                    yield text
                elif not self.skip_bad_lines:
                    raise text
                elif epoch == 0:  # later epochs meet the same bad lines
                    self.skipped, self.first_skipped = self.skipped + 1, self.first_skipped or text
            if empty:
                raise InputError(f"{self.paths[0]}: no text in this shard or any other")


def read_shard(path: Path) -> Iterator[str | InputError]:
    """Yield the `text` of each JSON line of a shard, `.gz` or plain, or an error in its place. Raises InputError."""
    with reading(path), (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        for number, line in enumerate(file, start=1):  # of bytes, so that a lone carriage return ends no line
            try:
                with reading(f"{path}: line {number}"):
                    text = valid(json.loads(line.decode("utf-8-sig"))["text"])
            except InputError as error:
                text = error
            yield text


# --------------------------------------------------------------------------------------------- batches


class Batch(NamedTuple):
    """Examples as tensors: ids padded with 0, labels with -100."""

    instruction_ids: Tensor  # [B, Li]
    input_ids: Tensor  # [B, S]
    labels: Tensor  # [B, T]


def microbatches(examples: Sequence[Ids], tokens: int, price: int = 0) -> list[list[Ids]]:
    """Split a batch into parts that cost at most `tokens` each, or hold a single example.

    A part costs its padded tokens, with each distinct instruction counted once, and `price` per distinct instruction:
    the generator's work for one instruction, in tokens. First, examples of one instruction are cut by length if they
    cost too much, or if the padding saved exceeds the cost of another pass of the instruction. Then these groups are
    divided among parts. However long an instruction is, its examples may take up half of `tokens`.
    """
    numbers: dict[tuple[int, ...], int] = {}
    sizes = [(numbers.setdefault(tuple(ids.instruction), len(numbers)), 1, *map(len, ids)) for ids in examples]
    rows = np.array(sizes)  # [B, 5]: number of the instruction, examples, longest instruction, input and target
    if _costs(rows, price)[-1] <= tokens:
        return [list(examples)]
    groups = []
    for number in range(len(numbers)):
        same = np.flatnonzero(rows[:, 0] == number)
        limit = max(tokens, price + rows[same[0], 2] + tokens // 2)
        groups += [same[group] for group in _divide(rows[same], limit, price, saving=True)]
    rows = np.array([(rows[group[0], 0], len(group), *rows[group, 2:].max(0)) for group in groups])
    return [[examples[i] for group in part for i in groups[group]] for part in _divide(rows, tokens, price)]


def _divide(rows: np.ndarray, limit: int, price: int, saving: bool = False) -> list[np.ndarray]:
    """Cut rows in two where the cost is least, until all parts fit -> rows per part. `saving`: cut on while it pays."""
    done, parts = [], [np.arange(len(rows))]
    while parts:
        part = parts.pop()
        cost = _costs(rows[part], price)[-1]
        cuts = []
        if len(part) > 1 and (cost > limit or saving):
            for keys in ((3, 0, 2), (4, 3), (3, 4)):  # by instruction, input, target (the last key goes first)
                order = part[np.lexsort(rows[part][:, keys].T)]
                costs = _costs(rows[order], price)[:-1] + _costs(rows[order[::-1]], price)[-2::-1]
                costs = costs + abs(np.linspace(-0.5, 0.5, len(costs)))  # of equal costs, take the one in the middle
                cuts.append((costs.min(), np.split(order, [costs.argmin() + 1])))
        least, halves = min(cuts, key=lambda cut: cut[0], default=(cost, []))
        if halves and (cost > limit or least < cost):
            parts += halves
        else:
            done.append(part)
    return done


def _costs(rows: np.ndarray, price: int) -> np.ndarray:
    """Return the cost of the first 1, 2, ... rows as one padded part."""
    first = np.zeros(len(rows), dtype=int)
    first[np.unique(rows[:, 0], return_index=True)[1]] = 1
    longest = np.maximum.accumulate(rows[:, 2:])
    return first.cumsum() * (longest[:, 0] + price) + rows[:, 1].cumsum() * (longest[:, 1] + longest[:, 2])


def collate(examples: Sequence[Ids]) -> Batch:
    """Pad examples to the longest instruction, input and target."""
    return Batch(*map(pad, zip(*examples), (PAD, PAD, NO_LABEL)))


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Lists of ids, padded on the right -> [B, longest]."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


# --------------------------------------------------------------------------------------------- metrics


def exact_match(prediction: str, reference: str) -> bool:
    """Compare two texts regardless of case, ASCII punctuation and runs of spaces."""
    texts = [text.lower().translate(str.maketrans("", "", string.punctuation)) for text in (prediction, reference)]
    return texts[0].split() == texts[1].split()


def rouge_l(prediction: str, reference: str) -> float:
    """F1 of the longest common subsequence of stemmed words, in 0...1, as in rouge-score with use_stemmer=True."""
    words = [re.findall("[a-z0-9]+", text.lower()) for text in (prediction, reference)]
    predicted, expected = ([_stem(word) if len(word) > 3 else word for word in several] for several in words)
    places: dict[str, int] = defaultdict(int)
    for place, word in enumerate(predicted):
        places[word] |= 1 << place
    # One integer holds a row of the table (Hyyrö, 2004). Bit i of `row` is zero if the common length of
    # predicted[: i + 1] and the part of `expected` read so far exceeds that of predicted[:i].
    full = row = (1 << len(predicted)) - 1
    for word in expected:
        matched = row & places.get(word, 0)
        row = ((row + matched) | (row - matched)) & full
    common = len(predicted) - row.bit_count()
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(expected)
    return 2 * precision * recall / (precision + recall)


def score(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Exact match and ROUGE-L in percent: the best over the references of each example, the mean over examples."""
    if len(predictions) != len(references) or not predictions:
        raise ValueError(f"{len(predictions)} predictions and {len(references)} lists of references do not match")
    means = {}
    for name, metric in (("exact_match", exact_match), ("rougeL", rouge_l)):
        best = [max(metric(text, wanted) for wanted in several) for text, several in zip(predictions, references)]
        means[name] = 100 * math.fsum(best) / len(best)
    return means


def scores(rows: Sequence[dict]) -> dict[str, float]:
    """Score predictions, dictionaries with `prediction` and `references`, in percent."""
    return score([row["prediction"] for row in rows], [row["references"] for row in rows])


def groups_of(rows: Sequence[dict], tasks: Sequence[Task]) -> dict[str, list[dict]]:
    """Group the predictions of tasks, in their order, by task, by template of P3, and by category of SNI."""
    groups: dict[str, list[dict]] = {}
    for name_of in (
        lambda task: task.name,
        lambda task: f"{task.name}: {one_line(task.definition)}" if task.prompted else None,
        lambda task: f"category {task.category}" if task.category else None,
    ):
        names = [name_of(task) for task in tasks for _ in task.instances]
        for name, row in zip(names, rows, strict=True):
            if name is not None:
                groups.setdefault(name, []).append(row)
    return groups


def report(rows: list[dict], groups: dict[str, list[dict]], out: Path) -> None:
    """Write `predictions.jsonl` and `metrics.json`, and print the scores of each group of rows and of all rows."""
    table = {name: scores(group) for name, group in {**groups, "overall": rows}.items()}
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    for name, text in (("predictions.jsonl", "".join(lines)), ("metrics.json", json.dumps(table, indent=2) + "\n")):
        with replacing(out / name) as file:
            file.write(text.encode("utf-8"))
    width = max(map(len, table))
    print(f"\n{'':{width}}  exact match  ROUGE-L")
    for name, row in table.items():
        print(f"{name:{width}}  {row['exact_match']:11.1f}  {row['rougeL']:7.1f}")


# --------------------------------------------------------------------------------------------- files of tokenizers


def load_tokenizer(name_or_dir_or_file: str | os.PathLike) -> Tokenizer:
    """Load `tokenizer.json`, else `spiece.model`, of a public name or folder, or either file. Raises InputError."""
    path = Path(name_or_dir_or_file)
    if not path.is_file():
        path = fetch(name_or_dir_or_file, "tokenizer.json") or fetch(name_or_dir_or_file, "spiece.model")
    if path is None:
        raise InputError(f"{name_or_dir_or_file}: has neither tokenizer.json nor spiece.model")
    with reading(path):
        content = path.read_bytes()
        tokenizer = _from_spiece(content) if path.suffix != ".json" else Tokenizer.from_str(content.decode("utf-8-sig"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        ids = tokenizer.encode("two words, \u5b57 \u2603").ids  # some damage shows only at unknown letters
        if ids[-1:] != [EOS] or tokenizer.token_to_id("<pad>") != PAD:
            raise ValueError(f"not a tokenizer of T5, whose id {PAD} is <pad> and whose texts end in </s>, id {EOS}")
    return tokenizer


def _from_spiece(spiece: bytes) -> Tokenizer:
    """Build a `tokenizers.Tokenizer` from a SentencePiece model, the only file that T5 v1.1 and T0 ship."""
    model = _fields(spiece)  # fields: 1 pieces (1 text, 2 score), 2 trainer (3 kind), 3 normalizer (2 character map)
    entries = map(_fields, model[1])
    pieces = [(entry[1][0].decode("utf-8"), np.frombuffer(entry[2][0], "<f4").item()) for entry in entries]
    if _fields(model[2][0]).get(3, [1]) != [1]:
        raise ValueError("a SentencePiece model of another kind than unigram")
    if [piece for piece, _ in pieces[:3]] != ["<pad>", "</s>", "<unk>"]:
        raise ValueError("its pieces do not begin with <pad>, </s>, <unk>")
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=UNKNOWN, byte_fallback=False))
    charsmaps = _fields(model[3][0]).get(2, [])
    tidy = [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), "▁")]
    tokenizer.normalizer = normalizers.Sequence([*map(normalizers.Precompiled, filter(None, charsmaps)), *tidy])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    extra = [f"<extra_id_{number}>" for number in reversed(range(100))]  # T5's, after the pieces in falling order
    special = [AddedToken(name, normalized=False, special=True) for name in ["<pad>", "</s>", "<unk>", *extra]]
    tokenizer.add_special_tokens(special)
    return tokenizer


def _fields(message: bytes) -> dict[int, list]:
    """Return the values of a protocol buffer message by field number."""
    fields, stream = defaultdict(list), io.BytesIO(message)

    def varint() -> int:  # seven bits a byte, lowest first
        byte = stream.read(1)[0]
        return byte if byte < 128 else byte - 128 + (varint() << 7)

    while stream.tell() < len(message):
        number, wire_type = divmod(varint(), 8)
        size = varint() if wire_type in (0, 2) else {1: 8, 5: 4}[wire_type]
        if wire_type and stream.tell() + size > len(message):
            raise ValueError("the file is cut short")
        fields[number].append(stream.read(size) if wire_type else size)  # the varint of type 0 is the value itself
    return dict(fields)


# ------------------------------------------- Porter's stemmer (1980), with the departures of NLTK, as in rouge-score

_IRREGULAR = {word: word for word in "news inning outing canning howe proceed exceed succeed".split()}
_IRREGULAR |= {"skies": "sky", "dying": "die", "lying": "lie", "tying": "tie"}
_IRREGULAR |= {"innings": "inning", "outings": "outing", "cannings": "canning"}
_STEP_1 = {"sses": "ss", "ies": "i", "ss": "ss", "s": ""}
_STEP_2 = {
    "ational": "ate", "tional": "tion", "enci": "ence", "anci": "ance", "izer": "ize", "bli": "ble", "alli": "al",
    "entli": "ent", "eli": "e", "ousli": "ous", "ization": "ize", "ation": "ate", "ator": "ate", "fulli": "ful",
    "alism": "al", "iveness": "ive", "fulness": "ful", "ousness": "ous", "aliti": "al", "iviti": "ive", "biliti": "ble",
}  # fmt: skip
_STEP_3 = {"icate": "ic", "ative": "", "alize": "al", "iciti": "ic", "ical": "ic", "ful": "", "ness": ""}
_STEP_4 = dict.fromkeys("al ance ence er ic able ible ant ement ment ent ion ou ism ate iti ous ive ize".split(), "")


@lru_cache(maxsize=1 << 16)
def _stem(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) == 4 and word.endswith("ies"):  # step 1a
        word = word[:-1]
    word = _replace(word, _STEP_1, 0)
    word = _without_ed_and_ing(word)  # step 1b
    if word.endswith("y") and len(word) > 2 and _shape(word[:-1]).endswith("c"):  # step 1c
        word = word[:-1] + "i"
    if word.endswith("alli") and _measure(word[:-4]) > 0:  # step 2
        word = word[:-2]
    if word.endswith("logi") and _measure(word[:-3]) > 0:
        word = word[:-1]
    word = _replace(_replace(word, _STEP_2, 1), _STEP_3, 1)
    if not re.search("[^st]ion$", word):  # step 4
        word = _replace(word, _STEP_4, 2)
    measure = _measure(word[:-1])  # step 5
    if word.endswith("e") and (measure > 1 or measure == 1 and not _ends_short(word[:-1])):
        word = word[:-1]
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word


def _without_ed_and_ing(word: str) -> str:
    """Remove -ed or -ing, and restore the end of the stem: hop(p)ing -> hop, fil(e)ing -> file."""
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    stem = word.removesuffix("ed") if word.endswith("ed") else word.removesuffix("ing")
    if stem == word or "v" not in _shape(stem):
        return word
    if stem.endswith(("at", "bl", "iz")):
        return stem + "e"
    if stem[-2:-1] == stem[-1] and _shape(stem).endswith("c"):
        return stem if stem[-1] in "lsz" else stem[:-1]
    return stem + "e" if _measure(stem) == 1 and _ends_short(stem) else stem


def _replace(word: str, rules: dict[str, str], measure: int) -> str:
    """Replace the longest suffix that has a rule, if the stem before the suffix has at least this measure."""
    for start in range(len(word)):
        if word[start:] in rules:
            return word[:start] + rules[word[start:]] if _measure(word[:start]) >= measure else word
    return word


def _shape(word: str) -> str:
    """Return a `c` for each consonant and a `v` for each vowel. A y after a consonant is a vowel."""
    shape = ""
    for letter in word:
        shape += "v" if letter in "aeiou" or letter == "y" and shape.endswith("c") else "c"
    return shape


def _measure(stem: str) -> int:
    """Count the vowels followed by a consonant: the m of Porter's rules."""
    return _shape(stem).count("vc")


def _ends_short(stem: str) -> bool:
    """Porter's *o: consonant, vowel, consonant other than w, x, y. NLTK adds stems of one vowel and one consonant."""
    shape = _shape(stem)
    return shape == "vc" or shape.endswith("cvc") and stem[-1] not in "wxy"


# --------------------------------------------------------------------------------------------- the toy world

KINDS = {
    "fruit": "apple pear lemon plum cherry melon", "animal": "tiger horse rabbit goat camel otter",
    "colour": "green purple orange silver brown yellow", "city": "london madrid cairo tokyo oslo paris",
    "tool": "hammer ladder shovel drill wrench saw", "food": "bread cheese pasta rice butter soup",
    "garment": "jacket shirt glove scarf boot hat", "sport": "tennis rugby chess golf hockey judo",
}  # fmt: skip
KIND_OF = {word: kind for kind, words in KINDS.items() for word in words.split()}
ARGUMENTS = "pom zet quib larn voft mish drel tunk wob fep glim narv brask crell dorf ennet flin gruv hesk jilt".split()
_SELECTIONS = {  # wordings for each selection of a word
    "first": ["the first word", "the word at the head"],
    **{kind: [f"the {kind}", f"the {kind} in it"] for kind in KINDS},
}
_TRANSFORMATIONS = {  # functions of the selected word, with wordings that all stand before the word
    "copy": (lambda word: word, ["a copy of {}", "simply {}"]),
    "thank": (lambda word: f"thanks {word}", ["thanks to {}", "gratitude to {}"]),
    "negate": (lambda word: f"not {word}", ["the negation of {}", "the opposite of {}"]),
    "praise": (lambda word: f"good {word}", ["praise for {}", "a compliment to {}"]),
    "greet": (lambda word: f"hello {word}", ["a greeting to {}", "a welcome to {}"]),
    "plural": (lambda word: f"{word}s", ["the plural of {}", "the plural form of {}"]),
    "initial": (lambda word: word[0], ["the initial of {}", "the opening letter of {}"]),
    "length": (lambda word: str(len(word)), ["the length of {}", "the number of letters in {}"]),
    "kind": (KIND_OF.__getitem__, ["the kind of {}", "the category of {}"]),
    "doubt": (lambda word: f"maybe {word}", ["a doubt about {}", "some doubt about {}"]),
    "dismiss": (lambda word: f"goodbye {word}", ["a farewell to {}", "a dismissal of {}"]),
    "own": (lambda word: f"my {word}", ["a claim to {}", "possession of {}"]),
}
_FRAMES = {  # wordings for the place of the argument
    "none": [""],
    "begin": [", but start with {}", ", with {} in front"],
    "end": [", and end with {}", ", followed by {}"],
    "both": [", between {0} and {0}", ", with {} on both sides"],
}
_VERBS, _JOINS = ["write", "give", "print"], ["{}, then {}", "{} and next {}"]


class Slot(NamedTuple):
    """A selected word of the input, and its transformation."""

    selection: str
    transformation: str


class Rule(NamedTuple):
    """Meaning of a toy task: one or two slots, and an argument in front, at the end or on both sides."""

    slots: tuple[Slot, ...]
    frame: str
    argument: str

    def answer(self, words: list[str]) -> str:
        """Apply the rule to an input."""
        parts = []
        for selection, transformation in self.slots:
            selected = next(word for word in words if selection in ("first", KIND_OF[word]))
            parts.append(_TRANSFORMATIONS[transformation][0](selected))
        before, after = ([self.argument] * (self.frame in (side, "both")) for side in ("begin", "end"))
        return " ".join([*before, " and ".join(parts), *after])

    def definition(self, draw: random.Random) -> str:
        """Draw a wording of the rule."""
        parts = [
            draw.choice(_TRANSFORMATIONS[transformation][1]).format(draw.choice(_SELECTIONS[selection]))
            for selection, transformation in self.slots
        ]
        joined = parts[0] if len(parts) == 1 else draw.choice(_JOINS).format(*parts)
        return f"{draw.choice(_VERBS)} {joined}{draw.choice(_FRAMES[self.frame]).format(self.argument)}."

    def draw_input(self, draw: random.Random, kinds: list[str]) -> list[str]:
        """Draw three to five words of different kinds, those selected among them."""
        drawn = [kind for kind in kinds if kind in [slot.selection for slot in self.slots]]
        drawn += draw.sample([kind for kind in kinds if kind not in drawn], draw.randint(3, 5) - len(drawn))
        draw.shuffle(drawn)
        return [draw.choice(KINDS[kind].split()) for kind in drawn]


class ToyWorld(NamedTuple):
    """Training tasks, and two sets of test tasks that each ask for something never trained."""

    train: list[Task]
    unseen_arguments: list[Task]  # an argument together with a selection never combined in training
    unseen_compositions: list[Task]  # a transformation followed by another, never in this order in training
    rules: dict[str, Rule]  # the meaning of each definition, by the name of the task


def toy_world(seed: int, tasks: int = 5000, instances: int = 12, kinds: int = 6, arguments: int = 12) -> ToyWorld:
    """Draw a world of short word lists and instructions: "give the plural of the fruit, then thanks to the first word".

    A fifth of the pairs (argument, selection) are kept from training. So are 24 ordered pairs of transformations: each
    transformation precedes two others, and follows two others, only in the unseen compositions, which ask each pair in
    turn: three tasks of four instances.
    """
    draw = random.Random(f"toy/{seed}")
    kind_names, argument_words = list(KINDS)[:kinds], ARGUMENTS[:arguments]
    selections = ["first", *kind_names]
    ring = draw.sample(list(_TRANSFORMATIONS), len(_TRANSFORMATIONS))
    unseen_orders = [(ring[i - step], ring[i]) for step in (1, 2) for i in range(len(ring))]
    pairs = list(product(argument_words, selections))
    unseen_pairs = set(draw.sample(pairs, len(pairs) // 5))
    rules: dict[str, Rule] = {}

    def draw_rule(part: str, number: int) -> Rule:
        asked = unseen_orders[number % len(unseen_orders)] if part == "unseen-compositions" else None
        while True:
            size = 1 if draw.random() < 0.3 else 2
            slots = tuple(Slot(draw.choice(selections), draw.choice(list(_TRANSFORMATIONS))) for _ in range(size))
            frame = draw.choice(list(_FRAMES))
            argument = "" if frame == "none" else draw.choice(argument_words)
            paired = any((argument, slot.selection) in unseen_pairs for slot in slots)
            order = tuple(slot.transformation for slot in slots)
            if (paired, order if order in unseen_orders else None) == (part == "unseen-arguments", asked):
                return Rule(slots, frame, argument)

    def draw_task(name: str, size: int) -> Task:
        answers: dict[str, str] = {}  # by input, so that no input occurs twice
        while len(answers) < 5 + size:
            words = rules[name].draw_input(draw, kind_names)
            answers[" ".join(words)] = rules[name].answer(words)
        pairs = [Example(*pair) for pair in answers.items()]
        asked = [Instance(f"{name}-{number}", text, (answer,)) for number, (text, answer) in enumerate(pairs[5:])]
        return Task(name, rules[name].definition(draw), tuple(pairs[:5]), tuple(asked))

    def draw_tasks(part: str, number_of_tasks: int, size: int) -> list[Task]:
        names = [f"{part}-{number}" for number in range(number_of_tasks)]
        rules.update((name, draw_rule(part, number)) for number, name in enumerate(names))
        return [draw_task(name, size) for name in names]

    train = draw_tasks("train", tasks, instances)
    return ToyWorld(train, draw_tasks("unseen-arguments", 72, 4), draw_tasks("unseen-compositions", 72, 4), rules)


def vague(world: ToyWorld) -> ToyWorld:
    """Replace the argument in every definition by "what" (", followed by what."), so that only examples tell it."""

    def without_argument(task: Task) -> Task:
        argument = world.rules[task.name].argument
        return replace(task, definition=re.sub(rf"\b{argument}\b", "what", task.definition)) if argument else task

    return ToyWorld(*(list(map(without_argument, tasks)) for tasks in world[:3]), world.rules)


def write_toy_world(folder: str | os.PathLike, world: ToyWorld) -> None:
    """Write a toy world as Super-NaturalInstructions, its tokenizer, and a C4-like corpus that works through it."""
    tasks_folder, splits_folder = Path(folder, "tasks"), Path(folder, "splits", "default")
    tasks_folder.mkdir(parents=True, exist_ok=True)
    splits_folder.mkdir(parents=True, exist_ok=True)
    for split, tasks in (("train", world.train), ("test", world.unseen_arguments + world.unseen_compositions)):
        Path(splits_folder, f"{split}_tasks.txt").write_text("\n".join(task.name for task in tasks))
        for task in tasks:
            content = {
                "Definition": [task.definition],
                "Positive Examples": [example._asdict() for example in task.examples],
                "Instances": [{"id": i.id, "input": i.input, "output": i.references} for i in task.instances],
            }
            Path(tasks_folder, f"{task.name}.json").write_text(json.dumps(content))
    with gzip.open(Path(folder, "corpus.json.gz"), "wt") as file:
        for task in world.train:
            lines = [f"Input: {i.input}. Output: {i.references[0]}." for i in task.instances]
            file.write(json.dumps({"text": " ".join([task.definition, *lines])}) + "\n")
    toy_tokenizer().save(str(Path(folder, "tokenizer.json")))  # last, as a sign that the folder is complete


def toy_tokenizer() -> Tokenizer:
    """Make each word and punctuation mark of the toy world and of the prompt formats a token."""
    texts = [*KIND_OF, *ARGUMENTS, *_VERBS, *_JOINS, *chain(*_SELECTIONS.values(), *_FRAMES.values())]
    for transform, wordings in _TRANSFORMATIONS.values():
        texts += [*wordings, *map(transform, KIND_OF)]
    texts.append("Definition: Positive Example 1 2 3 4 - Now complete the following example - Input: Output: , .")
    split = pre_tokenizers.BertPreTokenizer()  # at spaces and punctuation
    known = sorted({token for text in texts for token, _ in split.pre_tokenize_str(text)} - {"{", "}"})
    special = ["<pad>", "</s>", "<unk>"]
    vocabulary = {token: number for number, token in enumerate(special + known)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    tokenizer.add_special_tokens(special)
    return tokenizer


def show_answers(tasks: Sequence[Task], rows: Sequence[dict]) -> None:
    """Print three right and three wrong answers of different tasks, with instruction and input."""
    asked = {instance.id: (task.definition, instance.input) for task in tasks for instance in task.instances}
    for title, exact in (("right", 100), ("wrong", 0)):
        chosen = [row for row in rows if scores([row])["exact_match"] == exact]
        print(f"\n{title}: {len(chosen)} of {len(rows)}")
        chosen = list({row["task"]: row for row in chosen}.values())
        for row in chosen[:: max(1, len(chosen) // 3)][:3]:
            definition, text = asked[row["id"]]
            wanted = "" if exact else f"   (wanted: {row['references'][0]})"
            print(f"  {definition}\n      {text}  ->  {row['prediction']}{wanted}")
