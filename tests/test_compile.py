"""torch.compile of a fused model gives native numbers and moves the same vectors."""

import pytest
import torch
from nets import FORMS, close, gradients, images, native, state

from bssn_kernels.group import fuse

BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", [True, False])
def test_compiled_training(form, training):
    net, expected = native(form).train(training), native(form).train(training)
    fuse(net)
    compiled = torch.compile(net, backend=BACKEND)
    for step in range(2):
        out, wanted = compiled(images(seed=step)), expected(images(seed=step))
        close(out, wanted)
        net.zero_grad(), expected.zero_grad()
        out.sum().backward(), wanted.sum().backward()
        close(gradients(net), gradients(expected))
        close(state(net), state(expected))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", [True, False])
def test_one_graph_once_a_forward_has_arranged_the_layers(form, training):
    net, expected = native(form).train(training), native(form).train(training)
    fuse(net)
    with torch.no_grad():
        net(images()), expected(images())
        compiled = torch.compile(net, backend=BACKEND, fullgraph=True)
        for step in range(2):
            close(compiled(images(seed=step)), expected(images(seed=step)))
    close(state(net), state(expected))
