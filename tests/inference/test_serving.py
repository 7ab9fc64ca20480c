"""A run behind HTTP: the page, /predict, the chat API, batches of many at once, and what is refused."""

import base64
import io
import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import methods_world
import numpy as np
import pytest
from exported import PROMPT, make_run
from PIL import Image

from mitrain.cli import main
from mitrain.cli.serve import together
from mitrain.core.errors import ConfigError, UserError
from mitrain.inference import chats, scoring, service
from mitrain.inference.service import ServiceLimits
from mitrain.training import runs, schema
from mitrain.training.build import build
from mitrain.training.checkpoint import Checkpoint

pytest.importorskip("python_multipart", reason="needs the extra [serve]")
testclient = pytest.importorskip("starlette.testclient", reason="needs the extra [serve]")
serving = pytest.importorskip("mitrain.inference.serving", reason="needs the extra [serve]")


@pytest.fixture(scope="module")
def run(world):
    return runs.open_run(make_run(world))


@pytest.fixture(scope="module")
def client(run):
    return testclient.TestClient(serving.app_of(run, ServiceLimits(megabytes=0.2, batch=4, milliseconds=30)))


@pytest.fixture(scope="module")
def images(world):
    return sorted((world / "data" / "images").glob("*.png"))[:6]


def coded(path):
    return base64.b64encode(path.read_bytes()).decode()


def alike(found, expected):
    assert found["answer"] == expected["answer"] and "image" not in found
    assert found["probabilities"] == pytest.approx(expected["probabilities"], abs=2e-6)


def test_a_form_and_json_give_what_predict_gives(client, run, images):
    expected = scoring.ask(run, {"image": images[0]}, PROMPT, candidates=["red", "blue"]).values
    form = {"text": PROMPT, "candidates": ["red", "blue"]}
    body = {"inputs": {"image": coded(images[0])}, "text": PROMPT, "candidates": ["red", "blue"]}
    answers = (
        client.post("/predict", data=form, files={"image": images[0].read_bytes()}),
        client.post("/predict", json=body),
    )
    for answer in answers:
        assert answer.status_code == 200
        alike(answer.json(), expected)
    off = [
        client.post("/predict", json={**body, "inputs": {"image": coded(p)}, "infused": False}).json() for p in images[:2]
    ]
    assert off[0]["probabilities"] == off[1]["probabilities"] != answers[0].json()["probabilities"]


def test_many_at_once_are_answered_in_batches_each_about_its_own_picture(client, run, images):
    expected = [scoring.ask(run, {"image": path}, PROMPT).values for path in images]
    assert len({json.dumps(answer["probabilities"]) for answer in expected}) == 6
    start, before = Barrier(6), counts(client)

    def asked(path):
        start.wait()
        return client.post("/predict", json={"inputs": {"image": coded(path)}, "text": PROMPT}).json()

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(asked, images * 3))
    for one, own in zip(found, expected * 3, strict=True):
        alike(one, own)
    after = counts(client)
    assert after["samples"] - before["samples"] == 18 > after["batches"] - before["batches"]


def counts(client):
    text = client.get("/metrics").text
    return {name: float(value) for name, value in re.findall(r"^mitrain_(\w+)_total (\S+)$", text, re.M)}


def test_the_chat_api(client, run, images):
    expected = scoring.ask(run, {"image": images[0]}, PROMPT).values
    content = [{"type": "text", "text": PROMPT}]
    content += [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{coded(images[0])}"}}]
    asked = {"model": "any", "messages": [{"role": "user", "content": content}], "stream": False}
    found = client.post("/v1/chat/completions", json=asked).json()
    assert found["choices"][0]["message"] == {"role": "assistant", "content": expected["answer"]}
    assert found["object"] == "chat.completion" and found["usage"]["total_tokens"] > found["usage"]["completion_tokens"] > 0
    alike(found["mitrain"], expected)
    for change, words in (
        ({"stream": 1}, "stream is true or false"),
        ({"stream": True, "seed": 1}, "'seed' cannot be set"),
        ({"seed": 1}, "'seed' cannot be set"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"top_p": 0.5}, "set temperature, too"),
        ({"messages": [{"role": "system", "content": "be"}, *asked["messages"]]}, "a system prompt is the run's"),
        ({"messages": [*asked["messages"], {"role": "assistant", "content": "red"}]}, "the user's last"),
        ({"messages": said("red", content)}, "was trained on single questions"),
        ({"messages": [{"role": "user", "content": [*content, content[1]]}]}, "no input for this image"),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "aaaa"}}]}]},
            "this audio",
        ),
    ):
        refused(client.post("/v1/chat/completions", json={**asked, **change}), 400, words)


