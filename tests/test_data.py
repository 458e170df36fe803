"""Tokenizer, tasks, prompts, pretraining chunks and metrics against their references."""

import gzip
import io
import json
import math
import os
import random
import re
import subprocess
import sys
from itertools import chain

import pytest
import sentencepiece
from conftest import SENTENCES, SHARED, TASK, needs_shared, write_prompted, write_shards, write_task
from nltk.stem.porter import PorterStemmer
from rouge_score import rouge_scorer
from tokenizers import Tokenizer

import data
from data import (
    EOS,
    DataError,
    Example,
    HINTFormat,
    Instance,
    NoInstructFormat,
    PretrainingChunks,
    Shuffled,
    Task,
    TkInstructFormat,
    collate,
    encode_tasks,
    exact_match,
    load_tasks,
    load_tokenizer,
    microbatches,
    rouge_l,
    score,
    toy_tokenizer,
    toy_world,
)  # fmt: skip

HARD = [
    "",
    " ",
    "  lead",
    "trail  ",
    "\n\n",
    "<extra_id_0> and <extra_id_99>",
    "a<extra_id_0>b",
    "</s> inside",
    "日本語",
    "{brace}",
    "a\u00a0b\u200bc",
    "É" * 30,
]


# ------------------------------------------------------------------------ tokenizer


def test_spiece_model_gives_the_ids_of_sentencepiece(spiece, tokenizer):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(spiece))
    for text in SENTENCES + [text for text in HARD if "<" not in text]:
        assert tokenizer.encode(text).ids == [*reference.encode(text), EOS], text
        if data.UNKNOWN not in reference.encode(text):  # which sentencepiece shows as a mark and T5 as nothing
            assert tokenizer.decode(tokenizer.encode(text).ids) == reference.decode(reference.encode(text)), text
    pieces = reference.get_piece_size()
    assert tokenizer.get_vocab_size() == pieces + 100
    assert tokenizer.token_to_id("<extra_id_0>") == pieces + 99 and tokenizer.token_to_id("<extra_id_99>") == pieces


@needs_shared
def test_both_real_files_give_the_same_ids_and_those_of_sentencepiece():
    texts = [
        line
        for task in load_tasks(SHARED / "sni", "test")
        for line in (task.definition, *(i.input for i in task.instances))
    ] + SENTENCES
    from_json, from_spiece = load_tokenizer(SHARED / "t5"), load_tokenizer(SHARED / "t5" / "spiece.model")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(SHARED / "t5" / "spiece.model"))
    assert from_json.get_vocab_size() == from_spiece.get_vocab_size() == 32_100
    for text in texts + HARD:
        assert from_json.encode(text).ids == from_spiece.encode(text).ids, text
    for text in texts:
        assert from_spiece.encode(text).ids == [*reference.encode(text), EOS], text
    assert len(texts) > 1000


def test_a_public_name_is_read_offline_from_the_hub_s_cache(tmp_path, spiece, tokenizer):
    """A repository that ships spiece.model alone, in a process that may not use the network."""
    snapshot = tmp_path / "models--someone--v1_1" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "spiece.model").write_bytes(spiece.read_bytes())
    (tmp_path / "models--someone--v1_1" / "refs").mkdir()
    (tmp_path / "models--someone--v1_1" / "refs" / "main").write_text("a" * 40)
    program = (
        "import data; print(data.load_tokenizer('someone/v1_1').encode('the cat').ids)\n"
        "try: data.load_tokenizer('someone/absent')\n"
        "except data.DataError as error: print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        str(tokenizer.encode("the cat").ids),
        "someone/absent: no tokenizer.json and no spiece.model there",
    ]


def test_tokenizer_json_is_preferred_and_read_as_it_is(tmp_path, spiece, tokenizer):
    (tmp_path / "spiece.model").write_bytes(spiece.read_bytes())
    assert load_tokenizer(tmp_path).encode("the cat").ids == tokenizer.encode("the cat").ids
    other = Tokenizer.from_str(tokenizer.to_str())
    other.enable_truncation(3)
    other.enable_padding(length=50)
    other.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "spiece.model").write_bytes(b"junk")
    assert (
        load_tokenizer(tmp_path).encode("the cat sat on the mat").ids == tokenizer.encode("the cat sat on the mat").ids
    )


@pytest.mark.parametrize(
    "changes, message", [(dict(pad_id=3, bos_id=0), "does not begin with"), (dict(model_type="bpe"), "another kind")]
)
def test_a_sentencepiece_model_that_is_not_t5_s_is_refused(tmp_path, changes, message):
    model = io.BytesIO()
    layout = dict(model_type="unigram", vocab_size=140, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False)
    if "model_type" in changes:
        layout.pop("hard_vocab_limit")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 5), model_writer=model, minloglevel=2, **{**layout, **changes}
    )
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path)


