"""The pipeline simulation against closed forms, Megatron-Core's own tables and rules, and its command line.

It proves the arithmetic and the order of events. It does not prove that a cluster behaves like the model.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import pipeline_sim
from benchmarks.pipeline_costs import MODELS, VARIANTS, Case, Model, Settings
from benchmarks.pipeline_schedule import Pipeline, Teacher, order, simulate
from benchmarks.pipeline_splits import best_split, megatron_split, virtual_size
from megatron_oisd.pipeline.channel import in_flight
from megatron_oisd.pipeline.microbatch import Shards, _bounds

SHAPES = [(1, 1, 3), (2, 1, 2), (4, 1, 3), (4, 1, 8), (8, 1, 20), (2, 2, 4), (4, 2, 8), (4, 3, 4), (8, 4, 16)]
"""(ranks, chunks, microbatches)."""


def _equal(ranks, chunks, microbatches, forward=1.0, backward=2.0, **options):
    stages = ranks * chunks
    return Pipeline(ranks, microbatches, (forward,) * stages, (backward,) * stages, **options)


# -------------------------------------------------------------------------------------------------- the schedules


@pytest.mark.parametrize(("ranks", "chunks", "microbatches"), SHAPES)
def test_every_operation_once_and_in_order(ranks, chunks, microbatches):
    for rank in range(ranks):
        operations = order(ranks, rank, microbatches, chunks)
        assert len(operations) == len(set(operations)) == 2 * chunks * microbatches
        for kind, chunk in itertools.product("FB", range(chunks)):
            assert [n for k, c, n in operations if (k, c) == (kind, chunk)] == list(range(microbatches))


def test_order_is_megatrons():
    schedules = pytest.importorskip("megatron.core.pipeline_parallel.schedules")
    for chunks, ranks, microbatches in ((2, 4, 8), (3, 2, 6), (5, 4, 16)):
        table = schedules.get_schedule_table(microbatches, chunks, ranks)
        for rank in range(ranks):
            operations = order(ranks, rank, microbatches, chunks)
            assert [(n, c) for kind, c, n in operations if kind == "F"] == table
            assert [(n, chunks - 1 - c) for kind, c, n in operations if kind == "B"] == table
            warmup = next(i for i, (kind, _, _) in enumerate(operations) if kind == "B") - 1
            # get_pp_rank_microbatches; one forward of the steady state comes before the first backward.
            assert warmup == min(2 * (ranks - rank - 1) + (chunks - 1) * ranks, len(table) - 1)


def test_interleaving_needs_whole_groups():
    with pytest.raises(ValueError, match="microbatches is 6: expected a multiple of 4"):
        order(4, 0, 6, 2)


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 5), (2, 2), (4, 4), (4, 9), (8, 64), (16, 64)])
def test_1f1b_closed_form(ranks, microbatches):
    run = simulate(_equal(ranks, 1, microbatches))
    assert run.seconds == pytest.approx((microbatches + ranks - 1) * 3.0)
    assert run.bubble == pytest.approx((ranks - 1) / (microbatches + ranks - 1))


@pytest.mark.parametrize(
    ("ranks", "chunks", "microbatches"), [(2, 2, 4), (4, 2, 8), (4, 3, 12), (8, 4, 64), (16, 5, 64)]
)
def test_interleaved_closed_form(ranks, chunks, microbatches):
    """The bubble is (p - 1) (f + b) / v, where f and b are those of all chunks of a rank."""
    run = simulate(_equal(ranks, chunks, microbatches))
    whole = 3.0 * chunks
    assert run.seconds == pytest.approx(microbatches * whole + (ranks - 1) * whole / chunks)


@pytest.mark.parametrize("slow", range(4))
def test_one_slow_stage_dominates(slow):
    """Every microbatch passes the slow stage, which waits for the way to it and back once."""
    forward, backward = [1.0] * 4, [2.0] * 4
    forward[slow], backward[slow] = 5.0, 10.0
    run = simulate(Pipeline(4, 12, tuple(forward), tuple(backward)))
    fill = sum(forward[:slow]) + sum(backward[:slow])
    assert run.busy[slow] == pytest.approx(12 * 15.0)
    assert run.seconds >= 12 * 15.0 + fill
    assert run.seconds <= 12 * 15.0 + 3 * (3.0 + 1e-9) + fill


@pytest.mark.parametrize("blocking", [False, True])
@pytest.mark.parametrize(("ranks", "chunks", "microbatches"), SHAPES)
def test_dependencies_hold_and_nothing_deadlocks(ranks, chunks, microbatches, blocking):
    stages = ranks * chunks
    forward = tuple(1.0 + 0.3 * (stage % 3) for stage in range(stages))
    hops = tuple(0.1 + 0.05 * stage for stage in range(stages - 1)) if ranks > 1 else ()
    for at, early in itertools.product(range(stages), (False, True)):
        backward = tuple(2 * f + (1.5 if stage == at else 0.0) for stage, f in enumerate(forward))
        teacher = Teacher(at, before=0.4, transfer=0.7, early=early)
        pipe = Pipeline(ranks, microbatches, forward, backward, hops, blocking, teacher)
        run = simulate(pipe)
        span = run.spans
        assert len(span) == 2 * stages * microbatches
        for n in range(microbatches):
            for stage in range(1, stages):
                hop = hops[stage - 1] if hops else 0.0
                assert span["F", stage, n][0] >= span["F", stage - 1, n][1] + hop - 1e-12
                assert span["B", stage - 1, n][0] >= span["B", stage, n][1] + hop - 1e-12
            assert span["B", stages - 1, n][0] >= span["F", stages - 1, n][1]
            # What is left of the student's backward after its tap comes after the message.
            left = backward[at] - teacher.before
            assert span["B", at, n][1] >= span["F", stages - 1, n][1] + teacher.transfer + left - 1e-9
        for rank in range(ranks):
            mine = sorted(time for (_, stage, _), time in span.items() if stage % ranks == rank)
            assert all(before[1] <= after[0] + 1e-12 for before, after in itertools.pairwise(mine))
        assert run == simulate(pipe)  # deterministic


# ---------------------------------------------------------------------------------------------------- the teachers


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("stage", range(6))
def test_teachers_in_flight_are_bounded(stage, early):
    """Between its forward and its backward stage s has PP - s microbatches at most; their teachers are among them."""
    run = simulate(_equal(6, 1, 20, teacher=Teacher(stage, early=early)))
    assert run.tapped == 6 - stage
    assert 1 <= run.teachers <= run.tapped


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(("ranks", "chunks", "microbatches"), [*SHAPES, (4, 2, 32), (4, 5, 40), (8, 2, 64)])
def test_the_channels_limit_holds_no_send(ranks, chunks, microbatches, early):
    """A buffer is free when its student is done, and the package's bound is never less than what is not free."""
    for stage in range(ranks * chunks):
        limit = in_flight(ranks, stage % ranks, chunks, None, microbatches)
        teacher = Teacher(stage, transfer=0.5, early=early)
        run = simulate(_equal(ranks, chunks, microbatches, teacher=teacher))
        assert run.teachers <= run.tapped <= limit


