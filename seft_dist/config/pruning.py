"""Runs of seft prune."""

from dataclasses import dataclass
from typing import Literal

from seft_dist.config.checks import check, check_numbers
from seft_dist.config.data import DataConfig
from seft_dist.config.inputs import ModelConfig


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """One run of seft prune (docs/pruning.md)."""

    model: ModelConfig
    output: str = ""
    """Folder for the pruned model (must not exist yet). Needed unless method is "none"."""
    data: DataConfig | None = None
    """Calibration text; needed by wanda, sparsegpt, curvature, OWL and compensate."""
    method: Literal["wanda", "sparsegpt", "curvature", "magnitude", "mask", "none"] = "wanda"
    """Weights that are pruned: "wanda": those with the smallest |weight| x norm of their input; "sparsegpt": those
    whose loss the remaining weights can compensate best, which are changed to do so; "curvature": those with the
    smallest |weight| x norm of their input x norm of their output's gradient, an estimate of how much the loss rises
    (needs a backward pass, and memory for each decoder layer's hidden states);
    "magnitude": those with the smallest |weight|; "mask": those that a file of kept positions does not name. "none"
    prunes nothing: it shows the zeros that a model has."""
    sparsity: float | None = None
    """Share of the targets' weights that become 0, above 0 and below 1. None: that of the pattern, or 0.6 without
    one."""
    pattern: str | None = None
    """N:M, e.g. "2:4": N of M consecutive weights of a row stay. None: unstructured."""
    group: Literal["auto", "row", "layer", "global"] = "auto"
    """Scope in which weights are ranked: inside each output "row" (not curvature), over the whole weight of a linear
    ("layer"), or over all targets ("global"; not sparsegpt, which ranks inside blocks of 128 columns). "auto": "layer"
    for sparsegpt and curvature, "row" for the others."""
    layer_ratios: str = "uniform"
    """Sparsity of each layer: "uniform", "owl" (decoder layers with more outliers lose less, the total stays), or a
    JSON or YAML file from names (of decoder layers or linears) to sparsities; all others get --sparsity."""
    owl_threshold: float = 5.0
    """OWL: a score above this many times the mean of its decoder layer is an outlier (M in the paper)."""
    owl_lambda: float = 0.08
    """OWL: no two decoder layers' sparsities differ by more than twice this."""
    mask: str | None = None
    """Method "mask": a safetensors file with, for each target, its kept positions (docs/pruning.md)."""
    compensate: bool = False
    """True: the weights that stay make up for those that are pruned, whatever the method chose: they change such that
    each linear's output changes least (least squares on the calibration text, one decoder layer after the other)."""
    compensate_rounds: int = 8
    """Rounds in which compensate prunes each linear, for wanda and curvature: the smallest first, as they are once the
    others have made up for the round before. Every row, group or linear still ends with as many zeros. 1: all at once,
    as the method alone would choose."""
    dampening: float = 0.01
    """SparseGPT, compensate: share of the Hessian's mean diagonal that is added to its diagonal. SparseGPT raises it
    tenfold, twice at most, where the Hessian cannot be inverted."""
    targets: str = "all-linear"
    """Linears that are pruned, chosen as by seft.targets."""
    sequences: int = 128
    """Calibration sequences of data.seq_len tokens."""
    seed: int = 0
    """Seed for drawing the calibration sequences."""
    threads: int | None = None
    """CPU threads of a rank. None: the machine's cores divided by the ranks on it (CPU runs only)."""

    def __post_init__(self) -> None:
        check_numbers(self)
        check(
            self.sparsity is None or 0 < self.sparsity < 1,
            f"sparsity={self.sparsity}",
            "a share above 0 and below 1",
        )
        check(self.sequences >= 1, f"sequences={self.sequences}", "at least 1")
        check(self.threads is None or self.threads >= 1, f"threads={self.threads}", "at least 1, or null")
        check(self.owl_threshold > 0, f"owl_threshold={self.owl_threshold}", "a number above 0")
        check(0 < self.owl_lambda < 1, f"owl_lambda={self.owl_lambda}", "a share above 0 and below 1")
        check(0 < self.dampening <= 1, f"dampening={self.dampening}", "a share above 0 and at most 1")
        check(bool(self.output) or self.method == "none", "output is empty", "a folder for the pruned model")
        check(bool(self.layer_ratios), "layer_ratios is empty", '"uniform", "owl" or a file')
        check(
            (self.mask is not None) == (self.method == "mask"),
            f"method={self.method} with mask={self.mask}",
            "--method mask together with --mask FILE",
        )
        if self.pattern is not None:
            self._check_pattern()
        self._check_choices()

    def _check_pattern(self) -> None:
        kept, width = self.kept_of
        check(0 < kept < width, f"pattern={self.pattern}", 'N:M with 0 < N < M, e.g. "2:4"')
        check(
            self.sparsity is None or abs(self.sparsity - (1 - kept / width)) < 1e-6,
            f"sparsity={self.sparsity} with pattern={self.pattern}",
            f"sparsity {1 - kept / width:g}, or none: the pattern decides it",
        )
        check(
            self.group == "auto",
            f"group={self.group} with pattern={self.pattern}",
            "one of them: a pattern ranks inside each M weights",
        )
        check(
            self.layer_ratios == "uniform",
            f"layer_ratios={self.layer_ratios} with pattern={self.pattern}",
            "uniform: a pattern has one sparsity",
        )

    def _check_choices(self) -> None:
        """Refuse options that the method of pruning does not have."""
        if self.method in ("mask", "none"):
            choices = (self.sparsity, self.pattern, self.group, self.layer_ratios)
            check(
                choices == (None, None, "auto", "uniform"),
                f"method={self.method} with sparsity, pattern, group or layer_ratios",
                "none of them: the mask file decides, or nothing is pruned",
            )
        check(not self.compensate or self.method != "none", "compensate with method=none", "a method that prunes")
        check(self.compensate_rounds >= 1, f"compensate_rounds={self.compensate_rounds}", "at least 1")
        given = self.compensate or self.compensate_rounds == PruneConfig.compensate_rounds
        check(given, f"compensate_rounds={self.compensate_rounds} without compensate", "--compensate true too")
        check(
            not self.needs_text or self.data is not None,
            f"{self._reader_of_text} without data",
            "calibration text: --data.path FILE",
        )
        separate = self.data is not None and self.data.separate
        check(not separate, "data.separate", "false: only training packs several documents")
        check(
            self.group != "global" or self.method != "sparsegpt",
            "group=global with method=sparsegpt",
            "row or layer: SparseGPT decides block by block, before later layers are seen",
        )
        check(
            self.method != "curvature" or self.ranking in ("layer", "global"),
            f"method=curvature with {f'pattern={self.pattern}' if self.pattern else 'group=row'}",
            "group layer or global; or --method wanda: inside a row both rank alike",
        )
        check(
            self.group != "global" or self.layer_ratios == "uniform",
            f"group=global with layer_ratios={self.layer_ratios}",
            "one of them: both decide how many weights each layer loses",
        )

    @property
    def chooses_in_rounds(self) -> bool:
        """True if compensate chooses again what is pruned: its own criterion is that of wanda and of curvature."""
        return self.compensate and self.compensate_rounds > 1 and self.method in ("wanda", "curvature")

    @property
    def needs_text(self) -> bool:
        """True if calibration text is read."""
        return self._reader_of_text is not None

    @property
    def _reader_of_text(self) -> str | None:
        if self.method in ("wanda", "sparsegpt", "curvature"):
            return f"method={self.method}"
        if self.layer_ratios == "owl":
            return "layer_ratios=owl"
        return "compensate=True" if self.compensate else None

    @property
    def kept_of(self) -> tuple[int, int]:
        """N and M of the pattern."""
        parts = (self.pattern or "").split(":")
        check(len(parts) == 2 and all(p.isdecimal() for p in parts), f"pattern={self.pattern}", 'N:M, e.g. "2:4"')
        return int(parts[0]), int(parts[1])

    @property
    def share(self) -> float:
        """The sparsity, resolved."""
        if self.pattern is not None:
            return 1 - self.kept_of[0] / self.kept_of[1]
        return 0.6 if self.sparsity is None else self.sparsity

    @property
    def ranking(self) -> str:
        """The group, resolved: "row", "layer", "global" or the pattern."""
        if self.pattern is not None:
            return self.pattern
        if self.group != "auto":
            return self.group
        return "layer" if self.method in ("sparsegpt", "curvature") else "row"
