"""SEFT on a CUDA device beside SEFT on a CPU; and the same on the CPU alone, with the forms in torch that a GPU runs.

pytest -m gpu tests/test_gpu.py          # on a machine with a GPU; without one these are skipped
"""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from seft_dist import SeftConfig, SeftOptimizer, pack_weights
from seft_dist.io import checkpoint
from seft_dist.kernels import adamw, bits, choice, packing, ranking, sampled, scatter
from tests.layouts import ds_engine, shard_fsdp, snapshot
from tests.models import Parent, batch, moving, prune_, tiny_llama
from tests.ranks import run_ranks
from tests.waits import Waits

STEPS = 8
CONFIG = moving(density=0.05, interval=2, window=2, steps=STEPS)
"""The first support and three evolutions."""
SEEDS = (0, 1, 2)


def on_card(mark: Any = None) -> list[Any]:
    """Parameters of a test: the CPU, and a CUDA device where there is one."""
    missing = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    return [pytest.param("cpu", marks=mark or ()), pytest.param("cuda", marks=[pytest.mark.gpu, missing])]


@pytest.fixture(params=on_card())
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Device of a test; a CPU is used without the compiled kernels, so that the code is that of a GPU."""
    if request.param == "cpu":
        for module in (adamw, bits, choice, packing, ranking, sampled, scatter):
            monkeypatch.setattr(module, "library", lambda: None)
    return torch.device(request.param)


def compute_exactly() -> None:
    """Make sums on a CUDA device deterministic in this process: without TF32, and with attention by matrix products."""
    torch.backends.cuda.matmul.allow_tf32 = False
    for enable in ("enable_flash_sdp", "enable_mem_efficient_sdp", "enable_cudnn_sdp"):
        getattr(torch.backends.cuda, enable)(False)


def build(
    device: torch.device,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    resident: bool = False,
    checkpointed: bool = False,
    config: SeftConfig = CONFIG,
    layers: int = 2,
    parent: Parent | None = None,
) -> tuple[Any, SeftOptimizer]:
    """A tiny pruned model on a device, and its optimizer."""
    if device.type == "cuda":
        compute_exactly()
    model: Any = prune_(tiny_llama(seed, dtype, num_hidden_layers=layers)).to(device)
    if checkpointed:
        model.train()
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})  # its name depends on the version
    if resident:
        pack_weights(model)
    return model, SeftOptimizer(model, config, lr=1e-2, max_grad_norm=1.0, parent=parent)


def data_of(step: int, device: torch.device, rank: int = 0, size: int = 4) -> dict[str, Tensor]:
    return {key: value.to(device) for key, value in batch(step, rank, size=size).items()}


def train(
    model: Any,
    seft: SeftOptimizer,
    device: torch.device,
    first: int = 0,
    last: int = STEPS,
    rank: int = 0,
    same_batch: bool = False,
) -> dict[str, Any]:
    """Some steps: every loss, every evolution's digest, and what the targets are in the end, on the CPU."""
    losses, digests = [], []
    for t in range(first, last):
        loss = model(**data_of(0 if same_batch else t, device, rank)).loss
        loss.backward()
        seft.step()
        seft.zero_grad()
        losses.append(loss.item())
        if seft.evolution:
            digests.append(seft.evolution.digest)
    state = {name: {key: value.cpu() for key, value in layer.items()} for name, layer in snapshot(model, seft).items()}
    return {"losses": losses, "digests": digests, "state": state}


@pytest.fixture(scope="module")
def on_cpu() -> list[dict[str, Any]]:
    """A run of each seed on the CPU, with its own kernels: in fp32, a model of one layer."""
    cpu = torch.device("cpu")
    return [train(*build(cpu, seed, layers=1), cpu) for seed in SEEDS]


def same_topology(one: dict[str, Any], other: dict[str, Any]) -> bool:
    pairs = [(layer, other["state"][name]) for name, layer in one["state"].items()]
    return all(torch.equal(a[key], b[key]) for a, b in pairs for key in ("mask", "support"))


def test_same_supports_and_masks_as_on_a_cpu(device: torch.device, on_cpu: list[dict[str, Any]]) -> None:
    found = [train(*build(device, seed, layers=1), device) for seed in SEEDS]
    same = 0
    for one, other in zip(found, on_cpu, strict=True):
        assert len(one["digests"]) == len(other["digests"]) == 4
        assert one["losses"] == pytest.approx(other["losses"], rel=2e-3)
        # scores that are equal up to rounding may be ranked differently: then few positions differ, in one seed at most
        for name, layer in one["state"].items():
            assert float((layer["mask"] != other["state"][name]["mask"]).float().mean()) < 0.02, name
        if same_topology(one, other):
            same += 1
            assert one["digests"][-1] == other["digests"][-1]
            for name, layer in one["state"].items():
                torch.testing.assert_close(layer["weight"], other["state"][name]["weight"], rtol=1e-3, atol=1e-3)
    assert same >= len(SEEDS) - 1, f"{same} of {len(SEEDS)} runs have the masks and supports of the CPU"


@pytest.mark.parametrize("resident", [False, True])
def test_swaps_are_those_of_a_cpu(device: torch.device, resident: bool) -> None:
    config = SeftConfig(density=0.05, interval=2, window=2, steps=STEPS, swap_fraction=0.03)
    found, wanted = (
        train(
            *build(where, layers=1, config=config, resident=resident, parent=Parent(tiny_llama(num_hidden_layers=1))),
            where,
        )
        for where in (device, torch.device("cpu"))
    )
    assert found["losses"] == pytest.approx(wanted["losses"], rel=2e-3)
    before = Parent(prune_(tiny_llama(num_hidden_layers=1))).weights
    for name, layer in wanted["state"].items():
        assert float((layer["mask"] != found["state"][name]["mask"]).float().mean()) < 0.02, name
        assert not torch.equal(layer["mask"], before[name].view(-1) != 0), name


