"""A model of which only the decoder layer at work is in memory; everything else is read from its files when asked for."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from seft_dist.io.library_types import PreTrainedModel
from seft_dist.io.models import named_state, outline
from seft_dist.io.source import Source
from seft_dist.modules.kinds import Target
from seft_dist.modules.targets import find_targets
from seft_dist.sparsity.casts import cast_weight


class StreamedModel:
    """A causal LM on disk whose modules get their weights for as long as they are held."""

    def __init__(self, source: Source, device: torch.device) -> None:
        """Args:
        source: The model on disk.
        device: Where held modules compute.

        Raises:
            ValueError: The files do not fit the model.
        """
        self.source = source
        self.device = device
        self.model: PreTrainedModel
        self.model, self._stored = outline(source)
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to(device)
        self._targets: dict[str, Target] = {}
        self._state = named_state(self.model)
        for name, value in self._state.items():
            if not value.is_meta:  # a buffer that the files hold
                value.copy_(self.read(name))
        self._names = {id(value): name for name, value in self._state.items()}

    def find_targets(self, pattern: str) -> dict[str, Target]:
        """Find the weights a pattern names, as ``seft_dist.modules.targets``; from then on ``read_rows`` knows them."""
        self._targets = find_targets(self.model, pattern)
        return self._targets

    def read_rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read rows of a target from its file, as the matrix [out, in] that pruning looks at.

        Args:
            name: Of a target.
            start: First row.
            stop: Row behind the last; None: the end.

        Returns:
            [stop - start, in], in the model's type, on the CPU.
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
        """Name of a parameter or persistent buffer of ``model``."""
        return self._names[id(value)]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read rows of a weight from its file.

        Args:
            name: Of ``named_state``.
            start: First row.
            stop: Row behind the last; None: the end.

        Returns:
            [stop - start, ...], in the type that the model holds it in, on the CPU.
        """
        info = self.source.weights.info(self._stored[name])
        width = info.numel // info.shape[0] if info.shape and info.numel else 1
        end = None if stop is None else stop * width
        values = self.source.weights.read(self._stored[name], start * width, end)
        values = values.view(-1, *info.shape[1:]) if info.shape else values.view(())
        return cast_weight(values, self._state[name].dtype)[0]

    @contextmanager
    def hold(self, prefix: str, without: str | None = None) -> Iterator[None]:
        """Give the modules below a name their weights, and take them away at the end.

        Args:
            prefix: Name of a module.
            without: A module below it that stays empty.
        """
        taken: list[tuple[nn.Module, str, nn.Parameter]] = []
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
                    taken.append((module, key, parameter))
                    module._parameters[key] = real[id(parameter)]
            yield
        finally:
            for module, key, parameter in taken:
                module._parameters[key] = parameter
