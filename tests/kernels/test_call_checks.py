"""What `check` lets through and what it refuses of the arguments of infused attention, by its whole message."""

import re

import pytest
import torch
from attention_cases import Case, bounds, make
from mitrain_kernels.infused_attention import Call, GateSums
from mitrain_kernels.infused_attention.reference import check

PACKED = Case(lengths=(2, 3), present=True, M=1, base="mixed")
RISE = "cu_seqlens must rise from 0 to 5, the number of tokens, but is "


def call(case, **changes):
    inputs, options = make(case)
    return Call(**{**inputs, **options, **changes})


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(window=1),
        Case(M=3, present=True, base="mixed", padding="left"),
        PACKED,
        Case(lengths=(5,)),
        Case(lengths=(5, 0, 1), M=3),
    ],
    ids=str,
)
def test_what_fits_is_let_through(case):
    check(call(case))


@pytest.mark.parametrize("given", [[1, 2, 5], [0, 2, 4], [0, 6, 5], [1, 5, 4]])
def test_bounds_that_do_not_rise_over_all_tokens_are_refused(given):
    with pytest.raises(ValueError, match=f"^{re.escape(RISE + str(given))}$"):
        check(call(PACKED, cu_seqlens=torch.tensor(given)))


def ints(*shape):
    return torch.zeros(shape, dtype=torch.int64)


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        (
            Case(B=1, tk=5, tq=4),
            {"cu_seqlens": bounds([2, 3])},
            "packed q, k, v must be (1, heads, all tokens, d), with as many queries as keys",
        ),
        (
            PACKED,
            {"return_state": True},
            "cu_seqlens excludes key_padding, mask and state: packed sequences have no padding",
        ),
        (
            Case(M=3),
            {"head_logit": torch.zeros(3, 5)},
            "head_logit must be (M, H) = (3, 4), but is (3, 5)",
        ),
        (
            Case(),
            {"state_in": GateSums(torch.zeros(2, 2, 4, 2), torch.zeros(2, 2, 2), torch.zeros(2, 2))},
            "state_in must be the sums of one token: give state.last()",
        ),
        (
            Case(),
            {"k": torch.zeros(2, 2, 9, 8)},
            "q, k, v must share a floating type, but are torch.float64, torch.float32, torch.float64",
        ),
        (
            Case(),
            {"q": ints(2, 4, 9, 8), "k": ints(2, 2, 9, 8), "v": ints(2, 2, 9, 8)},
            "q, k, v must share a floating type, but are torch.int64, torch.int64, torch.int64",
        ),
    ],
    ids=range(6),
)
def test_what_does_not_fit_is_refused_by_its_whole_message(case, changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check(call(case, **changes))
