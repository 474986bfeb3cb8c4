"""What the plugin decides before any model runs: needs of rows, options, wrapped configs."""

import pytest

pytest.importorskip("vllm")

import copy
import pickle
import types

import checkpoints
import torch
from vllm.lora.layers import LogitsProcessorWithLoRA
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization import fp8
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor import LogitsProcessor as ProcessorV1
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as ProcessorV2

from flashhead.errors import FlashHeadError
from flashhead.integrations.vllm import layers, method, requests
from flashhead.integrations.vllm.adapters import FlashLogitsProcessor, adapted_rows
from flashhead.integrations.vllm.config import FlashHeadConfig
from flashhead.integrations.vllm.layers import FlashParallelLMHead, register_layers
from flashhead.integrations.vllm.method import FlashHeadMethod
from flashhead.integrations.vllm.options import read_options
from flashhead.integrations.vllm.plugin import register
from flashhead.integrations.vllm.requests import Need, RowNeeds, need_of, refuse_below, tracker_of

GREEDY = SamplingParams(temperature=0)
SAMPLED = SamplingParams(temperature=0.7, top_p=0.9, top_k=20, min_p=0.1, seed=1)
DENSE = SamplingParams(temperature=0, logprobs=1)
EVERY_LOGIT = {
    "structured_outputs": StructuredOutputsParams(choice=["a", "b"]),
    "logit_bias": {5: 1.0},
    "allowed_token_ids": [1, 2],
    "bad_words": ["x"],
    "min_tokens": 3,
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.1,
    "presence_penalty": -0.1,
    "logprobs": 0,
    "prompt_logprobs": 0,
    "logprob_token_ids": [3],
}


@pytest.fixture
def tracker():
    return RowNeeds(engine("one"), "cpu", False)


def engine(name, processors=None):
    model = types.SimpleNamespace(logits_processors=processors)
    return types.SimpleNamespace(instance_id=name, model_config=model, quant_config=None)


def update(size, added=(), removed=(), moved=()):
    return BatchUpdate(
        batch_size=size,
        removed=list(removed),
        added=[(row, params, [], []) for row, params in added],
        moved=list(moved),
    )


@pytest.mark.parametrize("name", EVERY_LOGIT)
def test_what_needs_every_logit(name):
    """An estimate that decides a mask, a penalty or a log-probability, with silence about it."""
    for temperature in (0, 1):
        params = SamplingParams(temperature=temperature, **{name: EVERY_LOGIT[name]})
        assert need_of(params) is Need.DENSE


def test_what_is_searched():
    """A request that gets more logits than it needs, or fewer."""
    assert need_of(GREEDY) is Need.WINNER
    assert need_of(SAMPLED) is Need.LOGITS
    assert need_of(SamplingParams(temperature=0, stop=["a"], stop_token_ids=[3], n=1)) is (
        Need.WINNER
    )


def test_rows_follow_the_batch(tracker):
    """A row served by the needs of a request that left it or moved."""
    tracker.update_state(update(3, [(0, GREEDY), (1, DENSE), (2, SAMPLED)]))
    assert tracker.of_rows(3) == [Need.WINNER, Need.DENSE, Need.LOGITS]
    tracker.update_state(None)
    assert tracker.of_rows(3) == [Need.WINNER, Need.DENSE, Need.LOGITS]
    tracker.update_state(update(2, removed=[0], moved=[(2, 0, MoveDirectionality.UNIDIRECTIONAL)]))
    assert tracker.of_rows(2) == [Need.LOGITS, Need.DENSE]
    tracker.update_state(update(2, moved=[(0, 1, MoveDirectionality.SWAP)]))
    assert tracker.of_rows(2) == [Need.DENSE, Need.LOGITS]
    tracker.update_state(update(2, [(0, GREEDY)]))
    assert tracker.of_rows(2) == [Need.WINNER, Need.LOGITS]


