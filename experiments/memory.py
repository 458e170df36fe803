"""Count the memory that a training step will need, on the meta device, before anything is trained.

    python experiments/memory.py --size xl --system hint --gradient-checkpointing
    python experiments/memory.py --size small --precision fp32 --measure

It takes the options of `python train.py finetune`. Counted are the weights, their gradients, what the forward pass of
the fullest microbatch keeps, and the space in which the backward pass works. Adafactor's state is negligible. bf16 is
counted unless `--precision fp32` is given, and the generator's attention as a GPU computes it, without keeping scores.

`--measure` also takes the step on this machine, whose CPU keeps the scores, which are then counted too. With
`MALLOC_MMAP_THRESHOLD_=100000` the C library of Linux gives back what is freed; it may hold a sixth of the whole.
"""

import argparse
import re
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from data import Ids, collate, microbatches
from hint import HINT, PlainT5, on_meta, price_in_tokens
from hypernet import InstructionReader
from report import markdown
from t5 import SIZES, T5, set_gradient_checkpointing
from train import Settings, accumulate_gradient, adafactor, device_and_precision, settings_of

PRODUCTS = (F.linear, torch.einsum, Tensor.matmul, Tensor.__matmul__, F.scaled_dot_product_attention)


class Bf16Products(TorchFunctionMode):
    """Do as autocast does, which the meta device has not: products in bf16, each weight cast once."""

    def __init__(self) -> None:
        super().__init__()
        self.casts: dict[int, Tensor] = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in PRODUCTS:
            args = [self.cast(item) for item in args]
        return function(*args, **(kwargs or {}))

    def cast(self, item):
        if not isinstance(item, Tensor) or item.dtype != torch.float32:
            return item
        if not isinstance(item, nn.Parameter):
            return item.bfloat16()
        return self.casts.setdefault(id(item), item.bfloat16())


def kept_bytes(model: HINT, batch, bf16: bool) -> tuple[int, int]:
    """Bytes that a forward pass keeps for the backward pass: in all, and in its largest recomputable part."""
    weights = {id(weight.untyped_storage()) for weight in model.parameters()}
    kept: dict[int, tuple] = {}  # by storage: the storage, and the part that keeps it first
    inside: list[nn.Module] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in weights:
            kept.setdefault(id(storage), (storage, inside[-1] if inside else None))
        return tensor

    def enter(part: nn.Module, inputs: tuple) -> None:
        for tensor in filter(torch.is_tensor, inputs):
            keep(tensor)  # not by the part: it is there already when the part is recomputed
        inside.append(part)

    generator = model.hypernetwork
    networks = [generator.attention, *generator.networks.values()] if hasattr(generator, "attention") else []
    handles = []
    for part in (*model.t5.encoder.blocks, *model.t5.decoder.blocks, *filter(None, networks)):
        handles.append(part.register_forward_pre_hook(enter))
        handles.append(part.register_forward_hook(lambda *_: inside.pop() and None))
    with Bf16Products() if bf16 else nullcontext(), saved_tensors_hooks(keep, lambda tensor: tensor):
        model(*batch)
    for handle in handles:
        handle.remove()
    by_part: dict[object, int] = {}
    for storage, part in kept.values():
        by_part[part] = by_part.get(part, 0) + storage.nbytes()
    return sum(by_part.values()), max((size for part, size in by_part.items() if part is not None), default=0)


def fullest_microbatch(model: HINT, settings: Settings, lengths: tuple[int, int, int]) -> list[Ids]:
    """Cut a batch of examples, `settings.group` of each task, as training does; return the part with most examples."""
    told, source, target = lengths
    if isinstance(model, PlainT5):  # reads the instruction with the input
        source, told = source + told, 1
    numbers = [2 + place // settings.group for place in range(min(settings.batch_size, 256))]
    examples = [Ids([number] * told, [2] * source, [2] * target) for number in numbers]
    return max(microbatches(examples, settings.microbatch, price_in_tokens(model)), key=len)


def step_bytes(model: HINT, examples: list[Ids], settings: Settings) -> dict[str, float]:
    """Count the bytes of a step on a model on the meta device, from its second microbatch on."""
    bf16, batch = settings.precision != "fp32", collate(examples)
    numbers = sum(weight.numel() for weight in model.parameters())
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    logits = sum(len(ids.target) for ids in examples) * model.t5.config.vocab_size
    set_gradient_checkpointing(model.train(), False)
    kept, largest = kept_bytes(model, batch, bf16)
    working = 3 * 4 * logits  # their exponentials, and gradients by both ways
    if settings.gradient_checkpointing:
        set_gradient_checkpointing(model, True)
        kept = kept_bytes(model, batch, bf16)[0]
        # First the weights that autocast has cast; later a recomputed part, with gradients half as large.
        working += max(2 * numbers * bf16, 1.5 * largest)
    return {"weights": 4 * numbers, "gradients": 4 * trained, "activations": kept, "working space": working}


def measured_bytes(model: HINT, examples: list[Ids], settings: Settings) -> int:
    """Take a step of two microbatches, and return the most memory that it took: of the GPU, or of this process."""
    device, precision = device_and_precision(settings.precision)
    before = 0 if device.type == "cuda" else most_held()
    t5 = T5(model.t5.config)
    model = (PlainT5(t5) if model.config is None else HINT(t5, model.config)).to(device)
    set_gradient_checkpointing(model.train(), settings.gradient_checkpointing)
    optimizer = adafactor(model, settings.learning_rate)
    for _ in range(2):
        accumulate_gradient(model, examples, 10**9, 0, precision)  # as one part
    optimizer.step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return most_held() - before


def most_held() -> int:
    """Bytes that this process held at most, as Linux counts them; `resource` would begin at those of its parent."""
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def main() -> None:
    """Count, and measure if asked to; print a line of a table."""
    own = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    own.add_argument("--lengths", type=int, nargs=3, default=(96, 160, 16), metavar=("INSTRUCTION", "INPUT", "TARGET"))
    own.add_argument("--measure", action="store_true", help="also take the step, on the GPU or CPU of this machine")
    given, words = own.parse_known_args()
    settings = settings_of(["finetune", "--data", ".", "--out", ".", "--tokenizer", ".", *words])
    if settings.size is None:
        own.error("--size says how large the T5 is")
    t5 = replace(SIZES[settings.size], dropout_rate=settings.dropout)
    model = on_meta(t5, settings.hint_config())
    reader, on_cpu = getattr(model.hypernetwork, "attention", None), given.measure and not torch.cuda.is_available()
    if isinstance(reader, InstructionReader) and not on_cpu:
        reader.dropout.p = 0.0  # on the meta device, attention is fused without dropout alone
    examples = fullest_microbatch(model, settings, given.lengths)
    counted = step_bytes(model, examples, settings)
    line = {"examples": str(len(examples)), **{name: f"{size / 1e9:.2f}" for name, size in counted.items()}}
    line["in all (GB)"] = f"{sum(counted.values()) / 1e9:.2f}"
    if given.measure:
        line["measured (GB)"] = f"{measured_bytes(model, examples, settings) / 1e9:.2f}"
    print(markdown([line]))


if __name__ == "__main__":
    main()
