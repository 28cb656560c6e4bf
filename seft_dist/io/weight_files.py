"""Which safetensors files make up a model, and the writing of one; nothing outside the model's folder, nothing pickled."""

from pathlib import Path

from pydantic import with_config
from safetensors import SafetensorError as SafetensorError  # for other rooms, which do not import the library
from safetensors import safe_open as safe_open
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import TypedDict

from seft_dist.files.reading import LENIENT, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@with_config(LENIENT)
class Index(TypedDict):
    """Which tensor is in which file."""

    weight_map: dict[str, str]


def weight_files(folder: Path) -> list[Path]:
    """Find the files that hold a model's weights.

    Raises:
        ValueError: There are none, one is missing, or the index names what is no file of the folder.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return [folder / name for name in named_files(folder, INDEX, read_json(folder / INDEX, Index)["weight_map"])]
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        raise ValueError(
            f"{folder} has its weights only as pickled files ({pickled[0]}), which can run code when loaded: convert "
            "it where you trust it, with AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}: needs a Hugging Face folder with safetensors weights")


def named_files(folder: Path, index: str, weight_map: dict[str, str]) -> list[str]:
    """The files that an index names, each once and in order.

    Args:
        folder: Of the model.
        index: Name of the index in it.
        weight_map: Tensor to file, as the index has it.

    Raises:
        ValueError: It names no file, one that is not there, or one outside the folder.
    """
    files = sorted(set(weight_map.values()))
    if not files:
        raise ValueError(f"{folder / index} names no tensor: write or download the model again")
    outside = [file for file in files if file in ("", ".", "..") or Path(file).name != file]
    if outside:
        raise ValueError(
            f"{folder / index} names {outside[0]!r}, which is no file of its folder: needs plain file names"
        )
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {_few(missing)}, which its {index} names: download the rest")
    return files


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write one file, readable to those who may read its folder (safetensors itself lets only the owner).

    Raises:
        OSError: It cannot be written, as on a full disk.
    """
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    path.chmod(path.parent.stat().st_mode & 0o666)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
