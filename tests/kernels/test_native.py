"""The compiled arithmetic around attention: the contract through it and without it, its building, and falling back."""

import logging
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from attention_cases import (
    CASES,
    Case,
    assert_backend_right,
    assert_right,
    faint,
    largest,
    make,
    poisoned,  # noqa: F401
    run,
    some,
    truth,
    upstream_of,
)
from mitrain_kernels import native
from mitrain_kernels.infused_attention import infused_attention, sdpa_native

ROOT = Path(__file__).parents[2]
OWN = [case for case in CASES if case.gate in ("prefix", "sequence") and case.M and case.softcap is None]
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, native.COMPILERS)), reason="no C compiler is here")
FUNCTIONS = ("INFUSE_QUERY", "INFUSE_OUTPUT", "BACKWARD")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a library that nobody has opened yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(native.SWITCH, raising=False)
    native.load.cache_clear()
    yield tmp_path / "mitrain_kernels"
    native.load.cache_clear()


@pytest.fixture
def called(monkeypatch):
    """Which functions of native.c were called."""
    names = []
    for name in FUNCTIONS:
        function = getattr(sdpa_native, name)
        monkeypatch.setattr(sdpa_native, name, lambda *a, n=name, f=function: names.append(n) or f(*a))
    return names


@pytest.fixture
def without_native(monkeypatch):
    monkeypatch.setattr(sdpa_native, "library", lambda: None)


# The contract, both ways


