"""What all figures have in common: colours, style, and how a figure is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_oisd.errors import OISDError

# Okabe and Ito's palette, in the order that keeps neighbours apart for the common colour-vision deficiencies.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
NEUTRAL = "#777777"
STYLE = {
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "megatron_oisd",  # the same data gives the same file
}


def save_figure(fill: Callable[[Any], None], output: str | Path, size: tuple[float, float]) -> list[Path]:
    """Make a figure of ``size`` inches, let ``fill`` draw into it, and write PNG and SVG beside each other.

    Raises:
        OISDError: matplotlib is missing, or the files cannot be written.
    """
    try:
        import matplotlib as mpl
        from matplotlib import font_manager
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OISDError("drawing needs matplotlib; pip install 'megatron_oisd[rl]'") from error
    base = Path(output)
    stem = base.stem if base.suffix.lower() in (".png", ".svg") else base.name
    files = [base.with_name(stem + suffix) for suffix in (".png", ".svg")]
    # Tokens are of any script: the first font that has a sign is taken for it.
    fonts = ["DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP"]
    installed = {font.name for font in font_manager.fontManager.ttflist}
    style = {**STYLE, "font.family": [name for name in fonts if name in installed] or ["sans-serif"]}
    with mpl.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        fill(figure)
        try:
            base.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(files[0], dpi=160)
            figure.savefig(files[1], metadata={"Date": None})
        except OSError as error:
            raise OISDError(f"{base} cannot be written ({error.strerror}): choose another --output") from error
    return files
