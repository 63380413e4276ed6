"""Faults: each ends in a clean error or in the right result, within a stated time, and never in a hang.

Why: a pipeline whose stages wait for each other turns every fault of one rank into silence on the others. A job that
hangs costs all its GPUs until somebody looks; one that goes on with something left over from a bad step trains on wrong
gradients. OISD adds messages of its own between the stages, so it must not add hangs, and the message that a person
reads in the end must be about the cause.

The ranks are real processes under Megatron's real schedules. What is not proved here: NCCL, whose watchdog aborts the
process where gloo raises; machines that vanish without closing their connections (there, only the timeout ends a rank,
as for the stopped ranks below).
"""

from __future__ import annotations

import functools
import gc
import itertools
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oisd import OISD, OISDConfig
from megatron_oisd.errors import OISDError
from megatron_oisd.rl.policy import ParallelGroups
from megatron_oisd.runtime import distributed
from tests.helpers.mcore import LENGTH, OISD_CONFIG, VOCAB, Layout, Rollouts, assemble, make_rollouts
from tests.helpers.mcore_reference import run_reference
from tests.helpers.mcore_run import Training, run_layout, start
from tests.helpers.ranks import Ending, endings, run_ranks

LIMIT_S = 40.0
"""Every rank must have ended by then, from the start of its process; mostly it takes two seconds."""
LONG_S, SHORT_S = 600.0, 8.0
"""Timeouts of process groups. Others wait for one only where a rank stops without a word: there it is the short one."""
CONNECTION_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed")
OVERLAP = (("overlap_grad_reduce", True), ("bucket_size", 4000))
PP2, PP4 = Layout("PP 2", pp=2), Layout("PP 4", pp=4, oisd=replace(OISD_CONFIG, layers=(1,)))
VPP2 = Layout("PP 2, VPP 2", pp=2, vpp=2, oisd=replace(OISD_CONFIG, layers=(1, 2, 3)))
PLAIN, DP2 = replace(PP2, oisd=None), Layout("DP 2", dp=2)
stage = dist.get_rank  # where it is asked for, every rank is a stage of its own
Gradients, Function = dict[str, Tensor], Callable[..., Any]


def attach(training: Training, config: OISDConfig = OISD_CONFIG, **arguments: Any) -> OISD:
    groups, arguments = ParallelGroups.from_megatron(), {"vocab_size": VOCAB} | arguments
    return OISD(config, training.chunks, tp_group=groups.tp, pp_group=groups.pp, dp_group=groups.dp, **arguments)


def train(training: Training, batch: Rollouts) -> Gradients:
    """One step; this rank's gradients."""
    training.forward_backward(batch)
    named = [(f"{i}.{name}", p) for i, chunk in enumerate(training.bare) for name, p in chunk.named_parameters()]
    return {name: parameter.main_grad.clone() for name, parameter in named}


def check_same(found: Gradients, expected: Gradients, when: str) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    differing = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    assert not differing, f"{when}: {differing}"


@contextmanager
def inside_step(training: Training, *, before: Any = None, after: Any = None, **counts: int) -> Iterator[None]:
    """Call something in the next steps of ``training``, before or after the schedule, or give other counts."""
    original = training.oisd.step

    @contextmanager
    def step(**given: int) -> Iterator[None]:
        with original(**given | counts):
            before and before()
            yield
            after and after()

    training.oisd.step = step
    try:
        yield
    finally:
        del training.oisd.step


def lone_forward(training: Training, batch: Rollouts) -> None:
    """The forward of a microbatch on this stage alone, outside the schedule."""
    model = training.bare[0]
    if stage() > 0:
        model.set_input_tensor(torch.ones(LENGTH, 1, model.config.hidden_size))
    training.forward_step(batch, iter([[0]]), training.chunks[0])


