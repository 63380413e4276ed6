"""Megatron-LM's ``train_rl.py`` with OISD.

The first part needs nothing. The second reads the sources of the checkout that MEGATRON_LM_PATH names: what is wrapped
is still there and still called so. The third runs that checkout on a CPU: the update on several layouts against a dense
float64 reference, and the whole program, from its command line to its checkpoints, with made-up rollouts.

Not proved: anything on a GPU, Transformer Engine's attention, rollouts by Megatron's engine with OISD attached.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_oisd.errors import OISDError
from megatron_oisd.integrations.megatron_lm import (
    CHECKOUT,
    PACKED_BATCH,
    ROW_BATCH,
    SYMBOLS,
    Batch,
    check_arguments,
    find_checkout,
    read_batch,
)
from tests.helpers.mcore import OISD_CONFIG, Layout, assemble
from tests.helpers.megatron_lm import (
    MODEL,
    ON_CPU,
    TRAINING,
    call,
    checkout,
    make_tokenizer,
    needs_checkout,
    run_script,
    why_not_run,
)
from tests.helpers.megatron_lm_cases import Case, run_cases, run_reference
from tests.helpers.ranks import run_ranks
from tests.helpers.training import load_script

# ------------------------------------------------------------------------------------------------ without Megatron-LM


def _raw(length: int = 6, rows: int = 1) -> tuple[Any, ...]:
    mask = torch.tensor([[1.0, 0, 0, 1, 1, 0]]).expand(rows, -1)  # the first column speaks of no prediction
    zeros = torch.zeros(rows, length - 1)
    positions = torch.arange(length).expand(rows, -1)
    return (positions, torch.full((rows,), -0.5, dtype=torch.bfloat16), zeros, mask, positions, zeros, zeros)


def test_rows_are_read_as_one_packed_sequence() -> None:
    raw = _raw()
    batch = read_batch(raw, packed=False)
    assert batch.raw is raw
    assert batch.mask.tolist() == [[False, False, True, True, False, False]]
    assert batch.advantages.tolist() == [-0.5]
    assert batch.borders == [0, 6]
    assert (batch.num_tokens, batch.num_sequences) == (2, 1)
    assert batch.packed_seq_params.qkv_format == "thd"
    assert batch.packed_seq_params.cu_seqlens_q.tolist() == [0, 6]


def test_empty_bins_and_padding_are_no_sequences() -> None:
    """Megatron-LM counts an empty bin as one token; a sequence without a response is no rollout."""
    mask = torch.zeros(1, 10, dtype=torch.bool)
    batch = Batch(None, mask, torch.zeros(0), [0, 10, 10])
    assert (batch.num_tokens, batch.num_sequences) == (1, 0)
    mask = torch.tensor([[0, 1, 1, 0, 0, 0, 1, 0, 0, 0]], dtype=torch.bool)
    batch = Batch(None, mask, torch.ones(3), [0, 4, 6, 9, 10, 10])
    assert (batch.num_tokens, batch.num_sequences) == (3, 2)


def test_other_batches_are_refused() -> None:
    with pytest.raises(OISDError, match="batch has 6 parts: expected tokens, advantages"):
        read_batch(_raw()[:6], packed=False)
    with pytest.raises(OISDError, match="2 sequences: expected 1"):
        read_batch(_raw(rows=2), packed=False)


GOOD = {
    "perform_rl_step": True, "virtual_pipeline_model_parallel_size": None, "context_parallel_size": 1,
    "micro_batch_size": 1, "bf16": True, "fp16": False, "cuda_graph_impl": "local", "rl_training_cuda_graphs": False,
    "use_megatron_fsdp": False, "use_torch_fsdp2": False,
}  # fmt: skip


def test_good_arguments_pass() -> None:
    check_arguments(SimpleNamespace(**GOOD))
    check_arguments(SimpleNamespace(**GOOD | {"cuda_graph_impl": "none", "rl_training_cuda_graphs": True}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"perform_rl_step": False}, "--perform-rl-step is not set"),
        ({"virtual_pipeline_model_parallel_size": 2}, "virtual_pipeline_model_parallel_size=2"),
        ({"context_parallel_size": 2}, "--context-parallel-size is 2"),
        ({"micro_batch_size": 4}, "--micro-batch-size is 4"),
        ({"bf16": False}, "add --bf16"),
        ({"rl_training_cuda_graphs": True}, "without --rl-training-cuda-graphs"),
        ({"cuda_graph_impl": "transformer_engine"}, "--cuda-graph-impl transformer_engine"),
        ({"cuda_graph_impl": "full_iteration"}, "--cuda-graph-impl full_iteration"),
        ({"use_megatron_fsdp": True}, "--use-megatron-fsdp"),
        ({"use_torch_fsdp2": True}, "--use-torch-fsdp2"),
    ],
)
def test_what_cannot_be_combined_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(OISDError, match=re.escape(words)):
        check_arguments(SimpleNamespace(**GOOD | change))


def test_a_missing_checkout_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    launcher = load_script("examples/megatron_lm/train_rl_oisd.py")
    monkeypatch.delenv(CHECKOUT, raising=False)
    with pytest.raises(OISDError, match=f"{CHECKOUT} is not set"):
        find_checkout()
    assert launcher.main([]) == 2
    assert capsys.readouterr().err.startswith(f"error: {CHECKOUT} is not set: set it to a checkout")
    monkeypatch.setenv(CHECKOUT, str(tmp_path))
    with pytest.raises(OISDError, match=r"where no train_rl\.py is"):
        find_checkout()


# ------------------------------------------------------------------------------------------------ the sources


@cache
def _tree(module: str) -> ast.Module:
    path = checkout()
    assert path is not None
    file = path / (module.replace(".", "/") + ".py")
    return ast.parse((file if file.is_file() else file.with_suffix("") / "__init__.py").read_text(encoding="utf-8"))


def _find(module: str, name: str) -> Any:
    """The definition that the module has under this name, of its own or imported."""
    for node in _tree(module).body:
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            parents = module.split(".")[: -node.level] if node.level else []
            return _find(".".join([*parents, *filter(None, [node.module])]), name)
    found = [node for node in _tree(module).body if getattr(node, "name", None) == name]
    assert len(found) == 1, f"{module} has {len(found)} definitions of {name}"
    return found[0]


def _calls(node: ast.AST, name: str) -> list[ast.Call]:
    return [
        call
        for call in ast.walk(node)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == name
    ]


@needs_checkout
@pytest.mark.parametrize("symbol", SYMBOLS, ids=lambda symbol: symbol.path.rpartition(":")[2])
def test_symbols_are_in_the_sources(symbol: Any) -> None:
    module, _, name = symbol.path.partition(":")
    node = _find(module, name)
    if isinstance(node, ast.FunctionDef):
        names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        assert tuple(names[: len(symbol.leading)]) == symbol.leading
        assert set(symbol.parameters) <= set(names)
    attributes = {
        item.target.id
        for item in ast.walk(node)
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }
    attributes |= {item.attr for item in ast.walk(node) if isinstance(item, ast.Attribute)}
    assert set(symbol.attributes) <= attributes


@needs_checkout
def test_what_is_wrapped_is_called_by_its_name() -> None:
    """A function that calls another by its module's global name calls our wrapper."""
    training = "megatron.training.training"
    assert len(_calls(_find(training, "pretrain"), "setup_model_and_optimizer")) == 1
    (step,) = _calls(_find(training, "train"), "train_step")
    given = [ast.unparse(argument) for argument in step.args]
    assert given[:3] == ["forward_step_func", "train_data_iterator", "model"]
    assert given[6] == "forward_backward_func"
    assert step.keywords[0].arg == "iteration"
    assert len(_calls(_find(training, "train"), "load_checkpoint")) == 2  # the reference policy's weights and the run's
    assert len(_calls(_find(training, "setup_model_and_optimizer"), "load_checkpoint")) == 1
    callers = [name for name in ("arguments", "initialize") if _calls(_tree(f"megatron.training.{name}"), "parse_args")]
    assert callers, "nobody calls parse_args by this name"


