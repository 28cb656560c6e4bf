"""Run folders after something went wrong: incomplete starts, damaged files, a second writer."""

import ctypes
import dataclasses
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import tests.preload  # noqa: F401
from seft_dist.config import TrainConfig
from seft_dist.files.writing import PART
from seft_dist.training import writer_lock
from seft_dist.training.manifest import read_manifest
from seft_dist.training.run_folder import check_run_folder, is_finished, open_run_folder
from seft_dist.training.step_lines import StepLines, as_ranges
from seft_dist.training.trace import read_trace
from seft_dist.training.trainer import train
from seft_dist.training.writer_lock import LOCK, only_writer
from tests.runs import digests, make_config, records, run_config, run_train

ROOT = Path(__file__).resolve().parents[1]


def test_a_run_that_was_killed_at_its_start_can_begin(inputs: Path, tmp_path: Path) -> None:
    config = make_config(inputs, tmp_path)
    for name in ("checkpoints", "slurm"):
        (tmp_path / name).mkdir()
    for name in ("config.yaml.part", LOCK):
        (tmp_path / name).write_text("")
    check_run_folder(config)
    (tmp_path / "checkpoints" / "mine").write_text("")
    with pytest.raises(ValueError, match=r"holds no run: choose another output \(found checkpoints\)"):
        check_run_folder(config)


