"""Evaluation of models: perplexity, tasks of lm-evaluation-harness, and the number of zero weights."""
