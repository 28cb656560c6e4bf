"""Models with an N:M pattern: checked anywhere; 2:4 ones held in torch's semi-structured tensors where a GPU has them."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor, nn

from seft_dist.config.pattern import pattern_sizes
from seft_dist.io.library_types import PreTrainedModel
from seft_dist.io.models import load_model, outline
from seft_dist.io.source import Source
from seft_dist.io.tables import kind_of
from seft_dist.modules.kinds import LinearWeight
from seft_dist.modules.targets import ALL_LINEAR, find_targets
from seft_dist.sparsity import nm_pattern
from seft_dist.sparsity.zeros import num_zeros

log = logging.getLogger(__name__)

KERNEL_ROWS, KERNEL_COLUMNS = 32, 64
"""torch's CUTLASS form takes 16-bit weights whose shape is a multiple of these."""


@dataclass(frozen=True)
class GroupCount:
    """The groups of one weight: M consecutive inputs of an output, of which N may be active."""

    name: str
    """Module name of the linear."""
    shape: tuple[int, int]
    groups: int
    """Whole groups; 0 if the inputs cannot be divided into groups."""
    broken: int
    """Groups with more than N active weights."""
    zeros: int
    first: tuple[int, int, int] | None
    """Row, first column and active weights of the first broken group."""

    @property
    def fits_kernel(self) -> bool:
        """Whether torch's semi-structured tensors take this shape."""
        return self.shape[0] % KERNEL_ROWS == 0 and self.shape[1] % KERNEL_COLUMNS == 0


def target_rows(source: Source, targets: str = ALL_LINEAR) -> Iterator[tuple[str, Tensor]]:
    """Read the targets of a model on disk, one at a time.

    Args:
        source: The model, plain or packed.
        targets: Which linears, as seft.targets.

    Yields:
        Name and weight as [out, in], experts one below the other.

    Raises:
        ValueError: No linear is meant, or a weight is damaged.
    """
    model, stored = outline(source)
    for name, target in find_targets(model, targets).items():
        weight = source.weights.read(stored[target.weight_name(name)]).view(target.weight.shape)
        yield name, target.rows_view(weight)


def count_groups(source: Source, pattern: str = "2:4", targets: str = ALL_LINEAR) -> list[GroupCount]:
    """Count the groups of each target that do and do not keep a pattern, one weight at a time.

    Args:
        source: The model, plain or packed.
        pattern: "N:M".
        targets: Which linears, as seft.targets.

    Raises:
        ValueError: The pattern is none, or no linear is meant.
    """
    most, size = pattern_sizes(pattern)
    return [_count(name, rows, most, size) for name, rows in target_rows(source, targets)]


def refuse_broken(counts: list[GroupCount], pattern: str) -> None:
    """Raise an error that names the first group which breaks a pattern.

    Raises:
        ValueError: One does, or a weight's inputs cannot be divided into groups.
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
                f"not a {pattern} model: {count.name}.weight has {active} active weights in row {row}, columns {column} to "
                f"{column + size - 1}, {most} are allowed; {sum(c.broken for c in broken):,} such groups in {len(broken)} "
                f"of {len(counts)} linears. Prune it with launch/prune.py --pattern {pattern}"
            )


def pattern_table(counts: list[GroupCount], pattern: str) -> Table:
    """One row for each kind of linear over all layers."""
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

    Never run by the authors: needs a GPU. Targets whose shape torch's kernels do not take stay dense, with a warning.

    Args:
        source: The model, in bfloat16.
        device: A CUDA device; None: the current one.
        targets: Which linears, as seft.targets.

    Returns:
        The model in evaluation mode, without gradients.

    Raises:
        ValueError: No such hardware, another type, or the model does not keep the pattern.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        raise ValueError(
            f"{device} has no 2:4 kernels: torch's semi-structured tensors need a CUDA GPU of compute capability 8.0 or "
            "higher. The model runs here as a dense one; its pattern can be checked with launch/export.py check"
        )
    if source.dtype != torch.bfloat16:
        raise ValueError(f"{source.folder} is held in {source.dtype}: 2:4 kernels need model.dtype bfloat16")
    counts = count_groups(source, "2:4", targets)
    refuse_broken(counts, "2:4")
    model = load_model(source, device=device).eval()
    found = find_targets(model, targets)
    for count in counts:
        linear = found[count.name]
        if not count.fits_kernel or not isinstance(linear, LinearWeight):
            log.warning("%s of shape %s stays dense: torch's 2:4 kernels do not take it", count.name, count.shape)
            continue
        sparse = torch.sparse.to_sparse_semi_structured(linear.weight.detach())
        linear.weight = nn.Parameter(sparse, requires_grad=False)
    return model


def _count(name: str, weight: Tensor, most: int, size: int) -> GroupCount:
    rows, columns = weight.shape
    active = weight != 0
    zeros = num_zeros(weight)
    if columns % size:
        return GroupCount(name, (rows, columns), 0, 0, zeros, None)
    found = nm_pattern.counts(active.reshape(-1), size)
    broken = (found > most).nonzero().view(-1)
    first = None
    if broken.numel():
        position = int(broken[0]) * size
        first = (position // columns, position % columns, int(found[broken[0]]))
    return GroupCount(name, (rows, columns), found.numel(), broken.numel(), zeros, first)
