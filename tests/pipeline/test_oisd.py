"""OISD on a real GPTModel: what it refuses, what it leaves alone, what it survives.

That the gradients are right on every layout is proved in ``test_exactness.py``; here they are compared with those of a
fresh run, which must be bit-identical, so that nothing of a bad step, another model or a detached instance is left.
The model and the update are the trained path: DistributedDataParallel, Megatron's schedules, ``PolicyPass``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_oisd.config import OISDConfig
from megatron_oisd.errors import OISDError
from megatron_oisd.pipeline import checks
from megatron_oisd.pipeline.lens import Lens
from megatron_oisd.pipeline.oisd import OISD
from megatron_oisd.rl.policy import ParallelGroups, PolicyLossConfig, PolicyMicrobatch, PolicyPass
from megatron_oisd.runtime import cpu, distributed
from tests.helpers import layout
from tests.helpers.layout import NUM_LAYERS, VOCAB, Batch, Case, largest_error, make_batch, reference
from tests.helpers.ranks import run_ranks

CONFIG = OISDConfig(layers=(2,), attn_window=3, attn_global_keys=3)
FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}
Gradients = dict[str, Tensor]


# ---------------------------------------------------------------------------------------------------------- one model


@dataclass
class Model:
    """A tiny Qwen3 as Megatron's GPTModel, one chunk, wrapped as for training."""

    config: Any
    arguments: Any
    chunk: Any
    finalize: Any

    @property
    def bare(self) -> nn.Module:
        return self.chunk.module

    def attach(self, config: OISDConfig = CONFIG, **kwargs: Any) -> OISD:
        groups = ParallelGroups.from_megatron()
        kwargs.setdefault("vocab_size", VOCAB)
        return OISD(config, [self.chunk], tp_group=groups.tp, pp_group=groups.pp, dp_group=groups.dp, **kwargs)

    def zero(self) -> None:
        self.chunk.zero_grad_buffer()

    def gradients(self) -> Gradients:
        return {name: p.main_grad.clone() for name, p in self.bare.named_parameters()}

    def policy(self, oisd: OISD | None) -> PolicyPass:
        return PolicyPass([self.chunk], self.config, oisd, PolicyLossConfig(), ParallelGroups.from_megatron(), VOCAB)

    def train(self, oisd: OISD | None, batch: Batch) -> Gradients:
        """One update's gradients from zero."""
        self.zero()
        self.policy(oisd).gradients(
            microbatches_of(batch), num_sequences=len(batch.tokens), num_tokens=int(batch.mask.sum())
        )
        return self.gradients()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.chunk(tokens, torch.arange(tokens.shape[1]).expand(tokens.shape), None)

    def hooks(self) -> list[str]:
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        return [f"{name}.{kind}" for name, m in self.chunk.named_modules() for kind in kinds for _ in getattr(m, kind)]


