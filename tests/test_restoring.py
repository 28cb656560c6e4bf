"""A state that no training has written is refused by name, on every rank, before anything is changed."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from seft_dist import SeftOptimizer
from seft_dist.io import checkpoint
from seft_dist.io.checkpoint import files
from seft_dist.optim.delta import Support
from seft_dist.optim.state import LayerDelta
from tests.layouts import build
from tests.models import batch, moving, prune_, tiny_llama
from tests.ranks import run_ranks

CONFIG = moving(density=0.05, targets="q_proj|down_proj", interval=4, window=3, steps=16)
NAME = "model.layers.1.mlp.down_proj"
STEPS = 7  # an evolution, and two of the three steps of a window

Change = Callable[[dict[str, Tensor]], object]


def put(key: str, at: int, value: float) -> Change:
    """Set one value of one of the target's tensors."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{NAME}.{key}"][at] = value

    return change


def replace(key: str, make: Callable[[Tensor], Tensor]) -> Change:
    """Put another tensor in the place of one of the target's."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{NAME}.{key}"] = make(tensors[f"{NAME}.{key}"]).contiguous()

    return change


def swap(tensors: dict[str, Tensor]) -> None:
    """Two entries in the wrong order, all columns alike."""
    for key in ("indices", "base", "values", "exp_avg", "exp_avg_sq", "age"):
        column = tensors[f"{NAME}.{key}"]
        column[[3, 4]] = column[[4, 3]]


def outside_the_mask(tensors: dict[str, Tensor]) -> None:
    mask, indices = tensors[f"{NAME}.mask"], tensors[f"{NAME}.indices"]
    mask[int(indices[5]) >> 3] &= ~(1 << (int(indices[5]) & 7)) & 255


def one_more_active(tensors: dict[str, Tensor]) -> None:
    mask = tensors[f"{NAME}.mask"]
    byte = int((mask != 255).nonzero()[0])
    mask[byte] |= (int(mask[byte]) + 1) & ~int(mask[byte])


BAD: dict[str, tuple[Change, str]] = {
    "age_huge": (put("age", 2, 10**6), r"age has values from \d+ to 1e\+06; needs 0 to 10"),
    "age_largest": (put("age", 2, 2**31 - 1), "age has values from .*; needs 0 to 10"),
    "age_negative": (put("age", 2, -(10**9)), r"age has values from -1e\+09 to \d+; needs 0 to 10"),
    "age_above_the_table": (put("age", 2, 20), "age has values from .* to 20; needs 0 to 10"),
    "age_minus_2": (put("age", 2, -2), "age has values from -2"),
    "age_minus_3": (put("age", 2, -3), "age has values from -3"),
    "age_of_another_type": (replace("age", Tensor.long), r"age is int64 \[\d+\]; needs int32"),
    "age_too_short": (replace("age", lambda age: age[:-1]), r"age is int32 \[\d+\]; needs int32 \[\d+\]"),
    "indices_unsorted": (swap, r"indices has \d+ behind \d+; needs increasing positions"),
    "indices_duplicate": (lambda t: t[f"{NAME}.indices"][3:5].fill_(7), "indices has .* behind"),
    "indices_beyond": (put("indices", -1, 10**6), r"indices has values from \d+ to 1e\+06; needs 0 to 1535"),
    "indices_negative": (put("indices", 0, -1), "indices has values from -1 to"),
    "indices_of_another_type": (replace("indices", Tensor.long), r"indices is int64 \[\d+\]; needs int32"),
    "indices_matrix": (replace("indices", lambda each: each.view(1, -1)), r"indices is int32 \[1, \d+\]"),
    "outside_the_mask": (outside_the_mask, r"indices has position \d+ outside the mask"),
    "values_nan": (put("values", 0, float("nan")), "values has values that are not finite"),
    "base_infinite": (put("base", 0, float("inf")), "base has values that are not finite"),
    "second_moment_negative": (put("exp_avg_sq", 0, -1.0), "exp_avg_sq has values from -1 to"),
    "second_moment_half": (replace("exp_avg_sq", Tensor.bfloat16), r"exp_avg_sq is bfloat16 \[\d+\]; needs float32"),
    "committed_beyond": (put("committed", -1, 2**31 - 1), "committed has values from"),
    "committed_unsorted": (replace("committed", lambda each: each.flip(0)), r"committed has \d+ behind \d+"),
    "committed_value_nan": (put("committed_values", 0, float("nan")), "committed_values has values that are not"),
    "committed_too_long": (
        replace("committed_values", lambda each: torch.cat([each, each])),
        r"committed_values is float32 \[\d+\]; needs float32 \[\d+\]",
    ),
    "mask_too_short": (replace("mask", lambda mask: mask[:-1]), r"mask is uint8 \[191\]; needs uint8 \[192\]"),
    "mask_of_booleans": (replace("mask", Tensor.bool), r"mask is bool \[192\]; needs uint8"),
    "one_more_active": (one_more_active, r"a mask with \d+ active positions; needs exactly \d+"),
    "missing": (lambda t: t.pop(f"{NAME}.age"), "age is missing"),
    "window_nan": (put("window.total", 0, float("nan")), "window.total has values that are not finite"),
    "window_too_short": (
        replace("window.total", lambda each: each[:9]),
        r"window.total is float32 \[9\]; needs .*1536",
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one process, inside a window."""
    model = prune_(tiny_llama())
    seft = SeftOptimizer(model, CONFIG, lr=1e-2)
    for t in range(STEPS):
        model(**batch(t)).loss.backward()
        seft.step()
        seft.zero_grad()
    assert all(len(layer.committed) > 1 for layer in seft.deltas() if layer.name == NAME)
    return checkpoint.save(seft, tmp_path_factory.mktemp("saved"), {})


