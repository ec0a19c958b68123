"""Regions of images: a mask that says which part of a query counts.

With a mask, the loss and every other output function is the mean over what the mask marks: *which training images made
this face*, not this picture. A mask is an image of any size, white where the query counts, grey where it counts in
part. A network of latents sees it brought to the size of the latents, by the mean over each latent's pixels.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from whence._columns import abbreviate
from whence.config import DataSettings
from whence.data import ImageData, open_images
from whence.errors import DataError


def with_masks(images: ImageData, source: str | Path, settings: DataSettings) -> ImageData:
    """Put masks beside images.

    Args:
        images: Queries.
        source: One mask for all of them; or a folder with one for each, of the name of its image, whatever the suffix.
        settings: How the images themselves are read: masks are squeezed or cut as these are.

    Returns:
        The images with their ``masks``.

    Raises:
        DataError: If a mask is missing, is black all over, or belongs to no image.
    """
    columns = dict.fromkeys(("image_column", "id_column", "label_column", "caption_column"))
    side = images.height if images.height == images.width else None
    found = open_images(source, replace(settings, **columns, grey=True, resolution=side))
    if (found.height, found.width) != (images.height, images.width):
        raise DataError(
            f"Masks must have the size of the queries, {images.height} x {images.width} pixels; those of {source} have "
            f"{found.height} x {found.width}."
        )
    rows = [0] * len(images) if Path(source).is_file() else _rows_by_name(found, images)
    masks = (found.pixels(range(len(found)))[:, 0] + 1) / 2
    black = [found.ids[row] for row in sorted(set(rows)) if not masks[row].any()]
    if black:
        raise DataError(f"A mask must mark something; these are black all over: {abbreviate(black)}. Paint it white.")
    return replace(images, masks=np.ascontiguousarray(masks[rows]))


def _rows_by_name(masks: ImageData, images: ImageData) -> list[int]:
    row_of = {Path(id_).with_suffix("").as_posix(): row for row, id_ in enumerate(masks.ids)}
    names = [Path(id_).with_suffix("").as_posix() for id_ in images.ids]
    missing = [id_ for id_, name in zip(images.ids, names, strict=True) if name not in row_of]
    unused = [masks.ids[row] for name, row in row_of.items() if name not in names]
    if missing or unused:
        faults = [f"{len(missing)} queries have none: {abbreviate(missing)}"] if missing else []
        faults += [f"{len(unused)} masks have no query: {abbreviate(unused)}"] if unused else []
        raise DataError(
            f"In a folder every query needs a mask of its name, and every mask a query; {'; '.join(faults)}. Give the "
            "file of one mask for all, or rename them."
        )
    return [row_of[name] for name in names]
