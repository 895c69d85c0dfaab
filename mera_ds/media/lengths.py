"""How long a file should be by its own outermost boxes: decoders pass over a cut end in silence."""

from collections.abc import Iterator

from mera_ds.media.errors import Unusable

UNKNOWN_RIFF_SIZE = 0x7FFFF000
"""From here on, a size in a RIFF file is a writer's way to say that it did not know."""
EBML = b"\x1a\x45\xdf\xa3"
SEGMENT = b"\x18\x53\x80\x67"
MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"uuid", b"moof", b"mfra")


def require_whole(content: bytes) -> None:
    """Raise `Unusable` if a WAV, AVI, MP4, MOV, Matroska or WebM file ends before it should."""
    if content[:4] == b"RIFF" and content[8:12] in (b"WAVE", b"AVI "):
        ends = _riff_ends(content)
    elif content[:4] == EBML:
        ends = _matroska_ends(content)
    elif content[4:8] in MP4_BOXES:
        ends = _mp4_ends(content)
    else:
        return
    expected = max(ends, default=0)
    if expected > len(content):
        raise Unusable(f"it is cut off: {len(content)} of {expected} bytes are there")


def _riff_ends(content: bytes) -> Iterator[int]:
    """Yield the ends of an AVI's lists, or of a WAV's samples: its outer size is often wrong."""
    if content[8:12] == b"WAVE":
        position, wanted = 12, b"data"
    else:
        position, wanted = 0, b"RIFF"
    while position + 8 <= len(content):
        name, size = content[position : position + 4], _little(content, position + 4)
        if size >= UNKNOWN_RIFF_SIZE or (name != wanted and wanted == b"RIFF"):
            return
        if name == wanted:
            yield position + 8 + size
        position += 8 + size + size % 2


def _mp4_ends(content: bytes) -> Iterator[int]:
    position = 0
    while content[position + 4 : position + 8] in MP4_BOXES:
        size = int.from_bytes(content[position : position + 4], "big")
        if size == 1:
            size = int.from_bytes(content[position + 8 : position + 16], "big")
        if size < 8:  # up to the end of the file
            return
        position += size
        yield position


def _matroska_ends(content: bytes) -> Iterator[int]:
    header = _element_size(content, 4)
    if header is None:
        return
    start = header[0] + header[1]
    if content[start : start + 4] != SEGMENT:
        return
    segment = _element_size(content, start + 4)
    if segment is not None:
        yield segment[0] + segment[1]


def _element_size(content: bytes, position: int) -> tuple[int, int] | None:
    """Return where an element's data begins and how long it is; None if it isn't said."""
    first = content[position] if position < len(content) else 0
    length = 9 - first.bit_length()
    if length > 8 or position + length > len(content):
        return None
    size = int.from_bytes(content[position : position + length], "big") ^ (1 << 7 * length)
    return None if size == (1 << 7 * length) - 1 else (position + length, size)


def _little(content: bytes, position: int) -> int:
    return int.from_bytes(content[position : position + 4], "little")
