"""Ranks of one head that act as one: all search, or none does.

Each rank holds its own rows of the vocabulary and times its own search. Were one to search a batch
that another multiplies, the step would last as long as the slower of the two.
"""

import torch
from torch import distributed

from flashhead.nn.tuning import ROW_COUNTS, Crossover

ANY = Crossover(ROW_COUNTS[-1], ROW_COUNTS[-1])
"""What a rank says that has no row of the vocabulary: it searches nothing and delays nobody."""


def agree(own: Crossover, group: distributed.ProcessGroup) -> Crossover:
    """The smallest crossover of all ranks. Every rank of the group must call it.

    Args:
        own: what this rank measured.
        group: of the ranks that share the head, on the CPU (gloo).
    """
    rows = torch.tensor([own.logits, own.token])
    distributed.all_reduce(rows, distributed.ReduceOp.MIN, group)
    return Crossover(*rows.tolist())
