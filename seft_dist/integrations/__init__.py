"""Adapters that let other libraries train with SEFT, beyond what they offer every optimizer."""
