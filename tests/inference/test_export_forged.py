"""What a stranger writes into an export costs nothing and reaches no page: bounds, links, markup."""

import json
import os
import shutil

import pytest
import torch
from exported import PROMPT, make_config, make_run, make_world, resigned
from folders import own_cache
from transformers import AutoModelForCausalLM

import mitrain
from mitrain.core.errors import CheckpointError, ConfigError, ModelError, UserError
from mitrain.inference.export import export
from mitrain.methods import export_format
from mitrain.models.encoders.image import ImageConfig, preprocessing

CONFIG, WEIGHTS = "mitrain.json", "mitrain.safetensors"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with own_cache(make_world(tmp_path_factory.mktemp("forged"))) as path:
        export(make_run(path), path / "exported")
        yield path


@pytest.fixture
def copied(world, tmp_path):
    return shutil.copytree(world / "exported", tmp_path / "copy")


def forged(folder, change):
    values = json.loads((folder / CONFIG).read_text())
    change(values)
    (folder / CONFIG).write_text(json.dumps(resigned(values)))
    return folder


def encoder(values):
    return values["run"]["encoders"][0]["preprocess"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v: encoder(v).update(std=[0.0, 1.0, 1.0]), "preprocess.std.0=0.0"),
        (lambda v: encoder(v).update(std=[1e-300, 1.0, 1.0]), "preprocess.std.0=1e-300"),
        (lambda v: encoder(v).update(mean=[1e300, 1.0, 1.0]), "preprocess.mean.0=1e"),
        (lambda v: encoder(v).update(size=4088), "size=4088 makes 85264 patches of a picture, more than 16384"),
        (lambda v: v["run"]["answers"].update({PROMPT: ["x"] * 100_000}), "at most 1000 items"),
        (lambda v: v["run"].update(answers={str(i): ["x"] for i in range(257)}), "at most 256 items"),
        (lambda v: v["run"]["answers"].update({PROMPT: ["x" * 1001]}), "at most 1000 characters"),
        (lambda v: v["run"]["config"]["task"].update(template="{prompt:>1000000000}"), "is not a field of this template"),
        (lambda v: v["run"]["config"]["task"].update(template="{prompt.__class__}"), "is not a field of this template"),
        (lambda v: v["adapter"].update(rank=5), None),  # load_adapter's alone: the run's configuration counts
        (lambda v: v["run"]["config"]["adapter"].update(rank=65536), "which is no adapter|has shape .*65536"),
    ],
)  # fmt: skip
def test_forged_settings_are_one_line(copied, change, says):
    forged(copied, change)
    if says is None:
        assert mitrain.from_pretrained(copied)
        return
    with pytest.raises(UserError, match=says) as refused:
        mitrain.from_pretrained(copied)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 700


@pytest.mark.parametrize("settings", [{"rank": 1 << 16}, {"rank": None, "modalities": {"image": 1 << 20}}])
def test_settings_that_imply_huge_tensors_are_refused_before_any_is_made(world, copied, settings):
    """In float32 256 MiB and 768 MiB, of a file of a few KiB: the most that the settings allow."""
    forged(copied, lambda values: values["adapter"].update(settings))
    model = AutoModelForCausalLM.from_pretrained(world / "llm")
    before = model(torch.tensor([[1, 2]])).logits
    with pytest.raises(CheckpointError, match=r"describes [\d,]{9,} trained numbers, and its weights have [\d,]+ bytes"):
        mitrain.load_adapter(model, copied)
    assert torch.equal(model(torch.tensor([[1, 2]])).logits, before)


@pytest.mark.parametrize("place", ["model", "task"])
def test_a_huge_name_is_reported_in_short(copied, place):
    def change(values):
        config = values["run"]["config"]
        (config["model"]["encoders"]["image"] if place == "model" else config["task"])["name"] = "x" * 1_000_000

    with pytest.raises(UserError, match="cannot load the image encoder|is not known") as refused:
        mitrain.from_pretrained(forged(copied, change))
    assert len(str(refused.value)) < 4100


