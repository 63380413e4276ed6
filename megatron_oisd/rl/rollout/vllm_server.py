"""Rollouts by vLLM servers over HTTP (``tools/serve_rollouts.py`` starts one), on this machine or others.

Every rank is a client. Servers die, stall and get restarted: each request has a time limit and is tried again, every
answer is checked before it counts, and the version of the weights is asked for before and after a batch, so that a
server that came back with other weights is noticed (:class:`StaleEngineError`) and refreshed instead of believed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_oisd.errors import OISDError
from megatron_oisd.rl.rollout.base import (
    INCONSISTENT_VERSION,
    ModelLimits,
    Rollout,
    SamplingParams,
    ServerError,
    StaleEngineError,
)
from megatron_oisd.rl.rollout.weight_names import ExpectedWeights
from megatron_oisd.rl.rollout.weight_stream import TransferError, WeightSender, transfer

MODEL_NAME = "policy"
"""The name under which ``tools/serve_rollouts.py`` serves the model."""


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """How patient the client is."""

    timeout_s: float = 600.0
    """Seconds for one answer; a whole response is one answer."""
    retries: int = 3
    """Further attempts after a failed one."""
    backoff_s: float = 1.0
    """Seconds before the first retry; each further one waits twice as long."""
    concurrency: int = 256
    """Requests under way at once."""


class VLLMServerEngine:
    """A :class:`~megatron_oisd.rl.rollout.base.RolloutEngine` over one vLLM server.

    Args:
        url: of the server, ``http://host:port``.
        run: name of the training run, the same on all its ranks: with it a server that another run refreshed is
            noticed.
        expected: the model's tensors.
        limits: the model's vocabulary and positions.
        eos_token_ids: the tokens that end a response.
        pushes: whether this rank sends the weights; one of the server's clients does.
        server: patience.
        weights_host: address of this machine that the server reaches.

    Raises:
        OISDError: httpx is missing, or the URL is none.
    """

    def __init__(
        self,
        url: str,
        *,
        run: str,
        expected: ExpectedWeights,
        limits: ModelLimits,
        eos_token_ids: Sequence[int],
        pushes: bool = True,
        server: ServerLimits | None = None,
        weights_host: str = "127.0.0.1",
    ) -> None:
        try:
            import httpx
        except ImportError as error:
            raise OISDError("--rollout-engine vllm_server needs httpx: pip install 'megatron_oisd[rl]'") from error
        if not url.startswith(("http://", "https://")):
            raise OISDError(f"--rollout-urls names {url!r}: expected http://host:port")
        self.url, self._run, self._expected, self._limits = url.rstrip("/"), run, expected, limits
        self._eos_token_ids, self._pushes, self._weights_host = list(eos_token_ids), pushes, weights_host
        self._server = server or ServerLimits()
        self._client = httpx.Client(
            base_url=self.url,
            timeout=httpx.Timeout(self._server.timeout_s, connect=min(10.0, self._server.timeout_s)),
            limits=httpx.Limits(max_connections=self._server.concurrency),
            trust_env=False,  # a proxy between a trainer and its engine is never meant
        )
        self._transport_error = httpx.HTTPError
        self.weights_version = 0

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        samples_per_prompt: int = 1,
        seeds: Sequence[int],
    ) -> list[list[Rollout]]:
        """Sample responses; see :class:`~megatron_oisd.rl.rollout.base.RolloutEngine`.

        Raises:
            OISDError: a request that the model cannot answer, or a server that failed after all retries.
            StaleEngineError: the server does not serve the weights of the last update.
        """
        self._limits.check_request(prompts, sampling, samples_per_prompt, seeds)
        self._check_version()

        def ask(index: int) -> list[Rollout]:
            return self._retried(lambda: self._complete(prompts[index], sampling, samples_per_prompt, seeds[index]))

        pool = ThreadPoolExecutor(max(1, min(self._server.concurrency, len(prompts))))
        try:
            results = list(pool.map(ask, range(len(prompts))))
        finally:
            # A signal that asks the run to leave must not wait for answers that nobody will read.
            pool.shutdown(wait=False, cancel_futures=True)
        self._check_version()
        return results

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Stream new weights into the server and drop its prefix cache, or wait until the rank that does has done so.

        Raises:
            OISDError: a name is unknown, missing or repeated, a shape differs, or the server failed.
        """
        self.weights_version = INCONSISTENT_VERSION
        checked = self._expected.checked(tensors)
        if self._pushes:
            receivers = len(self._retried(lambda: self._versions()))
            with WeightSender(self._weights_host, timeout_s=self._server.timeout_s) as sender:
                arguments = {"address": sender.address, "version": self._name(version)}
                try:
                    transfer(sender, checked, lambda: self._rpc("oisd_receive_weights", arguments), receivers=receivers)
                except TransferError as error:
                    raise ServerError(f"{self.url}: {error}") from error
            # Keys and values of the old weights: with them log-probabilities would be off by whole nats.
            self._retried(lambda: self._post("/reset_prefix_cache", None))
        else:
            for _ in checked:  # every rank has a part in gathering the weights
                pass
            self._await_version(self._name(version))
        self.weights_version = version

    def sleep(self) -> None:
        """Let the server free its device's memory until :meth:`wake`."""
        self.weights_version = INCONSISTENT_VERSION
        if self._pushes:
            self._retried(lambda: self._post("/sleep?level=2", None))

    def wake(self) -> None:
        """Let the server take its memory again; :meth:`update_weights` must follow."""
        if self._pushes:
            self._retried(lambda: self._post("/wake_up", None))

    def close(self) -> None:
        """Close the connections; the server goes on."""
        self._client.close()

    # ------------------------------------------------------------------------------------------------ requests

    def _complete(self, prompt: Sequence[int], sampling: SamplingParams, samples: int, seed: int) -> list[Rollout]:
        answer = self._post(
            "/v1/completions",
            {
                "model": MODEL_NAME, "prompt": list(prompt), "n": samples, "seed": seed % 2**62,
                "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0,
                "max_tokens": sampling.max_new_tokens, "stop_token_ids": self._eos_token_ids, "ignore_eos": True,
                "logprobs": 0, "return_token_ids": True, "skip_special_tokens": False,
            },
        )  # fmt: skip
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            if [choice["index"] for choice in choices] != list(range(samples)):
                raise ServerError(f"{self.url} returned {len(choices)} responses where {samples} were asked for")
            return [
                self._limits.make_rollout(
                    prompt, choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"],
                    sampling=sampling, eos_token_ids=self._eos_token_ids,
                )
                for choice in choices
            ]  # fmt: skip
        except (KeyError, TypeError, AttributeError) as error:
            raise ServerError(f"{self.url} returned no completion ({type(error).__name__}: {error})") from error
        except OISDError as error:
            raise ServerError(f"{self.url}: {error}") from error

    def _rpc(self, method: str, arguments: dict[str, str]) -> list[Any]:
        answer = self._post("/collective_rpc", {"method": method, "kwargs": arguments})
        results = answer.get("results") if isinstance(answer, dict) else None
        if not isinstance(results, list) or not results:
            raise ServerError(
                f"{self.url} answered {str(answer)[:60]!r} to {method}: start it with tools/serve_rollouts.py"
            )
        return results

    def _versions(self) -> list[Any]:
        return self._rpc("oisd_weights_version", {})

    def _check_version(self) -> None:
        if self.weights_version == INCONSISTENT_VERSION:
            raise StaleEngineError(f"the last refresh of {self.url} failed: it has no weights to sample with")
        versions = set(self._retried(self._versions))
        if versions != {self._name(self.weights_version)}:
            raise StaleEngineError(
                f"{self.url} serves the weights {sorted(map(str, versions))}, expected "
                f"{self._name(self.weights_version)!r}: it was restarted, or another run uses it"
            )

    def _await_version(self, name: str) -> None:
        deadline = time.monotonic() + self._server.timeout_s
        while set(self._retried(self._versions)) != {name}:
            if time.monotonic() > deadline:
                raise ServerError(f"{self.url} did not get the weights {name!r} within {self._server.timeout_s:.0f} s")
            time.sleep(0.05)

    def _name(self, version: int) -> str:
        return f"{self._run}/{version}"

    def _post(self, path: str, body: dict[str, Any] | None) -> Any:
        try:
            response = self._client.post(path, json=body)
        except self._transport_error as error:
            raise ServerError(f"{self.url} does not answer ({type(error).__name__}: {error})") from error
        if response.status_code >= 500:
            raise ServerError(f"{self.url}{path} failed with HTTP {response.status_code}: {response.text[:200]}")
        if response.status_code == 404:
            raise OISDError(f"{self.url} has no {path}: start the server with tools/serve_rollouts.py")
        if response.status_code >= 400:
            raise OISDError(f"{self.url}{path} refused a request, HTTP {response.status_code}: {response.text[:300]}")
        if not response.content:
            return None
        try:
            return response.json()
        except ValueError as error:
            raise ServerError(f"{self.url}{path} returned no JSON: {response.text[:60]!r}") from error

    def _retried(self, request: Any) -> Any:
        for attempt in range(self._server.retries + 1):
            try:
                return request()
            except ServerError as error:
                if attempt == self._server.retries:
                    raise ServerError(f"{error}; gave up after {attempt + 1} attempts") from error
                time.sleep(self._server.backoff_s * 2**attempt)
        raise AssertionError("the loop returns or raises")
