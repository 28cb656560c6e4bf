"""Fine-tune a pruned causal LM with SEFT: its sparsity stays what it is, its quality comes back.

    seft train --model.path models/pruned --data.path data/train.jsonl --output runs/r1
    torchrun --nproc-per-node 8 -m seft_dist train --config llama_fsdp
    deepspeed --num_gpus 8 --module seft_dist train --config llama_zero3

The same command runs under accelerate launch, mpirun and srun.
"""

import sys
from functools import partial

from seft_dist.session.signals import StopRequest, stop_requests


def main() -> None:
    """Train as the command line says."""
    with stop_requests(process_ends=True) as request:  # before anything is loaded that takes long
        from seft_dist.session.cli import run

        run(partial(_train, request))


def _train(request: StopRequest) -> None:
    from seft_dist.config import TrainConfig
    from seft_dist.session.cli import parse

    config = parse(TrainConfig, description=__doc__)

    from seft_dist.session.distributed import shutdown
    from seft_dist.training.trainer import Stopped, train

    outcome = train(config, request)
    shutdown()
    if isinstance(outcome, Stopped) and outcome.signal == "SIGINT":
        sys.exit(130)  # as everything that Ctrl-C ends: a script must not go on with its next command
