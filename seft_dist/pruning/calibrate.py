"""Calibration text through a model one decoder layer at a time.

Only the hidden states between two layers are held. Each layer runs twice: once for somebody to look at the inputs of
its linears, and, when those are pruned, once more for the input of the next layer, so that every layer sees what the
pruned layers before it produce. Ranks run different batches.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from seft_dist.backends.group import Group
from seft_dist.data.batches import check_vocabulary
from seft_dist.data.sequences import Sample
from seft_dist.io.library_types import PreTrainedModel

_TOKENS_AT_ONCE = 2048


class _Stop(Exception):  # noqa: N818  # no error: ends a forward pass whose rest is not needed
    pass


@dataclass
class _Call:
    """How a model calls one of its layers, apart from the hidden states."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Find the list of decoder layers.

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
    """Draw calibration sequences without repetition.

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


Visit = Callable[[str, nn.Module, Callable[[], None]], None]
Hold = Callable[[str], AbstractContextManager[None]]


class Calibration:
    """Calibration text on its way through a model's decoder layers, spread over ranks batch by batch."""

    @torch.no_grad()
    def __init__(
        self,
        model: PreTrainedModel,
        sequences: Sequence[Tensor],
        ranks: Group,
        *,
        hold: Hold = lambda name: nullcontext(),
        hold_rest: Callable[[], AbstractContextManager[None]] = nullcontext,
        device: torch.device | None = None,
    ) -> None:
        """Look at how the model calls its layers; ``ranks`` only says which batches are this rank's.

        Args:
            model: A causal LM in evaluation mode.
            sequences: Token numbers, 1-D int64 each, the same on every rank; equal lengths run together.
            ranks: Who shares the work.
            hold: Called with a layer's name: makes its weights real, on ``device``, while the context is open.
            hold_rest: The same for everything outside the decoder layers and the head.
            device: Where the model computes; None: the CPU. Hidden states wait on the CPU.

        Raises:
            ValueError: The model's layers are not a plain chain, or its tokens are not the tokenizer's.
        """
        self._model, self._hold, self._hold_rest = model, hold, hold_rest
        self._device = device or torch.device("cpu")
        self._prefix, self._layers = find_layers(model)
        batches = _batches(sequences)
        for batch in batches:
            check_vocabulary({"input_ids": batch}, model)
        # Batches do not depend on the number of ranks, so neither do the sums over each of them.
        first, last = (len(batches) * number // ranks.size for number in (ranks.rank, ranks.rank + 1))
        self._own = batches[first:last]
        self._calls = {
            shape: self._record_calls(batch) for shape, batch in {batch.shape: batch for batch in batches}.items()
        }
        self._check_chain(batches[0])

    @torch.no_grad()
    def walk(self, visit: Visit, *, changes: bool = True, progress: bool = True) -> Iterator[str]:
        """Visit every decoder layer in order; after each the caller's turn comes, with the layer still there.

        Args:
            visit: Called with a layer's name, the layer, and ``run``, which passes all of this rank's text through it.
            changes: Whether ``visit`` may change weights after ``run()``: then the next layer's input is computed anew.
            progress: Show a bar.

        Yields:
            The layer's name.
        """
        with self._hold_rest():
            hidden = [self._first_input(batch) for batch in self._own]
        bar = tqdm(self._layers, desc="Pruning layers" if changes else "Measuring layers", disable=not progress)
        for number, layer in enumerate(bar):
            outputs: list[Tensor] = []
            with self._hold(f"{self._prefix}.{number}"):

                def run(number: int = number, layer: nn.Module = layer, outputs: list[Tensor] = outputs) -> None:
                    outputs.clear()
                    for index, batch in enumerate(self._own):
                        call = self._calls[batch.shape][number]
                        result = _run(layer, hidden[index].to(self._device), call)  # noqa: B023  # called in this turn only
                        if changes:
                            del result  # of no use: the weights are about to change
                        else:
                            outputs.append(result.cpu())

                visit(f"{self._prefix}.{number}", layer, run)
                yield f"{self._prefix}.{number}"
                if changes or len(outputs) < len(hidden):
                    if number + 1 < len(self._layers):
                        for index, batch in enumerate(self._own):
                            call = self._calls[batch.shape][number]
                            hidden[index] = _run(layer, hidden[index].to(self._device), call).cpu()
                else:
                    hidden = outputs

    def _forward(self, tokens: Tensor) -> None:
        # without the head: nobody reads its large output
        self._model.base_model(input_ids=tokens.to(self._device), use_cache=False)

    @contextmanager
    def _held_in_turn(self) -> Iterator[None]:
        """While open, a forward of the whole model has one decoder layer's weights at a time."""
        opened: list[ExitStack] = []

        def enter(name: str) -> Callable[..., None]:
            def before(module: nn.Module, args: Any) -> None:
                opened.append(ExitStack())
                opened[-1].enter_context(self._hold(name))

            return before

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            opened.pop().close()

        with ExitStack() as stack:
            stack.enter_context(self._hold_rest())
            for number, layer in enumerate(self._layers):
                stack.callback(layer.register_forward_pre_hook(enter(f"{self._prefix}.{number}"), prepend=True).remove)
                stack.callback(layer.register_forward_hook(leave).remove)
            try:
                yield
            finally:
                while opened:
                    opened.pop().close()

    def _record_calls(self, tokens: Tensor) -> list[_Call]:
        """What the model passes to each layer beside hidden states: positions, masks; some models vary it by layer."""
        calls = [_Call() for _ in self._layers]

        def recorder(call: _Call) -> Callable[..., None]:
            def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                call.args = args[1:]
                call.kwargs = {name: value for name, value in kwargs.items() if name != "hidden_states"}

            return record

        with ExitStack() as stack:
            for layer, call in zip(self._layers, calls, strict=True):
                stack.callback(layer.register_forward_pre_hook(recorder(call), with_kwargs=True).remove)
            with self._held_in_turn():
                self._forward(tokens)
        return calls

    def _first_input(self, tokens: Tensor) -> Tensor:
        """Hidden states that enter the first layer, [sequences, tokens, hidden]."""
        caught: list[Tensor] = []

        def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append(args[0] if args else kwargs["hidden_states"])
            raise _Stop

        handle = self._layers[0].register_forward_pre_hook(catch, with_kwargs=True)
        try:
            self._forward(tokens)
        except _Stop:
            pass
        finally:
            handle.remove()
        return caught[0].cpu()

    def _check_chain(self, tokens: Tensor) -> None:
        """Refuse models whose layers get more than what the layer before gives: the chain would be silently wrong.

        Other tokens than the recorded ones are used, so that a call that depends on them is noticed.
        """
        calls, tokens = self._calls[tokens.shape], tokens.flip(1)
        chain: list[Tensor] = []
        ends: list[Tensor] = []

        def follow(call: _Call) -> Callable[..., None]:
            def after(module: nn.Module, args: Any, output: Any) -> None:
                # inside the model's own forward, while the layer is there; .forward, for hooks are not wanted twice
                chain.append(_tensor(module.forward(chain.pop(), *call.args, **call.kwargs)))
                ends[:] = [_tensor(output)]

            return after

        with self._hold_rest():
            chain.append(self._first_input(tokens).to(self._device))
        with ExitStack() as stack:
            for layer, call in zip(self._layers, calls, strict=True):
                stack.callback(layer.register_forward_hook(follow(call)).remove)
            with self._held_in_turn():
                self._forward(tokens)
        # Both ran the same operations on the same shapes; the tolerance is for libraries that look at memory alignment.
        tolerance = 8 * torch.finfo(chain[0].dtype).eps * float(ends[0].abs().max())
        if not torch.allclose(ends[0], chain[0], rtol=0, atol=tolerance):
            raise ValueError(
                f"{type(self._model).__name__} passes its layers more than the output of the layer before: "
                "layer-by-layer calibration does not fit it; use --method magnitude"
            )


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


def _run(layer: nn.Module, hidden: Tensor, call: _Call) -> Tensor:
    return _tensor(layer(hidden, *call.args, **call.kwargs))


def _tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
