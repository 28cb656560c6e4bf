"""Running calibration text through a model, one decoder layer at a time.

Only the hidden states between two layers are kept. Each layer runs twice: once to observe the inputs of its linears
and, after those were pruned, once more to compute the input of the next layer. So every layer sees what the pruned
layers before it produce. Ranks run different batches.
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
from seft_dist.data.order import MixedOrder
from seft_dist.data.sequences import Sample
from seft_dist.data.several import MixedSequences
from seft_dist.io.library_types import PreTrainedModel

_TOKENS_AT_ONCE = 2048
"""Largest number of tokens in a batch."""


class _StopForward(Exception):  # noqa: N818  # not an error
    """Ends a forward pass whose rest is not needed."""


@dataclass
class LayerCall:
    """The arguments with which a model calls one of its layers, except the hidden states."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Find the list of a model's decoder layers.

    Returns:
        The name of the module list, and the list.

    Raises:
        ValueError: There is no such list, or there are several.
    """
    kinds = set(model._no_split_modules or ())
    candidates = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(type(layer).__name__ in kinds for layer in module)
    ]
    if len(candidates) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(candidates)} lists of decoder layers: needs one, as Llama's "
            "model.layers; magnitude pruning (--method magnitude, no --compensate) works without"
        )
    return candidates[0]


def sample_sequences(sequences: Sequence[Sample], count: int, seed: int) -> list[Tensor]:
    """Draw calibration sequences at random, without repetition; from each source of a mix its share.

    Args:
        sequences: The calibration data.
        count: Number of sequences to draw.
        seed: Seed of the random numbers.

    Returns:
        ``count`` tensors of token numbers, 1-D int64; more if the sequences hold separate documents: one for each, so
        that none sees another.

    Raises:
        ValueError: There are fewer sequences.
    """
    if len(sequences) < count:
        raise ValueError(
            f"the calibration data has {len(sequences)} sequences, --sequences asks for {count}: lower it, lower "
            "data.seq_len, or use more text"
        )
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    if isinstance(sequences, MixedSequences):
        mixed = MixedOrder(sequences.counts, sequences.weights, seed)
        order = [mixed(position) for position in range(count)]
        if len(set(order)) < count:
            raise ValueError(
                f"a source of data.mix has fewer sequences than its share of --sequences={count}: lower it or the "
                "weight, or use more text"
            )
    return [document for index in order for document in _documents(sequences[index])]


def _documents(sample: Sample) -> tuple[Tensor, ...]:
    ids, _, *positions = sample
    if not positions:
        return (ids,)
    return ids.tensor_split((positions[0] == 0).nonzero().flatten()[1:])


LayerVisitor = Callable[[str, nn.Module, Callable[[], None]], None]
"""Function that is called with the name of a layer, the layer, and ``run``, see ``Calibration.walk``."""
Materialize = Callable[[str], AbstractContextManager[None]]
"""Function from the name of a module to a context in which the module's weights are in memory."""


