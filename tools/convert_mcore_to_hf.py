"""Convert a Megatron checkpoint, written at any TP/PP layout, into an HF checkpoint.

python tools/convert_mcore_to_hf.py --mcore runs/oisd/checkpoints --iteration 300 --output Qwen3-4B-OISD
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_oisd.convert import command_line as common
from megatron_oisd.convert.mcore_to_hf import convert_mcore_to_hf, plan_mcore_to_hf
from megatron_oisd.errors import command_line


@command_line
def main(argv: list[str] | None = None) -> None:
    """Parse the command line and convert."""
    common.hide_megatrons_warnings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mcore", type=Path, required=True, help="Megatron checkpoint directory, with its hf/")
    parser.add_argument("--iteration", type=int, help="which one; default: the latest")
    parser.add_argument("--output", type=Path, required=True, help="HF directory to make")
    common.conversion_options(parser)
    options = parser.parse_args(argv)
    dtype, prompts = common.dtype_of(options), common.prompts_of(options)
    if options.dry_run:
        plan, writer = plan_mcore_to_hf(
            options.mcore, options.output, iteration=options.iteration, dtype=dtype, force=options.force
        )
        common.print_plan(plan, writer)
        return
    report = convert_mcore_to_hf(
        options.mcore,
        options.output,
        iteration=options.iteration,
        dtype=dtype,
        verify="none" if options.no_verify else options.verify,
        prompts=prompts,
        progress=not options.no_progress,
        force=options.force,
    )
    common.give_report(report, options)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    raise SystemExit(main())
