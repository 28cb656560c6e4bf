"""Fine-tune a pruned causal LM with SEFT: its sparsity stays what it is, its quality comes back.

    python launch/train.py --model.path models/pruned --data.path data/train.jsonl --output runs/r1
    torchrun --nproc-per-node 8 launch/train.py --config launch/recipes/llama_fsdp.yaml
    deepspeed --num_gpus 8 launch/train.py --config launch/recipes/llama_zero3.yaml --deepspeed ds_configs/zero3.json

The same script runs under accelerate launch, mpirun and srun.
"""

import sys
from functools import partial

from seft_dist.session.signals import StopRequest, stop_requests


def main(request: StopRequest | None = None) -> None:
    """Train as the command line says."""
    from seft_dist.config import TrainConfig
    from seft_dist.session.cli import parse

    config = parse(TrainConfig, description=__doc__)

    from seft_dist.session.distributed import shutdown
    from seft_dist.training.trainer import Stopped, train

    outcome = train(config, request)
    shutdown()
    if isinstance(outcome, Stopped) and outcome.signal == "SIGINT":
        sys.exit(130)  # as everything that Ctrl-C ends: a script must not go on with its next command


if __name__ == "__main__":
    with stop_requests(process_ends=True) as request:  # before anything is loaded that takes long
        from seft_dist.session.cli import run

        run(partial(main, request))
