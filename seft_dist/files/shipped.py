"""Recipes, ds_configs, scripts and batch scripts that come with the package, found by name from anywhere.

A wheel holds them in seft_dist/shipped. In a checkout that folder has links to launch/, ds_configs/ and slurm/.
"""

import shutil
from pathlib import Path

SHIPPED = Path(__file__).resolve().parents[1] / "shipped"
"""Folder with the same layout as a checkout."""
SCRIPTS = (SHIPPED / "launch").resolve()
"""Folder of train.py and its like, for launchers that start a script."""
RECIPES, DS_CONFIGS = "launch/recipes", "ds_configs"
"""Folders below SHIPPED whose files can be named."""
_ENDINGS = {RECIPES: ".yaml", DS_CONFIGS: ".json"}
_OF_A_CHECKOUT = ("__pycache__", "wheels.py")
"""Files that are of no use beside an installed package."""


def find_file(name: str, folder: str) -> str:
    """Find a file that the user has named: one of the user's own, or else one that comes with the package.

    Args:
        name: A path, or the name of a shipped file, with or without its folder and ending: "quickstart",
            "quickstart.yaml" and "launch/recipes/quickstart.yaml" are the same recipe.
        folder: RECIPES or DS_CONFIGS.

    Returns:
        The path of a shipped file if there is no file ``name``, else ``name``.
    """
    path = Path(name)
    if not path.is_file() and path.parent in (Path(), Path(folder)):
        shipped = SHIPPED / folder / f"{path.name.removesuffix(_ENDINGS[folder])}{_ENDINGS[folder]}"
        if shipped.is_file():
            return str(shipped.resolve())
    return name


def shipped_names(folder: str) -> list[str]:
    """List the shipped files of a folder.

    Args:
        folder: Below SHIPPED, e.g. RECIPES.

    Returns:
        Their names, sorted.
    """
    return sorted(path.name for path in (SHIPPED / folder).iterdir() if path.is_file())


def short_names(folder: str) -> list[str]:
    """List the names, without ending, by which the shipped files of RECIPES or DS_CONFIGS can be given; sorted."""
    return [name.removesuffix(_ENDINGS[folder]) for name in shipped_names(folder)]


def copy_shipped(folder: Path) -> None:
    """Copy everything that is shipped, for changes of one's own; commands of the documentation work there.

    Args:
        folder: Gets launch/, ds_configs/ and slurm/; it may exist, but must have none of them.

    Raises:
        ValueError: One of them is there already.
    """
    for part in sorted(path.name for path in SHIPPED.iterdir()):
        if (folder / part).exists():
            raise ValueError(f"{folder / part} is there already: needs a folder without it")
    shutil.copytree(SHIPPED, folder, ignore=shutil.ignore_patterns(*_OF_A_CHECKOUT), dirs_exist_ok=True)
