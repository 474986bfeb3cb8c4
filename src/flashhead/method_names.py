"""Names of the methods that an evaluation compares; `evaluate.methods` builds them."""

METHODS = (
    *("flashhead", "certified", "codes", "clusters", "clusters-published", "sampled"),
    *("clusters-codes", "svd", "svd-hidden", "bf16", "int8", "fp8", "int4", "int4-g128"),
)
"""What `flashhead eval` can measure."""
TABLE_METHODS = ("flashhead", "bf16", "int8", "int4")
"""What `flashhead eval head` shows unless it is told otherwise."""
CALIBRATED_METHODS = (
    *("codes", "clusters", "clusters-published", "sampled", "clusters-codes", "svd-hidden"),
)
"""Those that need hidden states sampled from the model; "certified" too for another index."""
