"""Methods to compare SEFT with, for seft train (docs/baselines.md)."""
