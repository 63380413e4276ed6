"""The contract with Megatron-Core: what OISD relies on is there, in the classes and on a real model.

Run it (with the rest of ``tests/pipeline``) on another release with ``tools/check_versions.py``. That what is there
also *behaves* as expected is proved by ``test_exactness.py``.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import megatron.core
import pytest
import torch

from megatron_oisd.errors import OISDError
from megatron_oisd.pipeline import versions
from megatron_oisd.pipeline.versions import LOOP_SYMBOLS, OVERLAP_SYMBOLS, SYMBOLS, TESTED, Symbol, check_megatron
from megatron_oisd.runtime import cpu, distributed

ROOT = Path(__file__).resolve().parents[2]
ALL = (*SYMBOLS, *OVERLAP_SYMBOLS, *LOOP_SYMBOLS)


def name_of(symbol: Symbol) -> str:
    return symbol.path.rsplit(":", 1)[1]


@pytest.fixture(autouse=True)
def not_warned_yet() -> Iterator[None]:
    versions._warn_untested.cache_clear()
    yield
    versions._warn_untested.cache_clear()


# ------------------------------------------------------------------------------------------------------ the contract


@pytest.mark.parametrize("symbol", ALL, ids=name_of)
def test_the_installed_megatron_has_it(symbol: Symbol) -> None:
    assert versions.missing(symbol) is None


@pytest.fixture(scope="module")
def instances() -> Iterator[list[Any]]:
    """A small model in DDP and everything of it that the table speaks of."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.packed_seq_params import PackedSeqParams

    from megatron_oisd.runtime.model import ModelArguments, build_model, transformer_config

    shim_was_there = cpu.is_installed()
    distributed.initialize()
    arguments = ModelArguments(
        num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=2, num_query_groups=1, kv_channels=16,
        vocab_size=50, max_position_embeddings=32, rotary_base=10000.0, layernorm_epsilon=1e-6, qk_layernorm=True,
    )  # fmt: skip
    config = transformer_config(arguments)
    (model,) = build_model(arguments, config)
    ddp_config = DistributedDataParallelConfig(overlap_grad_reduce=True)
    chunk = DistributedDataParallel(config=config, ddp_config=ddp_config, module=model)
    layer = model.decoder.layers[0]
    yield [
        chunk, model, model.decoder, model.decoder.submodules, layer, layer.self_attention,
        layer.self_attention.core_attention, config, ddp_config,
        chunk.param_to_bucket_group[model.decoder.final_layernorm.weight], PackedSeqParams(),
    ]  # fmt: skip
    distributed.shutdown()
    if not shim_was_there:
        cpu.uninstall()


WITH_ATTRIBUTES = [symbol for symbol in ALL if symbol.attributes]
NOT_IN_THIS_MODEL = {"MLASelfAttention"}


@pytest.mark.parametrize("symbol", WITH_ATTRIBUTES, ids=name_of)
def test_a_real_model_has_the_attributes(symbol: Symbol, instances: list[Any]) -> None:
    module, name = symbol.path.split(":")
    found = [item for item in instances if isinstance(item, getattr(importlib.import_module(module), name))]
    assert found or name in NOT_IN_THIS_MODEL
    for item in found:
        for attribute in symbol.attributes:
            assert hasattr(item, attribute), attribute


def test_what_is_hooked_is_called_as_a_module(instances: list[Any]) -> None:
    """A host that called ``.forward`` would pass by the hooks."""
    chunk, model = instances[0], instances[1]
    layer = model.decoder.layers[1]
    seen: dict[str, Any] = {}

    def record(name: str) -> Any:
        return lambda module, args, kwargs, output: seen.update({name: (args, kwargs, output)})

    hooked = {
        "layer": layer, "attention": layer.self_attention.core_attention, "norm": model.decoder.final_layernorm,
        "head": model.output_layer,
    }  # fmt: skip
    handles = [module.register_forward_hook(record(name), with_kwargs=True) for name, module in hooked.items()]
    chunk(torch.arange(12).view(2, 6), torch.arange(6).expand(2, 6), None)
    for handle in handles:
        handle.remove()
    assert seen.keys() == hooked.keys()
    output = seen["layer"][2]
    assert (output[0] if isinstance(output, tuple) else output).shape == (6, 2, 32)
    args, kwargs, _ = seen["attention"]
    query = args[0] if args else kwargs["query"]
    key = args[1] if len(args) > 1 else kwargs["key"]
    assert (query.shape, key.shape) == ((6, 2, 2, 16), (6, 2, 1, 16))
    assert seen["norm"][2].shape == (6, 2, 32)
    logits = seen["head"][2]
    assert (logits[0] if isinstance(logits, tuple) else logits).shape == (6, 2, 128)


def test_the_table_is_not_blind() -> None:
    for wrong, words in {
        Symbol(path="megatron.core.nowhere:Thing", used_for="x"): "module megatron.core.nowhere",
        Symbol(path="megatron.core.models.gpt:GPTModle", used_for="x"): "megatron.core.models.gpt.GPTModle",
        Symbol(path="megatron.core.models.gpt:GPTModel.nothing", used_for="x"): "GPTModel.nothing",
        Symbol(path="megatron.core.models.gpt:GPTModel", used_for="x", attributes=("decodre",)): "attribute 'decodre'",
        Symbol(path="megatron.core.models.gpt:GPTModel.forward", used_for="x", parameters=("a",)): "parameter 'a'",
        Symbol(path="megatron.core.models.gpt:GPTModel.forward", used_for="x", leading=("position_ids",)): "number 1",
        Symbol(
            path="megatron.core.pipeline_parallel.schedules:forward_backward_no_pipelining", used_for="x",
            mentions=("no_such_func",),
        ): "use of 'no_such_func'",
    }.items():  # fmt: skip
        assert words in (versions.missing(wrong) or "nothing is missing"), wrong


