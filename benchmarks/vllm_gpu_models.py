"""Model folders for `vllm_gpu_step.py`: public shapes, made-up weights, hidden states as hard to
search for as real ones.

`flashhead.bench.synthetic` makes a head W and, for every token t, a hidden state h_t of a target
row. The model is built around them: its input embedding is h, its final norm restores the length,
and its body (random weights of the real sizes) adds noise of relative size c:

    hidden state = norm(h_token + c * noise(context))

States are handed to tokens so that each one's winner is the next of one long cycle, so text does
not stand still; and each is turned a little towards that winner or away from it, as far as it takes
for as many rows to survive the scan as on real text. The input embedding is therefore no tie of
the head: its time is that of a lookup either way.

Weights of W4A16 are random codes with one scale a group of 128, as compressed-tensors packs them.
"""

import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from vllm_gpu_shapes import GROUP, SHAPES, SMOKE, TINY

from flashhead.bench.synthetic import LOGIT_SPREAD, make_problem
from flashhead.index.build_codes import build_codes
from flashhead.index.codes import CodesIndex
from flashhead.index.store import INDEX_FILE, save_index
from flashhead.options import CodesOptions

SURVIVORS = {"mean": 1400.0, "median": 370.0}
"""Of real text (docs/log.md, "How hard is real text?": 368 of mean 1,432; 258 of mean 1,351)."""
NOISE = 0.2
"""c: length of what the body adds, relative to the input embedding."""
LEAST_EASE, MOST_EASE, STEPS, SPREADS = -1.5, 2.0, 6, (0.0, 0.4, 0.8)
"""Standard deviations of a logit by which winners are raised: tried, and their spread by tokens."""
CODE_DEVIATION = (255 / 12) ** 0.5
"""Of a code that is uniform in -8 ... 7."""
CALIBRATION, MEASURED, LENGTH = 4096, 1024, 256
"""Hidden states that shape the index, that are searched for, and of a sequence."""


