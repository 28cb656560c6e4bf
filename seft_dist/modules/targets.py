"""The choice of the weights of a model that get deltas.

Linears, GPT-2's Conv1D and fused experts do (``seft_dist.modules.kinds``). Embeddings, the output head, norms, biases
and routers do not; docs/models.md has the reasons. Any other matrix is refused by name: left out in silence it would
stay dense and untrained.
"""

import re
from collections.abc import Iterable, Iterator
from math import prod

import regex
from torch import nn

from seft_dist.config import SeftConfig
from seft_dist.modules.experts import is_experts, parameter_shapes
from seft_dist.modules.kinds import Conv1DWeight, ExpertWeight, LinearWeight, Target, is_conv1d

ALL_LINEAR = "all-linear"
_ROUTER = re.compile("router|gate$|gating", re.IGNORECASE)
_LONGEST_PATTERN = 10_000
_SEARCH_SECONDS = 10.0
"""Longest that a pattern is searched in one name; real ones take microseconds."""


def find_targets(model: nn.Module, pattern: str = ALL_LINEAR) -> dict[str, Target]:
    """Find the weights a pattern names, in the order of ``model.named_modules()``.

    Args:
        model: Any module. What ``get_output_embeddings()`` returns, of the model or of one inside it, is never a target
            of "all-linear".
        pattern: "all-linear" for every linear and every fused expert weight, or a regular expression searched in their
            names. Routers never match.

    Returns:
        Name to target (a module's name, or a fused parameter's); never empty.

    Raises:
        ValueError: The pattern is no regular expression, nothing matches, a match cannot carry deltas, its weight is
            shared with another module, or "all-linear" would leave out a matrix of a kind that is not known.
    """
    heads = _output_heads(model)
    routers = find_routers(model)
    known: dict[str, Target] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module not in routers:
            known[name] = LinearWeight(module)
        elif is_conv1d(module) and module not in routers:
            known[name] = Conv1DWeight(module)
        elif is_experts(module):
            for key, shape in parameter_shapes(module).items():
                if len(shape) == 3:
                    known[f"{name}.{key}"] = ExpertWeight(module, key)
    if pattern == ALL_LINEAR:
        targets = {name: target for name, target in known.items() if target.module not in heads}
    else:
        wanted = _matching(pattern, known)
        targets = {name: target for name, target in known.items() if name in wanted}
    if not targets:
        ends = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in known})) or "none"
        raise ValueError(f"targets={pattern!r} matches no linear of {type(model).__name__}; its linears end in: {ends}")
    for name, target in targets.items():
        target.check_stored(name)
        target.check_supported(name)
    if pattern == ALL_LINEAR:
        _check_all_known(model, known, routers | heads)
    _check_untied(model, targets)
    return targets


def _output_heads(model: nn.Module) -> set[nn.Module]:
    """Return the output heads of the model and of the models inside it, e.g. of one in a wrapper."""
    heads = (getattr(module, "get_output_embeddings", lambda: None)() for module in model.modules())
    return {head for head in heads if head is not None}


def _matching(pattern: str, names: Iterable[str]) -> set[str]:
    """Return the names in which a regular expression matches somewhere.

    Python's own engine may search some patterns, such as (a|a)+$, for hours, and cannot be stopped; the one of
    ``regex`` has a time limit, and unlike engines of linear time it supports the same syntax.
    """
    if len(pattern) > _LONGEST_PATTERN:
        raise ValueError(
            f"targets has {len(pattern)} characters: needs a regular expression of at most {_LONGEST_PATTERN}"
        )
    if pattern.startswith("[") and pattern.endswith("]") and "," in pattern:
        wanted = "|".join(part.strip(" '\"") for part in pattern[1:-1].split(","))
        raise ValueError(f"targets={pattern} is a list: needs a regular expression, here {wanted!r}")
    try:
        re.compile(pattern)
        expression = regex.compile(pattern)
        return {name for name in names if expression.search(name, timeout=_SEARCH_SECONDS)}
    except (re.error, regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(
            f"targets={pattern[:200]!r} is no regular expression ({error}): needs {ALL_LINEAR!r} or one, e.g. "
            "'self_attn|down_proj'"
        ) from error
    except TimeoutError as error:
        raise ValueError(
            f"targets={pattern!r} takes more than {_SEARCH_SECONDS:g} s to search in one name: needs a regular "
            "expression without repetitions inside repetitions, as in (a|a)+"
        ) from error


def check_criteria(targets: dict[str, Target], config: SeftConfig) -> None:
    """Refuse settings of the method that the kind of a target does not have.

    Raises:
        ValueError: Names the target and the setting.
    """
    for name, target in targets.items():
        target.check_criteria(name, config)


def find_routers(model: nn.Module) -> set[nn.Module]:
    """Return the modules that choose experts, with all they contain: neighbours of experts, by type or name."""
    routers: set[nn.Module] = set()
    for parent in model.modules():
        children = dict(parent.named_children())
        if not any(is_experts(child) or name == "experts" for name, child in children.items()):
            continue
        for name, child in children.items():
            if _ROUTER.search(type(child).__name__) or _ROUTER.search(name):
                routers.update(child.modules())
    return routers


def _matrices(module: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    return (
        (key, shape) for key, shape in parameter_shapes(module).items() if len(shape) > 1 and prod(shape) > max(shape)
    )


def _check_all_known(model: nn.Module, known: dict[str, Target], left_alone: set[nn.Module]) -> None:
    """Refuse a matrix that is neither a target nor something that is left alone on purpose."""
    covered = {id(target.module) for target in known.values()}
    for name, module in model.named_modules():
        if id(module) in covered or module in left_alone or isinstance(module, nn.Embedding):
            continue
        for key, shape in _matrices(module):
            raise ValueError(
                f"{name}.{key} of {type(model).__name__}, {list(shape)}, belongs to a {type(module).__name__}: no "
                "linear, no fused experts, no embedding and no router. It would stay dense and frozen; if that is what "
                f"you want, name the targets by a regular expression instead of {ALL_LINEAR!r}"
            )


def _check_untied(model: nn.Module, targets: dict[str, Target]) -> None:
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{name}.{key}")
    for name, target in targets.items():
        own = target.weight_name(name)
        shared = [owner for owner in owners[id(target.weight)] if owner != own]
        if shared:
            raise ValueError(
                f"target {own} is tied to {', '.join(shared)}: a delta would change both; "
                "choose targets without it, or untie the weights"
            )
