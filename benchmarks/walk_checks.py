"""What must be equal after steps of walk.py."""

import json
from pathlib import Path

import torch
from safetensors import safe_open


def check_resumed(root: Path) -> None:
    """Compare the run that was killed and resumed with the one that was not.

    Raises:
        RuntimeError: The loss, a mask, a support or a delta differs.
    """
    final = []
    for run in ("run-single", "run-killed"):
        manifest = json.loads((root / run / "manifest.json").read_text())
        final.append(manifest["final"] | {"evolutions": manifest["evolutions"]})
    if differ := [key for key in final[0] if final[0][key] != final[1].get(key)]:
        raise RuntimeError(f"the resumed run differs from the one that was not killed: {', '.join(differ)}")


def check_removed(root: Path) -> None:
    """Compare the model from which the delta was removed with the pruned one, one tensor at a time.

    Raises:
        RuntimeError: A tensor is missing, or a bit differs.
    """
    files = [_files_of_tensors(root / folder) for folder in ("pruned-wanda", "removed")]
    if other := files[0].keys() ^ files[1].keys():
        raise RuntimeError(f"only one of pruned-wanda and removed has {min(other)}")
    for name in files[0]:
        tensors = []
        for places in files:
            with safe_open(places[name], "pt") as file:
                tensors.append(file.get_tensor(name).view(torch.uint8))
        if not torch.equal(*tensors):
            raise RuntimeError(f"{name} in removed is not what it was in pruned-wanda")


def _files_of_tensors(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor of a model folder."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found.update(dict.fromkeys(file.keys(), path))
    return found


CHECKS = {"train_resumed": check_resumed, "delta_remove": check_removed}
