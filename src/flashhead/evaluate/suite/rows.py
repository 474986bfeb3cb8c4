"""Many token rows through a model without its head: shared beginnings once, the rest in batches.

Rows are sorted, and neighbours that begin alike are a group: few-shot examples, or one long
document that many questions ask about. A group's common beginning is prefilled once and its keys
and values are copied to every row. Rows of unlike length end together: a row that is s tokens
shorter than the longest has its copy shifted by s places, and those s places are masked. So the
tokens of a row stay consecutive (sliding windows stay exact) and no padding lies between them.
Long rows are read in parts, as attention under a mask may hold the scores of all pairs of tokens.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from flashhead.integrations.latent_model import latent_modules

LEAST_SHARED = 64
"""Tokens; below it a copy of keys and values costs more than the prefill."""
SCORE_BYTES = 2**31
"""Of the attention scores of one layer that may exist at a time while rows are read."""
LEAST_PART = 128
"""Tokens of a part, however many rows are read and however long they are."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows that begin alike.

    Args:
        members: places in the list of rows, the longest last.
        shared: tokens that all of them begin with, at least one less than the shortest has.
    """

    members: tuple[int, ...]
    shared: int


def groups(rows: list[list[int]], sharing: bool = True) -> list[Group]:
    """Group rows by how they begin; those that share nothing are one group, by length.

    Args:
        rows: token ids, one or more each.
        sharing: False: nothing is shared.
    """
    order = sorted(range(len(rows)), key=rows.__getitem__)
    found: list[Group] = []
    alone: list[int] = []
    start = 0
    while start < len(order):
        stop, shared = start + 1, len(rows[order[start]]) - 1
        while sharing and stop < len(order):
            common = _common(rows[order[start]], rows[order[stop]])
            common = min(shared, common, len(rows[order[stop]]) - 1)
            if common < LEAST_SHARED or 2 * common < shared:
                break
            shared, stop = common, stop + 1
        if stop - start > 1:
            members = sorted(order[start:stop], key=lambda i: len(rows[i]))
            found.append(Group(tuple(members), shared))
        else:
            alone += order[start:stop]
        start = stop
    if alone:
        found.append(Group(tuple(sorted(alone, key=lambda i: len(rows[i]))), 0))
    return found


def _common(a: list[int], b: list[int]) -> int:
    """How many tokens two rows begin with alike."""
    most = min(len(a), len(b))
    if a[:most] == b[:most]:
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle)
    return low


class Recorder(nn.Module):
    """Stands where the head was, keeps what enters it and scores nothing."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, head.bias
        self.hidden = torch.empty(0)

    def forward(self, hidden: Tensor) -> Tensor:
        """No logits: zeros `[..., 1]`."""
        self.hidden = hidden
        return hidden.new_zeros(*hidden.shape[:-1], 1)


class Body:
    """A causal language model whose head is somebody else's business.

    Args:
        model: its output embedding is taken out.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.head = model.get_output_embeddings()
        self._recorder = Recorder(self.head)
        model.set_output_embeddings(self._recorder)
        self.sharing = not latent_modules(model)
        text = model.config.get_text_config()
        self._score_bytes = text.num_attention_heads * model.dtype.itemsize  # of a pair of tokens

    def _hidden(self, ids: Tensor, keep: int, **where: Any) -> tuple[Tensor, Cache]:
        out = self.model(input_ids=ids, use_cache=True, logits_to_keep=keep, **where)
        return self._recorder.hidden[:, -keep:], out.past_key_values

    def _read(
        self, ids: Tensor, keep: int, before: int, cache: Cache | None, **where: Tensor
    ) -> tuple[Tensor, Cache]:
        """`_hidden` of tokens that follow `before` others, in parts that bound the scores.

        Args:
            ids: `int64[rows, tokens]`.
            keep: hidden states of so many last tokens, at most all.
            before: tokens that the cache holds.
            cache: None: a new one.
            where: position ids of these tokens, attention mask of all, if any.
        """
        rows, tokens = ids.shape
        part = SCORE_BYTES // (self._score_bytes * rows * (before + tokens))
        part = max(LEAST_PART, int(part))
        kept: list[Tensor] = []
        for start in range(0, tokens, part):
            stop = min(start + part, tokens)
            now = dict(where)
            if "position_ids" in now:
                now["position_ids"] = now["position_ids"][:, start:stop]
            if "attention_mask" in now:
                now["attention_mask"] = now["attention_mask"][:, : before + stop]
            wanted = stop - max(start, tokens - keep)  # of this part; the model scores one or more
            hidden, cache = self._hidden(
                ids[:, start:stop], max(1, wanted), past_key_values=cache, **now
            )
            if wanted > 0:
                kept.append(hidden)
        assert cache is not None
        return kept[0] if len(kept) == 1 else torch.cat(kept, 1), cache

    @torch.no_grad()
    def prefix(self, row: list[int]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values `[1, heads, tokens, width]` of each layer; [] of no tokens."""
        if not row:
            return []
        ids = torch.tensor([row], device=self.model.device)
        cache = DynamicCache()
        self._read(ids, 1, 0, cache)
        return [(layer.keys, layer.values) for layer in cache.layers]

    @torch.no_grad()
    def prefill(
        self, rows: list[list[int]], prefix: list[tuple[Tensor, Tensor]], keep: int
    ) -> tuple[Tensor, "Decoding"]:
        """Read rows that begin with a prefix.

        Args:
            rows: token ids, whole.
            prefix: of `prefix(...)`, of tokens that all rows begin with.
            keep: last positions of each row that are wanted.

        Returns:
            Hidden states `[rows, keep, d]` (those before a row's first token mean nothing), and
            what is needed to go on.
        """
        longest = max(map(len, rows))
        shared = prefix[0][0].shape[2] if prefix else 0
        shifts = torch.tensor([longest - len(row) for row in rows], device=self.model.device)
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        places = torch.arange(longest, device=self.model.device)
        where = {"position_ids": (places[shared:] - shifts[:, None]).clamp_min(0)}
        if bool(shifts.any()):
            where["attention_mask"] = (places >= shifts[:, None]).long()
        cache = _copies(prefix, shifts) if prefix else None
        ids = ids[:, shared:].to(self.model.device)
        hidden, cache = self._read(ids, min(keep, longest - shared), shared, cache, **where)
        return hidden, Decoding(self, cache, shifts, longest)


