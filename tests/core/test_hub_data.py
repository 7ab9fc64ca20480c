"""Data sets that Hugging Face's datasets reads, as prepared folders; without a hub, a line."""

import pytest
from embedded import COLOURS, png

from mitrain.core import hub
from mitrain.core.errors import PrepareError
from mitrain.data.images import read_image
from mitrain.data.sources import LabelledConfig
from mitrain.training.build import resolve_data


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MITRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def test_a_folder_that_load_dataset_takes_is_prepared_once_for_each_of_its_states(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra [datasets]")
    kinds = {
        "picture": datasets.Image(),
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["no", "yes"]),
    }
    cells = {"picture": [{"bytes": png(c), "path": None} for c in COLOURS], "text": ["t"] * 4, "label": [0, 1, 1, 0]}
    made = datasets.Dataset.from_dict(cells, features=datasets.Features(kinds))
    (tmp_path / "mine").mkdir()
    made.to_parquet(tmp_path / "mine" / "train.parquet")
    data = LabelledConfig(source=f"hf:{tmp_path / 'mine'}", splits={"train": "train"}, columns={"image": "picture"})
    folder = resolve_data(data)
    samples = data.read(folder, "train")
    assert [s.labels[0] for s in samples] == ["no", "yes", "yes", "no"] and resolve_data(data) == folder
    assert read_image(folder, samples[2].inputs["image"]).upright().getpixel((0, 0)) == (0, 0, 255)
    made.select([1]).to_parquet(tmp_path / "mine" / "train.parquet")
    again = resolve_data(data)
    assert again != folder and len(data.read(again, "train")) == 1


def test_what_cannot_be_read_is_one_line(tmp_path):
    """Without the package as without the data set."""
    with pytest.raises(
        PrepareError, match=r"'nobody/nothing' cannot be read \(.*\): bring it .* 'mitrain\[datasets\]'$"
    ) as caught:
        hub.ensure("hf:nobody/nothing")
    assert "\n" not in str(caught.value) and not list((tmp_path / "cache").glob("data/hf*"))
