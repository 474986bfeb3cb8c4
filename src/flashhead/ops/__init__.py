"""The maths of the heads:
one folder an operation, `api` in front, `reference` as the specification.
"""
