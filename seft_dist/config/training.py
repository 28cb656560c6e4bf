"""Runs of seft train and seft reproduce."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal, get_args

from seft_dist.config.baselines import VARIANTS, BaselineConfig, MethodName, check_method, with_variant
from seft_dist.config.checks import check, check_numbers
from seft_dist.config.data import DataConfig
from seft_dist.config.inputs import ModelConfig
from seft_dist.config.method import AdamConfig, SeftConfig
from seft_dist.config.teacher import TeacherConfig
from seft_dist.config.validation import EvalConfig

BackendName = Literal["auto", "single", "ddp", "fsdp", "deepspeed"]
Packing = Literal["none", "gather", "resident"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
DEFAULT_STEPS = 1000
"""Optimizer steps of a run for which neither steps nor epochs is given."""
_MONTH = 30 * 24 * 3600


OPTIONS_WITHOUT_EFFECT = (
    *("output", "save_every", "save_every_minutes", "keep", "log_every", "trace", "trackers", "project", "run_name"),
    "timeout",
)
"""Options of a run that leave what it computes as it is, on any layout."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One fine-tuning run of seft train."""

    model: ModelConfig
    data: DataConfig
    output: str
    """Folder of the run: configuration, metrics, checkpoints, repaired model. It must be new or of a run to resume."""
    method: MethodName = "seft"
    """Method of training (docs/baselines.md): "seft"; SEFT with fixed settings: "seft_static", "seft_static_random",
    "seft_fixed_mask" and "spiel"; or another method to compare it with: "none" (the pruned model as it is), "lora",
    "lora_merged" (LoRA*, pruned again), "masked_lora" (SQFT), "spp", "masked_full" (all active weights),
    "norms_and_biases" (PERP)."""
    seft: SeftConfig = field(default_factory=SeftConfig)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    optim: AdamConfig = field(default_factory=AdamConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    parent: str | None = None
    """Folder or hub name of the model before it was pruned, from which seft.swap_fraction brings weights back. Each
    rank reads its own part at evolutions. None: there is none."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    steps: int | None = None
    """Optimizer steps of the run. None: as many as epochs makes, or 1000 without epochs."""
    epochs: float | None = None
    """Length of the run in passes over the data instead of steps, e.g. 3 or 0.5; the steps that this makes are printed
    at the start and written to config.yaml. None: the length is given by steps."""
    batch_size: int = 1
    """Most sequences of a rank in one forward pass."""
    global_batch: int | None = None
    """Sequences of one optimizer step over all ranks: as many forward passes as needed are accumulated, and every
    loss token weighs the same. None: batch_size for each rank; a resumed run keeps what it began with, on any
    number of ranks. A ds_config's batch sizes must agree or be "auto"."""
    backend: BackendName = "auto"
    """Backend that holds weights on several ranks: "fsdp" (FSDP2, sharded), "ddp" (a full copy each), "deepspeed"
    (chosen by --deepspeed), "single" (one process), or "auto": deepspeed if --deepspeed is given, else fsdp if there
    are several ranks, else single."""
    deepspeed: str | None = None
    """A ds_config file, e.g. ds_configs/zero3.json: train with DeepSpeed."""
    replicas: int = 1
    """FSDP only: number of groups of ranks that each hold a whole sharded copy (HSDP). 1: plain FSDP."""
    offload: bool = False
    """FSDP only: keep the weight shards in CPU memory (DeepSpeed: use ds_configs/zero3_offload.json)."""
    packing: Packing = "none"
    """Treatment of zeros in memory and traffic; the results are the same bits (docs/packing.md). "gather": FSDP ranks
    send each other bits and non-zero values; the weights at rest stay dense. "resident": the targets stay packed at
    rest as well, on FSDP ranks or in one process, and are dense one at a time while in use."""
    seed: int = 0
    """Seed of the data order."""
    group_by_length: bool = False
    """True: sequences of similar length come together, so that less is padded: those of 50 optimizer steps are sorted
    by length, and the steps shuffled. Each pass over the data still has every sequence once."""
    log_every: int = 1
    """Optimizer steps between records in metrics.jsonl and the trackers. In between, ranks exchange gradients only and
    do not wait for their devices; stop signals and losses that are not finite are noticed when a step is recorded."""
    save_every: int = 0
    """Optimizer steps between checkpoints, from which a rerun of the same command goes on. 0: only at the end."""
    save_every_minutes: float = 0.0
    """Minutes between checkpoints, in addition to save_every, by the clock of rank 0: all ranks save after the next
    logged step. 0: not by time."""
    keep: int = 2
    """Newest checkpoints that are kept; older ones are removed. The one with the lowest validation loss stays too."""
    trace: bool = False
    """True: also write trace.jsonl, exact hashes of every layer's support, mask, deltas and weights after each step
    (about 0.2 kB for each layer and step), in which seft compare finds the first step and layer that differ."""
    export: bool | Literal["last", "best"] = True
    """Model to write at the end as a Hugging Face folder, with its delta file: "last" (or true), as it is after the
    last step; "best", as it was at the evaluation with the lowest loss; false: none."""
    trackers: tuple[Tracker, ...] | str = ()
    """Experiment trackers beside metrics.jsonl, with commas in between: tensorboard, wandb, mlflow, trackio. A
    resumed run continues its own entry in them."""
    project: str = "seft_dist"
    """Project (MLflow: experiment) that the trackers file the run under."""
    run_name: str | None = None
    """Name of the run in the trackers. None: that of the output folder."""
    threads: int | None = None
    """CPU threads of a rank. None: the machine's cores divided by the ranks on it (CPU runs only)."""
    timeout: float = 1800.0
    """Seconds after which a collective that a rank did not enter stops the run."""

    def __post_init__(self) -> None:
        check_numbers(self)
        for name in ("batch_size", "replicas", "log_every", "keep"):
            check(getattr(self, name) >= 1, f"{name}={getattr(self, name)}", "at least 1")
        check(self.save_every >= 0, f"save_every={self.save_every}", "0 or a number of steps")
        self._check_length()
        self._check_outputs()
        check(self.global_batch is None or self.global_batch >= 1, f"global_batch={self.global_batch}", "at least 1")
        check(1 <= self.timeout <= _MONTH, f"timeout={self.timeout}", f"1 to {_MONTH} seconds (30 days)")
        check(self.threads is None or self.threads >= 1, f"threads={self.threads}", "at least 1, or null")
        check(bool(self.output), "output is empty", "a folder for the run")
        check_method(self.method, self.seft, self.baseline)
        length = f"{self.total_steps} steps" if self.epochs is None else f"{self.epochs} epochs"
        check(
            self.seft.steps is None or (self.epochs is None and self.seft.steps == self.total_steps),
            f"seft.steps={self.seft.steps} in a run of {length}",
            "it left out: SEFT's schedule is as long as the run",
        )
        if self.is_seft:
            if self.epochs is None:  # check the schedule against the run's length
                dataclasses.replace(with_variant(self.method, self.seft), steps=self.total_steps)
        else:
            self._check_baseline()
        check(
            self.method != "none" or self.teacher.path is None,
            f"teacher.path={self.teacher.path} with method=none",
            "a method that trains, or no teacher: nothing would learn from it",
        )
        check(
            (self.parent is not None) == (self.is_seft and self.seft.swap_fraction > 0),
            f"parent={self.parent} with method={self.method}, seft.swap_fraction={self.seft.swap_fraction}",
            "--parent with the model before it was pruned together with seft.swap_fraction above 0, or neither",
        )
        check(
            self.parent is None or self.parent != self.model.path,
            f"parent={self.parent}, which is model.path",
            "the model before it was pruned: the pruned one has nothing to bring back",
        )
        if self.backend != "auto":
            check(
                (self.backend == "deepspeed") == (self.deepspeed is not None),
                f"backend={self.backend} with deepspeed={self.deepspeed}",
                "--deepspeed FILE with backend deepspeed (or auto), and without it otherwise",
            )
        if self.replicas > 1 or self.offload:
            check(
                self.deepspeed is None and self.backend in ("auto", "fsdp"),
                "replicas or offload without FSDP",
                "backend fsdp",
            )
        if self.packing != "none":
            check(
                self.deepspeed is None
                and self.backend != "ddp"
                and (self.packing, self.backend) != ("gather", "single"),
                f"packing={self.packing} with backend={self.backend}, deepspeed={self.deepspeed}",
                "backend fsdp (or single, for resident), without DeepSpeed",
            )
        check(not (self.offload and self.packing == "resident"), "packing=resident with offload", "one of the two")

    def _check_length(self) -> None:
        check(self.steps is None or self.steps >= 1, f"steps={self.steps}", "at least 1")
        check(self.epochs is None or self.epochs > 0, f"epochs={self.epochs}", "a number above 0, e.g. 3")
        both = f"steps={self.steps} with epochs={self.epochs}"
        check(self.steps is None or self.epochs is None, both, "one of them: --epochs alone is --steps null --epochs 1")

    def _check_outputs(self) -> None:
        minutes = self.save_every_minutes
        check(0 <= minutes <= _MONTH / 60, f"save_every_minutes={minutes}", f"0 to {_MONTH // 60} minutes (30 days)")
        self.eval.check_text(self.validation_data, "data" if self.eval.data is None else "eval.data")
        if self.export == "best":
            wanted = "text to judge by: --eval.data.path FILE, or --data.holdout_share 0.02"
            check(self.validation_data is not None, "export=best without eval.data", wanted)
        unknown = sorted(set(self.tracker_names) - set(get_args(Tracker)))
        check(not unknown, f"trackers={','.join(unknown)}", f"names out of {', '.join(get_args(Tracker))}")
        check(bool(self.project), "project is empty", "a name for the trackers")
        check(self.run_name is None or bool(self.run_name), "run_name is empty", "a name, or null")

    def _check_baseline(self) -> None:
        """Refuse what only SEFT can do."""
        method, layouts = f"method={self.method}", "backend single, fsdp or ddp, without"
        check(self.deepspeed is None, f"deepspeed={self.deepspeed} with {method}", f"{layouts} DeepSpeed")
        check(self.replicas == 1, f"replicas={self.replicas} with {method}", f"{layouts} replicas (HSDP)")
        check(not self.offload, f"offload with {method}", f"{layouts} offloaded weights")
        check(self.packing == "none", f"packing={self.packing} with {method}", "packing none: its weights are stored")
        check(not self.trace, f"trace with {method}", "no trace: it has no supports and no deltas")

    @property
    def validation_data(self) -> DataConfig | None:
        """Text of the evaluations: eval.data, else the records that holdout_share keeps out of training, if any."""
        if self.eval.data is None and self.data.holdout_share and not self.data.holdout:
            return self.data.held_out
        return self.eval.data

    @property
    def is_seft(self) -> bool:
        """True if the method is SEFT, with any settings."""
        return self.method in VARIANTS

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run; known once ``epochs`` has been turned into steps."""
        assert self.epochs is None, "epochs depend on the data, which was not read yet"
        return DEFAULT_STEPS if self.steps is None else self.steps

    @property
    def tracker_names(self) -> tuple[str, ...]:
        """Names of the trackers, each once."""
        given = self.trackers.split(",") if isinstance(self.trackers, str) else self.trackers
        return tuple(dict.fromkeys(name.strip() for name in given if name.strip()))

    def with_method_settings(self) -> "TrainConfig":
        """Return this configuration with the settings of SEFT that its method stands for."""
        return dataclasses.replace(self, seft=with_variant(self.method, self.seft))


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig:
    """One check of seft reproduce: the same run several times and on several layouts."""

    output: str
    """Folder of the check: a run folder and a log for each run, comparisons, reproduce.json. The same command again
    goes on where it was stopped."""
    layouts: str = "single:1"
    """Layouts to run on, with commas in between: BACKEND:RANKS, BACKEND being single, ddp, fsdp, zero0 to zero3 or
    zero3_offload. Options of seft train may follow, for this layout only, e.g. "single:1, fsdp:4 --replicas 2".
    All get the same global batch: --global_batch, or batch_size for each rank of the first layout."""
    runs: int = 2
    """Number of runs of each layout; the later ones must equal the first one bit for bit."""
    launcher: str | None = None
    """Command that starts the ranks, with {ranks} for their number, e.g. "srun --ntasks={ranks} python" for the nodes
    of a Slurm job. None: python for one rank, torchrun on this machine for several."""

    def __post_init__(self) -> None:
        check_numbers(self)
        check(bool(self.output), "output is empty", "a folder for the runs")
        check(bool(self.layouts.strip()), "layouts is empty", "at least one BACKEND:RANKS, e.g. fsdp:2")
        check(self.runs >= 1, f"runs={self.runs}", "at least 1")
