"""Wrong model folders: each is refused by one message, before anything is built, read whole or written."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tests.preload  # noqa: F401
from seft_dist.config import DataConfig, EvaluateConfig, ModelConfig, PruneConfig
from seft_dist.evaluation.evaluation import evaluate
from seft_dist.export.delta import read_delta
from seft_dist.export.export import pack_model, write_model
from seft_dist.export.folders import new_folder
from seft_dist.io import weight_files
from seft_dist.io.models import build_meta_model
from seft_dist.io.packed import INDEX as PACKED
from seft_dist.io.source import Source, open_source
from seft_dist.io.weight_files import INDEX
from seft_dist.pruning.prune import prepare
from tests.folders import model_folder

CONFIGS: dict[str, tuple[Any, str]] = {
    "null": (None, "does not hold what is needed"),
    "a list": ([1], "does not hold what is needed"),
    "a text": ("llama", "does not hold what is needed"),
    "no model type": ({"model_type": None}, "model_type"),
    "a model type that is a number": ({"model_type": 3}, "model_type"),
    "an unknown model type": ({"model_type": "llamma"}, "no model that transformers knows"),
    "layers as text": ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
    "layers that are not whole": ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5"),
    "layers below 0": ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
    "layers without end": ({"num_hidden_layers": 10**5}, "num_hidden_layers is 100000: .* 21 tensors"),
    "true layers": ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    "experts without end": ({"model_type": "mixtral", "num_local_experts": 10**12}, "num_local_experts"),
    "heads of any size": ({"head_dim": 10**12}, "head_dim is 1000000000000"),
    "a vocabulary of any size": ({"vocab_size": 2**62}, "vocab_size"),
    "a width as a list": ({"hidden_size": [32, "x"]}, "hidden_size is 'x'"),
    "no width": ({"hidden_size": 0}, "."),
    "no heads": ({"num_attention_heads": 0}, "."),
    "an unknown type": ({"dtype": "float33"}, "no model that transformers knows"),
    "an unknown activation": ({"hidden_act": "rm -rf"}, "cannot build this model"),
    "rotary settings as text": ({"rope_parameters": "x"}, "."),
    "an unknown rotary type": ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1.0}}, "."),
    "other heads": ({"num_key_value_heads": 3}, "."),
    "another width": ({"intermediate_size": 64}, "check config.json"),
    "another number of layers": ({"num_hidden_layers": 1}, "does not fit LlamaForCausalLM"),
    "quantized": ({"quantization_config": {"quant_method": "fp8"}}, "is quantized"),
    "sparse in an old way": ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
}


def opened(folder: Path) -> Source:
    return open_source(ModelConfig(path=str(folder)))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("sound") / "model")


def copied(sound: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in sound.iterdir():
        (folder / file.name).symlink_to(file)
    return folder


def replaced(file: Path, content: str | bytes) -> None:
    file.unlink(missing_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations(name: str, sound: Path, tmp_path: Path) -> None:
    change, message = CONFIGS[name]
    folder = copied(sound, tmp_path / "model")
    settings = json.loads((sound / "config.json").read_text())
    replaced(folder / "config.json", json.dumps(settings | change if isinstance(change, dict) else change))
    with pytest.raises(ValueError, match=message):
        build_meta_model(opened(folder))
    with pytest.raises(ValueError, match=message):
        prepare(PruneConfig(model=ModelConfig(path=str(folder)), method="magnitude", output=str(tmp_path / "out")))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("content", ["", "{", "[" * 10**5, "\x00", b"\xff\xfe"])
def test_configurations_that_are_no_json(content: str | bytes, sound: Path, tmp_path: Path) -> None:
    folder = copied(sound, tmp_path / "model")
    for name in ("config.json", "generation_config.json"):
        replaced(folder / name, content)
        with pytest.raises(ValueError, match=name):
            opened(folder)
        replaced(folder / name, (sound / name).read_bytes())


def test_pipes_are_not_waited_for(sound: Path, tmp_path: Path) -> None:
    folder = copied(sound, tmp_path / "model")
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(ValueError, match="needs a regular file"):
        opened(folder)
    os.mkfifo(tmp_path / "delta")
    with pytest.raises(ValueError, match="is no file"):
        read_delta(tmp_path / "delta")


INDEXES: dict[str, tuple[Any, str]] = {
    "null": (None, "does not hold what is needed"),
    "no map": ({}, "weight_map"),
    "a map that is a list": ({"weight_map": ["model.safetensors"]}, "weight_map"),
    "names that are no text": ({"weight_map": {"a": 7}}, "weight_map.a"),
    "nothing": ({"weight_map": {}}, "names no tensor"),
    "a folder above": ({"weight_map": {"a": "../model.safetensors"}}, "no file of its folder"),
    "an absolute path": ({"weight_map": {"a": "/etc/hostname"}}, "no file of its folder"),
    "the folder itself": ({"weight_map": {"a": "."}}, "no file of its folder"),
    "a file that is not there": ({"weight_map": {"a": "gone.safetensors"}}, "lacks gone.safetensors"),
    "a file that is none": ({"weight_map": {"a": "config.json"}}, "not a whole safetensors file"),
}


@pytest.mark.parametrize("name", INDEXES)
@pytest.mark.parametrize("index", [INDEX, PACKED])
def test_indexes(index: str, name: str, sound: Path, tmp_path: Path) -> None:
    content, message = INDEXES[name]
    folder = copied(sound, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    replaced(tmp_path / "model.safetensors", (sound / "model.safetensors").read_bytes())
    head = {"format": "seft_dist packed", "version": 1} if index == PACKED else {}
    replaced(folder / index, json.dumps(head | content if isinstance(content, dict) else content))
    with pytest.raises(ValueError, match=message):
        opened(folder)


def test_weight_files_without_an_end_or_a_tensor(sound: Path, tmp_path: Path) -> None:
    folder = copied(sound, tmp_path / "model")
    names = [f"model.layers.0.mlp.experts.{number}.up_proj.weight" for number in (0, 10**12)]
    (folder / "model.safetensors").unlink()
    save_file({name: torch.ones(2, 2) for name in names}, folder / "model.safetensors")
    assert opened(folder).weights.fused == {}
    save_file({}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="without a tensor"):
        opened(folder)
    (folder / "model.safetensors").unlink()
    for number in (1, 2):
        save_file({"a": torch.ones(1)}, folder / f"{number}.safetensors")
    replaced(folder / INDEX, json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    with pytest.raises(ValueError, match=r"a is in .*1.safetensors and in .*2.safetensors"):
        opened(folder)


def make_file(path: Path) -> None:
    path.write_text("x")


def make_link(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


@pytest.mark.parametrize("make", [make_file, make_link, Path.mkdir])
@pytest.mark.parametrize("ending", ["", ".part"])
def test_outputs_that_are_taken(ending: str, make: Callable[[Path], None], sound: Path, tmp_path: Path) -> None:
    make(tmp_path / f"out{ending}")
    if ending and make is Path.mkdir:  # left by a process that was killed
        write_model(opened(sound), tmp_path / "out")
        return
    with pytest.raises(ValueError, match="exists already|leads nowhere|is no folder"):
        write_model(opened(sound), tmp_path / "out")
    if not ending:
        config = PruneConfig(model=ModelConfig(path=str(sound)), method="magnitude", output=str(tmp_path / "out"))
        with pytest.raises(ValueError, match="output=.*(exists already|leads nowhere)"):
            prepare(config)
    assert [path.name for path in tmp_path.iterdir()] == [f"out{ending}"]


@pytest.mark.parametrize("export", [write_model, pack_model])
def test_a_full_disk_is_an_error_of_the_system(
    export: Callable[[Source, Path], Any], sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"begun")
        raise weight_files.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(weight_files, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        export(opened(sound), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_fp16_names_the_option_that_is_there(sound: Path, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "half", torch.float16)
    with pytest.raises(ValueError, match="choose --model.dtype float32"):
        opened(folder)
    with pytest.raises(ValueError, match="choose --dtype float32"):
        evaluate(EvaluateConfig(models={"half": str(folder)}, data=DataConfig(path="none.jsonl")), show=False)


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), new_folder(tmp_path / "out") as folder:
        (folder / "begun").write_text("x")
        raise KeyError("x")
    assert not list(tmp_path.iterdir())
