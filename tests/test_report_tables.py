"""Tables of the report's page that need no run."""

from pathlib import Path
from typing import Any

from seft_dist.results.page.record import RunRecord
from seft_dist.results.page.tables import differences


def record(config: dict[str, Any], result: dict[str, Any] | None = None) -> RunRecord:
    return RunRecord(Path("run"), "run", config=config, result=result or {})


def test_a_group_that_a_run_lacks_is_one_row() -> None:
    data = {"path": "held.jsonl", "seq_len": 128, "kind": "auto"}
    plain = record({"optim": {"lr": 1e-3}, "eval": {"data": None, "every": 5}})
    measured = record({"optim": {"lr": 1e-3}, "eval": {"data": data, "every": 5}})
    assert differences([plain, measured]).rows == [["eval.data", "-", "held.jsonl"]]
    longer = record({"optim": {"lr": 2e-3}, "eval": {"data": data | {"seq_len": 512}, "every": 5}})
    assert differences([plain, measured, longer]).rows == [
        ["optim.lr", "0.001", "0.001", "0.002"],
        ["eval.data", "-", "held.jsonl", "held.jsonl"],
        ["eval.data.seq_len", "-", "128", "512"],
    ]
    assert differences([measured, longer]).rows == [["optim.lr", "0.001", "0.002"], ["eval.data.seq_len", "128", "512"]]


def test_the_exported_step_is_known_if_it_is_not_the_last() -> None:
    best = {"validation": {"best": {"step": 20}}}
    assert record({"export": "best"}, best).exported_step == 20
    assert record({"export": "last"}, best).exported_step is None
    assert record({"export": "best"}).exported_step is None
