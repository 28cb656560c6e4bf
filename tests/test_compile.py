"""torch.compile puts the linears into its graphs as they are: no graph break, no second compilation."""

import dataclasses
from typing import Any

import pytest
import torch
import torch._dynamo

from seft_dist import SeftOptimizer
from tests.layouts import snapshot
from tests.models import batch, moving, prune_, tiny_llama

CONFIG = moving(density=0.05, interval=3, window=2, steps=9)


def _train(compiled: str | None, **over: Any) -> tuple[list[float], dict[str, Any]]:
    model: Any = prune_(tiny_llama())
    seft = SeftOptimizer(model, dataclasses.replace(CONFIG, **over), lr=1e-2)
    called = torch.compile(model, backend="aot_eager") if compiled == "model" else model
    if compiled == "in place":
        model.compile(backend="aot_eager")
    for layer in model.model.layers if compiled == "layers" else ():
        layer.compile(backend="aot_eager")
    losses = []
    for t in range(7):  # the first support, windows and two evolutions
        loss = called(**batch(t)).loss
        loss.backward()
        seft.step()
        seft.zero_grad()
        losses.append(loss.item())
    return losses, snapshot(model, seft)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiled", "graphs"), [("model", 1), ("layers", 2), pytest.param("in place", 1, marks=pytest.mark.long)]
)
def test_compiled_training_is_eager_training_in_one_graph(compiled: str, graphs: int) -> None:
    losses, state = _train(None)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    others, other = _train(compiled)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"] and not counters["recompiles"]
    assert counters["stats"]["unique_graphs"] <= graphs
    assert others == pytest.approx(losses, abs=1e-5)
    for name, layer in other.items():
        assert torch.equal(layer["support"], state[name]["support"]) and torch.equal(layer["mask"], state[name]["mask"])


@pytest.mark.slow
def test_norms_train_outside_of_the_graphs() -> None:
    losses, _ = _train(None, train_norms=True)
    torch._dynamo.reset()
    assert _train("layers", train_norms=True)[0] == pytest.approx(losses, abs=1e-5)
