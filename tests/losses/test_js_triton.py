"""The Triton kernels against the float64 reference and the eager kernels, and which of the two is taken.

Without a GPU the kernels run in Triton's interpreter. It replaces parts of ``triton.language`` for the whole process,
so ``TestKernels`` runs in a process of its own, started by :func:`test_the_kernels_in_the_interpreter`; with a GPU it
also runs here, compiled. The interpreter proves the arithmetic, the masks and the addressing, and
:func:`test_they_compile_for_hopper` that the compiler takes them; neither proves that in-place writes are free of races
between threads, the accuracy of the GPU's own exponential, or any speed. ``test_on_a_gpu_*`` do the first two.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_oisd import losses
from megatron_oisd.losses import js, js_eager
from megatron_oisd.losses.js import HiddenTeacher, LogitsTeacher, lens_js, row_kernels, use_kernels, vocab_parallel_js
from megatron_oisd.losses.reference import jensen_shannon

TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = TRITON and os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda" if TRITON and torch.cuda.is_available() else None
needs_triton = pytest.mark.skipif(not TRITON, reason="triton is not installed")

# Relative to the largest gradient of a row: half precisions round the result once; the interpreter truncates bf16.
GRADIENT_TOLERANCE = {
    torch.float32: 5e-6, torch.bfloat16: 2.0 ** -(7 if INTERPRETED else 8), torch.float16: 2.0**-10
}  # fmt: skip
DTYPES = list(GRADIENT_TOLERANCE)


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_the_kernels_in_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"{Path(__file__).resolve()}::TestKernels"],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert "skipped" not in run.stdout


def _logits(rows, width, dtype, *, spread=3.0, seed=0, device=None):
    """Student and teacher, alike as two layers of a model are."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, width, generator=generator) * spread
    teacher = student + torch.randn(rows, width, generator=generator)
    return student.to(device or DEVICE, dtype), teacher.to(device or DEVICE, dtype)


def _scale(rows, device=None):
    return torch.linspace(-1.0, 1.5, rows, device=device or DEVICE)


def _reference(student, teacher, scale, temperature):
    leaf = student.double().requires_grad_()
    values = jensen_shannon(leaf, teacher.double(), temperature)
    (gradient,) = torch.autograd.grad((values * scale.double()).sum(), leaf)
    return values.detach(), gradient


def _check(values, gradient, student, teacher, scale, temperature, columns):
    expected, expected_gradient = _reference(student[:, :columns], teacher[:, :columns], scale, temperature)
    assert values.dtype is torch.float32
    torch.testing.assert_close(values.double(), expected, rtol=2e-6, atol=5e-7)
    error = (gradient[:, :columns].double() - expected_gradient).abs().amax(-1)
    allowed = GRADIENT_TOLERANCE[gradient.dtype] * expected_gradient.abs().amax(-1)
    assert (error <= allowed + 1e-7).all(), (error, allowed)
    assert (gradient[:, columns:] == 0).all()


def _by_hand(kernels, student, teacher, scale, temperature, cuts):
    """The loss from vocabulary shards ``cuts``, reduced as the process group would; (values, gradient)."""
    parts = list(itertools.pairwise(cuts))
    statistics = torch.stack(
        [kernels.statistics(student[:, a:b], teacher[:, a:b], columns=b - a, temperature=temperature) for a, b in parts]
    )
    lse = (statistics[:, 0] + statistics[:, 1].log()).logsumexp(0)
    kl = torch.stack(
        [
            kernels.divergences(student[:, a:b], teacher[:, a:b], lse, columns=b - a, temperature=temperature)
            for a, b in parts
        ]
    ).sum(0)
    gradient = torch.full_like(student, 7.0)
    for a, b in parts:
        kernels.gradient_(
            student[:, a:b], teacher[:, a:b], lse, kl[0], scale, columns=b - a, temperature=temperature,
            out=gradient[:, a:b],
        )  # fmt: skip
    return 0.5 * kl.sum(0), gradient


