"""Sounds of the pocket set: notes and melodies of sampled instruments, and recorded drums."""

import io
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import soundfile

from mera_ds.errors import InputError
from mera_ds.recipes.pocket.instruments import DRUM_RECORDINGS, FAMILIES, Instrument
from mera_ds.recipes.pocket.items import Item, Part, split_by_concept
from mera_ds.recipes.pocket.ogg import encode_ogg
from mera_ds.recipes.pocket.sources import SONIC_PI, SOUNDFONT, read_members

QUESTION = "Which instrument family?"
ANSWERS = tuple(sorted(FAMILIES))
TEST_SIZE = 118
TEST_CLIPS = 6
"""The test split has this many sounds of an instrument (each shape once, if it can play all)."""

SOURCE_RATE = 44_100
RATE = 22_050
SECONDS = 1.9
FADE_SECONDS = 0.03
PEAK = 0.7
RELEASE = 0.12
"""Share of a note's time after its key is let go."""
SILENCE_BETWEEN = SOURCE_RATE // 2
SYNTHESIZER = "tinysoundfont==0.3.7"

BANDS = {"low": (28, 52), "middle": (53, 67), "high": (68, 96)}
"""What captions call a pitch: MIDI note numbers."""
SHAPES = {
    "low note": (0,),
    "middle note": (0,),
    "high note": (0,),
    "repeated note": (0, 0, 0, 0),
    "rising melody": (0, 4, 7, 12),
    "falling melody": (12, 7, 4, 0),
}
"""What is played: semitones above the lowest note, evenly spread over the clip."""

Floats: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Sound:
    """A clip to be made; `make` renders or cuts it at 44.1 kHz."""

    key: str
    concept: str
    answer: str
    captions: tuple[str, ...]
    source: str
    number: int
    """Counts the sounds of an instrument, or the recordings of a concept."""
    make: Callable[[], Floats]


def build_part(source: Path) -> Part:
    """Return the sounds of the set, played and cut from the packages in `source`."""
    sounds = sorted([*_played(source), *_recorded(source)], key=lambda sound: sound.key)
    train, test = split_by_concept(
        sounds, TEST_SIZE, "pocket/audio", lambda sound: sound.number < TEST_CLIPS
    )
    return Part(
        modality="audio",
        licence="MIT, parts CC0-1.0 or public domain (MuseScore General); CC0-1.0 (Sonic Pi)",
        question=QUESTION,
        answers=ANSWERS,
        train=tuple(_item(sound) for sound in train),
        test=tuple(_item(sound) for sound in test),
        method=(
            f"at most {SECONDS} s, mono, {RATE} Hz, Ogg Vorbis; instruments rendered with "
            f"{SYNTHESIZER} from the soundfont, drums cut from the recordings"
        ),
        packages=(SOUNDFONT, SONIC_PI),
    )


def _item(sound: _Sound) -> Item:
    return Item(
        key=sound.key,
        extension="ogg",
        media=encode_ogg(finish(sound.make()), RATE),
        concept=sound.concept,
        source=sound.source,
        answer=sound.answer,
        captions=sound.captions,
    )


def finish(waveform: Floats) -> Floats:
    """Return a sound at 44.1 kHz (n,) as a clip: cut, at half the rate, with a fade, as loud."""
    kept = waveform[: int(SECONDS * SOURCE_RATE)].astype(np.float64)
    half = np.convolve(kept, _half_band(), mode="same")[::2]
    fade = min(int(FADE_SECONDS * RATE), len(half))
    half[len(half) - fade :] *= np.linspace(1, 0, fade)
    return (half * (PEAK / max(np.abs(half).max(), 1e-6))).astype(np.float32)


def _half_band(taps: int = 63) -> npt.NDArray[np.float64]:
    """Return a low-pass filter at a quarter of the sampling rate (windowed sinc)."""
    position = np.arange(taps) - taps // 2
    kernel = np.sinc(position / 2) * np.hamming(taps)
    return kernel / kernel.sum()


def _played(source: Path) -> Iterator[_Sound]:
    files = read_members(source, SOUNDFONT, lambda path: path.endswith(".sf3"))
    (path, content), *_ = files.items()
    player = _Player(content)
    for family, (instruments, general) in FAMILIES.items():
        for instrument in instruments:
            for number, (shape, notes, velocity) in enumerate(_scores(instrument)):
                yield _Sound(
                    key=f"gm{instrument.program:03d}-{number:02d}",
                    concept=instrument.concept,
                    answer=family,
                    captions=(f"{shape} on {instrument.name}", f"{shape} on {general}"),
                    source=f"{SOUNDFONT.name}/{PurePosixPath(path).name}#{instrument.program}",
                    number=number,
                    make=_performance(player, instrument.program, notes, velocity),
                )


