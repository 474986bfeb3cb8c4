"""Probe: score all centroids, take the best clusters (see `api`)."""
