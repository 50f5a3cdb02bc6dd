"""Masks keep their classes from the file to the crop; what does not belong together is named, with the remedy."""

import io
import json
import logging
import pickle
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from data_helpers import encode
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from torchvision import tv_tensors

from mimae.data.images.decoding import BadImageError, decode_image
from mimae.data.images.masks import decode_mask
from mimae.data.images.segmentation_augmentation import (
    FittingResize,
    MixedCrop,
    PhotometricDistortion,
    segmentation_evaluation_transform,
    segmentation_training_transform,
)
from mimae.data.scenes import SceneComposer, compose_split, photographs
from mimae.data.sources.base import ArraySource
from mimae.data.sources.opening import open_image_source
from mimae.data.sources.segmentation import SegmentationSource, open_segmentation_source

HEIGHT, WIDTH = 10, 14
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
IMAGE = ImageFeature()
SEVEN_BY_FIVE = np.arange(35, dtype=np.uint8).reshape(5, 7) % 4


def picture(height=HEIGHT, width=WIDTH, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def classes(num_classes, height=HEIGHT, width=WIDTH, seed=0):
    return np.random.default_rng(seed).integers(0, num_classes, (height, width), dtype=np.uint8)


def png(values, **options):
    return encode(Image.fromarray(values), "PNG", **options)


def source_of(mask, image=None, num_classes=4, **options):
    """A source of one row, whose bytes are as given."""
    both = ArraySource(np.zeros((1, 1, 1), dtype=np.uint8), None, name="one")
    source = SegmentationSource(both, both, class_names=[str(k) for k in range(num_classes)], **options)
    return source, (image or encode(picture(5, 7), "PNG"), mask)


def decoded(mask, image=None, **options):
    source, row = source_of(mask, image, **options)
    return source.decode(0, row, 3)


def write_pairs(folder, kind="annotations", split="training", count=3, num_classes=4):
    for part in ("images", kind):
        (folder / part / split).mkdir(parents=True)
    for number in range(count):
        name = f"ADE_{number:03d}"
        (folder / "images" / split / f"{name}.jpg").write_bytes(encode(picture(seed=number)))
        (folder / kind / split / f"{name}.png").write_bytes(png(classes(num_classes, seed=number)))
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    for stream, split in enumerate(("train", "validation")):
        sprites = open_image_source(split="test")
        composer = SceneComposer(sprites, photographs(held_out=False), scene_size=64, seed=0, stream=stream)
        compose_split(composer, folder, split, 8)
    return folder


# Masks


def test_masks_of_every_kind_keep_their_numbers():
    palette = Image.new("P", (7, 5))
    palette.putdata(SEVEN_BY_FIVE.ravel().tolist())
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    files = {
        "grey levels": png(SEVEN_BY_FIVE),
        "palette indices": encode(palette, "PNG"),
        "two bits a pixel": encode(palette, "PNG", bits=2),
        "sixteen bits": png(SEVEN_BY_FIVE.astype(np.uint16)),
    }
    for kind, content in files.items():
        mask = decoded(content)[1]
        assert mask.numpy().tolist() == SEVEN_BY_FIVE.tolist(), kind
        assert (type(mask), mask.dtype) == (tv_tensors.Mask, torch.uint8)
    one_bit = png(SEVEN_BY_FIVE % 2 == 1)
    assert np.array_equal(decoded(one_bit)[1].numpy(), SEVEN_BY_FIVE % 2)


def test_grey_levels_of_few_bits_are_not_spread():
    """Pillow writes no such file: it is made by hand, of two bits a pixel, one row of 0, 1, 2, 3."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 4, 1, 2, 0, 0, 0, 0)
    data = zlib.compress(bytes([0, 0b00011011]))
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    assert np.asarray(Image.open(io.BytesIO(content))).tolist() == [[0, 85, 170, 255]]
    assert decode_mask(content, "x.png").tolist() == [[0, 1, 2, 3]]


def test_zero_is_ignored_and_the_rest_counted_from_one_on_request():
    values = np.array([[0, 1, 2, 3, 4, 255, 1]] * 5, dtype=np.uint8)
    assert decoded(png(values), reduce_zero_label=True)[1][0].tolist() == [255, 0, 1, 2, 3, 255, 0]
    values[values == 4] = 0
    assert decoded(png(values))[1][0].tolist() == [0, 1, 2, 3, 0, 255, 1]


@pytest.mark.parametrize(("value", "options"), [(4, {}), (254, {}), (5, {"reduce_zero_label": True}), (300, {})])
def test_a_class_outside_the_list_is_refused_by_name(value, options):
    values = SEVEN_BY_FIVE.astype(np.uint16)
    values[2, 3] = value
    with pytest.raises(ValueError, match=rf"one:0 has a pixel of value {value}, but the 4 .*--reduce_zero_label"):
        decoded(png(values), **options)


def test_a_mask_in_colour_is_refused_by_name():
    for mode in ("RGB", "RGBA"):
        with pytest.raises(ValueError, match=r"one:0 is a mask in colour .*convert") as caught:
            decoded(encode(picture(5, 7).convert(mode), "PNG"))
        assert not isinstance(caught.value, BadImageError)  # all of the set will be so: nothing to replace it by


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (b"", "its mask is empty"),
        (b"no image at all", "no PNG file"),
        (png(classes(4, 50, 50))[:200], "its mask: "),
        (png(SEVEN_BY_FIVE[:, :6]), "its mask is 6 x 5 pixels, the image 7 x 5"),
        (png(SEVEN_BY_FIVE.T), "its mask is 5 x 7 pixels"),
    ],
)
def test_what_cannot_be_decoded_or_fitted_is_a_bad_image(mask, reason):
    with pytest.raises(BadImageError, match=reason):
        decoded(mask)


def test_a_bad_image_beside_a_good_mask_is_a_bad_image():
    source, (_, mask) = source_of(png(SEVEN_BY_FIVE))
    with pytest.raises(BadImageError, match="the file is empty"):
        source.decode(0, (b"", mask), 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_of_the_stored_pixels_is_turned_with_them(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    red = Image.fromarray(SEVEN_BY_FIVE * 80)
    image = encode(red.convert("RGB").resize((28, 20), Image.Resampling.NEAREST), "PNG", exif=exif)
    stored = SEVEN_BY_FIVE.repeat(4, 0).repeat(4, 1)
    upright = decode_image(image, 3)[0].numpy() // 80
    for mask in (stored, upright) if orientation > 4 else (upright,):
        pixels, target = decoded(png(mask), image)
        assert pixels.shape[1:] == target.shape
        assert np.array_equal(target.numpy(), upright)


# Where pairs come from


@pytest.mark.parametrize(("kind", "split"), [("annotations", "training"), ("masks", "train"), ("masks", "Train")])
def test_pairs_are_found_in_the_usual_layouts(tmp_path, kind, split):
    source = open_segmentation_source(train_dir=write_pairs(tmp_path, kind, split), num_classes=4)
    assert (len(source), source.class_names, source.block_sizes.tolist()) == (3, ["0", "1", "2", "3"], [3])
    for index in range(3):
        image, mask = source.decode(index, source.read(index), 3)
        assert (type(image), image.dtype, tuple(image.shape)) == (tv_tensors.Image, torch.uint8, (3, HEIGHT, WIDTH))
        assert np.array_equal(mask.numpy(), classes(4, seed=index))
        assert f"ADE_00{index}.jpg" in source.describe(index)


def test_scenes_are_read_with_their_names_and_other_files_do_not_confuse(scenes):
    source = open_segmentation_source(train_dir=scenes, split="validation")
    names = json.loads((scenes / "annotations" / "instances_validation.json").read_text())["categories"]
    assert source.class_names == ["background", *(entry["name"] for entry in names)]
    expected = Image.open(scenes / "masks" / "validation" / "000005.png")
    assert np.array_equal(source.decode(5, source.read(5), 3)[1].numpy(), np.asarray(expected))
    without_background = open_segmentation_source(train_dir=scenes, reduce_zero_label=True)
    assert without_background.class_names == source.class_names[1:]


def test_a_folder_without_splits_is_for_training(tmp_path):
    write_pairs(tmp_path, "masks", ".")
    assert len(open_segmentation_source(train_dir=tmp_path, num_classes=4)) == 3
    with pytest.raises(ValueError, match="no split 'validation'"):
        open_segmentation_source(train_dir=tmp_path, split="validation", num_classes=4)


def test_a_source_can_be_pickled_and_reads_the_same(scenes):
    source = open_segmentation_source(train_dir=scenes)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read(3) == source.read(3)
    assert copy.fingerprint == source.fingerprint


def test_the_fingerprint_is_that_of_the_content_wherever_it_lies(tmp_path, scenes):
    source = open_segmentation_source(train_dir=scenes)
    shutil.copytree(scenes, tmp_path / "copy")
    assert open_segmentation_source(train_dir=tmp_path / "copy").fingerprint == source.fingerprint
    mask = tmp_path / "copy" / "masks" / "train" / "000000.png"
    mask.write_bytes(png(np.zeros((64, 64), dtype=np.uint8)))
    others = [
        open_segmentation_source(train_dir=tmp_path / "copy"),
        open_segmentation_source(train_dir=scenes, reduce_zero_label=True),
        open_segmentation_source(train_dir=scenes, split="validation"),
    ]
    assert len({source.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_images_and_masks_without_each_other_are_named(tmp_path):
    write_pairs(tmp_path, count=5)
    for number in (0, 1):
        (tmp_path / "annotations" / "training" / f"ADE_00{number}.png").unlink()
    (tmp_path / "images" / "training" / "ADE_004.jpg").unlink()
    message = (
        r"2 image\(s\) without a mask, .*ADE_000\.jpg.*ADE_001\.jpg.*; 1 mask\(s\) without an image.*ADE_004\.png"
    )
    with pytest.raises(ValueError, match=message):
        open_segmentation_source(train_dir=tmp_path, num_classes=4)


def test_two_images_of_one_name_are_refused(tmp_path):
    write_pairs(tmp_path)
    (tmp_path / "images" / "training" / "ADE_000.png").write_bytes(png(classes(4)))
    with pytest.raises(ValueError, match=r"ADE_000\.jpg and .*ADE_000\.png would share one mask"):
        open_segmentation_source(train_dir=tmp_path, num_classes=4)


def test_a_folder_without_the_parts_says_which_is_missing(tmp_path):
    with pytest.raises(ValueError, match="images is not a folder"):
        open_segmentation_source(train_dir=tmp_path)
    (tmp_path / "images" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="no folder of masks"):
        open_segmentation_source(train_dir=tmp_path)
    (tmp_path / "masks" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"split 'train' .* is empty"):
        open_segmentation_source(train_dir=tmp_path)
    with pytest.raises(ValueError, match=r"no split 'test'; it has \['train'\]"):
        open_segmentation_source(train_dir=tmp_path, split="test")


def test_there_must_be_one_place(tmp_path):
    for places in ({}, {"train_dir": "a", "dataset_name": "b"}):
        with pytest.raises(ValueError, match="by one of --dataset_name"):
            open_segmentation_source(**places)


# Parquet files


def write_parquet(path, columns=("image", "annotation"), kinds=(IMAGE, IMAGE), count=3):
    contents = [encode(picture(seed=row)) for row in range(count)], [png(classes(4, seed=row)) for row in range(count)]
    cells = [
        [{"bytes": content, "path": None} for content in column] if isinstance(kind, ImageFeature) else [0] * count
        for column, kind in zip(contents, kinds, strict=True)
    ]
    features = Features({**dict(zip(columns, kinds, strict=True)), "scene": Value("string")})
    data = dict(zip(columns, cells, strict=True)) | {"scene": ["kitchen"] * count}
    Dataset.from_dict(data, features=features).to_parquet(path)
    return str(path)


@pytest.mark.parametrize("columns", [("image", "annotation"), ("picture", "label"), ("photo", "mask")])
def test_columns_of_a_data_set_are_found_and_read_undecoded(tmp_path, columns):
    path = write_parquet(tmp_path / "a.parquet", columns)
    source = open_segmentation_source(data_files=path, num_classes=4, cache_dir=tmp_path / "cache")
    assert source.read(1) == (encode(picture(seed=1)), png(classes(4, seed=1)))
    assert np.array_equal(source.decode(2, source.read(2), 3)[1].numpy(), classes(4, seed=2))


def test_a_local_data_set_and_named_columns_give_the_same(tmp_path):
    write_parquet(tmp_path / "set" / "train-0.parquet", ("annotation", "truth"))
    options = {"num_classes": 4, "cache_dir": tmp_path / "cache"}
    columns = {"image_column_name": "annotation", "annotation_column_name": "truth"}
    source = open_segmentation_source(dataset_name=str(tmp_path / "set"), **columns, **options)
    assert source.read(1) == (encode(picture(seed=1)), png(classes(4, seed=1)))
    with pytest.raises(ValueError, match="nope"):
        open_segmentation_source(dataset_name=str(tmp_path / "set"), split="nope", **options)


def test_columns_that_are_none_of_masks_are_named(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ("image", "label"), (IMAGE, Value("int64")))
    for column, message in ((None, "no column of masks"), ("label", "no column 'label' of masks"), ("x", "'x'")):
        with pytest.raises(ValueError, match=rf"{message}.*--annotation_column_name"):
            open_segmentation_source(data_files=path, annotation_column_name=column, cache_dir=tmp_path / "cache")


def test_the_flag_that_names_the_files_is_blamed_for_them(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ("image", "label"), (IMAGE, Value("int64")))
    with pytest.raises(ValueError, match="--validation_files has no column of masks"):
        open_segmentation_source(data_files=path, flag="--validation_files", cache_dir=tmp_path / "cache")


# Classes


def test_names_of_a_file_win_and_must_agree_with_their_number(scenes, tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("\n".join(["sky", *"abcdefghij"]) + "\n\n", encoding="utf-8")
    source = open_segmentation_source(train_dir=scenes, class_names_file=path, num_classes=11)
    assert source.class_names == ["sky", *"abcdefghij"]
    other = open_segmentation_source(train_dir=scenes, class_names=source.class_names[::-1], class_names_file=path)
    assert other.class_names == source.class_names[::-1]
    with pytest.raises(ValueError, match=r"--num_classes is 3, but .* 11 classes"):
        open_segmentation_source(train_dir=scenes, class_names_file=path, num_classes=3)
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no name"):
        open_segmentation_source(train_dir=scenes, class_names_file=path)
    with pytest.raises(ValueError, match="is not a file"):
        open_segmentation_source(train_dir=scenes, class_names_file=tmp_path / "none.txt")


def test_ade20ks_list_names_the_classes(tmp_path):
    write_pairs(tmp_path)
    lines = ("Idx\tRatio\tName", "1\t0.1576\twall", "2\t0.1072\tbuilding, edifice")
    (tmp_path / "objectInfo150.txt").write_text("\n".join(lines))
    names = ["other", "wall", "building, edifice"]
    assert open_segmentation_source(train_dir=tmp_path).class_names == names
    assert open_segmentation_source(train_dir=tmp_path, reduce_zero_label=True).class_names == names[1:]


def test_without_names_or_number_the_masks_are_counted_and_the_log_says_so(tmp_path, caplog):
    write_pairs(tmp_path, num_classes=4)
    mask = classes(4)
    mask[0] = 255
    (tmp_path / "annotations" / "training" / "ADE_001.png").write_bytes(png(mask))
    (tmp_path / "annotations" / "training" / "ADE_002.png").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert open_segmentation_source(train_dir=tmp_path).class_names == ["0", "1", "2", "3"]
    assert "reading all 3 masks" in caplog.text
    assert open_segmentation_source(train_dir=tmp_path, reduce_zero_label=True).class_names == ["0", "1", "2"]


def test_a_damaged_list_of_categories_is_named(tmp_path):
    write_pairs(tmp_path, "masks", "train")
    (tmp_path / "annotations").mkdir()
    for content in ("{", "[]", '{"categories": [{"id": 1}]}'):
        (tmp_path / "annotations" / "instances_train.json").write_text(content)
        with pytest.raises(ValueError, match=r"instances_train\.json does not list categories .*--class_names_file"):
            open_segmentation_source(train_dir=tmp_path)


@pytest.mark.parametrize("num_classes", [0, 256])
def test_there_are_one_to_255_classes(num_classes):
    with pytest.raises(ValueError, match=rf"has {num_classes} classes; there can be 1 to 255"):
        source_of(b"", num_classes=num_classes)


# Augmentation


def pair(channels=3):
    """A ramp of 40 × 60 pixels: a pixel's class is its row + its column, and the image twice that."""
    mask = (torch.arange(40)[:, None] + torch.arange(60)).to(torch.uint8)
    return tv_tensors.Image((2 * mask)[None].expand(channels, -1, -1).clone()), tv_tensors.Mask(mask)


def training_transform(crop_size=(32, 48), **options):
    defaults = {"mean": [0.0] * 3, "std": [1 / 255] * 3, "short_side": 40, "long_side_limit": 160}
    return segmentation_training_transform(crop_size, **(defaults | options))


@pytest.mark.parametrize("scale_range", [(1.0, 1.0), (0.5, 2.0)])
def test_image_and_mask_stay_together(scale_range):
    transform = training_transform(photometric_distortion=False, scale_range=scale_range)
    for seed in range(20):
        torch.manual_seed(seed)
        image, mask = transform(*pair())
        assert (tuple(image.shape), image.dtype) == ((3, 32, 48), torch.float32)
        assert (tuple(mask.shape), mask.dtype) == ((32, 48), torch.int64)
        seen = mask != 255
        # at half the size the nearest pixel is half a pixel off in both directions; a shift by two would be seen
        assert (image[0] / 2 - mask)[seen].abs().max() <= (1e-4 if scale_range == (1.0, 1.0) else 2)
        assert (image[:, ~seen] == 0).all()


def test_padding_is_zero_after_normalisation_and_ignored():
    transform = training_transform((64, 64), mean=MEAN, std=STD, scale_range=(1.0, 1.0), photometric_distortion=False)
    image, mask = transform(*pair())
    assert (mask == 255).sum() == 64 * 64 - 40 * 60
    assert (mask[40:] == 255).all()
    assert (mask[:, 60:] == 255).all()
    assert (image[:, 40:] == 0).all()
    flipped = [torch.equal(image[0, :40, :60], value) for value in normalised_both_ways()]
    assert any(flipped)


def normalised_both_ways():
    values = (pair()[0][0].to(torch.float32) - 255 * MEAN[0]) / (255 * STD[0])
    return values, values.flip(1)


def test_augmentation_is_a_function_of_torchs_seed_alone():
    transform = pickle.loads(pickle.dumps(training_transform()))
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(transform(*pair()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[2][0])


@pytest.mark.parametrize(
    ("size", "expected"),
    # ADE20K's median image; one that the longer side limits; one of a pixel's height
    [((512, 683), (512, 683)), ((256, 341), (512, 682)), ((100, 1000), (205, 2048)), ((1, 5000), (1, 2048))],
)
def test_sizes_fit_both_limits(size, expected):
    for turn in (1, -1):
        image = tv_tensors.Image(torch.zeros(3, *size[::turn], dtype=torch.uint8))
        assert tuple(FittingResize(512, 2048)(image).shape[1:]) == expected[::turn]


def test_ratios_fill_their_range():
    image = tv_tensors.Image(torch.zeros(1, 100, 100, dtype=torch.uint8))
    resize = FittingResize(100, 400, (0.5, 2.0))
    sides = np.array([resize(image).shape[1] for _ in range(300)])
    assert 50 <= sides.min() < 55
    assert 195 < sides.max() <= 200
    assert abs(sides.mean() - 125) < 10


def test_no_class_fills_more_than_its_share_of_a_crop_that_could_be_found():
    mask = torch.zeros(100, 100, dtype=torch.uint8)
    mask[30:70, 30:70] = 1  # a crop of 20 is of one class alone in most places
    mask[:10] = 255
    shares = []
    for share in (0.75, 1.0):
        crops = [MixedCrop(20, 20, share)(tv_tensors.Mask(mask)) for _ in range(200)]
        counts = [torch.bincount(crop[crop != 255].long(), minlength=2) for crop in crops]
        shares.append(np.mean([(count.max() > 0.75 * count.sum()).item() for count in counts]))
    # a crop at random passes with probability p: none of eleven does with (1 - p)^11
    assert shares[1] > 0.6
    assert shares[0] < 0.1


def test_a_crop_of_one_class_alone_is_taken_where_there_is_no_other():
    for value in (3, 255):
        crop = MixedCrop(8, 8, 0.75)(tv_tensors.Mask(torch.full((20, 20), value, dtype=torch.uint8)))
        assert tuple(crop.shape) == (8, 8)


def test_an_image_smaller_than_the_crop_is_not_cut():
    image, mask = MixedCrop(50, 20, 1.0)(*pair())
    assert tuple(image.shape[1:]) == tuple(mask.shape) == (40, 20)


def test_distortion_leaves_masks_and_the_order_of_channels():
    red = torch.zeros(3, 8, 8, dtype=torch.uint8)
    red[0] = 200
    _, mask = pair()
    for _ in range(50):
        image, same = PhotometricDistortion()(tv_tensors.Image(red), mask)
        assert torch.equal(same, mask)
        assert image[0].float().mean() >= image[1:].float().mean((1, 2)).max()


def test_a_grey_image_is_augmented_too():
    transform = training_transform(mean=[0.5], std=[0.5])
    for _ in range(10):
        image, _ = transform(*pair(channels=1))
        assert image.shape[0] == 1
        assert image.isfinite().all()


def test_a_wholly_ignored_image_is_augmented_too():
    image, mask = pair()
    image, mask = training_transform()(image, tv_tensors.Mask(torch.full_like(mask, 255)))
    assert (mask == 255).all()
    assert image.isfinite().all()


def test_evaluation_resizes_the_image_alone():
    image, mask = pair()
    resized, same = segmentation_evaluation_transform(20, 80, mean=MEAN, std=STD)(image, mask)
    assert tuple(resized.shape) == (3, 20, 30)
    assert same.dtype == torch.int64
    assert torch.equal(same, mask.long())
    kept, _ = segmentation_evaluation_transform(40, 160, mean=MEAN, std=STD)(image, mask)
    torch.testing.assert_close(torch.as_tensor(kept[0]), normalised_both_ways()[0].as_subclass(torch.Tensor))
