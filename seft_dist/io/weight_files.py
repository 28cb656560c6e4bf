"""Finding the safetensors files of a model, and writing such a file.

Files outside the model's folder and pickled files are refused.
"""

from pathlib import Path

from safetensors import SafetensorError as SafetensorError  # for other subpackages, which may not import safetensors
from safetensors import safe_open as safe_open
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import TypedDict

from seft_dist.files.kinds import lenient
from seft_dist.files.reading import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@lenient
class WeightIndex(TypedDict):
    """Content of ``model.safetensors.index.json``: the file of each tensor."""

    weight_map: dict[str, str]


def weight_files(folder: Path) -> list[Path]:
    """Find the files that hold a model's weights.

    Raises:
        ValueError: There are no such files, one is missing, or the index names a file outside the folder.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX, WeightIndex)["weight_map"]
        return [folder / name for name in files_of_index(folder, INDEX, weight_map)]
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        raise ValueError(
            f"{folder} has its weights only as pickled files ({pickled[0]}), which can run code when loaded: convert "
            "it where you trust it, with AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}: needs a Hugging Face folder with safetensors weights")


def files_of_index(folder: Path, index: str, weight_map: dict[str, str]) -> list[str]:
    """Return the files that an index names, each once and in alphabetical order.

    Args:
        folder: Folder of the model.
        index: Name of the index file in it.
        weight_map: File of each tensor, from the index.

    Raises:
        ValueError: The index names no file, a missing one, or one outside the folder.
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
        raise ValueError(f"{folder} lacks {abbreviate(missing)}, which its {index} names: download the rest")
    return files


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write one safetensors file with the read permissions of its folder.

    The safetensors library creates files that only their owner can read.

    Args:
        path: The file; one that exists is replaced.
        tensors: Contiguous tensors by name.
        metadata: Entries of the file's header.

    Raises:
        OSError: The file cannot be written, for example because the disk is full.
    """
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    path.chmod(path.parent.stat().st_mode & 0o666)


def abbreviate(names: list[str]) -> str:
    """Return the first three names of a list and the number of further ones, for messages."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
