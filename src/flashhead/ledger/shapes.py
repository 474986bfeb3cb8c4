"""The tensors of a decoder from its architecture alone: shapes by role, sizes in bf16 or W4A16.

Names are those of transformers. Experts are stacked: one tensor of [experts, out, in] for the gate
and up projections, one for the down projections.

W4A16: the linear layers of the body at 4 bits a weight and one bf16 scale for each group of a row;
head, embeddings, norms, biases and the router of a mixture stay in bf16.
"""

import math

from flashhead.errors import FlashHeadError
from flashhead.ledger.architecture import Architecture
from flashhead.ledger.files import TensorInfo, tensor_info
from flashhead.options import QUANTIZE_GROUPS

WEIGHTS = ("bf16", "w4a16")
ROUTER = ".mlp.gate.weight"


def tensor_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter, by its name in transformers; of a tied head none."""
    table = (architecture.vocab_size, architecture.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table}
    for i, sparse in enumerate(architecture.sparse_layers):
        layer = {**_attention(architecture), **_norms(architecture)}
        layer |= _experts(architecture) if sparse else _mlp(architecture)
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = table[1:]
    if not architecture.tie_word_embeddings:
        shapes["lm_head.weight"] = table
    return shapes


def sized_tensors(architecture: Architecture, weights: str = "bf16") -> dict[str, TensorInfo]:
    """Tensors as `token_bytes` takes them.

    Args:
        architecture: of the model.
        weights: "bf16" or "w4a16".

    Raises:
        FlashHeadError: unknown `weights`, or no group size divides the inputs of all layers.
    """
    if weights not in WEIGHTS:
        raise FlashHeadError(f"weights={weights!r}: wanted one of {', '.join(WEIGHTS)}")
    shapes = tensor_shapes(architecture)
    infos = {name: tensor_info("BF16", shape) for name, shape in shapes.items()}
    if weights == "bf16":
        return infos
    linear = [name for name, shape in shapes.items() if _is_linear(name, shape)]
    group = _group_of({shapes[name][-1] for name in linear})
    for name in linear:
        elements = math.prod(shapes[name])
        infos[name] = TensorInfo(shapes[name], elements / 2 + elements / group * 2)
    return infos


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a layer of the body is quantized."""
    return name.startswith("model.layers.") and len(shape) > 1 and not name.endswith(ROUTER)


def _group_of(inputs: set[int]) -> int:
    for group in QUANTIZE_GROUPS:
        if all(length % group == 0 for length in inputs):
            return group
    least = QUANTIZE_GROUPS[-1]
    odd = min(length for length in inputs if length % least)
    raise FlashHeadError(f"w4a16: a layer has {odd} inputs, no multiple of {least}")


def _linear(name: str, rows: int, columns: int, bias: bool) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {f"{name}.weight": (rows, columns)}
    return found | ({f"{name}.bias": (rows,)} if bias else {})


def _attention(a: Architecture) -> dict[str, tuple[int, ...]]:
    queries, keys = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    normed: dict[str, tuple[int, ...]] = {
        f"self_attn.{name}_norm.weight": (a.head_dim,) for name in "qk" if a.qk_norm
    }
    return {
        **_linear("self_attn.q_proj", queries, a.hidden_size, a.qkv_bias),
        **_linear("self_attn.k_proj", keys, a.hidden_size, a.qkv_bias),
        **_linear("self_attn.v_proj", keys, a.hidden_size, a.qkv_bias),
        **_linear("self_attn.o_proj", a.hidden_size, queries, a.output_bias),
        **normed,
    }


def _norms(a: Architecture) -> dict[str, tuple[int, ...]]:
    names = ["input_layernorm", "post_attention_layernorm"]
    if a.norms == 4:
        names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    return {f"{name}.weight": (a.hidden_size,) for name in names}


def _mlp(a: Architecture) -> dict[str, tuple[int, ...]]:
    return {
        **_linear("mlp.gate_proj", a.intermediate_size, a.hidden_size, a.mlp_bias),
        **_linear("mlp.up_proj", a.intermediate_size, a.hidden_size, a.mlp_bias),
        **_linear("mlp.down_proj", a.hidden_size, a.intermediate_size, a.mlp_bias),
    }


def _experts(a: Architecture) -> dict[str, tuple[int, ...]]:
    return {
        "mlp.gate.weight": (a.num_experts, a.hidden_size),
        "mlp.experts.gate_up_proj": (a.num_experts, 2 * a.moe_intermediate_size, a.hidden_size),
        "mlp.experts.down_proj": (a.num_experts, a.hidden_size, a.moe_intermediate_size),
    }
