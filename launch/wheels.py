"""Collect the wheels that a machine without network needs beyond torch: `pip install --no-index` works there.

    python3.12 launch/wheels.py --output wheels --torch 2.11.0
    (copy the folder there)  pip install --no-index --find-links wheels 'seft_dist[train,deepspeed,mpi4py]'

Run it with the Python release of that machine, on the same kind of processor and an operating system that is not newer.
torch, triton and CUDA are left out: that machine has them. What is collected fits the release of torch that is named.
Needs pip and a package index, nothing of this project.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
EXTRAS = "train,deepspeed,mpi4py"
"""Extras of setup.cfg that training needs."""


def write_placeholder(folder: Path, version: str) -> Path:
    """Make an empty wheel that is called torch, so that pip resolves everything else beside that release.

    Args:
        folder: Gets the wheel.
        version: The release it stands for.

    Returns:
        The wheel.
    """
    wheel, facts = folder / f"torch-{version}-py3-none-any.whl", f"torch-{version}.dist-info"
    files = {
        f"{facts}/METADATA": f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n",
        f"{facts}/WHEEL": "Wheel-Version: 1.0\nGenerator: seft_dist\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{facts}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{facts}/RECORD"])
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return wheel


def collect(output: Path, version: str, extras: str) -> None:
    """Fill a folder with the wheels of this project and of what it needs.

    Args:
        output: The folder; it is made, or must be empty.
        version: Release of torch on the machine that will install them.
        extras: Names of setup.cfg's extras, separated by commas; may be empty.

    Raises:
        ValueError: The folder is not empty, the release is none, or pip failed.
    """
    if not re.fullmatch(r"\d+(\.\d+)+", version):
        raise ValueError(f"--torch {version}: needs a release such as 2.11.0, without what follows a +")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is there already: needs a new or an empty folder")
    with tempfile.TemporaryDirectory() as name:
        torch = write_placeholder(Path(name), version)
        wanted = [f"torch @ {torch.as_uri()}", f"{PROJECT}[{extras}]" if extras else str(PROJECT)]
        command = [sys.executable, "-m", "pip", "wheel", "--wheel-dir", str(Path(name) / "wheels"), *wanted]
        if subprocess.run(command, check=False).returncode != 0:
            raise ValueError(
                f"`{' '.join(command)}` failed: needs a package index, and a torch that setup.cfg's range has "
                f"(asked for: {version}, Python {sys.version_info.major}.{sys.version_info.minor})"
            )
        output.mkdir(parents=True, exist_ok=True)
        for wheel in sorted((Path(name) / "wheels").glob("*.whl")):
            if not wheel.name.startswith(("torch-", "triton-", "nvidia_", "cuda_")):
                shutil.move(wheel, output / wheel.name)


def main() -> None:
    """Collect as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the wheels, new or empty")
    parser.add_argument("--torch", required=True, metavar="RELEASE", help="torch on the machine without network")
    parser.add_argument("--extras", default=EXTRAS, help="extras of setup.cfg (default: %(default)s); may be empty")
    args = parser.parse_args()
    try:
        collect(args.output, args.torch, args.extras)
    except ValueError as error:
        parser.error(str(error))
    wheels = list(args.output.glob("*.whl"))
    size = sum(wheel.stat().st_size for wheel in wheels)
    wanted = f"'seft_dist[{args.extras}]'" if args.extras else "seft_dist"
    install = f"pip install --no-index --find-links {args.output} {wanted}"
    print(f"{len(wheels)} wheels, {size / 1e6:.0f} MB. There: {install}")


if __name__ == "__main__":
    main()