def streamed(client, asked):
    """The events of an answer, and the text of their pieces."""
    found = client.post("/v1/chat/completions", json={**asked, "stream": True})
    assert found.status_code == 200 and found.headers["content-type"].startswith("text/event-stream")
    *lines, last = [line.removeprefix("data: ") for line in found.text.split("\n\n") if line]
    assert last == "[DONE]"
    events = [json.loads(line) for line in lines]
    return events, [e["choices"][0]["delta"]["content"] for e in events if e["choices"] and e["choices"][0]["delta"]]


@pytest.mark.parametrize("tokens", [None, 1])
def test_an_answer_is_streamed_piece_by_piece(client, images, tokens):
    content = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{coded(images[0])}"}}]
    content.append({"type": "text", "text": "this thing is"})  # a new question: the model speaks
    asked = {"messages": [{"role": "user", "content": content}], "max_tokens": tokens}
    whole = client.post("/v1/chat/completions", json=asked).json()
    events, pieces = streamed(client, {**asked, "stream_options": {"include_usage": True}})
    assert "".join(pieces) == whole["choices"][0]["message"]["content"]
    assert len(pieces) > 2 if tokens is None else len(pieces) == 1
    assert events[0]["choices"][0]["delta"]["role"] == "assistant" and events[0]["object"] == "chat.completion.chunk"
    assert events[-2]["choices"][0]["finish_reason"] == "stop" and events[-1]["usage"] == whole["usage"]
    assert len({event["id"] for event in events}) == 1
    content[1]["text"] = PROMPT  # a known one, whose answer is chosen: in one piece
    assert streamed(client, asked)[1] == [
        client.post("/v1/chat/completions", json=asked).json()["choices"][0]["message"]["content"]
    ]


def test_a_streamed_answer_that_breaks_off_says_so(client, images, monkeypatch):
    def breaks(service, contents, text, candidates, infused, turns, generation, hear):
        hear("so far")
        raise UserError("no more")

    monkeypatch.setattr(service.Service, "predict", breaks)
    found = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": PROMPT}], "stream": True})
    first, second = [json.loads(line.removeprefix("data: ")) for line in found.text.split("\n\n") if line]
    assert first["choices"][0]["delta"]["content"] == "so far" and second["error"]["message"] == "no more"


def said(answer, content):
    """A question, its ``answer``, and a question again; the first one shows what ``content`` does."""
    turns = [("user", content), ("assistant", answer), ("user", PROMPT)]
    return [{"role": role, "content": words} for role, words in turns]


def test_what_was_said_before_stands_as_turns_before_the_question(world, images, monkeypatch):
    run = runs.open_run(make_run(world, "dialogue"))
    client = testclient.TestClient(serving.app_of(run, ServiceLimits()))
    parts = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{coded(images[0])}"}}]
    parts.append({"type": "text", "text": PROMPT})
    prompt, read = run.model.text.prompt, []
    monkeypatch.setattr(run.model.text, "prompt", lambda *how: read.append(prompt(*how)) or read[-1])
    for answer in ("red", "blue square"):
        asked = {"messages": said(answer, parts), "max_tokens": 3}
        found = client.post("/v1/chat/completions", json=asked).json()
        whole = f"{PROMPT} {answer} and {PROMPT}"  # as task.turn puts it
        expected = scoring.ask(run, {"image": images[0]}, whole, generation={"max_new_tokens": 3}).values
        assert found["mitrain"]["generated"] == expected["generated"]
        assert read[-2] == read[-1] == prompt(whole)


