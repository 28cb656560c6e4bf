"""Quality of models: perplexity, tasks of lm-evaluation-harness, and how many weights are 0."""
