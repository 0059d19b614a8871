"""Claims about weights.py: layouts, loading, files, the command; and about networks in the hands of other tools."""

import argparse
import http.server
import re
import threading
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from helpers import CPU, TINY, Killed, assert_equal, image_folder, kill, randomised, save_noise, words

import analyze
import data
import detect
import finetune
import pretrain
import segment
import weights
from fcmae import FCMAE
from model import MODELS, ConvNeXt
from plumbing.files import UserError, download

WRITTEN = ("authors", "timm", "hf", "mmpretrain")


def net(seed: int = 0, **kwargs) -> ConvNeXt:
    torch.manual_seed(seed)
    return randomised(ConvNeXt(**TINY | dict(num_classes=5) | kwargs), seed).eval()


def user_error(words: str):  # in a message of one line
    return pytest.raises(UserError, match=rf"\A(?=[^\n]*{re.escape(words)})[^\n]+\Z")


def without(state: dict, *starts: str) -> dict:
    return {key: value for key, value in state.items() if not key.startswith(starts)}


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_size_round_trips_through_every_layout_and_has_timms_names(name):
    with torch.device("meta"):
        state = MODELS[name](num_classes=7).state_dict()
        theirs = {} if "yocto" in name else timm.create_model(name, num_classes=7).state_dict()
    for layout in WRITTEN:
        converted, known = weights.from_native(state, layout), layout.replace("authors", "native")
        assert weights.describe(converted) == f"{known} layout, {len(state)} tensors, {name}, 7 classes"
        for a, b in ((weights.to_native(converted), state), (converted, theirs if layout == "timm" else {})):
            assert not b or {key: value.shape for key, value in a.items()} == {key: b[key].shape for key in b}
        assert all(value.dim() == 1 for key, value in converted.items() if re.match(r"backbone.+\.grn\.", key))


# The smaller ones of timm, below 96 channels, have convolutions in their MLP, the others matrices.
WIDTHS = {"timm atto": TINY["dims"], "timm tiny": (96, 16, 32, 64), "hf": TINY["dims"]}


def network_of(library: str, version: int) -> torch.nn.Module:
    """A small one of timm; or of transformers, with our eps in the final norm too, where its own default is 1e-12."""
    if library != "hf":
        sizes = TINY | dict(dims=WIDTHS[library], num_classes=5)
        return timm.create_model(f"convnext{'v2' * (version == 2)}_{library.split()[-1]}", **sizes)
    transformers, name = pytest.importorskip("transformers"), "ConvNextV2" if version == 2 else "ConvNext"
    sizes = dict(depths=list(TINY["depths"]), hidden_sizes=list(TINY["dims"]), num_labels=5)
    config = getattr(transformers, f"{name}Config")(**sizes, layer_norm_eps=1e-6)
    return getattr(transformers, f"{name}ForImageClassification")(config)


@torch.no_grad()
def difference(ours: ConvNeXt, theirs: torch.nn.Module) -> float:
    """Relative difference of their logits from ours."""
    imgs = torch.randn(2, 3, 64, 96, dtype=ours.head.weight.dtype)
    expected, logits = ours.eval()(imgs), theirs.eval()(imgs)
    return ((getattr(logits, "logits", logits) - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("scale", [1, 1e-3])  # a small one brings every norm's input down to its eps
@pytest.mark.parametrize("version", [2, 1])
@pytest.mark.parametrize("library", WIDTHS)
def test_logits_equal_other_libraries_both_ways_also_where_eps_matters(library, version, scale):
    ours, theirs = net(version=version, dims=WIDTHS[library]).double(), network_of(library, version).double()
    for module in ours.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)) and module is not ours.head:
            module.load_state_dict({name: scale * value for name, value in module.state_dict().items()})
    theirs.load_state_dict(weights.from_native(ours.state_dict(), library.split()[0]))
    assert difference(ours, theirs) < 1e-10
    theirs = randomised(network_of(library, version), 1)
    assert difference(weights.build(weights.to_native(theirs.state_dict())), theirs) < 1e-5


