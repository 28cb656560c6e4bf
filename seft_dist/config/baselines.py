"""The names of the methods, and the settings of those that are not SEFT (docs/baselines.md)."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from seft_dist.config.checks import check, check_numbers
from seft_dist.config.method import SeftConfig

MethodName = Literal[
    "seft",
    "seft_static",
    "seft_static_random",
    "seft_fixed_mask",
    "spiel",
    "none",
    "lora",
    "lora_merged",
    "masked_lora",
    "spp",
    "masked_full",
    "norms_and_biases",
]

VARIANTS: dict[str, dict[str, Any]] = {
    "seft": {},
    "seft_static": {"static": True, "reactivation": 0.0, "init": "gradient"},
    "seft_static_random": {"static": True, "init": "random"},
    "seft_fixed_mask": {"static": False, "reactivation": 0.0, "swap_fraction": 0.0},
    "spiel": {
        "static": False,
        "adapt": "none",
        "init": "random",
        "moments": "seeded",
        "reactivation": 1.0,
        "on_drop": "revert",
    },
}
"""Methods that are SEFT with fixed settings."""


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """Settings of the methods that are not SEFT."""

    rank: int = 16
    """Rank of lora, lora_merged and masked_lora; of spp the number of column scalings, each for as many rows."""
    alpha: float = 32.0
    """The added matrix is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Share of the adapters' inputs that is 0 in a training step, from 0 to below 1; read by lora and lora_merged."""
    sequences: int = 128
    """Number of training sequences by which Wanda prunes the merged model again; read by lora_merged."""
    seed: int = 0
    """Seed of the adapters' first values, and of the choice of these sequences."""

    def __post_init__(self) -> None:
        check_numbers(self, "baseline.")
        check(self.rank >= 1, f"baseline.rank={self.rank}", "at least 1")
        check(self.alpha > 0, f"baseline.alpha={self.alpha}", "a number above 0")
        check(0 <= self.dropout < 1, f"baseline.dropout={self.dropout}", "a share from 0 to below 1")
        check(self.sequences >= 1, f"baseline.sequences={self.sequences}", "at least 1")


_SEFT_FIELDS = ("targets", "pattern", "allow_dense", "steps")
FIELDS = {
    "lora": ("rank", "alpha", "dropout", "seed"),
    "lora_merged": ("rank", "alpha", "dropout", "seed", "sequences"),
    "masked_lora": ("rank", "alpha", "seed"),
    "spp": ("rank", "alpha", "seed"),
}
"""Fields of BaselineConfig that each method reads."""


def with_variant(method: str, seft: SeftConfig) -> SeftConfig:
    """Return SEFT's settings with those that a method fixes; unchanged for methods that are not SEFT."""
    return dataclasses.replace(seft, **VARIANTS.get(method, {}))


def check_method(method: str, seft: SeftConfig, baseline: BaselineConfig) -> None:
    """Refuse settings that a method does not read, or that it has fixed, where they are not the defaults.

    Raises:
        ValueError: Names the setting, and what to change.
    """
    fixed = VARIANTS.get(method)
    for key, value, default in _changed(seft):
        if fixed is None:
            needed = f"{default}, its default: {method} does not read it; leave it out, or choose method seft"
            check(key in _SEFT_FIELDS, f"seft.{key}={value} with method={method}", needed)
        elif key in fixed:
            needed = f"{fixed[key]}, which is what {method} stands for; leave it out, or choose method seft"
            check(value == fixed[key], f"seft.{key}={value} with method={method}", needed)
    needed = "a method whose zeros stay; leave it out, or choose lora_merged"
    check(method != "lora" or seft.known_pattern is None, f"seft.pattern={seft.pattern} with method=lora", needed)
    for key, value, default in _changed(baseline):
        readers = ", ".join(name for name, read in FIELDS.items() if key in read)
        needed = f"{default}, its default: only {readers} read it"
        check(key in FIELDS.get(method, ()), f"baseline.{key}={value} with method={method}", needed)


def _changed(config: Any) -> list[tuple[str, Any, Any]]:
    """Return name, value and default of the fields that differ from their defaults."""
    fields = [(field.name, getattr(config, field.name), field.default) for field in dataclasses.fields(config)]
    return [(name, value, default) for name, value, default in fields if value != default]