@needs_checkout
def test_train_step_hands_over_keywords_and_returns_losses_first() -> None:
    node = _find("megatron.training.training", "train_step")
    (schedule,) = _calls(node, "forward_backward_func")
    assert not schedule.args
    assert {keyword.arg for keyword in schedule.keywords} >= {
        *("forward_step_func", "data_iterator", "model", "num_microbatches", "forward_only"),
    }
    returned = [item.value.elts[0] for item in ast.walk(node) if isinstance(item, ast.Return)]  # type: ignore[union-attr]
    assert {ast.unparse(first) for first in returned} == {"loss_reduced", "{}"}


@needs_checkout
def test_the_batch_is_what_we_read() -> None:
    forward_step = _find("train_rl", "forward_step")
    assert [argument.arg for argument in forward_step.args.args[:2]] == ["data_iterator", "model"]
    unpacked = {
        ast.unparse(item.value).partition("(")[0]: tuple(ast.unparse(name) for name in item.targets[0].elts)
        for item in ast.walk(forward_step)
        if isinstance(item, ast.Assign) and isinstance(item.targets[0], ast.Tuple) and len(item.targets[0].elts) > 6
    }
    assert unpacked == {"batch_data": ROW_BATCH, "load_packed_data_by_index": PACKED_BATCH}
    (load,) = _calls(forward_step, "load_packed_data_by_index")
    assert [ast.unparse(argument) for argument in load.args[:2]] == [
        "bin_tensor.item()",
        "runtime_state.packing_context",
    ]
    assert len(_calls(forward_step, "next")) == 1
    text = ast.unparse(forward_step)
    assert "loss_mask[:, 1:]" in text
    assert "bin_tensor = batch_data[0]" in text
    returned = [
        item.value for item in ast.walk(_find("megatron.rl.sequence_packing_utils", "load_packed_data_by_index"))
        if isinstance(item, ast.Return)
    ]  # fmt: skip
    assert [tuple(ast.unparse(name) for name in value.elts) for value in returned] == [PACKED_BATCH]  # type: ignore[union-attr]