def build(*, tied: bool = True, pp: int = 1, **overrides: Any) -> Model:
    """Needs Megatron's parallel groups."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    from megatron_oisd.convert.families import arguments_from_hf_config
    from megatron_oisd.convert.weights import load_hf_weights
    from megatron_oisd.runtime.model import build_model, transformer_config

    hf = layout.hf_model(tied)
    arguments = arguments_from_hf_config(hf.config.to_dict() | {"architectures": ["Qwen3ForCausalLM"]})
    config = transformer_config(
        arguments, pipeline_parallel=pp, finalize_model_grads_func=finalize_model_grads, **overrides
    )
    (bare,) = build_model(arguments, config)
    load_hf_weights([bare], arguments, {name: p.detach() for name, p in hf.state_dict().items()})
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False)
    chunk = DistributedDataParallel(config=config, ddp_config=ddp_config, module=bare)
    chunk.zero_grad_buffer()
    chunk.train()
    return Model(config, arguments, chunk, finalize_model_grads)


def microbatches_of(batch: Batch) -> list[PolicyMicrobatch]:
    return [
        PolicyMicrobatch(
            tokens=batch.tokens[i : i + 1], mask=batch.mask[i : i + 1], advantages=batch.advantages[i : i + 1],
            old_log_probs=batch.old_log_probs[i : i + 1], sequence_ids=[i],
        )
        for i in range(len(batch.tokens))
    ]  # fmt: skip


def differing(gradients: Gradients, expected: Gradients) -> list[str]:
    assert gradients.keys() == expected.keys()
    return [name for name, value in expected.items() if not torch.equal(gradients[name], value)]


def held(oisd: OISD) -> list[Any]:
    """What an instance holds of microbatches; empty between steps."""
    left: list[Any] = [*(oisd._exchange.held if oisd._exchange else [])]
    for chunk in oisd._chunks:
        left += [
            *chunk.waiting,
            *([chunk.current] if chunk.current else []),
            *([chunk.forwarded] * (chunk.forwarded > 0)),
        ]
    return left


@pytest.fixture(scope="module")
def world() -> Iterator[None]:
    """A world of one rank in the test process itself."""
    shim_was_there = cpu.is_installed()
    distributed.initialize()
    yield
    distributed.shutdown()
    if not shim_was_there:
        cpu.uninstall()


@pytest.fixture
def model(world: None) -> Model:
    return build()


@pytest.fixture(scope="module")
def shared(world: None) -> Model:
    """For tests that only look or are refused."""
    return build()


@pytest.fixture(scope="module")
def batch() -> Batch:
    return make_batch()


@pytest.fixture(scope="module")
def fresh(world: None, batch: Batch) -> Gradients:
    """Gradients of one step of an instance that has seen nothing else."""
    model = build()
    return model.train(model.attach(), batch)


# ---------------------------------------------------------------------------------------------------------- attaching


@pytest.mark.parametrize("layers", [(NUM_LAYERS,), (NUM_LAYERS + 1,), (1, NUM_LAYERS)], ids=str)
def test_a_layer_that_is_no_student_is_refused_with_nothing_attached(shared, layers):
    hooks = shared.hooks()
    with pytest.raises(OISDError, match=rf"student layer {layers[-1]} is outside 1\.\.{NUM_LAYERS - 1}"):
        shared.attach(replace(CONFIG, layers=layers))
    assert shared.hooks() == hooks
    assert shared.config.finalize_model_grads_func is shared.finalize


REFUSED = {
    "fine_grained_activation_offloading": True,
    "distribute_saved_activations": True,
    "defer_embedding_wgrad_compute": True,
    "overlap_moe_expert_parallel_comm": True,
    "cpu_offloading": True,
    "enable_cuda_graph": True,
    "external_cuda_graph": True,
    "fp8": "hybrid",
    "fp4": "e2m1",
    "fp32_residual_connection": True,
    "use_mup": True,  # from megatron-core 0.17 on
    "enable_mhc_connections": True,  # later still
    "enable_hyper_connections": True,
    "gtp_weight_remat_size": 2,
    "context_parallel_size": 2,
    "cuda_graph_impl": "local",
}
# Options that some tested release does not have (yet).
NEWER = {
    *("use_mup", "fine_grained_activation_offloading", "experimental_attention_variant", "gtp_weight_remat_size"),
    *("enable_mhc_connections", "enable_hyper_connections", "overlap_moe_expert_parallel_comm", "fp4"),
    *("cuda_graph_impl", "softmax_type"),
}
ATTENTION_ONLY = {
    "softmax_type": "off-by-one",
    "apply_query_key_layer_scaling": True,
    "experimental_attention_variant": "dsa",
}


def test_no_refused_option_is_forgotten_here():
    assert set(checks._REFUSED) <= set(REFUSED)
    assert set(checks._REFUSED_WITH_ATTENTION) <= set(ATTENTION_ONLY)


@pytest.mark.parametrize(("name", "value"), (REFUSED | ATTENTION_ONLY).items(), ids=REFUSED | ATTENTION_ONLY)
def test_a_model_option_without_exact_gradients_is_refused_by_name_and_value(shared, monkeypatch, name, value):
    hooks = shared.hooks()
    assert hasattr(shared.config, name) or name in NEWER, "a typing error in the table would never refuse anything"
    monkeypatch.setattr(shared.config, name, value, raising=False)
    with pytest.raises(OISDError, match=rf"^{name}={re.escape(repr(value))} .*not supported by ") as caught:
        shared.attach()
    assert "\n" not in str(caught.value)
    assert shared.hooks() == hooks
    assert shared.config.finalize_model_grads_func is shared.finalize
    harmless = {"lambda_attn": 0.0} if name in ATTENTION_ONLY else {"lambda_think": 0.0, "lambda_attn": 0.0}
    shared.attach(replace(CONFIG, **harmless)).detach()  # nothing is added there: nothing to refuse


def test_a_vocabulary_larger_than_the_unembedding_is_refused(shared):
    rows, hooks = shared.arguments.padded_vocab_size(1), shared.hooks()
    with pytest.raises(OISDError, match=rf"vocab_size is {rows + 1} but the model's unembedding has {rows} rows"):
        shared.attach(vocab_size=rows + 1)
    assert shared.hooks() == hooks
    shared.attach(vocab_size=rows).detach()


def test_fully_sharded_parameters_are_refused(shared):
    class TorchFullyShardedDataParallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = shared.bare

    with pytest.raises(OISDError, match="TorchFullyShardedDataParallel is not supported by OISD"):
        OISD(CONFIG, [TorchFullyShardedDataParallel()])
    with pytest.raises(OISDError, match="cannot attach to Linear: no Megatron-Core decoder inside"):
        OISD(CONFIG, [nn.Linear(1, 1)])


def test_attaching_and_detaching_leave_nothing_behind(shared):
    hooks, keys = shared.hooks(), list(shared.chunk.state_dict())
    names = [name for name, _ in shared.chunk.named_parameters()]
    for _ in range(100):
        oisd = shared.attach(replace(CONFIG, layers=(1, 3)))
        assert len(shared.hooks()) == len(hooks) + 6
        assert shared.config.finalize_model_grads_func is not shared.finalize
        assert list(shared.chunk.state_dict()) == keys, "checkpoints do not know of OISD"
        assert [name for name, _ in shared.chunk.named_parameters()] == names
        oisd.detach()
        oisd.detach()
    assert shared.hooks() == hooks
    assert shared.config.finalize_model_grads_func is shared.finalize


def test_a_finalize_function_set_after_attaching_survives_detaching(shared, monkeypatch):
    oisd = shared.attach()

    def later(*args: Any, **kwargs: Any) -> None:
        pass

    shared.config.finalize_model_grads_func = later
    oisd.detach()
    assert shared.config.finalize_model_grads_func is later
    shared.config.finalize_model_grads_func = shared.finalize


def test_two_instances_on_one_config_do_not_wrap_each_other_without_end(shared, batch):
    """Each step of one finds the other's wrapper outermost; a wrapper per step would overflow the stack in a night."""
    pair, calls = [shared.attach(), shared.attach(replace(CONFIG, layers=(1,)))], []
    for oisd in pair:
        oisd.reduce_head_gradients = lambda: calls.append(1)  # called by whichever wrappers there are
    for _ in range(5):
        for oisd in pair:
            with oisd.step(num_microbatches=1, num_sequences=1, num_tokens=1):
                pass
    shared.config.finalize_model_grads_func([shared.chunk], None)
    assert len(calls) <= 4
    for oisd in pair:
        oisd.detach()
    shared.config.finalize_model_grads_func = shared.finalize


