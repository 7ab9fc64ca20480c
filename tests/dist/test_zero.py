"""DeepSpeed's stages on several ranks: every number of one process, weights in shards, checkpoints free of both."""

from folders import own_cache
import json
import shutil
import sys

import pytest
import torch
from ranks import STEPS, losses, make_world, run_folder
from zero_worker import NARROW, POISONED, SPREADS

import mitrain
from mitrain.training.checkpoint.folder import complete_checkpoints
from mitrain.cli import main
from mitrain.inference.scoring import ask
from mitrain.training import runs

pytest.importorskip("deepspeed", reason="deepspeed is not installed")

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
"""float32 sums in another order, amplified by Adam's division by a root."""


@pytest.fixture(scope="module")
def engines(forge, tmp_path_factory):
    out = tmp_path_factory.mktemp("engines")
    ended = forge.start(2, "zero_worker:compare", out, MITRAIN_TIMEOUT="120").wait()
    assert [e.code for e in ended] == [0, 0], ended[0].err + ended[1].err
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


def assert_same_results(found: list, plain: list) -> None:
    for one, two in zip(found, plain, strict=True):
        assert one[:2] == two[:2] and one[5] == two[5]
        assert one[2:5] == pytest.approx(two[2:5], rel=1e-5, nan_ok=True)


def assert_same_tensors(found: dict, plain: dict) -> None:
    """``unused`` and its state are the plain engine's too, but for the state of a parameter that never was stepped."""
    assert {n for n in found if "unused" not in n} == {n for n in plain if "unused" not in n}
    for name, values in plain.items():
        torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(values), **CLOSE)


