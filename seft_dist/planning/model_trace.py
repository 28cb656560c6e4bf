"""Cost of one forward and backward pass, traced by running the real model class on fake tensors without values.

Only the first few layers are run. Every further layer of the same kind adds the cost that the last traced layer of its
kind added.
"""

import contextlib
import copy
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from seft_dist.config import SeftConfig
from seft_dist.io.models import checkpoint_activations, decoder_layers
from seft_dist.modules.experts import first_projection, is_experts
from seft_dist.modules.targets import find_targets
from seft_dist.optim.install import install

# transformers builds no mask for an attention function that it does not know, so the causal kernel is called, as in a
# training run on full blocks.
_ATTENTION = "seft_plan"
AttentionInterface.register(_ATTENTION, sdpa_attention_forward)


@dataclass(frozen=True)
class PassCost:
    """Cost of one forward and backward pass over one micro-batch."""

    saved: float
    """Bytes of the activations that are kept between forward and backward."""
    head: float
    """Peak bytes until the gradient of the last layer's output exists, which includes logits and loss."""
    layers: float
    """Peak bytes after that, until the gradient of the first layer's output exists."""
    first: float
    """Peak bytes after that, during the backward pass of the first layer."""
    matmul: float
    """Floating-point operations of matrix products: forward, recomputation, gradients of inputs."""
    attention: float
    """Floating-point operations of attention kernels."""
    moved: float
    """Bytes that all other operations read and write."""
    calls: float
    """Number of operations."""

    def __add__(self, other: "PassCost") -> "PassCost":
        return PassCost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def minus(self, other: "PassCost") -> "PassCost":
        """Subtract another cost, field by field."""
        return PassCost(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    @property
    def computed(self) -> tuple[float, float, float, float]:
        """The fields that take time: matmul, attention, moved, calls."""
        return self.matmul, self.attention, self.moved, self.calls

    @property
    def peak(self) -> float:
        """Peak bytes of the whole pass."""
        return max(self.head, self.layers, self.first)


def trace_pass(
    config: PreTrainedConfig,
    kinds: list[tuple[Any, ...]],
    dtype: torch.dtype,
    batch: int,
    length: int,
    checkpoint: bool,
    inputs_kept: bool = False,
) -> PassCost:
    """Trace the cost of a pass through the whole model, by running its first few layers.

    Args:
        config: Configuration of the model.
        kinds: Kind of each decoder layer (``ModelShapes.kinds``).
        dtype: Dtype of the weights.
        batch: Number of sequences in a micro-batch.
        length: Number of tokens in a sequence.
        checkpoint: Decoder layers are computed again in backward.
        inputs_kept: Every linear keeps its input for backward, as in LoRA and full fine-tuning.
    """
    runs: dict[int, PassCost] = {}

    def first(count: int) -> PassCost:
        if count not in runs:
            runs[count] = _run(config, count, dtype, batch, length, checkpoint, inputs_kept)
        return runs[count]

    if len(kinds) == 1:
        return first(1)
    # The cost that a layer adds is the difference of two runs, with and without it. The first layer is not used for
    # this, because its run also includes everything that exists once. The earliest later layer of each kind is.
    steps = {kinds[i]: i for i in range(len(kinds) - 1, 0, -1)}
    costliest = max(steps.values())
    total = first(costliest + 1)
    for kind in kinds[costliest + 1 :]:
        added = first(steps[kind] + 1).minus(first(steps[kind]))
        total += PassCost(added.saved, added.saved, added.saved, 0.0, *added.computed)
    return total


def _shortened(config: PreTrainedConfig, count: int) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:count]
    config.use_cache = False
    return config


