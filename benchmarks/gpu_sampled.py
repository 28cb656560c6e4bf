"""Duration of every form of the sampled gradient, by tokens, shape and density; part of benchmarks/gpu.py.

    python benchmarks/gpu_sampled.py --result DIR/sampled.json

Besides the forms that seft_dist/kernels/ chooses from, two others are measured for comparison: ``forward``, the
linear's own product (without TF32), and ``thin``, a dense product for the same number of weights in a few whole input
columns, which is what a support of whole columns would cost.

The table of this card, sampled_times.json, is written beside the result. Copied into seft_dist/kernels/, it determines
which form is used.
"""

import functools
import json
import os
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

import torch
from gpu_common import Part, lacks_triton, seconds_of

LAUNCHES = [(16, 128, 4), (8, 256, 4), (32, 64, 4), (32, 128, 8), (16, 256, 8)]
"""Launch settings of the Triton kernel; the fastest one on a common case is used for all cases."""


def problems(tiny: bool) -> Iterator["Problem"]:
    """Yield dtype, tokens, shape and density of each case, the most important ones first."""
    if tiny:
        yield from ((kind, 32, (48, 64), density) for kind in ("bfloat16", "float32") for density in (0.01, 0.2))
        return
    densities = (0.002, 0.005, 0.01, 0.02, 0.05, 0.001)
    for kind, tokens, shapes in (
        ("bfloat16", 2048, [(4096, 4096), (11008, 4096), (4096, 11008), (8192, 8192), (2048, 2048)]),
        ("bfloat16", 8192, [(4096, 4096), (2048, 2048), (8192, 8192)]),
        ("float32", 2048, [(4096, 4096), (2048, 2048)]),
        ("bfloat16", 512, [(4096, 4096), (2048, 2048), (8192, 8192)]),
        ("bfloat16", 16384, [(4096, 4096), (8192, 8192)]),
        ("float32", 8192, [(2048, 2048)]),
    ):
        yield from ((kind, tokens, shape, density) for shape in shapes for density in densities)


def draw(kind: str, tokens: int, shape: tuple[int, int], density: float, device: torch.device) -> tuple[Any, Any, Any]:
    """Draw random operands and positions."""
    from seft_dist.optim.delta import Support

    rows, columns = shape
    dtype = getattr(torch, kind)
    x = torch.randn(tokens, columns, device=device, dtype=dtype)
    grad = torch.randn(tokens, rows, device=device, dtype=dtype)
    chosen = (torch.rand(rows * columns, device=device) < density).nonzero().view(-1).int()
    return x, grad, Support(shape, [chosen])


Problem = tuple[str, int, tuple[int, int], float]


def measure(problem: Problem, device: torch.device, launch: list[int], check: bool) -> dict[str, Any]:
    """Measure the duration of each form that is available here.

    Args:
        problem: A case of ``problems``.
        device: The device.
        launch: Launch setting of the Triton kernel.
        check: Compare the results of the forms.
    """
    from seft_dist.kernels.build import library, triton_kernels
    from seft_dist.kernels.sampled import FORMS

    kind, tokens, shape, density = problem
    x, grad, support = draw(kind, tokens, shape, density, device)
    forms: list[Any] = ["dense"]
    if device.type == "cuda" and triton_kernels() is not None:
        forms.append("triton")
    if device.type == "cpu" and library() is not None:
        forms.append("c++")
    if kind == "float32":
        forms.append("sampled_addmm")
    given = (support.shape, support.crow, support.col, x, grad)
    results, seconds, peaks = {}, {}, {}
    for form in forms:
        out = torch.zeros(len(support), device=device)
        run = functools.partial(FORMS[form], out, *given, False, support.bounds)
        if form == "triton":  # the form in FORMS would use the launch setting of an older table
            run = functools.partial(_triton, triton_kernels(), out, given, launch)
        before = _begin(device)
        run()
        results[form], peaks[form] = out.clone(), _used(device, before)
        seconds[form] = seconds_of(run, device)
    if check:
        for form in forms[1:]:
            torch.testing.assert_close(results[form], results["dense"], rtol=1e-3, atol=1e-3 * tokens**0.5)
    weight = torch.randn(shape, device=device, dtype=x.dtype)
    thin = x[:, : max(1, int(density * shape[1]))].contiguous()
    return {
        "dtype": kind,
        "tokens": tokens,
        "rows": shape[0],
        "columns": shape[1],
        "density": density,
        "seconds": seconds,
        "extra_bytes": peaks,
        "forward": seconds_of(lambda: x @ weight.T, device),
        "thin": seconds_of(lambda: grad.T @ thin, device),
    }


def _triton(kernels: Any, out: torch.Tensor, given: tuple[Any, ...], launch: list[int]) -> None:
    kernels.sampled_grad_(out.zero_(), *given, tuple(launch))


def _begin(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _used(device: torch.device, before: int) -> int | None:
    return torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None


def best_launch(part: Part) -> dict[str, Any]:
    """Find the fastest launch setting of the Triton kernel on a common case."""
    from seft_dist.kernels.build import triton_kernels

    kernels = triton_kernels()
    assert kernels is not None
    shape, tokens, density = ((16, 24), 20, 0.2) if part.tiny else ((4096, 4096), 2048, 0.005)
    x, grad, support = draw("bfloat16", tokens, shape, density, part.device)
    out = torch.zeros(len(support), device=part.device)
    found = {}
    for launch in LAUNCHES[:2] if part.tiny else LAUNCHES:
        run = functools.partial(kernels.sampled_grad_, out, shape, support.crow, support.col, x, grad, launch)
        found[launch] = seconds_of(run, part.device, repeats=1 if part.tiny else 7)
    best = min(found, key=lambda launch: found[launch])
    return {"launch": list(best), "seconds_of_launches": {str(launch): s for launch, s in found.items()}}


def write_table(part: Part, launch: list[int], rows: list[dict[str, Any]]) -> None:
    """Add the table of this card to those of other cards."""
    from seft_dist.kernels.choice import TABLE, card_name

    known = json.loads(TABLE.read_text()) if TABLE.is_file() else {}
    keys = ("dtype", "tokens", "rows", "columns", "density", "seconds")
    name = card_name(part.device) if part.device.type == "cuda" else "cpu"
    about = f"torch {torch.__version__}, {datetime.now(timezone.utc):%F}"
    known[name] = {"about": about, "launch": launch, "rows": [{key: row[key] for key in keys} for row in rows]}
    (part.folder / "sampled_times.json").write_text(json.dumps(known, indent=1) + "\n")


def main() -> None:
    """Measure cases until the time is over."""
    if "cpu" in sys.argv:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported
    part = Part(__doc__)
    from seft_dist.kernels.choice import DEFAULT_LAUNCH

    launch = list(DEFAULT_LAUNCH)
    lack = lacks_triton(part.device)
    if lack is not None:
        part.missing("triton", lack)
    else:
        launch = part.case("launch of the Triton kernel", lambda: best_launch(part)).get("launch", launch)
    for number, problem in enumerate(problems(part.tiny)):
        kind, tokens, shape, density = problem
        name = f"{kind} {tokens} tokens, {shape[0]} x {shape[1]}, {density:.1%}"
        run = functools.partial(measure, problem, part.device, launch, check=part.tiny or number % 6 == 0)
        part.case(name, run, needs=1.0)
        good = [row for row in part.rows if row["status"] == "ok" and "density" in row]
        write_table(part, launch, good)
    part.end()


if __name__ == "__main__":
    main()
