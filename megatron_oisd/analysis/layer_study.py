"""What every layer of a checkpoint believes and looks at: entropies, distance to the teacher, the logit-lens map.

One checkpoint, some samples of text. Numbers are means over a sample's scored positions, ``[samples, layers]``, layer 1
first. *Lens* policies go through the model's final norm, as OISD's students do; *module* policies (what a module reads
and writes) go to the unembedding as they are, as BuPO (arXiv 2512.19673) measures them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_oisd.analysis.measures import attention_js, lens_against_teacher, lens_entropy
from megatron_oisd.analysis.streamed_model import LayerActivations, StreamedModel
from megatron_oisd.convert.output import write_text
from megatron_oisd.errors import OISDError

MEASURES = {
    "entropy/residual": "lens policy of the residual stream after the layer",
    "entropy/layer_input": "lens policy of the residual stream before the layer",
    "entropy/after_attention": "lens policy of the residual stream between attention and FFN",
    "entropy/attention_input": "module policy of what attention reads (normed by the layer)",
    "entropy/attention_output": "module policy of what attention writes",
    "entropy/ffn_input": "module policy of what the FFN reads (normed by the layer)",
    "entropy/ffn_output": "module policy of what the FFN writes",
    "js/teacher": "JS of the lens policy after the layer to the final policy",
    "js/attention": "JS of the layer's attention to the last layer's, over all causal keys, mean over heads",
}
"""Every measure, in nats."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A text: its tokens, and the first of them that is scored; the prediction of token t is made at position t - 1."""

    id: str
    token_ids: list[int]
    first_scored: int = 1
    """1 scores every prediction; the length of the prompt scores a response only."""


@dataclass(frozen=True, kw_only=True)
class LensMap:
    """The logit lens of one sample: the most probable next token of every layer at a range of positions."""

    sample: str
    first_position: int
    tokens: list[str]
    """What stands at the positions; the layers predict what comes after."""
    next_tokens: list[str]
    """What comes after in the text."""
    top_tokens: list[list[str]]
    """``[layers][positions]``, layer 1 first."""
    probabilities: list[list[float]]
    js: list[list[float]]
    """To the final policy, nats."""


@dataclass(frozen=True, kw_only=True)
class LayerStudy:
    """The numbers of one checkpoint."""

    label: str
    step: int | None
    architecture: str
    num_layers: int
    vocab_size: int
    samples: list[str]
    positions: list[int]
    """Scored positions of each sample."""
    response_only: bool
    """Whether only responses were scored, as OISD's losses do."""
    measures: dict[str, NDArray[np.float64]]
    lens: LensMap | None = None

    def write(self, path: str | Path) -> None:
        """Write everything as JSON; :func:`read_study` reads it."""
        content = {**vars(self), "measures": {name: values.tolist() for name, values in self.measures.items()}}
        content["lens"] = asdict(self.lens) if self.lens else None
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_text(Path(path), json.dumps(content) + "\n")
        except OSError as error:
            raise OISDError(f"{path} cannot be written ({error.strerror}): choose another --output") from error


