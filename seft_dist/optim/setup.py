"""The state a run starts with, and every check of the model that can be made before or right after the first step."""

import hashlib
from collections import Counter

import torch

from seft_dist.backends import Backend
from seft_dist.backends.replicated import ReplicatedBackend
from seft_dist.config import SeftConfig
from seft_dist.config.pattern import AUTO, pattern_sizes
from seft_dist.kernels.bits import pack
from seft_dist.kernels.fingerprint import fingerprint
from seft_dist.kernels.ranking import ranking_keys
from seft_dist.optim.collectives import differing_ranks, select
from seft_dist.optim.delta import Columns, Support
from seft_dist.optim.nm_groups import NMGroups, describe_group
from seft_dist.optim.nm_search import find_patterns
from seft_dist.optim.state import State, deltas_asked_for
from seft_dist.sparsity import scores
from seft_dist.sparsity.casts import has_negative_zeros
from seft_dist.sparsity.hashes import pieces
from seft_dist.sparsity.partition import position_dtype
from seft_dist.sparsity.zeros import all_finite

_INIT = 3  # key of the random first support's stream
LEAST_SPARSITY = 0.01
"""A model with a smaller share of zeros is taken for a dense one."""
_CHECKED_LAYERS = 4
_CHECKED_POSITIONS = 64


def agree_on_config(backend: Backend, settings: str) -> None:
    """Refuse ranks that were given other settings. Collective.

    Args:
        backend: Knows the ranks.
        settings: This rank's settings as text.

    Raises:
        ValueError: Naming the ranks; every rank raises the same.
    """
    digest = int.from_bytes(hashlib.sha256(settings.encode()).digest()[:7], "little")
    wrong = differing_ranks(backend.owners, backend.replicas, digest)
    if wrong:
        raise ValueError(
            f"ranks {wrong} have another configuration than the rest: start all with the same; here {settings}"
        )


def prepare_weights(backend: Backend) -> None:
    """Turn -0.0 into 0.0 in the targets' weights, and compare them where every rank has all of them. Collective.

    Args:
        backend: Holds the weights as they were loaded.

    Raises:
        ValueError: Ranks hold different weights; every rank raises the same.
    """
    _clear_negative_zeros(backend)
    if isinstance(backend, ReplicatedBackend):
        for i in range(len(backend.names)):
            backend.check_replicas(i)


@torch.no_grad()
def _clear_negative_zeros(backend: Backend) -> None:
    """Turn -0.0 into 0.0. Collective.

    ``weight * mask`` leaves -0.0 where it prunes a negative weight. What is resumed, packed or exported has 0.0 there,
    so a run must begin with it.
    """
    flags = torch.tensor([int(has_negative_zeros(backend.memory(i)[0])) for i in range(len(backend.names))])
    # All ranks write if one of them has to: publishing a write is collective.
    wanted = backend.replicas.max(backend.owners.max(flags)).tolist()
    if any(wanted):
        with backend.writing():
            for i in (i for i, is_wanted in enumerate(wanted) if is_wanted):
                for part in pieces(backend.memory(i)[0]):
                    part.masked_fill_(part == 0, 0.0)


def survey(backend: Backend) -> tuple[list[torch.Tensor], list[int], list[int]]:
    """Derive masks, counts and hashes from the weights as they are. Collective.

    Args:
        backend: Holds the weights.

    Returns:
        Three lists with one item for each target: this rank's part of the mask of non-zero weights, packed; the number
        of non-zero weights in the whole; and a hash of the whole.

    Raises:
        ValueError: The weights are of several dtypes or not finite, or replicas of them differ; every rank raises the
            same.
    """
    if len(set(backend.dtypes)) > 1:
        raise ValueError("targets have weights of several dtypes: needs one; load the model with one dtype")
    masks, table = [], []
    for i in range(len(backend.names)):
        own = backend.own(i)
        active = own != 0
        masks.append(pack(active))
        broken = 0 if all_finite(own) else int(torch.isfinite(own).logical_not().sum())
        table.append([int(torch.count_nonzero(active)), broken, int(fingerprint(own, backend.interval(i).start))])
    replicas = backend.replicas.stack(backend.owners.sum(torch.tensor(table)))
    for name, (_, wrong, hashes) in zip(backend.names, replicas.permute(1, 2, 0), strict=True):
        if wrong.any():
            bad = int(wrong.max())
            raise ValueError(f"{name}.weight has {bad} values that are not finite: the checkpoint is damaged")
        if (hashes != hashes[0]).any():
            raise ValueError(f"{name}.weight is not the same in all replicas: load the same model on all ranks")
    counts, _, prints = replicas[0].T.tolist()
    return masks, counts, prints


