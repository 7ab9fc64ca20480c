"""``mitrain bench journeys``: what a stranger does by the documentation alone, timed from the first command to its success.

Each journey runs the documentation's own commands as whole processes in an empty folder. The frozen models are tiny random
ones under the names of the prepared ones, so that what is timed is mitrain and not a model.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import bare_system
from mitrain.core import markdown
from mitrain.core.provenance import made_with, sentence

ROOT = Path(__file__).parents[1]
SUPPORT = ROOT / "tests" / "support"
LIMIT_S = 3600.0
BLOCK = re.compile(r"```(?:bash|python)\n(.*?)```", re.S)
ASK = "mitrain predict runs/birds --image photos/0.png"
INTRODUCTION = (
    "What the documentation says, done in an empty folder by its own commands as whole processes, and timed from the first"
    " command to the first success, imports and a training included. The frozen models are tiny random ones under the names"
    " of the prepared ones: what is timed is mitrain, not a model. The machine was busy with other work."
)
JOURNEYS: dict[str, tuple[str, Callable[["Traveller"], str]]] = {}


class Skipped(Exception):
    """This machine lacks what the journey needs."""


class Failed(Exception):
    """A command of the journey ended otherwise than the documentation says."""


def journey(title: str, page: str) -> Callable[[Any], Any]:
    """Registers a journey by the documentation's ``page``; what it returns is its first success, in words."""
    return lambda function: JOURNEYS.setdefault(title, (page, function))[1]


@dataclass
class Traveller:
    """Somebody in an empty ``folder``; ``python``: another interpreter, ``root``: a folder for a bare system, or None."""

    folder: Path
    env: dict[str, str]
    python: str | None = None
    root: str | None = None

    def sh(self, line: str) -> str:
        """What a shell command prints; Failed with its last line."""
        words = ["bash", "-euo", "pipefail", "-c", line]
        options = {"cwd": self.folder, "env": self.env, "capture_output": True, "text": True, "timeout": LIMIT_S}
        done = subprocess.run(words, **options)
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()
            said = [line for line in said if line.startswith("mitrain: ")] or said  # libraries speak at the end, too
            raise Failed(f"{line.splitlines()[0][:80]}: {said[-1][:200] if said else done.returncode}")
        return done.stdout

    def script(self, code: str) -> str:
        (self.folder / "script.py").write_text(code, encoding="utf-8")
        return self.sh(f"{shlex.quote(sys.executable)} script.py")

    def blocks(self, page: str) -> list[str]:
        return BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))

    def birds(self) -> None:
        """The table and pictures of the first tutorial, its configuration, and a run of one epoch."""
        self.script(self.blocks("docs/tutorials/own-pictures.md")[0])
        self.sh("mitrain init --data birds.csv && mitrain train birds.yaml train.epochs=1 --run-dir runs/birds")


@journey("own pictures and a CSV file", "docs/tutorials/own-pictures.md")
def own_pictures(one: Traveller) -> str:
    table, init, _, train, *_ = one.blocks("docs/tutorials/own-pictures.md")
    one.script(table)
    one.sh(init + train)
    return f"predict names a bird: {one.sh(ASK).splitlines()[0][:60]}"


@journey("questions in LLaVA's JSON", "docs/tutorials/own-questions.md")
def own_questions(one: Traveller) -> str:
    table, train, _, ask = one.blocks("docs/tutorials/own-questions.md")
    one.script(table)
    one.sh(train)
    return f"predict answers a question: {one.sh(ask.splitlines()[0]).splitlines()[0][:60]}"


@journey("without triton", "docs/guide/install.md")
def without_triton(one: Traveller) -> str:
    """As on a system that triton has no wheels for: it cannot be imported."""
    hidden = one.folder / "hidden" / "triton"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ImportError('no triton here')\n", encoding="utf-8")
    one.env["PYTHONPATH"] = f"{hidden.parent}{os.pathsep}{one.env['PYTHONPATH']}"
    one.birds()
    return f"trained, and predict says {one.sh(ASK).splitlines()[0][:60]}"


@journey("a wheel in another Python", "docs/guide/install.md")
def wheel(one: Traveller) -> str:
    """Outside the clone, with folders in place of prepared models, which come with the clone's demonstration."""
    if not one.python:
        raise Skipped("--python names no other interpreter")
    offline = "--no-deps --no-build-isolation --no-index --disable-pip-version-check -q"
    one.sh(f"{shlex.quote(sys.executable)} -m pip wheel {offline} --wheel-dir dist {shlex.quote(str(ROOT))}")
    one.sh(
        f"uv venv -q --python {shlex.quote(one.python)} other && uv pip install -q -p other/bin/python dist/mitrain-*.whl"
    )
    one.env = {**one.env, "PYTHONPATH": "", "PATH": f"{one.folder}/other/bin{os.pathsep}{one.env['PATH']}"}
    models = Path(one.env["MITRAIN_CACHE"]) / "models"
    one.script(one.blocks("docs/tutorials/own-pictures.md")[0])
    places = f"--llm {models}/smollm2-135m-instruct --encoder image={models}/dinov2-vits14"
    one.sh(f"mitrain init --data birds.csv {places} && mitrain train birds.yaml train.epochs=1 --run-dir runs/birds")
    version = one.sh("python -c 'import sys; print(sys.version.split()[0])'").strip()
    return f"Python {version} from the wheel: {one.sh(ASK).splitlines()[0][:60]}"


