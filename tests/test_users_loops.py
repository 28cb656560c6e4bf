"""What loops of users do beside forward, backward and step: other backward passes, copies, conversions, heads."""

import copy
import functools
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.utils import prune
from transformers import LlamaConfig, LlamaForSequenceClassification
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from seft_dist import SeftConfig, SeftOptimizer
from seft_dist.optim.notices import SeftWarning
from tests.models import SIZES, VOCAB, batch, moving, prune_, tiny_llama
from tests.ranks import run_ranks

CONFIG = moving(density=0.05, interval=4, window=2, steps=8)


def train(model: Any, seft: SeftOptimizer, steps: range) -> None:
    for t in steps:
        model(**batch(t)).loss.backward()
        seft.step()
        seft.zero_grad()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("how", ["grad", "inputs"])
def test_gradients_of_something_else_are_not_trained(how: str) -> None:
    def train_beside(attacks: bool) -> dict[str, Tensor]:
        model: Any = prune_(tiny_llama())
        seft = SeftOptimizer(model, moving(density=0.05, interval=4, window=2, steps=8, train_norms=True), lr=1e-2)
        for t in range(6):  # the first support, a window and an evolution
            model(**batch(t)).loss.backward()
            if attacks:
                embedded = model.get_input_embeddings()(batch(t)["input_ids"]).detach().requires_grad_()
                loss = model(inputs_embeds=embedded, labels=batch(t)["labels"]).loss
                if how == "grad":
                    assert torch.autograd.grad(loss, [embedded])[0].any()
                else:
                    loss.backward(inputs=[embedded])
                    assert embedded.grad is not None
            seft.step()
            seft.zero_grad()
        return weights(model)

    assert_equal(train_beside(True), train_beside(False))


def test_a_layer_that_is_frozen_by_hand_is_named() -> None:
    model: Any = prune_(tiny_llama())
    model.model.layers[0].requires_grad_(False)
    seft = SeftOptimizer(model, CONFIG)
    with pytest.warns(SeftWarning, match=r"7 targets were frozen .* e.g. model.layers.0.self_attn.q_proj"):
        train(model, seft, range(1))


def test_a_model_that_is_frozen_as_a_whole_is_no_mistake() -> None:
    model: Any = prune_(tiny_llama())
    seft = SeftOptimizer(model.requires_grad_(False), CONFIG)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SeftWarning)
        train(model, seft, range(2))


@pytest.mark.parametrize("each_layer", [True, False])
@pytest.mark.parametrize("wrapped_first", [True, False])
def test_fsdp1_is_refused_by_name(wrapped_first: bool, each_layer: bool) -> None:
    def on_rank(rank: int, size: int) -> None:
        model = prune_(tiny_llama())
        wrap = functools.partial(
            FullyShardedDataParallel,
            use_orig_params=True,
            device_id=torch.device("cpu"),
            auto_wrap_policy=ModuleWrapPolicy([LlamaDecoderLayer]) if each_layer else None,
        )
        if wrapped_first:
            SeftOptimizer(wrap(model), CONFIG)
        else:
            seft = SeftOptimizer(model, CONFIG)
            train(wrap(model), seft, range(1))

    with pytest.raises(AssertionError, match=r"FullyShardedDataParallel \(FSDP1\).*needs FSDP2.*fsdp_version: 2"):
        run_ranks(on_rank, 2)


def test_a_weight_that_is_computed_from_others_since_is_refused() -> None:
    model: Any = prune_(tiny_llama())
    seft = SeftOptimizer(model, CONFIG)
    prune.identity(model.model.layers[0].mlp.up_proj, "weight")
    with pytest.raises(ValueError, match=r"mlp.up_proj: torch.nn.utils.prune computes its weight anew"):
        train(model, seft, range(1))


def test_two_optimizers_of_one_model_are_refused() -> None:
    model = prune_(tiny_llama())
    first = SeftOptimizer(model, SeftConfig(targets="self_attn"))
    with pytest.raises(ValueError, match="already has a SeftOptimizer"):
        SeftOptimizer(model, SeftConfig(targets="mlp"))
    with pytest.raises(ValueError, match="already has a SeftOptimizer"):
        SeftOptimizer(copy.deepcopy(model), CONFIG)
    first.detach()
    SeftOptimizer(model, SeftConfig(targets="mlp"))


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_llama()


def test_the_head_of_a_model_in_a_wrapper_is_no_target() -> None:
    names = SeftOptimizer(prune_(Wrapper()), CONFIG).target_names
    assert len(names) == 14 and not any("lm_head" in name for name in names)


def test_a_dense_head_among_pruned_layers_is_named() -> None:
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "num_labels": 4, "pad_token_id": 0} | SIZES
    model: Any = LlamaForSequenceClassification(LlamaConfig(**sizes))
    prune_(model, pattern="layers")
    seft = SeftOptimizer(model, CONFIG)
    with pytest.warns(SeftWarning, match=r"1 of 15 targets have no zeros \(e.g. score\)"):
        model(input_ids=batch(0)["input_ids"], labels=torch.tensor([1, 2]))
    assert "score" in seft.target_names


@pytest.mark.parametrize("attached", [False, True])
def test_a_copy_of_the_model_leaves_the_original_alone(attached: bool) -> None:
    model: Any = prune_(tiny_llama())
    seft = SeftOptimizer(model, CONFIG, lr=1e-2)
    if attached:
        train(model, seft, range(1))
    before = weights(model)
    twin = copy.deepcopy(model)
    twin(**batch(1)).loss.backward()
    seft.step()
    assert seft.num_steps == int(attached)
    assert_equal(weights(model), before)
    assert_equal(weights(twin), before)
    train(model, seft, range(2, 4))
    alone: Any = prune_(tiny_llama())
    other = SeftOptimizer(alone, CONFIG, lr=1e-2)
    train(alone, other, range(1) if attached else range(0))
    train(alone, other, range(2, 4))
    assert_equal(weights(model), weights(alone))


def test_the_optimizer_itself_cannot_be_copied() -> None:
    seft = SeftOptimizer(prune_(tiny_llama()), CONFIG)
    for make in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            make(seft)


def test_a_model_that_is_converted_while_it_trains_is_refused() -> None:
    model: Any = prune_(tiny_llama())
    seft = SeftOptimizer(model, CONFIG)
    train(model, seft, range(2))
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"was torch.float32 when SeftOptimizer read it, and is torch.bfloat16 now"):
        train(model, seft, range(2, 3))


@pytest.mark.parametrize("store", ["full", "bf16", "factored", "candidates"])
def test_the_default_dtype_does_not_matter(store: str) -> None:
    config = moving(density=0.05, interval=4, window=2, steps=8, train_norms=True, window_store=store)

    def trained() -> dict[str, Tensor]:
        model: Any = prune_(tiny_llama())
        train(model, SeftOptimizer(model, config, lr=1e-2, max_grad_norm=1.0), range(6))
        return weights(model)

    expected, usual = trained(), torch.get_default_dtype()
    try:
        for dtype in (torch.bfloat16, torch.float64):
            model = prune_(tiny_llama())  # made before: only what training makes has the other type
            torch.set_default_dtype(dtype)
            train(model, SeftOptimizer(model, config, lr=1e-2, max_grad_norm=1.0), range(6))
            torch.set_default_dtype(usual)
            assert_equal(weights(model), expected)
    finally:
        torch.set_default_dtype(usual)


def test_a_transposed_view_is_refused() -> None:
    model: Any = prune_(tiny_llama())
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.data = weight.data.t().contiguous().t()
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj.weight is not contiguous"):
        SeftOptimizer(model, CONFIG)
