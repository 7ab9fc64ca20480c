"""Formats of other projects that no reader here takes: known by their keys, so that an error can name the conversion."""

from typing import Any

RECORD = '{"image": …, "prompt": …, "answer": …} a line'


def advice(value: Any) -> str:
    """What a JSON file's value or a record is, and how it becomes what is read here; "" where it is nothing known."""
    if not isinstance(value, dict):
        return ""
    listed = {key: item[0] if item else None for key, item in value.items() if isinstance(item, list)}
    first = listed.get("annotations")
    inner = first if isinstance(first, dict) else {}
    if "conversations" in listed or "messages" in listed:
        return f"conversations, as LLaVA's: data.name=conversations reads them; or write {RECORD}"
    if "questions" in listed:
        return f"VQA's questions: data.name=vqa reads them beside their answers; or write {RECORD}"
    if "multiple_choice_answer" in inner or "answers" in inner:
        return f"VQA's answers: data.name=vqa reads them beside their questions; or write {RECORD}"
    if "caption" in inner and "segmentation" not in inner:
        return "COCO's captions: data.name=coco-captions reads them, data.name=karpathy Karpathy's dataset_coco.json"
    if "segmentation" in inner or "bbox" in inner:
        return (
            "COCO's instances: data.name=expressions reads them where annotations have an 'expression', data.name=refcoco"
            " reads them beside the references that speak of them"
        )
    if isinstance(listed.get("images"), dict) and "sentences" in listed["images"]:
        return "Karpathy's captions: data.name=karpathy reads them"
    return ""
