"""docs/private_parts.md lists every private part of another library that ours uses, and each is as we need it."""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import re
import types
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import evaluate
import pytest
import torch
from PIL import Image
from timm.data import rand_augment_transform
from torch import nn
from torchvision.ops import MultiScaleRoIAlign
from transformers import HfArgumentParser, PreTrainedConfig, SwinConfig, SwinModel, Trainer, ViTMAEConfig
from transformers.modeling_outputs import BaseModelOutput

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "private_parts.md").read_text(encoding="utf-8")
HUGGING_FACE = ("accelerate", "datasets", "evaluate", "huggingface_hub", "transformers")
LIBRARIES = {*HUGGING_FACE, "argparse", "timm", "torch", "torchvision"}
UNDERSCORES_ALONE = {"accelerate", "argparse", "torch"}  # of these every module may be imported
OF_NAMED_TUPLES = {"_asdict", "_fields", "_replace"}  # documented; the underscore keeps them apart from the fields
MADE_HERE = {"build", "dist", "exports", "outputs", "scenes"}  # by commands of the README: models bring code with them
OUTSIDE = {"benchmarks", "drills", "replication", "tests", *MADE_HERE}

PUBLIC = {
    name
    for line in re.findall(r"^- [^:]+: ((?:.|\n  )+)", PAGE, flags=re.MULTILINE)
    for name in re.findall(r"`([\w.]+)`", line)
}
LISTED = {
    part: set(re.findall(r"`([^`]+)`", where))
    for part, where in re.findall(r"^\| `([\w.]+)` \| (.+?) \| .+ \|$", PAGE, flags=re.MULTILINE)
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_" and name not in OF_NAMED_TUPLES


@cache
def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@cache
def resolve(name: str) -> object:
    """What a dotted name means: as many modules as there are, then attributes."""
    module, rest = name, []
    while not is_module(module):
        module, _, attribute = module.rpartition(".")
        rest.insert(0, attribute)
    found = importlib.import_module(module)
    for attribute in rest:
        found = getattr(found, attribute)
    return found


def library_files() -> list[Path]:
    inside = [(path, path.relative_to(ROOT).parts) for path in sorted(ROOT.rglob("*.py"))]
    return [path for path, parts in inside if parts[0] not in OUTSIDE and not any(p.startswith(".") for p in parts)]


def private_imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names, of the modules themselves where a module is imported or gone through."""
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            roots |= {alias.asname or alias.name for alias in node.names if "." not in alias.name}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from filter(is_private_path, names)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node).split(".")[0] in roots:
            name = ast.unparse(node)
            if re.fullmatch(r"[\w.]+", name) and name.split(".")[0] in LIBRARIES and is_module(name):
                yield from filter(is_private_path, [name])


def is_private_path(name: str) -> bool:
    library, *parts = name.split(".")
    if library not in LIBRARIES:
        return False
    if any(map(is_private, parts)):
        return True
    if library in UNDERSCORES_ALONE or name in PUBLIC:
        return False
    return is_module(name) or name.rpartition(".")[0] not in PUBLIC


def private_attributes(tree: ast.AST, own: set[str]) -> Iterator[str]:
    """Names with an underscore that are looked up on something, and are none of ours."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            name = next((a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)), "")
        else:
            continue
        if is_private(name) and name not in own:
            yield name


def names_defined(tree: ast.AST) -> set[str]:
    """Functions, classes, variables, and what methods set on `self`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found |= {node.attr} if ast.unparse(node.value) in ("self", "cls") else set()
    return found


def names_in_classes(tree: ast.Module) -> dict[str, set[str]]:
    """Private names that a class's own body defines, by class; what decorators and metaclasses add is not there."""
    return {
        node.name: set(filter(is_private, names_defined(ast.Module(shallow(node), []))))
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }


def shallow(node: ast.ClassDef) -> list[ast.stmt]:
    """The statements of a class, its methods without what is in them."""
    body = [ast.Pass()]
    return [
        ast.FunctionDef(each.name, each.args, body, []) if isinstance(each, ast.FunctionDef) else each
        for each in node.body
    ]


def overrides(of_class: type, private_of: dict[type, set[str]]) -> Iterator[tuple[type, str]]:
    """(our class, private name of another library's class that it takes the place of), of one class and its bases.

    A mix-in of ours overrides what stands behind it in the classes that are made with it.
    """
    foreign = [each for each in of_class.__mro__ if each.__module__.split(".")[0] in LIBRARIES]
    for each in of_class.__mro__:
        for name in private_of.get(each, ()):
            owners = [other for other in foreign if name in {**vars(other), **getattr(other, "__annotations__", {})}]
            for owner in owners[-1:]:  # the one that first had it
                yield each, f"{owner.__module__}.{owner.__qualname__}.{name}"


@cache
def reaches() -> dict[str, set[str]]:
    """Private parts that the library uses, and the files that do. Attributes are found by their last name alone."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in library_files()}
    own = set().union(*map(names_defined, trees.values()))
    found: dict[str, set[str]] = {}
    private_of, file_of = {}, {}
    for path, tree in trees.items():
        file = path.relative_to(ROOT).as_posix()
        for part in private_imports(tree):
            found.setdefault(part, set()).add(file)
        for name in private_attributes(tree, own):
            parts = [part for part in LISTED if part.endswith(f".{name}")]
            found.setdefault(parts[0] if len(parts) == 1 else f"?.{name}", set()).add(file)
        module = "mimae." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for name, private in names_in_classes(tree).items():
            our_class = getattr(importlib.import_module(module.removesuffix(".__init__")), name)
            private_of[our_class], file_of[our_class] = private, file
    for our_class in private_of:
        for each, part in overrides(our_class, private_of):
            found.setdefault(part, set()).add(file_of[each])
    return found


def test_every_private_part_that_the_library_uses_is_listed_with_its_files():
    assert reaches() == LISTED


def test_each_line_says_why():
    lines = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert len(lines) == len(LISTED)  # none is written so that it is not read, none twice
    assert all(re.fullmatch(r"\| `[\w.]+` \| (`[\w./]+`(, )?)+ \| [A-Z`].+\. \|", line) for line in lines)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from datasets.utils.file_utils import xopen", {"datasets.utils.file_utils.xopen"}),
        ("def f():\n    from torch._dynamo import reset", {"torch._dynamo.reset"}),
        ("from transformers import initialization as init", {"transformers.initialization"}),
        ("import timm\ntimm.layers.DropPath", {"timm.layers"}),
        ("import huggingface_hub.utils._http", {"huggingface_hub.utils._http"}),
        ("import transformers\ntransformers.Trainer", set()),
        ("from transformers import Trainer\nfrom timm.optim import Lars\nfrom torch.nn import functional", set()),
        ("from mimae.data import _anything\nfrom ._ours import _x", set()),
    ],
)
def test_a_private_import_is_found(code, found):
    # negative control of the reader of imports
    assert set(private_imports(ast.parse(code))) == found


def test_a_private_attribute_and_an_override_are_found():
    # negative control of the two other readers
    code = "class A(Trainer):\n    def _ours(self):\n        self._save(x._row._replace(a=1)); getattr(x, '_state')"
    tree = ast.parse(code)
    assert set(private_attributes(tree, names_defined(tree))) == {"_save", "_row", "_state"}
    assert names_in_classes(ast.parse("class A:\n    _x = 1\n    def _f(self):\n        _y = 2")) == {
        "A": {"_x", "_f"}
    }

    class Mixin:
        _compute = None

    class Metric(Mixin, evaluate.Metric):
        pass

    assert list(overrides(Metric, {Mixin: {"_compute", "_ours"}})) == [
        (Mixin, "evaluate.module.EvaluationModule._compute")
    ]


Check = Callable[[object], None]


def takes(*positional: str, **by_name: str) -> Check:
    """A check that a function or class can be called as we call it."""
    return lambda part: inspect.signature(part).bind(*positional, **by_name)


def takes_names(names: str, *positional: str) -> Check:
    return takes(*positional, **dict.fromkeys(names.split()))


def is_a(*bases: type) -> Check:
    def check(part: object) -> None:
        assert isinstance(part, type)
        assert issubclass(part, bases)

    return check


def has_parts(make: Callable[[type], object], names: str) -> Check:
    """A check that what a class makes has the attributes that our code uses."""

    def check(part: type) -> None:
        made = make(part)
        assert isinstance(made, part)
        assert not [name for name in names.split() if not hasattr(made, name)]

    return check


def can_be_set_to(*values: object) -> Check:
    """A check that a class's attribute has such a value or a kin one, so that ours means what it did."""

    def check(part: object) -> None:
        assert isinstance(part, (*map(type, values), types.NoneType))

    return check


def small_vit() -> ViTMAEConfig:
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "decoder_num_hidden_layers": 1}
    widths = {"hidden_size": 8, "intermediate_size": 8, "decoder_hidden_size": 8, "decoder_intermediate_size": 8}
    heads = {"decoder_num_attention_heads": 2, "attn_implementation": "sdpa"}
    return ViTMAEConfig(image_size=8, patch_size=4, **sizes, **widths, **heads)