@needs_checkout
def test_graphs_are_off_in_updates() -> None:
    """CUDA graphs for rollouts are accepted because they are switched off before each update."""
    text = ast.unparse(_find("megatron.rl.rl_utils", "prepare_data_for_update"))
    assert re.search(
        r"if args\.cuda_graph_impl != 'none' and \(?not args\.rl_training_cuda_graphs\)?:.*?"
        r"toggle_cuda_graphs\(lang_module, 'none'", text, re.DOTALL,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ on a CPU

can_run = pytest.mark.skipif("bool(why_not_run())", reason="see why_not_run()")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    if why_not_run():
        pytest.skip(why_not_run())
    folder = make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder)]


# Megatron-LM's own recomputation of two layers at once, the student in the middle of a chunk.
RECOMPUTE = (("recompute_granularity", "full"), ("recompute_method", "uniform"), ("recompute_num_layers", 4))
TOKEN_MEAN = replace(OISD_CONFIG, aggregation="token")
LOGITS = replace(OISD_CONFIG, teacher_payload="logits")

GROUPS: dict[str, list[Case]] = {
    "one process": [
        Case(Layout("rows")),
        Case(Layout("packed", packed=True)),
        Case(Layout("all terms", packed=True), kl_beta=0.05, entropy_weight=0.1, correction=True),
        Case(Layout("mean loss", per_token_loss=False)),
        Case(Layout("token mean", packed=True, oisd=TOKEN_MEAN)),
        Case(Layout("recompute", packed=True, config=RECOMPUTE)),
        Case(Layout("lambda 0", packed=True, oisd=replace(OISD_CONFIG, lambda_think=0.0, lambda_attn=0.0))),
    ],
    "pipeline 2": [
        Case(Layout("rows", pp=2)),
        Case(Layout("packed", pp=2, packed=True)),
        Case(Layout("all terms", pp=2), kl_beta=0.05, entropy_weight=0.1, correction=True),
        Case(Layout("tied", pp=2, packed=True, tied=True)),
        Case(Layout("mean loss", pp=2, per_token_loss=False)),
        Case(Layout("recompute", pp=2, packed=True, config=(*RECOMPUTE[:2], ("recompute_num_layers", 2)))),
    ],
    "tensor 2": [
        Case(Layout("rows", tp=2)),
        Case(Layout("packed", tp=2, packed=True)),
        Case(Layout("sequence parallel", tp=2, packed=True, sequence_parallel=True)),
        # train_rl.py gathers the logits over the tensor-parallel ranks.
        Case(Layout("logits payload", tp=2, packed=True, oisd=LOGITS)),
    ],
    "data 2": [
        Case(Layout("rows", dp=2)),
        Case(Layout("packed", dp=2, packed=True), empty_bins=1),
        Case(Layout("overlap", dp=2, packed=True, ddp=(("overlap_grad_reduce", True),)), empty_bins=1),
    ],
    "tensor 2 pipeline 2": [
        Case(Layout("packed", tp=2, pp=2, packed=True, sequence_parallel=True)),
    ],
}  # fmt: skip


