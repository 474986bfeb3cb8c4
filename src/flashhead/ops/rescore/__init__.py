"""Rescore: exact logits of chosen rows."""
