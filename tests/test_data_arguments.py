"""The data flags parse from the command line and from YAML, and refuse by name what cannot be."""

import pytest

from mimae.flags.data import DataArguments
from mimae.flags.parser import FlagParser


def parser() -> FlagParser:
    return FlagParser([DataArguments], {}, {}, "")


def test_flags_parse():
    flags = "--data_files a.tar b.tar --streaming --shuffle_window 64 --min_crop_scale 0.3 --samples_per_epoch 9"
    (arguments,) = parser().parse_args_into_dataclasses(flags.split())
    assert arguments.data_files == ["a.tar", "b.tar"]
    assert arguments.streaming is True
    assert (arguments.shuffle_window, arguments.min_crop_scale, arguments.samples_per_epoch) == (64, 0.3, 9)
    assert arguments.dataset_name is None


def test_a_whole_number_is_a_float_too():
    parser()  # HfArgumentParser writes over the types in the dataclass's fields
    assert type(DataArguments(horizontal_flip=0).horizontal_flip) is float


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shuffle_window": "8192"}, "shuffle_window"),
        ({"min_crop_scale": "2e-1"}, "min_crop_scale"),
        ({"data_files": "a.tar"}, "data_files"),
        ({"streaming": "yes"}, "streaming"),
        ({"dataloader_num_workers": True}, "dataloader_num_workers"),
        ({"min_crop_scale": 0.0}, "min_crop_scale=0.0 must be above 0 and at most 1"),
        ({"horizontal_flip": 1.5}, "horizontal_flip=1.5 must be in 0..1"),
        ({"samples_per_epoch": 0}, "samples_per_epoch=0 must be at least 1"),
        ({"dataset_name": "digits", "train_dir": "x"}, "dataset_name and train_dir"),
    ],
)
def test_wrong_types_and_values_are_refused_by_name(values, message):
    parser()
    with pytest.raises((TypeError, ValueError), match=message):
        DataArguments(**values)
