"""The hot loops: each has a form in torch, which is the reference, and faster ones that give the same result."""
