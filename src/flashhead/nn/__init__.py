"""Modules with weights of their own; the maths is in ops."""
