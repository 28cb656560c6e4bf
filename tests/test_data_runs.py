"""Data of a run: the day of its start is kept, replaced text is refused, and bad data ends all ranks with one error."""

import datetime
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from seft_dist.config import DataConfig, ModelConfig
from seft_dist.training import run_folder
from tests.chat_templates import LLAMA, unmarked
from tests.folders import text_file
from tests.runs import make_config, run_train
from tests.scripts import run_script
from tests.test_train import as_if_killed, failure
from tests.texts import write_jsonl

ROOT = Path(__file__).parents[1]


class _Day(datetime.date):
    today_is = datetime.date(2031, 3, 9)

    @classmethod
    def today(cls) -> Any:
        return cls.today_is


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_run_keeps_the_day_on_which_it_began(
    world_size: int, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(inputs / "pruned", model)
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 512}))
    (model / "chat_template.jinja").write_text(unmarked(LLAMA))
    turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    data = DataConfig(path=str(write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}] * 24)), seq_len=512)
    config = make_config(
        inputs, tmp_path / "run", model=ModelConfig(path=str(model)), data=data, steps=6, save_every=3, batch_size=4
    )
    monkeypatch.setattr(run_folder, "datetime", SimpleNamespace(date=_Day))
    run_train(config, world_size)
    as_if_killed(tmp_path / "run", 3)
    monkeypatch.setattr(_Day, "today_is", datetime.date(2031, 3, 10))
    run_train(config, world_size)
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["date"]
    assert kept == "2031-03-09"
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert [attempt["config"]["data"]["date"] for attempt in manifest["attempts"]] == ["2031-03-09"] * 2
    assert [attempt["first_step"] for attempt in manifest["attempts"]] == [1, 4]


def test_text_replaced_in_place_is_refused_when_a_run_goes_on(inputs: Path, tmp_path: Path) -> None:
    text, other = text_file(tmp_path / "text.jsonl"), tmp_path / "other.jsonl"
    data = DataConfig(path=str(text), seq_len=16)
    config = make_config(inputs, tmp_path / "run", data=data, steps=6, save_every=3)
    run_train(config)
    as_if_killed(tmp_path / "run", 3)
    other.write_text(text.read_text().replace("w1 ", "w2 ", 1))
    os.utime(other, ns=(text.stat().st_atime_ns, text.stat().st_mtime_ns))
    assert text.stat().st_size == other.stat().st_size
    shutil.copy2(other, text)
    assert "cannot go on with this data: data is " in failure(config)


def test_bad_data_ends_every_rank_with_the_same_message(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "deep.jsonl").write_text('{"text": "a"}\n' + "[" * 100_000)
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, message in {"deep": "line 2 is nested too deeply", "pipe": "is a pipe or a device"}.items():
        data = DataConfig(path=str(tmp_path / f"{name}.jsonl"), seq_len=16)
        assert message in failure(make_config(inputs, tmp_path / "run", data=data, batch_size=6), 2)
        assert not (tmp_path / "run").exists()


def test_the_command_gives_one_message_and_code_2(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "null.jsonl").write_bytes(b'{"te\0xt": "a"}\n')
    options = ["--model.path", str(inputs / "pruned"), "--data.path", str(tmp_path / "null.jsonl")]
    options += ["--data.seq_len", "16"]
    done = run_script("launch/train.py", *options, "--output", tmp_path / "run", "--threads", "1")
    assert done.returncode == 2
    said = f"train.py: error: {tmp_path / 'null.jsonl'}, line 1 has a null byte: it may be damaged or cut short"
    assert said in done.stderr and "Traceback" not in done.stderr
