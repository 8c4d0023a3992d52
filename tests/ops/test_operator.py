"""The generated-adapter operator on CPU: errors against double precision, and how it behaves inside
PyTorch."""

import os
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hdscale.errors import UserError
from hdscale.ops import AdapterHeads, SharedHeads, generated_adapter, generated_adapter_reference, share_heads
from hdscale.ops.backend import availability, resolve_backend
from hdscale.ops.cases import TOLERANCE, Case, random_case, reference, relative_error
from hdscale.ops.naive import Shape, generate_adapter_weights
from hdscale.ops.verify import outputs_and_gradients, relative_errors, relu_masks

needs_compiler = pytest.mark.skipif(
    not availability("cpp").usable, reason=f"no C++ kernels here: {availability('cpp').reason}"
)
DTYPES = (torch.float32, torch.bfloat16)
CORNERS = [
    Shape(B=0, T=3, D=16, A=4, K=8, N=2),
    Shape(B=1, T=1, D=8, A=1, K=1),
    Shape(B=129, T=1, D=8, A=3, K=5),
    Shape(B=33, T=130, D=24, A=2, K=3),
    Shape(B=2, T=3, D=4096, A=5, K=7),
    Shape(B=3, T=2, D=8, A=800, K=256),
    Shape(B=16, T=4, D=64, A=8, K=16, N=4),
    Shape(B=31, T=5, D=37, A=11, K=130, N=3),
    Shape(B=3, T=40, D=32, A=16, K=9, N=6),  # by library products, several layers together
    Shape(B=0, T=40, D=32, A=16, K=9, N=2),
]


def largest(errors: dict[str, float]) -> float:
    return max(errors.values())


def misses(case: Case, errors: dict[str, float]) -> dict[str, float]:
    """The errors beyond the tolerance.

    One tensor has an allowance: `down_bias_bias` is A sums of B T N terms dz of either sign, and with A = 1 a draw in
    a few hundred has terms that cancel to a thousandth of their size. Its error may be the unit roundoff of float32
    times the condition of the sum, sum |dz| / |sum dz|: what no sum in float32 can promise to stay below.
    """
    tolerance = TOLERANCE[case.code.dtype]
    missed = {name: error for name, error in errors.items() if not error <= tolerance}
    if "down_bias_bias" in missed and missed["down_bias_bias"] <= 2**-24 * sum_condition(case):
        del missed["down_bias_bias"]
    return missed


def sum_condition(case: Case) -> float:
    """sum |dz| / |sum dz| over instances and tokens, the largest of any layer and of all layers together."""
    heads = AdapterHeads(*(tensor.double() for tensor in case.heads))
    terms = []
    for code, dy, mask in zip(case.code.double().unbind(), case.dy, relu_masks(case), strict=True):
        up = generate_adapter_weights(code, heads).up
        terms.append((torch.bmm(dy.double(), up.transpose(1, 2)) * mask).flatten(0, 1))
    sums = [*terms, torch.cat(terms)]
    return max(float(dz.abs().sum(0).norm() / dz.sum(0).norm()) for dz in sums)


def test_the_condition_of_a_sum_is_large_only_where_it_cancels():
    case = random_case(Shape(B=4, T=5, D=32, A=1, K=8), torch.float32)
    assert 1 <= sum_condition(case) < 100
    last = case.dy[0][-1:].clone()
    twins = case._replace(
        x=[torch.cat([case.x[0][-1:]] * 2)],
        code=torch.cat([case.code[:, -1:]] * 2, 1),
        dy=[torch.cat([last, -last * 0.999])],
    )
    assert sum_condition(twins) > 1000


# ---- results ---------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CORNERS, ids=str)
def test_corner_shapes(shape, dtype):
    for shared in (True, False):
        errors = relative_errors(random_case(shape, dtype, seed=sum(shape)), "cpp", shared)
        assert largest(errors) <= TOLERANCE[dtype], errors


