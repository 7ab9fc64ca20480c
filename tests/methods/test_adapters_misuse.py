"""What would lose an adapter or its features in silence is refused; several threads may run one model."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Thread

import pytest
import torch
from folders import llm_folder
from tiny import scramble, tiny
from transformers import AutoModelForCausalLM

import mitrain
from mitrain import methods
from mitrain.core import config
from mitrain.core.errors import ModelError

IDS = torch.tensor([[3, 4, 5, 6]])
FEATURES = torch.randn(16, 1, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    return tiny("llama")


@pytest.fixture
def mit(model):
    adapter = mitrain.attach(model, mitrain.MiTConfig(modalities={"image": 6}, layers=[1, 3]))
    scramble(adapter)
    return adapter


@pytest.mark.parametrize("settings", [{"name": "lora"}, {"name": "prompt", "tokens": 2}, {"name": "mit"}])
def test_a_model_is_not_saved_without_its_adapter(tmp_path, settings):
    folder = llm_folder(tmp_path / "llm", layers=2)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    plain = model(IDS).logits
    adapter = methods.build(config.choose("adapter", settings), {"image": 6})
    adapter.attach({"text": model})
    for part in (model, model.base_model):
        with pytest.raises(ModelError, match=f"has a {adapter.traits.name} adapter attached, which save_pretrained"):
            part.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    adapter.detach()
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(IDS).logits, plain)


def test_an_attached_model_is_not_copied(mit, model):
    for make in (copy.deepcopy, pickle.dumps):
        for part in (mit, model):
            with pytest.raises(ModelError, match=r"mit adapter attached cannot be copied or pickled: call.*detach\(\)"):
                make(part)
    mit.detach()
    other, again = copy.deepcopy(model), pickle.loads(pickle.dumps(mit))
    again.attach({"text": other})
    mit.attach({"text": model})
    one, two = (m(IDS, infused={"image": FEATURES[0]}).logits for m in (model, other))
    assert torch.equal(one, two)


def test_features_that_nothing_reads_are_refused(mit, model):
    plain = tiny("llama")
    given = {"image": FEATURES[0]}
    for call in (lambda: plain(IDS, infused=given), lambda: model.base_model(IDS, infused=given)):
        with pytest.raises(ModelError, match=r"was called with infused=, which nothing reads: give infused= to the very"):
            call()
    with pytest.raises(ModelError, match="called with infuse=, which"):
        model(IDS, infuse=given)
    with pytest.raises(ModelError, match=r"unknown modality 'imgae' \(did you mean 'image'\?\)"):
        model(IDS, infused={"imgae": FEATURES[0]})
    assert not torch.equal(model(IDS, infused=given).logits, model(IDS).logits)
    mit.detach()
    with pytest.raises(ModelError, match="called with infused="):
        model(IDS, infused=given)


@pytest.mark.parametrize("by", ["keyword", "bind"])
@torch.no_grad()
def test_threads_that_share_a_model_each_get_their_own_features(mit, model, by):
    def ask(feature):
        if by == "keyword":
            return model(IDS, infused={"image": feature}).logits
        with mit.bind({"image": feature}):
            return model(IDS).logits

    expected = [ask(feature) for feature in FEATURES]
    assert not torch.equal(expected[0], expected[1])
    start = Barrier(4)

    def asked(feature):
        start.wait()
        with torch.no_grad():
            return ask(feature)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(asked, FEATURES))
    assert all(map(torch.equal, found, expected))
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, tiny("llama")(IDS).logits)


def test_features_bound_in_another_thread_are_neither_used_nor_dropped(mit, model):
    found = []

    def run():
        try:
            found.append(model(IDS).logits)
        except ModelError as error:
            found.append(str(error))

    with mit.bind({"image": FEATURES[0]}):
        thread = Thread(target=run)
        thread.start()
        thread.join()
    assert len(found) == 1 and "features are bound in another thread" in found[0]
