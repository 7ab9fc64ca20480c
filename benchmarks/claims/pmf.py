"""PMF's claims."""

from types import SimpleNamespace

from benchmarks.claims.claim import Conditions, claim
from benchmarks.claims.rows import Rows, difference, fit, mean, rises, series

NAMED = "pictures with their names, 81 classes, held-out concepts"
NOT_TRAINED = "the paper's models and data: configs/pmf-food101.yaml, not trained"


@claim(
    "PMF trains less than 3 % of the parameters",
    expected="1.29 % with two fusion layers; more than 3 % from five on",
    data="counted on BERT-base and ViT-B/16",
)
def p1(rows: Rows, found: SimpleNamespace) -> Conditions:
    found.share_with_2 = mean(rows.of("pmf", "fusion_layers", 2), "share")
    found.share_with_5 = mean(rows.of("pmf", "fusion_layers", 5), "share")
    return Conditions(confirmed=found.share_with_2 < 0.03, contradicted=found.share_with_2 >= 0.03)


@claim(
    "PMF saves up to 66 % of the training memory of full fine-tuning",
    expected="the saving falls linearly with the number of fusion layers; about two thirds of the activations with two",
    data="tuxpaint captions, MiniLM of 6 layers and DINOv2 of 12, counted on tensors",
    note=f"{NOT_TRAINED}; of the peak, frozen layers below the fusion are let go of",
)
def p2(rows: Rows, found: SimpleNamespace) -> Conditions:
    depths, full = rows.along("fusion-layers", "pmf"), rows.of("full")
    saved, peak = series(depths, "saved_bytes"), series(depths, "peak_bytes")
    found.largest_saving = 1 - min(peak) / mean(full, "peak_bytes")
    found.activation_saving_with_2 = 1 - mean(rows.of("pmf"), "saved_bytes") / mean(full, "saved_bytes")
    found.linear_fit = fit(series(depths, "at"), saved)
    return Conditions(
        confirmed=found.largest_saving >= 0.66 and rises(saved) and found.linear_fit > 0.98,
        contradicted=found.largest_saving < 0.66 or not rises(saved),
    )


@claim(
    "each kind of prompt and the non-linear map help",
    expected="worse without any of them (sign only); more prompts than four do not help",
    data=NAMED,
    note=NOT_TRAINED,
)
def p3(rows: Rows, found: SimpleNamespace) -> Conditions:
    pmf = rows.of("pmf")
    without = [rows.of(method) for method in ("pmf-no-context", "pmf-no-fusion-context", "pmf-linear")]
    gains = [difference(pmf, less) for less in without]
    found.context, found.fusion_context, found.map = gains
    four, sixteen = (rows.of("pmf", "prompts", count) for count in (4, 16))
    found.many = difference(sixteen, four)
    return Conditions(
        confirmed=all(gain.low > 0 for gain in gains) and found.many.low <= 0,
        contradicted=any(gain.high < 0 for gain in gains),
    )


@claim(
    "PMF is comparable to full fine-tuning and better than prompts at the input",
    expected="at most three points below full fine-tuning, above prompt tuning",
    data=NAMED,
    note=f"prompt tuning stands in for PromptFuse and BlindPrompt; {NOT_TRAINED}",
)
def p4(rows: Rows, found: SimpleNamespace) -> Conditions:
    pmf, full, prompt = (rows.of(method) for method in ("pmf", "full", "prompt"))
    found.below_full, found.above_prompt = difference(full, pmf), difference(pmf, prompt)
    return Conditions(
        confirmed=found.below_full.high <= 0.03 and found.above_prompt.low > 0,
        contradicted=found.below_full.low > 0.03 or found.above_prompt.high < 0,
    )
