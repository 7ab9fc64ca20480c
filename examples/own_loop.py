"""A training loop of your own around `mitrain.attach`: a frozen language model learns to name the classes of your pictures.

    python examples/own_loop.py PICTURES --llm HuggingFaceTB/SmolLM2-135M-Instruct --encoder facebook/dinov2-small

Everything that `mitrain train` would do is done by hand: features, batches, loss, score with a control, saving, loading.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import mitrain

PROMPT = "The thing in this picture is"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@torch.no_grad()
def picture_features(encoder: str, paths: list[Path]) -> Tensor:
    """One vector a picture (N, e), of a frozen encoder: computed once, as it never changes."""
    model = AutoModel.from_pretrained(encoder).eval()
    size = (model.config.image_size,) * 2
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB").resize(size)) / 255 for path in paths])
    pixels = torch.tensor((pixels - MEAN) / STD, dtype=model.dtype).permute(0, 3, 1, 2)
    return torch.cat([model(pixel_values=some).last_hidden_state.mean(1) for some in pixels.split(32)]).float()


def batch_of(tokenizer: AutoTokenizer, answers: list[str]) -> dict[str, Tensor]:
    """Prompt and answer as one text; only the answer's tokens, and the end behind them, are learned (-100 is not)."""
    given = tokenizer([f"{PROMPT} {answer}{tokenizer.eos_token}" for answer in answers], return_tensors="pt", padding=True)
    asked = len(tokenizer(PROMPT)["input_ids"])
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    labels[:, :asked] = -100
    return {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"], "labels": labels}


@torch.no_grad()
def said(model: torch.nn.Module, tokenizer: AutoTokenizer, mit: mitrain.MiT, features: Tensor) -> list[str]:
    """What the language model says of each feature, with its KV cache."""
    asked = tokenizer([PROMPT] * len(features), return_tensors="pt")
    with mit.bind({"image": features}):
        out = model.generate(
            asked["input_ids"], attention_mask=asked["attention_mask"], max_new_tokens=8, do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
    return [text.strip() for text in tokenizer.batch_decode(out[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)]


def train(
    model: torch.nn.Module,
    tokenizer: AutoTokenizer,
    mit: mitrain.MiT,
    features: Tensor,
    names: list[str],
    steps: int,
    lr: float,
) -> None:
    optimizer = torch.optim.AdamW(mit.parameters(), lr=lr)  # the model itself is frozen
    for step in range(1, steps + 1):
        rows = torch.randint(len(names), (16,))
        loss = model(**batch_of(tokenizer, [names[row] for row in rows]), infused={"image": features[rows]}).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(mit.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0 or step == steps:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)


def main(words: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pictures", type=Path, help="a folder with a folder of pictures for each class")
    parser.add_argument("--llm", required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=Path("own-loop-adapter"))
    arguments = parser.parse_args(words)

    torch.manual_seed(0)
    paths = sorted(path for path in arguments.pictures.glob("*/*") if path.is_file())
    names = np.array([path.parent.name for path in paths])
    held = np.arange(len(paths)) % 4 == 3  # every fourth picture is never trained on
    features = picture_features(arguments.encoder, paths)
    features = (features - features[~held].mean(0)) / features[~held].std(0).clamp(min=1e-6)

    tokenizer = AutoTokenizer.from_pretrained(arguments.llm, padding_side="right")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(arguments.llm).eval()
    mit = mitrain.attach(model, mitrain.MiTConfig(modalities={"image": features.shape[1]}, layers="last third"))
    train(model, tokenizer, mit, features[~held], names[~held], arguments.steps, arguments.lr)

    # The control: the same question with another sample's picture. What stays right then, the picture did not say.
    shown, truths, scores = features[held], names[held], {}
    for what, given in (("held-out pictures", shown), ("another sample's picture", shown.roll(len(shown) // 2, 0))):
        scores[what] = float(np.mean(said(model, tokenizer, mit, given) == truths))
        print(f"{what}: {scores[what]:.2f} of {len(truths)} named right")

    mit.save_pretrained(arguments.out)  # the adapter alone, a few files
    mit.detach()
    mit, _ = mitrain.load_adapter(model, arguments.out)
    again = said(model, tokenizer, mit, shown)
    print(f"saved to {arguments.out}; loaded again it says {again[0]!r} of {paths[int(held.argmax())].name}")
    return scores


if __name__ == "__main__":
    main()