HUB = """
import subprocess, sys
from hub import TOKEN, running
with running() as hub:
    import os
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(["bash", "-euc", sys.argv[1]], env=env | {"HF_HUB_CACHE": "hub"})
    sys.exit(done.returncode)
"""


@journey("the Hugging Face Hub (a stand-in on this machine)", "docs/tutorials/publish-and-serve.md")
def hub(one: Traveller) -> str:
    one.birds()
    export, _, _, push, *_ = one.blocks("docs/tutorials/publish-and-serve.md")
    one.env["PYTHONPATH"] += os.pathsep + str(SUPPORT)
    (one.folder / "with_hub.py").write_text(HUB, encoding="utf-8")
    said = one.sh(export + f"{shlex.quote(sys.executable)} with_hub.py {shlex.quote(push)}")
    return f"pushed, and loaded by its name: {said.splitlines()[-1][:60]}"


THREADS = """
from concurrent.futures import ThreadPoolExecutor
import mitrain
predictor = mitrain.from_pretrained("runs/birds")
asked = [f"photos/{number}.png" for number in range(16)]
alone = [predictor.predict(path, "") for path in asked]
with ThreadPoolExecutor(4) as pool:
    together = list(pool.map(lambda path: predictor.predict(path, ""), asked))
assert together == alone, "threads change answers"
print(len(together), "answers, each equal to the one that is asked for alone")
"""


@journey("four threads on one predictor", "docs/guide/serve.md")
def threads(one: Traveller) -> str:
    one.birds()
    return one.script(THREADS).strip()


BROWSER = """
import shutil, signal, subprocess, sys
from playwright.sync_api import sync_playwright
chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
server = subprocess.Popen(["mitrain", "serve", "runs/birds", "--port", "0"], stderr=subprocess.PIPE, text=True)
try:
    address = next(line for line in server.stderr if "answers at" in line).split("answers at ")[1].split(";")[0]
    with sync_playwright() as driver:
        page = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"]).new_page()
        page.set_default_timeout(600_000)
        page.goto(address)
        page.wait_for_selector("body[data-ready=yes]")
        page.locator("input[type=file]").first.set_input_files("photos/0.png")
        page.click("#ask")
        page.locator(".answer[data-title='answer'] .bar").first.wait_for()
        print(page.locator(".answer[data-title='answer']").first.inner_text().splitlines()[0])
finally:
    server.send_signal(signal.SIGTERM)
"""


@journey("the page in a browser (headless Chromium)", "docs/guide/serve.md")
def browser(one: Traveller) -> str:
    if one.sh("python -c 'import importlib.util as u; print(u.find_spec(\"playwright\") is not None)'").strip() != "True":
        raise Skipped("the package playwright is not installed")
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        raise Skipped("there is no Chromium")
    one.birds()
    return f"asked on the page: {one.script(BROWSER).strip()[:60]}"


NOTEBOOK = """
import nbformat, sys
from nbclient import NotebookClient
book = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(book, timeout=3600, kernel_name="python3", resources={"metadata": {"path": "."}}).execute()
print(sum(cell.cell_type == "code" for cell in book.cells))
"""


@journey("the notebook", "examples/notebooks/train_and_look.ipynb")
def notebook(one: Traveller) -> str:
    (one.folder / "notebook.py").write_text(NOTEBOOK, encoding="utf-8")
    book = ROOT / "examples" / "notebooks" / "train_and_look.ipynb"
    cells = one.sh(f"{shlex.quote(sys.executable)} notebook.py {shlex.quote(str(book))}").split()[-1]
    return f"all of its {cells} cells ran"


TRAINER = """
import sys, mitrain, torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
mit = mitrain.attach(model, mitrain.MiTConfig(modalities={"image": 32}, layers="last third"))
rows = [{"input_ids": torch.arange(3, 11), "image": torch.randn(32)} for _ in range(16)]

def collate(some):
    ids = torch.stack([row["input_ids"] for row in some])
    return {"input_ids": ids, "labels": ids, "infused": {"image": torch.stack([row["image"] for row in some])}}

options = {"max_steps": 4, "per_device_train_batch_size": 4, "save_steps": 2, "remove_unused_columns": False}
arguments = TrainingArguments("hf-run", report_to=[], use_cpu=True, **options)
trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collate, callbacks=[mitrain.AdapterCallback()])
trainer.train()
import pathlib
size = sum(path.stat().st_size for path in pathlib.Path("hf-run/checkpoint-4").iterdir())
print(f"4 steps, a checkpoint of {size >> 10} KiB")
"""


