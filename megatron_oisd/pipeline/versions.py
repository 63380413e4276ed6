"""Which releases of Megatron-Core OISD works on, and what of Megatron-Core it relies on.

Nothing here decides by a version number: :data:`SYMBOLS` lists every class, function, parameter and attribute that
this folder uses, and :func:`check_megatron` looks for them in whatever is installed. A release outside :data:`TESTED`
that has them all is used, with one warning. ``tests/pipeline/test_versions.py`` also checks the table against a real
model, and ``tools/check_versions.py`` runs the tests on several releases.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import importlib
import inspect
import re
import types
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from megatron_oisd.errors import OISDError

TESTED = ("0.10", "0.11", "0.12", "0.13", "0.14", "0.15", "0.16", "0.17", "0.18", "0.19")
"""Releases (major.minor) on which ``tests/pipeline`` passed; what was run is in ``docs/versions.md``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Symbol:
    """Something of Megatron-Core that OISD relies on."""

    path: str
    """``module:name`` or ``module:Class.method``."""
    used_for: str
    """What breaks without it, for the error message."""
    parameters: tuple[str, ...] = ()
    """Parameters a function must take by these names."""
    leading: tuple[str, ...] = ()
    """Names of a method's first positional parameters, in order and without ``self``."""
    attributes: tuple[str, ...] = ()
    """Fields of a dataclass, or attributes that a class or its methods set on an instance."""
    mentions: tuple[str, ...] = ()
    """Attributes that a function must read."""


_TRANSFORMER = "megatron.core.transformer"
_DDP = "megatron.core.distributed"
_SCHEDULES = "megatron.core.pipeline_parallel.schedules"

SYMBOLS = (
    # The model: where layers, the final norm and the unembedding are.
    Symbol(
        path="megatron.core.models.gpt:GPTModel",
        used_for="finding the layers and the unembedding",
        attributes=(
            *("config", "decoder", "vocab_size", "pre_process", "post_process", "output_layer"),
            "share_embeddings_and_output_weights",
        ),
    ),
    Symbol(path="megatron.core.models.gpt:GPTModel.shared_embedding_or_output_weight", used_for="the tied unembedding"),
    Symbol(
        path=f"{_TRANSFORMER}.transformer_block:TransformerBlock",
        used_for="hooking layers and the final norm",
        attributes=("layers", "final_layernorm", "submodules"),
    ),
    Symbol(
        path=f"{_TRANSFORMER}.transformer_block:TransformerBlockSubmodules",
        used_for="building the final norm's replica",
        attributes=("layer_norm",),
    ),
    Symbol(
        path=f"{_TRANSFORMER}.transformer_layer:TransformerLayer",
        used_for="finding the student layers",
        attributes=("layer_number", "self_attention"),
    ),
    Symbol(
        path=f"{_TRANSFORMER}.attention:SelfAttention",
        used_for="hooking queries and keys",
        attributes=("core_attention",),
    ),
    Symbol(
        path=f"{_TRANSFORMER}.dot_product_attention:DotProductAttention.forward",
        used_for="reading queries and keys",
        leading=("query", "key"),
        parameters=("packed_seq_params",),
    ),
    Symbol(
        path=f"{_TRANSFORMER}.dot_product_attention:DotProductAttention",
        used_for="the scale of the attention scores",
        attributes=("config", "softmax_scale"),
    ),
    Symbol(
        path=f"{_TRANSFORMER}.multi_latent_attention:MLASelfAttention",
        used_for="the scale of the attention scores",
        attributes=("core_attention", "softmax_scale"),
    ),
    Symbol(
        path="megatron.core.packed_seq_params:PackedSeqParams",
        used_for="the borders of packed sequences",
        attributes=("cu_seqlens_q", "cu_seqlens_q_padded"),
    ),
    Symbol(
        path=f"{_TRANSFORMER}.spec_utils:build_module",
        used_for="building the final norm's replica",
        leading=("spec_or_module",),
    ),
    # Configuration: shapes, and Megatron's own hooks around the gradients.
    Symbol(
        path=f"{_TRANSFORMER}:TransformerConfig",
        used_for="shapes and the scaling of gradients",
        attributes=(
            *("hidden_size", "layernorm_epsilon", "num_attention_heads", "num_query_groups", "params_dtype"),
            *("sequence_parallel", "tensor_model_parallel_size", "context_parallel_size"),
            *("multi_latent_attention", "window_size"),
            *("calculate_per_token_loss", "grad_scale_func", "finalize_model_grads_func"),
        ),
    ),
    # Where gradients and parameters are kept.
    Symbol(
        path=f"{_DDP}:DistributedDataParallel",
        used_for="adding the lens gradients to Megatron's",
        attributes=("ddp_config", "module", "param_to_bucket_group"),
    ),
    Symbol(
        path=f"{_DDP}:DistributedDataParallelConfig",
        used_for="knowing when gradients are reduced and parameters gathered",
        attributes=("overlap_grad_reduce", "overlap_param_gather"),
    ),
)
"""What the code of this folder always touches."""