def test_files_that_are_no_tokenizer_are_refused(tmp_path, spiece):
    with pytest.raises(DataError, match="no tokenizer.json and no spiece.model"):
        load_tokenizer(tmp_path)
    whole = spiece.read_bytes()
    for content in (b"", b"junk", whole[: len(whole) // 2], whole[:-1], b"\xff" * 100, b"\x0a\xff\xff\xff\xff\x0f"):
        (tmp_path / "spiece.model").write_bytes(content)
        with pytest.raises(DataError, match="spiece.model"):
            load_tokenizer(tmp_path)
    for content in (b"", b"{}", b"[", Tokenizer(data.models.WordLevel({"a": 0}, "a")).to_str().encode()):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(DataError, match="tokenizer.json"):
            load_tokenizer(tmp_path)


# ------------------------------------------------------------------------ tasks


def test_tasks_are_read_as_the_repository_lays_them_out(tmp_path):
    write_task(tmp_path)
    [task] = load_tasks(tmp_path, "train", max_instances=3)
    assert (task.name, task.definition, task.examples) == (
        "task1_a",
        "Say it again, and give me the book that lies on the table.",
        (Example("x", "y"),),
    )
    assert (
        task.instances[1] == Instance("task1_a-1", "in 1 the cat sat on the mat and the dog", ("out 1", "other"))
        and len(task.instances) == 3
    )
    assert len(load_tasks(tmp_path, "train")[0].instances) == 5


@needs_shared
def test_the_real_tasks_are_all_read():
    train, test = load_tasks(SHARED / "sni", "train"), load_tasks(SHARED / "sni", "test")
    assert (len(train), len(test)) == (146, 12)
    assert {len(task.instances) for task in test} == {100} and not {t.name for t in train} & {t.name for t in test}


BAD_TASKS = {
    "lacks a Definition": dict(Definition=None),
    "lacks Instances": dict(Instances=None),
    "lacks Instances ": dict(Instances=[]),
    "instance 0 has no output": dict(Instances=[{"id": "a", "input": "x", "output": []}]),
    "no text as 'input'": dict(Instances=[{"id": "a", "output": ["x"]}]),
    "Positive Examples is not a list": {"Positive Examples": 3},
    "no text as 'output'": {"Positive Examples": [{"input": "x"}]},
}


@pytest.mark.parametrize("message", BAD_TASKS)
def test_a_task_that_lacks_something_is_named(tmp_path, message):
    write_task(tmp_path, **BAD_TASKS[message])
    with pytest.raises(DataError, match=f"task1_a.json: .*{message.strip()}"):
        load_tasks(tmp_path, "train")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 10**5])
def test_a_task_that_is_not_json_is_named(tmp_path, content):
    write_task(tmp_path)
    (tmp_path / "tasks" / "task1_a.json").write_bytes(content)
    with pytest.raises(DataError, match="task1_a.json"):
        load_tasks(tmp_path, "train")


def test_missing_folders_splits_and_tasks_are_named(tmp_path):
    with pytest.raises(DataError, match="must hold tasks/ and splits/default/"):
        load_tasks(tmp_path / "absent", "train")
    write_task(tmp_path)
    listing = tmp_path / "splits" / "default" / "train_tasks.txt"
    listing.write_text("\n\n")
    with pytest.raises(DataError, match="the split is empty"):
        load_tasks(tmp_path, "train")
    listing.write_text("task1_a\ntask2_b\n")
    with pytest.raises(DataError, match="task2_b.json: no such file"):
        load_tasks(tmp_path, "train")


def test_prompted_examples_of_one_data_set_and_instruction_are_a_task(tmp_path):
    either, true, summary = load_tasks(write_prompted(tmp_path), "train")
    assert [(task.name, task.definition) for task in (either, true, summary)] == [
        ("rte", "Is it true that [MASK]? [MASK] or [MASK]?"), ("rte", "[MASK]. True?"), ("xsum", "[MASK] Sum it up: [MASK]")
    ]  # fmt: skip
    assert either.instances == (
        Instance("rte-1", "the cat sat\nyes\nno", ("no",), ("yes", "no")),
        Instance("mine", "yes\nno", ("yes",), ("yes", "no")),
    )
    assert true.instances == (Instance("rte-2", "the dog barked", ("no",), ("no", "yes")),)
    assert summary.instances == (Instance("xsum-4", "the book", ("a book",)),) and summary.examples == ()
    assert [len(task.instances) for task in load_tasks(tmp_path, "train", 1)] == [1, 1, 1]