def test_rows_nobody_told_of(tracker):
    """A dummy batch, or the positions of a prompt, taken for the requests of the batch."""
    assert tracker.of_rows(2) == [Need.DENSE] * 2
    tracker.update_state(update(2, [(0, GREEDY), (1, GREEDY)]))
    assert tracker.of_rows(3) == [Need.DENSE] * 3
    tracker.update_state(None)
    assert tracker.of_rows(2) == [Need.WINNER] * 2
    assert tracker.of_rows(2) == [Need.DENSE] * 2  # a second call of the step


def test_slots(tracker):
    """Model runner V2, where a slot's request may still run: never fewer logits than it needs."""
    for slot, params in enumerate((GREEDY, SAMPLED)):
        assert tracker.add_request(slot, params) is False
    tracker.apply_staged_writes()
    assert tracker.of_rows(5) == [Need.LOGITS] * 5
    tracker.add_request(7, DENSE)
    assert tracker.of_rows(1) == [Need.DENSE]
    for slot in (1, 7):
        tracker.add_request(slot, GREEDY)
    assert tracker.of_rows(2) == [Need.WINNER] * 2


def test_both_interfaces(tracker):
    """A processor that one of the model runners refuses, or that changes logits."""
    assert issubclass(RowNeeds, ProcessorV1)
    assert issubclass(RowNeeds, ProcessorV2)
    assert tracker.is_argmax_invariant()
    logits = object()
    assert tracker.apply(logits) is logits
    assert tracker.apply(logits, "context") is logits
    assert tracker_of("one") is tracker
    assert tracker_of("another") is None


def test_processors_of_others():
    """A stranger's processor that reads estimates for exact logits."""
    tracker = RowNeeds(engine("two", ["their.module:Processor"]))
    tracker.update_state(update(1, [(0, GREEDY)]))
    assert tracker.of_rows(1) == [Need.DENSE]


def test_no_head_is_an_error(monkeypatch):
    """A model served dense in silence, as its class builds its head by other means."""
    monkeypatch.setattr(requests, "get_pp_group", lambda: types.SimpleNamespace(is_last_rank=True))
    config = FlashHeadConfig()
    config.maybe_update_config("model")
    served = engine("headless")
    served.quant_config = config
    with pytest.raises(RuntimeError, match="no output embedding of model"):
        RowNeeds(served).update_state(update(1, [(0, GREEDY)]))
    with pytest.raises(RuntimeError, match="no output embedding of model"):
        RowNeeds(served).add_request(0, GREEDY)
    monkeypatch.setenv("FLASHHEAD_ENABLED", "0")
    config.require_searched()
    monkeypatch.setenv("FLASHHEAD_ENABLED", "1")
    config.keeps_head = True
    config.require_searched()


def test_refusals(monkeypatch):
    """A request that the head cannot serve and that nobody refuses."""
    monkeypatch.setattr(requests, "_least_served", [])
    RowNeeds.validate_params(DENSE)
    refuse_below(Need.LOGITS)
    RowNeeds.validate_params(SAMPLED)
    with pytest.raises(ValueError, match="speculative_target='search'"):
        RowNeeds.validate_params(DENSE)
    refuse_below(Need.WINNER)
    RowNeeds.validate_params(GREEDY)
    with pytest.raises(ValueError, match="no temperature above 0"):
        RowNeeds.validate_params(SAMPLED)


def test_options():
    """A misspelt option that is ignored."""
    read = read_options({"bits": 2, "crossover": 4, "calibration": "none"})
    assert (read.codes.bits, read.crossover, read.calibration) == (2, 4, "none")
    for values, message in (
        ({"bit": 2}, "'bit' is unknown"),
        ({"calibration": "some"}, "calibration='some'"),
        ({"speculative_target": 1}, "speculative_target=1"),
        ({"index": 3}, "index=3"),
        ({"bits": 9}, "bits=9"),
    ):
        with pytest.raises(FlashHeadError, match=message):
            read_options(values)


