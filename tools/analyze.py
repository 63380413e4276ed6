"""Look inside a model, layer by layer, before and during training: figures, a layer to teach, one HTML report.

    python tools/analyze.py lens --checkpoint MODEL --prompt "2+2=" --output figures/lens.png
    python tools/analyze.py layers --checkpoint MODEL --data math500.parquet --output figures/layers
    python tools/analyze.py recommend --checkpoint MODEL --data math500.parquet
    python tools/analyze.py training --run RUN --output figures/attention.png
    python tools/analyze.py compare --table math500=EVALUATION/table.json --output figures/evaluation
    python tools/analyze.py report --run RUN --output report.html

A checkpoint is an HF directory, a Megatron checkpoint, or a run of tools/train_rl.py. Layers are counted from 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_oisd.analysis.comparisons import draw_ablation, draw_pass_at_k
from megatron_oisd.analysis.html_report import Section, write_report
from megatron_oisd.analysis.layer_figures import draw_layers, draw_lens_map, draw_training
from megatron_oisd.analysis.layer_study import LayerStudy, Sample, read_study
from megatron_oisd.analysis.recommend import RULES, recommend
from megatron_oisd.analysis.training_curves import draw
from megatron_oisd.errors import OISDError, command_line


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    lens = command("lens", "logit-lens map of one text: the most probable next token of every layer at every position")
    layers = command("layers", "entropies, entropy changes and distances by layer, as layers.json and a figure")
    advice = command("recommend", "which layer to teach, by BuPO's rule, and how sure that is")
    training = command("training", "attention and policy of each layer against the last, over a run's checkpoints")
    compare = command("compare", "Pass@K curves and ablation bars of tables of tools/evaluate.py")
    report = command("report", "all of it about one run, in one HTML file")

    for each in (lens, layers, advice):
        each.add_argument("--checkpoint", type=Path, help="HF directory, Megatron checkpoint, or a run's directory")
        each.add_argument("--iteration", type=int, help="of a Megatron checkpoint; default: the latest")
    advice.add_argument("--layers", type=Path, help="layers.json of an earlier call, in the place of --checkpoint")
    for each in (training, report):
        each.add_argument("--run", type=Path, required=True, help="directory of tools/train_rl.py")
        each.add_argument("--checkpoints", type=int, default=6, help="at most so many, evenly spread over the run")
        each.add_argument("--base", type=Path, help="checkpoint the run started from, shown as step 0")
    for each in (lens, layers, advice, training, report):
        _sample_options(each)
    for each in (advice, layers, report):
        each.add_argument("--rule", choices=tuple(RULES), default="module", help="how FFN entropy change is measured")
        each.add_argument("--threshold", type=float, default=0.0, help="changes up to this count as none (nats)")
    for each in (lens, report, layers):
        each.add_argument("--lens-positions", type=int, default=20, help="positions in the logit-lens map")
    for each, required in ((compare, True), (report, False)):
        each.add_argument(
            "--table", action="append", required=required, default=[], metavar="SET=TABLE.JSON",
            help="a problem set's name and its table.json; repeat for several sets",
        )  # fmt: skip
    report.add_argument(
        "--compare-run", action="append", default=[], metavar="LABEL=RUN", help="other runs in the training curves"
    )
    for each, default in (
        (lens, "lens.png"), (layers, "layers"), (training, "attention_over_training.png"), (compare, "evaluation"),
        (report, "report.html"),
    ):  # fmt: skip
        what = "directory" if each in (layers, compare) else "the HTML file" if each is report else "PNG; an SVG, too"
        each.add_argument("--output", type=Path, default=Path(default), help=what)
    return parser.parse_args(argv)


def _sample_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a text, as it is (repeatable)")
    parser.add_argument("--token-ids", action="append", default=[], metavar="1,2,3", help="token ids (repeatable)")
    parser.add_argument("--data", type=Path, help="problems, .parquet or .jsonl, through the chat template")
    parser.add_argument(
        "--responses", type=Path, metavar="LABEL.JSONL",
        help="tools/evaluate.py's responses to --data: they are appended, and only they are scored",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, default=16, help="problems taken from --data")
    parser.add_argument("--max-tokens", type=int, default=1024, help="tokens kept of a text")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="padded tokens run at once")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="inside layers; the lens: float32",
    )


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise OISDError for values that would fail only after a model is loaded."""
    for name in ("limit", "max_tokens", "batch_tokens", "lens_positions", "checkpoints"):
        value = getattr(arguments, name, 1)
        if value < 1:
            raise OISDError(f"--{name.replace('_', '-')} {value}: at least 1 is needed")
    if getattr(arguments, "responses", None) and not arguments.data:
        raise OISDError("--responses needs --data: the problems that were answered")
    if arguments.command in ("lens", "layers") and arguments.checkpoint is None:
        raise OISDError("--checkpoint is missing: give an HF directory, a Megatron checkpoint or a run's directory")


