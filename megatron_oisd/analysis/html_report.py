"""One HTML file that holds everything: figures as data URIs, the logit lens as a table, no scripts, no network."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_oisd.analysis.layer_study import LensMap
from megatron_oisd.convert.output import write_text
from megatron_oisd.errors import OISDError

# The policy makes the browser itself refuse whatever is not in the file.
_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #222; max-width: 1180px; margin: 2em auto;
  padding: 0 1em; }}
h1 {{ font-size: 1.6em; }} h2 {{ font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ddd; }}
figure {{ margin: 1em 0; }} figure img {{ max-width: 100%; height: auto; }}
figcaption, .note {{ color: #555; font-size: 0.9em; max-width: 75ch; }}
pre {{ background: #f4f4f4; padding: 0.8em; white-space: pre-wrap; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 12px; }}
table.lens td, table.lens th {{ padding: 2px 5px; text-align: center; white-space: pre; border: 1px solid #fff; }}
table.lens th {{ font-weight: normal; color: #555; }}
table.lens td.same {{ font-weight: bold; }}
table.facts td {{ padding: 2px 1.2em 2px 0; vertical-align: top; }}
</style>
</head>
<body>
<h1>{title}</h1>
"""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading with what stands below it; each part may be left out."""

    title: str
    text: str = ""
    code: str = ""
    figure: Path | None = None
    """An SVG or PNG file; its content goes into the report."""
    alt: str = ""
    """What the figure shows, for those who cannot see it."""
    lens: LensMap | None = None


def write_report(
    output: str | Path, *, title: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section]
) -> Path:
    """Write the report in one step.

    Args:
        output: the HTML file.
        title: heading and window title.
        facts: pairs shown as a table at the top.
        sections: the rest, in order.

    Raises:
        OISDError: a figure cannot be read or the file cannot be written.
    """
    parts = [_HEAD.format(title=html.escape(title)), '<table class="facts">']
    parts += [f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in facts]
    parts.append("</table>")
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        if section.code:
            parts.append(f"<pre>{html.escape(section.code)}</pre>")
        if section.figure is not None:
            parts.append(
                f'<figure><img src="{_data_uri(section.figure)}" alt="{html.escape(section.alt, quote=True)}">'
            )
            parts.append(f"<figcaption>{html.escape(section.text)}</figcaption></figure>")
        elif section.text:
            parts.append(f'<p class="note">{html.escape(section.text)}</p>')
        if section.lens is not None:
            parts.append(_lens_table(section.lens))
    parts.append("</body>\n</html>\n")
    output = Path(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # Plain ASCII with references: right whatever the locale's encoding is.
        write_text(output, "\n".join(parts).encode("ascii", "xmlcharrefreplace").decode("ascii"))
    except OSError as error:
        raise OISDError(f"{output} cannot be written ({error.strerror}): choose another --output") from error
    return output


def _data_uri(path: Path) -> str:
    kind = {".svg": "image/svg+xml", ".png": "image/png"}[path.suffix]
    try:
        return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
    except OSError as error:
        raise OISDError(f"figure {path} cannot be read ({error.strerror}): draw it again") from error


def _lens_table(lens: LensMap) -> str:
    """Last layer at the top; a cell's title says token, probability and distance in full."""
    final = lens.top_tokens[-1]
    rows = []
    for layer in range(len(lens.top_tokens), 0, -1):
        cells = []
        columns = zip(lens.top_tokens[layer - 1], lens.probabilities[layer - 1], lens.js[layer - 1], final, strict=True)
        for token, probability, js, last in columns:
            lightness = 97 - 55 * probability
            colour = "#fff" if lightness < 60 else "#222"
            hint = html.escape(f"{token!r} p={probability:.3f} JS={js:.3f} nats", quote=True)
            cells.append(
                f'<td{" class=same" if token == last else ""} title="{hint}" '
                f'style="background:hsl(209,65%,{lightness:.0f}%);color:{colour}">{_visible(token)}</td>'
            )
        rows.append(f"<tr><th>{layer}</th>{''.join(cells)}</tr>")
    here = "".join(f"<th>{_visible(token)}</th>" for token in lens.tokens)
    after = "".join(f"<th>{_visible(token)}</th>" for token in lens.next_tokens)
    rows += [f"<tr><th>text</th>{here}</tr>", f"<tr><th>next</th>{after}</tr>"]
    return f'<div class="scroll"><table class="lens">{"".join(rows)}</table></div>'


def _visible(token: str) -> str:
    shown = token.replace("\n", "⏎").replace("\t", "→").replace(" ", "·") or "∅"
    return html.escape("".join(c if c.isprintable() else "�" for c in shown))
