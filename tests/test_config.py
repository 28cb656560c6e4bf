"""Every check of the configuration is raised once; defaults pass; unknown keys are refused by every command."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from seft_dist import config
from seft_dist.config import (
    AdamConfig,
    BaselineConfig,
    ClusterConfig,
    DataConfig,
    EvalConfig,
    EvaluateConfig,
    ModelConfig,
    PlanConfig,
    PruneConfig,
    ReproduceConfig,
    SeftConfig,
    SourceConfig,
    StudyConfig,
    SweepConfig,
    TrainConfig,
)
from seft_dist.session.cli import parse, to_yaml

MODEL, DATA = ModelConfig(path="m"), DataConfig(path="d")
NEEDED: dict[type, dict[str, Any]] = {
    SeftConfig: {},
    AdamConfig: {},
    BaselineConfig: {},
    ModelConfig: {"path": "m"},
    DataConfig: {"path": "d"},
    SourceConfig: {"path": "a", "weight": 1.0},
    TrainConfig: {"model": MODEL, "data": DATA, "output": "o"},
    PruneConfig: {"model": MODEL, "data": DATA, "output": "o"},
    EvalConfig: {"data": DATA},
    EvaluateConfig: {"models": {"dense": "m"}, "data": DATA},
    ReproduceConfig: {"output": "o"},
    ClusterConfig: {},
    PlanConfig: {"model": "m"},
    SweepConfig: {"folder": "f"},
    StudyConfig: {"output": "o", "bases": {"b": {}}, "data": {}, "methods": {"m": {}}, "tokens": 1},
}

# class, what the user sets, a word of the message
BAD: list[tuple[type, dict[str, Any], str]] = [
    (SeftConfig, {"density": 0.0}, "density=0.0"),
    (SeftConfig, {"density": 1.5}, "at most 1"),
    (SeftConfig, {"targets": ""}, "targets"),
    (SeftConfig, {"interval": 0}, "interval=0"),
    (SeftConfig, {"window": 0}, "window=0"),
    (SeftConfig, {"window": 9, "interval": 8}, "window shorter"),
    (SeftConfig, {"window_store": "candidates", "moments": "seeded", "window": 2}, "moments=seeded"),
    (SeftConfig, {"window_store": "factored", "moments": "seeded"}, "moments=seeded"),
    (SeftConfig, {"window_store": "factored", "grow": "momentum"}, "grow=momentum"),
    (SeftConfig, {"window_store": "factored", "drop": "movement"}, "drop=movement"),
    (SeftConfig, {"window_store": "candidates", "grow": "random", "window": 2}, "grow=random"),
    (SeftConfig, {"window_store": "candidates", "pattern": "2:4", "window": 2}, "pattern=2:4"),
    (SeftConfig, {"window_store": "candidates"}, "window=1"),
    (SeftConfig, {"window_store": "candidates", "window": 2, "window_candidates": 0.1}, "window_candidates=0.1"),
    (SeftConfig, {"begin": 0}, "begin=0"),
    (SeftConfig, {"drop_fraction": 1.1}, "drop_fraction=1.1"),
    (SeftConfig, {"swap_fraction": -0.1}, "swap_fraction=-0.1"),
    (SeftConfig, {"swap_fraction": 0.1, "reactivation": 0.5}, "swap_fraction=0.1 with reactivation=0.5"),
    (SeftConfig, {"swap_fraction": 0.1, "static": True}, "swap_fraction=0.1 with static"),
    (SeftConfig, {"swap_fraction": 0.1, "adapt": "none"}, "swap_fraction=0.1 with adapt=none"),
    (SeftConfig, {"swap_fraction": 0.1, "steps": 190}, "the first evolution at step 60 and the last swaps at 57"),
    (SeftConfig, {"swap_fraction": 0.1, "swap_end": 59}, "the first evolution at step 60 and the last swaps at 59"),
    (
        SeftConfig,
        {"swap_fraction": 0.1, "swap_end": 60, "end": 50},
        "the first evolution at step 60 and the last swaps at 50",
    ),
    (SeftConfig, {"swap_fraction": 0.1, "pattern": "2:4"}, "swap_fraction=0.1 with pattern=2:4"),
    (SeftConfig, {"swap_fraction": 0.1, "window_store": "candidates", "window": 2}, "with window_store=candidates"),
    (SeftConfig, {"drop_fraction": -0.1}, "drop_fraction=-0.1"),
    (SeftConfig, {"reactivation": 2.0}, "reactivation=2.0"),
    (SeftConfig, {"steps": 0}, "steps=0"),
    (SeftConfig, {"steps": 16, "interval": 8, "end": 16}, "last evolution"),
    (SeftConfig, {"steps": 1}, "last evolution"),
    (AdamConfig, {"lr": 0.0}, "optim.lr=0.0"),
    (AdamConfig, {"betas": (0.9, 1.0)}, "optim.betas"),
    (AdamConfig, {"eps": 0.0}, "optim.eps"),
    (AdamConfig, {"weight_decay": -1.0}, "optim.weight_decay"),
    (AdamConfig, {"warmup": 1.5}, "optim.warmup"),
    (AdamConfig, {"max_grad_norm": 0.0}, "optim.max_grad_norm"),
    (ModelConfig, {"path": ""}, "model.path"),
    (DataConfig, {"path": ""}, "data.path"),
    (DataConfig, {"seq_len": 1}, "data.seq_len=1"),
    (DataConfig, {"holdout_every": 1}, "data.holdout_every=1"),
    (DataConfig, {"holdout": True}, "holdout_every"),
    (DataConfig, {"max_records": 0}, "data.max_records=0"),
    *(
        (TrainConfig, {name: 0}, f"{name}=0")
        for name in ("steps", "batch_size", "global_batch", "replicas", "log_every")
    ),
    (TrainConfig, {"save_every": -1}, "save_every=-1"),
    (TrainConfig, {"parent": "dense"}, "parent=dense with method=seft, seft.swap_fraction=0.0"),
    (TrainConfig, {"seft": SeftConfig(swap_fraction=0.1)}, "parent=None with method=seft, seft.swap_fraction=0.1"),
    (TrainConfig, {"parent": "m", "seft": SeftConfig(swap_fraction=0.1)}, "parent=m, which is model.path"),
    (
        TrainConfig,
        {"method": "seft_fixed_mask", "seft": SeftConfig(swap_fraction=0.1)},
        "swap_fraction=0.1 with method",
    ),
    (TrainConfig, {"parent": "dense", "method": "lora"}, "parent=dense with method=lora"),
    (TrainConfig, {"timeout": 0.0}, "timeout=0.0"),
    (TrainConfig, {"threads": 0}, "threads=0"),
    (TrainConfig, {"output": ""}, "output"),
    (TrainConfig, {"steps": 10, "seft": SeftConfig(interval=5, end=10)}, "last evolution"),
    (TrainConfig, {"backend": "fsdp", "deepspeed": "zero3.json"}, "backend=fsdp"),
    (TrainConfig, {"backend": "deepspeed"}, "--deepspeed FILE"),
    (TrainConfig, {"replicas": 2, "backend": "ddp"}, "backend fsdp"),
    (TrainConfig, {"offload": True, "deepspeed": "zero3.json"}, "backend fsdp"),
    (TrainConfig, {"packing": "resident", "deepspeed": "zero3.json"}, "without DeepSpeed"),
    (TrainConfig, {"packing": "gather", "backend": "ddp"}, "without DeepSpeed"),
    (TrainConfig, {"packing": "gather", "backend": "single"}, "backend fsdp"),
    (TrainConfig, {"packing": "resident", "offload": True}, "one of the two"),
    (TrainConfig, {"keep": 0}, "keep=0"),
    (TrainConfig, {"epochs": 0.0}, "epochs=0.0"),
    (TrainConfig, {"epochs": 2.0, "steps": 10}, "steps=10 with epochs=2.0"),
    (TrainConfig, {"save_every_minutes": -1.0}, "save_every_minutes=-1.0"),
    (TrainConfig, {"export": "best"}, "--eval.data.path FILE"),
    (TrainConfig, {"trackers": "wandb,comet"}, "trackers=comet"),
    (TrainConfig, {"project": ""}, "project is empty"),
    (TrainConfig, {"run_name": ""}, "run_name is empty"),
    (EvalConfig, {"every": -1}, "eval.every=-1"),
    (EvalConfig, {"batch_size": 0}, "eval.batch_size=0"),
    (EvalConfig, {"patience": -1}, "eval.patience=-1"),
    (EvalConfig, {"max_tokens": 1}, "eval.max_tokens=1"),
    (EvalConfig, {"patience": 2}, "with eval.every=0"),
    (EvalConfig, {"stride": 1024}, "eval.data.seq_len - 1"),
    *(
        (TrainConfig, {"eval": evaluation}, f"eval.{name} without eval.data")
        for name, evaluation in (
            ("every", EvalConfig(every=2)),
            ("stride", EvalConfig(stride=2)),
            ("max_tokens", EvalConfig(max_tokens=2)),
        )
    ),
    (EvalConfig, {"stride": 8, "data": DataConfig(path="d", separate=True)}, "eval.data.separate"),
    (DataConfig, {"holdout_share": 1.0}, "data.holdout_share=1.0"),
    (DataConfig, {"holdout_share": 0.1, "holdout_every": 3}, "one of the two"),
    (DataConfig, {"separate": True, "join": "newline"}, "data.separate with data.join=newline"),
    (DataConfig, {"num_proc": 0}, "data.num_proc=0"),
    (DataConfig, {"mix": {"a": SourceConfig(path="a", weight=1)}}, "data.path beside data.mix"),
    (DataConfig, {"path": (), "mix": {}}, "data.mix is empty"),
    (DataConfig, {"path": ("a", "")}, "has an empty entry"),
    (SourceConfig, {"weight": 0.0}, "weight=0.0 of a"),
    (SourceConfig, {"path": ()}, "has no path"),
    (PruneConfig, {"data": DataConfig(path="d", separate=True)}, "only training packs"),
    (EvaluateConfig, {"data": DataConfig(path="d", separate=True)}, "only training packs"),
    (EvaluateConfig, {"data": DataConfig(mix={"a": SourceConfig(path="a", weight=1)})}, "measured by itself"),
    (BaselineConfig, {"rank": 0}, "baseline.rank=0"),
    (BaselineConfig, {"alpha": 0.0}, "baseline.alpha=0.0"),
    (BaselineConfig, {"dropout": 1.0}, "baseline.dropout=1.0"),
    (BaselineConfig, {"sequences": 0}, "baseline.sequences=0"),
    (TrainConfig, {"method": "spp", "seft": SeftConfig(density=0.2)}, "seft.density=0.2 with method=spp"),
    (TrainConfig, {"method": "spiel", "seft": SeftConfig(adapt="magnitude")}, "seft.adapt=magnitude with method=spiel"),
    (TrainConfig, {"method": "lora", "seft": SeftConfig(pattern="2:4")}, "seft.pattern=2:4 with method=lora"),
    (TrainConfig, {"method": "spp", "baseline": BaselineConfig(dropout=0.1)}, "only lora, lora_merged read it"),
    (TrainConfig, {"baseline": BaselineConfig(rank=4)}, "baseline.rank=4 with method=seft"),
    (TrainConfig, {"method": "lora", "deepspeed": "zero3.json"}, "deepspeed=zero3.json with method=lora"),
    (TrainConfig, {"method": "lora", "replicas": 2}, "replicas=2 with method=lora"),
    (TrainConfig, {"method": "lora", "offload": True}, "offload with method=lora"),
    (TrainConfig, {"method": "lora", "packing": "resident"}, "packing=resident with method=lora"),
    (TrainConfig, {"method": "lora", "trace": True}, "trace with method=lora"),
    (PruneConfig, {"sparsity": 1.0}, "sparsity=1.0"),
    (PruneConfig, {"sparsity": 0.0}, "sparsity=0.0"),
    (PruneConfig, {"sequences": 0}, "sequences=0"),
    (PruneConfig, {"data": None}, "calibration text"),
    (PruneConfig, {"output": ""}, "output"),
    (PruneConfig, {"owl_threshold": 0.0}, "owl_threshold=0.0"),
    (PruneConfig, {"owl_lambda": 1.0}, "owl_lambda=1.0"),
    (PruneConfig, {"dampening": 0.0}, "dampening=0.0"),
    (PruneConfig, {"layer_ratios": ""}, "layer_ratios is empty"),
    (PruneConfig, {"mask": "m.safetensors"}, "method=wanda with mask"),
    (PruneConfig, {"method": "mask"}, "method=mask with mask=None"),
    (PruneConfig, {"pattern": "4:2"}, "pattern=4:2"),
    (PruneConfig, {"pattern": "half"}, "pattern=half"),
    (PruneConfig, {"pattern": "2:4", "sparsity": 0.6}, "needs sparsity 0.5"),
    (PruneConfig, {"pattern": "2:4", "group": "row"}, "group=row with pattern"),
    (PruneConfig, {"pattern": "2:4", "layer_ratios": "owl"}, "layer_ratios=owl with pattern"),
    (PruneConfig, {"method": "none", "sparsity": 0.5}, "method=none with sparsity"),
    (PruneConfig, {"method": "magnitude", "layer_ratios": "owl", "data": None}, "calibration text"),
    (PruneConfig, {"method": "sparsegpt", "group": "global"}, "group=global with method=sparsegpt"),
    (PruneConfig, {"method": "curvature", "group": "row"}, "method=curvature with group=row"),
    (PruneConfig, {"method": "curvature", "pattern": "2:4"}, "method=curvature with pattern=2:4"),
    (PruneConfig, {"method": "curvature", "data": None}, "method=curvature without data"),
    (PruneConfig, {"group": "global", "layer_ratios": "owl"}, "group=global with layer_ratios"),
    (PruneConfig, {"method": "none", "compensate": True}, "compensate with method=none"),
    (PruneConfig, {"method": "none", "layer_ratios": "owl", "data": None}, "method=none with sparsity"),
    (PruneConfig, {"method": "magnitude", "compensate": True, "data": None}, "compensate=True without data"),
    (PruneConfig, {"method": "mask", "mask": "m", "compensate": True, "data": None}, "compensate=True without data"),
    (EvaluateConfig, {"models": {}}, "models is empty"),
    (EvaluateConfig, {"batch_size": 0}, "batch_size=0"),
    (EvaluateConfig, {"threads": 0}, "threads=0"),
    (EvaluateConfig, {"max_tokens": 1}, "max_tokens=1"),
    (EvaluateConfig, {"data": None}, "neither data nor tasks"),
    (EvaluateConfig, {"data": None, "tasks": "boolq", "stride": 8}, "stride=8 without data"),
    (EvaluateConfig, {"tasks": "boolq,,arc_easy"}, "tasks="),
    (EvaluateConfig, {"tasks": "boolq", "task_files": {"arc_easy": "f"}}, "task_files names arc_easy"),
    (EvaluateConfig, {"limit": 3}, "limit without tasks"),
    (EvaluateConfig, {"chat_template": True}, "chat_template without tasks"),
    (EvaluateConfig, {"tasks": "boolq", "fewshot": -1}, "fewshot=-1"),
    (EvaluateConfig, {"tasks": "boolq", "limit": 0}, "limit=0"),
    (ClusterConfig, {"nodes": 0}, "cluster.nodes=0"),
    (ClusterConfig, {"gpus_per_node": 0}, "cluster.gpus_per_node=0"),
    (ClusterConfig, {"memory_gb": 0.0}, "cluster.memory_gb=0.0"),
    (ClusterConfig, {"tflops": -1.0}, "cluster.tflops=-1.0"),
    (ClusterConfig, {"intra_gb_s": 0.0}, "cluster.intra_gb_s=0.0"),
    (ClusterConfig, {"inter_gb_s": 0.0}, "cluster.inter_gb_s=0.0"),
    (ClusterConfig, {"mfu": 1.5}, "cluster.mfu=1.5"),
    (ClusterConfig, {"sampled_share": 0.0}, "cluster.sampled_share=0.0"),
    (ClusterConfig, {"link_share": 0.0}, "cluster.link_share=0.0"),
    (ClusterConfig, {"fragmentation": 1.0}, "cluster.fragmentation=1.0"),
    (ClusterConfig, {"reserve_gb": -1.0}, "cluster.reserve_gb=-1.0"),
    (PlanConfig, {"model": ""}, "model is empty"),
    (PlanConfig, {"sparsity": 1.0}, "sparsity=1.0"),
    (PlanConfig, {"sparsity": 0.999}, "seft.density=0.01 with sparsity=0.999"),
    (PlanConfig, {"steps": 0}, "steps=0"),
    (PlanConfig, {"batch_size": 0}, "batch_size=0"),
    (PlanConfig, {"lora_rank": 0}, "lora_rank=0"),
    (PlanConfig, {"global_batch": 0}, "global_batch=0"),
    (PlanConfig, {"seq_len": 1}, "seq_len=1"),
    (PlanConfig, {"save_rates": "r.json"}, "save_rates=r.json with cluster.gpu=H100-80GB"),
    (ReproduceConfig, {"output": ""}, "output is empty"),
    (ReproduceConfig, {"layouts": " "}, "layouts is empty"),
    (ReproduceConfig, {"runs": 0}, "runs=0"),
    (SweepConfig, {"folder": ""}, "folder is empty"),
    (StudyConfig, {"output": ""}, "output is empty"),
    *((StudyConfig, {name: empty}, name) for name, empty in (("bases", {}), ("methods", {}), ("seeds", ()))),
    (StudyConfig, {"tokens": 0}, "tokens=0"),
    (StudyConfig, {"seeds": (0, 0)}, "seeds=[0, 0]"),
    (StudyConfig, {"jobs": 0}, "jobs=0"),
    (StudyConfig, {"threads": 0}, "threads=0"),
    (StudyConfig, {"base": "x"}, "one of b"),
    (StudyConfig, {"reference": "x"}, "one of m"),
]


@pytest.mark.parametrize(("config_class", "values", "word"), BAD, ids=[f"{c.__name__}-{v}" for c, v, _ in BAD])
def test_a_bad_value_is_named_with_what_is_needed(config_class: type, values: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match="needs") as caught:
        config_class(**{**NEEDED[config_class], **values})
    assert word in str(caught.value)


def test_every_check_is_raised_above() -> None:
    """Counts the checks in the source: a new one needs a line in BAD."""
    files = [path for path in Path(str(config.__file__)).parent.glob("*.py") if path.name != "checks.py"]
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    in_loop = 5 - 1 + 3 - 1 + 4 - 1  # checks that run for five, three and four names
    assert len(re.findall(r"\bcheck\(", source)) + in_loop <= len(BAD)


@pytest.mark.parametrize("config_class", NEEDED, ids=lambda c: c.__name__)
def test_defaults_pass_and_nothing_can_be_changed(config_class: type) -> None:
    made = config_class(**NEEDED[config_class])
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.path = "x"
    with pytest.raises(TypeError):
        config_class("positional")


@pytest.mark.parametrize(
    ("values", "last"),
    [
        ({}, None),  # length unknown
        ({"steps": 100, "interval": 8}, 80),  # 80 % of the steps
        ({"steps": 100, "interval": 8, "end": 99}, 96),
        ({"steps": 100, "interval": 8, "begin": 81}, 0),  # none fits
        ({"steps": 2, "interval": 1}, 1),
        ({"steps": 100, "static": True}, 0),
    ],
)
def test_last_evolution(values: dict[str, Any], last: int | None) -> None:
    assert SeftConfig(**values).last_evolution == last


def test_methods_that_are_settings_of_seft() -> None:
    given = {**NEEDED[TrainConfig], "seft": SeftConfig(density=0.05, reactivation=0.0)}
    resolved = TrainConfig(**given, method="seft_static").with_method_settings()
    assert (
        resolved.seft == SeftConfig(density=0.05, reactivation=0.0, static=True)
        and resolved.with_method_settings() == resolved
    )
    assert resolved.is_seft and TrainConfig(**given).with_method_settings() == TrainConfig(**given)
    assert not TrainConfig(**NEEDED[TrainConfig], method="none").is_seft


ARGV = ["--model.path", "m", "--data.path", "d", "--output", "o"]


@pytest.mark.parametrize("extra", [["--seft.densty", "0.1"], ["--nothing", "1"], ["--seft.density", "much"]])
def test_unknown_and_misspelt_options_are_refused(extra: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(TrainConfig, ARGV + extra)
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert extra[0].removeprefix("--").split(".")[-1] in said and "Traceback" not in said


def test_unknown_keys_in_a_recipe_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seft:\n  density: 0.1\n  budget: 3\n")
    with pytest.raises(SystemExit):
        parse(TrainConfig, ["--config", str(recipe), *ARGV])
    assert "budget" in capsys.readouterr().err


def test_the_command_line_wins_over_a_recipe_and_yaml_reads_back(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: 50\nseft:\n  density: 0.1\n  interval: 5\noptim:\n  betas: [0.8, 0.9]\n")
    made = parse(TrainConfig, ["--config", str(recipe), *ARGV, "--seft.interval", "7"])
    assert (made.steps, made.seft.density, made.seft.interval, made.optim.betas) == (50, 0.1, 7, (0.8, 0.9))
    recipe.write_text(to_yaml(made))
    assert parse(TrainConfig, ["--config", str(recipe)]) == made
    assert yaml.safe_load(to_yaml(made))["seft"]["interval"] == 7


@pytest.mark.parametrize("config_class", [TrainConfig, PruneConfig, EvaluateConfig], ids=lambda c: c.__name__)
def test_help_says_what_every_option_means(config_class: type, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(config_class, ["--help"])
    assert caught.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(config_class):
        assert f"--{field.name}" in said
    assert "Traceback" not in said
    if config_class is TrainConfig:
        assert "Share of each target weight's positions that carry a trainable delta" in said
