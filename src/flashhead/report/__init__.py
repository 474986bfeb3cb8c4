"""Plots, drawn only from the JSON documents that `flashhead eval` and `flashhead bench` write."""
