"""Timings of the head and of decoding against their baselines; every result is verified first."""
