"""The schedule of evolutions: pure functions of the configuration and the step t, counted from 1."""

import math

from seft_dist.config import SeftConfig


def is_evolution(config: SeftConfig, step: int) -> bool:
    """Return whether step t ends with an evolution. The choice of the first support does not count as one."""
    if config.static or step % config.interval or step < config.begin:
        return False
    return config.last_step is None or step <= config.last_step


def is_swap(config: SeftConfig, step: int) -> bool:
    """Return whether the evolution of step t swaps, if it is not the choice of the first support."""
    return config.swap_fraction > 0 and (config.last_swap is None or step <= config.last_swap)


def first_evolution(config: SeftConfig) -> int | None:
    """Return the step of the first evolution (the first support aside); None if there will be none."""
    return next_evolution(config, 0)


def next_evolution(config: SeftConfig, step: int) -> int | None:
    """Return the step of the first evolution after step t; None if there is none."""
    coming = max(step // config.interval + 1, -(-config.begin // config.interval)) * config.interval
    return coming if is_evolution(config, coming) else None


def is_first_support(config: SeftConfig, step: int) -> bool:
    """Return whether the first support is chosen by the gradient of step t."""
    return step == 1 and config.init == "gradient"


def reactivated_share(config: SeftConfig, step: int) -> float:
    """Return the share of the positions to grow that may be pruned ones, 0 to 1, in an evolution at step t.

    No trial begins in the last evolution: nothing would end it, and the mask would stay too large.
    """
    if config.reactivate == "trial" and next_evolution(config, step) is None:
        return 0.0
    return config.reactivation


def window_end(config: SeftConfig, step: int) -> int:
    """Return the step whose evolution ends the window of step t, if t is in one: a multiple of the interval."""
    return -(-step // config.interval) * config.interval


def in_window(config: SeftConfig, step: int) -> bool:
    """Return whether the dense gradient of step t is accumulated for the evolution that follows it."""
    coming = window_end(config, step)
    return is_evolution(config, coming) and step > coming - config.window


def drop_fraction(config: SeftConfig, step: int) -> float:
    """Return the share of the support that is dropped in an evolution at step t, 0 to 1."""
    initial, total = config.drop_fraction, config.steps
    if config.drop_schedule == "constant" or total is None:
        return initial
    if config.drop_schedule == "linear":
        return initial * (1 - step / total)
    return initial / 2 * (1 + math.cos(math.pi * step / total))


def fraction_of(fraction: float, count: int) -> int:
    """Return the number of entries that are a fraction of ``count``, rounded half up."""
    return math.floor(fraction * count + 0.5)