@pytest.mark.parametrize(("ranks", "chunks", "microbatches"), SHAPES)
def test_a_backward_never_waits_for_its_teacher_to_be_made(ranks, chunks, microbatches):
    for stage in range(ranks * chunks):
        run = simulate(_equal(ranks, chunks, microbatches, teacher=Teacher(stage)))
        assert run.waited == run.exposed == 0
        assert run.seconds == simulate(_equal(ranks, chunks, microbatches)).seconds


def test_transfer_is_exposed_where_it_is_not_posted_early():
    slow = simulate(_equal(4, 1, 10, teacher=Teacher(0, transfer=0.5)))
    fast = simulate(_equal(4, 1, 10, teacher=Teacher(0, transfer=0.5, early=True)))
    assert slow.exposed == pytest.approx(10 * 0.5)
    assert fast.exposed == 0
    assert fast.seconds == pytest.approx(13 * 3.0)
    # One by one: a channel that cannot keep up holds back even early messages.
    crowded = simulate(_equal(4, 1, 10, teacher=Teacher(0, transfer=5.0, early=True)))
    assert crowded.seconds >= 10 * 5.0
    assert crowded.waited == 0


def test_work_of_the_lens_on_the_first_stage_adds_itself_and_no_more():
    backward = (2.5, 2.0, 2.0, 2.0)
    run = simulate(Pipeline(4, 10, (1.0,) * 4, backward, teacher=Teacher(0)))
    assert run.seconds == pytest.approx(13 * 3.0 + 10 * 0.5, abs=3 * 0.5)


# ------------------------------------------------------------------------------------------------------- the costs

TINY = Model("tiny", 8, 64, 128, 8, 4, 1000)


def _case(model=TINY, ranks=4, chunks=1, layer=2, recompute=False, **changes):
    return Case(model, ranks, chunks, layer, recompute, Settings(**{"microbatches": 8, **changes}))


def test_splits_are_megatrons():
    assert megatron_split(80, 16) == [5] * 16
    assert megatron_split(126, 8) == [15] + [16] * 6 + [15]
    assert megatron_split(126, 16, 2) == [3] + [4] * 30 + [3]
    assert (virtual_size(80, 16), virtual_size(126, 16)) == (5, 2)
    with pytest.raises(ValueError, match="77 layers on 8 virtual stages"):
        megatron_split(77, 8)


