"""From a medium as it stands in the source to the one that is stored, checked on the way."""

from dataclasses import dataclass

from mera_ds.media import decode
from mera_ds.media.errors import Unusable
from mera_ds.media.video import sample_frames
from mera_ds.media.webp import encode_frames
from mera_ds.recipes.official.points import convert_points

_EXTENSIONS = {"jpeg": "jpg"}


@dataclass(frozen=True)
class Conversion:
    """How the media of a dataset are stored."""

    kind: str
    """Kind of the medium: image, video, audio or pointcloud."""
    frames: int = 0
    """Video: evenly spaced frames, stored as one lossless WebP; 0: the file as it is."""
    points: int = 0
    """Point cloud: how many points are kept."""
    normalise: bool = False
    """Point cloud: centroid at the origin, farthest point at distance 1."""
    seed: int = 0
    """Decides which points are kept."""

    def apply(self, content: bytes, extension: str, key: str) -> tuple[str, bytes]:
        """Return extension and bytes of the stored medium.

        Pictures and sounds are decoded to see that they can be, and stored as they are.

        Raises:
            Unusable, DataError: it is damaged, empty, too large or of an unknown type.
        """
        if self.kind == "pointcloud":
            points = convert_points(
                content, extension, self.points, self.normalise, f"{self.seed}/{key}"
            )
            return "npy", points
        if self.kind == "video":
            return self._video(content, extension)
        decode(self.kind, extension, content, key)
        return _EXTENSIONS.get(extension, extension), content

    def _video(self, content: bytes, extension: str) -> tuple[str, bytes]:
        clip = sample_frames(content, extension, self.frames or 2)
        if not self.frames:
            return extension, content
        try:
            return "webp", encode_frames(clip)
        except ValueError as error:
            raise Unusable(str(error)) from None
