"""The sparsity of each layer, from the outliers of its scores (OWL) or from a file.

Source: Yin, Wu, Zhang, Hsieh, Wang, Jia, Li, Jaiswal, Pechenizkiy, Liang, Bendersky, Wang, Liu, "Outlier Weighed
Layerwise Sparsity (OWL)", arXiv 2310.05175.
"""

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from seft_dist.files.reading import read_yaml


def outlier_share(scores: list[Tensor], threshold: float) -> float:
    """Share of a decoder layer's scores that are above ``threshold`` times their mean.

    Args:
        scores: Wanda's scores of each linear of the layer, fp32.
        threshold: M in the paper.
    """
    numel = sum(score.numel() for score in scores)
    mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / numel
    return sum(int(torch.count_nonzero(score > threshold * mean)) for score in scores) / numel


def owl_sparsities(
    outliers: dict[str, float], sizes: dict[str, int], sparsity: float, spread: float
) -> dict[str, float]:
    """Compute the sparsity of each decoder layer: a layer with more outliers gets fewer zeros.

    Args:
        outliers: Share of outliers of each decoder layer, by name.
        sizes: Number of weights of each decoder layer; the mean sparsity over all weights is ``sparsity``.
        sparsity: Sparsity of all layers together.
        spread: lambda in the paper; the sparsities of two layers differ by at most twice this.

    Raises:
        ValueError: The sparsity of a layer is not between 0 and 1.
    """
    low, high = min(outliers.values()), max(outliers.values())
    scale = 2 * spread / (high - low) if high > low else 0.0
    density = {name: (share - low) * scale for name, share in outliers.items()}
    mean = sum(density[name] * size for name, size in sizes.items()) / sum(sizes.values())
    result = {name: sparsity - (value - mean) for name, value in density.items()}
    for name, value in result.items():
        if not 0 < value < 1:
            raise ValueError(
                f"OWL gives {name} the sparsity {value:.3f}: needs one between 0 and 1; lower --owl_lambda (now "
                f"{spread})"
            )
    return result


def read_sparsities(path: str, targets: Iterable[str], default: float | None) -> dict[str, float]:
    """Read the sparsity of each target from a file.

    Args:
        path: JSON or YAML file with a sparsity for names of modules (decoder layers or linears). The longest name that
            matches a target is used.
        targets: Names of the linears.
        default: Sparsity of targets that the file does not name; None: it must name all targets.

    Returns:
        Sparsity of each target, 0 <= sparsity < 1.

    Raises:
        ValueError: There is no such file, its content is wrong, a name matches no target, or a target has no name.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f'layer_ratios={path} is no file: needs "uniform", "owl" or a JSON or YAML file')
    try:
        content = read_yaml(file)  # JSON is YAML
    except ValueError as error:
        raise ValueError(f"layer_ratios: {error}; a file that is neither JSON nor YAML cannot be read") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f'{path} holds {type(content).__name__}: needs names to sparsities, as "model.layers.0: 0.5"')
    for name, value in content.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not isinstance(name, str) or not number or not math.isfinite(value) or not 0 <= value < 1:
            raise ValueError(f"{path}: {name!r} has {value!r}: needs a name with a share of at least 0 and below 1")
    sparsities: dict[str, float] = {}
    used = set()
    for target in targets:
        fitting = [name for name in content if target == name or target.startswith(f"{name}.")]
        if not fitting and default is None:
            raise ValueError(f"{path} does not name {target}: add it, or give --sparsity for what is not named")
        chosen = max(fitting, key=len, default=None)
        used.update(fitting)
        sparsities[target] = float(content[chosen]) if chosen is not None else float(default or 0)
    unused = sorted(content.keys() - used)
    if unused:
        raise ValueError(f"{path} names {unused[0]}, which is no target and holds none: check --targets and the name")
    return sparsities