def test_a_joint_input_is_the_prompt_with_its_fields_filled_in(tmp_path):
    either, true, summary = load_tasks(write_prompted(tmp_path), "train", joint=True)
    assert [instance.input for task in (either, true, summary) for instance in task.instances] == [
        "Is it true that the cat sat? yes or no?", "Is it true that yes? yes or no?", "the dog barked. True?", "Sum it up: the book"
    ]  # fmt: skip
    assert either.definition == "Is it true that [MASK]? [MASK] or [MASK]?"
    with pytest.raises(DataError, match="train.jsonl: line 4: the instruction has 2 .MASK. for 1 fields"):
        load_tasks(write_prompted(tmp_path, input="one"), "train", joint=True)
    assert load_tasks(tmp_path, "train")[-1].instances[0].input == "one"


BAD_EXAMPLES = {
    "no text as 'task'": dict(task=3),
    "'a.nb' is not the name of a task": dict(task="a\nb"),
    "no text as 'instruction'": dict(instruction=None),
    "no text as 'target'": dict(target=["a book"]),
    "'input' is not a list of texts": dict(input=["the book", 3]),
    "'input' is not a list of texts ": dict(input=None),
    "'choices' is not a list of texts": dict(choices={"yes": 1}),
    "the target is none of the choices": dict(choices=["yes", "no"]),
}


@pytest.mark.parametrize("message", BAD_EXAMPLES)
def test_a_prompted_example_that_lacks_something_is_named_by_its_line(tmp_path, message):
    with pytest.raises(DataError, match=f"train.jsonl: line 4: .*{message.strip()}"):
        load_tasks(write_prompted(tmp_path, **BAD_EXAMPLES[message]), "train")


@pytest.mark.parametrize("content", [b"{", b"\n", b"\xff\xfe", b"[" * 10**5, b"a" * (1 << 25)])
def test_a_line_that_is_no_prompted_example_is_named(tmp_path, content):
    path = write_prompted(tmp_path) / "train.jsonl"
    path.write_bytes(path.read_bytes() + content)
    with pytest.raises(DataError, match="train.jsonl: line 5 cannot be read as JSON") as refused:
        load_tasks(tmp_path, "train")
    assert ("longer than 16,777,216 bytes" in str(refused.value)) == (len(content) > 1 << 24)
    path.write_bytes(b"[]\n")
    with pytest.raises(DataError, match="train.jsonl: line 1: "):
        load_tasks(tmp_path, "train")
    path.write_bytes(b"")
    with pytest.raises(DataError, match="train.jsonl: the split is empty"):
        load_tasks(tmp_path, "train")


def test_a_folder_of_super_natural_instructions_stays_one_and_has_no_joint_setting(tmp_path):
    write_prompted(write_task(tmp_path))
    assert [task.name for task in load_tasks(tmp_path, "train")] == ["task1_a"]
    with pytest.raises(DataError, match="holds no prompted examples"):
        load_tasks(tmp_path, "train", joint=True)


# ------------------------------------------------------------------------ prompts


def test_hint_reads_the_definition_alone_or_behind_its_examples(tokenizer):
    assert HINTFormat(tokenizer, 0).instruction(TASK) == "Give the answer"
    assert HINTFormat(tokenizer, 2).instruction(TASK) == (
        " Positive Example 2 -\nInput: two?\n Output: 2!\n Positive Example 1 -\nInput: one.\n Output: 1.\nDefinition: Give the answer"
    )
    [(instruction, inputs)] = HINTFormat(tokenizer, 2)(TASK)
    assert instruction == tokenizer.encode(HINTFormat(tokenizer, 2).instruction(TASK)).ids
    assert inputs == tokenizer.encode("four").ids


def test_tk_instruct_reads_the_published_prompt(tokenizer):
    assert "".join(TkInstructFormat(tokenizer, 0).prompt(TASK, TASK.instances[0])) == (
        "Definition: Give the answer.\n\nNow complete the following example -\nInput: four.\nOutput: "
    )
    whole = (
        "Definition: Give the answer.\n\n"
        " Positive Example 1 -\nInput: one.\n Output: 1.\n\n"
        " Positive Example 2 -\nInput: two?\n Output: 2!\n\n"
        "Now complete the following example -\nInput: four.\nOutput: "
    )
    assert "".join(TkInstructFormat(tokenizer, 2).prompt(TASK, TASK.instances[0])) == whole
    assert TkInstructFormat(tokenizer, 2)(TASK) == [([EOS], tokenizer.encode(whole).ids)]


