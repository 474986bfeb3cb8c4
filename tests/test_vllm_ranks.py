"""Ranks of one head agree on the batches they search."""

import torch
from torch import distributed
from torch.multiprocessing import spawn

from flashhead.integrations.vllm.ranks import ANY, agree
from flashhead.nn.tuning import Crossover

MEASURED = (Crossover(8, 64), ANY, Crossover(16, 2))


def rank_of(rank: int, folder: str) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(MEASURED)
    )
    agreed = agree(MEASURED[rank], distributed.group.WORLD)
    torch.save([agreed.logits, agreed.token], f"{folder}/{rank}")
    distributed.destroy_process_group()


def test_the_slowest_rank_decides(tmp_path):
    """A rank that keeps its own crossover, or one without rows that holds all others to nothing."""
    spawn(rank_of, (str(tmp_path),), nprocs=len(MEASURED))
    found = [torch.load(tmp_path / str(rank)) for rank in range(len(MEASURED))]
    assert found == [[8, 2]] * len(MEASURED)
