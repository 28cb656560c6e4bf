"""Make the repaired model from the pruned one and the delta file of a run.

python launch/export.py --base models/pruned --delta runs/r1/delta.safetensors --output models/repaired
"""

from pathlib import Path

from jsonargparse import auto_cli

from seft_dist.training.cli import run


def export(base: str, delta: Path, output: Path) -> None:
    """Make the repaired model from the pruned one and the delta file of a run, bit for bit as it was trained.

    Args:
        base: The pruned model's folder or hub name: model.path of the run.
        delta: delta.safetensors of the run.
        output: Folder to make; it must not exist.
    """
    from seft_dist.config import ModelConfig
    from seft_dist.io.export import apply_delta
    from seft_dist.io.models import open_source

    apply_delta(open_source(ModelConfig(path=base, dtype="float32")), delta, output)
    print(f"The repaired model is in {output}")


if __name__ == "__main__":
    run(lambda: auto_cli(export, as_positional=False))
