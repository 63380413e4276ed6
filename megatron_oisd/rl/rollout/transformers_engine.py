"""Rollouts by Hugging Face ``generate``: no extra dependency, any device, meant for small models and as a reference.

Shapes: B sequences of a batch, T new tokens, V vocabulary.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LogitsProcessor, LogitsProcessorList

from megatron_oisd.errors import OISDError
from megatron_oisd.rl.rollout.base import Rollout, SamplingParams

INCONSISTENT_VERSION = -1
"""``weights_version`` after a refresh that failed half-way: no trainer's version, so its samples are refused."""


class _LogprobRecorder(LogitsProcessor):
    """Keeps the log-probability of each sampled token and only one step of logits (``output_logits`` keeps all T).

    ``generate`` calls it before temperature and top_p, with the tokens so far: the newest one belongs to the logits
    of the previous call.
    """

    def __init__(self, temperature: float):
        self._temperature = temperature
        self._logits: Tensor | None = None
        self._logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._record(input_ids)
        if not torch.isfinite(scores.sum()):  # one number: NaN or inf anywhere makes the sum so
            raise OISDError(
                "the policy's logits are NaN or infinite, so nothing can be sampled; go back to "
                "the last good checkpoint and lower --lr"
            )
        self._logits = scores
        return scores

    def finish(self, sequences: Tensor) -> Tensor:
        """Log-probabilities ``[B, T]`` in fp32; entries after a sequence's end are meaningless."""
        self._record(sequences)
        return torch.stack(self._logprobs, dim=1)

    def _record(self, tokens: Tensor) -> None:
        if self._logits is None:
            return
        logits = self._logits.float() / self._temperature
        chosen = logits.gather(1, tokens[:, -1:]).squeeze(1)
        self._logprobs.append(chosen - logits.logsumexp(dim=1))


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
        self._model: Any = model.eval().requires_grad_(False)
        self._model.generation_config = GenerationConfig()
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
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, *, samples_per_prompt: int = 1, seed: int
    ) -> list[list[Rollout]]:
        """Sample responses; see :class:`~megatron_oisd.rl.rollout.base.RolloutEngine`.

        Returns ``samples_per_prompt`` rollouts for each prompt, in the caller's order. The caller's random state is
        left as it was. The same arguments and weights give the same rollouts, for one ``batch_size``.

        Raises:
            OISDError: an empty prompt, a token outside the vocabulary, a sequence longer than the model's positions,
                or a sampling value out of range.
        """
        model = self._open_model()
        self._check(prompts, sampling, samples_per_prompt)
        rows = [prompt_index for prompt_index in range(len(prompts)) for _ in range(samples_per_prompt)]
        rows.sort(key=lambda index: len(prompts[index]))  # stable; equal lengths together waste least padding
        results: list[list[Rollout]] = [[] for _ in prompts]
        with torch.inference_mode(), _seeded(seed, model.device):
            for start in range(0, len(rows), self._batch_size):
                batch = rows[start : start + self._batch_size]
                for index, rollout in zip(
                    batch, self._generate_batch([prompts[i] for i in batch], sampling), strict=True
                ):
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
        model = self._open_model()
        targets: dict[str, Tensor] = model.state_dict(keep_vars=True)
        tied: dict[int, list[str]] = defaultdict(list)
        for name, target in targets.items():
            tied[id(target)].append(name)
        self.weights_version = INCONSISTENT_VERSION
        seen: set[str] = set()
        for name, tensor in tensors:
            if name not in targets:
                raise OISDError(
                    f"weight {name!r} is unknown to the rollout model; expected names such as {next(iter(targets))!r}"
                )
            if name in seen:
                raise OISDError(f"weight {name!r} came twice in one refresh; send each name once")
            target = targets[name]
            if tensor.shape != target.shape:
                raise OISDError(
                    f"weight {name!r} has shape {tuple(tensor.shape)}, the rollout model expects "
                    f"{tuple(target.shape)}; send the full unsharded tensor of the same architecture"
                )
            twin = next((other for other in tied[id(target)] if other in seen), None)
            seen.add(name)
            if twin is None:
                with torch.no_grad():
                    target.copy_(tensor)
            elif not torch.equal(target, tensor.to(target)):
                raise OISDError(
                    f"weights {name!r} and {twin!r} are tied in the rollout model but differ; send one of them"
                )
        missing = [names[-1] for names in tied.values() if seen.isdisjoint(names)]
        if missing:
            raise OISDError(f"{len(missing)} weights missing from the refresh, first {missing[0]!r}; send every tensor")
        self.weights_version = version

    def close(self) -> None:
        """Drop the model; ``generate`` and ``update_weights`` then raise."""
        self._model = None

    def _open_model(self) -> Any:
        if self._model is None:
            raise RuntimeError("this rollout engine was closed")
        return self._model

    def _check(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, samples_per_prompt: int) -> None:
        if sampling.max_new_tokens < 1:
            raise OISDError(f"max_new_tokens={sampling.max_new_tokens}: expected at least 1; raise it")
        if sampling.temperature < 0:
            raise OISDError(f"temperature={sampling.temperature}: expected 0 (greedy) or more; raise it")
        if not 0 < sampling.top_p <= 1:
            raise OISDError(f"top_p={sampling.top_p}: expected a value in (0, 1]; 1 keeps the whole vocabulary")
        if samples_per_prompt < 1:
            raise OISDError(f"samples_per_prompt={samples_per_prompt}: expected at least 1; raise it")
        vocabulary = self._model.get_input_embeddings().num_embeddings
        positions = getattr(self._model.config, "max_position_embeddings", None)
        for index, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise OISDError(f"prompt {index} is empty; expected at least one token")
            if min(prompt) < 0 or max(prompt) >= vocabulary:
                raise OISDError(
                    f"prompt {index} has tokens in {min(prompt)}..{max(prompt)}, the model's vocabulary is "
                    f"0..{vocabulary - 1}; use the checkpoint's own tokenizer"
                )
            if positions is not None and len(prompt) + sampling.max_new_tokens > positions:
                raise OISDError(
                    f"prompt {index} of {len(prompt)} tokens and max_new_tokens={sampling.max_new_tokens} exceed the "
                    f"model's {positions} positions; shorten one of them"
                )

    def _generate_batch(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> Iterator[Rollout]:
        device = self._model.device
        width = max(map(len, prompts))
        padded = [[self._pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        attention_mask = torch.arange(width) >= width - lengths[:, None]
        recorder = _LogprobRecorder(sampling.temperature or 1.0)
        sequences = self._model.generate(
            input_ids=torch.tensor(padded, device=device),
            attention_mask=attention_mask.long().to(device),
            generation_config=self._generation_config(sampling),
            logits_processor=LogitsProcessorList([recorder]),
        )
        logprobs = recorder.finish(sequences).tolist()
        ends = set(self._eos_ids)
        for prompt, tokens, values in zip(prompts, sequences[:, width:].tolist(), logprobs, strict=True):
            length = next((position + 1 for position, token in enumerate(tokens) if token in ends), None)
            yield Rollout(
                prompt_ids=list(prompt),
                response_ids=tokens[:length],
                logprobs=values[:length],
                finish_reason="length" if length is None else "stop",
            )

    def _generation_config(self, sampling: SamplingParams) -> GenerationConfig:
        common = {
            "max_new_tokens": sampling.max_new_tokens,
            "eos_token_id": self._eos_ids,
            "pad_token_id": self._pad_id,
            "use_cache": True,
        }
        if sampling.temperature == 0:
            return GenerationConfig(do_sample=False, **common)
        return GenerationConfig(
            do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=0, **common
        )


def _first_set(name: str, *configs: Any) -> Any:
    """Give the first value of ``name`` that is not None."""
    return next((value for config in configs if (value := getattr(config, name, None)) is not None), None)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the generators that sampling on ``device`` reads, and restore them afterwards."""
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_cuda else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed every GPU, ours or not
        if on_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
