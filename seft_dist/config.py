"""Every knob of the project, once: frozen, keyword-only, checked when made.

A field's docstring says its meaning, its unit and its special values; ``--help`` of each door prints it.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

DropSchedule = Literal["cosine", "linear", "constant"]
OnDrop = Literal["commit_reactivated", "keep"]
Init = Literal["gradient", "random"]
Moments = Literal["zero", "seeded"]
Drop = Literal["magnitude", "movement", "random"]
Grow = Literal["gradient", "momentum", "random"]
Adapt = Literal["sensitivity", "activation", "magnitude", "none"]
Scope = Literal["layer", "global"]
Selection = Literal["auto", "gather", "radix"]
Decay = Literal["weight", "delta"]
Backend = Literal["auto", "single", "ddp", "fsdp", "deepspeed"]
DType = Literal["auto", "float32", "bfloat16"]


def _check(condition: bool, found: str, needed: str) -> None:
    if not condition:
        raise ValueError(f"{found}: needs {needed}")


@dataclass(frozen=True, kw_only=True)
class SeftConfig:
    """The method: how many deltas, where they may go, when they move (docs/algorithm.md)."""

    density: float = 0.01
    """Share of each target weight's positions that carry a trainable delta, above 0 and at most 1. It may not exceed the
    share of active (non-zero) weights of any target."""
    targets: str = "all-linear"
    """Which linears get deltas: "all-linear" (every nn.Linear except the output head and tied weights), or a regular
    expression that is searched in module names, e.g. "q_proj|v_proj"."""
    steps: int | None = None
    """Optimizer steps of the whole run, T of the drop schedule. None: unknown, the drop fraction stays constant.
    launch/train.py sets it from its own --steps."""
    interval: int = 60
    """Optimizer steps between evolutions: one happens at each step divisible by it."""
    window: int = 1
    """Optimizer steps, ending with the evolution's, over which the dense gradient is accumulated. At most interval."""
    begin: int = 1
    """First optimizer step (counted from 1) at which an evolution may happen."""
    end: int | None = None
    """Last optimizer step at which an evolution may happen. None: 80 % of steps, or never ending if steps is None."""
    static: bool = False
    """True: no evolution; the first support is kept to the end (the static baseline)."""
    drop_fraction: float = 0.2
    """Share of the support that moves in an evolution at the start of the run, f0, 0 to 1."""
    drop_schedule: DropSchedule = "cosine"
    """How the moving share falls to 0 at the last step: "cosine", "linear", or "constant" (does not fall)."""
    on_drop: OnDrop = "commit_reactivated"
    """What a dropped entry leaves behind. "commit_reactivated": the base weight returns bit for bit, except at reactivated
    positions (base 0), whose delta becomes the base. "keep": every dropped delta becomes part of the base."""
    reactivation: float = 1.0
    """Largest share of the entries grown in a step that may be pruned positions, 0 to 1. 0: the mask never moves."""
    init: Init = "gradient"
    """First support: "gradient" (an evolution of the empty support on the first step's gradient) or "random" (active
    positions drawn from the seed)."""
    moments: Moments = "zero"
    """Adam moments of a grown entry: "zero" (age 0) or "seeded" from the window's mean gradient and mean square."""
    drop: Drop = "magnitude"
    """What is dropped: smallest "magnitude" |delta|, smallest "movement" -delta x accumulated gradient, or "random"."""
    grow: Grow = "gradient"
    """What is grown: largest |accumulated "gradient"|, largest row/column second "momentum" (SM3), or "random"."""
    adapt: Adapt = "sensitivity"
    """What leaves the mask again: smallest "sensitivity" |weight x accumulated gradient|, smallest "activation"
    |weight| x input norm (Wanda), smallest "magnitude" |weight|, or "none" (sparsity is lost, as SpIEL on a pruned model)."""
    scope: Scope = "layer"
    """Where Adapt ranks: inside each "layer", which keeps its own target, or "global" over all of them with one target."""
    selection: Selection = "auto"
    """Form of the distributed top-k: "gather" candidates, "radix" histograms, or "auto", the one that moves fewer bytes. All
    give the same result."""
    decay: Decay = "weight"
    """What weight_decay shrinks: the "weight" (base + delta, as torch.optim.AdamW) or only the "delta" (towards the base)."""
    allow_dense: bool = False
    """True: accept a model whose targets have no pruned positions."""
    seed: int = 0
    """Seed of the random criteria and of the random first support."""

    def __post_init__(self) -> None:
        _check(0 < self.density <= 1, f"density={self.density}", "a share above 0 and at most 1, e.g. 0.01 for 1 %")
        _check(bool(self.targets), "targets is empty", '"all-linear" or a regular expression for module names')
        _check(self.interval >= 1, f"interval={self.interval}", "at least 1 optimizer step")
        _check(
            1 <= self.window <= self.interval,
            f"window={self.window} with interval={self.interval}",
            "a window of 1 to interval steps; make the window shorter or the interval longer",
        )
        _check(self.begin >= 1, f"begin={self.begin}", "an optimizer step from 1 on")
        _check(0 <= self.drop_fraction <= 1, f"drop_fraction={self.drop_fraction}", "a share from 0 to 1")
        _check(0 <= self.reactivation <= 1, f"reactivation={self.reactivation}", "a share from 0 to 1")
        if self.steps is not None:
            _check(self.steps >= 1, f"steps={self.steps}", "at least 1 optimizer step")
        last = self.last_evolution
        if self.steps is not None and last is not None:
            _check(
                last < self.steps,
                f"the last evolution would be at step {last} of {self.steps}",
                "at least one update after it (grown weights start at 0); set end below steps, or raise steps",
            )

    @property
    def last_step(self) -> int | None:
        """Last step at which an evolution may happen, None if there is no such limit."""
        if self.end is not None or self.steps is None:
            return self.end
        return min(int(0.8 * self.steps), self.steps - 1)

    @property
    def last_evolution(self) -> int | None:
        """Step of the run's last evolution, the first support included; None if unknown, 0 if there is none."""
        first = 1 if self.init == "gradient" and self.steps is not None and self.steps == 1 else 0
        if self.static:
            return first
        if self.last_step is None:
            return None
        last = self.last_step // self.interval * self.interval
        return last if last >= self.begin else first