OVERLAP_SYMBOLS = (
    Symbol(
        path=f"{_DDP}.param_and_grad_buffer:_ParamAndGradBucketGroup",
        used_for="holding back the reduction of the lens gradients",
        attributes=("ddp_config",),
    ),
    Symbol(
        path=f"{_DDP}.param_and_grad_buffer:_ParamAndGradBucketGroup.register_grad_ready",
        used_for="holding back the reduction of the lens gradients",
        leading=("param",),
        mentions=("start_grad_sync",),
    ),
    Symbol(
        path=f"{_DDP}.param_and_grad_buffer:_ParamAndGradBucketGroup.start_grad_sync",
        used_for="holding back the reduction of the lens gradients",
    ),
    Symbol(
        path=f"{_DDP}.param_and_grad_buffer:_ParamAndGradBucketGroup.finish_param_sync",
        used_for="gathering the final norm and the unembedding for the replicas",
        parameters=("skip_next_bucket_dispatch",),
    ),
)
"""What it touches of DDP's buckets where the reduction of gradients or the gathering of parameters is overlapped."""

_SCHEDULE_ARGUMENTS = (
    *("forward_step_func", "data_iterator", "model", "num_microbatches", "seq_length", "micro_batch_size"),
    "forward_only",
)

LOOP_SYMBOLS = (
    *(
        Symbol(
            path=f"{_SCHEDULES}:{name}",
            used_for="bringing the lens gradients home before gradients are reduced",
            parameters=_SCHEDULE_ARGUMENTS,
            mentions=("finalize_model_grads_func",),
        )
        for name in (
            "forward_backward_no_pipelining",
            "forward_backward_pipelining_without_interleaving",
            "forward_backward_pipelining_with_interleaving",
        )
    ),
    Symbol(path="megatron.core.pipeline_parallel:get_forward_backward_func", used_for="the documented loop"),
    Symbol(path=f"{_DDP}:finalize_model_grads", used_for="the documented loop", leading=("model", "num_tokens")),
    *(
        Symbol(path=f"megatron.core.parallel_state:{name}", used_for="the documented loop")
        for name in ("get_tensor_model_parallel_group", "get_pipeline_model_parallel_group")
    ),
    Symbol(
        path="megatron.core.parallel_state:get_data_parallel_group",
        used_for="the documented loop",
        parameters=("with_context_parallel",),
    ),
    Symbol(
        path="megatron.core.tensor_parallel:checkpoint",
        used_for="recomputing inside backward",
        leading=("function", "distribute_saved_activations"),
    ),
    Symbol(path=f"{_TRANSFORMER}.module:Float16Module", used_for="finding the model inside it"),
)
"""What a training loop and its schedule bring along. Nothing here touches it, so attaching does not look for it."""


def installed_version() -> str:
    """Version of the Megatron-Core that is imported.

    Raises:
        OISDError: there is none.
    """
    try:
        core = importlib.import_module("megatron.core")
        return str(core.__version__)
    except (ImportError, AttributeError) as error:
        raise OISDError(
            f"megatron-core cannot be imported ({error}): pip install '{_requirement()}', which is the tested range"
        ) from error


