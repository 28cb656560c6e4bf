"""Every option of the project, defined once, as fields of frozen dataclasses that check their values when made.

A field's docstring says its meaning, its unit and its special values; ``--help`` of each command prints it.
"""

from seft_dist.config.baselines import BaselineConfig
from seft_dist.config.data import DataConfig, SourceConfig, paths_of
from seft_dist.config.inputs import DType, ModelConfig
from seft_dist.config.method import AdamConfig, SeftConfig, Selection, check_adam
from seft_dist.config.planning import ClusterConfig, PlanConfig
from seft_dist.config.pruning import PruneConfig
from seft_dist.config.results import EvaluateConfig, SweepConfig
from seft_dist.config.study import StudyConfig
from seft_dist.config.teacher import TeacherConfig
from seft_dist.config.training import ReproduceConfig, TrainConfig
from seft_dist.config.validation import EvalConfig

__all__ = [
    "AdamConfig",
    "BaselineConfig",
    "ClusterConfig",
    "DType",
    "DataConfig",
    "EvalConfig",
    "EvaluateConfig",
    "ModelConfig",
    "PlanConfig",
    "PruneConfig",
    "ReproduceConfig",
    "SeftConfig",
    "Selection",
    "SourceConfig",
    "StudyConfig",
    "SweepConfig",
    "TeacherConfig",
    "TrainConfig",
    "check_adam",
    "paths_of",
]
