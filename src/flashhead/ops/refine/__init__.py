"""Refine: better estimates of the rows that survived the scan."""
