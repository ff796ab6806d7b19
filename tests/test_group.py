"""normalize and what a SpectralGroup offers."""

import copy

import pytest
import torch
import torch.nn as nn
from nets import LAYERS, close, gradients, images, plain, same, state, twin, vectors
from torch.nn.utils.parametrizations import spectral_norm as torch_parametrization

from bssn_kernels.group import group_of, normalize
from bssn_kernels.parametrizations import spectral_norm
from bssn_kernels.spectral_group import SpectralGroup
from bssn_kernels.variants import Semantics, Variant, semantics_names, variants


def exact(weight: torch.Tensor, axis: int) -> torch.Tensor:
    return torch.linalg.matrix_norm(weight.detach().movedim(axis, 0).flatten(1), 2)


def settle(group: SpectralGroup, times: int = 300) -> None:
    for _ in range(times):
        group.update()


def test_sn_equals_torchs_applied_to_every_layer():
    """The same seed, draws, start, keys and numbers."""
    net, expected = plain(), plain()
    torch.manual_seed(1)
    normalize(net, "sn")
    torch.manual_seed(1)
    for name in LAYERS:
        torch_parametrization(expected[int(name)])
    close(state(net), state(expected), 1e-12)
    for _ in range(3):
        out, wanted = net(images()), expected(images())
        close(out, wanted)
        out.sum().backward(), wanted.sum().backward()
    close(gradients(net), gradients(expected))
    close(state(net), state(expected))


@pytest.mark.parametrize("variant", [*variants(), Variant(0.3, 0.7, 0.1, 2.0)])
def test_variants_at_convergence(variant):
    """W_bar against exact singular values."""
    net = plain()
    raw = {name: net[int(name)].weight.detach().clone() for name in LAYERS}
    group = normalize(net, variant, scale=0.7)
    settle(group)
    numbers = {
        **dict.fromkeys(("sn", "ssn"), (1, 0, 0, 1)),
        **dict.fromkeys(("bsn", "bssn"), (0.5, 0.5, 0, 1)),
        "capped": (1, 0, 0.7, 1),
    }
    out, into, floor, gain = numbers.get(variant, (0.3, 0.7, 0.1, 2.0))
    net.eval()
    for name in LAYERS:
        axis = 1 if name == "2" else 0
        sigmas = exact(raw[name], axis), exact(raw[name], 1 - axis) if raw[name].ndim > 2 else exact(raw[name], axis)
        mean = out * sigmas[0] + into * sigmas[1]
        wanted = 0.7 * gain * raw[name] / torch.clamp(mean, min=floor)
        close(net[int(name)].weight.detach(), wanted, 1e-6)
        found = group.sigmas()[name], group.sigmas(directions=True)[name]
        close(found[0], mean, 1e-6)
        close(found[1], torch.stack(sigmas)[: 2 if into and raw[name].ndim > 2 else 1], 1e-6)


@pytest.mark.parametrize("semantics", semantics_names())
@pytest.mark.parametrize("update", [None, "manual"])
def test_cadence(semantics, update):
    """When the vectors move, and that a group's layers see what each would see alone."""
    net, alone = plain(), plain()
    for model in (net, alone):
        torch.manual_seed(2)
        if model is net:
            group = normalize(net, "bssn", semantics=semantics, update=update)
        else:
            for name in LAYERS:
                spectral_norm(alone[int(name)], variant="bssn", semantics=semantics)
    assert same(state(net), state(alone))
    moves = semantics != "paper" and update is None
    for training in (True, False, True):
        before = vectors(net)
        net.train(training), alone.train(training and moves)
        if semantics == "paper":
            alone.train(training)
        close(net(images()), alone(images()))
        assert same(before, vectors(net)) != (moves and training)
    before = vectors(net)
    group.update()
    assert not same(before, vectors(net))
    close(state(net)["0.parametrizations.weight.original"], state(alone)["0.parametrizations.weight.original"])


def test_paper_moves_once_per_update_and_sees_one_iteration_further():
    net = plain()
    group = normalize(net, "sn", semantics="paper")
    weight, norm = net[0].parametrizations.weight.original.detach().flatten(1), net[0].parametrizations.weight[0]
    for _ in range(3):
        u = norm._u.clone()
        for _ in range(2):
            v = weight.T @ u
            v = v / (v.norm() + 1e-12)
            w = weight @ v
            net(images())
            close(group.sigmas()["0"], w.norm())
        group.update()
        close(norm._u, w / (w.norm() + 1e-12))


def test_sigmas_before_a_forward_move_nothing_and_report_the_last_one_afterwards():
    net = plain()
    group = normalize(net, "bssn")
    before = vectors(net)
    first = group.sigmas()
    assert list(first) == list(LAYERS) and all(s.ndim == 0 and not s.requires_grad for s in first.values())
    assert same(before, vectors(net))
    net.eval()(images())
    close(group.sigmas(), first)
    weight = net[0].parametrizations.weight.original
    with torch.no_grad():
        weight.mul_(2)
    close(group.sigmas(), first)
    net(images())
    close(group.sigmas()["0"], 2 * first["0"])
    group.update()
    assert not torch.equal(group.sigmas()["0"], 2 * first["0"])