def _run(
    config: PreTrainedConfig,
    count: int,
    dtype: torch.dtype,
    batch: int,
    length: int,
    checkpoint: bool,
    inputs_kept: bool,
) -> PassCost:
    """Run the first ``count`` layers forward and backward on fake tensors."""
    # SEFT's linears save their inputs if a hook handles saved tensors (seft_dist/optim/recompute_inputs.py), so a hook
    # without effect makes them keep their inputs as other methods do
    hooks = saved_tensors_hooks(Tensor.detach, Tensor.detach) if inputs_kept else contextlib.nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model: Any = AutoModelForCausalLM.from_config(
            _shortened(config, count),
            dtype=dtype,
            # the fused kernels cannot cap attention scores
            attn_implementation="eager" if getattr(config, "attn_logit_softcapping", None) else _ATTENTION,
            trust_remote_code=False,
        )
        model.train()
        if checkpoint:
            checkpoint_activations(model)
        targets = find_targets(model, SeftConfig().targets)
        model.requires_grad_(False)
        for target in targets.values():
            install(target)
        for module in model.modules():
            if is_experts(module):
                module.forward = types.MethodType(_even_experts, module)
        ids = torch.zeros(batch, length, dtype=torch.long)
        meter = _Meter([*model.parameters(), *model.buffers(), ids])
        layers = decoder_layers(model)
        layers[-1].register_forward_hook(meter.watch("head"))
        layers[0].register_forward_hook(meter.watch("layers"))
        with meter, hooks:
            loss = model(input_ids=ids, labels=ids).loss
            saved = meter.live
            loss.backward()
    computed = (meter.matmul, meter.attention, meter.moved, meter.calls)
    return PassCost(saved, meter.part["head"], meter.part["layers"], meter.peak, *computed)


class _Meter(TorchDispatchMode):
    """Dispatch mode that tracks the memory of every tensor, and counts what operations compute and move.

    A storage is counted when an operation first returns it, and until it is freed. Parameters, buffers and the input
    are not counted; they are passed in as known.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = self.matmul = self.attention = self.moved = self.calls = 0
        self.part = {"head": 0, "layers": 0}
        """Peak bytes of each part of the pass that has ended."""
        self._known = {_storage(tensor) for tensor in known}

    def watch(self, part: str) -> Callable[..., None]:
        """Make a forward hook for a layer, which ends a part of the pass when the gradient of its output exists."""

        def done(_: Tensor) -> None:
            self.part[part], self.peak = self.peak, self.live

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(done)

        return hook

    def _freed(self, key: int, size: int) -> None:
        self.live -= size
        self._known.discard(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in results:
            key, size = _storage(tensor), tensor.untyped_storage().nbytes()
            if key not in self._known:
                self._known.add(key)
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(tensor.untyped_storage(), self._freed, key, size)
        self.calls += func is not torch.ops.aten.detach.default
        self._count(func._schema.name, inputs, results)
        return out

    def _count(self, name: str, inputs: list[Tensor], results: list[Tensor]) -> None:
        if not results:
            return
        if name in ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"):
            self.matmul += 2 * results[0].numel() * inputs[-2].shape[-1]
        elif "scaled_dot_product" in name:
            query, key, value = inputs[1:4] if "backward" in name else inputs[:3]
            pairs = query.shape[:-1].numel() * key.shape[-2] // 2  # half of all pairs, by causality
            backward = 2.5 if "backward" in name else 1  # five products instead of two
            self.attention += int(2 * backward * pairs * (query.shape[-1] + value.shape[-1]))
        elif not {_storage(t) for t in results} <= {_storage(t) for t in inputs} or name.endswith("_"):
            self.moved += sum(t.numel() * t.element_size() for t in (*inputs, *results))


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _even_experts(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Forward pass of fused experts if each gets the same number of tokens; fake tensors cannot decide on a routing."""
    chosen = top_k_index.shape[-1]
    order = top_k_index.reshape(-1).sort(stable=True).indices
    rows = order.numel()
    sizes = [rows * (e + 1) // module.num_experts - rows * e // module.num_experts for e in range(module.num_experts)]

    def project(key: str, x: Tensor) -> Tensor:
        weight = getattr(module, key)
        return torch.cat([part @ weight[expert].T for expert, part in enumerate(x.split(sizes))])

    x = project(first_projection(module), hidden[order // chosen])
    x = project("down_proj", module._apply_gate(x) if module.has_gate else module.act_fn(x))
    x = x * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    return x[order.argsort()].view(-1, chosen, x.shape[-1]).sum(1).to(hidden.dtype)
