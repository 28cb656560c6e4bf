"""On SmolLM2-135M-Instruct and CPython's own documentation text: the method on two layers, and what pruning loses."""

from pathlib import Path
from pydoc_data.topics import topics  # type: ignore[import-not-found,unused-ignore]
from typing import Any

import pytest
import torch

from benchmarks.pruning import measure
from seft_dist.config import DataConfig, ModelConfig, PruneConfig
from seft_dist.pruning.masks import Ranking
from tests.layouts import train
from tests.models import moving, prune_
from tests.ranks import run_ranks

MODEL = Path(__file__).parents[1] / "models" / "SmolLM2-135M-Instruct"
STEPS = 12


def real_slice() -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.config.use_cache = False
    return prune_(model, 0.6)


def real_batch(step: int, size: int) -> dict[str, torch.Tensor]:
    from transformers import AutoTokenizer

    text = "\n".join(topics[name] for name in sorted(topics)[:20])
    ids = torch.tensor(AutoTokenizer.from_pretrained(MODEL)(text)["input_ids"])
    part = ids[step * size * 64 : (step + 1) * size * 64].view(size, 64)
    return {"input_ids": part, "labels": part}


needs_model = pytest.mark.skipif(
    not (MODEL / "config.json").exists(), reason="needs the demo model: make quickstart fetches it"
)


@pytest.mark.slow
@needs_model
@pytest.mark.parametrize(("layout", "world_size"), [("fsdp", 2), ("zero3", 2)])
def test_real_weights_follow_one_process(layout: str, world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.layouts.batch", lambda step, size: real_batch(step, size))
    config = moving(density=0.01, interval=4, window=2, steps=STEPS)

    def on_rank(rank: int, world: int, where: str) -> dict[str, Any]:
        run = train(where, world, config, STEPS, rank, global_batch=4, model=real_slice(), lr=2e-3)
        del run["state"]
        return run

    single = run_ranks(on_rank, 1, "single", timeout=250)[0]
    several = run_ranks(on_rank, world_size, layout, timeout=250)[0]
    assert sum(single["losses"][-3:]) < 0.95 * sum(single["losses"][:3])
    assert torch.allclose(torch.tensor(several["losses"]), torch.tensor(single["losses"]), rtol=1e-3)
    for run in (single, several):
        assert len(run["digests"]) == 3
        assert all(layer.zeros == layer.numel - layer.mask_size for layer in run["sparsity"])


@pytest.mark.slow
@needs_model
def test_sparsegpt_loses_less_than_wanda_and_wanda_than_magnitude(tmp_path: Path) -> None:
    """In every linear of two layers, on the text that the statistics come from."""
    (tmp_path / "text.txt").write_text("\n".join(topics[name] for name in sorted(topics)[:20]))
    config = PruneConfig(
        model=ModelConfig(path=str(MODEL), dtype="float32"),
        data=DataConfig(path=str(tmp_path / "text.txt"), seq_len=128),
        method="sparsegpt",
        output=str(tmp_path / "out"),
        sequences=8,
    )
    found = list(measure(config, [Ranking("row", 0.6), Ranking("2:4", 0.5)], every=15))
    assert len(found) == 2 * 7 * 2 and not (tmp_path / "out").exists()
    for name, ranking, errors in found:
        assert 0 < errors["sparsegpt"] < errors["wanda"] < errors["magnitude"] < 1, (name, ranking, errors)
