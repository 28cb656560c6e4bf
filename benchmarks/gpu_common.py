"""Shared by the parts of benchmarks/gpu.py: options, isolated cases, clocks, peaks of memory, and random models.

A part is a separate program. It writes its JSON file after every case, so the results are kept when it is stopped.
Only torch and transformers are needed.
"""

import argparse
import ctypes
import gc
import importlib.util
import json
import statistics
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seft_dist.files.writing import write_json

LLAMAS: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "34B": {
        "hidden_size": 8192,
        "intermediate_size": 22016,
        "num_hidden_layers": 48,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
"""Shapes of TinyLlama, Llama-2-7B, -13B, Code-Llama-34B and Llama-2-70B; values are always random."""
SPARSITY = 0.6


def content_of(name: str) -> dict[str, Any]:
    """Content of the config.json of a model of this shape."""
    shape = {"num_key_value_heads": LLAMAS[name]["num_attention_heads"]} | LLAMAS[name]
    common = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5}
    return common | {"tie_word_embeddings": False} | shape


class Part:
    """One part of the check: its options, its cases and their results."""

    def __init__(self, description: str | None) -> None:
        """Args:
        description: For --help.
        """
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--result", type=Path, required=True, help="JSON file; others are written beside it")
        parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
        parser.add_argument(
            "--tiny", action="store_true", help="the same code on shapes that a CPU computes in seconds"
        )
        parser.add_argument("--seconds", type=float, default=600, help="after these no further case begins")
        self.options = parser.parse_args()
        self.tiny: bool = self.options.tiny
        self.device = torch.device(self.options.device)
        self.folder: Path = self.options.result.parent
        self.rows: list[dict[str, Any]] = []
        self._deadline = time.monotonic() + self.options.seconds
        self._broken: str | None = None
        if self.device.type == "cpu":
            torch.set_num_threads(1)  # small operations on a shared machine are faster on one thread
        elif not torch.cuda.is_available():
            raise SystemExit("there is no CUDA device here: use --device cpu --tiny to see that the code runs")

    @property
    def left(self) -> float:
        """Seconds that remain for further cases."""
        return self._deadline - time.monotonic()

    def case(
        self, name: str, run: Callable[[], dict[str, Any]], needs: float = 0.0, about: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Run one case. Any exception is recorded, and the next case can run.

        Args:
            name: Name of the case in tables.
            run: Runs the case and returns its results.
            needs: Seconds that the case takes at least.
            about: Further entries of its row, which are recorded even if it fails.

        Returns:
            The row of the case.
        """
        row: dict[str, Any] = {"case": name, "status": "ok"} | (about or {})
        began = time.monotonic()
        if self._broken is not None:
            row |= {"status": "not run", "why": f"the device is of no use after {self._broken}"}
        elif self.left < needs:
            row |= {"status": "not run", "why": "no time left"}
        else:
            try:
                row |= run()
            except Exception as error:
                row |= {"status": "failed", "traceback": traceback.format_exc()}
                self._note_broken_device(name, error)
        row["case_seconds"] = round(time.monotonic() - began, 3)
        self.rows.append(row)
        print(json.dumps({key: value for key, value in row.items() if key != "traceback"}), flush=True)
        if "traceback" in row:
            print(row["traceback"], flush=True)
        self._write()
        free(self.device)
        return row

    def missing(self, name: str, why: str) -> None:
        """Record a case that cannot be run, because something is not installed or not supported here."""
        self.rows.append({"case": name, "status": "missing", "why": why})
        self._write()

    def end(self) -> None:
        """Exit with status 1 if a case failed, otherwise 0."""
        self._write()
        raise SystemExit(int(any(row["status"] == "failed" for row in self.rows)))

    def _note_broken_device(self, name: str, error: Exception) -> None:
        # After some errors every later call on the device fails
        if self.device.type != "cuda" or isinstance(error, torch.OutOfMemoryError):
            return
        try:
            torch.ones(1, device=self.device).add_(1).cpu()
        except Exception:
            self._broken = name

    def _write(self) -> None:
        write_json(self.options.result, {"rows": self.rows})


def lacks_triton(device: torch.device) -> str | None:
    """Return why the Triton kernels cannot be used, or None. On CUDA they are always tried, so errors are reported."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cpu":
        from seft_dist.kernels.build import triton_kernels

        kernels = triton_kernels()
        assert kernels is not None
        crow, col = torch.tensor([0, 1], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        try:
            kernels.sampled_grad_(torch.zeros(1), (1, 1), crow, col, torch.ones(1, 1), torch.ones(1, 1))
        except Exception as error:  # e.g. Triton 3.6 with numpy 2.5
            return f"Triton's interpreter does not run here: {error!r}"
    return None


def free(device: torch.device) -> None:
    """Free all unused memory."""
    gc.collect()
    if device.type == "cuda":
        with suppress(RuntimeError):
            torch.cuda.empty_cache()


def wait(device: torch.device) -> None:
    """Wait until the device has finished all operations."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Duration of one call, including the work on the device, in seconds, and its result."""
    wait(device)
    began = time.perf_counter()
    result = run()
    wait(device)
    return time.perf_counter() - began, result


def seconds_of(run: Callable[[], Any], device: torch.device, repeats: int = 7, warmup: int = 2) -> float:
    """Median duration of several calls, in seconds."""
    for _ in range(warmup):
        run()
    if device.type == "cpu":
        return statistics.median(timed(run, device)[0] for _ in range(repeats))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    wait(device)
    return statistics.median(a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)) / 1e3


def begin_peak(device: torch.device) -> None:
    """Reset the peak of memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """Peak memory since ``begin_peak`` in bytes: of all tensors on a GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) << 10


