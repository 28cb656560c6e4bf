"""A run goes on from a checkpoint on any number of ranks and any backend as if it had not been interrupted."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from seft_dist import SeftConfig, SeftOptimizer
from seft_dist.io import checkpoint
from seft_dist.io.checkpoint import files, writer
from seft_dist.io.checkpoint.files import MANIFEST
from seft_dist.optim.notices import SeftWarning
from tests.layouts import build, snapshot
from tests.models import batch, moving, prune_, tiny_llama
from tests.ranks import run_ranks

STEPS, GLOBAL = 16, 12
CONFIG = moving(density=0.05, interval=4, window=3, steps=STEPS)


def run(
    layout: str, world_size: int, first: int, last: int, folder: Path, config: SeftConfig = CONFIG, save: bool = True
) -> dict[str, Any]:
    """Train steps first .. last - 1 (counted from 0), loading and saving checkpoints."""

    def on_rank(rank: int, world: int) -> dict[str, Any]:
        model = prune_(tiny_llama())
        called, seft, backward, step = build(layout, config, model)
        if first:
            newest = checkpoint.latest(folder)
            assert newest is not None
            assert checkpoint.load(seft, newest) == {"first": first}
        digests = []
        size = GLOBAL // world
        for t in range(first, last):
            part = {key: value[rank * size : (rank + 1) * size] for key, value in batch(t, size=GLOBAL).items()}
            backward(called(**part).loss)
            step()
            if seft.evolution:
                digests.append(seft.evolution.digest)
        if save:
            checkpoint.save(seft, folder, {"first": last})
        return {"digests": digests, "state": snapshot(model, seft)}

    return run_ranks(on_rank, world_size, timeout=120)[0]


def assert_same(one: dict[str, Any], other: dict[str, Any], exact: bool) -> None:
    assert one["digests"][-1] == other["digests"][-1]
    for name, layer in one["state"].items():
        for key in ("mask", "support"):
            assert torch.equal(layer[key], other["state"][name][key]), (name, key)
        if exact:
            assert torch.equal(layer["weight"], other["state"][name]["weight"]), name
            assert torch.equal(layer["values"], other["state"][name]["values"]), name
        else:
            assert torch.allclose(layer["weight"], other["state"][name]["weight"], rtol=1e-4, atol=2e-6), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "world_size", "at"),
    [
        ("single", 1, 5),
        ("single", 1, 7),
        ("single", 1, 8),
        ("fsdp", 2, 7),
        pytest.param("ddp", 2, 7, marks=pytest.mark.long),
        ("zero3", 2, 5),
        pytest.param("zero3", 2, 8, marks=pytest.mark.long),
    ],
)
def test_same_layout_is_bitwise(layout: str, world_size: int, at: int, tmp_path: Path) -> None:
    """At step 7 a window has begun; step 8 was an evolution."""
    whole = run(layout, world_size, 0, STEPS, tmp_path, save=False)
    run(layout, world_size, 0, at, tmp_path)
    assert_same(run(layout, world_size, at, STEPS, tmp_path), whole, exact=True)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (("zero3", 4), ("fsdp", 2)),
        (("fsdp", 4), ("single", 1)),
        pytest.param(("single", 1), ("zero3", 3), marks=pytest.mark.long),
        pytest.param(("ddp", 2), ("zero3", 2), marks=pytest.mark.long),
        pytest.param(("hsdp", 4), ("ddp", 3), marks=pytest.mark.long),
        (("zero2", 2), ("hsdp", 4)),
    ],
)
@pytest.mark.slow
def test_other_layout_follows(first: tuple[str, int], then: tuple[str, int], tmp_path: Path) -> None:
    whole = run("single", 1, 0, STEPS, tmp_path, save=False)
    run(*first, 0, 7, tmp_path)
    assert_same(run(*then, 7, STEPS, tmp_path), whole, exact=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"moments": "seeded"},
        {"grow": "momentum"},
        pytest.param({"adapt": "activation"}, marks=pytest.mark.long),
        {"scope": "global"},
        pytest.param({"on_drop": "keep"}, marks=pytest.mark.long),
        pytest.param({"init": "random"}, marks=pytest.mark.long),
        pytest.param({"window_store": "bf16", "moments": "seeded"}, marks=pytest.mark.long),
        {"window_store": "candidates"},
        {"window_store": "factored"},
        {"reactivate": "trial", "adapt": "curvature"},
    ],
)
def test_every_kind_of_state_is_kept(options: dict[str, Any], tmp_path: Path) -> None:
    config = moving(density=0.05, interval=4, window=3, steps=STEPS, **options)
    whole = run("fsdp", 2, 0, STEPS, tmp_path, config, save=False)
    run("fsdp", 2, 0, 7, tmp_path, config)
    assert_same(run("single", 1, 7, STEPS, tmp_path, config), whole, exact=False)


@pytest.mark.parametrize("before", ["full", "candidates"])
def test_the_form_of_a_window_may_change_before_it_begins(before: Any, tmp_path: Path) -> None:
    """Step 6 begins a window of three: after step 5 there is an empty one, after step 6 it has begun."""
    config = dataclasses.replace(CONFIG, begin=8, window_store="candidates")
    seft = stepped(prune_(tiny_llama()), dataclasses.replace(config, window_store=before), steps=5)
    checkpoint.save(seft, tmp_path / "5", {})
    model = prune_(tiny_llama())
    other = SeftOptimizer(model, config, lr=1e-2)
    checkpoint.load(other, tmp_path / "5" / "step-00000005")
    for t in range(5, 8):
        model(**batch(t)).loss.backward()
        other.step()
        other.zero_grad()
        if t == 5:
            checkpoint.save(other, tmp_path / "6", {})
    whole = stepped(prune_(tiny_llama()), config, steps=8)
    assert whole.evolution is not None and other.evolution is not None
    assert whole.evolution.digest == other.evolution.digest
    late = SeftOptimizer(prune_(tiny_llama()), dataclasses.replace(config, window_store="full"), lr=1e-2)
    with pytest.raises(ValueError, match="window_store='candidates' there, 'full' here"):
        checkpoint.load(late, tmp_path / "6" / "step-00000006")


def saved(folder: Path, config: SeftConfig = CONFIG, keep: int = 2) -> Path:
    """A checkpoint after one step in this process."""
    seft = stepped(prune_(tiny_llama()), config)
    return checkpoint.save(seft, folder, {}, keep)


def stepped(model: nn.Module, config: SeftConfig, steps: int = 1) -> SeftOptimizer:
    seft = SeftOptimizer(model, config, lr=1e-2)
    for t in range(steps):
        model(**batch(t)).loss.backward()
        seft.step()
        seft.zero_grad()
    return seft


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    model = prune_(tiny_llama())
    seft = SeftOptimizer(model, CONFIG)
    for t in range(4):
        model(**batch(t)).loss.backward()
        seft.step()
        newest = checkpoint.save(seft, tmp_path, {}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]
    assert checkpoint.latest(tmp_path) == newest


def test_checkpoint_is_small(tmp_path: Path) -> None:
    path = saved(tmp_path, moving(density=0.01))
    seft = SeftOptimizer(prune_(tiny_llama()), CONFIG)
    seft.attach()
    numel = sum(layer.numel for layer in seft.sparsity())
    data = path / "rank-00000-of-00001.safetensors"
    header = 8 + int.from_bytes(data.read_bytes()[:8], "little")
    assert data.stat().st_size - header <= numel / 8 + 0.011 * numel * 24 + 64 * 14


def test_unfinished_checkpoint_is_not_found(tmp_path: Path) -> None:
    path = saved(tmp_path)
    (path / MANIFEST).unlink()
    assert checkpoint.latest(tmp_path) is None
    seft = SeftOptimizer(prune_(tiny_llama()), CONFIG)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        checkpoint.load(seft, path)
    whole = saved(tmp_path / "other")
    with pytest.raises(ValueError, match=rf"no complete checkpoint .*the newest one inside it is {whole}"):
        checkpoint.load(seft, whole.parent)


def test_altered_file_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path)
    file = path / "rank-00000-of-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"rank-00000-of-00001\.safetensors is damaged"):
        checkpoint.load(SeftOptimizer(prune_(tiny_llama()), CONFIG), path)
    file.unlink()
    with pytest.raises(checkpoint.DamagedError, match="rank-00000-of-00001.safetensors is missing"):
        checkpoint.load(SeftOptimizer(prune_(tiny_llama()), CONFIG), path)


def test_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with pytest.raises(ValueError, match="another base model"):
        checkpoint.load(SeftOptimizer(prune_(tiny_llama(seed=1)), CONFIG), path)
    with pytest.raises(ValueError, match=r"differ \(held as torch.float32 there, as torch.bfloat16 here\)"):
        checkpoint.load(SeftOptimizer(prune_(tiny_llama(dtype=torch.bfloat16)), CONFIG), path)
    with pytest.raises(ValueError, match="another model or of other targets"):
        checkpoint.load(SeftOptimizer(prune_(tiny_llama(num_hidden_layers=1)), CONFIG), path)
    with pytest.raises(ValueError, match="has shape"):
        checkpoint.load(SeftOptimizer(prune_(tiny_llama(intermediate_size=24)), CONFIG), path)
    with pytest.raises(ValueError, match=r"density=0\.05 there, 0\.02 here"):
        checkpoint.load(SeftOptimizer(prune_(tiny_llama()), moving(density=0.02, interval=4, window=3)), path)
    manifest = json.loads((path / MANIFEST).read_text())
    newer = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    newer["method"] = {"later": 3} | {key: value for key, value in newer["method"].items() if key != "scope"}
    files.write_manifest(path, newer)
    with pytest.raises(ValueError, match="another method: later=3 there, unknown here; use"):
        checkpoint.load(SeftOptimizer(prune_(tiny_llama()), CONFIG), path)
    files.write_manifest(
        path, {key: value for key, value in (manifest | {"format_version": 99}).items() if key[:8] != "manifest"}
    )
    with pytest.raises(ValueError, match="format version 99"):
        checkpoint.load(SeftOptimizer(prune_(tiny_llama()), CONFIG), path)
    (path / MANIFEST).write_text(json.dumps(manifest | {"num_steps": 2}))
    with pytest.raises(checkpoint.DamagedError, match="its checksum does not fit"):
        checkpoint.load(SeftOptimizer(prune_(tiny_llama()), CONFIG), path)
    (path / MANIFEST).write_text(json.dumps(manifest)[:300])
    with pytest.raises(checkpoint.DamagedError, match="no complete checkpoint"):
        checkpoint.load(SeftOptimizer(prune_(tiny_llama()), CONFIG), path)


def test_a_restored_window_needs_what_its_criteria_need(tmp_path: Path) -> None:
    """Not what the first support needs: its gradient is dense, whatever the criteria."""
    criteria: dict[str, Any] = {"grow": "random", "drop": "random", "adapt": "magnitude"}
    config = dataclasses.replace(CONFIG, **criteria)
    model = prune_(tiny_llama())
    seft = stepped(model, config, steps=2)  # the window begins with step 2
    path = checkpoint.save(seft, tmp_path, {})
    other = SeftOptimizer(prune_(tiny_llama()), config)
    checkpoint.load(other, path)
    for one, two in zip(seft._windows, other._windows, strict=True):
        assert one is not None and two is not None and one._needs == two._needs and not two._needs.gradient


def no_space(file: Path) -> bytes:
    raise OSError(28, "No space left on device", str(file))


def no_memory(file: Path) -> bytes:
    raise MemoryError(f"no memory for {file}")


@pytest.mark.parametrize(("fails", "words"), [(no_space, "No space left"), (no_memory, "MemoryError: no memory for")])
def test_a_rank_that_cannot_write_stops_all_and_loses_nothing(fails: Any, words: str, tmp_path: Path) -> None:
    def on_rank(rank: int, world_size: int) -> str | None:
        model = prune_(tiny_llama())
        called, seft, backward, step = build("fsdp", CONFIG, model)
        backward(called(**batch(0, rank)).loss)
        step()
        good = checkpoint.save(seft, tmp_path, {})
        backward(called(**batch(1, rank)).loss)
        step()
        if rank == 1:
            writer.sync_and_hash = fails
        where = "" if rank else "rank 1: "
        with pytest.raises(OSError, match=f"checkpoint of step 2 could not be written: {where}.*{words}"):
            checkpoint.save(seft, tmp_path, {})
        dist.barrier()
        assert checkpoint.latest(tmp_path) == good
        assert [path.name for path in tmp_path.iterdir()] == [good.name]  # the failed one gave its space back
        return good.name

    assert run_ranks(on_rank, 2) == ["step-00000001"] * 2


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """The copy is of the step at which it was taken, whatever training does before it is on disk."""
    model = prune_(tiny_llama())
    seft = stepped(model, CONFIG, 3)
    at_once = checkpoint.save(seft, tmp_path / "at_once", extra := {"losses": [1.0]})
    saver = checkpoint.Saver(seft, tmp_path / "later")
    saver.start(extra)
    assert checkpoint.latest(tmp_path / "later") is None
    for t in range(3, 6):
        model(**batch(t)).loss.backward()
        seft.step()
        extra["losses"].append(2.0)
    later = saver.finish()
    assert later is not None and later.name == at_once.name and saver.finish() is None
    for file in at_once.iterdir():
        assert file.read_bytes() == (later / file.name).read_bytes()


def test_a_step_saved_twice_is_there_at_every_instant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seft = stepped(prune_(tiny_llama()), CONFIG)
    checkpoint.save(seft, tmp_path, {"attempt": 1})
    renames, really_rename = [], writer.os.rename

    def rename(old: Path, new: Path) -> None:
        renames.append(checkpoint.latest(tmp_path))
        really_rename(old, new)
        renames.append(checkpoint.latest(tmp_path))

    monkeypatch.setattr(writer.os, "rename", rename)
    newest = checkpoint.save(seft, tmp_path, {"attempt": 2})
    assert len(renames) == 6 and None not in renames  # the old one aside, the new one here, the old one away
    assert checkpoint.load(SeftOptimizer(prune_(tiny_llama()), CONFIG), newest) == {"attempt": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize(
    "stage",
    [*(pytest.param(stage, marks=pytest.mark.long) for stage in range(3)), pytest.param(3, marks=pytest.mark.slow)],
)
def test_a_deepspeed_checkpoint_does_not_lose_masks_and_deltas_in_silence(stage: int, tmp_path: Path) -> None:
    """engine.save_checkpoint says what it leaves out; engine.load_checkpoint alone is refused, and works after ours."""
    config = moving(density=0.05, interval=2, steps=STEPS)

    def begin() -> Any:
        return build(f"zero{stage}", config, prune_(tiny_llama()))

    def on_rank(rank: int, world: int) -> None:
        engine, seft, backward, step = begin()
        for t in range(3):
            backward(engine(**batch(t, rank)).loss)
            step()
        with pytest.warns(SeftWarning, match=r"not in state_dict\(\), so neither in engine\.save_checkpoint"):
            engine.save_checkpoint(str(tmp_path / "engine"))
        path = checkpoint.save(seft, tmp_path / "ours", {})
        with warnings.catch_warnings():
            warnings.simplefilter("error", SeftWarning)  # what it leaves out has been saved
            engine.save_checkpoint(str(tmp_path / "engine"))
        backward(engine(**batch(3, rank)).loss)
        step()
        expected = snapshot(engine.module, seft)

        engine, seft, backward, step = begin()
        engine.load_checkpoint(str(tmp_path / "engine"))
        with pytest.raises(ValueError, match="has done 0 steps, the state_dict is of step 3"):
            engine(**batch(3, rank))
        engine, seft, backward, step = begin()
        checkpoint.load(seft, path)
        engine.load_checkpoint(str(tmp_path / "engine"))
        backward(engine(**batch(3, rank)).loss)
        step()
        for name, layer in snapshot(engine.module, seft).items():
            for key in ("mask", "support", "values", "weight"):
                assert torch.equal(layer[key], expected[name][key]), (name, key)

    run_ranks(on_rank, 2)
