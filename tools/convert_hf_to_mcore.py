"""Convert an HF checkpoint into a Megatron checkpoint that loads at any TP/PP layout.

python tools/convert_hf_to_mcore.py --hf Qwen3-4B --output Qwen3-4B-mcore
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_oisd.convert import command_line as common
from megatron_oisd.convert.hf_to_mcore import convert_hf_to_mcore, plan_hf_to_mcore
from megatron_oisd.errors import command_line


@command_line
def main(argv: list[str] | None = None) -> None:
    """Parse the command line and convert."""
    common.hide_megatrons_warnings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True, help="HF directory: config.json, *.safetensors, tokenizer")
    parser.add_argument("--output", type=Path, required=True, help="Megatron checkpoint directory to make")
    parser.add_argument(
        "--transformer-impl", choices=("transformer_engine", "local"), default="transformer_engine",
        help="how Megatron-LM will be told to build the model, which decides a parameter's name where there are "
        "experts; this package loads both",
    )  # fmt: skip
    common.conversion_options(parser)
    options = parser.parse_args(argv)
    dtype, prompts = common.dtype_of(options), common.prompts_of(options)
    local_experts = options.transformer_impl == "local"
    if options.dry_run:
        common.print_plan(
            plan_hf_to_mcore(options.hf, options.output, dtype=dtype, force=options.force, local_experts=local_experts)
        )
        return
    report = convert_hf_to_mcore(
        options.hf,
        options.output,
        dtype=dtype,
        verify="none" if options.no_verify else options.verify,
        prompts=prompts,
        progress=not options.no_progress,
        force=options.force,
        local_experts=local_experts,
    )
    common.give_report(report, options)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    raise SystemExit(main())
