"""One rank is the oracle for n ranks, one backend for the other: the same run on every layout, and against a file."""

from pathlib import Path
from typing import Any

import pytest
import torch

from seft_dist import SeftConfig
from tests.layouts import LAYOUTS, train_on
from tests.models import moving

GOLDEN = Path(__file__).parent / "assets" / "golden_losses.txt"
STEPS = 30
CONFIG = moving(density=0.05, interval=8, window=2, steps=STEPS)
"""Three evolutions after the first support: steps 8, 16 and 24."""

_oracle: dict[SeftConfig, dict[str, Any]] = {}


def oracle(config: SeftConfig) -> dict[str, Any]:
    """The single-process run, made once."""
    if config not in _oracle:
        _oracle[config] = train_on("single", 1, config, config.steps or 0)
    return _oracle[config]


def assert_same_run(run: dict[str, Any], reference: dict[str, Any], on_target: bool = True) -> None:
    """Same topology at every evolution, same values to rounding, zeros exactly on target (but without Adapt)."""
    assert run["digests"] == reference["digests"]
    assert torch.allclose(torch.tensor(run["losses"]), torch.tensor(reference["losses"]), rtol=1e-5)
    for name, layer in reference["state"].items():
        assert torch.equal(run["state"][name]["mask"], layer["mask"]), name
        assert torch.equal(run["state"][name]["support"], layer["support"]), name
        assert torch.allclose(run["state"][name]["weight"], layer["weight"], rtol=1e-4, atol=2e-6), name
    for counts in run["sparsity"]:
        assert counts.zeros == counts.numel - counts.active, counts
        assert (counts.active == counts.mask_size) == on_target, counts


def cases() -> list[Any]:
    """Every backend on 1 to 4 ranks; all but one case in the slow tier, 1 and 4 ranks in the long one."""
    tiers = {1: [pytest.mark.long], 2: [pytest.mark.slow], 3: [pytest.mark.slow], 4: [pytest.mark.long]}
    return [
        pytest.param(layout, world_size, marks=[] if (layout, world_size) == ("fsdp", 2) else tiers[world_size])
        for layout in LAYOUTS
        if layout != "single"
        for world_size in (1, 2, 3, 4)
    ]


@pytest.mark.parametrize(("layout", "world_size"), cases())
def test_every_layout_follows_one_process(layout: str, world_size: int) -> None:
    assert_same_run(train_on(layout, world_size, CONFIG, STEPS), oracle(CONFIG))


OPTIONS: dict[str, dict[str, Any]] = {
    "seeded": {"moments": "seeded"},
    "global": {"scope": "global"},
    "no reactivation": {"reactivation": 0.0},
    "some reactivation": {"reactivation": 0.4},
    "random": {"init": "random", "drop": "random", "grow": "random", "adapt": "magnitude"},
    "momentum, movement": {"grow": "momentum", "drop": "movement"},
    "activation": {"adapt": "activation"},
    "keep": {"on_drop": "keep"},
    "gather": {"selection": "gather"},
    "radix": {"selection": "radix"},
    "bf16": {"window_store": "bf16"},
    "candidates": {"window_store": "candidates"},
    "candidates, global": {"window_store": "candidates", "window_candidates": 0.5, "scope": "global"},
    "factored": {"window_store": "factored"},
    "curvature": {"adapt": "curvature"},
    "no Adapt": {"adapt": "none", "reactivation": 0.5, "drop_fraction": 0.6},
    "revert": {"adapt": "none", "on_drop": "revert", "drop_fraction": 0.6},
    "trial": {"reactivate": "trial", "adapt": "activation"},
    "trial, global, curvature": {"reactivate": "trial", "adapt": "curvature", "scope": "global"},
}


def options_on_layouts() -> list[Any]:
    """Every option on three layouts, on two of them in the long tier."""
    return [
        pytest.param(option, *layout, marks=[pytest.mark.long if (i + j) % 3 else pytest.mark.slow])
        for i, option in enumerate(OPTIONS)
        for j, layout in enumerate((("ddp", 2), ("fsdp", 3), ("zero3", 2)))
    ]


@pytest.mark.parametrize(("option", "layout", "world_size"), options_on_layouts())
def test_every_option_follows_one_process(option: str, layout: str, world_size: int) -> None:
    config = moving(density=0.05, interval=4, window=3, steps=14, **OPTIONS[option])
    assert_same_run(train_on(layout, world_size, config, 14), oracle(config), on_target=config.adapt != "none")


def test_selection_forms_choose_the_same() -> None:
    forms = [
        oracle(moving(density=0.05, interval=8, window=2, steps=STEPS, selection=form)) for form in ("gather", "radix")
    ]
    assert forms[0]["digests"] == forms[1]["digests"] == oracle(CONFIG)["digests"]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "world_size"), [("fsdp", 2), ("zero3", 2)])
def test_same_command_same_bits(layout: str, world_size: int) -> None:
    first, second = (train_on(layout, world_size, CONFIG, 10) for _ in range(2))
    assert first["losses"] == second["losses"]
    assert first["digests"] == second["digests"]
    for name, layer in first["state"].items():
        assert torch.equal(layer["weight"], second["state"][name]["weight"]), name


def test_golden_losses() -> None:
    """Losses of the run above to full precision; regenerate with ``python -m tests.test_layouts`` and say why."""
    golden = torch.tensor([float(line) for line in GOLDEN.read_text().split()])
    assert torch.allclose(torch.tensor(oracle(CONFIG)["losses"]), golden, rtol=1e-4)


if __name__ == "__main__":
    GOLDEN.write_text("\n".join(repr(loss) for loss in oracle(CONFIG)["losses"]) + "\n")