def test_after_detaching_the_update_is_plain_grpo(model, batch):
    plain = model.train(None, batch)
    oisd = model.attach()
    assert differing(model.train(oisd, batch), plain)
    oisd.detach()
    assert differing(model.train(None, batch), plain) == []


# ---------------------------------------------------------------------------------------------------------- inert taps


def test_without_gradients_a_step_or_training_mode_the_taps_do_nothing(model, batch):
    tokens = batch.tokens[:1]
    fields = {"loss_mask": batch.mask[:1], "advantages": batch.advantages[:1]}
    expected = model.forward(tokens)
    expected.float().square().sum().backward()
    plain = model.gradients()

    oisd = model.attach()
    model.zero()
    with oisd.microbatch(model.chunk, **fields):  # outside a step
        output = model.forward(tokens)
    assert torch.equal(output, expected)
    assert held(oisd) == []
    output.float().square().sum().backward()
    assert differing(model.gradients(), plain) == []

    with oisd.step(num_microbatches=1, num_sequences=1, num_tokens=9):
        with torch.no_grad(), oisd.microbatch(model.chunk, **fields):
            assert torch.equal(model.forward(tokens), expected)
        assert held(oisd) == []
        model.chunk.eval()
        with oisd.microbatch(model.chunk, **fields):
            assert torch.equal(model.forward(tokens), expected)
        model.chunk.train()
        assert held(oisd) == []
        assert torch.equal(model.forward(tokens), expected)  # in a step, outside a microbatch
        assert held(oisd) == []
        with oisd.microbatch(model.chunk, **fields):
            output = model.forward(tokens)
        assert torch.equal(output, expected), "the taps are the identity in forward"
        assert held(oisd)
        output.sum().backward()
    assert held(oisd) == []


def test_a_log_probability_pass_changes_neither_metrics_nor_the_next_step(model, batch, fresh):
    oisd = model.attach()
    plain = model.policy(None).log_probs(microbatches_of(batch))
    for value, expected in zip(model.policy(oisd).log_probs(microbatches_of(batch)), plain, strict=True):
        assert torch.equal(value, expected)
    assert set(oisd.metrics().values()) == {0.0}
    assert differing(model.train(oisd, batch), fresh) == []


# ---------------------------------------------------------------------------------------------------------- bad steps


@pytest.mark.parametrize("backward", [0, 1])
def test_a_microbatch_that_never_comes_back_is_named_and_forgotten(model, batch, fresh, backward):
    """``backward`` of the two come back: what they left in the lens must not enter the next step either."""
    oisd = model.attach()

    def step() -> None:
        with oisd.step(num_microbatches=2, num_sequences=4, num_tokens=40):
            outputs = []
            for part in (slice(0, 1), slice(1, 2)):
                with oisd.microbatch(model.chunk, loss_mask=batch.mask[part], advantages=batch.advantages[part]):
                    outputs.append(model.forward(batch.tokens[part]))
            for output in outputs[:backward]:
                output.sum().backward()

    with pytest.raises(OISDError, match=rf"for microbatch {backward} \(attn of layer 2, think of layer 2\)") as caught:
        step()
    assert ("microbatch 0" in str(caught.value)) == (backward == 0)
    assert held(oisd) == []
    assert differing(model.train(oisd, batch), fresh) == []