def test_a_request_and_the_command_say_how_the_model_speaks(run, images):
    content = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{coded(images[0])}"}}]
    asked = {"messages": [{"role": "user", "content": [*content, {"type": "text", "text": "this thing is"}]}]}

    def length(limits, **more):
        client = testclient.TestClient(serving.app_of(run, limits))
        found = client.post("/v1/chat/completions", json={**asked, **more}).json()
        return found["usage"]["completion_tokens"], found["choices"][0]["message"]["content"]

    short = ServiceLimits(generation={"max_new_tokens": 2})
    assert length(ServiceLimits())[0] == 8 and length(short)[0] == 2 and length(short, max_tokens=3)[0] == 3
    likeliest = length(ServiceLimits())[1]
    drawn = {length(ServiceLimits(), temperature=t, top_p=0.9)[1] for t in (20.0, 90.0)}
    assert drawn != {likeliest} and length(ServiceLimits(), temperature=0)[1] == likeliest
    assert run.model.task.config.temperature == 0 and run.model.task.config.max_new_tokens == 8


def refused(answer, status, words):
    assert answer.status_code == status and words in answer.json()["error"]["message"], answer.text
    assert "Traceback" not in answer.text and "\n" not in answer.json()["error"]["message"] and "/tmp" not in answer.text


def test_what_is_refused(client, images, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(images[0].read_bytes())
    body = {"inputs": {"image": coded(images[0])}, "text": PROMPT}
    part = {"type": "image_url", "image_url": {"url": f"file://{secret}"}}
    for path, sent, words in (
        ("/predict", {**body, "inputs": {"image": str(secret)}}, "not valid base64"),
        ("/predict", {**body, "inputs": {"image": ["a"]}}, "no path is read"),
        ("/predict", {**body, "inputs": {"../x": coded(images[0])}}, "none of this run's inputs"),
        (
            "/predict",
            {**body, "inputs": {"image": base64.b64encode(b"no picture").decode()}},
            "is not a readable picture",
        ),
        ("/predict", {**body, "inputs": {}}, "this run reads image"),
        ("/predict", {**body, "text": " "}, "the text is empty"),
        ("/predict", {**body, "text": 3}, "text as a string"),
        ("/predict", {**body, "candidates": ["red"]}, "leaves nothing to choose"),
        ("/predict", {**body, "url": "x"}, "'url' is no key"),
        ("/predict", [], "not a JSON object"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [part]}]}, "nothing is fetched"),
    ):
        refused(client.post(path, json=sent), 400, words)
    refused(client.post("/predict", content=b"{", headers={"content-type": "application/json"}), 400, "not JSON")
    bad_form = {"content-type": "multipart/form-data; boundary=x"}
    refused(client.post("/predict", content=b"--x\r\nbroken", headers=bad_form), 400, "")
    refused(client.post("/predict", files={"image": b"x" * 300_000}), 413, "larger than 0.2 MB")
    refused(client.get("/nothing"), 404, "Not Found")
    refused(client.get("/predict"), 405, "Method Not Allowed")
    alike(client.post("/predict", json=body).json(), client.post("/predict", json=body).json())


def test_a_fault_of_the_server_is_no_traceback_and_the_next_request_is_answered(client, images, monkeypatch, caplog):
    body = {"inputs": {"image": coded(images[0])}, "text": PROMPT}
    with monkeypatch.context() as patch:
        patch.setattr(service, "ask_all", lambda *_: 1 / 0)
        refused(client.post("/predict", json=body), 500, "its log says more")
    assert "ZeroDivisionError" in caplog.text and client.post("/predict", json=body).status_code == 200


def test_health_the_page_and_metrics(client):
    assert client.get("/health").json() == {"status": "ok", "run": "colours", "step": 4}
    about = client.get("/run").json()
    assert about["inputs"] == {"image": {"takes": "image", "may_lack": False}} and about["asks"] == "prompt"
    page = client.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"] and "mitrain serve" in page.text
    assert not re.findall(r"(?:src|href)=\"?http|@import|cdn", page.text)
    assert 'mitrain_requests_total{path="/health",status="200"} 1' in client.get("/metrics").text


