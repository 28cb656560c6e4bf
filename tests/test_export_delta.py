"""The delta file: apply and remove give the bits back, inspect counts, and what does not fit is refused."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import tests.preload  # noqa: F401
from seft_dist.config import DType, ModelConfig
from seft_dist.export.delta import DeltaWriter, apply_delta, delta_table, make_delta, name_of, read_delta, remove_delta
from seft_dist.io.source import Source, open_source
from tests.folders import model_folder
from tests.test_export import assert_same_model, same_bits

NAME = "model.layers.1.mlp.up_proj.weight"


def opened(folder: Path, dtype: DType = "float32") -> Source:
    return open_source(ModelConfig(path=str(folder), dtype=dtype))


def pair(folder: Path) -> tuple[Path, Path, Path]:
    """A pruned model, one with 4 positions of one weight changed, and the delta between them."""
    pruned = model_folder(folder / "pruned", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(pruned)
    with torch.no_grad():
        flat = model.get_parameter(NAME).view(-1)
        zeros, active = (flat == 0).nonzero().view(-1), (flat != 0).nonzero().view(-1)
        flat[zeros[3]], flat[zeros[5]] = 0.5, -0.0  # a sign of a zero is no change
        flat[active[2]], flat[active[7]], flat[active[9]] = 0.0, 9.0, 8.0
    repaired = model_folder(folder / "repaired", torch.bfloat16)
    (repaired / "model.safetensors").unlink()
    state = {
        name: value for name, value in model.state_dict().items() if name in load_file(pruned / "model.safetensors")
    }
    save_file(state, repaired / "model.safetensors", {"format": "pt"})
    make_delta(opened(pruned), opened(repaired, "auto"), folder / "d.safetensors")
    return pruned, repaired, folder / "d.safetensors"


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_there_and_back(data: st.DataObject, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Also subnormals, NaN, and weights where nothing or everything changed; zeros lose their sign."""
    values = st.sampled_from([0.0, -0.0, 1.0, -2.5, 1e-40, 3e38, float("nan")])
    size = data.draw(st.integers(1, 12))
    drawn = (torch.tensor(data.draw(st.lists(values, min_size=size, max_size=size)), dtype=dtype) for _ in "ab")
    base, new = (torch.where(tensor == 0, torch.zeros_like(tensor), tensor) for tensor in drawn)
    folder = tmp_path_factory.mktemp("delta")
    model_folder(folder / "pruned")  # for its config.json
    (folder / "pruned" / "model.safetensors").unlink()
    save_file({"t.weight": base, "other": torch.ones(2, dtype=dtype)}, folder / "pruned" / "model.safetensors")
    writer = DeltaWriter(dtype, "pruned")
    writer.add("t.weight", base, new)
    writer.close(folder / "d.safetensors")
    apply_delta(opened(folder / "pruned"), folder / "d.safetensors", folder / "repaired")
    assert same_bits(load_file(folder / "repaired" / "model.safetensors")["t.weight"], new)
    remove_delta(opened(folder / "repaired"), folder / "d.safetensors", folder / "again")
    assert same_bits(load_file(folder / "again" / "model.safetensors")["t.weight"], base)


def test_make_apply_remove_inspect(tmp_path: Path) -> None:
    pruned, repaired, delta = pair(tmp_path)
    found = read_delta(delta)
    assert [found.count(NAME, kind) for kind in ("changed", "reactivated", "pruned")] == [2, 1, 1]
    assert sum(t.numel() for t in found.tensors.values()) == 8 and found.base_name == "pruned"
    apply_delta(opened(pruned), delta, tmp_path / "applied")
    assert_same_model(repaired, tmp_path / "applied")
    remove_delta(opened(tmp_path / "applied"), delta, tmp_path / "removed")
    assert_same_model(pruned, tmp_path / "removed")
    console = Console(record=True, width=200)
    console.print(delta_table(found))
    rows = {line.split("│")[1].strip(): line for line in console.export_text().splitlines() if line.count("│") > 3}
    assert [cell.strip() for cell in rows[NAME].split("│")[2:6]] == ["4", "2", "1", "1"]
    total = next(line for name, line in rows.items() if name.startswith("all"))
    assert [cell.strip() for cell in total.split("│")[2:6]] == ["4", "2", "1", "1"]


