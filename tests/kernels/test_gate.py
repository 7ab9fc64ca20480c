"""The gate's arithmetic and what is hidden from it, by hand on a few numbers."""

import torch
from mitrain_kernels.infused_attention.hidden import ORDINARY, finite, shield, without_hidden, without_missing

NAN, INF = float("nan"), float("inf")


def test_maps_of_a_missing_modality_are_zero_with_their_gradients():
    present = torch.tensor([[True, False], [False, True]])
    x = torch.full((2, 2, 3, 2), NAN)
    x[0, 0] = 1.0
    x[1, 1] = 2.0
    x.requires_grad_()
    found, nothing = without_missing(present, x, None)
    assert nothing is None and found[0, 0].eq(1).all() and found[1, 1].eq(2).all()
    assert found[0, 1].eq(0).all() and found[1, 0].eq(0).all()
    found.sum().backward()
    assert torch.equal(x.grad, present[:, :, None, None].expand_as(x).to(x))
    assert without_missing(None, x, None) == [x, None]


def test_only_what_is_immense_or_no_number_in_hidden_rows_becomes_zero():
    row = [NAN, INF, -INF, ORDINARY, -2 * ORDINARY, ORDINARY / 2, -3.0]
    x = torch.tensor(row).expand(2, 1, 2, 7)
    valid = torch.tensor([[False, True, False], [True, False, True]])
    found = without_hidden(x, valid)  # the rows are the last two of three
    cleaned = torch.tensor([0, 0, 0, 0, 0, ORDINARY / 2, -3.0])
    assert torch.equal(found[0, 0, 1], cleaned) and torch.equal(found[1, 0, 0], cleaned)
    for kept in (found[0, 0, 0], found[1, 0, 1]):
        torch.testing.assert_close(kept, torch.tensor(row), rtol=0, atol=0, equal_nan=True)
    assert without_hidden(x, None) is x


def test_a_sum_that_overflows_in_half_precision_is_finite_in_float32():
    assert finite(torch.full((8,), 6e4, dtype=torch.float16), None, torch.ones(2, dtype=torch.float64))
    assert finite(torch.full((2,), 1e300, dtype=torch.float64))
    assert not finite(torch.ones(2), None, torch.tensor([1.0, NAN]))
    assert not finite(torch.tensor([INF, -INF])) and finite()


def test_the_shield_hands_the_output_on_and_cleans_its_gradient():
    output = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    valid = torch.tensor([[False, True]])
    shielded = shield(output, valid)
    assert torch.equal(shielded, output) and shielded is not output
    shielded.backward(torch.tensor([[[[NAN, 1.0], [2.0, 3.0]]]]))
    assert output.grad.tolist() == [[[[0.0, 1.0], [2.0, 3.0]]]]
    assert shield(output, None) is output and shield(still := output.detach(), valid) is still
