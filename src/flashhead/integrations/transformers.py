"""Any causal LM of transformers with a FlashHead: load, attach, detach.

The head is found by role (`get_output_embeddings`), never by a model's name. Soft-capping and
scaling of logits happen in the model after its head and stay there.
"""

import dataclasses
import logging
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashhead.errors import FlashHeadError
from flashhead.index.build_clusters import build_clusters
from flashhead.index.build_codes import build_codes_expecting
from flashhead.index.choose import Expectation
from flashhead.index.clusters import ClustersIndex
from flashhead.index.codes import CodesIndex
from flashhead.index.store import load_index
from flashhead.integrations.calibration import (
    QUICK_TOKENS,
    quick_hidden_states,
    sample_hidden_states,
)
from flashhead.integrations.gguf_tokenizer import (
    asked_ends,
    prove_tokenizer,
    require_transformers,
    write_proof,
)
from flashhead.integrations.latent_model import load_latent, read_section
from flashhead.integrations.packed import pack_body
from flashhead.integrations.unpacked import load_unpacked, read_quantization
from flashhead.models import known_names, resolve
from flashhead.nn.head import FlashHead
from flashhead.nn.tuning import Crossover
from flashhead.options import CALIBRATION_TOKENS, ClustersOptions, CodesOptions, make_options

try:
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
    from transformers.utils.quantization_config import GgufConfig
except ImportError as error:
    raise ImportError(
        "transformers is not installed: pip install 'flashhead[transformers,cpu]'"
    ) from error

HEADS = ("codes", "clusters", "dense")
_SEARCH_OPTIONS = ("failure_probability", "kl_budget", "probes")
"""Options that only the search reads: they may differ from the saved index's."""
_log = logging.getLogger("flashhead")


class Attachment:
    """A FlashHead in a model, and the way back. Also a context manager that detaches at its end.

    Args:
        model: the model that holds the head.
        head: the FlashHead in it.
        replaced: the module it took the place of.
        expectation: why a codes index was built as it is; None: nothing was built, or clusters.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        head: FlashHead,
        replaced: nn.Module,
        expectation: Expectation | None = None,
    ) -> None:
        self.model, self.head, self._replaced = model, head, replaced
        self.expectation = expectation

    def detach(self) -> None:
        """Put the original head back; a second call does nothing."""
        if self.model.get_output_embeddings() is self.head:
            self.model.set_output_embeddings(self._replaced)

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self.detach()


def load(
    model: str,
    head: str | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    impl: str = "auto",
    crossover: int | None = None,
    packed: bool | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
    **options: Any,
) -> PreTrainedModel:
    """Load a causal LM with a FlashHead as its output embedding.

    Args:
        model: embedded name, hub id, local folder (also one written by `flashhead convert`) or
            local `.gguf` file.
        head: "codes", "clusters" or "dense"; None: the folder's index if it has one, else "codes".
        dtype: of the weights.
        device: where the model goes before its head is attached.
        impl: "auto", "cpu", "triton" or "reference".
        crossover: up to how many rows the index is searched, 0 or a power of two up to 64; None:
            measured once on this machine.
        packed: whether linear layers that compressed-tensors packed multiply with their codes
            (`nn/packed.py`) instead of being unpacked; None: where the CPU has a product for them.
        trust_remote_code: run Python code that the model's folder brings.
        progress: progress bars on stderr.
        options: fields of `CodesOptions` or `ClustersOptions`.

    Returns:
        An ordinary transformers model in eval mode; `generate()` works as before.

    Raises:
        FlashHeadError: unknown model, head or option; an index that does not fit; a model without a
            linear head.
    """
    if head is not None:
        _require_head(head)
    source = resolve(model, progress)
    place = torch.device(device)
    loaded = load_dense(
        source, dtype=dtype, trust_remote_code=trust_remote_code, packed=packed, device=place
    )
    section = getattr(loaded.config, "flashhead", None)
    if not isinstance(section, dict) or not Path(source).is_dir():
        section = None
    if section is not None and head in (None, section.get("index")):
        index, sample = load_index(Path(source), section, _linear_head(loaded).weight)
        index = _with_options(index, options)
        attach(loaded, index.kind, impl=impl, crossover=crossover, index=index, sample=sample)
    else:
        if section is not None and head != "dense":
            _log.warning(
                "%s holds a %s index; a new %s index is built", source, section.get("index"), head
            )
        kind = head or "codes"
        if kind != "dense":
            options = {"calibration_tokens": CALIBRATION_TOKENS, **options}
        attach(loaded, kind, impl=impl, crossover=crossover, progress=progress, **options)
    return loaded


def load_dense(
    source: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    trust_remote_code: bool = False,
    packed: bool | None = False,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Load a causal LM as it is: safetensors or GGUF only, never pickled weights. Weights packed by
    compressed-tensors, AWQ or GPTQ are unpacked to `dtype`, since transformers has no kernels that
    read them on a CPU; those of compressed-tensors may stay packed (`packed`, as in `load`).

    Raises:
        FlashHeadError: it is not there, not readable, no causal LM, or a tensor of it is missing.
    """
    path = Path(source)
    where: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if path.suffix == ".gguf":
        require_transformers()
        where |= {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}
        source = str(path.parent)
    else:
        where["use_safetensors"] = True
    latent = read_section(source)
    info: dict[str, Any] = {"missing_keys": ()}
    try:
        coded = read_quantization(source)
        if latent is not None:
            model = load_latent(source, latent, dtype)
        elif coded is not None:
            model, info = load_unpacked(source, coded, dtype)
        else:
            model, info = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, output_loading_info=True, **where
            )
    except FlashHeadError:
        raise
    except ImportError as error:
        extra = "gguf" if path.suffix == ".gguf" else "quantize"
        raise FlashHeadError(
            f"model {str(path)!r}: {_first_line(error)}; pip install 'flashhead[{extra}]'"
        ) from error
    except Exception as error:  # whatever the checkpoint's reader raises: the cause stays attached
        if "normal_kernel" in str(error):  # transformers cannot make up integers
            raise FlashHeadError(
                f"model {str(path)!r} is not whole: no file of it holds one of its packed tensors"
            ) from error
        if not _is_checkpoint_error(error):
            raise
        raise FlashHeadError(
            f"model {str(path)!r} cannot be loaded: {_first_line(error)}; {known_names()}"
        ) from error
    if info["missing_keys"]:  # transformers makes up random ones
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise FlashHeadError(f"model {str(path)!r} is not whole: no file of it holds {missing}")
    quantization = getattr(model.config, "quantization_config", None)
    ours = isinstance(quantization, dict) and quantization.get("quant_method") == "flashhead"
    if quantization is not None and (ours or path.suffix == ".gguf"):
        del model.config.quantization_config  # plain weights, or dequantized: saving would refuse
    # the library would unpack at the first call of the whole model, too late for its parts
    device = device or torch.device("cpu")
    pack_body(model, packed, device)
    compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
    if compressor is not None:
        compressor.decompress_model(model)
    return model.to(device).eval()