def test_the_wrong_model_is_refused(tmp_path: Path) -> None:
    pruned, repaired, delta = pair(tmp_path)
    other = model_folder(tmp_path / "other", torch.bfloat16, seed=1)
    for act, folder, kind in (
        (apply_delta, other, "another pruned model"),
        (apply_delta, repaired, "another pruned model"),
        (remove_delta, other, "another repaired model"),
        (remove_delta, pruned, "another repaired model"),
    ):
        with pytest.raises(ValueError, match=f"{kind} than {folder}.*base: pruned"):
            act(opened(folder), delta, tmp_path / "out")
    small = model_folder(tmp_path / "small", torch.bfloat16, num_hidden_layers=1)
    with pytest.raises(ValueError, match="needs two versions of one model"):
        make_delta(opened(small), opened(pruned), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="differs between"):
        make_delta(opened(pruned), opened(repaired, "auto"), tmp_path / "x.safetensors", names=["lm_head.weight"])
    with pytest.raises(ValueError, match="exists already"):
        make_delta(opened(pruned), opened(repaired, "auto"), delta)
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob("x.*"))


def changed_file(delta: Path, metadata: dict[str, str], tensors: dict[str, Tensor | None]) -> Path:
    with safe_open(delta, "pt") as handle:
        head = dict(handle.metadata()) | metadata
        held: dict[str, Tensor | None] = {n: handle.get_tensor(n) for n in handle.keys()}  # noqa: SIM118  # not a dict
    kept = {name: value for name, value in (held | tensors).items() if value is not None}
    save_file(kept, delta.with_name("bad.safetensors"), head)
    return delta.with_name("bad.safetensors")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    pruned, _, delta = pair(tmp_path)
    source, spot = opened(pruned), f"{NAME}.changed"
    good = read_delta(delta).tensors
    below, above, swapped, twice = (good[spot].clone() for _ in range(4))
    below[0], above[1] = -1, 2**30
    swapped[0], swapped[1] = good[spot][1], good[spot][0]
    twice[1] = twice[0]
    flipped = good[f"{spot}_xor"] ^ 1
    cases: list[tuple[dict[str, str], dict[str, Tensor | None], str]] = [
        ({"format": "seft_dist delta 3"}, {}, "up to version 2: update it"),
        ({"format": "seft_dist checkpoint 1"}, {}, "needs 'seft_dist delta 2'"),
        ({"dtype": "torch.load"}, {}, "damaged: 'torch.load'"),
        ({"targets": "{}"}, {}, "targets does not hold what is needed"),
        ({"targets": "["}, {}, "damaged"),
        ({"targets": json.dumps([NAME + "x"])}, {}, "none of its targets'"),
        ({}, {spot: below}, "outside the 1536 weights"),
        ({}, {spot: above}, "outside the 1536 weights"),
        ({}, {spot: swapped}, "not ascending"),
        ({}, {spot: twice}, "not ascending"),
        ({}, {spot: good[spot].float()}, "no list of positions"),
        ({}, {f"{spot}_xor": None}, "does not fit"),
        ({}, {f"{spot}_xor": good[f"{spot}_xor"].int()}, "does not fit"),
        ({}, {f"{spot}_xor": flipped}, "does not lead to the weights"),
        ({}, {"surplus": torch.ones(2)}, "holds surplus"),
    ]
    for metadata, tensors, message in cases:
        with pytest.raises(ValueError, match=message):
            apply_delta(source, changed_file(delta, metadata, tensors), tmp_path / "out")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(delta.read_bytes()[:-7])
    with pytest.raises(ValueError, match="cannot be read as a delta file"):
        read_delta(cut)
    assert not list(tmp_path.glob("out*"))


def test_files_of_version_1_can_still_be_applied(tmp_path: Path) -> None:
    pruned, repaired, delta = pair(tmp_path)
    flat = load_file(repaired / "model.safetensors")[NAME].view(-1)
    with safe_open(delta, "pt") as handle:
        head = dict(handle.metadata()) | {"format": "seft_dist delta 1"}
        tensors = {n: handle.get_tensor(n) for n in handle.keys() if not n.endswith("_xor")}  # noqa: SIM118
    for kind in ("changed", "reactivated"):
        tensors[f"{NAME}.{kind}_values"] = flat[tensors[f"{NAME}.{kind}"].long()]
    del head["repaired"], head["base_name"]
    save_file(tensors, tmp_path / "old.safetensors", head)
    apply_delta(opened(pruned), tmp_path / "old.safetensors", tmp_path / "applied")
    assert_same_model(repaired, tmp_path / "applied")
    with pytest.raises(ValueError, match="version 1, .* can only be applied"):
        remove_delta(opened(repaired), tmp_path / "old.safetensors", tmp_path / "out")


def test_names_of_bases(tmp_path: Path) -> None:
    hub = tmp_path / "models--org--name" / "snapshots" / "abc"
    hub.parent.mkdir(parents=True)
    assert name_of(opened(model_folder(hub))) == "org/name"
    assert name_of(opened(model_folder(tmp_path / "pruned"))) == "pruned"
