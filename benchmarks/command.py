"""The benchmarks behind ``mitrain bench NAME``."""

import argparse
import itertools
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from benchmarks import results
from mitrain.cli import started
from mitrain.cli.shared import Help, Parser, command, refused, say
from mitrain.core.errors import ConfigError, UserError

KERNELS = Path(__file__).parents[1] / "kernels" / "bench"


class KernelsError(UserError):
    """The kernels' benchmark ended otherwise than well, and has said why."""

    def __init__(self, code: int):
        super().__init__("python kernels/bench ended with an error, which stands above")
        self.exit_code = code


def main(words: Sequence[str] | None = None) -> int:
    """Run one benchmark; returns the exit code."""
    return started(lambda: parser().parse(words))


def parser() -> Parser:
    text = "Benchmarks: shards, faults, loading, steps, encoding, kernels, and the papers' claims."
    top = Parser(prog="mitrain bench", description=text, formatter_class=Help)
    top.set_defaults(command="bench")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="NAME")
    add_parity(verbs)
    add_faults(verbs)
    add_step(verbs)
    add_memory(verbs)
    add_generate(verbs)
    add_start(verbs)
    add_short(verbs)
    add_journeys(verbs)
    add_ledger(verbs)
    kernels = "the operators beside plain ones: times and bytes, if they are right; python kernels/bench has more options"
    benchmark(verbs, "kernels", run_kernels, kernels, "two shapes an operator, about a minute", out=False)
    return top


def benchmark(verbs: Any, name: str, run: Any, text: str, quick: str, out: bool = True) -> argparse.ArgumentParser:
    """``out``: what it prints can be written, too."""
    sub = command(verbs, name, run, text)
    sub.add_argument("--quick", action="store_true", help=quick)
    if out:
        sub.add_argument("--out", metavar="DIR", help="for results.json and table.md (default: print only)")
    return sub


def add_out(sub: argparse.ArgumentParser) -> None:
    """For a benchmark that takes long: it goes on in the folder where it was interrupted."""
    name = sub.prog.split()[-1]
    text = f"for results.json and table.md (default: runs/{name}); the same DIR goes on after an interruption"
    sub.add_argument("--out", metavar="DIR", help=text)


def out_of(arguments: argparse.Namespace) -> Path:
    return Path(arguments.out or f"runs/{arguments.verb}{'-quick' if arguments.quick else ''}")


def add_parity(verbs: Any) -> None:
    text, quick = (
        "ZeRO stages × precisions × ranks: losses, bytes, step times",
        "ZeRO 0 and 3, fp32 and int8, 5 updates, no peers",
    )
    sub = benchmark(verbs, "parity", run_parity, text, quick, out=False)
    add_out(sub)
    sub.add_argument("--config", default="configs/quickstart.yaml", help="what is trained (default: %(default)s)")
    sub.add_argument("--only", nargs="+", metavar="NAME", help="cells whose names begin so, as ours-int8 peft")
    sub.add_argument("--steps", type=int, metavar="N", help="updates before the loss is taken (default: 20, quick 5)")
    sub.add_argument("--batch", type=int, default=4, metavar="N", help="samples a step, an even number (default: 4)")
    sub.add_argument("--limit", type=float, default=3600, metavar="S", help="seconds for a cell (default: 3600)")


def add_faults(verbs: Any) -> None:
    text = "kills, damage, hostile inputs: what comes of each, on tiny models"
    sub = benchmark(verbs, "faults", run_faults, text, "a dozen of them", out=False)
    add_out(sub)
    sub.add_argument("--only", nargs="+", default=[], metavar="NAME", help="faults whose names begin so, as cache rank")


def add_step(verbs: Any) -> None:
    text = "time, bytes and operations of a training step of configurations, each in a process of its own"
    sub = benchmark(verbs, "step", run_step, text, "5 steps")
    sub.add_argument("--configs", nargs="+", default=["quickstart"], metavar="NAME", help="(default: quickstart)")
    sub.add_argument("--steps", type=int, metavar="N", help="of which times are taken (default: 20, quick 5)")
    against = "instead, MiT beside LoRA, a visual prefix and others on one model: these, or all (lora-all always)"
    sub.add_argument("--providers", nargs="*", metavar="NAME", help=against)
    add_shapes(sub)


def add_memory(verbs: Any) -> None:
    text = "what a step of MiT holds beside LoRA's, a visual prefix's and others': counted tensors, and the process"
    sub = benchmark(verbs, "memory", run_step, text, "a process of each")
    sub.add_argument("--providers", nargs="*", default=[], metavar="NAME", help="(default: all; lora-all always)")
    sub.set_defaults(steps=1)  # memory is the same in each
    add_shapes(sub)


