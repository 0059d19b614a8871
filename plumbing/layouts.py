"""Weights in and out: the tensors of a ConvNeXt under this project's names, and under everybody else's; `weights.py` is its front.

"Native" is this project's dense layout and also that of the authors' release. Other libraries compute the same logits from the
same weights, because their LayerNorm and GRN have this project's eps of 1e-6, with one exception: the final norm of Hugging Face
transformers takes `layer_norm_eps` of the configuration, 1e-12 by default; set it to 1e-6 there.

Shapes: C channels, o and i a convolution's output and input channels, K kernel taps.
"""

import argparse
import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import nn

from ablations.norms import MLP_NORMS, exchange_norm
from model import MODELS, SIZES, ConvNeXt
from plumbing import mmdet
from plumbing.devices import to_device
from plumbing.files import load_file, save_tensors, write_atomically
from plumbing.script import UserError, counted

State = dict[str, torch.Tensor]

# One row per kind of tensor, one column per layout, read in both directions; "" means as in the first column. Fields: p weight
# or bias, i stage, j block, d stage after the first, k norm or convolution, v what ablations/norms.py puts in GRN's place (other
# libraries have no such networks); {block} stands for the layout's entry in BLOCK.
LAYOUTS = ("native", "timm", "hf", "mmpretrain")
NAMES = (
    ("downsample_layers.0.0.{p}", "stem.0.{p}", "embeddings.patch_embeddings.{p}", ""),
    ("downsample_layers.0.1.{p}", "stem.1.{p}", "embeddings.layernorm.{p}", ""),
    ("downsample_layers.{d}.{k}.{p}", "stages.{d}.downsample.{k}.{p}", "encoder.stages.{d}.downsampling_layer.{k}.{p}", ""),
    ("{block}.dwconv.{p}", "{block}.conv_dw.{p}", "", "{block}.depthwise_conv.{p}"),
    ("{block}.norm.{p}", "", "{block}.layernorm.{p}", ""),
    ("{block}.pwconv1.{p}", "{block}.mlp.fc1.{p}", "", "{block}.pointwise_conv1.{p}"),
    ("{block}.pwconv2.{p}", "{block}.mlp.fc2.{p}", "", "{block}.pointwise_conv2.{p}"),
    ("{block}.grn.gamma", "{block}.mlp.grn.weight", "{block}.grn.weight", ""),
    ("{block}.grn.beta", "{block}.mlp.grn.bias", "{block}.grn.bias", ""),
    ("{block}.grn.{v}", "", "", ""),
    ("{block}.gamma", "", "{block}.layer_scale_parameter", ""),
    ("norm.{p}", "head.norm.{p}", "layernorm.{p}", "norm3.{p}"),
    ("head.{p}", "head.fc.{p}", "classifier.{p}", "head.fc.{p}"),
)
BLOCK = ("stages.{i}.{j}", "stages.{i}.blocks.{j}", "encoder.stages.{i}.layers.{j}", "stages.{i}.{j}")
FIELDS = {"p": "weight|bias", "i": "[0-3]", "j": r"\d+", "d": "[1-3]", "k": "[01]", "v": rf"(?:{'|'.join(MLP_NORMS)})\.[\w.]+"}
OUTER = r"(?:encoder\.|backbone\.(?:encoder\.)?|convnext(?:v2)?\.)?"  # what a larger network calls the ConvNeXt inside it

STEM = "downsample_layers.0.0.weight"
# What an FCMAE, a detector of detect.py, and a segmenter of segment.py hold besides their encoder.
DECODER = re.compile(
    r"mask_token|(proj|pred|decoder)\..+|(backbone\.(norms|fpn)|rpn|roi_heads)\..+"
    r"|(norms|ppm|lateral|fpn)\.\d\..+|(bottleneck|fuse|classifier|auxiliary)\..+"
)
DETECTOR = re.compile(r"(neck|fpn|rpn|roi|bbox|mask_head|decode_head|auxiliary_head|panoptic)\w*\.|backbone\.(norm0|body)\.")