@pytest.mark.parametrize("where", ["forward", "loss", "optimizer"])
def test_an_exception_in_a_step_leaves_nothing_for_the_next(model, batch, fresh, monkeypatch, where):
    oisd, policy, calls = model.attach(), model.policy(None), []
    policy.oisd = oisd

    def fail_third(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                raise FloatingPointError("made up")
            return original(*args, **kwargs)

        return call

    if where == "forward":
        last = model.bare.decoder.layers[-1].mlp
        monkeypatch.setattr(last, "forward", fail_third(last.forward))
    else:
        monkeypatch.setattr(policy, "_loss", fail_third(policy._loss))
    counts = {"num_sequences": 4, "num_tokens": int(batch.mask.sum())}
    if where == "optimizer":  # the caller's own mistake, after everything went well
        with pytest.raises(FloatingPointError), oisd.step(num_microbatches=4, **counts):
            raise FloatingPointError
    else:
        with pytest.raises(FloatingPointError, match="made up"):
            policy.gradients(microbatches_of(batch), **counts)
    monkeypatch.undo()
    assert held(oisd) == []
    assert differing(model.train(oisd, batch), fresh) == []


def test_metrics_of_an_abandoned_step_are_not_counted(model, batch):
    oisd = model.attach()
    model.train(oisd, batch)
    expected = oisd.metrics()
    policy = model.policy(oisd)
    broken = [*microbatches_of(batch)[:2], replace(microbatches_of(batch)[2], old_log_probs=torch.zeros(1, 3))]
    with pytest.raises(IndexError):
        policy.gradients(broken, num_sequences=4, num_tokens=int(batch.mask.sum()))
    model.train(oisd, batch)
    assert oisd.metrics() == expected


def test_a_finalize_function_set_after_attaching_is_wrapped_too(model, batch, fresh):
    """Megatron-LM's train() sets it itself, after the model was made and OISD attached."""
    oisd = model.attach()
    model.config.finalize_model_grads_func = partial(model.finalize)
    for _ in range(2):
        assert differing(model.train(oisd, batch), fresh) == []


def test_lens_gradients_that_were_never_returned_are_noticed(model, batch):
    oisd = model.attach()
    model.config.finalize_model_grads_func = None
    model.train(oisd, batch)
    with pytest.raises(OISDError, match=r"lens gradients were never added.*OISD\.reduce_head_gradients\(\)"):
        model.train(oisd, batch)


def test_a_loop_without_a_finalize_function_returns_them_by_hand(world, batch, fresh):
    model = build()
    model.config.finalize_model_grads_func = None
    oisd = model.attach()
    for _ in range(2):
        model.train(oisd, batch)
        oisd.reduce_head_gradients()
        model.finalize([model.chunk], batch.mask.sum().to(torch.int))
        assert differing(model.gradients(), fresh) == []
    oisd.detach()
    assert model.config.finalize_model_grads_func is None


# ---------------------------------------------------------------------------------------------------------- arguments


def test_counts_that_the_mean_over_sequences_needs_are_demanded(shared):
    oisd = shared.attach()
    for counts in ({}, {"num_sequences": 4}, {"num_tokens": 9}):
        with (
            pytest.raises(OISDError, match=r"'sequence' with calculate_per_token_loss needs .*num_sequences and num_t"),
            oisd.step(num_microbatches=2, **counts),
        ):
            raise AssertionError("the step must not begin")
    with pytest.raises(OISDError, match="num_microbatches is 0"), oisd.step(num_microbatches=0):
        raise AssertionError("the step must not begin")
    with oisd.step(num_microbatches=2, num_sequences=4, num_tokens=9):  # a refused step was not half entered
        pass
    oisd.detach()
    token = shared.attach(replace(CONFIG, aggregation="token"))
    with token.step(num_microbatches=2):
        pass
    token.detach()


def test_counts_are_optional_without_per_token_loss(shared, monkeypatch):
    monkeypatch.setattr(shared.config, "calculate_per_token_loss", False)
    oisd = shared.attach()
    with oisd.step(num_microbatches=2):
        pass
    oisd.detach()


def test_steps_do_not_nest(shared):
    oisd = shared.attach()
    counts = {"num_microbatches": 1, "num_sequences": 1, "num_tokens": 1}
    with (
        pytest.raises(OISDError, match=r"step\(\) was entered twice"),
        oisd.step(**counts),
        oisd.step(**counts),
    ):
        raise AssertionError("the inner step must not begin")
    with oisd.step(**counts):
        pass
    oisd.detach()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss_mask": torch.ones(24)}, r"loss_mask has shape \[24\]: expected \[sequences, positions\]"),
        ({"loss_mask": torch.ones(1, 24, 1)}, r"loss_mask has shape \[1, 24, 1\]"),
        ({"advantages": torch.ones(3)}, r"advantages has shape \[3\]: expected \[1\] or \[1, 24\] .*\[1, 24\]"),
        ({"advantages": torch.ones(1, 23)}, r"advantages has shape \[1, 23\]"),
        ({"advantages": torch.tensor(1.0)}, r"advantages has shape \[\]"),
        ({"sequence_ids": [0, 1]}, r"2 sequence_ids for 1 sequences"),
        ({"sequence_ids": []}, r"0 sequence_ids for 1 sequences"),
    ],
    ids=["mask-1d", "mask-3d", "advantages-rows", "advantages-length", "advantages-scalar", "ids-many", "ids-none"],
)
def test_shapes_that_do_not_fit_together_are_refused(shared, batch, fields, message):
    oisd = shared.attach()
    good = {"loss_mask": batch.mask[:1], "advantages": batch.advantages[:1]}
    with oisd.step(num_microbatches=1, num_sequences=1, num_tokens=9):
        with pytest.raises(OISDError, match=message), oisd.microbatch(shared.chunk, **good | fields):
            raise AssertionError("the microbatch must not begin")
        assert held(oisd) == []
    oisd.detach()