@journey("Hugging Face's Trainer", "docs/guide/python.md")
def trainer(one: Traveller) -> str:
    (one.folder / "loop.py").write_text(TRAINER, encoding="utf-8")
    model = Path(one.env["MITRAIN_CACHE"]) / "models" / "smollm2-135m-instruct"
    return one.sh(f"{shlex.quote(sys.executable)} loop.py {model}").splitlines()[-1]


@journey("a bare system, as in a container", "Dockerfile")
def bare(one: Traveller) -> str:
    """The Dockerfile's steps in a Debian that debootstrap makes in ``root``, with folders in place of prepared models."""
    if not one.root:
        raise Skipped("--root names no folder for a bare system")
    if lacking := bare_system.missing():
        raise Skipped(lacking)
    root = Path(one.root)
    work = root / "work"
    try:
        image = bare_system.build(root)
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(Path(one.env["MITRAIN_CACHE"]) / "models", work / "models")
        (work / "make.py").write_text(one.blocks("docs/tutorials/own-pictures.md")[0], encoding="utf-8")
        models = "--llm models/smollm2-135m-instruct --encoder image=models/dinov2-vits14"
        trained = f"mitrain init --data birds.csv {models} && mitrain train birds.yaml train.epochs=1 --run-dir runs/birds"
        bare_system.run(root, f"cd /work && python make.py && {trained}", image)
        said = bare_system.run(root, f"cd /work && {ASK}", image)
    except (RuntimeError, subprocess.CalledProcessError) as error:
        raise Failed(str(error)[-200:]) from error
    return f"the Dockerfile's steps ran in a chroot, and predict says {said.splitlines()[0][:60]}"


def measured(only: list[str], python: str | None, root: str | None, say: Callable[[str], object]) -> list[dict[str, Any]]:
    """A row for each journey whose title holds one of ``only`` (none: all): seconds, its success, or why there is none."""
    rows = []
    with prepared_models() as cache:
        for title, (page, run) in JOURNEYS.items():
            if only and not any(word in title for word in only):
                continue
            with tempfile.TemporaryDirectory(prefix="mitrain-journey-") as folder:
                one = Traveller(Path(folder), environment(Path(folder), cache), python, root)
                start = time.monotonic()
                try:
                    outcome, words = "works", run(one)
                except Skipped as error:
                    outcome, words = "skipped", str(error)
                except (Failed, subprocess.TimeoutExpired) as error:
                    outcome, words = "fails", str(error)
                rows.append({"journey": title, "page": page, "outcome": outcome, "first success": words})
                rows[-1]["seconds"] = round(time.monotonic() - start, 1)
                say(f"{title}: {outcome}, {rows[-1]['seconds']} s: {words}")
    return rows


@contextmanager
def prepared_models():
    """A cache in which tiny models stand for the prepared ones, as the tests have it."""
    with tempfile.TemporaryDirectory(prefix="mitrain-journeys-") as folder:
        code = "import sys; from pathlib import Path; from tutorials import stand_ins; stand_ins(Path(sys.argv[1]))"
        paths = os.pathsep.join([str(SUPPORT), str(ROOT / "tests"), *sys.path])
        words = [sys.executable, "-c", code, folder]
        subprocess.run(words, check=True, env={**os.environ, "PYTHONPATH": paths}, capture_output=True)
        yield Path(folder)


def environment(folder: Path, cache: Path) -> dict[str, str]:
    """A shell in which ``mitrain`` and ``python`` are this checkout and this interpreter."""
    tools = folder / "bin"
    tools.mkdir()
    for name, words in (("mitrain", '-m mitrain "$@"'), ("python", '"$@"')):
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words}\n', encoding="utf-8")
        (tools / name).chmod(0o755)
    paths = os.pathsep.join(str(ROOT / name) for name in ("", "kernels", "examples/demo"))
    own = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": paths, "MITRAIN_CACHE": str(cache)}
    return {**os.environ, **own}


def to(page: str) -> str:
    """A page of the repository as docs/results/journeys.md links to it."""
    return f"../{page.removeprefix('docs/')}" if page.startswith("docs/") else f"../../{page}"


def page(rows: list[dict[str, Any]], command: str, earlier: str = "") -> str:
    """docs/results/journeys.md; of journeys that are not in ``rows`` it keeps the lines of the ``earlier`` page."""
    made = {"command": command, **made_with(("torch", "transformers"))}
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in earlier.splitlines() if line.startswith("| ")}
    for row in rows:
        seconds = f"{row['seconds']:.0f}" if row["outcome"] == "works" else "–"
        link = f"[{Path(row['page']).name}]({to(row['page'])})"
        words = markdown.plain(row["first success"])
        cells = (row["journey"], link, row["outcome"], seconds, words, f"{made['commit']}, {made['date']}")
        lines[row["journey"]] = f"| {' | '.join(cells)} |"
    head = markdown.table(("journey", "by", "", "seconds", "first success", "commit, date"), [])
    shown = [lines[title] for title in JOURNEYS if title in lines]
    text = ["# Ten journeys of a stranger", "", *textwrap.wrap(INTRODUCTION, 120), "", *head, *shown]
    return "\n".join([*text, "", "Each row is of its own call; of the last one:", "", sentence(made), ""])
