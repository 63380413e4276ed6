"""Megatron-LM's RL loop, ``train_rl.py``, with OISD added: functions it calls are wrapped, not a line of it is changed.

:func:`install` wraps four functions of ``megatron.training`` before ``train_rl.py`` runs:

=============================== ====================================================================================
``parse_args``                  gets the ``--oisd-*`` arguments through its ``extra_args_provider``
``setup_model_and_optimizer``   refuses what cannot be combined, then OISD attaches to the model that was built
``load_checkpoint``             the lens replicas follow the loaded weights
``train_step``                  its schedule runs inside ``OISD.step`` and its forward step inside ``OISD.microbatch``;
                                after the optimizer's step the replicas follow, and OISD's metrics join the losses that
                                ``train_step`` returns, which Megatron-LM writes to TensorBoard, W&B and the console
=============================== ====================================================================================

Rollouts, log-probability passes and evaluation do not go through ``train_step``, so that the taps are silent there.
Nothing is added to the model's state. With both lambdas 0 only the arguments are added.

Position t of OISD's ``[1, s]`` mask speaks of the prediction of token t + 1; Megatron-LM's masks ``[1, s - 1]`` do too.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_oisd.config import OISDConfig, add_arguments, config_from_arguments
from megatron_oisd.errors import OISDError
from megatron_oisd.losses.numerics import Group, group_size
from megatron_oisd.pipeline.microbatch import packed_borders
from megatron_oisd.pipeline.oisd import OISD
from megatron_oisd.pipeline.placement import unwrap
from megatron_oisd.pipeline.versions import Symbol, missing

CHECKOUT = "MEGATRON_LM_PATH"
"""Environment variable with the directory of a Megatron-LM checkout."""

ROW_BATCH = (
    *("tokens", "advantages", "old_logprobs", "loss_mask", "position_ids", "ref_logprobs", "inference_logprobs"),
)
"""What ``train_rl.forward_step`` takes from its iterator when sequences are not packed, in order."""

PACKED_BATCH = (*ROW_BATCH, "seq_starts", "seq_lengths", "seq_indices", "packed_seq_params")
"""What ``load_packed_data_by_index`` returns, in order."""

_TRAINING = "megatron.training.training"

SYMBOLS = (
    Symbol(
        path="megatron.training.arguments:parse_args",
        used_for="adding the --oisd-* arguments",
        leading=("extra_args_provider",),
    ),
    Symbol(path=f"{_TRAINING}:setup_model_and_optimizer", used_for="attaching to the model"),
    Symbol(path=f"{_TRAINING}:load_checkpoint", used_for="refreshing the lens after a load", leading=("ddp_model",)),
    Symbol(
        path=f"{_TRAINING}:train_step",
        used_for="surrounding the update",
        parameters=("forward_step_func", "data_iterator", "model", "forward_backward_func", "iteration"),
    ),
    Symbol(path="megatron.training.global_vars:get_args", used_for="reading the options"),
    Symbol(path="megatron.training.global_vars:get_tokenizer", used_for="the size of the vocabulary"),
    Symbol(path="megatron.rl.rl_utils:get_rl_runtime_state", used_for="finding the packed sequences"),
    Symbol(
        path="megatron.rl.rl_utils:RLRuntimeState",
        used_for="finding the packed sequences",
        attributes=("packing_context",),
    ),
    Symbol(
        path="megatron.rl.sequence_packing_utils:load_packed_data_by_index",
        used_for="reading the packed sequences",
        leading=("bin_idx", "packing_context", "logprobs_is_correction"),
    ),
    Symbol(
        path="megatron.core.packed_seq_params:PackedSeqParams",
        used_for="the borders of packed sequences",
        attributes=("qkv_format", "cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded"),
    ),
    *(
        Symbol(path=f"megatron.core.parallel_state:{name}", used_for="the process groups")
        for name in ("get_tensor_model_parallel_group", "get_pipeline_model_parallel_group", "get_data_parallel_group")
    ),
)
"""What is used of Megatron-LM beyond what :mod:`megatron_oisd.pipeline.versions` lists of Megatron-Core."""


def find_checkout() -> Path:
    """The checkout that the environment variable names, put first on the path for imports.

    Raises:
        OISDError: the variable is not set, or no checkout with ``train_rl.py`` is there.
    """
    value = os.environ.get(CHECKOUT)
    if not value:
        raise OISDError(
            f"{CHECKOUT} is not set: set it to a checkout of Megatron-LM (git clone -b core_v0.16.1 "
            "https://github.com/NVIDIA/Megatron-LM)"
        )
    checkout = Path(value).expanduser().resolve()
    if not (checkout / "train_rl.py").is_file():
        raise OISDError(
            f"{CHECKOUT} is {value}, where no train_rl.py is: set it to the root of a checkout of Megatron-LM, "
            "core_v0.16.1 or newer"
        )
    # As for a script that is run there: train_rl.py imports the modules beside it.
    sys.path.insert(0, str(checkout))
    return checkout


@dataclass(frozen=True)
class Batch:
    """One microbatch as OISD needs it, on the CPU."""

    raw: Any
    """What Megatron-LM's iterator gave, for its own forward step."""
    mask: Tensor
    """``[1, s]`` bool."""
    advantages: Tensor
    """One for each sequence."""
    borders: list[int]
    """Of the sequences, in positions; the last one ends at s."""

    @property
    def num_tokens(self) -> int:
        """Response tokens as ``train_rl.loss_func`` reports them: an empty bin counts as one token."""
        return max(int(self.mask.sum()), 1)

    @property
    def num_sequences(self) -> int:
        """Sequences with a response; padding rows and bins have none."""
        before = torch.cat([torch.zeros(1, dtype=torch.long), self.mask[0].cumsum(0)])[self.borders]
        return int((before.diff() > 0).sum())

    @property
    def packed_seq_params(self) -> Any:
        """The borders in Megatron's form: ``train_rl.py`` gives the model packed sequences in any case, if only one."""
        from megatron.core.packed_seq_params import PackedSeqParams

        borders = torch.tensor(self.borders, dtype=torch.int32)
        return PackedSeqParams(qkv_format="thd", cu_seqlens_q=borders, cu_seqlens_kv=borders)


