"""Which weights of a model get deltas, and which never do.

    nn.Linear                      weight [out, in]
    Conv1D (GPT-2)                 weight [in, out]: stored the other way round, y = x W + b
    fused experts (mixtures)       weight [experts, out, in]: one parameter for all experts of a layer

Left alone: embeddings, the output head, norms, biases, and routers (choosing experts is not the weights' damage to
repair, and a changed choice would move every token's path at once). Any other matrix is refused, never skipped.
"""

import re
from collections.abc import Iterable, Iterator
from math import prod
from typing import Any

import regex
from torch import Tensor, nn

from seft_dist.backends.shards import whole_shape
from seft_dist.config import SeftConfig

ALL_LINEAR = "all-linear"
_ROUTER = re.compile("router|gate$|gating", re.IGNORECASE)
_LONGEST_PATTERN = 10_000
_SEARCH_SECONDS = 10.0
"""Longest that a pattern is searched in one name; real ones take microseconds."""


class ExpertWeight:
    """One fused weight of a module that holds all experts of a layer."""

    def __init__(self, module: nn.Module, key: str) -> None:
        """Args:
        module: As transformers builds them: its forward takes hidden states, chosen experts and their weights.
        key: Name of the parameter in it, [experts, out, in].
        """
        self.module, self.key = module, key

    @property
    def weight(self) -> nn.Parameter:
        """The parameter as it is held now."""
        weight: nn.Parameter = getattr(self.module, self.key)
        return weight


Target = Any
"""nn.Linear, transformers' Conv1D or ExpertWeight: something with a ``weight``."""


def is_conv1d(module: object) -> bool:
    """Whether a module is GPT-2's linear with a transposed weight."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds all experts of a layer in fused 3-D weights."""
    return any(len(shape) == 3 for shape in _shapes(module).values()) and hasattr(module, "is_transposed")


def matrix(target: Target) -> tuple[int, int]:
    """Shape of ``as_rows``."""
    rows, columns = as_rows(target).shape
    return rows, columns


def as_rows(target: Target) -> Tensor:
    """A whole weight as a view [out, in] (experts one below the other), e.g. for pruning row by row."""
    weight: Tensor = target.weight.detach()
    if is_conv1d(target):
        return weight.T
    return weight.view(-1, weight.shape[-1])


def from_rows(target: Target, rows: Tensor) -> Tensor:
    """What ``as_rows`` gave, or another matrix of its shape, in the shape in which the weight is stored."""
    return rows.T.contiguous() if is_conv1d(target) else rows.view(target.weight.shape)


def weight_name(name: str, target: Target) -> str:
    """Name of a target's parameter in the model."""
    return name if isinstance(target, ExpertWeight) else f"{name}.weight"


def find_targets(model: nn.Module, pattern: str = ALL_LINEAR) -> dict[str, Target]:
    """Find the weights a pattern names, in the order of ``model.named_modules()``.

    Args:
        model: Any module; if it has ``get_output_embeddings()``, the output head is never a target of "all-linear".
        pattern: "all-linear" for every linear and every fused expert weight, or a regular expression searched in their
            names. Routers never match.

    Returns:
        Name to target (a module's name, or a fused parameter's); never empty.

    Raises:
        ValueError: The pattern is no regular expression, nothing matches, a match cannot carry deltas, its weight is shared
            with another module, or "all-linear" would leave out a matrix of a kind that is not known.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    routers = _routers(model)
    known: dict[str, Target] = {}
    for name, module in model.named_modules():
        if (isinstance(module, nn.Linear) or is_conv1d(module)) and module not in routers:
            known[name] = module
        elif is_experts(module):
            for key, shape in _shapes(module).items():
                if len(shape) == 3:
                    known[f"{name}.{key}"] = ExpertWeight(module, key)
    if pattern == ALL_LINEAR:
        found = {name: target for name, target in known.items() if target is not head}
    else:
        wanted = _matching(pattern, known)
        found = {name: target for name, target in known.items() if name in wanted}
    if not found:
        ends = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in known})) or "none"
        raise ValueError(f"targets={pattern!r} matches no linear of {type(model).__name__}; its linears end in: {ends}")
    for name, target in found.items():
        _check_kind(name, target)
    if pattern == ALL_LINEAR:
        _refuse_unknown(model, known, routers, head)
    _refuse_tied(model, found)
    return found


def _matching(pattern: str, names: Iterable[str]) -> set[str]:
    """Names in which a regular expression is found.

    Python's own engine may search some patterns, such as (a|a)+$, for longer than anybody waits, and cannot be stopped;
    the one of ``regex`` has a limit, and unlike engines of linear time it knows all that Python's does.
    """
    if len(pattern) > _LONGEST_PATTERN:
        raise ValueError(
            f"targets has {len(pattern)} characters: needs a regular expression of at most {_LONGEST_PATTERN}"
        )
    try:
        re.compile(pattern)
        wanted = regex.compile(pattern)
        return {name for name in names if wanted.search(name, timeout=_SEARCH_SECONDS)}
    except (re.error, regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(
            f"targets={pattern[:200]!r} is no regular expression ({error}): needs {ALL_LINEAR!r} or one, e.g. "
            "'self_attn|down_proj'"
        ) from error
    except TimeoutError as error:
        raise ValueError(
            f"targets={pattern!r} takes more than {_SEARCH_SECONDS:g} s to search in one name: needs a regular expression "
            "without repetitions inside repetitions, as in (a|a)+"
        ) from error


def check_criteria(targets: dict[str, Target], config: SeftConfig) -> None:
    """Refuse what the method cannot do for a kind of target.

    Raises:
        ValueError: Names the target and the setting.
    """
    for name, target in targets.items():
        kind = type(getattr(target, "module", target)).__name__
        if config.adapt == "activation" and (is_conv1d(target) or isinstance(target, ExpertWeight)):
            raise ValueError(
                f"seft.adapt=activation is not supported yet for the weights of a {kind} ({name}): choose "
                "seft.adapt=sensitivity or magnitude, or targets without it"
            )
        if config.window_store == "factored" and isinstance(target, ExpertWeight):
            raise ValueError(
                f"seft.window_store=factored is not supported for the fused experts of a {kind} ({name}): each expert has "
                "column sums of its own; choose full, bf16 or candidates, or targets without it"
            )
        if config.pattern is not None and is_conv1d(target):
            raise ValueError(
                f"seft.pattern={config.pattern} is not supported for a {kind} ({name}): it stores inputs down its columns, so "
                "groups along the inputs do not lie together; set no pattern, or targets without it"
            )


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Whole shapes of a module's own parameters, also where they are sharded."""
    return {name: whole_shape(parameter) for name, parameter in module.named_parameters(recurse=False)}


