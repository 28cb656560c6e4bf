"""Files and options that are wrong on purpose: each program ends soon, with one message that names them."""

import contextlib
import io
import json
import math
import os
import signal
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from seft_dist.backends.deepspeed import ds_optimizer_args
from seft_dist.config import ClusterConfig, DataConfig, ModelConfig, PlanConfig, SweepConfig, TrainConfig
from seft_dist.modules import targets
from seft_dist.modules.targets import find_targets
from seft_dist.planning.architectures import ModelShapes, find_architecture
from seft_dist.planning.hardware import GPUS, gpu_rates, read_rates, write_rates
from seft_dist.planning.plan import make_plan
from seft_dist.pruning.owl import read_sparsities
from seft_dist.results.report import read_run
from seft_dist.results.sweep import read_sweep, write_sweep
from seft_dist.session.cli import parse, run
from seft_dist.training.ds_config import DsConfig, read_ds_config
from tests.test_config import NEEDED
from tests.test_sweep import make_run

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.fixture(autouse=True)
def alarm() -> Iterator[None]:
    """Let a test that would never end fail."""

    def stop(*_: Any) -> None:
        pytest.fail("does not end")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def said(command: Callable[[], Any]) -> tuple[int, str]:
    """Exit code and message of a command; anything but one message is an error here."""
    with contextlib.redirect_stderr(io.StringIO()) as printed, pytest.raises(SystemExit) as ended:
        run(command)
    return int(str(ended.value.code)), printed.getvalue()


TRAIN = ["--model.path=m", "--output=o", "--data.path=d"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB + "seft: *i\n", "values once aliases are expanded"),
        ("seft: " + "[" * 900 + "]" * 900, "nested too deeply"),
        ("seft: &a {x: *a}\n", "alias inside what it stands for"),
        ("seft: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
        ("[1, 2]", "Unexpected config"),
        ("", "Unexpected config"),
        ("a: \x00", "unacceptable character"),
        ("steps: [1", "steps"),
        ("model: null\n", "model"),
        ("seft: {density: {a: 1}}\n", "seft.density"),
    ],
)
def test_recipes(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    code, printed = said(lambda: parse(TrainConfig, [*TRAIN, "--config", str(tmp_path / "r.yaml")]))
    assert code == 2 and message in printed and len(printed) < 1500 and "Traceback" not in printed


def test_a_recipe_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"steps: \xff\xfe")
    code, printed = said(lambda: parse(TrainConfig, [*TRAIN, "--config", str(tmp_path / "r.yaml")]))
    assert code == 2 and "r.yaml: not UTF-8 text" in printed


@pytest.mark.parametrize("value", ["1e30", "1e400", "nan", "inf", "-inf", "-1", "0", "1e-300", "x", "[1]", ""])
def test_no_such_timeout(value: str) -> None:
    code, printed = said(lambda: parse(TrainConfig, [*TRAIN, f"--timeout={value}"]))
    assert code == 2 and "timeout" in printed


