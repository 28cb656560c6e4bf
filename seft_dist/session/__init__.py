"""Options, ranks, signals and the environment, for every program of launch/."""