def _routers(model: nn.Module) -> set[nn.Module]:
    """Modules that choose experts: those beside the experts whose kind or name says so, with all they contain."""
    found: set[nn.Module] = set()
    for parent in model.modules():
        children = dict(parent.named_children())
        if not any(is_experts(child) or name == "experts" for name, child in children.items()):
            continue
        for name, child in children.items():
            if _ROUTER.search(type(child).__name__) or _ROUTER.search(name):
                found.update(child.modules())
    return found


def _check_kind(name: str, target: Target) -> None:
    if isinstance(target, ExpertWeight):
        module = target.module
        kind = type(module).__name__
        reasons = {
            "is stored transposed": module.is_transposed,
            "has biases": module.has_bias,
            "has a norm behind every expert": getattr(module, "has_post_expert_norm", False),  # not in every version
            "is spread over ranks (expert parallelism)": getattr(module, "_is_expert_parallel", False),
            "is not one of up, gate_up and down projection": target.key not in (first_projection(module), "down_proj"),
        }
        for reason, holds in reasons.items():
            if holds:
                raise ValueError(
                    f"fused expert weights of {kind} are not supported yet: {name} {reason}; choose targets without it, "
                    r'e.g. a regular expression such as "self_attn"'
                )
    elif isinstance(target, nn.Linear) and type(target).forward is not nn.Linear.forward:
        raise ValueError(
            f"target {name} is a {type(target).__name__} with a forward of its own: needs a plain nn.Linear "
            "(not quantized, not wrapped by an adapter); choose other targets"
        )


def first_projection(experts: Any) -> str:
    """Name of the parameter that experts multiply their input with."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def _matrices(module: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    return ((key, shape) for key, shape in _shapes(module).items() if len(shape) > 1 and prod(shape) > max(shape))


def _refuse_unknown(
    model: nn.Module, known: dict[str, Target], routers: set[nn.Module], head: nn.Module | None
) -> None:
    """Refuse a matrix that is neither a target nor something that is left alone on purpose."""
    covered = {id(target) for target in known.values()}
    covered |= {id(target.module) for target in known.values() if isinstance(target, ExpertWeight)}
    for name, module in model.named_modules():
        if id(module) in covered or module is head or module in routers or isinstance(module, nn.Embedding):
            continue
        for key, shape in _matrices(module):
            raise ValueError(
                f"{name}.{key} of {type(model).__name__}, {list(shape)}, belongs to a {type(module).__name__}: no linear, no "
                "fused experts, no embedding and no router. It would stay dense and frozen; if that is what you want, name "
                f"the targets by a regular expression instead of {ALL_LINEAR!r}"
            )


def _refuse_tied(model: nn.Module, targets: dict[str, Target]) -> None:
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{name}.{key}")
    for name, target in targets.items():
        own = weight_name(name, target)
        shared = [owner for owner in owners[id(target.weight)] if owner != own]
        if shared:
            raise ValueError(
                f"target {own} is tied to {', '.join(shared)}: a delta would change both; "
                "choose targets without it, or untie the weights"
            )
