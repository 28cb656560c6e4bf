"""The norms and biases of a model: parameters of one dimension, which are no targets but can be trained beside them."""

from dataclasses import dataclass

from torch import nn

from seft_dist.backends.shards import whole_shape
from seft_dist.modules.kinds import is_conv1d
from seft_dist.modules.targets import find_routers


@dataclass(frozen=True)
class Vector:
    """One parameter of a norm, or one bias."""

    name: str
    """Name in the model."""
    uses: list[tuple[nn.Module, str]]
    """The modules that have it, several if they share it, and its name in each."""

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as it is held now; while it is sharded, maybe only a part of it."""
        module, key = self.uses[0]
        parameter: nn.Parameter = getattr(module, key)
        return parameter


def find_vectors(model: nn.Module) -> dict[str, Vector]:
    """Find the scales and shifts of norms, and the biases of linears; not those of routers.

    Args:
        model: Any module, sharded or not.

    Returns:
        Name to vector, in the order of ``model.named_modules()``.
    """
    routers = find_routers(model)
    found: dict[int, Vector] = {}
    for name, module in model.named_modules():
        is_norm = "Norm" in type(module).__name__
        is_linear = isinstance(module, nn.Linear) or is_conv1d(module)
        for key, parameter in module.named_parameters(recurse=False):
            if len(whole_shape(parameter)) != 1 or not (is_norm or (is_linear and key == "bias")) or module in routers:
                continue
            vector = found.setdefault(id(parameter), Vector(f"{name}.{key}" if name else key, []))
            vector.uses.append((module, key))
    return {vector.name: vector for vector in found.values()}
