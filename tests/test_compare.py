"""`seft compare` on real runs: equal ones, other layouts, changed seeds, learning rates, data, weights and files."""

import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tests.preload  # noqa: F401
from seft_dist.config import AdamConfig, DataConfig
from seft_dist.reproduce.compare import (
    DIFFERS,
    EQUAL,
    PARTED,
    UNDECIDED,
    WITHIN,
    Comparison,
    compare,
    write_comparison,
)
from seft_dist.reproduce.compare_report import print_comparison
from seft_dist.reproduce.promise import DELTA_RELATIVE, LOSS_RELATIVE, WEIGHT_ABSOLUTE, WEIGHT_RELATIVE
from seft_dist.training.method import TrainedSeft
from tests.models import moving
from tests.runs import STEPS, run_config, run_train

ROOT = Path(__file__).parents[1]
LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module", autouse=True)
def one_code() -> Iterator[None]:
    """Fix the digest of the source, so that edits of the package while the tests run do not matter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("seft_dist.session.facts.source_digest", lambda: "0" * 16)
        yield


@pytest.fixture(scope="module")
def single(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one process."""
    output = tmp_path_factory.mktemp("runs") / "single"
    run_train(run_config(inputs, output))
    return output


@pytest.fixture
def again(single: Path, tmp_path: Path) -> Path:
    """The files of an equal run, to be changed."""
    return shutil.copytree(single, tmp_path / "again")


def shown(found: Comparison) -> str:
    """Text that a user reads."""
    from rich.console import Console

    console = Console(width=120, record=True, file=io.StringIO())
    print_comparison(found, console)
    return console.export_text()


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes))


def edit_trace(run: Path, step: int, change: Any) -> None:
    """Change the line of one step."""
    path = run / "trace.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines[step - 1])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_same_twice_is_bitwise_equal(inputs: Path, single: Path, tmp_path: Path) -> None:
    run_train(run_config(inputs, tmp_path / "run", log_every=2, save_every=3))
    found = compare(single, tmp_path / "run")
    assert found.verdict == EQUAL and found.held and found.terms.promise == "bits", found.sentence
    assert found.steps == STEPS and found.traced and found.evolutions == 3 and found.supports is not None
    assert found.weights is not None and len(found.weights) > 14
    assert EQUAL in shown(found)


@pytest.mark.slow
@pytest.mark.parametrize("over", [{"backend": "ddp", "batch_size": 2}, {"batch_size": 2}])
def test_another_layout_is_equal_within_the_tolerance(
    over: dict[str, Any], inputs: Path, single: Path, tmp_path: Path
) -> None:
    run_train(run_config(inputs, tmp_path / "run", **over), 3)
    found = compare(single, tmp_path / "run")
    assert found.verdict == WITHIN and found.held and found.terms.promise == "tolerance", found.sentence
    assert {d.key for d in found.terms.layout} >= {"backend", "world_size", "batch_size"}
    assert found.differences and found.first_evolution is None
    assert WITHIN in shown(found)


@pytest.mark.parametrize("there", ["resident", "gather"])
def test_packing_belongs_to_the_layout_and_changes_no_bit(there: str, single: Path, again: Path) -> None:
    manifest = json.loads((again / "manifest.json").read_text())
    manifest["attempts"][0]["layout"]["packing"] = manifest["attempts"][0]["config"]["packing"] = there
    (again / "manifest.json").write_text(json.dumps(manifest))
    found = compare(single, again)
    assert found.held and found.verdict == EQUAL and found.terms.promise == "bits", found.sentence
    assert [(d.key, d.first, d.second) for d in found.terms.layout] == [("packing", "none", there)]
    edit_trace(again, 2, lambda line: line.update(loss=(float.fromhex(line["loss"]) * (1 + 1e-12)).hex()))
    assert compare(single, again).verdict == DIFFERS


CHANGES: list[tuple[dict[str, Any], int, str]] = [
    ({"seed": 1}, 1, "data"),
    ({"optim": AdamConfig(lr=2e-2)}, 1, "learning rate 0.01 against 0.02"),
    ({"optim": AdamConfig(lr=1e-2, schedule="linear")}, 3, "learning rate"),
    ({"seft": moving(density=0.05, interval=3, drop_fraction=0.4)}, 3, "support"),
    ({"optim": AdamConfig(lr=1e-2, weight_decay=0.1)}, 1, "deltas"),
]