class Decoding:
    """Rows that were read, to be continued token by token.

    Args:
        body: the model.
        cache: keys and values of the rows.
        shifts: `int64[rows]`, masked places before each row.
        length: places in the cache.
    """

    def __init__(self, body: Body, cache: Cache, shifts: Tensor, length: int) -> None:
        self.body, self.cache, self.shifts, self.length = body, cache, shifts, length

    @torch.no_grad()
    def step(self, tokens: list[int]) -> Tensor:
        """Read one more token of each row: hidden states `[rows, d]`."""
        device = self.shifts.device
        ids = torch.tensor(tokens, device=device)[:, None]
        places = torch.arange(self.length + 1, device=device)
        where: dict[str, Any] = {"past_key_values": self.cache}
        if bool(self.shifts.any()):
            where["attention_mask"] = (places >= self.shifts[:, None]).long()
        where["position_ids"] = (places[-1:] - self.shifts[:, None]).clamp_min(0)
        hidden, self.cache = self.body._hidden(ids, 1, **where)
        self.length += 1
        return hidden[:, 0]

    def keep(self, places: list[int]) -> None:
        """Go on with some of the rows."""
        index = torch.tensor(places, device=self.shifts.device)
        self.cache.batch_select_indices(index)
        self.shifts = self.shifts[index]


def _copies(prefix: list[tuple[Tensor, Tensor]], shifts: Tensor) -> DynamicCache:
    """The prefix once a row, each shifted."""
    tokens = prefix[0][0].shape[2]
    places = (torch.arange(tokens, device=shifts.device) - shifts[:, None]).clamp_min(0)
    cache = DynamicCache()
    for number, pair in enumerate(prefix):
        # [1, heads, tokens, width] -> [heads, rows, tokens, width] -> [rows, heads, tokens, width]
        copies = [part[0][:, places].transpose(0, 1).contiguous() for part in pair]
        cache.update(copies[0], copies[1], number)
    return cache


def generate(
    body: Body,
    rows: list[list[int]],
    choose: Callable[[Tensor], list[int]],
    ended: Callable[[int, list[int]], bool],
    max_tokens: int,
    prefix: list[tuple[Tensor, Tensor]],
) -> list[list[int]]:
    """Continue rows until each has ended.

    Args:
        body: the model.
        rows: token ids of the prompts.
        choose: the next tokens of hidden states `[n, d]`.
        ended: whether a row (its place, its new tokens) needs no more.
        max_tokens: of a row.
        prefix: what all rows begin with.

    Returns:
        The new tokens of each row.
    """
    hidden, decoding = body.prefill(rows, prefix, 1)
    states = hidden[:, -1]
    alive = list(range(len(rows)))
    new: list[list[int]] = [[] for _ in rows]
    for _ in range(max_tokens):
        tokens = choose(states)
        for place, token in zip(alive, tokens, strict=True):
            new[place].append(token)
        going = [i for i, place in enumerate(alive) if not ended(place, new[place])]
        if not going or len(new[alive[going[0]]]) == max_tokens:
            break
        if len(going) < len(alive):
            decoding.keep(going)
            alive, tokens = [alive[i] for i in going], [tokens[i] for i in going]
        states = decoding.step(tokens)
    return new


def batches(group: Group, rows_at_once: int) -> Iterator[list[int]]:
    """A group's members, some at a time; neighbours are of like length."""
    for start in range(0, len(group.members), rows_at_once):
        yield list(group.members[start : start + rows_at_once])
