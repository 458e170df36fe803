"""Every kind of file that is read, damaged: it is read, or refused in one line that names the file or its folder.

`pytest` tries some damage of each kind, `pytest -m long tests/test_damaged.py` a thousand pieces of each.
"""

import faulthandler
import gzip
import json
import pickle
import random
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import (
    SENTENCES, SIZES, finetune, log_of, make_sni, make_start, random_ids, run, said, write_prompted, write_shards,
)  # fmt: skip

import t5
from data import HINTFormat, PretrainingChunks, TkInstructFormat, load_tasks, load_tokenizer, toy_tokenizer
from hint import load_model
from t5 import T5, InputError

pytestmark = pytest.mark.usefixtures("quick_disk")
TEXT = "Écoute: ﬁnal ½ 日本語 \u2603 e\u0301 the cat, and <extra_id_3>\n\tno zygote\u200b 👩‍👩‍👧 \x00 end"

# ------------------------------------------------------------------------ damage: a source of random numbers, bytes -> bytes


def cut(draw: random.Random, data: bytes) -> bytes:
    """Only the beginning."""
    return data[: draw.randrange(len(data))]


def flip_bits(draw: random.Random, data: bytes) -> bytes:
    """One to eight bits, the first of which lies near the beginning."""
    damaged = bytearray(data)
    for place in [draw.randrange(min(len(data), 200)), *draw.choices(range(len(data)), k=draw.randint(0, 7))]:
        damaged[place] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def splice(draw: random.Random, data: bytes) -> bytes:
    """A chunk, once or often, in place of another of some other length."""
    a, b, c, d = (draw.randrange(len(data) + 1) for _ in range(4))
    return data[:a] + data[b : b + c % 200] * draw.choice((1, 1, 30)) + data[a + d % 200 :]


