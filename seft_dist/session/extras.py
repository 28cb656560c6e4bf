"""Libraries that only some commands need: which extra of the package installs each, and how that is said."""

import importlib.util

EXTRAS = {
    "accelerate": "train",
    "datasets": "train",
    "sentencepiece": "train",
    "deepspeed": "deepspeed",
    "mpi4py": "mpi4py",
    "jinja2": "plots",
    "matplotlib": "plots",
    "peft": "baselines",
    "lm_eval": "eval",
    "gguf": "quickstart",
    "tensorboard": "trackers",
    "wandb": "trackers",
    "mlflow": "trackers",
    "trackio": "trackers",
    "openvino": "runtime",
    "onnx": "runtime",
    "onnxruntime": "runtime",
    "onnxscript": "runtime",
}
"""Extra of setup.cfg for each library, by the name that is imported."""


def install_line(library: str) -> str:
    """Return the command that installs a library.

    Args:
        library: A key of EXTRAS.
    """
    return f"pip install 'seft_dist[{EXTRAS[library]}]'"


def require(library: str, what: str, otherwise: str = "") -> None:
    """Refuse to go on without a library, before anything is loaded that takes long.

    Args:
        library: A key of EXTRAS.
        what: What needs it, e.g. "--figures".
        otherwise: What else can be done, e.g. ", or --figures false".

    Raises:
        ValueError: It is not installed; says how to install it.
    """
    if importlib.util.find_spec(library) is None:
        raise ValueError(f"{what} needs {library}, which is not installed: {install_line(library)}{otherwise}")
