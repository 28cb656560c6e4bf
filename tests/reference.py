"""The method once more, written from its description and not from the optimizer: dense tensors, one process, no tricks.

Every position of every target has a slot in every tensor here, autograd gives the whole weight gradient, and every
ranking is a stable sort. It is the oracle of ``SeftOptimizer``, so it shares nothing with it but the configuration, the
choice of targets and the random numbers.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from seft_dist.config import SeftConfig
from seft_dist.modules.targets import find_targets
from seft_dist.sparsity.scores import uniform
from tests.reference_layer import Layer
from tests.reference_window import Window, cut

TINY = 2.0**-126


class DenseSeft:
    """Sparsity evolution of a whole model in one process, with the arguments of ``SeftOptimizer``.

    ``closest`` is the smallest distance seen so far between the last score that was chosen and the first that was not
    (exact ties aside), as a share of the larger one and a hundredth of what is typical, for a score whose terms cancel
    has the rounding of its terms: where it is of the size of rounding errors, another order of summation may choose
    otherwise. ``largest_delta`` is the largest |delta| of any entry in any step.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SeftConfig,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        parent: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.config, self.lr, self.betas, self.eps = config, lr, betas, eps
        self.weight_decay, self.max_grad_norm = weight_decay, max_grad_norm
        self.parent = parent or {}
        self.num_steps = 0
        self.grad_norm = 0.0
        self.largest_delta = 0.0
        self.closest = math.inf
        model.requires_grad_(False)
        targets = find_targets(model, config.targets)
        self.layers = {name: Layer.of(target.module, config) for name, target in targets.items()}
        for layer in self.layers.values():
            layer.module.weight.requires_grad_(True)
            layer.module.register_forward_hook(self._observe(layer))
        self.vectors: list[tuple[nn.Parameter, dict[str, Tensor]]] = []
        if config.train_norms:  # of the models in the tests, everything that has one dimension
            for parameter in (p for p in model.parameters() if p.dim() == 1):
                parameter.requires_grad_(True)
                zero = torch.zeros(parameter.shape)
                self.vectors.append((parameter, {"value": parameter.detach().float(), "mean": zero, "square": zero}))
        if config.init == "random":
            for i, layer in enumerate(self.layers.values()):
                draw = uniform(layer.positions, config.seed, i, 3)
                layer.support = self._choose(draw, layer.mask, layer.budget, largest=True, random=True)

    def step(self) -> None:
        """One optimizer step on the gradients of ``backward``; then drops them."""
        config, layers = self.config, list(self.layers.values())
        self.num_steps = t = self.num_steps + 1
        gradients = []
        for layer in layers:
            assert layer.module.weight.grad is not None
            gradients.append(layer.module.weight.grad.float())
            layer.module.weight.grad = None
        for layer, gradient in zip(layers, gradients, strict=True):
            if self._in_window(t):
                layer.window.add(gradient, layer.inputs, layer.outputs)
        if t == 1 and config.init == "gradient":
            windows = [Window.empty(layer.base, config.window_store) for layer in layers]
            for window, layer, gradient in zip(windows, layers, gradients, strict=True):
                window.add(gradient, layer.inputs, layer.outputs)
            self._evolve(windows, first=True)
            gradients = [window.gradient * (config.window_store != "factored") for window in windows]
        self._update(gradients)
        if self.evolves(t):
            self._evolve([layer.window for layer in layers], first=False)
            for layer in layers:
                layer.window = Window.empty(layer.base, config.window_store)
        elif config.window_store == "candidates" and layers[0].window.steps == 1:
            self._keep_candidates(layers)
        for layer in layers:
            layer.inputs, layer.outputs = torch.zeros_like(layer.inputs), torch.zeros_like(layer.outputs)
            layer.write()

    def evolves(self, t: int) -> bool:
        """Return whether step ``t`` ends with an evolution, not counting the first support."""
        config = self.config
        last = config.last_step
        return not config.static and t % config.interval == 0 and t >= config.begin and (last is None or t <= last)

    def drop_fraction(self, t: int) -> float:
        config = self.config
        if config.steps is None or config.drop_schedule == "constant":
            return config.drop_fraction
        if config.drop_schedule == "linear":
            return config.drop_fraction * (1 - t / config.steps)
        return config.drop_fraction / 2 * (1 + math.cos(math.pi * t / config.steps))

    def _in_window(self, t: int) -> bool:
        return any(self.evolves(u) for u in range(t, t + self.config.window))

    @staticmethod
    def _observe(layer: Layer):  # type: ignore[no-untyped-def]
        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            if torch.is_grad_enabled():
                x = args[0].detach().float().flatten(0, -2)
                layer.inputs = layer.inputs + (x**2).sum(dim=0)
                out.register_hook(see)

        def see(gradient: Tensor) -> None:
            layer.outputs = layer.outputs + (gradient.float().flatten(0, -2) ** 2).sum(dim=0)

        return hook

    def _update(self, gradients: list[Tensor]) -> None:
        """Clipping as torch.nn.utils.clip_grad_norm_, then torch.optim.AdamW with an age for each entry."""
        layers = list(self.layers.values())
        sparse = [torch.where(layer.support, g, 0.0) for layer, g in zip(layers, gradients, strict=True)]
        others = [parameter.grad.float() for parameter, _ in self.vectors if parameter.grad is not None]
        self.grad_norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in sparse + others))
        scale = 1.0
        if self.max_grad_norm is not None:
            scale = min(1.0, self.max_grad_norm / (self.grad_norm + 1e-6))
        beta1, beta2 = self.betas
        for (parameter, state), gradient in zip(self.vectors, others, strict=True):
            state["mean"] = beta1 * state["mean"] + (1 - beta1) * gradient * scale
            state["square"] = beta2 * state["square"] + (1 - beta2) * (gradient * scale) ** 2
            first, second = state["mean"] / (1 - beta1**self.num_steps), state["square"] / (1 - beta2**self.num_steps)
            state["value"] = state["value"] - self.lr * first / (second.sqrt() + self.eps)
            with torch.no_grad():
                parameter.copy_(state["value"])
            parameter.grad = None
        for layer, gradient in zip(layers, sparse, strict=True):
            g = gradient * scale
            layer.age = layer.age + layer.support
            layer.exp_avg = torch.where(layer.support, beta1 * layer.exp_avg + (1 - beta1) * g, 0.0)
            layer.exp_avg_sq = torch.where(layer.support, beta2 * layer.exp_avg_sq + (1 - beta2) * g**2, 0.0)
            age = layer.age.double()
            first = layer.exp_avg / (1 - beta1**age).float()
            second = layer.exp_avg_sq / (1 - beta2**age).float()
            shrunk = layer.value if self.config.decay == "weight" else layer.delta
            moved = layer.delta - self.lr * self.weight_decay * shrunk - self.lr * first / (second.sqrt() + self.eps)
            layer.delta = torch.where(layer.support, moved, 0.0)
            # An active weight is never 0 after an update: it keeps the smallest normal number.
            lost = layer.support & (layer.value.abs() < TINY)
            kept = torch.copysign(torch.tensor(TINY), layer.value) - layer.base.float()
            layer.delta = torch.where(lost, kept, layer.delta)
            self.largest_delta = max(self.largest_delta, float(layer.delta.abs().max()))

    def _evolve(self, windows: list[Window], first: bool) -> None:
        for layer in self.layers.values():
            layer.grown = layer.removed = layer.returned = torch.zeros_like(layer.mask)
        if self.parent and not first and (self.config.last_swap is None or self.num_steps <= self.config.last_swap):
            self._swap(windows)
        if self.config.reactivate == "trial":
            self._adapt(windows)
            for layer in self.layers.values():
                layer.trial = torch.zeros_like(layer.mask)
        for i, (layer, window) in enumerate(zip(self.layers.values(), windows, strict=True)):
            self._drop(i, layer, window)
            self._grow(i, layer, window)
        if self.config.reactivate == "commit" and not self.parent:
            self._adapt(windows)

    def _swap(self, windows: list[Window]) -> None:
        """Pair the cheapest active positions with the dearest pruned ones, and swap where the pruned one is dearer."""
        layers, values = list(self.layers.values()), [self.parent[name] for name in self.layers]
        counts = [math.floor(self.config.swap_fraction * layer.mask.numel() + 0.5) for layer in layers]
        active = [self._price(layer.value, window) for layer, window in zip(layers, windows, strict=True)]
        pruned = [self._price(value, window) for value, window in zip(values, windows, strict=True)]
        groups = [[i] for i in range(len(layers))] if self.config.scope == "layer" else [list(range(len(layers)))]
        for group in groups:
            count = sum(counts[i] for i in group)
            free = [~layers[i].mask & (values[i].abs() >= TINY) for i in group]
            leaving = self._choose_of_all([active[i] for i in group], [layers[i].mask for i in group], count)
            coming = self._choose_of_all([pruned[i] for i in group], free, count, largest=True)
            out, back = self._listed(group, active, leaving), self._listed(group, pruned, coming)
            # of equal ones, those at smaller places come and leave first
            out, back = sorted(out), sorted(back, key=lambda p: (-p[0], p[1], p[2]))
            pairs = [(one, other) for one, other in zip(out, back, strict=False) if cut(other[0]) > cut(one[0])]
            typical = math.sqrt(sum(one[0] ** 2 for one in out + back) / max(1, len(out + back)))
            for one, other in zip(out, back, strict=False):
                self._note(other[0], one[0], typical)
            moved = [[torch.zeros_like(layer.mask).flatten() for layer in layers] for _ in range(2)]
            for pair in pairs:
                for which, (_, i, at) in zip(moved, pair, strict=True):
                    which[i][at] = True
            for i in group:
                layer = layers[i]
                removed, layer.returned = (which[i].view(layer.mask.shape) for which in moved)
                layer.prune(removed)
                layer.mask = layer.mask | layer.returned
                layer.base = torch.where(layer.returned, values[i].to(layer.base.dtype), layer.base)

    def _listed(self, group: list[int], prices: list[Tensor], chosen: list[Tensor]) -> list[tuple[float, int, int]]:
        """Price, layer and position of each that was chosen."""
        found = []
        for i, which in zip(group, chosen, strict=True):
            price = prices[i].flatten()
            found += [(float(price[at]), i, at) for at in which.flatten().nonzero().flatten().tolist()]
        return found

    def _price(self, value: Tensor, window: Window) -> Tensor:
        rows, columns = window.outputs / window.steps, window.inputs / window.steps
        return rows.view(-1, 1) * columns * value.float() ** 2 / 2

    def _drop(self, i: int, layer: Layer, window: Window) -> None:
        config, t = self.config, self.num_steps
        count = math.floor(self.drop_fraction(t) * int(layer.support.sum()) + 0.5)
        count = min(count, layer.mask.numel() - layer.budget)  # not more than Grow can replace
        if (share := self._reactivated_share(t)) < 1:
            count = min(count, int(max(0, int(layer.mask.sum()) - layer.budget) / (1 - share) + 1e-6))
        if config.drop == "magnitude":
            score = layer.delta.abs()
        elif config.drop == "movement":
            score = -layer.delta * window.gradient
        else:
            score = uniform(layer.positions, config.seed, i, t, 1)
        layer.dropped = self._choose(score, layer.support, count, largest=False, random=config.drop == "random")
        if config.on_drop == "revert":
            layer.prune(layer.dropped & (layer.base == 0))
        else:
            commit = layer.dropped & ((layer.base == 0) | (config.on_drop == "keep"))
            layer.base = torch.where(commit, layer.value.to(layer.base.dtype), layer.base)
        layer.leave(layer.dropped)

    def _grow(self, i: int, layer: Layer, window: Window) -> None:
        config, t = self.config, self.num_steps
        if config.grow == "gradient":
            score = window.score.abs()
        elif config.grow == "momentum":
            score = torch.minimum(window.rows, window.columns)
        else:
            score = uniform(layer.positions, config.seed, i, t, 2)
        free = ~layer.support & ~layer.dropped & ~layer.removed & window.known
        if config.grow != "random":
            free &= score != 0  # what has no gradient does not grow
        count = layer.budget - int(layer.support.sum())
        if not window.known.all():
            count = min(count, self._num_candidates(layer))
        layer.grown = grown = self._best_free(layer, score, free, count, self._reactivated_share(t))
        layer.support = layer.support | grown
        if config.reactivate == "trial":
            layer.trial = grown & ~layer.mask
        layer.mask = layer.mask | grown
        if config.moments == "seeded":
            a, (beta1, beta2) = window.steps, self.betas
            layer.exp_avg = torch.where(grown, (1 - beta1**a) * window.gradient / a, layer.exp_avg)
            layer.exp_avg_sq = torch.where(grown, (1 - beta2**a) * window.square / a, layer.exp_avg_sq)
            layer.age = torch.where(grown, a, layer.age)

    def _best_free(self, layer: Layer, score: Tensor, free: Tensor, count: int, share: float) -> Tensor:
        cap = math.floor(share * count + 0.5)
        count = min(count, int(free.sum()))
        if self.config.known_pattern:
            return self._walk(layer, score, free, count, cap)
        random = self.config.grow == "random"
        best = self._choose(score, free, count, True, random)
        if int((best & ~layer.mask).sum()) > cap:
            pruned = self._choose(score, free & ~layer.mask, cap, True, random)
            best = pruned | self._choose(score, free & layer.mask, count - cap, True, random)
        return best

    def _reactivated_share(self, evolution: int) -> float:
        later = range(evolution + 1, (self.config.last_step or 0) + 1)
        if self.config.reactivate == "trial" and not any(map(self.evolves, later)):
            return 0.0  # no evolution would decide about a trial
        return self.config.reactivation

    def _num_candidates(self, layer: Layer) -> int:
        return math.floor(self.config.window_candidates * layer.budget + 0.5)

    def _keep_candidates(self, layers: list[Layer]) -> None:
        """After a window's first step: the gradient stays known where it may be needed."""
        scores = [self._adapt_score(layer, layer.window) for layer in layers]
        spare = [layer.mask & ~layer.support for layer in layers]
        counts = [self._num_candidates(layer) for layer in layers]
        if self.config.adapt != "sensitivity" or not self.config.reactivation:
            prune = [torch.zeros_like(layer.mask) for layer in layers]
        elif self.config.scope == "layer":
            prune = [self._choose(*args, largest=False) for args in zip(scores, spare, counts, strict=True)]
        else:
            prune = self._choose_of_all(scores, spare, sum(counts))
        coming = next(t for t in range(self.num_steps, self.num_steps + self.config.interval) if self.evolves(t))
        for layer, least, count in zip(layers, prune, counts, strict=True):
            score = layer.window.gradient.abs()
            grow = self._best_free(layer, score, ~layer.support & (score != 0), count, self._reactivated_share(coming))
            layer.window.known = layer.support | grow | least
            layer.window.gradient = torch.where(layer.window.known, layer.window.gradient, 0.0)

    def _adapt(self, windows: list[Window]) -> None:
        if self.config.adapt == "none":
            return
        layers = list(self.layers.values())
        scores = [self._adapt_score(*args) for args in zip(layers, windows, strict=True)]
        eligible = [layer.mask & ~layer.grown for layer in layers]
        if self.config.adapt == "sensitivity":
            eligible = [which & window.known for which, window in zip(eligible, windows, strict=True)]
        excess = [int(layer.mask.sum()) - layer.target for layer in layers]
        if self.config.known_pattern:
            out = [self._pay(*args) for args in zip(layers, scores, strict=True)]
        elif self.config.scope == "layer":
            out = [self._choose(*args, largest=False) for args in zip(scores, eligible, excess, strict=True)]
        else:
            out = self._choose_of_all(scores, eligible, sum(excess))
        for layer, pruned in zip(layers, out, strict=True):
            layer.prune(pruned)

    def _adapt_score(self, layer: Layer, window: Window) -> Tensor:
        if self.config.adapt == "sensitivity":
            return (layer.value * window.score).abs()
        if self.config.adapt == "curvature":
            return self._price(layer.value, window)
        if self.config.adapt == "activation":
            return layer.value.abs() * window.inputs.sqrt()
        return layer.value.abs()

    def _choose_of_all(
        self, scores: list[Tensor], eligible: list[Tensor], count: int, largest: bool = False
    ) -> list[Tensor]:
        """The ``count`` smallest, or largest, of all layers together."""
        flat = torch.cat([score.flatten() for score in scores]), torch.cat([e.flatten() for e in eligible])
        parts = self._choose(*flat, count, largest).split([score.numel() for score in scores])
        return [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]

    def _group_size(self) -> int:
        assert self.config.known_pattern
        return int(self.config.known_pattern.split(":")[1])

    def _walk(self, layer: Layer, score: Tensor, free: Tensor, count: int, cap: int) -> Tensor:
        """Growth under an N:M pattern, one position after the other, best first."""
        size = self._group_size()
        scores, is_free, active = score.flatten().tolist(), free.flatten().tolist(), layer.mask.flatten().tolist()
        grown = torch.zeros(len(scores), dtype=torch.bool)
        took: dict[int, int] = {}  # of each group
        passed: dict[int, float] = {}  # score of the last one taken of each group
        last = math.inf
        typical = float(score[free].square().mean().sqrt())
        taken = pruned = 0
        for at in sorted((p for p, it_is in enumerate(is_free) if it_is), key=lambda p: (-scores[p], p)):
            group = at // size
            full = took.get(group, 0) == sum(active[group * size : (group + 1) * size])
            full = full and self.config.reactivate == "commit"  # on trial, nobody has to make room yet
            if full or (not active[at] and pruned == cap):
                if self.config.grow != "random":  # such scores are exact
                    self._note(passed[group] if full and group in passed else last, scores[at], typical)
                continue
            if taken == count:
                if self.config.grow != "random":
                    self._note(last, scores[at], typical)
                break
            taken += 1
            grown[at], last, passed[group] = True, scores[at], scores[at]
            took[group] = took.get(group, 0) + 1
            pruned += not active[at]
        return grown.view(score.shape)

    def _pay(self, layer: Layer, score: Tensor) -> Tensor:
        """Select the positions that leave the mask under an N:M pattern: from each group as many as it has too many."""
        size = self._group_size()
        before, first = layer.mask.view(-1, size), layer.first_mask.view(-1, size)
        out = torch.zeros_like(before)
        for group in range(len(before)):
            inside = torch.zeros_like(before)
            inside[group] = True
            excess = int(before[group].sum()) - int(first[group].sum())
            assert excess >= 0
            eligible = layer.mask & ~layer.grown & inside.view(layer.mask.shape)
            if excess:
                assert int(eligible.sum()) >= excess
                out |= self._choose(score, eligible, excess, largest=False).view(-1, size)
        return out.view(layer.mask.shape)

    def _note(self, inside: float, outside: float, typical: float) -> None:
        """Remember how close a decision was."""
        if inside != outside and math.isfinite(inside):  # an exact tie is one everywhere
            size = max(abs(inside), abs(outside)) + typical / 100
            self.closest = min(self.closest, abs(inside - outside) / size)

    def _choose(self, score: Tensor, eligible: Tensor, count: int, largest: bool, random: bool = False) -> Tensor:
        """The ``count`` best of the eligible; of equal ones those at smaller positions. Random scores are exact."""
        positions = eligible.flatten().nonzero().flatten()
        ranked, order = torch.sort(score.flatten()[positions], descending=largest, stable=True)
        chosen = torch.zeros(score.numel(), dtype=torch.bool)
        chosen[positions[order[: max(count, 0)]]] = True
        if 0 < count < len(ranked) and not random:
            self._note(float(ranked[count - 1]), float(ranked[count]), float(ranked.square().mean().sqrt()))
        return chosen.view(score.shape)
