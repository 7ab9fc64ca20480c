"""How a model is made to speak: with its KV cache where that changes nothing, else a whole pass for every token."""

import logging
from typing import Any

import torch

from mitrain.core.errors import ModelError
from mitrain.models.batch import ModalityInputs
from mitrain.models.loading import agree
from mitrain.tasks.base import Parts

log = logging.getLogger(__name__)
TRIED = 3  # tokens

# A checkpoint's generation_config.json acts where a keyword is left out: Qwen's penalises repetition, also without sampling.
NEUTRAL: dict[str, Any] = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "early_stopping": False}
NEUTRAL |= {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "length_penalty": 1.0}
NEUTRAL |= dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"))
NEUTRAL |= dict.fromkeys(("min_length", "min_new_tokens", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids"))
NEUTRAL |= dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"))
NEUTRAL |= dict.fromkeys(("sequence_bias", "guidance_scale"))
NEUTRAL |= {"use_cache": True, "cache_implementation": None}  # `decoding` says whether there is one


def generated(parts: Parts, ids: torch.Tensor, mask: torch.Tensor, **options: Any) -> Any:
    """What transformers' ``generate`` returns for prompts padded on the left, by default the likeliest token each time; no
    setting acts that the model brings."""
    text = parts.text
    return text.model.generate(
        input_ids=ids,
        attention_mask=mask,
        synced_gpus=text.sharded,
        eos_token_id=text.tokenizer.eos_token_id,
        pad_token_id=text.pad_id,
        **{**NEUTRAL, **options},
    )


@torch.no_grad()
def decoding(parts: Parts) -> dict[str, Any]:
    """Keywords for `generated` under which the attached model generates what its whole passes say.

    It is asked by a short text: not every layer reads the cache as it was written, nor every method. ModelError where it
    cannot generate at all.
    """
    try:
        expected = logits(parts, use_cache=False)
    except ModelError:
        raise
    except Exception as error:  # a model that cannot generate fails in a way of its own
        raise ModelError(f"{type(parts.text.model).__name__} cannot generate ({str(error)[:120]}): use another") from None
    try:
        if all(map(agree, logits(parts, use_cache=True), expected)):
            return {}
        reason = "it answers differently with one"
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
    log.warning("%s generates without a KV cache, a whole pass for each token: %s", type(parts.text.model).__name__, reason)
    return {"use_cache": False}


def logits(parts: Parts, use_cache: bool) -> list[torch.Tensor]:
    """(B, V) of each step, up to the first at which two ways of computing them could part."""
    ids, mask = parts.text.probe("left")
    factory = {"dtype": parts.text.dtype, "device": parts.text.device}
    widths = parts.adapter.attachment.modalities
    features = {name: torch.zeros(len(ids), width, **factory) for name, width in widths.items()}
    inputs = ModalityInputs(features) if features else None
    options = {"max_new_tokens": TRIED, "min_new_tokens": TRIED, "use_cache": use_cache}
    with parts.adapter.conditioned(inputs):
        return list(generated(parts, ids, mask, return_dict_in_generate=True, output_logits=True, **options).logits)
