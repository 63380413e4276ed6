"""NeMo-Aligner's actors with OISD: two training steps of the real ones against a dense float64 reference, and what of
the adapter needs no NeMo.

The first part runs in another environment, by torchrun, because NeMo-Aligner 0.7.0 needs Megatron-Core 0.10.0:

    NEMO_ALIGNER_PATH=checkout NEMO_ALIGNER_PYTHON=environment/bin/python \\
        pytest tests/integrations/test_nemo_aligner.py

(docs/nemo_aligner.md says how to make that environment on a CPU). What it proves: the actors' own constructors,
closures, schedules and gradient reductions give the right loss and every right gradient with OISD, twice in a row with
weights that change, on one rank, PP 2, TP 2 and DP 2. What it does not: anything on a GPU, Apex's
``distributed_fused_adam``, half precision, TensorRT-LLM, the trainers around the actor.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_oisd.config import OISDConfig
from megatron_oisd.errors import OISDError
from megatron_oisd.integrations import nemo_aligner as adapter

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "nemo_aligner"
RECIPES = ("reinforce", "ppo")
CHECKOUT, PYTHON = os.environ.get("NEMO_ALIGNER_PATH", ""), os.environ.get("NEMO_ALIGNER_PYTHON", "")
needs_checkout = pytest.mark.skipif(not CHECKOUT, reason="needs NEMO_ALIGNER_PATH, a checkout of NeMo-Aligner")
needs_environment = pytest.mark.skipif(
    not (CHECKOUT and PYTHON), reason="needs NEMO_ALIGNER_PATH and NEMO_ALIGNER_PYTHON, NeMo-Aligner's environment"
)

# ------------------------------------------------------------------------------------- the real actors, where they are


def in_environment(*command: str) -> str:
    """Run a command of that environment with both packages on its path; its output."""
    paths = os.pathsep.join([CHECKOUT, str(ROOT)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [PYTHON, "-W", "ignore", *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    return result.stdout


def run_step(output: Path, layout: str, ranks: int, *options: str) -> list[Any]:
    """What each rank wrote."""
    output.mkdir()
    in_environment(
        "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "-m", "tests.helpers.nemo_aligner_step",
        "--layout", layout, "--output", str(output), *options,
    )  # fmt: skip
    return [torch.load(output / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


@needs_environment
@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", ["one", "pp2", "pp2 tied", "pp2 token", "tp2", "dp2", "pp2 mcore", "dp2 mcore overlap", "pp2 plain"]
)
def test_two_steps_of_the_actors_equal_the_dense_reference(layout: str, tmp_path: Path) -> None:
    from tests.helpers.mcore import assemble

    found = run_step(tmp_path / "found", layout, 1 if layout == "one" else 2)
    (expected,) = run_step(tmp_path / "expected", layout, 1, "--reference")
    for algorithm, reference in expected.items():
        gradients, apart = assemble([rank[algorithm]["gradients"] for rank in found])
        largest = max(gradient.abs().max().item() for gradient in reference["gradients"].values())
        assert apart / largest < 5e-5
        assert gradients.keys() == reference["gradients"].keys()
        for name, gradient in reference["gradients"].items():
            difference = (gradients[name] - gradient).abs().max() / gradient.abs().max()
            assert difference < 5e-5, f"{algorithm}: {name}"  # fp32, after a step that was taken in fp32 too
        for rank in found:
            for metrics, values in zip(rank[algorithm]["metrics"], reference["metrics"], strict=True):
                named = {name: value for name, value in values.items() if value}
                assert {name: metrics[name] for name in named} == pytest.approx(named, rel=2e-5)
            evaluated = rank[algorithm]["evaluated"]  # forward only: the policy loss as before, nothing of OISD
            assert evaluated["loss"] == pytest.approx(reference["metrics"][-1]["loss"], rel=2e-5)
            assert not any(name.startswith("oisd/") for name in evaluated)


@needs_environment
@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_entry_script_composes_both_yaml_files(recipe: str) -> None:
    """Hydra, NeMo's runner and the original's main, up to the configuration that it would start from."""
    code = (
        "import runpy, sys, types\n"
        "stub = types.ModuleType('nemo_aligner.utils.trt_llm'); stub.GPTGenerateTRTLLM = None\n"
        "sys.modules[stub.__name__] = stub\n"
        "for name in ('pytriton', 'pytriton.client', 'pytriton.model_config', 'pytriton.triton', 'pytriton.decorators',"
        " 'pytriton.exceptions', 'pytriton.client.exceptions'):\n"
        "    stub = sys.modules[name] = types.ModuleType(name)\n"
        "    stub.__file__, stub.__getattr__ = '/dev/null', lambda name: type(name, (), {})\n"
        "sys.argv[:] = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    script = str(EXAMPLE / f"train_gpt_{recipe}_actor_oisd.py")
    text = in_environment("-c", code, script, "--cfg", "job", "model.oisd.layers=[6]", "model.oisd.lambda_attn=0.2")
    config = yaml.safe_load(text[text.index("trainer:") :])
    assert config["model"]["oisd"]["layers"] == [6]
    assert config["model"]["oisd"]["lambda_attn"] == 0.2
    assert config["model"]["oisd"]["temperature"] == 1.0
    assert config["model"][recipe]["sampling_params"]["temperature"] == 1.0  # the original's
    assert config["trainer"][recipe]["gradient_clip_val"] == 1.0


# ------------------------------------------------------------------------------------- its sources, where they are


@needs_checkout
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_symbols_that_are_used_are_in_the_checkout(recipe: str) -> None:
    module, base, _ = adapter._ACTORS[adapter._RECIPES[recipe]]
    source = Path(CHECKOUT, "nemo_aligner", "models", "nlp", "gpt", f"{module}.py").read_text(encoding="utf-8")
    (actor,) = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == base]
    methods = {node.name: node for node in actor.body if isinstance(node, ast.FunctionDef)}
    for name in ("prepare_for_training", "get_actor_forward_output_and_loss_func", "finish_training_step"):
        assert [argument.arg for argument in methods[name].args.args] == ["self"]
    assert [a.arg for a in methods["get_loss_and_metrics"].args.args] == ["self", "batch", "forward_only"]
    assert [a.arg for a in methods["__init__"].args.args] == ["self", "cfg", "trainer"]
    step = ast.unparse(methods["get_loss_and_metrics"])
    assert step.index("set_sync_funcs(self") < step.index("self.get_actor_forward_output_and_loss_func()")
    assert "get_iterator_k_split(batch, get_num_microbatches())" in step
    closure = ast.unparse(methods["get_actor_forward_output_and_loss_func"])
    used = {"reinforce": ("rewards_with_kl", "baseline"), "ppo": ("advantages",)}[recipe]
    for key in (*used, "mask", "is_end", "response_tokens"):
        assert f"batch['{key}']" in closure
    assert "is_end_mask = mask * is_end.view(-1, 1)" in closure
    assert "grad_reductions(self)" in ast.unparse(methods["finish_training_step"])

    script = Path(CHECKOUT, "examples", "nlp", "gpt", f"train_gpt_{recipe}_actor.py").read_text(encoding="utf-8")
    assert f"from nemo_aligner.models.nlp.gpt.{module} import {base}" in script
    assert f"@hydra_runner(config_path='conf', config_name='gpt_{recipe}_actor')" in script.replace('"', "'")
    trainer = Path(CHECKOUT, "nemo_aligner", "algorithms", f"{recipe}.py").read_text(encoding="utf-8")
    order = ("prepare_for_training()", "zero_grad()", "get_loss_and_metrics(", "finish_training_step()", ".step()")
    places = [trainer.index(f"{call}", trainer.index("def run_training")) for call in order]
    assert places == sorted(places)


@needs_checkout
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_inherited_yaml_is_there_and_has_no_such_section(recipe: str) -> None:
    file = Path(CHECKOUT, "examples", "nlp", "gpt", "conf", f"gpt_{recipe}_actor.yaml")
    original = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert "oisd" not in original["model"]
    assert original["model"]["optim"]["overlap_grad_sync"] is False  # on, it would be refused


# ------------------------------------------------------------------------------------- without NeMo


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_yaml_inherits_and_holds_the_defaults(recipe: str) -> None:
    config = yaml.safe_load((EXAMPLE / "conf" / f"gpt_{recipe}_actor_oisd.yaml").read_text(encoding="utf-8"))
    assert config["defaults"] == [f"gpt_{recipe}_actor", "_self_"]
    assert config.keys() == {"defaults", "model"}
    assert config["model"].keys() == {"oisd"}
    section = config["model"]["oisd"]
    assert section.pop("layers") == "???"  # Hydra's mark of a value that must be given
    defaults = {item.name: item.default for item in dataclasses.fields(OISDConfig)}
    assert section == {name: defaults[name] for name in section}
    assert adapter.config_from_section({**section, "layers": [6]}) == OISDConfig(layers=(6,))


def test_sections_that_cannot_be_used_are_refused_with_the_key() -> None:
    with pytest.raises(OISDError, match=r"^model\.oisd is missing"):
        adapter.config_from_section(None)
    with pytest.raises(OISDError, match=r"^model\.oisd has the key 'lamda_think': expected one of advantage_clip"):
        adapter.config_from_section({"layers": [6], "lamda_think": 1.0})
    with pytest.raises(OISDError, match=r"^model\.oisd\.layers is not set"):
        adapter.config_from_section({"lambda_think": 1.0})
    with pytest.raises(OISDError, match="temperature is 0"):
        adapter.config_from_section({"layers": [6], "temperature": 0})


def test_a_batch_is_given_mask_and_advantages_as_long_as_its_tokens() -> None:
    mask = torch.tensor([[0.0, 1.0, 1.0], [0.0, 1.0, 0.0]])
    batch = {
        "response_tokens": torch.zeros(2, 4, dtype=torch.long), "mask": mask, "is_end": torch.tensor([False, True]),
        "rewards_with_kl": torch.tensor([1.0, 0.0]), "baseline": torch.tensor([0.25, 0.5]),
        "advantages": torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], dtype=torch.float64),
    }  # fmt: skip
    ended = adapter.response_mask(batch)
    assert ended.tolist() == [[0, 0, 0], [0, 1, 0]]
    added = adapter.add_weights(batch, adapter.reinforce_advantages(batch), ended)
    assert added["oisd_mask"].tolist() == [[0, 0, 0, 0], [0, 1, 0, 0]]
    assert added["oisd_advantages"].tolist() == [0.75, -0.5]
    added = adapter.add_weights(batch, adapter.ppo_advantages(batch), ended)
    assert added["oisd_advantages"].dtype == torch.float32
    assert added["oisd_advantages"][:, -1].tolist() == [0, 0]
    assert torch.equal(added["oisd_advantages"][:, :3], batch["advantages"].float())
    assert "oisd_mask" not in batch  # a copy


class Options(dict):  # type: ignore[type-arg]
    """A configuration node as OmegaConf's."""

    __getattr__ = dict.__getitem__


