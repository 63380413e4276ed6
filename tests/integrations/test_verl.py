"""verl's update with OISD installed: loss and every gradient against the dense float64 reference.

With ``VERL_PATH``, a checkout of verl, it is verl's own ``forward_backward_batch``, packing and model call, taken from
its sources (verl cannot be imported without Ray and a GPU). Not proved: the worker and the rest of verl around the
update, rows that are not packed, fused kernels, Transformer Engine, context parallelism (refused).
"""

from __future__ import annotations

import ast
import dataclasses
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_oisd.config import OISDConfig
from megatron_oisd.errors import OISDError
from megatron_oisd.integrations import verl
from tests.helpers import verl_backend
from tests.helpers.mcore import OISD_CONFIG, Layout, assemble
from tests.helpers.mcore_reference import reference
from tests.helpers.ranks import run_ranks

CHECKOUT = os.environ.get("VERL_PATH", "")
needs_checkout = pytest.mark.skipif(not CHECKOUT, reason="needs VERL_PATH, a checkout of verl")
SEVERAL = dataclasses.replace(OISD_CONFIG, layers=(1, 3))
LAYOUTS = [
    Layout("one rank", oisd=SEVERAL, per_token_loss=False),
    Layout("PP 2", pp=2, oisd=SEVERAL, per_token_loss=False),
    Layout("PP 2, token mean", pp=2, oisd=dataclasses.replace(SEVERAL, aggregation="token"), per_token_loss=False),
    Layout("TP 2", tp=2, oisd=SEVERAL, per_token_loss=False),
    Layout("DP 2", dp=2, oisd=SEVERAL, per_token_loss=False),
]


@needs_checkout
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_loss_and_every_gradient_equal_the_reference(layout: Layout) -> None:
    expected, whole = reference(layout)
    # The harness builds the model; OISD is attached by the adapter, not by it.
    bare = dataclasses.replace(layout, oisd=None, packed=True, variable=True)
    outcomes = run_ranks(layout.world, verl_backend.train, bare, CHECKOUT, layout.oisd)
    found, _ = assemble([outcome.gradients for outcome in outcomes])
    for name, gradient in whole.items():
        assert (found[name] - gradient).abs().max() / gradient.abs().max() < layout.tolerance, name
    named = {f"actor/{name}": [pytest.approx(value, rel=1e-5)] for name, value in expected.metrics.items() if value}
    last = outcomes[-1].metrics
    assert {name: last[name] for name in named} == named


def test_the_variable_is_read() -> None:
    assert verl.config_from_text('{"layers": [6], "lambda_attn": 0}') == OISDConfig(layers=(6,), lambda_attn=0)
    for text in ("layers: 6", '{"layers": [6], "lamda": 1}', "[6]"):
        with pytest.raises(OISDError, match=r"^OISD_CONFIG is .*: expected a JSON object"):
            verl.config_from_text(text)
    code = "import megatron_oisd.integrations.verl, sys; print('verl' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "OISD_CONFIG"}
    quiet = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert quiet.stdout == "False\n"
    environment["OISD_CONFIG"] = '{"layers": []}'
    loud = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "OISDError: layers is empty" in loud.stderr


def test_another_verl_is_refused_by_the_name_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.SimpleNamespace(get_forward_backward_func=print)
    monkeypatch.setattr(verl.importlib, "import_module", lambda name: module)
    with pytest.raises(OISDError, match=r"has no MegatronPPOActor\.forward_backward_batch: this verl is another"):
        verl.install(OISDConfig(layers=(1,)))
    module.MegatronPPOActor = type("Actor", (), {"forward_backward_batch": print})
    del module.get_forward_backward_func
    with pytest.raises(OISDError, match="has no get_forward_backward_func"):
        verl.install(OISDConfig(layers=(1,)))
    assert module.MegatronPPOActor.forward_backward_batch is print


def test_log_probability_passes_are_left_alone() -> None:
    training = verl._Training(OISDConfig(layers=(1,)))

    def original(actor: Any, data: Any, forward_only: bool = False) -> str:
        return "untouched"

    assert training.forward_backward_batch(original, None, None, True) == "untouched"
    assert training.oisd is None
    assert training.get_forward_backward_func(lambda: "schedule") == "schedule"
    training._before_forward(torch.nn.Identity(), (), {})  # outside a forward step


def test_masks_and_advantages_follow_the_tokens_into_the_model() -> None:
    batch = {
        "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]),
        "response_mask": torch.tensor([[1, 1, 0], [1, 0, 1]]),
        "advantages": torch.tensor([[0.5, 0.5, 0.5], [-1.0, -2.0, -3.0]]),
    }
    mask, advantages = verl.microbatch_weights(batch, None, 6)
    assert mask.tolist() == [[0, 1, 1, 0, 0, 0], [0, 0, 1, 0, 1, 0]]
    assert advantages[1].tolist() == [0, 0, -1, -2, -3, 0]
    packed = types.SimpleNamespace(cu_seqlens_q=None, cu_seqlens_q_padded=torch.tensor([0, 5, 12]))
    mask, advantages = verl.microbatch_weights(batch, packed, 0)
    assert mask.tolist() == [[0, 1, 1, 0, 0, 0, 0, 1, 0, 1, 0, 0]]
    assert advantages[0, 5:].tolist() == [0, 0, -1, -2, -3, 0, 0]


@needs_checkout
def test_the_names_that_are_wrapped_are_used_by_verl_as_expected() -> None:
    source = Path(CHECKOUT, "verl", "workers", "actor", "megatron_actor.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    imported = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert "get_forward_backward_func" in imported  # a name of the module, found there when called
    (actor,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "MegatronPPOActor"]
    methods = {node.name: node for node in actor.body if isinstance(node, ast.FunctionDef)}
    assert [a.arg for a in methods["forward_backward_batch"].args.args][:3] == ["self", "data", "forward_only"]
    assert "forward_only=True" in ast.unparse(methods["compute_log_prob"])
    update = ast.unparse(methods["update_policy"])
    assert update.index("chunk.zero_grad_buffer()") < update.index("self.forward_backward_batch(data")
    assert "append_to_dict(metrics, metric[0])" in update
    workers = Path(CHECKOUT, "verl", "workers", "megatron_workers.py").read_text(encoding="utf-8")
    start = workers.index("def init_model(self)")
    assert workers.index("importlib.import_module(self.config.model.external_lib)", start) > start
    forward = Path(CHECKOUT, "verl", "models", "mcore", "model_forward.py").read_text(encoding="utf-8")
    assert "output_orig = model(**input_args)" in forward
    assert "packed_seq_params=packed_seq_params" in forward
