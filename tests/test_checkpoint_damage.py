"""Checkpoints that somebody or something has changed: one message that names the file, and older ones are tried."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tests.preload  # noqa: F401
from seft_dist import SeftOptimizer
from seft_dist.io import checkpoint
from seft_dist.io.checkpoint import files
from seft_dist.io.checkpoint.files import MANIFEST, rank_file
from seft_dist.training.run_folder import open_run_folder
from seft_dist.training.trainer import train
from tests.models import batch, moving, prune_, tiny_llama
from tests.ranks import run_ranks
from tests.runs import make_config, records, run_train

CONFIG = moving(density=0.05, interval=4, window=3, steps=16)
NAME = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint inside a window, of one process."""
    model = prune_(tiny_llama())
    seft = SeftOptimizer(model, CONFIG, lr=1e-2)
    for t in range(3):
        model(**batch(t)).loss.backward()
        seft.step()
        seft.zero_grad()
    return checkpoint.save(seft, tmp_path_factory.mktemp("saved"), {})


@pytest.fixture
def path(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / saved.name))


def load(path: Path) -> None:
    checkpoint.load(SeftOptimizer(prune_(tiny_llama()), CONFIG, lr=1e-2), path)


def manifest_of(path: Path) -> dict[str, Any]:
    return {key: value for key, value in json.loads((path / MANIFEST).read_text()).items() if key != "manifest_sha256"}


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of rank 0, checksums and all."""
    file = path / rank_file(0, 1)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    files.write_manifest(path, manifest_of(path) | {"sha256": [files.sync_and_hash(file).hex()]})


def test_a_flipped_bit_of_the_version_is_damage(path: Path) -> None:
    text = (path / MANIFEST).read_text()
    (path / MANIFEST).write_text(text.replace('"format_version": 1', '"format_version": 3'))
    with pytest.raises(checkpoint.DamagedError, match="its checksum does not fit"):
        load(path)
    files.write_manifest(path, manifest_of(path) | {"format_version": 3})
    with pytest.raises(ValueError, match="format version 3") as caught:
        load(path)
    assert not isinstance(caught.value, checkpoint.DamagedError)  # whole: an older one would hide that


def target(**over: Any) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest["targets"][0].update(over)


CRAFTED: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("no targets", lambda m: m.pop("targets"), "targets: Field required"),
    ("empty targets", lambda m: m.update(targets=[]), "at least 1 item"),
    ("targets are text", lambda m: m.update(targets=["a"]), "targets.0"),
    ("steps are text", lambda m: m.update(num_steps="3"), "num_steps: Input should be a valid integer"),
    ("steps below 0", lambda m: m.update(num_steps=-1), "num_steps"),
    ("steps are a fraction", lambda m: m.update(num_steps=1.5), "num_steps"),
    ("method is a list", lambda m: m.update(method=[]), "method"),
    ("extra is null", lambda m: m.update(extra=None), "extra"),
    ("no rank", lambda m: m.update(world_size=0, sha256=[]), "world_size"),
    ("10^12 ranks", lambda m: m.update(world_size=10**12), "world_size"),
    ("a rank too many", lambda m: m.update(world_size=2), "has 1 checksums of files: needs world_size=2"),
    ("checksums are numbers", lambda m: m.update(sha256=[1]), "sha256.0"),
    ("window longer than the run", lambda m: m.update(window_steps=9), "needs at most num_steps"),
    ("three dimensions", target(shape=[32, 32, 1]), "shape"),
    ("too large", target(shape=[1 << 30, 1 << 30]), "positions"),
    ("shape of text", target(shape="ab"), "shape"),
    ("chunk too small", target(chunk=3), "chunks for all of them"),
    ("chunk of text", target(chunk="3"), "chunk"),
    ("more active than positions", target(target=5000), "as many active ones"),
    ("fingerprint of text", target(fingerprint="x"), "fingerprint"),
    ("a target twice", lambda m: m["targets"].append(m["targets"][0]), "twice"),
]


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in CRAFTED], ids=[case[0] for case in CRAFTED])
def test_crafted_manifests(change: Callable[[dict[str, Any]], object], message: str, path: Path) -> None:
    manifest = manifest_of(path)
    change(manifest)
    files.write_manifest(path, manifest)
    with pytest.raises(checkpoint.DamagedError, match=message):
        checkpoint.read_manifest(path)


@pytest.mark.parametrize("text", ["null", "[]", '"x"', "[" * 100_000, "{}"])
def test_a_manifest_that_is_none(text: str, path: Path) -> None:
    (path / MANIFEST).write_text(text)
    with pytest.raises(checkpoint.DamagedError, match=r"checkpoint\.json|no complete checkpoint"):
        checkpoint.read_manifest(path)


def replaced(key: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({f"{NAME}.{key}": make(tensors[f"{NAME}.{key}"]).contiguous()})


def removed(key: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.pop(f"{NAME}.{key}")


_OWN = ("indices", "values", "exp_avg_sq", "age", "mask", "committed", "committed_values", "window.total")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *((removed(key), f"{NAME}: {key} is missing") for key in _OWN),
        (replaced("age", lambda value: value.float()), r"age is float32 .*needs int32"),
        (replaced("values", lambda value: value.double()), "values is float64"),
        (replaced("values", lambda value: value[:-1]), r"values is float32 \[\d+\]; needs float32 \[\d+\]"),
        (replaced("values", lambda value: value.view(1, -1)), r"values is float32 \[1, \d+\]"),
        (replaced("mask", lambda value: value[:-1]), r"mask is uint8 \[127\]; needs uint8 \[128\]"),
        (replaced("indices", lambda value: value.repeat(100)), "needs increasing positions"),
        (replaced("window.total", lambda value: value[1:]), r"total is float32 \[1023\]; needs float32 \[1024\]"),
    ],
)
def test_crafted_tensors(change: Callable[[dict[str, torch.Tensor]], object], message: str, path: Path) -> None:
    rewrite(path, change)
    with pytest.raises(checkpoint.DamagedError, match=message):
        load(path)


def test_a_file_that_is_no_safetensors(path: Path) -> None:
    file = path / rank_file(0, 1)
    file.write_bytes(b"\xff" * 64)
    files.write_manifest(path, manifest_of(path) | {"sha256": [files.sync_and_hash(file).hex()]})
    with pytest.raises(checkpoint.DamagedError, match="is damaged: .*deserializing"):
        load(path)


def test_targets_in_another_order_are_found_by_name(path: Path) -> None:
    manifest = manifest_of(path)
    manifest["targets"].reverse()
    files.write_manifest(path, manifest)
    load(path)


def test_only_our_own_names_are_ours(saved: Path, tmp_path: Path) -> None:
    """A user's copies are neither gone on from nor removed; what killed attempts have left is."""
    folder = tmp_path / "checkpoints"
    own = ["step-00000006-good", "step-6", "copy of step-00000001", "damaged-step-00000002"]
    left = ["partial-00000007", "removed-00000001", "replaced-00000005"]
    steps = [f"step-{number:08d}" for number in (1, 4, 5, 123_456_789)]
    for name in [*own, *left, *steps]:
        shutil.copytree(saved, folder / name)
    (folder / "step-00000009").symlink_to(saved)
    assert [path.name for path in checkpoint.complete(folder)] == steps
    checkpoint.tidy(folder, keep=2)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*own, *steps[2:], "step-00000009"])
    assert (saved / MANIFEST).exists()
    shutil.copytree(saved, folder / "replaced-00000005")
    weights = next((folder / steps[2]).glob("rank-*"))
    weights.write_bytes(weights.read_bytes()[:-1])
    checkpoint.tidy(folder, keep=2)  # the step's second save is damaged: the first one may still be needed
    assert (folder / "replaced-00000005").exists()
    shutil.rmtree(folder / "replaced-00000005")
    shutil.copy(saved / weights.name, weights)
    (folder / steps[2]).rename(folder / "replaced-00000005")  # killed between two renames: the only one of its step
    checkpoint.tidy(folder, keep=2)
    assert [path.name for path in checkpoint.complete(folder)] == ["replaced-00000005", steps[3]]