def small_swin() -> SwinConfig:
    return SwinConfig(image_size=16, patch_size=4, embed_dim=4, depths=[1, 1], num_heads=[1, 1], window_size=2)


def check_registration(register: Callable) -> None:
    takes("type", ["renamings"], overwrite="x")(register)
    mapping = resolve("transformers.conversion_mapping.get_checkpoint_conversion_mapping")
    register("a-type-of-this-test", [], overwrite=True)
    assert mapping("a-type-of-this-test") == []


def check_swin_renamings(get_mapping: Callable) -> None:
    assert get_mapping("swin")  # SwinModel's own


def check_relative_imports(get_files: Callable, folder: Path) -> None:
    (folder / "a.py").write_text("from .b import x\n")
    (folder / "b.py").write_text("from .c import x\n")
    (folder / "c.py").write_text("x = 1\n")
    assert {Path(name).name for name in get_files(folder / "a.py")} == {"b.py", "c.py"}


def check_initialization(init: types.ModuleType) -> None:
    names = "constant_ copy_ kaiming_normal_ kaiming_uniform_ normal_ ones_ trunc_normal_ uniform_ zeros_"
    assert not [name for name in names.split() if not hasattr(init, name)]
    new, loaded = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    loaded._is_hf_initialized = True
    for parameter in (new, loaded):
        init.zeros_(parameter)
    assert new.tolist() == [0, 0]
    assert loaded.tolist() == [1, 1]