def sparse_names(state: dict) -> dict:
    """An encoder as the authors' pre-training saves it."""
    sparse = {}
    for key, value in state.items():
        key = re.sub(r"(pwconv\d)\.", r"\1.linear.", re.sub(r"(\.norm|s\.[1-3]\.0)\.", r"\1.ln.", key))
        if re.search(r"dwconv.weight|s\.[1-3]\.1\.weight", key):
            key, taps = key.replace(".weight", ".kernel"), range(value.shape[2])
            value = torch.stack([value[:, :, y, x].T for x in taps for y in taps]).squeeze(1)  # (K, i, o) or (K, C)
        sparse[f"encoder.{key}"] = value.reshape(1, -1) if ".grn" in key or key.endswith("bias") else value
    return sparse


# --- networks ---------------------------------------------------------------------------------------------------------

NORM, HEAD = "norm.weight, norm.bias", "head.weight, head.bias"
LEFT_OUT = {  # what the file lacks, the model's classes, what stays at its initial values, what the report says of both
    "other classes": ((), 7, ("head.",), [f"left out: {HEAD}", f"at their initial values: {HEAD}"]),
    "no classes": ((), 0, (), [f"left out: {NORM}, {HEAD}"]),
    "an encoder": (("norm.", "head."), 5, ("norm.", "head."), [f"at their initial values: {NORM}, {HEAD}"]),
    "without head": (("head.",), 5, ("head.",), [f"at their initial values: {HEAD}"]),
}