class TestKernels:
    """Compiled on the GPU, or in the interpreter's own process."""

    __test__ = DEVICE is not None

    @pytest.fixture
    def kernels(self):
        from megatron_oisd.losses import js_triton

        assert js_triton.INTERPRETED == INTERPRETED
        return js_triton

    # One block, several, a whole number of them, padded columns, a last block of one column.
    SHAPES = ((1, 1, 1, 1.0), (5, 300, 257, 0.7), (2, 9001, 9001, 1.0), (1, 16400, 16384, 1.3), (1, 8193, 8193, 1.0))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("rows", "width", "columns", "temperature"), SHAPES)
    def test_whole_rows(self, kernels, dtype, rows, width, columns, temperature):
        student, teacher = _logits(rows, width, dtype)
        student[:, columns:] = torch.nan  # Padding is never looked at.
        gradient, scale = student.clone(), _scale(rows)
        values = kernels.fused_(gradient, teacher, scale, columns=columns, temperature=temperature)
        _check(values, gradient, student, teacher, scale, temperature, columns)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("cuts", [(0, 4096, 9001), (0, 1, 9000, 9001)])
    def test_shards_combined_by_hand_equal_the_whole(self, kernels, dtype, cuts):
        student, teacher = _logits(2, 9001, dtype)
        scale = _scale(2)
        values, gradient = _by_hand(kernels, student, teacher, scale, 0.8, cuts)
        _check(values, gradient, student, teacher, scale, 0.8, 9001)

    def test_each_step_equals_the_eager_one(self, kernels):
        student, teacher = _logits(4, 130, torch.bfloat16)
        options = {"columns": 97, "temperature": 0.7}
        statistics = kernels.statistics(student, teacher, **options)
        torch.testing.assert_close(statistics, js_eager.statistics(student, teacher, **options), rtol=1e-6, atol=1e-6)
        lse = statistics[0] + statistics[1].log()
        kl = kernels.divergences(student, teacher, lse, **options)
        torch.testing.assert_close(kl, js_eager.divergences(student, teacher, lse, **options), rtol=1e-5, atol=1e-6)
        ours, theirs = student.clone(), student.clone()
        assert kernels.gradient_(ours, teacher, lse, kl[0], _scale(4), **options) is ours
        js_eager.gradient_(theirs, teacher, lse, kl[0], _scale(4), **options)
        torch.testing.assert_close(ours, theirs, rtol=2.0**-7, atol=1e-6)
        assert (ours[:, 97:] == 0).all()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_extremes(self, kernels, dtype):
        """One-hot against another, against itself, flat against one-hot, a vocabulary partly masked on either side."""
        big, none = 1e4, -math.inf
        student = torch.tensor(
            [[big, 0, -big], [-big, big, 0], [0, 0, 0], [none, 1, 2], [1, 2, none], [big, big, none]]
        )
        teacher = torch.tensor(
            [[-big, 0, big], [-big, big, 0], [big, 0, 0], [1, 2, none], [2, 1, none], [none, 0, big]]
        )
        student, teacher = student.to(DEVICE, dtype), teacher.to(DEVICE, dtype)
        scale = torch.ones(6, device=DEVICE)
        # The reference takes logarithms of 0, so it gets the limit.
        finite = [logits.double().clamp_min(-1e100) for logits in (student, teacher)]
        expected, expected_gradient = _reference(*finite, scale, 1.0)
        whole = student.clone()
        values = kernels.fused_(whole, teacher, scale, columns=3, temperature=1.0)
        # Shards pass the log-sum-exp on in fp32, which has an error of 5e-4 at 1e4, like the eager kernels'.
        by_shards, shards = _by_hand(kernels, student, teacher, scale, 1.0, (0, 2, 3))
        for ours, gradient, tolerance in ((values, whole, 1e-6), (by_shards, shards, 1e-3)):
            torch.testing.assert_close(ours.double(), expected, rtol=0.0, atol=tolerance)
            torch.testing.assert_close(gradient.double(), expected_gradient, rtol=2.0**-7, atol=tolerance)
        torch.testing.assert_close(values[:2].cpu(), torch.tensor([math.log(2.0), 0.0]), rtol=0.0, atol=1e-6)

    def test_large_logits_lose_nothing(self, kernels):
        """Whole rows: 1e4 is subtracted before the logarithm of the sum, so that differences keep their digits."""
        student, teacher = _logits(3, 50, torch.float32, spread=1.0)
        student, teacher = student + 1e4, teacher - 1e4
        gradient = student.clone()
        values = kernels.fused_(gradient, teacher, _scale(3), columns=50, temperature=1.0)
        _check(values, gradient, student, teacher, _scale(3), 1.0, 50)

    def test_equal_distributions_give_exactly_nothing(self, kernels):
        student, _ = _logits(3, 1000, torch.float32)
        gradient = student.clone()
        values = kernels.fused_(gradient, student, _scale(3), columns=1000, temperature=1.0)
        assert (values == 0).all()
        assert (gradient == 0).all()

    def test_rows_without_mass_and_nan_stay_visible(self, kernels):
        """As in the eager kernels: nan in that row's value and gradient, and in no other row."""
        student, teacher = _logits(5, 40, torch.float32)
        student[1], teacher[2], student[3, 7] = -torch.inf, -torch.inf, torch.nan
        statistics = kernels.statistics(student, teacher, columns=40, temperature=1.0)
        assert statistics[:, 0, 1].tolist() == [-math.inf, 0.0]
        assert statistics[:, 1, 2].tolist() == [-math.inf, 0.0]
        ours, theirs = student.clone(), student.clone()
        values = kernels.fused_(ours, teacher, _scale(5), columns=40, temperature=1.0)
        expected = js_eager.fused_(theirs, teacher, _scale(5), columns=40, temperature=1.0)
        assert torch.isnan(values).tolist() == [False, True, True, True, False] == torch.isnan(expected).tolist()
        torch.testing.assert_close(ours[[0, 4]], theirs[[0, 4]], rtol=1e-5, atol=1e-7)
        assert torch.isnan(ours[1:4]).all()

    @pytest.mark.parametrize(("rows", "columns"), [(0, 6), (0, 0), (2, 0)])
    def test_nothing_to_do(self, kernels, rows, columns):
        student, teacher = _logits(rows, 6, torch.float32)
        options = {"columns": columns, "temperature": 1.0}
        statistics = kernels.statistics(student, teacher, **options)
        assert statistics.shape == (2, 2, rows)
        lse = statistics[0] + statistics[1].log()
        assert kernels.divergences(student, teacher, lse, **options).tolist() == [[0.0] * rows] * 2
        assert (kernels.gradient_(student, teacher, lse, lse[0], _scale(rows), **options) == 0).all()
        if columns or not rows:
            assert kernels.fused_(student, teacher, _scale(rows), **options).shape == (rows,)

    def test_strides(self, kernels):
        """Rows apart from each other, a transposed teacher, and the expanded scalar that autograd hands over."""
        wide, teacher = _logits(4, 600, torch.float32)
        student, teacher = wide[:, 100:400], teacher[:, :300].t().contiguous().t()
        scale = torch.tensor(0.5, device=DEVICE).expand(4)
        expected_outside = wide[:, 400:].clone()
        before = student.clone()
        values = kernels.fused_(student, teacher, scale, columns=300, temperature=1.0)
        _check(values, student, before, teacher, scale, 1.0, 300)
        torch.testing.assert_close(wide[:, 400:], expected_outside, rtol=0, atol=0)
        values, gradient = _by_hand(kernels, before.t().contiguous().t(), teacher, scale, 1.0, (0, 300))
        _check(values, gradient, before, teacher, scale, 1.0, 300)

    def test_float64_goes_to_the_eager_kernels(self, kernels):
        student, teacher = _logits(2, 9, torch.float64)
        gradient = student.clone()
        values = kernels.fused_(gradient, teacher, _scale(2).double(), columns=9, temperature=1.0)
        expected, expected_gradient = _reference(student, teacher, _scale(2), 1.0)
        torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-14)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("as_hidden", [True, False])
    def test_the_lens_loss_is_the_eager_kernels_one(self, kernels, dtype, as_hidden):
        generator = torch.Generator().manual_seed(3)
        hidden, theirs = torch.randn(2, 11, 16, generator=generator).to(DEVICE, dtype)
        head = torch.randn(120, 16, generator=generator).to(DEVICE, dtype)
        teacher = HiddenTeacher(theirs) if as_hidden else LogitsTeacher(theirs @ head.t())
        results = {}
        for name in ("eager", "triton"):
            head_gradient = torch.zeros(120, 16, device=DEVICE)
            with use_kernels(name):
                loss = lens_js(
                    hidden, teacher, head, _scale(11), temperature=0.9, group=None, chunk_tokens=4, valid_columns=113,
                    head_gradient=head_gradient,
                )  # fmt: skip
            results[name] = (loss.values, loss.hidden_gradient, head_gradient)
        # Half precisions: single elements of the logits' gradient may round to the neighbour.
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 1e-2}
        for ours, expected in zip(results["triton"][1:], results["eager"][1:], strict=True):
            torch.testing.assert_close(ours, expected, **tolerance)
        torch.testing.assert_close(results["triton"][0], results["eager"][0], rtol=1e-5, atol=1e-6)

    def test_under_autograd(self, kernels):
        student, teacher = _logits(4, 70, torch.float32)
        leaf = student.clone().requires_grad_()
        with use_kernels("triton"):
            values = vocab_parallel_js(leaf, teacher, valid_columns=65)
            values.sum().backward()
        _check(values.detach(), leaf.grad, student, teacher, torch.ones(4, device=DEVICE), 1.0, 65)


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="interpreted functions are not compiled")
@pytest.mark.parametrize("name", ["_statistics", "_divergences", "_gradient", "_fused"])
def test_they_compile_for_hopper(name, monkeypatch, tmp_path):
    """As on an H200, for bf16 rows of any length that start at multiples of 16 bytes: wide loads, no spilling."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from megatron_oisd.losses import js_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    rows = torch.empty(0, dtype=torch.bfloat16)
    launch = js_triton._block_launch(151669) if name == "_gradient" else js_triton._row_launch(rows, 151669)
    block, constants, signature, attributes = launch.pop("BLOCK"), {}, {}, {}
    for position, argument in enumerate((kernel := getattr(js_triton, name)).arg_names):
        if argument == "BLOCK" or argument.endswith("_stride"):
            signature[argument], constants[argument] = "constexpr", block if argument == "BLOCK" else 1
        elif argument in ("student", "teacher", "out"):
            signature[argument] = "*bf16"
        elif argument in ("rows", "columns") or argument.endswith("_rows"):
            signature[argument] = "i32"
        else:
            signature[argument] = "fp32" if argument == "inverse_temperature" else "*fp32"
        if argument in ("student", "teacher", "out") or argument.endswith("_rows"):
            attributes[(position,)] = [["tt.divisibility", 16]]  # As Triton finds at the call.
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options=launch)
    assert "ld.global.v4" in compiled.asm["ptx"]
    if name in ("_gradient", "_fused"):
        assert "st.global.v4" in compiled.asm["ptx"]
        assert "cvt.rn.bf16" in compiled.asm["ptx"]  # Rounded to nearest, which the interpreter does not show.
    cubin, tools = tmp_path / "kernel.cubin", Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run([tools / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True)
    registers, stack = (int(part) for part in re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups())
    assert stack <= 8  # A scalar of the row, parked outside the loops.
    assert registers * 32 * launch["num_warps"] <= 65536  # Of a multiprocessor: more cannot be launched.


@pytest.mark.gpus(1)
@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "columns"), [(151936, 151669), (32001, 32001)])
def test_on_a_gpu_long_rows(dtype, width, columns):
    """More rows than multiprocessors; a padded vocabulary, and one whose rows allow no wide load."""
    from megatron_oisd.losses import js_triton

    student, teacher = _logits(300, width, dtype, device="cuda")
    assert row_kernels(student) is js_triton
    scale = _scale(300, "cuda")
    eager, gradient = student.clone(), student.clone()
    expected = js_eager.fused_(eager, teacher, scale, columns=columns, temperature=0.7)
    values = js_triton.fused_(gradient, teacher, scale, columns=columns, temperature=0.7)
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)
    rows = slice(0, 300, 13)
    _check(values[rows], gradient[rows], student[rows], teacher[rows], scale[rows], 0.7, columns)
    cut = columns // 3
    values, gradient = _by_hand(js_triton, student[:, :columns], teacher[:, :columns], scale, 0.7, (0, cut, columns))
    _check(values[rows], gradient[rows], student[rows, :columns], teacher[rows, :columns], scale[rows], 0.7, columns)


@pytest.mark.gpus(1)
@needs_triton
def test_on_a_gpu_offsets_beyond_32_bits():
    from megatron_oisd.losses import js_triton

    rows, columns = 17000, 131072
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of free GPU memory")
    student = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    teacher = torch.randn(1, columns, device="cuda", dtype=torch.bfloat16).expand(rows, columns)
    some = torch.tensor([0, 16383, 16384, 16999], device="cuda")
    before, scale = student[some], _scale(rows, "cuda")
    values = js_triton.fused_(student, teacher, scale, columns=columns, temperature=1.0)
    _check(values[some], student[some], before, teacher[some], scale[some], 1.0, columns)


@pytest.fixture
def fresh_choice():
    """The choice is made once for each device, the warning once for each message."""
    js._triton_kernels.cache_clear()
    js._warn_once.cache_clear()
    yield
    js._triton_kernels.cache_clear()
    js._warn_once.cache_clear()


def _on_gpu(dtype=torch.bfloat16):
    return SimpleNamespace(is_cuda=True, dtype=dtype, device=torch.device("cuda", 0))


def _without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "megatron_oisd.losses.js_triton", raising=False)
    monkeypatch.delattr(losses, "js_triton", raising=False)


def test_cpu_takes_the_eager_kernels_silently(fresh_choice, recwarn):
    assert row_kernels(torch.zeros(1, 1)) is js_eager
    assert not recwarn


def test_a_gpu_without_triton_warns_once(fresh_choice, monkeypatch):
    _without_triton(monkeypatch)
    with pytest.warns(UserWarning, match=r"eager kernels on cuda:0: importing triton failed.*pip install.*ten times"):
        assert row_kernels(_on_gpu()) is js_eager
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert row_kernels(_on_gpu()) is js_eager
        assert row_kernels(_on_gpu(torch.float64)) is js_eager


@needs_triton
def test_a_gpu_takes_triton_where_it_compiles_for_it(fresh_choice, monkeypatch):
    from megatron_oisd.losses import js_triton

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert row_kernels(_on_gpu()) is js_triton
    assert row_kernels(_on_gpu(torch.float64)) is js_eager
    with use_kernels("eager"):
        assert row_kernels(_on_gpu()) is js_eager


@needs_triton
def test_an_old_gpu_warns(fresh_choice, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.warns(UserWarning, match=r"compute capability 8\.0"):
        assert row_kernels(_on_gpu()) is js_eager


def test_asking_for_triton_without_it_is_an_error(fresh_choice, monkeypatch):
    _without_triton(monkeypatch)
    with use_kernels("triton"), pytest.raises(RuntimeError, match="importing triton failed"):
        row_kernels(torch.zeros(1, 1))


@needs_triton
def test_asking_for_triton_on_cpu_names_the_interpreter(fresh_choice):
    with use_kernels("triton"), pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        row_kernels(torch.zeros(1, 1))
    assert row_kernels(torch.zeros(1, 1)) is js_eager


def test_the_override_ends_and_knows_its_names():
    with pytest.raises(KeyError), use_kernels("eager"):
        raise KeyError
    assert js._kernels == "auto"
    with pytest.raises(ValueError, match="'fast'"), use_kernels("fast"):
        pass
