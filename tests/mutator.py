"""Seeded damage to files. A `Damage` takes a source of random numbers and the bytes of a file, and damages them."""

import gzip
import io
import json
import pickletools
import random
import zipfile
from typing import Callable

Damage = Callable[[random.Random, bytes], bytes]

PROOF = "it-ran"  # the folder that appears where a damaged pickle is obeyed
NUMBERS = [0, 1, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 10**12, 10**18]


# ------------------------------------------------------------------------ bytes


def cut(draw: random.Random, data: bytes) -> bytes:
    """Only the beginning."""
    return data[: draw.randrange(len(data))]


def flip_bits(draw: random.Random, data: bytes) -> bytes:
    """One to eight bits."""
    damaged = bytearray(data)
    for _ in range(draw.randint(1, 8)):
        damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def splice(draw: random.Random, data: bytes) -> bytes:
    """A chunk in place of another of some other length."""
    chunk, (begin, end) = data[slice(*_span(draw, data))], _span(draw, data)
    return data[:begin] + chunk + data[end:]


def repeat(draw: random.Random, data: bytes) -> bytes:
    """A chunk, several times."""
    begin, end = _span(draw, data)
    return data[:begin] + data[begin:end] * draw.randint(2, 50) + data[end:]


def insert_foreign_bytes(draw: random.Random, data: bytes) -> bytes:
    """Zeros, or what is no UTF-8: half a character, an overlong one, half of a surrogate pair, one beyond Unicode."""
    place = draw.randrange(len(data) + 1)
    foreign = [b"\0", b"\0" * 64, b"\xff\xfe", b"\xc3", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\x80" * 9]
    return data[:place] + draw.choice(foreign) + data[place:]


def _span(draw: random.Random, data: bytes) -> tuple[int, int]:
    begin = draw.randrange(len(data) + 1)
    return begin, min(len(data), begin + draw.randint(1, 200))


BYTES = (cut, flip_bits, splice, repeat, insert_foreign_bytes)


# ------------------------------------------------------------------------ JSON

NESTED = "as deep as a reader can just follow, or just not"
VALUES = [
    *map(str, NUMBERS), "-1", "0.5", "-0.0", "1e308", "-1e308", "1e999", "1e-320", "NaN", "Infinity", "9" * 400, "9" * 5000,
    "null", "true", "false", '""', '" "', '"text"', r'"\ud800"', r'"\u0000\n\u001b[31m"', '"' + "long " * 50_000 + '"',
    NESTED, "[]", "{}", "[[]]", "[null]", '["text"]', '{"a": 1}', "[" * 100_000, "[" * 5000 + "]" * 5000, '{"a":' * 700 + "1" + "}" * 700,
]  # fmt: skip


def damage_json(draw: random.Random, data: bytes) -> bytes:
    """One to three values dropped, of another type, absurd, of another place, or given twice under one key."""
    holder, texts = {"": json.loads(data)}, {}
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        _damage_value(draw, holder, texts)
    text = json.dumps(holder[""]) if holder else ""
    for mark, value in texts.items():
        text = text.replace(json.dumps(mark), value)
    return text.encode()


def _damage_value(draw: random.Random, holder: dict, texts: dict[str, str]) -> None:
    """`texts` is given what cannot be said by a Python object, under a mark that stands for it."""
    container, key = _somewhere(draw, holder)
    kind = draw.choice(("drop", "replace", "replace", "copy", "twice"))
    mark, value, depth = f"@{len(texts)}@", draw.choice(VALUES), draw.randint(900, 1000)
    value = "[" * depth + "]" * depth if value is NESTED else value
    if kind == "drop":
        del container[key]
    elif kind == "copy":
        other, place = _somewhere(draw, holder)
        container[key] = json.loads(json.dumps(other[place]))
    else:
        again = f"{json.dumps(container[key])}, {json.dumps(key)}: {value}"
        texts[mark] = again if kind == "twice" and isinstance(container, dict) and container is not holder else value
        container[key] = mark


def _somewhere(draw: random.Random, holder: dict) -> tuple[dict | list, str | int]:
    """A container and a key of it: down from the root, so that the few upper values are met as often as the many lower."""
    container, key = holder, ""
    if not holder:
        holder[""] = None
    while isinstance(container[key], (dict, list)) and container[key] and draw.random() < 0.85:
        container = container[key]
        key = draw.choice(list(container) if isinstance(container, dict) else range(len(container)))
    return container, key


def damage_line(draw: random.Random, data: bytes) -> bytes:
    """One line of a file of JSON lines: its JSON, its bytes, or its end."""
    lines = data.splitlines(keepends=True)
    place = draw.randrange(len(lines))
    ends = [b"", b"\n\n", b"\r\n", b"\r", b" \t\n", b"\x0b\n", "\u2028\n".encode()]
    lines[place] = draw.choice(
        (
            lambda: damage_json(draw, lines[place]) + b"\n",
            lambda: draw.choice(BYTES)(draw, lines[place]),
            lambda: lines[place].rstrip(b"\n") + draw.choice(ends),
        )
    )()
    return b"".join(lines)


# ------------------------------------------------------------------------ formats with lengths


def damage_safetensors_header(draw: random.Random, data: bytes) -> bytes:
    """The JSON of the header, its length, or both."""
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length] if draw.random() < 0.2 else damage_json(draw, data[8 : 8 + length])
    said = draw.choice([len(header)] * 20 + [len(header) - 1, len(header) + 8, len(data), *NUMBERS])
    return max(said, 0).to_bytes(8, "little") + header + data[8 + length :]


