"""Time and costs: Figure 4, section 3.3 and appendix C of the paper."""

import sys
import time
from pathlib import Path
from statistics import median
from typing import Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn
from tqdm import tqdm

from hint import (
    HINT, HINTConfig, decoder_cache_numbers, decoder_only_flops, exact_flops, generator_flops, hint_cache_numbers,
    hint_flops, named_tensors, on_meta, tk_instruct_flops,
)  # fmt: skip
from report import markdown
from t5 import EOS, SIZES, T5, T5Config


def answering_times(size: str, lengths: Sequence[int], new_tokens: int = 16) -> dict[int, dict[str, float]]:
    """Measure Figure 4: seconds for 100 inputs of one task, by the length of its instruction.

    HINT, its hypernetwork included, against the instruction in every input. Random weights that never end an answer,
    inputs of 100 tokens, 25 at once, medians of three rounds in turns.
    """
    model = HINT(T5(SIZES[size]), HINTConfig()).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    nn.init.zeros_(model.t5.lm_head.weight.data[EOS])
    inputs, times = torch.randint(2, 32000, (100, 100)), {}
    for length in tqdm(lengths, "time", leave=False):
        instruction = torch.randint(2, 32000, (1, max(length, 1)))  # an empty one is `</s>` alone
        whole = torch.cat([instruction[:, :length].expand(100, -1), inputs], dim=1)
        seconds: dict[str, list[float]] = {"hint": [], "of it, reading": [], "tk-instruct": []}
        for _ in range(3):
            began = time.perf_counter()
            with torch.no_grad():
                task = model.encode_instruction(instruction)
            task.attention_mask.cpu()  # a GPU is waited for
            seconds["of it, reading"].append(time.perf_counter() - began)
            for part in inputs.split(25):
                model.generate(task, part, max_new_tokens=new_tokens).cpu()
            seconds["hint"].append(time.perf_counter() - began)
            began = time.perf_counter()
            for part in whole.split(25):
                model.t5.generate(part, max_new_tokens=new_tokens).cpu()
            seconds["tk-instruct"].append(time.perf_counter() - began)
        times[length] = {name: median(several) for name, several in seconds.items()}
    return times


def time_lines(times: dict[int, dict[str, float]]) -> list[dict[str, str]]:
    """Make the lines of a table from the times of answering."""
    return [
        {"tokens of instruction": f"{length:,}", **{f"{name} (s)": f"{x:.3f}" for name, x in seconds.items()},
         "times as fast": f"{seconds['tk-instruct'] / seconds['hint']:.2f}"}
        for length, seconds in times.items()
    ]  # fmt: skip


def cost_text(size: str, lengths: Sequence[int] = (25, 50, 100, 200, 500, 1000)) -> str:
    """Compute FLOPs and numbers kept, by the paper's formulas and counted on this code; HINT as in the paper."""
    t5, config, n, i, o = SIZES[size], HINTConfig(), 100, 100, 16
    model, plain = on_meta(t5, config), on_meta(t5, None)
    N, p = sum(parameter.numel() for parameter in plain.parameters()), generated_numbers(model)
    unit, name = (1e12, "TFLOP") if N > 1e9 else (1e9, "GFLOP")
    lines = []
    for t in tqdm(lengths, "costs", leave=False):
        H = generator_flops(model, t)
        once = hint_flops(n, i, t, o, N, H, p), sum(exact_flops(model, n, i, t, o))
        each = tk_instruct_flops(n, i, t, o, N), sum(exact_flops(plain, n, t + i, 1, o))
        cells = {"t": f"{t:,}", "H": f"{H / unit:.3g}", "H in tokens of N FLOPs": f"{H / N:.0f}"}
        cells |= {"HINT": f"{once[0] / unit:.4g} / {once[1] / unit:.4g}"}
        cells |= {"Tk-Instruct": f"{each[0] / unit:.4g} / {each[1] / unit:.4g}"}
        cells |= {"times cheaper": f"{each[0] / once[0]:.2f} / {each[1] / once[1]:.2f}"}
        lines.append({**cells, "decoder with a cache": f"{decoder_only_flops(n, i, t, o, N) / unit:.4g}"})
    text = f"T5 {size}; {n} inputs of {i} tokens, answers of {o}, an instruction of t. {name}, by formula / counted.\n"
    text += f"H: the generator's work for one instruction.\n\n{markdown(lines)}\n"
    for L in (t5.num_decoder_layers, t5.num_layers + t5.num_decoder_layers):
        formula, counted = smaller_cache_from(t5, config, L)
        text += f"HINT keeps less than a decoder of {L} layers from {formula:,} tokens of instruction on by formula, "
        text += f"from {counted:,} on counted.\n"
    return text


def kept_numbers(model: HINT, t: int) -> int:
    """Count the numbers of an EncodedTask of t tokens, on a model on the meta device."""
    task = model.encode_instruction(torch.ones(1, t, dtype=torch.long))
    return sum(tensor.numel() for _, tensor in named_tensors(task))


def generated_numbers(model: HINT) -> int:
    """Count p: the numbers of an EncodedTask that do not depend on its length."""
    return 2 * kept_numbers(model, 1) - kept_numbers(model, 2)


def smaller_cache_from(t5: T5Config, config: HINTConfig, L: int) -> tuple[int, int]:
    """Find the shortest instruction of which HINT keeps less than a decoder of L layers: by appendix C.2, and here."""
    h, k, d = t5.num_heads, t5.d_kv, t5.d_model
    decoder, model = decoder_cache_numbers(L, h, k, s=1), on_meta(t5, config)
    by_formula = hint_cache_numbers(L, h, k, d, 0, config.bottleneck, config.prefix_length) // (decoder - d) + 1
    p = generated_numbers(model)
    return by_formula, p // (decoder - (kept_numbers(model, 1) - p)) + 1
