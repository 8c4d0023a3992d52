"""The plain definition of generated adapters, against the paper's formula written out instance by instance."""

import pytest
import torch

from hdscale.ops import apply_adapter, generate_adapter_weights, generated_adapter
from hdscale.ops.cases import random_case
from hdscale.ops.naive import Shape

CASE = random_case(Shape(B=3, T=5, D=12, A=4, K=6), torch.float64)


def one_instance(n: int, x: torch.Tensor) -> torch.Tensor:
    heads, h = CASE.heads, CASE.code[0, n]
    down = (heads.down_weight @ h + heads.down_bias).reshape(12, 4)
    up = (heads.up_weight @ h + heads.up_bias).reshape(4, 12)
    hidden = torch.relu(x @ down + heads.down_bias_weight @ h + heads.down_bias_bias)
    return hidden @ up + heads.up_bias_weight @ h + heads.up_bias_bias


def test_equals_the_formula():
    y = generated_adapter(CASE.x[0], CASE.code[0], CASE.heads, backend="torch")
    for n in range(3):
        torch.testing.assert_close(y[n], one_instance(n, CASE.x[0][n]))


def test_generate_once_apply_often():
    weights = generate_adapter_weights(CASE.code[0], CASE.heads)
    for t in range(5):
        y = apply_adapter(CASE.x[0][:, t : t + 1], weights)
        torch.testing.assert_close(y[1, 0], one_instance(1, CASE.x[0][1, t]))


def test_beams_of_an_instance_are_adjacent():
    weights = generate_adapter_weights(CASE.code[0], CASE.heads)
    x = torch.randn(6, 2, 12, dtype=torch.float64)
    y = apply_adapter(x, weights)
    for row in range(6):
        torch.testing.assert_close(y[row], one_instance(row // 2, x[row]))


def test_rows_that_do_not_divide_evenly():
    with pytest.raises(ValueError, match="4 rows cannot be divided evenly among 3 instances"):
        apply_adapter(torch.zeros(4, 1, 12, dtype=torch.float64), generate_adapter_weights(CASE.code[0], CASE.heads))
