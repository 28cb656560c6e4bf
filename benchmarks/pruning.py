"""Error that the pruning methods cause in the output of each linear, on the real inputs of a model's linears.

    python benchmarks/pruning.py --dense models/SmolLM2-135M-Instruct --text data/pydoc-topics/train.jsonl

The calibration text runs through the dense model once. Every linear of every decoder layer is then pruned by each
method from the same statistics, and its error is |X W' - X W|^2 / |X W|^2 over all tokens X of the text, taken from X
X^T. Exit status 1 if SparseGPT does not lose less than Wanda, or Wanda not less than magnitude, in any linear.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor, nn

from seft_dist.backends.group import Group
from seft_dist.config import DataConfig, ModelConfig, PruneConfig
from seft_dist.io.tables import kind_of
from seft_dist.pruning.magnitude import magnitude_scores
from seft_dist.pruning.masks import Ranking, select_pruned
from seft_dist.pruning.methods import open_calibration
from seft_dist.pruning.prune import prepare
from seft_dist.pruning.sparsegpt import Hessians, inverse_factor, sparsegpt
from seft_dist.pruning.wanda import wanda_scores

METHODS = ("magnitude", "wanda", "sparsegpt")
ALONE = Group(None)


def error(weight: Tensor, pruned: Tensor, hessian: Tensor) -> float:
    """Compute |X (W' - W)|^2 / |X W|^2 from a multiple of X X^T, fp64."""
    loss, whole = pruned.double() - weight.double(), weight.double()
    return float(((loss @ hessian) * loss).sum() / ((whole @ hessian) * whole).sum())


def errors(weight: Tensor, hessian: Tensor, ranking: Ranking) -> dict[str, float]:
    """Error of each method on one weight [out, in], given its Hessian [in, in], fp64."""
    norm = hessian.diagonal().sqrt().float()
    scores = {"magnitude": magnitude_scores(weight), "wanda": wanda_scores(weight, norm)}
    found = {}
    for name, score in scores.items():
        found[name] = error(weight, weight.masked_fill(select_pruned(score, weight, ranking, ALONE), 0.0), hessian)
    factor, dead = inverse_factor(hessian.clone(), PruneConfig.dampening, "w")
    found["sparsegpt"] = error(weight, sparsegpt(weight, factor, dead, ranking, ALONE), hessian)
    return found


def measure(
    config: PruneConfig, rankings: list[Ranking], every: int = 1
) -> Iterator[tuple[str, Ranking, dict[str, float]]]:
    """Prune the linears of every n-th decoder layer.

    Yields:
        Name of a linear, the ranking, and the error of each method.
    """
    plan = prepare(config, progress=False)
    calibration = open_calibration(plan.stream, plan.sequences, ALONE)
    found: list[tuple[str, Ranking, dict[str, float]]] = []
    number = 0

    def visit(layer_name: str, layer: nn.Module, run: Callable[[], None]) -> None:
        nonlocal number
        number += 1
        if (number - 1) % every:
            return
        linears = {name: t for name, t in plan.targets.items() if name.startswith(f"{layer_name}.")}
        hessians = Hessians(linears)
        run()
        for names, hessian in hessians.close(ALONE):
            for name in names:
                for ranking in rankings:
                    found.append((name, ranking, errors(linears[name].as_rows().float(), hessian, ranking)))

    for _ in calibration.walk(visit, changes=False, progress=False):
        yield from found
        found.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--every", type=int, default=1, help="only every n-th decoder layer")
    options = parser.parse_args()
    config = PruneConfig(
        model=ModelConfig(path=str(options.dense), dtype="float32"),
        data=DataConfig(path=str(options.text), seq_len=options.seq_len),
        method="sparsegpt",
        output=f"{options.dense}-not-written",
        sequences=options.sequences,
    )
    rankings = [Ranking("row", 0.6), Ranking("2:4", 0.5)]
    kinds: dict[tuple[str, str], dict[str, list[float]]] = {}
    ordered = total = 0
    for name, ranking, found in measure(config, rankings, options.every):
        entry = kinds.setdefault((ranking.kind, kind_of(name)), {method: [] for method in METHODS})
        for method in METHODS:
            entry[method].append(found[method])
        total += 1
        if found["sparsegpt"] < found["wanda"] < found["magnitude"]:
            ordered += 1
        else:
            print("not in order:", name, ranking.kind, found)
    print("| ranked | linear | " + " | ".join(METHODS) + " |\n|---|---|" + "---|" * len(METHODS))
    for (ranked, kind), entry in sorted(kinds.items()):
        cells = [f"{statistics.median(values):.4f}" for values in entry.values()]
        print(f"| {ranked} | {kind} ({len(entry['wanda'])} x) | " + " | ".join(cells) + " |")
    print(f"sparsegpt < wanda < magnitude: {ordered} of {total}")
    sys.exit(ordered != total)


if __name__ == "__main__":
    main()
