"""Pictures in a page that loads nothing: each stands once in the style sheet, a data URI with a class of its own."""

import base64
import io
from dataclasses import dataclass

from PIL import Image

from whence.data import ImageData

MAX_PIXELS = 160
"""A picture with a longer side than this is reduced to it, so that the page stays small."""
PIXELATED_UP_TO = 48
"""Pictures with no longer side than this are enlarged with their pixels sharp."""


class Pictures:
    """Hands out a CSS class for each picture and keeps its bytes once, also where a query is a training image."""

    def __init__(self) -> None:
        self._names: dict[bytes, str] = {}

    def name(self, data: ImageData, row: int) -> str:
        return self._names.setdefault(data.picture(row), f"p{len(self._names)}")

    def prepare(self) -> list["Picture"]:
        return [_prepare_picture(name, png) for png, name in self._names.items()]


@dataclass(frozen=True)
class Picture:
    """One rule of the style sheet."""

    name: str
    uri: str
    pixelated: bool
    reduced: bool


def _prepare_picture(name: str, png: bytes) -> Picture:
    kind, shown = "png", png
    with Image.open(io.BytesIO(png)) as image:
        longest = max(image.size)
        if longest > MAX_PIXELS:
            small = image.convert("RGB")
            small.thumbnail((MAX_PIXELS, MAX_PIXELS))
            buffer = io.BytesIO()
            small.save(buffer, "JPEG", quality=88)
            kind, shown = "jpeg", buffer.getvalue()
    uri = f"data:image/{kind};base64,{base64.b64encode(shown).decode()}"
    return Picture(name, uri, longest <= PIXELATED_UP_TO, longest > MAX_PIXELS)
