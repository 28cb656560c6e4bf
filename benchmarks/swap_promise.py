"""What one evolution's swaps promise and what they do: the loss without any training, for several limits.

    python benchmarks/swap_promise.py --model studies/teacher60/bases/wanda60/model \\
        --parent models/SmolLM2-135M-Instruct --train studies/teacher60/data/train.jsonl \\
        --validation studies/teacher60/data/validation.jsonl

For each limit (--limits, values of seft.swap_fraction; with 1 every pair that promises something changes places) the
pruned model is loaded, SeftOptimizer makes one evolution at learning rate 0, and the cross entropy of the validation
text is measured. What the swaps promise is computed apart from the optimizer, from the weights before and after them
and from moments that this script takes: the sum of h v^2 / 2 over what comes back, less that over what leaves, in nats
per token as the loss is. h is the mean square of the gradient of the output times that of the input, over the tokens
of the window. The promise is also shown as a share of the validation text's loss before. fp32.
"""

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from seft_dist import ParentModel, SeftConfig, SeftOptimizer
from seft_dist.config import DataConfig, ModelConfig
from seft_dist.data.load import load_sequences
from seft_dist.data.tokenizer import load_tokenizer
from seft_dist.modules.targets import find_targets

WINDOW = 2


def read_tokens(path: str, tokenizer: Any, length: int, number: int) -> Tensor:
    """Return sequences from all over a plain text, int64 [number, length]."""
    sequences = load_sequences(DataConfig(path=path, seq_len=length), tokenizer, progress=False)
    if len(sequences) < number:
        raise SystemExit(f"{path} has {len(sequences)} sequences of {length} tokens: needs {number}, so a longer text")
    every = len(sequences) // number
    return torch.stack([torch.as_tensor(sequences[i][0]) for i in range(0, len(sequences), every)][:number]).long()


@contextmanager
def moments_of(modules: dict[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Sum up, over the passes inside the context, the squared gradients of outputs [out] and squared inputs [in]."""
    sums: dict[str, list[Tensor]] = {
        name: [torch.zeros(size, dtype=torch.float64) for size in module.weight.shape]  # type: ignore[union-attr]
        for name, module in modules.items()
    }

    def observe(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            sums[name][1] += inputs[0].detach().flatten(0, -2).square().sum(0, dtype=torch.float64)

            def add(grad: Tensor) -> None:
                sums[name][0] += grad.flatten(0, -2).square().sum(0, dtype=torch.float64)

            output.register_hook(add)

        return hook

    handles = [module.register_forward_hook(observe(name)) for name, module in modules.items()]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def mean_loss(model: Any, tokens: Tensor) -> float:
    """Return the mean cross entropy over sequences [n, length], in nats per token."""
    model.eval()
    return sum(float(model(input_ids=row[None], labels=row[None]).loss) for row in tokens) / len(tokens)


def weights_of(model: Any) -> dict[str, Tensor]:
    """Return copies of the weights of all targets."""
    return {name: target.weight.detach().clone() for name, target in find_targets(model).items()}


def swap_once(arguments: argparse.Namespace, limit: float, train: Tensor) -> tuple[Any, int, float]:
    """Load the pruned model and swap.

    Returns:
        The model after one evolution, the number of positions that came back, and what was promised for them.
    """
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    model.config.use_cache = False
    model.train()
    before = weights_of(model)
    config = SeftConfig(density=0.01, interval=WINDOW + 1, window=WINDOW, swap_fraction=limit, scope="global")
    optimizer = SeftOptimizer(model, config, lr=0.0, parent=ParentModel.open(arguments.parent))

    def step(number: int) -> None:
        batch = train[number * arguments.batch_size :][: arguments.batch_size]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(0)  # chooses the support; the others are the window
    with moments_of({name: model.get_submodule(name) for name in before}) as sums:
        for number in range(1, WINDOW + 1):
            step(number)
    optimizer.detach()
    promise, count = 0.0, 0
    for name, weight in weights_of(model).items():
        rows, columns = (each / WINDOW for each in sums[name])
        came, left = (before[name] == 0) & (weight != 0), (before[name] != 0) & (weight == 0)
        price = torch.outer(rows, columns) / 2
        promise += float((price * weight.double().square())[came].sum())
        promise -= float((price * before[name].double().square())[left].sum())
        count += int(came.sum())
    return model, count, promise


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the pruned model")
    parser.add_argument("--parent", required=True, help="folder of the dense model")
    parser.add_argument("--train", required=True, help="text of the window")
    parser.add_argument("--validation", required=True, help="text whose loss is measured")
    parser.add_argument("--limits", type=float, nargs="+", default=[0.01, 0.02, 0.04, 0.08, 1.0])
    parser.add_argument("--batch-size", type=int, default=2, help="sequences of 128 tokens in a step")
    parser.add_argument("--sequences", type=int, default=12, help="sequences of 512 tokens to measure the loss on")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(ModelConfig(path=arguments.model))
    train = read_tokens(arguments.train, tokenizer, 128, arguments.batch_size * (WINDOW + 1))
    validation = read_tokens(arguments.validation, tokenizer, 512, arguments.sequences)
    start = mean_loss(AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32), validation)
    print(f"validation: {validation.numel():,} tokens, loss {start:.3f}, perplexity {math.exp(start):.2f}", flush=True)
    print("| limit | came back | promised | share of the loss | loss | perplexity |\n|---|---|---|---|---|---|")
    for limit in arguments.limits:
        model, number, promise = swap_once(arguments, limit, train)
        loss = mean_loss(model, validation)
        print(
            f"| {limit:g} | {number:,} | {promise:.2f} | {promise / start:.1%} | {loss - start:+.2f} | "
            f"{math.exp(loss):.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
