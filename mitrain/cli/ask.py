"""``mitrain eval`` and ``mitrain predict``: what a trained run is asked."""

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

from mitrain.cli.shared import add_allow_changes, add_checkpoint, command, on_ranks, say


def add_eval(commands: Any) -> None:
    sub = command(commands, "eval", on_ranks(run_eval), "score a run's best checkpoint on a split")
    sub.add_argument("run_dir", metavar="RUN_DIR", help="a run folder, as runs/NAME-TIME, or what was exported of one")
    sub.add_argument("--split", default="val", help="a split of the run's data (default: val)")
    sub.add_argument(
        "--control",
        default="none",
        choices=["none", "shuffle", "no-image", "other-text", "frozen"],
        help="a negative control: shuffle, another scene's expression (segment) or any other image (answer); no-image, the"
        " image of another object; other-text, another sample's text (classify, regress); frozen, no infusion"
        " (default: none)",
    )
    add_checkpoint(sub)
    add_allow_changes(sub)
    add_places(sub)
    sub.add_argument("--data", metavar="DIR", help="the data's folder, where it is another than the run's data.root")
    sub.add_argument("--samples", type=int, metavar="N", help="score N samples spread evenly over the split")
    sub.add_argument(
        "--generate",
        action="store_true",
        help="also let the model speak and count exact matches (answer; caption does anyway)",
    )
    sub.add_argument("--seed", type=int, default=0, help="of the control's pairing")
    sub.add_argument(
        "--baselines",
        action="store_true",
        help="also score what needs no model: majority answer and linear probe (answer), masks that no text chose (segment)",
    )


def run_eval(arguments: argparse.Namespace) -> Any:
    from mitrain.inference.scoring import score_run

    metrics = score_run(
        arguments.run_dir,
        split=arguments.split,
        control=arguments.control,
        which=arguments.checkpoint,
        samples=arguments.samples,
        generate=arguments.generate,
        seed=arguments.seed,
        baselines=arguments.baselines,
        allow_changes=arguments.allow_changes,
        base=arguments.base,
        encoders=arguments.encoder,
        root=arguments.data,
    )
    for line in metric_lines(metrics):
        say(arguments, line)
    return metrics


def metric_lines(metrics: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """A name and a number a line; what holds several numbers is a heading with indented lines."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield f"{indent}{name}"
            yield from metric_lines(value, indent + "  ")
        else:
            shown = f"{value:.4f}" if isinstance(value, float) else "decided or undefined" if value is None else value
            yield f"{indent + name:24s} {shown}"


def add_predict(commands: Any) -> None:
    sub = command(commands, "predict", run_predict, "ask a run about one image")
    sub.add_argument("run_dir", metavar="RUN_DIR", help="a run folder, as runs/NAME-TIME, or what was exported of one")
    sub.add_argument("--image", required=True, metavar="FILE", help="a picture, of any size")
    sub.add_argument("--text", required=True, help="the prompt, or the expression to segment")
    sub.add_argument(
        "--candidates", metavar="A,B,…", help="answers to choose among (answer; default: the training answers)"
    )
    sub.add_argument("--out", metavar="DIR", help="where image, overlay, expression and mask are written (segment)")
    add_checkpoint(sub)
    add_allow_changes(sub)
    add_places(sub)


def add_places(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--base", metavar="DIR", help="the language model's folder, where it is another than in training")
    sub.add_argument(
        "--encoder",
        action="append",
        metavar="DIR",
        help="the image encoder's folder, likewise; of several encoders one option each, in order",
    )


def run_predict(arguments: argparse.Namespace) -> Any:
    from mitrain.inference.scoring import predict_one

    candidates = [c.strip() for c in arguments.candidates.split(",") if c.strip()] if arguments.candidates else None
    result = predict_one(
        arguments.run_dir,
        arguments.image,
        arguments.text,
        candidates=candidates,
        out=arguments.out,
        which=arguments.checkpoint,
        allow_changes=arguments.allow_changes,
        base=arguments.base,
        encoders=arguments.encoder,
    )
    for line in result.lines:
        say(arguments, line)
    return result.values
