"""A tiny training on a CUDA device or a CPU, for tests/test_gpu.py: what it gives, and where the host would wait."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from seft_dist import SeftConfig, SeftOptimizer, pack_weights
from seft_dist.backends.group import ProcessGroup
from tests.layouts import snapshot
from tests.models import Parent, batch, moving, prune_, tiny_llama
from tests.waits import Waits

STEPS = 8
CONFIG = moving(density=0.05, interval=2, window=2, steps=STEPS)
"""The first support and three evolutions."""


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
    group: ProcessGroup | None = None,
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
    return model, SeftOptimizer(model, config, lr=1e-2, max_grad_norm=1.0, parent=parent, group=group)


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


def same_topology(one: dict[str, Any], other: dict[str, Any]) -> bool:
    pairs = [(layer, other["state"][name]) for name, layer in one["state"].items()]
    return all(torch.equal(a[key], b[key]) for a, b in pairs for key in ("mask", "support"))


def same_exactly(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(
        torch.equal(value, other[name][key].cpu()) for name, layer in one.items() for key, value in layer.items()
    )


@contextmanager
def nothing_waits(device: torch.device, *allowed: str) -> Iterator[None]:
    """An error where the host would wait for the device.

    Args:
        device: The device.
        allowed: Operations that would make a host wait for a GPU if their operand had not been copied long since. On a
            CPU there is no such copy.
    """
    if device.type == "cpu":
        with Waits() as waits:
            yield
        assert waits.found in ([], list(allowed))
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def layers_do_not_wait(model: Any, device: torch.device) -> Iterator[None]:
    """An error where the host would wait in the forward pass of a decoder layer, the last norm or the output layer.

    The model around them is not ours: transformers reads whether a batch holds several sequences in a row.
    """
    within = ExitStack()
    hooks = []
    for module in (*model.model.layers, model.model.norm, model.lm_head):
        enter = module.register_forward_pre_hook(lambda *_: within.enter_context(nothing_waits(device)), prepend=True)
        hooks += [enter, module.register_forward_hook(lambda *_: within.close())]
    try:
        yield
    finally:
        within.close()
        for hook in hooks:
            hook.remove()
