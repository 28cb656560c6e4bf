"""Comparison of the kernels with alternatives: sampled gradients, packed weights, passes of a selection.

    python benchmarks/kernels.py sampled --threads 2
    python benchmarks/kernels.py packing --threads 1
    python benchmarks/kernels.py selection --threads 2

The forms of a row run one after the other in every round, so that other load on the machine affects all of them. Times
are medians, and ratios are medians of the rounds' ratios. Inputs are random, and each form's result is checked against
the first.
"""

import argparse
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seft_dist.kernels import packing, ranking
from seft_dist.kernels.choice import Form
from seft_dist.kernels.describe import describe
from seft_dist.kernels.sampled import FORMS
from seft_dist.optim.delta import Support
from seft_dist.sparsity import selection
from seft_dist.sparsity.bitmask import pack, unpack

SHAPES = {
    "SmolLM2 q, o": (576, 576),
    "SmolLM2 k, v": (192, 576),
    "SmolLM2 gate, up": (1536, 576),
    "SmolLM2 down": (576, 1536),
    "2048 q, o": (2048, 2048),
    "2048 gate, up": (5632, 2048),
    "2048 down": (2048, 5632),
}
"""[out, in] of the linears of SmolLM2-135M and of a Llama with hidden size 2048."""
SELECTED = 106_168_320
"""Weights of SmolLM2-135M that are targets."""


def interleaved(forms: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Measure the duration of every form in every round, after one round for warming up."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(rounds + 1):
        for name, run in forms.items():
            began = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(of: list[float], to: list[float]) -> float:
    """Median over the rounds of the ratio of two forms' durations."""
    return statistics.median(a / b for a, b in zip(of, to, strict=True))


def sampled(rounds: int, densities: list[float], tokens: list[int], dtype: torch.dtype) -> list[dict[str, Any]]:
    """Measure each form of the sampled gradient, as a ratio to a dense product with an index."""
    rows = []
    forms: list[Form] = ["dense", "sampled_addmm", "c++"]
    for name, (out, inputs) in SHAPES.items():
        for length in tokens:
            x, grad = torch.randn(length, inputs).to(dtype), torch.randn(length, out).to(dtype)
            for density in densities:
                chosen = torch.randperm(out * inputs)[: int(density * out * inputs)].sort().values.int()
                support = Support((out, inputs), [chosen])
                given = (support.shape, support.crow, support.col, x, grad)
                results = {form: torch.zeros(len(support)) for form in forms}
                for form, result in results.items():
                    FORMS[form](result, *given, False)
                    assert torch.allclose(result, results["dense"], rtol=1e-3, atol=1e-3 * length**0.5)
                runs = {form: functools.partial(FORMS[form], results[form], *given, False) for form in forms}
                seconds = interleaved(runs, rounds)
                row: dict[str, Any] = {"weight": name, "tokens": length, "density": density}
                row["dense_ms"] = statistics.median(seconds["dense"]) * 1e3
                row |= {form: ratio(seconds[form], seconds["dense"]) for form in forms[1:]}
                rows.append(row)
                print(
                    f"{name:18} {length:5} tokens {density:7.2%}  dense {row['dense_ms']:7.2f} ms  sampled_addmm "
                    f"{row['sampled_addmm']:5.2f}  c++ {row['c++']:5.3f}",
                    flush=True,
                )
    return rows


def packed(rounds: int, numel: int) -> list[dict[str, Any]]:
    """Measure encode, decode and a copy, in GB of dense weights a second."""
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        mask = torch.rand(numel) < 0.4
        bits, dense = pack(mask), torch.randn(numel).to(dtype)
        values, out = packing.encode(dense, bits), torch.empty_like(dense)
        assert torch.equal(packing.decode(bits, values, out), torch.where(mask, dense, 0))
        forms: dict[str, Callable[[], Any]] = {
            "copy": lambda out=out, dense=dense: out.copy_(dense),
            "encode": lambda bits=bits, dense=dense: packing.encode(dense, bits),
            "decode": lambda bits=bits, values=values, out=out: packing.decode(bits, values, out),
            "encode in torch": lambda bits=bits, dense=dense: dense[unpack(bits, numel)],
            "decode in torch": lambda bits=bits, values=values, out=out: out.zero_().masked_scatter_(
                unpack(bits, numel), values
            ),
        }
        size = numel * dense.element_size() / 1e9
        for name, seconds in interleaved(forms, rounds).items():
            rows.append({"dtype": str(dtype), "form": name, "gb_per_second": size / statistics.median(seconds)})
            print(f"{str(dtype):16} {name:16} {rows[-1]['gb_per_second']:6.2f} GB/s", flush=True)
    return rows


def selected(rounds: int, numel: int) -> list[dict[str, Any]]:
    """Measure one ranking of all scores for the largest 1 %."""
    scores = torch.randn(numel)
    k = numel // 100

    def in_cpp() -> Tensor:
        return ranking.top_k(ranking.ranking_keys(scores, True, absolute=True), k)

    def in_torch() -> Tensor:
        key = selection.keys(scores.abs(), True)
        counts = selection.first_histogram(key)
        found, _ = selection.descend(counts.unsqueeze(0), torch.tensor([k]))
        return selection.survivors(key, int(found))

    forms: dict[str, Callable[[], Any]] = {
        "torch.topk": lambda: scores.abs().topk(k, sorted=False),
        "keys, histogram, survivors in torch": in_torch,
        "exact selection in C++": in_cpp,
    }
    assert torch.equal(scores[in_cpp()].abs().sort().values, scores.abs().topk(k).values.sort().values)
    seconds = interleaved(forms, rounds)
    rows = []
    for name, of in seconds.items():
        rows.append({"form": name, "seconds": statistics.median(of), "ratio": ratio(of, seconds["torch.topk"])})
        print(f"{name:36} {rows[-1]['seconds']:6.3f} s  {rows[-1]['ratio']:5.3f} of topk", flush=True)
    return rows


def main() -> None:
    """Measure one part and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["sampled", "packing", "selection"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.002, 0.01, 0.05, 0.1, 0.2, 0.4])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--numel", type=int, help="positions of packing (2^24) and selection (all of SmolLM2's)")
    parser.add_argument("--output", type=Path, help="JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    today = f"{datetime.now(timezone.utc):%F}"
    about = f"{platform.platform()}, torch {torch.__version__}, {options.threads} threads, {today}"
    print(f"{about}\nkernels: {describe(torch.device('cpu'))}")
    if options.part == "sampled":
        rows = sampled(options.rounds, options.densities, options.tokens, getattr(torch, options.dtype))
    elif options.part == "packing":
        rows = packed(options.rounds, options.numel or 1 << 24)
    else:
        rows = selected(options.rounds, options.numel or SELECTED)
    if options.output is not None:
        options.output.write_text(json.dumps({"about": about, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
