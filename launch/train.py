"""Fine-tune a pruned causal LM with SEFT: its sparsity stays what it is, its quality comes back.

    python launch/train.py --model.path models/pruned --data.path data/train.jsonl --output runs/r1
    torchrun --nproc-per-node 8 launch/train.py --config launch/recipes/llama_fsdp.yaml
    deepspeed --num_gpus 8 launch/train.py --config launch/recipes/llama_zero3.yaml --deepspeed ds_configs/zero3.json

The same script runs under accelerate launch, mpirun and srun.
"""

from seft_dist.config import TrainConfig
from seft_dist.training.cli import parse, run


def main() -> None:
    """Train as the command line says."""
    config = parse(TrainConfig, description=__doc__)

    from seft_dist.training.distributed import shutdown
    from seft_dist.training.trainer import train

    train(config)
    shutdown()


if __name__ == "__main__":
    run(main)
