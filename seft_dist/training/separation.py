"""Check of a loaded model that documents which share a sequence do not see each other.

How attention is restricted to documents is up to transformers: it finds them by positions that begin anew. Not every
family does so (those that carry a state from token to token cannot), nor every implementation of attention. So the
model is asked: what does it say of a document behind another one, and what of the same document alone?
"""

from typing import Any

import torch
from torch import Tensor, nn

from seft_dist.backends.fsdp import reshard
from seft_dist.training.build import TrainingRun

_LENGTHS = (7, 10)
"""Tokens of the two documents, in the first row; in the second row they change places."""
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Largest share of the other document's influence that may be left, as rounding explains it."""
_ROUNDING_16_BIT = 0.05


def check_separation(run: TrainingRun) -> None:
    """Refuse ``data.separate`` for models that cannot keep documents apart. Collective.

    Raises:
        ValueError: The model, or the teacher, cannot.
    """
    config = run.config
    text = config.validation_data
    if not (config.data.separate or (text is not None and text.separate)):
        return
    for data, option in ((config.data, "data.seq_len"), (text, "eval.data.seq_len")):
        if data is not None and data.separate:
            check_frequencies(run.source.config, data.seq_len, option)
    forward_module = run.model if run.engine is None else run.forward_module
    rows = min(2, config.batch_size)
    shares = {"the model": leaked_share(forward_module, run.model, run.ranks.device, rows)}
    if run.teacher is not None:
        shares["the teacher"] = leaked_share(run.teacher.model, run.teacher.model, run.ranks.device, rows)
    allowed = _ROUNDING.get(run.source.dtype, _ROUNDING_16_BIT)
    kind = run.source.config.model_type
    for name, share in shares.items():
        if not share <= allowed:
            raise ValueError(
                f"data.separate: {name} ({kind}) does not keep the documents of a sequence apart: "
                f"{share:.1%} of the influence that one has on the next without the option is left. Its attention does "
                "not follow position_ids; use data.separate false"
            )


def check_frequencies(config: Any, length: int, option: str) -> None:
    """Refuse lengths at which a document's rotary frequencies depend on the longest document beside it.

    Args:
        config: Configuration of a causal LM of transformers.
        length: Tokens of a sequence.
        option: Option that sets the length.

    Raises:
        ValueError: Sequences are so long that frequencies change.
    """
    text = config.get_text_config()
    rotary = getattr(text, "rope_parameters", None) or {}
    for entry in [entry for entry in rotary.values() if isinstance(entry, dict)] or [rotary]:
        kind, most = entry.get("rope_type"), entry.get("original_max_position_embeddings")
        most = most or getattr(text, "original_max_position_embeddings", None) or text.max_position_embeddings
        if kind in ("dynamic", "longrope") and length > most:
            raise ValueError(
                f"data.separate with {option}={length}: rotary frequencies of type {kind} are those of the longest "
                f"document of a batch beyond {most} tokens; choose at most {most}, or data.separate false"
            )


@torch.no_grad()
def leaked_share(forward_module: nn.Module, model: Any, device: torch.device, rows: int = 2) -> float:
    """Measure how much of a document's influence on the one behind it is left when the two are separate.

    Collective if the model is sharded.

    Args:
        forward_module: What a forward pass calls; its training mode is restored afterwards.
        model: The causal LM.
        device: Device of its inputs.
        rows: Sequences in a forward pass, 1 or 2: some implementations of attention separate only one.

    Returns:
        Root mean square of the change of the logits, as a share of that without separation; 0 for the same logits.
    """
    first, second = _LENGTHS
    length = first + second
    size = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, size, (rows, length), generator=generator)
    cuts = [first, second][:rows]
    places = torch.stack([torch.cat([torch.arange(cut), torch.arange(length - cut)]) for cut in cuts])
    was_training = forward_module.training
    forward_module.eval()
    try:
        separate = _logits(forward_module, device, input_ids=ids, position_ids=places)
        joined = _logits(forward_module, device, input_ids=ids)
        alone = [_logits(forward_module, device, input_ids=ids[row : row + 1, cut:])[0] for row, cut in enumerate(cuts)]
    finally:
        forward_module.train(was_training)
        reshard(model)
    left, whole = (
        torch.cat([(found[row, cut:] - alone[row]).flatten() for row, cut in enumerate(cuts)]).square().mean().sqrt()
        for found in (separate, joined)
    )
    return 0.0 if float(left) == 0 else float(left / whole)


def _logits(forward_module: nn.Module, device: torch.device, **inputs: Tensor) -> Tensor:
    outputs = forward_module(**{name: value.to(device) for name, value in inputs.items()}, use_cache=False)
    logits: Tensor = outputs.logits.double().cpu()
    return logits
