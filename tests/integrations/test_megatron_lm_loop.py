"""The wrappers of ``train_rl.py`` around a loop of the same form, where no Megatron-LM is at hand.

The loop below keeps to what ``tests/integrations/test_megatron_lm.py`` reads from Megatron-LM's sources; the model, the
schedule and everything of OISD are real. Loss and gradients are compared with the dense float64 reference.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_oisd.config import OISDConfig
from megatron_oisd.errors import OISDError
from tests.helpers.mcore import LENGTH, OISD_CONFIG, PADDED, VOCAB, Layout, Rollouts, assemble, make_rollouts, pieces
from tests.helpers.mcore_reference import reference
from tests.helpers.mcore_run import Outcome, parallel_world, start
from tests.helpers.ranks import run_ranks


class Loop:
    """``megatron.training.training`` as far as it is wrapped, over a model of ``tests/helpers/mcore.py``."""

    def __init__(self, layout: Layout, batch: Rollouts) -> None:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.training, self.batch = start(layout, batch), batch
        self.schedule = get_forward_backward_func()
        self.calls: list[str] = []

    def setup_model_and_optimizer(self, *args: Any, **kwargs: Any) -> tuple[Any, None, None]:
        self.calls.append("setup")
        return self.training.chunks, None, None

    def load_checkpoint(self, ddp_model: Any, optimizer: Any, opt_param_scheduler: Any) -> tuple[int, int]:
        self.calls.append("load")
        return 0, 0

    def train_step(
        self, forward_step_func: Any, data_iterator: Any, model: Any, optimizer: Any, opt_param_scheduler: Any,
        config: Any, forward_backward_func: Any, iteration: int | None = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        for chunk in model:
            chunk.zero_grad_buffer()
        store = forward_backward_func(
            forward_step_func=forward_step_func, data_iterator=data_iterator, model=model,
            num_microbatches=len(self.batch.tokens), seq_length=LENGTH, micro_batch_size=1, decoder_seq_length=None,
            forward_only=False,
        )  # fmt: skip
        return ({"loss": torch.stack(store).sum()} if store else {}, 0, False, False, 0, 1.0, None, 0)

    def forward_step(self, data_iterator: Any, model: Any, loss_only: bool = False) -> tuple[Any, Any]:
        """On rows as Megatron-LM's loader gives them, each run as one packed sequence."""
        from megatron.core.packed_seq_params import PackedSeqParams

        tokens, advantages, old, mask, positions, _, _ = next(data_iterator)
        borders = torch.tensor([0, LENGTH], dtype=torch.int32)
        packed = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=borders, cu_seqlens_kv=borders, max_seqlen_q=LENGTH, max_seqlen_kv=LENGTH
        )
        output = model(tokens, positions, None, packed_seq_params=packed)
        view = SimpleNamespace(
            mask=torch.nn.functional.pad(mask[:, 1:] > 0, (0, 1)), targets=torch.roll(tokens, -1, 1),
            old=torch.nn.functional.pad(old, (0, 1)), token_advantages=advantages.unsqueeze(1).expand(tokens.shape),
            own=lambda tensor: tensor,
        )  # fmt: skip
        return output, partial(self.training.loss, view)

    def rows(self) -> Any:
        """An endless iterator, as ``itertools.cycle`` over the loader is."""
        batch = self.batch
        mask = torch.nn.functional.pad(batch.mask.float(), (1, 0))[:, :-1]
        positions = torch.arange(LENGTH).expand(batch.tokens.shape)
        old = batch.old_log_probs[:, :-1]
        parts = (batch.tokens, batch.advantages, old, mask, positions, old, old)
        while True:
            yield from (tuple(part[row : row + 1] for part in parts) for row in range(len(batch.tokens)))


OPTIONS = {
    "perform_rl_step": True, "virtual_pipeline_model_parallel_size": None, "context_parallel_size": 1,
    "micro_batch_size": 1, "bf16": True, "fp16": False, "cuda_graph_impl": "none", "rl_training_cuda_graphs": False,
    "rl_use_sequence_packing": False, "padded_vocab_size": PADDED, "skip_train": False,
}  # fmt: skip


def _stub_global_vars(**options: Any) -> None:
    package, module = ModuleType("megatron.training"), ModuleType("megatron.training.global_vars")
    module.get_args = lambda: SimpleNamespace(**OPTIONS | options)  # type: ignore[attr-defined]
    module.get_tokenizer = lambda: SimpleNamespace(vocab_size=VOCAB)  # type: ignore[attr-defined]
    sys.modules |= {"megatron.training": package, "megatron.training.global_vars": module}