def damage_protobuf_length(draw: random.Random, data: bytes) -> bytes:
    """The length of a field of the message, which then does not fit its content."""
    _, _, begin, end = draw.choice(_protobuf_fields(data))
    length = draw.choice([end - begin - 1, end - begin + 1, *NUMBERS, 2**70])
    return data[: begin - len(_varint(end - begin))] + _varint(max(length, 0)) + data[begin:]


def damage_protobuf_field(draw: random.Random, data: bytes) -> bytes:
    """The content of a field, whose length is set right; each kind of field as often as any other."""
    found = _protobuf_fields(data)
    kind = draw.choice(sorted({number for number, *_ in found}))
    _, _, begin, end = draw.choice([field for field in found if field[0] == kind])
    content = draw.choice(BYTES)(draw, data[begin:end])
    return data[: begin - len(_varint(end - begin))] + _varint(len(content)) + content + data[end:]


def _protobuf_fields(data: bytes) -> list[tuple[int, int, int, int]]:
    """Number, start, and begin and end of the content of each field that is not empty; all of them have a length."""
    found, position = [], 0
    while position < len(data):
        start, number = position, data[position] >> 3
        length, position, shift = 0, position + 1, 0
        while True:
            length |= (data[position] & 127) << shift
            position, shift = position + 1, shift + 7
            if data[position - 1] < 128:
                break
        found.append((number, start, position, position + length))
        position += length
    return [field for field in found if field[3] > field[2]]


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes([*encoded, number])


# ------------------------------------------------------------------------ archives and pickles

ATTACK = b"cos\nmkdir\n(X" + len(PROOF).to_bytes(4, "little") + PROOF.encode() + b"tR"
OBJECTS = [  # opcodes that put one object on the stack
    ATTACK, b"N", b"\x88", b"K\x00", b"J\xff\xff\xff\xff", b"\x8a\x08" + b"\xff" * 7 + b"\x0f", b"\x8a\x06" + b"\xff" * 5 + b"\x00",
    b"G\x7f\xf8" + bytes(6), b"X\x01\0\0\0a", b"]", b"}", b")", b"\x8a\x09" + b"\xff" * 8 + b"\x00", b"]" * 3000 + b"a" * 2999,
    b"cbuiltins\neval\n", b"ctorch\nload\n", b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n",
]  # fmt: skip


def damage_pickle(draw: random.Random, data: bytes) -> bytes:
    """An operation of a pickle, or of several behind each other, is dropped, doubled, or puts another object there."""
    bounds = _pickle_operations(data)
    for _ in range(draw.choice((1, 1, 2))):
        place = draw.randrange(len(bounds) - 1)
        begin, end = bounds[place], bounds[place + 1]
        old, other = data[begin:end], draw.choice(OBJECTS)
        new = draw.choice((b"", old * 2, other, other, other, old + b"0" + other))
        data = data[:begin] + new + data[end:]
        bounds = [bound if bound <= begin else bound + len(new) - len(old) for bound in bounds]
    return data


def _pickle_operations(data: bytes) -> list[int]:
    """Where each operation begins, and where the last one ends."""
    file, bounds = io.BytesIO(data), [0]
    try:
        while file.tell() < len(data):
            bounds += [file.tell() for _ in pickletools.genops(file)]
    except (ValueError, UnicodeDecodeError):  # here the raw numbers begin
        pass
    return bounds


def damage_zip(draw: random.Random, data: bytes) -> bytes:
    """A record of an archive is damaged, dropped or called otherwise, and all checksums are right."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        records = {name: old.read(name) for name in old.namelist()}
        pickled = next(name for name in records if name.endswith("data.pkl"))
        name = draw.choice([pickled] * 2 * len(records) + list(records))
        content = records.pop(name)
        kind = draw.choice((damage_pickle,) * 6 + BYTES if name == pickled else BYTES)
        what = draw.random()
        if what > 0.05:
            records[name if what > 0.1 else name + "x"] = kind(draw, content) if content else b"\0"
        for name, content in records.items():
            new.writestr(name, content)
    return out.getvalue()


def compressed(damage: Damage) -> Damage:
    """The same damage to what a gzip file holds."""

    def damage_inside(draw: random.Random, data: bytes) -> bytes:
        return gzip.compress(damage(draw, gzip.decompress(data)), compresslevel=1, mtime=0)

    damage_inside.__name__ = f"{damage.__name__} inside"
    return damage_inside