# ------------------------------------------------------------------------------------------------------ what is said


def test_the_tested_releases_are_in_the_documentation() -> None:
    text = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| (\d+\.\d+)\.\d+ \|", text, re.MULTILINE))
    assert listed == set(TESTED)


def test_a_tested_release_passes_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron.core, "__version__", f"{TESTED[0]}.7rc1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_megatron() == f"{TESTED[0]}.7rc1"
        assert check_megatron(overlap=False) == f"{TESTED[0]}.7rc1"


@pytest.mark.parametrize("version", ["0.9.2", "0.99.0+abc", "1.15.0", "unknown"])
def test_an_unknown_release_with_everything_is_warned_of_once(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron.core, "__version__", version)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert check_megatron() == version
        check_megatron(overlap=False)
    (warning,) = [str(item.message) for item in caught if "tested releases" in str(item.message)]
    assert warning == (
        f"megatron-core {version} is not one of the tested releases ({', '.join(TESTED)}): run "
        "`make test ARGS=tests/pipeline` to check"
    )


def test_a_missing_symbol_is_named_with_version_range_and_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.transformer import spec_utils

    check_megatron()  # imports what imports the symbol, before it goes
    monkeypatch.setattr(megatron.core, "__version__", "0.99.0")
    monkeypatch.delattr(spec_utils, "build_module")
    with pytest.raises(OISDError) as caught:
        check_megatron()
    message = str(caught.value)
    assert message.startswith("megatron-core 0.99.0 has no megatron.core.transformer.spec_utils.build_module, which")
    assert f"{TESTED[0]} to {TESTED[-1]}" in message
    assert message.endswith("pip install 'megatron-core>=0.10,<0.20'")
    assert "\n" not in message


def test_bucket_groups_are_needed_only_under_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.distributed import param_and_grad_buffer

    monkeypatch.delattr(param_and_grad_buffer, "_ParamAndGradBucketGroup")
    check_megatron(overlap=False)
    with pytest.raises(OISDError, match="_ParamAndGradBucketGroup, which OISD needs for holding back"):
        check_megatron()


def test_no_megatron_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(versions.importlib, "import_module", nothing)
    with pytest.raises(OISDError, match=r"No module named 'megatron\.core'.*pip install 'megatron-core>=0\.10,<0\.20'"):
        check_megatron()


# ------------------------------------------------------------------------------------------------------ the tool


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    import sys

    spec = importlib.util.spec_from_file_location("check_versions", ROOT / "tools" / "check_versions.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "check_versions", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_tool_counts_and_fails_where_a_release_fails(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tests = tmp_path / "test_release.py"
    tests.write_text(
        "import pytest\nimport megatron.core as core\n"
        "def test_good(): pass\n"
        "def test_new(): assert core.__version__ == '9.2.0'\n"
        "@pytest.mark.skip\ndef test_skipped(): pass\n"
    )
    for release in ("9.1.0", "9.2.0"):  # stand-ins, as if installed before
        core = tmp_path / "folder" / release / "megatron" / "core"
        core.mkdir(parents=True)
        (core.parent / "__init__.py").touch()
        (core / "__init__.py").write_text(f"__version__ = {release!r}\n")
    monkeypatch.setattr(tool.platform, "python_version", lambda: "3.x")
    options = ["--folder", str(tmp_path / "folder"), "--tests", str(tests)]
    assert tool.main(["9.2.0", *options]) == 0
    assert re.search(r"\| 9\.2\.0 \| 3\.x \| 2 \| 0 \| 1 \| \d+ \|", capfd.readouterr().out)
    assert tool.main(["9.1.0", "9.2.0", *options]) == 1
    output = capfd.readouterr().out
    rows = r"\| 9\.1\.0 \| 3\.x \| 1 \| 1 \| 1 \| \d+ \|\n\| 9\.2\.0 \| 3\.x \| 2 \| 0 \| 1 \| \d+ \|$"
    assert re.search(rows, output)
    assert "test_new" in output  # pytest's own words are shown
    assert tool.main(["9.2.0", *options[:2], "--tests", str(tmp_path / "no_such_tests.py")]) == 1
    assert "pytest's exit code 4" in capfd.readouterr().out


def test_the_tool_refuses_a_release_that_cannot_be_had(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tool.subprocess, "run", lambda *args, **kwargs: SimpleNamespace(returncode=1))
    assert tool.main(["0.0.1", "--folder", str(tmp_path)]) == 2
    assert "error: megatron-core==0.0.1 cannot be installed" in capfd.readouterr().err
    assert not (tmp_path / "0.0.1").exists()


def test_the_tool_notices_that_another_release_is_imported(tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "megatron" / "core").mkdir(parents=True)  # empty: the environment's own is found instead
    with pytest.raises(OISDError, match="cannot be imported"):
        tool.imported(tmp_path)