@pytest.mark.parametrize("shape", [(1, 12), (2, 12), (1, 25)], ids=str)
def test_a_mask_of_another_shape_than_the_models_input_is_refused(shared, batch, shape):
    """Its positions would silently pick other tokens than those of the response."""
    oisd = shared.attach()
    mask = torch.zeros(shape)
    mask[:, 4:8] = 1
    with (
        pytest.raises(OISDError, match=rf"^loss_mask has shape \[{shape[0]}, {shape[1]}\] but .*\[1, 24\]"),
        oisd.step(num_microbatches=1, num_sequences=1, num_tokens=4),
        oisd.microbatch(shared.chunk, loss_mask=mask, advantages=torch.ones(shape[0])),
    ):
        shared.forward(batch.tokens[:1])
    oisd.detach()


@pytest.mark.parametrize("losses", [{}, {"lambda_attn": 0.0}, {"lambda_think": 0.0}], ids=["both", "think", "attn"])
def test_packing_that_only_one_side_knows_of_is_refused(shared, batch, losses):
    from megatron.core.packed_seq_params import PackedSeqParams

    borders = torch.tensor([0, 10, 24], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=borders, cu_seqlens_kv=borders)
    fields = {"loss_mask": batch.mask[:1], "advantages": torch.ones(1, 24)}
    oisd = shared.attach(replace(CONFIG, **losses))
    with (
        pytest.raises(
            OISDError, match=r"^the model ran without packed_seq_params but OISD.microbatch\(\) was called with"
        ),
        oisd.step(num_microbatches=1, num_sequences=1, num_tokens=9),
        oisd.microbatch(shared.chunk, packed_seq_params=packed, **fields),
    ):
        shared.forward(batch.tokens[:1])
    oisd.detach()


@pytest.mark.parametrize(
    ("borders", "fields", "message"),
    [
        ([0, 10, 24], {"loss_mask": torch.ones(2, 24)}, r"loss_mask has 2 rows: packed sequences stand in one row"),
        ([0, 10, 25], {}, r"cu_seqlens is \[0, 10, 25\]: expected borders that rise from 0 to at most 24"),
        ([1, 24], {}, r"cu_seqlens is \[1, 24\]"),
        ([0, 9, 5, 24], {}, r"cu_seqlens is \[0, 9, 5, 24\]"),
        ([0, 10], {}, r"loss_mask is set after cu_seqlens ends at 10"),
        (
            [0, 10, 24],
            {"advantages": torch.ones(1)},
            r"advantages has shape \[1\]: expected one for each packed sequence",
        ),
        ([0, 10, 24], {"advantages": torch.ones(3)}, r"advantages has shape \[3\]"),
        (
            [0, 10, 24],
            {"sequence_ids": [7]},
            r"mask is set at or after position 10, behind the last of the 1 sequences",
        ),
    ],
    ids=["rows", "too long", "start", "falling", "outside", "few advantages", "many advantages", "ids"],
)
def test_malformed_packing_is_refused(shared, borders, fields, message):
    from megatron.core.packed_seq_params import PackedSeqParams

    cu_seqlens = torch.tensor(borders, dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens)
    good = {"loss_mask": torch.ones(1, 24), "advantages": torch.ones(2), "packed_seq_params": packed}
    oisd = shared.attach()
    with (
        oisd.step(num_microbatches=1, num_sequences=2, num_tokens=24),
        pytest.raises(OISDError, match=message),
        oisd.microbatch(shared.chunk, **good | fields),
    ):
        raise AssertionError("the microbatch must not begin")
    oisd.detach()