@can_run
@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_updates_equal_the_reference(group: str, tokenizer: list[str], tmp_path: Path) -> None:
    """Loss and every gradient of ``train_step`` with OISD; all cases of a group in one start of Megatron-LM."""
    cases = GROUPS[group]
    layout = cases[0].layout
    arguments = [*MODEL, *ON_CPU, *TRAINING, *tokenizer, "--oisd-layers", "2"]
    arguments += ["--tensor-model-parallel-size", str(layout.tp), "--pipeline-model-parallel-size", str(layout.pp)]
    arguments += ["--grpo-clamp-eps-lower", "0.2", "--grpo-clamp-eps-upper", "0.2"]
    ranks = call(layout.world, tmp_path, run_cases, arguments, cases)
    for number, case in enumerate(cases):
        outcomes = [rank[number] for rank in ranks]
        expected, whole = _reference(case)
        found, apart = assemble([outcome.gradients for outcome in outcomes])
        assert found.keys() == whole.keys()
        for name, gradient in whole.items():
            error = (found[name] - gradient).abs().max() / gradient.abs().max().clamp_min(1e-12)
            assert error < 1e-5, f"{case.layout.name}: {name} differs by {error}"
        assert apart < 1e-7, case.layout.name
        last = outcomes[-1]
        assert last.loss == pytest.approx(expected.loss, rel=1e-5), case.layout.name
        for name, value in expected.metrics.items():
            if value:
                assert last.metrics[name] == pytest.approx(value, rel=1e-5), f"{case.layout.name}: {name}"
        assert all(outcome.extra["silent"] for outcome in outcomes), case.layout.name


_known: dict[Any, Any] = {}


def _reference(case: Case) -> Any:
    if case.key not in _known:
        (outcome,) = run_ranks(1, run_reference, case)
        _known[case.key] = outcome, assemble([outcome.gradients])[0]
    return _known[case.key]


# ------------------------------------------------------------------------------------------------ the whole program

PIPELINE = ["--pipeline-model-parallel-size", "2", "--rl-use-sequence-packing", "--save-interval", "3"]
OISD = ["--oisd-layers", "2", "--oisd-lambda-think", "20", "--oisd-lambda-attn", "20"]


@dataclass(frozen=True)
class Run:
    """What a run of the program left."""

    folder: Path
    lines: list[dict[str, str]]
    """The console's line of each update, by what it names; without what depends on the clock."""

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything of tensors in its checkpoint, optimizer state included."""
        return read_tensors(next((self.folder / "checkpoints").glob("iter_*")))


@pytest.fixture(scope="module")
def program(tokenizer: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Run the program; each command once."""
    known: dict[tuple[str, ...], Run] = {}

    def run(mode: str, *arguments: str, world: int = 2) -> Run:
        if (mode, *arguments) not in known:
            folder = tmp_path_factory.mktemp("run")
            own = ["--save", str(folder / "checkpoints"), "--tensorboard-dir", str(folder / "tensorboard")]
            code, log = run_script(
                world, [mode, *MODEL, *ON_CPU, *TRAINING, *tokenizer, *own, *arguments], folder / "log"
            )
            assert code == 0, log[-6000:]
            known[mode, *arguments] = Run(folder, read_lines(log))
        return known[mode, *arguments]

    return run


