"""Pruning of dense models by magnitude, Wanda and SparseGPT, one decoder layer at a time."""