def _in_world(function: Function, layout: Layout, timeout_s: float, args: tuple[Any, ...]) -> Any:
    distributed.initialize(pipeline_parallel=layout.pp, virtual_pipeline=layout.vpp, timeout_s=timeout_s)
    try:
        batch = make_rollouts()
        return function(start(layout, batch), batch, *args)
    finally:
        distributed.shutdown()


def together(function: Function, layout: Layout, *args: Any) -> list[Any]:
    """``function(training, batch, *args)`` on every rank, which none may fail in."""
    return run_ranks(layout.world, _in_world, function, layout, LONG_S, args, timeout_s=LIMIT_S)


def apart(function: Function, layout: Layout, *args: Any, timeout_s: float = LONG_S, **how: Any) -> list[Ending]:
    """Likewise; how each rank ended."""
    return endings(layout.world, _in_world, function, layout, timeout_s, args, limit_s=LIMIT_S, **how)


def said(ending: Ending) -> str:
    """The last exception of a traceback."""
    lines = ending.error.splitlines()
    return next((line for line in reversed(lines) if line and not line.startswith(" ")), "")


def lost_connection(ending: Ending) -> bool:
    return "RuntimeError: " in ending.error and any(text in ending.error for text in CONNECTION_LOST)


# ---------------------------------------------------------------------------------------------------------- ranks end


@dataclass(frozen=True)
class Fault:
    """What happens to one stage, at its last layer, in the forward or backward of one microbatch."""

    action: str
    stage: int
    where: str = "forward"
    microbatch: int = 1

    def happen(self, *ignored: Any) -> None:
        if self.action == "raise":
            raise FloatingPointError(f"made up on stage {self.stage}")
        os.kill(os.getpid(), signal.SIGKILL if self.action == "kill" else signal.SIGSTOP)

    def install(self, training: Training) -> None:
        calls = itertools.count()

        def hook(module: Any, args: Any, output: Any) -> None:
            if next(calls) == self.microbatch:
                # In backward: after the gradient has arrived, before OISD's tap has received the teacher.
                self.happen() if self.where == "forward" else output[0].register_hook(self.happen)

        if self.stage == stage():
            training.bare[0].decoder.layers[-1].register_forward_hook(hook)


def _run_into(training: Training, batch: Rollouts, fault: Fault) -> None:
    training.forward_backward(batch)
    fault.install(training)
    training.forward_backward(batch)
    dist.barrier()


ONE_RANK_FAILS = {
    # The student has received its gradient and not yet its teacher: the last stage's message is under way.
    "PP 2, the student's rank killed in its backward": (PP2, Fault("kill", 0, "backward")),
    # The student's stage waits for a gradient and, behind it, for a teacher that was never sent.
    "PP 2, the last rank killed in its forward": (PP2, Fault("kill", 1)),
    "PP 4, the student's rank killed in its backward": (PP4, Fault("kill", 0, "backward")),
    "PP 4, the last rank killed in its forward": (PP4, Fault("kill", 3)),
    "PP 2, the first stage raises": (PP2, Fault("raise", 0)),
    "PP 2, the last stage raises": (PP2, Fault("raise", 1)),
    "PP 4, the first stage raises": (PP4, Fault("raise", 0)),
    "PP 4, a middle stage raises": (PP4, Fault("raise", 1)),
    "PP 4, the last stage raises": (PP4, Fault("raise", 3)),
}


@pytest.mark.parametrize(("layout", "fault"), ONE_RANK_FAILS.values(), ids=ONE_RANK_FAILS)
def test_when_one_rank_fails_all_others_end_with_an_error_by_themselves(layout, fault):
    """An out-of-memory kill or an exception in user code on one of many machines must end the job on all of them, so
    that a scheduler starts it anew from its checkpoint. The timeouts of minutes play no part here."""
    for rank, ending in enumerate(apart(_run_into, layout, fault)):
        if rank != fault.stage:
            assert lost_connection(ending), f"rank {rank}: {ending}"
        elif fault.action == "kill":
            assert ending.signal == signal.SIGKILL
        else:
            assert said(ending) == f"FloatingPointError: made up on stage {fault.stage}"


