"""Latent attention over a paged cache against the same module on each text alone."""

import copy
import itertools

import pytest
import torch
from latent_models import tiny, windows

from flashhead.convert.latent import make_latent
from flashhead.integrations.latent_model import latent_modules
from flashhead.nn.latent import LatentAttention
from flashhead.nn.latent_paged import PagedBatch, paged_attention
from flashhead.nn.latent_shape import LatentShape
from flashhead.nn.rotary import RotaryTable
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


def texts_of(module):
    generator = torch.Generator().manual_seed(1)
    totals = [sum(step[text] for step in STEPS) for text in range(3)]
    return [torch.randn(n, module.shape.hidden_size, generator=generator) for n in totals]


@torch.no_grad()
def served(module, texts, block=BLOCK):
    """Outputs of each text, all served together from one cache whose other blocks are NaN."""
    generator = torch.Generator().manual_seed(2)
    like = texts[0]
    pages = torch.randperm(40, generator=generator)[: 3 * 12].unflatten(0, (3, 12)).int()
    cache = like.new_full((40, block, module.shape.width), float("nan"))
    done, found = [0, 0, 0], [[], [], []]
    for step in STEPS:
        order = sorted((text for text in range(3) if step[text]), key=lambda t: step[t] > 1)
        lengths = torch.tensor([done[t] + step[t] for t in order], dtype=torch.int32)
        places = [torch.arange(done[t], done[t] + step[t]) for t in order]
        slots = [
            pages[t, p // block].long() * block + p % block
            for t, p in zip(order, places, strict=True)
        ]
        hidden = torch.cat([texts[t][p] for t, p in zip(order, places, strict=True)])
        batch = PagedBatch.of_rows(
            [step[text] for text in order],
            lengths.to(like.device),
            pages[order].to(like.device),
            torch.cat(slots).to(like.device),
            int(lengths.max()),
        )
        mixed = paged_attention(module, *queries_and_latents(module, hidden), cache, batch)
        out = module.o_proj(mixed.flatten(1)).split([len(p) for p in places])
        for text, own in zip(order, out, strict=True):
            found[text].append(own)
        done = [n + m for n, m in zip(done, step, strict=True)]
    return [torch.cat(own) for own in found]


@torch.no_grad()
def test_as_each_text_alone(modules):
    """A block table read in the wrong order, a token kept in another's slot, a key turned by its
    place in the batch, a prompt's piece that sees the future or only its own piece, a window that
    is off by one, rows answered in another order.
    """
    for module in modules:
        texts = texts_of(module)
        for text, found in zip(texts, served(module, texts), strict=True):
            torch.testing.assert_close(found, module(text[None])[0][0], rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rotary", ["rebuilt", "decoupled"])
def test_on_a_gpu(rotary):
    """Kernels that read an engine's blocks wrongly on a card: bfloat16, blocks of 16, against the
    CPU's bfloat16 error to float32.
    """
    torch.manual_seed(0)
    shape = LatentShape(
        hidden_size=896,
        heads=14,
        kv_heads=2,
        head_dim=64,
        value_dim=64,
        rank=128,
        rotary_dim=64,
        rotary=rotary,
        components=(1,) * 32 if rotary == "decoupled" else (),
        scale=0.125,
    )
    exact = LatentAttention(shape, RotaryTable.of_base(64)).eval()
    texts = texts_of(exact)
    want = served(exact, texts, 16)
    rounded = copy.deepcopy(exact).bfloat16()
    coarse = [text.bfloat16() for text in texts]
    eager = served(rounded, coarse, 16)
    found = served(rounded.cuda(), [text.cuda() for text in coarse], 16)
    for right, own, other in zip(want, found, eager, strict=True):
        allowed = float((other.float() - right).norm())
        assert float((own.float().cpu() - right).norm()) <= 2 * allowed
