"""Methods that train weights of the model itself, or none of them.

norms_and_biases: Zimmer, Andoni, Spiegel, Pokutta, "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs",
arXiv 2312.15230.
"""

from torch import Tensor, nn

from seft_dist.backends.shards import stored_part
from seft_dist.baselines.baseline import Baseline
from seft_dist.kernels.bits import pack, unpack
from seft_dist.modules.vectors import find_vectors


class NoRepair(Baseline):
    """Trains nothing: the pruned model as it is."""

    allows_dense = True

    def install(self) -> dict[str, nn.Parameter]:
        return {}

    @property
    def total_steps(self) -> int:
        return 0

    @property
    def changed_names(self) -> list[str]:
        return []


class MaskedFull(Baseline):
    """Full fine-tuning of the targets' active weights; zeros stay.

    A pruned weight's gradient is set to 0, so its moments are 0 and AdamW adds 0. Weight decay takes a share of 0.
    """

    _masks: list[Tensor]
    """Active weights of each target's stored part, packed into one bit each; set by ``install``."""

    def install(self) -> dict[str, nn.Parameter]:
        names = {target.weight_name(name): target.weight for name, target in self.targets.items()}
        self._masks = [pack(stored_part(parameter)[0] != 0) for parameter in names.values()]
        return names

    @property
    def trainable(self) -> int:
        return sum(self.active_counts)

    def active_mask(self, i: int) -> Tensor | None:
        return unpack(self._masks[i], self.trained.parts[i].values.numel())


class NormsAndBiases(Baseline):
    """Trains the scales and shifts of norms, and the biases of linears; no matrix changes."""

    allows_dense = True
    _loaded_frozen: set[int]
    """Identities of the parameters that were frozen when the model was loaded, and stay so; set by ``attach``."""

    def install(self) -> dict[str, nn.Parameter]:
        parameters = {
            vector.name: vector.parameter
            for vector in find_vectors(self.model).values()
            if id(vector.parameter) not in self._loaded_frozen
        }
        if not parameters:
            raise ValueError(
                f"{type(self.model).__name__} has no norms with parameters and no biases: choose another method"
            )
        return parameters

    def attach(self) -> None:
        if self._backend is None:
            # Parameters that a model of 16 bits keeps in fp32 are frozen when it is loaded.
            self._loaded_frozen = {
                id(parameter) for parameter in self.model.parameters() if not parameter.requires_grad
            }
        self._adam["weight_decay"] = 0.0  # which would pull scales of 1 towards 0; as with train_norms
        super().attach()

    @property
    def changed_names(self) -> list[str]:
        return [part.name for part in self.trained.parts]