def add_shapes(sub: argparse.ArgumentParser) -> None:
    """What providers are compared at; of several values each is taken with each."""
    for name, usual, text in (
        ("length", 128, "words of a text"),
        ("batch", 8, "texts of a step"),
        ("layers", "last third", "MiT's layers"),
        ("dtype", "fp32", "precision of the models"),
        ("ranks", 1, "processes that share a step"),
        ("modalities", 1, "how many, each with an encoder"),
        ("zero", 0, "stage of ZeRO"),
    ):
        text = f"of providers: {text} (default: {usual})"
        sub.add_argument(f"--{name}", type=type(usual), nargs="+", default=[usual], help=text)
    sub.add_argument("--rounds", type=int, metavar="N", help="processes of each provider (default: 3, quick 1)")


def add_generate(verbs: Any) -> None:
    text = "tokens per second of generation and evaluation with MiT, beside the plain language model's"
    sub = benchmark(verbs, "generate", run_generate, text, "2 rounds of 8 texts")
    sub.add_argument("--llm", default="smollm2-135m-instruct", metavar="NAME", help="(default: %(default)s)")
    sub.add_argument("--batch", type=int, metavar="N", help="texts at a time (default: 32, quick 8)")
    sub.add_argument("--prompt", type=int, default=32, metavar="N", help="tokens of a prompt (default: %(default)s)")
    sub.add_argument("--tokens", type=int, default=24, metavar="N", help="tokens behind it (default: %(default)s)")
    sub.add_argument("--rounds", type=int, metavar="N", help="(default: 7, quick 2)")


def add_start(verbs: Any) -> None:
    text = "seconds until training can begin on many pictures, with an empty and a filled cache"
    sub = benchmark(verbs, "start", run_start, text, "60 pictures, a start of each")
    sub.add_argument("--pictures", type=int, metavar="N", help="(default: 2000)")
    sub.add_argument("--runs", type=int, metavar="N", help="starts of each kind (default: 3)")
    sub.add_argument("--before", metavar="DIR", help="a checkout of another commit, to compare with")


def add_short(verbs: Any) -> None:
    """The benchmarks of an option or two, and what their options are left at."""
    text = "peak bytes of loading a random model of 2 GB in shards, beside their limit"
    load = benchmark(verbs, "load", run_load, text, "a model of a tenth of the size")
    load.add_argument("--ranks", type=int, default=2, metavar="N", help="processes (default: 2)")
    text = "what many rows cost before the first step: reading, tokens, names of pictures, controls, memory"
    data = benchmark(verbs, "data", run_data, text, "1,000 rows")
    data.add_argument("--rows", type=int, nargs="+", metavar="N", help="(default: 1000 10000 100000 1000000)")
    text = "seconds from files of sound to their features, beside the encoder's bare passes and a limit"
    encode = benchmark(verbs, "encode", run_encode, text, "120 clips, a smaller encoder")
    encode.add_argument("--clips", type=int, metavar="N", help="(default: 1000)")
    text = "memory and seconds of an epoch of streamed rows of features, beside a limit"
    stream = benchmark(verbs, "stream", run_stream, text, "2,000 and 4,000 rows")
    stream.add_argument("--rows", type=int, nargs="+", metavar="N", help="(default: 100000 1000000)")
    text = "what mitrain plan says of memory and gathers, beside what runs take; tables for large models"
    plan = benchmark(verbs, "plan", run_plan, text, "gathers of one precision")
    each = "each may have overrides, as 'quickstart train.batch=8' (default: quickstart)"
    plan.add_argument("--configs", nargs="*", default=["quickstart"], metavar="NAME", help=each)
    plan.add_argument("--memory-alone", action="store_true", help="no gathers and no tables for large models")
    text = "the word error rate of a prepared Whisper on the lines of dialogue, beside a limit"
    transcribe = benchmark(verbs, "transcribe", run_transcribe, text, "20 clips")
    transcribe.add_argument("--model", default="whisper-base", metavar="NAME", help="(default: whisper-base)")
    transcribe.add_argument("--clips", type=int, metavar="N", help="(default: 100)")


def add_journeys(verbs: Any) -> None:
    text = "what a stranger does by the documentation alone, timed to the first success"
    sub = benchmark(verbs, "journeys", run_journeys, text, "the first journey alone", out=False)
    sub.add_argument("--only", nargs="+", default=[], metavar="WORD", help="journeys whose titles hold one of these")
    sub.add_argument("--python", metavar="PATH", help="another interpreter, for the wheel's journey")
    sub.add_argument("--root", metavar="DIR", help="a folder in which debootstrap makes a bare system, for the Dockerfile's")
    sub.add_argument("--out", metavar="FILE", help="for the page, where rows of other journeys stay (default: print only)")


