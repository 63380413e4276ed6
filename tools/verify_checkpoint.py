"""Check that an HF checkpoint and a Megatron checkpoint hold the same model: their logits must agree in float32.

python tools/verify_checkpoint.py --hf Qwen3-4B --mcore Qwen3-4B-mcore
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_oisd.convert.checkpoint import read_arguments
from megatron_oisd.convert.verify import TOLERANCE, compare_logits, sample_token_ids
from megatron_oisd.errors import OISDError, command_line


@command_line
def main(argv: list[str] | None = None) -> None:
    """Parse the command line and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True, help="HF directory")
    parser.add_argument("--mcore", type=Path, required=True, help="Megatron checkpoint directory")
    parser.add_argument("--iteration", type=int, help="of the Megatron checkpoint; default: the latest")
    parser.add_argument("--length", type=int, default=64, help="tokens in each of two sequences (default 64)")
    options = parser.parse_args(argv)
    if options.length < 1:
        raise OISDError(f"--length is {options.length}: expected an integer of at least 1")
    token_ids = sample_token_ids(read_arguments(options.mcore), length=options.length)
    comparison = compare_logits(options.hf, options.mcore, token_ids, options.iteration)
    print(comparison)
    if not comparison.agree:
        raise OISDError(
            f"{options.hf} and {options.mcore} hold different models: expected a relative "
            f"difference of at most {TOLERANCE}"
        )


if __name__ == "__main__":
    raise SystemExit(main())
