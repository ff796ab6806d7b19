"""The backends for GPUs on a GPU: launches, synchronization, graphs, streams, repeated runs, very large layers."""

import os

import pytest
import torch
import torch.nn as nn
from drafts import Layer, assert_same_bits, draft_of, run
from nets import close, gradients, native, plain, state, twin

import bssn_kernels as bk
from bssn_kernels import backends, functional
from bssn_kernels.backends.cuda import modelling
from bssn_kernels.backends.triton import interpreting
from bssn_kernels.plan import LayerSpec
from bssn_kernels.variants import resolve_variant, semantics_names

HERE = torch.cuda.is_available() and not interpreting() and not modelling()
if not HERE and os.environ.get("BSSN_STRICT") != "1":
    pytest.skip("no CUDA device, or TRITON_INTERPRET or BSSN_CUDA_MODEL is set", allow_module_level=True)

SHAPES = [(64, 32, 3, 3), (128, 64, 3, 3), (300, 600), (1, 128), (96, 3, 3, 3), (10, 7), (256, 256, 3, 3)]


@pytest.fixture(autouse=True)
def on_a_device(monkeypatch):
    assert HERE, "BSSN_STRICT=1 expects a CUDA device without TRITON_INTERPRET and BSSN_CUDA_MODEL"
    # Filling fresh memory with NaN, as other tests have it, is a kernel for each tensor.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


@pytest.fixture(params=["cuda", "triton"])
def name(request) -> str:
    """Of a backend."""
    reasons = "; ".join(backends.get(request.param).unsupported())
    if reasons:
        (pytest.fail if os.environ.get("BSSN_STRICT") == "1" else pytest.skip)(reasons)
    return request.param


class Group:
    """A group on the GPU and what a call needs."""

    def __init__(self, name: str, variant="bssn", semantics="torch", dtype=torch.float32, shapes=SHAPES) -> None:
        torch.manual_seed(0)
        self.weights = [torch.randn(shape, device="cuda").mul(0.02).to(dtype).requires_grad_() for shape in shapes]
        rule = {"variant": resolve_variant(variant), "semantics": semantics}
        specs = [LayerSpec.of(w, name=str(i), **rule) for i, w in enumerate(self.weights)]
        self.plan = functional.make_plan(specs, name)
        self.vectors = [torch.randn(n, device="cuda") for n in self.plan.sizes]
        self.grads = [torch.randn_like(w) for w in self.weights]

    def forward(self) -> functional.Normalized:
        return functional.spectral_normalize(self.weights, self.vectors, self.plan)

    def both(self) -> list[torch.Tensor]:
        outs = self.forward().weights
        return [*outs, *torch.autograd.grad(outs, self.weights, self.grads)]


