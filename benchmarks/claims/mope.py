"""MoPE's claims."""

from types import SimpleNamespace

from benchmarks.claims.claim import Conditions, claim
from benchmarks.claims.rows import Rows, mean, noise, series, spread

TUXPAINT = "tuxpaint captions, categories, held-out objects"
NOT_TRAINED = "the paper's models and data: configs/mope-snli-ve.yaml, not trained"


@claim(
    "conditional prompts train 0.7 %, MoPE 0.8 % of the parameters",
    expected="0.67 to 0.77 % (two to four experts, no heads) and 0.75 to 0.85 % (four experts); the release's unused parts"
    " aside",
    data="counted on Swin-B and BERT-base",
)
def c1(rows: Rows, found: SimpleNamespace) -> Conditions:
    two, four = (rows.of("cpt", "experts", count) for count in (2, 4))
    mope = rows.of("mope", "experts", 4)
    found.cpt_with_2 = mean(two, "adapter_parameters") / mean(two, "frozen_parameters")
    found.cpt_with_4 = mean(four, "adapter_parameters") / mean(four, "frozen_parameters")
    found.mope_with_4 = mean(mope, "trainable_parameters") / mean(mope, "frozen_parameters")
    holds = found.cpt_with_2 < 0.0075 and found.cpt_with_4 >= 0.0065 and 0.0075 <= found.mope_with_4 < 0.0085
    return Conditions(confirmed=holds, refuted=not holds)


@claim(
    "more experts help, longer prompts do not",
    expected="rising or flattening with experts; flattening or falling with length at equal parameters",
    data=TUXPAINT,
    note=NOT_TRAINED,
)
def c2(rows: Rows, found: SimpleNamespace) -> Conditions:
    experts, lengths = rows.along("experts", "mope"), rows.along("length", "one-expert")
    found.by_experts, found.by_length = series(experts, "value"), series(lengths, "value")
    found.experts_gain = found.by_experts[-1] - found.by_experts[0]
    found.length_gain = found.by_length[-1] - found.by_length[0]
    found.spread = max(spread(experts[-1], "value"), spread(lengths[-1], "value"))
    return Conditions(
        confirmed=found.experts_gain > found.spread and found.experts_gain > found.length_gain + found.spread,
        refuted=found.experts_gain < -found.spread or found.length_gain > found.experts_gain + found.spread,
    )


@claim(
    "the importance loss prevents the collapse onto few experts",
    expected="squared variation at most 0.1 with the loss, more without",
    data=TUXPAINT,
    note=NOT_TRAINED,
)
def c3(rows: Rows, found: SimpleNamespace) -> Conditions:
    mope, without = rows.of("mope"), rows.of("mope-no-importance")
    found.variation = mean(mope, "usage.variation")
    found.variation_without = mean(without, "usage.variation")
    found.top_share = mean(mope, "usage.top_share")
    found.top_share_without = mean(without, "usage.top_share")
    return Conditions(
        confirmed=found.variation <= 0.1 and found.variation_without > 0.1,
        refuted=found.variation > 0.1 or found.variation_without < found.variation,
    )


@claim(
    "MoPE makes more of more data than vanilla prompts",
    expected="the gap widens",
    data=TUXPAINT,
    note=NOT_TRAINED,
)
def c4(rows: Rows, found: SimpleNamespace) -> Conditions:
    mope_tenth, mope_all = (rows.of("mope", "data", share) for share in (0.1, 1.0))
    one_tenth, one_all = (rows.of("one-expert", "data", share) for share in (0.1, 1.0))
    found.gap_at_tenth = mean(mope_tenth, "value") - mean(one_tenth, "value")
    found.gap_at_all = mean(mope_all, "value") - mean(one_all, "value")
    found.error = noise(mope_tenth, one_tenth, "value") + noise(mope_all, one_all, "value")
    return Conditions(
        confirmed=found.gap_at_all > found.gap_at_tenth + found.error,
        refuted=found.gap_at_all < found.gap_at_tenth - found.error,
    )


@claim(
    "routing is instance-wise",
    expected="a clear drop when partners are permuted; none for static prompts",
    data=TUXPAINT,
    note="the paper's models and data: configs/mope-mmimdb.yaml, not trained",
)
def c5(rows: Rows, found: SimpleNamespace) -> Conditions:
    routed, static, mope = (rows.of(method) for method in ("routed", "static", "mope"))
    found.drop = mean(routed, "value") - mean(routed, "controls.other-text")
    found.drop_of_static = mean(static, "value") - mean(static, "controls.other-text")
    found.drop_of_mope = mean(mope, "value") - mean(mope, "controls.other-text")
    found.spread = max(spread(routed, "value"), spread(static, "value"))
    return Conditions(
        confirmed=found.drop > 2 * found.spread and found.drop_of_static < found.drop - found.spread,
        refuted=found.drop < found.spread or found.drop_of_static > found.drop,
    )
