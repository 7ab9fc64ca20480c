"""Every tutorial is followed to its end, with tiny models under the names of real ones; jobs and launchers by -m slow."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hub import TOKEN, running
from huggingface_hub import constants
from ranks import PATH, free_port, need
from slurm_cluster import PROGRAMS, Cluster
from source_tree import ROOT
from tutorials import blocks, follow, stand_ins

from mitrain.cli import main, parser

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:httpx2")  # of the Hub's client, in its uploads
PAGES = {path.stem for path in (ROOT / "docs" / "tutorials").glob("*.md")}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return stand_ins(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def here(tmp_path, monkeypatch, cache):
    """A reader's folder, with the clone's launchers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MITRAIN_CACHE", str(cache))
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    return tmp_path


def scores(run):
    lines = [json.loads(line) for line in (Path("runs") / run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "val"]


def test_own_pictures(here):
    assert follow("own-pictures", {}) == 7
    assert scores("birds")
    assert len(Path("species.jsonl").read_text().splitlines()) == 90


def test_own_questions(here):
    assert follow("own-questions", {}) == 7
    answers = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert len(answers) >= 8 and {line["answer"] for line in answers} <= {"red", "green", "blue", "yes", "no"}


def test_speech(here):
    pytest.importorskip("soundfile", reason="needs the extra [audio]")
    assert follow("speech", {}) == 7
    assert scores("clips")


def test_publish_and_serve(here, monkeypatch, capfd):
    pytest.importorskip("uvicorn", reason="needs the extra [serve]")
    pytest.importorskip("python_multipart", reason="needs the extra [serve]")
    run_of_birds()
    port, processes = str(free_port()), []

    def curl(words):
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        said.append(json.loads(done.stdout))

    def serve(words):
        process = subprocess.Popen([sys.executable, "-m", *words], stderr=subprocess.PIPE, text=True)
        processes.append(process)
        assert port in next(line for line in process.stderr if "answers at" in line)

    said = []
    with running() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        values = {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(here / "hub")}
        for name, value in (values | {"HF_HUB_DISABLE_PROGRESS_BARS": True}).items():
            monkeypatch.setattr(constants, name, value)
        try:
            curl_or_not = curl if shutil.which("curl") else lambda words: None
            count = follow(
                "publish-and-serve",
                {"mitrain serve": serve, "curl": curl_or_not},
                lambda code: code.replace("8000", port),
            )
        finally:
            for process in processes:
                process.send_signal(signal.SIGTERM)
                process.communicate(timeout=60)
        assert count == 8 and "YOUR-NAME/birds" in hub.repositories
    assert not shutil.which("curl") or said[1]["labels"][0] in ("robin", "parrot", "jay")


def run_of_birds():
    """What the page on one's own pictures leaves behind."""
    table_of_birds()
    assert main(["train", "birds.yaml", "train.epochs=2", "--run-dir", "runs/birds"]) == 0


def table_of_birds():
    exec(next(code for language, code in blocks("own-pictures") if language == "python"), {})
    assert main(["init", "--data", "birds.csv"]) == 0


def test_cluster_as_far_as_one_process_goes(here):
    table_of_birds()
    assert follow("cluster", {"bash": understood, "sbatch": understood}) == 3


def understood(words):
    """The script is there and mitrain takes what it is handed."""
    script = next(word for word in words if word.startswith("launch/"))
    subprocess.run(["bash", "-n", script], check=True)
    rest = words[words.index(script) + 1 :]
    assert callable(parser().parse_args(rest[1:] if script.endswith("local.sh") else ["train", *rest]).run)


@pytest.mark.slow
@pytest.mark.slurm
def test_cluster_in_a_real_slurm(here, tmp_path_factory, monkeypatch):
    need(*PROGRAMS)
    table_of_birds()
    for name, value in {"PYTHON": sys.executable, "PYTHONPATH": PATH, "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))

    def submit(words):
        said = cluster.run(*words, **{**os.environ, "PATH": cluster.env["PATH"], "MITRAIN_ROOT": str(ROOT)})
        assert cluster.wait(said.split()[-1])["JobState"] == "COMPLETED", [
            log.read_text() for log in here.glob("slurm-*.log")
        ]

    try:
        cluster.start()
        assert follow("cluster", {"bash": lambda words: subprocess.run(words, check=True), "sbatch": submit}) == 3
    finally:
        cluster.stop()
    assert scores("two") and [path for path in (here / "runs").glob("slurm-*") if (path / "summary.json").is_file()]


def test_every_tutorial_has_its_test():
    tests = Path(__file__).read_text(encoding="utf-8")
    assert len(PAGES) >= 5 and [page for page in PAGES if f'"{page}"' not in tests] == []
