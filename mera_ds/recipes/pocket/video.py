"""Videos of the pocket set: animated Fluent emoji of people, hands and faces, in four frames."""

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from mera_ds.recipes.pocket.emoji import EmojiName, EmojiNames
from mera_ds.recipes.pocket.items import Item, Part, captions_of, head_word, split_by_concept
from mera_ds.recipes.pocket.sources import EMOJIBASE, FLUENT, Package, read_members

QUESTION = "What is going on?"
ANSWERS = ("emotion", "gesture", "job", "magic", "sport")
TEST_SIZE = 128
FRAMES = 4
SIZE = 96
MILLISECONDS = 250
QUALITY = 75

KINDS = {
    "face-affection": ("emotion", "a loving face"),
    "face-concerned": ("emotion", "a worried face"),
    "face-hand": ("emotion", "a face with hands"),
    "face-negative": ("emotion", "an angry face"),
    "face-neutral-skeptical": ("emotion", "a doubtful face"),
    "face-sleepy": ("emotion", "a sleepy face"),
    "face-smiling": ("emotion", "a happy face"),
    "face-tongue": ("emotion", "a playful face"),
    "face-unwell": ("emotion", "a sick face"),
    "cat-face": ("emotion", "a cat face"),
    "hand-fingers-closed": ("gesture", "a hand gesture"),
    "hand-fingers-open": ("gesture", "a hand gesture"),
    "hand-fingers-partial": ("gesture", "a hand gesture"),
    "hand-single-finger": ("gesture", "a hand gesture"),
    "hands": ("gesture", "a hand gesture"),
    "person-gesture": ("gesture", "a body gesture"),
    "person-role": ("job", "a job"),
    "person-fantasy": ("magic", "a magic being"),
    "person-sport": ("sport", "a sport"),
}
"""Subgroup of the emoji -> class, and phrase of the caption; others are left out."""

SPORTS = frozenset(("running", "walking", "dancing", "climbing", "position"))
"""Concepts of other subgroups that are counted as sports."""

NOT_OF_THEIR_KIND = frozenset(
    "baby feeding headscarf nursing pregnant prince princess skull skullcap turban tuxedo"
    " veil".split()
)
"""Concepts whose subgroup does not say what they are."""

VARIANT_WORDS = frozenset(
    "man woman person men women people male female mx mrs face cat blond"
    " up down left right facing backhand index slightly".split()
)
TRAIN_SKIN_TONES = ("1f3fc", "1f3fe")
"""Variants by skin tone that are added to the training split; the test split has none."""


@dataclass(frozen=True)
class _Clip:
    code: str
    """The code points, which name the file."""
    package: Package
    label: str
    concept: str
    answer: str
    phrase: str
    skin_tone: bool


def build_part(source: Path) -> Part:
    """Return the videos of the set, cut from the packages in `source`."""
    frames, clips = _animated_clips(source)
    train, test = split_by_concept(
        clips, TEST_SIZE, "pocket/video", lambda clip: not clip.skin_tone
    )
    return Part(
        modality="video",
        licence="MIT (fluent-emoji, Microsoft and LobeHub); names MIT (emojibase-data)",
        question=QUESTION,
        answers=ANSWERS,
        train=tuple(_item(clip, frames) for clip in train),
        test=tuple(_item(clip, frames) for clip in test),
        method=(
            f"{FRAMES} evenly spaced frames with the first and the last, on white, {SIZE} px, "
            f"as one animated WebP of quality {QUALITY}"
        ),
        packages=(*FLUENT, EMOJIBASE),
    )


def _animated_clips(source: Path) -> tuple[dict[str, bytes], list[_Clip]]:
    names = EmojiNames(source)
    frames: dict[str, bytes] = {}
    clips = []
    for package in FLUENT:
        for path, content in read_members(source, package, _may_be_used).items():
            code = PurePosixPath(path).stem
            name = names.find(code)
            clip = _clip(code, package, name) if name else None
            if clip and (short := shorten(content)):
                frames[code] = short
                clips.append(clip)
    return frames, sorted(clips, key=lambda clip: clip.code)


def _may_be_used(path: str) -> bool:
    code = PurePosixPath(path).stem
    tones = [part for part in code.split("-") if "1f3fb" <= part <= "1f3ff" and len(part) == 5]
    return path.endswith(".webp") and (not tones or tones[0] in TRAIN_SKIN_TONES)


def _clip(code: str, package: Package, name: EmojiName) -> _Clip | None:
    concept = head_word(name.label, VARIANT_WORDS)
    concept = "mermaid" if concept in ("merman", "merperson") else concept
    kind = KINDS.get(name.subgroup)
    if name.subgroup in ("person-activity", "person-resting") and concept in SPORTS:
        kind = KINDS["person-sport"]
    if kind is None or concept in NOT_OF_THEIR_KIND:
        return None
    return _Clip(code, package, name.label, concept, *kind, skin_tone=name.skin_tone)


def shorten(content: bytes) -> bytes | None:
    """Return a clip of `FRAMES` frames from a longer one, or None if it does not move enough.

    The WebP encoder joins equal neighbours, so a clip that stands still comes out shorter.
    """
    with Image.open(io.BytesIO(content)) as image:
        count = getattr(image, "n_frames", 1)
        if count < FRAMES:
            return None
        pictures = list(_frames(image, (k * (count - 1) // (FRAMES - 1) for k in range(FRAMES))))
    target = io.BytesIO()
    pictures[0].save(
        target,
        format="WEBP",
        save_all=True,
        append_images=pictures[1:],
        duration=MILLISECONDS,
        quality=QUALITY,
        method=6,
    )
    with Image.open(target) as written:
        moves = getattr(written, "n_frames", 1) == FRAMES
    return target.getvalue() if moves else None


def _frames(image: Image.Image, positions: Iterable[int]) -> Iterable[Image.Image]:
    for position in positions:
        image.seek(position)
        picture = image.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        white.alpha_composite(picture)
        yield white.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def _item(clip: _Clip, frames: dict[str, bytes]) -> Item:
    return Item(
        key=clip.code,
        extension="webp",
        media=frames[clip.code],
        concept=clip.concept,
        source=f"{clip.package.name}/assets/{clip.code}.webp",
        answer=clip.answer,
        captions=captions_of(clip.label, clip.phrase),
    )
