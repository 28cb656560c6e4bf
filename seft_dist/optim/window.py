"""Statistics of the steps before an evolution, for one weight and this rank's interval of it.

    full, bf16     g g g g g g g g     the gradient summed over steps, at every own position
    candidates     . g . g . . g .     so in the window's first step; then only at the support and at candidates
    factored       row sums, column sums of squares: |g| is estimated from them, no dense gradient is computed

A step's contribution stays pending until the step is known to be finite: ``accumulate_step`` counts it,
``discard_step`` drops it.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from seft_dist.backends.base import Backend
from seft_dist.config import SeftConfig
from seft_dist.kernels import bits
from seft_dist.modules.experts import expert_slices
from seft_dist.optim.delta import Columns, Support, gather_supports
from seft_dist.optim.report import ReportDraft
from seft_dist.sparsity import scores


@dataclass(frozen=True)
class Needs:
    """The statistics that a configuration's criteria read, and how they are kept."""

    gradient: bool
    """True if the gradient of every position is read, or an estimate of it."""
    norms: bool
    """True if norms of the inputs are read."""
    outputs: bool
    """True if the size of the outputs' gradients is read too."""
    squares: bool
    """True if squares of the gradient are read."""
    momentum: bool
    """True if SM3's row and column accumulators are read."""
    factored: bool
    """True if the gradient is estimated from row and column sums."""
    candidates: bool
    """True if only the gradient of candidates is kept after the window's first step."""
    dtype: torch.dtype
    """Dtype in which dense gradients are accumulated."""

    @classmethod
    def of(cls, config: SeftConfig) -> "Needs":
        """Derive the needs of a configuration."""
        seeded, momentum = config.moments == "seeded", config.grow == "momentum"
        gradient = (
            seeded
            or momentum
            or config.grow == "gradient"
            or config.adapts_by == "sensitivity"
            or config.drop == "movement"
        )
        dtype = torch.bfloat16 if config.window_store == "bf16" else torch.float32
        factored, candidates = config.window_store == "factored", config.window_store == "candidates"
        price = config.swap_fraction > 0 or config.adapts_by == "curvature"
        outputs = price or (gradient and factored)
        norms = config.adapts_by == "activation" or outputs
        return cls(gradient, norms, outputs, seeded, momentum, factored, candidates, dtype)

    @classmethod
    def of_any_step(cls, config: SeftConfig) -> "Needs":
        """Derive the most that a step of a run needs: the first support may need more than the criteria do."""
        needs = cls.of(config)
        return needs.of_first_support() if config.init == "gradient" else needs

    def of_first_support(self) -> "Needs":
        """Return the needs with the gradient among them, which chooses the first support whatever the criteria."""
        outputs = self.outputs or self.factored
        return dataclasses.replace(self, gradient=True, norms=self.norms or outputs, outputs=outputs)

    @property
    def dense(self) -> bool:
        """True if the dense gradient must be computed."""
        return self.gradient and not self.factored

    @property
    def sums(self) -> list[str]:
        """Names of the statistics that each rank sums over its own tokens only."""
        return ["norms"] * self.norms + ["outputs"] * self.outputs


