"""Conv1D and fused experts as targets: right gradients, right files, clear messages for what is not supported."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from seft_dist.backends.group import Group
from seft_dist.config import DataConfig, ModelConfig, PruneConfig, SeftConfig
from seft_dist.data.load import load_sequences
from seft_dist.data.tokenizer import load_tokenizer
from seft_dist.io.models import load_model
from seft_dist.io.source import open_source
from seft_dist.modules.experts import expert_slices
from seft_dist.modules.kinds import Conv1DWeight, ExpertWeight, LinearWeight, Target
from seft_dist.modules.targets import find_targets
from seft_dist.optim.optimizer import SeftOptimizer
from seft_dist.pruning.calibrate import sample_sequences
from seft_dist.pruning.curvature import OutputGradientNorm
from seft_dist.pruning.prune import prepare, prune, prune_folder
from seft_dist.pruning.watch import watch_calls
from tests import pruning_reference as reference
from tests.families import FAMILIES, family_folder, family_model
from tests.models import batch, moving
from tests.ranks import run_ranks
from tests.texts import text_jsonl

ODD = ["gpt2", "mixtral", "qwen2_moe", "deepseek_v2", "deepseek_v3"]


@pytest.mark.parametrize("family", ODD)
def test_sampled_gradients_are_those_of_autograd(family: str) -> None:
    model, twin = family_model(family), family_model(family)
    seft = SeftOptimizer(model, moving(density=0.05, init="random", allow_dense=True, static=True))
    for step in range(2):
        model(**batch(step)).loss.backward()
        twin(**batch(step)).loss.backward()
    for (name, wanted), slot in zip(find_targets(twin).items(), seft._slots, strict=True):
        assert slot.support is not None and slot.grad is not None and len(slot.support)
        assert wanted.weight.grad is not None
        expected = wanted.weight.grad.reshape(-1)[slot.support.positions()]
        torch.testing.assert_close(slot.grad, expected, rtol=1e-4, atol=1e-6, msg=name)
    assert all(p.grad is None for name, p in model.named_parameters() if not name.endswith("seft_anchor"))


@pytest.mark.parametrize("family", ODD)
def test_with_a_delta_everywhere_it_is_adamw(family: str) -> None:
    model, twin = family_model(family), family_model(family)
    config = moving(density=1.0, allow_dense=True, static=True)
    seft = SeftOptimizer(model, config, lr=1e-3, eps=1e-4, weight_decay=0.1)
    twin.requires_grad_(False)
    weights = [target.weight.requires_grad_() for target in find_targets(twin).values()]
    adamw = torch.optim.AdamW(weights, lr=1e-3, eps=1e-4, weight_decay=0.1)
    for step in range(3):
        for each, optimizer in ((model, seft), (twin, adamw)):
            each(**batch(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    seft.detach()
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6, msg=name)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_routers_embeddings_and_heads_are_left_alone() -> None:
    for family in FAMILIES:
        names = set(find_targets(family_model(family)))
        assert not [name for name in names if name.endswith(("gate", "lm_head", "embed_tokens", "wte", "wpe"))]
        assert any("layers." in name or ".h." in name for name in names)
    experts = [name for name in find_targets(family_model("mixtral")) if "experts" in name]
    assert experts == [f"model.layers.{i}.mlp.experts.{key}" for i in (0, 1) for key in ("gate_up_proj", "down_proj")]
    assert set(find_targets(family_model("qwen2_moe"), "gate")) == {
        f"model.layers.{i}.mlp.{rest}" for i in (0, 1) for rest in ("experts.gate_up_proj", "shared_expert.gate_proj")
    }


@pytest.mark.parametrize(
    ("family", "kind"), [("llama2", LinearWeight), ("gpt2", Conv1DWeight), ("mixtral", ExpertWeight)]
)
def test_every_kind_of_weight_as_rows_and_back(family: str, kind: type[Target]) -> None:
    model = family_model(family)
    targets = {name: target for name, target in find_targets(model).items() if isinstance(target, kind)}
    assert targets
    for name, target in targets.items():
        weight = model.get_parameter(target.weight_name(name))
        assert weight is target.weight and tuple(target.as_rows().shape) == target.matrix_shape
        changed = target.from_rows(target.as_rows() + 1)
        assert changed.shape == weight.shape and torch.equal(changed, weight + 1)
        x = torch.randn(2, weight.shape[0 if target.is_stored_transposed else -1])
        if target.num_experts == 1:
            torch.testing.assert_close(
                target.module(x) - (target.module.bias if family == "gpt2" else 0), x @ target.as_rows().T
            )
        replacement = torch.nn.Parameter(changed, requires_grad=False)
        target.weight = replacement
        assert model.get_parameter(target.weight_name(name)) is replacement


def test_what_cannot_be_handled_is_refused() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    config = AutoConfig.for_model("gpt_oss", **sizes)
    gpt_oss = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="fused expert weights of GptOssExperts are not supported yet.*transposed"):
        find_targets(gpt_oss)
    assert len(find_targets(gpt_oss, "self_attn")) == 4

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.mixing = nn.Linear(4, 4), nn.Parameter(torch.ones(4, 4))

    with pytest.raises(ValueError, match=r"\.mixing of Odd, \[4, 4\].*would stay dense"):
        find_targets(Odd())
    assert list(find_targets(Odd(), "linear")) == ["linear"]
    for family, over, message in (
        ("gpt2", {"adapt": "activation"}, "adapt=activation is not supported for a Conv1D"),
        ("gpt2", {"pattern": "2:4"}, "pattern=2:4 is not supported for a Conv1D"),
    ):
        with pytest.raises(ValueError, match=message):
            SeftOptimizer(family_model(family), moving(**over))
    SeftOptimizer(family_model("gpt2"), SeftConfig(adapt="activation"))  # which nothing reads: the mask stays


def prune_config(folder: Path, family: str, name: str, **over: Any) -> PruneConfig:
    """A family's random model and text in a folder, and how to prune it to another."""
    if not (folder / "dense").exists():
        family_folder(folder / "dense", family)
        text_jsonl(folder / "text.jsonl")
    return PruneConfig(
        model=ModelConfig(path=str(folder / "dense")),
        data=DataConfig(path=str(folder / "text.jsonl"), seq_len=32),
        output=str(folder / name),
        sequences=24,
        **over,
    )