def run_journeys(arguments: argparse.Namespace) -> Any:
    from benchmarks import journeys

    only = arguments.only or ["own pictures"] * arguments.quick
    rows = journeys.measured(only, arguments.python, arguments.root, say=aside)
    out = Path(arguments.out) if arguments.out else None
    earlier = out.read_text(encoding="utf-8") if out and out.exists() else ""
    shown = journeys.page(rows, again(arguments), earlier)
    say(arguments, shown)
    if out:
        out.write_text(shown, encoding="utf-8")
    return rows


def add_ledger(verbs: Any) -> None:
    text = "what the rows of mitrain compare say of the papers' claims"
    sub = benchmark(verbs, "ledger", run_ledger, text, "measure the counted cells alone, which take seconds each", out=False)
    sub.add_argument("--measure", action="store_true", help="first measure the cells that the claims lack")
    sub.add_argument("--results", metavar="DIR", help="of the studies, NAME/results.json (default: docs/results/compare)")
    sub.add_argument("--out", metavar="DIR", help="for ledger.json and ledger.md (default: print only)")


def run_parity(arguments: argparse.Namespace) -> Any:
    from benchmarks.parity import cells, run

    steps = arguments.steps or (5 if arguments.quick else 20)
    if steps < 1 or arguments.batch < 2 or arguments.batch % 2:
        raise ConfigError(f"--steps={steps} --batch={arguments.batch}: give a step or more, of an even number of samples")
    wanted = cells.quick() if arguments.quick else cells.full(arguments.batch, arguments.only or ())
    if not wanted:
        raise ConfigError(f"--only {' '.join(arguments.only)} names no cell: names begin as ours-int8-zero3-ranks2")
    plan, out = cells.Plan(arguments.config, steps, arguments.batch), out_of(arguments)
    run.prepare(plan)
    found = run.parity(plan, wanted, out, again(arguments), say=aside, limit_s=arguments.limit)
    say(arguments, (out / "table.md").read_text(encoding="utf-8"))
    return refused(run.check, found)


def run_faults(arguments: argparse.Namespace) -> Any:
    from benchmarks.faults import cases, suite

    chosen, out = suite.chosen(cases.CASES, arguments.quick, arguments.only), out_of(arguments)
    found = suite.faults(chosen, out, again(arguments), say=aside)
    say(arguments, (out / "table.md").read_text(encoding="utf-8"))
    return refused(suite.check, found)


def run_load(arguments: argparse.Namespace) -> Any:
    from benchmarks import load

    if arguments.ranks < 1:
        raise ConfigError(f"--ranks {arguments.ranks} loads nothing: give at least 1")
    found = load.load(arguments.ranks, load.QUICK if arguments.quick else load.SHAPE)
    say(arguments, load.table(found))
    if arguments.out:
        load.write(found, Path(arguments.out), again(arguments))
    return refused(load.check, found)


def run_step(arguments: argparse.Namespace) -> Any:
    from benchmarks import providers, step

    steps, rounds = arguments.steps or (5 if arguments.quick else 20), arguments.rounds or (1 if arguments.quick else 3)
    names = [field.name for field in fields(providers.Shape)]
    shapes = [providers.Shape(*each) for each in itertools.product(*(getattr(arguments, name) for name in names))]
    counts = [n for shape in shapes for n in (*vars(replace(shape, zero=1)).values(), rounds, steps) if isinstance(n, int)]
    if min(counts) < 1:
        raise ConfigError("--rounds, --steps and the numbers of a shape measure nothing below 1: give at least 1 of each")
    if arguments.providers is None:
        found, table = step.measured(arguments.configs, steps, again(arguments), say=aside), step.table
    else:
        names = arguments.providers or list(providers.PROVIDERS)
        table = providers.memory_table if arguments.verb == "memory" else providers.table
        found = providers.measured(names, shapes, rounds, steps, again(arguments), say=aside)
    return show(arguments, found, table(found))


def run_generate(arguments: argparse.Namespace) -> Any:
    from benchmarks import generate

    batch, rounds = arguments.batch or (8 if arguments.quick else 32), arguments.rounds or (2 if arguments.quick else 7)
    shape = (batch, arguments.prompt, arguments.tokens, rounds)
    if min(shape) < 1:
        raise ConfigError(f"--batch, --prompt, --tokens, --rounds {shape} measure nothing: give at least 1 of each")
    found = generate.measured(arguments.llm, *shape, again(arguments), say=aside)
    return show(arguments, found, generate.table(found))


