"""NeMo RL's training call with OISD installed: loss and every gradient against the dense float64 reference.

With ``NEMO_RL_PATH``, a checkout of NeMo RL, the call is its own: ``megatron_forward_backward``,
``forward_with_post_processing_fn`` and ``model_forward`` from its sources (NeMo RL cannot be imported without Ray and
Megatron-Bridge). Without it, a stand-in of the same shape. Not proved: the worker and the rest of NeMo RL around the
call, Transformer Engine, context parallelism (refused).
"""

from __future__ import annotations

import ast
import dataclasses
import os
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_oisd.config import OISDConfig
from megatron_oisd.errors import OISDError
from megatron_oisd.integrations import nemo_rl
from tests.helpers import nemo_rl_backend
from tests.helpers.mcore import OISD_CONFIG, Layout, assemble
from tests.helpers.mcore_reference import reference
from tests.helpers.ranks import run_ranks

CHECKOUT = os.environ.get("NEMO_RL_PATH", "")
needs_checkout = pytest.mark.skipif(not CHECKOUT, reason="needs NEMO_RL_PATH, a checkout of NeMo RL")
SEVERAL = dataclasses.replace(OISD_CONFIG, layers=(1, 3))
LAYOUTS = [
    Layout("one rank", oisd=SEVERAL, micro_batch=2),
    Layout("PP 2", pp=2, oisd=SEVERAL),
    Layout("PP 2, packed", pp=2, oisd=SEVERAL, micro_batch=2, packed=True),
    Layout("TP 2, packed", tp=2, oisd=SEVERAL, micro_batch=2, packed=True),
    Layout("DP 2", dp=2, oisd=SEVERAL),
]


@pytest.mark.parametrize("checkout", ["", pytest.param(CHECKOUT, marks=needs_checkout)], ids=["stand-in", "NeMo RL"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_loss_and_every_gradient_equal_the_reference(layout: Layout, checkout: str) -> None:
    expected, whole = reference(layout)
    # The harness builds the model; OISD is attached by the adapter, not by it.
    bare = dataclasses.replace(layout, oisd=None)
    outcomes = run_ranks(layout.world, nemo_rl_backend.train, bare, checkout, layout.oisd)
    found, _ = assemble([outcome.gradients for outcome in outcomes])
    for name, gradient in whole.items():
        assert (found[name] - gradient).abs().max() / gradient.abs().max() < layout.tolerance, name
    named = {name: value for name, value in expected.metrics.items() if value}
    assert named
    for outcome in outcomes:
        assert {name: outcome.metrics[name] for name in named} == pytest.approx(named, rel=1e-5)


def test_both_lambdas_zero_install_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nemo_rl.importlib, "import_module", lambda name: pytest.fail("nothing is to be touched"))
    assert nemo_rl.install(OISDConfig(layers=(1,), lambda_think=0.0, lambda_attn=0.0)).metrics() == {}


def test_what_cannot_be_used_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OISDError, match=r"^aggregation is 'token': "):
        nemo_rl.install(OISDConfig(layers=(1,), aggregation="token"))
    monkeypatch.setattr(nemo_rl.importlib, "import_module", lambda name: types.ModuleType(name))
    with pytest.raises(OISDError, match=r"^nemo_rl\.models\.megatron\.train has no model_forward"):
        nemo_rl.install(OISDConfig(layers=(1,)))
    with pytest.raises(OISDError, match=r"^the batch has no 'advantages'"):
        nemo_rl.microbatch_weights({"token_mask": None}, 4, None)


def test_evaluation_and_log_probability_calls_are_left_alone() -> None:
    training = nemo_rl._Training(OISDConfig(layers=(1,)), None)

    def call(model: Any, forward_only: bool = False, global_valid_seqs: Any = None) -> str:
        return "untouched"

    assert training.megatron_forward_backward(call, None, forward_only=True, global_valid_seqs=1) == "untouched"
    assert training.megatron_forward_backward(call, None) == "untouched"
    assert training.model_forward(call, None) == "untouched"
    assert training.oisd is None


def test_masks_and_advantages_stand_at_the_predictions() -> None:
    data = {
        "token_mask": torch.tensor([[0, 0, 1, 1, 0], [0, 1, 1, 1, 1], [0, 1, 1, 0, 0]]),
        "sample_mask": torch.tensor([1, 1, 0]), "input_lengths": torch.tensor([4, 5, 3]),
        "advantages": torch.tensor([[0.5] * 5, [-1.0, -2.0, -3.0, -4.0, -5.0], [9.0] * 5]),
    }  # fmt: skip
    mask, advantages = nemo_rl.microbatch_weights(data, 5, None)
    assert mask.tolist() == [[0, 1, 1, 0, 0], [1, 1, 1, 1, 0], [0, 0, 0, 0, 0]]
    assert advantages[1].tolist() == [-2, -3, -4, -5, 0]
    packed = types.SimpleNamespace(cu_seqlens_q=None, cu_seqlens_q_padded=torch.tensor([0, 6, 11, 14, 16]))
    mask, advantages = nemo_rl.microbatch_weights(data, 16, packed)
    assert mask.tolist() == [[0, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0]]
    assert advantages[0, 6:11].tolist() == [-2, -3, -4, -5, 0]


@needs_checkout
def test_the_names_that_are_wrapped_are_used_by_nemo_rl_as_expected() -> None:
    folder = Path(CHECKOUT, "nemo_rl", "models")
    functions = {
        node.name: node
        for node in ast.parse((folder / "megatron" / "train.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    parameters = [argument.arg for argument in functions["megatron_forward_backward"].args.args]
    assert {"model", "num_microbatches", "forward_only", "global_valid_seqs"} <= set(parameters)
    parameters = [argument.arg for argument in functions["model_forward"].args.args]
    assert {"model", "data_dict", "input_ids_cp_sharded", "packed_seq_params"} <= set(parameters)
    assert "= model_forward(model=model" in ast.unparse(functions["forward_with_post_processing_fn"])
    worker = (folder / "policy" / "workers" / "megatron_policy_worker.py").read_text(encoding="utf-8")
    assert "losses_reduced = megatron_forward_backward(" in worker
    assert "class MegatronPolicyWorkerImpl(" in worker
    # Megatron divides by nothing, which the counts given to OISD.step() rest on.
    assert "model_cfg.calculate_per_token_loss = True" in (folder / "megatron" / "setup.py").read_text(encoding="utf-8")
    train = (folder / "megatron" / "train.py").read_text(encoding="utf-8")
    assert "return loss * num_microbatches / cp_size, metrics" in train
    losses = Path(CHECKOUT, "nemo_rl", "algorithms", "loss", "loss_functions.py").read_text(encoding="utf-8")
    for text in ('data["token_mask"][:, 1:]', 'data["advantages"][:, 1:]', 'data["sample_mask"]'):
        assert text in losses
    policy = (folder / "policy" / "lm_policy.py").read_text(encoding="utf-8")
    assert "worker_builder_cls_fqn = worker_extension_cls_fqn" in policy