def test_no_instruct_reads_the_input_alone(tokenizer):
    assert NoInstructFormat(tokenizer, 2)(TASK) == [([EOS], tokenizer.encode("four").ids)]


def test_examples_that_do_not_fit_are_left_out(tokenizer):
    """HINT tries the next one, Tk-Instruct stops, as published; limits are set so that the long one alone is too much."""
    task = Task("t", "Say it", (Example("long " * 40, "1"), Example("two", "2")), (Instance("i", "four", ("4",)),))
    hint = HINTFormat(tokenizer, 2, max_instruction=80)
    assert "Example 2" in hint.instruction(task) and "Example 1" not in hint.instruction(task)
    tk = TkInstructFormat(tokenizer, 2, max_input=120)
    assert "Example" not in tk.prompt(task, task.instances[0])[0]
    assert "Example 1" in TkInstructFormat(tokenizer, 2).prompt(task, task.instances[0])[0]


def test_an_example_that_just_fits_is_taken(tokenizer):
    """With </s> and, for Tk-Instruct, with the query counted."""
    whole = len(tokenizer.encode(HINTFormat(tokenizer, 1).instruction(TASK)).ids)
    assert "Example" in HINTFormat(tokenizer, 1, max_instruction=whole).instruction(TASK)
    assert "Example" not in HINTFormat(tokenizer, 1, max_instruction=whole - 1).instruction(TASK)
    whole = len(tokenizer.encode("".join(TkInstructFormat(tokenizer, 1).prompt(TASK, TASK.instances[0]))).ids)
    assert "Example" in TkInstructFormat(tokenizer, 1, max_input=whole).prompt(TASK, TASK.instances[0])[0]
    assert "Example" not in TkInstructFormat(tokenizer, 1, max_input=whole - 1).prompt(TASK, TASK.instances[0])[0]


def test_a_cut_keeps_the_beginning_and_the_end_mark():
    assert data.cut([5, 6, 7, 8, EOS], 3) == [5, 6, EOS] and data.cut([5, 6, EOS], 3) == [5, 6, EOS]


@pytest.mark.parametrize("system", [HINTFormat, TkInstructFormat, NoInstructFormat])
@pytest.mark.parametrize("limit", [60, 80, 120])
def test_truncation_loses_neither_the_query_nor_the_end(tokenizer, system, limit):
    for definition, text in (("word " * 100, "the cat"), ("word", "many " * 100), ("word " * 100, "many " * 100)):
        task = Task("t", definition, (), (Instance("i", text, ("4",)),))
        [(instruction, ids)] = system(tokenizer, 0, limit, limit)(task)
        assert len(ids) <= limit and len(instruction) <= limit and ids[-1] == instruction[-1] == EOS
        first = text.split()[0]
        assert first in tokenizer.decode(ids), "the input must be there"
        if system is TkInstructFormat:
            assert tokenizer.decode(ids).endswith(
                "Output:"
            ) and "Now complete the following example" in tokenizer.decode(ids)
        if len(text) < 20:
            assert text in tokenizer.decode(ids), "a short input is never cut"


def test_targets_keep_their_end_and_one_reference_is_drawn_by_the_seed(tokenizer):
    task = Task("t", "d", (), tuple(Instance(str(n), "x", ("aa " * 50, "b")) for n in range(20)))
    prompts = HINTFormat(tokenizer)
    one, same, other = (encode_tasks([task], prompts, 8, seed) for seed in (0, 0, 1))
    assert one == same != other
    assert {example.target[-1] for example in one} == {EOS} and {len(example.target) for example in one} <= {2, 3, 8}
    assert len({tuple(example.target) for example in one}) == 2


# ------------------------------------------------------------------------ sources


def test_every_epoch_holds_each_example_once_in_another_order():
    source = Shuffled(list(range(10)), seed=3)
    first, second = source.take(10), source.take(10)
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert Shuffled(list(range(10)), seed=3).take(20) == first + second
    assert Shuffled(list(range(10)), seed=4).take(10) != first


def test_groups_stay_together_and_their_order_changes():
    source = Shuffled(list(range(12)), seed=3, group=4)
    first, second = source.take(12), source.take(12)
    for epoch in (first, second):
        assert sorted(epoch) == list(range(12))
        assert all(epoch[start + 1 : start + 4] == [epoch[start] + n for n in (1, 2, 3)] for start in (0, 4, 8))
    assert len({tuple(Shuffled(list(range(12)), seed, group=4).take(12)) for seed in range(30)}) == 6, (
        "all orders of three groups"
    )


