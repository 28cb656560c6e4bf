"""Facts about a run's environment: versions, machine, code. Reads files and asks git, changes nothing."""

import hashlib
import platform
import resource
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).resolve().parents[1]
"""The code that runs."""
MAX_DIFF = 1_000_000
"""Bytes of uncommitted changes that are kept."""
_PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "tokenizers",
    "sentencepiece",
    "accelerate",
    "datasets",
    "safetensors",
    "numpy",
    "mpi4py",
)
_GIT_SECONDS = 60
_MAX_UNTRACKED = 100


def versions() -> dict[str, str | None]:
    """Find the versions of Python, the libraries, CUDA, NCCL and the driver; None for what is not there."""
    installed: dict[str, str | None] = {"python": platform.python_version(), "seft_dist": _version("seft_dist")}
    installed |= {name: _version(name) for name in _PACKAGES}
    installed["torch"] = torch.__version__  # includes the build, e.g. +cpu
    installed["cuda"] = torch.version.cuda
    has_gpu = torch.cuda.is_available()
    installed["cudnn"] = str(torch.backends.cudnn.version()) if has_gpu else None
    installed["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if has_gpu else None
    driver = Path("/proc/driver/nvidia/version")
    installed["driver"] = driver.read_text().splitlines()[0] if driver.is_file() else None
    return installed


def numerics() -> dict[str, Any]:
    """Return the settings of torch that can change the bits of a result."""
    return {
        "matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
    }


def cpu() -> str:
    """Describe the model of the processor and the vector instructions that torch uses on it."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has used: its resident set, or on CUDA what torch has allocated."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def source_digest() -> str:
    """Hash the package's own source files, the code that runs, whether git knows it or not; 16 hex digits."""
    digest = hashlib.sha256()
    files = [file for kind in ("*.py", "*.cpp", "*.h") for file in PACKAGE.rglob(kind)]
    # What is shipped is linked in a checkout and copied in a wheel; no run depends on it.
    for file in sorted(file for file in files if file.relative_to(PACKAGE).parts[0] != "shipped"):
        digest.update(f"{file.relative_to(PACKAGE).as_posix()} ".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def code() -> tuple[dict[str, Any], bytes]:
    """Find the commit that the package is run from, and the changes since.

    Returns:
        ``source`` (digest of the package's files), ``commit``, ``dirty`` and ``untracked`` (Python files), or ``git``
        with the reason why there is no commit; and the uncommitted changes as a patch, maybe empty or cut.
    """
    facts: dict[str, Any] = {"source": source_digest(), "commit": None}
    try:
        # A package installed into somebody else's repository is not part of it.
        _git(PACKAGE, "ls-files", "--error-unmatch", "__init__.py")
        facts["commit"] = _git(PACKAGE, "rev-parse", "HEAD").decode().strip()
        top = Path(_git(PACKAGE, "rev-parse", "--show-toplevel").decode().strip())
        diff = _git(top, "diff", "--no-ext-diff", "--no-color", "--binary", "HEAD")
        others = _git(top, "ls-files", "--others", "--exclude-standard", "--", "*.py").decode().splitlines()
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error).encode()
        return facts | {"git": said.decode(errors="replace").strip().partition("\n")[0]}, b""
    facts |= {"dirty": bool(diff), "untracked": others[:_MAX_UNTRACKED]}
    if len(diff) > MAX_DIFF:
        diff = diff[:MAX_DIFF] + f"\ncut here: {len(diff)} bytes\n".encode()
    return facts, diff


def _git(folder: Path, *command: str) -> bytes:
    done = subprocess.run(
        ["git", "--no-optional-locks", *command], cwd=folder, check=True, capture_output=True, timeout=_GIT_SECONDS
    )
    return done.stdout


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
