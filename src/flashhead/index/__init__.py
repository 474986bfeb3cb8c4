"""Indexes of a head: how they are built, what they hold, how they are stored."""
