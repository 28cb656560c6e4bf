"""Models and checkpoints on disk: finding and checking them, loading them into shards, and writing them."""
