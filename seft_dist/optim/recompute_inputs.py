"""The input of a linear for its backward, without keeping what autograd keeps anyway.

A gated MLP multiplies two activations, and both are kept for that product's own backward; so is what a norm scales. Such an
input is computed again, elementwise, from the operands that the graph holds: same operations, same bits, and the T x in
numbers of the product are not kept from forward to backward. An input that comes about otherwise is kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_MOST_STEPS = 5
"""Operations that are followed back: a norm's two products, the conversion between them, the choice of experts."""

_KEY = "seft_input"


@dataclass(frozen=True)
class _Step:
    """An operation on what its sources give."""

    operation: Callable[..., Tensor]
    sources: "tuple[Recipe, ...]"


Recipe = int | _Step
"""How a tensor comes about: its place among the kept ones, or the last operation."""


class Input:
    """The way to one input, for all linears that share it (query, key, value): the first backward computes it.

    The last one drops it, and what it was computed from.
    """

    def __init__(self, recipe: Recipe, operands: list[Tensor]) -> None:
        self.recipe = recipe
        self.operands: list[Tensor] = operands
        """Until the last backward: a graph may outlive it."""
        self.users = 0
        self.value: Tensor | None = None

    def get(self, kept: Sequence[Tensor]) -> Tensor:
        """The input, bit for bit.

        Args:
            kept: What ``keep`` returned; others may follow.
        """
        if isinstance(self.recipe, int):
            return kept[self.recipe]
        value = self.value = _compute(self.recipe, kept) if self.value is None else self.value
        self.leave()
        return value

    def leave(self) -> None:
        """One linear less will ask for it."""
        self.users -= 1
        if self.users <= 0:
            self.value, self.operands = None, []


_WHOLE = Input(0, [])
"""The way to an input that is kept itself."""


def keep(x: Tensor) -> tuple[Input, list[Tensor]]:
    """What a linear's forward keeps of its input for backward.

    Args:
        x: The input, as the linear gets it.

    Returns:
        The way to the input, and what is to be saved for backward: the input itself, or what is alive until then in any
        case or has few numbers.
    """
    # Hooks decide what becomes of saved tensors (a checkpointed layer keeps none): asking the graph for its own would
    # already run them.
    node: Any = x.grad_fn
    if node is None or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return _WHOLE, [x]
    known: Input | None = node.metadata.get(_KEY)
    if known is None or not known.operands:
        operands: list[Tensor] = []
        try:
            recipe = _follow(node, x.shape, operands, _MOST_STEPS)
        except RuntimeError:  # an operand was changed in place since
            recipe = None
        if recipe is None:
            return _WHOLE, [x]
        known = node.metadata[_KEY] = Input(recipe, operands)
    known.users += 1
    return known, known.operands


def _compute(recipe: Recipe, kept: Sequence[Tensor]) -> Tensor:
    if isinstance(recipe, int):
        return kept[recipe]
    return recipe.operation(*(_compute(source, kept) for source in recipe.sources))


def _follow(node: Any, shape: torch.Size, operands: list[Tensor], steps: int) -> Recipe | None:
    """The recipe of a node's output, its operands appended; None: the graph does not hold them all."""
    if node is None or not steps:
        return None
    kind = node.name()
    if kind == "MulBackward0":
        sides: list[Recipe] = []
        for side, (before, _) in zip((node._saved_self, node._saved_other), node.next_functions, strict=True):
            # A factor that needs no gradient, a frozen norm's weight, has its partner not kept.
            recipe = _follow(before, shape, operands, steps - 1) if side is None else _operand(side, shape, operands)
            if recipe is None:
                return None
            sides.append(recipe)
        return _Step(torch.mul, tuple(sides))
    if kind not in ("ToCopyBackward0", "ViewBackward0", "IndexBackward0"):
        return None
    source = _follow(node.next_functions[0][0], shape, operands, steps - 1)
    if source is None:
        return None
    result = node._input_metadata[0]
    if kind == "ToCopyBackward0":
        return _Step(partial(Tensor.to, dtype=result.dtype), (source,))
    if kind == "ViewBackward0":
        return _Step(partial(torch.reshape, shape=tuple(result.shape)), (source,))
    rows, *others = node._saved_indices  # each expert's tokens
    if rows is None or others:
        return None
    operands.append(rows)
    return _Step(_rows, (source, len(operands) - 1))


def _rows(tensor: Tensor, rows: Tensor) -> Tensor:
    return tensor[rows]


def _operand(side: Tensor, shape: torch.Size, operands: list[Tensor]) -> int | None:
    if isinstance(side, nn.Parameter) or not side.requires_grad:
        # No activation. Engines free parameters after forward: a copy, of one that is small and still there.
        if side.shape != shape[-1:]:
            return None
        side = side.clone()
    operands.append(side.detach())
    return len(operands) - 1