def run_loop(layout: Layout) -> Outcome:
    """Called on every rank."""
    from megatron_oisd.integrations.megatron_lm import TrainRL

    _stub_global_vars()
    with parallel_world(layout):
        loop, wrappers = Loop(Layout(layout.name, pp=layout.pp, packed=True, oisd=None), make_rollouts()), TrainRL()
        original = loop.train_step
        for name in ("setup_model_and_optimizer", "load_checkpoint", "train_step"):
            wrappers.wrap(loop, name)
        wrappers.config = layout.oisd
        chunks, *_ = loop.setup_model_and_optimizer()
        assert (wrappers.oisd is not None) == (layout.oisd is not None and layout.oisd.enabled)
        loop.load_checkpoint(chunks, None, None)
        losses, *_ = loop.train_step(
            loop.forward_step, loop.rows(), chunks, None, None, None, loop.schedule, iteration=0
        )
        assert loop.calls == ["setup", "load"]
        metrics = {name: float(value) for name, value in losses.items()}
        wrappers.remove()
        wrappers.remove()
        assert loop.train_step == original
        assert wrappers.oisd is None
        return Outcome(metrics.pop("loss", 0.0), metrics, pieces(loop.training.bare))


@pytest.mark.parametrize("pp", [1, 2])
def test_wrapped_loop_equals_the_reference(pp: int) -> None:
    layout = Layout("wrapped", pp=pp)
    expected, whole = reference(layout)
    outcomes = run_ranks(pp, run_loop, layout)
    found, apart = assemble([outcome.gradients for outcome in outcomes])
    assert apart == 0
    for name, gradient in whole.items():
        assert (found[name] - gradient).abs().max() < layout.tolerance * gradient.abs().max(), name
    # Only the last stage has losses, and OISD's beside them.
    assert all(not outcome.metrics for outcome in outcomes[:-1])
    for name, value in expected.metrics.items():
        assert outcomes[-1].metrics[name] == pytest.approx(value, rel=1e-5)
    assert outcomes[-1].loss == pytest.approx(expected.loss, rel=1e-5)


def test_lambda_0_wraps_nothing() -> None:
    off = Layout("off", pp=2, oisd=OISDConfig(layers=(2,), lambda_think=0.0, lambda_attn=0.0))
    outcomes = run_ranks(2, run_loop, off)
    assert all(not outcome.metrics for outcome in outcomes)


def run_graphs() -> list[str]:
    """Graphs for rollouts are on when OISD attaches, and by mistake still in the update."""
    from megatron_oisd.integrations.megatron_lm import TrainRL

    _stub_global_vars(cuda_graph_impl="local")
    layout = Layout("graphs", packed=True, oisd=None)
    with parallel_world(layout):
        loop, wrappers = Loop(layout, make_rollouts()), TrainRL()
        config = loop.training.config
        config.cuda_graph_impl = "local"
        wrappers.config = OISD_CONFIG
        for name in ("setup_model_and_optimizer", "train_step"):
            wrappers.wrap(loop, name)
        chunks, *_ = loop.setup_model_and_optimizer()
        said = [config.cuda_graph_impl]
        for graphs in ("local", "none"):
            config.cuda_graph_impl = graphs
            try:
                losses, *_ = loop.train_step(
                    loop.forward_step, loop.rows(), chunks, None, None, None, loop.schedule, iteration=0
                )
                said.append(f"{losses['oisd/js/layer_2'] > 0}")
            except OISDError as error:
                said.append(str(error))
        wrappers.remove()
        return said


def test_graphs_may_be_on_in_rollouts_only() -> None:
    ((attached, on, off),) = run_ranks(1, run_graphs)
    assert attached == "local"
    assert on.startswith("cuda_graph_impl is 'local' in an update")
    assert off == "True"


def test_arguments_come_before_those_of_the_given_provider() -> None:
    from megatron_oisd.integrations.megatron_lm import TrainRL

    def parse_args(extra_args_provider: Any = None, ignore_unknown_args: bool = False) -> argparse.Namespace:
        parser = argparse.ArgumentParser(allow_abbrev=False)
        parser.add_argument("--yaml-cfg")
        if extra_args_provider is not None:
            parser = extra_args_provider(parser)
        arguments = ["--oisd-layers", "3", "--oisd-lambda-attn", "0", *rest]
        return parser.parse_known_args(arguments)[0] if ignore_unknown_args else parser.parse_args(arguments)

    def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser.add_argument("--mine", type=int)
        return parser

    loop, module = TrainRL(), SimpleNamespace(parse_args=parse_args)
    loop.wrap(module, "parse_args")
    rest = ["--mine", "7"]
    assert module.parse_args(provider).mine == 7
    assert loop.config == OISDConfig(layers=(3,), lambda_attn=0.0)
    rest = ["--unknown"]
    assert module.parse_args(ignore_unknown_args=True).oisd_layers == [3]
    rest = ["--yaml-cfg", "model.yaml"]
    with pytest.raises(OISDError, match="--yaml-cfg replaces the command line"):
        module.parse_args()
    rest = ["--oisd-temperature", "0"]
    with pytest.raises(OISDError, match=r"temperature is 0\.0"):
        module.parse_args()
