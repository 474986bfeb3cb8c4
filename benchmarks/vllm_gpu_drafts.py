"""Drafts for `vllm_gpu_speculation.py`: EAGLE (arXiv 2401.15077) and EAGLE-3 (2503.01840) for a
Llama of `vllm_gpu_models.py`, with weights by construction, not by training.

In such a model a token's input embedding is almost the hidden state that it leads to, so a draft
that hands the embedding on to the head proposes what the target will mostly choose:

- eagle: `fc = [I 0]` of (embedding, hidden state), a layer that adds nothing. It has no head: vLLM
  gives it the target's.
- eagle3: a layer whose attention looks at its own position only (queries and keys are the embedding
  scaled up) and copies the embedding. Its head is its own: half of the target's rows, with an index
  of its own, and `d2t` says which; every second proposal or so must be refused.
- mtp: the target's checkpoint as a MiMo (a Qwen2: its biases are zero) with a layer behind it that
  predicts one more token and hands the embedding on (multi-token prediction, arXiv 2404.19737).

    python benchmarks/vllm_gpu_drafts.py JOB.json
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashhead.index.build_codes import build_codes
from flashhead.index.store import save_index
from flashhead.options import CodesOptions

DRAFTS = ("eagle", "eagle3", "mtp")
SHARPNESS = 3.0
"""Of the attention to its own position: 9 sqrt(head_dim) before the softmax."""
CALIBRATION = 1024
Weights = dict[str, Tensor]


def make_draft(
    kind: str, target: Path, folder: Path, crossover: int | None = None
) -> dict[str, Any]:
    """Write a draft's checkpoint; what was made, as JSON values.

    Args:
        kind: of `DRAFTS`.
        target: folder of the model that it drafts for.
        folder: to make.
        crossover: rows up to which its own head is searched; None: measured at load.
    """
    config = json.loads((target / "config.json").read_text())
    if config["model_type"] != "llama":
        raise ValueError(f"{target}: a {config['model_type']}, wanted a llama")
    weights = load_file(target / "model.safetensors")
    folder.mkdir(parents=True)
    if kind == "mtp":
        return _write_mtp(config, weights, target, folder)
    config.pop("flashhead", None)
    config |= {"num_hidden_layers": 1}
    if kind == "eagle":
        made = _eagle(config)
        config |= {"architectures": ["LlamaForCausalLM"]}
    else:
        made, tokens = _eagle3(config, weights["lm_head.weight"])
        config |= {
            "architectures": ["LlamaForCausalLMEagle3"],
            "num_key_value_heads": config["num_attention_heads"],
            "draft_vocab_size": len(tokens),
            "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
        }
        embeddings = weights["model.embed_tokens.weight"]
        if crossover is not None:
            config["flashhead_options"] = {"crossover": crossover}
        config["flashhead"] = _write_index(made["lm_head.weight"], embeddings[tokens], folder)
    _write(made, config, folder)
    rows = len(made["lm_head.weight"]) if "lm_head.weight" in made else None
    return {"model": str(folder), "kind": kind, "own_head_rows": rows}


def _write(weights: Weights, config: dict[str, Any], folder: Path) -> None:
    floats = {name: t.bfloat16() for name, t in weights.items() if t.is_floating_point()}
    save_file(weights | floats, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def _write_mtp(
    config: dict[str, Any], weights: Weights, target: Path, folder: Path
) -> dict[str, Any]:
    """The target and its layer in one checkpoint, with the target's index."""
    d, heads = config["hidden_size"], config["num_key_value_heads"]
    layer = _layer(config, d, heads)
    layer |= {f"{name}_layernorm.weight": torch.ones(d) for name in ("token", "hidden", "final")}
    layer["input_proj.weight"] = torch.cat([torch.zeros(d, d), torch.eye(d)], dim=1)
    made = weights | {f"model.mtp_layers.0.{name}": tensor for name, tensor in layer.items()}
    for name, tensor in list(made.items()):
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            made[name.removesuffix("weight") + "bias"] = torch.zeros(len(tensor))
    config |= {"architectures": ["MiMoForCausalLM"], "model_type": "qwen2"}
    _write(made, config | {"num_nextn_predict_layers": 1}, folder)
    shutil.copytree(target / "flashhead", folder / "flashhead")
    return {"model": str(folder), "kind": "mtp", "own_head_rows": None}


def _layer(config: dict[str, Any], inputs: int, kv_heads: int) -> Weights:
    """A layer of zeros with norms of ones; attention reads `inputs` columns."""
    d, width, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    sizes = {
        "self_attn.q_proj": (config["num_attention_heads"] * dim, inputs),
        "self_attn.k_proj": (kv_heads * dim, inputs),
        "self_attn.v_proj": (kv_heads * dim, inputs),
        "self_attn.o_proj": (d, config["num_attention_heads"] * dim),
        "mlp.gate_proj": (width, d),
        "mlp.up_proj": (width, d),
        "mlp.down_proj": (d, width),
    }
    layer = {f"{name}.weight": torch.zeros(size) for name, size in sizes.items()}
    norms = ("input_layernorm", "post_attention_layernorm")
    return layer | {f"{name}.weight": torch.ones(d) for name in norms}


def _eagle(config: dict[str, Any]) -> Weights:
    d = config["hidden_size"]
    made = {
        f"layers.0.{name}": tensor
        for name, tensor in _layer(config, d, config["num_key_value_heads"]).items()
        if not name.startswith("input_layernorm")  # EAGLE's first layer has none
    }
    made["fc.weight"] = torch.cat([torch.eye(d), torch.zeros(d, d)], dim=1)
    return made


def _eagle3(config: dict[str, Any], head: Tensor) -> tuple[Weights, Tensor]:
    """Weights, and the tokens that the draft's head has."""
    d, vocab_size = config["hidden_size"], config["vocab_size"]
    if config["num_attention_heads"] * config["head_dim"] != d:
        raise ValueError("eagle3: heads must make up the hidden size")
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randperm(vocab_size, generator=generator)[: vocab_size // 2].sort().values
    layer = _layer(config, 2 * d, config["num_attention_heads"])
    copied = torch.cat([torch.eye(d), torch.zeros(d, d)], dim=1)  # of (embedding, hidden state)
    for name, factor in (("q", SHARPNESS), ("k", SHARPNESS), ("v", 1.0)):
        layer[f"self_attn.{name}_proj.weight"] = factor * copied
    layer["self_attn.o_proj.weight"] = torch.eye(d)
    layer["hidden_norm.weight"] = torch.ones(d)
    made = {f"midlayer.{name}": tensor for name, tensor in layer.items()}
    made["fc.weight"] = torch.zeros(d, 3 * d)
    made["norm.weight"] = torch.ones(d)
    made["lm_head.weight"] = head[tokens].clone()
    made["d2t"] = tokens - torch.arange(len(tokens))
    return made, tokens


def _write_index(head: Tensor, embeddings: Tensor, folder: Path) -> dict[str, Any]:
    """The index of the draft's head for the states that it will search for."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    some = embeddings[:CALIBRATION].float()
    states = (some / some.square().mean(1, keepdim=True).sqrt()).bfloat16().to(device)
    index = build_codes(head.bfloat16().to(device), CodesOptions(), states)
    return save_index(index.to(torch.device("cpu")), head.bfloat16(), states[:64].cpu(), folder)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    target, folder = Path(job["target"]), Path(job["folder"])
    made = {
        kind: make_draft(kind, target, folder / kind, job["crossover"]) for kind in job["kinds"]
    }
    Path(job["out"]).write_text(json.dumps(made))


if __name__ == "__main__":
    main()