def device_work(call) -> list[str]:
    """Names of everything that a call puts on the device: kernels, copies, fills."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    return [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.parametrize("semantics", semantics_names())
def test_one_launch_forward_and_one_backward(name, semantics):
    group = Group(name, semantics=semantics)
    with torch.no_grad():
        (forward,) = device_work(group.forward)
        assert "forward_kernel" in forward
    outs = group.forward().weights

    def backward() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(outs, group.weights, group.grads, retain_graph=True)

    (found,) = device_work(backward)
    assert "backward_kernel" in found


@pytest.mark.parametrize("variant", ["sn", "bssn"])
def test_a_fused_forward_stores_its_vectors_in_one_launch_more(name, variant):
    net, plain_net = plain(torch.float32).cuda(), plain(torch.float32).cuda()
    bk.normalize(net, variant, backend=name)
    x = torch.randn(2, 3, 6, 6, device="cuda")
    names = device_work(lambda: net(x))
    for kernel in ("forward_kernel", "store_kernel"):
        assert sum(kernel in name for name in names) == 1, names
    assert len(names) <= len(device_work(lambda: plain_net(x))) + 2


def test_no_synchronization(name):
    group = Group(name)
    group.both()
    torch.cuda.set_sync_debug_mode("error")
    try:
        group.both()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_ten_thousand_forwards_give_the_same_bits(name):
    group = Group(name)
    with torch.no_grad():
        first = group.forward()
        wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(10_000):
            result = group.forward()
            wrong += sum((a != b).any() for a, b in zip(result.weights, first.weights))
            wrong += (result.saved != first.saved).any()
    assert wrong.item() == 0


def test_beside_another_kernel_and_on_two_streams(name):
    """A kernel that holds many SMs for long, and two streams that call at once: no hang, the same bits."""
    group = Group(name)
    with torch.no_grad():
        first = group.forward()
        a = torch.randn(8192, 8192, device="cuda")
        streams = [torch.cuda.Stream() for _ in range(3)]
        torch.cuda.synchronize()
        found = []
        with torch.cuda.stream(streams[0]):
            for _ in range(30):
                a @ a
        for _ in range(200):
            for stream in streams[1:]:
                with torch.cuda.stream(stream):
                    found.append(group.forward().saved)
        torch.cuda.synchronize()
    assert all(torch.equal(x, first.saved) for x in found)


@pytest.mark.parametrize("semantics", ["torch", "miyato"])
def test_a_graph_of_a_fused_forward_moves_the_vectors(name, semantics):
    """Each replay iterates and stores, as an eager forward does; the capture itself does neither."""
    nets = [plain(torch.float32).cuda() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    groups = [bk.normalize(net, "bssn", semantics=semantics, backend=name) for net in nets]
    nets[1].load_state_dict(nets[0].state_dict())
    x = torch.randn(2, 3, 6, 6, device="cuda")
    with torch.no_grad():
        for _ in range(5):
            nets[1](x)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                nets[0](x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            nets[0](x)
        for _ in range(3):
            graph.replay()
    assert all(name in repr(group) for group in groups)
    for (key, found), (_, expected) in zip(nets[0].named_buffers(), nets[1].named_buffers(), strict=True):
        assert torch.equal(found, expected), key


@pytest.mark.parametrize("graphs", [1, 2, 4])
def test_graphs_replayed_beside_eager_calls(name, graphs):
    """Each graph has counters of its own: two are at hand, more are made."""
    group = Group(name)
    expected = [x.detach().clone() for x in group.both()]  # no graph: its leaves would belong to this stream
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        group.both()
    captured = []
    for _ in range(graphs):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = group.both()
        captured.append((graph, results))
    for _ in range(100):
        for graph, _ in captured:
            graph.replay()
        with torch.cuda.stream(side):
            found = group.both()
    torch.cuda.synchronize()
    for results in (found, *(results for _, results in captured)):
        assert all(map(torch.equal, results, expected))


def test_a_graph_outlives_its_plan(name):
    """Its tables and counters are not given to others."""
    group = Group(name)
    expected = [x.detach().clone() for x in group.both()]  # no graph: its leaves would belong to this stream
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = group.both()
    del group.plan
    others = [Group(name, semantics=semantics).both() for semantics in semantics_names()]
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, results, expected)) and others


def test_a_capture_without_a_warm_up_is_refused(name):
    group = Group(name)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="never run before the capture"), torch.cuda.graph(graph):
        group.forward()
    torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_large_layers_equal_themselves_alone(name, dtype):
    """Layers of many tiles in every scheme of columns, in a group and alone."""
    shapes = [(512, 512, 3, 3), (256, 512, 3, 3), (1024, 1024), (128, 64, 4, 4), (64, 3, 7, 7)]
    shapes += [(100_003, 3), (3, 90_001)]
    drafts = [
        draft_of(shape, i, iterations=1 + i % 3, semantics=semantics_names()[i % 5]) for i, shape in enumerate(shapes)
    ]
    drafts[1]["layout"], drafts[3]["axis"] = "channels_last", 1
    together = run([Layer(draft, dtype, "cuda") for draft in drafts], name)
    for i, draft in enumerate(drafts):
        assert_same_bits(run([Layer(draft, dtype, "cuda")], name), [together[i]])


def test_a_layer_of_more_than_two_billion_numbers(name):
    """8 GB of bf16 weights and results, against products by torch."""
    P, L = 65_537, 32_768
    weight = torch.empty(P, L, dtype=torch.bfloat16, device="cuda").normal_(std=0.01)
    plan = functional.plan_for([weight], backend=name)
    u, v = torch.randn(P, device="cuda"), torch.randn(L, device="cuda")
    with torch.no_grad():
        result = functional.spectral_normalize([weight], [u, v], plan)
        new_u, new_v = result.vectors
        s = torch.stack([row.float() @ v for row in weight[-3:]])
        torch.testing.assert_close(new_u[-3:] / new_u[-1], s / s[-1], rtol=1e-4, atol=0)
        expected = sum(weight[i : i + 4096].float().T @ new_u[i : i + 4096] for i in range(0, P, 4096))
        torch.testing.assert_close(expected.norm(), result.sigmas[0], rtol=1e-4, atol=0)
        ratio = result.weights[0][-1].float() / weight[-1].float()
        torch.testing.assert_close(ratio, torch.full_like(ratio, 1 / result.sigmas[0].item()), rtol=1e-2, atol=0)


def test_memory_beyond_the_results(name):
    """At most 2 % of the weights, or 8 MB."""
    group = Group(name, shapes=[(1024, 1024, 3, 3), (1024, 512, 3, 3)] * 2)
    nbytes = sum(w.nbytes for w in group.weights)
    group.both()
    torch.cuda.synchronize()
    with torch.no_grad():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = group.forward()
        extra = torch.cuda.max_memory_allocated() - before - nbytes
    assert extra <= max(0.02 * nbytes, 8e6) and result.saved.is_cuda


@pytest.mark.parametrize("form", ["parametrization", "hook"])
def test_training_equals_native(name, form):
    """20 steps in float64 against torch's own, on the device."""
    theirs = native(form).cuda()
    ours = twin(theirs) if form == "parametrization" else native(form).cuda()
    group = bk.fuse(ours, backend=name)
    assert name in repr(group)
    for step in range(20):
        generator = torch.Generator("cuda").manual_seed(step)
        x = torch.randn(4, 3, 6, 6, dtype=torch.float64, device="cuda", generator=generator)
        for net in (theirs, ours):
            net.zero_grad()
            net(x).square().mean().backward()
            with torch.no_grad():
                for p in net.parameters():
                    p -= 0.01 * p.grad
        close(gradients(ours), gradients(theirs), rtol=1e-8)
    close(state(ours), state(theirs), rtol=1e-9)


def test_channels_last_and_autocast(name):
    net = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ConvTranspose2d(32, 8, 4)).cuda().to(memory_format=torch.channels_last)
    bk.normalize(net, "bssn", output_dtype="autocast", backend=name)
    x = torch.randn(2, 16, 8, 8, device="cuda").to(memory_format=torch.channels_last)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        net(x).float().sum().backward()
    for layer in net:
        weight = layer.parametrizations.weight.original
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert weight.grad.stride() == weight.stride() and weight.grad.isfinite().all()