class Calibration:
    """Runs calibration text through a model's decoder layers; its batches are divided among the ranks."""

    @torch.no_grad()
    def __init__(
        self,
        model: PreTrainedModel,
        sequences: Sequence[Tensor],
        ranks: Group,
        *,
        materialize: Materialize = lambda name: nullcontext(),
        materialize_rest: Callable[[], AbstractContextManager[None]] = nullcontext,
        device: torch.device | None = None,
    ) -> None:
        """Record how the model calls its layers, and check that they form a chain. No collective is entered.

        Args:
            model: A causal LM in evaluation mode.
            sequences: Token numbers, 1-D int64 each, the same on every rank. Sequences of equal length form batches.
            ranks: Ranks that share the work; each runs its own batches.
            materialize: Puts the weights of a layer on ``device`` while the context is open.
            materialize_rest: The same for everything except the decoder layers and the head.
            device: Device on which the model computes; None: the CPU. Hidden states are kept on the CPU.

        Raises:
            ValueError: The model's layers do not form a chain, or a token is outside the model's vocabulary.
        """
        self._model, self._materialize, self._materialize_rest = model, materialize, materialize_rest
        self._device = device or torch.device("cpu")
        self._prefix, self._layers = find_layers(model)
        batches = _batches(sequences)
        for batch in batches:
            check_vocabulary({"input_ids": batch}, model)
        # The batches do not depend on the number of ranks, so neither do the statistics of each batch
        first, last = (len(batches) * number // ranks.size for number in (ranks.rank, ranks.rank + 1))
        self._own = batches[first:last]
        self._calls = {
            shape: self._record_calls(batch) for shape, batch in {batch.shape: batch for batch in batches}.items()
        }
        self._check_chain(batches[0])

    @torch.no_grad()
    def walk(self, visit: LayerVisitor, *, changes: bool = True, progress: bool = True) -> Iterator[str]:
        """Visit every decoder layer in order, and yield after each one, while its weights are still in memory.

        Args:
            visit: Called with the name of a layer, the layer, and ``run``, which runs all of this rank's batches
                through the layer.
            changes: ``visit`` may change weights after ``run()``, so the next layer's input is computed again.
            progress: Show a progress bar.

        Yields:
            The name of the layer.
        """
        with self._materialize_rest():
            hidden = [self._first_input(batch) for batch in self._own]
        bar = tqdm(self._layers, desc="Pruning layers" if changes else "Measuring layers", disable=not progress)
        for number, layer in enumerate(bar):
            outputs: list[Tensor] = []
            with self._materialize(f"{self._prefix}.{number}"):

                def run(number: int = number, layer: nn.Module = layer, outputs: list[Tensor] = outputs) -> None:
                    outputs.clear()
                    for index, batch in enumerate(self._own):
                        call = self._calls[batch.shape][number]
                        states = hidden[index].to(self._device)  # noqa: B023  # only called in this iteration
                        result = run_layer(layer, states, call)
                        if changes:
                            del result  # not needed: the weights are about to change
                        else:
                            outputs.append(result.cpu())

                visit(f"{self._prefix}.{number}", layer, run)
                yield f"{self._prefix}.{number}"
                if changes or len(outputs) < len(hidden):
                    if number + 1 < len(self._layers):
                        for index, batch in enumerate(self._own):
                            call = self._calls[batch.shape][number]
                            hidden[index] = run_layer(layer, hidden[index].to(self._device), call).cpu()
                else:
                    hidden = outputs

    def _forward(self, tokens: Tensor) -> None:
        # Without the head, whose large output is not needed
        self._model.base_model(input_ids=tokens.to(self._device), use_cache=False)

    @contextmanager
    def _one_layer_at_a_time(self) -> Iterator[None]:
        """Context in which a forward pass of the model materializes the weights of one decoder layer at a time."""
        opened: list[ExitStack] = []

        def enter(name: str) -> Callable[..., None]:
            def before(module: nn.Module, args: Any) -> None:
                opened.append(ExitStack())
                opened[-1].enter_context(self._materialize(name))

            return before

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            opened.pop().close()

        with ExitStack() as stack:
            stack.enter_context(self._materialize_rest())
            for number, layer in enumerate(self._layers):
                stack.callback(layer.register_forward_pre_hook(enter(f"{self._prefix}.{number}"), prepend=True).remove)
                stack.callback(layer.register_forward_hook(leave).remove)
            try:
                yield
            finally:
                while opened:
                    opened.pop().close()

    def _record_calls(self, tokens: Tensor) -> list[LayerCall]:
        """Record the arguments of each layer except the hidden states: positions, masks. They may differ by layer."""
        calls = [LayerCall() for _ in self._layers]

        def recorder(call: LayerCall) -> Callable[..., None]:
            def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                call.args = args[1:]
                call.kwargs = {name: value for name, value in kwargs.items() if name != "hidden_states"}

            return record

        with ExitStack() as stack:
            for layer, call in zip(self._layers, calls, strict=True):
                stack.callback(layer.register_forward_pre_hook(recorder(call), with_kwargs=True).remove)
            with self._one_layer_at_a_time():
                self._forward(tokens)
        return calls

    def _first_input(self, tokens: Tensor) -> Tensor:
        """Compute the hidden states that enter the first layer, [sequences, tokens, hidden]."""
        caught: list[Tensor] = []

        def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append(args[0] if args else kwargs["hidden_states"])
            raise _StopForward

        handle = self._layers[0].register_forward_pre_hook(catch, with_kwargs=True)
        try:
            self._forward(tokens)
        except _StopForward:
            pass
        finally:
            handle.remove()
        return caught[0].cpu()

    def _check_chain(self, tokens: Tensor) -> None:
        """Check that each layer gets only the output of the layer before, and arguments that do not depend on the text.

        Otherwise running layer by layer would be wrong without any error. The tokens are in another order than those
        whose calls were recorded, so that arguments that depend on them are noticed.

        Raises:
            ValueError: The whole model and the chain of layers give different results.
        """
        calls, tokens = self._calls[tokens.shape], tokens.flip(1)
        chain: list[Tensor] = []
        ends: list[Tensor] = []

        def follow(call: LayerCall) -> Callable[..., None]:
            def after(module: nn.Module, args: Any, output: Any) -> None:
                # Runs within the model's own forward pass, while the layer is in memory. It calls .forward because
                # calling the module would run the hooks again.
                chain.append(_tensor(module.forward(chain.pop(), *call.args, **call.kwargs)))
                ends[:] = [_tensor(output)]

            return after

        with self._materialize_rest():
            chain.append(self._first_input(tokens).to(self._device))
        with ExitStack() as stack:
            for layer, call in zip(self._layers, calls, strict=True):
                stack.callback(layer.register_forward_hook(follow(call)).remove)
            with self._one_layer_at_a_time():
                self._forward(tokens)
        # Both run the same operations on the same shapes. The tolerance is for libraries whose choice of algorithm
        # depends on the alignment of memory.
        tolerance = 8 * torch.finfo(chain[0].dtype).eps * float(ends[0].abs().max())
        if not torch.allclose(ends[0], chain[0], rtol=0, atol=tolerance):
            raise ValueError(
                f"{type(self._model).__name__} passes its layers more than the output of the layer before: "
                "layer-by-layer calibration does not fit it; use --method magnitude without --compensate"
            )


def _batches(sequences: Sequence[Tensor]) -> list[Tensor]:
    """Stack sequences of equal length, up to a number of tokens. Without padding, masks do not depend on the data."""
    by_length: dict[int, list[Tensor]] = {}
    for sequence in sequences:
        by_length.setdefault(len(sequence), []).append(sequence)
    batches = []
    for length, group in by_length.items():
        size = max(1, _TOKENS_AT_ONCE // length)
        batches += [torch.stack(group[start : start + size]) for start in range(0, len(group), size)]
    return batches


def run_layer(layer: nn.Module, hidden: Tensor, call: LayerCall) -> Tensor:
    """Run a layer on hidden states as the model calls it, and return the hidden states behind it."""
    return _tensor(layer(hidden, *call.args, **call.kwargs))


def _tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
