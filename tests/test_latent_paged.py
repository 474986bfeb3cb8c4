"""Latent attention over a paged cache against the same module on each text alone."""

import itertools

import pytest
import torch
from latent_models import tiny, windows

from flashhead.convert.latent import make_latent
from flashhead.integrations.latent_model import latent_modules
from flashhead.nn.latent_paged import PagedBatch, paged_attention
from flashhead.options_latent import LatentOptions

BLOCK = 4
CASES = [
    *itertools.product(["gqa", "biases", "gemma3", "partial-rotary"], ["rebuilt", "decoupled"]),
    ("qwen3", "rebuilt"),
]
STEPS = [[7, 0, 21], [1, 5, 1], [1, 1, 9], [1, 1, 1], [0, 12, 1]]
"""Query tokens that each of three texts brings to a call: prompts whole and in pieces, decode
steps, a text that comes late and one that ends.
"""


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def modules(request):
    family, rotary = request.param
    made = tiny(family)
    make_latent(made, LatentOptions(kv_ratio=1.5, rotary=rotary), windows(), progress=False)
    return list(latent_modules(made).values())


def queries_and_latents(module, hidden):
    query = module.q_proj(hidden).unflatten(-1, (module.shape.heads, -1))
    query = query if module.q_norm is None else module.q_norm(query)
    return query, module.compress(hidden[None])[0]


@torch.no_grad()
def test_as_each_text_alone(modules):
    """A block table read in the wrong order, a token kept in another's slot, a key turned by its
    place in the batch, a prompt's piece that sees the future or only its own piece, a window that
    is off by one, rows answered in another order.
    """
    generator = torch.Generator().manual_seed(1)
    totals = [sum(step[text] for step in STEPS) for text in range(3)]
    pages = torch.randperm(40, generator=generator)[: 3 * 12].unflatten(0, (3, 12)).int()
    for module in modules:
        shape = module.shape
        texts = [torch.randn(n, shape.hidden_size, generator=generator) for n in totals]
        wanted = [module(text[None])[0][0] for text in texts]
        cache = torch.full((40, BLOCK, shape.width), float("nan"))
        done = [0, 0, 0]
        for step in STEPS:
            order = sorted((text for text in range(3) if step[text]), key=lambda t: step[t] > 1)
            counts = [step[text] for text in order]
            lengths = torch.tensor([done[t] + step[t] for t in order], dtype=torch.int32)
            places = [torch.arange(done[t], done[t] + step[t]) for t in order]
            slots = [
                pages[t, p // BLOCK].long() * BLOCK + p % BLOCK
                for t, p in zip(order, places, strict=True)
            ]
            hidden = torch.cat([texts[t][p] for t, p in zip(order, places, strict=True)])
            batch = PagedBatch.of_rows(
                counts, lengths, pages[order], torch.cat(slots), int(lengths.max())
            )
            mixed = paged_attention(module, *queries_and_latents(module, hidden), cache, batch)
            found = module.o_proj(mixed.flatten(1))
            want = torch.cat([wanted[t][p] for t, p in zip(order, places, strict=True)])
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
            done = [n + m for n, m in zip(done, step, strict=True)]
        assert done == totals
