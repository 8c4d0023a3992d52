"""One small forward and backward pass of the operator, for compute-sanitizer to watch."""

import torch

from hdscale.ops.cases import random_case
from hdscale.ops.naive import Shape
from hdscale.ops.verify import outputs_and_gradients


def run() -> None:
    """Odd sizes, two layers, each kernel at least once."""
    for tokens in (5, 20, 40):  # the three blocks of the contraction
        case = random_case(Shape(B=3, T=tokens, D=72, A=20, K=40, N=2), torch.bfloat16, "cuda")
        outputs_and_gradients(case, "cuda")
    torch.cuda.synchronize()


if __name__ == "__main__":
    run()