@pytest.mark.parametrize("semantics", ["torch", "biggan", "paper"])
def test_layers_in_eval_within_a_training_root_rest(semantics):
    net = plain()
    group = normalize(net, "bssn", semantics=semantics)
    net[0].eval()
    before = vectors(net)
    net(images())

    def moved():  # of the last layer, a row, one step is exact: it may have arrived
        return {name.split(".")[0] for name, v in vectors(net).items() if not torch.equal(v, before[name])} - {"6"}

    assert moved() == (set() if semantics == "paper" else {"2", "4"})
    group.update()
    assert moved() == {"0", "2", "4"}


def test_gains_that_start_at_sigma():
    net = plain()
    raw = [net[int(name)].weight.detach().clone() for name in LAYERS]
    expected = net.eval()(images())
    group = normalize(net, "bssn", scale=1.3, learnable_gain="sigma")
    close(net(images()), expected)
    close([net[int(name)].weight.detach() for name in LAYERS], raw)
    gains = [net[int(name)].parametrizations.weight[0]._gain for name in LAYERS]
    close([g.detach()[0] * 1.3 for g in gains], list(group.sigmas().values()))
    assert {id(g) for g in gains} < {id(p) for p in net.parameters()}


def test_freeze():
    net = plain()
    group = normalize(net, "bssn")
    group.freeze()
    before, rested = vectors(net), net.eval()(images())
    close(net.train()(images()), rested)
    net[0](images())
    assert same(before, vectors(net)) and "frozen" in repr(group)
    group.update()
    assert not same(before, vectors(net))
    group.unfreeze()
    before = vectors(net)
    net(images())
    assert not same(before, vectors(net))


def test_reset_draws_anew():
    net, other = plain(), plain()
    torch.manual_seed(5)
    normalize(other.eval(), "bssn")
    group = normalize(net.eval(), "bssn")
    net.train()(images()), net.eval()
    buffers = list(net.buffers())
    torch.manual_seed(5)
    reported = group.sigmas()["0"]
    group.reset()
    assert not torch.equal(group.sigmas()["0"], reported)
    assert same(state(net), state(other)) and all(a is b for a, b in zip(buffers, net.buffers()))


@pytest.mark.parametrize("semantics", semantics_names())
@pytest.mark.parametrize("gain", [False, True])
def test_folding_gives_the_eval_model(semantics, gain):
    net = plain()
    group = normalize(net, "bssn", semantics=semantics, scale=1.1, learnable_gain=gain, output_dtype=torch.float32)
    group.update()
    parameters = [net[int(name)].parametrizations.weight.original for name in LAYERS]
    expected = twin(net).eval()
    wanted = [expected[int(name)].weight.double() for name in LAYERS]
    group.remove()
    for name, parameter, weight in zip(LAYERS, parameters, wanted):
        assert net[int(name)].weight is parameter and parameter.dtype == torch.float64
        close(parameter.detach(), weight.detach(), 1e-6)
    assert group_of(net) is None and type(net[0]) is nn.Conv2d
    for call in (group.sigmas, group.update, group.reset, group.remove, group.__enter__):
        with pytest.raises(RuntimeError, match="removed"):
            call()


def test_restore_is_for_fuse():
    net = plain()
    with pytest.raises(RuntimeError, match=r"restore\(\) undoes fuse\(\)"):
        normalize(net).restore()
    assert torch.isfinite(net(images())).all()


def test_shared_parameters_share_vectors_and_one_computation():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embedding = nn.Embedding(7, 4).double()
            self.inner = nn.Linear(4, 4).double()
            self.head = nn.Linear(4, 7, bias=False).double()
            self.head.weight = self.embedding.weight

        def forward(self, i):
            return self.head(self.inner(self.inner(self.embedding(i))))

    net = Tied()
    group = normalize(net, "bssn", learnable_gain=True)
    assert len(group.layers) == 2 and set(group.sigmas()) == {"embedding", "inner", "head"}
    assert net.head.parametrizations.weight[0] is net.embedding.parametrizations.weight[0]
    assert len(list(net.parameters())) == 5  # two weights, two gains, a bias
    index, weight = torch.arange(7), net.embedding.parametrizations.weight.original
    assert net.head.parametrizations.weight.original is weight
    wanted = twin(net)
    out = net(index)
    out.square().sum().backward()
    with group_of(wanted):  # the two uses by hand
        bar, inner = wanted.embedding.weight, wanted.inner
        by_hand = inner(inner(bar[index])) @ bar.T
    by_hand.square().sum().backward()
    close(out, by_hand)
    close(gradients(net), gradients(wanted))
    close(state(net), state(wanted))
    replica = copy.deepcopy(net)
    assert replica.head.parametrizations.weight[0] is replica.embedding.parametrizations.weight[0]
    close(replica(index), net(index))
    wanted = twin(net).eval()(index)
    group.remove()
    assert net.head.weight is net.embedding.weight
    close(net(index), wanted)


