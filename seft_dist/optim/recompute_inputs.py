"""The input of a linear for its backward pass, without keeping what autograd keeps anyway.

A gated MLP multiplies two activations, and autograd keeps both for the backward pass of that product; it also keeps
what a norm scales. Such an input is computed again, elementwise, from the operands that the graph holds: the same
operations give the same bits, and the T x in numbers of the product are not kept from forward to backward. Any other
input is kept itself.

    gate ---> silu --.                      the graph holds: silu(gate), up
    up ---------------* ---> down_proj      SEFT keeps:      the recipe  mul(operand 0, operand 1)
                                            instead of:      silu(gate) * up, T x in numbers

The graph is read through the names of autograd's nodes and of the attributes in which they save tensors. Neither is an
interface that torch promises to keep. A node that is not in the table below ends the search, and the input is kept:
results never depend on this file, only memory does. ``unknown_nodes`` tries every entry of the table, so that a change
of names in torch is noticed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# Autograd's nodes that can be followed back. Beside the saved tensors, each knows the shape and dtype of its result.
#   name of the node                 saves                             its result is computed again as
_PRODUCT = "MulBackward0"  # _saved_self, _saved_other             self * other
_CONVERSION = "ToCopyBackward0"  # nothing                         source.to(dtype)
_VIEW = "ViewBackward0"  # nothing                                 source.reshape(shape)
_SELECTION = "IndexBackward0"  # _saved_indices                    source[rows]

_MOST_STEPS = 5
"""Most operations that are followed back: a norm's two products, the conversion between them, the choice of experts."""

_KEY = "seft_input"
"""Key in an autograd node's metadata for the ``Input`` that is shared by all linears which got the node's result."""


@dataclass(frozen=True)
class _Step:
    """One operation, and the recipes of its arguments."""

    operation: Callable[..., Tensor]
    sources: "tuple[Recipe, ...]"


Recipe = int | _Step
"""Recipe for a tensor that is computed again: the index of a kept tensor, or an operation on other recipes."""


class Input:
    """One input, shared by all linears that got it (query, key, value).

    The first backward pass that asks for it computes it; the last one drops it, and what it was computed from.
    """

    def __init__(self, recipe: Recipe, operands: list[Tensor]) -> None:
        self.recipe = recipe
        self.operands: list[Tensor] = operands
        """Kept tensors that the recipe refers to; dropped at the last backward pass, because a graph may outlive it."""
        self.users = 0
        """Linears that have not had their backward pass yet."""
        self.value: Tensor | None = None
        """The input, between the first and the last backward pass."""

    def get(self, kept: Sequence[Tensor]) -> Tensor:
        """Return the input, the same bits as in forward.

        Args:
            kept: What ``keep`` returned; others may follow.
        """
        if isinstance(self.recipe, int):
            return kept[self.recipe]
        value = self.value = _compute(self.recipe, kept) if self.value is None else self.value
        self.leave()
        return value

    def leave(self) -> None:
        """Note that one linear has had its backward pass, or will not ask any more."""
        self.users -= 1
        if self.users <= 0:
            self.value, self.operands = None, []


_WHOLE = Input(0, [])
"""Stands for every input that is kept itself."""


def keep(x: Tensor) -> tuple[Input, list[Tensor]]:
    """Choose what a linear's forward keeps of its input for backward.

    Args:
        x: The input, as the linear gets it.

    Returns:
        How to get the input in backward, and the tensors to save until then: the input itself, or tensors that live
        until then in any case or have few numbers.
    """
    # Hooks decide what becomes of saved tensors (a checkpointed layer keeps none), and asking the graph runs them.
    node: Any = x.grad_fn
    if node is None or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return _WHOLE, [x]
    known: Input | None = node.metadata.get(_KEY)
    if known is None or not known.operands:
        operands: list[Tensor] = []
        try:
            recipe = _follow(node, x.shape, operands, _MOST_STEPS)
        except (RuntimeError, AttributeError):  # an operand was changed in place since, or torch saves it elsewhere
            recipe = None
        if recipe is None:
            return _WHOLE, [x]
        known = node.metadata[_KEY] = Input(recipe, operands)
    known.users += 1
    return known, known.operands


def unknown_nodes() -> list[str]:
    """Return the names of the nodes that this version of torch does not have as expected; normally none."""
    with torch.enable_grad():
        x = torch.rand(2, 2, requires_grad=True)
        product = (x + 1) * (x + 2)
        results = {
            _PRODUCT: product,
            _CONVERSION: product.to(torch.bfloat16),
            _VIEW: product.view(4),
            _SELECTION: product[torch.tensor([1, 0])],
        }
    return [name for name, result in results.items() if not _is_recomputable(result)]


def _is_recomputable(result: Tensor) -> bool:
    operands: list[Tensor] = []
    try:
        recipe = _follow(result.grad_fn, result.shape, operands, _MOST_STEPS)
        return recipe is not None and torch.equal(_compute(recipe, operands), result)
    except (RuntimeError, AttributeError):
        return False


def _compute(recipe: Recipe, kept: Sequence[Tensor]) -> Tensor:
    if isinstance(recipe, int):
        return kept[recipe]
    return recipe.operation(*(_compute(source, kept) for source in recipe.sources))


def _follow(node: Any, shape: torch.Size, operands: list[Tensor], steps: int) -> Recipe | None:
    """Return the recipe of a node's result and append its operands; None if the graph does not hold them all.

    Args:
        node: The node, or None for a tensor that no operation made.
        shape: Shape of the linear's input.
        operands: Gets the tensors that the recipe refers to.
        steps: Most operations to follow back from here.
    """
    if node is None or not steps:
        return None
    kind = node.name()
    if kind == _PRODUCT:
        sides: list[Recipe] = []
        for side, (before, _) in zip((node._saved_self, node._saved_other), node.next_functions, strict=True):
            # A product with a factor that needs no gradient (a frozen norm's weight) does not save the other factor.
            recipe = _follow(before, shape, operands, steps - 1) if side is None else _operand(side, shape, operands)
            if recipe is None:
                return None
            sides.append(recipe)
        return _Step(torch.mul, tuple(sides))
    if kind not in (_CONVERSION, _VIEW, _SELECTION):
        return None
    source = _follow(node.next_functions[0][0], shape, operands, steps - 1)
    if source is None:
        return None
    result = node._input_metadata[0]
    if kind == _CONVERSION:
        return _Step(partial(Tensor.to, dtype=result.dtype), (source,))
    if kind == _VIEW:
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
        # Engines free this parameter after forward: it is copied if it is as small as one row, and still there.
        if side.shape != shape[-1:]:
            return None
        side = side.clone()
    operands.append(side.detach())
    return len(operands) - 1
