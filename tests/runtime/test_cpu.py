"""The CPU shim: CUDA calls land on the CPU, nothing stays replaced after uninstall, never active beside a GPU."""

from __future__ import annotations

import pytest
import torch

from megatron_oisd.runtime import cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the shim is for machines without CUDA")


def replaced_functions() -> dict[tuple[str, str], object]:
    """Every attribute that could be replaced, by owner and name; ``getattr`` finds what torch.Tensor inherits too."""
    from megatron.core.tensor_parallel import random as megatron_random

    owners = {
        "torch": torch, "Tensor": torch.Tensor, "Module": torch.nn.Module, "cuda": torch.cuda,
        "nvtx": torch.cuda.nvtx, "random": megatron_random,
    }  # fmt: skip
    found = {(label, name): value for label, owner in owners.items() for name, value in vars(owner).items()}
    return found | {("Tensor", name): getattr(torch.Tensor, name) for name in ("cuda", "to", "type")}


@pytest.fixture
def shim():
    assert not cpu.is_installed()
    assert cpu.install() is True
    yield
    cpu.uninstall()


def test_install_is_idempotent_and_uninstall_restores_everything():
    before = replaced_functions()
    assert cpu.install() is True
    once = replaced_functions()
    assert cpu.install() is True
    assert cpu.is_installed()
    twice = replaced_functions()
    assert all(twice[key] is value for key, value in once.items()), "the second call must not wrap the wrappers"
    changed = [key for key, value in before.items() if once[key] is not value]
    assert ("torch", "empty") in changed
    assert ("cuda", "current_device") in changed
    assert ("random", "_set_cuda_rng_state") in changed
    assert ("Tensor", "to") in changed

    cpu.uninstall()
    after = replaced_functions()
    assert not cpu.is_installed()
    assert [key for key, value in before.items() if after.get(key) is not value] == []
    cpu.uninstall()


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 0)], ids=str)
def test_cuda_devices_land_on_the_cpu(shim, device):
    made = [
        torch.empty(2, device=device), torch.zeros(2, device=device), torch.ones(2, device=device),
        torch.full((2,), 3.0, device=device), torch.arange(2, device=device), torch.tensor([1], device=device),
        torch.rand(2, device=device), torch.randn(2, device=device), torch.randint(3, (2,), device=device),
        torch.zeros_like(torch.ones(2), device=device), torch.empty_like(torch.ones(2), device=device),
    ]  # fmt: skip
    tensor = torch.ones(2)
    made += [tensor.to(device), tensor.to(device=device), tensor.to(device, torch.float64), tensor.cuda()]
    assert [value.device.type for value in made] == ["cpu"] * len(made)
    assert tensor.to(device, torch.float64).dtype is torch.float64


def test_modules_move_to_cuda_and_stay_on_the_cpu(shim):
    linear = torch.nn.Linear(2, 2)
    assert linear.cuda() is linear
    assert linear.to("cuda") is linear
    assert linear.weight.device.type == "cpu"


def test_other_devices_are_left_alone(shim):
    assert torch.empty(2, device="meta").device.type == "meta"
    assert torch.ones(2).to("meta").device.type == "meta"
    assert torch.ones(2).to(torch.float64).dtype is torch.float64
    with torch.device("meta"):
        assert torch.empty(2).device.type == "meta"


def test_cuda_queries_answer(shim):
    assert torch.empty(1, device=torch.cuda.current_device()).device.type == "cpu"
    torch.cuda.set_device(3)
    torch.cuda.synchronize()
    torch.cuda.current_stream().wait_stream(torch.cuda.Stream())
    with torch.cuda.stream(torch.cuda.Stream()):
        state = torch.cuda.get_rng_state()
    drawn = torch.rand(2)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(2), drawn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_type_answers_the_name_that_megatrons_optimizers_sort_by(shim, dtype):
    name = torch.ones(1, dtype=dtype).type()
    assert name.startswith("torch.cuda.")
    assert name.endswith("Tensor")
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    converted = torch.ones(1).type(torch.float64)
    assert converted.dtype is torch.float64


def test_it_is_never_active_where_cuda_is(monkeypatch):
    before = replaced_functions()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not cpu.is_needed()
    assert cpu.install() is False
    assert not cpu.is_installed()
    monkeypatch.undo()
    after = replaced_functions()
    assert [key for key, value in before.items() if after[key] is not value] == []


def test_transformers_still_initialises_rotary_tables(shim, tmp_path):
    """from_pretrained builds on "meta"; a shim that hides the factories from it leaves garbage in the buffers."""
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, rope_theta=10000.0,
    )  # fmt: skip
    made = Qwen3ForCausalLM(config)
    made.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(read.model.rotary_emb.inv_freq, expected)
    torch.testing.assert_close(made.model.rotary_emb.inv_freq, expected)
    for name, value in made.state_dict().items():
        assert torch.equal(read.state_dict()[name], value), name
