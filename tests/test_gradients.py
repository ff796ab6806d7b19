"""First and second derivatives by finite differences, on every backend and on the composed path; batched ones."""

import pytest
import torch
import truth
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from zoo import interpreted, lay_out

from bssn_kernels import functional
from bssn_kernels.plan import LayerSpec
from bssn_kernels.variants import Variant, resolve_variant, semantics_names

# name -> shape, row axis, memory format
KINDS = {
    "linear": ((3, 4), 0, "contiguous"),
    "linear_exchanged": ((4, 3), 0, "exchanged"),
    "conv1d": ((3, 2, 2), 0, "contiguous"),
    "conv2d": ((2, 3, 2, 2), 0, "channels_last"),
    "conv3d": ((2, 2, 1, 2, 2), 0, "channels_last"),
    "depthwise": ((3, 1, 2, 2), 0, "contiguous"),
    "transposed2d": ((2, 3, 2, 1), 1, "contiguous"),
    "one_row": ((1, 5), 0, "contiguous"),
    "vector": ((4,), 0, "contiguous"),
}
VARIANTS = {
    "sn": Variant(),
    "bssn": resolve_variant("bssn", 1.2),
    "custom": Variant(0.3, 0.9, 0.05, 0.7),
    "capped_below": resolve_variant("capped", 50.0),
}


@pytest.fixture(autouse=True)
def few_in_the_interpreter(request):
    """Finite differences call a forward hundreds of times; test_zoo.py compares all gradients with float64."""
    chosen = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if interpreted(chosen.get("backend", "")):
        usual = chosen.get("kind") == "linear" and chosen.get("semantics") in (None, "torch", "paper")
        if not usual or "convergence" in request.node.name:
            pytest.skip("Triton's interpreter would take minutes: linear layers under torch and paper are checked")


def variants_for(kind: str) -> list[str]:
    """All of them for one kind of each number of axes that the formulas know."""
    return list(VARIANTS) if kind in ("linear", "conv1d", "vector") else ["bssn"]


class Problem:
    """W_bar of one layer as a function of its weight and gain."""

    def __init__(
        self,
        kind: str,
        backend: str,
        variant: str = "bssn",
        semantics: str = "torch",
        iterations: int = 0,
        dtype: torch.dtype = torch.float64,
        gap: bool = False,
    ) -> None:
        shape, axis, layout = KINDS[kind]
        weight = torch.randn(shape, dtype=dtype)
        weight = lay_out(1 + 0.2 * weight if gap else weight, layout)  # nearly of rank one: converges in a few steps
        rule = {"axis": axis, "variant": VARIANTS[variant], "semantics": semantics, "gain": True}
        spec = LayerSpec.of(weight, name=kind, **rule)
        self.plan, self.iterations = functional.make_plan([spec], backend), iterations
        self.vectors = [torch.randn(n, dtype=dtype) for (n,) in spec.vector_shapes]
        if iterations == 0:  # so that no sigma is near zero
            warm = functional.make_plan([spec], "reference")
            self.vectors = functional.spectral_normalize(
                [weight], self.vectors, warm, 2, gains=[torch.ones(1, dtype=dtype)]
            ).vectors
        gain = torch.full((1,), 0.8, dtype=dtype)
        self.inputs = weight.requires_grad_(), gain.requires_grad_()

    def __call__(self, weight: Tensor, gain: Tensor) -> Tensor:
        result = functional.spectral_normalize([weight], self.vectors, self.plan, self.iterations, gains=[gain])
        return result.weights[0]


