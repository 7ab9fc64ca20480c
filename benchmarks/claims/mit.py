"""MiT's claims."""

from types import SimpleNamespace

from benchmarks.claims.claim import Conditions, claim
from benchmarks.claims.rows import Rows, difference, fit, mean, rises, series

LLAMA = "counted on LLaMA-2-7B and CLIP ViT-L/14-336"


@claim(
    "MiT trains 2.5 % of the parameters",
    expected="2.46 % with eight infused layers; 1.55 % with the five that the release infuses",
    data=LLAMA,
)
def m1(rows: Rows, found: SimpleNamespace) -> Conditions:
    eight, five = (rows.of("mit", "layers", count) for count in (8, 5))
    found.trained_with_8 = mean(eight, "trainable_parameters")
    found.share_with_8 = found.trained_with_8 / mean(eight, "backbone_parameters")
    found.share_with_5 = mean(five, "trainable_parameters") / mean(five, "backbone_parameters")
    holds = 0.0245 <= found.share_with_8 < 0.0255
    return Conditions(confirmed=holds, contradicted=not holds)


@claim(
    "MiT takes 0.47 TFLOPs, about 10 % of a model that is given visual tokens",
    expected="0.470 T multiply-accumulates, 11 % of those with 576 visual tokens",
    data=LLAMA,
    note="the paper's FLOPs are multiply-accumulates",
)
def m2(rows: Rows, found: SimpleNamespace) -> Conditions:
    found.tera_macs = mean(rows.of("mit"), "method_macs") / 1e12
    found.prepended_tera_macs = mean(rows.of("mit"), "prepended_macs") / 1e12
    found.ratio = found.tera_macs / found.prepended_tera_macs
    holds = abs(found.tera_macs - 0.47) <= 0.005 and found.ratio <= 0.12
    return Conditions(confirmed=holds, contradicted=not holds)


@claim(
    "MiT's cost grows linearly with the size of the other modality, as it adds no tokens",
    expected="the language model's part stays the same; with visual tokens it grows at least linearly",
    data=f"{LLAMA}, 256 to 2,304 patches",
)
def m3(rows: Rows, found: SimpleNamespace) -> Conditions:
    sides = rows.along("side", "mit")
    mit, prepended = series(sides, "language_macs"), series(sides, "prepended_language_macs")
    found.mit_growth = mit[-1] / mit[0]
    found.prepended_growth = prepended[-1] / prepended[0]
    found.prepended_fit = fit(series(sides, "image_tokens"), prepended)
    flat = found.mit_growth == 1 and max(mit) == min(mit)
    return Conditions(
        confirmed=flat and rises(prepended) and found.prepended_fit > 0.98,
        contradicted=found.mit_growth > 1.01 or not rises(prepended),
    )


@claim(
    "rescaling the heads by L + cos(V, I) helps",
    expected="better with the gate than without, and with the cosine than without (sign only)",
    data="pictures with their names, 81 classes, held-out concepts; SmolLM2-135M and MiniLM",
    note="the paper's models and data: configs/mit-llama2-7b-refcoco.yaml, not trained",
)
def m4(rows: Rows, found: SimpleNamespace) -> Conditions:
    methods = ("mit", "mit-no-gate", "mit-no-cosine")
    llm, encoder = ([rows.of(method, task=task) for method in methods] for task in ("llm", "encoder"))
    found.gate_in_llm, found.gate_in_encoder = difference(llm[0], llm[1]), difference(encoder[0], encoder[1])
    found.cosine_in_llm, found.cosine_in_encoder = difference(llm[0], llm[2]), difference(encoder[0], encoder[2])
    gates, cosines = (found.gate_in_llm, found.gate_in_encoder), (found.cosine_in_llm, found.cosine_in_encoder)
    return Conditions(
        confirmed=all(gain.low > 0 for gain in gates) and all(gain.value >= 0 for gain in cosines),
        contradicted=all(gain.high < 0 for gain in gates),
    )
