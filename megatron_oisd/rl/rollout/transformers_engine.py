"""Rollouts by Hugging Face ``generate``: no extra dependency, any device, meant for small models and as a reference.

Shapes: B sequences of a batch, T new tokens, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LogitsProcessor, LogitsProcessorList

from megatron_oisd.convert.fused import split_views
from megatron_oisd.errors import OISDError
from megatron_oisd.rl.rollout.base import INCONSISTENT_VERSION, ModelLimits, Rollout, SamplingParams
from megatron_oisd.rl.rollout.weight_names import ExpectedWeights


class _Sampler(LogitsProcessor):
    """Draws the tokens itself and lets ``generate`` choose greedily among what it left: one token.

    Each row has random numbers of its own, one a position, so that what is drawn depends neither on the rows beside it
    nor on their number; and only one step of logits is kept (``output_logits`` keeps all T).

    Args:
        sampling: how.
        uniforms: ``[B, T]`` in [0, 1), float64.
    """

    def __init__(self, sampling: SamplingParams, uniforms: Tensor) -> None:
        self._sampling, self._uniforms = sampling, uniforms
        self._logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        del input_ids
        log_p = (scores.float() / (self._sampling.temperature or 1.0)).log_softmax(-1)
        if not torch.isfinite(scores.sum()):  # one number: NaN or inf anywhere makes the sum so
            raise OISDError(
                "the policy's logits are NaN or infinite, so nothing can be sampled; go back to "
                "the last good checkpoint and lower --lr"
            )
        if self._sampling.temperature == 0:
            chosen = scores.argmax(-1, keepdim=True)
        else:
            chosen = self._draw(log_p, self._uniforms[:, len(self._logprobs)])
        self._logprobs.append(log_p.gather(1, chosen).squeeze(1))
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen, 0.0)

    def _draw(self, log_p: Tensor, uniforms: Tensor) -> Tensor:
        """Inverse of the cumulative distribution; ``[B, 1]`` token ids."""
        p, order = log_p.double().exp(), None
        if self._sampling.top_p < 1:
            p, order = p.sort(stable=True, dim=-1, descending=True)
            before = p.cumsum(-1) - p
            p = p.masked_fill(before >= self._sampling.top_p, 0.0)  # the first token always stays
        cumulative = p.cumsum(-1)
        point = uniforms.to(cumulative.device).unsqueeze(1) * cumulative[:, -1:]
        # Right of equal entries: a token without probability is never drawn.
        index = torch.searchsorted(cumulative, point, right=True).clamp_max(p.shape[-1] - 1)
        return index if order is None else order.gather(1, index)

    def finish(self) -> Tensor:
        """Log-probabilities ``[B, T]`` in fp32; entries after a sequence's end are meaningless."""
        return torch.stack(self._logprobs, dim=1)


