"""List the recipes, ds_configs and batch scripts that come with the package, or copy them.

    seft files
    seft files --copy work && cd work && sbatch slurm/train.sbatch --config llama_fsdp

Recipes and ds_configs can be named from anywhere: --config quickstart, --deepspeed zero3. Copies are for changes of
your own; launch/, ds_configs/ and slurm/ lie in them as in a checkout, so every command of the documentation works.
"""

from pathlib import Path

from seft_dist.files.shipped import DS_CONFIGS, RECIPES, SHIPPED, copy_shipped, shipped_names
from seft_dist.session.cli import call, run


def files(copy: Path | None = None) -> None:
    """List the recipes, ds_configs and batch scripts that come with the package, or copy them.

    Args:
        copy: Folder that gets launch/, ds_configs/ and slurm/; it must have none of them yet.
    """
    if copy is not None:
        copy_shipped(copy)
        print(f"{copy} has launch/, ds_configs/ and slurm/; facts about your cluster belong in {copy}/slurm/env.sh")
        return
    for title, folder in (("--config", RECIPES), ("--deepspeed", DS_CONFIGS), ("sbatch", "slurm")):
        names = [name for name in shipped_names(folder) if folder != "slurm" or name.endswith((".sbatch", "sweep.sh"))]
        print(f"{title:<12} {', '.join(names)}")
    print(f"{'folder':<12} {SHIPPED}")


def main() -> None:
    """List or copy as the command line says."""
    run(lambda: call(files, __doc__))
