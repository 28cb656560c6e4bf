"""Models and loops that SEFT cannot train are refused by name, with what to change."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from seft_dist import SeftOptimizer
from seft_dist.io import checkpoint
from tests.models import batch, moving, prune_, tiny_llama

CONFIG = moving(density=0.05, interval=4, steps=9)


def _projection(model: Any) -> Any:
    return model.model.layers[0].mlp.up_proj


def test_parameters_instead_of_a_model() -> None:
    model: Any = prune_(tiny_llama())
    with pytest.raises(TypeError, match=r"got a generator instead of a model.*SeftOptimizer\(model"):
        SeftOptimizer(model.parameters())


@pytest.mark.parametrize("late", [False, True])
def test_adapters(late: bool) -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = prune_(tiny_llama())
    adapters = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    if late:
        SeftOptimizer(model, CONFIG)
        wrapped: Any = get_peft_model(model, adapters)
        with pytest.raises(ValueError, match="of PEFT.*merge_and_unload"):
            wrapped(**batch(0))
        return
    with pytest.raises(ValueError, match="of PEFT.*merge_and_unload"):
        SeftOptimizer(get_peft_model(model, adapters), moving(density=0.01, targets="up_proj"))


def test_fp16_weights() -> None:
    with pytest.raises(ValueError, match="is float16.*bfloat16"):
        SeftOptimizer(prune_(tiny_llama(dtype=torch.float16)), CONFIG)


def test_fp16_autocast() -> None:
    model = prune_(tiny_llama())
    SeftOptimizer(model, CONFIG)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = model(**batch(0)).loss
    with pytest.raises(ValueError, match="gradients are float16"):
        loss.backward()


def test_a_grad_scaler() -> None:
    model = prune_(tiny_llama())
    seft = SeftOptimizer(model, CONFIG)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(**batch(0)).loss).backward()
    with pytest.raises(ValueError, match="got a GradScaler.*bf16"):
        scaler.step(seft)


def test_pruning_parametrizations() -> None:
    model = prune_(tiny_llama())
    prune.l1_unstructured(_projection(model), "weight", 0.5)
    with pytest.raises(ValueError, match=r"up_proj: torch.nn.utils.prune computes.*prune.remove"):
        SeftOptimizer(model, CONFIG)
    prune.remove(_projection(model), "weight")
    SeftOptimizer(model, CONFIG).detach()
    parametrize.register_parametrization(_projection(model), "weight", nn.Identity())
    with pytest.raises(ValueError, match="up_proj.*remove_parametrizations"):
        SeftOptimizer(model, CONFIG)


def test_sparse_weights() -> None:
    model = prune_(tiny_llama())
    module = _projection(model)
    module.weight = nn.Parameter(module.weight.detach().to_sparse_csr())
    with pytest.raises(ValueError, match="up_proj.*sparse_csr.*to_dense"):
        SeftOptimizer(model, CONFIG)


def test_meta_weights() -> None:
    model = prune_(tiny_llama())
    module = _projection(model)
    module.weight = nn.Parameter(module.weight.detach().to("meta"))
    seft = SeftOptimizer(model, CONFIG)
    with pytest.raises(ValueError, match=r"up_proj.weight is on the meta device, without values"):
        seft.attach()
    seft.detach()
    module._hf_hook = object()
    with pytest.raises(ValueError, match="up_proj.weight is on the meta device and fetched.*device_map"):
        SeftOptimizer(model, CONFIG)


def test_checkpoints_take_paths_as_text(tmp_path: Any) -> None:
    model = prune_(tiny_llama())
    seft = SeftOptimizer(model, CONFIG)
    model(**batch(0)).loss.backward()
    seft.step()
    saved = checkpoint.save(seft, str(tmp_path), {"a": 1})
    assert checkpoint.latest(str(tmp_path)) == saved
    assert checkpoint.load(SeftOptimizer(prune_(tiny_llama()), CONFIG), str(saved)) == {"a": 1}


@pytest.mark.filterwarnings("ignore:.*fewer active weights than density")
def test_a_checkpoint_loads_onto_the_trained_weights_and_no_others(tmp_path: Any) -> None:
    model: Any = prune_(prune_(tiny_llama()), 0.97, "q_proj")  # its budget is what is active, until some are given up
    seft = SeftOptimizer(model, CONFIG, lr=1e-2)
    for t in range(4):  # the last one evolves: what has grown is 0
        model(**batch(t)).loss.backward()
        seft.step()
    saved = checkpoint.save(seft, tmp_path, {})
    other: Any = prune_(tiny_llama())
    other.load_state_dict(model.state_dict())
    loaded = SeftOptimizer(other, CONFIG, lr=1e-2)
    checkpoint.load(loaded, saved)
    assert loaded.sparse_state.fingerprints == seft.sparse_state.fingerprints
    assert loaded.sparse_state.budgets == seft.sparse_state.budgets
    for each, optimizer in ((model, seft), (other, loaded)):
        each(**batch(4)).loss.backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match="is of step 4, and the model has been trained since"):
        checkpoint.load(seft, saved)
