"""The photographs of the demo, and the picture it writes.

china.jpg and flower.jpg come with scikit-learn, both under CC BY 2.0
(https://creativecommons.org/licenses/by/2.0/):
china.jpg    (c) danielbuechele, https://www.flickr.com/photos/danielbuechele/6061409035/
flower.jpg   (c) vultilion, https://www.flickr.com/photos/vultilion/6056698931/
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

CREDIT = "Photographs: china.jpg by danielbuechele, flower.jpg by vultilion (flickr), CC BY 2.0"
# The same light in other ways: gain and offset of red, green and blue, as a camera, a lamp or fog
# change a photograph. InstanceNorm removes exactly these.
EXPOSURES = {
    "as taken": ((1.0, 1.0, 1.0), (0.0, 0.0, 0.0)),
    "underexposed": ((0.3, 0.3, 0.3), (0.0, 0.0, 0.0)),
    "in fog": ((0.35, 0.35, 0.35), (0.55, 0.55, 0.55)),
    "by lamplight": ((0.95, 0.6, 0.28), (0.05, 0.02, 0.0)),
}
_GAP, _LABEL, _TITLE = 8, 26, 44


def photographs() -> Array:
    """The two photographs, (2, 3, 427, 640), float32 from 0 to 1."""
    from sklearn.datasets import load_sample_images

    images = np.stack(load_sample_images().images)
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).astype(np.float32) / 255.0


def exposures(pictures: Array) -> Array:
    """Each picture in every exposure, (P * E, 3, H, W): all of the first picture, then the next."""
    batch = [
        picture * _column(gain) + _column(offset)
        for picture in pictures
        for gain, offset in EXPOSURES.values()
    ]
    return np.stack(batch).astype(np.float32)


def _column(values: Sequence[float]) -> Array:
    return np.asarray(values, np.float32)[:, None, None]


def before_and_after(before: Array, after: Array, caption: str, path: Path) -> None:
    """Write a PNG: a row of inputs over a row of outputs for each picture, a column an exposure.

    before and after are (P * E, 3, H, W); values outside 0 to 1 are clipped.
    """
    from PIL import Image, ImageDraw, ImageFont

    columns = len(EXPOSURES)
    rows = before.shape[0] // columns
    high, wide = before.shape[2:]
    factor = max(1.0, wide / 400.0)
    size = (round(wide / factor), round(high / factor))
    width = columns * (size[0] + _GAP) + _GAP + 96
    height = _TITLE + _LABEL + rows * 2 * (size[1] + _GAP) + rows * _GAP + _LABEL + _GAP
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    title, label, small = (ImageFont.load_default(points) for points in (21, 16, 13))
    draw.text((_GAP, _GAP), caption, fill="black", font=title)
    for column, name in enumerate(EXPOSURES):
        middle = 96 + column * (size[0] + _GAP) + size[0] // 2
        draw.text((middle, _TITLE), name, fill="black", font=label, anchor="ma")
    for row in range(rows):
        for step, (name, batch) in enumerate((("before", before), ("after", after))):
            top = _TITLE + _LABEL + (2 * row + step) * (size[1] + _GAP) + row * _GAP
            draw.text((_GAP, top + size[1] // 2), name, fill="black", font=label, anchor="lm")
            for column in range(columns):
                pixels = np.clip(batch[row * columns + column], 0.0, 1.0).transpose(1, 2, 0)
                tile = Image.fromarray((pixels * 255.0 + 0.5).astype(np.uint8))
                tile = tile.resize(size, Image.Resampling.LANCZOS)
                sheet.paste(tile, (96 + column * (size[0] + _GAP), top))
    draw.text((_GAP, height - _LABEL), CREDIT, fill="dimgray", font=small)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
