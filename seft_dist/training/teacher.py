"""Distillation: what a training step learns from a teacher, usually the model before it was pruned.

    loss = (1 - logits) x cross entropy + logits x T^2 x KL(teacher || model) + hidden x distance of layer outputs

All terms are means over the same tokens, those that are learnt. So the micro-batches and ranks of a step weigh as they
do without a teacher (training/step.py).
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from seft_dist.backends.fsdp import reshard
from seft_dist.backends.shards import stored_part
from seft_dist.config import ModelConfig, TeacherConfig, TrainConfig
from seft_dist.config.teacher import TEACHER_CHUNK
from seft_dist.io.models import Sharding, load_model, named_state
from seft_dist.io.positions import check_length
from seft_dist.io.source import Source, open_source
from seft_dist.kernels.fingerprint import fingerprint
from seft_dist.session.agreement import on_all_ranks, sum_over_ranks
from seft_dist.session.distributed import Ranks
from seft_dist.training.ds_config import DsConfig


class Teacher:
    """A frozen model beside the one that is trained, held in the same way."""

    def __init__(self, model: nn.Module, config: TeacherConfig, fingerprint: str) -> None:
        """Args:
        model: What a forward pass calls.
        config: Says what is learnt from it.
        fingerprint: Of its weights, from ``teacher_fingerprint``.
        """
        self.model, self._config, self.fingerprint = model, config, fingerprint

    @torch.no_grad()
    def _outputs(self, inputs: dict[str, Tensor]) -> Any:
        outputs = self.model(**inputs, output_hidden_states=self._config.hidden > 0)
        reshard(self.model)  # else the embeddings and the head stay whole on every rank until the next step
        return outputs

    def loss(self, forward_module: nn.Module, inputs: dict[str, Tensor], learnt: Tensor) -> Tensor:
        """Compute the loss of a micro-batch, with forward passes of both models. Collective if they are sharded.

        Args:
            forward_module: The model that is trained, or what wraps it.
            inputs: input_ids, attention_mask and labels [batch, length], int64, on this rank's device. Without labels
                this rank only takes part in the forward passes.
            learnt: int64 [n], from ``learnt_positions``, on this rank's device.

        Returns:
            A scalar: the mean over the tokens that are learnt; without labels any number that has a gradient.
        """
        config = self._config
        labels = inputs.get("labels")
        seen = {key: value for key, value in inputs.items() if key != "labels"}
        taught = self._outputs(seen)  # first: the activations of the other are then the only ones
        needs_labels = labels is not None and config.logits < 1
        outputs = forward_module(**(inputs if needs_labels else seen), output_hidden_states=config.hidden > 0)
        if labels is None:
            mean: Tensor = outputs.logits.float().mean()
            return mean
        loss = torch.zeros((), device=labels.device)
        if needs_labels:
            loss = loss + (1 - config.logits) * outputs.loss
        if config.logits > 0:
            own, wanted = (each.logits.flatten(0, 1)[learnt] for each in (outputs, taught))
            loss = loss + config.logits * divergence(own, wanted, config.temperature)
        if config.hidden > 0:
            layers = zip(outputs.hidden_states[1:], taught.hidden_states[1:], strict=True)
            distances = [relative_distance(*(each.flatten(0, 1)[learnt] for each in pair)) for pair in layers]
            loss = loss + config.hidden * torch.stack(distances).mean()
        return loss


def learnt_positions(batch: Mapping[str, Tensor]) -> Tensor:
    """Return the positions whose next token is learnt, int64 [n], counted through the batch row by row.

    Args:
        batch: With labels [batch, length], still in CPU memory: on a GPU the host would have to wait for their number.
    """
    labels = batch["labels"]
    learnt = torch.zeros(labels.shape, dtype=torch.bool)
    learnt[:, :-1] = labels[:, 1:] != -100
    return learnt.view(-1).nonzero().view(-1)


def divergence(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute the mean over tokens of KL(teacher || model), times the squared temperature.

    The fp32 copies exist for some tokens at a time, and are made again in backward.

    Args:
        logits: [n, vocabulary], of the model.
        teacher_logits: [n, vocabulary]; without gradient.
        temperature: Divides both.

    Returns:
        fp32 [].

    Source: Hinton, Vinyals, Dean (arXiv 1503.02531).
    """

    def kl_sum(student: Tensor, teacher: Tensor) -> Tensor:
        targets = F.log_softmax(teacher.float() / temperature, dim=-1)
        return F.kl_div(F.log_softmax(student.float() / temperature, dim=-1), targets, reduction="sum", log_target=True)

    sums = [
        checkpoint(kl_sum, *chunk, use_reentrant=False)
        for chunk in zip(logits.split(TEACHER_CHUNK), teacher_logits.split(TEACHER_CHUNK), strict=True)
    ]
    return torch.stack(sums).sum() * (temperature**2 / len(logits))