def test_owner_of_a_layer():
    case = _case(MODELS["70b"], 16, 1, 6)
    assert case.owner([5] * 16) == 1
    assert replace(case, layer=5).owner([5] * 16) == 0
    assert replace(case, layer=80).owner([5] * 16) == 15
    with pytest.raises(ValueError, match="layer is 81"):
        replace(case, layer=81).owner([5] * 16)


def test_layer_flops_are_parameters_and_half_a_square():
    model = MODELS["70b"]
    parameters = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672
    assert model.layer_flops(8192, 1) == 2 * 8192 * parameters + 2 * 8192**2 * 8192
    assert model.layers * parameters + 2 * model.vocabulary * model.hidden == pytest.approx(70.6e9, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "variant", "products"),
    [
        ({}, "student stage", 4),
        ({"head_gradient": False}, "student stage", 3),
        ({"teacher_payload": "topk"}, "student stage", 3),
        ({"teacher_payload": "logits"}, "student stage", 3),
        ({"teacher_payload": "logits", "head_gradient": False}, "student stage", 2),
        ({}, "last stage", 3),
        ({"head_gradient": False}, "last stage", 2),
    ],
)
@pytest.mark.parametrize("tokens", [1.0, 0.5])
def test_products_of_the_lens(changes, variant, products, tokens):
    case = _case(nvlink_gbs=1e30, attn_queries=0, lens_tokens=tokens, **changes)
    split, s = [2] * 4, case.settings
    flops = products * 2 * tokens * (s.sequence - s.prompt) * TINY.vocabulary * TINY.hidden
    plain, other = (case.parts(split, name) for name in ("plain", variant))
    added = sum(other["forward"] + other["backward"]) - sum(plain["forward"] + plain["backward"])
    assert added == pytest.approx(s.compute(flops))
    assert other["where"] == (0 if variant == "student stage" else 3)


def test_recomputation_repeats_layers_and_nothing_else():
    once, twice = (_case(recompute=recompute).parts([2] * 4, "student stage") for recompute in (False, True))
    assert twice["layer"] == pytest.approx(once["layer"] * 4 / 3)
    assert (twice["lens"], twice["output"]) == (once["lens"], once["output"])


def test_a_share_is_the_largest_of_the_packages():
    """The bounds of :mod:`megatron_oisd.pipeline.microbatch`, with the rows of a prompt left out."""
    for sequence, prompt, rows in ((64, 8, 1), (64, 12, 2), (64, 60, 2), (64, 0, 1)):
        s = Settings(tp=8, sequence=sequence, prompt=prompt, micro_batch=rows)
        order = torch.arange(prompt * rows, sequence * rows)  # positions in [s, b]
        bounds = _bounds(order, sequence * rows, Shards(tensor_size=8, sequence_parallel=True))
        assert bounds[-1] == s.tokens
        assert max(b - a for a, b in itertools.pairwise(bounds)) == s.share


def test_messages():
    case = _case(MODELS["70b"], 16, 1, 6)
    scores = 4 * 128 * 64 * 8

    def sent(**changes):
        return replace(case, settings=replace(case.settings, **changes)).teacher_bytes() - scores

    assert sent() == 1024 * 8192 * 2  # of 7168 rows: the first of 8 ranks has the prompt
    assert sent(shard_teacher=False) == 7168 * 8192 * 2
    assert sent(teacher_payload="topk", teacher_topk=64) == 1024 * 64 * 8
    assert sent(teacher_payload="logits") == 7168 * 128256 / 8 * 2
    split = [5] * 16
    plain, carried = (case.pipeline(split, name)[0].hops for name in ("plain", "last stage"))
    assert plain[0] == carried[0] == pytest.approx(10e-6 + 8192 * 8192 * 2 / 8 / 50e9)
    assert all(a < b for a, b in zip(plain[1:], carried[1:], strict=True))
    # The replica in bf16 and its gradient in fp32, once in a step; nothing for a student on the last rank.
    assert case.pipeline(split, "student stage")[1] == pytest.approx(20e-6 + 6 * 128256 * 8192 / 8 / 50e9)
    local, once = replace(case, layer=80).pipeline(split, "student stage")
    assert (local.teacher.transfer, once) == (0.0, 0.0)


def test_collectives_of_the_lens():
    case = _case(MODELS["70b"], 16, 1, 6, tflops=1e30)
    split, gather = [5] * 16, 7 * 1024 * 8192 * 2 / 400e9
    reduce = 2 * 7 / 8 * 7168 * 8192 * 4 / 400e9

    def lens(variant="student stage", **changes):
        return replace(case, settings=replace(case.settings, **changes)).parts(split, variant)["lens"]

    assert lens() == pytest.approx(2 * gather + reduce)
    assert lens(teacher_payload="logits") == lens("last stage") == pytest.approx(gather + reduce)
    assert lens(shard_teacher=False) == pytest.approx(gather + reduce)
    assert lens(tp=1) == pytest.approx(0)