@pytest.mark.parametrize(("missing", "classes", "initial", "words"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_head_and_norm_that_do_not_fit_are_left_out_and_reported(missing, classes, initial, words):
    state, model = without(net().state_dict(), *missing), net(1, num_classes=classes)
    expected = {k: v.clone() if k.startswith(initial) else state[k] for k, v in model.state_dict().items()}
    assert weights.load_weights(model, state)[1:] == words
    assert_equal(model.state_dict(), expected)


@pytest.mark.parametrize(("old", "new"), [(3, 1), (3, 2), (3, 4), (3, 6), (1, 3), (4, 3)])
def test_an_adapted_stem_responds_equally_to_grey_images(old, new):
    source, model = net(in_chans=old).double(), net(1, in_chans=new).double()
    assert f"stem adapted from {old} to {new} input channels" in weights.load_weights(model, source.state_dict())
    grey = torch.randn(2, 1, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(model(grey.expand(-1, new, -1, -1)), source(grey.expand(-1, old, -1, -1)))
    if new == 6:
        kernel = source.state_dict()[weights.STEM]
        torch.testing.assert_close(model.state_dict()[weights.STEM], torch.cat([kernel, kernel], dim=1) / 2)


UNFIT = [
    (lambda s: without(s, "stages.2.1.grn.gamma"), 'Missing key(s) in state_dict: "stages.2.1.grn.gamma"'),
    (lambda s: without(s, "head.weight"), '"head.weight"'),
    (lambda s: without(s, "stages.1.0.dwconv.weight"), "the weights lack stages.1.0.dwconv.weight"),
    (lambda s: s | {"stages.2.1.gamma": torch.zeros(1)}, 'Unexpected key(s) in state_dict: "stages.2.1.gamma"'),
    (lambda s: s | {"module.head.bias": torch.zeros(5)}, "head.bias"),  # a name twice
    (lambda s: {key: torch.zeros(()) for key in s}, "shape () cannot be the downsample_layers.1.1.weight"),
    (lambda s: s | {"stages.0.0.dwconv.weight": torch.zeros(48, 8)}, "(48, 8)"),  # no square of taps
    (lambda s: s | {"norm.weight": torch.zeros(3)}, "size mismatch for norm.weight"),
    (lambda s: {"conv1.weight": torch.zeros(1)}, "no layout is known for these 1 tensors (conv1.weight)"),
]


@pytest.mark.parametrize(("change", "words"), UNFIT)
def test_loading_is_strict_and_names_what_does_not_fit(change, words):
    with user_error(words):
        weights.load_weights(net(1), weights.to_native(change(net().state_dict())))


def test_a_checkpoint_that_differs_from_the_network_that_it_describes_is_refused():
    with user_error("a.pth and the network that it describes differ"):
        weights.load_saved({"model": net().state_dict()}, lambda: net(num_classes=4), "a.pth", CPU)


def test_a_detector_of_mmdetection_comes_with_cocos_numbers_of_its_classes(tmp_path):
    state = weights.from_native(MODELS["convnextv2_yocto"](num_classes=0).state_dict(), "mmpretrain")
    heads = ["rpn_head.rpn_conv", "roi_head.bbox_head.fc_cls", "roi_head.bbox_head.shared_fcs.0"]
    state |= {f"{name}.weight": torch.zeros(4, 4) for name in (*heads, "roi_head.mask_head.convs.0.conv")}
    for classes, numbers in ((["dog", "cat", "zebra"], [18, 17, 24]), (["dog", "cat", "unicorn"], [1, 2, 3])):
        torch.save({"state_dict": state, "meta": {"dataset_meta": {"CLASSES": tuple(classes)}}}, tmp_path / "a.pth")
        content = weights.read_content(tmp_path / "a.pth")
        assert (content["classes"], content["category_ids"]) == (classes, numbers)


# --- files and the command --------------------------------------------------------------------------------------------


def convert(*line) -> None:
    """The command."""
    weights.main(weights.get_args([*map(str, line)]))


def test_weights_are_found_under_the_usual_keys_in_spite_of_a_namespace(tmp_path):
    raw, path = net().state_dict(), tmp_path / "a.pth"
    for content in (raw, {"state_dict": raw}, {"module": raw}, {"model": raw, "args": argparse.Namespace(lr=1e-3)}):
        torch.save(content, path)
        assert_equal(weights.read_file(path), raw)


def test_files_without_weights_are_named(tmp_path):
    state, contents = net().state_dict(), {"epoch": {"epoch": 1}, "empty": {}, "nothing": {"model": {}}}
    for name, content in (contents | {"mixed": state | {"epoch": 1}}).items():
        torch.save(content, tmp_path / name)
    weights.write_file(tmp_path / "cut.safetensors", state)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:5000])
    for name in (*contents, "mixed", "cut.safetensors", "missing.safetensors", "."):
        with user_error(str(tmp_path / name)):
            weights.read_file(tmp_path / name)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("layout", ["native", *WRITTEN])
def test_the_command_converts_there_and_back(tmp_path, monkeypatch, capsys, layout, suffix):
    monkeypatch.chdir(tmp_path)
    mae, averaged = FCMAE(net(num_classes=0), decoder_embed_dim=16).state_dict(), net(1).state_dict()
    torch.save({"model": mae, "model_ema": averaged}, "a.pth")
    for flags, expected in (([], weights.to_native(mae)), (["--model_ema"], averaged)):
        convert("a.pth", f"new/b.{suffix}", "--to", layout, *flags)
        convert(f"new/b.{suffix}", "c.pt", "--to", "native")
        assert_equal(torch.load("c.pt")["model"], expected)
    assert f"b.{suffix}: {layout} layout, {len(averaged)} tensors" in capsys.readouterr().out
    top = {"timm": set(), "hf": set(), "mmpretrain": {"state_dict"}}.get(layout, {"model"})
    assert suffix != "pth" or torch.load("new/b.pth").keys() & {"model", "state_dict"} == top


def test_the_command_refuses_in_one_line_what_it_cannot_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(net().state_dict(), "a.pth")
    for out in ("c.onnx", "c", "c.zip"):
        with user_error("must end in .pth"):
            convert("a.pth", out, "--to", "mmpretrain")
    with pytest.raises(SystemExit, match="2"):
        convert("a.pth", "b.pth", "--to", "tim")
    assert re.fullmatch(r".*invalid choice: 'tim' \(choose from .*timm.*\)\n", capsys.readouterr().err)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address on this machine at which the files in `tmp_path` are."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=partial(server.serve_forever, poll_interval=0.01), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_every_flag_for_weights_takes_an_address_downloads_it_once_and_takes_flags_from_there(tmp_path, server, capsys):
    state = MODELS["convnextv2_yocto"](num_classes=5, stem_stride=2).state_dict()
    torch.save({"model": state, "config": dict(input_size=48, crop_pct=0.9, image_max=4095)}, tmp_path / "a.pth")
    address, folder = f"{server}/a.pth?x=1", str(tmp_path)
    for script in (pretrain, finetune, detect, segment):
        flag = "init_weight" if script is pretrain else "finetune"
        args = script.get_args([f"--{flag}", address, "--data_path", folder])
        assert (args.model, args.stem_stride, args.image_max) == ("convnextv2_yocto", 2, 4095)
        assert Path(getattr(args, flag)).read_bytes() == (tmp_path / "a.pth").read_bytes()
    for task in (["--finetune"], ["--eval", "--resume"], ["--predict", "cat.jpg", "--resume"]):
        args = finetune.get_args([*task, address, "--data_path", folder])
        assert (args.input_size, args.image_max) == (48, 4095)
    assert (args.crop_pct, args.output_dir) == (0.9, "runs/finetune")  # not beside the cached file
    assert analyze.get_args(["collapse", "--checkpoint", address, "--data_path", folder]).checkpoint[0].name == "a.pth"
    convert(address, tmp_path / "b.pth", "--to", "hf")
    assert capsys.readouterr().out.count("downloading") == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.pth").write_text("text")  # another file of the same name
    with user_error("damaged"):
        finetune.get_args(["--finetune", f"{server}/other/a.pth", "--data_path", folder])


def test_an_interrupted_download_is_an_error_and_the_next_one_starts_afresh(tmp_path, server, monkeypatch):
    state, path = net().state_dict(), tmp_path / "a.pth"
    with user_error("404"):
        download(f"{server}/a.pth")
    torch.save(state, path)
    with monkeypatch.context() as patch, user_error(f"9,000 of {path.stat().st_size:,} bytes came"):
        patch.setattr(http.server.SimpleHTTPRequestHandler, "copyfile", lambda _, a, b: b.write(a.read(9000)))
        download(f"{server}/a.pth")
    assert_equal(weights.read_file(download(f"{server}/a.pth")), state)


PREFIX = "model.module._orig_mod."  # of Lightning, DistributedDataParallel and torch.compile
STARTS = {  # what a file holds of an autoencoder, and how many tensors besides the encoder fit
    "all": (lambda mae: mae.state_dict(), 15),
    "wrapped": (lambda mae: {PREFIX + key: value for key, value in mae.state_dict().items()}, 15),
    "sparse": (lambda mae: sparse_names(mae.encoder.state_dict()) | without(mae.state_dict(), "encoder."), 15),
    "released": (lambda mae: mae.encoder.state_dict(), 0),
    "hf": (lambda mae: weights.from_native(mae.encoder.state_dict(), "hf"), 0),
    "width": (lambda mae: FCMAE(mae.encoder, decoder_embed_dim=8).state_dict() | {"pred.bias": mae.pred.bias.data}, 1),
}


@pytest.mark.parametrize(("make", "fitting"), STARTS.values(), ids=STARTS)
def test_pre_training_starts_from_every_layout_with_all_tensors_that_fit(tmp_path, monkeypatch, capsys, make, fitting):
    mae = randomised(FCMAE(MODELS["convnextv2_yocto"](num_classes=0, stem_stride=2), decoder_embed_dim=16))
    torch.save({"model": (file := make(mae))}, tmp_path / "a.pth")
    flags = dict(init_weight=tmp_path / "a.pth", data_path=image_folder(tmp_path / "images", train=4))
    flags |= dict(decoder_embed_dim=16, device="cpu", output_dir=tmp_path / "run")
    initial, run = {}, lambda args, images, device, net, *_: initial.update(net.state_dict()) or kill()
    monkeypatch.setattr(pretrain, "Run", run)
    with pytest.raises(Killed):
        pretrain.main(pretrain.get_args(words(**flags, input_size=32)))
    loaded = {key for key, value in mae.state_dict().items() if torch.equal(initial[key], value)}
    encoder = {key for key in initial if key.startswith("encoder.")}
    assert loaded >= encoder and len(loaded) == len(encoder) + fitting
    output, rest = capsys.readouterr().out, len(file) - len(encoder)
    assert f"loaded {fitting} of the autoencoder's 15 other tensors" in output
    assert f"no head; {rest} tensors besides the encoder are left out" in output or not rest
    with user_error("with --stem_stride 2, do not fit the model"):
        pretrain.main(pretrain.get_args(words(**flags, stem_stride=1)))


# --- in the hands of other tools --------------------------------------------------------------------------------------


def write_checkpoint(path: Path, num_classes: int, **config) -> ConvNeXt:
    """As finetune.py or pretrain.py would leave it."""
    model = net(num_classes=num_classes, stem_stride=config.get("stem_stride", 4))
    torch.save({"model": model.state_dict(), "config": config, "classes": ["a", "b", "c"][:num_classes]}, path)
    return model


CONFIGS = [(layout, dict(input_size=384)) for layout in ("hf", "timm")]  # images are warped to squares
CONFIGS += [("hf", dict(input_size=48, data_set="cifar10", stem_stride=2))]
CONFIGS += [("timm", dict(input_size=64, crop_pct=0.9, stem_stride=1))]


@pytest.mark.parametrize(("layout", "config"), CONFIGS)
@torch.no_grad()
def test_a_folder_opens_in_its_library_with_classes_logits_and_preparation(tmp_path, layout, config):
    model, size = write_checkpoint(tmp_path / "a.pth", 3, **config), config["input_size"]
    convert(tmp_path / "a.pth", tmp_path / "out", "--to", layout)
    save_noise(tmp_path / "cat.jpg", (120, 90))
    image, data_set = data.open_rgb(tmp_path / "cat.jpg"), config.get("data_set", "folder")
    ours = data.evaluation_transform(size, config.get("crop_pct"))(image)[None]
    ours = data.normalise(ours, data.STATISTICS[data_set], "cpu")
    if layout == "timm":
        theirs = timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True).eval()
        assert theirs.pretrained_cfg["label_names"] == ["a", "b", "c"]
        prepared = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs))(image)[None]
        logits = theirs(ours)
    else:
        transformers = pytest.importorskip("transformers")
        theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
        assert theirs.config.id2label[2] == "c"
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
        prepared = processor(image, return_tensors="pt").pixel_values
        logits = theirs(ours).logits
    assert (logits - model(ours)).abs().max() < 1e-5 * max(1, logits.abs().max())
    assert (prepared - ours).abs().max() < 0.05


