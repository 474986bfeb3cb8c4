"""Noise: Gumbel numbers that a seed, a step and a row determine, whoever asks and in what order."""