def test_the_configuration_is_there_before_anything_else(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(inputs, tmp_path / "run")
    mkdir = Path.mkdir

    def killed(path: Path, *args: object, **options: object) -> None:
        if path.name == "checkpoints":
            raise KeyboardInterrupt
        mkdir(path, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", killed)
    with pytest.raises(KeyboardInterrupt):
        open_run_folder(config)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]
    check_run_folder(config)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("model", lambda path: path.write_text(""), "model is a file: the run writes a folder there"),
        ("model", lambda path: path.symlink_to(path.parent), "model is a link"),
        ("model", lambda path: path.symlink_to(path.parent / "nowhere"), "model is a link"),
        ("checkpoints", lambda path: path.write_text(""), "checkpoints is a file"),
        ("metrics.jsonl", lambda path: path.mkdir(), "metrics.jsonl is a folder: the run writes a file there"),
        ("delta.safetensors", lambda path: path.mkdir(), "delta.safetensors is a folder"),
    ],
)
def test_what_only_the_end_would_meet_is_refused_at_once(
    name: str, make: Callable[[Path], object], message: str, inputs: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text("")
    make(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        check_run_folder(make_config(inputs, tmp_path))


def shell_says_finished(file: Path) -> bool:
    common = (ROOT / "slurm" / "common.sh").read_text()
    function = common[common.index("finished() {") :].partition("\n}\n")[0] + "\n}\n"
    return not subprocess.run(["bash", "-c", f'{function}finished "$1"', "bash", str(file)], check=False).returncode


@pytest.mark.parametrize("content", [None, "", "\n", "{", '{"steps": 3', "\0" * 40, '{"steps": 3}\n'])
def test_a_damaged_result_is_none(content: str | None, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    if content is not None:
        file.write_text(content)
    assert is_finished(tmp_path) == shell_says_finished(file) == (content == '{"steps": 3}\n')


def test_a_full_disk_leaves_whole_records(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of steps that are done stay when they cannot be written anew, and there is no result that is cut short."""
    lines = "".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3))
    (tmp_path / "trace.jsonl").write_text(lines)
    folder, sync = tmp_path / "run", os.fsync

    def full(handle: int) -> None:
        if (tmp_path / f"trace.jsonl{PART}").exists() or (folder / f"result.json{PART}").exists():
            raise OSError(28, "No space left on device")
        sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        StepLines(tmp_path / "trace.jsonl", 2)
    assert (tmp_path / "trace.jsonl").read_text() == lines
    with pytest.raises(OSError, match="No space"):
        train(make_config(inputs, folder, steps=2, batch_size=12))
    assert not (folder / "result.json").exists() and not is_finished(folder)


@pytest.fixture
def done(inputs: Path, tmp_path: Path) -> TrainConfig:
    """A finished run with a trace and the checkpoints of steps 5 and 10."""
    config = run_config(inputs, tmp_path / "run", save_every=5, batch_size=12)
    run_train(config)
    return config


def damage(path: Path, line: int) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    lines[line] = lines[line].replace(b'"', b"'", 1)
    path.write_bytes(b"".join(lines))


def test_damaged_records_stop_no_run(done: TrainConfig, capfd: pytest.CaptureFixture[str]) -> None:
    """Named, put aside, and the run goes on with what can be known; on two ranks, of which one reads."""
    output = Path(done.output)
    before, evolutions = records(output), digests(output)
    damage(output / "metrics.jsonl", 1)
    damage(output / "trace.jsonl", 3)
    (output / "manifest.json").write_text('{"format": "seft_dist mani')
    (output / "result.json").write_text("")  # a full disk
    shutil.rmtree(output / "checkpoints" / "step-00000010")
    run_train(dataclasses.replace(done, batch_size=6), 2)
    said = capfd.readouterr().err
    assert f"{output / 'metrics.jsonl'} had lines that cannot be read: it is now damaged-metrics.jsonl" in said
    assert f"{output / 'metrics.jsonl'} lacks 1 records of the steps up to 5, among them those of steps 2;" in said
    assert f"{output / 'trace.jsonl'} has no line for steps 4" in said and "it is now damaged-manifest.json" in said
    assert f"{output / 'result.json'} cannot be read: it is now damaged-result.json" in said and is_finished(output)
    assert [line["step"] for line in records(output)] == [1, *range(3, 11)]
    assert [line["step"] for line in read_trace(output)] == [1, 2, 3, *range(5, 11)]
    expected = [line["loss"] for line in before if line["step"] != 2]
    assert [line["loss"] for line in records(output)] == pytest.approx(expected, rel=1e-5)
    manifest = read_manifest(output)
    assert [entry["digest"] for entry in manifest["evolutions"]] == evolutions
    assert [entry["first_step"] for entry in manifest["attempts"]] == [6]
    assert manifest["damaged"] == ["damaged-manifest.json"]
    assert len((output / "damaged-metrics.jsonl").read_text().splitlines()) == 10


def test_records_that_are_gone_are_named(done: TrainConfig, capfd: pytest.CaptureFixture[str]) -> None:
    output = Path(done.output)
    (output / "metrics.jsonl").write_text("")
    (output / "result.json").unlink()
    shutil.rmtree(output / "checkpoints" / "step-00000010")
    for _ in range(2):  # the second time it is known
        run_train(done)
        (output / "result.json").unlink()
        said = capfd.readouterr().err
        assert ("lacks 5 records of the steps up to 5, among them those of steps 1-5" in said) == (_ == 0)
    assert [line["step"] for line in records(output)] == list(range(6, 11))


def test_step_lines(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    text = '{"step": 1}\n{"step": 3}\n{"step": 2}\n[1]\n{"a": 1}\n\xff\n{"step": 5}\n{"step": 6'
    path.write_bytes(text.encode("latin-1"))
    lines = StepLines(path, 5)
    assert lines.steps == [1, 3, 5] and lines.put_aside is not None and lines.put_aside.name == "damaged-lines.jsonl"
    lines.add({"step": 6})
    lines.sync()
    lines.close()
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n{"step": 5}\n{"step": 6}\n'
    assert StepLines(path, 4).put_aside is None and path.read_text() == '{"step": 1}\n{"step": 3}\n'
    path.write_text("x\n")
    assert StepLines(path, 1).put_aside == tmp_path / "damaged-lines.jsonl-2"
    assert as_ranges([1, 2, 3, 7, 9, 8]) == "1-3, 7-9" and as_ranges([4]) == "4"


def test_a_damaged_trace_is_named(tmp_path: Path) -> None:
    (tmp_path / "trace.jsonl").write_text(json.dumps({"step": 1, "loss": 2}) + "\n")
    with pytest.raises(ValueError, match=r"line 1 of .*trace\.jsonl is damaged"):
        list(read_trace(tmp_path))


def refused_in_another_process(folder: Path) -> str:
    """Error of a process that does not see this one's names in the kernel, as in another container."""

    def unclaimed(folder: Path, deadline: float) -> object:
        return os.scandir("/")

    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        answer = "not refused"
        try:
            if ctypes.CDLL(None).unshare(0x40000000):  # CLONE_NEWNET; needs root
                writer_lock._claimed_name = unclaimed  # type: ignore[assignment]
            with only_writer(folder):
                pass
        except ValueError as error:
            answer = str(error)
        os.write(writer, answer.encode())
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(writer)
    with os.fdopen(reader) as answer_of:
        return answer_of.read()


def test_two_containers_cannot_write_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_lock, "PATIENCE", 0.2)
    folder = tmp_path / "a" / "run"
    with only_writer(folder):
        said = refused_in_another_process(folder)
        assert said.startswith(f"another run (process {os.getpid()} on ") and f"is writing to {folder}" in said
    assert not (tmp_path / "a").exists()  # nothing was written there
    assert refused_in_another_process(folder) == "not refused"
    folder.mkdir(parents=True)
    (folder / LOCK).write_text("process 1 on elsewhere\n")  # of one that is dead
    with only_writer(folder):
        pass
    assert list(folder.iterdir()) == []


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without(handle: int, how: int) -> None:
        raise OSError(38, "Function not implemented")  # Lustre, mounted without flock

    monkeypatch.setattr(writer_lock.fcntl, "lockf", without)
    with only_writer(tmp_path / "run"):
        assert (
            "has no locks (Function not implemented): a second run is kept out on this machine"
            in capsys.readouterr().err
        )