@dataclass(frozen=True, kw_only=True)
class AdamConfig:
    """The update of the deltas and its learning rate. With --deepspeed, keys of the ds_config's optimizer block and its
    gradient_clipping take the place of these (a warning says so where they differ)."""

    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the two Adam moments, each 0 to below 1."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay per step, as a multiple of the learning rate (see seft.decay)."""
    max_grad_norm: float | None = 1.0
    """Largest global norm of the deltas' gradient; it is scaled down to this. None: no clipping."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay of the learning rate after the warm-up, to 0 at the last step; "constant" does not decay. A scheduler block
    in the ds_config takes its place."""
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises linearly from 0, 0 to 1."""

    def __post_init__(self) -> None:
        _check(self.lr > 0, f"optim.lr={self.lr}", "a learning rate above 0")
        _check(all(0 <= b < 1 for b in self.betas), f"optim.betas={self.betas}", "two rates from 0 to below 1")
        _check(self.eps > 0, f"optim.eps={self.eps}", "a number above 0")
        _check(self.weight_decay >= 0, f"optim.weight_decay={self.weight_decay}", "a number from 0 on")
        _check(0 <= self.warmup <= 1, f"optim.warmup={self.warmup}", "a share from 0 to 1")
        if self.max_grad_norm is not None:
            _check(self.max_grad_norm > 0, f"optim.max_grad_norm={self.max_grad_norm}", "a norm above 0, or null")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and how its weights are held."""

    path: str
    """Folder of a Hugging Face causal LM (config.json, *.safetensors, tokenizer), or a hub name."""
    dtype: DType = "auto"
    """Type of the weights: "float32", "bfloat16", or "auto", that of the checkpoint."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer; None: the model's own."""
    activation_checkpointing: bool = False
    """True: keep only each decoder layer's input and compute the layer again in backward (less memory, about 1/3 more
    time)."""

    def __post_init__(self) -> None:
        _check(bool(self.path), "model.path is empty", "a folder of a Hugging Face causal LM, or a hub name")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which records, and how they become token sequences."""

    path: str
    """A file (.txt, .json, .jsonl, .parquet), a folder of such files, or the hub name of a dataset. A .txt file is one
    record."""
    name: str | None = None
    """Configuration of a hub dataset, e.g. "wikitext-2-raw-v1"."""
    split: str = "train"
    """Split of a hub dataset; local files are one split named "train"."""
    kind: Literal["auto", "text", "instruction", "chat"] = "auto"
    """How a record is read: "text" (packed into full blocks), "instruction" (prompt and answer; loss on the answer),
    "chat" (a list of messages; loss on the assistant's turns); "auto" decides by the columns."""
    text_field: str = "text"
    """Column with the text."""
    prompt_field: str = "instruction"
    """Column with the instruction or question."""
    input_field: str = "input"
    """Column with an optional further input, appended to the instruction where present and not empty."""
    answer_field: str = "output"
    """Column with the answer."""
    messages_field: str = "messages"
    """Column with a list of {"role", "content"} messages."""
    seq_len: int = 1024
    """Tokens in a sequence: the length of packed blocks, and the limit at which longer records are cut."""
    holdout_every: int = 0
    """Keep every n-th record (the n-th, 2n-th, ...) out of training, for evaluation. 0: keep none out."""
    holdout: bool = False
    """True: read the records that holdout_every keeps out, instead of the others."""
    max_records: int | None = None
    """Read at most this many records, after holding out. None: all."""

    def __post_init__(self) -> None:
        _check(bool(self.path), "data.path is empty", "a file, a folder or the hub name of a dataset")
        _check(self.seq_len >= 2, f"data.seq_len={self.seq_len}", "at least 2 tokens")
        _check(
            self.holdout_every == 0 or self.holdout_every >= 2,
            f"data.holdout_every={self.holdout_every}",
            "0 or at least 2",
        )
        _check(
            not self.holdout or self.holdout_every >= 2,
            "data.holdout without holdout_every",
            "data.holdout_every of 2 or more",
        )
        _check(
            self.max_records is None or self.max_records >= 1,
            f"data.max_records={self.max_records}",
            "at least 1, or null",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One fine-tuning run of launch/train.py."""

    model: ModelConfig
    data: DataConfig
    output: str
    """Folder of the run: configuration, metrics, checkpoints, repaired model. It must be new or of a run to resume."""
    seft: SeftConfig = field(default_factory=SeftConfig)
    optim: AdamConfig = field(default_factory=AdamConfig)
    steps: int = 1000
    """Optimizer steps of the run."""
    batch_size: int = 1
    """Sequences of a rank in one forward pass."""
    accumulate: int = 1
    """Forward passes whose gradients are averaged into one optimizer step. A ds_config's gradient_accumulation_steps must
    agree or be "auto"."""
    backend: Backend = "auto"
    """How weights are held on several ranks: "fsdp" (FSDP2, sharded), "ddp" (a full copy each), "deepspeed" (chosen by
    --deepspeed), "single" (one process), or "auto": deepspeed if --deepspeed is given, else fsdp if there are several
    ranks, else single."""
    deepspeed: str | None = None
    """A ds_config file, e.g. ds_configs/zero3.json: train with DeepSpeed."""
    replicas: int = 1
    """FSDP only: number of groups of ranks that each hold a whole sharded copy (HSDP). 1: plain FSDP."""
    offload: bool = False
    """FSDP only: keep the weight shards in CPU memory (DeepSpeed: use ds_configs/zero3_offload.json)."""
    seed: int = 0
    """Seed of the data order."""
    log_every: int = 1
    """Optimizer steps between records in metrics.jsonl and the trackers."""
    save_every: int = 0
    """Optimizer steps between checkpoints, from which a rerun of the same command goes on. 0: only at the end."""
    export: bool = True
    """True: write the repaired model as a Hugging Face folder, and the delta file, at the end."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Experiment trackers beside metrics.jsonl."""
    threads: int | None = None
    """CPU threads of a rank. None: the machine's cores divided by the ranks on it (CPU runs only)."""
    timeout: float = 1800.0
    """Seconds after which a collective that a rank did not enter stops the run."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "replicas", "log_every"):
            _check(getattr(self, name) >= 1, f"{name}={getattr(self, name)}", "at least 1")
        _check(self.save_every >= 0, f"save_every={self.save_every}", "0 or a number of steps")
        _check(self.timeout > 0, f"timeout={self.timeout}", "seconds above 0")
        _check(self.threads is None or self.threads >= 1, f"threads={self.threads}", "at least 1, or null")
        _check(bool(self.output), "output is empty", "a folder for the run")
        dataclasses.replace(self.seft, steps=self.steps)  # checks the schedule against the run's length
        if self.backend != "auto":
            _check(
                (self.backend == "deepspeed") == (self.deepspeed is not None),
                f"backend={self.backend} with deepspeed={self.deepspeed}",
                "--deepspeed FILE with backend deepspeed (or auto), and without it otherwise",
            )
        if self.replicas > 1 or self.offload:
            _check(
                self.deepspeed is None and self.backend in ("auto", "fsdp"),
                "replicas or offload without FSDP",
                "backend fsdp",
            )


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """One pruning run of launch/prune.py."""

    model: ModelConfig
    output: str
    """Folder for the pruned model (must not exist yet)."""
    data: DataConfig | None = None
    """Calibration text; needed by wanda."""
    method: Literal["wanda", "magnitude"] = "wanda"
    """Score of a weight: "wanda" |weight| x norm of its input, or "magnitude" |weight|."""
    sparsity: float = 0.6
    """Share of each target's weights that become 0, above 0 and below 1."""
    group: Literal["row", "layer"] = "row"
    """Where weights are ranked against each other: inside each output "row" (as Wanda), or over the whole "layer"."""
    targets: str = "all-linear"
    """Which linears are pruned: as seft.targets."""
    sequences: int = 128
    """Calibration sequences of data.seq_len tokens."""
    seed: int = 0
    """Seed for drawing the calibration sequences."""

    def __post_init__(self) -> None:
        _check(0 < self.sparsity < 1, f"sparsity={self.sparsity}", "a share above 0 and below 1")
        _check(self.sequences >= 1, f"sequences={self.sequences}", "at least 1")
        _check(
            self.method == "magnitude" or self.data is not None,
            "method=wanda without data",
            "calibration text: --data.path FILE",
        )
        _check(bool(self.output), "output is empty", "a folder for the pruned model")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """One evaluation of launch/evaluate.py."""

    models: dict[str, str]
    """Models to evaluate side by side, as name: folder."""
    data: DataConfig
    dtype: DType = "auto"
    """Type of the weights: "float32", "bfloat16", or "auto", that of each checkpoint."""
    batch_size: int = 4
    """Sequences in one forward pass."""
    max_tokens: int | None = None
    """Evaluate at most this many tokens. None: all."""
    targets: str = "all-linear"
    """Which linears the sparsity report covers: as seft.targets."""
    output: str | None = None
    """JSON file for the results. None: only print them."""

    def __post_init__(self) -> None:
        _check(bool(self.models), "models is empty", "at least one name: folder")
        _check(self.batch_size >= 1, f"batch_size={self.batch_size}", "at least 1")
        _check(self.max_tokens is None or self.max_tokens >= 2, f"max_tokens={self.max_tokens}", "at least 2, or null")