@pytest.mark.parametrize("semantics", semantics_names())
@pytest.mark.parametrize("kind", KINDS)
def test_stored_vectors(backend, kind, semantics):
    """With no iteration u and v are constants under every semantics, whatever their gradient rule."""
    for variant in variants_for(kind):
        problem = Problem(kind, backend, variant, semantics)
        assert gradcheck(problem, problem.inputs, check_batched_grad=True)
        assert gradgradcheck(problem, problem.inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_through_the_iteration(backend, kind):
    """The gradient of `paper` is that of one iteration from constant vectors, however far from converged."""
    for variant in variants_for(kind):
        problem = Problem(kind, backend, variant, "paper", iterations=1)
        assert gradcheck(problem, problem.inputs, check_batched_grad=True)
        assert gradgradcheck(problem, problem.inputs)


@pytest.mark.parametrize("semantics", ["torch", "torch_hook", "miyato", "biggan"])
@pytest.mark.parametrize("kind", KINDS)
def test_constant_vectors_at_convergence(backend, kind, semantics):
    """Where u and v are the singular vectors, taking them as constants is exact to first order."""
    problem = Problem(kind, backend, "sn", semantics, iterations=50, gap=True)
    assert gradcheck(problem, problem.inputs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("semantics", semantics_names())
@pytest.mark.parametrize("kind", ["conv2d", "transposed2d", "linear", "vector"])
def test_double_backward_through_moving_vectors(backend, kind, semantics, iterations):
    """A gradient penalty, against autograd twice through the few lines of truth.py."""
    problem = Problem(kind, backend, "bssn", semantics, iterations)
    weight, gain = problem.inputs
    spec = problem.plan.specs[0]
    rule = {"variant": spec.variant, "semantics": semantics, "axis": spec.axis, "iterations": iterations}
    expected = truth.normalize(weight, problem.vectors, gain=gain, **rule).weight
    grad = torch.randn_like(expected)
    seconds = []
    for out in (problem(weight, gain), expected):
        first = torch.autograd.grad(out, (weight, gain), grad, create_graph=True)
        penalty = first[0].square().sum() + first[1].pow(3).sum()
        seconds.append([*first, *torch.autograd.grad(penalty, (weight, gain))])
    for found, true in zip(*seconds):
        assert truth.relative(found, true) < 1e-10


@pytest.mark.parametrize("semantics", ["torch", "torch_hook"])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "transposed2d"])
def test_complex_weights(kind, semantics):
    """They take the composed path, whose group names the reference."""
    for variant in ("sn", "bssn"):
        problem = Problem(kind, "reference", variant, semantics, dtype=torch.complex128)
        assert gradcheck(problem, problem.inputs)
        assert gradgradcheck(problem, problem.inputs)


@pytest.mark.parametrize("kind", ["linear", "conv2d", "vector"])
def test_legacy_batched_gradients(backend, kind):
    problem = Problem(kind, backend, semantics="torch", iterations=1)
    out = problem(*problem.inputs)
    grads = torch.randn(5, *out.shape, dtype=out.dtype)
    batched = torch.autograd.grad(out, problem.inputs, grads, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(grads):
        single = torch.autograd.grad(out, problem.inputs, grad, retain_graph=True)
        assert all(truth.relative(b[i], s) < 1e-12 for b, s in zip(batched, single))


@pytest.mark.parametrize("semantics", ["torch", "paper"])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "transposed2d"])
def test_functorch(backend, kind, semantics):
    """grad, jacrev and vmap over the function, and vmap of grad; against plain calls."""
    problem = Problem(kind, backend, semantics=semantics, iterations=1)
    weight, gain = (x.detach() for x in problem.inputs)
    probe = torch.randn_like(weight)

    def loss(w: Tensor) -> Tensor:
        return (problem(w, gain) * probe).sum()

    def plain_grad(w: Tensor) -> Tensor:
        w = w.clone().requires_grad_()
        return torch.autograd.grad(loss(w), w)[0]

    assert truth.relative(torch.func.grad(loss)(weight), plain_grad(weight)) < 1e-12
    jacobian = torch.func.jacrev(lambda w: problem(w, gain))(weight)
    assert truth.relative(torch.tensordot(probe, jacobian, probe.ndim), plain_grad(weight)) < 1e-12
    stack = torch.stack([weight, 2 * weight, weight.flip(0)])
    outs = torch.vmap(lambda w: problem(w, gain))(stack)
    grads = torch.vmap(torch.func.grad(loss))(stack)
    for w, out, grad in zip(stack, outs, grads):
        w = lay_out(w, KINDS[kind][2])
        assert truth.relative(out, problem(w, gain)) < 1e-12 and truth.relative(grad, plain_grad(w)) < 1e-12


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_forward_over_reverse(backend, kind):
    """torch.func.hessian against two reverse passes."""
    problem = Problem(kind, backend, semantics="paper", iterations=1)
    weight, gain = (x.detach() for x in problem.inputs)
    probe = torch.randn_like(weight)

    def loss(w: Tensor) -> Tensor:
        return (problem(w, gain) * probe).sum()

    expected = torch.autograd.functional.hessian(loss, weight)
    assert truth.relative(torch.func.hessian(loss)(weight), expected) < 1e-10