@torch.no_grad()
def test_encoders_open_too_and_timms_stem_of_stride_two_is_refused(tmp_path, capsys):
    model, imgs = write_checkpoint(tmp_path / "a.pth", 0, input_size=64), torch.randn(2, 3, 64, 64)
    for layout in ("timm", "hf"):
        convert(tmp_path / "a.pth", tmp_path / layout, "--to", layout)
    theirs = timm.create_model(f"local-dir:{tmp_path}/timm", pretrained=True).eval()
    torch.testing.assert_close(theirs.forward_features(imgs), model.forward_stages(imgs)[-1], rtol=1e-4, atol=1e-5)
    theirs = pytest.importorskip("transformers").AutoModel.from_pretrained(tmp_path / "hf").eval()
    torch.testing.assert_close(theirs(imgs).last_hidden_state, model.forward_stages(imgs)[-1], rtol=1e-4, atol=1e-5)
    write_checkpoint(tmp_path / "b.pth", 3, input_size=64, stem_stride=2)
    for out in ("c", "c.pth"):
        with user_error("stem of stride 2"):
            convert(tmp_path / "b.pth", tmp_path / out, "--to", "timm")
    convert(tmp_path / "b.pth", tmp_path / "c.pth", "--to", "hf")
    assert "made with patch_size=2" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
