"""The one-machine stack: the same files as on a cluster, run as processes."""