def test_wrapped_config():
    """A checkpoint's own quantization that is replaced instead of wrapped."""
    register()
    register()
    theirs = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {},
        "ignore": ["lm_head"],
    }
    claims = FlashHeadConfig.override_quantization_method
    assert claims(theirs, "flashhead") == "flashhead"
    assert claims(theirs, None) is None
    assert claims(theirs, "compressed-tensors") is None
    converted = types.SimpleNamespace(flashhead={"index": "codes"})
    assert claims(theirs, None, hf_config=converted) == "flashhead"
    assert claims({"quant_method": "flashhead"}, None) == "flashhead"
    config = FlashHeadConfig.from_config(theirs)
    assert type(config.inner).__name__ == "CompressedTensorsConfig"
    assert config.get_min_capability() == config.inner.get_min_capability() > 0
    assert FlashHeadConfig().get_min_capability() == 0
    config.packed_modules_mapping = {"qkv_proj": ["q_proj"]}
    assert config.inner.packed_modules_mapping == {"qkv_proj": ["q_proj"]}
    both = FlashHeadConfig.from_config({"quant_method": "flashhead", "bits": 2, "inner": theirs})
    assert both.options.codes.bits == 2
    assert type(both.inner).__name__ == "CompressedTensorsConfig"
    plain = FlashHeadConfig.from_config({"quant_method": "flashhead"})
    assert plain.inner is None
    hf_config = types.SimpleNamespace(flashhead_options={"bits": 4})
    plain.maybe_update_config("model", hf_config=hf_config)
    assert (plain.model, plain.options.codes.bits) == ("model", 4)


def layer_of(kind):
    """A layer that has its type and nothing else."""
    layer = object.__new__(kind)
    torch.nn.Module.__init__(layer)
    return layer


@pytest.fixture
def serving(monkeypatch):
    """What layers ask of the engine that they are built for."""
    model = types.SimpleNamespace(dtype=torch.bfloat16, trust_remote_code=False)
    engine = types.SimpleNamespace(
        instance_id="one", model_config=model, speculative_config=None, lora_config=None
    )
    for module in (method, fp8):
        monkeypatch.setattr(module, "get_current_vllm_config", lambda: engine)
    return engine