@pytest.mark.parametrize("fault", [Fault("stop", 1), Fault("stop", 0, "backward", 3)], ids=["forward", "backward"])
def test_when_one_rank_stops_the_others_time_out_as_they_were_told(fault):
    """A rank that neither answers nor dies is seen by the clock alone, and ``timeout_s`` must hold on every group that
    a stage may wait on: Megatron's (first case) and OISD's own, where the last stage waits for the lens gradients
    (second case). A group left at torch's default would hold the job for half an hour."""
    found = apart(_run_into, PP2, fault, timeout_s=SHORT_S, stopped=[fault.stage])
    assert "Timed out waiting" in found[1 - fault.stage].error, found
    assert found[fault.stage].signal == signal.SIGKILL, "it was still stopped in the end"


def test_torchrun_ends_all_ranks_when_one_is_killed(tmp_path):
    """As users start it: the launcher must see the failure, stop the rest and say so with its exit code."""
    script = tmp_path / "job.py"
    script.write_text(
        "from tests.pipeline.test_faults import LONG_S, PP2, Fault, _in_world, _run_into\n"
        "_in_world(_run_into, PP2, LONG_S, (Fault('kill', 0, 'backward'),))\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}, capture_output=True, text=True,
        timeout=2 * LIMIT_S, check=False,  # most of it is the start of Python
    )  # fmt: skip
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr, done.stderr[-3000:]


# ---------------------------------------------------------------------------------------------------------- steps


def emptied(*rows: int) -> Rollouts:
    batch = make_rollouts()
    batch.mask[list(rows)] = False
    return batch


@functools.cache
def reference_without(*rows: int) -> tuple[dict[str, float], Gradients]:
    """The dense reference of the other rollouts alone. The means count all, those without tokens as 0: so the lambdas
    are smaller in proportion."""
    whole, left = make_rollouts(), [row for row in range(4) if row not in rows]
    share = len(left) / len(whole.tokens)
    fields = {name: getattr(whole, name)[left] for name in ("tokens", "mask", "advantages", "old_log_probs")}
    weights = {name: share * getattr(OISD_CONFIG, name) for name in ("lambda_think", "lambda_attn")}
    layout, part = Layout("", oisd=replace(OISD_CONFIG, **weights)), Rollouts(**fields, lengths=[LENGTH] * len(left))
    (outcome,) = run_ranks(1, run_reference, layout, part)
    return {name: share * value for name, value in outcome.metrics.items()}, assemble([outcome.gradients])[0]


EMPTY = {
    "one, PP 2": (PP2, (1,)),
    "half of one, PP 2": (replace(PP2, micro_batch=2), (1,)),
    "one, TP 2 PP 2": (Layout("", tp=2, pp=2, sequence_parallel=True), (1,)),
    "one, PP 2 VPP 2": (replace(VPP2, oisd=OISD_CONFIG), (1,)),
    "all of a data-parallel rank": (DP2, (1, 3)),
    "all of a pipeline, overlapped reduction": (replace(PP2, dp=2, ddp=OVERLAP), (1, 3)),
}


@pytest.mark.parametrize(("layout", "rows"), EMPTY.values(), ids=EMPTY)
def test_rollouts_without_tokens_count_as_zero(layout, rows):
    """Truncated or filtered rollouts have empty masks. Such a microbatch has nothing to send, but its header travels
    and its ranks take part in every collective; one left out would hang the others or shift their messages."""
    values, whole = reference_without(*rows)
    outcomes = run_ranks(layout.world, run_layout, layout, emptied(*rows), timeout_s=LIMIT_S)
    found, difference = assemble([outcome.gradients for outcome in outcomes])
    for name, gradient in whole.items():
        assert (found[name] - gradient).abs().max() < 2e-5 * gradient.abs().max(), name
    assert difference < 2e-5 * max(gradient.abs().max() for gradient in whole.values())
    for outcome in outcomes:
        assert {name: outcome.metrics[name] for name in values} == pytest.approx(values, rel=2e-5)


