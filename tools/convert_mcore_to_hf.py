"""Convert a Megatron checkpoint, written at any TP/PP layout, into an HF checkpoint.

python tools/convert_mcore_to_hf.py --mcore runs/oisd/checkpoints --iteration 300 --output Qwen3-4B-OISD
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from megatron_oisd.convert.mcore_to_hf import convert_mcore_to_hf
from megatron_oisd.errors import command_line


@command_line
def main(argv: list[str] | None = None) -> None:
    """Parse the command line and convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mcore", type=Path, required=True, help="Megatron checkpoint directory, with its hf/")
    parser.add_argument("--iteration", type=int, help="which one; default: the latest")
    parser.add_argument("--output", type=Path, required=True, help="HF directory to make")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; default: as stored"
    )
    parser.add_argument("--no-verify", action="store_true", help="do not compare the logits of both checkpoints")
    parser.add_argument("--force", action="store_true", help="replace an existing checkpoint")
    options = parser.parse_args(argv)
    comparison = convert_mcore_to_hf(
        options.mcore,
        options.output,
        iteration=options.iteration,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        verify=not options.no_verify,
        force=options.force,
    )
    print(comparison or "logits were not compared (--no-verify)")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    raise SystemExit(main())
