"""Weights of more than 2^31 positions for real: zeros that nobody writes take no memory, a few values are written."""

import dataclasses
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from seft_dist import SeftOptimizer
from seft_dist.export.delta import DeltaWriter, read_delta
from seft_dist.io import checkpoint
from seft_dist.kernels import ranking
from seft_dist.kernels.bits import count_outside, hash_of_bits, holds, pack, popcount, unpack, with_bits
from seft_dist.kernels.packing import decode, encode
from seft_dist.kernels.scatter import scatter_
from seft_dist.planning.architectures import find_architecture
from seft_dist.sparsity.hashes import hash_of_set
from tests.models import moving
from tests.test_large_weights import lazy_zeros, steps


class Experts(nn.Module):
    """Fused experts of which three exist, at both ends; the others are zeros and get no tokens."""

    def __init__(self, count: int) -> None:
        super().__init__()
        config = find_architecture("DeepSeek-V3")
        config.num_hidden_layers, config.first_k_dense_replace, config.n_group = 1, 0, 1
        config.hidden_size, config.moe_intermediate_size, config.n_routed_experts = 2048, 1024, count
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
        self.experts = model.model.layers[0].mlp.experts
        generator, self.live = torch.Generator().manual_seed(0), [0, count - 2, count - 1]
        for key, shape in (("gate_up_proj", (2048, 2048)), ("down_proj", (2048, 1024))):
            weight = lazy_zeros(count, *shape, dtype=torch.bfloat16)
            for expert in self.live:
                drawn = torch.randn(shape, generator=generator) / 32
                weight[expert] = drawn.masked_fill(torch.rand(shape, generator=generator) < 0.5, 0.0)
            setattr(self.experts, key, nn.Parameter(weight, requires_grad=False))

    def forward(self, t: int) -> Tensor:
        generator = torch.Generator().manual_seed(1 + t)
        x = torch.randn(16, 2048, generator=generator).bfloat16()
        chosen = torch.rand(16, 3, generator=generator).argsort(1)[:, :2]
        shares = torch.rand(16, 2, generator=generator).bfloat16()
        return self.experts(x, torch.tensor(self.live)[chosen], shares).float().square().mean()

    def memory_indices(self, of_three: Tensor) -> Tensor:
        """Translate positions in a module of three experts to this one."""
        each = 2048 * 2048
        return torch.tensor(self.live)[of_three // each] * each + of_three % each


def needs_memory(gigabytes: int) -> None:
    free = next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line)
    if int(free.split()[1]) < gigabytes * 1e6:
        pytest.skip(f"needs {gigabytes} GB of free memory")


def of_experts(count: int) -> tuple[Experts, SeftOptimizer]:
    model = Experts(count)
    config = moving(density=2000 / (count * 2048 * 2048), targets="gate_up_proj", static=True)
    seft = SeftOptimizer(model, config, lr=1e-2, max_grad_norm=1.0)
    seft.attach()
    return model, seft


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_experts_of_more_than_2_31_weights_are_trained_saved_and_exported(tmp_path: Path) -> None:
    """Three experts are trained like the same three among 513."""
    needs_memory(12)
    small, reference = of_experts(3)
    steps(small, reference, 0, 1)  # its first support, with pruned positions
    (given,) = reference.deltas()
    model, seft = of_experts(513)
    (layer,) = seft.deltas()
    active = model.memory_indices(unpack(given.mask, len(given.interval)).nonzero().view(-1))
    mask = with_bits(torch.zeros_like(layer.mask), len(layer.interval), active, True)
    columns = given.columns.take(slice(None))
    columns = dataclasses.replace(columns, indices=model.memory_indices(columns.indices.long()))
    columns = columns.take(torch.arange(len(columns)))  # a copy
    seft.restore(1, [dataclasses.replace(layer, mask=mask, columns=columns)])
    steps(model, seft, 1, 4)
    steps(small, reference, 1, 4)

    def check(seft: SeftOptimizer) -> None:
        (ours,), (theirs,) = seft.deltas(), reference.deltas()
        assert ours.columns.indices.dtype == torch.int64 and int(ours.columns.indices[-1]) > 2**31
        assert torch.equal(ours.columns.indices, model.memory_indices(theirs.columns.indices.long()))
        for key in ("base", "values", "exp_avg", "exp_avg_sq", "age"):
            assert torch.equal(getattr(ours.columns, key), getattr(theirs.columns, key)), key
        whole, three = seft.backend.own(0).view(513, -1), reference.backend.own(0).view(3, -1)
        assert torch.equal(whole[model.live], three)
        assert not any(bool(one.any()) for one in whole[1:511])

    check(seft)
    saved = checkpoint.save(seft, tmp_path, {})
    del model, seft, layer, columns
    gc.collect()  # hooks and modules hold each other
    model, seft = of_experts(513)
    checkpoint.load(seft, saved)
    steps(model, seft, 4, 6)
    steps(small, reference, 4, 6)
    check(seft)

    base, weight = Experts(513).experts.gate_up_proj.detach(), seft.backend.own(0).view(513, 2048, 2048)
    writer = DeltaWriter(torch.bfloat16)
    writer.add("experts", base, weight)
    writer.close(tmp_path / "delta")
    delta = read_delta(tmp_path / "delta")
    assert {delta.tensors[f"experts.{kind}"].dtype for kind in ("changed", "reactivated", "pruned")} == {torch.int64}
    assert int(delta.tensors["experts.reactivated"][-1]) > 2**31
    delta.change("experts", base)
    assert all(map(torch.equal, base, weight))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_kernels_on_more_than_2_31_positions() -> None:
    needs_memory(8)
    numel = 2**31 + 1_000_003
    places = torch.tensor([0, 5, 2**31 - 1, 2**31, 2**31 + 77, numel - 1])
    values = torch.tensor([1.0, -2.0, 3.0, 4.0, 5.0, 6.0]).bfloat16()
    key = lazy_zeros(numel, dtype=torch.int32)
    key[places] = torch.tensor([7, 9, 9, 9, 10, 8], dtype=torch.int32) << 24
    assert sorted(ranking.first_histogram(key).tolist())[-4:] == [1, 1, 3, numel - 6]
    assert ranking.top_k(key, 3).tolist() == [5, 2**31 - 1, 2**31 + 77]
    assert ranking.top_k(key, 6).tolist() == places.tolist()
    del key
    bits = with_bits(torch.zeros(-(-numel // 8), dtype=torch.uint8), numel, places, True)
    assert popcount(bits) == 6 and holds(bits, places).all() and not holds(bits, places[1:] - 2).any()
    assert torch.equal(hash_of_bits(bits, numel, 2**31), hash_of_set(places + 2**31))
    mask = unpack(bits, numel)
    assert torch.equal(mask.nonzero().view(-1), places) and torch.equal(pack(mask), bits)
    del mask
    out = lazy_zeros(numel, dtype=torch.bfloat16)
    scatter_([out], [0], [places], values)
    assert torch.equal(encode(out, bits), values) and count_outside(bits, out) == 0
    assert count_outside(with_bits(bits, numel, places[-2:], False), out) == 2
    decode(bits, values * 2, out)
    assert torch.equal(out[places], values * 2) and int(torch.count_nonzero(out)) == 6
