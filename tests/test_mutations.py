"""Every reader is fed damaged files, each in a process that survives crashes: it must read them, or refuse in a sentence.

`pytest` tries some of each, `pytest -m long tests/test_mutations.py -rP` more than a thousand, and shows how they ended.
"""

import contextlib
import gzip
import io
import json
import os
import pickle
import pickletools
import random
import re
import resource
import select
import subprocess
import sys
import traceback
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import pytest
import torch
from conftest import SENTENCES, random_ids, tiny_config, tiny_hint, tiny_t5, write_prompted, write_shards, write_task
from mutator import (
    ATTACK,
    BYTES,
    PROOF,
    Damage,
    compressed,
    damage_json,
    damage_line,
    damage_pickle,
    damage_protobuf_field,
    damage_protobuf_length,
    damage_safetensors_header,
    damage_zip,
    flip_bits,
)

import t5
import train
from data import (
    DataError,
    HINTFormat,
    TkInstructFormat,
    _parse_spiece,
    load_tasks,
    load_tokenizer,
    read_shard,
    toy_tokenizer,
)
from hint import HINT, EncodedTask
from t5 import T5, Adapter, CheckpointError, KeyValue, LayerModules, Modules
from train import RunError, read_lines

SECONDS = 60  # far more than any file here takes, so that only what would never end is stopped
MEMORY = 256 << 20  # bytes; the files here are smaller than 300 kB
TEXT = "Écoute: ﬁnal ½ 日本語 \u2603 e\u0301 the cat, and <extra_id_3>\n\tno zygote\u200b 👩‍👩‍👧 \x00 end"


class Reader(NamedTuple):
    """Which file is read, what damages it, how it is read and checked, and the error that refuses it."""

    file: str
    damages: tuple[Damage, ...]
    read: Callable[[Path], None]
    error: type[Exception]


# ------------------------------------------------------------------------ readers, and what a correct read is


def read_task(path: Path) -> None:
    (task,) = load_tasks(path.parents[1], "train")
    assert task.instances and all(instance.references for instance in task.instances)
    task.definition.encode(), json.dumps([list(i) for i in task.instances], ensure_ascii=False).encode()
    for prompts in (HINTFormat(toy_tokenizer(), 2), TkInstructFormat(toy_tokenizer(), 2)):
        assert len(prompts(task)) == len(task.instances)
    for instance, found in zip(task.instances, json.loads(path.read_text("utf-8"))["Instances"], strict=True):
        assert instance.input == found["input"].encode("utf-8", "replace").decode().strip()


def read_split(path: Path) -> None:
    assert [task.name for task in load_tasks(path.parents[2], "train")] == path.read_text("utf-8").split()


def read_prompted(path: Path) -> None:
    """In both settings; each line is an instance, whose answer is one of its choices."""
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    for joint in (False, True):
        tasks = load_tasks(path.parent, "train", joint=joint)
        assert sum(len(task.instances) for task in tasks) == len(lines)
        for task in tasks:
            json.dumps([task.name, *map(list, task.instances)], ensure_ascii=False).encode()
            assert len(HINTFormat(toy_tokenizer())(task)) == len(task.instances)
            assert all(not i.choices or i.references[0] in i.choices for i in task.instances)


