"""The record of a run beside its metrics: how to repeat it, what moved in it, and its trace if there is to be one."""

from pathlib import Path

from seft_dist.config import TrainConfig
from seft_dist.data.batches import Batch
from seft_dist.io.source import Source
from seft_dist.session.agreement import on_all_ranks
from seft_dist.session.distributed import Ranks
from seft_dist.training.ds_config import DsConfig
from seft_dist.training.fingerprint import has_dropout, topology_hashes
from seft_dist.training.manifest import list_hosts, open_manifest
from seft_dist.training.method import Method, TrainedSeft
from seft_dist.training.run_folder import RunOrigin
from seft_dist.training.topology import FirstMasks, Topology
from seft_dist.training.trace import Trace


class Record:
    """The record of the run that this process takes part in."""

    def __init__(
        self,
        config: TrainConfig,
        ranks: Ranks,
        source: Source,
        method: Method,
        *,
        origin: RunOrigin,
        backend: str,
        ds: DsConfig | None,
        first: FirstMasks | None,
    ) -> None:
        """Write down the start of the run or of a further attempt. Collective; every rank raises the same errors.

        Args:
            config: The run, resolved; its folder exists.
            ranks: This process.
            source: The model that training starts from.
            method: The method, the steps of a checkpoint already restored.
            origin: Fingerprints of model and data.
            backend: Backend that holds the weights, e.g. "zero3".
            ds: The ds_config, if there is one.
            first: Masks of the pruned model, if the method can move them.

        Raises:
            OSError: A file cannot be read or written.
        """
        self._method = method
        self._topology: Topology | None = None
        self._trace: Trace | None = None
        data = {"fingerprint": origin.data, "sequences": origin.sequences, "global_batch": origin.global_batch}
        hosts = list_hosts(ranks)

        def open_files() -> None:
            self._manifest = open_manifest(
                config,
                ranks,
                fingerprints={"model": origin.model, "teacher": origin.teacher, "parent": origin.parent},
                dtype=str(source.dtype).removeprefix("torch."),
                dropout=has_dropout(source.config.to_dict()) or config.baseline.dropout > 0,
                data=data,
                backend=backend,
                ds=ds,
                steps_done=method.num_steps,
                hosts=hosts,
            )
            if first is not None:
                self._topology = Topology(Path(config.output), first, ranks)
            if config.trace:
                assert isinstance(method, TrainedSeft)  # checked in the configuration
                self._trace = Trace(Path(config.output), method, ranks)

        try:
            on_all_ranks(ranks, open_files)
        except (OSError, ValueError):
            self.close()
            raise

    def step(self, step: int, micro_batches: list[Batch], *, loss: float, tokens: int, lr: float) -> None:
        """Record one optimizer step, after it was done. Collective with a trace or an evolution, else local.

        Args:
            step: Counted from 1.
            micro_batches: This rank's batches.
            loss: Mean over the ranks.
            tokens: Number of tokens of this step, over all ranks.
            lr: Learning rate of this step.
        """
        self._manifest.evolution(self._method.evolution)
        if self._topology is not None:
            self._topology.step()
        if self._trace is not None:
            self._trace.step(step, micro_batches, loss=loss, tokens=tokens, lr=lr)

    def finish(self, loss: float | None) -> None:
        """Record the end of a run that has done all its steps. Collective.

        Args:
            loss: Loss of the last record of the metrics; None: there was no step.
        """
        self._manifest.finish(self._method.num_steps, loss, topology_hashes(self._method))

    def sync(self) -> None:
        """Force what was recorded to disk."""
        if self._topology is not None:
            self._topology.sync()
        if self._trace is not None:
            self._trace.sync()

    def close(self) -> None:
        """Close the files."""
        if self._topology is not None:
            self._topology.close()
        if self._trace is not None:
            self._trace.close()