def test_a_source_goes_on_where_it_stopped(tokenizer, tmp_path):
    shards = write_shards(tmp_path, 300)
    for new in (
        lambda p: Shuffled(list(range(10)), 3, p or 0),
        lambda p: PretrainingChunks(shards, tokenizer, 40, 3, p or (0, 0)),
    ):
        whole = new(None).take(90)
        for stop in (1, 7, 10, 33, 89):
            begun = new(None)
            begun.take(stop)
            assert new(json.loads(json.dumps(begun.position))).take(90 - stop) == whole[stop:]


def test_chunks_are_the_text_split_at_two_points(tokenizer, tmp_path):
    """Put together again, the chunks of a group are its documents, each ended by </s>, cut to the length."""
    shards = write_shards(tmp_path, 256)
    texts = [text for path in shards for text in data.read_shard(path)]
    stream = [i for text in texts[:128] for i in tokenizer.encode(text).ids]
    segments = len(stream) // 64
    chunks = PretrainingChunks(shards, tokenizer, 64, seed=0).take(segments)
    joined = [i for parts in chunks for part in parts for i in part[:-1]]
    assert joined == stream[: segments * 64]
    assert all(part[-1] == EOS for parts in chunks for part in parts)
    assert all(parts.instruction[:-1] and parts.target[:-1] for parts in chunks), "only the input may be empty"


def test_each_group_and_each_seed_is_split_anew(tokenizer, tmp_path):
    """All documents are equal, so only the split points can differ."""
    path = tmp_path / "same.json.gz"
    path.write_bytes(gzip.compress((json.dumps({"text": SENTENCES[0]}) + "\n").encode() * 256))

    segments = 128 * len(tokenizer.encode(SENTENCES[0]).ids) // 40

    def lengths(seed):
        return [tuple(map(len, parts)) for parts in PretrainingChunks([path], tokenizer, 40, seed).take(2 * segments)]

    assert lengths(0)[:segments] != lengths(0)[segments:] and lengths(0) != lengths(1) and lengths(0) == lengths(0)


def test_split_points_are_uniform_and_independent():
    """As in the paper's code: p1 uniform, p2 uniform behind it, so the parts average 1/2, 1/4 and 1/4 of the length."""
    draw = random.Random(0)
    lengths = [[len(part) - 1 for part in data.split_for_hint(list(range(512)), draw)] for _ in range(20_000)]
    means = [sum(column) / len(lengths) for column in zip(*lengths)]
    assert means == pytest.approx([255, 127, 130], abs=3)  # the standard error of a mean is about 1
    assert {sum(parts) for parts in lengths} == {512} and min(parts[1] for parts in lengths) == 0
    assert sum(parts[1] == 0 for parts in lengths) / len(lengths) == pytest.approx(0.013, abs=0.004)


def test_caclm_reads_around_input_and_target(tokenizer, tmp_path):
    """Put where the </s> in what the hypernetwork reads stands, they make the segments that the paper's split makes."""
    shards = write_shards(tmp_path, 256)
    whole = [[i for part in parts for i in part[:-1]] for parts in PretrainingChunks(shards, tokenizer, 64, 0).take(40)]
    for parts, segment in zip(PretrainingChunks(shards, tokenizer, 64, 0, split="caclm").take(40), whole, strict=True):
        around, given, target = (part[:-1] for part in parts)
        assert all(part[-1] == EOS for part in parts) and target
        marks = [place for place, token in enumerate(around) if token == EOS]  # those of documents, too
        assert segment in [around[:mark] + given + target + around[mark + 1 :] for mark in marks]


def test_split_points_of_caclm_are_uniform_one_behind_the_other():
    """So that the part before averages half of the length, and each of the next two half of what is left of it."""
    draw = random.Random(0)
    lengths = []
    for _ in range(20_000):
        around, middle, target = data.split_for_caclm(list(range(2, 514)), draw)
        before = around.index(EOS)
        lengths.append([before, len(middle) - 1, len(target) - 1, len(around) - before - 2])
    means = [sum(column) / len(lengths) for column in zip(*lengths)]
    assert means == pytest.approx([254, 127.25, 64.6, 66.1], abs=3)
    assert {sum(parts) for parts in lengths} == {512}
    assert [min(column) for column in zip(*lengths)] == [1, 0, 1, 3]
    shortest = [data.split_for_caclm(list(range(2, 10)), draw) for _ in range(1000)]
    found = {(around.index(EOS), len(middle) - 1, len(target) - 1) for around, middle, target in shortest}
    cuts = [(p1, p2, p3) for p1 in range(1, 4) for p2 in range(p1, 5) for p3 in range(p2 + 1, 6)]
    assert found == {(p1, p2 - p1, p3 - p2) for p1, p2, p3 in cuts}, "all ways to split the shortest segment there is"


