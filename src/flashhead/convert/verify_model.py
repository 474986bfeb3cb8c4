"""The steps of `verify` that need the model in memory.

The head is compared with its own weight in float32, the variant with the model that it was made
from, and `generate` is timed with the head and with the dense product, in turn.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from flashhead.convert.files import read_config
from flashhead.errors import FlashHeadError

if TYPE_CHECKING:
    from flashhead.convert.verify import VerifyOptions

WORST_PERPLEXITY_RATIO = 2.0
"""A variant that makes the text this much less likely than its base does is damaged."""
SPEED_TOKENS = 32
SPEED_REPEATS = 3
POSITION_FIGURES = (
    *("agreement", "agreement_stderr", "kl", "kl_stderr", "tv", "bytes_fraction"),
    *("certified_fraction", "certified_wrong", "candidates_mean", "fallback_fraction"),
)


class LoadedFolder:
    """The model of a folder, its tokenizer, its base, and the windows that they read."""

    def __init__(self, folder: Path, options: "VerifyOptions") -> None:
        self._folder, self._options = folder, options
        self._searched = isinstance(read_config(folder).get("flashhead"), dict)
        self._model: Any = None
        self._tokenizer: Any = None
        self._base: Any = None
        self._windows: list[Tensor] = []

    def steps(self, into: dict[str, Any]) -> dict[str, Callable[[], str]]:
        """Checks by name, in order; each returns a line and puts its figures `into` a document."""
        found = {"positions": lambda: self._positions(into)}
        if self._base is not None:
            found["against"] = lambda: self._compare(into)
        if self._searched:
            found["speed"] = lambda: self._speed(into)
        return found

    def reload(self) -> str:
        """As a user loads it: the index must be that of this head, and the weights all there."""
        from flashhead.integrations.transformers import load, load_tokenizer

        source, progress = str(self._folder), self._options.progress
        self._tokenizer = load_tokenizer(source)
        self._model = load(source, None if self._searched else "dense", progress=progress)
        head = self._model.get_output_embeddings()
        said = f"{type(self._model).__name__}, head of {len(head.weight):,} x {head.in_features:,}"
        return f"{said}, its own {head.kind} index" if self._searched else f"{said}, no index"

    def prepare(self) -> None:
        """Load the base, and choose the windows of text.

        Raises:
            FlashHeadError: the base is another model, or the text cannot be used.
        """
        self._load_base()
        self._windows = self._choose_windows()

    def _load_base(self) -> None:
        from flashhead.integrations.transformers import load_dense
        from flashhead.models import resolve

        if self._options.against is None:
            return
        self._base = load_dense(resolve(self._options.against, self._options.progress))
        sizes = [len(m.get_output_embeddings().weight) for m in (self._model, self._base)]
        if sizes[0] != sizes[1]:
            raise FlashHeadError(
                f"--against {self._options.against}: a vocabulary of {sizes[1]:,}, the folder's "
                f"has {sizes[0]:,}: wanted the model that it was made from"
            )

    def _choose_windows(self) -> list[Tensor]:
        from flashhead.evaluate.head import window_tokens_of
        from flashhead.evaluate.text import read_documents, take_positions, token_windows
        from flashhead.integrations.calibration import SEQUENCE_TOKENS, sample_windows

        options, bos = self._options, self._tokenizer.bos_token_id
        if options.data is not None:
            documents = read_documents(options.data)
            return token_windows(
                documents,
                self._tokenizer,
                options.positions,
                window_tokens=window_tokens_of(self._model),
                seed=options.seed,
            )
        source = self._model if self._base is None else self._base
        # BOS is no position, so a few more tokens than positions
        tokens = options.positions + options.positions // 16 + SEQUENCE_TOKENS
        sampled = sample_windows(source, tokens, options.seed, options.progress)
        return take_positions(sampled, options.positions, bos)

    def _text(self) -> str:
        if self._options.data is not None:
            return self._options.data.name
        sampler = "model" if self._base is None else "base"
        return f"text that the {sampler} sampled"

    def _positions(self, into: dict[str, Any]) -> str:
        """The head's tokens and logits against its own weight in float32."""
        if not self._searched:
            return "no index, so the head is the dense one"
        rows = self._measure()
        row, greedy = rows["flashhead"], rows.get("certified", rows["flashhead"])
        figures = {name: row.get(name) for name in POSITION_FIGURES if name in row}
        into["positions"] = {
            **figures,
            "positions": self._options.positions,
            "text": self._text(),
            "certified_agreement": greedy["agreement"],
            "certified_bytes_fraction": greedy["bytes_fraction"],
            "certified_wrong": sum(r["certified_wrong"] or 0 for r in rows.values()),
        }
        wrong = into["positions"]["certified_wrong"]
        said = (
            f"{self._options.positions:,} positions of {self._text()}: certified token "
            f"{greedy['agreement']:.2%} the float32 head's for {greedy['bytes_fraction']:.1%} of "
            f"its bytes, {wrong} certified wrong; complete logits: agreement "
            f"{row['agreement']:.2%}, KL {row['kl']:.1e} nats, {row['bytes_fraction']:.1%} of bytes"
        )
        if wrong:
            raise FlashHeadError(said)
        return said

    def _measure(self) -> dict[str, Any]:
        from flashhead.evaluate.capture import hidden_states
        from flashhead.evaluate.measure import measure
        from flashhead.evaluate.methods import families
        from flashhead.integrations.transformers import logit_postprocess

        head, finish = (
            self._model.get_output_embeddings(),
            logit_postprocess(self._model.config),
        )
        names = ("flashhead", "certified") if head.kind == "codes" else ("flashhead",)
        states = hidden_states(self._model, self._windows, self._tokenizer.bos_token_id, finish)
        document = measure(
            head,
            families(head, names),
            states,
            self._options.positions,
            finish,
            desc="verifying",
            progress=self._options.progress,
        )
        return dict(document["methods"])

    def _compare(self, into: dict[str, Any]) -> str:
        """What quantizing the body cost."""
        from flashhead.evaluate.against import compare_models
        from flashhead.integrations.transformers import logit_postprocess

        finish = (logit_postprocess(self._model.config), logit_postprocess(self._base.config))
        bos = self._tokenizer.bos_token_id
        figures = compare_models(self._model, self._base, self._windows, bos, finish)
        name = Path(str(self._options.against)).name
        ratio = figures["perplexity_ratio"]
        said = (
            f"{name}: agreement of dense heads {figures['agreement']:.1%}, KL {figures['kl']:.1e} "
            f"nats, perplexity {figures['perplexity']:.2f} for {figures['base_perplexity']:.2f}"
        )
        if not ratio <= WORST_PERPLEXITY_RATIO:
            raise FlashHeadError(f"{said}: {ratio:.2f} times the base's, this is another model")
        into["against"] = {"model": name, "text": self._text(), **figures}
        return said

    def _speed(self, into: dict[str, Any]) -> str:
        """Ratio of `generate` with the dense head's time to FlashHead's, interleaved."""
        from flashhead.bench.decode import bench_decode

        document = bench_decode(
            self._model,
            self._model,
            self._tokenizer,
            self._options.prompts,
            new_tokens=SPEED_TOKENS,
            repeats=SPEED_REPEATS,
        )["eager"]
        names = ("speedup", "speedup_p10", "speedup_p90", "upper_bound", "agreement")
        rows = self._model.get_output_embeddings().crossover_rows
        into["speed"] = {name: document[name] for name in names} | {"crossover_rows": rows}
        dense = "; the dense product was the faster one here" if rows == 0 else ""
        return (
            f"generate is {document['speedup']:.2f}x as fast as with the dense head "
            f"({document['speedup_p10']:.2f}-{document['speedup_p90']:.2f}; at most "
            f"{document['upper_bound']:.2f}x){dense}"
        )
