"""Latent attention in the layout of DeepSeek-V3, which transformers and serving engines know.

Decoupled latent attention is DeepSeek's (arXiv 2412.19437, section 2.1.1) but for three things,
which weights can take up:

- Mixes of the rotary key commute with its rotation, so they move into the query: `q_rope = M q`.
  DeepSeek has one rotary key with each frequency once: at most one component a pair (missing ones
  are zeros), where the converter may have kept several.
- DeepSeek always norms the latent. Attention that has the norm exports as it is. Without one the
  latent gets one more number, a constant K that the projection's bias gives:
      rms([c, K]) = K / sqrt(r + 1) * sqrt(1 + |c|^2 / K^2),
  so the norm is a constant factor, which the up-projection divides by, to |c|^2 / 2K^2. K is 2048
  times what |c| can be: 1e-7, float32's own rounding.
- A constant value leaves through the output's bias, `b + O v0`; a constant key that does not turn
  adds the same to all scores of a query, so it is nothing. One that turns is an error.

Biases that are not zero need `attention_bias`, which transformers' class has and vLLM's has not.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedModel

from flashhead.errors import FlashHeadError
from flashhead.integrations.latent_model import latent_modules
from flashhead.nn.latent import LatentAttention

BASES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
"""Models whose layers are DeepSeek's dense ones but for the attention."""
ROPE_TYPES = ("default", "linear", "llama3")
"""Rotary types without a factor on the angles, which DeepSeek takes otherwise."""
MARGIN = 2048.0
"""The constant number of a latent without a norm, over the largest latent's norm."""
TOLERANCE = 1e-3
"""Largest difference of the trial's logits in float32, in units of their largest; 1e-6 is usual."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes that all layers share.

    Args:
        rank: `kv_lora_rank`.
        fixed: `qk_nope_head_dim`.
        rope: `qk_rope_head_dim`.
        value: `v_head_dim`.
    """

    rank: int
    fixed: int
    rope: int
    value: int

    @property
    def scale(self) -> float:
        """DeepSeek's of the scores."""
        return float((self.fixed + self.rope) ** -0.5)


def to_deepseek(model: PreTrainedModel) -> tuple[DeepseekV3ForCausalLM, dict[str, Any]]:
    """The same model as a `DeepseekV3ForCausalLM`.

    Args:
        model: with decoupled latent attention in every layer.

    Returns:
        the model, in the dtype and on the device of `model`, its head written out where it was
        tied; and a report: sizes, `attention_bias`, `logit_error` (of a trial in float32).

    Raises:
        FlashHeadError: what the layout cannot hold, said in one line.
    """
    modules = latent_modules(model)
    layout = _require_layout(model, list(modules.values()))
    weights = {k: v for k, v in model.state_dict().items() if ".self_attn." not in k}
    weights["lm_head.weight"] = model.get_output_embeddings().weight.detach()
    norms = [w for k, w in weights.items() if k.endswith("input_layernorm.weight")]
    largest = max(float(weight.abs().max()) for weight in norms)
    biases: dict[str, Tensor] = {}
    for name, module in modules.items():
        made = _attention(module, layout, largest)
        biases |= {f"{name}.{k}": v for k, v in made.items() if k.endswith("bias")}
        weights |= {f"{name}.{k}": v for k, v in made.items() if not k.endswith("bias")}
    has_bias = any(bool(bias.any()) for bias in biases.values())
    if has_bias:
        weights |= biases
    config = _config(model, layout, has_bias)
    with torch.device("meta"):
        made_model = DeepseekV3ForCausalLM(config)
    made_model.float().to_empty(device=model.device)
    # angles are computed, not loaded
    made_model.model.rotary_emb = type(made_model.model.rotary_emb)(config).to(model.device)
    made_model.load_state_dict(weights, strict=True)
    _require_angles(made_model, next(iter(modules.values())))
    report = {**dataclasses.asdict(layout), "attention_bias": has_bias}
    report["logit_error"] = _trial(model, made_model.eval())
    return made_model.to(model.dtype), report


