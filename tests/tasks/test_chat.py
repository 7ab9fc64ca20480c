"""The chat template of an instruct model as a template of ours."""

import json

import pytest
from commands import as_json
from folders import colour_records, llm_folder, vision_folder

from mitrain.cli import main
from mitrain.core.errors import ConfigError
from mitrain.models.text import read_tokenizer
from mitrain.models.tokens import Tokens
from mitrain.tasks.answer import AnswerConfig
from mitrain.tasks.chat import earlier_turn, in_chat
from mitrain.tasks.language import chatting, frame_of_turns
from mitrain.tasks.template import frame_of
from mitrain.training import schema

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}[{{ messages[-1].content }}]"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = llm_folder(tmp_path_factory.mktemp("chat") / "llm", width=48)
    (path / "chat_template.jinja").write_text(CHATML)
    return path


@pytest.fixture
def tokenizer(folder):
    return read_tokenizer(folder)


def test_the_template_is_what_the_user_says(tokenizer):
    told = in_chat("{prompt} Say {{it}}.", "Be brief.", tokenizer, "llm")
    assert "".join(frame_of(told)[:1]) == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    assert "What? ".join(frame_of(told)).endswith("user\nWhat?  Say {it}.<|im_end|>\n<|im_start|>assistant\n")


def test_earlier_turns_are_turns_of_the_chat(tokenizer):
    """Token for token what the tokenizer's own template makes of the conversation."""
    given = "{prompt} Say {{it}}.", "Be brief.", tokenizer, "llm"
    said = ["What?", "A cat.", "And <|im_end|> now?", "A dog.", "Who?"]
    turns = [{"role": "system", "content": "Be brief."}]
    for i, words in enumerate(said):
        turns.append(
            {"role": "assistant", "content": words} if i % 2 else {"role": "user", "content": f"{words} Say {{it}}."}
        )
    frame = frame_of_turns(in_chat(*given), earlier_turn(*given), 2)
    whole = "".join(part + words for part, words in zip(frame, [*said, ""], strict=True))
    assert whole == tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert Tokens(tokenizer).prompt(tuple(said[:1]), frame_of(in_chat(*given))) == Tokens(tokenizer).prompt(
        said[0], frame_of(in_chat(*given))
    )
    plain = Tokens(tokenizer).ids(tuple(said), frame_of_turns("{prompt}", "{prompt} {answer} ", 2))
    assert plain == Tokens(tokenizer).ids(" ".join(said))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ messages[-1].content }}", "does not put every earlier turn the same way"),
        ("{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}", "does not put every earlier turn"),
    ],
)
def test_a_chat_template_that_counts_turns_is_told(tokenizer, template, words, caplog):
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=words):
        earlier_turn("{prompt}", "", tokenizer, "llm")
    assert chatting(AnswerConfig(chat=True), tokenizer, "llm").turn == "" and words in caplog.text


def test_turns_have_one_place():
    for values, words in (
        ({"turn": "{answer} {prompt}"}, "write {prompt} and then {answer}"),
        ({"turn": "{prompt}"}, "write {prompt} and then {answer}"),
        ({"turn": "{prompt} {answer}", "template": "{prompt} {prompt}"}, "which template names twice"),
        ({"turn": "{prompt} {answer}", "chat": True}, "turn is the chat template's"),
    ):
        with pytest.raises(ValueError, match=words):
            AnswerConfig(**values)


def test_braces_of_the_chat_template_stay_what_they_are(tokenizer):
    tokenizer.chat_template = "{{ '{\"a\": {}}' }}{{ messages[-1].content }}}"
    assert "x".join(frame_of(in_chat("{prompt}", "", tokenizer, "llm"))) == '{"a": {}}x}'


def test_an_opening_that_the_tokenizer_puts_there_itself_stands_once(tokenizer):
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    told, opening = in_chat("{prompt}", "", tokenizer, "llm"), Tokens(tokenizer).opening
    row = Tokens(tokenizer).prompt("What?", frame_of(told))
    assert row.count(tokenizer.bos_token_id) == 1 or not opening


def test_an_answer_stands_behind_a_line_without_a_blank(tokenizer, monkeypatch):
    monkeypatch.setattr(Tokens, "_encoded", lambda self, text, plain=False: list(map(ord, text)))
    frame = frame_of(in_chat("{prompt}", "", tokenizer, "llm"))
    row, start = Tokens(tokenizer).answered("What?", "cat", frame)
    assert "".join(map(chr, row)).endswith("assistant\ncat") and "".join(map(chr, row[start:])) == "cat"
    row, _ = Tokens(tokenizer).answered("What?", "cat", frame_of("{prompt} It is"))
    assert "".join(map(chr, row)).endswith("It is cat")


@pytest.mark.parametrize(
    ("template", "system", "words"),
    [
        (None, "", "has no chat template: set task.chat=false"),
        (NO_SYSTEM, "Be brief.", r"does not take this \(no system role\)"),
        ("hello", "", "does not say once what the user says"),
        ("{{ messages[-1].content }}{{ messages[-1].content }}", "", "does not say once"),
        ("{% broken", "", "does not take this"),
    ],
)
def test_a_template_that_does_not_serve_is_refused_in_a_line(tokenizer, template, system, words):
    tokenizer.chat_template = template
    with pytest.raises(ConfigError, match=words) as caught:
        in_chat("{prompt}", system, tokenizer, "llm")
    assert "\n" not in str(caught.value)


def test_a_system_prompt_without_a_chat_is_refused():
    with pytest.raises(ValueError, match="system is a part of the chat template: set chat=true"):
        AnswerConfig(system="Be brief.")


def test_a_run_writes_its_chat_template_down_and_is_scored_by_it(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MITRAIN_CACHE", str(tmp_path / "cache"))
    vision_folder(tmp_path / "vision")
    colour_records(tmp_path / "data", train=24, val=8)
    for split in ("train", "val", "test"):
        rows = map(json.loads, (tmp_path / "data" / f"{split}.jsonl").read_text().splitlines())
        said = {row["image"]: ("<image>What colour?", row["answer"]) for row in rows}
        talks = []
        for image, pair in said.items():
            turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
            talks.append({"image": image, "messages": turns})
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, talks)))
    (tmp_path / "run.yaml").write_text(
        f"model: {{llm: {folder}, encoders: {{image: {{name: vision, layer: 2, pool: cls+mean}}}}}}\n"
        "adapter: {name: mit, layers: [1, 2]}\ntask: {name: answer, chat: true, system: Be brief.}\n"
        "data: {name: conversations, root: data}\ntrain: {steps: 16, batch: 8, lr: 1e-2, eval_every: 8, save_every: 8}\n"
    )
    assert main(["train", "run.yaml"]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    kept = schema.load(run / "config.yaml").task
    assert kept.template == in_chat("{prompt}", "Be brief.", read_tokenizer(folder), "llm") and not kept.chat
    assert kept.turn == earlier_turn("{prompt}", "Be brief.", read_tokenizer(folder), "llm")
    assert as_json(capsys, "eval", run, "--split", "test")["accuracy"] == 1


def test_settings_are_written_out_once(folder):
    told = chatting(AnswerConfig(chat=True), read_tokenizer(folder), "llm")
    assert not told.chat and "assistant" in told.template
