"""What OISD refuses on a real GPTModel, with nothing attached or begun: layers, model options, shapes, packing."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megatron_oisd.errors import OISDError
from megatron_oisd.pipeline import checks
from megatron_oisd.pipeline.oisd import OISD
from tests.helpers.layout import NUM_LAYERS
from tests.helpers.one_chunk import CONFIG, held

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
