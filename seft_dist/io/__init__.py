"""Models and checkpoints on disk: found, checked, loaded into shards, written."""