def make_actor(**changes: Any) -> Any:
    options = Options(precision="bf16", optim=Options(name="distributed_fused_adam"), **changes.pop("cfg", {}))
    options.optim.update(changes.pop("optim", {}))
    values = {"enable_autocast": False, "megatron_amp_O2": True}
    values |= {"with_distributed_adam": True, "use_mcore_dist_optim": False} | changes
    return types.SimpleNamespace(cfg=options, **values)


def test_options_without_exact_gradients_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import parallel_state

    monkeypatch.setattr(parallel_state, "get_data_parallel_world_size", lambda: 2)
    config = OISDConfig(layers=(6,))
    without_head = dataclasses.replace(config, head_gradient=False)
    adapter.check_actor(make_actor(), config)
    cases = [
        (make_actor(cfg={"context_parallel_size": 2}), r"^model\.context_parallel_size is 2: "),
        (make_actor(cfg={"mcore_customization_config": {"final_logit_softcapping": 30.0}}), "softcapping is set"),
        (make_actor(enable_autocast=True, megatron_amp_O2=False), r"^model\.megatron_amp_O2 is off"),
    ]
    for actor, words in cases:
        for each in (config, without_head):
            with pytest.raises(OISDError, match=words):
                adapter.check_actor(actor, each)
    overlapped = make_actor(optim={"overlap_grad_sync": True})
    alone = make_actor(optim={"name": "fused_adam"}, with_distributed_adam=False)
    for actor, words in ((overlapped, r"^model\.optim\.overlap_grad_sync is on"), (alone, r"is fused_adam and model")):
        with pytest.raises(OISDError, match=words):
            adapter.check_actor(actor, config)
        adapter.check_actor(actor, without_head)
    adapter.check_actor(make_actor(optim={"overlap_grad_sync": True}, use_mcore_dist_optim=True), config)
    for changes in ({"pipeline_model_parallel_size": 2}, {"sequence_parallel": True}, {"async_grad_allreduce": False}):
        options = make_actor(cfg=changes, optim={"name": "fused_adam"}, with_distributed_adam=False)
        adapter.check_actor(options, config)