def _evaluate(training: Training, batch: Rollouts, no_grad: bool) -> list[float]:
    """Megatron's schedule, forward only: what evaluation and old log-probabilities are made with."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    chunks, rows = training.chunks, [[row] for row in range(len(batch.tokens))]
    with torch.no_grad() if no_grad else nullcontext():
        store = get_forward_backward_func()(
            forward_step_func=functools.partial(training.forward_step, batch),
            data_iterator=iter(rows) if len(chunks) == 1 else [iter(rows) for _ in chunks],
            model=chunks[0] if len(chunks) == 1 else chunks, num_microbatches=len(rows), seq_length=LENGTH,
            micro_batch_size=1, forward_only=True,
        )  # fmt: skip
    return [float(value) for value in store]


def _train_and_evaluate(plain: Training, batch: Rollouts) -> None:
    expected = [train(plain, batch), train(plain, batch)]
    plain.oisd.detach()
    losses = _evaluate(plain, batch, no_grad=True)
    training = start(plain.layout, batch)
    for gradients in expected:
        assert [_evaluate(training, batch, no_grad) for no_grad in (True, False)] == [losses, losses]
        assert set(training.oisd.metrics().values()) == {0.0}, "nothing was sent, waited for or counted"
        check_same(train(training, batch), gradients, "after an evaluation")
        assert training.oisd.metrics()["oisd/transport/teacher_bytes"], "the counter counts"


@pytest.mark.parametrize("layout", [PP2, VPP2], ids=lambda layout: layout.name)
def test_forward_only_passes_send_nothing_and_leave_training_as_it_is(layout):
    """Evaluation and old log-probabilities run on the training model, between its steps, through the same schedule."""
    together(_train_and_evaluate, layout)


def _abandon(*ignored: Any) -> None:
    raise FloatingPointError("user code gave up")


def _live_through_bad_steps(training: Training, batch: Rollouts) -> None:
    expected = train(training, batch)
    # What was sent and how long it took is not compared: an abandoned step sends too.
    values = {n: v for n, v in training.oisd.metrics().items() if "transport" not in n and "timing_s/" not in n}

    def check_good_step(when: str) -> None:
        check_same(train(training, batch), expected, when)
        found = training.oisd.metrics()
        assert {name: found[name] for name in values} == values, when

    for where in ("before", "after"):
        with inside_step(training, **{where: _abandon}), pytest.raises(FloatingPointError):
            training.forward_backward(replace(batch, advantages=-batch.advantages))
        check_good_step(f"abandoned {where} the schedule")

    # A forward too many on the student's stage alone, say for logging: nobody will ever make its teacher.
    named = pytest.raises(OISDError, match=r"injected for microbatch 4 \(attn of layer 2, think of layer 2\)")
    refused: Any = nullcontext() if stage() else named
    with refused, inside_step(training, after=lambda: stage() or lone_forward(training, batch)):
        training.forward_backward(batch)
    check_good_step("a forward too many")

    for poisoned in (0, 1):  # the student and all that follows, or the teacher alone
        factors = itertools.chain([1.0, math.nan if stage() == poisoned else 1.0], itertools.repeat(1.0))
        hook = (
            training.bare[0]
            .decoder.layers[0]
            .register_forward_hook(
                lambda module, args, output, factors=factors: (output[0] * next(factors), *output[1:])
            )
        )
        train(training, batch)
        hook.remove()
        metrics = training.oisd.metrics()
        for name in ("oisd/think", "oisd/attn", "oisd/js/layer_2", "oisd/attn_js/layer_2"):
            assert math.isnan(metrics[name]), f"a clamp hid that {name} is not a number"
        check_good_step(f"not a number on stage {poisoned}")

    nothing = emptied(0, 1, 2, 3)
    with inside_step(training, num_tokens=1):
        assert not any(value.any() for value in train(training, nothing).values())
    assert not any(v for name, v in training.oisd.metrics().items() if name in values)
    with pytest.raises(OISDError, match="num_tokens is 0: expected at least 1"):
        training.forward_backward(nothing)
    check_good_step("a batch without tokens")


def test_a_good_step_after_a_bad_one_is_right():
    """Trainers skip bad batches and go on. Nothing of the bad step may enter the next one: no gradient, no metric, no
    message, no microbatch that is still waited for. One instance lives through abandoned steps, a microbatch that
    goes forward and never back (named), hidden states that are not numbers (seen in the metrics) and a batch without
    any token (no gradient; refused on every rank alike where its count of tokens is given as 0)."""
    together(_live_through_bad_steps, PP2)


def _leave_early(training: Training, batch: Rollouts) -> None:
    with training.oisd.step(num_microbatches=1, num_sequences=1, num_tokens=9):
        lone_forward(training, batch)
    dist.barrier()


def _forward_twice(training: Training, batch: Rollouts) -> None:
    once = training.forward_step

    def twice(batch: Rollouts, rows: Any, model: Any) -> Any:
        row = next(rows)
        return [once(batch, iter([row]), model) for _ in range(2 - stage())][-1]

    training.forward_step = twice
    training.forward_backward(batch)
    dist.barrier()


WRONG_LOOPS = {
    _leave_early: r"injected for microbatch 0 \(attn of layer 2, think of layer 2\)",
    _forward_twice: r"3 microbatches are between forward and backward on this stage, where Megatron's schedules",
}


@pytest.mark.parametrize(("function", "message"), WRONG_LOOPS.items(), ids=["left early", "each forward twice"])
def test_what_no_schedule_does_is_named_on_the_students_stage(function, message):
    """A loop with a bug of its own. The last stage waits for the student's and must end with it."""
    first, last = apart(function, PP2)
    assert re.search(rf"OISDError: .*{message}", said(first)), first
    assert lost_connection(last), last


