"""Claims about the networks in other hands: exported, copied, wrapped, differentiated by other means than backward()."""

import copy
import io
import pickle
import re
from pathlib import Path

import pytest
import torch
from helpers import TINY, randomised, save_noise
from torch.autograd import forward_ad
from torch.func import functional_call

import fast
from fcmae import FCMAE
from model import ConvNeXt

SMALL = TINY | dict(depths=(1, 1, 1, 1), stem_stride=1)
IMAGES = torch.randn(4, 3, 16, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
MASK = torch.tensor([[True, True, False], [False, True, True]]).expand(4, 2, 3)


def network(name: str, mode: str = "train") -> torch.nn.Module:
    torch.manual_seed(0)
    if name in ("V1", "V2"):
        net = ConvNeXt(**SMALL, num_classes=5, version=int(name[1]))
    else:
        net = FCMAE(ConvNeXt(**SMALL, num_classes=0), decoder_embed_dim=16, backend=name)
    return randomised(net).double().train(mode == "train")


def scalar(net: torch.nn.Module, parameters: dict, imgs: torch.Tensor) -> torch.Tensor:
    if isinstance(net, FCMAE):
        return functional_call(net, parameters, (imgs, MASK[: len(imgs)]))[0]
    return functional_call(net, parameters, (imgs,)).square().sum()


@pytest.fixture
def plainly(monkeypatch):
    """Calls a function with the fast path switched off."""

    def call(function, *args):
        with monkeypatch.context() as patch:
            patch.setattr(fast, "ENABLED", False)
            return function(*args)

    return call


def penalty(net: torch.nn.Module, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """The parameters' gradients of a penalty on the gradient that reaches the images, asked for as `inputs`."""
    imgs, net = IMAGES.to(dtype, copy=True).requires_grad_(), net.to(dtype)
    parameters = dict(net.named_parameters())
    (gradient,) = torch.autograd.grad(scalar(net, parameters, imgs), imgs, create_graph=True)
    found = torch.autograd.grad(gradient.square().sum(), list(parameters.values()), allow_unused=True)
    return [g for g in found if g is not None]  # that of the last bias is none


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # the depthwise convolution has its own backward in the latter
@pytest.mark.parametrize("name", ["V1", "V2", "sparse", "masked"])
def test_a_gradient_of_a_gradient_is_that_of_the_plain_modules(name, dtype, plainly):
    net = network(name)
    oracle = plainly(penalty, network("masked" if name == "sparse" else name))
    fused = penalty(net, dtype)
    assert len(fused) == len(oracle)
    for a, b in zip(fused, oracle):
        assert (a - b).norm() <= (1e-10 if dtype == torch.float64 else 1e-3) * b.norm()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", ["V1", "V2", "sparse", "masked"])
def test_torch_func_and_forward_mode_give_the_plain_modules_derivatives(name, mode, plainly):
    net = network(name, mode)
    parameters = {key: p.detach() for key, p in net.named_parameters()}
    tangents = {key: torch.randn_like(p) for key, p in parameters.items()}

    def backward():
        leaves = {key: p.clone().requires_grad_() for key, p in parameters.items()}
        oracle = network("masked", mode) if name == "sparse" else net
        return torch.autograd.grad(scalar(oracle, leaves, IMAGES), list(leaves.values()))

    def forward_mode():
        with forward_ad.dual_level():
            duals = {key: forward_ad.make_dual(p, tangents[key]) for key, p in parameters.items()}
            return forward_ad.unpack_dual(scalar(net, duals, IMAGES)).tangent

    expected = plainly(backward)
    slope = sum((g * t).sum() for g, t in zip(expected, tangents.values()))
    found = torch.func.grad(lambda p: scalar(net, p, IMAGES))(parameters)
    torch.testing.assert_close(tuple(found.values()), expected)
    torch.testing.assert_close(torch.func.jvp(lambda p: scalar(net, p, IMAGES), (parameters,), (tangents,))[1], slope)
    torch.testing.assert_close(forward_mode(), slope)


def test_vmap_gives_each_images_gradient():
    net = network("V2")
    parameters = {key: p.detach() for key, p in net.named_parameters()}
    each = torch.func.vmap(torch.func.grad(lambda p, image: scalar(net, p, image[None])), (None, 0))(parameters, IMAGES)
    for i, image in enumerate(IMAGES):
        net.zero_grad()
        net(image[None]).square().sum().backward()
        for key, p in net.named_parameters():
            torch.testing.assert_close(each[key][i], p.grad)


def saved_and_loaded(net: torch.nn.Module) -> torch.nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WRAPPERS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "torch.save": saved_and_loaded,
    "DataParallel": lambda net: torch.nn.DataParallel(copy.deepcopy(net)),
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
}


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("name", ["V1", "V2", "sparse"])
def test_copies_and_wrappers_train_the_same(name, wrap):
    gradients = []
    for net in (network(name), WRAPPERS[wrap](network(name))):
        y = net(IMAGES, MASK)[0] if name == "sparse" else net(IMAGES).square().sum()
        y.backward()
        gradients.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_an_exchanged_linear_layer_is_what_computes(mode):
    """Parametrised, and quantised: the weights that the layer itself makes are used."""
    net = network("V2", mode)
    layer = net.stages[3][0].pwconv2
    torch.nn.utils.parametrizations.weight_norm(layer)
    before = net(IMAGES)
    torch.testing.assert_close(before, network("V2", mode)(IMAGES))
    layer.parametrizations.weight.original0.data *= 2  # the norms of the rows
    twice = network("V2", mode)
    twice.stages[3][0].pwconv2.weight.data *= 2
    torch.testing.assert_close(net(IMAGES), twice(IMAGES))

    plain = network("V2", mode).float()
    quantised = torch.ao.quantization.quantize_dynamic(plain, {torch.nn.Linear}, dtype=torch.qint8).train(mode == "train")
    assert not any(type(module) is torch.nn.Linear for module in quantised.modules())
    error = (quantised(IMAGES.float()) - plain(IMAGES.float())).norm() / plain(IMAGES.float()).norm()
    assert 0 < error < 0.1  # eight bits


def outputs(net: torch.nn.Module, stages: bool, imgs: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        return net.forward_stages(imgs) if stages else [net(imgs)]


BATCH = ({0: torch.export.Dim("batch")},)


@pytest.mark.parametrize("stages", [False, True], ids=["classifier", "stages"])
@pytest.mark.parametrize("version", [1, 2])
def test_an_exported_network_computes_the_same_for_another_number_of_images(version, stages):
    net, imgs = network(f"V{version}", "eval").float(), IMAGES.float()
    expected = outputs(net, stages, imgs)
    if stages:
        net.forward = net.forward_stages
    found = torch.export.export(net, (imgs[:2],), dynamic_shapes=BATCH).module()(imgs)
    torch.testing.assert_close(list(found) if stages else [found], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stages", [False, True], ids=["classifier", "stages"])
@pytest.mark.parametrize("version", [1, 2])
def test_onnx_runtime_computes_the_same_for_another_number_of_images(version, stages):
    onnxruntime, _ = pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    net, imgs = network(f"V{version}", "eval").float(), IMAGES.float()
    expected = outputs(net, stages, imgs)
    if stages:
        net.forward = net.forward_stages
    program = torch.onnx.export(net, (imgs[:2],), dynamo=True, dynamic_shapes=BATCH, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: imgs.numpy()})
    torch.testing.assert_close([torch.from_numpy(y) for y in found], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_examples_of_the_page_on_weights_run(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    for file, classes in (("runs/finetune/checkpoint-best.pth", 5), ("runs/pretrain/encoder.pth", 0)):
        (tmp_path / file).parent.mkdir(parents=True)
        torch.save({"model": ConvNeXt(**TINY | dict(depths=(1, 1, 1, 1)), num_classes=classes).state_dict()}, tmp_path / file)
    save_noise(tmp_path / "cat.jpg", (90, 60))
    monkeypatch.chdir(tmp_path)
    names = dict(images=torch.randn(2, 3, 64, 64))
    page = Path(__file__).parents[1] / "docs/weights.md"
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        exec(block, names)
    assert names["logits"].shape == (1, 5) and [len(x) for x in names["maps"]] == [2] * 4
    assert all((tmp_path / file).exists() for file in ("classifier.pt2", "classifier.onnx", "stages.onnx"))