def test_a_run_that_goes_on_removes_what_rotation_left(saved: Path, inputs: Path, tmp_path: Path) -> None:
    """Kills may leave more checkpoints than are to be kept; the next attempt removes them when it begins."""
    folder = tmp_path / "run" / "checkpoints"
    for number in (1, 4, 5):
        shutil.copytree(saved, folder / f"step-{number:08d}")
    open_run_folder(make_config(inputs, tmp_path / "run", keep=2))
    assert [path.name for path in sorted(folder.iterdir())] == ["step-00000004", "step-00000005"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_goes_on_from_the_one_before(
    world_size: int, inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Damaged in a way that only a look into the file shows; what was put aside stays, whatever it is called."""
    config = make_config(inputs, output := tmp_path / "run", batch_size=12 // world_size, save_every=5)
    run_train(config, world_size)
    losses = [line["loss"] for line in records(output)]
    (output / "result.json").unlink()
    newest = output / "checkpoints" / "step-00000010"
    files.write_manifest(newest, manifest_of(newest) | {"num_steps": "ten"})
    newest = newest.rename(output / "checkpoints" / "replaced-00000010")
    run_ranks(lambda rank, world: train(config), world_size)
    said = capfd.readouterr().err
    assert said.count("num_steps: Input should be a valid integer") == 1
    assert (output / "checkpoints" / "damaged-replaced-00000010" / MANIFEST).exists()
    assert [line["loss"] for line in records(output)] == losses


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"origin": None}, "origin: Input should be a valid dictionary"),
        ({"origin": {"model": "x"}}, "origin.data: Field required"),
        ({"state": []}, "state: Input should be a valid dictionary"),
        ({"state": {"metrics": {"tokens": "many"}}}, "tokens: Input should be a valid integer"),
    ],
)
def test_crafted_states_of_a_run(change: dict[str, Any], message: str, inputs: Path, tmp_path: Path) -> None:
    config = make_config(inputs, output := tmp_path / "run", steps=2)
    run_train(config)
    (output / "result.json").unlink()
    path = output / "checkpoints" / "step-00000002"
    manifest = manifest_of(path)
    files.write_manifest(path, manifest | {"extra": manifest["extra"] | change})

    def on_rank(rank: int, world: int) -> None:
        with pytest.raises(ValueError, match=message):
            train(config)

    run_ranks(on_rank, 1)