def read_samples(arguments: argparse.Namespace, tokenizer: Any) -> list[Sample]:
    """Return the texts that the options name, as token ids cut to --max-tokens."""
    samples = []
    for number, text in enumerate(arguments.prompt, start=1):
        if tokenizer is None:
            raise OISDError(f"--prompt {text[:40]!r}: the checkpoint has no tokenizer; give --token-ids")
        samples.append(Sample(id=f"prompt {number}", token_ids=list(tokenizer(text)["input_ids"])))
    for number, text in enumerate(arguments.token_ids, start=1):
        try:
            samples.append(Sample(id=f"token ids {number}", token_ids=[int(part) for part in text.split(",")]))
        except ValueError:
            raise OISDError(f"--token-ids {text!r}: expected numbers with commas between them, like 1,2,3") from None
    if arguments.data is not None:
        samples += _data_samples(arguments, tokenizer)
    return [replace(sample, token_ids=sample.token_ids[: arguments.max_tokens]) for sample in samples]


def _data_samples(arguments: argparse.Namespace, tokenizer: Any) -> list[Sample]:
    from megatron_oisd.rl.data import load_prompts, tokenize_prompts
    from megatron_oisd.rl.evaluate import read_problems

    if tokenizer is None:
        raise OISDError(f"--data {arguments.data}: the checkpoint has no tokenizer; give --token-ids")
    records = load_prompts(arguments.data)
    answers: dict[str, str] = {}
    if arguments.responses is not None:
        answers = {problem.id: problem.responses[0] for problem in read_problems(arguments.responses).problems}
        records = [record for record in records if record.id in answers]
        if not records:
            raise OISDError(
                f"{arguments.responses} answers none of the problems of {arguments.data}: give its own data"
            )
    prompts, _ = tokenize_prompts(records[: arguments.limit], tokenizer, max_prompt_tokens=arguments.max_tokens - 1)
    samples = []
    for prompt in prompts:
        ids, first = prompt.token_ids, 1
        if answers:
            response = tokenizer(answers[prompt.record.id], add_special_tokens=False)["input_ids"]
            if not response:
                continue
            ids, first = [*ids, *response], len(ids)
        samples.append(Sample(id=prompt.record.id, token_ids=ids, first_scored=first))
    return samples


