"""Reproducibility of runs: comparison of two runs step by step, and repetition of a run on several layouts."""
