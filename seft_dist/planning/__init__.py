"""Whether a model fits a cluster and how long a recipe takes, calculated before anything is started."""
