"""Scan: an estimate of every logit from the base codes."""