def read_batch(raw: Any, *, packed: bool) -> Batch:
    """Mask, advantages and borders of what ``train_rl.forward_step`` will take from its iterator.

    Args:
        raw: :data:`ROW_BATCH`, or a bin's index where sequences are packed.
        packed: Megatron-LM's ``--rl-use-sequence-packing``.

    Raises:
        OISDError: it is something else.
    """
    given, params = raw, None
    if packed:
        from megatron.rl.rl_utils import get_rl_runtime_state
        from megatron.rl.sequence_packing_utils import load_packed_data_by_index

        given = load_packed_data_by_index(raw[0].item(), get_rl_runtime_state().packing_context, False)
    expected = PACKED_BATCH if packed else ROW_BATCH
    if len(given) != len(expected):
        raise OISDError(
            f"train_rl.py's batch has {len(given)} parts: expected {', '.join(expected)}; use a checkout of a release "
            "named in docs/megatron_lm.md"
        )
    advantages, mask = given[expected.index("advantages")], given[expected.index("loss_mask")]
    if packed:
        params = given[expected.index("packed_seq_params")]
    else:
        mask = mask[:, 1:]
    if mask.shape[0] != 1:
        raise OISDError(f"a microbatch has {mask.shape[0]} sequences: expected 1, pass --micro-batch-size 1")
    mask = torch.nn.functional.pad(mask.cpu() > 0, (0, 1))
    borders = [0, mask.shape[1]] if params is None else packed_borders(params)
    return Batch(raw, mask, advantages.cpu(), borders)


def check_arguments(args: Any) -> None:
    """Raise :class:`OISDError` naming the first option of ``train_rl.py`` that OISD cannot be combined with.

    What is refused by itself, whatever the loop, is in :mod:`megatron_oisd.pipeline.checks`.
    """
    if not args.perform_rl_step:
        raise OISDError("--perform-rl-step is not set: OISD is part of the RL update; add the flag")
    if args.virtual_pipeline_model_parallel_size is not None:
        raise OISDError(
            f"virtual_pipeline_model_parallel_size={args.virtual_pipeline_model_parallel_size}: Megatron-LM's RL loop "
            "has one iterator and no model chunks; remove the interleaved schedule"
        )
    if args.context_parallel_size > 1:
        raise OISDError(
            f"--context-parallel-size is {args.context_parallel_size}: OISD in train_rl.py is proved for 1 only; set "
            "it to 1 and use tensor, pipeline or sequence parallelism"
        )
    if args.micro_batch_size != 1:
        raise OISDError(
            f"--micro-batch-size is {args.micro_batch_size}: train_rl.py gives the model packed sequences in one row; "
            "set it to 1 and pack with --rl-use-sequence-packing"
        )
    if not (args.bf16 or args.fp16):
        raise OISDError("the model is in fp32, which train_rl.py's get_logprobs cannot run: add --bf16")
    graphs = getattr(args, "cuda_graph_impl", "none")
    if graphs not in (None, "none", "local") or (graphs == "local" and args.rl_training_cuda_graphs):
        raise OISDError(
            f"--cuda-graph-impl {graphs} in the update: hooks do not run in replayed graphs; use --cuda-graph-impl "
            "local without --rl-training-cuda-graphs (graphs in rollouts only), or none"
        )
    for name in ("use_megatron_fsdp", "use_torch_fsdp2"):
        if getattr(args, name, False):
            raise OISDError(
                f"--{name.replace('_', '-')}: the lens reads whole parameters outside the model's forward; use "
                "--use-distributed-optimizer"
            )


