"""Summaries, tables and figures of runs and sweeps, from the files that they left."""
