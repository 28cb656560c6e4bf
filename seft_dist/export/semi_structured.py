"""Checking of models with an N:M pattern, and loading of 2:4 models as torch's semi-structured tensors on a GPU."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor, nn

from seft_dist.config.pattern import pattern_sizes
from seft_dist.io.library_types import PreTrainedModel
from seft_dist.io.models import build_meta_model, load_model
from seft_dist.io.source import Source
from seft_dist.io.tables import kind_of
from seft_dist.modules.kinds import LinearWeight
from seft_dist.modules.targets import ALL_LINEAR, find_targets
from seft_dist.sparsity import nm_pattern
from seft_dist.sparsity.zeros import num_zeros

log = logging.getLogger(__name__)

KERNEL_ROWS, KERNEL_COLUMNS = 32, 64
"""Rows and columns of a 16-bit weight must be multiples of these for torch's CUTLASS kernels."""


@dataclass(frozen=True)
class GroupCount:
    """Counts over the groups of one weight: M consecutive inputs of an output, of which N may be active."""

    name: str
    """Module name of the linear."""
    shape: tuple[int, int]
    """[out, in]."""
    groups: int
    """Number of groups; 0 if M does not divide the number of inputs."""
    broken: int
    """Number of groups with more than N active weights."""
    zeros: int
    """Number of weights that are 0."""
    first: tuple[int, int, int] | None
    """Row, first column and number of active weights of the first broken group; None if there is none."""

    @property
    def fits_kernel(self) -> bool:
        """Torch's semi-structured tensors support this shape."""
        return self.shape[0] % KERNEL_ROWS == 0 and self.shape[1] % KERNEL_COLUMNS == 0


def target_rows(source: Source, targets: str = ALL_LINEAR) -> Iterator[tuple[str, Tensor]]:
    """Read the targets of a model on disk as matrices, one at a time.

    Args:
        source: The model, plain or packed.
        targets: Pattern of the linears, see ``SeftConfig.targets``.

    Yields:
        Name and weight [out, in]; the weights of fused experts are stacked along the rows.

    Raises:
        ValueError: The pattern matches no linear, or a weight is damaged.
    """
    model, stored = build_meta_model(source)
    for name, target in find_targets(model, targets).items():
        weight = source.weights.read(stored[target.weight_name(name)]).view(target.weight.shape)
        yield name, target.rows_view(weight)


def count_groups(source: Source, pattern: str = "2:4", targets: str = ALL_LINEAR) -> list[GroupCount]:
    """Count the groups of each target that keep or break a pattern, one weight at a time.

    Args:
        source: The model, plain or packed.
        pattern: The pattern "N:M".
        targets: Pattern of the linears, see ``SeftConfig.targets``.

    Raises:
        ValueError: ``pattern`` is not of the form N:M, or ``targets`` matches no linear.
    """
    most, size = pattern_sizes(pattern)
    return [_count_groups_of(name, rows, most, size) for name, rows in target_rows(source, targets)]


def check_groups_kept(counts: list[GroupCount], pattern: str) -> None:
    """Raise an error that names the first group that breaks a pattern.

    Args:
        counts: The counts of all targets, from ``count_groups``.
        pattern: The pattern "N:M".

    Raises:
        ValueError: A group breaks the pattern, or M does not divide the inputs of a weight.
    """
    most, size = pattern_sizes(pattern)
    broken = [count for count in counts if count.broken]
    for count in counts:
        if count.shape[1] % size:
            raise ValueError(
                f"{count.name} has {count.shape[1]} inputs: a pattern of {pattern} needs a multiple of {size}"
            )
        if count.first is not None:
            row, column, active = count.first
            raise ValueError(
                f"not a {pattern} model: {count.name}.weight has {active} active weights in row {row}, columns "
                f"{column} to {column + size - 1}, {most} are allowed; {sum(c.broken for c in broken):,} such groups "
                f"in {len(broken)} of {len(counts)} linears. Prune it with seft prune --pattern {pattern}"
            )


def pattern_table(counts: list[GroupCount], pattern: str) -> Table:
    """Tabulate groups and zeros, with one row for each kind of linear over all layers."""
    table = Table(title=f"{pattern} groups")
    table.add_column("linear", no_wrap=True)
    for column in ("groups", "broken", "in layers", "zeros", "fit kernels"):
        table.add_column(column, justify="right", no_wrap=True)
    table.caption = "fit kernels: layers whose shape torch's 2:4 kernels take"
    kinds: dict[str, list[GroupCount]] = {}
    for count in counts:
        kinds.setdefault(kind_of(count.name), []).append(count)
    for kind, members in [*kinds.items(), ("all", counts)]:
        if kind == "all":
            table.add_section()
        weights = sum(count.shape[0] * count.shape[1] for count in members)
        table.add_row(
            kind,
            f"{sum(count.groups for count in members):,}",
            f"{sum(count.broken for count in members):,}",
            f"{sum(count.broken > 0 for count in members)} of {len(members)}",
            f"{100 * sum(count.zeros for count in members) / weights:.2f} %",
            f"{sum(count.fits_kernel for count in members)} of {len(members)}",
        )
    return table


def load_semi_structured(
    source: Source, device: torch.device | None = None, targets: str = ALL_LINEAR
) -> PreTrainedModel:
    """Load a 2:4 model with its targets as torch's semi-structured tensors, for inference on a GPU.

    This function was never run by the authors, as it needs a GPU. Targets whose shape torch's kernels do not support
    stay dense, with a warning.

    Args:
        source: The model, in bfloat16.
        device: A CUDA device; None: the current one.
        targets: Pattern of the linears, see ``SeftConfig.targets``.

    Returns:
        The model in evaluation mode, without gradients.

    Raises:
        ValueError: The device has no 2:4 kernels, the model is of another dtype, or it does not keep the pattern.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        raise ValueError(
            f"{device} has no 2:4 kernels: torch's semi-structured tensors need a CUDA GPU of compute capability 8.0 "
            "or higher. The model runs here as a dense one; its pattern can be checked with seft export check"
        )
    if source.dtype != torch.bfloat16:
        raise ValueError(f"{source.folder} is held in {source.dtype}: 2:4 kernels need model.dtype bfloat16")
    counts = count_groups(source, "2:4", targets)
    check_groups_kept(counts, "2:4")
    model = load_model(source, device=device).eval()
    linears = find_targets(model, targets)
    for count in counts:
        linear = linears[count.name]
        if not count.fits_kernel or not isinstance(linear, LinearWeight):
            log.warning("%s of shape %s stays dense: torch's 2:4 kernels do not take it", count.name, count.shape)
            continue
        sparse = torch.sparse.to_sparse_semi_structured(linear.weight.detach())
        linear.weight = nn.Parameter(sparse, requires_grad=False)
    return model


def _count_groups_of(name: str, weight: Tensor, most: int, size: int) -> GroupCount:
    rows, columns = weight.shape
    active = weight != 0
    zeros = num_zeros(weight)
    if columns % size:
        return GroupCount(name, (rows, columns), 0, 0, zeros, None)
    counts = nm_pattern.counts(active.reshape(-1), size)
    broken = (counts > most).nonzero().view(-1)
    first = None
    if broken.numel():
        position = int(broken[0]) * size
        first = (position // columns, position % columns, int(counts[broken[0]]))
    return GroupCount(name, (rows, columns), counts.numel(), broken.numel(), zeros, first)
