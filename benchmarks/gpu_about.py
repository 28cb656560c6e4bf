"""What machine benchmarks/gpu.py runs on, found out without importing torch: a driver that hangs must not stop it."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from typing import Any

PACKAGES = ("torch", "triton", "transformers", "safetensors", "accelerate", "peft", "deepspeed", "numpy", "pytest")
SEGMENTS = "expandable_segments:True"
"""Setting of torch's allocator: large tensors are allocated and freed in turn, and it would fragment without it."""
_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_QUERY = ["nvidia-smi", "--query-gpu=uuid,name,driver_version,memory.total", "--format=csv,noheader"]
_USE = """
import torch
print(torch.version.cuda)
if torch.cuda.is_available():
    torch.ones(1 << 25, device="cuda").sum().item()
    print(torch.cuda.get_device_name())
    print(getattr(torch.cuda.get_device_properties(0), "uuid", ""))
"""
"""Allocates on the card and prints the version of CUDA, the card's name and its number."""


def about(device: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Describe card, driver and versions.

    Returns:
        The description, and the environment variables that the parts need besides those that are set.
    """
    found: dict[str, Any] = {"date": f"{datetime.now(timezone.utc):%F %H:%M} UTC", "python": platform.python_version()}
    found |= {"platform": platform.platform(), "device": device}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    variables, allocator, used = _allocator() if device == "cuda" else ({}, "", _run([sys.executable, "-c", _USE]))
    works, text = used
    cuda, name, uuid = [*text.splitlines(), "", "", ""][:3] if works else (text, "", "")
    listed = _run(_QUERY)
    found["card"] = cards(listed[1], uuid) if listed[0] else listed[1]
    found["cuda"] = f"{cuda} {name}".strip()
    if allocator:
        found["allocator"] = allocator
    return found, variables


def cards(listed: str, uuid: str) -> str:
    """Name the cards of the machine in one line, and mark the one that is used.

    Args:
        listed: A line for each card, which begins with "GPU-" and its number.
        uuid: Number of the used one, with or without "GPU-"; a part of a card (MIG) is in no line.
    """
    found = []
    lines = [line.partition(",") for line in listed.splitlines() if line.strip()]
    for number, _, rest in lines:
        used = len(lines) == 1 or number.removeprefix("GPU-") == uuid.removeprefix("GPU-")
        found.append(rest.strip() + " (used)" * used)
    return "; ".join(found)


def _allocator() -> tuple[dict[str, str], str, tuple[bool, str]]:
    """Try torch's allocator with ``SEGMENTS``, which not every driver and container admits.

    Returns:
        Variables to set, the choice in words, and what a process that used the card has printed.
    """
    given = [f"{name}={os.environ[name]}" for name in _VARIABLES if os.environ.get(name)]
    command = [sys.executable, "-c", _USE]
    if given:
        return {}, f"as given: {', '.join(given)}", _run(command)
    variables = {_VARIABLES[0]: SEGMENTS}  # every version of torch reads this one
    with_it = _run(command, variables)
    if with_it[0]:
        return variables, SEGMENTS, with_it
    without = _run(command)
    if not without[0]:  # the card cannot be used at all
        return {}, "not tried", without
    return {}, f"torch's default, as {SEGMENTS} does not work here: {with_it[1]}", without


def _run(command: list[str], variables: dict[str, str] | None = None) -> tuple[bool, str]:
    """Run a command; returns whether it worked, and what it printed or the end of its error."""
    environment = os.environ | (variables or {})
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, f"unknown ({type(error).__name__})"
    return done.returncode == 0, done.stdout.strip() if done.returncode == 0 else done.stderr.strip()[-300:]
