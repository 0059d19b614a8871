"""Claims about model.py: the dense network. test_weights.py compares its logits with timm's and transformers'."""

import pytest
import torch
from helpers import TINY, randomised

from model import GRN, Block, ConvNeXt


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def random_loss(tensors: list[torch.Tensor]) -> torch.Tensor:
    """A sum with other weights for every element, so that no gradient is zero or lost in a sum."""
    generator = torch.Generator().manual_seed(3)
    return sum((t * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)).sum() for t in tensors)


def outputs_and_gradients(run, net, imgs, autocast=None) -> list[torch.Tensor]:
    imgs = imgs.clone().requires_grad_()
    with torch.autocast(imgs.device.type, autocast, enabled=autocast is not None):
        outputs = run(net, imgs)
    return [*outputs, *torch.autograd.grad(random_loss(outputs), [imgs, *net.parameters()])]


def test_state_dict_keys_are_the_authors():
    v2, v1 = (ConvNeXt(**TINY, version=version).state_dict() for version in (2, 1))
    assert v2["stages.2.1.grn.gamma"].shape == (1, 1, 1, 128) and v1["stages.2.1.gamma"].shape == (32,)
    blocks = [f"stages.{i}.{j}" for i, depth in enumerate(TINY["depths"]) for j in range(depth)]
    layers = [f"{block}.{part}" for block in blocks for part in ("dwconv", "norm", "pwconv1", "pwconv2")]
    layers += [f"downsample_layers.{i}.{k}" for i in range(4) for k in (0, 1)] + ["norm", "head"]
    keys = {f"{layer}.{parameter}" for layer in layers for parameter in ("weight", "bias")}
    assert set(v2) == keys | {f"{block}.grn.{parameter}" for block in blocks for parameter in ("gamma", "beta")}
    assert set(v1) == keys | {f"{block}.gamma" for block in blocks}


def test_initial_values():
    net = ConvNeXt(**TINY, version=1, drop_path_rate=0.4, head_init_scale=0.5)
    assert net.stages[2][1].gamma.unique().tolist() == [pytest.approx(1e-6)]
    assert ConvNeXt(**TINY, version=1, layer_scale_init_value=0.5).stages[2][1].gamma.unique().tolist() == [0.5]
    for layer, std in ((net.stages[3][0].pwconv1, 0.02), (net.downsample_layers[3][1], 0.02), (net.head, 0.01)):
        assert layer.weight.std().item() == pytest.approx(std, rel=0.1) and not layer.bias.any()
    assert [block.drop_path.p for stage in net.stages for block in stage] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_grn_is_algorithm_1_of_the_paper_and_starts_as_the_identity():
    x, grn = torch.randn(3, 5, 4, 6, dtype=torch.float64), GRN(6).double()
    assert torch.equal(grn(x), x)
    randomised(grn)
    for image, y in zip(x, grn(x)):  # (H, W, C)
        norms = torch.stack([channel.norm() for channel in image.unbind(-1)])
        expected = grn.gamma[0, 0] * image * norms / (norms.mean() + 1e-6) + grn.beta[0, 0] + image
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_grn_does_not_overflow_in_half_precision():
    x = torch.full((1, 8, 8, 4), 20_000.0)  # the norm is 160,000, beyond float16's 65504
    grn = randomised(GRN(4))
    with torch.autocast("cpu", torch.float16):
        y = grn(x.half())
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), grn(x), rtol=2e-3, atol=0)


def test_stochastic_depth_drops_an_images_whole_branch_and_scales_the_others():
    block = randomised(Block(8, drop_path=0.5)).double()
    x = torch.randn(64, 8, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        ratio = (block.train()(x) - x).flatten(1).norm(dim=1) / (block.eval()(x) - x).flatten(1).norm(dim=1)
    assert 16 < (ratio == 0).sum() < 48 and (ratio[ratio > 0] - 2).abs().max() < 1e-9


@pytest.mark.parametrize("stem_stride", [4, 2, 1])
def test_stages_halve_the_resolution_and_without_classes_there_is_neither_norm_nor_head(stem_stride):
    net = ConvNeXt(**TINY, stem_stride=stem_stride, in_chans=2, num_classes=5)
    h, w = 16 * stem_stride, 24 * stem_stride
    imgs = torch.randn(2, 2, h, w)
    shapes = [tuple(stage.shape) for stage in net.forward_stages(imgs)]
    assert shapes == [(2, TINY["dims"][i], h // stem_stride >> i, w // stem_stride >> i) for i in range(4)]
    assert net.forward_features(imgs).shape == (2, 64) and net(imgs).shape == (2, 5)
    encoder = ConvNeXt(**TINY, stem_stride=stem_stride, in_chans=2, num_classes=0)
    assert not [key for key in encoder.state_dict() if key.startswith(("norm", "head"))]
    torch.testing.assert_close(encoder(imgs), encoder.forward_stages(imgs)[-1].mean(dim=(2, 3)))