def first_state(backend: Backend, config: SeftConfig) -> State:
    """Make the state of a run that begins: masks from the weights as they are, no deltas. Collective.

    Args:
        backend: Holds the pruned weights.
        config: The method.

    Raises:
        ValueError: The model is dense, it has fewer active weights than the density asks for, weights are not finite,
            of several dtypes or too wide, or do not have the pattern; every rank raises the same.
    """
    count = len(backend.names)
    masks, sizes, prints = survey(backend)
    numels = [partition.numel for partition in backend.partitions]
    asked = deltas_asked_for(backend, config)
    for name, (_, width) in zip(backend.names, backend.shapes, strict=True):
        if position_dtype(width) != torch.int32:  # of ``Support.col``
            raise ValueError(f"{name}.weight has {width} columns: needs fewer than 2^31; leave the layer out (targets)")
    _check(numels, sizes, asked, config)
    group_prints = check_pattern(backend, config, masks)
    none = torch.empty(0, dtype=backend.position_dtype, device=backend.device)
    supports = [Support(backend.shapes[i], [none] * backend.owners.size) for i in range(count)]
    for i, mask in enumerate(masks):
        backend.remask(i, mask, none.long())
    backend.sync_mask_counts()
    columns, nothing = Columns.empty(backend.device, backend.position_dtype), [none] * count
    return State(
        columns=columns,
        lengths=[0] * count,
        memory_indices=list(nothing),
        masks=masks,
        mask_sizes=sizes,
        budgets=list(map(min, asked, sizes)),
        supports=supports,
        committed=list(nothing),
        trial=list(nothing),
        fingerprints=prints,
        group_prints=group_prints,
    )


def check_pattern(backend: Backend, config: SeftConfig, masks: list[torch.Tensor]) -> list[int]:
    """Check that the model has the N:M pattern, or none if it is not said which. Collective, unless it has none.

    Returns:
        A hash of each target's groups, by which ``NMGroups.check`` knows later that none has changed; empty without a
        pattern.
    """
    if config.pattern == AUTO and (config.reactivation or config.swap_fraction):  # else no position becomes active
        _check_no_patterns(backend.names, find_patterns(backend, masks), config)
    if config.known_pattern is None:
        return []
    most, size = pattern_sizes(config.known_pattern)
    for name, (_, width) in zip(backend.names, backend.shapes, strict=True):
        if width % size:
            raise ValueError(
                f"{name}: {width} inputs are no multiple of {size}, so its rows have no {config.pattern} pattern; "
                "leave the layer out (targets), or set no pattern"
            )
    groups = NMGroups(backend, config.known_pattern)
    for name, (_, width), (group, count) in zip(backend.names, backend.shapes, groups.fullest(masks), strict=True):
        if count > most:
            raise ValueError(
                f"{name}: {describe_group(group, size, width)} hold {count} non-zero weights, pattern {config.pattern} "
                f"allows {most}; prune the model to {config.pattern} first, leave the layer out (targets), or set no "
                "pattern"
            )
    return groups.fingerprints(masks)


