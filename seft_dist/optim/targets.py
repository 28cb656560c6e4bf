"""Which linears of a model get deltas."""

import re

from torch import nn

ALL_LINEAR = "all-linear"


def find_targets(model: nn.Module, pattern: str = ALL_LINEAR) -> dict[str, nn.Linear]:
    """Find the linears a pattern names, in the order of ``model.named_modules()``. Local.

    Args:
        model: Any module; if it has ``get_output_embeddings()``, the output head is never a target.
        pattern: "all-linear" for every ``nn.Linear``, or a regular expression searched in module names.

    Returns:
        Module name to linear; never empty.

    Raises:
        ValueError: Nothing matches, a match is no linear, or its weight is shared with another module.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if pattern == ALL_LINEAR:
        found = {name: module for name, module in linears.items() if module is not head}
    else:
        found = {name: module for name, module in linears.items() if re.search(pattern, name)}
    if not found:
        known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linears})) or "none"
        raise ValueError(
            f"targets={pattern!r} matches no linear of {type(model).__name__}; its linears end in: {known}"
        )
    for name, module in found.items():
        if type(module).forward is not nn.Linear.forward:
            raise ValueError(
                f"target {name} is a {type(module).__name__} with a forward of its own: needs a plain nn.Linear "
                "(not quantized, not wrapped by an adapter); choose other targets"
            )
    _refuse_tied(model, found)
    return found


def _refuse_tied(model: nn.Module, targets: dict[str, nn.Linear]) -> None:
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{name}.{key}")
    for name, module in targets.items():
        shared = [owner for owner in owners[id(module.weight)] if owner != f"{name}.weight"]
        if shared:
            raise ValueError(
                f"target {name}.weight is tied to {', '.join(shared)}: a delta would change both; "
                "choose targets without it, or untie the weights"
            )
