"""Reading what runs have left: seft evaluate and seft sweep."""

from dataclasses import dataclass, field
from typing import Literal

from seft_dist.config.checks import check, check_numbers
from seft_dist.config.data import DataConfig

DType = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """One evaluation of seft evaluate."""

    models: dict[str, str] = field(default_factory=dict)
    """Models to evaluate side by side, as name: folder; at least one."""
    data: DataConfig | None = None
    """Text for perplexity. None: no perplexity, only tasks."""
    dtype: DType = "auto"
    """Type of the weights: "float32", "bfloat16", or "auto", that of each checkpoint."""
    batch_size: int = 4
    """Sequences of a rank in one forward pass."""
    stride: int | None = None
    """Perplexity of a text in sliding windows of data.seq_len tokens that begin every so many tokens, below
    data.seq_len: each token is scored once, with at least data.seq_len - stride tokens before it. None: windows side by
    side (blocks), the first token of each not scored. A chat or instruction is one sequence, without windows."""
    max_tokens: int | None = None
    """Measure perplexity on at most this many tokens. None: all."""
    tasks: str | None = None
    """Tasks of lm-evaluation-harness (extra "eval"), with commas in between, e.g. "arc_easy,boolq". None: none."""
    task_files: dict[str, str] = field(default_factory=dict)
    """Tasks whose records are read from a file (.json, .jsonl, .parquet), as task: file, instead of the hub. The file
    has the columns of the task's data set; it serves for the questions and for few-shot examples."""
    tasks_path: str | None = None
    """Folder with task descriptions of your own (.yaml), as lm-eval's --include_path."""
    fewshot: int | None = None
    """Solved examples before each question. None: what each task says."""
    limit: int | None = None
    """Ask only the first so many questions of each task. None: all."""
    chat_template: bool = False
    """True: put the questions into the tokenizer's chat template, as lm-eval's --apply_chat_template."""
    targets: str = "all-linear"
    """Linears that the sparsity report covers, chosen as by seft.targets."""
    threads: int | None = None
    """CPU threads of a rank. None: the machine's cores divided by the ranks on it (CPU runs only)."""
    output: str | None = None
    """JSON file for the results. None: only print them."""

    def __post_init__(self) -> None:
        check_numbers(self)
        check(self.threads is None or self.threads >= 1, f"threads={self.threads}", "at least 1, or null")
        check(bool(self.models), "models is empty", "at least one, each with a name: --models.NAME FOLDER")
        check(self.batch_size >= 1, f"batch_size={self.batch_size}", "at least 1")
        check(self.max_tokens is None or self.max_tokens >= 2, f"max_tokens={self.max_tokens}", "at least 2, or null")
        check(self.data is not None or bool(self.tasks), "neither data nor tasks", "--data.path FILE or --tasks NAMES")
        if self.data is not None:
            check(self.data.mix is None, "data.mix", "data.path: each text is measured by itself")
            check(not self.data.separate, "data.separate", "false: only training packs several documents")
        if self.stride is not None:
            check(self.data is not None, f"stride={self.stride} without data", "--data.path FILE")
            window = self.data.seq_len if self.data is not None else 0
            check(
                1 <= self.stride < window,
                f"stride={self.stride} with data.seq_len={window}",
                "a stride of 1 to data.seq_len - 1 tokens",
            )
        names = [name.strip() for name in (self.tasks or "").split(",")]
        check(
            not self.tasks or all(names), f"tasks={self.tasks!r}", "names with commas in between, e.g. arc_easy,boolq"
        )
        unused = sorted(self.task_files.keys() - set(names))
        check(not unused, f"task_files names {', '.join(unused)}", f"only tasks that --tasks names ({self.tasks})")
        for name in ("tasks_path", "fewshot", "limit"):
            check(getattr(self, name) is None or bool(self.tasks), f"{name} without tasks", "--tasks NAMES")
        check(not self.chat_template or bool(self.tasks), "chat_template without tasks", "--tasks NAMES")
        check(self.fewshot is None or self.fewshot >= 0, f"fewshot={self.fewshot}", "0 or more, or null")
        check(self.limit is None or self.limit >= 1, f"limit={self.limit}", "at least 1, or null")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """The table of a sweep, made by seft sweep."""

    folder: str
    """Folder whose subfolders are runs of seft train; gets sweep.csv, sweep.md and sweep.png. With tasks.tsv in it
    (by slurm/sweep.sbatch: a line for each run, its name, a tab, its options), runs that have not begun are listed."""
    figure: bool = True
    """False: no sweep.png (it needs matplotlib)."""

    def __post_init__(self) -> None:
        check_numbers(self)
        check(bool(self.folder), "folder is empty", "the folder of a sweep")