def tokens_of_experts(config: PruneConfig, model: Any, experts: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the calibration text: the tokens [T, in] that reach a mixture, and the experts [T, k] that they choose."""
    seen: list[tuple[torch.Tensor, ...]] = []
    experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    data = load_sequences(config.data, load_tokenizer(config.model), progress=False)  # type: ignore[arg-type]
    with torch.no_grad():
        for tokens in sample_sequences(data, 24, 0):
            model(tokens[None])
    hidden, chosen = (torch.cat([args[i].view(-1, args[i].shape[-1]) for args in seen]) for i in (0, 1))
    return hidden, chosen


@pytest.mark.parametrize(("family", "key"), [("mixtral", "gate_up_proj"), ("deepseek_v3", "gate_up_proj")])
@pytest.mark.parametrize("ranked", [{"group": "layer", "sparsity": 0.53}, {"pattern": "2:4"}], ids=str)
def test_sparsegpt_of_experts_is_the_published_algorithm(
    family: str, key: str, ranked: dict[str, Any], tmp_path: Path
) -> None:
    """Every expert of the first mixture layer, from the tokens that chose it in the dense model."""
    config = prune_config(tmp_path, family, "pruned", method="sparsegpt", **ranked)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    counts = {count.name: count for count in prune_folder(config, progress=False)}
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    name = next(name for name in find_targets(dense) if name.endswith(f"experts.{key}"))
    experts = dense.get_submodule(name.rpartition(".")[0])
    # the layers before are pruned when this one is looked at
    number = int(name.split(".")[2])
    for layer in range(number):
        dense.model.layers[layer] = pruned.model.layers[layer]
    hidden, chosen = tokens_of_experts(config, dense, experts)
    before, after = dense.get_parameter(name), pruned.get_parameter(name)
    done, numel = 0, before[0].numel()
    for expert, weight in enumerate(before.detach()):
        upto = int(0.53 * numel * (expert + 1) + 0.5)
        hessian = reference.hessian_of([hidden[(chosen == expert).any(1)]])
        pattern = (2, 4) if "pattern" in ranked else None
        gone = after[expert] == 0
        wanted, missed = reference.sparsegpt(
            weight, hessian, gone, [upto - done], pattern
        )  # one block: under 128 columns
        done = upto
        assert missed <= reference.CLOSE, (expert, missed)
        assert float((wanted - after[expert]).detach().norm() / weight.norm()) < 1e-4, expert
    assert counts[name].zeros == (int(0.53 * before.numel() + 0.5) if pattern is None else before.numel() // 2)


def test_experts_make_up_for_their_own_pruned_weights(tmp_path: Path) -> None:
    """The first mixture layer: each expert's weights that stay are solved for with the tokens that chose it."""
    config = prune_config(tmp_path, "mixtral", "pruned", method="curvature", sparsity=0.53, compensate=True)
    prune_folder(config, progress=False)
    dense, pruned = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("dense", "pruned"))
    name = next(name for name in find_targets(dense) if name.endswith("layers.0.mlp.experts.gate_up_proj"))
    experts = dense.get_submodule(name.rpartition(".")[0])
    hidden, chosen = tokens_of_experts(config, dense, experts)
    before, after = dense.get_parameter(name).detach(), pruned.get_parameter(name).detach()
    for expert, (weight, new) in enumerate(zip(before, after, strict=True)):
        hessian = reference.hessian_of([hidden[(chosen == expert).any(1)]])
        assert 0 < int((new == 0).sum()) < new.numel()
        assert reference.excess(new, weight, hessian, new == 0, 0.01) < 0.01, expert