def missing(symbol: Symbol) -> str | None:
    """What of ``symbol`` the installed Megatron-Core lacks, in words; None where it is all there."""
    module_name, _, name = symbol.path.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError:
        return f"module {module_name}"
    for part in name.split("."):
        if not hasattr(found, part):
            return symbol.path.replace(":", ".")
        found = getattr(found, part)
    where = symbol.path.replace(":", ".")
    if symbol.parameters or symbol.leading:
        names = [n for n in inspect.signature(found).parameters if n != "self"]
        for position, parameter in enumerate(symbol.leading):
            if names[position : position + 1] != [parameter]:
                return f"parameter {parameter!r} as number {position + 1} of {where}"
        for parameter in symbol.parameters:
            if parameter not in names:
                return f"parameter {parameter!r} of {where}"
    there = _attributes(found) if symbol.attributes else set()
    for attribute in symbol.attributes:
        if attribute not in there:
            return f"attribute {attribute!r} of {where}"
    read = {i.argval for code in _codes(found) for i in _attribute_access(code)} if symbol.mentions else set()
    for attribute in symbol.mentions:
        if attribute not in read:
            return f"use of {attribute!r} in {where}"
    return None


def check_megatron(*, overlap: bool = True) -> str:
    """Check that the installed Megatron-Core has all that OISD relies on.

    Warns, once in a process, where the release is not in :data:`TESTED`.

    Args:
        overlap: whether DDP overlaps communication, so that its buckets are touched too.

    Returns:
        The version.

    Raises:
        OISDError: something is missing; the line names it, the version and the tested range.
    """
    version = installed_version()
    for symbol in (*SYMBOLS, *(OVERLAP_SYMBOLS if overlap else ())):
        lacks = missing(symbol)
        if lacks is not None:
            raise OISDError(
                f"megatron-core {version} has no {lacks}, which OISD needs for {symbol.used_for}: install a tested "
                f"release ({TESTED[0]} to {TESTED[-1]}), e.g. pip install '{_requirement()}'"
            )
    if _minor(version) not in TESTED:
        _warn_untested(version)
    return version


@functools.cache
def _warn_untested(version: str) -> None:
    warnings.warn(
        f"megatron-core {version} is not one of the tested releases ({', '.join(TESTED)}): run "
        "`make test ARGS=tests/pipeline` to check",
        stacklevel=4,
    )


def _minor(version: str) -> str:
    match = re.match(r"\d+\.\d+", version)
    return match.group() if match else version


def _requirement() -> str:
    major, minor = TESTED[-1].split(".")
    return f"megatron-core>={TESTED[0]},<{major}.{int(minor) + 1}"


@functools.cache
def _attributes(cls: type) -> set[str]:
    """Names that instances of ``cls`` have: what it defines, its fields, and what its methods assign to.

    Instances cannot be made for the purpose, they need process groups; hence the look into the methods' code.
    """
    names: set[str] = set(dir(cls))
    for base in inspect.getmro(cls):
        names.update(getattr(base, "__annotations__", {}))
        for method in vars(base).values():
            accesses = (access for code in _codes(method) for access in _attribute_access(code))
            names.update(access.argval for access in accesses if access.opname == "STORE_ATTR")
    return names


def _codes(function: Any) -> Iterator[types.CodeType]:
    """The function's code and that of functions inside it, whatever it is wrapped in."""
    function = inspect.unwrap(getattr(function, "__func__", function)) if callable(function) else None
    waiting = [getattr(function, "__code__", None)]
    while waiting:
        code = waiting.pop()
        if code is not None:
            yield code
            waiting += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]


def _attribute_access(code: types.CodeType) -> Iterable[dis.Instruction]:
    return (i for i in dis.get_instructions(code) if i.opname.endswith("_ATTR") or i.opname == "LOAD_METHOD")