class TransformersEngine:
    """A :class:`~megatron_oisd.rl.rollout.base.RolloutEngine` over a Hugging Face causal language model.

    The engine owns the model: it puts it in eval mode, turns gradients off and replaces its generation config, so
    that nothing in a checkpoint (``top_k``, penalties, ...) can change how responses are drawn.

    Log-probabilities are ``log_softmax(logits / temperature)`` over the whole vocabulary in fp32, also where
    ``top_p`` < 1 narrows what is drawn; greedy responses (temperature 0) report temperature 1.

    Args:
        model: a decoder-only model on its device.
        eos_token_id: the token, or tokens, that end a response.
        pad_token_id: fills batches on the left; may equal an end token.
        batch_size: sequences generated at once.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        eos_token_id: int | Sequence[int],
        pad_token_id: int,
        batch_size: int = 256,
    ):
        if batch_size < 1:
            raise OISDError(f"rollout batch_size={batch_size}: expected at least 1; pass a positive number")
        self._eos_ids = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
        if not self._eos_ids:
            raise OISDError("eos_token_id=[]: expected at least one end-of-sequence token; pass the tokenizer's")
        self._pad_id = pad_token_id
        self._batch_size = batch_size
        self._model = cast(Any, model.eval().requires_grad_(False))
        self._model.generation_config = GenerationConfig()
        if getattr(self._model.config, "output_router_logits", False):
            self._model.config.output_router_logits = False  # transformers' balance loss breaks down in generation
        self._limits = ModelLimits(
            self._model.get_input_embeddings().num_embeddings,
            getattr(self._model.config, "max_position_embeddings", None),
        )
        self.weights_version = 0

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32, batch_size: int = 256
    ) -> TransformersEngine:
        """Load a local safetensors checkpoint; end and padding tokens come from its generation config or config.

        Args:
            path: folder with ``config.json`` and ``*.safetensors``. Code in the folder is never run.
            dtype: type of the weights in memory.
            batch_size: sequences generated at once.

        Raises:
            OISDError: the folder, its weights or a tensor is missing, truncated or unreadable, or it names no end
                token.
        """
        directory = Path(path)
        cure = "point to a complete Hugging Face checkpoint folder"
        if not (directory / "config.json").is_file():
            raise OISDError(f"{directory}: expected a folder with config.json; {cure}")
        if not any(directory.glob("*.safetensors")):
            raise OISDError(f"{directory}: expected *.safetensors files (pickled weights are not read); {cure}")
        options = {"trust_remote_code": False, "local_files_only": True}
        try:
            config = AutoConfig.from_pretrained(directory, **options)
            model, loaded = AutoModelForCausalLM.from_pretrained(
                directory, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
            )
        except Exception as error:  # safetensors, json and transformers each raise their own kinds
            reason = " ".join(str(error).split())[:300]
            raise OISDError(f"{directory}: cannot be read as a checkpoint ({reason}); {cure}") from error
        absent = sorted(loaded["missing_keys"])
        if absent:  # transformers would go on with random values
            raise OISDError(f"{directory}: {len(absent)} tensors missing, first {absent[0]!r}; {cure}")
        if loaded.get("mismatched_keys"):
            raise OISDError(f"{directory}: shapes differ from config.json: {loaded['mismatched_keys']}; {cure}")
        eos, pad = (_first_set(name, model.generation_config, config) for name in ("eos_token_id", "pad_token_id"))
        if eos is None:
            raise OISDError(f"{directory}: eos_token_id is in neither generation_config.json nor config.json; add it")
        if pad is None:
            pad = eos if isinstance(eos, int) else eos[0]
        return cls(model, eos_token_id=eos, pad_token_id=pad, batch_size=batch_size)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        samples_per_prompt: int = 1,
        seeds: Sequence[int],
    ) -> list[list[Rollout]]:
        """Sample responses; see :class:`~megatron_oisd.rl.rollout.base.RolloutEngine`.

        The caller's random state is not touched.

        Raises:
            OISDError: an empty prompt, a token outside the vocabulary, a sequence longer than the model's positions,
                or another number of seeds than prompts.
        """
        self._open_model()
        self._limits.check_request(prompts, sampling, samples_per_prompt, seeds)
        rows = [(index, sample) for index in range(len(prompts)) for sample in range(samples_per_prompt)]
        rows.sort(key=lambda row: len(prompts[row[0]]))  # stable; equal lengths together waste least padding
        results: list[list[Rollout]] = [[] for _ in prompts]
        with torch.inference_mode():
            for start in range(0, len(rows), self._batch_size):
                batch = rows[start : start + self._batch_size]
                uniforms = torch.stack([_uniforms(seeds[i], sample, sampling.max_new_tokens) for i, sample in batch])
                rollouts = self._generate_batch([prompts[i] for i, _ in batch], sampling, uniforms)
                for (index, _), rollout in zip(batch, rollouts, strict=True):
                    results[index].append(rollout)
        return results

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Copy streamed ``(HF name, full tensor)`` pairs into the model in place, one at a time.

        Every name comes exactly once. Of tied names (``lm_head.weight`` and the embedding) one is enough; where both
        come they must be equal.

        Raises:
            OISDError: a name is unknown, missing or repeated, a shape differs, or tied tensors differ. The engine
                then holds a mixture and its ``weights_version`` is :data:`INCONSISTENT_VERSION`.
        """
        targets = split_views(self._open_model().state_dict(keep_vars=True))
        expected = ExpectedWeights(targets)
        self.weights_version = INCONSISTENT_VERSION
        seen: set[str] = set()
        for name, tensor in expected.checked(tensors):
            target = targets[name]
            twin = next((other for other in expected.tied_with(name) if other in seen), None)
            seen.add(name)
            if twin is None:
                with torch.no_grad():
                    target.copy_(tensor)
            elif not torch.equal(target, tensor.to(target)):
                raise OISDError(
                    f"weights {name!r} and {twin!r} are tied in the rollout model but differ; send one of them"
                )
        self.weights_version = version

    def sleep(self) -> None:
        """Move the model to the CPU's memory."""
        self._device = self._open_model().device
        self._model.to("cpu")
        self.weights_version = INCONSISTENT_VERSION

    def wake(self) -> None:
        """Move the model back to its device."""
        self._open_model().to(self._device)

    def close(self) -> None:
        """Drop the model; ``generate`` and ``update_weights`` then raise."""
        self._model = None

    def _open_model(self) -> Any:
        if self._model is None:
            raise RuntimeError("this rollout engine was closed")
        return self._model

    def _generate_batch(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, uniforms: Tensor
    ) -> Iterator[Rollout]:
        device = self._model.device
        width = max(map(len, prompts))
        padded = [[self._pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        attention_mask = torch.arange(width) >= width - lengths[:, None]
        sampler = _Sampler(sampling, uniforms)
        sequences = self._model.generate(
            input_ids=torch.tensor(padded, device=device),
            attention_mask=attention_mask.long().to(device),
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=sampling.max_new_tokens, eos_token_id=self._eos_ids,
                pad_token_id=self._pad_id, use_cache=True,
            ),
            logits_processor=LogitsProcessorList([sampler]),
        )  # fmt: skip
        logprobs = sampler.finish().tolist()
        ends = set(self._eos_ids)
        for prompt, tokens, values in zip(prompts, sequences[:, width:].tolist(), logprobs, strict=True):
            length = next((position + 1 for position, token in enumerate(tokens) if token in ends), None)
            yield Rollout(
                prompt_ids=list(prompt),
                response_ids=tokens[:length],
                logprobs=values[:length],
                finish_reason="length" if length is None else "stop",
            )


def _uniforms(seed: int, sample: int, count: int) -> Tensor:
    """Random numbers of one response, a function of its arguments alone."""
    generator = np.random.Generator(np.random.Philox(key=[seed, sample]))
    return torch.from_numpy(generator.random(count))


def _first_set(name: str, *configs: Any) -> Any:
    """Give the first value of ``name`` that is not None."""
    return next((value for config in configs if (value := getattr(config, name, None)) is not None), None)