def read_c4(path: Path) -> None:
    """Without the option all texts or the number of the first bad line; with it the texts of all good lines."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error):
        list(read_shard(path))
        raise AssertionError("what is not gzip was read") from None
    lines = content.removesuffix(b"\n").split(b"\n") if content else []
    skipped = []
    assert len(list(read_shard(path, skipped.append))) == sum(is_good(lines))
    assert len(skipped) == len(lines) - sum(is_good(lines))
    try:
        assert len(list(read_shard(path))) == len(lines)
    except DataError as error:
        assert f": line {is_good(lines).index(False) + 1} cannot be read" in str(error)
        assert str(error) == str(skipped[0])
        raise


def is_good(lines: list[bytes]) -> list[bool]:
    """Which lines hold an object with a text."""

    def one(line: bytes) -> bool:
        try:
            return isinstance(json.loads(line.decode("utf-8"))["text"], str)
        except (ValueError, KeyError, TypeError, RecursionError):
            return False

    return [one(line) for line in lines]


def read_endless_line(path: Path) -> None:
    """The line behind it, where bad lines are skipped."""
    skipped = []
    assert list(read_shard(path, skipped.append)) == ["the cat"] and len(skipped) == 1
    list(read_shard(path))


def read_inputs(path: Path) -> None:
    lines = read_lines(str(path))
    assert "\n".join(lines) == path.read_text("utf-8").removesuffix("\n")


def read_t5(path: Path) -> None:
    """Weights and config agree, or nothing is read."""
    model = T5.from_pretrained(path.parent)
    with torch.device("meta"):
        wanted = {name: parameter.shape for name, parameter in T5(model.config).named_parameters()}
    found = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert found == wanted and {p.dtype for p in model.parameters()} == {torch.float32}
    assert model(random_ids(1, 5), random_ids(1, 4)).shape == (1, 4, model.config.vocab_size)


def read_hint_config(path: Path) -> None:
    model = HINT.from_pretrained(path.parent)
    task = model.encode_instruction(random_ids(1, 5))
    assert task.modules.encoder[0].adapter.down.shape == (1, model.t5.config.d_model, model.config.bottleneck)
    t5.read_config(path.parent, train.notes_of_run)


def read_tokenizer(path: Path) -> None:
    """It gives the ids of any text, all within its vocabulary, and takes them back."""
    tokenizer = load_tokenizer(path)
    assert load_tokenizer(path).encode(TEXT).ids == tokenizer.encode(TEXT).ids
    for text in ("", TEXT, *SENTENCES):
        ids = tokenizer.encode(text).ids
        assert ids[-1] == 1 and max(ids) <= max(tokenizer.get_vocab().values())
        assert isinstance(tokenizer.decode(ids), str)


def read_encoded_task(path: Path) -> None:
    """Where its shapes are those of the model, it answers."""
    task = EncodedTask.load(path)
    for layer in (*task.modules.encoder, *task.modules.decoder):
        assert layer.adapter is None or layer.adapter.up.shape[::2] == task.states.shape[::2]
    encoder, decoder = task.modules
    alike = (len(encoder), len(decoder)) == (2, 3) and task.states.shape[2] == 24
    if alike and all(layer.prefix is None or layer.prefix.key.shape == (1, 3, 4, 10) for layer in (*encoder, *decoder)):
        tiny_hint().generate(task, random_ids(2, 5), max_new_tokens=2)


def resume(path: Path) -> None:
    """One more step of the run that the file belongs to; of its log the whole lines of earlier steps stay.

    A line of the last step without a loss is taken for its evaluation, which is made again.
    """
    lines = (path.parent / "log.jsonl").read_text("utf-8", "replace").splitlines(keepends=True)
    wanted = [entry for entry in map(entry_of, shallow(lines)) if entry and entry["step"] <= 3 - ("loss" not in entry)]
    command("pretrain", *PRETRAIN, "--start", path.parents[1] / "start", "--corpus", path.parents[1] / "c4-0.json.gz",
            "--out", path.parent, "--steps", 4, "--resume")  # fmt: skip
    *log, last = map(json.loads, shallow((path.parent / "log.jsonl").read_text("utf-8").splitlines()))
    assert json.dumps(log) == json.dumps(wanted) and last["step"] == 4
    assert t5.read_metadata(path.parent / "model.safetensors")["step"] == "4"


def shallow(lines: list[str]) -> list[str]:
    """Lines but for those so deep that it depends on the depth of the calls whether they can be parsed."""
    return [line for line in lines if "[" * 850 not in line]


def entry_of(line: str) -> dict | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if line.endswith("\n") and isinstance(found, dict) and type(found.get("step")) is int else None


def predict(path: Path) -> None:
    assert command("predict", "--model", path.parent, "--instruction", "Say it.", "the cat", TEXT)


def command(*words: object) -> str:
    """What `python train.py ...` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()):
        train.main([str(word) for word in words])
    return said.getvalue()


