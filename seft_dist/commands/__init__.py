"""The commands of `seft`: each parses its options and calls one room; launch/ has them as scripts."""