def _abandon_under_way(training: Training, batch: Rollouts, cure: bool) -> None:
    expected = train(training, batch)
    with pytest.raises(FloatingPointError), training.oisd.step(num_microbatches=1, num_sequences=1, num_tokens=9):
        _abandon(lone_forward(training, batch))
    if cure:
        training.oisd.detach()
        training.oisd = attach(training)
    check_same(train(training, batch), expected, "abandoned under way")


def test_a_step_abandoned_with_a_teacher_under_way_is_refused_with_its_cure():
    """Every rank gives up after the last stage has sent and before the student's has received. The next message would
    be taken for the one left over: one rank says so and what to do, and none hangs or trains on. Doing it helps."""
    found = apart(_abandon_under_way, PP2, False)
    assert all(ending.error for ending in found), found
    assert any(
        re.search("OISDError: .* detach OISD and construct it again on every rank", said(ending)) for ending in found
    ), found
    together(_abandon_under_way, PP2, True)


# ---------------------------------------------------------------------------------------------------------- instances


def _train_two(plain: Training, batch: Rollouts) -> None:
    layouts = [PP2, replace(PP2, oisd=replace(OISD_CONFIG, layers=(1, 3), lambda_think=3.0))]
    alone = []
    for layout in layouts:
        training = start(layout, batch)
        alone.append([train(training, batch) for _ in range(2)])
        training.oisd.detach()
    assert any(not torch.equal(value, alone[1][0][name]) for name, value in alone[0][0].items()), "they differ"
    pair = [start(layout, batch) for layout in layouts]
    for number, (training, expected) in itertools.product(range(2), list(zip(pair, alone, strict=True))):
        check_same(train(training, batch), expected[number], "in turn")
    for (outer, inner), where in itertools.product(((0, 1), (1, 0)), ("before", "after")):
        nested: list[Gradients] = []
        with inside_step(pair[outer], **{where: lambda to=nested, n=inner: to.append(train(pair[n], batch))}):
            check_same(train(pair[outer], batch), alone[outer][0], f"with another's step inside, {where}")
        check_same(nested[0], alone[inner][0], f"inside another's step, {where}")
    pair[0].oisd.detach()
    check_same(train(pair[1], batch), alone[1][0], "after the other was detached")