@cache
def _patterns(layout: str) -> list[tuple[re.Pattern, tuple[str, ...]]]:
    """Each row of NAMES, written out, with a pattern for its name in `layout`."""

    def pattern(name: str) -> re.Pattern:
        return re.compile(OUTER + re.sub(r"\\{(\w)\\}", lambda field: f"(?P<{field[1]}>{FIELDS[field[1]]})", re.escape(name)))

    rows = [tuple((name or names[0]).replace("{block}", block) for name, block in zip(names, BLOCK)) for names in NAMES]
    return [(pattern(names[LAYOUTS.index(layout)]), names) for names in rows]


def _rename(key: str, source: str, target: str) -> str | None:
    """A tensor's name in another layout; None if no ConvNeXt has such a tensor."""
    for pattern, names in _patterns(source):
        if match := pattern.fullmatch(key):
            return names[LAYOUTS.index(target)].format(**match.groupdict())
    return None


# --- any layout -> native ---------------------------------------------------------------------------------------------


def detect_layout(state_dict: State) -> str:
    """One of `LAYOUTS`, where "native" covers the authors' dense files too, or "sparse", the authors' pre-training layout.

    UserError for anything else.
    """
    keys = [_unwrapped(key) for key in state_dict]
    if any(re.fullmatch(OUTER + r"stages\.0\.0\.dwconv\.kernel", key) for key in keys):
        return "sparse"
    for layout in LAYOUTS:
        if any(_rename(key, layout, "native") == "stages.0.0.dwconv.weight" for key in keys):
            return layout
    raise UserError(
        f"no layout is known for these {len(keys)} tensors ({_few(keys)}){_hint(keys)}; known are ConvNeXt V1 and V2 of this "
        f"project, its authors, timm, Hugging Face transformers and mmpretrain"
    )


def to_native(state_dict: State) -> State:
    """Tensors of any known layout, under this project's names and in its shapes; `describe` says what was recognised.

    Prefixes `module.` and `_orig_mod.` are removed and an FCMAE's decoder is left out. UserError for an unknown layout, and
    for tensors that are no part of a classifier.
    """
    layout = detect_layout(state_dict)
    native, foreign = {}, []
    for key, value in state_dict.items():
        key = _unwrapped(key)
        if _of_decoder(key, layout):
            continue
        name = _rename(_dense_name(key), "native", "native") if layout == "sparse" else _rename(key, layout, "native")
        if name is None or name in native:
            foreign.append(key)
            continue
        try:
            native[name] = _native_shape(name, _dense_kernel(value) if key.endswith(".kernel") else value)
        except (RuntimeError, IndexError, TypeError):
            raise UserError(f"{key} of shape {tuple(value.shape)} cannot be the {name} of a ConvNeXt") from None
    if foreign:
        raise UserError(
            f"{len(foreign)} of {len(state_dict)} tensors are no part of a ConvNeXt in the {layout} layout "
            f"({_few(foreign)}){_hint(foreign)}"
        )
    return native


def describe(state_dict: State) -> str:
    """What `to_native` makes of a state dict, in words, the decoder that it leaves out included."""
    layout = detect_layout(state_dict)
    decoder = sum(_of_decoder(_unwrapped(key), layout) for key in state_dict)
    found = architecture(to_native(state_dict))
    head = counted(found["num_classes"], "class") if found["num_classes"] else "no head"
    owners = {"rpn": "detector", "ppm": "segmenter"}
    whose = next((owners[part] for key in state_dict if (part := _unwrapped(key).split(".")[0]) in owners), "pre-training decoder")
    left_out = f"; {decoder} tensors of the {whose} are left out" if decoder else ""
    return f"{layout} layout, {counted(len(state_dict) - decoder, 'tensor')}, {_network(**found)}, {head}{left_out}"