@pytest.mark.parametrize("spread", [json.dumps(s) for s in SPREADS])
class TestEngine:
    def test_it_is_the_plain_engine(self, engines, spread):
        results, tensors = engines[0][spread]["whole"]
        assert_same_results(results, engines[0]["plain"][0])
        assert_same_tensors(tensors, engines[0]["plain"][1])

    def test_ranks_agree_bit_for_bit(self, engines, spread):
        for key, (results, tensors) in ((k, v) for k, v in engines[0][spread].items() if k != "bucket"):
            assert repr(results) == repr(engines[1][spread][key][0]) and tensors == engines[1][spread][key][1]

    def test_one_rank_alone_makes_all_skip_and_may_have_no_samples(self, engines, spread):
        results, _ = engines[0][spread]["whole"]
        assert [r[:2] for r in results[POISONED : NARROW + 1]] == [[False, "non-finite loss"], [True, None]]
        assert [r[5] for r in results] == [1.0 if i == NARROW else 13.0 for i in range(6)]

    def test_its_state_goes_on_bit_for_bit(self, engines, spread):
        results, tensors = engines[0][spread]["resumed"]
        whole, end = engines[0][spread]["whole"]
        assert repr(results) == repr(whole[2:]) and tensors == end

    def test_the_bucket_for_gradients_holds_a_quarter_of_them(self, engines, spread):
        found, trained, users = engines[0][spread]["bucket"]
        assert (found, users) == (-(-trained // 4), 77)

    def test_a_batch_that_is_tried_before_the_first_step_leaves_no_trace(self, engines, spread):
        for tried, whole in (
            (engines[0][spread]["tried"], engines[0][spread]["whole"]),
            (engines[0]["plain tried"], engines[0]["plain"]),
        ):
            assert repr(tried) == repr(whole)

    @pytest.mark.parametrize("way", ["from plain", "to plain"])
    def test_its_state_is_the_plain_engines(self, engines, spread, way):
        results, tensors = engines[0][spread][way]
        assert_same_results(results, engines[0]["plain"][0][2:])
        assert_same_tensors(tensors, engines[0]["plain"][1])


def test_a_setting_that_deepspeed_does_not_know_is_one_line(engines):
    for found in engines:
        assert "reduce_bucket_sise" in found["refusal"] and found["refusal"].endswith("check zero.config")
        assert "\n" not in found["refusal"]


def test_a_head_finds_the_embedding_that_it_shares_still_gathered(engines):
    """However far they are apart: each step gathers the shared weights and the frozen layer once, and keeps nothing.

    The first step, in which DeepSpeed learns the modules' order, does not tell.
    """
    embedding, layer = 4 * 100 * 8, 4 * 8 * 8
    for found in engines:
        assert found["tied"][1:] == [[embedding + layer, 0]] * 2
        assert found["headless"][1:] == [[embedding + layer, 0]] * 2, "a head that is not called keeps nothing either"


def test_what_is_gathered_in_place_is_what_torch_gathers(engines):
    assert all(all(found["gathers"]) for found in engines)


def test_a_small_model_is_not_gathered_whole_unless_the_user_says_so(engines):
    """Of sixteen layers two are an eighth; the one that runs comes on top, and one that is fetched ahead."""
    for found in engines:
        assert max(found["layers"]) <= 4 and found["all layers"][-1] == 16


FAR = {"stage3_param_persistence_threshold": 0}
"""No weight stays whole on every rank, as of large models."""
LOW = {
    "fp32": [],
    "int8": ["model.quantize=int8", "model.quantize_embedding=true"],
    "nf4": ["model.quantize=nf4"],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world, and the run of one process in each precision."""
    with own_cache(make_world(tmp_path_factory.mktemp("zero"))) as path:
        for name, settings in LOW.items():
            assert main(["train", str(path / "config.yaml"), f"name={name}", *settings, "--runs", str(path)]) == 0
        yield path


def launch(forge, world, out, ranks: int, *arguments: str, worker: str = "train") -> list[dict]:
    """``mitrain train ARGUMENTS`` on ranks with a cache of their own; what each rank found."""
    env = {"MITRAIN_CACHE": str(out / "cache"), "MITRAIN_TIMEOUT": "120", "TORCH_EXTENSIONS_DIR": str(out / "built")}
    ended = forge.start(ranks, f"zero_worker:{worker}", world, out, *arguments, **env).wait()
    assert [e.code for e in ended] == [0] * ranks, "\n".join(e.err for e in ended)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(ranks)]


def learnt(out) -> list[list[str]]:
    """For each rank what `zero_worker.speaking` has written."""
    return [(out / f"{rank}.ahead").read_text().split()[1:] for rank in range(2)]


@pytest.fixture(scope="module")
def shards(forge, world, tmp_path_factory):
    """For a precision: the run of two ranks at stage 3, nothing encoded before, and what they found; made once."""
    made = {}

    def run(precision: str) -> tuple:
        if precision not in made:
            out = tmp_path_factory.mktemp(f"shards-{precision}")
            settings = ["name=shards", "zero.stage=3", *LOW[precision], "--runs", str(out)]
            found = launch(forge, world, out, 2, str(world / "config.yaml"), *settings)
            made[precision] = run_folder(out, "shards"), found
        return made[precision]

    return run


@pytest.mark.parametrize("precision", list(LOW))
def test_a_run_in_shards_is_the_run_of_one_process(world, shards, precision):
    """Encoders, trunk, training and evaluation, all in shards; nothing is compiled on the spot."""
    folder, found = shards(precision)
    assert losses(folder) == pytest.approx(losses(run_folder(world, precision)), rel=1e-5)
    assert [rank["extensions"] for rank in found] == [[], []]


@pytest.mark.parametrize("precision", list(LOW))
def test_no_rank_holds_more_than_its_shard_and_what_is_small(shards, precision):
    """The tiny models' parameters are all small, so what stays gathered is counted apart: a shard is half, rounded up
    by at most an element a parameter."""
    for rank in shards(precision)[1]:
        for held in rank["held"].values():
            assert held["whole"] / 2 <= held["shards"] <= held["whole"] / 2 + held["slack"]
            assert held["gathered"] <= held["whole"]


def test_shards_that_the_cache_stands_for_are_let_go_of_until_something_runs_them(forge, world, tmp_path):
    """What is said after every step runs all layers, which no step does. A second run finds the cache filled."""
    one = (str(world / "config.yaml"), "train.accumulate=1", "train.check_largest=off", "--runs", str(tmp_path))
    assert main(["train", *one, "name=alone"]) == 0
    shared = (*one, "zero.stage=3", f"zero.config={json.dumps({'zero_optimization': FAR})}")
    found = launch(forge, world, tmp_path, 2, *shared, "name=lean", "train.eval_every=1", worker="speaking")
    assert learnt(tmp_path) == [[], []]  # each step is followed by more than the next one
    filled = launch(forge, world, tmp_path, 2, *shared, "name=filled", "train.eval_every=3", worker="speaking")
    assert learnt(tmp_path)[0] == learnt(tmp_path)[1] != [] and {order[0] for order in learnt(tmp_path)[0]} == {"0"}
    for rank, later in zip(found, filled, strict=True):
        assert later["held"]["text"]["shards"] == rank["first"]["text"]["shards"] < rank["held"]["text"]["shards"]
        vision, text = (rank["first"][name] for name in ("encoder0", "text"))
        assert vision["shards"] == vision["slack"]  # an element of each parameter
        assert text["shards"] == rank["last"]["text"]["shards"] < 0.8 * text["whole"] / 2
        assert rank["run"] == rank["loaded"]
    assert losses(run_folder(tmp_path, "lean")) == pytest.approx(losses(run_folder(tmp_path, "alone")), rel=1e-5)


def cut_run(shards, tmp_path):
    """The sharded run without its checkpoint of the last step."""
    folder = tmp_path / "cut"
    shutil.copytree(shards("fp32")[0], folder)
    shutil.rmtree(folder / "checkpoints" / f"step-{STEPS:08d}")
    assert [manifest.step for _, manifest in complete_checkpoints(folder / "checkpoints")] == [3]
    return folder


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (3, 1), (4, 3)])
def test_a_checkpoint_of_two_ranks_in_shards_goes_on_anywhere(forge, world, shards, ranks, stage, tmp_path):
    folder = cut_run(shards, tmp_path)
    launch(forge, world, tmp_path, ranks, "--resume", str(folder), f"zero.stage={stage}")
    assert losses(folder) == pytest.approx(losses(run_folder(world, "fp32")), rel=1e-5)


def test_in_the_same_shards_it_goes_on_bit_for_bit(forge, world, shards, tmp_path):
    folder = cut_run(shards, tmp_path)
    launch(forge, world, tmp_path, 2, "--resume", str(folder))
    assert losses(folder) == losses(shards("fp32")[0])


@pytest.mark.parametrize("stage", [2, 3])
def test_a_model_that_diverges_on_one_rank_fails_on_all_and_is_not_saved(forge, world, stage, tmp_path):
    settings = (f"zero.stage={stage}", "train.save_every=1", "--run-dir", tmp_path / "spoilt")
    env = {"MITRAIN_CACHE": str(tmp_path / "cache"), "MITRAIN_TIMEOUT": "120"}
    ended = forge.start(2, "worker:spoilt", 1, 2, world / "config.yaml", *settings, **env).wait()
    assert [e.code for e in ended] == [2, 2], "\n".join(e.err for e in ended)
    assert "is not finite at step 2" in ended[0].err  # what all ranks meet alike the first says for them
    assert [manifest.step for _, manifest in complete_checkpoints(tmp_path / "spoilt" / "checkpoints")] == [1]


def test_an_adapter_of_int8_shards_loads_in_one_line_without_deepspeed(world, shards, tmp_path, monkeypatch):
    folder, picture = shards("int8")[0], next((world / "data").rglob("*.png"))
    assert main(["export", str(folder), "--out", str(tmp_path / "adapter")]) == 0
    expected = ask(runs.open_run(folder), {"image": str(picture)}, "what colour ?", candidates=["red", "blue"]).values
    for name in [name for name in sys.modules if name.split(".")[0] == "deepspeed"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    found = mitrain.from_pretrained(tmp_path / "adapter").predict(picture, "what colour ?", candidates=["red", "blue"])
    assert found == expected and set(found["probabilities"]) == {"red", "blue"}


def test_evaluation_and_generation_in_shards(world, forge, tmp_path, capsys):
    """13 samples in batches of 5 are two rounds on rank 0 and one on rank 1."""
    folder = tmp_path / "sharded"
    shutil.copytree(run_folder(world, "fp32"), folder)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("stage: 0", "stage: 3"))
    asked = (str(folder), "--split", "test", "--generate", "--samples", "13", "--json")
    env = {"MITRAIN_CACHE": str(tmp_path / "cache"), "MITRAIN_TIMEOUT": "120"}
    ended = forge.start(2, "zero_worker:score", *asked, **env).wait()
    assert [e.code for e in ended] == [0, 0], ended[0].err + ended[1].err
    assert ended[1].out == ""
    assert main(["eval", *asked]) == 0
    assert json.loads(ended[0].out) == json.loads(capsys.readouterr().out)
