"""The documentation against the code: fields and defaults, named files and tests, the import rule, the example."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_oisd.config import OISDConfig
from megatron_oisd.rl.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CHANGELOG.md"]
SOURCE = re.compile(r"(?<![\w/.-])(?:megatron_oisd|tests|tools|examples)/[\w/.-]*\.py\b")
TEST = re.compile(r"(?<![\w/.-])(tests/[\w/]+\.py)::(\w+)")


def _table(heading: str) -> dict[str, str]:
    """The third column of the table under a heading of the paper map, by the field named in the first."""
    text = (ROOT / "docs" / "paper_map.md").read_text(encoding="utf-8")
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "|" in line]
    return {row[0].strip("`"): row[2] for row in rows if row[0].startswith("`")}


@pytest.mark.parametrize(("heading", "config"), [("OISD", OISDConfig), ("Training", TrainConfig)])
def test_every_field_has_its_source_and_its_default(heading: str, config: Any) -> None:
    documented = _table(heading)
    fields = dataclasses.fields(config)
    assert documented.keys() == {item.name for item in fields}
    for item in fields:
        if item.name in ("layers", "load", "data", "output"):
            assert documented[item.name] == "required", item.name
        else:
            assert ast.literal_eval(documented[item.name].strip("`")) == item.default, item.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_and_tests_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = sorted({name for name in SOURCE.findall(text) if not (ROOT / name).is_file()})
    assert not missing
    for file, name in TEST.findall(text):
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"


def test_quoted_messages_are_in_the_code() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r'\*\*"([^"]+)"\*\*', text)
    assert len(quoted) > 15
    # Messages are written over several lines: the quotes between their parts are taken out.
    files = [path for folder in ("megatron_oisd", "tools") for path in (ROOT / folder).rglob("*.py")]
    source = "\n".join(path.read_text(encoding="utf-8") for path in files)
    joined = re.sub(r'"\s*\n\s*f?"', "", source)
    missing = [words for words in quoted if words not in joined]
    assert not missing


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    for name in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(name, reason="needs the extra docs")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    page = (tmp_path / "reference" / "oisd.html").read_text(encoding="utf-8")
    assert "lambda_think" in page
    for html in tmp_path.rglob("*.html"):  # readable without a network
        assert not re.findall(r'(?:src|href)="https?://[^"]*\.(?:js|css|woff2?)"', html.read_text(encoding="utf-8"))


def _imports(folder: str) -> set[str]:
    """Parts of the package that the files of a folder import, at the top or inside functions."""
    found = set()
    for file in sorted((ROOT / "megatron_oisd" / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: relative import"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name.split(".")[1] for name in names if name.startswith("megatron_oisd.")}
    return found


def test_the_import_rule() -> None:
    assert _imports("losses") <= {"losses"}
    assert _imports("pipeline") <= {"pipeline", "losses", "config", "errors"}
    others = {path.name for path in (ROOT / "megatron_oisd").iterdir() if (path / "__init__.py").is_file()} - {"rl"}
    assert others >= {"losses", "pipeline", "convert", "runtime"}
    for folder in others:
        assert "rl" not in _imports(folder), folder


def test_the_example_of_the_architecture_page_runs(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    blocks = [
        b for b in re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE) if "# runs in tests" in b
    ]
    assert len(blocks) == 1
    script = tmp_path / "example.py"
    script.write_text(blocks[0], encoding="utf-8")
    # Without a launcher's variables, so that the example makes a group of one process.
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launcher}
    # What was there comes first: it may hold another Megatron-Core (tools/check_versions.py).
    paths = [*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)], env=environment, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("'oisd/think/layer_1'") == 2
