"""SEFT as a torch optimizer: deltas, windows of statistics, evolutions, and the linears that feed them."""