def _unwrapped(key: str) -> str:
    return re.sub(r"\b(module|_orig_mod)\.", "", key)  # DistributedDataParallel's and torch.compile's


def _of_decoder(key: str, layout: str) -> bool:
    return layout in ("native", "sparse") and DECODER.fullmatch(key) is not None


def _dense_name(key: str) -> str:
    return re.sub(r"\.(ln|linear)\b", "", key).replace(".kernel", ".weight")


def _dense_kernel(kernel: torch.Tensor) -> torch.Tensor:
    """(K, i, o) -> (o, i, k, k), or depthwise (K, C) -> (C, 1, k, k); a sparse kernel's taps run down columns."""
    k = math.isqrt(len(kernel))
    if kernel.dim() == 2:
        kernel = kernel[:, None]  # (K, C) -> (K, 1, C)
    return kernel.permute(2, 1, 0).unflatten(2, (k, k)).transpose(3, 2)


def _native_shape(name: str, value: torch.Tensor) -> torch.Tensor:
    if name.endswith((".grn.gamma", ".grn.beta")):
        value = value.reshape(1, 1, 1, -1)
    elif ".grn." in name:
        return value  # of ablations/norms.py, as it is
    elif name.endswith("bias"):
        value = value.flatten()  # (1, C) -> (C,)
    elif ".pwconv" in name and value.dim() == 4:
        value = value.flatten(1)  # (o, i, 1, 1) -> (o, i)
    if value.dim() == 0 or value.numel() == 0:
        raise TypeError("no channels")
    return value.contiguous()


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _hint(keys: list[str]) -> str:
    found = any(DETECTOR.match(key) for key in keys)
    return "; they look like a detector's or segmenter's: give the classifier or encoder it was built on" if found else ""


# transformers' UperNetForSemanticSegmentation -> the segmenter of segment.py, but for the encoder, which NAMES has.
UPERNET = (
    {f"decode_head.psp_modules.{i}.1": f"ppm.{i}" for i in range(4)}
    | {f"decode_head.lateral_convs.{i}": f"lateral.{i}" for i in range(3)}
    | {f"decode_head.fpn_convs.{i}": f"fpn.{i}" for i in range(3)}
    | {f"backbone.hidden_states_norms.stage{i + 1}": f"norms.{i}" for i in range(4)}
    | {"decode_head.bottleneck": "bottleneck", "decode_head.fpn_bottleneck": "fuse", "decode_head.classifier": "classifier"}
    | {"auxiliary_head.convs.0": "auxiliary.0", "auxiliary_head.classifier": "auxiliary.1"}
)


def upernet_names(state_dict: State) -> State:
    """The tensors of transformers' UPerNet under the names of `segmenter.UPerNet`; anything else as it is."""
    if "decode_head.psp_modules.0.1.conv.weight" not in state_dict:
        return state_dict
    renamed = {}
    for key, value in state_dict.items():
        module, step, kind = re.fullmatch(r"(.+?)(\.conv|\.batch_norm)?\.(\w+)", key).groups()
        if module in UPERNET:
            renamed[UPERNET[module] + {".conv": ".0", ".batch_norm": ".1", None: ""}[step] + f".{kind}"] = value
        elif inner := _rename(key, "hf", "native"):
            renamed[f"encoder.{inner}"] = _native_shape(inner, value)
        else:
            renamed[key] = value
    return renamed


# --- native -> other layouts ------------------------------------------------------------------------------------------