class TrainRL:
    """The wrappers, and what they share from the arguments to the last step.

    ``config`` is set when the arguments are parsed, ``oisd`` when the model is built.
    """

    def __init__(self) -> None:
        self.config: OISDConfig | None = None
        self.oisd: OISD | None = None
        self._model_config: Any = None
        self._device = torch.device("cpu")
        self._dp_group: Group = None
        self._packed = False
        self._wrapped: list[tuple[Any, str, Any]] = []

    def wrap(self, module: Any, name: str) -> None:
        """Put the method of that name around ``module``'s function."""
        original = getattr(module, name)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return getattr(self, name)(original, *args, **kwargs)

        wrapper.oisd_loop = self  # type: ignore[attr-defined]
        self._wrapped.append((module, name, original))
        setattr(module, name, wrapper)

    def remove(self) -> None:
        """Give Megatron-LM its functions back, and the model its own hooks; safe to call twice."""
        while self._wrapped:
            setattr(*self._wrapped.pop())
        if self.oisd is not None:
            self.oisd.detach()
            self.oisd = None

    def parse_args(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``parse_args(extra_args_provider=None, ...)`` with our arguments before those of the given provider."""
        bound = inspect.signature(original).bind(*args, **kwargs)
        given = bound.arguments.get("extra_args_provider")

        def provider(parser: Any) -> Any:
            add_arguments(parser)
            return parser if given is None else given(parser)

        bound.arguments["extra_args_provider"] = provider
        parsed = original(*bound.args, **bound.kwargs)
        if getattr(parsed, "yaml_cfg", None) is not None or not hasattr(parsed, "oisd_layers"):
            raise OISDError("--yaml-cfg replaces the command line, and with it --oisd-*: pass arguments instead")
        self.config = config_from_arguments(parsed)
        return parsed

    def setup_model_and_optimizer(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Refuse, build, attach."""
        from megatron.training.global_vars import get_args

        assert self.config is not None
        options = get_args()
        if not self.config.enabled or options.skip_train:
            return original(*args, **kwargs)
        check_arguments(options)
        result = original(*args, **kwargs)
        self.attach(result[0])
        return result

    def attach(self, model: list[nn.Module]) -> OISD:
        """Attach to the chunks that Megatron-LM trains; on every rank."""
        from megatron.core import parallel_state
        from megatron.training.global_vars import get_args, get_tokenizer

        assert self.config is not None
        options = get_args()
        self._packed = options.rl_use_sequence_packing
        self._dp_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self._model_config = unwrap(model[0]).config
        self._device = next(parameter.device for chunk in model for parameter in chunk.parameters())
        with _without_rollout_graphs(self._model_config):
            self.oisd = OISD(
                self.config,
                model,
                tp_group=parallel_state.get_tensor_model_parallel_group(),
                pp_group=parallel_state.get_pipeline_model_parallel_group(),
                dp_group=self._dp_group,
                vocab_size=min(get_tokenizer().vocab_size, options.padded_vocab_size),
            )
        return self.oisd

    def load_checkpoint(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Load, then let the lens replicas follow."""
        result = original(*args, **kwargs)
        if self.oisd is not None:
            self.oisd.sync()
        return result

    def train_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One update with OISD; its metrics are added to the losses, which only the last stage has."""
        if self.oisd is None:
            return original(*args, **kwargs)
        bound = inspect.signature(original).bind(*args, **kwargs)
        bound.arguments["forward_backward_func"] = functools.partial(
            self._run_schedule, bound.arguments["forward_backward_func"], bound.arguments.get("iteration")
        )
        result = original(*bound.args, **bound.kwargs)
        self.oisd.sync()
        metrics, losses = self.oisd.metrics(), result[0]
        if losses:
            some = next(iter(losses.values()))
            losses.update({name: some.new_tensor(value) for name, value in metrics.items()})
        return result

    def _run_schedule(self, schedule: Callable[..., Any], iteration: int | None, /, **kwargs: Any) -> Any:
        """Megatron's schedule over this step's microbatches, which are fetched beforehand for their counts."""
        if kwargs.get("forward_only"):
            return schedule(**kwargs)
        assert self.oisd is not None
        graphs = getattr(self._model_config, "cuda_graph_impl", "none")
        if graphs not in (None, "none"):
            raise OISDError(
                f"cuda_graph_impl is {graphs!r} in an update: train_rl.py was expected to switch graphs off after the "
                "rollouts; pass --cuda-graph-impl none"
            )
        iterator = kwargs["data_iterator"]
        batches = [read_batch(next(iterator), packed=self._packed) for _ in range(kwargs["num_microbatches"])]
        num_sequences, num_tokens = self._count(batches)
        kwargs["data_iterator"] = iter(batches)
        kwargs["forward_step_func"] = functools.partial(self._forward_step, kwargs["forward_step_func"])
        with self.oisd.step(
            num_microbatches=len(batches), num_sequences=num_sequences, num_tokens=num_tokens, step=iteration
        ):
            return schedule(**kwargs)

    def _forward_step(
        self, original: Callable[..., Any], data_iterator: Iterator[Batch], model: nn.Module, *args: Any
    ) -> Any:
        """``train_rl.forward_step`` on the next batch."""
        assert self.oisd is not None
        batch = next(data_iterator)
        with self.oisd.microbatch(
            model, loss_mask=batch.mask, advantages=batch.advantages, packed_seq_params=batch.packed_seq_params
        ):
            return original(iter((batch.raw,)), model, *args)

    def _count(self, batches: list[Batch]) -> tuple[int, int]:
        """Sequences and response tokens of the global batch; one all-reduce over the data-parallel ranks."""
        counts = [sum(batch.num_sequences for batch in batches), sum(batch.num_tokens for batch in batches)]
        total = torch.tensor(counts, device=self._device)
        if group_size(self._dp_group) > 1:
            dist.all_reduce(total, group=self._dp_group)
        num_sequences, num_tokens = total.tolist()
        return max(num_sequences, 1), num_tokens


@contextmanager
def _without_rollout_graphs(model_config: Any) -> Iterator[None]:
    """Attach as an update will find the model: ``train_rl.py`` switches local CUDA graphs off before each of them."""
    graphs = getattr(model_config, "cuda_graph_impl", None)
    if graphs == "local":
        model_config.cuda_graph_impl = "none"
    try:
        yield
    finally:
        if graphs == "local":
            model_config.cuda_graph_impl = graphs


def install() -> TrainRL:
    """Wrap Megatron-LM's functions in this process; before ``train_rl.py`` is run. :meth:`TrainRL.remove` undoes it.

    Raises:
        OISDError: Megatron-LM cannot be imported, or lacks something that is used.
    """
    try:
        training, arguments, initialize, _ = (
            importlib.import_module(name)
            for name in (
                _TRAINING,
                "megatron.training.arguments",
                "megatron.training.initialize",
                "megatron.rl.rl_utils",
            )
        )
    except ImportError as error:
        python = f"releases from 0.17 on need Python 3.12, this is {sys.version.split()[0]}"
        cure = "install that package" if isinstance(error, ModuleNotFoundError) else python
        raise OISDError(f"Megatron-LM cannot be imported ({error}): {cure}; see docs/megatron_lm.md") from error
    installed = getattr(training.train_step, "oisd_loop", None)
    if installed is not None:
        return installed
    for symbol in SYMBOLS:
        lacks = missing(symbol)
        if lacks is not None:
            raise OISDError(
                f"this Megatron-LM has no {lacks}, which OISD needs for {symbol.used_for}: use a checkout of a release "
                "named in docs/megatron_lm.md"
            )
    loop = TrainRL()
    loop.wrap(arguments, "parse_args")
    if hasattr(initialize, "parse_args"):  # until 0.17 it is called by this name
        loop.wrap(initialize, "parse_args")
    for name in ("setup_model_and_optimizer", "load_checkpoint", "train_step"):
        loop.wrap(training, name)
    return loop