def _require_layout(model: PreTrainedModel, modules: list[LatentAttention]) -> Layout:
    """The shared sizes; FlashHeadError for what DeepSeek's attention does not have."""
    name = type(model).__name__
    if name not in BASES:
        raise FlashHeadError(f"DeepSeek layout: {name}: wanted one of {', '.join(BASES)}")
    if len(modules) != model.config.num_hidden_layers:
        raise FlashHeadError("DeepSeek layout: wanted a model with latent attention in all layers")
    for module in modules:
        shape, where = module.shape, f"DeepSeek layout: layer {module.layer_idx}"
        if shape.rotary != "decoupled":
            raise FlashHeadError(f"{where}: rebuilt keys: wanted --rotary decoupled")
        if max(shape.components, default=0) > 1:
            raise FlashHeadError(
                f"{where}: {max(shape.components)} components of one rotary pair: wanted at most 1"
            )
        if shape.window is not None or shape.encoder != "hidden" or module.q_norm is not None:
            raise FlashHeadError(f"{where}: windows and norms of queries and keys are not in it")
        if module.q_proj.bias is not None and module.q_proj.bias.any():
            raise FlashHeadError(f"{where}: a bias of queries is not in it")
        if module.key_constant is not None:
            turning = module.key_constant.unflatten(0, (shape.kv_heads, -1))[:, : shape.rotary_dim]
            if turning.any():
                raise FlashHeadError(f"{where}: a constant key that turns is not in it")
    sizes = {(m.shape.fixed_dim, m.shape.rotary_dim, m.shape.value_dim) for m in modules}
    if len(sizes) != 1:
        raise FlashHeadError(f"DeepSeek layout: layers of different sizes {sorted(sizes)}")
    fixed, rope, value = sizes.pop()
    rank = max(m.shape.rank + (m.latent_norm is None) for m in modules)
    return Layout(rank, fixed, rope, value)


def _config(model: PreTrainedModel, layout: Layout, has_bias: bool) -> DeepseekV3Config:
    old = model.config
    rope = dict(old.rope_parameters)
    if rope.get("rope_type", "default") not in ROPE_TYPES:
        raise FlashHeadError(
            f"DeepSeek layout: rotary type {rope['rope_type']!r}: wanted {', '.join(ROPE_TYPES)}"
        )
    if getattr(old, "mlp_bias", False):
        raise FlashHeadError("DeepSeek layout: biases of the MLP are not in it")
    return DeepseekV3Config(
        vocab_size=old.vocab_size,
        hidden_size=old.hidden_size,
        intermediate_size=old.intermediate_size,
        num_hidden_layers=old.num_hidden_layers,
        num_attention_heads=old.num_attention_heads,
        num_key_value_heads=old.num_attention_heads,
        hidden_act=old.hidden_act,
        max_position_embeddings=old.max_position_embeddings,
        rms_norm_eps=old.rms_norm_eps,
        rope_parameters=rope,
        pad_token_id=old.pad_token_id,
        bos_token_id=old.bos_token_id,
        eos_token_id=old.eos_token_id,
        tie_word_embeddings=False,
        attention_bias=has_bias,
        kv_lora_rank=layout.rank,
        q_lora_rank=None,
        qk_nope_head_dim=layout.fixed,
        qk_rope_head_dim=layout.rope,
        v_head_dim=layout.value,
        # every layer is dense: what follows is never read
        first_k_dense_replace=old.num_hidden_layers,
        moe_intermediate_size=old.intermediate_size,
        n_routed_experts=1,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        num_mtp_layers=0,
    )


