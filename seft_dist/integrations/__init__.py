"""What other libraries need to train with SEFT, beyond what they offer every optimizer."""