def test_a_model_that_is_not_attached_is_refused(shared, batch):
    oisd = shared.attach()
    other = SimpleNamespace(decoder=None, training=True)
    with (
        oisd.step(num_microbatches=1, num_sequences=1, num_tokens=1),
        pytest.raises(OISDError, match=r"microbatch\(\) was given a model that OISD is not attached to"),
        oisd.microbatch(other, loss_mask=batch.mask[:1], advantages=batch.advantages[:1]),
    ):
        raise AssertionError("the microbatch must not begin")
    oisd.detach()


# ---------------------------------------------------------------------------------------------------------- two models


def interleaved(pairs: list[tuple[Model, OISD]], batch: Batch) -> list[Gradients]:
    """Two microbatches on each model, forwards of all before backwards of all."""
    counts = {"num_microbatches": 2, "num_sequences": 2, "num_tokens": int(batch.mask[:2].sum())}
    steps = [oisd.step(**counts) for _, oisd in pairs]
    for (model, _), step in zip(pairs, steps, strict=True):
        model.zero()
        step.__enter__()
    outputs = []
    for row in (slice(0, 1), slice(1, 2)):
        for model, oisd in pairs:
            with oisd.microbatch(model.chunk, loss_mask=batch.mask[row], advantages=batch.advantages[row]):
                outputs.append(model.forward(batch.tokens[row]))
    for output in outputs:
        output.float().square().mean().backward()
    for step, (_, oisd) in zip(steps, pairs, strict=True):
        oisd.reduce_head_gradients()
        step.__exit__(None, None, None)
    return [model.gradients() for model, _ in pairs]


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recompute"])
def test_two_models_in_one_process_do_not_see_each_other(world, batch, recompute):
    overrides = FULL_RECOMPUTE if recompute else {}
    configs = [replace(CONFIG, layers=(1,)), replace(CONFIG, layers=(2, 3), lambda_think=0.3)]
    alone, alone_metrics = [], []
    for config in configs:
        model = build(**overrides)
        oisd = model.attach(config)
        alone += interleaved([(model, oisd)], batch)
        alone_metrics.append(oisd.metrics())
    pairs = []
    for config in configs:
        model = build(**overrides)
        pairs.append((model, model.attach(config)))
    together = interleaved(pairs, batch)
    assert differing(together[0], alone[0]) == []
    assert differing(together[1], alone[1]) == []
    assert differing(alone[0], alone[1]), "the two really differ"
    assert [oisd.metrics() for _, oisd in pairs] == alone_metrics

    pairs[0][1].detach()
    hooks = pairs[1][0].hooks()
    again = interleaved(pairs[1:], batch)
    assert differing(again[0], alone[1]) == [], "detaching one leaves the other at work"
    assert pairs[1][0].hooks() == hooks
    assert pairs[0][0].config.finalize_model_grads_func is pairs[0][0].finalize
    assert pairs[1][0].config.finalize_model_grads_func is not pairs[1][0].finalize


# ---------------------------------------------------------------------------------------------------------- metrics


def test_a_resumed_run_samples_the_queries_of_the_step_it_is_at(model, batch):
    config = replace(CONFIG, attn_queries=2)
    counts = {"num_microbatches": 1, "num_sequences": 1, "num_tokens": 9}

    fields = {"loss_mask": batch.mask[:1], "advantages": batch.advantages[:1], "sequence_ids": [5]}

    def queries(oisd: OISD, **step: int) -> list[int]:
        with oisd.step(**counts, **step):
            with oisd.microbatch(model.chunk, **fields):
                output = model.forward(batch.tokens[:1])
            positions = oisd._chunks[0].waiting[0].sample.position.tolist()
            output.sum().backward()
        oisd.reduce_head_gradients()
        return positions

    oisd = model.attach(config)
    counted = [queries(oisd) for _ in range(4)]
    oisd.detach()
    assert len({tuple(positions) for positions in counted}) > 1
    oisd = model.attach(config)
    assert queries(oisd, step=2) == counted[2]
    assert queries(oisd) == counted[3]


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_metrics_have_the_sign_of_the_advantages_and_reset(model, batch, aggregation):
    oisd = model.attach(replace(CONFIG, layers=(1, 2), aggregation=aggregation))
    good = replace(batch, advantages=torch.tensor([0.7, 1.6, 0.2, 0.4]))
    model.train(oisd, good)
    metrics = oisd.metrics()
    clipped, tokens = torch.tensor([0.7, 1.0, 0.2, 0.4]), batch.mask.sum(1)
    weight = clipped.mean() if aggregation == "sequence" else (clipped * tokens).sum() / tokens.sum()
    for layer in (1, 2):
        for kind, js in (("think", "js"), ("attn", "attn_js")):
            divergence, loss = metrics[f"oisd/{js}/layer_{layer}"], metrics[f"oisd/{kind}/layer_{layer}"]
            assert metrics[f"oisd/{kind}_weight/layer_{layer}"] == pytest.approx(weight.item(), rel=1e-6)
            assert 0 < loss < divergence < math.log(2)
    for kind in ("think", "attn"):
        layers = [metrics[f"oisd/{kind}/layer_{layer}"] for layer in (1, 2)]
        assert metrics[f"oisd/{kind}"] == pytest.approx(sum(layers) / 2)
    assert set(oisd.metrics().values()) == {0.0}, "read once, they start anew"

    model.train(oisd, replace(good, advantages=-good.advantages))
    mirrored = oisd.metrics()
    assert mirrored.keys() == metrics.keys()
    for name, value in metrics.items():
        assert mirrored[name] == pytest.approx(value if "js" in name else -value, rel=1e-6), name


