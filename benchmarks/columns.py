"""Comparison of the sampled gradient of deltas anywhere with a thin dense product, if all are in few input columns.

    python benchmarks/columns.py --columns 0.05 --density 0.01 --threads 1

The columns of the input are gathered beforehand, as a forward pass would keep them. Forms of a row run one after the
other in every round; ratios are medians of the rounds' ratios, to the sampled gradient of positions anywhere.
"""

import argparse
import statistics

import torch
from kernels import SHAPES, interleaved, ratio

from seft_dist.kernels.sampled import sampled_grad_
from seft_dist.optim.delta import Support


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=float, default=0.05)
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for name, (out, inputs) in SHAPES.items():
            tokens, kept = 256, round(options.columns * inputs)
            x, grad = torch.randn(tokens, inputs).to(dtype), torch.randn(tokens, out).to(dtype)
            columns = torch.randperm(inputs)[:kept].sort().values
            count = int(options.density * out * inputs)
            anywhere = Support((out, inputs), [torch.randperm(out * inputs)[:count].sort().values.int()])
            thin = torch.randperm(out * kept)[:count].sort().values
            inside = Support((out, inputs), [(thin // kept * inputs + columns[thin % kept]).int()])
            narrow = x[:, columns].contiguous()

            def sampled(support: Support, x: torch.Tensor = x, grad: torch.Tensor = grad) -> torch.Tensor:
                found = torch.zeros(len(support))
                sampled_grad_(found, support.shape, support.crow, support.col, x, grad, False, support.bounds)
                return found

            def product(narrow=narrow, grad=grad, thin=thin) -> torch.Tensor:  # type: ignore[no-untyped-def]
                return (grad.t() @ narrow).view(-1)[thin].float()

            assert torch.allclose(product(), sampled(inside), rtol=2e-2, atol=2e-2 * tokens**0.5)
            forms = {"anywhere": lambda: sampled(anywhere), "inside": lambda: sampled(inside), "product": product}
            seconds = interleaved(forms, options.rounds)
            ms = statistics.median(seconds["anywhere"]) * 1e3
            print(
                f"{str(dtype):15} {name:18} anywhere {ms:7.3f} ms  sampled in columns "
                f"{ratio(seconds['inside'], seconds['anywhere']):5.2f}  thin product "
                f"{ratio(seconds['product'], seconds['anywhere']):5.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