def read_lines(log: str) -> list[dict[str, str]]:
    """Megatron-LM's console lines."""
    lines = []
    for line in re.findall(r"iteration +\d+/ +\d+ \|(.*)", log):
        parts = (part.partition(":") for part in line.split(" | "))
        values = {name.strip(" |"): value.strip(" |") for name, _, value in parts}
        lines.append({n: v for n, v in values.items() if "time" not in n and "toks" not in n and "oisd_wait" not in n})
    return lines


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    stored = checkpoint.FileSystemReader(directory).read_metadata().state_dict_metadata
    state = {
        name: torch.full(entry.size, torch.nan, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    checkpoint.load(state, checkpoint_id=directory, no_dist=True)
    return state


@can_run
@pytest.mark.slow
def test_lambda_0_is_train_rl(program: Callable[..., Run]) -> None:
    """Three updates: the console's numbers and every tensor of the checkpoint, bit for bit."""
    plain = program("plain", *PIPELINE)
    off = program("oisd", *PIPELINE, "--oisd-layers", "2", "--oisd-lambda-think", "0", "--oisd-lambda-attn", "0")
    assert len(plain.lines) == 3
    assert off.lines == plain.lines
    expected, found = plain.tensors, off.tensors
    assert any("exp_avg_sq" in name for name in expected)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@can_run
@pytest.mark.slow
def test_train_rl_with_oisd(program: Callable[..., Run]) -> None:
    plain, oisd = program("plain", *PIPELINE), program("oisd", *PIPELINE, *OISD)
    assert len(oisd.lines) == 3
    for line in oisd.lines:
        assert 0 < float(line["oisd/js/layer_2"]) < math.log(2)
        assert 0 < float(line["oisd/attn_js/layer_2"]) < math.log(2)
    # The same rollouts and weights at first: what the first update starts from is the same, its gradient is not.
    assert oisd.lines[0]["rl/entropy_term"] == plain.lines[0]["rl/entropy_term"]
    assert oisd.lines[0]["grad norm"] != plain.lines[0]["grad norm"]
    expected, found = plain.tensors, oisd.tensors
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in expected.items()}
    assert not torch.equal(
        found["decoder.layers.mlp.linear_fc2.weight"], expected["decoder.layers.mlp.linear_fc2.weight"]
    )
    assert all(tensor.isfinite().all() for tensor in found.values() if tensor.is_floating_point())


@can_run
@pytest.mark.slow
def test_metrics_are_where_megatron_lm_writes_its_own(program: Callable[..., Run]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = program("oisd", *PIPELINE, *OISD)
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    for name in (
        *("oisd/think", "oisd/attn", "oisd/js/layer_2", "oisd/attn_js/layer_2", "oisd/think_weight/layer_2"),
        *("oisd/transport/teacher_bytes", "timing_s/oisd_wait", "oisd/js/layer_2 vs samples", "rl/kl_term"),
    ):
        values = events.Scalars(name)
        assert len(values) == 3, name
        assert all(math.isfinite(value.value) for value in values), name
    assert [value.step for value in events.Scalars("oisd/js/layer_2")] == [1, 2, 3]


@can_run
@pytest.mark.slow
def test_layouts_train_alike(program: Callable[..., Run]) -> None:
    """In bf16, with rollouts packed or not: one process against two stages."""
    two = program("oisd", *PIPELINE, *OISD)
    one = program("oisd", *OISD, world=1)
    for index, tolerance in ((0, 1e-3), (2, 0.05)):  # later updates start from weights rounded to bf16 each time
        for name in ("oisd/js/layer_2", "oisd/attn_js/layer_2", "grad norm"):
            assert float(two.lines[index][name]) == pytest.approx(float(one.lines[index][name]), rel=tolerance), name


@can_run
@pytest.mark.slow
def test_a_run_goes_on_with_and_without_oisd(program: Callable[..., Run]) -> None:
    """Its checkpoint is one of train_rl.py, which reads it, optimizer and all."""
    first = program("oisd", *PIPELINE, *OISD)
    further = [*PIPELINE, "--load", str(first.folder / "checkpoints"), "--train-iters", "6"]
    for mode, arguments in (("oisd", OISD), ("plain", [])):
        lines = program(mode, *further, *arguments).lines
        assert len(lines) == 3
        assert lines[0]["consumed samples"] == "32"
        assert ("oisd/js/layer_2" in lines[0]) == (mode == "oisd")


@can_run
@pytest.mark.slow
def test_the_distributed_optimizer_with_overlap(program: Callable[..., Run]) -> None:
    overlap = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
    apart, together = (program("oisd", *OISD, "--rl-use-sequence-packing", *more) for more in ([], overlap))
    for one, other in zip(apart.lines, together.lines, strict=True):
        for name in ("oisd/js/layer_2", "oisd/attn_js/layer_2", "grad norm"):
            assert float(other[name]) == pytest.approx(float(one[name]), rel=1e-3), name


@can_run
@pytest.mark.slow
def test_a_refusal_is_one_line(tokenizer: list[str], tmp_path: Path) -> None:
    arguments = [*MODEL, *ON_CPU, *TRAINING, *tokenizer, *OISD, "--micro-batch-size", "2"]
    code, log = run_script(1, ["oisd", *arguments], tmp_path / "log")
    assert code != 0
    assert "error: --micro-batch-size is 2: train_rl.py gives the model packed sequences in one row" in log
    assert "OISDError" not in log.partition("error: --micro")[0]
