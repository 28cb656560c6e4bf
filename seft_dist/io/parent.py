"""The model before it was pruned, on disk: the source of weights that come back (``SeftConfig.swap_fraction``)."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from seft_dist.config import ModelConfig
from seft_dist.io.models import build_meta_model
from seft_dist.io.source import Source, open_source
from seft_dist.io.weight_files import SafetensorError

_SAMPLED = 1024
"""Values of each target that the fingerprint reads."""


class ParentModel:
    """A causal LM on disk, of which parts of single weights are read. It is never in memory as a whole."""

    def __init__(self, source: Source, option: str = "parent") -> None:
        """Args:
        source: The model on disk.
        option: Name of the option that chose it, for messages.

        Raises:
            ValueError: The files do not fit the model.
        """
        self._source, self._option = source, option
        _, stored = build_meta_model(source)
        # by the names of targets: fused experts have that of the parameter itself
        self._stored = {name.removesuffix(".weight"): tensor for name, tensor in stored.items()}

    @classmethod
    def open(cls, path: str, option: str = "parent") -> "ParentModel":
        """Open a model.

        Args:
            path: Folder or hub name of a Hugging Face causal LM.
            option: Name of the option that chose it, for messages.

        Raises:
            ValueError: There is no such model, or its files do not fit it.
        """
        # fp32, which every stored type fits: values are read in the type of the file
        return cls(open_source(ModelConfig(path=path, dtype="float32"), path_option=option), option)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check that the parent has these targets.

        Args:
            shapes: Name of each target to the shape in which its weight is stored.

        Raises:
            ValueError: It lacks one, or has another shape.
        """
        for name, shape in shapes.items():
            stored = self._stored.get(name)
            found = None if stored is None else tuple(self._source.weights.info(stored).shape)
            if found != shape:
                has = "no such weight" if found is None else f"the shape {list(found)}"
                raise ValueError(
                    f"{self._option}={self._source.folder}: the weight of {name} has the shape {list(shape)} in the "
                    f"pruned model, the parent has {has}: needs the model that was pruned, before it was"
                )

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return the values [start, stop) of a target's flattened weight, in the file's dtype, on the CPU.

        Raises:
            ValueError: A file cannot be read.
        """
        stored = self._stored[name]
        try:
            return self._source.weights.read(stored, start, stop).reshape(-1)
        except (SafetensorError, OSError) as error:
            file = self._source.weights.info(stored).file
            raise ValueError(f"{self._option}={self._source.folder}: {file} cannot be read: {error}") from error

    def fingerprint(self, names: list[str]) -> str:
        """Hash some values of each target, by which another parent is noticed; reads little.

        Raises:
            ValueError: A file cannot be read.
        """
        digest = hashlib.sha256()
        for name in names:
            numel = self._source.weights.info(self._stored[name]).numel
            values = self.read(name, 0, min(_SAMPLED, numel)).to(torch.float32)
            digest.update(name.encode() + values.numpy().tobytes())
        return digest.hexdigest()[:16]
