"""Accuracy of a head on real text, next to the dense, int8 and int4 heads."""

from flashhead.evaluate.head import evaluate_head, format_table

__all__ = ["evaluate_head", "format_table"]
