"""What stands on the command line, before any command runs."""

import subprocess
import sys

import pytest

from mitrain.cli import main, parser


@pytest.mark.parametrize(
    "words",
    [
        ["train", "c.yaml", "--dry-run", "train.steps=3", "--json", "model.dtype=bf16"],
        ["train", "c.yaml", "train.steps=3", "model.dtype=bf16", "--dry-run", "--json"],
    ],
)
def test_settings_may_stand_behind_options(words):
    found = parser().parse(words)
    assert found.overrides == ["train.steps=3", "model.dtype=bf16"] and found.dry_run and found.json


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["train", "c.yaml", "--dry-runn"],
            "--dry-runn means nothing to mitrain train (did you mean '--dry-run'?)",
        ),
        (["train", "c.yaml", "--dry-run", "stray"], "stray means nothing to mitrain train: see mitrain train --help"),
        (["eval", "run", "--baselines", "a=b"], "a=b means nothing to mitrain eval: see mitrain eval --help"),
        (["compare"], "the following arguments are required: STUDY: see mitrain compare --help"),
        (
            ["eval", "run", "--control", "shufle"],
            "argument --control: invalid choice: 'shufle' (did you mean 'shuffle'?)",
        ),
        (["trian", "c.yaml"], "no command 'trian' (did you mean 'train'?) among init, config,"),
        (
            ["data", "lst"],
            "no command 'lst' (did you mean 'list'?) among list, prepare, inspect: see mitrain data --help",
        ),
        ([], "the following arguments are required: COMMAND: see mitrain --help"),
    ],
)
def test_a_mistake_is_one_line(capsys, words, said):
    with pytest.raises(SystemExit) as ended:
        main(words)
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 1 and lines[0].startswith(f"mitrain: {said}")


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--text", "a\udcff"], "--text 'a\\udcff'"),
        (["--text", "a", "--candidates", "b,\ud800"], "--candidates '\\ud800'"),
    ],
)
def test_half_a_character_is_refused_before_anything_is_opened(capsys, option, said):
    assert main(["predict", "nowhere", "--image", "a.png", *option]) == 2
    assert capsys.readouterr().err == f"mitrain: {said} holds half a character: write it in UTF-8\n"


def test_a_configuration_that_cannot_be_read_is_refused_before_torch_is_imported(tmp_path):
    (tmp_path / "run.yaml").write_text("a: &a [*a]\n")
    code = "import sys, mitrain.cli as c; print(c.main(['train', sys.argv[1]]), 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run.yaml")], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["2", "False"] and "refers to *a in line 1" in done.stderr


def test_a_command_imports_no_other():
    code = "import sys, mitrain.cli as c; c.parser(['runs']); print(*(m for m in sys.modules if 'mitrain.cli.' in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"mitrain.cli.commands", "mitrain.cli.shared", "mitrain.cli.runs"}


def test_the_interpreter_ends_without_looking_at_all_objects_again():
    """Its last collections took seconds with torch loaded, after a server had answered everybody."""
    program = "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count() > 0)); import mitrain.cli"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "True\n"