def from_native(state_dict: State, layout: str) -> State:
    """The inverse of `to_native`: this project's tensors in the layout "timm", "hf", "mmpretrain" or "authors".

    Of a pre-trained encoder, which has neither norm nor head, the others' models must be built without them too, or be
    told to accept that they are missing.
    """
    layout = "native" if layout == "authors" else layout
    if layout not in LAYOUTS:
        raise UserError(f"no layout {layout!r} to write; choose from authors, {', '.join(LAYOUTS)}")
    found = architecture(state_dict)
    if layout != "native" and mlp_norm_of(state_dict) not in (None, "grn"):
        raise UserError(f"{layout} has no ConvNeXt with {mlp_norm_of(state_dict)} in GRN's place; only --to native can hold it")
    outer = {"hf": "convnextv2." if found["version"] == 2 else "convnext.", "mmpretrain": "backbone."}.get(layout, "")
    # timm runs the MLP of its models narrower than tiny as 1x1 convolutions.
    as_convolution = layout == "timm" and found["dims"][0] < SIZES["tiny"][1][0]
    written = {}
    for key, value in state_dict.items():
        name = _rename(key, "native", layout)
        if name is None:
            raise UserError(f"{key} is not a tensor of this project's classifier; apply to_native first")
        if ".grn." in key and layout in ("timm", "mmpretrain"):
            value = value.flatten()  # (1, 1, 1, 4C) -> (4C,)
        elif ".pwconv" in key and value.dim() == 2 and as_convolution:
            value = value[:, :, None, None]  # (o, i) -> (o, i, 1, 1)
        written[name if key.startswith("head.") else outer + name] = value
    return written


# --- native -> a model ------------------------------------------------------------------------------------------------


def architecture(native: State) -> dict:
    """Arguments for which `ConvNeXt(**architecture(native))` fits the tensors, but for what may stand in GRN's place (`build`).

    num_classes is 0 if there is no head.
    """
    needed = [STEM, *(f"stages.{i}.0.dwconv.weight" for i in range(4))]
    if missing := [key for key in needed if key not in native]:
        raise UserError(f"the weights lack {_few(missing)}, which every ConvNeXt has")
    stem = native[STEM].shape
    if len(stem) != 4 or stem[2] != stem[3] or stem[2] not in (4, 2, 1):
        raise UserError(f"the stem's kernel {tuple(stem)} is not (C, in_chans, s, s) with s 4, 2 or 1")
    return dict(
        depths=tuple(sum(bool(re.fullmatch(rf"stages\.{i}\.\d+\.dwconv\.weight", key)) for key in native) for i in range(4)),
        dims=tuple(len(native[key]) for key in needed[1:]),
        version=2 if mlp_norm_of(native) else 1,
        num_classes=len(native["head.weight"]) if "head.weight" in native else 0,
        in_chans=stem[1],
        stem_stride=stem[2],
    )


def build(native: State, load: bool = True, **start: float) -> ConvNeXt:
    """A network that fits the tensors, with them as its weights, or else with initial ones, to which `start` (of ConvNeXt) applies."""
    net, mlp_norm = ConvNeXt(**architecture(native), **start), mlp_norm_of(native)
    if mlp_norm not in (None, "grn"):
        exchange_norm(net, mlp_norm)
    if load:
        load_weights(net, native)
    return net


def load_classifier(path: str, device: torch.device) -> tuple[dict[str, ConvNeXt], list[str] | None]:
    """The classifiers of a checkpoint, "model" and where there is one "model_ema", ready to evaluate; and their class names."""
    content, networks = read_content(path), {}
    for name in ("model", "model_ema"):
        if name == "model" or content.get(name):
            net = build(to_native(read_file(path, ema=name == "model_ema")))
            if not net.num_classes:
                raise UserError(f"{path} holds no classifier but an encoder; train one with finetune.py --finetune {path}")
            if net.in_chans != 3:
                raise UserError(f"{path} takes images of {net.in_chans} channels; images here have 3")
            networks[name] = net.to(device, memory_format=torch.channels_last).eval()
    classes = content.get("classes")
    return networks, classes if isinstance(classes, list) and len(classes) == net.num_classes else None