PRETRAIN = "--batch-size 2 --microbatch 2 --max-input 12 --bottleneck 2 --prefix-length 2 --log-every 1".split()
JSON = (damage_json, damage_json, *BYTES)
ZIP = (damage_zip, damage_zip, damage_zip, *BYTES)
READERS = {
    "task file": Reader("sni/tasks/task1_a.json", JSON, read_task, DataError),
    "split list": Reader("sni/splits/default/train_tasks.txt", BYTES, read_split, DataError),
    "prompted examples": Reader("p3/train.jsonl", (*BYTES, *[damage_line] * 5), read_prompted, DataError),
    "C4 shard": Reader("c4/shard.json.gz", (*BYTES, *[compressed(damage_line)] * 5), read_c4, DataError),
    "line without an end": Reader("c4/endless.json.gz", BYTES, read_endless_line, DataError),
    "lines to predict": Reader("inputs.txt", (*BYTES, damage_line), read_inputs, RunError),
    "log.jsonl on resume": Reader("pretrained/log.jsonl", (*BYTES, *[damage_line] * 5), resume, SystemExit),
    "config.json on resume": Reader("pretrained/config.json", JSON, resume, SystemExit),
    "model.safetensors on resume": Reader("pretrained/model.safetensors", (flip_bits, *[damage_safetensors_header] * 3), resume, SystemExit),
    "training-3.pt": Reader("pretrained/training-3.pt", ZIP, resume, SystemExit),
    "config.json of T5": Reader("start/config.json", JSON, read_t5, CheckpointError),
    "config.json of HINT": Reader("finetuned/config.json", JSON, read_hint_config, CheckpointError),
    "model.safetensors": Reader("start/model.safetensors", (*BYTES, *[damage_safetensors_header] * 5), read_t5, CheckpointError),
    "model.safetensors.index.json": Reader("sharded/model.safetensors.index.json", JSON, read_t5, CheckpointError),
    "pytorch_model.bin": Reader("bin/pytorch_model.bin", ZIP, read_t5, CheckpointError),
    "pytorch_model.bin, legacy": Reader("legacy/pytorch_model.bin", (*BYTES, *[damage_pickle] * 5), read_t5, CheckpointError),
    "tokenizer.json": Reader("finetuned/tokenizer.json", JSON, read_tokenizer, DataError),
    "spiece.model": Reader("start/spiece.model", (*BYTES, damage_protobuf_length, *[damage_protobuf_field] * 4), read_tokenizer, DataError),
    "tokenizer.json of the toy world": Reader("toy/tokenizer.json", JSON, read_tokenizer, DataError),
    "HINT folder, config.json": Reader("finetuned/config.json", JSON, predict, SystemExit),
    "HINT folder, model.safetensors": Reader("finetuned/model.safetensors", (flip_bits, *[damage_safetensors_header] * 2), predict, SystemExit),
    "HINT folder, tokenizer.json": Reader("finetuned/tokenizer.json", JSON, predict, SystemExit),
    "encoded task": Reader("a.task", ZIP, read_encoded_task, CheckpointError),
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory, spiece) -> Path:  # noqa: F811
    """A folder with a whole file for every reader."""
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    (folder / "sni").mkdir()
    write_task(folder / "sni")
    for split in ("train", "test"):
        (folder / f"sni/splits/default/{split}_tasks.txt").write_text("task1_a\n")
    write_prompted(folder / "p3")
    (folder / "c4").mkdir()
    content = "".join(json.dumps({"text": text, "url": "", "n": [1, {"a": None}]}) + "\n" for text in SENTENCES)
    (folder / "c4/shard.json.gz").write_bytes(gzip.compress(content.encode(), mtime=0))
    (folder / "inputs.txt").write_text("".join(json.dumps({"input": text}) + "\n" for text in SENTENCES))
    model = tiny_t5(vocab_size=300)
    for name in ("start", "bin", "legacy", "sharded"):
        model.save_pretrained(folder / name)
        (folder / name / "spiece.model").write_bytes(spiece.read_bytes())
    tensors = t5.read_safetensors(folder / "start/model.safetensors")
    torch.save(tensors, folder / "bin/pytorch_model.bin")
    torch.save(tensors, folder / "legacy/pytorch_model.bin", _use_new_zipfile_serialization=False)
    names = sorted(tensors)
    places = {name: f"model-{names.index(name) * 3 // len(names)}.safetensors" for name in names}
    for shard in set(places.values()):
        part = {name: tensors[name] for name in names if places[name] == shard}
        t5.write_safetensors(folder / "sharded" / shard, part, {})
    (folder / "sharded/model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for name in ("bin", "legacy", "sharded"):
        (folder / name / "model.safetensors").unlink()
    (folder / "toy").mkdir()
    toy_tokenizer().save(str(folder / "toy/tokenizer.json"))
    hint = tiny_hint()
    hint.encode_instruction(random_ids(1, 5)).save(folder / "a.task")
    write_shards(folder, 100, shards=1)
    command("pretrain", *PRETRAIN, "--start", folder / "start", "--corpus", folder / "c4-0.json.gz", "--out", folder / "pretrained",
            "--steps", 3)  # fmt: skip
    command("finetune", "--start", folder / "start", "--data", folder / "sni", "--out", folder / "finetuned", "--steps", 1,
            "--batch-size", 2, "--max-target", 4, "--bottleneck", 2, "--prefix-length", 2)  # fmt: skip
    return folder


# ------------------------------------------------------------------------ the process that reads


def serve() -> None:
    """Read the files that standard input names, one a line, and say on standard output how each read ended."""
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))  # no machine is brought down by what is found here
    torch.set_num_threads(1)
    at_first = peak_memory()
    for line in sys.stdin:
        name, path = json.loads(line)
        outcome, detail = read(READERS[name], Path(path))
        peak = peak_memory()
        if peak - at_first > MEMORY:
            outcome, detail, at_first = "fault", f"took {(peak - at_first) >> 20} MB ({detail})", peak
        print(json.dumps([outcome, detail]), flush=True)


