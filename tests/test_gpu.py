"""SEFT on a CUDA device beside SEFT on a CPU; and the same on the CPU alone, with the forms in torch that a GPU runs.

pytest -m gpu tests/test_gpu.py          # on a machine with a GPU; without one these are skipped
"""

import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from seft_dist import SeftConfig, SeftOptimizer
from seft_dist.backends.group import Group
from seft_dist.io import checkpoint
from seft_dist.kernels import adamw, bits, choice, packing, ranking, sampled, scatter
from tests.gpu_runs import (
    STEPS,
    build,
    data_of,
    layers_do_not_wait,
    nothing_waits,
    same_exactly,
    same_topology,
    train,
)
from tests.layouts import ds_engine, shard_fsdp, snapshot
from tests.models import Parent, moving, prune_, tiny_llama
from tests.ranks import run_ranks

SEEDS = (0, 1, 2)
MISSING = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
NO_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
ON_CARD = [pytest.mark.gpu, MISSING]
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=ON_CARD)]
FORMS = pytest.mark.parametrize(
    ("device", "form"),
    [
        pytest.param("cpu", "dense"),
        pytest.param("cuda", "dense", marks=ON_CARD),
        pytest.param("cuda", "triton", marks=[*ON_CARD, NO_TRITON]),
    ],
    indirect=True,
)
"""For tests that run with every form of the sampled gradient that a device has, whatever would be chosen."""


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Device of a test; a CPU is used without the compiled kernels, so that the code is that of a GPU."""
    if request.param == "cpu":
        for module in (adamw, bits, choice, packing, ranking, sampled, scatter):
            monkeypatch.setattr(module, "library", lambda: None)
    return torch.device(request.param)


@pytest.fixture
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Forces a form of the sampled gradient, and checks after the test that it ran and no other did."""
    ran = set()

    def recorded(name: choice.Form) -> Callable[..., None]:
        run = sampled.FORMS[name]

        def wrapper(*args: Any) -> None:
            ran.add(name)
            run(*args)

        return wrapper

    monkeypatch.setattr(sampled, "choose", lambda *_: request.param)
    monkeypatch.setattr(sampled, "FORMS", {name: recorded(name) for name in sampled.FORMS})
    yield request.param
    assert ran == {request.param}


@pytest.fixture(scope="module")
def on_cpu() -> list[dict[str, Any]]:
    """A run of each seed on the CPU, with its own kernels: in fp32, a model of one layer."""
    cpu = torch.device("cpu")
    return [train(*build(cpu, seed, layers=1), cpu) for seed in SEEDS]


@FORMS
def test_same_supports_and_masks_as_on_a_cpu(device: torch.device, form: str, on_cpu: list[dict[str, Any]]) -> None:
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
    config = SeftConfig(density=0.05, interval=2, window=2, steps=STEPS, swap_fraction=0.03, swap_end=STEPS)
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


def test_resident_weights_train_to_the_same_bits(device: torch.device) -> None:
    dense, packed = (train(*build(device, resident=resident), device) for resident in (False, True))
    assert dense["losses"] == packed["losses"] and dense["digests"] == packed["digests"]
    assert same_exactly(dense["state"], packed["state"])


def test_checkpointed_layers_train_to_the_same_bits(device: torch.device) -> None:
    kept, again = (train(*build(device, checkpointed=checkpointed), device) for checkpointed in (False, True))
    assert kept["losses"] == again["losses"] and kept["digests"] == again["digests"]


@FORMS
@pytest.mark.parametrize("resident", [False, True])
def test_an_ordinary_step_does_not_wait(form: str, resident: bool, device: torch.device) -> None:
    config = moving(density=0.05, interval=4, steps=STEPS)
    model, seft = build(device, dtype=torch.bfloat16, resident=resident, config=config)
    seft.attach()
    seft._checks_late = True
    for t in range(7):
        data = data_of(t, device)
        if t in (1, 5):  # not the first one, whose write is checked, and no step that evolves
            with layers_do_not_wait(model, device):
                loss = model(**data).loss
            with nothing_waits(device, "aten._local_scalar_dense.default"):  # what the step before found out is read
                loss.backward()
                seft.step()
                seft.zero_grad()
        else:
            model(**data).loss.backward()
            seft.step()
            seft.zero_grad()
    assert seft.num_steps == 7


def on_ranks(device: torch.device, world_size: int, backend: str, run: Callable[..., Any]) -> list[Any]:
    """Run on new processes; with CUDA they are spawned, as a forked one cannot use a device that its parent uses."""
    if device.type == "cpu":
        return run_ranks(run, world_size, device.type, timeout=120)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cuda")  # for all other tests it is the CPU (tests/conftest.py)
        return run_ranks(run, world_size, device.type, timeout=120, start="spawn", backend=backend)


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


def called_collectives(rank: int, world_size: int, kind: str) -> dict[str, Any]:
    """Every collective of a group of one rank, and a training whose exchange goes through the library.

    A process alone, as ``Group(None)``, would call no library.
    """
    device = torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(0)
    ours = Group(dist.group.WORLD)
    for group in (ours, ours.twin()):
        for where in {device, torch.device("cpu")}:  # offloaded shards are on the CPU, also where NCCL is used
            for dtype in (torch.float32, torch.bfloat16, torch.int32, torch.int64, torch.uint8):
                values = torch.arange(6, device=where).to(dtype)
                (lengths,), (gathered,) = (group.gather(values, given) for given in ([6], None))
                found = [
                    group.sum(values.clone()),
                    group.max(values.clone()),
                    group.stack(values)[0],
                    lengths,
                    gathered,
                ]
                assert all(torch.equal(one, values) and one.device == values.device for one in found), (where, dtype)
            numbers = torch.randn(5, device=where)
            assert torch.equal(group.sum_to_owners(numbers, [5]), numbers)
            assert group.sum_to_owners(numbers[:0], [0]).numel() == 0
        assert group.gather_objects({"rank": rank}) == [{"rank": 0}]
    calls = Counter[str]()
    names = ("all_reduce", "all_to_all_single", "all_gather_single", "all_gather_into_tensor")
    for name in names:
        run = getattr(dist, name, None)
        if run is not None:
            setattr(dist, name, counting(calls, name, run))
    return train(*build(device, group=dist.group.WORLD), device) | {"calls": calls}


def counting(calls: Counter[str], name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return run(*args, **kwargs)

    return counted


def replicated_pair(rank: int, world_size: int, kind: str) -> dict[str, Any]:
    device = torch.device(kind)
    model, seft = build(device)
    found = train(model, seft, device, rank=rank)
    return {"digests": found["digests"], "state": found["state"]}


def test_collectives_of_one_rank(device: torch.device) -> None:
    alone = train(*build(device), device)
    (found,) = on_ranks(device, 1, "nccl", called_collectives)
    assert found["digests"] == alone["digests"]
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    calls = found["calls"]
    assert calls["all_reduce"] and calls["all_to_all_single"] >= STEPS - 1
    assert calls["all_gather_single"] + calls["all_gather_into_tensor"]


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
