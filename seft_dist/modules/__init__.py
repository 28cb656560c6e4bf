"""The weights of a model that are trained sparsely, whatever library their modules are from."""
