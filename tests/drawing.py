"""Pictures take half the time of a tiny run: they are drawn where a test looks at them, and blank elsewhere."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from mimae.pictures import classes

_savefig, _fewest_for_tsne = Figure.savefig, classes.FEWEST_FOR_TSNE


def _save_blank(figure: Figure, path: Any, **_: Any) -> None:
    Image.new("L", (1, 1)).save(path, format="PNG")


def leave_blank() -> None:
    """From now on each figure is saved as a pixel, and no map of features is sought for long."""
    Figure.savefig, classes.FEWEST_FOR_TSNE = _save_blank, sys.maxsize


@contextlib.contextmanager
def drawn() -> Iterator[None]:
    """Within, pictures are drawn."""
    Figure.savefig, classes.FEWEST_FOR_TSNE = _savefig, _fewest_for_tsne
    try:
        yield
    finally:
        leave_blank()
