"""What the command lines of the converters have in common."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch

from megatron_oisd.convert.plan import Plan
from megatron_oisd.convert.report import MEMORY_FACTOR, Prompts, Report
from megatron_oisd.convert.safetensors_io import ShardedWriter
from megatron_oisd.errors import OISDError

_VERIFY = f"""what to compare before the output appears. tensors: every tensor, bit by bit, one in memory at a time.
logits (default): that, and the logits of both models in float32 on the CPU, for which each model is built in turn,
which takes up to {MEMORY_FACTOR * 4:.0f} bytes of memory per weight; where those are not available, a line says so
and only tensors are compared. none: nothing"""


def conversion_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of both converters."""
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; default: as stored"
    )
    parser.add_argument("--dry-run", action="store_true", help="check the input, print the plan and write nothing")
    parser.add_argument("--force", action="store_true", help="replace an existing checkpoint")
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")
    parser.add_argument("--no-verify", action="store_true", help="the same as --verify none")
    verification_options(parser)


def verification_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a comparison."""
    parser.add_argument("--verify", choices=("logits", "tensors", "none"), default="logits", help=_VERIFY)
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="compare logits on this text (repeatable); default: a sample"
    )
    parser.add_argument(
        "--token-ids", action="append", metavar="1,2,3", help="compare logits on these token ids (repeatable)"
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the report as JSON, too")


def dtype_of(options: argparse.Namespace) -> torch.dtype | None:
    """Return what --dtype names."""
    return getattr(torch, options.dtype) if options.dtype else None


def prompts_of(options: argparse.Namespace) -> Prompts | None:
    """Return all prompts, texts first; None for none."""
    prompts: list[str | list[int]] = list(options.prompt or [])
    for text in options.token_ids or []:
        try:
            prompts.append([int(part) for part in text.split(",")])
        except ValueError:
            raise OISDError(f"--token-ids is {text!r}: expected numbers with commas between them, like 1,2,3") from None
    return prompts or None


def hide_megatrons_warnings() -> None:
    """Leave out what Megatron-Core says when it is imported: which GPU packages are missing, a page long."""
    warnings.filterwarnings("ignore", module=r"megatron\.core\.")


def print_plan(plan: Plan, writer: ShardedWriter | None = None) -> None:
    """Print a plan, and that it was no more than that."""
    sys.stdout.writelines(f"{line}\n" for line in plan.lines(writer))
    print("dry run: nothing was written")


def give_report(report: Report, options: argparse.Namespace) -> None:
    """Print the report and write it to the file that was asked for."""
    print(report)
    if options.report:
        report.write(options.report)