class FakeActor:
    """NeMo-Aligner's protocol around a batch, for what the adapter adds to it."""

    use_mcore_dist_optim = False

    def __init__(self, cfg: Any, trainer: Any) -> None:
        self.cfg, self.calls = cfg, []

    def prepare_for_training(self) -> None:
        self.calls.append("prepare")

    def get_actor_forward_output_and_loss_func(self) -> Any:
        return lambda iterator, model: (sorted(next(iterator)), model)

    def finish_training_step(self) -> None:
        self.calls.append("reduce")


@pytest.fixture
def actors(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The adapter with stand-ins for NeMo-Aligner's two modules."""
    for name, (module, base, _) in adapter._ACTORS.items():
        parent = types.ModuleType(f"nemo_aligner.models.nlp.gpt.{module}")
        setattr(parent, base, FakeActor)
        monkeypatch.setitem(sys.modules, parent.__name__, parent)
        monkeypatch.delitem(vars(adapter), name, raising=False)
    for name in ("nemo_aligner", "nemo_aligner.models", "nemo_aligner.models.nlp", "nemo_aligner.models.nlp.gpt"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    yield adapter
    for name in adapter._ACTORS:
        vars(adapter).pop(name, None)


def test_the_classes_extend_the_actors_and_have_their_place(actors: Any) -> None:
    reinforce = actors.OISDReinforceActorModel
    assert actors.OISDReinforceActorModel is reinforce
    assert issubclass(reinforce, FakeActor)
    assert f"{reinforce.__module__}.{reinforce.__qualname__}" == f"{adapter.__name__}.OISDReinforceActorModel"
    assert actors.OISDActorModel is not reinforce
    with pytest.raises(AttributeError, match="no attribute 'OISDCritic'"):
        _ = actors.OISDCritic
    with pytest.raises(OISDError, match="layers is not set"):
        reinforce({"oisd": {}}, None)


def test_the_closure_never_shows_the_policy_loss_what_was_added(actors: Any) -> None:
    actor = actors.OISDActorModel({"oisd": {"layers": [1]}}, None)
    seen: list[Any] = []

    class Recorder:
        def microbatch(self, model: Any, **given: Any) -> Any:
            import contextlib

            seen.append((model, given))
            return contextlib.nullcontext()

        def reduce_head_gradients(self) -> None:
            actor.calls.append("lens")

        def sync(self) -> None:
            actor.calls.append("sync")

        def wrap_finalize(self) -> None:
            actor.calls.append("wrap")

    actor.oisd = Recorder()
    closure = actor.get_actor_forward_output_and_loss_func()
    batch = {"response_tokens": 1, "oisd_mask": "mask", "oisd_advantages": "weights"}
    assert closure(iter([batch]), "chunk") == (["response_tokens"], "chunk")
    assert seen == [("chunk", {"loss_mask": "mask", "advantages": "weights"})]
    assert "oisd_mask" in batch  # virtual chunks are given the same batch again
    assert closure(iter([{"response_tokens": 1}]), "chunk") == (["response_tokens"], "chunk")
    assert len(seen) == 1
    actor.finish_training_step()
    actor.prepare_for_training()
    assert actor.calls == ["wrap", "lens", "reduce", "prepare", "sync"]
    actor.use_mcore_dist_optim = True
    actor.finish_training_step()
    assert actor.calls[5:] == ["reduce"]
    assert actor._optimizer_step() is None
    actor._scheduler = {"scheduler": types.SimpleNamespace(last_epoch=7)}
    assert actor._optimizer_step() == 7


def test_the_recipe_runs_the_original_script_with_the_actor_replaced(
    actors: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "examples" / "nlp" / "gpt" / "train_gpt_ppo_actor.py"
    monkeypatch.setenv("NEMO_ALIGNER_PATH", str(tmp_path))
    with pytest.raises(OISDError, match=r"NEMO_ALIGNER_PATH is .*: expected NeMo-Aligner's folder"):
        actors.run_recipe("ppo", EXAMPLE / "conf")
    script.parent.mkdir(parents=True)
    script.write_text(
        "import sys\nfrom nemo_aligner.models.nlp.gpt.megatron_gpt_ppo_actor import MegatronGPTActorModel as actor\n"
        "print(actor.__name__, __name__, sys.argv)\n"
    )
    monkeypatch.setattr(sys, "argv", ["entry.py", "model.oisd.layers=[6]"])
    actors.run_recipe("ppo", EXAMPLE / "conf")
    options = ["--config-dir", str(EXAMPLE / "conf"), "--config-name", "gpt_ppo_actor_oisd", "model.oisd.layers=[6]"]
    assert capsys.readouterr().out == f"OISDActorModel __main__ {[str(script), *options]}\n"
    monkeypatch.setattr(sys, "argv", ["entry.py", "--config-name=mine", "--config-dir", "here"])
    actors.run_recipe("ppo", EXAMPLE / "conf")
    assert str([str(script), "--config-name=mine", "--config-dir", "here"]) in capsys.readouterr().out


def test_importing_the_adapter_imports_no_framework() -> None:
    code = (
        "import sys, megatron_oisd.integrations.nemo_aligner\n"
        "print([name for name in ('nemo', 'nemo_aligner', 'megatron.core', 'hydra') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert result.stdout == "[]\n"


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_entry_scripts_say_where_nemo_aligner_is_missing(recipe: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NEMO_ALIGNER_PATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, str(EXAMPLE / f"train_gpt_{recipe}_actor_oisd.py")], env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert re.match(r"error: NEMO_ALIGNER_PATH is '.*': expected NeMo-Aligner's folder", result.stderr)


def test_the_adapter_names_only_existing_recipes() -> None:
    for recipe in RECIPES:
        assert adapter._RECIPES[recipe] in adapter._ACTORS
        assert (EXAMPLE / f"train_gpt_{recipe}_actor_oisd.py").is_file()
    assert importlib.import_module(adapter.__name__) is adapter
