"""Comparison of every kernel with its form in torch, and the tests marked gpu; part of benchmarks/gpu.py.

python benchmarks/gpu_correct.py --result DIR/correct.json
"""

import functools
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from gpu_common import Part, lacks_triton
from gpu_outcomes import outcomes

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("float32", "bfloat16")
LEAST = 15.0
"""Seconds that the tests get at least."""
SHAPES = [(1, 3, 5, 1.0), (1, 70, 130, 0.1), (63, 37, 129, 0.05), (257, 130, 67, 0.3), (2048, 1030, 517, 0.01)]
"""Tokens, rows, columns and density: a single token, odd sizes, and more tokens than one Triton program processes."""


def sampled(forms: list[str], kind: str, problem: tuple[int, int, int, float], device: torch.device) -> dict[str, Any]:
    """Compare each form of the sampled gradient with fp64 on the CPU; some rows have no entries and one row has all."""
    from seft_dist.kernels.sampled import FORMS
    from seft_dist.optim.delta import Support

    tokens, rows, columns, density = problem
    generator, dtype = torch.Generator().manual_seed(tokens), getattr(torch, kind)
    x, grad = (torch.randn(tokens, size, generator=generator).to(dtype) for size in (columns, rows))
    chosen = torch.rand(rows, columns, generator=generator) < density
    if rows > 3:
        chosen[1], chosen[2] = False, True
    support = Support((rows, columns), [chosen.view(-1).nonzero().view(-1).int().to(device)])
    expected = (grad.double().T @ x.double()).view(-1)[support.positions().cpu()]
    before = torch.arange(len(support), dtype=torch.float32) % 7
    worst = {}
    for form in forms:
        out = before.to(device, copy=True)
        operands = (support.crow, support.col, x.to(device), grad.to(device))
        FORMS[form](out, support.shape, *operands, True, support.bounds)  # type: ignore[index]
        found = out.cpu().double()
        torch.testing.assert_close(found, before + expected, rtol=2e-5, atol=2e-5 * tokens**0.5)
        worst[form] = float((found - before - expected).abs().max())
    return {"largest_difference": worst, "entries": len(support)}


def packing(kind: str, numel: int, device: torch.device) -> dict[str, Any]:
    """Compare encode and decode with boolean indexing, bit for bit; of large weights only samples."""
    from seft_dist.kernels.packing import decode, encode
    from seft_dist.sparsity.bitmask import pack

    dense = torch.empty(numel, dtype=getattr(torch, kind), device=device).normal_()
    mask = torch.cat([torch.rand(piece.shape, device=device) < 0.4 for piece in dense.split(1 << 26)])
    bits = torch.cat([pack(piece) for piece in mask.split(1 << 26)])
    values = encode(dense, bits)
    count = int(mask.sum())
    assert values.numel() == count, f"{values.numel()} values of {count} bits"
    around = torch.full((numel + 2,), 7.0, dtype=dense.dtype, device=device)
    decode(bits, values, around[1:-1])
    assert float(around[0]) == float(around[-1]) == 7.0, "written outside"
    begin = 0
    for piece, kept, back in zip(dense.split(1 << 26), mask.split(1 << 26), around[1:-1].split(1 << 26), strict=True):
        assert torch.equal(back, piece.masked_fill(~kept, 0)), f"decode differs after position {begin}"
        begin += piece.numel()
    some = dense[-1000:][mask[-1000:]]
    assert torch.equal(values[count - some.numel() :], some), "encode differs at the end"
    return {"positions": numel, "values": count}


def far_positions(forms: list[str], rows: int, tokens: int, device: torch.device) -> dict[str, Any]:
    """Check positions beyond 2^31 in the operands, with a few entries in the first and the last row."""
    from seft_dist.kernels.sampled import FORMS
    from seft_dist.optim.delta import Support

    columns, dtype = 64, torch.bfloat16
    x = torch.randn(tokens, columns, device=device, dtype=dtype)
    grad = torch.zeros(tokens, rows, device=device, dtype=dtype)
    for row in (0, rows // 2, rows - 1):
        grad[:, row].normal_()
    at = torch.tensor([0, rows // 2, rows - 1], device=device)
    positions = (at[:, None] * columns + torch.tensor([0, 17, 63], device=device)).view(-1).int()
    support = Support((rows, columns), [positions])
    expected = (grad[:, at].double().T @ x.double())[:, [0, 17, 63]].view(-1).cpu()
    for form in set(forms) - {"sampled_addmm"}:  # it would make fp32 copies of the operands
        out = torch.zeros(9, device=device)
        operands = (support.crow, support.col, x, grad)
        FORMS[form](out, support.shape, *operands, True, support.bounds)  # type: ignore[index]
        torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-4, atol=1e-4 * tokens**0.5)
    return {"numbers_of_an_operand": rows * tokens}


def suite(part: Part) -> dict[str, Any]:
    """Run the tests marked gpu in a separate process with a time limit, and note each outcome once it is known."""
    record, settings = part.folder / "outcomes.jsonl", part.folder / "pytest.ini"
    record.unlink(missing_ok=True)
    # The project's own settings are not used: they name plug-ins that a GPU machine may not have
    settings.write_text("[pytest]\nmarkers =\n    gpu: needs a CUDA device\n    slow: takes more than a few seconds\n")
    chosen = ["-m", "gpu"] if part.device.type == "cuda" else ["-k", "cpu and (bf16 or resident)"]
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "gpu_outcomes"]
    command += ["-c", str(settings), "--rootdir", str(ROOT), *chosen, "tests/test_gpu.py"]
    environment = os.environ | {"GPU_OUTCOMES": str(record)}
    paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    # earlier cases may have selected Triton's interpreter, which must not affect the tests
    environment.pop("TRITON_INTERPRET", None)
    end = time.monotonic() + max(LEAST, part.left)
    log = part.folder / "pytest.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.2)
            part.note({"tests": outcomes(record)})
    finally:
        in_time = process.poll() is not None
        process.kill()
        code = process.wait()
    found = outcomes(record)
    part.note({"tests": found})
    assert in_time, f"no time left for the tests; running: {[name for name in found if found[name] == 'running']}"
    assert code == 0 and found, f"pytest ended with {code}:\n{log.read_text(errors='replace')[-6000:]}"
    return {"tests": found}


def main() -> None:
    """Check kernels, then run the tests."""
    if "cpu" in sys.argv:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported
    part = Part(__doc__)
    torch.backends.cuda.matmul.allow_tf32 = False
    lack = lacks_triton(part.device)
    forms = ["dense", "sampled_addmm", *(["triton"] if lack is None else [])]
    if lack is not None:
        part.missing("triton", lack)
    for kind in KINDS:
        for problem in SHAPES[: 3 if part.tiny else None]:
            tokens, rows, columns, density = problem
            name = f"sampled gradient, {kind}, {tokens} tokens, {rows} x {columns}, {density:.0%}"
            part.case(name, functools.partial(sampled, forms, kind, problem, part.device))
        for numel in (1, 1024, 3001) if part.tiny else (1, 1024, 3001, 100_000_007):
            part.case(f"packing, {kind}, {numel} positions", functools.partial(packing, kind, numel, part.device))
    if part.tiny:
        part.case("far positions", functools.partial(far_positions, forms, 5, 70, part.device))
    else:
        part.case("packing, 500,000,001 positions", lambda: packing("bfloat16", 500_000_001, part.device))
        part.case("positions beyond 2^31", lambda: far_positions(forms, 32768, 70_000, part.device))
    part.case("tests marked gpu", lambda: suite(part), needs=LEAST)
    part.end()


if __name__ == "__main__":
    main()
