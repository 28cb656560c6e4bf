"""Settings every test shares: one thread per process, no network, no accelerator probing, fork-safe."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Tests marked gpu compare bits: cuBLAS is deterministic only with this workspace, which it reads when it starts
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp(prefix="seft-datasets-"))

import hypothesis
import pytest
import torch

# How long an example takes is the machine's business: the first one may compile the kernels.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
# For runs in which every example is slow (tests/test_kernels_sanitized.py)
hypothesis.settings.register_profile("few", max_examples=12, deadline=None)

# Files that take longest, the longest first. Workers begin with them: none is left alone with one at the end.
LONGEST = [
    f"test_{name}.py"
    for name in (
        *("slurm_train", "layouts", "launchers", "slurm", "stopping", "reproduce", "pattern_layouts", "train"),
        *("families", "gpu_check", "evaluation_tasks", "properties", "backends", "study", "hf_trainer", "quickstart"),
    )
]

# Ranks are forked from this process: it must never have started a thread pool of its own.
torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the longest files first, where several workers share the files (--no-loadscope-reorder keeps the order)."""
    order = {name: i for i, name in enumerate(LONGEST)}
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Refuse tests that leave several threads set: a fork of a process whose thread pool is in use may hang."""
    yield
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert threads == 1, f"this test, or a fixture of its module, leaves {threads} threads set: needs threads=1"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of tokenised data for this module alone."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("datasets")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the inputs of a tiny run: ``pruned``, a model with its tokenizer, and ``text.jsonl``."""
    from tests.folders import model_folder, text_file

    folder = tmp_path_factory.mktemp("inputs")
    model_folder(folder / "pruned")
    text_file(folder / "text.jsonl")
    return folder