SKIPPED = {
    "awq": {"modules_to_not_convert": ["layers.1.mlp"]},
    "gptq": {"dynamic": {r"-:.*layers\.1\.": {}}},
    "fp8": {"ignored_layers": ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"]},
}
METHODS = {
    "awq": "AutoAWQMarlinLinearMethod",
    "gptq": "AutoGPTQLinearMethod",
    "fp8": "Fp8LinearMethod",
}


@pytest.mark.parametrize("kind", METHODS)
def test_wrapped_methods(kind, serving):
    """A layer that loses its quantization or gets one that it should not; a name not handed on."""
    config = FlashHeadConfig.from_config(checkpoints.scheme(kind) | SKIPPED[kind])
    inner = config.inner
    config.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    linear = layer_of(LinearBase)
    for name in ("gate_up_proj", "down_proj"):
        found = config.get_quant_method(linear, f"model.layers.0.mlp.{name}")
        assert type(found).__name__ == METHODS[kind]
        assert type(found.quant_config) is type(inner)
    found = config.get_quant_method(linear, "model.layers.1.mlp.gate_up_proj")
    assert type(found) is UnquantizedLinearMethod
    assert type(config.get_quant_method(layer_of(ParallelLMHead), "lm_head")) is FlashHeadMethod
    assert len(config.heads) == 1

    assert config.get_min_capability() == inner.get_min_capability() > 0
    assert config.get_supported_act_dtypes() == inner.get_supported_act_dtypes()
    assert config._ignore_unexpected_suffixes == inner._ignore_unexpected_suffixes
    for name in ("get_cache_scale_mapper", "get_checkpoint_weight_mapper"):
        assert getattr(config, name)() == getattr(inner, name)()
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(copied.inner) is type(inner)
        assert copied.packed_modules_mapping is copied.inner.packed_modules_mapping
    for name in SKIPPED[kind]:
        assert getattr(config, name) is getattr(inner, name)
    assert not hasattr(config, "nothing")
    assert not hasattr(FlashHeadConfig(), "ignored_layers")
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language.model."}))
    if kind == "fp8":
        assert config.ignored_layers[0] == "language.model.layers.1.mlp.gate_proj"


@pytest.mark.parametrize("kind", ["awq", "gptq"])
def test_quantized_head(kind, serving):
    """A quantized head taken for a plain one, or a plain one that its class gave no config."""
    config = FlashHeadConfig.from_config(checkpoints.scheme(kind) | {"lm_head": True})
    found = config.get_quant_method(layer_of(ParallelLMHead), "lm_head")
    assert type(found).__name__ == METHODS[kind]
    assert (config.keeps_head, config.heads) == (True, [])
    bare = layer_of(FlashParallelLMHead)
    bare.was_given_none = True
    assert type(config.get_quant_method(bare, "lm_head")) is FlashHeadMethod


def test_rows_with_adapters_of_the_head(serving):
    """An adapter that comes or goes unseen; rows taken for others; rows nobody told of searched."""
    wrapper = layer_of(LogitsProcessorWithLoRA)
    wrapper.base_layer = layer_of(FlashLogitsProcessor)
    wrapper.lora_a_stacked = torch.zeros(3, 1, 8, 16)
    wrapper.lora_b_stacked = torch.zeros(3, 1, 32, 8)
    wrapper.punica_wrapper = types.SimpleNamespace(sampler_indices=torch.tensor([2, -1, 1, 0]))
    assert adapted_rows(wrapper.base_layer, 4) == set()
    with torch.inference_mode():
        assert adapted_rows(wrapper, 4) == set()
        for slot in (1, 2):
            wrapper.set_lora(slot, torch.ones(4, 16), torch.ones(32, 4))
        assert adapted_rows(wrapper, 4) == {0, 1, 2}  # -1 is the last slot on a CPU
        assert adapted_rows(wrapper, 5) == {0, 1, 2, 3, 4}
        wrapper.reset_lora(2)
        assert adapted_rows(wrapper, 4) == {2}

    serving.lora_config = object()
    tracker = RowNeeds(types.SimpleNamespace(**vars(serving), quant_config=None))
    head = FlashHeadConfig().get_quant_method(layer_of(ParallelLMHead), "lm_head")
    for adapted, needs in (
        (set(), [Need.WINNER, Need.LOGITS]),
        ({1}, [Need.WINNER, Need.DENSE]),
        (None, [Need.DENSE, Need.DENSE]),
    ):
        tracker.update_state(update(2, [(0, GREEDY), (1, SAMPLED)]))
        head.adapted = adapted
        assert head._needs(2) == needs
    serving.lora_config = None
    head = FlashHeadConfig().get_quant_method(layer_of(ParallelLMHead), "lm_head")
    tracker.update_state(None)
    assert head._needs(2) == [Need.WINNER, Need.LOGITS]


def test_layers_of_the_registry(monkeypatch):
    """A layer of vLLM's that is no longer replaced, or not in a process that gets the config."""
    register_layers()
    sent = pickle.dumps(FlashHeadConfig())
    for name in (ParallelLMHead.__name__, LogitsProcessor.__name__):
        monkeypatch.delitem(op_registry_oot, name)
    pickle.loads(sent)
    register_layers()
    for theirs, ours in (
        (ParallelLMHead, FlashParallelLMHead),
        (LogitsProcessor, FlashLogitsProcessor),
    ):
        assert op_registry_oot[theirs.__name__] is ours
        assert type(theirs.__new__(theirs)) is ours


def test_draft_is_what_is_built_behind_its_target(monkeypatch):
    """A draft's head under the target's index, or a target's head taken for a draft's."""
    config = FlashHeadConfig()
    models = {"draft_model_config": types.SimpleNamespace(model="draft")}
    models["target_model_config"] = types.SimpleNamespace(model="target")
    engine = types.SimpleNamespace(quant_config=config, load_config=None)
    engine.speculative_config = types.SimpleNamespace(**models)
    assert layers._config_for(engine) is config  # the target itself
    config.heads.append(types.SimpleNamespace(is_ready=True))
    given = []
    monkeypatch.setattr(
        layers.VllmConfig, "get_quantization_config", lambda *args: given.append(args) or "its own"
    )
    assert layers._config_for(engine) == "its own"
    assert given == [(models["draft_model_config"], None)]
    models["draft_model_config"].model = "target"  # MTP
    assert layers._config_for(engine) is None
    engine.speculative_config = None
    assert layers._config_for(engine) is config
