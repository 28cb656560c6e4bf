"""What the parts of benchmarks/gpu.py share: options, cases that fail alone, clocks and peaks of memory, random models.

A part is a program of its own. It writes its JSON file again after every case, so that what it had is there when it is stopped.
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
    """What the config.json of a model of this shape says."""
    shape = {"num_key_value_heads": LLAMAS[name]["num_attention_heads"]} | LLAMAS[name]
    common = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5}
    return common | {"tie_word_embeddings": False} | shape


class Part:
    """One part: its options, its cases and what came out of them."""

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
            torch.set_num_threads(1)  # a machine that is shared: what is small is not divided
        elif not torch.cuda.is_available():
            raise SystemExit("there is no CUDA device here: use --device cpu --tiny to see that the code runs")

    @property
    def left(self) -> float:
        """Seconds until no further case begins."""
        return self._deadline - time.monotonic()

    def case(
        self, name: str, run: Callable[[], dict[str, Any]], needs: float = 0.0, about: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Do one measurement; whatever it raises is recorded and the next one can begin.

        Args:
            name: For tables.
            run: Gives what was found.
            needs: Seconds it will take at least.
            about: What else its row says, also if it fails.

        Returns:
            Its row.
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
        """Record that something is not installed or not possible here."""
        self.rows.append({"case": name, "status": "missing", "why": why})
        self._write()

    def end(self) -> None:
        """Leave with 1 if a case failed, else 0."""
        self._write()
        raise SystemExit(int(any(row["status"] == "failed" for row in self.rows)))

    def _note_broken_device(self, name: str, error: Exception) -> None:
        # After some errors every later call on the device fails, whatever it is.
        if self.device.type != "cuda" or isinstance(error, torch.OutOfMemoryError):
            return
        try:
            torch.ones(1, device=self.device).add_(1).cpu()
        except Exception:
            self._broken = name

    def _write(self) -> None:
        write_json(self.options.result, {"rows": self.rows})


def lacks_triton(device: torch.device) -> str | None:
    """Why the Triton kernels cannot be tried; None where they can. On CUDA a kernel that fails is a failure, not a lack."""
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
    """Give back what nobody uses any more."""
    gc.collect()
    if device.type == "cuda":
        with suppress(RuntimeError):
            torch.cuda.empty_cache()


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of one call, waited for, and what it gave."""
    wait(device)
    began = time.perf_counter()
    result = run()
    wait(device)
    return time.perf_counter() - began, result


def seconds_of(run: Callable[[], Any], device: torch.device, repeats: int = 7, warmup: int = 2) -> float:
    """Median seconds of some calls."""
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
    """From here on the largest use of memory is looked for."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """Bytes: of a GPU those of tensors, of a CPU all of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) << 10


def empty_llama(name: str) -> Any:
    """A model on the meta device, in bf16."""
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

    Packed weights, whose outlines are on the meta device for good, are left alone.
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
    """Set random weights to 0, in place, a piece at a time."""
    for piece in weight.view(-1).split(1 << 26):
        piece.masked_fill_(torch.rand(piece.shape, device=piece.device) < SPARSITY, 0)
    return weight


def random_llama(name: str, device: torch.device) -> Any:
    """A dense random model of which 60 % of the target weights are 0."""
    from seft_dist.modules.targets import find_targets

    model = empty_llama(name)
    fill_dense_rest(model, device)
    for target in find_targets(model).values():
        prune_(target.weight.detach())
    return model


def packed_llama(name: str, device: torch.device) -> Any:
    """The same, with its targets created packed, one weight after another: no dense copy of the model ever exists."""
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
    # renamed in transformers 5.2x; both names are met on machines with GPUs
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    return model


def random_tokens(model: Any, sequences: int, tokens: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Random tokens: no method's time depends on the text."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (sequences, tokens), generator=generator).to(device)
    return {"input_ids": ids, "labels": ids}
