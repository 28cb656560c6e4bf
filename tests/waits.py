"""Detection on a CPU of operations that would make the host wait for a GPU."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Waits(TorchDispatchMode):
    """Counts what makes a host wait for a GPU: values read, sizes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.equal,
            torch.ops.aten.bincount,
        ):
            self.found.append(str(func))
        if func.overloadpacket is torch.ops.aten.repeat_interleave and (kwargs or {}).get("output_size") is None:
            self.found.append(str(func))  # told how long the result is, it need not ask
        return func(*args, **kwargs or {})