def test_bf16_learns_and_keeps_its_zeros(device: torch.device) -> None:
    model, seft = build(device, dtype=torch.bfloat16)
    found = train(model, seft, device, same_batch=True)
    assert found["losses"][-1] < found["losses"][0] and len(found["digests"]) == 4
    for layer in seft.sparsity():
        assert layer.active == layer.mask_size and layer.zeros == layer.numel - layer.mask_size, layer.name
    for name, layer in found["state"].items():
        assert not layer["weight"][~layer["mask"]].any(), name


def test_a_checkpoint_goes_to_the_cpu_and_back(device: torch.device, tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    model, seft = build(device)
    there = train(model, seft, device, 0, 3, same_batch=True)
    checkpoint.save(seft, tmp_path, {"step": 3})

    def resume(where: torch.device, step: int) -> tuple[Any, SeftOptimizer]:
        model, seft = build(where)
        newest = checkpoint.latest(tmp_path)
        assert newest is not None and checkpoint.load(seft, newest) == {"step": step}
        return model, seft

    model, seft = resume(cpu, 3)
    assert same_exactly(there["state"], snapshot(model, seft))
    on_cpu = train(model, seft, cpu, 3, 5, same_batch=True)
    checkpoint.save(seft, tmp_path, {"step": 5})
    model, seft = resume(device, 5)
    assert same_exactly(on_cpu["state"], snapshot(model, seft))
    back = train(model, seft, device, 5, same_batch=True)
    assert len(there["digests"] + on_cpu["digests"] + back["digests"]) == 4
    assert back["losses"][-1] < there["losses"][0]


def same_exactly(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(
        torch.equal(value, other[name][key].cpu()) for name, layer in one.items() for key, value in layer.items()
    )


def test_resident_weights_train_to_the_same_bits(device: torch.device) -> None:
    dense, packed = (train(*build(device, resident=resident), device) for resident in (False, True))
    assert dense["losses"] == packed["losses"] and dense["digests"] == packed["digests"]
    assert same_exactly(dense["state"], packed["state"])


def test_checkpointed_layers_train_to_the_same_bits(device: torch.device) -> None:
    kept, again = (train(*build(device, checkpointed=checkpointed), device) for checkpointed in (False, True))
    assert kept["losses"] == again["losses"] and kept["digests"] == again["digests"]


@contextmanager
def nothing_waits(device: torch.device) -> Iterator[None]:
    """An error where the host would wait for the device."""
    if device.type == "cpu":
        with Waits() as waits:
            yield
        # what the step before found out is read; on a GPU it has been copied long since
        assert waits.found in ([], ["aten._local_scalar_dense.default"])
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("form", ["dense", None])
def test_an_ordinary_step_does_not_wait(
    form: str | None, resident: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form is not None:
        monkeypatch.setattr(sampled, "choose", lambda *_: form)
    config = moving(density=0.05, interval=4, steps=STEPS)
    model, seft = build(device, dtype=torch.bfloat16, resident=resident, config=config)
    seft.attach()
    seft._checks_late = True
    for t in range(7):
        loss = model(**data_of(t, device)).loss
        if t in (1, 5):  # not the first one, whose write is checked, and no step that evolves
            with nothing_waits(device):
                loss.backward()
                seft.step()
                seft.zero_grad()
        else:
            loss.backward()
            seft.step()
            seft.zero_grad()
    assert seft.num_steps == 7


def on_ranks(device: torch.device, world_size: int, backend: str, run: Callable[..., Any]) -> list[Any]:
    """Run on new processes; with CUDA they are spawned, as a forked one cannot use a device that its parent uses."""
    start, backend = ("fork", "gloo") if device.type == "cpu" else ("spawn", backend)
    return run_ranks(run, world_size, device.type, timeout=120, start=start, backend=backend)


def fsdp_alone(rank: int, world_size: int, kind: str) -> dict[str, Any]:
    device = torch.device(kind)
    model, seft = build(device)
    shard_fsdp(model)
    return train(model, seft, device)


def zero3_alone(rank: int, world_size: int, kind: str) -> dict[str, Any]:
    device = torch.device(kind)
    model, seft = build(device)
    engine = ds_engine(model, seft, 3)
    losses, digests = [], []
    for t in range(STEPS):
        loss = engine(**data_of(t, device)).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        if seft.evolution:
            digests.append(seft.evolution.digest)
    return {"losses": losses, "digests": digests}


def replicated_pair(rank: int, world_size: int, kind: str) -> dict[str, Any]:
    device = torch.device(kind)
    model, seft = build(device)
    found = train(model, seft, device, rank=rank)
    return {"digests": found["digests"], "state": found["state"]}


def test_fsdp_of_one_rank(device: torch.device) -> None:
    alone = train(*build(device), device)
    (found,) = on_ranks(device, 1, "nccl", fsdp_alone)
    assert found["digests"] == alone["digests"]
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_zero3_of_one_rank(device: torch.device) -> None:
    alone = train(*build(device), device)
    (found,) = on_ranks(device, 1, "nccl", zero3_alone)
    assert found["digests"] == alone["digests"]
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)


def test_two_ranks_on_one_device(device: torch.device) -> None:
    one, other = on_ranks(device, 2, "gloo", replicated_pair)
    assert one["digests"] == other["digests"] and len(one["digests"]) == 4
    for name, layer in one["state"].items():
        assert torch.equal(layer["weight"], other["state"][name]["weight"]), name