def read_study(path: str | Path) -> LayerStudy:
    """Read what :meth:`LayerStudy.write` wrote; :class:`OISDError` where it is something else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        content["measures"] = {
            name: np.asarray(values, dtype=np.float64) for name, values in content["measures"].items()
        }
        content["lens"] = LensMap(**content["lens"]) if content["lens"] else None
        study = LayerStudy(**content)
        shape = (len(study.samples), study.num_layers)
        if any(study.measures[name].shape != shape for name in MEASURES):
            raise ValueError(f"measures are not {shape}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OISDError(
            f"{path}: not the layers.json of tools/analyze.py ({type(error).__name__}: {error}); run its layers again"
        ) from error
    return study


def study_layers(
    model: StreamedModel,
    samples: Sequence[Sample],
    *,
    lens_sample: int | None = 0,
    lens_positions: int = 24,
    decode: Callable[[int], str] = str,
    batch_tokens: int = 4096,
    progress: Callable[[int], object] | None = None,
) -> LayerStudy:
    """Measure every layer on every sample.

    Samples are run in batches of at most ``batch_tokens`` padded tokens, each batch twice: the first pass keeps what
    the last layer believes and looks at, the second compares. Memory holds the layers' weights of one layer (all where
    they easily fit), one layer's activations, the last layer's attention of the batch, and a piece of the logits.

    Args:
        model: the model.
        samples: the texts.
        lens_sample: which of them gets a logit-lens map; None for none.
        lens_positions: positions of the map: the first scored ones.
        decode: a token id as text.
        batch_tokens: see above; a longer sample is a batch of its own.
        progress: called with the number of samples just finished.

    Raises:
        OISDError: no samples, a sample without a scored position, or a token beyond the vocabulary.
    """
    check_samples(samples, model.checkpoint.arguments.vocab_size)
    values = {name: np.zeros((len(samples), model.num_layers)) for name in MEASURES}
    lens: LensMap | None = None
    for numbers in _batches(samples, batch_tokens):
        batch = [samples[number] for number in numbers]
        lengths = [len(sample.token_ids) for sample in batch]
        ids = torch.zeros(len(batch), max(lengths), dtype=torch.long)
        for row, sample in zip(ids, batch, strict=True):
            row[: len(sample.token_ids)] = torch.tensor(sample.token_ids)
        pass_over = _Comparison(model, batch, ids, lengths)
        pass_over.run()
        for row, number in enumerate(numbers):
            for name in MEASURES:
                values[name][number] = pass_over.means[name][row]
        if lens_sample in numbers:
            row = numbers.index(lens_sample)
            lens = _lens_map(samples[numbers[row]], pass_over, row, lens_positions, decode)
        if progress is not None:
            progress(len(numbers))
    checkpoint = model.checkpoint
    return LayerStudy(
        label=checkpoint.label, step=checkpoint.step, architecture=checkpoint.arguments.architecture,
        num_layers=model.num_layers, vocab_size=checkpoint.arguments.vocab_size, samples=[s.id for s in samples],
        positions=[len(s.token_ids) - s.first_scored for s in samples],
        response_only=all(s.first_scored > 1 for s in samples), measures=values, lens=lens,
    )  # fmt: skip


def check_samples(samples: Sequence[Sample], vocab_size: int) -> None:
    """Raise :class:`OISDError` unless every sample has scored positions and known tokens."""
    if not samples:
        raise OISDError("nothing to analyse: no samples; give --prompt, --token-ids or --data")
    for sample in samples:
        if not 1 <= sample.first_scored < len(sample.token_ids):
            raise OISDError(
                f"sample {sample.id!r} has {len(sample.token_ids)} tokens and none to score from token "
                f"{sample.first_scored} on: give a longer text or raise --max-tokens"
            )
        if not all(0 <= token < vocab_size for token in sample.token_ids):
            raise OISDError(
                f"sample {sample.id!r} has token ids outside 0..{vocab_size - 1}: use the model's own tokenizer"
            )


def _batches(samples: Sequence[Sample], batch_tokens: int) -> Iterator[list[int]]:
    """Neighbours in length share a batch, so that little is padding."""
    order = sorted(range(len(samples)), key=lambda number: len(samples[number].token_ids))
    batch: list[int] = []
    for number in order:
        if batch and (len(batch) + 1) * len(samples[number].token_ids) > batch_tokens:
            yield batch
            batch = []
        batch.append(number)
    yield batch


class _Comparison:
    """The two passes over one batch; ``means`` are ``[rows, layers]`` and ``tokens``, ``probabilities`` and ``js``
    hold, by layer, the lens at all scored positions of the batch one after the other."""

    def __init__(self, model: StreamedModel, batch: list[Sample], ids: Tensor, lengths: list[int]) -> None:
        self.model, self.ids, self.lengths = model, ids, lengths
        self.means: dict[str, NDArray[np.float64]] = {
            name: np.zeros((len(batch), model.num_layers)) for name in MEASURES
        }
        self.tokens: list[Tensor] = []
        self.probabilities: list[Tensor] = []
        self.js: list[Tensor] = []
        self.spans = [slice(sample.first_scored - 1, len(sample.token_ids) - 1) for sample in batch]
        ends = np.cumsum([span.stop - span.start for span in self.spans]).tolist()
        self.places = [slice(end - (span.stop - span.start), end) for end, span in zip(ends, self.spans, strict=True)]
        self._teacher_attention: list[Tensor] = []

    def run(self) -> None:
        def keep(activations: LayerActivations) -> None:
            if activations.layer == self.model.num_layers:
                self._teacher_attention = self._attention(activations)

        self._teacher = self._rows(self.model.run(self.ids, self.lengths, keep))
        self.model.run(self.ids, self.lengths, self._visit)

    def _attention(self, activations: LayerActivations) -> list[Tensor]:
        """Each sample's scored queries over its own tokens, ``[H, scored, s]``; copies, so that the rest is freed."""
        return [
            attention[:, span, :length].clone()
            for attention, span, length in zip(activations.attention, self.spans, self.lengths, strict=True)
        ]

    def _rows(self, hidden: Tensor) -> Tensor:
        """The scored positions of the batch, one sample after the other: ``[n, h]``."""
        return torch.cat([row[span] for row, span in zip(hidden, self.spans, strict=True)])

    def _store(self, name: str, layer: int, values: Tensor) -> None:
        for row, place in enumerate(self.places):
            self.means[name][row, layer - 1] = values[place].double().mean().item()

    @torch.no_grad()
    def _visit(self, seen: LayerActivations) -> None:
        model, layer, head = self.model, seen.layer, self.model.unembedding
        through_norm = {"entropy/after_attention": seen.after_attention}
        if layer == 1:
            through_norm["entropy/layer_input"] = seen.layer_input
        else:
            self.means["entropy/layer_input"][:, layer - 1] = self.means["entropy/residual"][:, layer - 2]
        for name, hidden in through_norm.items():
            self._store(name, layer, lens_entropy(model.normed(self._rows(hidden)), head))
        for name in ("attention_input", "attention_output", "ffn_input", "ffn_output"):
            self._store(f"entropy/{name}", layer, lens_entropy(self._rows(getattr(seen, name)), head))
        student = model.normed(self._rows(seen.layer_output))
        entropies, distances, tokens, probabilities = lens_against_teacher(student, self._teacher, head)
        self._store("entropy/residual", layer, entropies)
        self._store("js/teacher", layer, distances)
        self.tokens.append(tokens.cpu())
        self.probabilities.append(probabilities.cpu())
        self.js.append(distances.cpu())
        pairs = zip(self._attention(seen), self._teacher_attention, strict=True)
        self._store("js/attention", layer, torch.cat([attention_js(mine, last) for mine, last in pairs]))


def _lens_map(sample: Sample, found: _Comparison, row: int, positions: int, decode: Callable[[int], str]) -> LensMap:
    place, span = found.places[row], found.spans[row]
    count = min(positions, span.stop - span.start)
    shown = slice(place.start, place.start + count)

    def numbers(layers: list[Tensor]) -> list[list[float]]:
        return [[round(value, 6) for value in layer[shown].tolist()] for layer in layers]

    ids: Any = sample.token_ids
    return LensMap(
        sample=sample.id, first_position=span.start, tokens=[decode(t) for t in ids[span.start : span.start + count]],
        next_tokens=[decode(token) for token in ids[span.start + 1 : span.start + 1 + count]],
        top_tokens=[[decode(token) for token in layer[shown].tolist()] for layer in found.tokens],
        probabilities=numbers(found.probabilities), js=numbers(found.js),
    )  # fmt: skip
