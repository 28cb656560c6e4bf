"""The method and its optimizer (docs/algorithm.md)."""

from dataclasses import dataclass
from typing import Literal

from seft_dist.config.checks import check, check_numbers, check_types
from seft_dist.config.pattern import AUTO, check_kept

DropSchedule = Literal["cosine", "linear", "constant"]
OnDrop = Literal["commit_reactivated", "keep", "revert"]
Init = Literal["gradient", "random"]
Moments = Literal["zero", "seeded"]
Drop = Literal["magnitude", "movement", "random"]
Grow = Literal["gradient", "momentum", "random"]
Adapt = Literal["sensitivity", "activation", "curvature", "magnitude", "none"]
Reactivate = Literal["commit", "trial"]
Scope = Literal["layer", "global"]
Selection = Literal["auto", "gather", "radix"]
Decay = Literal["weight", "delta"]
WindowStore = Literal["full", "bf16", "candidates", "factored"]


@dataclass(frozen=True, kw_only=True)
class SeftConfig:
    """The method: how many deltas, where they may go, when they move (docs/algorithm.md)."""

    density: float = 0.01
    """Share of each target weight's positions that carry a trainable delta, above 0 and at most the share of active
    (non-zero) weights of all targets together. A target with fewer active weights gets no more deltas than these."""
    targets: str = "all-linear"
    """Linears that get deltas: "all-linear" (every nn.Linear except the output head and tied weights), or a regular
    expression that is searched in module names, e.g. "q_proj|v_proj"."""
    steps: int | None = None
    """Optimizer steps of the whole run, T of the drop schedule. None: unknown, the drop fraction stays constant.
    seft train sets it from its own --steps, and refuses another value."""
    interval: int = 60
    """Optimizer steps between evolutions: one happens at each step divisible by it."""
    window: int = 1
    """Optimizer steps, ending with the evolution's, over which the dense gradient is accumulated. At most interval."""
    window_store: WindowStore = "full"
    """Form in which a rank keeps the window's gradient (docs/evolution.md): "full" (fp32 at every own weight), "bf16"
    (half of it), "candidates" (dense in the window's first step; then only the support and the best candidates to
    grow and to prune), or "factored" (row and column sums; no dense gradient is ever computed)."""
    window_candidates: float = 1.0
    """With window_store "candidates": how many a layer keeps of each kind, as a multiple of its budget; at least
    drop_fraction. An evolution grows at most as many."""
    begin: int = 1
    """First optimizer step (counted from 1) at which an evolution may happen."""
    end: int | None = None
    """Last optimizer step at which an evolution may happen. None: 80 % of steps, or never ending if steps is None."""
    static: bool = False
    """True: no evolution; the first support is kept to the end (the static baseline)."""
    drop_fraction: float = 0.2
    """Share of the support that moves in an evolution at the start of the run, f0, 0 to 1."""
    drop_schedule: DropSchedule = "cosine"
    """Schedule of the moving share: "cosine" or "linear", which fall to 0 at the last step, or "constant"."""
    on_drop: OnDrop = "commit_reactivated"
    """Weight that a dropped entry leaves behind. "commit_reactivated": the base weight returns bit for bit, except at
    reactivated positions (base 0), whose delta becomes the base. "keep": every dropped delta joins the base. "revert":
    the base returns everywhere, and reactivated positions are pruned again (SpIEL; needs adapt "none")."""
    reactivation: float = 0.0
    """Largest share of the entries grown in a step that may be pruned positions, 0 to 1. 0: the support moves inside
    the mask, which stays (unless swap_fraction moves it). 1: no cap, as in the paper; it repaired worse (with
    reactivate "trial" about as well) in what was measured (docs/results.md)."""
    reactivate: Reactivate = "commit"
    """Way in which pruned positions come back. "commit": a position that grows takes the place of another at once.
    "trial": it trains until the next evolution, which ranks all active positions and keeps the best; until then the
    mask is larger by what is on trial, at most reactivation x density of a layer. The last evolution lets nothing go on
    trial."""
    swap_fraction: float = 0.0
    """Largest share of a weight's positions that an evolution swaps, 0 to 1: pruned positions come back with their
    value in the parent (--parent, the model before it was pruned) in the place of active ones, where that lowers the
    "curvature" price of what is pruned. 0: none. Not together with reactivation."""
    swap_end: int | None = None
    """Last optimizer step at which an evolution swaps. None: 30 % of steps; no limit if steps is None. The later a
    swap, the more have other weights adapted to the mask."""
    init: Init = "gradient"
    """First support: "gradient" (an evolution of the empty support on the first step's gradient) or "random" (active
    positions drawn from the seed)."""
    moments: Moments = "zero"
    """Adam moments of a grown entry: "zero" (age 0) or "seeded" from the window's mean gradient and mean square."""
    drop: Drop = "magnitude"
    """Criterion to drop: smallest "magnitude" |delta| or "movement" -delta x accumulated gradient, or "random"."""
    grow: Grow = "gradient"
    """Criterion to grow: largest |accumulated "gradient"| or row/column second "momentum" (SM3), or "random"."""
    adapt: Adapt = "sensitivity"
    """Criterion to prune again: smallest "sensitivity" |weight x accumulated gradient|, "activation" |weight| x input
    norm (Wanda), "curvature" h weight^2 / 2 or "magnitude" |weight|, or "none" (sparsity is lost, as SpIEL on a pruned
    model)."""
    scope: Scope = "layer"
    """Scope in which Adapt and swaps rank: "layer", so that each layer keeps its number of zeros, or "global", so that
    only the model keeps it and layers may end with more or fewer."""
    pattern: str | None = AUTO
    """Pattern of the pruned model that evolutions keep, "2:4": at most 2 of 4 consecutive inputs of a row are active
    (in YAML with quotation marks). None: any position may become active, so that a pattern is lost. "auto": the same,
    but a model that has a pattern is refused, with what to give to keep it (unless reactivation is 0)."""
    selection: Selection = "auto"
    """Form of the distributed top-k: "gather" candidates, "radix" histograms, or "auto", the one that moves fewer
    bytes. All give the same result."""
    decay: Decay = "weight"
    """Values that weight_decay shrinks: "weight" (base + delta, as torch.optim.AdamW) or "delta" (to the base)."""
    train_norms: bool = False
    """True: train the norms' scales and shifts and the linears' biases too, all of them, with the same learning rate
    and no weight decay. They are well below 0.1 % of a model, and every rank keeps all of them."""
    allow_dense: bool = False
    """True: accept a model whose targets have no pruned positions."""
    seed: int = 0
    """Seed of the random criteria and of the random first support."""

    def __post_init__(self) -> None:
        check_types(self)
        check_numbers(self)
        check(0 < self.density <= 1, f"density={self.density}", "a share above 0 and at most 1, e.g. 0.01 for 1 %")
        check(bool(self.targets), "targets is empty", '"all-linear" or a regular expression for module names')
        check(self.interval >= 1, f"interval={self.interval}", "at least 1 optimizer step")
        check(
            1 <= self.window <= self.interval,
            f"window={self.window} with interval={self.interval}",
            "a window of 1 to interval steps; make the window shorter or the interval longer",
        )
        check(self.begin >= 1, f"begin={self.begin}", "an optimizer step from 1 on")
        check(0 <= self.drop_fraction <= 1, f"drop_fraction={self.drop_fraction}", "a share from 0 to 1")
        check(0 <= self.reactivation <= 1, f"reactivation={self.reactivation}", "a share from 0 to 1")
        check(self.steps is None or self.steps >= 1, f"steps={self.steps}", "at least 1 optimizer step")
        check(
            self.on_drop != "revert" or self.adapt == "none",
            f"on_drop=revert with adapt={self.adapt}",
            'adapt "none", since pruning what is dropped leaves too few active positions; or another on_drop',
        )
        check_kept(self.pattern, self.scope, self.adapt, self.reactivation)
        self._check_window_store()
        self._check_trial()
        self._check_swaps()
        last = self.last_evolution
        if self.steps is not None and last is not None:
            check(
                last < self.steps,
                f"the last evolution would be at step {last} of {self.steps}",
                "at least one update after it (grown weights start at 0); set end below steps, or raise steps",
            )

    def _check_trial(self) -> None:
        if self.reactivate == "commit":
            return
        check(
            self.reactivation > 0,
            'reactivate="trial" with reactivation=0',
            "reactivation above 0, e.g. 1: else nothing goes on trial",
        )
        check(
            self.adapt != "none",
            'reactivate="trial" with adapt="none"',
            'a criterion that ends a trial, e.g. adapt "activation"; or reactivate "commit"',
        )

    def _check_swaps(self) -> None:
        given = f"swap_fraction={self.swap_fraction}"
        check(0 <= self.swap_fraction <= 1, given, "a share from 0 to 1")
        if self.swap_fraction > 0:
            check(self.reactivation == 0, f"{given} with reactivation={self.reactivation}", "one of them")
            check(not self.static, f"{given} with static", "evolutions, in which swaps happen, or swap_fraction 0")
            check(self.adapt != "none", f"{given} with adapt=none", "the default of adapt, which swaps do not read")
            check(self.known_pattern is None, f"{given} with pattern={self.pattern}", "no pattern, or swap_fraction 0")
            check(self.window_store != "candidates", f"{given} with window_store=candidates", "another window_store")
            self._check_last_swap()

    def _check_last_swap(self) -> None:
        """Refuse a run in which no evolution comes early enough to swap."""
        last = self.last_swap
        if last is None:
            return
        first = max(1, -(-self.begin // self.interval)) * self.interval
        limit = last if self.last_step is None else min(last, self.last_step)
        given = f"swap_fraction={self.swap_fraction}"
        check(
            first <= limit,
            f"{given} with the first evolution at step {first} and the last swaps at {limit}",
            "an evolution at which to swap: a shorter interval, or a later swap_end and end",
        )

    def _check_window_store(self) -> None:
        """Refuse criteria that need more of the gradient than the store of the window keeps."""
        if self.window_store not in ("candidates", "factored"):
            return
        store = f"window_store={self.window_store}"
        other = 'what the store keeps; or choose window_store "full" or "bf16"'
        check(self.moments == "zero", f"{store} with moments={self.moments}", f'moments "zero", {other}')
        if self.window_store == "factored":
            check(self.grow != "momentum", f"{store} with grow={self.grow}", f'grow "gradient" or "random", {other}')
            check(self.drop != "movement", f"{store} with drop={self.drop}", f'drop "magnitude" or "random", {other}')
            return
        check(self.grow == "gradient", f"{store} with grow={self.grow}", f'grow "gradient", {other}')
        check(self.pattern in (None, AUTO), f"{store} with pattern={self.pattern}", f"no pattern, {other}")
        check(
            self.window > 1,
            f"{store} with window={self.window}",
            'a window of at least 2 steps (the first one is dense); or window_store "full"',
        )
        check(
            self.window_candidates >= self.drop_fraction and self.window_candidates > 0,
            f"window_candidates={self.window_candidates} with drop_fraction={self.drop_fraction}",
            "at least as many candidates as entries that move: a multiple of the budget from drop_fraction on, above 0",
        )

    @property
    def known_pattern(self) -> str | None:
        """The pattern that evolutions keep, None if none was named."""
        return None if self.pattern == AUTO else self.pattern

    def check_trials_end(self) -> None:
        """Check, once the run's length is known, that no position stays on trial for ever.

        Raises:
            ValueError: There is no last evolution.
        """
        check(
            self.reactivate == "commit" or self.static or self.last_step is not None,
            'reactivate="trial" without a last evolution',
            "steps or end: a run must not end while positions are on trial",
        )

    @property
    def adapts_by(self) -> Adapt | None:
        """The criterion of Adapt, None if it has no work: no position grows outside the mask, or none leaves it."""
        return self.adapt if self.reactivation > 0 and self.adapt != "none" else None

    @property
    def last_step(self) -> int | None:
        """Last step at which an evolution may happen, None if there is no such limit."""
        if self.end is not None or self.steps is None:
            return self.end
        return min(int(0.8 * self.steps), self.steps - 1)

    @property
    def last_swap(self) -> int | None:
        """Last step at which an evolution may swap, None if there is no such limit."""
        if self.swap_end is not None or self.steps is None:
            return self.swap_end
        return 3 * self.steps // 10

    @property
    def last_evolution(self) -> int | None:
        """Step of the run's last evolution, the first support included; None if unknown, 0 if there is none."""
        first = 1 if self.init == "gradient" and self.steps is not None and self.steps == 1 else 0
        if self.static:
            return first
        if self.last_step is None:
            return None
        last = self.last_step // self.interval * self.interval
        return last if last >= self.begin else first


@dataclass(frozen=True, kw_only=True)
class AdamConfig:
    """The update of the deltas and its learning rate. With --deepspeed, keys of the ds_config's optimizer block and its
    gradient_clipping take the place of these (a warning says so where they differ)."""

    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the two Adam moments, each 0 to below 1."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay per step, as a multiple of the learning rate (see seft.decay)."""
    max_grad_norm: float | None = 1.0
    """Largest global norm of the deltas' gradient; it is scaled down to this. None: no clipping."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay of the learning rate after the warm-up, to 0 at the last step; "constant" does not decay. A scheduler block
    in the ds_config takes its place."""
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises linearly from 0, 0 to 1."""

    def __post_init__(self) -> None:
        check_types(self, "optim.")
        check_numbers(self, "optim.")
        check(self.lr > 0, f"optim.lr={self.lr}", "a learning rate above 0")
        check(all(0 <= b < 1 for b in self.betas), f"optim.betas={self.betas}", "two rates from 0 to below 1")
        check(self.eps > 0, f"optim.eps={self.eps}", "a number above 0")
        check(self.weight_decay >= 0, f"optim.weight_decay={self.weight_decay}", "a number from 0 on")
        check(0 <= self.warmup <= 1, f"optim.warmup={self.warmup}", "a share from 0 to 1")
        if self.max_grad_norm is not None:
            check(self.max_grad_norm > 0, f"optim.max_grad_norm={self.max_grad_norm}", "a norm above 0, or null")


def check_adam(
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float, max_grad_norm: float | None
) -> None:
    """Refuse values of an optimizer's arguments that ``AdamConfig`` refuses; a learning rate of 0 is admitted.

    Raises:
        ValueError: Names the value and what is needed.
    """
    check(isinstance(betas, tuple | list) and len(betas) == 2, f"betas={betas}", "two rates from 0 to below 1")
    rates = (float(betas[0]), float(betas[1]))
    AdamConfig(lr=lr or 1.0, betas=rates, eps=eps, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