def flags_of(path: str | Path, *others: str) -> dict:
    """What a weights file tells of finetune.py's flags: model, stem_stride, mlp_norm, input_size and `others`."""
    found, config = _flags_of(to_native(read_file(path))), read_config(path)
    found |= {name: config[name] for name in others if name in config}
    return found | ({"input_size": config["input_size"]} if isinstance(config.get("input_size"), int) else {})


def _flags_of(native: State) -> dict:
    shape = architecture(native)
    key = (shape["depths"], shape["dims"]), shape["version"]
    names = [name for name, make in MODELS.items() if (make.args, make.keywords["version"]) == key]
    found = {"stem_stride": shape["stem_stride"]} | ({"model": names[0]} if names else {})
    return found | ({"mlp_norm": mlp_norm_of(native)} if mlp_norm_of(native) not in (None, "grn") else {})


def mlp_norm_of(native: State) -> str | None:
    """What stands in GRN's place, a name in `ablations.norms.MLP_NORMS`: "grn" in V2, None in V1."""
    found = {key.split(".grn.")[1].split(".")[0] for key in native if ".grn." in key}
    return next(iter(found & MLP_NORMS.keys()), "grn" if found else None)


def load_weights(model: ConvNeXt, native: State, exchange_mlp_norm: bool = False) -> list[str]:
    """Copy native tensors into `model`, strictly; returns a report, line by line.

    A model without classes takes neither norm nor head. A head for another number of classes is left out. The model's head
    keeps its initial values then, and where the file has none; so does its norm where the file has neither, as pre-trained
    encoders do. A stem for other images is adapted (`adapt_stem`). UserError for another stem stride, and for whatever else is
    missing, unexpected or of another shape.

    exchange_mlp_norm: what stands in GRN's place may be another in the model than in the file. It is left out then, and the
        model's keeps its initial values.
    """
    native, expected, found = dict(native), model.state_dict(), architecture(native)
    if found["stem_stride"] != model.stem_stride:
        raise UserError(
            f"the weights have stem_stride {found['stem_stride']} and the model {model.stem_stride}: its stages would see "
            f"features at a scale that they were not trained for; use --stem_stride {found['stem_stride']}"
        )
    norm, head = ([name for name in native if name.startswith(part)] for part in ("norm.", "head."))
    dropped, reason, initial = [], "", ()
    if model.num_classes == 0:
        dropped, reason = norm + head, "the model has no classes"
    elif not head:
        initial = ("head.",) if norm else ("norm.", "head.")
    elif found["num_classes"] not in (0, model.num_classes):
        dropped, initial = head, ("head.",)
        reason = f"{counted(found['num_classes'], 'class')} in the file, {model.num_classes} in the model"
    native = {name: value for name, value in native.items() if name not in dropped}

    report = []
    if found["in_chans"] != model.in_chans:
        native[STEM] = adapt_stem(native[STEM], model.in_chans)
        report.append(f"stem adapted from {found['in_chans']} to {model.in_chans} input channels")
    if dropped:
        report.append(f"left out {', '.join(dropped)}: {reason}")
    initial = [name for name in expected if name.startswith(initial)]
    if initial:
        report.append(f"at their initial values: {', '.join(initial)}")
    if exchange_mlp_norm:
        left, new = ([name for name in names if ".grn." in name] for names in (native, expected))
        before, after = mlp_norm_of(native), mlp_norm_of(expected)
        report.append(f"{before} exchanged for {after}: {len(left)} tensors left out, {len(new)} at their initial values")
        native = {name: value for name, value in native.items() if name not in left}
        initial += new
    shapes = {name: (tuple(native[name].shape), tuple(expected[name].shape)) for name in native if name in expected}
    problems = {
        "missing": [name for name in expected if name not in native and name not in initial],
        "unexpected": [name for name in native if name not in expected],
        "misshaped": [f"{name} {given} for {wanted}" for name, (given, wanted) in shapes.items() if given != wanted],
    }
    if any(problems.values()):
        words = "; ".join(f"{len(names)} {what}: {_few(names)}" for what, names in problems.items() if names)
        given, wanted = _network(**found), _network(model.depths, model.dims, model.version)
        fix = "the file is incomplete or altered" if given == wanted else f"the weights are of {given}, the model is {wanted}"
        raise UserError(f"the weights do not fit the model ({words}); {fix}")
    model.load_state_dict({name: native.get(name, value) for name, value in expected.items()})
    return [f"loaded {len(native)} of the model's {len(expected)} tensors", *report]


