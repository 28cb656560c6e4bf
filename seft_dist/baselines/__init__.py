"""Methods to compare SEFT with, for launch/train.py (docs/baselines.md)."""