def test_shards_are_streamed(tokenizer, tmp_path, monkeypatch):
    """The first examples come before the second group of documents is read."""
    shards, read = write_shards(tmp_path, 1000, shards=1), []
    real = data.read_shard
    monkeypatch.setattr(data, "read_shard", lambda path, skip: (read.append(1) or text for text in real(path, skip)))
    PretrainingChunks(shards, tokenizer, 64, seed=0).take(3)
    assert len(read) == 128


def test_a_damaged_shard_names_its_line(tokenizer, tmp_path):
    path = tmp_path / "bad.json.gz"
    good = json.dumps({"text": "the cat"})
    for lines, line in ((["{"], 1), ([good, '{"url": 3}'], 2), ([good, good, '{"text": 3}'], 3)):
        path.write_bytes(gzip.compress("\n".join(lines).encode()))
        with pytest.raises(DataError, match=f"bad.json.gz: line {line} "):
            PretrainingChunks([path], tokenizer, 8, 0).take(1)
    path.write_bytes(gzip.compress(good.encode() * 100)[:-30])
    with pytest.raises(DataError, match="bad.json.gz"):
        PretrainingChunks([path], tokenizer, 8, 0).take(1)
    whole = bytearray(gzip.compress(random.Random(0).randbytes(3000)))
    whole[1000:1010] = b"\xff" * 10  # damaged in the middle, not cut
    path.write_bytes(whole)
    with pytest.raises(DataError, match="bad.json.gz"):
        PretrainingChunks([path], tokenizer, 8, 0)
    path.write_bytes(gzip.compress(b""))
    with pytest.raises(DataError, match="no text"):
        PretrainingChunks([path], tokenizer, 8, 0).take(1)
    path.write_bytes(gzip.compress(b'{"text": ""}\n'))
    with pytest.raises(DataError, match="128 texts are shorter than one segment of 512 tokens"):
        PretrainingChunks([path], tokenizer, 512, 0).take(1)
    with pytest.raises(DataError, match="absent.json.gz"):
        PretrainingChunks([tmp_path / "absent.json.gz"], tokenizer, 8, 0).take(1)