def check_attention_functions(functions: object) -> None:
    assert functions.get_interface("eager", max) is max
    takes_names("dropout scaling", "module", "query", "key", "value", None)(functions.get_interface("sdpa", max))


def check_drop_path(drop_path: type[nn.Module]) -> None:
    layer, ones = drop_path(0.5), torch.ones(64, 3)
    kept = layer(ones)
    assert set(kept.unique().tolist()) == {0, 2}  # a sample's path as a whole
    assert (kept == kept[:, :1]).all()
    assert torch.equal(layer.eval()(ones), ones)


def check_swin_encoder(encoder: type[nn.Module]) -> None:
    made = encoder(small_swin(), (4, 4))
    assert made.layers[0].downsample is not None
    assert made.layers[1].downsample is None
    takes_names("always_partition return_dict", "hidden_states", (4, 4))(made.forward)


def check_relative_position_index(method: Callable) -> None:
    model = SwinModel(small_swin())
    modules = [module for module in model.modules() if hasattr(module, method.__name__)]
    assert len(modules) == 2  # one in each block
    for module in modules:
        assert torch.equal(module._create_relative_position_index().view(-1), module.relative_position_index)


def check_sincos(positions: Callable) -> None:
    table = positions(2, 3, embed_dim=8, cls_token=True)
    assert table.shape == (1 + 6, 8)
    assert not table[0].any()
    rows, columns = table[1:].unflatten(0, (2, 3)).chunk(2, dim=-1)  # (2, 3, 4) each
    assert torch.equal(rows, rows[:, :1].expand_as(rows))
    assert torch.equal(columns, columns[:1].expand_as(columns))


