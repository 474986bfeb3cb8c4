"""One training step: next tokens, AdamW, gradients clipped at norm 1.

Masters and moments are float32; on a GPU products are bfloat16 by autocast. With `compile_layers`
decoder layers and the loss go through torch.compile, layer by layer, so that a model costs one
layer's compilation.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from twins.rows import Rows

WEIGHT_DECAY = 0.1
Loss = Callable[[Tensor, nn.Module, Tensor], Tensor]


def next_token_loss(hidden: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    """Mean cross entropy, nats: `head(hidden)` in float32 against `int64[batch, tokens]`."""
    return functional.cross_entropy(head(hidden).float().flatten(0, 1), targets.flatten())


def compile_layers(model: PreTrainedModel) -> Loss:
    """Compile each decoder layer in place; the loss, compiled too."""
    for layer in model.base_model.layers:
        layer.compile(dynamic=False)
    return torch.compile(next_token_loss, dynamic=False)


def uncompile(model: PreTrainedModel) -> None:
    """Take back what `compile_layers` did."""
    for layer in model.base_model.layers:
        layer._compiled_call_impl = None


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU; nothing elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def make_optimizer(model: nn.Module, rate: float) -> torch.optim.AdamW:
    """AdamW; matrices decay, vectors and rotary mixes do not."""
    named = dict(model.named_parameters())
    decayed = [p for n, p in named.items() if p.dim() == 2]
    rest = [p for n, p in named.items() if p.dim() != 2]
    groups = [
        {"params": decayed, "weight_decay": WEIGHT_DECAY},
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))


def train_step(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    rows: Tensor,
    micro_rows: int,
    loss_of: Loss,
) -> Tensor:
    """One step on `int64[rows, context + 1]`; the loss, nats, still on its device."""
    total = torch.zeros((), device=rows.device)
    for part in rows.split(micro_rows):
        with autocast(rows.device):
            hidden = model.base_model(part[:, :-1], use_cache=False).last_hidden_state
            loss = loss_of(hidden, model.lm_head, part[:, 1:]) * (len(part) / len(rows))
        loss.backward()
        total += loss.detach()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, rows: Rows, tokens: int, micro_rows: int) -> float:
    """Mean loss, nats a token, on the first rows; never compiled."""
    was_training = model.training
    model.eval()
    count = max(1, min(rows.count, tokens // rows.context))
    total = 0.0
    with torch.compiler.set_stance("force_eager"):
        for index in torch.arange(count).split(micro_rows):
            part = rows.at(index).to(model.device)
            with autocast(part.device):
                hidden = model.base_model(part[:, :-1], use_cache=False).last_hidden_state
                loss = next_token_loss(hidden, model.lm_head, part[:, 1:])
            total += float(loss) * len(index) / count
    model.train(was_training)
    return total