def load_parts(net: nn.Module, encoder: ConvNeXt, path: str, what: str) -> list[str]:
    """Give `net`, a detector or segmenter (`what`) on `encoder`, the weights of a file of any layout; lines that say what was done.

    The encoder's must all fit. The rest is taken where the file has a tensor of that name and shape.
    """
    found, own = read_file(path), net.state_dict()
    report = [f"{path}: {describe(found)}", *load_weights(encoder, to_native(found))]
    heads = {name: value for name, value in found.items() if DECODER.fullmatch(name) and name in own}
    if heads:
        fitting = {name: value for name, value in heads.items() if value.shape == own[name].shape}
        net.load_state_dict(fitting, strict=False)
        others = ", ".join(sorted({name.rsplit(".", 1)[0] for name in heads.keys() - fitting.keys()}))
        report.append(
            f"loaded {len(fitting)} of the {what}'s other tensors" + (f"; at their initial values: {others}" * bool(others))
        )
    return report


def load_own(net: nn.Module, state_dict: State, path: str) -> None:
    """Give a network the weights that one like it was saved with; UserError where they do not fit."""
    own = net.state_dict()
    wrong = [name for name in sorted(own.keys() | state_dict.keys()) if _shape(own, name) != _shape(state_dict, name)]
    if wrong:
        raise UserError(
            f"{path} and the network that it describes differ in {counted(len(wrong), 'tensor')} ({_few(wrong)}); it is incomplete or altered"
        )
    net.load_state_dict(state_dict)


def load_saved(content: dict, make: Callable[[], nn.Module], path: str, device: torch.device) -> dict[str, nn.Module]:
    """The networks of a checkpoint, "model" and where there is one "model_ema", ready to evaluate."""
    networks = {}
    for name in ("model", "model_ema"):
        if content.get(name):
            networks[name] = make().eval()
            load_own(networks[name], content[name], path)
            to_device(networks[name], device)
    return networks


def make_encoder(args: argparse.Namespace) -> ConvNeXt:
    """The encoder that the flags of detect.py or segment.py describe."""
    encoder = MODELS[args.model](num_classes=0, stem_stride=args.stem_stride, drop_path_rate=args.drop_path)
    if args.mlp_norm not in (None, "grn"):
        exchange_norm(encoder, args.mlp_norm)
    encoder.checkpoint_activations(args.checkpoint_activations)
    return encoder


def _shape(state_dict: State, name: str) -> tuple | None:
    return tuple(state_dict[name].shape) if name in state_dict else None


def adapt_stem(kernel: torch.Tensor, in_chans: int) -> torch.Tensor:
    """A stem's kernel (o, i, s, s) -> (o, in_chans, s, s) with the same response to images whose channels are all equal.

    Fewer channels: each takes the sum of every in_chans-th old one, a single channel the sum of all. More: the old ones repeat
    in turn, each divided by the number of its copies, so that the sum over channels stays the same for any two numbers.
    """
    old = kernel.shape[1]
    if in_chans < old:
        return torch.stack([kernel[:, c::in_chans].sum(dim=1) for c in range(in_chans)], dim=1)
    source = torch.arange(in_chans) % old
    return kernel[:, source] / source.bincount()[source].view(1, -1, 1, 1).to(kernel)