def check_eager_attention(attention: Callable) -> None:
    query = torch.randn(1, 2, 3, 4)
    module = types.SimpleNamespace(training=False, num_key_value_groups=1)
    output, weights = attention(module, query, query, query, None, dropout=0.0, scaling=0.5)
    expected = nn.functional.scaled_dot_product_attention(query, query, query, scale=0.5)
    torch.testing.assert_close(output, expected.transpose(1, 2))
    assert weights.shape == (1, 2, 3, 3)


def check_tuples(decorator: Callable) -> None:
    output = BaseModelOutput(last_hidden_state=torch.ones(1))
    owner = types.SimpleNamespace(config=types.SimpleNamespace(return_dict=True))
    forward = decorator(lambda self, **kwargs: output)
    assert forward(owner) is output
    assert forward(owner, return_dict=False) == output.to_tuple()


def check_attention_of_config(_: object) -> None:
    config = PreTrainedConfig()
    config._attn_implementation = "eager"
    assert config._attn_implementation == "eager"


def check_posterize(posterize: Callable) -> None:
    # of the operations that RandAugment draws from some are this very function
    transform = rand_augment_transform("rand-m9-mstd0.5-inc1", {})
    assert posterize in [operation.aug_fn for operation in transform.ops]
    posterize(Image.new("RGB", (2, 2)), 4)


def check_mixup_target(mixup_target: Callable) -> None:
    smooth = mixup_target(torch.tensor([1]), 4, smoothing=0.4)
    torch.testing.assert_close(smooth.float().cpu(), torch.tensor([[0.1, 0.7, 0.1, 0.1]]))


def check_random_erasing(erasing: type) -> None:
    erased = erasing(1.0, mode="pixel", device="cpu")(torch.zeros(1, 16, 16))
    assert 0 < (erased != 0).sum() < 16 * 16


def check_type_validator(validator: Callable) -> None:
    validator("flag", 1, int | None)
    with pytest.raises(TypeError, match="flag"):
        validator("flag", "1", int | None)


def check_path_and_options(prepare: Callable) -> None:
    config = resolve("datasets.DownloadConfig")(storage_options={"https": {"client_kwargs": {"timeout": 5}}})
    path, options = prepare("https://example.org/a.tar", config)
    assert path == "https://example.org/a.tar"
    assert options["https"]["client_kwargs"]["timeout"] == 5


def check_local_paths(is_local: Callable) -> None:
    assert is_local("/a/b")
    assert not is_local("https://example.org/b")
    assert not is_local("hf://datasets/a/b")


def check_xopen(xopen: Callable, folder: Path) -> None:
    (folder / "a").write_bytes(b"bytes")
    with xopen(str(folder / "a"), "rb") as file:
        assert file.read() == b"bytes"


def check_folder_of_metric(build: Callable) -> None:
    takes("self")(build)
    assert "self._data_dir_root" in inspect.getsource(build)
    assert "_build_data_dir()" in inspect.getsource(resolve("evaluate.module.EvaluationModule.__init__"))


def check_kind_of_bools(string_to_bool: Callable) -> None:
    parser = HfArgumentParser(dataclasses.make_dataclass("Group", [("flag", bool, False)]))
    assert [action.type for action in parser._actions if action.dest == "flag"] == [string_to_bool]


def first_block() -> nn.Module:
    return SwinModel(small_swin()).encoder.layers[0].blocks[0]


def called_in_trainer(*positional: str) -> Check:
    def check(method: Callable) -> None:
        takes("self", *positional)(method)
        assert f"self.{method.__name__}(" in inspect.getsource(Trainer)

    return check


