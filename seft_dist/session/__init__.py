"""What every program of launch/ shares: options, ranks, signals, the environment."""