class Analyst:
    """Opens checkpoints and studies them on the same samples."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.samples: list[Sample] = []

    def study(self, path: Path, iteration: int | None = None, *, lens: bool = True) -> LayerStudy:
        """Measure one checkpoint; the first one's tokenizer makes the samples of all."""
        import torch
        from tqdm import tqdm

        from megatron_oisd.analysis.checkpoints import open_checkpoint
        from megatron_oisd.analysis.layer_study import check_samples, study_layers
        from megatron_oisd.analysis.streamed_model import StreamedModel
        from megatron_oisd.convert.hf_files import load_tokenizer

        options = self.arguments
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise OISDError(f"--device {device}: cannot be used here ({reason}); give cpu") from error
        checkpoint = open_checkpoint(path, iteration)
        tokenizer = load_tokenizer(checkpoint.hf_directory)
        self.samples = self.samples or read_samples(options, tokenizer)
        check_samples(self.samples, checkpoint.arguments.vocab_size)
        decode: Callable[[int], str] = str if tokenizer is None else lambda token: tokenizer.decode([token])
        model = StreamedModel(checkpoint, device=device, dtype=getattr(torch, options.dtype))
        with tqdm(total=len(self.samples), desc=checkpoint.label, unit="sample") as bar:
            return study_layers(
                model, self.samples, lens_sample=0 if lens else None, decode=decode, progress=bar.update,
                lens_positions=getattr(options, "lens_positions", 1), batch_tokens=options.batch_tokens,
            )  # fmt: skip

    def over_training(self, run: Path) -> list[LayerStudy]:
        """Study the checkpoints of a run, after the one it started from, where that is given."""
        from megatron_oisd.analysis.checkpoints import iterations

        steps = iterations(run)
        if not steps:
            raise OISDError(f"{run} has no checkpoints: train with a smaller --save-interval")
        count = min(self.arguments.checkpoints, len(steps))
        # From the last one back, so that it is always among them.
        chosen = sorted(steps[-1 - round(i * (len(steps) - 1) / max(count - 1, 1))] for i in range(count))
        studies = []
        if self.arguments.base is not None:
            studies.append(replace(self.study(self.arguments.base, lens=False), step=0, label="step 0"))
        return studies + [self.study(run, step, lens=step == steps[-1]) for step in chosen]


def read_tables_option(items: list[str]) -> dict[str, Path]:
    """Return the tables by problem set."""
    tables: dict[str, Path] = {}
    for item in items:
        name, separator, path = item.partition("=")
        if not (name and separator and path):
            raise OISDError(
                f"--table {item!r}: expected SET=TABLE.JSON, for example math500=runs/evaluation/table.json"
            )
        tables[name] = Path(path)
    return tables


def run_lens(arguments: argparse.Namespace) -> list[Path]:
    """Draw the map of the first sample."""
    study = Analyst(arguments).study(arguments.checkpoint, arguments.iteration)
    assert study.lens is not None
    return draw_lens_map(study.lens, arguments.output, title=f"Logit lens of {study.label}, {study.lens.sample}")


def run_layers(arguments: argparse.Namespace) -> list[Path]:
    """Write layers.json and the figures."""
    study = Analyst(arguments).study(arguments.checkpoint, arguments.iteration)
    study.write(arguments.output / "layers.json")
    advice = recommend(study, rule=arguments.rule, threshold=arguments.threshold)
    assert study.lens is not None
    files = draw_layers(study, advice, arguments.output / "layers.png")
    files += draw_lens_map(study.lens, arguments.output / "lens.png")
    return [arguments.output / "layers.json", *files]


def run_recommend(arguments: argparse.Namespace) -> list[Path]:
    """Print the flag and what speaks for it."""
    if (arguments.layers is None) == (arguments.checkpoint is None):
        raise OISDError("give either --checkpoint or --layers, the layers.json of an earlier call")
    if arguments.layers is not None:
        study = read_study(arguments.layers)
    else:
        study = Analyst(arguments).study(arguments.checkpoint, arguments.iteration, lens=False)
    print("\n".join(recommend(study, rule=arguments.rule, threshold=arguments.threshold).lines()))
    other = recommend(study, rule="lens" if arguments.rule == "module" else "module", threshold=arguments.threshold)
    print(f"the other rule, {other.rule!r}, says: {'no layer' if other.layer is None else f'layer {other.layer}'}")
    return []


def run_training(arguments: argparse.Namespace) -> list[Path]:
    """Draw the layers over the run."""
    _default_samples(arguments)
    return draw_training(Analyst(arguments).over_training(arguments.run), arguments.output)


def run_compare(arguments: argparse.Namespace) -> list[Path]:
    """Draw both comparisons."""
    tables = read_tables_option(arguments.table)
    return [
        *draw_pass_at_k(tables, arguments.output / "pass_at_k.png"),
        *draw_ablation(tables, arguments.output / "ablation.png"),
    ]