class MadeUpModel:
    """A model of random weights around a made-up head, and its W4A16 codes.

    Args:
        config: of its config.json.
        device: where it is made.
        seed: of all weights.
    """

    def __init__(self, config: dict[str, Any], device: str, seed: int = 0) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self.config, self.device = config, device
        self.quantized = "quantization_config" in config
        values = {k: v for k, v in copy.deepcopy(config).items() if k != "quantization_config"}
        own = AutoConfig.for_model(values.pop("model_type"), **values)
        torch.manual_seed(seed)
        with torch.device(device):
            self.model = AutoModelForCausalLM.from_config(own, dtype=torch.bfloat16).eval()
        shape = config["vocab_size"], config["hidden_size"]
        problem = make_problem(
            config["model_type"], shape, states=shape[0], calibration=0, device=device, seed=seed
        )
        self.packed: dict[str, tuple[Tensor, Tensor]] = {}
        self.is_gemma = config["model_type"].startswith("gemma")
        self.noise, self.ease = 0.0, (0.0, 0.0)
        with torch.no_grad():
            self._fill(problem.weight, problem.hidden)

    @property
    def head(self) -> Tensor:
        """`bf16[V, d]`."""
        weight: Tensor = self.model.lm_head.weight
        return weight.detach()

    def _fill(self, head: Tensor, states: Tensor) -> None:
        """All weights; the body's noise is as long as a state."""
        model = self.model
        model.lm_head.weight.copy_(head)
        self.cycle, states = _in_a_cycle(head, states)
        self._plain = states[self.cycle].float()
        model.model.embed_tokens.weight.copy_(states)
        rms = float(states.float().square().mean().sqrt())
        model.model.norm.weight.fill_(rms - 1 if self.is_gemma else rms)
        layers = list(model.model.layers)
        for number, layer in enumerate(layers):
            for name, module in layer.named_modules():
                if isinstance(module, nn.Linear):
                    self._fill_linear(f"model.layers.{number}.{name}", module)
        self._residual = rms * (self.config["hidden_size"] ** 0.5 if self.is_gemma else 1.0)
        self._parts = 2 * len(layers)
        if self.is_gemma:  # norms behind attention and MLP say how long each part is
            self.set_noise(1.0)

    def _fill_linear(self, name: str, linear: nn.Linear) -> None:
        deviation = linear.in_features**-0.5
        if not self.quantized:
            linear.weight.normal_(0, deviation)
            return
        rows, columns = linear.weight.shape
        packed = torch.randint(
            -(2**31), 2**31, (rows, columns // 8), dtype=torch.int32, device=self.device
        )
        scale = torch.full(
            (rows, columns // GROUP), deviation / CODE_DEVIATION, device=self.device
        ).bfloat16()
        self.packed[name] = packed, scale
        linear.weight.copy_(unpacked(packed, scale))

    @torch.no_grad()
    def set_ease(self, ease: float, spread: float) -> None:
        """Raise the logits of the winners by so many standard deviations, not all alike."""
        self.ease = ease, spread
        head = self.head
        rows = head[self.cycle.roll(-1)].float() - head.float().mean(0)
        drawn = torch.randn(len(rows), 1, generator=torch.Generator().manual_seed(7))
        raised = LOGIT_SPREAD * (ease + spread * drawn.to(self.device))
        turned = self._plain + raised * rows / rows.square().sum(1, keepdim=True)
        self.model.model.embed_tokens.weight[self.cycle] = turned.bfloat16()

    def set_noise(self, ratio: float) -> None:
        """Let the body's noise have this length, relative to the input embedding's.

        Behind norms (Gemma) the length is given; else the output projections are scaled, and three
        measurements find the scale.
        """
        if self.is_gemma:
            with torch.no_grad():
                for layer in self.model.model.layers:
                    each = ratio * self._residual / self._parts**0.5
                    layer.post_attention_layernorm.weight.fill_(each - 1)
                    layer.post_feedforward_layernorm.weight.fill_(each - 1)
        else:
            for _ in range(3):
                self._scale_outputs(ratio / max(1e-6, self.measured_noise()))
        self.noise = self.measured_noise()

    def _scale_outputs(self, factor: float) -> None:
        with torch.no_grad():
            for number, layer in enumerate(self.model.model.layers):
                for name in ("self_attn.o_proj", "mlp.down_proj"):
                    key = f"model.layers.{number}.{name}"
                    linear = layer.get_submodule(name)
                    if key in self.packed:
                        codes, scale = self.packed[key]
                        scale.mul_(factor)
                        linear.weight.copy_(unpacked(codes, scale))
                    else:
                        linear.weight.mul_(factor)

    def _random_tokens(self, count: int, seed: int) -> Tensor:
        """Tokens that some state has for its winner, as all that the model generates are."""
        generator = torch.Generator().manual_seed(seed)
        size = (-(-count // LENGTH), min(LENGTH, count))
        drawn = torch.randint(len(self.cycle), size, generator=generator)
        return self.cycle[drawn.to(self.device)]

    @torch.no_grad()
    def measured_noise(self) -> float:
        """Length of what the body adds, relative to the input embedding: a median of tokens."""
        tokens = self._random_tokens(LENGTH, 3)
        body = self.model.model
        final: list[Tensor] = []
        hook = body.norm.register_forward_pre_hook(lambda _, args: final.append(args[0]))
        body(tokens, use_cache=False)
        hook.remove()
        start = body.embed_tokens(tokens).float()
        added = (final[0].float() - start).norm(dim=-1) / start.norm(dim=-1)
        return float(added.median())

    @torch.no_grad()
    def hidden_states(self, count: int, seed: int) -> Tensor:
        """Of such tokens: `bf16[n, d]`, n at least `count`."""
        parts = self._random_tokens(count, seed).split(4)
        body = self.model.model
        states = torch.cat([body(part, use_cache=False).last_hidden_state for part in parts])
        return states.reshape(-1, states.shape[-1])

    def tensors(self) -> dict[str, Tensor]:
        """What the checkpoint holds, on the CPU."""
        found = {}
        for name, tensor in self.model.state_dict().items():
            stem = name.removesuffix(".weight")
            if stem in self.packed:
                packed, scale = self.packed[stem]
                found[f"{stem}.weight_packed"] = packed.cpu()
                found[f"{stem}.weight_scale"] = scale.cpu()
                found[f"{stem}.weight_shape"] = torch.tensor(tensor.shape)
            else:
                found[name] = tensor.detach().cpu().contiguous()
        return found


def _in_a_cycle(head: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """States of tokens, so that a token's winner is the token after it in a cycle.

    Args:
        head: `bf16[V, d]`.
        states: `bf16[V, d]`.

    Returns:
        The tokens of the cycle, `int64[m]`: all that some state has for its winner; and the states
        again, in the order of the tokens that they belong to. A token outside keeps its own.
    """
    winners = torch.cat([(part @ head.T).argmax(1) for part in states.split(2048)])
    state_of = torch.full((len(head),), -1, device=head.device)
    state_of[winners] = torch.arange(len(states), device=head.device)
    cycle = (state_of >= 0).nonzero()[:, 0]
    order = torch.randperm(len(cycle), generator=torch.Generator().manual_seed(5))
    cycle = cycle[order.to(head.device)]
    given = states.clone()
    given[cycle] = states[state_of[cycle.roll(-1)]]
    return cycle, given


def unpacked(packed: Tensor, scale: Tensor) -> Tensor:
    """Weights `float32[rows, columns]` of int4 codes, 8 an int32 from its lowest bits on, plus 8.

    Args:
        packed: `int32[rows, columns / 8]`.
        scale: `bf16[rows, columns / 128]`.
    """
    shifts = torch.arange(0, 32, 4, device=packed.device, dtype=torch.int32)
    codes = ((packed[:, :, None] >> shifts) & 15) - 8
    groups = codes.view(len(packed), scale.shape[1], -1).float()
    return (groups * scale.float()[:, :, None]).flatten(1)


def survivors(index: CodesIndex, weight: Tensor, states: Tensor) -> list[int]:
    """Rows whose planes the GPU search reads, of each hidden state."""
    from flashhead.nn.head import FlashHead
    from flashhead.nn.tuning import Crossover

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    head = FlashHead(linear.eval(), index, impl="triton", crossover=Crossover(64, 64))
    with torch.no_grad():
        answers: Any = head.next_token(states)
    return [int(count) for count in answers.answers[6].tolist()]


def summary(counts: list[int]) -> dict[str, float]:
    """Mean, median, 90th percentile and largest."""
    values = torch.tensor(counts, dtype=torch.float64)
    return {
        "mean": round(float(values.mean()), 1),
        "median": float(values.median()),
        "p90": round(float(values.quantile(0.9)), 1),
        "max": float(values.max()),
    }


def choose_ease(made: MadeUpModel) -> list[dict[str, Any]]:
    """Make states as hard to search for as those of real text: everything that was tried."""
    index = build_codes(made.head, CodesOptions(), made.hidden_states(CALIBRATION, 1))
    tried: list[dict[str, Any]] = []
    for spread in SPREADS:
        low, high = LEAST_EASE, MOST_EASE
        for _ in range(STEPS):
            ease = (low + high) / 2
            made.set_ease(ease, spread)
            found = summary(survivors(index, made.head, made.hidden_states(MEASURED, 2)))
            tried.append({"ease": ease, "spread": spread, **found})
            if found["median"] > SURVIVORS["median"]:
                low = ease
            else:
                high = ease
    best = min(tried, key=_distance)
    made.set_ease(best["ease"], best["spread"])
    return tried


def _distance(found: dict[str, Any]) -> float:
    """How far mean and median of the survivors are from real text's, as logarithms."""
    return sum(abs(math.log(max(1.0, found[name]) / SURVIVORS[name])) for name in SURVIVORS)


def write_model(folder: Path, made: MadeUpModel, index: CodesIndex, sample: Tensor) -> None:
    """Checkpoint, index and config.json, as `flashhead convert` lays them out."""
    folder.mkdir(parents=True)
    save_file(made.tensors(), folder / "model.safetensors", {"format": "pt"})
    section = save_index(index.to(torch.device("cpu")), made.head, sample.cpu(), folder)
    config = made.config | {"flashhead": section}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def make_model(folder: Path, config: dict[str, Any], device: str, seed: int = 0) -> dict[str, Any]:
    """Make a folder with a model and the index of its head; what was reached, as JSON values."""
    made = MadeUpModel(config, device, seed)
    searches = device.startswith("cuda")
    made.set_noise(NOISE)
    tried = choose_ease(made) if searches else []
    made.noise = made.measured_noise()
    calibration = made.hidden_states(CALIBRATION, 1)
    index = build_codes(made.head, CodesOptions(), calibration)
    found = None
    if searches:
        found = summary(survivors(index, made.head, made.hidden_states(MEASURED, 2)))
    write_model(folder, made, index, calibration[:64])
    return {
        "weights": "made up",
        "tied": False,
        "cycle_tokens": len(made.cycle),
        "noise": round(made.noise, 4),
        "survivors": found,
        "survivors_of_real_text": SURVIVORS,
        "ease": made.ease,
        "tried": tried,
        "index_bytes": (folder / INDEX_FILE).stat().st_size,
        "bits": index.options.bits,
        "planes": index.options.planes,
    }


def prepare(job: dict[str, Any]) -> dict[str, Any]:
    """The folder that engines load, and options of the plugin; what was made, as JSON values.

    Args:
        job: `folder` to make; `shape` of a made-up model, or `model`, a folder with a real one.
    """
    folder, device = Path(job["folder"]), "cuda" if torch.cuda.is_available() else "cpu"
    if "model" not in job:
        config = (SHAPES | {"smoke": SMOKE, "tiny": TINY})[job["shape"]]
        return {"model": str(folder), "options": {}, **make_model(folder, config, device)}
    config = json.loads((Path(job["model"]) / "config.json").read_text())
    if "flashhead" in config:
        return {"model": job["model"], "options": {}, "weights": "real"}
    from flashhead.convert.head import convert

    told = convert(job["model"], folder, index_only=True, progress=False)
    options = {"index": str(folder)}
    return {"model": job["model"], "options": options, "weights": "real", "converted": told}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    Path(job["out"]).write_text(json.dumps(prepare(job)))


if __name__ == "__main__":
    main()
