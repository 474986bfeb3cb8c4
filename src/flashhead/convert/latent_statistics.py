"""What a latent must keep: second moments of keys and values, and of the loss's gradients at them.

An error e in a token's keys and values x = [k; v] (keys before they turn, after any norm) costs
about e' F e / 2 nats of KL divergence, F = E[g g'] the Fisher information: g is the gradient of
-log p(y) summed over all later positions, each y drawn from the model's own distribution there.
Labels drawn independently make one backward pass an unbiased estimate of the sum over positions,
and the pass itself averages over real distances, heads and attention weights: queries' second
moment, the softmax, W_O and everything behind it are all inside.

Tokens that are read more (sinks, names) matter more, so the second moment of x is weighted by how
strongly each token's gradient stands out, at most `WEIGHT_LIMIT` times the average.
"""

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from flashhead.errors import FlashHeadError

WEIGHT_LIMIT = 10.0
LEAST_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of one layer; n = numbers in the keys and values of one token.

    Args:
        mean: float64[n].
        covariance: float64[n, n], about the mean.
        fisher: float64[n, n].
    """

    mean: Tensor
    covariance: Tensor
    fisher: Tensor


def collect(
    model: nn.Module,
    streams: list[tuple[nn.Module, nn.Module]],
    windows: list[Tensor],
    *,
    batch_tokens: int = 2048,
    seed: int = 0,
    progress: bool = True,
) -> list[Statistics]:
    """Statistics of all layers from a text.

    Args:
        model: in float32; its parameters stop asking for gradients.
        streams: for each layer the modules whose outputs are its keys and its values.
        windows: int64[tokens] each.
        batch_tokens: about how many tokens a backward pass takes.
        seed: of the labels.
        progress: progress bar on stderr.

    Raises:
        FlashHeadError: fewer than `LEAST_TOKENS` tokens.
    """
    total = sum(len(window) for window in windows)
    if total < LEAST_TOKENS:
        raise FlashHeadError(
            f"calibration text of {total} tokens: wanted {LEAST_TOKENS} or more, better 8,192"
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in streams]
    generator = torch.Generator().manual_seed(seed)
    bar = tqdm(total=total, desc="calibrating", unit="token", disable=not progress)
    with bar:
        for batch in batches(windows, batch_tokens):
            for layer, pair in zip(kept, _states_and_gradients(model, streams, batch, generator),
                                   strict=True):  # fmt: skip
                layer.append(pair)
            bar.update(batch.numel())
    return [_statistics(layer) for layer in kept]


def batches(windows: list[Tensor], batch_tokens: int) -> list[Tensor]:
    """Windows of the same length together: int64[rows, tokens] each."""
    lengths: dict[int, list[Tensor]] = {}
    for window in windows:
        lengths.setdefault(len(window), []).append(window)
    made = []
    for length, same in lengths.items():
        rows = max(1, batch_tokens // length)
        made += [torch.stack(same[i : i + rows]) for i in range(0, len(same), rows)]
    return made


def _states_and_gradients(
    model: nn.Module,
    streams: list[tuple[nn.Module, nn.Module]],
    batch: Tensor,
    generator: torch.Generator,
) -> list[tuple[Tensor, Tensor]]:
    """For each layer x and g, bfloat16 `[tokens, n]`."""
    held: dict[tuple[int, int], Tensor] = {}

    def watch(place: tuple[int, int]) -> object:
        def hook(_: nn.Module, __: object, out: Tensor) -> Tensor:
            out = out if out.requires_grad else out.detach().requires_grad_(True)
            out.retain_grad()
            held[place] = out
            return out

        return hook

    handles = [
        module.register_forward_hook(watch((i, j)))  # type: ignore[arg-type]
        for i, pair in enumerate(streams)
        for j, module in enumerate(pair)
    ]
    try:
        with torch.enable_grad():
            device = next(model.parameters()).device
            logits = model(batch.to(device), use_cache=False).logits.flatten(0, 1)
            with torch.no_grad():
                # Gumbel noise from a generator of its own: the global one stays as it was
                noise = torch.rand(logits.shape, generator=generator).to(device)
                labels = (logits - (-noise.clamp_min(1e-20).log()).log()).argmax(1)
            functional.cross_entropy(logits.float(), labels, reduction="sum").backward()
    finally:
        for handle in handles:
            handle.remove()
    tokens = batch.shape[1]
    return [
        (_side_by_side(held, i, tokens, False), _side_by_side(held, i, tokens, True))
        for i in range(len(streams))
    ]


def _side_by_side(
    held: dict[tuple[int, int], Tensor], layer: int, tokens: int, gradient: bool
) -> Tensor:
    """Keys beside values: bfloat16 `[rows * tokens, n]`."""
    parts = []
    for j in range(2):
        tensor = held[layer, j]
        taken = tensor.grad if gradient else tensor.detach()
        if taken is None:
            raise FlashHeadError(f"layer {layer}: no gradient reaches its keys and values")
        if taken.dim() == 4 and taken.shape[1] != tokens:  # a norm after the transposition
            taken = taken.transpose(1, 2)
        parts.append(taken.flatten(2).flatten(0, 1).bfloat16().cpu())
    return torch.cat(parts, 1)


def _statistics(pairs: list[tuple[Tensor, Tensor]]) -> Statistics:
    x = torch.cat([state for state, _ in pairs]).double()
    g = torch.cat([gradient for _, gradient in pairs]).double()
    fisher = g.T @ g / len(g)
    values, vectors = torch.linalg.eigh(fisher)
    whitened = g @ (vectors * values.clamp_min(values[-1].clamp_min(1e-300) * 1e-4).rsqrt())
    weight = whitened.square().mean(1).clamp_max(WEIGHT_LIMIT)
    weight = weight / weight.mean().clamp_min(1e-300)
    mean = (weight[:, None] * x).mean(0)
    centred = x - mean
    return Statistics(mean, (weight[:, None] * centred).T @ centred / len(x), fisher)
