"""The CUDA kernels without a GPU: their index arithmetic checked by a C++ compiler, their source run in an
emulation of warps and barriers, and compiled by nvcc. And with a GPU, where there is one: their results,
shape by shape."""

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from hdscale.ops.backend import LARGEST_CUDA_CODE, MOST_CUDA_LAYERS, availability, cuda_supports, supports
from hdscale.ops.cases import TOLERANCE, random_case
from hdscale.ops.naive import Shape
from hdscale.ops.verify import outputs_and_gradients, relative_errors
from tests.helpers.places import ROOT, TESTS

EMULATOR = TESTS / "helpers" / "emulator"
SOURCES = ROOT / "hdscale" / "ops" / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def compile_program(name: str, folder: Path) -> Path:
    program = folder / name
    command = [
        COMPILER,
        "-std=c++17",
        "-O2",
        "-Wall",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-I",
        SOURCES,
        "-I",
        EMULATOR,
    ]
    subprocess.run([*command, EMULATOR / f"{name}.cpp", "-o", program], check=True)
    return program


@needs_compiler
def test_index_arithmetic_covers_everything_once(tmp_path):
    subprocess.run([compile_program("check_tiles", tmp_path)], check=True)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    return compile_program("run_kernels", tmp_path_factory.mktemp("emulator"))


def emulated_errors(emulator: Path, shape: Shape, seed: int) -> dict[str, float]:
    command = [str(emulator), *map(str, shape), str(seed)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, (shape, result.returncode, result.stderr)
    lines = [line.split() for line in result.stdout.splitlines()]
    return {f"{name}{index}": float(error) for index, (name, error) in enumerate(lines)}


def check_emulated(emulator: Path, shape: Shape, seed: int) -> None:
    errors = emulated_errors(emulator, shape, seed)
    assert len(errors) == 5 * shape.N + 5
    assert all(error <= TOLERANCE[torch.bfloat16] for error in errors.values()), (shape, seed, errors)


SHAPES = [
    Shape(B=3, T=4, D=24, A=5, K=9, N=2),  # odd sizes everywhere
    Shape(B=65, T=1, D=17, A=4, K=8),  # two groups of instances, the second nearly empty
    Shape(B=2, T=20, D=33, A=18, K=40),  # the block for more tokens
    Shape(B=3, T=70, D=16, A=16, K=16),  # and for many, in two parts
    Shape(B=1, T=1, D=8, A=1, K=1),
    Shape(B=5, T=9, D=20, A=17, K=130),  # K beyond one block of columns
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_in_the_emulator(emulator, shape):
    check_emulated(emulator, shape, seed=sum(shape))


@pytest.mark.slow
def test_kernels_in_the_emulator_at_many_shapes(emulator):
    """Shapes drawn anew at each run; shape and seed are in the message."""
    draw = random.SystemRandom()
    for _ in range(25):
        shape = Shape(
            B=draw.randint(1, 80), T=draw.randint(1, 70), D=draw.randint(8, 70), A=draw.randint(1, 40),
            K=draw.randint(1, 140), N=draw.randint(1, 3),
        )  # fmt: skip
        while shape.B * shape.D * shape.A * shape.K * shape.N > 1 << 23:
            shape = shape._replace(B=max(1, shape.B // 2), K=max(1, shape.K // 2), N=1)
        check_emulated(emulator, shape, seed=draw.randrange(1 << 30))


# ---- on a GPU --------------------------------------------------------------------------------------------

GPU_SHAPES = [
    Shape(B=0, T=4, D=64, A=8, K=16),
    Shape(B=1, T=1, D=8, A=1, K=1),
    Shape(B=129, T=4, D=256, A=64, K=128, N=3),
    Shape(B=32, T=4, D=1024, A=64, K=128, N=4),
    Shape(B=17, T=130, D=72, A=36, K=72, N=2),
    Shape(B=4, T=3, D=4096, A=33, K=256),
    Shape(B=3, T=2, D=8, A=800, K=250),
]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_kernels_on_a_gpu(shape):
    assert availability("cuda").usable, availability("cuda").reason
    case = random_case(shape, torch.bfloat16, "cuda", seed=sum(shape))
    for shared in (True, False):
        errors = relative_errors(case, "cuda", shared)
        assert max(errors.values()) <= TOLERANCE[torch.bfloat16], errors


@pytest.mark.gpu
def test_results_on_a_gpu_are_the_same_at_every_run():
    case = random_case(Shape(B=64, T=4, D=512, A=64, K=128, N=4), torch.bfloat16, "cuda")
    first, second = (outputs_and_gradients(case, "cuda") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
def test_capture_into_a_cuda_graph():
    case = random_case(Shape(B=16, T=4, D=256, A=32, K=64), torch.bfloat16, "cuda")
    heads = case.heads
    biases = (torch.zeros(16, 32, device="cuda"), torch.zeros(16, 256, device="cuda"))
    arguments = (case.x[0], case.code[0], *heads[:4], *biases)
    assert availability("cuda").usable, availability("cuda").reason
    expected = torch.ops.hdscale.generated_adapter(*arguments)[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.ops.hdscale.generated_adapter(*arguments)[0]
    graph.replay()
    assert torch.equal(captured, expected)


def test_what_the_kernels_take_is_known_before_the_launch(emulator):
    """`cuda_supports` says what `gpu::takes` says, at the limits of every size and over odd shapes: a shape beyond the
    kernels takes the plain path instead of failing in the middle of a step."""
    draw = random.Random(0)
    sizes = [
        (0, 1, 2, 63, 64, 65, 129, 4_194_240, 4_194_304, 4_194_305, 1 << 30, 1 << 33),  # B
        (0, 1, 8, 9, 32, 33, 130, 2048, 4_194_240, 4_194_241, 1 << 30, 1 << 33),  # T
        (1, 8, 17, 4096, (1 << 20) - 1, 1 << 20, 1 << 30),  # D
        (1, 3, 64, 800, 1023, 1024, 1025),  # A
        (1, 7, 128, 256, LARGEST_CUDA_CODE, LARGEST_CUDA_CODE + 1, 4096),  # K
        (1, 24, MOST_CUDA_LAYERS, MOST_CUDA_LAYERS + 1),  # N
    ]
    shapes = [Shape(*(draw.choice(choices) for choices in sizes)) for _ in range(6000)]
    usual = Shape(B=32, T=4, D=1024, A=64, K=128, N=24)
    for name, choices in zip(Shape._fields, sizes, strict=True):
        shapes += [usual._replace(**{name: size}) for size in choices]
    lines = "".join(" ".join(map(str, shape)) + "\n" for shape in shapes)
    result = subprocess.run([str(emulator), "takes"], input=lines, capture_output=True, text=True, check=True)
    theirs = [line == "1" for line in result.stdout.split()]
    assert [cuda_supports(shape) for shape in shapes] == theirs
    assert cuda_supports(usual) and any(theirs) and not all(theirs)


def test_shapes_beyond_the_kernels_fall_back():
    brain = torch.empty(1, dtype=torch.bfloat16, device="meta")
    usual = Shape(B=2, T=4, D=8, A=8, K=LARGEST_CUDA_CODE, N=MOST_CUDA_LAYERS)
    assert supports("cuda", (brain,), usual)
    assert not supports("cuda", (brain,), usual._replace(K=LARGEST_CUDA_CODE + 1))
    assert not supports("cuda", (brain,), usual._replace(N=MOST_CUDA_LAYERS + 1))