def load_tokenizer(model: str, *, trust_remote_code: bool = False) -> Any:
    """Tokenizer of a model, by the same names as `load`. One that is made of a `.gguf` file is
    proved against the file (`integrations/gguf_tokenizer.py`).

    Raises:
        FlashHeadError: there is none, or transformers makes a wrong one.
    """
    path = Path(resolve(model))
    where: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    source = str(path) if path.exists() else model
    if path.suffix == ".gguf":
        require_transformers()
        source, where["gguf_file"] = str(path.parent), path.name
        where |= asked_ends(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
    except (OSError, ValueError, KeyError) as error:
        raise FlashHeadError(
            f"model {model!r} has no readable tokenizer: {_first_line(error)}"
        ) from error
    if path.suffix == ".gguf":
        prove_tokenizer(tokenizer, path)
    return tokenizer


def gguf_to_folder(gguf: Path, out: Path) -> None:
    """Dequantize a GGUF file to a bf16 Hugging Face folder with its tokenizer.

    Args:
        gguf: the file.
        out: an existing folder.

    Raises:
        FlashHeadError: the file is not readable, or the folder's tokenizer is not the file's.
    """
    load_tokenizer(str(gguf)).save_pretrained(out)
    load_dense(str(gguf)).save_pretrained(out)
    prove_tokenizer(load_tokenizer(str(out)), gguf)
    write_proof(out)


def attach(
    model: PreTrainedModel,
    head: str = "codes",
    *,
    impl: str = "auto",
    crossover: int | None = None,
    progress: bool = True,
    index: CodesIndex | ClustersIndex | None = None,
    sample: Tensor | None = None,
    hidden: Tensor | None = None,
    **options: Any,
) -> Attachment:
    """Replace the output embedding of a model in memory by a FlashHead.

    Args:
        model: a causal LM.
        head: "codes", "clusters" or "dense".
        impl: "auto", "cpu", "triton" or "reference".
        crossover: up to how many rows the index is searched, 0 or a power of two up to 64; None:
            measured once on this machine.
        progress: progress bars on stderr.
        index: a ready index of this head; None builds one, from text sampled from the model itself.
        sample: floating `[n, d]`, hidden states to measure the crossover with.
        hidden: floating `[n, d]`, calibration hidden states, instead of sampled ones.
        options: fields of `CodesOptions` or `ClustersOptions`. Without `calibration_tokens` a codes
            index is calibrated on few tokens, sampled in two passes (`integrations.calibration`):
            seconds instead of minutes, and a tenth to a third more bytes a token.

    Returns:
        A handle whose `detach()` puts the original head back.

    Raises:
        FlashHeadError: unknown head or option, no linear head, or one that is attached already.
    """
    _require_head(head)
    linear = _linear_head(model)
    expectation = None
    if head == "dense":
        given = options if crossover is None else {"crossover": crossover, **options}
        if given:
            raise FlashHeadError(f"head='dense' takes no options, got {next(iter(given))!r}")
        replaced = FlashHead(linear, None)
    else:
        if index is None:
            index, hidden, expectation = _build(model, linear, head, progress, hidden, options)
        states = sample if sample is not None else hidden
        replaced = FlashHead(
            linear,
            index,
            impl=impl,
            sample=None if states is None else _spread(states),
            crossover=None if crossover is None else Crossover(crossover, crossover),
        )
    model.set_output_embeddings(replaced)
    return Attachment(model, replaced, linear, expectation)


def head_of(model: PreTrainedModel) -> FlashHead:
    """The FlashHead of a model.

    Raises:
        FlashHeadError: it has none.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, FlashHead):
        raise FlashHeadError("the model has no FlashHead: flashhead.attach(model) attaches one")
    return head


def logit_postprocess(config: Any) -> Callable[[Tensor], Tensor]:
    """What the model does to its head's logits: soft-capping (Gemma 2), scaling (Cohere, Granite);
    else nothing.
    """
    text = config.get_text_config()
    cap = getattr(text, "final_logit_softcapping", None)
    factor = getattr(text, "logit_scale", None) or 1.0
    divisor = getattr(text, "logits_scaling", None) or 1.0

    def process(logits: Tensor) -> Tensor:
        logits = logits * (factor / divisor) if factor != divisor else logits
        return torch.tanh(logits / cap) * cap if cap else logits

    return process


def _build(
    model: PreTrainedModel,
    linear: nn.Linear,
    head: str,
    progress: bool,
    hidden: Tensor | None,
    values: dict[str, Any],
) -> tuple[CodesIndex | ClustersIndex, Tensor, Expectation | None]:
    options: CodesOptions | ClustersOptions
    if head == "codes":
        options = make_options(CodesOptions, values)
    else:
        options = make_options(ClustersOptions, values)
    if hidden is None and head == "codes" and "calibration_tokens" not in values:
        hidden = quick_hidden_states(model, options.seed)
        options = dataclasses.replace(options, calibration_tokens=QUICK_TOKENS)
    elif hidden is None:
        hidden = sample_hidden_states(model, options.calibration_tokens, options.seed, progress)
    weight = linear.weight.detach()
    if isinstance(options, CodesOptions):
        index, expectation = build_codes_expecting(weight, options, hidden, progress)
        return index, hidden, expectation
    if not options.always:
        options = dataclasses.replace(options, always=_special_tokens(model))
    bias = None if linear.bias is None else linear.bias.detach()
    return build_clusters(weight, options, hidden, progress, bias), hidden, None


def _special_tokens(model: PreTrainedModel) -> tuple[int, ...]:
    """Tokens that end or structure a generation, by role: always scored."""
    found: set[int] = set()
    for config in (model.config.get_text_config(), model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
            value = getattr(config, name, None)
            found.update(
                value if isinstance(value, (list, tuple)) else [] if value is None else [value]
            )
    return tuple(
        sorted(token for token in found if 0 <= token < model.config.get_text_config().vocab_size)
    )


def _linear_head(model: PreTrainedModel) -> nn.Linear:
    head = model.get_output_embeddings()
    if isinstance(head, FlashHead):
        raise FlashHeadError("the model has a FlashHead already: detach it first")
    if type(head) is not nn.Linear or not head.weight.is_floating_point():
        raise FlashHeadError(
            f"the output embedding is {type(head).__name__}, wanted a floating nn.Linear"
        )
    return head


def _with_options(
    index: CodesIndex | ClustersIndex, values: dict[str, Any]
) -> CodesIndex | ClustersIndex:
    saved = dataclasses.asdict(index.options)
    if isinstance(index, CodesIndex):
        codes = make_options(CodesOptions, {**saved, **values})
        _require_as_built(saved, dataclasses.asdict(codes))
        return dataclasses.replace(index, options=codes)
    clusters = make_options(ClustersOptions, {**saved, **values})
    _require_as_built(saved, dataclasses.asdict(clusters))
    return dataclasses.replace(index, options=clusters)


def _require_as_built(saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        if value != saved[name] and name not in _SEARCH_OPTIONS:
            raise FlashHeadError(
                f"{name}={value!r}: the saved index has {saved[name]!r}; convert the model again"
            )


def _spread(states: Tensor, rows: int = 64) -> Tensor:
    """A few hidden states from all over a sample."""
    order = torch.randperm(len(states), generator=torch.Generator().manual_seed(0))
    return states[order[:rows]].clone()


def _require_head(head: str) -> None:
    if head not in HEADS:
        raise FlashHeadError(f"head={head!r}: wanted one of {', '.join(HEADS)}")


def _is_checkpoint_error(error: Exception) -> bool:
    """Whether an exception speaks of the checkpoint (missing, damaged) and not of a bug."""
    from safetensors import SafetensorError

    if isinstance(error, RuntimeError):
        return "mismatch" in str(error)  # a tensor of another size than the config says
    return isinstance(error, (OSError, ValueError, KeyError, SafetensorError))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
