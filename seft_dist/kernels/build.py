"""The C++ library of the kernels, compiled when first used, and the Triton kernels, tried when first used.

The library is kept in the folder of torch's extensions. It is plain C++ behind C functions, so one file serves every
version of torch and compiles in seconds. Its name depends on the source, the processor and the compiler. One process of
a machine builds it under a lock that ends with the process that holds it, while the others wait; a library appears
whole or not at all.

The environment is read as for every extension of torch: TORCH_EXTENSIONS_DIR names the folder, CXX the compiler. CXX
may contain options, which come after ours: CXX="g++ -march=x86-64" builds for any x86-64 processor, so that two of them
compute the same bits; CXX="g++ -fsanitize=address" checks for accesses outside of arrays.
"""

import ctypes
import fcntl
import functools
import hashlib
import importlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

import torch

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-fPIC")
_SECONDS = 300
_TRITON_KERNELS = "seft_dist.kernels.triton_kernels"
_MOST_WORDS = 300
"""Characters of an error of Triton that are shown; a compiler may say a lot."""
_HERE = Path(__file__).parent
_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
# x, stride, g, stride, tokens, rows, columns, crow, whether it is int64, col, entries, grad, accumulate, block, threads
_SAMPLED = [_POINTER, _LONG, _POINTER, _LONG, *[_LONG] * 3, _POINTER, _INT, _POINTER, _LONG, _POINTER, *[_INT] * 3]
_PACKED = [_POINTER, _LONG, _POINTER, _POINTER, _LONG, _INT]  # encode: bits, n, dense, values, count, threads
_UNPACKED = [_POINTER, _LONG, _POINTER, _LONG, _POINTER, _INT]  # decode: bits, n, values, count, out, threads
# outs, starts, sizes, indices, whether these are int64, ends, tensors, values, threads
_SCATTER = [*[_POINTER] * 4, _INT, _POINTER, _LONG, _POINTER, _INT]
_FLOAT = ctypes.c_float
_ADAMW = [_LONG, _FLOAT, *[_POINTER] * 8, *[_FLOAT] * 5, _INT, _POINTER, _INT]
SIGNATURES = {
    "sampled_f32": _SAMPLED,
    "sampled_bf16": _SAMPLED,
    "popcount_bits": [_POINTER, _LONG, _POINTER],
    "pack_bools": [_POINTER, _LONG, _POINTER, _INT],
    "unpack_bits": [_POINTER, _LONG, _POINTER, _INT],
    "set_bits": [_POINTER, _POINTER, _LONG, _INT],
    "fingerprint_bf16": [_POINTER, _LONG, _LONG, _POINTER, _INT],
    "fingerprint_f32": [_POINTER, _LONG, _LONG, _POINTER, _INT],
    "hash_weight_16": [_POINTER, _LONG, _LONG, _POINTER, _INT],
    "hash_weight_32": [_POINTER, _LONG, _LONG, _POINTER, _INT],
    "hash_bits": [_POINTER, _LONG, _LONG, _POINTER, _INT],
    "count_outside_16": [_POINTER, _LONG, _POINTER, _POINTER, _INT],
    "count_outside_32": [_POINTER, _LONG, _POINTER, _POINTER, _INT],
    "rank_keys": [_POINTER, _POINTER, _POINTER, _LONG, _INT, _INT, _POINTER, _INT],
    "count_keys": [_POINTER, _LONG, _POINTER, _INT],
    "keys_from": [_POINTER, _LONG, _INT, _POINTER, _POINTER, _POINTER, _INT],
    "encode_16": _PACKED,
    "encode_32": _PACKED,
    "decode_16": _UNPACKED,
    "decode_32": _UNPACKED,
    "scatter_16": _SCATTER,
    "scatter_32": _SCATTER,
    "adamw": _ADAMW,
}
"""Argument types of each function; all return an int, 0 for success."""


class BuildError(Exception):
    """The library cannot be built here; the message names what is missing."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled functions, built at the first call; None, with one warning, where that fails."""
    try:
        loaded = ctypes.CDLL(str(build()))
    except (BuildError, OSError) as error:
        warnings.warn(f"no C++ kernels, the slower ones in torch are used: {error}", stacklevel=2)
        return None
    for name, arguments in SIGNATURES.items():
        getattr(loaded, name).argtypes = arguments
    loaded.built_with.restype = ctypes.c_char_p
    return loaded