def _scores(instrument: Instrument) -> list[tuple[str, tuple[int, ...], int]]:
    """Return what an instrument plays: names of shapes, MIDI notes and velocities.

    It plays all shapes in turn, and no shape twice from the same note.
    """
    rng = np.random.default_rng([2025, instrument.program])
    orders = {shape: rng.permutation(_starts(instrument, shape)) for shape in SHAPES}
    scores = [
        (shape, tuple(int(order[turn]) + step for step in SHAPES[shape]))
        for turn in range(instrument.clips)
        for shape, order in orders.items()
        if turn < len(order)
    ]
    return [(*score, int(rng.integers(70, 120))) for score in scores[: instrument.clips]]


def _starts(instrument: Instrument, shape: str) -> list[int]:
    """Return the notes on which a shape can start so that it stays in the instrument's range."""
    lowest, highest = instrument.lowest, instrument.highest - max(SHAPES[shape])
    band = BANDS.get(shape.split()[0])
    if band:
        lowest, highest = max(lowest, band[0]), min(highest, band[1])
    return list(range(lowest, highest + 1))


def _performance(
    player: "_Player", program: int, notes: tuple[int, ...], velocity: int
) -> Callable[[], Floats]:
    return lambda: player.play(program, notes, velocity)


def synthesizer() -> ModuleType:
    """Return the module that plays soundfonts.

    Raises:
        InputError: it is not installed; the message says how to install it.
    """
    try:
        return import_module("tinysoundfont")
    except ImportError:
        raise InputError(
            "the sounds of the pocket set are played by tinysoundfont, which is not installed; "
            f"run: pip install --no-deps {SYNTHESIZER}"
        ) from None


class _Player:
    """Plays notes of a soundfont. The same calls in the same order give the same samples."""

    def __init__(self, soundfont: bytes) -> None:
        self._synth = synthesizer().Synth(samplerate=SOURCE_RATE)
        self._font = self._synth.sfload(soundfont)

    def play(self, program: int, notes: tuple[int, ...], velocity: int) -> Floats:
        """Return the notes one after the other in the time of a clip, mono (n,)."""
        self._synth.program_select(0, self._font, 0, program, False)
        each = int(SECONDS * SOURCE_RATE) // len(notes)
        release = int(each * RELEASE)
        parts = []
        for note in notes:
            self._synth.noteon(0, note, velocity)
            parts.append(self._generate(each - release))
            self._synth.noteoff(0, note)
            parts.append(self._generate(release))
        self._synth.sounds_off(0)
        self._generate(SILENCE_BETWEEN)
        return np.concatenate(parts)

    def _generate(self, count: int) -> Floats:
        stereo = np.frombuffer(bytes(self._synth.generate(count)), np.float32)
        return stereo.reshape(-1, 2).mean(1)


def _recorded(source: Path) -> Iterator[_Sound]:
    files = read_members(
        source, SONIC_PI, lambda path: path.endswith((".flac", "doc/sonic-pi-samples/copyright"))
    )
    (copyright_file,) = (name for name in files if name.endswith("copyright"))
    free = cc0_files(files.pop(copyright_file).decode())
    numbers: Counter[str] = Counter()
    for path, content in files.items():
        name = PurePosixPath(path).stem
        start = next((start for start in DRUM_RECORDINGS if name.startswith(start)), None)
        if start is None or f"{name}.flac" not in free:
            continue
        concept, caption = DRUM_RECORDINGS[start]
        numbers[concept] += 1
        yield _Sound(
            key=f"drum-{name.replace('_', '-')}",
            concept=concept,
            answer="drum",
            captions=(caption, f"{caption.split()[0]} on a drum"),
            source=f"{SONIC_PI.name}/{name}.flac",
            number=numbers[concept] - 1,
            make=_recording(content),
        )


def cc0_files(copyright_text: str) -> set[str]:
    """Return the file names that a Debian copyright file (DEP-5) lists under CC0."""
    free: set[str] = set()
    for paragraph in copyright_text.replace("\n ", " ").split("\n\n"):
        fields = dict(line.split(":", 1) for line in paragraph.splitlines() if ":" in line)
        if fields.get("License", "").strip() == "CC0":
            free.update(PurePosixPath(path).name for path in fields.get("Files", "").split())
    return free


def _recording(content: bytes) -> Callable[[], Floats]:
    def make() -> Floats:
        waveform, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
        assert rate == SOURCE_RATE, rate
        return waveform.mean(1)

    return make