def test_segmentation_shows_its_mask(world, images):
    run = runs.open_run(make_run(world, "segment"))
    client = testclient.TestClient(serving.app_of(run, ServiceLimits()))
    found = client.post("/predict", data={"text": "red square"}, files={"image": images[0].read_bytes()}).json()
    mask = scoring.ask(run, {"image": images[0]}, "red square").mask
    png = base64.b64decode(found["mask"].partition(",")[2])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))) > 0, mask) and found["overlay"] != found["mask"]
    refused(client.post("/v1/chat/completions", json={"messages": []}), 400, "which does not speak")


def test_several_runs_share_a_language_model_each_below_its_name(world, images):
    first, folder = runs.open_run(make_run(world)), make_run(world, "segment")
    second = runs.open_run(folder, beside=first)
    assert second.model.text is first.model.text
    second.config = second.config.model_copy(update={"name": "squares"})
    client = testclient.TestClient(together([first, second], ServiceLimits()))
    body = {"inputs": {"image": coded(images[0])}}
    expected = [scoring.ask(runs.open_run(folder), {"image": images[0]}, "red square").values["mask_share"]]
    for _ in range(2):  # in turn
        found = client.post("/squares/predict", json={**body, "text": "red square"}).json()
        assert found["mask_share"] == expected[0]
        answer = client.post("/predict", json={**body, "text": PROMPT}).json()
        alike(answer, scoring.ask(first, {"image": images[0]}, PROMPT).values)
        assert client.post("/colours/predict", json={**body, "text": PROMPT}).json() == answer
    assert client.get("/squares/run").json()["task"] == "segment" and "mitrain serve" in client.get("/squares/").text
    with pytest.raises(ConfigError, match="no two addresses for 'colours'"):
        together([first, first], ServiceLimits())


def test_a_port_in_use_and_odd_limits_are_one_line(world, run, capsys):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", str(run.folder), "--port", str(taken.getsockname()[1])]) == 2
    assert "give others with --host and --port" in capsys.readouterr().err
    assert main(["serve", str(run.folder), "--batch", "0"]) == 2
    assert "--batch is at least 1" in capsys.readouterr().err


def test_retrieval_finds_the_nearest_texts_of_the_data(tmp_path_factory, monkeypatch):
    path = methods_world.make_world(tmp_path_factory.mktemp("matches"))
    monkeypatch.setenv("MITRAIN_CACHE", str(path / "cache"))
    config = schema.from_dict(methods_world.settings(path, "mit", ["last"], "retrieve"))
    run = runs.Run(path, config, build(config), Checkpoint(path, 1, None, {}, {}))
    run.model.train(False)
    client = testclient.TestClient(serving.app_of(run, ServiceLimits()))
    files = {"image": next((path / "data").rglob("*.png")).read_bytes()}
    texts = {json.loads(line)["text"] for line in (path / "data" / "captions-val.jsonl").read_text().splitlines()}
    found = client.post("/predict", data={"text": "a red square"}, files=files).json()["scores"]
    assert set(found) == texts | {"a red square"} and list(found.values()) == sorted(found.values(), reverse=True)
    few = {"text": "a red square", "candidates": "a green square"}
    assert set(client.post("/predict", data=few, files=files).json()["scores"]) == {"a red square", "a green square"}


def test_parts_of_a_chat_message_go_to_the_inputs_that_take_them(run):
    asked = service.Service(run, ServiceLimits())
    asked.takes = {"speech": "audio", "image": "image", "second": "image"}
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aaaa"}}
    sound = {"type": "input_audio", "input_audio": {"data": "bbbb", "format": "wav"}}
    parts = [picture, {"type": "text", "text": "one"}, sound, picture, {"type": "text", "text": "two"}]
    contents, turns, _ = chats.Chats(asked)._conversation({"messages": [{"role": "user", "content": parts}]})
    assert list(contents) == ["image", "speech", "second"] and turns == ["one\ntwo"]
    assert contents["speech"] == base64.b64decode("bbbb")


@pytest.mark.parametrize("package", ["uvicorn", "starlette", "python_multipart"])
def test_without_the_extra_one_line_names_it(package, monkeypatch, capsys, tmp_path):
    (tmp_path / "config.yaml").write_text("name: run\n")
    monkeypatch.setitem(sys.modules, package, None)  # importing it raises ImportError
    assert main(["serve", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "pip install 'mitrain[serve]'" in said
