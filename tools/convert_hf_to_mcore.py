"""Convert an HF checkpoint into a Megatron checkpoint that loads at any TP/PP layout.

python tools/convert_hf_to_mcore.py --hf Qwen3-4B --output Qwen3-4B-mcore
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from megatron_oisd.convert.hf_to_mcore import convert_hf_to_mcore
from megatron_oisd.errors import command_line


@command_line
def main(argv: list[str] | None = None) -> None:
    """Parse the command line and convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True, help="HF directory: config.json, *.safetensors, tokenizer")
    parser.add_argument("--output", type=Path, required=True, help="Megatron checkpoint directory to make")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; default: as stored"
    )
    parser.add_argument("--no-verify", action="store_true", help="do not compare the logits of both checkpoints")
    parser.add_argument("--force", action="store_true", help="replace an existing checkpoint")
    options = parser.parse_args(argv)
    comparison = convert_hf_to_mcore(
        options.hf,
        options.output,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        verify=not options.no_verify,
        force=options.force,
    )
    print(comparison or "logits were not compared (--no-verify)")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    raise SystemExit(main())
