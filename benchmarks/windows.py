"""Cost of each form of an evolution's window, and the difference of its selection from that of the full form.

    python benchmarks/windows.py --model models/SmolLM2-135M-Instruct-wanda60 --text data/pydoc-topics/train.jsonl

All forms start from the same checkpoint, which the full form made just before a window, and use the same batches up to
the same evolution. "grown" and "removed" are the shares of the full form's positions that a form also grows, or removes
from the mask. A second full window on other text shows how much a selection depends on the text. Bytes are those of the
window on one process (each of W ranks holds 1/W of the part that is per weight); docs/evolution.md has formulas for the
traffic.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from seft_dist import SeftConfig, SeftOptimizer
from seft_dist.io import checkpoint
from seft_dist.optim.window import Window
from seft_dist.sparsity.bitmask import unpack


def read_batches(path: Path, model: str, count: int, shape: tuple[int, int]) -> list[torch.Tensor]:
    """Read the first blocks of tokens of a text."""
    text = "\n".join(json.loads(line)["text"] for line in path.read_text().splitlines())
    ids = torch.tensor(AutoTokenizer.from_pretrained(model)(text)["input_ids"])
    need = count * shape[0] * shape[1]
    if len(ids) < need:
        raise SystemExit(f"{path} has {len(ids)} tokens, {need} are needed: fewer or shorter batches")
    return list(ids[:need].view(count, *shape))


def load(model_path: str, dtype: torch.dtype, config: SeftConfig) -> tuple[Any, SeftOptimizer]:
    """Load the pruned model, and make an optimizer for it."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype)
    model.config.use_cache = False
    return model, SeftOptimizer(model, config, lr=1e-3, max_grad_norm=1.0)


def step(model: Any, seft: SeftOptimizer, ids: torch.Tensor) -> float:
    """Do one optimizer step; returns its duration in seconds."""
    begin = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    seft.step()
    seft.zero_grad()
    return time.perf_counter() - begin


def held(windows: list[Window | None]) -> int:
    """Bytes of the windows' tensors."""
    tensors = [value for window in windows if window is not None for value in vars(window).values()]
    return sum(value.nbytes for value in tensors if isinstance(value, torch.Tensor))


def positions(seft: SeftOptimizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Support and mask of all targets, concatenated, as booleans."""
    supports, masks = [], []
    for layer in seft.deltas():
        support = torch.zeros(len(layer.interval), dtype=torch.bool)
        support[layer.columns.indices.long()] = True
        supports.append(support)
        masks.append(unpack(layer.mask, len(layer.interval)))
    return torch.cat(supports), torch.cat(masks)


def run(args: argparse.Namespace, config: SeftConfig, folder: Path, batches: list[torch.Tensor]) -> dict[str, Any]:
    """Run one window and its evolution from the checkpoint."""
    model, seft = load(args.model, args.dtype, config)
    newest = checkpoint.latest(folder)
    assert newest is not None
    checkpoint.load(seft, newest)
    support, mask = positions(seft)
    seconds, most = [], 0
    for ids in batches:
        model_seconds = step(model, seft, ids)
        seconds.append(model_seconds)
        most = max(most, held([layer.window for layer in seft.deltas()]))
    assert seft.evolution is not None, "the window does not end with an evolution"
    new_support, new_mask = positions(seft)
    return {
        "grown": new_support & ~support,
        "removed": mask & ~new_mask,
        "step_seconds": seconds,
        "evolution_seconds": seft.evolution.seconds,
        "held_between_steps": most,
        "reactivated": seft.evolution.reactivated,
    }


def compare(name: str, found: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
    """Compare a form with the full one; returns a row of the table."""

    def share(key: str) -> float:
        return int((found[key] & full[key]).sum()) / max(int(full[key].sum()), 1)

    *steps, last = found["step_seconds"]
    row = {
        "form": name,
        "grown": share("grown"),
        "removed": share("removed"),
        "first_step_seconds": found["step_seconds"][0],
        "later_step_seconds": sum(found["step_seconds"][1:-1]) / max(len(steps) - 1, 1),
        "evolution_seconds": found["evolution_seconds"],
        "held_MB": found["held_between_steps"] / 1e6,
        "reactivated": found["reactivated"],
    }
    print("| " + " | ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()) + " |", flush=True)
    return row


def forms(base: SeftConfig, factors: list[float]) -> dict[str, SeftConfig]:
    """Configuration of each form, by its name."""
    found = {
        store: dataclasses.replace(base, window_store=store)  # type: ignore[arg-type]
        for store in ("full", "bf16")
    }
    for factor in factors:
        found[f"candidates, {factor}"] = dataclasses.replace(base, window_store="candidates", window_candidates=factor)
    return found | {"factored": dataclasses.replace(base, window_store="factored")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--targets", default="all-linear", help="as seft.targets; fewer layers take less time")
    parser.add_argument("--only", default="", help="measure only forms with this in their name")
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--window", type=int, default=5)
    parser.add_argument("--begin", type=int, default=10, help="steps before the window")
    parser.add_argument("--shape", type=int, nargs=2, default=(4, 128), help="sequences and tokens of a step")
    parser.add_argument("--factors", type=float, nargs="+", default=[0.25, 0.5, 1.0, 2.0])
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    interval = args.begin + args.window
    base = SeftConfig(
        density=args.density,
        targets=args.targets,
        interval=interval,
        window=args.window,
        steps=20 * interval,
        reactivation=1.0,
    )
    batches = read_batches(args.text, args.model, interval + args.window, tuple(args.shape))
    print(f"torch {version('torch')}, {args.threads} threads, {vars(args)}", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, seft = load(args.model, args.dtype, base)
        for ids in batches[: args.begin]:
            step(model, seft, ids)
        checkpoint.save(seft, folder, {})
        seft.detach()
        del model, seft
        seen = batches[args.begin : interval]
        full = run(args, base, folder, seen)
        for name, config in forms(base, args.factors).items():
            if args.only not in name:
                continue
            rows.append(compare(name, full if name == "full" else run(args, config, folder, seen), full))
        if args.only in "full, other text":
            rows.append(compare("full, other text", run(args, base, folder, batches[interval:]), full))
    if args.output is not None:
        args.output.write_text(json.dumps({"torch": version("torch"), "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
