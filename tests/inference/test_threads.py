"""Threads and asyncio tasks that share a model or a run: each answer is that of its own picture."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from exported import PROMPT, make_config
from folders import own_cache
from methods_world import make_world, settings
from tiny import scramble, tiny

import mitrain
from mitrain.core.errors import ModelError
from mitrain.inference import scoring
from mitrain.inference.export import Pretrained
from mitrain.training import schema
from mitrain.training.build import build
from mitrain.training.checkpoint import Checkpoint
from mitrain.training.runs import Run

IDS = torch.tensor([[3, 4, 5, 6]])
FEATURES = torch.randn(6, 1, 6, generator=torch.Generator().manual_seed(0))
TASKS = [("mit", task) for task in ("answer", "segment", "classify", "retrieve")]
TASKS += [("visual-prefix", "classify"), ("mope", "classify"), ("pmf", "retrieve")]
TASKS += [("gated-xattn", "classify"), ("vlora", "retrieve"), ("uniadapter", "classify")]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with own_cache(make_world(tmp_path_factory.mktemp("threads"))) as path:
        yield path


def opened(world: Path, method: str, task: str) -> Run:
    """A run of random numbers, which never trained."""
    if task in ("answer", "segment"):
        config = make_config(world, task)
    else:
        readout = ["joint"] if method in ("mope", "aurora") else ["last", "image"]
        config = schema.from_dict(settings(world, method, readout, task))
    model = build(config)
    for module in (model.adapter, model.task):
        scramble(module, spread=0.5)
    model.train(False)
    answers = {PROMPT: ("red", "green", "blue")}
    return Run(world, config, model, Checkpoint(world, 1, None, {}, {}), answers)


def plain(answer):
    return answer.values if answer.mask is None else (answer.values, answer.mask.tobytes())


@pytest.mark.parametrize(("method", "task"), TASKS)
def test_threads_that_share_a_run_each_get_the_answer_of_their_own_picture(world, method, task):
    run = opened(world, method, task)
    pictures = sorted((world / "data").rglob("*.png"))[:4]
    choice = ["a red square", "a blue square"] if task == "retrieve" else None
    ask = lambda path: plain(scoring.ask(run, {"image": path}, PROMPT, candidates=choice))  # noqa: E731
    expected = [ask(path) for path in pictures]
    assert len({repr(answer).replace(str(path), "") for path, answer in zip(pictures, expected, strict=True)}) == 4
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, pictures * 3)) == expected * 3


def test_a_prediction_does_not_see_what_another_task_has_bound(world):
    predictor = Pretrained(opened(world, "mit", "classify"))
    picture = next((world / "data").rglob("*.png"))
    expected = predictor.predict(picture, "it is")
    others = {"image": torch.ones(1, *predictor.adapter.feature_widths.values())}

    async def predicts():
        return predictor.predict(picture, "it is")

    async def main():
        with predictor.adapter.bind(others):
            return await asyncio.create_task(predicts()), await asyncio.to_thread(predictor.predict, picture, "it is")

    assert asyncio.run(main()) == (expected, expected)
    with predictor.adapter.bind(others), ThreadPoolExecutor(1) as pool:
        assert pool.submit(predictor.predict, picture, "it is").result() == expected


@pytest.fixture
def mit():
    adapter = mitrain.attach(tiny("llama"), mitrain.MiTConfig(modalities={"image": 6}, layers=[1, 3]))
    scramble(adapter)
    return adapter


@torch.no_grad()
def logits(mit):
    return mit._backbones["text"](IDS).logits


def test_tasks_that_take_turns_inside_bind_each_keep_their_own_features(mit):
    expected = []
    for feature in FEATURES:
        with mit.bind({"image": feature}):
            expected.append(logits(mit))
    assert not torch.equal(expected[0], expected[1])

    async def asked(number, feature):
        with mit.bind({"image": feature}):
            found = []
            for _ in range(number + 1):  # who came first leaves first
                await asyncio.sleep(0)
                found.append(logits(mit))
        return [*found, await asyncio.to_thread(bound, feature)]

    def bound(feature):
        with mit.bind({"image": feature}):
            return logits(mit)

    async def main():
        return await asyncio.gather(*(asked(i, feature) for i, feature in enumerate(FEATURES)))

    for found, own in zip(asyncio.run(main()), expected, strict=True):
        assert all(torch.equal(each, own) for each in found)
    assert torch.equal(logits(mit), tiny("llama")(IDS).logits)


def test_a_thread_that_is_given_the_context_has_its_features_and_another_task_has_none(mit):
    with mit.bind({"image": FEATURES[0]}):
        expected = logits(mit)

    async def main():
        entered, asked = asyncio.Event(), asyncio.Event()

        async def holds():
            with mit.bind({"image": FEATURES[0]}):
                found = await asyncio.to_thread(logits, mit)
                entered.set()
                await asked.wait()
            return found

        holding = asyncio.create_task(holds())
        await asyncio.wait_for(entered.wait(), 60)
        with pytest.raises(ModelError, match="bound in another thread or task"):
            logits(mit)
        asked.set()
        return await holding

    assert torch.equal(asyncio.run(main()), expected)
    assert np.array_equal(logits(mit).numpy(), tiny("llama")(IDS).logits.detach().numpy())
