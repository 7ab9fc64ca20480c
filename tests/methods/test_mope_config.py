"""MoPE's settings, and the exact count of what is trained against the published arithmetic."""

from collections import Counter

import pytest
import torch
from transformers import BertConfig, BertModel, SwinConfig, SwinModel

from mitrain import methods
from mitrain.core import config
from mitrain.core.errors import ConfigError
from mitrain.methods.mope.config import MoPEConfig, Shape
from mitrain.methods.mope.mope import MoPE

DIMS, DEPTHS, TEXT = (128, 256, 512, 1024), (2, 2, 18, 2), 768
WHOLE = 12_032  # Σ depth · width of Swin-B
SWIN_B = Shape(
    widths=tuple(d for d, depth in zip(DIMS, DEPTHS, strict=True) for _ in range(depth - 1)),
    stage_widths=DIMS,
    entry=DIMS[0],
    condition=TEXT,
    others=(TEXT,) * 12,
)


@pytest.fixture(scope="module")
def swin_and_bert():
    with torch.device("meta"):
        swin = SwinModel(SwinConfig(embed_dim=128, depths=DEPTHS, num_heads=(4, 8, 16, 32)))
        return {"text": BertModel(BertConfig()), "encoder": swin}


def trained(models, **settings):
    """Trained parameters by part (a router's frozen keys are buffers), and the shape that they were made for."""
    mope = MoPE(MoPEConfig(**settings))
    mope.attach(models)
    count = Counter()
    for name, parameter in mope.named_parameters():
        assert parameter.is_meta
        first, *inside = name.split(".")
        part = {"prompts": inside[1:2], "mapper": ["stages" if inside[:1] == ["stages"] else "mapper"]}.get(first, [first])
        count[part[0]] += parameter.numel()
    mope.detach()
    return count, mope._shape


@pytest.mark.parametrize(
    ("experts", "food", "entailment"), [(1, 1.57, 1.40), (4, 1.79, 1.61), (8, 2.08, 1.90), (16, 2.65, 2.48)]
)
def test_swin_b_and_bert_have_the_published_count(swin_and_bert, experts, food, entailment):
    """The release holds a static prompt, experts and a router in each stage's first block, too, and never uses them."""
    count, shape = trained(swin_and_bert, experts=experts)
    assert shape == SWIN_B
    assert (count["mapper"], count["stages"], count["others"], count["entry"]) == (296_064, 739_200, 36_864, 1_664)
    unused = sum(DIMS)
    static, expert = count["static"] + 6 * unused, count["experts"] + experts * 6 * unused
    router = count["router"] + 2 * unused + 4 * (2 + 8 * (TEXT + 1))
    assert (static, expert, router) == (6 * WHOLE, experts * 6 * WHOLE, 171_760)
    released = count.total() + 6 * unused + experts * 6 * unused + router - count["router"]
    for classes, millions in ((101, food), (3, entailment)):
        assert round((released + classes * (1024 + 1 + TEXT + 1)) / 1e6, 2) == millions


@pytest.mark.parametrize(("experts", "millions"), [(2, 1.32), (4, 1.50), (16, 2.58)])
def test_conditional_prompts_have_the_published_count(swin_and_bert, experts, millions):
    """Their release routes every block but the very first, which gets the entry prompt beside its unused own."""
    settings = {"router": "cpt", "mapper_norm": "none", "stage_start": "prompted", "experts": experts}
    count, _ = trained(swin_and_bert, **settings)
    assert count["entry"] == 0 and count["router"] == 24 * (TEXT + 1) * experts
    count, _ = trained(swin_and_bert, **settings, shared_router=True)
    assert count["router"] == 23 * (TEXT + 1) * experts
    assert round((count.total() + 13 * DIMS[0]) / 1e6, 2) == millions


def test_an_expert_costs_parameters_and_no_tokens(swin_and_bert):
    one, two, many = (trained(swin_and_bert, stage_start="prompted", experts=k)[0].total() for k in (1, 2, 32))
    assert two - one == 72_192 == 6 * WHOLE and many - one == 31 * 72_192
    assert {MoPEConfig(experts=k).prompt_tokens for k in (1, 2, 32)} == {2 * 6 + 1}


def test_vanilla_prompts_of_l_times_k_tokens_have_as_many_parameters_as_the_experts(swin_and_bert):
    vanilla, _ = trained(swin_and_bert, length=6 * 4, dynamic=False, mapped=False)
    experts, _ = trained(swin_and_bert, length=6, experts=4)
    assert vanilla["static"] == experts["experts"]


def test_what_the_routers_differ_in():
    mope, cpt = MoPEConfig(experts=16), MoPEConfig(experts=16, router="cpt")
    assert (mope.gamma, mope.noise_std, cpt.gamma, cpt.noise_std) == (0.1, 1 / 256, 0.05, 1 / 256)
    assert MoPEConfig(router="cpt", experts=2).noise_std == 1 / 4
    assert MoPEConfig(noise=0, threshold=0).noise_std == MoPEConfig(noise=0, threshold=0).gamma == 0
    assert mope.router_widths == (2, 8)
    assert MoPEConfig(router_reads="tokens").router_widths == (10, 0)
    assert MoPEConfig(router_reads="condition").router_widths == (0, 10)
    assert (mope.main, mope.other, MoPEConfig(main="text").other) == ("encoder", "text", "encoder")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"static": False, "dynamic": False, "mapped": False, "other_length": 0}, "nothing is trained"),
        ({"router": "cpt", "router_reads": "tokens"}, "router=cpt reads the condition alone"),
        ({"router": "cpt", "keys": "learned"}, "router=cpt reads the condition alone and has no keys"),
        ({"shared_router": True, "stage_start": "prompted"}, "shared_router=true is of conditional prompts"),
        ({"main": "audio"}, "adapter.main='audio'"),
        ({"temperature": 0}, "adapter.temperature=0"),
        ({"experts": 0}, "adapter.experts=0"),
        ({"expert": 4}, "unknown key 'adapter.expert' .did you mean 'experts'"),
    ],
)
def test_a_wrong_setting_is_one_line(values, message):
    with pytest.raises(ConfigError, match=message) as error:
        config.choose("adapter", {"name": "mope", **values})
    assert "\n" not in str(error.value)


def test_the_method_is_built_by_name():
    section = config.choose("adapter", {"name": "mope", "experts": 2})
    assert isinstance(methods.build(section, {"image": 384}), MoPE)
    assert MoPEConfig(**section.to_dict()) == section