def run_start(arguments: argparse.Namespace) -> Any:
    from benchmarks import start

    pictures, runs = arguments.pictures or (60 if arguments.quick else 2000), arguments.runs or 3 - 2 * arguments.quick
    if pictures < 40 or runs < 1:
        raise ConfigError(f"--pictures {pictures} --runs {runs} measures nothing: give at least 40 pictures and a run")
    found = start.measured(pictures, runs, arguments.before, again(arguments), say=aside)
    return show(arguments, found, start.table(found))


def run_data(arguments: argparse.Namespace) -> Any:
    from benchmarks import data

    sizes = arguments.rows or ([1_000] if arguments.quick else [1_000, 10_000, 100_000, 1_000_000])
    if min(sizes) < 100:
        raise ConfigError(f"--rows {min(sizes)} is less than a batch of pictures: give 100 or more")
    found = data.measured(sizes, again(arguments), say=aside)
    return show(arguments, found, data.table(found))


def run_encode(arguments: argparse.Namespace) -> Any:
    from benchmarks import encode

    clips = 120 if arguments.quick else 1000
    clips = clips if arguments.clips is None else arguments.clips
    if clips < 1:
        raise ConfigError(f"--clips {clips} measures nothing: give at least 1")
    found = encode.measured(clips, encode.TINY if arguments.quick else encode.BASE, again(arguments), say=aside)
    return refused(encode.check, show(arguments, found, encode.table(found)))


def run_stream(arguments: argparse.Namespace) -> Any:
    from benchmarks import stream

    sizes = arguments.rows or ([2_000, 4_000] if arguments.quick else [100_000, 1_000_000])
    if min(sizes) < stream.FILES:
        raise ConfigError(f"--rows {min(sizes)} is less than a row in each of {stream.FILES} files: give more")
    found = stream.measured(sizes, again(arguments), say=aside)
    return refused(stream.check, show(arguments, found, stream.table(found)))


def run_transcribe(arguments: argparse.Namespace) -> Any:
    from benchmarks import transcribe

    clips = (20 if arguments.quick else 100) if arguments.clips is None else arguments.clips
    if clips < 1:
        raise ConfigError(f"--clips {clips} measures nothing: give at least 1")
    found = transcribe.measured(arguments.model, clips, again(arguments), say=aside)
    return refused(transcribe.check, show(arguments, found, transcribe.table(found)))


def run_plan(arguments: argparse.Namespace) -> Any:
    from benchmarks import plan

    found = plan.measured(arguments.configs, arguments.quick, again(arguments), aside, arguments.memory_alone)
    return show(arguments, found, plan.table(found))


def run_ledger(arguments: argparse.Namespace) -> Any:
    from benchmarks.claims import CLAIMS, ledger
    from mitrain.core.files import write_atomic, write_json

    studies = Path(arguments.results) if arguments.results else ledger.RESULTS
    if arguments.measure:
        wanted = ledger.jobs(CLAIMS, studies, ledger.STUDIES)
        ledger.measure([job for job in wanted if job.study.kind == "count" or not arguments.quick], say=aside)
    found = ledger.ledger(results=studies)
    text = ledger.table(found)
    if arguments.out:
        write_json(Path(arguments.out) / "ledger.json", found)
        write_atomic(Path(arguments.out) / "ledger.md", text)
    say(arguments, text)
    return found


def run_kernels(arguments: argparse.Namespace) -> Any:
    words = [sys.executable, str(KERNELS), *(["--quick"] if arguments.quick else [])]
    if not arguments.json:
        done, found = subprocess.run(words, check=False), None
    else:
        done = subprocess.run([*words, "--json"], stdout=subprocess.PIPE, check=False)
        found = json.loads(done.stdout or "null")
    return refused(kernels_check(done.returncode), found)


def kernels_check(code: int) -> Callable[[Any], None]:
    def check(_: Any) -> None:
        if code:
            raise KernelsError(code)

    return check


def show(arguments: argparse.Namespace, found: dict[str, Any], table: str) -> dict[str, Any]:
    """What was found, once its table is printed and, with --out, both are written."""
    say(arguments, table)
    if arguments.out:
        results.write(Path(arguments.out), found, table)
    return found


def aside(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def again(arguments: argparse.Namespace) -> str:
    """The command that makes these results again: the benchmark with the options that are not at their defaults."""
    words = arguments.parser.prog.split()
    for action in sorted(arguments.parser._actions, key=lambda action: action.dest == "out"):  # the last, as people write it
        value = getattr(arguments, action.dest, None)
        if action.dest not in ("help", "json") and value != action.default:
            words.append(action.option_strings[0])
            words += [] if value is True else map(str, value if isinstance(value, list) else [value])
    return shlex.join(words)