def peak_memory() -> int:
    """The most that this process has held so far, in bytes; Linux counts in kilobytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def read(reader: Reader, path: Path) -> tuple[str, str]:
    """How a read ended, "read" or "refused" as it should be, or "fault"; and what was said."""
    try:
        reader.read(path)
        return "read", ""
    except reader.error as error:
        message = str(error)
        named = path.name in message or str(path.parent) in message
        fine = named and message.isprintable() and len(message) < 600 and type(error) is reader.error
        return ("refused" if fine else "fault"), message
    except BaseException:  # a panic of a library in Rust is no Exception
        return "fault", traceback.format_exc()


class Worker:
    """The process that reads; another one where it dies or does not answer."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.process = folder, None

    def read(self, name: str, path: Path) -> tuple[str, str]:
        """How the read ended."""
        if self.process is None:
            python_path = {**os.environ, "PYTHONPATH": str(Path(t5.__file__).parent), "RUST_BACKTRACE": "0"}
            self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                            stderr=open(self.folder / "stderr", "ab"), cwd=self.folder, env=python_path)  # fmt: skip
        self.process.stdin.write(json.dumps([name, str(path)]).encode() + b"\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], SECONDS)
        line = self.process.stdout.readline() if ready else b""
        if line:
            return tuple(json.loads(line))
        self.stop()
        return "fault", f"the process {'died' if ready else f'was still reading after {SECONDS} seconds'}"

    def stop(self) -> None:
        """End the process."""
        if self.process:
            self.process.kill()
            self.process.communicate()
            self.process = None


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    worker = Worker(tmp_path_factory.mktemp("worker"))
    yield worker
    worker.stop()


# ------------------------------------------------------------------------ tests


FEW, MANY = pytest.param(range(100), id="few"), pytest.param(range(100, 1200), id="many", marks=pytest.mark.long)


@pytest.mark.parametrize("trials", [FEW, MANY])
@pytest.mark.parametrize("name", [name for name in READERS if name != "line without an end"])
def test_a_damaged_file_is_read_or_refused_in_a_sentence(files, worker, name, trials):
    """The whole file is read; of the damaged ones some are refused, or the damage would be none."""
    reader = READERS[name]
    path = files / reader.file
    before = {file: file.read_bytes() for file in path.parent.iterdir() if file.is_file()}
    assert worker.read(name, path) == ("read", "")
    outcomes, faults = Counter(), {}
    for trial in trials:
        draw = random.Random(f"{name}/{trial}")
        damage = draw.choice(reader.damages)
        damaged = damage(draw, before[path])
        restore(path.parent, {**before, path: damaged})
        outcome, detail = worker.read(name, path)
        outcomes[outcome] += 1
        if outcome == "fault":
            kind = " ".join(detail.split()[-2:])
            faults.setdefault(kind, f"trial {trial} ({damage.__name__}): {detail[:100]} ... {detail[-600:]}")
    restore(path.parent, before)
    print(f"{name}: {len(trials):,} mutations, {outcomes['read']} read, {outcomes['refused']} refused")
    assert not (worker.folder / PROOF).exists(), "a pickle has run code"
    assert not faults, f"{outcomes['fault']} faults, one of each kind:\n" + "\n".join(faults.values())
    assert outcomes["refused"] > len(trials) / 10 or name == "log.jsonl on resume", "of which damaged lines are dropped"


def state_with(**changes) -> Callable[[bytes], bytes]:
    """A training state, some entries of which are others."""

    def crafted(content: bytes) -> bytes:
        state, file = torch.load(io.BytesIO(content), weights_only=True), io.BytesIO()
        torch.save({**state, **changes}, file)
        return file.getvalue()

    return crafted


def repeated_numbers(zipped: bool) -> Callable[[bytes], bytes]:
    """Weights for a vocabulary of 10,000,000 that hold one number each, and strides of zero that repeat it."""

    def crafted(content: bytes) -> bytes:
        file, one = io.BytesIO(), torch.zeros(1)
        config = tiny_config(vocab_size=10**7)
        with torch.device("meta"):
            shapes = {t5.public_name(name): tensor.shape for name, tensor in T5(config).named_parameters()}
        tensors = {name: one.as_strided(shape, [0] * len(shape)) for name, shape in shapes.items()}
        torch.save(tensors, file, _use_new_zipfile_serialization=zipped)
        return file.getvalue()

    return crafted


def task_of_other_width(content: bytes) -> bytes:
    """An encoded task whose states are not as wide as its adapters."""
    file = io.BytesIO()
    with torch.serialization.safe_globals([EncodedTask, Modules, LayerModules, Adapter, KeyValue]):
        task = torch.load(io.BytesIO(content), weights_only=True)
    torch.save(task._replace(states=task.states[..., :5].clone()), file)
    return file.getvalue()


def charsmap_that_leads_outside(content: bytes) -> bytes:
    """A SentencePiece model whose character map finds every character, and points behind the texts for each."""
    charsmap = _parse_spiece(content)[1]
    size = int.from_bytes(charsmap[:4], "little")
    units = np.frombuffer(charsmap, "<u4", size // 4, 4).copy()
    units[units >> 31 == 1] |= 0x7FFFFFFF
    return content.replace(charsmap[4 : 4 + size], units.tobytes())


def sparse(content: bytes) -> bytes:
    """Weights, one of which is a sparse tensor."""
    tensors, file = torch.load(io.BytesIO(content), weights_only=True), io.BytesIO()
    torch.save({**tensors, "shared.weight": tensors["shared.weight"].to_sparse()}, file)
    return file.getvalue()


def without_numbers(content: bytes) -> bytes:
    """The first four of the pickles that make a file of the old form, and no numbers: memory would be left as it is."""
    file = io.BytesIO(content)
    for _ in range(4):
        list(pickletools.genops(file))
    return content[: file.tell()] + pickle.dumps([], protocol=2)


def deflated(content: bytes) -> bytes:
    """The same archive, compressed."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return file.getvalue()


def with_another_number(content: bytes) -> bytes:
    """A bit of the first tensor is another."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/data/0")]
        place = content.index(archive.read(name), archive.getinfo(name).header_offset)
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def with_value(*keys: str, value: object) -> Callable[[bytes], bytes]:
    """JSON with another value under a path of keys."""

    def crafted(content: bytes) -> bytes:
        found = part = json.loads(content)
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = value
        return json.dumps(found).encode()

    return crafted


