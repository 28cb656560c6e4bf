"""Pruning: magnitude, Wanda and SparseGPT, one decoder layer at a time."""
