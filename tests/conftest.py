"""What several test files share: small random models, small data, and runs of the command line on it."""

import gzip
import io
import json
import os
import random
from contextlib import contextmanager, redirect_stderr
from itertools import count
from pathlib import Path
from traceback import clear_frames
from typing import Callable, Iterable, Iterator

import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer

from data import Example, Instance, Task, load_tokenizer
from hint import HINT, HINTConfig, load_model
from t5 import T5, Adapter, KeyValue, LayerModules, Modules, T5Config

torch.set_num_threads(1)  # the models here are so small that a second thread costs more than it gives
os.environ["OMP_NUM_THREADS"] = "1"  # likewise for the command lines that tests run

SHARED = Path(__file__).resolve().parents[2] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real vocabulary and data in ../shared")


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


def tiny_config(**changes) -> T5Config:
    """A T5 whose sizes all differ, so that no axis can be taken for another."""
    sizes = dict(
        vocab_size=53, d_model=24, d_kv=10, d_ff=36, num_layers=2, num_decoder_layers=3, num_heads=3, dropout_rate=0.0
    )
    return T5Config(**{**sizes, **changes})


def tiny_t5(**changes) -> T5:
    """With a relative bias that is large enough to be noticed."""
    model = T5(tiny_config(**changes)).eval()
    for stack in (model.encoder, model.decoder):
        torch.nn.init.normal_(stack.relative_bias.weight)
    return model


def tiny_hint(**changes) -> HINT:
    """A HINT whose generated weights are large enough to be noticed."""
    model = HINT(tiny_t5(**changes), HINTConfig(bottleneck=5, prefix_length=4, generator_dropout=0.0)).eval()
    for network in model.hypernetwork.networks.values():
        network[-1].weight.data *= 8
    return model


def random_ids(*shape: int, vocab: int = 53) -> torch.Tensor:
    """Ids without padding and without `</s>`."""
    return torch.randint(2, vocab, shape)


def random_modules(config: T5Config, batch: int, bottleneck: int = 5, prefix: int = 4) -> Modules:
    """Adapters and prefixes for every layer, different in each example."""

    def pair() -> KeyValue:
        return KeyValue(*torch.randn(2, batch, config.num_heads, prefix, config.d_kv))

    def adapter() -> Adapter:
        d, r = config.d_model, bottleneck
        return Adapter(
            torch.randn(batch, d, r), torch.randn(batch, 1, r), torch.randn(batch, r, d), torch.randn(batch, 1, d)
        )

    return Modules(
        encoder=tuple(LayerModules(adapter(), pair()) for _ in range(config.num_layers)),
        decoder=tuple(LayerModules(adapter(), pair(), (pair(),)) for _ in range(config.num_decoder_layers)),
    )


# ------------------------------------------------------------------------ small data

SENTENCES = [
    "the cat sat on the mat and the dog barked at it", "please give me the book that lies on the table", "questions, answers; and more",
    "Now complete the following example -\nInput: what?\nOutput: that.", "Definition: write the plural. Positive Example 1 -",
    "relational conditional rationally organisations", "tabs\tand  double   spaces", "ﬁnal ½ café naïve ①", "numbers 1 22 333 4,444",
]  # fmt: skip


