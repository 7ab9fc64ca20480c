"""`mitrain completion`: what bash offers after a few letters."""

import contextlib
import io
import shutil
import subprocess
import sys

import pytest

from mitrain.cli import main


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    pytest.importorskip("shtab", reason="needs the extra [completion]")

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        assert main(["completion", "bash"]) == 0
    path = tmp_path_factory.mktemp("completion") / "mitrain.bash"
    path.write_text(shown.getvalue())
    return path


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["tra"], {"train"}),
        (["data", "in"], {"inspect"}),
        (["eval", "--ch"], {"--checkpoint"}),
        (["eval", "run", "--control", "sh"], {"shuffle"}),
        (["train", "bi"], {"birds.yaml", "birds"}),
        (["serve", "bi"], {"birds"}),
    ],
)
def test_what_is_offered(script, tmp_path, words, offered):
    (tmp_path / "birds").mkdir()
    (tmp_path / "birds.yaml").touch()
    asked = f'source "{script}"; COMP_WORDS=(mitrain {" ".join(words)}); COMP_CWORD={len(words)};'
    asked += f'_shtab_mitrain mitrain {words[-1]} {["mitrain", *words][-2]}; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", asked], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == offered


def test_without_the_extra_it_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert "pip install 'mitrain[completion]'" in capsys.readouterr().err
