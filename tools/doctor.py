"""What this machine has for OISD training, and what each absence costs: python tools/doctor.py [--json]."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import warnings

from megatron_oisd.errors import command_line


@command_line
def main(argv: list[str] | None = None) -> int:
    """Examine and report; exit code 1 where nothing can run."""
    from megatron_oisd.runtime.doctor import examine, report

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON list instead")
    arguments = parser.parse_args(argv)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # packages complain of each other while they are imported
        if arguments.json:
            findings = list(examine())
            print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
        else:
            findings = report()
    return 1 if any(finding.required and finding.state != "ok" for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