class Window:
    """Accumulated gradient of weight i over the steps of one window.

    The dense gradient itself exists during ``add`` only; docs/evolution.md says what is kept of it and what it costs.
    """

    def __init__(self, backend: Backend, i: int, needs: Needs, draft: ReportDraft) -> None:
        """Args:
        backend: Knows which part of the weight this rank owns.
        i: Number of the target.
        needs: Statistics to accumulate.
        draft: Gets the costs of this; one object for the windows of all targets.
        """
        self._backend, self._i, self._needs = backend, i, needs
        self._draft = draft
        self.num_steps = 0
        """Number of accumulated steps."""
        self.total: Tensor | None = None
        """[own], or [kept] with candidates: sum over steps of the gradient averaged over ranks."""
        self.squares: Tensor | None = None
        """[own], sum over steps of the squared gradient (seeded moments)."""
        self.positions: Tensor | None = None
        """``Backend.position_dtype`` [kept], increasing: own positions with a gradient in ``total``; None: all."""
        self.sampled: Support | None = None
        """All ranks' ``positions``, which backward samples; None: backward computes the dense gradient."""
        self.norms: Tensor | None = None
        """fp32 [experts x in], sum of squares of each expert's input, this rank's tokens only (activation, curvature,
        factored). Of a weight that is stored transposed it is the output's gradient, and ``outputs`` has the input."""
        self.outputs: Tensor | None = None
        """fp32 [experts x out], sum of squares of the output's gradient, this rank's tokens only (curvature,
        factored)."""
        self.rows: Tensor | None = None
        """fp32 [out], row accumulator (momentum); the same on every rank."""
        self.cols: Tensor | None = None
        """fp32 [in], column accumulator (momentum)."""
        self._step: Tensor | None = None
        self._step_sums: dict[str, Tensor] = {}
        self._factors: tuple[Tensor, Tensor] | None = None

    @property
    def needs_dense(self) -> bool:
        """True if backward must compute the dense gradient and call ``add``."""
        return self._needs.dense and self.sampled is None

    @property
    def sums(self) -> list[str]:
        """Names of the statistics that each rank has of its own tokens only."""
        return self._needs.sums

    @property
    def narrows(self) -> bool:
        """True if candidates are to be chosen now."""
        return self._needs.candidates and self.positions is None and self.num_steps == 1

    def measuring(self) -> AbstractContextManager[None]:
        """Add the costs of what happens inside the context to the coming evolution's report."""
        return self._draft.measuring(self._backend)

    def add(self, dense: Tensor) -> None:
        """Bring one backward's dense gradient to its owners. Collective.

        Args:
            dense: fp32 [out, in], this rank's; may be overwritten.
        """
        own = self._backend.reduce_dense(self._i, dense).to(self._backend.device)
        self._step = own.to(self._needs.dtype) if self._step is None else self._step.add_(own)

    def add_candidates(self, grad: Tensor) -> None:
        """Set one step's gradient at ``positions``, fp32 [kept], averaged over ranks."""
        self._step = grad

    def observe(self, x: Tensor, grad: Tensor, ends: list[int] | None = None) -> None:
        """Add one backward pass's tokens to the sums over tokens.

        Args:
            x: [T, in], the linear's input; of a weight that is stored transposed the gradient of its output.
            grad: [T, out], gradient of its output; of a weight that is stored transposed its input.
            ends: Where each expert's tokens end, for fused experts; the tokens are sorted by expert.
        """
        gradient = "norms" if self._backend.transposed[self._i] else "outputs"
        for name in self.sums:
            part = (x if name == "norms" else grad).float()
            if name == gradient:
                # A rank's gradient is that of its own mean loss: world_size times its share of the mean over ranks.
                part = part / self._backend.world_size
            squares = [part[tokens].square().sum(0) for tokens in expert_slices(ends or [len(part)])]
            squared = torch.cat(squares).to(self._backend.device)  # the CPU, where weights are offloaded
            self._step_sums[name] = self._step_sums[name] + squared if name in self._step_sums else squared

    def is_finite(self) -> Tensor:
        """Return whether the pending step is finite, bool [] on the device."""
        pending = [*self._step_sums.values(), *([] if self._step is None else [self._step])]
        # A value that is not finite shows in the extremes, which take much less time than a test of each value.
        extremes = [extreme.float() for part in pending if part.numel() for extreme in part.aminmax()]
        return torch.isfinite(torch.stack(extremes)).all() if extremes else torch.tensor(True)

    def discard_step(self) -> None:
        """Drop what was added since the last ``accumulate_step``."""
        self._step, self._step_sums = None, {}

    def accumulate_step(self) -> None:
        """Count the pending step. Collective for momentum."""
        self.num_steps += 1
        for name, squared in self._step_sums.items():
            before = getattr(self, name)
            setattr(self, name, squared if before is None else before + squared)
        if self._needs.dense:
            step = self._step
            if step is None:
                length = self._numel if self.positions is None else self.positions.numel()
                step = torch.zeros(length, dtype=self._needs.dtype, device=self._backend.device)
            if self._needs.squares:
                squared = step.float().square()
                self.squares = (squared if self.squares is None else squared.add_(self.squares)).to(step.dtype)
            if self._needs.momentum:
                self._accumulate_momentum(step.float())
            self.total = step if self.total is None else self.total.add_(step)
        self.discard_step()

    @property
    def _numel(self) -> int:
        return len(self._backend.interval(self._i))

    def _accumulate_momentum(self, step: Tensor) -> None:
        """Add a step's dense gradient to the second moments of rows and columns. Collective."""
        (rows, cols), start = self._backend.shapes[self._i], self._backend.interval(self._i).start
        if self.rows is None or self.cols is None:
            self.rows = torch.zeros(rows, dtype=torch.float32, device=step.device)
            self.cols = torch.zeros(cols, dtype=torch.float32, device=step.device)
        estimate = scores.momentum(self.rows, self.cols, start, step.numel()) + step.square()
        positions = torch.arange(start, start + step.numel(), device=step.device)
        for accumulator, index in ((self.rows, positions // cols), (self.cols, positions % cols)):
            accumulator.zero_().scatter_reduce_(0, index, estimate, "amax")
            self._backend.owners.max(accumulator)

    def narrow_to(self, offsets: Tensor) -> None:
        """Keep the gradient at some positions, and drop it everywhere else.

        Args:
            offsets: int64 [kept], increasing, counted from the start of the own interval.
        """
        assert self.total is not None and self.positions is None
        self.total = self.total[offsets]
        self.positions = (offsets + self._backend.interval(self._i).start).to(self._backend.position_dtype)

    def reduce_factors(self) -> None:
        """Add up the row and column sums of all ranks. Collective where both are kept; otherwise nothing is sent."""
        if "outputs" in self.sums:
            self._factors = self.summed("outputs"), self.summed_norms()

    def gradient(self) -> Tensor:
        """Return the accumulated gradient of the own interval, fp32 [own], or an estimate of its size.

        It is 0 outside of candidates where only these are known. The result may be ``total`` itself.
        """
        if self._needs.factored and self._factors is not None:
            return scores.factored(*self._factors, self._backend.interval(self._i).start, self._numel)
        assert self.total is not None, "criterion without its statistics"
        if self.positions is None:
            return self.total.float()
        return self.total.new_zeros(self._numel).index_put_((self._offsets,), self.total)

    def gradient_at(self, positions: Tensor) -> Tensor:
        """Return the accumulated gradient at some own positions, fp32; 0 if only its size is estimated."""
        if self._needs.factored:
            return torch.zeros(positions.shape, dtype=torch.float32, device=positions.device)
        return self.gradient()[positions.long() - self._backend.interval(self._i).start]

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return the mean over steps of the row and column sums of all ranks, fp32 [experts x out] and [experts, in].

        Their product estimates the curvature of the loss at each position. Needs ``reduce_factors``.
        """
        assert self._factors is not None, "criterion without its statistics"
        return self._factors[0] / self.num_steps, self._factors[1] / self.num_steps

    def known(self) -> Tensor | None:
        """Return where the gradient of the own interval is known, uint8, packed; None: everywhere."""
        if self.positions is None:
            return None
        nowhere = torch.zeros(-(-self._numel // 8), dtype=torch.uint8, device=self.positions.device)
        return bits.with_bits(nowhere, self._numel, self._offsets, True)

    @property
    def _offsets(self) -> Tensor:
        assert self.positions is not None
        return self.positions.long() - self._backend.interval(self._i).start

    def summed_norms(self) -> Tensor:
        """Add up ``norms`` over all ranks, fp32 [experts, in]. Collective."""
        return self.summed("norms").view(self._backend.experts[self._i], -1)

    def summed(self, name: str) -> Tensor:
        """Add up one of ``sums`` over all ranks, fp32, flat. Collective."""
        own: Tensor | None = getattr(self, name)
        rows, columns = self._backend.shapes[self._i]
        length = columns * self._backend.experts[self._i] if name == "norms" else rows
        if own is not None:
            squared = own.clone()
        else:
            squared = torch.zeros(length, dtype=torch.float32, device=self._backend.device)
        return self._backend.replicas.sum(self._backend.owners.sum(squared))


def share_positions(backend: Backend, windows: Sequence[Window | None]) -> None:
    """Let every rank know which positions of each weight backward samples. Collective if windows keep candidates.

    Args:
        backend: Knows which rank owns which positions.
        windows: Window of each weight; None outside a window.
    """
    keeping = [window for window in windows if window is not None and window.positions is not None]
    own = [window.positions for window in keeping if window.positions is not None]
    if own:
        supports = gather_supports(backend.owners, torch.cat(own), [len(part) for part in own], backend.shapes)
        for window, support in zip(keeping, supports, strict=True):
            window.sampled = support


def sampled_positions(windows: Sequence[Window | None], supports: list[Support]) -> list[Support]:
    """Return the positions at which backward samples each weight: the deltas', and a window's candidates.

    Args:
        windows: Window of each weight.
        supports: Positions of the deltas of each weight.
    """
    return [
        support if window is None or window.sampled is None else window.sampled
        for window, support in zip(windows, supports, strict=True)
    ]


def gradient_at_entries(windows: Sequence[Window], entries: Iterable[Columns]) -> Tensor:
    """Return the accumulated gradient at the own deltas, fp32 [own], layers one after another.

    Args:
        windows: Window of each weight.
        entries: The own deltas of each weight.
    """
    return torch.cat([window.gradient_at(own.indices) for window, own in zip(windows, entries, strict=True)])


def split_candidate_gradients(windows: Sequence[Window | None], grad: Tensor, entries: Iterable[Columns]) -> Tensor:
    """Hand the windows the gradient at their candidates, and return the gradient at the deltas.

    Args:
        windows: Window of each weight.
        grad: fp32, gradient at the own part of ``sampled_positions``, layers one after another.
        entries: The own deltas of each weight.

    Returns:
        fp32, the gradient at the own deltas.
    """
    if all(window is None or window.positions is None for window in windows):
        return grad
    parts, begin = [], 0
    for window, own in zip(windows, entries, strict=True):
        positions = None if window is None else window.positions
        length = len(own) if positions is None else len(positions)
        part = grad[begin : begin + length]
        begin += length
        if window is not None and positions is not None:
            window.add_candidates(part)
            part = part[torch.searchsorted(positions, own.indices)]
        parts.append(part)
    return torch.cat(parts)