def triton_kernels(device: torch.device | None = None) -> ModuleType | None:
    """Return the kernels for CUDA, or None where they cannot run.

    Args:
        device: Device of the operands; None: the current CUDA device, or the CPU (Triton's interpreter) without one.
    """
    if device is None:
        has_cuda = torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if has_cuda else torch.device("cpu")
    return importlib.import_module(_TRITON_KERNELS) if lacks_triton(device) is None else None


@functools.cache
def lacks_triton(device: torch.device) -> str | None:
    """Return why the Triton kernels cannot run on a device, or None. The first call compiles one and launches it.

    Triton compiles C for each kernel. It needs a C compiler and the headers of Python, which many containers with torch
    lack. So a launch tells what an import does not. Where it fails, there is one warning.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        importlib.import_module(_TRITON_KERNELS).try_out(device)
    except torch.OutOfMemoryError:
        raise  # says nothing about Triton
    except Exception as error:  # of any type: from the import, the compilers, the driver
        words = " ".join(str(error).split())
        reason = f"Triton does not run here ({type(error).__name__}: {words[:_MOST_WORDS]})"
        warnings.warn(
            f"no Triton kernels, the slower ones in torch are used: {reason}; Triton needs a C compiler (gcc, or the "
            "one that CC names) and the headers of Python (python3-dev)",
            stacklevel=2,
        )
        return reason
    return None


def build() -> Path:
    """Compile the library unless it is there. Waits while another process of this machine builds it.

    Returns:
        File of the library.

    Raises:
        BuildError: There is no compiler, or it failed.
        OSError: The folder cannot be written.
    """
    from torch.utils import cpp_extension  # half a second

    # The folder that TORCH_EXTENSIONS_DIR names, else one in the user's cache.
    folder = Path(cpp_extension._get_build_directory("seft_dist_kernels", verbose=False))
    program, *options = compiler_command()
    name = _key_of_source(options)
    compiler = shutil.which(program)
    if compiler is None:
        earlier = sorted(folder.glob(f"{name}-*.so"), key=lambda path: path.stat().st_mtime)
        if earlier:  # e.g. built on a login node
            return earlier[-1]
        raise BuildError(
            f"no C++ compiler {program!r} is found; install g++, or name one in CXX, or run once where there is one"
        )
    library = folder / f"{name}-{_digest(_run([compiler, '--version'], folder))}.so"
    if not library.exists():
        with _lock(library.with_suffix(".lock")):
            if not library.exists():
                _compile(compiler, options, library)
    return library


def compiler_command() -> list[str]:
    """Return the C++ compiler and the user's options for it, from CXX.

    Raises:
        BuildError: CXX is empty or cannot be split into words.
    """
    from torch.utils import cpp_extension

    given = cpp_extension.get_cxx_compiler()
    try:
        words = shlex.split(given)
    except ValueError as error:
        raise BuildError(f"CXX={given!r} cannot be split into words ({error}): write it as in a shell") from error
    if not words:
        raise BuildError("CXX is empty: name a C++ compiler in it, or unset it")
    return words


def _compile(compiler: str, options: list[str], library: Path) -> None:
    prefix = f"{library.stem}."
    for left in library.parent.glob(f"{prefix}*.part"):  # of builders that were killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=prefix, suffix=".part") as part:
        _run([compiler, *FLAGS, *options, "-c", *map(str, sorted(_HERE.glob("*.cpp")))], Path(part))
        # Linked without -fopenmp, so that the threads are those of the OpenMP library that torch has loaded.
        objects = sorted(path.name for path in Path(part).glob("*.o"))
        _run([compiler, "-shared", *options, "-o", "library.so", *objects], Path(part))
        os.replace(Path(part) / "library.so", library)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        with suppress(OSError):  # a file system without locks: each process builds its own, the last one stays
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(command: list[str], folder: Path) -> str:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} did not end in {_SECONDS} seconds") from error
    if done.returncode:
        output = done.stderr.splitlines()
        first = next((line for line in output if "error" in line), output[0] if output else "nothing")
        raise BuildError(f"{command[0]} failed with exit code {done.returncode}; it said: {first}")
    return done.stdout


def _key_of_source(options: list[str]) -> str:
    text = " ".join([*FLAGS, *options]) + _cpu()
    for path in sorted([*_HERE.glob("*.cpp"), *_HERE.glob("*.h")]):
        text += path.name + path.read_text(encoding="utf-8")
    return _digest(text)


def _cpu() -> str:
    """Describe the processor by the facts on which -march=native depends."""
    kind = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text().splitlines()
        kind += "".join(
            sorted({line for line in lines if line.startswith(("flags", "Features", "model\t", "cpu family"))})
        )
    return kind


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