def _check_no_patterns(names: list[str], patterns: list[str | None], config: SeftConfig) -> None:
    """Refuse a mask that may move if some targets would lose a pattern by it.

    Args:
        names: Names of the targets.
        patterns: The pattern of each target; None where there is none.
        config: The method.

    Raises:
        ValueError: There is a pattern; says what to give.
    """
    having = {name: pattern for name, pattern in zip(names, patterns, strict=True) if pattern is not None}
    if not having:
        return
    pattern = Counter(having.values()).most_common(1)[0][0]
    others = [name for name in names if having.get(name) != pattern]
    most, size = pattern_sizes(pattern)
    where = "every target" if not others else f"{len(names) - len(others)} of {len(names)} targets"
    allowed = f"at most {most} of {size} consecutive inputs are active, in {where}"
    found = f"the pruned model has the pattern {pattern} ({allowed})"
    if config.swap_fraction:
        raise ValueError(f"{found}, which swaps do not keep: set swap_fraction to 0, or seft.pattern null to lose it")
    keeps = f"give seft.pattern {pattern} to keep it"
    if others:
        example = f"{others[0]}, which has {having.get(others[0], 'none')}"
        keeps += f" and leave out the other targets (seft.targets; e.g. {example})"
    raise ValueError(
        f"{found}, and would lose it: {keeps} (with seft.reactivation 0 all positions stay where they are, which was "
        "best in our runs: docs/patterns.md), or seft.pattern null to lose it"
    )


def _check(numels: list[int], sizes: list[int], asked: list[int], config: SeftConfig) -> None:
    if sum(asked) > sum(sizes):
        raise ValueError(
            f"density {config.density} asks for {sum(asked)} deltas, but only {sum(sizes)} of the targets' "
            f"{sum(numels)} weights are active: needs a density of at most {sum(sizes) / sum(numels):.4f}"
        )
    if not sum(map(min, asked, sizes)):
        raise ValueError(f"density {config.density} gives no layer even one delta: choose a larger density")
    sparsity = 1 - sum(sizes) / sum(numels)
    if sparsity < LEAST_SPARSITY and not config.allow_dense:
        raise ValueError(
            f"the targets are dense ({sparsity:.2%} of their weights are 0): SEFT starts from a pruned model; prune it "
            "first (seft prune), or set allow_dense to train it as it is"
        )


def random_support(backend: Backend, config: SeftConfig, state: State) -> None:
    """Draw the first support from the active positions, the same for every layout. Collective."""

    def key(i: int) -> torch.Tensor:
        interval = backend.interval(i)
        positions = torch.arange(interval.start, interval.stop, device=backend.device)
        drawn = scores.uniform(positions, config.seed, i, _INIT)
        return ranking_keys(drawn, largest=True, eligible=state.masks[i])

    chosen = select(backend.owners, key, list(range(len(state.budgets))), state.budgets, config.selection)
    positions = [(offsets + backend.interval(i).start).to(backend.position_dtype) for i, offsets in enumerate(chosen)]
    bases = [backend.load(i, backend.memory_indices(i, where)).float() for i, where in enumerate(positions)]
    state.set_entries(backend, list(map(Columns.grown, positions, bases)))


def check_write(backend: Backend, state: State) -> None:
    """Refuse to go on if the model does not see what was written. Collective, once a run.

    Args:
        backend: Holds the weights.
        state: The weights as they should be.

    Raises:
        RuntimeError: Naming the ranks; every rank raises the same.
    """
    count = len(backend.names)
    smallest = min(range(count), key=lambda i: backend.partitions[i].numel)
    layers = sorted({0, smallest, count // 2, count - 1})[:_CHECKED_LAYERS]
    entries = list(state.layers())
    wrong = torch.zeros(len(layers), dtype=torch.int64)
    for row, i in enumerate(layers):
        some = entries[i].take(slice(0, _CHECKED_POSITIONS))
        seen = backend.read(i, some.indices.long()).to(some.base.device)
        wrong[row] = int((seen != some.weight().to(seen.dtype)).sum())
    ranks = backend.replicas.stack(backend.owners.stack(wrong)).sum(2).view(-1).nonzero().view(-1).tolist()
    if ranks:
        raise RuntimeError(
            f"the model does not see the updates of its weights (ranks {ranks}, e.g. {backend.names[layers[0]]}): a "
            "gathered copy hides the shard. Report how the model was sharded; nothing trained from here would be right"
        )
