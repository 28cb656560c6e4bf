"""The commands of `seft`: each parses its options and calls another subpackage; launch/ has them as scripts."""
