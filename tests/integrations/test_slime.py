"""slime's training step with OISD installed by its hook: loss and every gradient against the dense float64 reference.

With ``SLIME_PATH``, a checkout of slime, the step is slime's own: its ``train_one_step``, ``get_batch`` and
``DataIterator``, taken from its sources (slime cannot be imported without Ray, SGLang and a GPU). Without it, a
stand-in of the same shape. Not proved: the rest of slime around the step, Transformer Engine, context parallelism
(refused).
"""

from __future__ import annotations

import ast
import dataclasses
import os
import types
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_oisd.config import OISDConfig
from megatron_oisd.errors import OISDError
from megatron_oisd.integrations import slime
from tests.helpers import slime_backend
from tests.helpers.mcore import OISD_CONFIG, Layout, assemble
from tests.helpers.mcore_reference import reference
from tests.helpers.ranks import run_ranks

CHECKOUT = os.environ.get("SLIME_PATH", "")
needs_checkout = pytest.mark.skipif(not CHECKOUT, reason="needs SLIME_PATH, a checkout of slime")
SEVERAL = dataclasses.replace(OISD_CONFIG, layers=(1, 3))
LAYOUTS = [
    Layout("one rank", oisd=SEVERAL, micro_batch=2),
    Layout("PP 2", pp=2, oisd=SEVERAL, micro_batch=2),
    Layout("PP 2, token mean", pp=2, oisd=dataclasses.replace(SEVERAL, aggregation="token")),
    Layout("TP 2", tp=2, oisd=SEVERAL, micro_batch=2),
    Layout("DP 2", dp=2, oisd=SEVERAL),
]


def options(config: OISDConfig) -> dict[str, Any]:
    """As a YAML of ``--custom-config-path`` would set them."""
    return {f"oisd_{name}": list(value) if name == "layers" else value for name, value in vars(config).items()}


@pytest.mark.parametrize("checkout", ["", pytest.param(CHECKOUT, marks=needs_checkout)], ids=["stand-in", "slime"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_loss_and_every_gradient_equal_the_reference(layout: Layout, checkout: str) -> None:
    expected, whole = reference(layout)
    assert layout.oisd is not None
    # The harness packs and trains; OISD is attached by the adapter, not by it.
    bare = dataclasses.replace(layout, oisd=None, packed=True, variable=True)
    outcomes = run_ranks(layout.world, slime_backend.train, bare, checkout, options(layout.oisd))
    found, _ = assemble([outcome.gradients for outcome in outcomes])
    for name, gradient in whole.items():
        assert (found[name] - gradient).abs().max() / gradient.abs().max() < layout.tolerance, name
    named = {name: value for name, value in expected.metrics.items() if value}
    assert named
    for outcome in outcomes:
        assert {name: outcome.metrics[name] for name in named} == pytest.approx(named, rel=1e-5)


def test_both_lambdas_zero_install_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slime.importlib, "import_module", lambda name: pytest.fail("nothing is to be touched"))
    slime.install(Namespace(oisd_layers=[1], oisd_lambda_think=0.0, oisd_lambda_attn=0.0))


def test_options_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(OISDError, match=r"^oisd_layers is not set: put e\.g\."):
        slime.config_from_args(Namespace(hidden_size=8))
    with pytest.raises(OISDError, match=r"^oisd_lamda is no option of OISD: expected oisd_ and one of advantage_clip"):
        slime.config_from_args(Namespace(oisd_layers=[1], oisd_lamda=1))
    assert slime.config_from_args(Namespace(oisd_layers=[6], lr=1.0)) == OISDConfig(layers=(6,))


def test_another_slime_is_refused_by_the_name_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.SimpleNamespace(train_one_step=print, get_batch=print)
    monkeypatch.setattr(slime.importlib, "import_module", lambda name: module)
    with pytest.raises(OISDError, match="has no get_forward_backward_func"):
        slime.install(Namespace(oisd_layers=[1]))
    assert module.train_one_step is print


def test_the_critic_and_log_probability_passes_are_left_alone() -> None:
    training = slime._Training(OISDConfig(layers=(1,)))
    critic = types.SimpleNamespace(role="critic")

    def train_one_step(args: Any, model: Any) -> str:
        return "untouched"

    assert training.train_one_step(train_one_step, None, [critic]) == "untouched"
    assert training.oisd is None
    assert training.get_forward_backward_func(lambda: "schedule") == "schedule"
    assert training.get_batch(lambda iterator, keys: keys, None, ["tokens"]) == ["tokens"]


def test_masks_and_advantages_stand_one_before_their_tokens() -> None:
    batch = {
        "tokens": torch.zeros(1, 10), "total_lengths": [4, 5], "response_lengths": [2, 3],
        "loss_masks": [torch.tensor([1, 1]), torch.tensor([1, 0, 1])],
        "oisd_advantages": [torch.tensor([0.5, 0.5]), torch.tensor([-1.0, -2.0, -3.0])],
    }  # fmt: skip
    mask, advantages = slime.microbatch_weights(batch)
    assert mask.tolist() == [[0, 1, 1, 0, 0, 1, 0, 1, 0, 0]]
    assert advantages.tolist() == [[0, 0.5, 0.5, 0, 0, -1, -2, -3, 0, 0]]


@needs_checkout
def test_the_names_that_are_wrapped_are_used_by_slime_as_expected() -> None:
    folder = Path(CHECKOUT, "slime", "backends", "megatron_utils")
    model = ast.parse((folder / "model.py").read_text(encoding="utf-8"))
    imported = {alias.name for node in model.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert {"get_forward_backward_func", "get_batch"} <= imported  # names of the module, found there when called
    functions = {node.name: node for node in model.body if isinstance(node, ast.FunctionDef)}
    parameters = [argument.arg for argument in functions["train_one_step"].args.args]
    assert parameters[:9] == [
        *("args", "rollout_id", "step_id", "data_iterator", "model", "optimizer", "opt_param_scheduler"),
        *("num_microbatches", "step_global_batch_size"),
    ]
    assert "train_one_step(" in ast.unparse(functions["train"])
    step = ast.unparse(functions["train_one_step"])
    assert step.index("get_batch(data_iterator,") < step.index("model(**forward_kwargs)")
    assert "forward_backward_func = get_forward_backward_func()" in step
    assert "forward_step_func=" in step
    data = (folder / "data.py").read_text(encoding="utf-8")
    for name in ("self.rollout_data", "self.micro_batch_indices", "self.offset", 'batch["packed_seq_params"]'):
        assert name in data
    # The mask is aligned as microbatch_weights() aligns it.
    assert "F.pad(loss_mask, (prompt_length - 1, 1), value=0)" in data
    initialize = (folder / "initialize.py").read_text(encoding="utf-8")
    assert "custom_init = load_function(args.custom_megatron_init_path)" in initialize
    assert "custom_init(args)" in initialize
    advantages = (folder / "loss.py").read_text(encoding="utf-8")
    assert 'rollout_data["advantages"]' in advantages
    arguments = Path(CHECKOUT, "slime", "utils", "arguments.py").read_text(encoding="utf-8")
    assert "--custom-config-path" in arguments
