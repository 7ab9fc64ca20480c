"""VQA's and COCO's own files, with their traps."""

import json
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import read_or_refused

from mitrain.core.errors import ConfigError, DataError
from mitrain.data.formats.captions import CaptionSample
from mitrain.data.formats.coco import read_coco_captions, read_vqa
from mitrain.data.formats.records import AnswerSample
from mitrain.data.released import CocoCaptionsConfig, VqaConfig


def question(number, image, text="What is it?", **more):
    return {"question_id": number, "image_id": image, "question": text, **more}


def annotation(number, *answers, **more):
    people = [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(answers, 1)]
    return {"question_id": number, "image_id": 1, "answers": people, "answer_type": "other", **more}


QUESTIONS = [question(11, 1), question(12, 1, " Is it red? "), question(21, 2), question(22, 2)]
ANNOTATIONS = [
    annotation(12, "yes", "no", "yes", multiple_choice_answer="yes", answer_type="yes/no"),
    annotation(11, "net", "net", "a net", multiple_choice_answer="net"),
    annotation(22, "", "", multiple_choice_answer=""),
]


def write(root, questions=QUESTIONS, annotations=ANNOTATIONS, subset="train2014", folder="", name="COCO_{}_{:012d}.jpg"):
    (root / folder).mkdir(exist_ok=True)
    path = root / folder / f"v2_OpenEnded_mscoco_{subset}_questions.json"
    path.write_text(json.dumps({"info": {}, "data_subtype": subset, "questions": questions}))
    path = root / folder / f"v2_mscoco_{subset}_annotations.json"
    path.write_text(json.dumps({"annotations": annotations}))
    (root / "images" / subset).mkdir(parents=True, exist_ok=True)
    for image in (1, 2):
        (root / "images" / subset / name.format(subset, image)).touch()
    return root


def test_questions_meet_their_answers_in_whatever_order(tmp_path, caplog):
    first, second = read_vqa(write(tmp_path), "train2014")
    picture = "images/train2014/COCO_train2014_000000000001.jpg"
    assert first == AnswerSample(
        "11", {"image": picture}, "What is it?", "net", kind="other", object=picture, references=("net", "net", "a net")
    )
    assert (second.prompt, second.answer, second.kind) == ("Is it red?", "yes", "yes/no")
    assert "left out 1 without an answer, 1 with an empty answer; 2 samples remain" in caplog.text


def test_files_may_lie_in_a_folder_and_pictures_have_the_names_of_2017(tmp_path):
    root = write(tmp_path, folder="annotations", name="{1:012d}.jpg")
    assert read_vqa(root, "train2014")[0].inputs["image"] == "images/train2014/000000000001.jpg"
    (root / "elsewhere").mkdir()
    (root / "elsewhere" / "000000000001.jpg").touch()
    assert read_vqa(root, "train2014", "elsewhere")[0].inputs["image"] == "elsewhere/000000000001.jpg"


def test_without_a_multiple_choice_answer_the_commonest_counts(tmp_path):
    (found,) = read_vqa(write(tmp_path, QUESTIONS[:1], [annotation(11, "a", "b", "b")]), "train2014")
    assert found.answer == "b"


def test_sections_name_splits_kinds_and_what_is_there(tmp_path):
    section = VqaConfig(root=str(tmp_path), kinds=("yes/no",))
    write(tmp_path)
    assert section.split_names(tmp_path) == ["train"] and [s.id for s in section.read(tmp_path, "train")] == ["12"]
    with pytest.raises(DataError, match="no sample of kind number: it has other, yes/no"):
        section.model_copy(update={"kinds": ("number",)}).read(tmp_path, "train")
    with pytest.raises(ConfigError, match=r"data\.subsets has no 'test': choose one of train, val"):
        section.read(tmp_path, "test")
    with pytest.raises(DataError, match=r"no file \*_val2014_questions\.json in .* or correct data\.subsets"):
        section.read(tmp_path, "val")


