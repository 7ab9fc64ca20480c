"""MoPE's claims."""

from types import SimpleNamespace

from benchmarks.claims.claim import Conditions, claim
from benchmarks.claims.rows import Rows, mean, numbers, scores, series

TUXPAINT = "tuxpaint captions, categories, held-out objects"
NAMED = "pictures with their names, 81 classes, held-out concepts"
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
    return Conditions(confirmed=holds, contradicted=not holds)


@claim(
    "more experts help, longer prompts do not",
    expected="rising or flattening with experts; flattening or falling with length at equal parameters",
    data=NAMED,
    note=NOT_TRAINED,
)
def c2(rows: Rows, found: SimpleNamespace) -> Conditions:
    experts, lengths = rows.along("experts", "mope"), rows.along("length", "one-expert")
    found.by_experts, found.by_length = series(experts, "value"), series(lengths, "value")
    experts_gain = scores(experts[-1]) - scores(experts[0])
    found.experts_gain = experts_gain.estimate
    found.above_length = (experts_gain - (scores(lengths[-1]) - scores(lengths[0]))).estimate
    return Conditions(
        confirmed=found.experts_gain.low > 0 and found.above_length.low > 0,
        contradicted=found.experts_gain.high < 0 or found.above_length.high < 0,
    )


@claim(
    "the importance loss prevents the collapse onto few experts",
    expected="squared variation at most 0.1 above that of even, sharp routing of a batch with the loss, more without",
    data=TUXPAINT,
    note=NOT_TRAINED,
)
def c3(rows: Rows, found: SimpleNamespace) -> Conditions:
    mope, without = rows.of("mope"), rows.of("mope-no-importance")
    with_loss, without_loss = (numbers(method, "usage.variation") for method in (mope, without))
    found.above_floor = (with_loss - numbers(mope, "usage.variation_floor")).estimate
    found.gain = (without_loss - with_loss).estimate
    found.top_share = mean(mope, "usage.top_share")
    found.top_share_without = mean(without, "usage.top_share")
    return Conditions(
        confirmed=found.above_floor.high <= 0.1 and found.gain.low > 0,
        contradicted=found.above_floor.low > 0.1 or found.gain.high < 0,
    )


@claim(
    "MoPE makes more of more data than vanilla prompts",
    expected="the gap widens",
    data=NAMED,
    note=NOT_TRAINED,
)
def c4(rows: Rows, found: SimpleNamespace) -> Conditions:
    mope, one = (rows.along("data", method) for method in ("mope", "one-expert"))
    at_least, at_most = (scores(mope[end]) - scores(one[end]) for end in (0, -1))
    found.gap_at_least, found.gap_at_most = at_least.estimate, at_most.estimate
    found.widening = (at_most - at_least).estimate
    return Conditions(confirmed=found.widening.low > 0, contradicted=found.widening.high < 0)


@claim(
    "routing is instance-wise",
    expected="a clear drop when partners are permuted; none for static prompts",
    data=NAMED,
    note="the paper's models and data: configs/mope-mmimdb.yaml, not trained",
)
def c5(rows: Rows, found: SimpleNamespace) -> Conditions:
    routed, static, mope = (rows.of(method) for method in ("routed", "static", "mope"))
    drops = [scores(method) - scores(method, "controls.other-text") for method in (routed, static, mope)]
    found.drop, found.drop_of_static, found.drop_of_mope = (drop.estimate for drop in drops)
    found.above_static = (drops[0] - drops[1]).estimate
    return Conditions(
        confirmed=found.drop.low > 0 and found.above_static.low > 0,
        contradicted=found.drop.high < 0 or found.above_static.high < 0,
    )
