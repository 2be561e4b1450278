"""Pictures as data URIs: small ones as they lie on disk, large ones reduced, so that a page can be mailed."""

import base64
from functools import lru_cache
from io import BytesIO
from pathlib import Path

SIDE = 512  # pixels at most
PLAIN = 48 * 1024  # bytes of a PNG that goes in as it is


def data_uri(path: Path, *, clean: bool = False) -> str:
    """The picture as `data:image/...`. clean: encoded anew in any case, so that nothing but pixels is in it.

    Raises OSError for a file that is no picture.
    """
    found = path.stat()
    return _encoded(path, found.st_mtime_ns, found.st_size, clean)


@lru_cache(maxsize=1024)  # a page that is written again and again during a run encodes the untuned pictures once
def _encoded(path: Path, _time: int, size: int, clean: bool) -> str:
    from PIL import Image

    if path.suffix == ".png" and size <= PLAIN and not clean:
        return _uri("png", path.read_bytes())
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    image.thumbnail((SIDE, SIDE))
    file = BytesIO()
    if max(image.size) <= 128:
        image.save(file, "PNG")
        return _uri("png", file.getvalue())
    image.save(file, "WEBP", quality=85)
    return _uri("webp", file.getvalue())


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def forget() -> None:
    """Give the memory of the encoded pictures back."""
    _encoded.cache_clear()