def bounded(B, T, D, A, K, N) -> Shape:
    """The shape, with adapter size and batch cut until double precision fits comfortably."""
    while max(B, 1) * D * A * N > 1 << 20:
        B, A, N = (B + 1) // 2, (A + 1) // 2, 1
    return Shape(B, T, D, min(A, max(1, (1 << 21) // (D * K))), K, N)


@needs_compiler
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    B=st.integers(0, 129), T=st.integers(1, 130), D=st.integers(8, 600), A=st.integers(1, 100),
    K=st.integers(1, 256), N=st.integers(1, 3), dtype=st.sampled_from(DTYPES), shared=st.booleans(),
)  # fmt: skip
def test_random_shapes(B, T, D, A, K, N, dtype, shared):
    shape = bounded(B, T, D, A, K, N)
    errors = relative_errors(random_case(shape, dtype, seed=B + T), "cpp", shared)
    assert largest(errors) <= TOLERANCE[dtype], (shape, errors)


@needs_compiler
@pytest.mark.slow
def test_many_random_shapes():
    """Inputs and shapes drawn anew at each run; the seed is in the message."""
    seed = random.SystemRandom().randrange(1 << 30)
    draw = random.Random(seed)
    for _ in range(60):
        B, T, K = draw.randint(0, 129), draw.randint(1, 130), draw.randint(1, 256)
        D, A = int(8 * 512 ** draw.random()), int(800 ** draw.random())
        while max(B, 1) * D * A > 1 << 22:
            B = (B + 1) // 2 if B > 1 else B
            A = max(1, A // 2)
        shape, dtype = Shape(B, T, D, A, K, draw.randint(1, 2)), draw.choice(DTYPES)
        shared = draw.random() < 0.5
        case = random_case(shape, dtype, seed=draw.randrange(1 << 30))
        errors = relative_errors(case, "cpp", shared)
        assert not misses(case, errors), (seed, shape, errors)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_worse_than_the_plain_path(dtype):
    """Against double precision with a ReLU mask of its own, where single flipped units count: errors up to
    1.2 times the plain path's, over a few draws (in float32, where hardly a unit flips, both are exact for
    all that matters)."""
    totals = {"cpp": {}, "torch": {}}
    for seed in range(4):
        case = random_case(Shape(B=24, T=4, D=192, A=32, K=48, N=2), dtype, seed=seed)
        wide = Case(*([t.double() for t in part] if isinstance(part, list) else part for part in case))
        wide = wide._replace(code=case.code.double(), heads=AdapterHeads(*(t.double() for t in case.heads)))
        expected = reference(wide, relu_masks(wide, compiled=False))
        for backend, total in totals.items():
            for name, tensor in outputs_and_gradients(case, backend).items():
                total[name] = total.get(name, 0.0) + relative_error(tensor, expected[name]) ** 2
    floor = 4 * (1e-6 if dtype == torch.float32 else 2e-3) ** 2
    assert all(totals["cpp"][n] <= max(1.44 * totals["torch"][n], floor) for n in totals["cpp"]), totals


VARIANT = """
import sys, torch
from hdscale.ops.backend import availability
from hdscale.ops.cases import TOLERANCE, random_case
from hdscale.ops.naive import Shape
from hdscale.ops.verify import relative_errors
assert availability("cpp").reason.startswith(sys.argv[1]), availability("cpp").reason
for dtype in (torch.float32, torch.bfloat16):
    errors = relative_errors(random_case(Shape(B=37, T=5, D=45, A=19, K=33, N=3), dtype), "cpp")
    assert max(errors.values()) <= TOLERANCE[dtype], errors
"""


@needs_compiler
@pytest.mark.parametrize("kernels", ["generic", "avx2"])
def test_kernels_of_older_processors(kernels):
    if kernels == "avx2" and availability("cpp").reason.split(",")[0] == "generic":
        pytest.skip("this processor has no AVX2")
    environment = os.environ | {"HDSCALE_CPU_KERNELS": kernels}
    result = subprocess.run([sys.executable, "-c", VARIANT, kernels], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@needs_compiler
def test_result_does_not_depend_on_a_repetition():
    case = random_case(Shape(B=20, T=4, D=128, A=16, K=32, N=2), torch.float32)
    first, second = (outputs_and_gradients(case, "cpp") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---- in PyTorch ------------------------------------------------------------------------------------------


class Stack:
    """A residual stack of generated adapters, to be run in different ways."""

    def __init__(self, dtype=torch.float32):
        case = random_case(Shape(B=6, T=4, D=48, A=8, K=16, N=3), dtype, seed=5)
        self.x = case.x[0].requires_grad_()
        self.code = case.code.requires_grad_()
        self.heads = AdapterHeads(*(tensor.requires_grad_() for tensor in case.heads))

    @property
    def leaves(self):
        return [self.x, self.code, *self.heads]

    def run(self, backend, shared=False, checkpointed=False):
        if shared:
            layers = share_heads(self.code, self.heads, self.x.shape[1], backend=backend)
        else:
            layers = [(code, self.heads) for code in self.code.unbind()]
        y = self.x
        for layer in layers:

            def block(y, layer=layer):
                return y + generated_adapter(y, *layer, backend=backend)

            y = torch.utils.checkpoint.checkpoint(block, y, use_reentrant=False) if checkpointed else block(y)
        return y.float().square().mean()

    def gradients(self, *args, **kwargs):
        return torch.autograd.grad(self.run(*args, **kwargs), self.leaves)


def assert_close(ours, expected, tolerance=1e-5):
    for mine, theirs in zip(ours, expected, strict=True):
        assert relative_error(mine, theirs.double()) <= tolerance


@needs_compiler
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_of_a_stack(shared, checkpointed):
    stack = Stack()
    assert_close(stack.gradients("cpp", shared, checkpointed), stack.gradients("torch"))


@needs_compiler
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_whole(shared, compiler):
    stack = Stack()
    compiled = torch.compile(lambda: stack.run("cpp", shared), fullgraph=True, backend=compiler)
    assert_close(torch.autograd.grad(compiled(), stack.leaves), stack.gradients("torch"))


@needs_compiler
def test_backward_twice_through_a_retained_graph():
    stack = Stack()
    loss = stack.run("cpp", shared=True)
    first = torch.autograd.grad(loss, stack.leaves, retain_graph=True)
    second = torch.autograd.grad(loss, stack.leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_compiler
def test_shared_heads_fire_each_gradient_hook_once():
    stack = Stack()
    fired = {name: 0 for name in AdapterHeads._fields}
    for name, tensor in stack.heads._asdict().items():

        def count(_, name=name):
            fired[name] += 1

        tensor.register_post_accumulate_grad_hook(count)
    stack.run("cpp", shared=True).backward()
    assert set(fired.values()) == {1}, fired


@needs_compiler
def test_a_shared_layer_used_twice_is_noticed():
    stack = Stack()
    layer = share_heads(stack.code, stack.heads, stack.x.shape[1], backend="cpp")[0]
    y = generated_adapter(generated_adapter(stack.x, *layer), *layer)
    with pytest.raises(RuntimeError, match="call share_heads once for each use"):
        y.sum().backward()


@needs_compiler
def test_layers_that_take_no_part_get_no_gradient():
    stack = Stack()
    layers = share_heads(stack.code, stack.heads, stack.x.shape[1], backend="cpp")
    dcode, dup = torch.autograd.grad(generated_adapter(stack.x, *layers[1]).sum(), [stack.code, stack.heads.up_weight])
    y = generated_adapter_reference(stack.x, stack.code[1], stack.heads).sum()
    expected = torch.autograd.grad(y, [stack.code, stack.heads.up_weight])
    assert_close((dcode, dup), expected)
    assert not dcode[0].any() and not dcode[2].any()


@needs_compiler
def test_shared_only_where_it_gains():
    stack = Stack()
    long = stack.x.shape[2]  # far more tokens than D * A / (D + A)
    assert isinstance(share_heads(stack.code, stack.heads, 4, backend="cpp")[0][1], SharedHeads)
    assert isinstance(share_heads(stack.code, stack.heads, long, backend="cpp")[0][1], AdapterHeads)
    assert isinstance(share_heads(stack.code, stack.heads, 4, backend="torch")[0][1], AdapterHeads)
    brain = AdapterHeads(*(tensor.bfloat16() for tensor in stack.heads))  # auto: T (48 + 8) <= 48 * 8, or half
    for length, heads, kind in (
        (6, stack.heads, SharedHeads),
        (7, stack.heads, AdapterHeads),
        (3, brain, SharedHeads),
        (4, brain, AdapterHeads),
    ):
        code = stack.code.to(heads.up_weight.dtype)
        assert isinstance(share_heads(code, heads, length, backend="auto")[0][1], kind), length
    with torch.no_grad():
        assert isinstance(share_heads(stack.code, stack.heads, 4, backend="cpp")[0][1], AdapterHeads)


@needs_compiler
def test_without_gradients():
    stack = Stack()
    with torch.no_grad():
        y = generated_adapter(stack.x, stack.code[0], stack.heads, backend="cpp")
    assert not y.requires_grad
    assert_close([y], [generated_adapter_reference(stack.x, stack.code[0], stack.heads)])


@needs_compiler
def test_keeps_a_tenth_of_the_memory_or_less():
    from hdscale.bench.op import bytes_kept

    case = random_case(Shape(B=16, T=4, D=512, A=32, K=32), torch.float32)
    x, heads = case.x[0].requires_grad_(), AdapterHeads(*(tensor.requires_grad_() for tensor in case.heads))
    kept = {
        backend: bytes_kept(lambda b=backend: generated_adapter(x, case.code[0], heads, backend=b), list(heads))
        for backend in ("cpp", "torch")
    }
    assert 10 * kept["cpp"] <= kept["torch"], kept


@needs_compiler
def test_input_that_is_not_contiguous():
    stack = Stack()
    x = stack.x.detach().transpose(0, 1).contiguous().transpose(0, 1)
    code = torch.stack([stack.code[0].detach()] * 2, dim=-1)[..., 0]
    heads = AdapterHeads(*(tensor.detach() for tensor in stack.heads))
    heads = heads._replace(up_weight=heads.up_weight.t().contiguous().t())
    assert not x.is_contiguous() and not code.is_contiguous() and not heads.up_weight.is_contiguous()
    expected = generated_adapter_reference(stack.x, stack.code[0], stack.heads)
    assert_close([generated_adapter(x, code, heads, backend="cpp")], [expected])


@needs_compiler
@pytest.mark.parametrize("shared", [False, True])
def test_under_autocast(shared):
    stack = Stack()
    with torch.autocast("cpu", torch.bfloat16):
        if shared:
            layer = share_heads(stack.code, stack.heads, stack.x.shape[1], backend="cpp")[0]
        else:
            layer = stack.code[0], stack.heads
        y = generated_adapter(stack.x, *layer, backend="cpp")
    assert y.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y.float().sum(), [stack.x, *stack.heads])
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    expected = generated_adapter_reference(stack.x, stack.code[0], stack.heads)
    assert_close([y], [expected], tolerance=2e-2)


@needs_compiler
def test_opcheck():
    stack = Stack()
    heads, code = stack.heads, stack.code
    biases = (torch.randn(6, 8, requires_grad=True), torch.randn(6, 48, requires_grad=True))
    ops = torch.ops.hdscale
    torch.library.opcheck(ops.generated_adapter.default, (stack.x, code[0], *heads[:4], *biases))
    torch.library.opcheck(ops.generated_adapter_by_products.default, (stack.x, code[0], *heads[:4], *biases))
    tokens = ops.generated_adapter_tokens(code, *heads[:4], 4, 8, True)
    some = [tensor.detach() for tensor in (code[0], *heads[:4])]
    torch.library.opcheck(ops.generated_adapter_shared.default, (stack.x, *some, *biases, tokens[:5]))
    plain = [tensor.detach() for tensor in heads[:4]]
    hidden = torch.rand(6, 4, 8)
    dy = torch.randn(6, 4, 48)
    torch.library.opcheck(ops.generated_adapter_backward.default, (dy, hidden, some[0], *plain))
    torch.library.opcheck(ops.generated_adapter_by_products_backward.default, (dy, hidden, some[0], *plain))
    factors = (
        [dy] * 3,
        [hidden] * 3,
        [hidden] * 3,
        [dy] * 3,
        code.detach(),
        heads.down_weight,
        heads.up_weight,
    )
    factors = tuple(f.detach() if torch.is_tensor(f) else f for f in factors)
    torch.library.opcheck(ops.generated_adapter_heads_backward.default, factors)
    torch.library.opcheck(ops.generated_adapter_by_products_heads_backward.default, factors)


def test_wrong_shapes_are_refused():
    stack = Stack()
    with pytest.raises(RuntimeError):
        generated_adapter(stack.x[..., :-1], stack.code[0], stack.heads)


# ---- choice of backend -----------------------------------------------------------------------------------


def test_unknown_backend():
    stack = Stack()
    with pytest.raises(UserError, match="did you mean 'cuda'"):
        generated_adapter(stack.x, stack.code[0], stack.heads, backend="cudaa")


def test_backend_of_another_device():
    stack = Stack()
    with pytest.raises(UserError, match="use method.backend=auto"):
        generated_adapter(stack.x, stack.code[0], stack.heads, backend="cuda")


@needs_compiler
def test_types_without_kernels_fall_back():
    assert resolve_backend("auto", torch.zeros(1)) == "cpp"
    assert resolve_backend("auto", torch.zeros(1, dtype=torch.float64)) == "torch"
    assert resolve_backend("cpp", torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)) == "torch"


def test_torch_operator_without_kernels():
    """The registered operators compute without any kernels too: here on float64, through their plain
    definition."""
    code = """
import torch
from hdscale.ops.cases import random_case
from hdscale.ops.naive import Shape
from hdscale.ops.verify import relative_errors
import hdscale.ops.generated as generated
generated.resolve_backend = lambda *_, **__: "operator"
for length in (3, 15):  # tile by tile where there are kernels, and by library products
    case = random_case(Shape(B=5, T=length, D=24, A=16, K=8, N=5), torch.float64)
    for shared in (True, False):
        errors = relative_errors(case, "operator", shared)
        assert max(errors.values()) < 1e-12, errors
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