def relative_distance(hidden: Tensor, teacher_hidden: Tensor) -> Tensor:
    """Compute the mean over tokens of the squared distance, as a share of the teacher's square at that token; fp32 [].

    SquareHead (Kurtic et al., arXiv 2310.06927) divides by the mean square over all tokens of a batch. That is not a
    mean over tokens, so it would depend on how a step is divided into micro-batches and ranks.

    Args:
        hidden: [n, width], output of one decoder layer at n tokens.
        teacher_hidden: The same of the teacher; without gradient.
    """
    target = teacher_hidden.float()
    squared = (hidden.float() - target).square().sum(-1)
    return (squared / target.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)).mean()


def open_teacher(config: TrainConfig, source: Source) -> Source | None:
    """Find the teacher and check that it fits, before anything is loaded.

    Args:
        config: The run.
        source: The model that is trained.

    Raises:
        ValueError: There is no such model, or it cannot teach this one.
    """
    path = config.teacher.path
    if path is None:
        return None
    teacher = open_source(ModelConfig(path=path, dtype=config.model.dtype), source.dtype, path_option="teacher.path")
    check_length(teacher.config, config.data.seq_len, f"teacher.path={path}", "data.seq_len")
    names = ["vocab_size"] + ["num_hidden_layers", "hidden_size"] * (config.teacher.hidden > 0)
    for name in names:
        own, theirs = (getattr(each.config.get_text_config(), name) for each in (source, teacher))
        if own != theirs:
            raise ValueError(
                f"teacher.path={path} has {name} {theirs}, the model has {own}: needs the same, for example the model "
                "as it was before pruning"
            )
    return teacher


def load_teacher(config: TrainConfig, ranks: Ranks, source: Source, sharding: Sharding, ds: DsConfig | None) -> Teacher:
    """Load the teacher in the way in which the model is held. Collective.

    Args:
        config: The run.
        ranks: This process.
        source: From ``open_teacher``.
        sharding: Of the model that is trained.
        ds: The ds_config; None without DeepSpeed.
    """
    model = load_model(
        source,
        sharding=sharding,
        device=ranks.device,
        replicas=config.replicas,
        offload=config.offload,
        ds_config=ds.content if ds else None,
    )
    model.requires_grad_(False).eval()
    shared = _fingerprint(model, ranks, sharding, config.replicas)
    forward_module: nn.Module = model
    if sharding == "zero3":
        import deepspeed

        assert ds is not None
        # No optimizer: the engine only gathers what a forward pass needs.
        settings = {key: value for key, value in ds.content.items() if key != "scheduler"}
        forward_module, *_ = deepspeed.initialize(model=model, config=settings)
        forward_module.eval()
    return Teacher(forward_module, config.teacher, shared)


def _fingerprint(model: nn.Module, ranks: Ranks, sharding: Sharding, replicas: int) -> str:
    """Fingerprint of all weights from the parts that ranks store, the same on every layout, 32 digits. Collective."""
    state = named_state(model)
    prints = torch.zeros(len(state), dtype=torch.int64)
    # Where several ranks store the same, the first of them speaks for all.
    speakers = {"none": 1, "fsdp": ranks.world_size // replicas, "zero3": ranks.world_size}[sharding]
    if ranks.rank < speakers:
        for i, held in enumerate(state.values()):
            values, start = stored_part(held)
            prints[i] = fingerprint(values, start).cpu()
    sum_over_ranks(ranks, prints)
    rows = sorted(zip(state, prints.tolist(), strict=True))
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:32]


def check_teacher(config: TrainConfig, source: Source, ranks: Ranks) -> Source | None:
    """``open_teacher`` on every rank. Collective."""
    return on_all_ranks(ranks, lambda: open_teacher(config, source))