def test_buffers_are_those_of_the_channel():
    case = _case(MODELS["70b"], 16, 1, 6, microbatches=64)
    assert [case.buffers(stage) for stage in (0, 1, 14, 15)] == [16, 15, 2, 0]
    row = case.row([5] * 16, "student stage")
    assert (row["buffers"], row["buffers_mb"]) == (15, pytest.approx(15 * case.teacher_bytes() / 1e6, rel=1e-5))


def test_on_the_last_rank_a_logits_teacher_is_the_lens_on_the_last_stage():
    """Same products, no message; only where the student's product runs and what rides in the payload differ."""
    case = _case(layer=8, teacher_payload="logits")
    mine, other = (case.parts([2] * 4, variant) for variant in ("student stage", "last stage"))
    assert mine["lens"] == other["lens"]
    assert mine["forward"][3] + mine["backward"][3] == pytest.approx(other["forward"][3] + other["backward"][3])
    assert case.seconds([2] * 4, "student stage") <= case.seconds([2] * 4, "last stage")


def test_tap_comes_after_the_layers_above_it():
    pipe, _ = _case(layer=3).pipeline([2] * 4, "student stage")
    layer = _case().parts([2] * 4, "plain")["layer_backward"]
    assert (pipe.teacher.stage, pipe.teacher.before) == (1, pytest.approx(layer))
    assert _case(layer=4).pipeline([2] * 4, "student stage")[0].teacher.before == 0


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_best_split_is_a_split_and_not_worse(chunks, variant):
    case = _case(Model("small", 16, 64, 128, 8, 4, 3000), 4, chunks, 3)
    start, best = megatron_split(16, 4, chunks), best_split(case, variant)
    assert (len(best), sum(best)) == (4 * chunks, 16)
    assert min(best) >= 0
    assert case.seconds(best, variant) <= case.seconds(start, variant)


def test_best_split_of_a_case_that_can_be_balanced_by_hand():
    """The output layer costs two layers: with 22 layers on 4 ranks every rank can have six layers' worth of work."""
    model = Model("even", 22, 64, 128, 8, 4, 1)
    layer = model.layer_flops(8192, 1)
    model = replace(model, vocabulary=round(2 * layer / (2 * 8192 * 64)))
    case = _case(model, 4, 1, 1, hop_gbs=1e30, latency_us=0.0, microbatches=32)
    assert best_split(case, "plain") == (6, 6, 6, 4)


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="teacher_payload is 'top_k'"):
        Settings(teacher_payload="top_k")
    with pytest.raises(ValueError, match="receive is 'late'"):
        Settings(receive="late")


# ------------------------------------------------------------------------------------------------ the command line


def test_command_line(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    image = tmp_path / "figure.png"
    flags = ["--model", "405b", "--pp", "2", "--microbatches", "4", "--layer", "0.5", "--recompute", "none"]
    pipeline_sim.main([*flags, "--out", str(tmp_path), "--image", str(image)])
    record, *rows = [json.loads(line) for line in (tmp_path / "pipeline-sim.jsonl").read_text().splitlines()]
    assert record["environment"]["settings"]["microbatches"] == 4
    assert {row["kind"] for row in rows} == {"megatron split", "best split", "remedy"}
    assert {row["layer"] for row in rows} == {63}
    assert all(row["ratio"] == 1 for row in rows if (row["kind"], row["variant"]) == ("megatron split", "plain"))
    assert image.read_bytes().startswith(b"\x89PNG")
    assert "| 405b | 2 | 1 | 63 |" in capsys.readouterr().out


def test_help_names_every_parameter(capsys):
    with pytest.raises(SystemExit):
        pipeline_sim.main(["--help"])
    text = capsys.readouterr().out
    assert all("--" + name.replace("_", "-") in text for name in Settings.__dataclass_fields__)


def test_committed_rows_say_what_the_code_says():
    """One case of the committed file, simulated again."""
    path = Path(pipeline_sim.__file__).parent / "results" / "pipeline-sim.jsonl"
    record, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    settings = Settings(**record["environment"]["settings"])
    case = Case(MODELS["70b"], 16, 1, 6, False, settings)
    for variant in VARIANTS:
        again = case.row([5] * 16, variant)
        wanted = {"model": "70b", "pp": 16, "chunks": 1, "layer": 6, "recompute": "none", "variant": variant}
        (row,) = [row for row in rows if row["kind"] == "megatron split" and wanted.items() <= row.items()]
        assert row["step_s"] == pytest.approx(again["step_s"], rel=1e-5)
        assert row["load_ms"] == pytest.approx(again["load_ms"], abs=2e-3)
