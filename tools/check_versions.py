"""Run tests on several releases of Megatron-Core, each installed beside the environment, not into it.

    python tools/check_versions.py                          # the newest release of every tested minor version
    python tools/check_versions.py 0.16.1 0.19.2 --tests tests/pipeline tests/convert

A release is installed once, without its dependencies and whatever Python it asks for, and comes first on the path of
the tests. The last lines are a table; the exit code is 1 where anything failed.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from megatron_oisd.errors import OISDError, command_line
from megatron_oisd.pipeline.versions import TESTED

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Outcome:
    """Counts of one test run."""

    release: str
    passed: int
    failed: int
    skipped: int
    seconds: float
    returncode: int = 0
    """pytest's own: not 0 also where it could not collect."""

    @property
    def good(self) -> bool:
        """Whether tests ran and none failed."""
        return self.returncode == 0 and self.failed == 0 and self.passed > 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "releases",
        nargs="*",
        default=[f"{minor}.*" for minor in TESTED],
        help="as pip writes them after ==, for example 0.19.2 or 0.19.*",
    )
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "build" / "megatron-versions", help="where releases are installed"
    )
    parser.add_argument("--tests", nargs="+", default=["tests/pipeline"], help="what pytest is given")
    return parser.parse_args(argv)


def install(release: str, folder: Path) -> Path:
    """Install ``megatron-core==release`` into a folder of its own, unless it is there; return the folder."""
    target = folder / release.replace("*", "x")
    if (target / "megatron" / "core").is_dir():
        return target
    shutil.rmtree(target, ignore_errors=True)
    print(f"megatron-core {release}: installing into {target}", flush=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    # Releases from 0.17 on ask for Python 3.12 but run on 3.11.
    command += ["--ignore-requires-python", "--target", str(target), f"megatron-core=={release}"]
    if subprocess.run(command, check=False).returncode:
        shutil.rmtree(target, ignore_errors=True)
        raise OISDError(f"megatron-core=={release} cannot be installed: see pip's message above")
    return target


def environment(target: Path) -> dict[str, str]:
    """The environment in which ``import megatron.core`` finds the release in ``target``."""
    paths = [str(target), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def imported(target: Path) -> str:
    """Version of the release that is really imported from ``target``."""
    code = "import megatron.core as core; print(core.__file__); print(core.__version__)"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment(target), cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    lines = result.stdout.split("\n")[-3:-1]
    if result.returncode or len(lines) != 2 or not Path(lines[0]).is_relative_to(target.resolve()):
        reason = (result.stderr or result.stdout).strip().split("\n")[-1]
        raise OISDError(f"megatron-core in {target} cannot be imported ({reason}): delete the folder and try again")
    return lines[1]


def run_tests(target: Path, release: str, tests: list[str]) -> Outcome:
    """Run pytest with the release in ``target``; its output is shown as it comes."""
    report = target / "report.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
    start = time.monotonic()
    returncode = subprocess.run(command, env=environment(target), cwd=ROOT, check=False).returncode
    return read_report(report, release, time.monotonic() - start, returncode)


def read_report(report: Path, release: str, seconds: float, returncode: int) -> Outcome:
    """Count what pytest wrote to its JUnit file; errors of fixtures and imports count as failures."""
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    if report.is_file():
        for suite in ElementTree.parse(report).getroot().iter("testsuite"):
            for name in counts:
                counts[name] += int(suite.get(name, 0))
    failed = counts["failures"] + counts["errors"]
    passed = counts["tests"] - failed - counts["skipped"]
    return Outcome(release, passed, failed, counts["skipped"], seconds, returncode)


def table(outcomes: list[Outcome]) -> str:
    """The outcomes as a Markdown table."""
    python = platform.python_version()
    rows = ["| release | python | passed | failed | skipped | seconds |", "|---|---|---:|---:|---:|---:|"]
    for outcome in outcomes:
        failed = outcome.failed if outcome.good or outcome.failed else f"pytest's exit code {outcome.returncode}"
        cells = (outcome.release, python, outcome.passed, failed, outcome.skipped, round(outcome.seconds))
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


@command_line
def main(argv: list[str] | None = None) -> int:
    """Install, test and print the table."""
    arguments = parse_arguments(argv)
    folder = arguments.folder.resolve()
    outcomes = []
    for number, wanted in enumerate(arguments.releases, 1):
        target = install(wanted, folder)
        release = imported(target)
        print(f"\nmegatron-core {release} ({number} of {len(arguments.releases)})", flush=True)
        outcomes.append(run_tests(target, release, arguments.tests))
        print(table(outcomes[-1:]), flush=True)
    print(f"\n{' '.join(arguments.tests)}\n{table(outcomes)}")
    return 0 if all(outcome.good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(None))
