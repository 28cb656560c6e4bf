"""Running the loss of calibration text backwards through a model, one decoder layer at a time.

The forward pass keeps the hidden states that enter each layer. The head turns the last ones into a loss and its
gradient. Then each layer, from the last to the first, runs once more with the states that it got, and passes the
gradient of its output on to its input. No weight gets a gradient, and only one layer's weights are in memory.

    states 0 --layer 0--> states 1 --layer 1--> states 2 --head--> loss
    gradient of states 0 <--layer 0-- of states 1 <--layer 1-- of states 2
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from seft_dist.pruning.calibrate import Calibration, LayerVisitor, run_layer


class BackwardCalibration(Calibration):
    """Runs calibration text forwards and the gradient of its loss backwards; batches are divided among the ranks."""

    def walk_back(
        self,
        visit: LayerVisitor,
        *,
        materialize_ends: Callable[[], AbstractContextManager[None]] = nullcontext,
        progress: bool = True,
    ) -> Iterator[str]:
        """Visit every decoder layer from the last to the first, and yield after each one, while it is in memory.

        The loss is the sum of the cross entropy over all predicted tokens, of the model as it is.

        Args:
            visit: Called with the name of a layer, the layer, and ``run``. ``run`` takes all of this rank's batches
                forwards through the layer, with gradients, and their gradients backwards; it must be called once.
            materialize_ends: Puts everything but the decoder layers in memory: embeddings, last norm, head.
            progress: Show progress bars.

        Yields:
            The name of the layer.
        """
        entering, wraps = self._enter_layers(progress)
        with materialize_ends():
            grads = [
                self._grad_of_loss(states, tokens, wraps)
                for states, tokens in zip(entering.pop(), self._own, strict=True)
            ]
        numbers = range(len(self._layers) - 1, -1, -1)
        for number in tqdm(numbers, desc="Measuring gradients", disable=not progress):
            layer, states = self._layers[number], entering.pop()
            with self._materialize(f"{self._prefix}.{number}"):

                def run(number: int = number, states: list[Tensor] = states) -> None:
                    for index, batch in enumerate(self._own):
                        call = self._calls[batch.shape][number]
                        leaf = states[index].to(self._device).requires_grad_()
                        with torch.enable_grad():
                            output = run_layer(self._layers[number], leaf, call)
                        output.backward(grads[index].to(self._device))
                        assert leaf.grad is not None, "a layer whose output does not depend on its input"
                        grads[index] = leaf.grad.cpu()

                visit(f"{self._prefix}.{number}", layer, run)
                yield f"{self._prefix}.{number}"

    @torch.no_grad()
    def _enter_layers(self, progress: bool) -> tuple[list[list[Tensor]], bool]:
        """Compute the hidden states that enter each layer, and behind them those that leave the last one.

        Returns:
            The states of each batch, for each layer and for the head, on the CPU; and whether a layer returns a tuple.
        """
        with self._materialize_rest():
            entering = [[self._first_input(batch) for batch in self._own]]
        wraps = False
        for number, layer in enumerate(tqdm(self._layers, desc="Measuring layers", disable=not progress)):
            with self._materialize(f"{self._prefix}.{number}"):
                leaving = []
                for states, batch in zip(entering[-1], self._own, strict=True):
                    call = self._calls[batch.shape][number]
                    output = layer(states.to(self._device), *call.args, **call.kwargs)
                    wraps = not isinstance(output, Tensor)
                    leaving.append((output[0] if wraps else output).cpu())
            entering.append(leaving)
        return entering, wraps

    def _grad_of_loss(self, states: Tensor, tokens: Tensor, wraps: bool) -> Tensor:
        """Compute the gradient of the summed loss with respect to the states that leave the last layer.

        One sequence at a time, since logits take as many values as tokens times the vocabulary.
        """
        grads = []
        for one, sequence in zip(states.split(1), tokens.to(self._device).split(1), strict=True):
            leaf = one.to(self._device).requires_grad_()
            with self._layers_that_return((leaf,) if wraps else leaf), torch.enable_grad():
                loss = self._model(input_ids=sequence, labels=sequence, use_cache=False).loss
            (loss * (sequence.shape[1] - 1)).backward()  # the model's loss is a mean
            assert leaf.grad is not None, "a loss that does not depend on the hidden states"
            grads.append(leaf.grad.cpu())
        return torch.cat(grads)

    @contextmanager
    def _layers_that_return(self, output: Any) -> Iterator[None]:
        """Context in which each decoder layer returns a given output, whatever its input."""
        try:
            for layer in self._layers:
                layer.forward = lambda *args, **kwargs: output
            yield
        finally:
            for layer in self._layers:
                del layer.forward