def test_curvature_of_experts(tmp_path: Path) -> None:
    """Every expert's inputs and gradients are those of the tokens that chose it."""
    config = prune_config(tmp_path, "mixtral", "pruned", method="curvature", sparsity=0.53)
    prune_folder(config, progress=False)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    targets = {key: t for key, t in find_targets(dense).items() if isinstance(t, ExpertWeight)}
    squares = {key: torch.zeros_like(t.weight, dtype=torch.float64) for key, t in targets.items()}

    def add(key: str, x: torch.Tensor, output: torch.Tensor, ends: list[int]) -> None:
        output.register_hook(lambda grad: seen[key].append((x.detach(), grad, ends)))

    seen: dict[str, list[Any]] = {key: [] for key in targets}
    for key, target in targets.items():
        watch_calls(target, partial(add, key))
    data = load_sequences(config.data, load_tokenizer(config.model), progress=False)  # type: ignore[arg-type]
    for tokens in sample_sequences(data, 24, 0):
        (dense(tokens[None], labels=tokens[None]).loss * (len(tokens) - 1)).backward()
    assert len(targets) == 4
    for key, target in targets.items():
        for expert in range(target.num_experts):
            inputs = outputs = torch.zeros((), dtype=torch.float64)
            for x, grad, ends in seen[key]:
                rows = expert_slices(ends)[expert]
                inputs = inputs + x[rows].double().square().sum(0)
                outputs = outputs + grad[rows].double().square().sum(0)
            squares[key][expert] = outputs[:, None] * inputs
        score = (target.weight.detach().double().abs() * squares[key].sqrt()).view(1, -1)
        gone = (pruned.get_parameter(key).detach() == 0).view(1, -1)
        assert reference.slack(score, gone, int(0.53 * score.numel() + 0.5)) <= reference.CLOSE, key


def test_an_expert_without_tokens_has_the_mean_gradients_of_the_others() -> None:
    """With gradients of 0 all of its weights would be pruned first."""
    target = next(t for t in find_targets(family_model("mixtral")).values() if isinstance(t, ExpertWeight))
    norms = OutputGradientNorm(target)
    squares = torch.rand(target.matrix_shape[0], dtype=torch.float64) + 0.1
    by_expert = squares.view(target.num_experts, -1)
    by_expert[1] = 0
    norms._terms.append(squares)
    found = norms.close("experts", Group(None)).view(target.num_experts, -1)
    others = [expert for expert in range(target.num_experts) if expert != 1]
    torch.testing.assert_close(found[1], by_expert[others].sqrt().float().mean(0))
    torch.testing.assert_close(found[others], by_expert[others].sqrt().float())


def prune_mixture(rank: int, size: int, folder: Path, over: dict[str, Any]) -> None:
    config = prune_config(folder, "mixtral", f"ranks{size}", sparsity=0.53, **over)
    prune(prepare(config, progress=False), Group(dist.group.WORLD), progress=False)


