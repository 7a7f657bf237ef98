import math

import pytest
import torch

from softlms.losses import adaptive_compression_loss, distillation_loss, linear_compression_loss


def test_values_and_gradients():
    alpha = torch.tensor([0.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    assert linear_compression_loss(alpha).item() == pytest.approx(3 - 3.5)
    assert adaptive_compression_loss(alpha).item() == pytest.approx(1 + math.exp(-0.5) + math.exp(-3))
    (linear,) = torch.autograd.grad(linear_compression_loss(alpha), alpha)
    (adaptive,) = torch.autograd.grad(adaptive_compression_loss(alpha), alpha)
    torch.testing.assert_close(linear, -torch.ones_like(alpha))
    torch.testing.assert_close(adaptive, -torch.exp(-alpha))


@pytest.mark.parametrize("loss", [linear_compression_loss, adaptive_compression_loss])
def test_gradcheck_with_weights(loss):
    alpha = torch.rand(5, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a: loss(a, weight), (alpha,))
    torch.testing.assert_close(loss(alpha, torch.ones(5)), loss(alpha))


def test_distillation_is_zero_for_equal_outputs_and_positive_otherwise():
    teacher = torch.randn(4, 3)
    assert distillation_loss(teacher.clone(), teacher).item() == pytest.approx(0, abs=1e-6)
    assert distillation_loss(torch.randn(4, 3), teacher, 2.0).item() > 0


def test_distillation_equals_the_definition():
    student, teacher = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    expected = 4 * (p * (p / q).log()).sum(-1).mean()
    assert distillation_loss(student, teacher, 2.0).item() == pytest.approx(expected.item(), rel=1e-5)


def test_distillation_gradcheck_and_leading_axes():
    student = torch.randn(2, 3, 4, requires_grad=True)
    teacher = torch.randn(2, 3, 4)
    flat = distillation_loss(student.reshape(6, 4), teacher.reshape(6, 4))
    torch.testing.assert_close(distillation_loss(student, teacher), flat)
    (gradient,) = torch.autograd.grad(distillation_loss(student, teacher), student)
    torch.testing.assert_close(gradient, (student.softmax(-1) - teacher.softmax(-1)) / 6, rtol=1e-4, atol=1e-6)


def test_distillation_of_a_score_is_the_squared_error():
    assert distillation_loss(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [4.0]])).item() == pytest.approx(2)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_distillation_of_counted_outputs_is_that_of_these_alone(chunk, monkeypatch):
    """However many log-probabilities are held at a time; a chunk may have no output that counts."""
    student, teacher = torch.randn(2, 5, 7, requires_grad=True), torch.randn(2, 5, 7)
    counted = torch.tensor([[True, True, False, True, False], [False] * 4 + [True]])
    expected = distillation_loss(student[counted], teacher[counted], 2.0)
    monkeypatch.setattr("softlms.losses.CHUNK", chunk)
    found = distillation_loss(student, teacher, 2.0, counted=counted)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients)
    assert gradients[0][~counted].abs().max() == 0


def test_wrong_input():
    with pytest.raises(ValueError, match="differ in shape"):
        distillation_loss(torch.zeros(2, 2), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="temperature"):
        distillation_loss(torch.zeros(2, 2), torch.zeros(2, 2), 0)
    with pytest.raises(ValueError, match=r"counted has shape \(3,\), the outputs have \(2,\)"):
        distillation_loss(torch.zeros(2, 2), torch.zeros(2, 2), counted=torch.ones(3, dtype=torch.bool))