ENDLESS = (
    gzip.compress(b'{"text": "') + gzip.compress(b"a" * (1 << 22)) * 128 + gzip.compress(b'"}\n{"text": "the cat"}\n')
)
CRAFTED = [
    ("line without an end", lambda _: ENDLESS, "line 1 .* longer than 16,777,216 bytes"),  # of 512 MiB
    ("training-3.pt", state_with(position=(10**12, 0)), "where 3 steps do not lead"),  # years of reading
    ("training-3.pt", state_with(position=(0, -1)), "where 3 steps do not lead"),
    ("training-3.pt", state_with(position=6), "does not say where in its data"),
    ("training-3.pt", state_with(losses=[None]), "not the training state of this run"),
    ("training-3.pt", state_with(streams=[(torch.zeros(9, dtype=torch.uint8), None)]), "not the training state of this run"),
    ("training-3.pt", state_with(optimizer={"state": {}}), "of another model"),
    ("pytorch_model.bin", repeated_numbers(zipped=True), "fewer numbers than its shape"),
    ("pytorch_model.bin, legacy", repeated_numbers(zipped=False), "fewer numbers than its shape"),
    ("pytorch_model.bin, legacy", without_numbers, "fewer bytes than its tensors"),
    ("pytorch_model.bin", sparse, "not plain"),
    ("pytorch_model.bin, legacy", lambda _: b"\x80\x02" + ATTACK + b".", "is damaged, or holds more than plain tensors"),
    ("encoded task", task_of_other_width, "is not an encoded task"),
    ("spiece.model", charsmap_that_leads_outside, "character map leads outside"),
    ("tokenizer.json", with_value("version", value="1\n\x1b[31m"), "Unknown tokenizer version"),
    ("config.json of T5", with_value("feed_forward_proj", value="long " * 1000), "feed_forward_proj 'long"),
    ("pytorch_model.bin", deflated, "compressed"),
    ("pytorch_model.bin", with_another_number, "checksum"),
    ("encoded task", with_another_number, "checksum"),
    ("training-3.pt", with_another_number, "checksum"),
    ("HINT folder, config.json", with_value("run", "precision", value="fp8"), "config.json: its run makes no sense"),
    ("HINT folder, config.json", with_value("run", "max_target", value=10**9), "--max-target 1000000000"),
    ("tokenizer.json", with_value("post_processor", "special_tokens", "</s>", "ids", value=[10**6, 1]), "not a tokenizer of T5"),
]  # fmt: skip


@pytest.mark.parametrize("name, crafted, message", CRAFTED, ids=[f"{name}-{text}" for name, _, text in CRAFTED])
def test_what_is_too_rare_among_random_damage_is_refused(files, worker, name, crafted, message):
    """Some of it would take all time or memory: a reader that obeyed would be killed, or seen to have taken it."""
    path = files / READERS[name].file
    before = {file: file.read_bytes() for file in path.parent.iterdir() if file.is_file()}
    damaged = {**before, path: crafted(before.get(path, b""))}
    if "fewer numbers" in message:
        damaged[path.with_name("config.json")] = with_value("vocab_size", value=10**7)(
            before[path.with_name("config.json")]
        )
    restore(path.parent, damaged)
    outcome, said = worker.read(name, path)
    restore(path.parent, before)
    assert outcome == "refused" and re.search(message, said), said


def restore(folder: Path, contents: dict[Path, bytes]) -> None:
    """The folder holds these files and no other."""
    for file in folder.iterdir():
        if file.is_file() and file not in contents:
            file.unlink()
    for file, content in contents.items():
        file.write_bytes(content)


if __name__ == "__main__":
    serve()