def test_two_models_in_one_process_train_as_if_alone():
    """A policy and, say, its smaller sibling: hooks, messages, lens gradients and finalize functions are each model's
    own, in turn and where one model's step runs inside the other's."""
    together(_train_two, PLAIN)


def _resources(training: Training) -> dict[str, int]:
    gc.collect()
    module = training.chunks[0]
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    starts = {group.start_grad_sync for group in module.param_to_bucket_group.values()}
    return {
        "process groups": len(dist.distributed_c10d._world.pg_map),
        "file descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "hooks": sum(len(getattr(part, kind)) for part in module.modules() for kind in kinds),
        "finalize functions": hasattr(training.config.finalize_model_grads_func, "oisd_wraps"),
        "held buckets": sum(isinstance(start, functools.partial) for start in starts),
    }


def _attach_often(training: Training, batch: Rollouts) -> None:
    plain = train(training, batch)
    before, resident = _resources(training), []
    for number in range(100):
        oisd = attach(training)
        if number == 0:
            rises = [name for name, count in _resources(training).items() if count > before[name]]
            assert rises == [name for name in before if stage() == 1 or name != "held buckets"], "counts count"
        oisd.detach()
        if number in (19, 99):
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE"))
    assert _resources(training) == before, (_resources(training), before)
    assert resident[1] - resident[0] < 8e6, f"{resident} bytes: 80 unembeddings would be 10 MB"
    check_same(train(training, batch), plain, "plain GRPO as before")


def test_attaching_a_hundred_times_leaks_nothing():
    """A trainer that attaches anew for each phase must not run out of file descriptors in the night."""
    together(_attach_often, replace(PLAIN, ddp=OVERLAP))


DISAGREEMENTS: dict[str, Any] = {
    # Other process groups, other messages or none: these would hang.
    "layers": (3,), "lambda_think": 0.0, "lambda_attn": 0.0, "head_gradient": False, "teacher_payload": "logits",
    # The same messages with another meaning: these would train on something that nobody asked for.
    "temperature": 2.0, "seed": 1, "advantage_clip": 0.5, "advantage_weighting": "none", "attn_queries": 2,
    "chunk_tokens": 7, "vocab_size": VOCAB - 1, "microbatches_in_flight": 4,
}  # fmt: skip


def _disagree(training: Training, batch: Rollouts) -> None:
    plain = train(training, batch)
    for name, value in DISAGREEMENTS.items():
        own = {name: value} if dist.get_rank() == 1 else {}
        config = replace(OISD_CONFIG, **own) if hasattr(OISD_CONFIG, name) else OISD_CONFIG
        arguments = {} if hasattr(OISD_CONFIG, name) else own
        with pytest.raises(OISDError, match=f"^{name} is .* on rank 0 and .* on rank 1: every rank must construct"):
            attach(training, config, **arguments)
    check_same(train(training, batch), plain, "nothing was attached")


@pytest.mark.parametrize("layout", [PP2, DP2], ids=lambda layout: layout.name)
def test_ranks_with_other_configurations_are_told_the_field_at_construction(layout):
    """Ranks read flags, environment and files of their own machines, and one may be stale. Found out later it is a
    hang, or a gradient towards a mixture of two objectives."""
    together(_disagree, replace(layout, oisd=None))
