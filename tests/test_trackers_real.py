"""Trackers that write files, if their packages are installed (the extra ``trackers``): a run goes on in its entry."""

import uuid
from pathlib import Path
from typing import Any

import pytest

from seft_dist.config import TrainConfig
from seft_dist.training.trackers import Trackers
from tests.runs import make_config


def record_twice(config: TrainConfig) -> list[str]:
    """Record steps 1 and 2, and in a further attempt steps 2 and 3; the warnings that were given."""
    said: list[str] = []
    for done, steps in ((0, (1, 2)), (1, (2, 3))):
        each = Trackers(config, done, said.append)
        for step in steps:
            each.log({"step": step, "loss": 5.0 - step, "validation": {"loss": 6.0 - step}}, step)
        each.close()
    return said


def test_mlflow(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow: Any = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path / 'mlruns'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    config = make_config(inputs, tmp_path / "run", trackers="mlflow", project="pruned", run_name="first try")
    (tmp_path / "run").mkdir()
    assert record_twice(config) == []
    client = mlflow.MlflowClient()
    (experiment,) = [one for one in client.search_experiments() if one.name == "pruned"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "first try" and run.data.params["seft.density"] == str(config.seft.density)
    for key, begin in (("loss", 5.0), ("validation.loss", 6.0)):
        history = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, key)}
        assert history == {1: begin - 1, 2: begin - 2, 3: begin - 3}


def test_trackio(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported, perhaps before
    storage: Any = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    project = f"pruned-{uuid.uuid4().hex}"  # no run of an earlier session is in it
    config = make_config(inputs, tmp_path / "run", trackers="trackio", project=project, run_name="first try")
    (tmp_path / "run").mkdir()
    assert record_twice(config) == []
    assert storage.get_runs(project) == ["first try"]
    logs = storage.get_logs(project, "first try")
    assert {log["step"] for log in logs} == {1, 2, 3}
    assert all(log["loss"] == 5.0 - log["step"] for log in logs)
