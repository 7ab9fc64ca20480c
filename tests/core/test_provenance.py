"""Which commit a measured number is said to come from."""

import subprocess

from mitrain.core import provenance


def test_a_commit_is_marked_by_changed_code_and_not_by_results(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    files = {name: tmp_path / name for name in ("mitrain/x.py", "docs/results/t.json", "kernels/bench/results/r.csv")}
    for path in files.values():
        path.parent.mkdir(parents=True)
        path.write_text("1")
    monkeypatch.setattr(provenance, "__file__", str(files["mitrain/x.py"]))
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    clean = provenance.commit()
    assert len(clean) >= 7 and "dirty" not in clean
    for name in ("docs/results/t.json", "kernels/bench/results/r.csv"):
        files[name].write_text("2")
    assert provenance.commit() == clean
    files["mitrain/x.py"].write_text("2")
    assert provenance.commit() == f"{clean}-dirty"


def test_outside_a_checkout_it_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "x.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert provenance.commit() == "unknown"
