"""A model on disk of which only those modules are in memory that run at the moment."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from seft_dist.io.library_types import PreTrainedModel
from seft_dist.io.models import build_meta_model, named_state
from seft_dist.io.source import Source
from seft_dist.modules.kinds import Target
from seft_dist.modules.targets import find_targets
from seft_dist.sparsity.casts import cast_weight


class StreamedModel:
    """A causal LM on the meta device, whose modules get their weights from the files while ``materialize`` is open."""

    def __init__(self, source: Source, device: torch.device) -> None:
        """Args:
        source: The model on disk.
        device: Device of the materialized weights.

        Raises:
            ValueError: The files do not fit the model.
        """
        self.source = source
        self.device = device
        self.model: PreTrainedModel
        self.model, self._stored = build_meta_model(source)
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to(device)
        self._targets: dict[str, Target] = {}
        self._state = named_state(self.model)
        for name, value in self._state.items():
            if not value.is_meta:  # a persistent buffer, whose values are in the files
                value.copy_(self.read(name))
        self._names = {id(value): name for name, value in self._state.items()}

    def find_targets(self, pattern: str) -> dict[str, Target]:
        """Find the targets of a pattern (see ``SeftConfig.targets``), and make them known to ``read_rows``."""
        self._targets = find_targets(self.model, pattern)
        return self._targets

    def read_rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read rows of a target from its file, as a matrix [out, in] of any kind of target.

        Args:
            name: Name of the target.
            start: First row.
            stop: Row behind the last; None: the end.

        Returns:
            [stop - start, in], in the model's dtype, on the CPU.
        """
        target = self._targets[name]
        whole = target.weight_name(name)
        if target.is_stored_transposed:
            return self.read(whole).T[start:stop].contiguous()
        width = target.weight.shape[-1]
        end = None if stop is None else stop * width
        values = self.source.weights.read(self._stored[whole], start * width, end)
        return cast_weight(values.view(-1, width), self.source.dtype)[0]

    def name_of(self, value: Tensor) -> str:
        """Return the name of a parameter or persistent buffer of ``model``."""
        return self._names[id(value)]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read rows of a weight from its file.

        Args:
            name: Name of the weight in ``named_state``.
            start: First row.
            stop: Row behind the last; None: the end.

        Returns:
            [stop - start, ...], in the dtype that the weight has in the model, on the CPU.
        """
        info = self.source.weights.info(self._stored[name])
        width = info.numel // info.shape[0] if info.shape and info.numel else 1
        end = None if stop is None else stop * width
        values = self.source.weights.read(self._stored[name], start * width, end)
        values = values.view(-1, *info.shape[1:]) if info.shape else values.view(())
        return cast_weight(values, self._state[name].dtype)[0]

    @contextmanager
    def materialize(self, prefix: str, without: str | None = None) -> Iterator[None]:
        """Context in which the weights of a module and all its submodules are in memory.

        Args:
            prefix: Name of the module.
            without: Name of a submodule that stays on the meta device.
        """
        placeholders: list[tuple[nn.Module, str, nn.Parameter]] = []
        real: dict[int, nn.Parameter] = {}
        try:
            for path, module in self.model.get_submodule(prefix).named_modules(prefix=prefix):
                if without is not None and f"{path}.".startswith(f"{without}."):
                    continue
                for key, parameter in list(module._parameters.items()):
                    if parameter is None:
                        continue
                    if id(parameter) not in real:
                        values = self.read(self._names[id(parameter)]).to(self.device)
                        real[id(parameter)] = nn.Parameter(values, requires_grad=False)
                    placeholders.append((module, key, parameter))
                    module._parameters[key] = real[id(parameter)]
            yield
        finally:
            for module, key, parameter in placeholders:
                module._parameters[key] = parameter
