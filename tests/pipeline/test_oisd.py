"""OISD on a real GPTModel: what it leaves alone, what it survives, what its metrics say.

That the gradients are right on every layout is proved in ``test_exactness.py``; here they are compared with those of a
fresh run, which must be bit-identical, so that nothing of a bad step, another model or a detached instance is left.
The model and the update are the trained path: DistributedDataParallel, Megatron's schedules, ``PolicyPass``.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from megatron_oisd.errors import OISDError
from megatron_oisd.pipeline.oisd import OISD
from tests.helpers.layout import Batch
from tests.helpers.one_chunk import CONFIG, FULL_RECOMPUTE, Gradients, Model, build, differing, held, microbatches_of


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