def run_report(arguments: argparse.Namespace) -> list[Path]:
    """Write the HTML file; what the run lacks is left out and said."""
    from megatron_oisd.rl.metrics_log import read_metrics

    runs = {arguments.run.resolve().name: read_metrics(arguments.run)}
    for item in arguments.compare_run:
        label, separator, path = item.partition("=")
        if not (label and separator and path):
            raise OISDError(f"--compare-run {item!r}: expected LABEL=RUN, for example GRPO=runs/grpo")
        runs[label] = read_metrics(path)
    tables = read_tables_option(arguments.table)
    _default_samples(arguments)
    studies = Analyst(arguments).over_training(arguments.run)
    study = studies[-1]
    first = studies[0]
    advice = recommend(first, rule=arguments.rule, threshold=arguments.threshold)
    assert study.lens is not None
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sections = [
            Section(
                title="Training dynamics", figure=draw(runs, work / "curves.png")[1],
                text="From metrics.jsonl. The unsigned distances say whether a taught layer comes closer to the last.",
                alt="Reward, losses, distances, entropy, response length and gradient norm over training steps",
            ),
            Section(
                title=f"Layers at {study.label}", figure=draw_layers(study, advice, work / "layers.png")[1],
                text="Entropy of the policies of layers and modules, what each module changes of it, and how "
                "far each layer is from the last.", alt="Entropy, entropy change and distances by layer",
            ),
            Section(title=f"Which layer to teach, by {first.label}", code="\n".join(advice.lines())),
        ]  # fmt: skip
        if len(studies) > 1:
            sections.append(
                Section(
                    title="Layers over training",
                    figure=draw_training(studies, work / "over_training.png")[1],
                    text="How like the last layer's each layer's attention and policy are, checkpoint by checkpoint.",
                    alt="Similarity of each layer to the last, by training step",
                )
            )
        sections.append(
            Section(
                title=f"Logit lens at {study.label}, {study.lens.sample}", lens=study.lens,
                text="The most probable next token of every layer; the darker, the more probable; bold where it is the "
                "last layer's. Hold the pointer over a cell for numbers.",
            )
        )  # fmt: skip
        if tables:
            bars, curves = draw_ablation(tables, work / "bars.png")[1], draw_pass_at_k(tables, work / "pass.png")[1]
            sections += [
                Section(title="Evaluation", figure=bars, text="Avg@K.", alt="Accuracy of each model on each set"),
                Section(title="Pass@K", figure=curves, text="Unbiased estimate.", alt="Pass@K over K of each model"),
            ]
        facts = [
            ("run", str(arguments.run)), ("model", f"{study.architecture}, {study.num_layers} layers"),
            ("checkpoints", ", ".join(each.label for each in studies)),
            ("samples", f"{len(study.samples)}, {sum(study.positions)} scored positions"),
            ("scored", "responses" if study.response_only else "all positions of the prompts"),
        ]  # fmt: skip
        if len(studies) < 2:
            facts.append(("left out", "layers over training: the run has one checkpoint and no --base was given"))
        if not tables:
            facts.append(("left out", "evaluation: no --table was given"))
        title = f"Inside {arguments.run.resolve().name}"
        return [write_report(arguments.output, title=title, facts=facts, sections=sections)]


def _default_samples(arguments: argparse.Namespace) -> None:
    """Without samples a run's own training problems are taken."""
    if arguments.prompt or arguments.token_ids or arguments.data:
        return
    import yaml

    path = arguments.run / "config.yaml"
    try:
        data = Path(yaml.safe_load(path.read_text(encoding="utf-8"))["data"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise OISDError(
            f"{path} names no data ({type(error).__name__}); give --data, --prompt or --token-ids"
        ) from error
    if not data.is_file():
        raise OISDError(f"{data}, the data of {path}, is not here; give --data, --prompt or --token-ids")
    arguments.data = data


COMMANDS = {
    "lens": run_lens,
    "layers": run_layers,
    "recommend": run_recommend,
    "training": run_training,
    "compare": run_compare,
    "report": run_report,
}


@command_line
def main(argv: list[str] | None = None) -> None:
    """Run the command and name the files it wrote."""
    arguments = parse_arguments(argv)
    check_arguments(arguments)
    for file in COMMANDS[arguments.command](arguments):
        print(file)


if __name__ == "__main__":
    sys.exit(main(None))