@pytest.mark.parametrize(
    "over",
    [{"method": "sparsegpt"}, *({"method": method, "compensate": True} for method in ("wanda", "curvature"))],
    ids=str,
)
def test_experts_on_two_ranks(over: dict[str, Any], tmp_path: Path) -> None:
    prune_folder(prune_config(tmp_path, "mixtral", "ranks1", sparsity=0.53, **over), progress=False)
    run_ranks(prune_mixture, 2, tmp_path, over)
    one, two = (load_file(tmp_path / f"ranks{size}/model.safetensors") for size in (1, 2))
    for name in one:
        assert torch.equal(one[name] == 0, two[name] == 0), name
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6)


def test_kept_positions_of_other_layouts(tmp_path: Path) -> None:
    """Masks have the shape in which a weight is stored: [in, out] for Conv1D, three-dimensional for fused experts."""
    for family in ("gpt2", "mixtral"):
        folder = tmp_path / family
        prune_folder(prune_config(folder, family, "wanda", sparsity=0.5), progress=False)
        pruned = find_targets(AutoModelForCausalLM.from_pretrained(folder / "wanda"))
        save_file({name: (t.weight.detach() != 0) for name, t in pruned.items()}, folder / "kept.safetensors")
        config = PruneConfig(
            model=ModelConfig(path=str(folder / "dense")),
            output=str(folder / "again"),
            method="mask",
            mask=str(folder / "kept.safetensors"),
        )
        prune_folder(config, progress=False)
        one, two = (load_file(folder / name / "model.safetensors") for name in ("wanda", "again"))
        assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("family", "method"),
    [
        *((family, "wanda") for family in FAMILIES),
        *((family, "sparsegpt") for family in ("gpt2", "gemma3", "deepseek_v2")),
    ],
)
def test_pruning_counts_in_every_row_of_every_expert(family: str, method: str, tmp_path: Path) -> None:
    prune_folder(prune_config(tmp_path, family, "pruned", method=method, sparsity=0.5), progress=False)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    for (name, target), before in zip(find_targets(pruned).items(), find_targets(dense).values(), strict=True):
        rows = target.as_rows()
        if method == "wanda":
            assert (rows == 0).sum(1).unique().tolist() == [rows.shape[1] // 2], name
            assert torch.equal(rows[rows != 0], before.as_rows()[rows != 0]), name
        else:
            assert (rows == 0).float().mean() == pytest.approx(0.5, abs=0.01), name


def test_files_keep_the_published_layout(tmp_path: Path) -> None:
    """One tensor for each expert in, one out; ranges of the fused weight are what transformers fuses."""
    for family in ("mixtral", "deepseek_v3"):
        folder = family_folder(tmp_path / family, family)
        model = AutoModelForCausalLM.from_pretrained(folder)
        weights = open_source(ModelConfig(path=str(folder))).weights
        assert any(".experts.1." in name for name in weights.tensors) and weights.fused
        for name, info in weights.fused.items():
            if name.endswith("experts.up_proj"):
                continue  # of experts without a gate
            whole = model.get_parameter(name).detach()
            assert info.shape == whole.shape
            for start, stop in ((0, None), (7, 7), (3, 1000), (whole.numel() - 5, whole.numel())):
                assert torch.equal(weights.read(name, start, stop), whole.reshape(-1)[start:stop])
            for stored, part in weights.split(name, whole):
                assert torch.equal(weights.read(stored).view(part.shape), part)


def test_an_incomplete_expert_is_refused(tmp_path: Path) -> None:
    folder = family_folder(tmp_path / "model", "mixtral")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj missing"):
        load_model(open_source(ModelConfig(path=str(folder))))


def test_the_published_gpt2_has_no_prefix(tmp_path: Path) -> None:
    folder = family_folder(tmp_path / "model", "gpt2")
    expected = AutoModelForCausalLM.from_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    old = {name.removeprefix("transformer."): value for name, value in weights.items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 4, 4).tril()  # a mask that was stored once
    save_file(old, folder / "model.safetensors", {"format": "pt"})
    loaded = load_model(open_source(ModelConfig(path=str(folder))))
    for mine, theirs in zip(loaded.parameters(), expected.parameters(), strict=True):
        assert torch.equal(mine, theirs)
