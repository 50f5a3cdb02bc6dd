"""Checkpoints in the formats of others, and theirs in ours: `python -m mimae.hub.export CHECKPOINT OUT --to FORMAT`.

    vit         a folder with a stock ViTModel, or ViTForImageClassification, that transformers loads by itself
    swin        of a Swin, the same: a stock SwinModel, or SwinForImageClassification
    timm        OUT.safetensors or OUT.pth for `timm.create_model(…, checkpoint_path=OUT)`, or a folder as its Hub has
    mae         OUT.pth with the names of the official MAE, which ViTDet and mmsegmentation read
    mimae       a folder of this project, from whatever CHECKPOINT is
    detectron2  OUT.pth with the encoder under the names of detectron2's ViTDet, to start a detector there

CHECKPOINT is a folder or a Hub name of this project, of a ViTMAE or of a stock Swin, or a file with the names of the
official MAE or of timm. What is written is read back as its users will, and compared with the checkpoint on random
images, before it gets its name.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import cached_file

from ..families.family import FAMILIES
from ..families.registry import family_of
from ..families.warm_start import load_and_tell
from ..modeling_mim import MIMPreTrainedMixin
from .formats import (
    PROCESSOR_NAME,
    ExportError,
    Format,
    Outputs,
    Source,
    example_images,
    formats,
    formats_of,
    official_outputs,
    outputs,
)
from .official_mae import PLAIN_MAE, model_from_official, read_official_file

TOLERANCE = 1e-5
# flags, and arguments of `load_source`
KNOWN_OF_A_FILE = ("image_size", "num_attention_heads", "decoder_num_attention_heads")


def load_source(checkpoint: str | os.PathLike[str], **known: Any) -> Source:
    """A checkpoint of this project, of a ViTMAE or Swin in any layout, or a file of an official MAE or of timm's ViT.

    Parameters in half precision become float32. The MAE and the SimMIM of others are read as what they are, with one
    mask and no information terms.

    Args:
        checkpoint: folder or Hub name, or the `.pth` or `.safetensors` file.
        known: of a file, `image_size`, `num_attention_heads` and `decoder_num_attention_heads`, where its shapes
            do not tell them; see `config_from_official`.

    Raises:
        ValueError: a model of another kind, parameters that are missing or do not fit; see also `read_official_file`
            and `config_from_official`.
        OSError: there is no such checkpoint.
    """
    path = Path(checkpoint)
    if path.is_file():
        return _load_official(path, known)
    if any(value is not None for value in known.values()):
        raise ValueError(f"{', '.join(known)} are for single files; the config.json of {checkpoint} tells them")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"{checkpoint} holds no config.json: name the folder of a model, or a checkpoint-* in it")
    return _load_pretrained(checkpoint)


def export(source: Source, out: str | os.PathLike[str], to: str, *, overwrite: bool = False) -> tuple[float, str]:
    """Write a model in another format, read it back, and compare the two before it gets its name.

    Differences are relative to the largest output of a kind: features before a last norm are large, and a new
    classifier's logits are so small that anything would be near them.

    Args:
        out: a folder; a `.pth` file for "mae" and "detectron2"; either, or a `.safetensors` file, for "timm".
        to: one of `formats`.
        overwrite: replace an earlier export, but no folder that holds anything else.

    Returns:
        The largest difference of an output, relative to the largest output of its kind, at most `TOLERANCE`; and
        Python text that loads the export.

    Raises:
        ExportError: see the message; `out` is untouched.
        OSError: `out` cannot be written.
    """
    out = Path(out)
    target = _format(source, to)
    _check_out(out, to, target.kinds, source.origin, overwrite)
    images = example_images(source.model)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.partial-") as scratch:
        partial = Path(scratch) / out.name
        target.write(source, partial)
        try:
            found = target.read_back(source, partial, images)
        except RuntimeError as error:
            raise ExportError(f"the export does not load ({error}): {out} was not written") from error
        expected = outputs(source.model, images)
        difference = _worst([source.difference, *(largest_difference(expected, each) for each in found)])
        if not difference <= TOLERANCE:  # so written, it refuses NaN
            raise ExportError(
                f"outputs of the export differ by {difference:.1e} of the largest, which is more than the "
                f"{TOLERANCE:.0e} of rounding: {out} was not written"
            )
        if out.exists():
            out.rename(Path(scratch) / "replaced")
        partial.rename(out)
    return difference, target.usage(source, out)


def largest_difference(expected: Outputs, found: Outputs) -> float:
    """max |a - b| / max |a| of the worst of the outputs found; NaN if there is one in them."""

    def relative(name: str) -> float:
        scale = expected[name].abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        return float((found[name] - expected[name]).abs().max() / scale)

    return _worst(map(relative, found))


def _worst(differences: Iterable[float]) -> float:
    return float(torch.tensor(list(differences)).max())  # Python's max passes NaN over


def _load_official(path: Path, known: Mapping[str, Any]) -> Source:
    state = read_official_file(path)
    try:
        source = Source(path, model_from_official(state, **known))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    images = example_images(source.model)
    difference = largest_difference(outputs(source.model, images), official_outputs(source, state, images))
    return replace(source, difference=difference)


def _load_pretrained(checkpoint: str | os.PathLike[str]) -> Source:
    try:
        config, _ = PreTrainedConfig.get_config_dict(checkpoint)
    except OSError as error:
        raise OSError(f"{checkpoint} is no model here, nor one on the Hub that can be reached: {error}") from error
    architecture = (config.get("architectures") or ["a model without a name"])[0]
    ours = {name: each for family in FAMILIES.values() for name, each in family.model_classes.items()}
    stock = {name: each for family in FAMILIES.values() for name, each in family.stock_classes.items()}
    if architecture not in ours | stock:
        raise ValueError(f"{checkpoint} holds {architecture}; what can be exported is {', '.join(ours | stock)}")
    model_class = (ours | stock)[architecture]
    try:
        known = {"config": _plain_config(checkpoint, model_class)} if architecture in stock else {}
        model, info = load_and_tell(model_class, checkpoint, dtype=torch.float32, **known)
    except (RuntimeError, StrictDataclassError, SafetensorError) as error:
        raise ValueError(f"{checkpoint}: a config.json or parameters that cannot be used ({error})") from error
    if missing := sorted(name for name in info["missing_keys"] if not name.startswith("mi_gate.")):
        raise ValueError(f"{checkpoint} lacks {len(missing)} parameters of a {architecture}, {missing[0]} among them")
    return Source(Path(checkpoint), model.eval(), _processor_file(checkpoint))


def _plain_config(checkpoint: str | os.PathLike[str], model_class: type[MIMPreTrainedMixin]) -> PreTrainedConfig:
    """Of a stock model as one of ours without information terms; what its config.json leaves out is stock, too."""
    fields, family = AutoConfig.from_pretrained(checkpoint).to_dict(), family_of(model_class)
    is_classifier = model_class is family.classification_class
    return family.config_class.from_dict({**family.stock_fields(fields, is_classifier), **fields, **PLAIN_MAE})


def _processor_file(checkpoint: str | os.PathLike[str]) -> Path | None:
    try:
        found = cached_file(checkpoint, PROCESSOR_NAME)
    except OSError:
        return None
    return None if found is None else Path(found)


def _format(source: Source, to: str) -> Format:
    if to not in formats():
        raise ExportError(f"no format {to!r}; there are {', '.join(formats())}")
    suitable = formats_of(family_of(type(source.model)))
    if to not in suitable:
        raise ExportError(
            f"--to {to} has no place for a {type(source.model).__name__}: export it with --to {' or '.join(suitable)}"
        )
    return suitable[to]


def _check_out(out: Path, to: str, kinds: tuple[str, ...], origin: Path, overwrite: bool) -> None:
    kind = out.suffix if out.suffix in (".pth", ".safetensors") else ""
    if kind not in kinds:
        names = " or ".join(f"a {each} file" if each else "a folder" for each in kinds)
        raise ExportError(f"--to {to} writes {names}; {out} is no name for that")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if out.resolve() == origin.resolve():
        raise ExportError(f"{out} is the checkpoint itself: choose another name")
    if not overwrite:
        raise ExportError(f"{out} exists: choose another name, or replace an earlier export with --overwrite")
    if out.is_dir() == bool(kind) or (out.is_dir() and not _is_export(out)):
        raise ExportError(f"{out} is not what --to {to} writes, and is not replaced: choose another name")


def _is_export(folder: Path) -> bool:
    model = {"config.json", "model.safetensors"}
    names = {path.name for path in folder.iterdir() if path.suffix != ".py"}
    return model <= names <= model | {PROCESSOR_NAME}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = _parser().parse_args(argv)
    known = {name: getattr(args, name) for name in KNOWN_OF_A_FILE}
    try:
        difference, usage = export(load_source(args.checkpoint, **known), args.out, args.to, overwrite=args.overwrite)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(f"wrote {args.out}; outputs differ by at most {difference:.1e} of the largest\n\n{usage}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mimae.hub.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder, Hub name, or file of an official MAE")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder or file to write")
    parser.add_argument("--to", choices=formats(), required=True, help="format to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    official = parser.add_argument_group("of a file, where its shapes do not tell")
    official.add_argument("--num_attention_heads", type=int, help="of the encoder, where its width is not standard")
    official.add_argument("--decoder_num_attention_heads", type=int, help="of the decoder, likewise")
    official.add_argument("--image_size", type=int, nargs=2, metavar=("H", "W"), help="of images that are not square")
    return parser


if __name__ == "__main__":
    sys.exit(main())
