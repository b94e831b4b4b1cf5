"""Image files as tensors. Needs the extra `agent-images`."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeward.errors import InvalidDocument, MissingDependency

try:
    from PIL import Image, ImageOps
except ImportError as error:
    raise MissingDependency("image files need Pillow", hint="pip install 'edgeward[agent-images]'") from error


def read_image(path: Path, width: int, height: int) -> npt.NDArray[np.uint8]:
    """The picture as `[1, H, W, 3]` uint8 RGB, upright, scaled to `width` x `height` where they are not 0.

    Raises InvalidDocument for what is no image or claims an absurd size.
    """
    try:
        with Image.open(path) as image:
            picture: Any = ImageOps.exif_transpose(image).convert("RGB")
            size = (width or picture.width, height or picture.height)
            if size != picture.size:
                picture = picture.resize(size, Image.Resampling.BILINEAR)
            return np.asarray(picture, dtype=np.uint8)[np.newaxis]
    # Pillow's plugins raise each of these for broken files.
    except (OSError, SyntaxError, ValueError, struct.error, EOFError, Image.DecompressionBombError) as error:
        raise InvalidDocument(f"not an image: {error}") from None