@torch.no_grad()
def _attention(module: LatentAttention, layout: Layout, largest: float) -> dict[str, Tensor]:
    """One layer's tensors by their names, in float32; `largest` as in `_constant`."""
    shape, rank = module.shape, module.shape.rank
    share, wide = shape.heads // shape.kv_heads, shape.rotary_width
    # where a kept component stands among all pairs, and pairs beside each other (interleaved)
    kept = torch.tensor([f for f, count in enumerate(shape.components) if count], dtype=torch.long)
    places = torch.cat((2 * kept, 2 * kept + 1)).to(module.q_proj.weight.device)

    query = module.q_proj.weight.float().unflatten(0, (shape.kv_heads, share, -1))
    turning, fixed = query.split((shape.rotary_dim, shape.fixed_dim), 2)
    rope = query.new_zeros(*query.shape[:2], layout.rope, query.shape[-1])
    rope[:, :, places] = module.mixes().float()[:, None] @ turning
    ratio = shape.scale / layout.scale
    made = {"q_proj.weight": ratio * torch.cat((fixed, rope), 2).flatten(0, 2)}

    encode = module.encode.weight.float()
    down = encode.new_zeros(layout.rank + layout.rope, encode.shape[1])
    bias = encode.new_zeros(len(down))
    down[:rank], down[layout.rank + places] = encode[wide:], encode[:wide]
    own = module.encode.bias.float()
    bias[:rank], bias[layout.rank + places] = own[wide:], own[:wide]
    norm = encode.new_zeros(layout.rank)
    if module.latent_norm is None:
        bias[layout.rank - 1] = constant = _constant(module, largest)
        norm[:rank] = constant / math.sqrt(layout.rank)
    else:
        norm[:rank] = module.latent_norm.weight.float() * math.sqrt(rank / layout.rank)
    made |= {"kv_a_proj_with_mqa.weight": down, "kv_a_proj_with_mqa.bias": bias}
    made["kv_a_layernorm.weight"] = norm

    keys = module.key_up.float().unflatten(0, (shape.kv_heads, -1))
    values = module.value_up.float().unflatten(0, (shape.kv_heads, -1))
    up = torch.cat((keys, values), 1).repeat_interleave(share, 0).flatten(0, 1)
    made["kv_b_proj.weight"] = torch.nn.functional.pad(up, (0, layout.rank - rank))

    output = module.o_proj.weight.float()
    constant_value = module.value_constant.float().unflatten(0, (shape.kv_heads, -1))
    leaves = output @ constant_value.repeat_interleave(share, 0).flatten()
    made["o_proj.weight"] = output
    made["o_proj.bias"] = leaves if module.o_proj.bias is None else module.o_proj.bias + leaves
    return made


def _constant(module: LatentAttention, largest: float) -> float:
    """K, a power of two: `MARGIN` times what a latent can be.

    Args:
        module: the layer.
        largest: weight of the norm before it: its output is at most sqrt(d) times that.
    """
    weight = module.encode.weight.float()[module.shape.rotary_width :]
    most = largest * math.sqrt(weight.shape[1]) * float(torch.linalg.matrix_norm(weight, 2))
    most += float(module.encode.bias.float().norm())
    return 2.0 ** math.ceil(math.log2(MARGIN * most))


def _require_angles(made: Any, module: LatentAttention) -> None:
    got, want = made.model.rotary_emb.inv_freq.float().cpu(), module.table.frequencies.cpu()
    if got.shape != want.shape or not torch.allclose(got, want, rtol=1e-5, atol=0):
        raise FlashHeadError("DeepSeek layout: it would turn keys by other angles")


@torch.no_grad()
def _trial(model: PreTrainedModel, made: Any) -> float:
    """Largest difference of logits on random tokens in float32, in units of the largest.

    Raises:
        FlashHeadError: above `TOLERANCE`.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, 48), generator=generator).to(model.device)
    dtype = model.dtype
    try:
        want, got = (m(ids, use_cache=False).logits for m in (model.float(), made))
    finally:
        model.to(dtype)
    error = float((got - want).abs().max() / want.abs().max())
    if not error <= TOLERANCE:
        raise FlashHeadError(f"DeepSeek layout: logits differ by {error:.1e} of the largest")
    return error
