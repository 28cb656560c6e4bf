"""LoRA, by PEFT: beside the frozen weights, then merged; and LoRA*, which is pruned again after that.

Source: Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen, "LoRA: Low-Rank Adaptation of Large Language Models",
arXiv 2106.09685. LoRA* is the name of the second in comparisons of sparse fine-tuning.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from seft_dist.backends import Backend
from seft_dist.backends.shards import stored_part, whole_shape
from seft_dist.baselines.baseline import Baseline, FinalizeInputs
from seft_dist.baselines.repruning import prune_again
from seft_dist.export.folders import new_folder
from seft_dist.io.weight_files import write_safetensors
from seft_dist.modules.kinds import Target
from seft_dist.optim.setup import check_pattern
from seft_dist.session.extras import require
from seft_dist.sparsity.casts import cast_weight

ADAPTER = "adapter"
"""Folder of a run with what lora has trained, as PEFT reads it."""
_NAME = "default"  # PEFT's name for the only adapter


def check_peft() -> None:
    """Refuse a machine without PEFT.

    Raises:
        ValueError: Says what to install.
    """
    require("peft", "method lora or lora_merged", ", or choose masked_lora")


class Lora(Baseline):
    """LoRA. The result is the merged model, which is dense; what was trained is written beside it."""

    supported_kinds = ("Linear", "Conv1D")
    allows_dense = True
    config_fields = ("rank", "alpha", "dropout", "seed")

    def install(self) -> dict[str, nn.Parameter]:
        from peft import LoraConfig, inject_adapter_in_model

        settings = self.config.baseline
        self._peft = LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=list(self.targets),
            base_model_name_or_path=self.config.model.path,
        )
        with _whole_placeholders(self.targets, self.backend.device):
            inject_adapter_in_model(self._peft, self.model, _NAME)
        layers = {name: self.model.get_submodule(name) for name in self.targets}
        return {
            f"{name}.{key}": getattr(layers[name], key)[_NAME].weight for name in layers for key in ("lora_A", "lora_B")
        }

    def finalize(self, inputs: FinalizeInputs) -> dict[str, Any]:
        adapter = {
            f"base_model.model.{part.name}.weight": part.values.view(part.parameter.shape).cpu()
            for part in self.trained.parts
        }
        if inputs.is_main and self.config.export:
            with new_folder(inputs.folder / ADAPTER) as folder:
                self._peft.inference_mode = True
                self._peft.save_pretrained(str(folder))
                write_safetensors(folder / "adapter_model.safetensors", adapter, {"format": "pt"})
        self._merge()
        return {"extra_bytes": sum(values.numel() * values.element_size() for values in adapter.values())}

    def _merge(self) -> None:
        """Add the adapters to the weights and remove them from the model."""
        with self.backend.writing():
            for name, target in self.targets.items():
                layer: Any = self.model.get_submodule(name)
                held, start = stored_part(target.weight)
                delta: Tensor = layer.get_delta_weight(_NAME).contiguous().view(-1)
                merged = held.float() + delta[start : start + held.numel()]
                held.copy_(cast_weight(merged, held.dtype)[0])
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, target.module)
        del self.model.peft_config


@contextmanager
def _whole_placeholders(targets: dict[str, Target], device: torch.device) -> Iterator[None]:
    """Put whole fp32 weights that take no memory in the targets' places while the context lasts.

    PEFT gives its matrices the weight's type, and takes a DTensor for a part of a linear that is computed in parts.
    """
    held = {name: target.weight for name, target in targets.items()}
    for name, target in targets.items():
        whole = torch.zeros((), device=device).expand(whole_shape(held[name]))
        target.weight = nn.Parameter(whole, requires_grad=False)
    try:
        yield
    finally:
        for name, target in targets.items():
            target.weight = held[name]


class LoraMerged(Lora):
    """LoRA*: merged, then as many weights as before are pruned again, row by row (or group by group), by Wanda."""

    allows_dense = False
    prunes_in_the_end = True

    def check_pattern(self, backend: Backend, masks: list[Tensor]) -> None:
        """Refuse a pattern that was not named, too: pruning again would lose it. Collective."""
        moving = dataclasses.replace(self.config.seft, reactivation=1.0)  # as if any position could become active
        check_pattern(backend, moving, masks)

    def finalize(self, inputs: FinalizeInputs) -> dict[str, Any]:
        """Merge the adapter, prune again, and put the weights into the model. Collective."""
        self._merge()
        for name, weight in prune_again(self, inputs):
            target = self.targets[name]
            with self.backend.writing():
                held, start = stored_part(target.weight)
                held.copy_(weight.reshape(-1)[start : start + held.numel()])
        return {}