@needs_compiler
@pytest.mark.parametrize("compiled", [True, False])
@some([Case(), Case("sequence", padding="left"), Case("token")])
def test_the_root_adds_epsilon_squared(case, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(sdpa_native, "library", lambda: None)
    inputs, options = faint(case)
    got = run(infused_attention, inputs, upstream_of(inputs), **options, backend="sdpa")
    assert_right(got, inputs, upstream_of(inputs), **options)
    other = truth(inputs, upstream_of(inputs), **options, eps=1e-3)  # its square is ε
    assert largest(got["v"] - other["v"]) > 0.1 * largest(other["v"])


@needs_compiler
@some(OWN)
def test_compiled_it_keeps_the_contract(case, called, poisoned):  # noqa: F811
    assert_backend_right(case, "sdpa", torch.float32)
    assert set(called) == set(FUNCTIONS)


@some(OWN)
def test_without_it_torch_keeps_the_contract(case, called, without_native, poisoned):  # noqa: F811
    assert_backend_right(case, "sdpa", torch.float32)
    assert not called


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("d", [16, 64, 128, 200])
@some([Case(tk=70, H=6, padding="left"), Case("sequence", tk=70, tq=40, M=1, G=4)])
def test_head_widths_and_threads(case, d, threads, monkeypatch, called):
    monkeypatch.setattr(sdpa_native, "WORTH_SHARING", 1 if threads > 1 else 1 << 60)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert_backend_right(Case(**{**vars(case), "d": d}), "sdpa", torch.float32)
    assert called


@needs_compiler
def test_the_number_of_threads_changes_nothing(monkeypatch):
    inputs, options = make(Case(tk=70, M=2, d=64), torch.float32)
    found = []
    for threads in (1, 4):
        monkeypatch.setattr(sdpa_native, "WORTH_SHARING", 1 if threads > 1 else 1 << 60)
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        found.append(run(infused_attention, inputs, upstream_of(inputs), **options, backend="sdpa"))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@needs_compiler
@some([Case(), Case("sequence", M=1), Case(padding="all", base="mixed", window=3), Case(layout="columns")])
def test_many_small_tiles(case, monkeypatch, called, poisoned):  # noqa: F811
    monkeypatch.setattr(sdpa_native, "ROWS", 4)
    assert sdpa_native.tile_width(case.H // case.G, case.tk, case.tk) == 2
    assert_backend_right(case, "sdpa", torch.float32)
    assert called.count("BACKWARD") == 1


@pytest.mark.parametrize(
    ("heads", "queries", "keys", "width"),
    [(3, 128, 128, 32), (3, 512, 512, 32), (1, 1024, 1024, 64), (1, 8192, 8192, 32), (1, 9, 9, 9), (300, 9, 9, 1)],
)
def test_tiles_fit_into_a_cores_cache(heads, queries, keys, width):
    assert sdpa_native.tile_width(heads, queries, keys) == width


@needs_compiler
@some([Case(padding="left", tq=5), Case("sequence", H=6), Case(padding="all", window=3)])
@pytest.mark.parametrize("lack", ["has_gemm", "tasks"])
def test_without_a_blas_or_work_for_half_of_the_threads_torch_goes_backward(lack, case, monkeypatch, called):
    threads = 2 * case.B * case.G + (lack == "tasks")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    if lack == "has_gemm":
        monkeypatch.setattr(sdpa_native, "has_gemm", lambda: False)
    assert_backend_right(case, "sdpa", torch.float32)
    assert set(called) == {"INFUSE_QUERY", "INFUSE_OUTPUT"}


@needs_compiler
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_of_ones_own(dtype, samples, called):
    """It says what key_padding and causal say, so that the definition knows it too."""
    inputs, options = make(Case(padding="left", tq=6), torch.float32)
    if samples == 1:
        options["key_padding"][:] = options["key_padding"][:1]
    i, j = torch.arange(3, 9)[:, None], torch.arange(9)
    mask = (options["key_padding"][:samples, None, None] & (j <= i)).expand(samples, 1, 6, 9)
    mask = mask if dtype == torch.bool else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    got = run(infused_attention, inputs, upstream_of(inputs), **options, mask=mask, backend="sdpa")
    assert_right(got, inputs, upstream_of(inputs), **options)
    assert "BACKWARD" in called


@needs_compiler
@pytest.mark.parametrize("spread", [1, 8, 130])
def test_weights_of_all_sizes_down_to_none(spread, called):
    """Scores are whole numbers down to -spread, exact in float32: what remains is the error of the exponential, and that
    of differences of weighted keys, which grows with the keys' size."""
    inputs, options = make(Case(tk=40, scale=1.0), torch.float32)
    inputs = {n: x.detach() for n, x in inputs.items()}
    inputs["q"], inputs["k_mul"] = torch.eye(8)[0].expand(2, 4, 40, 8).clone(), torch.zeros(2, 2, 4, 8)
    inputs["k"] = -torch.randint(0, spread + 1, (2, 2, 40, 8), generator=torch.Generator().manual_seed(1)).float()
    inputs = {n: x.requires_grad_() for n, x in inputs.items()}
    got = run(infused_attention, inputs, upstream_of(inputs), **options, backend="sdpa")
    assert_right(got, inputs, upstream_of(inputs), slack=max(1, spread // 8), **options)
    assert "BACKWARD" in called


@needs_compiler
@pytest.mark.parametrize("place", [0, 3, 18])
def test_a_score_that_outdoes_all_others_wherever_it_stands(place, called):
    """130 above the rest, whose exponential float32 does not hold: the highest is found among 20 keys, which are no
    multiple of a vector's lanes."""
    inputs, options = make(Case(tk=20, scale=1.0), torch.float32)
    inputs = {n: x.detach() for n, x in inputs.items()}
    inputs["q"], inputs["k_mul"] = torch.eye(8)[0].expand(2, 4, 20, 8).clone(), torch.zeros(2, 2, 4, 8)
    inputs["k"] = torch.zeros(2, 2, 20, 8)
    inputs["k"][:, :, place, 0] = 130
    inputs = {n: x.requires_grad_() for n, x in inputs.items()}
    got = run(infused_attention, inputs, upstream_of(inputs), **options, backend="sdpa")
    assert_right(got, inputs, upstream_of(inputs), slack=16, **options)
    assert "BACKWARD" in called


@needs_compiler
def test_keys_with_strides_that_a_blas_refuses(called):
    inputs, options = make(Case(tk=9), torch.float32)
    same = {n: inputs[n].detach()[:, :, :1].expand(-1, -1, 9, -1).requires_grad_() for n in "kv"}
    single, _ = make(Case(tk=1), torch.float32, seed=3)
    odd = {n: single[n].detach().as_strided((2, 2, 1, 8), (16, 8, 1, 1)).requires_grad_() for n in "kv"}
    for own in (inputs | same, single | odd):
        got = run(infused_attention, own, upstream_of(own), **options, backend="sdpa")
        assert_right(got, own, upstream_of(own), **options)
    assert called.count("BACKWARD") == 2


@needs_compiler
@pytest.mark.parametrize("shape", [(), (8,), (9, 1)])
def test_an_expanded_upstream_gradient(shape, called):
    one = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert_backend_right(Case(), "sdpa", torch.float32, upstream=one.expand(2, 4, 9, 8))
    assert called


@needs_compiler
@pytest.mark.parametrize("frozen", ["q", "k", "v", "kv", "qkv"])
def test_gradients_that_nobody_asked_for(frozen, called):
    inputs, options = make(Case(tq=5), torch.float32)
    inputs = {n: x.detach() if n in frozen else x for n, x in inputs.items()}
    assert_right(run(infused_attention, inputs, upstream_of(inputs), **options, backend="sdpa"),
                 inputs, upstream_of(inputs), **options)  # fmt: skip
    assert called


@needs_compiler
def test_what_is_not_seen_may_be_nan(called):
    """Values that padding hides do not reach the gate's sums; NaN that is seen reaches the output."""
    inputs, options = make(Case(padding="left"), torch.float32)
    inputs = {n: x.detach() for n, x in inputs.items()}
    sdpa_native.library()
    clean = infused_attention(**inputs, **options, return_state=True, backend="sdpa")[1]
    inputs["v"][0, :, :2] = float("nan")
    output, state = infused_attention(**inputs, **options, return_state=True, backend="sdpa")
    assert called and all(torch.equal(x, y) for x, y in zip(clean, state, strict=True))
    inputs["q"][1, 2, 8, 3] = float("nan")
    output = infused_attention(**inputs, **options, backend="sdpa")
    assert output[1, 2, 8].isnan().all() and output[1, 2, :8].isfinite().all()


@pytest.mark.parametrize(
    ("change", "dtype"),
    [({"gate": "head"}, torch.float32), ({"M": 0}, torch.float32), ({"M": 65, "H": 2}, torch.float32),
     ({"d": 520}, torch.float32), ({}, torch.bfloat16), ({}, torch.float64)],
)  # fmt: skip
def test_the_rest_is_torchs(change, dtype, called):
    inputs, options = make(Case(**{"H": 4, "G": 2, "tk": 3, **change}), dtype)
    run(infused_attention, inputs, upstream_of(inputs), **options, backend="sdpa")
    assert not called


# Building, keeping and doing without


def lines(caplog):
    return [record.getMessage() for record in caplog.records if record.name == native.log.name]


@needs_compiler
def test_it_is_built_once_and_kept(cache, monkeypatch, caplog):
    with caplog.at_level(logging.INFO):
        assert native.load(sdpa_native.SOURCE) is not None
    (built,) = cache.iterdir()
    native.load.cache_clear()
    monkeypatch.setattr(native, "build", lambda *_: pytest.fail("built again"))
    assert native.load(sdpa_native.SOURCE) is not None and list(cache.iterdir()) == [built]
    assert not lines(caplog)


@needs_compiler
@pytest.mark.parametrize("harm", ["cut", "changed", "empty"])
def test_a_damaged_library_is_built_anew(cache, harm):
    native.load(sdpa_native.SOURCE)
    (built,) = cache.iterdir()
    content = built.read_bytes()
    half = len(content) // 2
    built.unlink()  # another file: the opened one stays as it is
    damaged = {"cut": content[:half], "changed": content[:half] + b"!" + content[half + 1 :], "empty": b""}[harm]
    assert damaged != content
    built.write_bytes(damaged)
    assert not native.is_whole(built)
    native.load.cache_clear()
    assert native.load(sdpa_native.SOURCE) is not None
    assert native.is_whole(built)


@needs_compiler
def test_two_may_build_at_once(cache):
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(native.open_library, [sdpa_native.SOURCE] * 2))
    assert all(library.infuse_query for library in found)
    assert len(list(cache.iterdir())) == 1


def test_another_source_compiler_or_flag_is_another_library(tmp_path, monkeypatch):
    source = tmp_path / "x.c"
    source.write_text("int x;")
    compiler = sys.executable  # anything that tells its version
    names = [native.identity(source, compiler)]
    assert names == [native.identity(source, compiler)]
    monkeypatch.setattr(native, "processor", lambda: "another")
    names.append(native.identity(source, compiler))
    monkeypatch.setattr(native, "FLAGS", ("-O1",))
    names.append(native.identity(source, compiler))
    source.write_text("int y;")
    names.append(native.identity(source, compiler))
    (tmp_path / "x.h").write_text("int z;")
    names.append(native.identity(source, compiler))
    assert len(set(names)) == 5


def fall_back(caplog, reason):
    """Everything goes on, with one line that gives the reason."""
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert_backend_right(Case(M=1), "sdpa", torch.float32)
    (line,) = lines(caplog)
    assert line.startswith("native.c is not used, torch does its work: ") and reason in line and "\n" not in line


def test_without_a_compiler(cache, called, caplog, monkeypatch):
    monkeypatch.setenv("PATH", str(cache.parent))
    fall_back(caplog, "no compiler: none of cc, gcc, clang is on the path")
    assert not called


def test_switched_off(cache, called, caplog, monkeypatch):
    monkeypatch.setenv(native.SWITCH, "0")
    fall_back(caplog, "MITRAIN_KERNELS_NATIVE=0")
    assert not called


@needs_compiler
def test_where_nothing_can_be_kept(cache, called, caplog):
    cache.write_text("a file where the folder should be")
    fall_back(caplog, "File exists")
    assert not called


def planted(folder):
    """A library that anybody could have put there: whole by its checksum, and it tells when it is opened."""
    folder.mkdir(exist_ok=True)
    compiler = next(filter(None, map(shutil.which, native.COMPILERS)))
    source = folder.parent / "evil.c"
    source.write_text('#include <stdlib.h>\n__attribute__((constructor)) void run(void) { setenv("PLANTED", "1", 1); }')
    target = folder / f"{sdpa_native.SOURCE.stem}-{native.identity(sdpa_native.SOURCE, compiler)}.so"
    native.build(source, compiler, target)
    return target


def everyone(path):
    path.chmod(path.stat().st_mode | 0o022)


def given_away(path):
    os.chown(path, 65534, 65534)


def linked(path):
    away = path.with_name(path.name + "-elsewhere")
    path.rename(away)
    path.symlink_to(away)


HARMS = [
    ("folder", everyone, "can be written by other users"),
    ("file", everyone, "can be written by other users"),
    ("around", everyone, "can be written by other users"),
    ("folder", linked, "is a link"),
    ("file", linked, "is a link"),
    *((what, given_away, "belongs to user 65534") for what in ("folder", "file", "around")),
]


@needs_compiler
@pytest.mark.parametrize(("what", "harm", "reason"), HARMS, ids=lambda x: getattr(x, "__name__", x))
def test_what_others_could_have_written_is_not_run(what, harm, reason, cache, called, caplog):
    """Nor mapped: its constructor would have run. One line says so, and torch does the work."""
    if harm is given_away and os.geteuid() != 0:
        pytest.skip("only root gives files away")
    file = planted(cache)
    harm({"folder": cache, "file": file, "around": cache.parent}[what])
    fall_back(caplog, reason)
    (level,) = {record.levelname for record in caplog.records if record.name == native.log.name}
    maps = Path("/proc/self/maps")
    assert level == "WARNING" and not called
    assert not maps.exists() or str(cache.parent) not in maps.read_text()


@needs_compiler
def test_what_is_built_is_its_users_alone(cache):
    before = os.umask(0)
    try:
        native.load(sdpa_native.SOURCE)
    finally:
        os.umask(before)
    (built,) = cache.iterdir()
    assert [path.stat().st_mode & 0o777 for path in (cache, built)] == [0o700, 0o700]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
@needs_compiler
def test_a_read_only_cache(cache, called, caplog):
    cache.parent.chmod(0o500)
    fall_back(caplog, "Permission denied")
    assert not called


@pytest.mark.parametrize(
    ("script", "reason"),
    [('[ "$1" = --version ] || { echo "no such\nflag" >&2; exit 1; }', "failed: no such flag"), ("exit 3", "status 3"),
     ('for x; do [ "$last" = -o ] && echo "not code" > "$x"; last=$x; done', "too short")],
)  # fmt: skip
def test_a_compiler_that_fails(script, reason, cache, called, caplog, monkeypatch, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    fall_back(caplog, reason)
    assert not called and not list(cache.glob("build-*"))


@needs_compiler
def test_without_torchs_threads_it_works_alone(cache, monkeypatch, called):
    monkeypatch.setattr(native, "torch_pool", lambda: None)
    monkeypatch.setattr(sdpa_native, "WORTH_SHARING", 1)
    assert_backend_right(Case(tk=40, M=1), "sdpa", torch.float32)
    assert called


def test_the_switch_is_read_in_a_process_of_its_own():
    code = "from mitrain_kernels.infused_attention import sdpa_native; print(sdpa_native.library())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels"), native.SWITCH: "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"