def _network(depths: tuple, dims: tuple, version: int, **_) -> str:
    generation = "convnextv2" if version == 2 else "convnext"
    names = [f"{generation}_{size}" for size, shape in SIZES.items() if shape == (depths, dims)]
    return names[0] if names else f"{generation} of depths {depths} and dims {dims}"


# --- files ------------------------------------------------------------------------------------------------------------


def read_content(path: str | Path) -> dict:
    """Everything in a checkpoint of plain types, or the tensors of a .safetensors file; code in it is never run.

    A detector of mmdetection comes as detect.py would have saved it.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    with torch.serialization.safe_globals([argparse.Namespace]):  # plain attributes, in the authors' own checkpoints
        content = load_file(path)
    state_dict = content.get("state_dict", content)
    return _own_detector(state_dict, content.get("meta")) if mmdet.is_detector(state_dict) else content


def _own_detector(state_dict: State, meta: dict | None) -> dict:
    outer, found = "backbone.encoder.", mmdet.to_detector(state_dict)
    encoder = to_native({name: value for name, value in found.items() if name.startswith(outer)})
    rest = {name: value for name, value in found.items() if not name.startswith(outer)}
    names, numbers = mmdet.classes_of(meta or {}, len(rest["roi_heads.box_predictor.cls_score.weight"]) - 1)
    return {
        "model": {outer + name: value for name, value in encoder.items()} | rest,
        "classes": names, "category_ids": numbers, "config": _flags_of(encoder) | mmdet.settings_of(found),
    }  # fmt: skip


def read_config(path: str | Path) -> dict:
    """The flags of the run that wrote a checkpoint of this project; empty for files that do not say."""
    config = {} if Path(path).suffix == ".safetensors" else read_content(path).get("config")
    return config if isinstance(config, dict) else {}


def read_file(path: str | Path, ema: bool = False) -> State:
    """The state dict in a file, in whatever layout; of transformers' UPerNet with the names of ours.

    Looks inside "model", "state_dict" and "module"; with `ema`, inside "model_ema" or "state_dict_ema" for the averaged
    weights. UserError for a file that cannot be read or holds no state dict.
    """
    content = read_content(path)
    top = ", ".join(str(key) for key in list(content)[:5])
    if ema:
        averaged = [content[key] for key in ("model_ema", "state_dict_ema") if isinstance(content.get(key), dict)]
        if not averaged:
            raise UserError(f"{path} holds no averaged weights (model_ema), only {top}; read it without --model_ema")
        content = averaged[0]
    while inner := [content[key] for key in ("model", "state_dict", "module") if isinstance(content.get(key), dict)]:
        content = inner[0]
    if not content or not all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in content.items()):
        raise UserError(f"{path} holds no state dict of tensors, alone or under 'model' or 'state_dict', but {top or 'nothing'}")
    return upernet_names(content)


def write_file(path: str | Path, state_dict: State, top: str | None = None) -> None:
    """Write a .safetensors file, or one for torch.load with the tensors under the key `top`, atomically."""
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            save = _safetensors(path).save_file
            tensors = {key: value.contiguous() for key, value in state_dict.items()}
            write_atomically(path, lambda file: save(tensors, file, metadata={"format": "pt"}))
        else:
            save_tensors(path, {top: state_dict} if top else state_dict)
    except (OSError, RuntimeError) as error:  # torch.save gives a missing folder the latter
        raise UserError(f"cannot write {path} ({getattr(error, 'strerror', None) or error})") from None


def _safetensors(path: Path):
    try:
        import safetensors.torch  # optional, and only for files of that kind
    except ImportError:
        raise UserError(f"{path} needs the package safetensors: pip install safetensors, or use a .pth file") from None
    return safetensors.torch


def _read_safetensors(path: Path) -> State:
    load = _safetensors(path).load_file
    try:
        return load(path)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error})") from None
    except Exception:  # the package's own types
        raise UserError(f"{path} is not a readable safetensors file: damaged, or something else") from None