def test_a_shared_parameter_is_iterated_once_per_forward():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    net[1].weight = net[0].weight
    other = nn.Sequential(copy.deepcopy(net[0])).double()
    for model in (net, other):
        torch.manual_seed(0)
        normalize(model, "sn")
    x = torch.randn(2, 4).double()
    net(x), other(x)
    close(net[0].parametrizations.weight[0]._u, other[0].parametrizations.weight[0]._u)


def test_where_chooses():
    net = nn.Sequential(plain(), nn.LayerNorm([1]), nn.LayerNorm([2, 2]))
    asked = []
    group = normalize(net, where=lambda name, module: asked.append(name) or name in ("0.0", "0.6"))
    assert list(group.sigmas()) == ["0.0", "0.6"] and asked == ["0.0", "0.2", "0.4", "0.6", "2"]
    assert len(normalize(copy.deepcopy(net), "sn", where=lambda name, module: name == "0.2").layers) == 1
    assert list(normalize(net, "sn", where=lambda name, _: name == "2").sigmas()) == ["2"]


def test_two_groups_on_one_root():
    net, expected = plain(), plain()
    torch.manual_seed(0)
    first = normalize(net, "bssn", where=lambda name, module: isinstance(module, nn.Conv2d))
    second = normalize(net, "sn", where=lambda name, module: isinstance(module, nn.Linear))
    torch.manual_seed(0)
    for name, variant in [("0", "bssn"), ("4", "bssn"), ("6", "sn")]:
        spectral_norm(expected[int(name)], variant=variant)
    for _ in range(2):
        close(net(images()), expected(images()))
    close(state(net), state(expected))
    assert group_of(net) is second
    second.remove()
    assert group_of(net) is first and type(net[6]) is nn.Linear
    expected.eval(), net.eval()
    close(net(images()), expected(images()))


def test_every_kind_of_layer():
    torch.manual_seed(0)
    kinds = nn.ModuleDict({
        "conv1d": nn.Conv1d(3, 4, 2), "conv3d": nn.Conv3d(2, 3, 2), "grouped": nn.Conv2d(4, 4, 3, groups=4),
        "transposed1d": nn.ConvTranspose1d(3, 5, 2), "transposed3d": nn.ConvTranspose3d(2, 3, 2),
        "bilinear": nn.Bilinear(3, 4, 5), "embedding": nn.Embedding(5, 3), "bag": nn.EmbeddingBag(5, 3),
        "row": nn.Linear(6, 1), "column": nn.Linear(1, 6),
    })  # fmt: skip
    raw = {name: m.weight.detach().clone() for name, m in kinds.items()}
    axes = {name: int("transposed" in name) for name in raw}
    group = normalize(kinds, "sn")
    assert list(group.sigmas()) == list(raw)
    settle(group)
    for name, module in kinds.eval().items():
        assert exact(module.weight, axes[name]).item() == pytest.approx(1, abs=1e-3), name
        close(module.weight.detach(), raw[name] / exact(raw[name], axes[name]), 1e-3)


@pytest.mark.parametrize("form", ["embedding", "bag"])
def test_sparse_gradients(form):
    results = []
    for sparse in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential({"embedding": nn.Embedding, "bag": nn.EmbeddingBag}[form](6, 3, sparse=sparse)).double()
        normalize(net, "sn")
        net(torch.tensor([[1, 2, 2]])).square().sum().backward()
        results.append(net[0].parametrizations.weight.original.grad)
    close(results[0], results[1])


def test_output_dtype():
    net = plain(torch.float32)
    normalize(net, output_dtype="autocast")
    seen = []
    net[4].register_forward_pre_hook(lambda module, args: seen.append(module.weight.dtype))
    net(images(dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(images(dtype=torch.float32))
        net[4].weight  # noqa: B018
    out.float().sum().backward()
    assert seen == [torch.float32, torch.bfloat16]
    assert net[4].parametrizations.weight.original.grad.dtype == torch.float32


def test_repr_says_layers_parameters_backend_and_why():
    text = repr(normalize(plain(), "bssn", scale=1.2, update="manual", backend="reference"))
    assert "4 layers, 703 parameters" in text and "backend reference for 4 layers of torch.float64 on cpu" in text
    assert "gain=1.2" in text and "semantics torch" in text and "update manual" in text
    own = Semantics("uv", "max", "stored", "constant", "forward", "unit")
    assert "order='uv'" in repr(normalize(plain(), semantics=own))


def test_group_of():
    net = plain()
    assert group_of(net) is None
    group = normalize(net)
    assert group_of(net) is group and group_of(nn.Sequential(net)) is group and group_of(net[0]) is None