@pytest.mark.parametrize(("over", "step", "word"), CHANGES)
def test_a_changed_setting_is_found_where_it_first_shows(
    over: dict[str, Any], step: int, word: str, inputs: Path, single: Path, tmp_path: Path
) -> None:
    run_train(run_config(inputs, tmp_path / "run", **over))
    found = compare(single, tmp_path / "run")
    assert found.verdict == DIFFERS and not found.held and found.terms.promise == "none"
    assert found.why.startswith(f"first at step {step}, ") and word in found.why, found.why
    assert "layer model.layers.0.self_attn.q_proj" in found.why
    assert all(str(difference) in found.why for difference in found.terms.inputs[:3])
    assert DIFFERS in shown(found)


def test_changed_text_is_found_where_it_is_first_read(inputs: Path, single: Path, tmp_path: Path) -> None:
    lines = (inputs / "text.jsonl").read_text().splitlines()
    changed = tmp_path / "text.jsonl"
    changed.write_text("\n".join([lines[0].replace("w3 ", "w4 ", 1), *lines[1:]]) + "\n")
    data = DataConfig(path=str(changed), seq_len=16)
    run_train(run_config(inputs, tmp_path / "run", data=data, steps=STEPS))
    found = compare(single, tmp_path / "run")
    assert [difference.key for difference in found.terms.inputs] == ["data"]
    first = found.differences[0]  # 12 of 153 sequences a step: the changed one is the first of them
    assert "batch" in first.values and not any("batch" in one.values for one in found.differences[1:])
    assert f"first at step {first.step}, data" in found.why


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_layer_that_goes_wrong_is_named_with_its_step(
    world_size: int, inputs: Path, single: Path, tmp_path: Path
) -> None:
    """One bit of one delta of one layer is wrong after step 5, on one rank only."""

    def break_step() -> None:
        # Not SeftOptimizer's: torch keeps a wrapped copy on the class of the first object that it makes.
        original = TrainedSeft.step

        def step(self: TrainedSeft, closure: Any = None) -> Any:
            result = original(self, closure)
            if self.num_steps == 5:
                i = self.target_names.index(LAYER)
                entries = list(self.sparse_state.layers())[i]
                if self.backend.owners.rank == world_size - 1:
                    entries.values.view(torch.int32)[3] ^= 1
            return result

        setattr(TrainedSeft, "step", step)  # noqa: B010

    over = {"backend": "fsdp"} if world_size == 2 else {}
    run_train(run_config(inputs, tmp_path / "run", **over), world_size, before=break_step)
    found = compare(single, tmp_path / "run")
    with_layers = [one for one in found.differences if one.layers]
    assert (with_layers[0].step, [layer.name for layer in with_layers[0].layers]) == (5, [LAYER])
    assert "deltas" in with_layers[0].layers[0].kinds and "support" not in with_layers[0].layers[0].kinds
    assert with_layers[0].layers[0].delta_relative < 1e-5
    if world_size == 1:
        assert found.verdict == DIFFERS and f"first at step 5, layer {LAYER}: deltas" in found.why, found.why
        assert found.terms.promise == "bits"


def flip(file: Path, name: str, bit: int = 0) -> int:
    """Flip a bit of a weight that is not 0; its position."""
    tensors = load_file(file)
    place = int(tensors[name].view(-1).nonzero()[5])
    tensors[name].view(-1).view(torch.int32)[place] ^= 1 << bit
    save_file(tensors, file, {"format": "pt"})
    return place


def test_a_flipped_bit_of_an_exported_weight_is_found(single: Path, again: Path) -> None:
    place = flip(again / "model" / "model.safetensors", f"{LAYER}.weight")
    found = compare(single, again)
    assert not found.held and found.verdict == DIFFERS
    assert f"{LAYER}.weight, position {place}" in found.why and "(1 values there, 1 tensors)" in found.why
    assert "is not what its run ended with" in found.why
    changed = [row for row in found.weights or [] if row.different]
    assert [(row.name, row.different, row.outside) for row in changed] == [(f"{LAYER}.weight", 1, 0)]
    assert compare(single, again, weights=False).held
    assert compare(again, again).verdict == DIFFERS  # one run is enough to see that its model was changed


