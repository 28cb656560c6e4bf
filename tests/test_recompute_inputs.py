"""Inputs that are computed again for backward: the same bits, and not a number more kept than a frozen model keeps."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seft_dist import pack_weights
from seft_dist.optim import linear
from seft_dist.optim import recompute_inputs as inputs
from seft_dist.optim.optimizer import SeftOptimizer
from seft_dist.optim.recompute_inputs import keep
from tests.families import family_model
from tests.models import batch, moving, prune_, tiny_llama

TYPES = [torch.float32, torch.bfloat16]


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """A Llama's, which computes in fp32."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def gemma_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + weight.float())).to(x.dtype)


def gated(x: Tensor, weight: Tensor) -> Tensor:
    return nn.functional.silu(x) * (x + weight)


def gelu(x: Tensor, _: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.04 * x.pow(3.0))))


@given(st.sampled_from([norm, gemma_norm, gated, gelu]), st.sampled_from(TYPES), st.integers(1, 9), st.integers(0, 999))
def test_the_same_bits_from_what_the_graph_holds(
    make: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, width: int, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 5, width, generator=rng).to(dtype).requires_grad_()
    weight = torch.randn(width, generator=rng).to(dtype)
    product = make(x, weight)
    ways = [keep(product) for _ in range(3)]  # as query, key and value do
    expected, place = product.detach().clone(), product.data_ptr()
    for _, kept in ways:
        assert kept and all(tensor.data_ptr() != place and tensor.grad_fn is None for tensor in kept)
    weight.zero_()  # an engine took it away after forward
    for way, kept in ways:
        found = way.get([*kept, weight])
        assert found.dtype == dtype and torch.equal(found, expected)
    again = ways[0][0].get(ways[0][1])  # a graph that was retained
    assert torch.equal(again, expected)


def test_the_first_of_several_linears_computes_and_the_last_drops() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    product = gated(x, torch.randn(8))
    (one, kept), (two, _) = keep(product), keep(product)
    value = one.get(kept)
    assert two.get(kept) is value
    assert one is two and one.value is None and not one.operands


def test_who_never_asks_lets_go_too() -> None:
    product = gated(torch.randn(4, 8, requires_grad=True), torch.randn(8))
    (one, kept), (two, _) = keep(product), keep(product)
    one.get(kept)
    two.leave()
    assert one.value is None and not one.operands


def kept_whole(x: Tensor) -> bool:
    _, (kept, *more) = keep(x)
    return kept is x and not more


def test_other_inputs_are_kept() -> None:
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(8)
    assert kept_whole(x) and kept_whole(x.detach()) and kept_whole(x + 1) and kept_whole(gated(x, weight).t())
    assert kept_whole(x * torch.randn(4, 8))  # a parameter of that size may be anywhere by then
    assert kept_whole(torch.cos(x)) and kept_whole(gated(x, weight)[:, [0, 1]])
    released = norm(x, gone := torch.randn(8))
    gone.data = torch.empty(0)  # as ZeRO-3 does after a module's forward
    assert kept_whole(released)
    left, right = x + 1, x + 2
    changed = left * right
    left.add_(1)  # the graph's operand is no longer what was multiplied
    assert kept_whole(changed)


def test_hooks_see_the_input_itself() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert kept_whole(gated(x, torch.randn(8)))
    assert not kept_whole(gated(x, torch.randn(8)))


def test_torch_has_the_nodes_that_are_followed() -> None:
    assert inputs.unknown_nodes() == []


@pytest.mark.parametrize("renamed", ["_PRODUCT", "_SELECTION"])
def test_one_warning_where_torch_names_a_node_otherwise(renamed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, renamed, "OtherBackward0")
    seft = SeftOptimizer(prune_(tiny_llama()), moving(density=0.05, interval=2, steps=8))
    with pytest.warns(UserWarning, match="no autograd nodes .*OtherBackward0.* needs more memory") as given:
        seft.attach()
        seft.attach()
    assert len(given) == 1
    if renamed == "_PRODUCT":
        assert kept_whole(gated(torch.randn(4, 8, requires_grad=True), torch.randn(8)))