@torch.no_grad()
def test_exported_programs_compute_the_logits_of_any_number_of_images(tmp_path, suffix):
    runtime = pytest.importorskip("onnxruntime") if suffix == "onnx" else None
    model = write_checkpoint(tmp_path / "a.pth", 3, input_size=32, stem_stride=1)
    imgs, out = torch.randn(5, 3, 32, 32), tmp_path / f"new/a.{suffix}"
    convert(tmp_path / "a.pth", out)
    if runtime:
        logits = torch.tensor(runtime.InferenceSession(out).run(["logits"], {"images": imgs.numpy()})[0])
    else:
        logits = torch.export.load(out).module()(imgs)
    torch.testing.assert_close(logits, model(imgs), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_examples_of_the_page_on_weights_run(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    for file, classes in {"runs/finetune/checkpoint-best.pth": 5, "runs/pretrain/encoder.pth": 0}.items():
        weights.write_file(Path(file), net(depths=(1, 1, 1, 1), num_classes=classes).state_dict(), "model")
    save_noise(tmp_path / "cat.jpg", (90, 60))
    names = dict(images=torch.randn(2, 3, 64, 64))
    page = (Path(__file__).parents[1] / "docs/weights.md").read_text()
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)), names)
    assert names["logits"].shape == (1, 5) and [len(x) for x in names["maps"]] == [2] * 4
    assert Path("stages.onnx").exists()