def test_a_flipped_bit_outside_of_the_targets_and_in_the_delta_file(single: Path, again: Path) -> None:
    delta = again / "delta.safetensors"
    tensors = load_file(delta)
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name].view(torch.uint8)[0] ^= 1
    with safe_open(delta, framework="pt") as handle:
        metadata = handle.metadata()
    save_file(tensors, delta, metadata)
    found = compare(single, again)
    assert not found.held and name in found.why and "although the models are equal" in found.why
    place = flip(again / "model" / "model.safetensors", "model.embed_tokens.weight", bit=30)
    assert f"model.embed_tokens.weight, position {place}" in compare(single, again).why


def test_manifests_alone_are_enough(single: Path, again: Path, tmp_path: Path) -> None:
    theirs = shutil.copyfile(again / "manifest.json", tmp_path / "theirs.json")
    found = compare(single, theirs)
    assert found.verdict == EQUAL and found.evolutions == 3 and not found.steps and found.weights is None
    manifest = json.loads(theirs.read_text())
    manifest["final"]["layers"][LAYER][2] = "0" * 16
    theirs.write_text(json.dumps(manifest))
    found = compare(single, theirs)
    assert not found.held and found.why == f"at the end, layer {LAYER}: weights (1 layers)"
    manifest["evolutions"][1]["digest"] = "0" * 16
    theirs.write_text(json.dumps(manifest))
    assert compare(single, theirs).why.startswith("first at step 3: masks or supports")


def test_without_a_trace_losses_tell_the_step(single: Path, again: Path) -> None:
    (again / "trace.jsonl").unlink()
    assert compare(single, again).verdict == EQUAL
    lines = [json.loads(line) for line in (again / "metrics.jsonl").read_text().splitlines()]
    lines[6]["loss"] += 1e-12
    (again / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = compare(single, again)
    assert not found.held and "first at step 7, loss" in found.why and not found.traced


def test_a_run_that_is_not_finished_is_not_judged(single: Path, again: Path) -> None:
    edit_json(again / "manifest.json", final=None)
    (again / "trace.jsonl").write_text("".join((single / "trace.jsonl").read_text().splitlines(keepends=True)[:4]))
    found = compare(single, again)
    assert found.verdict == UNDECIDED and not found.held and found.steps == 4 and "not finished" in found.why


def moved_by_near_ties(run: Path, ties: int) -> None:
    """Change a trace as if in step 3 one position of a layer's mask had fallen the other way, on another layout."""
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["attempts"][0]["layout"]["world_size"] = 2
    manifest["evolutions"][1]["digest"] = "0" * 16
    manifest["final"]["layers"][LAYER][1] = "0" * 16
    (run / "manifest.json").write_text(json.dumps(manifest))

    def change(line: dict[str, Any]) -> None:
        line["layers"][LAYER][1] = "0" * 16
        line["topology"][LAYER][1][2] += 1
        line["topology"][LAYER][1][5] -= 1

    edit_trace(run, 3, change)
    edit_trace(run, 3, lambda line: line["topology"][LAYER].__setitem__(2, ties))


def test_near_ties_part_runs_on_other_layouts_and_nothing_else_may(single: Path, again: Path, tmp_path: Path) -> None:
    base = shutil.copytree(single, tmp_path / "base")
    edit_trace(base, 3, lambda line: line["topology"][LAYER].__setitem__(2, 3))
    moved_by_near_ties(again, ties=3)
    found = compare(base, again)
    assert found.verdict == PARTED and found.held and "at step 3 about 2 positions of 1 layers" in found.why, (
        found.sentence
    )
    edit_trace(again, 3, lambda line: line["topology"][LAYER].__setitem__(2, 0))
    found = compare(base, again)
    assert found.verdict == DIFFERS and f"first at step 3, layer {LAYER}: mask (about 2 positions)" in found.why
    edit_trace(again, 3, lambda line: line["topology"][LAYER].__setitem__(2, 3))
    edit_trace(again, 2, lambda line: line.update(loss=(float.fromhex(line["loss"]) * 1.001).hex()))
    assert compare(base, again).verdict == DIFFERS  # what came before was not within the tolerance
    for run in (base, again):
        content = json.loads((run / "manifest.json").read_text())
        content["attempts"][0]["layout"]["world_size"] = 1
        (run / "manifest.json").write_text(json.dumps(content))
    edit_trace(again, 2, lambda line: line.update(json.loads((base / "trace.jsonl").read_text().splitlines()[1])))
    assert compare(base, again).verdict == DIFFERS  # on the same layout there is no rounding to blame


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest["attempts"].clear(), "attempts: List should have at least 1 item"),
        (lambda manifest: manifest["attempts"][0].pop("config"), "attempts.0.config: Field required"),
        (lambda manifest: manifest["attempts"][0]["config"].pop("log_every"), "log_every: Field required"),
        (lambda manifest: manifest["attempts"][0].update(layout=[]), "attempts.0.layout: Input should be"),
        (lambda manifest: manifest.pop("data"), "data: Field required"),
        (lambda manifest: manifest["final"].pop("layers"), "final.layers: Field required"),
    ],
)
def test_a_manifest_without_what_is_compared_is_named(
    change: Callable[[dict[str, Any]], object], message: str, single: Path, again: Path
) -> None:
    manifest = json.loads((again / "manifest.json").read_text())
    change(manifest)
    (again / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError) as error:
        compare(single, again)
    assert f"the manifest of {again} does not hold what is needed: " in str(error.value)
    assert message in str(error.value)