def test_metrics_without_advantage_are_zero_and_without_a_loss_absent(model, batch):
    oisd = model.attach(replace(CONFIG, lambda_attn=0.0))
    model.train(oisd, replace(batch, advantages=torch.zeros(4)))
    metrics = oisd.metrics()
    transport = {"timing_s/oisd_wait", *(f"oisd/transport/{n}" for n in ("teacher_bytes", "lens_bytes", "buffers"))}
    assert set(metrics) == {"oisd/think", *(f"oisd/{n}/layer_2" for n in ("think", "js", "think_weight")), *transport}
    assert set(metrics.values()) == {0.0}
    oisd.detach()
    assert model.attach(replace(CONFIG, lambda_think=0.0, lambda_attn=0.0)).metrics() == {}


# ---------------------------------------------------------------------------------------------------------- two stages


def change_last_stage(norm: Tensor, head: Tensor) -> None:
    """In place, as an optimizer does."""
    norm.mul_(1.4)
    head.mul_(-0.7)


def _exported(model: Model) -> Gradients:
    from megatron_oisd.convert.weights import export_hf_weights

    groups = ParallelGroups.from_megatron()
    values = [parameter.data for parameter in model.bare.parameters()]
    for parameter in model.bare.parameters():
        parameter.data = parameter.main_grad.detach().clone()
    result = dict(export_hf_weights([model.bare], model.arguments, tp_group=groups.tp, pp_group=groups.pp))
    for parameter, value in zip(model.bare.parameters(), values, strict=True):
        parameter.data = value
    return result


def _two_stages(batch: Batch) -> dict[str, Any]:
    """Everything that is asked of two stages and leaves them at work, on one pair of processes."""
    distributed.initialize(pipeline_parallel=2)
    result: dict[str, Any] = {}
    try:
        model = build(tied=False, pp=2)
        hooks, keys = model.hooks(), list(model.chunk.state_dict())
        with pytest.raises(OISDError, match=r"student layer 4 is outside 1\.\.3"):
            model.attach(replace(CONFIG, layers=(4,)))
        result["refused"] = model.hooks() == hooks and model.config.finalize_model_grads_func is model.finalize

        oisd = model.attach()
        result["state_dict"] = list(model.chunk.state_dict()) == keys
        model.train(oisd, batch)
        result["before"] = _exported(model)
        result["metrics"], result["read twice"] = oisd.metrics(), oisd.metrics()

        with pytest.raises(FloatingPointError), oisd.step(num_microbatches=4, num_sequences=4, num_tokens=40):
            raise FloatingPointError
        model.train(oisd, batch)
        result["after exception"] = _exported(model)

        def change() -> None:
            if model.bare.post_process:
                with torch.no_grad():
                    change_last_stage(model.bare.decoder.final_layernorm.weight, model.bare.output_layer.weight)

        refresh = Lens.refresh
        change()
        Lens.refresh = lambda *args: None
        model.train(oisd, batch)
        result["stale"] = _exported(model)
        Lens.refresh = refresh
        model.train(oisd, batch)
        result["automatic"] = _exported(model)
        change()
        oisd.sync()
        Lens.refresh = lambda *args: None  # a step after sync() must not need another
        model.train(oisd, batch)
        result["by hand"] = _exported(model)
        Lens.refresh = refresh
        oisd.detach()
        result["detached"] = model.hooks() == hooks and model.config.finalize_model_grads_func is model.finalize
        return result
    finally:
        distributed.shutdown()


@pytest.fixture(scope="module")
def two_stages(batch: Batch) -> list[dict[str, Any]]:
    return run_ranks(2, _two_stages, batch, timeout_s=60.0)