SWIN = "transformers.models.swin.modeling_swin"
VIT = "transformers.models.vit_mae.modeling_vit_mae"
DETECTION = "torchvision.models.detection"
PROPOSALS = (
    "anchor_generator head fg_iou_thresh bg_iou_thresh batch_size_per_image positive_fraction pre_nms_top_n "
    "post_nms_top_n nms_thresh"
)
REGIONS = (
    "box_roi_pool box_head box_predictor fg_iou_thresh bg_iou_thresh batch_size_per_image positive_fraction "
    "bbox_reg_weights score_thresh nms_thresh detections_per_img mask_roi_pool mask_head mask_predictor"
)


def of_config(part: type) -> nn.Module:
    """A ViT's module, each made from its configuration alone."""
    return part(small_vit())


# instance attributes have no object that could be looked up: those checks get None
OF_INSTANCES = {
    "evaluate.module.EvaluationModule._data_dir_root",
    "transformers.configuration_utils.PreTrainedConfig._attn_implementation",
}
CHECKS: dict[str, Callable] = {
    "datasets.config": lambda config: (
        config.STREAMING_READ_MAX_RETRIES + config.STREAMING_READ_RETRY_INTERVAL,
        Path(config.HF_DATASETS_CACHE),
    ),
    "datasets.utils.file_utils._prepare_path_and_storage_options": check_path_and_options,
    "datasets.utils.file_utils.is_local_path": check_local_paths,
    "datasets.utils.file_utils.xopen": check_xopen,
    "evaluate.module.EvaluationModule._build_data_dir": check_folder_of_metric,
    "evaluate.module.EvaluationModule._compute": takes_names("predictions references", "self"),
    "evaluate.module.EvaluationModule._data_dir_root": lambda _: check_folder_of_metric(
        resolve("evaluate.module.EvaluationModule._build_data_dir")
    ),
    "evaluate.module.EvaluationModule._info": takes("self"),
    "huggingface_hub.constants": lambda constants: constants.ENDPOINT.rstrip("/"),
    "huggingface_hub.dataclasses.type_validator": check_type_validator,
    "timm.data.auto_augment.posterize": check_posterize,
    "timm.data.mixup.mixup_target": check_mixup_target,
    "timm.data.random_erasing.RandomErasing": check_random_erasing,
    "torchvision.models.convnext.LayerNorm2d": is_a(nn.LayerNorm),
    f"{DETECTION}.anchor_utils.AnchorGenerator": takes(((32,),), ((1.0,),)),
    f"{DETECTION}.faster_rcnn.FastRCNNConvFCHead": takes((8, 7, 7), [8], [8], norm_layer=nn.BatchNorm2d),
    f"{DETECTION}.faster_rcnn.FastRCNNPredictor": has_parts(lambda part: part(8, 2), "cls_score bbox_pred"),
    f"{DETECTION}.image_list.ImageList": takes("tensors", [(8, 8)]),
    f"{DETECTION}.mask_rcnn.MaskRCNNHeads": takes(8, [8], dilation=1, norm_layer=nn.BatchNorm2d),
    f"{DETECTION}.mask_rcnn.MaskRCNNPredictor": has_parts(lambda part: part(8, 8, 2), "mask_fcn_logits"),
    f"{DETECTION}.roi_heads.RoIHeads": takes_names(REGIONS),
    f"{DETECTION}.rpn.RPNHead": takes(8, num_anchors=3, conv_depth=2),
    f"{DETECTION}.rpn.RegionProposalNetwork": takes_names(PROPOSALS),
    "transformers.configuration_utils.PreTrainedConfig._attn_implementation": check_attention_of_config,
    "transformers.conversion_mapping.WeightRenaming": takes(r"encoder\.layer\.", "layers."),
    "transformers.conversion_mapping.get_checkpoint_conversion_mapping": check_swin_renamings,
    "transformers.conversion_mapping.register_checkpoint_conversion_mapping": check_registration,
    "transformers.dynamic_module_utils.get_relative_import_files": check_relative_imports,
    "transformers.hf_argparser.string_to_bool": check_kind_of_bools,
    "transformers.initialization": check_initialization,
    "transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS": check_attention_functions,
    "transformers.modeling_utils.PreTrainedModel._init_weights": takes("self", "module"),
    "transformers.modeling_utils.PreTrainedModel._keep_in_fp32_modules_strict": can_be_set_to((), [], set()),
    "transformers.modeling_utils.PreTrainedModel._keys_to_ignore_on_load_unexpected": can_be_set_to((), [], set()),
    "transformers.modeling_utils.PreTrainedModel._supports_sdpa": can_be_set_to(True),
    "transformers.models.dinov2.modeling_dinov2.Dinov2DropPath": check_drop_path,
    f"{SWIN}.SwinDropPath": check_drop_path,
    f"{SWIN}.SwinEmbeddings": has_parts(
        lambda part: part(small_swin(), use_mask_token=True), "patch_embeddings patch_grid norm dropout mask_token"
    ),
    f"{SWIN}.SwinEncoder": check_swin_encoder,
    f"{SWIN}.SwinLayer": has_parts(lambda part: first_block(), "drop_path mlp input_resolution shift_size"),
    f"{SWIN}.SwinMLP": has_parts(lambda part: first_block().mlp, "fc1 activation_fn fc2"),
    f"{SWIN}.SwinPreTrainedModel": is_a(nn.Module),
    f"{SWIN}.SwinRelativePositionBias": is_a(nn.Module),
    f"{SWIN}.SwinRelativePositionBias._create_relative_position_index": check_relative_position_index,
    f"{VIT}.ViTMAEAttention": has_parts(
        of_config, "q_proj k_proj v_proj o_proj num_attention_heads head_dim attention_dropout scaling config"
    ),
    f"{VIT}.ViTMAEDecoder": has_parts(
        lambda part: part(small_vit(), 4), "decoder_embed mask_token decoder_pos_embed decoder_layers decoder_pred"
    ),
    f"{VIT}.ViTMAEEmbeddings": has_parts(of_config, "patch_embeddings cls_token position_embeddings config"),
    f"{VIT}.ViTMAELayer": has_parts(of_config, "attention layernorm_before layernorm_after mlp dropout"),
    f"{VIT}.ViTMAEPreTrainedModel": is_a(nn.Module),
    f"{VIT}.build_2d_sinusoidal_position_embedding": check_sincos,
    f"{VIT}.eager_attention_forward": check_eager_attention,
    "transformers.trainer.Trainer._load_from_checkpoint": called_in_trainer("folder", "model"),
    "transformers.trainer.Trainer._save_checkpoint": called_in_trainer("model", "trial"),
    "transformers.trainer_utils.EvalLoopOutput": is_a(tuple),
    "transformers.trainer_utils.PREFIX_CHECKPOINT_DIR": can_be_set_to("checkpoint"),
    "transformers.utils.cached_file": takes("folder", "file"),
    "transformers.utils.generic.can_return_tuple": check_tuples,
    "transformers.utils.output_capturing.capture_outputs": takes(tie_last_hidden_states=False),
}


def test_every_listed_part_is_checked():
    assert set(CHECKS) == set(LISTED)


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_a_private_part_is_as_we_need_it(name, tmp_path):
    part = None if name in OF_INSTANCES else resolve(name)
    check = CHECKS[name]
    check(part, tmp_path) if "folder" in inspect.signature(check).parameters else check(part)


def test_checks_fail_for_a_part_that_is_not_as_we_need_it():
    # negative control of the kinds of checks
    with pytest.raises(TypeError):
        takes_names(REGIONS)(MultiScaleRoIAlign)
    with pytest.raises(AssertionError):
        has_parts(of_config, "mlp attention")(resolve(f"{VIT}.ViTMAEAttention"))
    with pytest.raises(AssertionError):
        can_be_set_to(())({"a": 1})
    with pytest.raises(AttributeError):
        resolve("transformers.trainer_utils.EvalLoopOutputs")