def test_every_number_is_bounded() -> None:
    """10^30 steps, infinite rates, sizes below what fp32 knows: no configuration takes one, and all name the field."""
    seen = 0
    for config_class, needed in NEEDED.items():
        for name, hint in typing.get_type_hints(config_class).items():
            kinds = {hint, *typing.get_args(hint)} & {int, float}
            for value in (10**30, -(10**30), math.inf, math.nan, 1e31, 1e-31, 10**400) if kinds else ():
                with pytest.raises(ValueError, match=name):
                    config_class(**{**needed, name: (value, value) if name == "betas" else value})
                seen += 1
    assert seen > 7 * 50


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "valid dictionary"),
        ("null", "valid dictionary"),
        ('"zero3"', "valid dictionary"),
        ("{", "is no JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' + "[" * 50 + "]" * 50 + "}", "deeper than 20 levels"),
        ('{"zero_optimization": []}', "zero_optimization"),
        ('{"zero_optimization": null}', "zero_optimization"),
        ('{"zero_optimization": {"stage": 7}}', "zero_optimization.stage"),
        ('{"zero_optimization": {"stage": "3"}}', "zero_optimization.stage"),
        ('{"zero_optimization": {"stage": 3, "zero_hpz_partition_size": "two"}}', "zero_hpz_partition_size"),
        ('{"bf16": true}', "bf16"),
        ('{"bf16": {"enabled": "yes"}}', "bf16.enabled"),
        ('{"bfloat16": {"enabled": true}}', "call it bf16"),
        ('{"optimizer": "AdamW"}', "optimizer"),
        ('{"optimizer": {"type": "AdamW", "params": {"lr": "fast"}}}', "lr"),
        ('{"optimizer": {"type": "AdamW", "params": {"lr": NaN}}}', "optim.lr=nan"),
        ('{"optimizer": {"type": "AdamW", "params": {"lr": -1}}}', "optim.lr=-1"),
        ('{"optimizer": {"type": "AdamW", "params": {"betas": [0.9]}}}', "needs two rates"),
        ('{"optimizer": {"type": "AdamW", "params": {"betas": 0.9}}}', "betas"),
        ('{"gradient_clipping": "tight"}', "gradient_clipping"),
        ('{"gradient_clipping": -1}', "optim.max_grad_norm=-1"),
        ('{"gradient_clipping": Infinity}', "optim.max_grad_norm=inf"),
        ('{"train_batch_size": "many"}', "train_batch_size"),
        ('{"train_micro_batch_size_per_gpu": 1.5}', "train_micro_batch_size_per_gpu"),
    ],
)
def test_ds_configs(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(content)
    config = TrainConfig(
        model=ModelConfig(path="m"), data=DataConfig(path="d"), output="o", deepspeed=str(file), global_batch=1
    )
    code, printed = said(lambda: read_ds_config(config, 1))
    assert code == 2 and message in printed and "ds.json" in printed
    if not content.startswith('{"train'):
        assert said(lambda: ds_optimizer_args(str(file)))[0] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "content",
    [
        {"zero_optimization": {"stage": 3, "overlap_comm": "banana"}},
        {"steps_per_print": 1, "bf16": {"enabled": True}, "fp16": {"enabled": False}, "data_types": 5},
    ],
)
def test_what_deepspeed_refuses_is_said_before_anything_is_loaded(content: dict[str, Any]) -> None:
    sizes = {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    code, printed = said(lambda: DsConfig(sizes | content, {}).check())
    assert code == 2 and "DeepSpeed refuses the ds_config" in printed


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("^(a|a)+[^a]$", "repetitions inside repetitions"),
        ("(a|a)*(a|a)*(a|a)*(a|a)*b{1000}$|(.*.*.*.*.*.*.*.*)*!", "repetitions inside repetitions"),
        ("(", "is no regular expression"),
        ("*", "is no regular expression"),
        ("(" * 3000 + ")" * 3000, "is no regular expression"),
        ("x" * 10_001, "at most 10000"),
        ("nothing_like_this", "matches no linear"),
    ],
)
def test_patterns_of_targets(pattern: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "_SEARCH_SECONDS", 0.3)
    model = torch.nn.ModuleDict({"a" * 60: torch.nn.Linear(2, 2)})
    code, printed = said(lambda: find_targets(model, pattern))
    assert code == 2 and message in printed and len(printed) < 1000


def test_patterns_know_what_pythons_know() -> None:
    model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in ("q_proj", "k_proj", "head")})
    assert list(find_targets(model, r"^(?!head)\w+$")) == ["q_proj", "k_proj"]
    assert list(find_targets(model, r"(?P<kind>[qk])_proj$")) == ["q_proj", "k_proj"]


LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "vocab_size": 64, "max_position_embeddings": 128}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "valid dictionary"),
        ([], "valid dictionary"),
        ({}, "model_type"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"model_type": "nothing"}, "no model_type 'nothing'"),
        ({**LLAMA, "num_hidden_layers": 100_000}, "num_hidden_layers is 100000: needs a whole number up to"),
        ({**MIXTRAL, "num_local_experts": 10**12}, "num_local_experts is 1000000000000"),
        ({**LLAMA, "hidden_size": 10**30}, "hidden_size"),
        ({**LLAMA, "hidden_size": -32}, "hidden_size is -32"),
        ({**LLAMA, "num_hidden_layers": "two"}, "num_hidden_layers is 'two'"),
        ({**LLAMA, "num_attention_heads": 0}, "llama"),
        ({**LLAMA, "num_attention_heads": 5}, "config.json"),
        ({**LLAMA, "hidden_act": "nothing"}, "llama"),
        ({**LLAMA, "dtype": "float17"}, "llama"),
    ],
)
def test_configurations_of_a_plan(config: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    recipe = PlanConfig(model=str(file), seq_len=64, cluster=ClusterConfig(nodes=1, gpus_per_node=2))
    code, printed = said(lambda: make_plan(recipe))
    assert code == 2 and message in printed and "Traceback" not in printed


@pytest.mark.parametrize("config", [LLAMA, MIXTRAL], ids=["llama", "mixtral"])
def test_configurations_that_can_be_planned(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert ModelShapes.of(find_architecture(str(tmp_path)), "all-linear").target_numel > 10_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rates: [], "valid dictionary"),
        (lambda rates: {"float32": rates["float32"]}, "bfloat16"),
        (lambda rates: rates | {"float32": 5}, "float32"),
        (lambda rates: rates | {"float32": rates["float32"] | {"matmul": "fast"}}, "matmul is 'fast'"),
        (lambda rates: rates | {"float32": rates["float32"] | {"matmul": 0.0}}, "matmul is 0.0"),
        (lambda rates: rates | {"float32": rates["float32"] | {"host": float("nan")}}, "host is nan"),
        (lambda rates: rates | {"float32": rates["float32"] | {"memory": None}}, "memory is None"),
        (lambda rates: rates | {"float32": rates["float32"] | {"shared": 1.0}}, "shared is 1.0"),
        (lambda rates: rates | {"float32": rates["float32"] | {"more": 1.0}}, "more"),
    ],
)
def test_files_of_rates(change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    rates = {kind: gpu_rates(ClusterConfig(gpu=next(iter(GPUS))), kind, 0.01) for kind in ("float32", "bfloat16")}
    file = tmp_path / "rates.json"
    write_rates(str(file), rates)
    assert read_rates(str(file)) == rates
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    code, printed = said(lambda: read_rates(str(file)))
    assert code == 2 and message in printed and "rates.json" in printed


DAMAGED = {"empty": "", "cut": '{"step', "a list": "[]", "null": "null", "text": '"x"', "deep": "[" * 100_000}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((name, content) for name in ("eval.json", "metrics.jsonl") for content in DAMAGED),
        *(("config.yaml", content) for content in ("empty", "cut", "a list", "null", "text")),
    ],
)
def test_damaged_files_of_a_sweep(name: str, content: str, tmp_path: Path) -> None:
    make_run(tmp_path / "a", loss=1.0, perplexity=2.0)
    (tmp_path / "a" / name).write_text(f"{DAMAGED[content]}\n{{}}" if name == "metrics.jsonl" else DAMAGED[content])
    code, printed = said(lambda: read_sweep(SweepConfig(folder=str(tmp_path))))
    assert code == 2 and f"a/{name}" in printed and "Traceback" not in printed
    code, printed = said(lambda: read_run(tmp_path / "a"))
    assert code == 2 and "a/" in printed


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_result_is_none_in_a_sweep_and_named_in_a_report(content: str, tmp_path: Path) -> None:
    make_run(tmp_path / "a", loss=1.0, perplexity=2.0)
    (tmp_path / "a" / "result.json").write_text(DAMAGED[content])
    (run,) = read_sweep(SweepConfig(folder=str(tmp_path))).runs
    assert not run.finished
    code, printed = said(lambda: read_run(tmp_path / "a"))
    assert code == 2 and "a/" in printed


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("result.json", {"steps": -1, "loss": 1.0, "seconds": 1.0, "sparsity": {"final": 0.6, "layers_off_target": 0}}),
        (
            "result.json",
            {"steps": 2, "loss": "low", "seconds": 1.0, "sparsity": {"final": 0.6, "layers_off_target": 0}},
        ),
        ("result.json", {"steps": 2, "loss": 1.0, "seconds": 1.0, "sparsity": 0.6}),
        ("eval.json", {"models": ["repaired"]}),
        ("eval.json", {"models": {"repaired": {"perplexity": "low"}}}),
        ("eval.json", {"models": {"repaired": {"perplexity": 1.0, "policy": "mine"}}}),
    ],
)
def test_files_of_a_sweep_with_other_types(name: str, content: dict[str, Any], tmp_path: Path) -> None:
    make_run(tmp_path / "a", loss=1.0, perplexity=2.0)
    (tmp_path / "a" / name).write_text(json.dumps(content))
    code, printed = said(lambda: read_sweep(SweepConfig(folder=str(tmp_path))))
    assert code == 2 and f"a/{name} does not hold what is needed" in printed


@pytest.mark.parametrize(
    ("text", "message"),
    [(BOMB, "aliases"), ("a: {b", "neither JSON nor YAML"), ("[0.5]", "needs names"), ("a: .nan", "'a'")],
)
def test_files_of_layer_ratios(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "ratios.yaml").write_text(text)
    code, printed = said(lambda: read_sparsities(str(tmp_path / "ratios.yaml"), ["a"], 0.5))
    assert code == 2 and message in printed


def test_a_full_disk_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table that was there stays, whole, and no part of the new one."""
    make_run(tmp_path / "a", loss=1.0)
    config = SweepConfig(folder=str(tmp_path), figure=False)
    write_sweep(read_sweep(config), config)
    before = (tmp_path / "sweep.csv").read_bytes()
    make_run(tmp_path / "b", loss=2.0)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, printed = said(lambda: write_sweep(read_sweep(config), config))
    assert code == 1 and "No space left on device" in printed
    assert (tmp_path / "sweep.csv").read_bytes() == before and not list(tmp_path.glob("*.part"))
