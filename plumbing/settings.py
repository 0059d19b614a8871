"""Where the flags of detect.py and segment.py come from: the command line, a recipe, weights or a checkpoint, the data set."""

import os
from collections.abc import Callable, Sequence

from model import MODELS
from plumbing import flags, layouts
from plumbing.files import file_of_run
from plumbing.script import UserError

UNFLAGGED = {"mlp_norm": None, "statistics": None, "compile": False, "images_per_update": None}  # of weights and recipes alone


def add_task_flags(parser: flags.Parser, does: str, recipe: str, files: str) -> Callable:
    """The flags that choose task and encoder; a function that adds more to the group of the model.

    does: what prediction does with pictures; recipe: its name; files: what --finetune reads.
    """
    add = parser.adder(parser.add_argument_group("task"))
    add("--eval", bool, False, "only evaluate the checkpoint of --resume")
    add("--predict", str, None, f"only {does} these files or folders with the checkpoint of --resume", nargs="+", metavar="IMAGE")
    add("--recipe", (recipe,), None, "the published settings for the model's size; other flags override them")
    add = parser.adder(parser.add_argument_group("model"))
    add("--model", flags.one_of("model", MODELS), "convnextv2_atto", ", ".join(MODELS))
    add("--finetune", str, None, f"weights of {files}", metavar="FILE")
    add("--stem_stride", flags.STRIDES, 4, "stride of the stem")
    add("--drop_path", flags.share, 0.0, "stochastic depth rate of the last block")
    return add


def add_evaluation_flags(parser: flags.Parser) -> None:
    """When to evaluate while training."""
    add = parser.adder(parser.add_argument_group("evaluation while training"))
    add("--eval_freq", flags.count, 1, "epochs between evaluations; the last epoch always has one")
    add("--disable_eval", bool, False, "do not evaluate while training")


def settle(
    parser: flags.Parser, argv: list[str] | None, network: Sequence[str], places: Sequence[str], prepared: Sequence[str],
    defaults: dict[str, dict], recipes: dict[str, dict], enough: Sequence[str], layout: str,
) -> flags.Settings:  # fmt: skip
    """Parse the command line; then come the recipe, the weights' own configuration, the data set, and the general defaults.

    Args:
        network: flags that a checkpoint decides, which a command line must not contradict.
        places: flags that tell where the data lie. Without --data_path and --data_set a checkpoint's are taken, but for those given.
        prepared: other flags that evaluation and prediction take from the checkpoint.
        defaults: data set -> its flags, which come after all others.
        recipes: name -> size -> flags.
        enough: those of `places` one of which a folder needs; `layout`: how it is laid out, in words.
    """
    given = parser.parse_args(argv)
    plain = flags.merge(given, parser.general)
    only_use, sources = plain.eval or plain.predict, {}
    flags.refuse_both(plain, parser, "eval", "predict")
    if only_use:
        if not plain.resume:
            parser.error(f"--{'eval' if plain.eval else 'predict'} needs --resume FILE, a checkpoint to use")
        given.resume = plain.resume = file_of_run(plain.resume, "checkpoint-best.pth", "newest")
        sources["the place of --resume"] = dict(output_dir=os.path.dirname(plain.resume) or ".")
        config = layouts.read_config(plain.resume)
        if hasattr(given, "data_set") or hasattr(given, "data_path"):
            as_trained = ()
        else:  # a place given beside the checkpoint's others, such as another split of the same folder
            as_trained = places if any(hasattr(given, name) for name in places) else ("data_set", *places)
        sources[plain.resume] = {name: config[name] for name in (*network, *as_trained, *prepared) if config.get(name) is not None}
        for name in network:
            if hasattr(given, name) and getattr(given, name) != config.get(name):
                parser.error(f"--{name} {getattr(given, name)}, but {plain.resume} has {config.get(name)}; leave --{name} out")
    elif plain.finetune:
        given.finetune = plain.finetune = file_of_run(plain.finetune, "checkpoint-best.pth", "encoder.pth", "newest")
        found = layouts.flags_of(plain.finetune)
        sources[plain.finetune] = {name: found[name] for name in ("model", "stem_stride", "mlp_norm") if name in found}
    plain = flags.merge(given, parser.general, **sources)
    data_set = plain.data_set or ("folder" if any(getattr(plain, name) for name in enough) else "embedded")
    if data_set == "folder" and not (plain.predict or any(getattr(plain, name) for name in enough)):
        parser.error(f"--data_set folder needs --data_path DIR, in {layout}")
    if data_set == "embedded" and plain.data_path:
        parser.error(f"--data_set embedded takes no --data_path {plain.data_path}; leave one of the two out")
    sources[f"the data set {data_set}"] = defaults[data_set]
    if plain.recipe:
        size, recipe = plain.model.split("_")[1], recipes[plain.recipe]
        if size not in recipe:
            parser.error(f"--recipe {plain.recipe} has no settings for size {size}; it has {', '.join(recipe)}")
        sources = {f"recipe {plain.recipe}": recipe[size]} | sources
    if hasattr(given, "blr"):
        given.lr = None
    args = flags.merge(given, parser.general | UNFLAGGED, **sources)
    args.data_set = data_set
    flags.settle_amp(args, parser)
    args.statistics = args.statistics or args.data_set  # of a checkpoint, those that it was trained with
    flags.check_run(args, parser)
    return args


def match_classes(trained: list[str], found: list[str]) -> None:
    """UserError unless the validation data have the classes that were trained, in their order."""
    if trained != found:
        before, now = (f"{', '.join(names[:5])} ({len(names)} in all)" for names in (trained, found))
        raise UserError(f"the training data's classes are {before}, the validation data's {now}; they must agree")
