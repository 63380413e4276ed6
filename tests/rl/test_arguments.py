"""YAML files, flags and their Megatron names: who wins, what is refused, that the recipes hold the paper's values."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_oisd.config import OISDConfig
from megatron_oisd.errors import OISDError
from megatron_oisd.rl.arguments import CONFIG_FILE, make_parser, parse_arguments, write_config
from megatron_oisd.rl.config import TrainConfig
from tests.helpers.ranks import run_ranks
from tests.helpers.training import ROOT, read_lines, run_training

CONFIGS = ROOT / "examples" / "configs"
NEEDED = ["--load", "in", "--data", "d.jsonl", "--output", "out"]

# The paper's values, written out again: layer, response tokens.
MODELS = {"qwen3_4b": (6, 8192), "qwen3_8b": (6, 8192), "octothinker_3b": (27, 3072), "octothinker_8b": (31, 3072)}
METHODS = {"grpo": (0, 0), "logit_only": (1, 0), "attention_only": (0, 0.1), "oisd": (1, 0.1)}
MEGATRON = {
    "tp": "--tensor-model-parallel-size", "pp": "--pipeline-model-parallel-size",
    "ep": "--expert-model-parallel-size", "etp": "--expert-tensor-parallel-size",
    "recompute": "--recompute-granularity", "prompts_per_step": "--grpo-prompts-per-step",
    "samples_per_prompt": "--grpo-group-size", "temperature": "--rl-default-temperature",
    "top_p": "--rl-default-top-p", "lr_warmup_steps": "--lr-warmup-iters",
    "clip_low": "--grpo-clamp-eps-lower", "clip_high": "--grpo-clamp-eps-upper", "kl_loss_coef": "--grpo-kl-beta",
    "entropy_coeff": "--grpo-entropy-term-weight", "sequence_packing": "--rl-use-sequence-packing",
    "rollout_is_threshold": "--rl-importance-sampling-truncation-coef", "wandb_name": "--wandb-exp-name",
}  # fmt: skip


def yaml_file(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_the_papers_recipes(model, method):
    files = [str(CONFIGS / f"{name}.yaml") for name in (model, method)]
    config, oisd = parse_arguments(["--config", *files, *NEEDED])
    layer, length = MODELS[model]
    assert (oisd.layers, config.max_response_tokens) == ((layer,), length)
    assert (oisd.lambda_think, oisd.lambda_attn) == METHODS[method]
    assert (config.prompts_per_step, config.samples_per_prompt, config.mini_batch_prompts) == (128, 8, 32)
    assert (config.lr, config.weight_decay, config.clip_grad, config.dual_clip) == (1e-6, 0.01, 1.0, 10.0)
    assert (config.num_steps, config.max_prompt_tokens, config.temperature, config.top_p) == (300, 1024, 1.0, 1.0)
    assert config.system_prompt == r"Please reason step by step, and put your final answer within \boxed{}."
    for data_parallel in (1, 2, 4, 8):
        config.check_data_parallel(data_parallel)


def test_every_recipe_is_one_of_these():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == MODELS.keys() | METHODS.keys()


def test_the_command_line_wins_over_the_last_file_and_that_over_the_first(tmp_path):
    first = yaml_file(tmp_path / "a.yaml", "lr: 1e-4\nclip-low: 0.1\nseed: 5\nbf16: true\noisd: {layers: [1, 2]}\n")
    second = yaml_file(tmp_path / "b.yaml", "lr: 2.0e-4\ngrpo_clamp_eps_lower: 0.3\noisd_layers: 3\nbf16: false\n")
    config, oisd = parse_arguments(["--config", first, second, *NEEDED, "--seed", "7"])
    assert (config.lr, config.clip_low, config.seed, config.bf16, oisd.layers) == (2e-4, 0.3, 7, False, (3,))
    config, oisd = parse_arguments(["--config", second, first, *NEEDED, "--no-bf16", "--oisd-layers", "4"])
    assert (config.lr, config.clip_low, config.seed, config.bf16, oisd.layers) == (1e-4, 0.1, 5, False, (4,))
    third = yaml_file(tmp_path / "c.yaml", "lr: null\n")  # back to the default
    assert parse_arguments(["--config", first, third, *NEEDED])[0].lr == 1e-6


def test_megatrons_names_are_accepted():
    parser = make_parser()
    names = {a.dest: a.option_strings for a in parser._actions}
    found = {i.name: i.metadata["megatron"] for i in dataclasses.fields(TrainConfig) if i.metadata["megatron"]}
    assert {name: "--" + other.replace("_", "-") for name, other in found.items()} == MEGATRON
    for name, other in MEGATRON.items():
        assert other in names[name]
    arguments = parser.parse_args(["--oisd-layers", "1", "--tensor-model-parallel-size", "4", "--grpo-kl-beta", "0.5"])
    assert (arguments.tp, arguments.kl_loss_coef) == (4, 0.5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("weight_dekay: 1\n", "'weight-dekay' is no flag of the trainer; did you mean 'weight-decay'?"),
        ("oisd: {layer: 6}\n", "'oisd-layer' is no flag of the trainer; did you mean 'oisd-layers'?"),
        ("config: a.yaml\n", "'config' is no flag"),
        ("lr: fast\n", "lr is 'fast': expected float"),
        ("num_steps: 1.5\n", "num-steps is 1.5: expected int"),
        ("num_steps: true\n", "num-steps is True: expected int"),
        ("bf16: 1\n", "bf16 is 1: expected true or false"),
        ("oisd_layers: [a]\n", "expected a list of int"),
        ("oisd_teacher_payload: wide\n", "expected hidden or logits or topk"),
        ("lr: [1]\n", "lr is [1]: expected float"),
        ("- lr\n", "expected keys with values, found a list"),
        ("lr: [\n", "not YAML"),
        ("lr: !!python/object/apply:os.system ['true']\n", "not YAML"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, said):
    path = yaml_file(tmp_path / "bad.yaml", text)
    with pytest.raises(OISDError) as raised:
        parse_arguments(["--config", path, *NEEDED, "--oisd-layers", "2"])
    message = str(raised.value)
    assert said in message
    assert path in message
    assert "\n" not in message


def test_files_that_cannot_be_read_and_what_the_configuration_refuses(tmp_path):
    with pytest.raises(OISDError, match="cannot be read"):
        parse_arguments(["--config", str(tmp_path / "absent.yaml"), *NEEDED])
    path = yaml_file(tmp_path / "a.yaml", "lr: -1\noisd_layers: [2]\n")
    with pytest.raises(OISDError, match=r"--lr is -1\.0"):
        parse_arguments(["--config", path, *NEEDED])
    with pytest.raises(OISDError, match="--oisd-layers"):
        parse_arguments(NEEDED)


def test_a_written_configuration_is_the_same_when_read(tmp_path):
    arguments = ["--resume", "--system-prompt", "-- é: {x}", "--dual-clip", "inf", "--no-norm-adv-by-std", "--bf16"]
    config, oisd = parse_arguments([*NEEDED, *arguments, "--oisd-layers", "2", "3", "--oisd-advantage-clip", "inf"])
    write_config(tmp_path / "run", config, oisd)
    again, oisd_again = parse_arguments(["--config", str(tmp_path / "run" / CONFIG_FILE)])
    assert again == dataclasses.replace(config, resume=False)
    assert oisd_again == oisd


def test_a_recipe_trains_in_small(workspace, tmp_path):
    """The Qwen3-4B recipe on two ranks with a tiny model: everything else is the file's."""
    files = [str(CONFIGS / f"{name}.yaml") for name in ("qwen3_4b", "oisd")]
    small = {
        "load": workspace / "mcore", "data": workspace / "train.jsonl", "output": tmp_path / "run", "num_steps": 1,
        "prompts_per_step": 4, "mini_batch_prompts": 4, "max_prompt_tokens": 128, "max_response_tokens": 12,
        "max_tokens_per_microbatch": 256, "rollout_engine": "transformers", "oisd_layers": 2, "reward": "parity",
    }  # fmt: skip
    flags = [word for name, value in small.items() for word in ("--" + name.replace("_", "-"), str(value))]
    for code, text in run_ranks(2, run_training, ["--config", *files, *flags, "--no-rollout-sleep"]):
        assert code == 0, text
    (line,) = read_lines(tmp_path / "run")
    assert line["actor/grad_norm"] > 0
    config, oisd = parse_arguments(["--config", str(tmp_path / "run" / CONFIG_FILE)])
    assert config.bf16
    assert config.pp == 2
    assert oisd == OISDConfig(layers=(2,))
