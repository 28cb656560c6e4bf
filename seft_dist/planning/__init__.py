"""Estimates of whether a model fits a cluster and how long a run takes, calculated before anything is started."""
