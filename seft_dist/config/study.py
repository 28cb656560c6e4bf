"""Studies of seft study: which methods are compared, on what, and what each of them may cost."""

from dataclasses import dataclass, field
from typing import Any, Literal

from seft_dist.config.checks import check, check_numbers

Keep = Literal["all", "chosen", "none"]


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """One study of seft study (docs/studies.md)."""

    output: str
    """Folder of the study. The same command again goes on with what is missing; several at a time share the work."""
    bases: dict[str, dict[str, Any]]
    """Models that methods start from, by name: either {path: FOLDER}, or options of seft prune by their dotted
    names, e.g. {model.path: FOLDER, method: wanda, sparsity: 0.6}, by which it is pruned once into OUTPUT/bases/NAME.
    Without data.path the calibration text is the training part."""
    data: dict[str, Any]
    """The parts of the text: train, validation, test and forgetting (may be missing), each a path or options of a
    data set ({path: ..., kind: ...}); or split: {path: FILE, shares: {train: 4, validation: 1, test: 1}, by: hash (or
    index), repeated: keep (or drop)}, which makes those that shares names. No record may be in two parts."""
    methods: dict[str, dict[str, Any]]
    """The methods that are compared, by name: options of seft train by their dotted names. A list is a grid, out
    of which one value is chosen on the validation part, e.g. {optim.lr: [1e-4, 3e-4]}. "base: NAME" starts from
    another base, "method: none" measures the base as it is."""
    tokens: int
    """Budget: tokens that each run is trained on, in sequences of data.seq_len, rounded down to optimizer steps."""
    base: str | None = None
    """Base of the methods that name none. None: the first of bases."""
    train: dict[str, Any] = field(default_factory=dict)
    """Options of seft train that all methods share; a method's own win."""
    evaluate: dict[str, Any] = field(default_factory=dict)
    """Options of seft evaluate, e.g. {data.seq_len: 512, stride: 256}. Tasks are asked of the final runs only.
    What is not said about data is as in training."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the final runs, with the chosen settings; each is both the run's seed and seft.seed."""
    search_seed: int | None = None
    """Seed of the runs among which settings are chosen. None: the first of seeds, whose run is then not made twice."""
    unequal_grids: bool = False
    """True: accept methods for which different numbers of settings are tried. The tables say so."""
    reference: str | None = None
    """Method with which the others are compared, seed by seed. None: the first of methods."""
    keep: Keep = "chosen"
    """Choice of the runs that keep their exported models and checkpoints once they are measured: "all", those with a
    "chosen" setting, or "none". To be measured in another way later, a run without its model is trained again."""
    jobs: int = 1
    """Processes at a time."""
    threads: int | None = None
    """CPU threads of a process. None: the machine's cores divided by jobs."""
    launcher: str | None = None
    """Words in front of the script of each command (launch/train.py, evaluate.py, prune.py of the package), e.g.
    "torchrun --standalone --nproc-per-node 8"; {slot} in them becomes 0 to jobs - 1, e.g.
    "env CUDA_VISIBLE_DEVICES={slot} python". None: python."""
    figures: bool = True
    """False: no figures (they need matplotlib)."""

    def __post_init__(self) -> None:
        check_numbers(self)
        check(bool(self.output), "output is empty", "a folder for the study")
        for name in ("bases", "methods", "seeds"):
            check(bool(getattr(self, name)), f"{name} is empty", "at least one")
        check(self.tokens >= 1, f"tokens={self.tokens}", "at least the tokens of one optimizer step")
        check(len(set(self.seeds)) == len(self.seeds), f"seeds={list(self.seeds)}", "each seed once")
        check(self.jobs >= 1, f"jobs={self.jobs}", "at least 1")
        check(self.threads is None or self.threads >= 1, f"threads={self.threads}", "at least 1, or null")
        check(self.base is None or self.base in self.bases, f"base={self.base}", f"one of {', '.join(self.bases)}")
        known = self.reference is None or self.reference in self.methods
        check(known, f"reference={self.reference}", f"one of {', '.join(self.methods)}")

    @property
    def default_base(self) -> str:
        """Base of the methods that name none."""
        return self.base or next(iter(self.bases))

    @property
    def default_reference(self) -> str:
        """Method with which the others are compared."""
        return self.reference or next(iter(self.methods))

    @property
    def first_seed(self) -> int:
        """Seed of the runs among which settings are chosen."""
        return self.seeds[0] if self.search_seed is None else self.search_seed
