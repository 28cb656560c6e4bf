"""Calibration text through a model one decoder layer at a time.

Only the hidden states between two layers are held. Each layer runs twice: once for somebody to look at the inputs of
its linears, and, when those are pruned, once more for the input of the next layer, so that every layer sees what the
pruned layers before it produce.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from seft_dist.io.data import Sample, check_vocabulary

_TOKENS_AT_ONCE = 2048


class _Stop(Exception):  # noqa: N818  # no error: ends a forward pass whose rest is not needed
    pass


@dataclass
class _Call:
    """How a model calls one of its layers, apart from the hidden states."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Find the list of decoder layers. Local.

    Returns:
        Its name and the list.

    Raises:
        ValueError: There is none, or several.
    """
    kinds = set(model._no_split_modules or ())
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(type(layer).__name__ in kinds for layer in module)
    ]
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(found)} lists of decoder layers: needs one, as Llama's model.layers; "
            "magnitude pruning (--method magnitude) works without"
        )
    return found[0]


def sample_sequences(sequences: Sequence[Sample], count: int, seed: int) -> list[Tensor]:
    """Draw calibration sequences without repetition. Local.

    Args:
        sequences: The calibration data.
        count: How many.
        seed: Of the draw.

    Returns:
        ``count`` tensors of token numbers, 1-D int64.

    Raises:
        ValueError: There are fewer.
    """
    if len(sequences) < count:
        raise ValueError(
            f"the calibration data has {len(sequences)} sequences, --sequences asks for {count}: lower it, lower "
            "data.seq_len, or use more text"
        )
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(seed))[:count]
    return [sequences[int(index)][0] for index in order]


@torch.no_grad()
def layer_by_layer(
    model: PreTrainedModel,
    sequences: Sequence[Tensor],
    visit: Callable[[str, nn.Module, Callable[[], None]], None],
    device: torch.device | None = None,
    progress: bool = True,
) -> None:
    """Run calibration text through a model, layer by layer. Local.

    Args:
        model: A causal LM in evaluation mode, on the CPU.
        sequences: Token numbers, 1-D int64 each; equal lengths run together.
        visit: Called for each layer with its name, the layer (on ``device``) and ``run``; ``run()`` passes all text
            through the layer once, outputs thrown away. It may change the layer's weights.
        device: Where layers compute, one at a time; None: the CPU.
        progress: Show a bar.

    Raises:
        ValueError: The model's layers are not a plain chain, or its tokens are not the tokenizer's.
    """
    prefix, layers = find_layers(model)
    device = device or torch.device("cpu")
    batches = _batches(sequences)
    for batch in batches:
        check_vocabulary({"input_ids": batch}, model)
    calls = {shape: _record_calls(model, layers, batch) for shape, batch in {b.shape: b for b in batches}.items()}
    _check_chain(model, layers, batches[0], calls[batches[0].shape])
    hidden = [_first_input(model, layers, batch) for batch in batches]
    for number, layer in enumerate(tqdm(layers, desc="Pruning layers", disable=not progress)):
        layer.to(device)
        local = {shape: _to(recorded[number], device) for shape, recorded in calls.items()}

        def outputs(index: int, layer: nn.Module = layer, local: dict[torch.Size, _Call] = local) -> Tensor:
            return _run(layer, hidden[index].to(device), local[batches[index].shape])

        def run() -> None:
            for index in range(len(hidden)):
                outputs(index)  # noqa: B023  # called before the next layer's turn

        visit(f"{prefix}.{number}", layer, run)
        for index in range(len(hidden)):
            hidden[index] = outputs(index).to(hidden[index].device)
        layer.to("cpu")


def _batches(sequences: Sequence[Tensor]) -> list[Tensor]:
    """Sequences of one length stacked, up to a number of tokens: no padding, so no masks that depend on the data."""
    by_length: dict[int, list[Tensor]] = {}
    for sequence in sequences:
        by_length.setdefault(len(sequence), []).append(sequence)
    batches = []
    for length, group in by_length.items():
        size = max(1, _TOKENS_AT_ONCE // length)
        batches += [torch.stack(group[start : start + size]) for start in range(0, len(group), size)]
    return batches


def _forward(model: PreTrainedModel, tokens: Tensor) -> None:
    model.base_model(input_ids=tokens, use_cache=False)  # without the head: nobody reads its large output


def _record_calls(model: PreTrainedModel, layers: nn.ModuleList, tokens: Tensor) -> list[_Call]:
    """What the model passes to each layer beside hidden states: positions, masks; some models vary it by layer."""
    calls = [_Call() for _ in layers]

    def recorder(call: _Call) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call.args = args[1:]
            call.kwargs = {name: value for name, value in kwargs.items() if name != "hidden_states"}

        return record

    handles = [
        layer.register_forward_pre_hook(recorder(call), with_kwargs=True)
        for layer, call in zip(layers, calls, strict=True)
    ]
    try:
        _forward(model, tokens)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _first_input(model: PreTrainedModel, layers: nn.ModuleList, tokens: Tensor) -> Tensor:
    """Hidden states that enter the first layer, [sequences, tokens, hidden]."""
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(args[0] if args else kwargs["hidden_states"])
        raise _Stop

    handle = layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        _forward(model, tokens)
    except _Stop:
        pass
    finally:
        handle.remove()
    return caught[0]


def _check_chain(model: PreTrainedModel, layers: nn.ModuleList, tokens: Tensor, calls: list[_Call]) -> None:
    """Refuse models whose layers get more than what the layer before gives: the chain would be silently wrong.

    Other tokens than the recorded ones are used, so that a call that depends on them is noticed.
    """
    tokens = tokens.flip(1)
    ends: list[Tensor] = []
    handle = layers[-1].register_forward_hook(lambda module, args, output: ends.append(_tensor(output)))
    try:
        _forward(model, tokens)
        hidden = _first_input(model, layers, tokens)
        for layer, call in zip(layers, calls, strict=True):
            hidden = _run(layer, hidden, call)
    finally:
        handle.remove()
    # Both ran the same operations on the same shapes; the tolerance is for libraries that look at memory alignment.
    tolerance = 8 * torch.finfo(hidden.dtype).eps * float(ends[0].abs().max())
    if not torch.allclose(ends[0], hidden, rtol=0, atol=tolerance):
        raise ValueError(
            f"{type(model).__name__} passes its layers more than the output of the layer before: layer-by-layer "
            "calibration does not fit it; use --method magnitude"
        )


def _run(layer: nn.Module, hidden: Tensor, call: _Call) -> Tensor:
    return _tensor(layer(hidden, *call.args, **call.kwargs))


def _tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, _Call):
        return _Call(_to(value.args, device), _to(value.kwargs, device))
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    return type(value)(_to(item, device) for item in value) if type(value) in (list, tuple) else value
