"""Options, ranks, signals and the environment, for every command."""
