"""A whole model's loss and gradients with the compiled operator equal those of the plain path."""

import pytest
import torch

from hdscale.bases.settings import ModelSettings
from hdscale.modeling import HyperdecoderConfig, build_model
from hdscale.modeling.settings import HypernetSettings, MethodSettings, SideSettings
from hdscale.ops.backend import availability

pytestmark = pytest.mark.skipif(
    not availability("cpp").usable, reason=f"no C++ kernels here: {availability('cpp').reason}"
)


def loss_and_gradients(backend: str, checkpointing: str, encoder: str):
    method = MethodSettings(
        "hyperdecoder",
        SideSettings(encoder, 8),
        SideSettings("generated", 8),
        HypernetSettings(16),
        backend=backend,
    )
    model_settings = ModelSettings("tiny-1", activation_checkpointing=checkpointing)
    model = build_model(HyperdecoderConfig(model_settings, method, ["a"]), seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # away from the initialisation, at which the adapters hardly do anything
        for parameter in model.method.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    source = torch.randint(3, 90, (5, 11), generator=generator)
    mask = torch.ones_like(source)
    mask[1, 7:] = 0
    labels = torch.randint(3, 90, (5, 4), generator=generator)
    labels[2, 2:] = -100
    loss = model(source, mask, labels, torch.zeros(5, dtype=torch.long)).loss_sum
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.method.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("encoder", ["manual", "generated"])
@pytest.mark.parametrize("checkpointing", ["none", "all"])
def test_same_loss_and_gradients(checkpointing, encoder):
    loss, gradients = loss_and_gradients("cpp", checkpointing, encoder)
    plain_loss, plain_gradients = loss_and_gradients("torch", checkpointing, encoder)
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    assert gradients.keys() == plain_gradients.keys() and gradients
    for name, gradient in gradients.items():
        difference = (gradient - plain_gradients[name]).norm() / plain_gradients[name].norm()
        assert difference <= 1e-4, (name, difference)
