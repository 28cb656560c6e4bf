"""Reading, writing and hashing files: atomic, checked, never unpickled."""