def test_both_stages_refuse_attach_and_detach_alike(two_stages):
    for result in two_stages:
        assert result["refused"]
        assert result["state_dict"]
        assert result["detached"]


def test_metrics_are_equal_on_both_stages(two_stages, batch):
    first, last = two_stages
    assert first["metrics"] == last["metrics"]
    assert first["metrics"]["oisd/js/layer_2"] > 0
    values, _ = reference(Case(tied=False), batch)
    assert first["metrics"]["oisd/think/layer_2"] == pytest.approx(values["oisd/think/layer_2"], rel=2e-5)
    for result in two_stages:
        assert set(result["read twice"].values()) == {0.0}


def test_an_exception_with_nothing_under_way_leaves_nothing_on_two_stages(two_stages):
    for result in two_stages:
        assert differing(result["after exception"], result["before"]) == []


@pytest.mark.parametrize(("name", "changes"), [("before", 0), ("automatic", 1), ("by hand", 2)])
def test_the_lens_on_another_stage_follows_the_last_stages_weights(two_stages, batch, monkeypatch, name, changes):
    changed = layout.hf_model(False)
    with torch.no_grad():
        for _ in range(changes):
            change_last_stage(changed.model.norm.weight, changed.lm_head.weight)
    monkeypatch.setattr(layout, "hf_model", lambda tied: changed)
    _, expected = reference(Case(tied=False), batch)
    for result in two_stages:
        error, parameter = largest_error(result[name], expected)
        assert error < 2e-5, f"{parameter} is off by {error:.1e}"
    if changes == 1:
        assert largest_error(two_stages[0]["stale"], expected)[0] > 1e-2, "without the refresh it does not"


def _disagree(batch: Batch, masks: list[Tensor], advantages: list[Tensor]) -> None:
    """The first stage must find it out; the last, left without its partner, is ended by the test."""
    distributed.initialize(pipeline_parallel=2)
    model = build(tied=False, pp=2)
    rank = dist.get_rank()
    model.train(model.attach(), replace(batch, mask=masks[rank], advantages=advantages[rank]))
    dist.barrier()


def _moved(mask: Tensor) -> Tensor:
    return torch.cat([mask[:, 1:], mask[:, :1]], dim=1)


def _fewer(mask: Tensor) -> Tensor:
    mask = mask.clone()
    mask[1, mask[1].nonzero()[0]] = False
    return mask


@pytest.mark.parametrize(
    "what",
    [
        "fewer on the last",
        "fewer on the first",
        "other positions",
        "other advantages",
    ],
)
def test_stages_that_disagree_about_a_microbatch_say_so(batch, what):
    masks, advantages = [batch.mask, batch.mask], [batch.advantages, batch.advantages]
    if what == "fewer on the last":
        masks[1] = _fewer(batch.mask)
    elif what == "fewer on the first":
        masks[0] = _fewer(batch.mask)
    elif what == "other positions":
        masks[1] = _moved(batch.mask)
    else:
        advantages[1] = -batch.advantages
    with pytest.raises(AssertionError, match="loss_mask and advantages must be the same on every pipeline stage"):
        run_ranks(2, _disagree, batch, masks, advantages, timeout_s=30.0)


def _fail_under_way(batch: Batch, sent: bool) -> Gradients:
    """Both stages fail in a forward pass, the last one before or after its teacher was sent; then a good step.

    The pipeline schedule is not run in the failing step: it would lose messages of its own.
    """
    distributed.initialize(pipeline_parallel=2)
    try:
        model = build(tied=False, pp=2)
        oisd = model.attach()
        if model.bare.post_process:
            model.bare.set_input_tensor(torch.ones(batch.tokens.shape[1], 1, model.config.hidden_size))

        def failing_step() -> None:
            with oisd.step(num_microbatches=1, num_sequences=1, num_tokens=9):
                with oisd.microbatch(model.chunk, loss_mask=batch.mask[:1], advantages=batch.advantages[:1]):
                    model.forward(batch.tokens[:1])
                    if not sent:
                        raise FloatingPointError
                raise FloatingPointError

        with pytest.raises(FloatingPointError):
            failing_step()
        dist.barrier()
        model.train(oisd, batch)
        return _exported(model)
    finally:
        distributed.shutdown()


@pytest.mark.parametrize("sent", [False, True], ids=["before sending", "after sending"])
def test_a_step_that_failed_with_a_teacher_under_way_spoils_no_later_one(two_stages, batch, sent):
    """The next step is right or refused: a message left over must neither be taken for its own nor block it."""
    try:
        results = run_ranks(2, _fail_under_way, batch, sent, timeout_s=30.0)
    except AssertionError as failure:
        assert "OISDError: " in str(failure)  # noqa: PT017
    else:
        for gradients, expected in zip(results, two_stages, strict=True):
            assert differing(gradients, expected["before"]) == []
