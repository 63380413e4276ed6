"""Check that an HF checkpoint and a Megatron checkpoint hold the same model, and that neither was damaged.

python tools/verify_checkpoint.py --hf Qwen3-4B --mcore Qwen3-4B-mcore
python tools/verify_checkpoint.py --mcore Qwen3-4B-mcore         # its manifest only: the sha256 of every file
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_oisd.convert import command_line as common
from megatron_oisd.convert.checkpoint import HF_DIRECTORY, read_arguments, whole_iteration
from megatron_oisd.convert.manifest import MANIFEST, check_manifest
from megatron_oisd.convert.report import verify_pair
from megatron_oisd.convert.verify import TOLERANCE, sample_token_ids
from megatron_oisd.errors import OISDError, command_line


@command_line
def main(argv: list[str] | None = None) -> None:
    """Parse the command line and compare."""
    common.hide_megatrons_warnings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, help="HF directory")
    parser.add_argument("--mcore", type=Path, help="Megatron checkpoint directory")
    parser.add_argument("--iteration", type=int, help="of the Megatron checkpoint; default: the latest")
    parser.add_argument("--length", type=int, default=64, help="tokens in each of two sampled sequences (default 64)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    common.verification_options(parser)
    options = parser.parse_args(argv)
    if options.length < 1:
        raise OISDError(f"--length is {options.length}: expected an integer of at least 1")
    if not (options.hf or options.mcore):
        raise OISDError("give --hf, --mcore or both")
    if options.hf:
        _check_manifest(options.hf)
    if options.mcore:
        _check_manifest(whole_iteration(options.mcore, options.iteration))
        _check_manifest(options.mcore / HF_DIRECTORY)
    if not (options.hf and options.mcore):
        print("one directory alone: only its manifest was checked")
        return
    report = verify_pair(
        options.hf,
        options.mcore,
        options.iteration,
        verify=options.verify,
        prompts=common.prompts_of(options),
        token_ids=sample_token_ids(read_arguments(options.mcore), length=options.length),
        progress=not options.no_progress,
    )
    common.give_report(report, options)
    if not report.agree:
        raise OISDError(
            f"{options.hf} and {options.mcore} hold different models ({report.verdict}): expected equal tensors and a "
            f"relative difference of logits of at most {TOLERANCE}"
        )


def _check_manifest(directory: Path) -> None:
    count = check_manifest(directory)
    print(f"{directory}: {f'all {count} files are as written' if count else f'no {MANIFEST} to check'}")


if __name__ == "__main__":
    raise SystemExit(main())