def insert_foreign_bytes(draw: random.Random, data: bytes) -> bytes:
    """Zeros, or what is no UTF-8: half a character, an overlong one, half of a surrogate pair, one beyond Unicode."""
    place = draw.randrange(len(data) + 1)
    foreign = draw.choice([b"\0", b"\0" * 64, b"\xff\xfe", b"\xc3", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80"])
    return data[:place] + foreign + data[place:]


BYTES = (cut, flip_bits, splice, insert_foreign_bytes)
VALUES = [
    *map(str, (0, 1, -1, 2**31, 2**63, 10**12, 10**18, 0.5, 1e308)), "1e999", "NaN", "Infinity", "9" * 5000, "null", "true", '""', '"text"',
    r'"\ud800"', r'"\u0000\n\u001b[31m"', '"' + "long " * 50_000 + '"', "[]", "{}", '["text"]', '{"a": 1}', "[" * 100_000, "[" * 5000 + "]" * 5000,
]  # fmt: skip


def damage_json(draw: random.Random, data: bytes) -> bytes:
    """One to three values are dropped, of another type, absurd, or those of another place; or a key stands there twice."""
    content, texts = json.loads(data), {}
    for number in range(draw.choice((1, 1, 2, 3))):
        (container, key), (other, place) = somewhere(draw, content), somewhere(draw, content)
        kind, mark = draw.choice(("drop", "replace", "replace", "copy", "twice")), f"@{number}@"
        if key is None or other[place] is container:
            continue
        if kind == "drop":
            del container[key]
        elif kind == "copy":
            container[key] = json.loads(json.dumps(other[place]))
        else:
            value, is_object = draw.choice(VALUES), isinstance(container, dict)
            again = f"{json.dumps(container[key])}, {json.dumps(key)}: {value}"
            texts[mark], container[key] = again if kind == "twice" and is_object else value, mark
    text = json.dumps(content)
    for mark, value in texts.items():
        text = text.replace(json.dumps(mark), value)
    return text.encode()


def somewhere(draw: random.Random, content: dict) -> tuple[dict | list, str | int | None]:
    """A container and a key of it: down from the root, so that the few upper values are met as often as the many lower."""
    container, key = {None: content}, None
    while isinstance(container[key], (dict, list)) and container[key] and (key is None or draw.random() < 0.8):
        container = container[key]
        key = draw.choice(list(container) if isinstance(container, dict) else range(len(container)))
    return container, key


def damage_line(draw: random.Random, data: bytes) -> bytes:
    """One line of a file of JSON lines: its JSON, its bytes, or its end."""
    lines = data.splitlines(keepends=True)
    place, ends = draw.randrange(len(lines)), [b"", b"\n\n", b"\r\n", b"\r", b" \t\n", b"\x0b\n", "\u2028\n".encode()]
    kind = draw.choice((damage_json, damage_json, *BYTES, None))
    line = lines[place].rstrip(b"\n")
    lines[place] = kind(draw, line) + b"\n" if kind else line + draw.choice(ends)
    return b"".join(lines)


def damage_header(draw: random.Random, data: bytes) -> bytes:
    """The JSON in the header of a safetensors file, its length, or both."""
    length = int.from_bytes(data[:8], "little")
    header = damage_json(draw, data[8 : 8 + length])
    length = draw.choice([len(header)] * 9 + [len(header) - 1, len(header) + 8, len(data), 2**63 - 1, 10**12])
    return length.to_bytes(8, "little") + header + data[-(len(data) - 8 - int.from_bytes(data[:8], "little")) :]


def damage_inside(draw: random.Random, data: bytes) -> bytes:
    """The lines that a gzip file holds."""
    return gzip.compress(damage_line(draw, gzip.decompress(data)), compresslevel=1, mtime=0)


# ------------------------------------------------------------------------ kinds of files, and how each is read and used


def read_tasks(path: Path, folder: int, joint: bool = False) -> None:
    """Tasks that were read can be encoded; `folder` is how far up their data set lies."""
    for task in load_tasks(path.parents[folder], "train", joint=joint):
        assert task.instances and all(instance.references for instance in task.instances)
        json.dumps(list(task.instances), ensure_ascii=False).encode()
        for prompts in (HINTFormat,) if task.prompted else (HINTFormat, TkInstructFormat):
            assert len(prompts(toy_tokenizer(), 0 if task.prompted else 2)(task)) == len(task.instances)


def read_text(path: Path) -> None:
    PretrainingChunks([path], toy_tokenizer(), 12, 0, skip_bad_lines=path.suffix == ".jsonl").take(40)


def read_t5(path: Path) -> None:
    model = T5.from_pretrained(path.parent)
    assert model(random_ids(1, 5), random_ids(1, 4)).shape == (1, 4, model.config.vocab_size)


def read_tokenizer(path: Path) -> None:
    """It gives ids within its vocabulary for any text, and takes them back."""
    tokenizer = load_tokenizer(path)
    for text in ("", TEXT, *SENTENCES):
        ids = tokenizer.encode(text).ids
        assert ids[-1] == 1 and max(ids) <= max(tokenizer.get_vocab().values()) and isinstance(tokenizer.decode(ids), str)


def read_encoded_task(path: Path) -> None:
    model = load_model(path.parent)
    model.generate(model.load_task(path), random_ids(2, 5), max_new_tokens=2)


def command(*words: object) -> None:
    """Run a command line; it ends well, or with status 1 and, in its last line, a reason."""
    status, text = said(*words)
    if status:
        assert status == 1
        raise InputError(text.splitlines()[-1])


def predict(path: Path, *more: object) -> None:
    command("predict", "--model", path.parents[path.name != "inputs.txt"] / "finetuned", "--instruction", "Say it.", "cat", *more)


def resume(path: Path) -> None:
    """One more step of the run that the file belongs to."""
    command("pretrain", *PRETRAIN, "--start", path.parents[1] / "start", "--corpus", path.parents[1] / "c4-0.json.gz",
            "--out", path.parent, "--steps", 4, "--resume")  # fmt: skip
    assert log_of(path.parent)[-1]["step"] == 4 and t5.read_metadata(path.parent / "model.safetensors")["step"] == "4"


PRETRAIN = [*"--batch-size 2 --microbatch 50 --max-input 12 --log-every 1".split(), *SIZES]
JSON, HEADER = (damage_json, damage_json, damage_json, *BYTES), (damage_header, damage_header, damage_header, *BYTES)
KINDS = {  # a file of the folder of all files, the damage to it, and its reader
    "task": ("sni/tasks/train_1.json", JSON, partial(read_tasks, folder=1)),
    "split": ("sni/splits/default/train_tasks.txt", BYTES, partial(read_tasks, folder=2)),
    "prompted examples": ("p3/train.jsonl", (damage_line, damage_line, *BYTES), partial(read_tasks, folder=0)),
    "prompted examples, joint": ("p3/train.jsonl", (damage_line,), partial(read_tasks, folder=0, joint=True)),
    "corpus": ("c4-0.json.gz", (damage_inside, damage_inside, *BYTES), read_text),
    "plain corpus": ("plain.jsonl", (damage_line, *BYTES), read_text),
    "inputs": ("inputs.txt", BYTES, lambda path: predict(path, "--file", path)),
    "log.jsonl of a run": ("pretrained/log.jsonl", (damage_line, *BYTES), resume),
    "config.json of a run": ("pretrained/config.json", JSON, resume),
    "model.safetensors of a run": ("pretrained/model.safetensors", HEADER, resume),
    "training state": ("pretrained/training-3.safetensors", HEADER, resume),
    "config.json of T5": ("start/config.json", JSON, read_t5),
    "model.safetensors": ("start/model.safetensors", HEADER, read_t5),
    "index": ("sharded/model.safetensors.index.json", JSON, read_t5),
    "pytorch_model.bin": ("bin/pytorch_model.bin", BYTES, read_t5),
    "pytorch_model.bin, legacy": ("legacy/pytorch_model.bin", BYTES, read_t5),
    "tokenizer.json": ("finetuned/tokenizer.json", JSON, read_tokenizer),
    "spiece.model": ("start/spiece.model", BYTES, read_tokenizer),
    "config.json of HINT": ("finetuned/config.json", JSON, predict),
    "model.safetensors of HINT": ("finetuned/model.safetensors", HEADER, predict),
    "encoded task": ("finetuned/a.task", HEADER, read_encoded_task),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory, spiece) -> Path:
    """A folder with a whole file of every kind."""
    folder = tmp_path_factory.mktemp("whole")
    make_sni(folder / "sni")
    write_prompted(folder / "p3")
    (folder / "plain.jsonl").write_bytes(gzip.decompress(write_shards(folder, 100, shards=1)[0].read_bytes()))
    (folder / "inputs.txt").write_text("\n".join(SENTENCES))
    for name in ("start", "bin", "legacy", "sharded"):
        make_start(folder / name, spiece)
    tensors = t5.read_safetensors(folder / "start/model.safetensors")
    torch.save(tensors, folder / "bin/pytorch_model.bin")
    torch.save(tensors, folder / "legacy/pytorch_model.bin", _use_new_zipfile_serialization=False)
    shard_of = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for shard in set(shard_of.values()):
        part = {name: tensor for name, tensor in tensors.items() if shard_of[name] == shard}
        t5.write_safetensors(folder / "sharded" / shard, part, {})
    (folder / "sharded/model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))
    for name in ("bin", "legacy", "sharded"):
        (folder / name / "model.safetensors").unlink()
    run("pretrain", *PRETRAIN, "--start", folder / "start", "--corpus", folder / "c4-0.json.gz", "--out", folder / "pretrained", "--steps", 3)
    finetune(folder / "sni", folder / "start", folder / "finetuned", "--steps", 1)
    model = load_model(folder / "finetuned")
    model.save_task(model.encode_instruction(random_ids(1, 5)), folder / "finetuned/a.task")
    return folder


@pytest.mark.parametrize("trials", [pytest.param(range(24), id="few"), pytest.param(range(24, 1024), id="many", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_read_or_refused_in_one_line_that_names_it(files, tmp_path, name, trials):
    """The whole file is read; of the damaged ones some are refused, or the damage would be none. None takes minutes."""
    file, kinds, read = KINDS[name]
    path, refusals, faults = files / file, 0, []
    content, before = path.read_bytes(), shutil.copytree(path.parent, tmp_path / "before")
    faulthandler.dump_traceback_later(100 + len(trials), exit=True)
    for trial in [None, *trials]:
        draw = random.Random(f"{name}/{trial}")
        damage = draw.choice(kinds)
        path.write_bytes(content if trial is None else damage(draw, content))
        try:
            read(path)
        except BaseException as error:  # a panic of a library in Rust is no Exception
            line = str(error)
            is_fine = type(error) is InputError and (path.name in line or str(path.parent) in line) and trial is not None
            if not (is_fine and line.isprintable() and len(line) < 600):
                faults.append(f"trial {trial} ({damage.__name__}): {type(error).__name__}: {line[:300]}")
            refusals += is_fine
        shutil.rmtree(path.parent)
        shutil.copytree(before, path.parent)
    faulthandler.cancel_dump_traceback_later()
    assert not faults, "\n".join(faults)
    assert refusals > len(trials) / 10 or name in ("inputs", "plain corpus", "log.jsonl of a run"), "where damaged lines are left out"


class MakesAFolder:
    """A pickle of it runs code wherever it is read without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


def test_a_pickle_that_wants_to_run_code_is_refused(files, tmp_path):
    path, content = shutil.copytree(files / "bin", tmp_path / "bin") / "pytorch_model.bin", {"a": MakesAFolder(tmp_path / "it-ran")}
    for write in (torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2))):
        write(content, path)
        with pytest.raises(InputError, match="pytorch_model.bin"):
            T5.from_pretrained(path.parent)
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("change", [
    {"run": 5}, {"max_input": "x"}, {"max_input": 3}, {"max_target": 10**9}, {"system": "foo"}, {"precision": "fp8"}, {"dropout": float("nan")},
])  # fmt: skip
def test_settings_of_a_run_that_make_no_sense_are_refused(files, tmp_path, change):
    """Too rare among random damage."""
    path = shutil.copytree(files / "finetuned", tmp_path / "finetuned") / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **change} if "run" in change else {**config, "run": {**config["run"], **change}}))
    with pytest.raises(InputError, match=f"config.json.*{'' if 'run' in change else min(change)}"):
        predict(path)
