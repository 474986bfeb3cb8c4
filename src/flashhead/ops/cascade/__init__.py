"""Cascade: scan, then planes for the survivors, then exact rows."""
