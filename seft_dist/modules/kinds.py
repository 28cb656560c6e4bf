"""The three kinds of weights that can carry deltas, and everything in which they differ.

kind            module               parameter                         as rows [out, in]
LinearWeight    nn.Linear            weight [out, in]                  as it is stored
Conv1DWeight    Conv1D of GPT-2      weight [in, out], y = x W + b     transposed
ExpertWeight    fused experts        e.g. down_proj [experts, out, in] one expert below the other
"""

import types
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from seft_dist.backends.shards import whole_shape
from seft_dist.config import SeftConfig
from seft_dist.modules.experts import first_projection


@dataclass(frozen=True)
class Forwards:
    """A replacement for the forward method of each kind of module; the module is the first argument."""

    linear: Callable[..., Tensor]
    conv1d: Callable[..., Tensor]
    experts: Callable[..., Tensor]


class Target(ABC):
    """One weight of a model that can carry deltas: a parameter of a module, and how it is laid out."""

    kind: ClassVar[str]
    """Kind of weight, for messages."""
    is_stored_transposed: ClassVar[bool] = False
    """True where the parameter is stored as [in, out]."""

    def __init__(self, module: nn.Module, key: str = "weight") -> None:
        """Args:
        module: The module that has the parameter.
        key: Name of the parameter in it.
        """
        self.module: Any = module
        self.key = key

    @property
    def weight(self) -> nn.Parameter:
        """The parameter as it is held now; while it is sharded, maybe only a part of it."""
        weight: nn.Parameter = getattr(self.module, self.key)
        return weight

    @weight.setter
    def weight(self, parameter: nn.Parameter) -> None:
        setattr(self.module, self.key, parameter)

    @property
    def num_experts(self) -> int:
        """Number of experts whose weights are in the parameter; 1 for an ordinary weight."""
        return 1

    def weight_name(self, name: str) -> str:
        """Return the name of the parameter in the model.

        Args:
            name: Name of the target.
        """
        return f"{name}.{self.key}"

    def attribute_name(self, suffix: str) -> str:
        """Return a name in the module for something that belongs to this weight alone.

        Args:
            suffix: What it is, e.g. "seft_anchor".
        """
        return suffix

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Shape of ``as_rows``, also where only a shard of the weight is present."""
        rows, columns = self.rows_view(torch.empty(whole_shape(self.weight), device="meta")).shape
        return rows, columns

    def as_rows(self) -> Tensor:
        """View the whole weight as rows [out, in], e.g. for pruning row by row."""
        return self.rows_view(self.weight.detach())

    def rows_view(self, stored: Tensor) -> Tensor:
        """View a tensor of the shape in which the weight is stored as rows [out, in]."""
        return stored.view(-1, stored.shape[-1])

    def from_rows(self, rows: Tensor) -> Tensor:
        """Give a matrix [out, in] the shape in which the weight is stored; the inverse of ``rows_view``."""
        return rows.view(self.weight.shape)

    @abstractmethod
    def bind_forward(self, forwards: Forwards) -> None:
        """Replace the forward method of the module by the one for its kind."""

    def unbind_forward(self) -> None:
        """Give the module the forward method of its class again."""
        self.module.__dict__.pop("forward", None)

    def _bind(self, forward: Callable[..., Tensor]) -> None:
        self.module.forward = types.MethodType(forward, self.module)

    def check_stored(self, name: str) -> None:
        """Refuse a weight that is computed from others, or stored in a way that cannot be written position by position.

        Args:
            name: Name of the target, for the message.

        Raises:
            ValueError: Names the target and the reason.
        """
        own = self.module._parameters
        if f"{self.key}_orig" in own:
            raise ValueError(
                f"target {name}: torch.nn.utils.prune computes its {self.key} anew in each forward pass; make the "
                f'pruning permanent first: torch.nn.utils.prune.remove(module, "{self.key}")'
            )
        if self.key not in own:
            raise ValueError(
                f"target {name}: its {self.key} is no parameter but computed (torch.nn.utils.parametrize?); make it "
                "plain first: torch.nn.utils.parametrize.remove_parametrizations"
                f'(module, "{self.key}"), or choose other targets'
            )
        layout = own[self.key].layout
        if layout != torch.strided:
            raise ValueError(
                f"target {name}: its {self.key} has the layout {layout}; needs an ordinary dense tensor with zeros "
                "where it is pruned: weight.to_dense()"
            )

    @abstractmethod
    def check_supported(self, name: str) -> None:
        """Refuse a weight that cannot carry deltas.

        Args:
            name: Name of the target, for the message.

        Raises:
            ValueError: Names the target and the reason.
        """

    @abstractmethod
    def check_criteria(self, name: str, config: SeftConfig) -> None:
        """Refuse settings of the method that this kind of weight does not have.

        Args:
            name: Name of the target, for the message.
            config: The method.

        Raises:
            ValueError: Names the target and the setting.
        """


@final
class LinearWeight(Target):
    """The weight of an nn.Linear."""

    kind = "Linear"

    def bind_forward(self, forwards: Forwards) -> None:
        self._bind(forwards.linear)

    def check_supported(self, name: str) -> None:
        if type(self.module).forward is not nn.Linear.forward:
            raise ValueError(
                f"target {name} is a {type(self.module).__name__} with a forward of its own: needs a plain nn.Linear "
                "(not quantized, not wrapped by an adapter); choose other targets"
            )

    def check_criteria(self, name: str, config: SeftConfig) -> None:
        pass  # all of them are supported


@final
class Conv1DWeight(Target):
    """The weight of a Conv1D of transformers, which is a linear that stores its weight transposed."""

    kind = "Conv1D"
    is_stored_transposed = True

    def rows_view(self, stored: Tensor) -> Tensor:
        return stored.T

    def from_rows(self, rows: Tensor) -> Tensor:
        return rows.T.contiguous()

    def bind_forward(self, forwards: Forwards) -> None:
        self._bind(forwards.conv1d)

    def check_supported(self, name: str) -> None:
        pass

    def check_criteria(self, name: str, config: SeftConfig) -> None:
        kind = type(self.module).__name__
        if config.adapts_by == "activation":
            raise ValueError(
                f"seft.adapt=activation is not supported for a {kind} ({name}), whose inputs run down the columns: "
                "choose seft.adapt=curvature, or targets without it"
            )
        if config.known_pattern is not None:
            raise ValueError(
                f"seft.pattern={config.pattern} is not supported for a {kind} ({name}): it stores inputs down its "
                "columns, so groups along the inputs do not lie together; set no pattern, or targets without it"
            )


@final
class ExpertWeight(Target):
    """One fused weight [experts, out, in] of a module that holds all experts of a layer.

    The module is one of transformers': its forward takes hidden states, chosen experts and their shares.
    """

    kind = "fused experts"

    @property
    def num_experts(self) -> int:
        return whole_shape(self.weight)[0]

    def weight_name(self, name: str) -> str:
        return name  # the parameter's name is in it

    def attribute_name(self, suffix: str) -> str:
        return f"{self.key}_{suffix}"

    def bind_forward(self, forwards: Forwards) -> None:
        self._bind(forwards.experts)

    def check_supported(self, name: str) -> None:
        module = self.module
        kind = type(module).__name__
        reasons = {
            "is stored transposed": module.is_transposed,
            "has biases": module.has_bias,
            "has a norm behind every expert": getattr(module, "has_post_expert_norm", False),  # not in every version
            "is spread over ranks (expert parallelism)": getattr(module, "_is_expert_parallel", False),
            "is not one of up, gate_up and down projection": self.key not in (first_projection(module), "down_proj"),
        }
        for reason, holds in reasons.items():
            if holds:
                raise ValueError(
                    f"fused expert weights of {kind} are not supported yet: {name} {reason}; choose targets without "
                    r'it, e.g. a regular expression such as "self_attn"'
                )

    def check_criteria(self, name: str, config: SeftConfig) -> None:
        pass  # all of them are supported


def is_conv1d(module: object) -> bool:
    """Return whether a module is GPT-2's linear with a transposed weight."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"