def empty_llama(name: str) -> Any:
    """Build a model on the meta device, in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    content = content_of(name)
    content.pop("model_type")
    config = LlamaConfig(**content, attn_implementation="sdpa")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.config.use_cache = False
    return model.train()


@torch.no_grad()
def fill_dense_rest(model: Any, device: torch.device) -> None:
    """Give parameters that are on the meta device random values, and the rotary embedding its frequencies.

    The placeholders of packed weights stay on the meta device.
    """
    from seft_dist.backends.packed import packed_of

    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.device.type != "meta" or packed_of(parameter) is not None:
                continue
            value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            value.normal_(std=0.02) if parameter.dim() > 1 else value.fill_(1.0)
            setattr(module, key, nn.Parameter(value, requires_grad=parameter.requires_grad))
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(model.config).to(device)


@torch.no_grad()
def prune_(weight: torch.Tensor) -> torch.Tensor:
    """Set randomly chosen weights to 0, in place, a piece at a time."""
    for piece in weight.view(-1).split(1 << 26):
        piece.masked_fill_(torch.rand(piece.shape, device=piece.device) < SPARSITY, 0)
    return weight


def random_llama(name: str, device: torch.device) -> Any:
    """Build a dense random model in which 60 % of the target weights are 0."""
    from seft_dist.modules.targets import find_targets

    model = empty_llama(name)
    fill_dense_rest(model, device)
    for target in find_targets(model).values():
        prune_(target.weight.detach())
    return model


def packed_llama(name: str, device: torch.device) -> Any:
    """Build such a model with packed targets, one weight after the other, so that no dense copy of the model exists."""
    from seft_dist import pack_weights
    from seft_dist.backends.packed import packed_of
    from seft_dist.modules.targets import find_targets

    model = empty_llama(name)
    shards = pack_weights(model, device=device)
    fill_dense_rest(model, device)
    for target in find_targets(model).values():
        packed = packed_of(target.weight)
        assert packed is not None
        own = torch.empty(len(packed.interval), dtype=packed.dtype, device=device).normal_(std=0.02)
        packed.put(prune_(own))
    shards.sync_mask_counts()
    return model


def checkpointed(model: Any) -> Any:
    """Compute each decoder layer again in backward."""
    # The method was renamed in transformers 5.2x; GPU machines may have either version
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    return model


def random_tokens(model: Any, sequences: int, tokens: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Draw random tokens; no method's time depends on the text."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (sequences, tokens), generator=generator).to(device)
    return {"input_ids": ids, "labels": ids}
