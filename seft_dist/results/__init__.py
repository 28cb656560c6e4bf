"""Summaries, tables and figures of runs and sweeps, made from the files that they wrote."""
