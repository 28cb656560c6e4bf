"""Which modules of a model are trained sparsely, whatever library they are from."""