def storages(output: Tensor) -> dict[int, int]:
    """Every storage that a graph keeps for backward, and its bytes."""
    found: dict[int, int] = {}
    nodes, seen = [output.grad_fn], set()
    while nodes:
        node: Any = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes.extend(before for before, _ in node.next_functions)
        names = (
            ["saved_tensors"] if hasattr(node, "saved_tensors") else [n for n in dir(node) if n.startswith("_saved_")]
        )
        for value in (getattr(node, name) for name in names):
            for tensor in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(tensor, Tensor):
                    found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return found


def activations(model: Any, ids: dict[str, Tensor]) -> int:
    known = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    return sum(size for place, size in storages(model(**ids).loss).items() if place not in known)


# Not gemma2, whose attention without a fused kernel copies what o_proj gets, and not gpt2, whose norm is one operation.
@pytest.mark.parametrize(
    "family", ["llama2", "llama3", "mistral", "qwen2", "qwen3", "deepseek_dense", "gemma", "gemma3", "qwen3_moe"]
)
@pytest.mark.parametrize("dtype", TYPES)
def test_no_more_kept_than_by_a_frozen_model(family: str, dtype: torch.dtype) -> None:
    model: Any = prune_(family_model(family)).to(dtype).train()
    ids = batch(0, length=32)
    # What makes a frozen model's graph is a gradient of its first input.
    model.get_input_embeddings().register_forward_hook(lambda *args: args[2].requires_grad_())
    model.requires_grad_(False)
    floor = activations(model, ids)
    seft = SeftOptimizer(model, moving(density=0.05))
    mine = activations(model, ids)
    numbers = sum(p.numel() for p in model.parameters() if p.ndim == 1) * 4
    assert mine <= floor + 3 * numbers, (mine / floor, floor)
    seft.detach()


def test_a_frozen_packed_linear_keeps_nothing() -> None:
    model: Any = prune_(tiny_llama()).train()
    pack_weights(model)
    model.requires_grad_(False)
    embedded = model.get_input_embeddings()(batch(0)["input_ids"]).requires_grad_()
    nodes, seen, kept = [model(inputs_embeds=embedded).logits.grad_fn], set(), []
    while nodes:
        node: Any = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes.extend(before for before, _ in node.next_functions)
            if "_SampledLinear" in node.name():
                kept.append(node.saved_tensors)
    assert len(kept) == 14 and all(tensors == () for tensors in kept)


@contextlib.contextmanager
def plain_inputs() -> Iterator[None]:
    """Every input kept, as autograd's own linear does."""
    before = linear.keep
    linear.keep = lambda x: (inputs._WHOLE, [x])
    try:
        yield
    finally:
        linear.keep = before


def trained(make: Callable[[], nn.Module], dtype: torch.dtype, checkpointed: bool) -> list[Tensor]:
    model: Any = prune_(make()).to(dtype).train()
    if checkpointed:
        for layer in model.transformer.h if hasattr(model, "transformer") else model.model.layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    seft = SeftOptimizer(model, moving(density=0.05, interval=2, window=1, steps=5))
    losses = []
    for step in range(5):
        for micro in range(2):
            loss = model(**batch(2 * step + micro)).loss
            loss.backward()
            losses.append(loss.detach())
        seft.step()
        seft.zero_grad()
    return [*losses, *(p.detach() for p in model.parameters())]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_training_is_the_same_to_the_bit(family: str, dtype: torch.dtype, checkpointed: bool) -> None:
    make = tiny_llama if family == "llama" else functools.partial(family_model, family)
    with plain_inputs():
        expected = trained(make, dtype, checkpointed)
    found = trained(make, dtype, checkpointed)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