def test_a_batch_is_padded_with_zeros_and_labels_with_minus_100():
    batch = collate([data.Ids([5, 1], [6, 7, 1], [1]), data.Ids([5, 5, 1], [1], [8, 1])])
    assert batch.instruction_ids.tolist() == [[5, 1, 0], [5, 5, 1]]
    assert batch.input_ids.tolist() == [[6, 7, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[1, -100], [8, 1]]


# ------------------------------------------------------------------------ the toy world


@pytest.fixture(scope="module")
def world():
    return toy_world(seed=0)


def padded_tokens(part) -> int:
    """What the model is given of some examples: each distinct instruction once, all of them padded."""
    instructions = {tuple(example.instruction) for example in part}
    longest = [max(map(len, lengths)) for lengths in zip(*part)]
    return len(instructions) * longest[0] + len(part) * (longest[1] + longest[2])


@pytest.fixture
def mixed_examples() -> list[data.Ids]:
    """Two hundred examples of forty tasks, whose lengths are spread as widely as real ones."""
    draw = random.Random(0)

    def ids(mean: int) -> list[int]:
        return [draw.randint(2, 50) for _ in range(1 + int(draw.lognormvariate(math.log(mean), 1)))]

    tasks = [ids(60) for _ in range(40)]
    return [data.Ids(draw.choice(tasks), ids(30), ids(9)) for _ in range(200)]


def test_microbatches_hold_every_example_once_and_no_more_tokens_than_allowed(mixed_examples):
    for tokens in (1, 100, 1000, 5000, 10**6):
        parts = microbatches(mixed_examples, tokens)
        assert sorted(chain(*parts)) == sorted(mixed_examples)
        assert all(len(part) == 1 or padded_tokens(part) <= tokens for part in parts)
    assert len(parts) == 1


def test_microbatches_are_cut_where_the_least_padding_is_left(mixed_examples):
    """The cut is found again by trying every place of every order."""
    which = {
        instruction: number for number, instruction in enumerate(dict.fromkeys(tuple(e[0]) for e in mixed_examples))
    }
    orders = (
        lambda e: (len(e.instruction), which[tuple(e.instruction)], len(e.input)),
        lambda e: (len(e.input), len(e.target)),
        lambda e: (len(e.target), len(e.input)),
    )
    least = min(
        padded_tokens(ordered[:place]) + padded_tokens(ordered[place:])
        for ordered in (sorted(mixed_examples, key=order) for order in orders)
        for place in range(1, len(ordered))
    )
    parts = microbatches(mixed_examples, padded_tokens(mixed_examples) - 1)
    assert len(parts) == 2 and sum(map(padded_tokens, parts)) == least


def test_microbatches_of_like_lengths_waste_little(mixed_examples):
    """Several times less than the same number of microbatches in random order."""
    parts = microbatches(mixed_examples, 2000)
    size = -(-len(mixed_examples) // len(parts))
    random_parts = [mixed_examples[start : start + size] for start in range(0, len(mixed_examples), size)]
    assert sum(map(padded_tokens, parts)) < sum(map(padded_tokens, random_parts)) / 2


def test_the_toy_world_has_the_form_of_the_real_one(world):
    assert (len(world.train), len(world.unseen_arguments), len(world.unseen_compositions)) == (5000, 64, 64)
    for task in (*world.train[:200], *world.unseen_arguments, *world.unseen_compositions):
        assert len(task.examples) == 5 and task.definition.endswith(".")
        texts = [example.input for example in task.examples] + [instance.input for instance in task.instances]
        assert len(set(texts)) == len(texts), "no input twice, or an example would be the answer"
        for text, answer in [*task.examples, *((i.input, i.references[0]) for i in task.instances)]:
            assert 2 <= len(text.split()) <= 5 and world.rules[task.name].answer(text.split()) == answer
    assert (
        len({instance.id for part in world[:3] for task in part for instance in task.instances})
        == 5000 * 12 + 2 * 64 * 4
    )


def slots_of(world, tasks):
    """(argument, selection) pairs and ordered pairs of transformations, by meaning and not by words."""
    rules = [world.rules[task.name] for task in tasks]
    arguments = [{(rule.argument, slot.selection) for slot in rule.slots if rule.argument} for rule in rules]
    return arguments, [tuple(slot.transformation for slot in rule.slots) for rule in rules]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_neither_test_set_overlaps_with_training(seed):
    """In meaning: every test task has a pair that no training task has, whatever else the two may share."""
    world = toy_world(seed)
    trained_arguments, trained_compositions = slots_of(world, world.train)
    trained_pairs = set().union(*trained_arguments)
    for pairs in slots_of(world, world.unseen_arguments)[0]:
        assert pairs - trained_pairs
    unseen = slots_of(world, world.unseen_compositions)[1]
    assert not set(unseen) & set(trained_compositions) and all(len(slots) == 2 for slots in unseen)
    assert len(set(unseen)) > 10, "one new composition would prove little"
    assert {slot for slots in unseen for slot in slots} <= {slot for slots in trained_compositions for slot in slots}
    rules = {world.rules[task.name] for task in world.train}
    assert not rules & {world.rules[task.name] for part in world[1:3] for task in part}


def test_what_is_held_out_is_an_order_and_not_a_pair(world):
    """ "The plural, then twice" may be new where "twice, then the plural" is not: an order must be composed, not recalled."""
    trained, unseen = (set(slots_of(world, tasks)[1]) for tasks in (world.train, world.unseen_compositions))
    assert all(slots[::-1] in trained for slots in unseen)


def test_a_fallback_is_needed_half_of_the_time(world):
    """Else "the fruit, or else the last word" would be learned as one of the two."""
    there = []
    for task in world.train:
        for slot in world.rules[task.name].slots:
            if slot.selection.endswith(data._OR_LAST):
                kind = slot.selection.removesuffix(data._OR_LAST)
                there += [any(data._KIND_OF[word] == kind for word in i.input.split()) for i in task.instances]
    assert len(there) > 10_000 and 0.4 < sum(there) / len(there) < 0.6


def test_a_rule_means_what_its_definition_says():
    """Read by a person, not by the code that made them."""
    words = "horse pear golf".split()

    def answer(*slots, frame="none", argument=""):
        return data.Rule(tuple(data.Slot(*slot) for slot in slots), frame, argument).answer(words)

    assert answer(("fruit", "plural")) == "pears"
    assert answer(("first", "twice"), ("last", "length")) == "horse horse 4"
    assert answer(("animal", "initial"), frame="both", argument="pom") == "pom h pom"
    assert answer(("tool or last", "kind"), frame="end", argument="pom") == "sport pom"
    assert answer(("fruit or last", "negate"), frame="begin", argument="pom") == "pom not pear"
    assert answer(("first", "praise"), ("fruit", "greet")) == "good horse hello pear"
    rule = data.Rule((data.Slot("fruit", "plural"),), "end", "pom")
    said = {rule.definition(random.Random(seed)) for seed in range(300)}
    assert "write the plural of the fruit, and end with pom." in said and len(said) > 50, "in several paraphrases"


def test_the_instruction_must_be_read_to_answer(world):
    """Asked of one input that every rule can be asked of, the tasks have so many answers that no guess is often right."""
    words = "pear horse green cairo drill rice".split()
    answers = [world.rules[task.name].answer(words) for task in world.train]
    assert max(map(answers.count, set(answers))) / len(answers) < 0.02 and len(set(answers)) > 1000
    assert all(world.rules[task.name].argument in task.definition for task in world.train)


def test_the_toy_world_depends_on_the_seed_alone(world):
    assert toy_world(0) == world and toy_world(1).train != world.train
    program = "import data, hashlib; print(hashlib.sha256(repr(data.toy_world(0)).encode()).hexdigest())"
    hashes = {
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(hashes) == 1 and len(hashes.pop().strip()) == 64


def test_the_toy_tokenizer_knows_every_word_and_gives_texts_back(world):
    tokenizer = toy_tokenizer()
    for prompts in (HINTFormat(tokenizer, 2), TkInstructFormat(tokenizer, 2), NoInstructFormat(tokenizer)):
        for task in (*world.train[:300], *world.unseen_arguments, *world.unseen_compositions):
            for ids in prompts(task)[0]:
                assert data.UNKNOWN not in ids and ids[-1] == EOS
    for task in world.train[:300]:
        for text in (task.instances[0].input, *task.instances[0].references):
            assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.get_vocab_size() < 400


# ------------------------------------------------------------------------ metrics


def texts_for_scoring(count=3000):
    """Pairs of answers made of words with every ending that the stemmer knows, some of them real sentences."""
    draw = random.Random(1)
    endings = (
        [suffix for suffix, _ in data._STEP_2 + data._STEP_3]
        + list(data._STEP_4)
        + ["ed", "ing", "ies", "ied", "eed", "y", "s", ""]
    )
    words = [
        "".join(draw.choice("aeiobcdlstyz") for _ in range(draw.randint(1, 4))) + draw.choice(endings)
        for _ in range(400)
    ]
    words += "dying skies news Proceed the cat's U.S. 3.5 naïve -- hello,world succeed innings".split()
    texts = [" ".join(draw.choice(words) for _ in range(draw.randint(0, 12))) for _ in range(count)]
    return texts, [
        " ".join(draw.sample(text.split(), len(text.split()))) if draw.random() < 0.5 else draw.choice(texts)
        for text in texts
    ]


def test_rouge_l_is_that_of_rouge_score_to_the_last_digit():
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    predictions, references = texts_for_scoring()
    found = [rouge_l(said, wanted) for said, wanted in zip(predictions, references)]
    assert found == [scorer.score(wanted, said)["rougeL"].fmeasure for said, wanted in zip(predictions, references)]
    assert len(set(found)) > 50, "scores of zero would agree by themselves"


@needs_shared
def test_rouge_l_is_that_of_rouge_score_on_real_answers():
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    answers = [instance.references[0] for task in load_tasks(SHARED / "sni", "train") for instance in task.instances]
    pairs = list(zip(answers, answers[1:]))[::5] + list(zip(answers, [a.title() + " s" for a in answers]))[::20]
    assert [rouge_l(*pair) for pair in pairs] == [
        scorer.score(wanted, said)["rougeL"].fmeasure for said, wanted in pairs
    ]


def test_stems_are_those_of_nltk():
    stemmer = PorterStemmer()
    special = {
        "controlled",
        "controll",
        "bying",
        "buzzed",
        "hissing",
        "skies",
        "flies",
        "tied",
        "enjoyment",
        "generally",
        "roll",
    }
    words = {word for texts in texts_for_scoring() for text in texts for word in re.findall("[a-z0-9]+", text.lower())}
    words |= special | set(data._IRREGULAR) | {"y" * n for n in range(4, 9)}
    assert len(words) > 300
    for word in sorted(word for word in words if len(word) > 3):
        assert data._stem(word) == stemmer.stem(word), word


def test_exact_match_forgives_case_punctuation_and_spaces_and_nothing_else():
    assert exact_match("The  Cat.", "the cat") and exact_match("don't", "dont") and exact_match("", "!?")
    assert not exact_match("a cat", "the cat") and not exact_match("cat", "cats") and not exact_match("", "a")


def test_scores_take_the_best_reference_and_the_mean_over_examples():
    found = score(["a b", "x", "q"], [["a b", "c"], ["y", "X."], ["z"]])
    assert found == {"exact_match": pytest.approx(200 / 3), "rougeL": pytest.approx(200 / 3)}
    assert score(["the cat sat"], [["a cat", "the cat ran"]])["rougeL"] == pytest.approx(100 * 2 / 3)
    with pytest.raises(ValueError):
        score(["a"], [])