def altered(path: Path, into: Path, change: Change) -> Path:
    """A copy whose tensors were changed; its checksums fit, as somebody would make them who wants to harm."""
    tensors = load_file(path / files.rank_file(0, 1))
    change(tensors)
    into.mkdir()
    file = into / files.rank_file(0, 1)
    save_file(tensors, file)
    manifest = json.loads((path / files.MANIFEST).read_text())
    del manifest["manifest_sha256"]
    files.write_manifest(into, manifest | {"sha256": [files.sync_and_hash(file).hex()]})
    return into


def kept(seft: SeftOptimizer) -> list[Any]:
    """All that a refused restore must leave as it was."""
    weights = [seft.backend.own(i).clone() for i in range(len(seft.backend.names))]
    return [*weights, *[mask.clone() for mask in seft.sparse_state.masks], seft.sparse_state.columns.indices.clone()]


@pytest.mark.parametrize("kind", BAD)
def test_altered_tensors_are_named_and_nothing_is_changed(kind: str, saved: Path, tmp_path: Path) -> None:
    change, words = BAD[kind]
    model = prune_(tiny_llama())
    seft = SeftOptimizer(model, CONFIG, lr=1e-2)
    seft.attach()
    before = kept(seft)
    with pytest.raises(ValueError, match=f"{NAME}: .*{words}") as caught:
        checkpoint.load(seft, altered(saved, tmp_path / "bad", change))
    if kind != "one_more_active":
        assert isinstance(caught.value, checkpoint.DamagedError) and files.rank_file(0, 1) in str(caught.value)
    assert seft.num_steps == 0 and all(map(torch.equal, before, kept(seft)))
    checkpoint.load(seft, saved)
    model(**batch(STEPS)).loss.backward()
    seft.step()
    assert seft.num_steps == STEPS + 1 and seft.evolution is not None


def test_a_part_that_is_wrong_for_one_rank_stops_all(saved: Path, tmp_path: Path) -> None:
    """Each rank reads its own rows; the bad age lies in those of rank 1 only, as what is given to ``restore`` does."""
    bad = altered(saved, tmp_path / "bad", put("age", -1, 10**6))

    def on_rank(rank: int, world: int) -> list[str]:
        _, seft, _, _ = build("fsdp", CONFIG, prune_(tiny_llama()))
        seft.attach()
        before = kept(seft)
        with pytest.raises(checkpoint.DamagedError, match=f"{NAME}: age has values") as first:
            checkpoint.load(seft, bad)
        checkpoint.load(seft, saved)
        layers = [clone(layer) for layer in seft.deltas()]
        _, seft, _, _ = build("fsdp", CONFIG, prune_(tiny_llama()))
        seft.attach()
        if rank == 1:
            layers[-1].columns.age[-1] = -2
        with pytest.raises(ValueError, match="age has values from -2") as second:
            seft.restore(STEPS, layers)
        assert all(map(torch.equal, before, kept(seft)))
        return [str(first.value)[:6], str(second.value)[:6]]

    assert run_ranks(on_rank, 2)[0][1] == "rank 1"


def clone(layer: LayerDelta) -> LayerDelta:
    columns = layer.columns.take(torch.arange(len(layer.columns)))
    return dataclasses.replace(layer, columns=columns)


def test_restore_asks_for_the_layers_of_this_run(saved: Path) -> None:
    seft = SeftOptimizer(prune_(tiny_llama()), CONFIG, lr=1e-2)
    checkpoint.load(seft, saved)
    layers = [clone(layer) for layer in seft.deltas()]
    other = SeftOptimizer(prune_(tiny_llama()), CONFIG, lr=1e-2)
    with pytest.raises(ValueError, match="3 layers were given for the 4 targets"):
        other.restore(STEPS, layers[:-1])
    with pytest.raises(ValueError, match="-1 optimizer steps done"):
        other.restore(-1, layers)
    wrong = dataclasses.replace(layers[0], mask_size=layers[0].mask_size + 1)
    with pytest.raises(ValueError, match=f"{layers[0].name}: a target of .* needs {layers[0].mask_size}"):
        other.restore(STEPS, [wrong, *layers[1:]])
    other.restore(STEPS, layers)
    assert other.num_steps == STEPS


def test_positions_outside_a_weight_never_reach_a_kernel() -> None:
    for positions in ([0, 6], [-1, 2]):
        with pytest.raises(ValueError, match=r"positions .* of a weight \[2, 3\]: needs 0 to 5"):
            Support((2, 3), [torch.tensor(positions, dtype=torch.int32)])