@pytest.mark.parametrize(
    ("questions", "annotations", "match"),
    [
        ([], ANNOTATIONS, r"train2014_questions\.json' has no list 'questions'"),
        (QUESTIONS, [], r"train2014_annotations\.json' has no list 'annotations'"),
        ([question(1, "x")], ANNOTATIONS, r"questions\.json: question 0 has the impossible image_id='x'"),
        ([question(1, 1), {"question_id": 2, "image_id": 1}], ANNOTATIONS, r"question 1 has no 'question'"),
        ([question(11, 1, " ")], ANNOTATIONS, "question 0 has an empty question"),
        ([question(11, 1), question(11, 1)], ANNOTATIONS, "question 1: the id '11' stands twice"),
        ([7], ANNOTATIONS, "question 0 is 7 instead of a dictionary"),
        (QUESTIONS, [{"question_id": 11}], "the annotation of question_id=11 has no 'answers'"),
        (QUESTIONS, [{"question_id": 11, "answers": ["net"]}], "question_id=11 is 'net' instead of a dictionary"),
        (QUESTIONS, [annotation(11, "a", multiple_choice_answer=[1])], "impossible multiple_choice_answer"),
        (QUESTIONS, [annotation(99, "a")], "has no question that is answered"),
        ([question(11, 3)], ANNOTATIONS, r"no file .*000000000003\.jpg' in .*train2014/ or images/train2014/"),
    ],
)
def test_faults_of_vqa_are_one_line(tmp_path, questions, annotations, match):
    with pytest.raises(DataError, match=match) as caught:
        read_vqa(write(tmp_path, questions, annotations), "train2014")
    assert "\n" not in str(caught.value)


def test_two_files_of_a_subset_are_refused(tmp_path):
    root = write(write(tmp_path), folder="copy")
    with pytest.raises(DataError, match=r"2 files \*_train2014_questions\.json in .*\(copy/v2.*, v2.*\)"):
        read_vqa(root, "train2014")


def write_captions(root, images, annotations):
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / "captions_val2017.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (root / "val2017").mkdir(exist_ok=True)
    (root / "val2017" / "000000000007.jpg").touch()
    return root


IMAGES = [{"id": 7, "file_name": "000000000007.jpg"}, {"id": 8, "file_name": "000000000008.jpg"}]
CAPTIONS = [{"image_id": 7, "id": i, "caption": text} for i, text in enumerate(["A  cat.\n", "Cats", " "])]


def test_captions_of_coco(tmp_path, caplog):
    root = write_captions(tmp_path, IMAGES, CAPTIONS)
    first, second = read_coco_captions(root, "val2017")
    assert first == CaptionSample("0", {"image": "val2017/000000000007.jpg"}, "A cat.", "7")
    assert first.captions == second.captions == ("A cat.", "Cats") and "left out 1 wordless captions" in caplog.text
    section = CocoCaptionsConfig(root=str(root))
    assert section.split_names(root) == ["val"] and section.read(root, "val") == [first, second]


@pytest.mark.parametrize(
    ("images", "captions", "match"),
    [
        ([], CAPTIONS, "has no list 'images'"),
        ([{"id": 7}], CAPTIONS, r"captions_val2017\.json: image 0 has no 'file_name'"),
        (IMAGES, [{"image_id": 9, "id": 1, "caption": "x"}], "annotation 0 is of the image 9, which 'images' has not"),
        (IMAGES, [{"image_id": 7, "id": 1}], "annotation 0 has no 'caption'"),
        (IMAGES, [CAPTIONS[0], CAPTIONS[0]], "annotation 1: the id '0' stands twice"),
        (IMAGES, CAPTIONS[2:], "has no caption"),
    ],
)
def test_faults_of_captions_are_one_line(tmp_path, images, captions, match):
    with pytest.raises(DataError, match=match) as caught:
        read_coco_captions(write_captions(tmp_path, images, captions), "val2017")
    assert "\n" not in str(caught.value)


ANY = st.recursive(
    st.none() | st.integers() | st.text(max_size=3) | st.booleans() | st.floats(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["answer", "id"]), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=100, deadline=None)
@given(
    key=st.sampled_from(["question_id", "image_id", "question", "answers", "answer_type"]),
    value=ANY,
    cut=st.integers(0, 400),
)
def test_any_file_is_read_or_refused_in_one_line(tmp_path_factory, key, value, cut):
    root = write(tmp_path_factory.mktemp("vqa"), [QUESTIONS[0] | {key: value}], [ANNOTATIONS[1] | {key: value}])
    path = next(root.glob("*_annotations.json"))
    path.write_text(path.read_text()[: -cut or None] if cut % 3 == 0 else path.read_text())
    logging.disable(logging.WARNING)
    try:
        found = read_or_refused(lambda: read_vqa(root, "train2014"), DataError)
    finally:
        logging.disable(logging.NOTSET)
    assert found is None or all(isinstance(sample, AnswerSample) for sample in found)