def test_a_damaged_line_of_the_metrics_is_named(single: Path, again: Path) -> None:
    (again / "trace.jsonl").unlink()
    text = (again / "metrics.jsonl").read_text()
    (again / "metrics.jsonl").write_text("{" + text)
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 1 is no JSON"):
        compare(single, again)


def test_other_versions_or_machines_lower_the_promise(single: Path, again: Path) -> None:
    manifest = json.loads((again / "manifest.json").read_text())
    manifest["attempts"][0]["versions"]["torch"] = "9.9"
    manifest["attempts"][0]["hosts"][0]["cpu"] = "abacus"
    manifest["attempts"][0]["command"] = "something else"
    (again / "manifest.json").write_text(json.dumps(manifest))
    found = compare(single, again)
    assert found.terms.promise == "tolerance" and found.held and found.verdict == EQUAL
    assert [difference.key for difference in found.terms.environment] == ["torch", "cpu"]
    assert "torch" in found.why


@pytest.mark.parametrize(
    ("change", "words"),
    [({"dropout": True}, "dropout"), ({"dtype": "bfloat16"}, "check layouts with --model.dtype float32")],
)
def test_where_layouts_are_promised_nothing(
    change: dict[str, Any], words: str, inputs: Path, single: Path, again: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(single, tmp_path / "base")
    moved_by_near_ties(again, ties=3)
    for run in (base, again):
        edit_json(run / "manifest.json", **change)
    found = compare(base, again)
    assert found.verdict == DIFFERS and found.terms.promise == "none" and "Nothing is promised for" in found.why
    assert words in found.why, found.why
    assert "promised    nothing" in shown(found)


def test_everything_is_in_the_json(single: Path, again: Path, tmp_path: Path) -> None:
    flip(again / "model" / "model.safetensors", f"{LAYER}.weight")
    write_comparison(compare(single, again), tmp_path / "out" / "found.json")
    content = json.loads((tmp_path / "out" / "found.json").read_text())
    assert content["verdict"] == DIFFERS and not content["held"] and content["promise"] == "bits"
    assert content["weights"][0]["name"] == f"{LAYER}.weight" and len(content["weights"]) == 1


def test_the_numbers_of_the_promise_are_those_of_the_page() -> None:
    page = (ROOT / "docs" / "numerics.md").read_text()
    rows = {cells[1].strip(): cells[2].strip() for line in page.splitlines() if len(cells := line.split("|")) == 4}
    assert float(rows["loss in each step"].split()[0]) == LOSS_RELATIVE
    relative, _, _, absolute = rows["final weights"].split()[:4]
    assert (float(relative), float(absolute)) == (WEIGHT_RELATIVE, WEIGHT_ABSOLUTE)
    assert f"{DELTA_RELATIVE:.0%}" in page.replace(" %", "%")
