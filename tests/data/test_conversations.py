"""Conversations as LLaVA, ShareGPT and chat APIs write them: every answer a sample, every picture in its place."""

import json

import pytest

from mitrain.core.errors import DataError
from mitrain.data.formats.conversations import read_conversations
from mitrain.data.formats.manifest import Manifest


def read(folder, rows, lines=True, **more):
    name = "a.jsonl" if lines else "a.json"
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    (folder / name).write_text(text)
    return read_conversations(Manifest.of(folder / name), **more)


def llava(*said, **more):
    return {
        "conversations": [{"from": "human" if i % 2 == 0 else "gpt", "value": text} for i, text in enumerate(said)],
        **more,
    }


def chat(*said, **more):
    return {
        "messages": [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(said)],
        **more,
    }


def test_every_answer_is_a_sample_behind_what_was_said_before(tmp_path):
    row = llava("<image>\nWhat is it?", "A cat.", "What colour has it?", "Black.", id="7", image="a.jpg")
    for lines in (True, False):
        first, second = read(tmp_path, [row], lines)
        assert (first.id, first.prompt, first.answer, first.inputs) == (
            "7/0",
            "What is it?",
            "A cat.",
            {"image": "a.jpg"},
        )
        assert (second.prompt, second.answer) == ("What is it?\nA cat.\nWhat colour has it?", "Black.")
        assert first.turns == () and second.turns == ("What is it?", "A cat.", "What colour has it?")
        assert second.inputs == first.inputs and second.object == first.object == "7"


def test_messages_of_a_chat_api_with_parts_and_a_system_prompt(tmp_path):
    asked = [{"type": "image", "image": "b.png"}, {"type": "text", "text": "What is it?"}]
    row = chat(asked, [{"type": "text", "text": "A dog."}])
    row["messages"].insert(0, {"role": "system", "content": "Be brief."})
    (sample,) = read(tmp_path, [row])
    assert (sample.prompt, sample.answer, sample.inputs) == ("What is it?", "A dog.", {"image": "b.png"})


def test_several_files_go_to_the_inputs_of_their_kind_in_their_order(tmp_path):
    row = chat("<image> and <image>: <audio> who speaks?", "Both.", images=["a.png", "b.png"], audios=["c.wav"])
    (sample,) = read(tmp_path, [row], inputs=("image", "image2", "audio"))
    assert sample.inputs == {"image": "a.png", "image2": "b.png", "audio": "c.wav"}
    assert sample.prompt == "and :  who speaks?"


def test_a_conversation_without_a_picture_is_one_that_lacks_it(tmp_path):
    rows = [llava("<image>\nWhat?", "A cat.", image="a.jpg"), llava("Hello?", "Hello.")]
    with pytest.raises(DataError, match=r"a\.jsonl:2: no file for the input 'image'.*data\.may_lack=\[image\]"):
        read(tmp_path, rows)
    assert [s.inputs for s in read(tmp_path, rows, may_lack=("image",))] == [{"image": "a.jpg"}, {}]


def test_a_question_that_nobody_answered_is_left_out(tmp_path):
    (sample,) = read(tmp_path, [llava("What?", "A cat.", "And now?", image="a.jpg")])
    assert sample.answer == "A cat."


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (llava("<image><image>\nWhat?", "A cat.", image="a.jpg"), "2 places <image> for 1 images: give as many"),
        (llava("<image>\nWhat?", "A cat."), "1 places <image> for 0 images"),
        (llava("What?", "A cat.", image=["a.jpg", "b.jpg"]), "0 places <image> for 2 images"),
        (chat("<image><image> a", "b", images=["a", "b"]), r"2 images, and the run reads 1 \(image\): name an encoder"),
        ({"conversations": [], "image": "a.jpg"}, "no list of 'conversations' or 'messages'"),
        ({"conversations": "hello"}, "no list of 'conversations'"),
        ({"conversations": [{"value": "a"}]}, "turn 1 says not whose it is"),
        (
            chat("a", "b", image="a") | {"messages": [{"role": "assistant", "content": "a"}]},
            "turn 1 is the assistant's out of turn",
        ),
        ({"conversations": [{"from": "human", "value": "a"}] * 2}, "turn 2 is the user's out of turn"),
        (llava("What?", "", image="a.jpg"), "a question or an answer has no words"),
        (llava("<image>", "A cat.", image="a.jpg"), "a question or an answer has no words"),
        (llava("What?", image="a.jpg"), "nothing is answered"),
        (llava("What?", 3, image="a.jpg"), "turn 2 holds no text"),
        (llava("What?", [{"type": "image", "image": "b"}], image="a.jpg"), "turn 2 holds no text"),
        (llava("What?", "A cat.", image=[3]), "image is no path and no list of paths"),
        (llava("What?", "A \x07", image="a.jpg"), "control character"),
        (chat([{"type": "image", "image": "b"}, {"type": "text", "text": "a"}], "c", image="a"), "name them once"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path, row, words):
    good = llava("What?", "A cat.", image="a.jpg")
    with pytest.raises(DataError, match=words) as caught:
        read(tmp_path, [good, row])
    assert str(caught.value).startswith(f"{tmp_path / 'a.jsonl'}:2: ") and "\n" not in str(caught.value)


def test_a_file_without_answers_and_ids_twice_are_refused(tmp_path):
    with pytest.raises(DataError, match="holds no answers"):
        read(tmp_path, [], lines=False)
    with pytest.raises(DataError, match="the id '1' stands twice"):
        read(tmp_path, [llava("What?", "A cat.", image="a.jpg", id="1")] * 2)