@pytest.fixture(scope="session")
def spiece(tmp_path_factory):
    """A SentencePiece model with T5's layout of ids, trained on the sentences above."""
    folder = tmp_path_factory.mktemp("spiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 5), model_writer=model, model_type="unigram", vocab_size=140, pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(model.getvalue())
    return folder / "spiece.model"


@pytest.fixture(scope="session")
def tokenizer(spiece) -> Tokenizer:
    return load_tokenizer(spiece)


TASK = Task(
    "t",
    "Give the answer",
    (Example("one", "1"), Example("two?", "2!"), Example("three", "3")),
    (Instance("i", "four", ("4",)),),
)


def write_task(folder, name="task1_a", **changes):
    """A folder in the layout of Super-NaturalInstructions with one task, changed as asked."""
    found = {
        "Definition": ["Say it again, and give me the book that lies on the table. "],
        "Positive Examples": [{"input": "x", "output": "y", "explanation": "so"}],
        "Instances": [
            {
                "id": f"{name}-{n}",
                "input": f" in {n} the cat sat on the mat and the dog ",
                "output": [f" out {n} ", "other"],
            }
            for n in range(5)
        ],
    }
    found = {key: value for key, value in {**found, **changes}.items() if value is not None}
    (folder / "tasks").mkdir(exist_ok=True)
    (folder / "splits" / "default").mkdir(parents=True, exist_ok=True)
    (folder / "tasks" / f"{name}.json").write_text(json.dumps(found))
    (folder / "splits" / "default" / "train_tasks.txt").write_text(f"{name}\n")
    return folder


def write_prompted(folder, split="train", **changes):
    """A folder of prompted examples: two of one instruction, one of another, one of another data set."""
    either = "Is it true that [MASK]? [MASK] or [MASK]? "
    lines = [
        dict(task="rte", instruction=either, input=[" the cat sat ", "yes", "no"], target="no ", choices=["yes", "no"]),
        dict(task="rte", instruction="[MASK]. True?", input="the dog barked", target="no", choices=["no", "yes"]),
        dict(
            task="rte", instruction=either, input=["yes", "yes", "no"], target="yes", choices=["yes", "no"], id="mine"
        ),
        dict(
            task="xsum", instruction="[MASK] Sum it up: [MASK]", input=["", "the book"], target="a book", choices=None
        ),
    ]
    lines[-1] |= changes
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_shards(folder, documents, shards=2):
    """Shards in the form of C4, of the sentences above in random order."""
    draw, paths = random.Random(0), []
    for number in range(shards):
        paths.append(folder / f"c4-{number}.json.gz")
        with gzip.open(paths[-1], "wt") as file:
            for _ in range(documents // shards):
                file.write(json.dumps({"text": draw.choice(SENTENCES), "url": ""}) + "\n")
    return paths


# ------------------------------------------------------------------------ runs on it

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
FAST = "--batch-size 4 --microbatch 100 --log-every 1 --max-input 40 --precision fp32".split()
SIZES = "--bottleneck 3 --prefix-length 2".split()


@pytest.fixture
def quick_disk(monkeypatch):
    """Wait for no disk, where that is not what a test is about."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def known_price(monkeypatch):
    """Count no costs, where many short runs would spend most of their time on it."""
    import train

    monkeypatch.setattr(train, "price_in_tokens", lambda model: 30)


def make_sni(folder: Path) -> Path:
    """A data set of three tasks to train on and two others, of one category, to be scored on."""
    folder.mkdir()
    names = {"train": ["train_1", "train_2", "train_3"], "test": ["test_1", "test_2"]}
    for name in names["train"] + names["test"]:
        write_task(folder, name, Categories=["Summing Up"] if name in names["test"] else None)
    for split in names:
        (folder / "splits" / "default" / f"{split}_tasks.txt").write_text("\n".join(names[split]))
    return folder


def make_start(folder: Path, spiece: Path) -> Path:
    """A tiny public T5: config, weights and spiece.model."""
    torch.manual_seed(0)
    tiny_t5(vocab_size=300).save_pretrained(folder)
    (folder / "spiece.model").write_bytes(spiece.read_bytes())
    return folder


@pytest.fixture
def sni(tmp_path) -> Path:
    return make_sni(tmp_path / "sni")


@pytest.fixture
def start(tmp_path, spiece) -> Path:
    return make_start(tmp_path / "public-t5", spiece)


def run(*words) -> None:
    """`python train.py ...` in this process."""
    import train

    train.main([str(word) for word in words])


def finetune(sni, start, out, *more) -> None:
    """Finetune with little work; the small sizes are those of a HINT, so another system keeps its own."""
    sizes = () if {"--system", "--generator", "--modules"} & set(more) else SIZES
    run("finetune", "--data", sni, "--start", start, "--out", out, "--max-target", 8, "--max-instruction", 40,
        *sizes, *FAST, *more)  # fmt: skip


def said(*words, by=run) -> tuple[int, str]:
    """Run a command line in this process -> its exit status, and what it writes to standard error."""
    with redirect_stderr(io.StringIO()) as text:
        status = 0
        try:
            by(*words)
        except SystemExit as end:
            status = 1 if isinstance(end.code, str) else end.code
            print(end.code if isinstance(end.code, str) else "", file=text)
            while end:  # errors hold the frames of the run, and these its lock
                clear_frames(end.__traceback__)
                end = end.__context__
    return status, text.getvalue().strip()


def refused(*words, status: int = 1, names: Iterable = (), by=run) -> str:
    """Run a command line that must be refused in one sentence, which holds all of `names`."""
    found, text = said(*words, by=by)
    assert found == status and text.startswith("train.py") and len(text.splitlines()) == 1, text
    assert all(str(name) in text for name in names), text
    return text


def settings(*words):
    """The settings of a command line."""
    import train

    return train.settings_of([str(word) for word in words])


def config_of(folder: Path) -> dict:
    """The settings that a run or an evaluation has kept."""
    return json.loads((folder / "config.json").read_text())["run"]


def log_of(run: Path) -> list[dict]:
    """The entries of `log.jsonl`."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def losses_of(run: Path) -> list[tuple[int, float]]:
    """Steps and losses in `log.jsonl`."""
    return [(entry["step"], entry["loss"]) for entry in log_of(run) if "loss" in entry]


def rows_of(folder: Path) -> list[dict]:
    """The answers in `predictions.jsonl`."""
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text("utf-8").split("\n")[:-1]]


def weights_of(folder):
    """All weights of a saved model."""
    return [parameter for _, parameter in load_model(folder).named_parameters()]


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a run, but for the name of its folder and for what the log says of time."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    lines = [{**entry, "tokens_per_second": 0, "seconds": 0} for entry in log_of(folder)]
    config = files["config.json"].replace(json.dumps(str(folder)).encode(), b"")
    return {**files, "log.jsonl": json.dumps(lines).encode(), "config.json": config}


def ends_as(one: Path, other: Path) -> None:
    """Two runs left the same files with the same bytes: weights, optimizer, random state, log, scores."""
    one, other = contents(one), contents(other)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


@contextmanager
def before_call(number: int, action: Callable, owner: object = None, name: str = "accumulate_gradient") -> Iterator:
    """Let `action()` go before the call of that number of a function, by default before the gradient of that step."""
    import train

    owner = owner or train
    real, calls = getattr(owner, name), count(1)

    def called(*arguments, **options):
        if next(calls) == number:
            action()
        return real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, called)
        yield


def raising(kind: type[BaseException], *arguments) -> Callable:
    """An action that raises an error, a new one each time: an old one would keep its run, and the lock, alive."""

    def fail(*_, **__) -> None:
        raise kind(*arguments)

    return fail