def test_sparse_weights_are_refused_unread(world, copied, monkeypatch):
    """20 GiB that take no place on the disk, by a header that describes one huge tensor or by what follows a true one."""
    header = json.dumps({"adapter.x": {"dtype": "F32", "shape": [5 << 30], "data_offsets": [0, 20 << 30]}}).encode()
    with open(copied / WEIGHTS, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (20 << 30))
    size = (copied / WEIGHTS).stat().st_size
    forged(copied, lambda values: values.update(tensors={"sha256": "0" * 64, "bytes": size}))
    monkeypatch.setattr(export_format.folder, "read_tensors", lambda *_: pytest.fail("read"))
    with pytest.raises(CheckpointError, match=r"does not fit the adapter's own configuration: .* is missing"):
        mitrain.from_pretrained(copied)
    model = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="5,368,709,.* trained numbers beside 6 frozen ones, which is no adapter"):
        mitrain.load_adapter(model, copied)


@pytest.mark.parametrize("values", [{"image_std": [0.0, 1, 1]}, {"image_std": [1e-9, 1, 1]}, {"image_mean": [1e9, 0, 0]}])
def test_an_encoders_own_preprocessing_has_the_same_bounds(tmp_path, values):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match="is malformed: image_mean and image_std"):
        preprocessing(ImageConfig(name="x", size=28), object(), tmp_path, "vit")


def hub_cache(export_folder, path):
    """The export as the Hub's cache keeps a repository: content in blobs, a snapshot of links to it."""
    repository = path / "models--owner--name"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(export_folder.iterdir())):
        shutil.copy(file, repository / "blobs" / f"{number:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
    return snapshot


def test_an_export_in_the_hubs_cache_is_opened(world, copied, tmp_path):
    snapshot = hub_cache(copied, tmp_path / "hub")
    images = sorted((world / "data" / "images").glob("*.png"))
    (tmp_path / "here").symlink_to(snapshot)
    expected = mitrain.from_pretrained(copied).predict(images[0], PROMPT)
    for folder in (snapshot, tmp_path / "here"):
        assert mitrain.from_pretrained(folder).predict(images[0], PROMPT) == expected


def test_other_links_are_refused_with_what_to_do(copied, tmp_path):
    snapshot = hub_cache(copied, tmp_path / "hub")
    outside = shutil.copy(copied / WEIGHTS, tmp_path / "outside")
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to(outside)
    os.replace(copied / CONFIG, tmp_path / "config")
    (copied / CONFIG).symlink_to(tmp_path / "config")
    for folder, name in ((snapshot, WEIGHTS), (copied, CONFIG)):
        with pytest.raises(CheckpointError, match=rf"{name} is a link, and not within.*: copy the folder with cp -rL"):
            export_format.read(folder)


EVIL = "x<script>alert(1)</script>`|\n# h\x1b[0m ![a](b) & *c*"


def test_names_are_text_in_the_card(world, copied):
    def change(values):
        values["base_model_name_or_path"] = EVIL
        run = values["run"]
        run["config"]["model"]["encoders"]["image"]["name"] = EVIL
        run["config"]["data"]["source"] = EVIL
        run["config"]["task"]["template"] = f"{EVIL} ```\n {{prompt}}"
        run["metrics"] = {EVIL: {EVIL: 1.0}}

    card = export_format.model_card(export_format.read(forged(copied, change)).contents)
    assert card.isprintable() or all(c.isprintable() or c == "\n" for c in card)
    block = card.split("```json\n")[1].split("```")[0]
    for raw in ("<script", "</script", "![a]", "`|", "\n# h"):
        assert raw not in card.replace(block, block.replace("![a]", ""))
    assert card.count("```") == 4 and card.count("\n# ") == 1
    assert "x&#60;script&#62;alert(1)&#60;/script&#62;&#96;&#124;" in card and "<code>x&#60;script" in card
    assert json.loads(block)["task"]["template"] == f"{EVIL} ```\n {{prompt}}"


def test_many_answers_are_not_exported(monkeypatch, world):
    monkeypatch.setattr(mitrain.inference.export, "ANSWERS_KEPT", 3)
    assert mitrain.inference.export.training_answers(make_config(world)) == {}
    with pytest.raises(ConfigError, match="is no multiple|patches of a picture"):
        preprocessing(ImageConfig(name="x", size=4088), type("S", (), {"patch_size": 14}), "x", "vit")
