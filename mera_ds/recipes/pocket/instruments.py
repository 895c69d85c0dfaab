"""The instruments and drum recordings of the pocket set's sounds: data only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Instrument:
    """A General MIDI program of the soundfont, and how it is used."""

    program: int
    name: str
    lowest: int
    highest: int
    """Range as MIDI note numbers (60 is the middle C)."""
    clips: int
    group: str = ""
    """Concept, if other programs use some of the same recorded notes; otherwise the name."""

    @property
    def concept(self) -> str:
        """What is on one side of the split as a whole."""
        return self.group or self.name


WIND = (
    Instrument(56, "trumpet", 54, 84, 9),
    Instrument(57, "trombone", 40, 72, 9),
    Instrument(58, "tuba", 30, 60, 9),
    Instrument(59, "muted trumpet", 54, 84, 9),
    Instrument(60, "french horn", 40, 76, 9),
    Instrument(61, "brass section", 40, 80, 9),
    Instrument(64, "soprano sax", 56, 86, 9),
    Instrument(65, "alto sax", 49, 80, 9),
    Instrument(66, "tenor sax", 44, 76, 9, "low sax"),
    Instrument(67, "baritone sax", 36, 69, 9, "low sax"),
    Instrument(68, "oboe", 58, 88, 9),
    Instrument(69, "english horn", 52, 81, 9),
    Instrument(70, "bassoon", 34, 69, 9),
    Instrument(71, "clarinet", 50, 88, 9),
    Instrument(72, "piccolo flute", 74, 96, 9),
    Instrument(73, "flute", 60, 92, 9),
    Instrument(74, "recorder", 60, 88, 9),
    Instrument(75, "pan flute", 60, 88, 9),
    Instrument(76, "blown bottle", 60, 84, 9),
    Instrument(77, "bamboo flute", 55, 84, 9),
    Instrument(78, "whistle", 72, 96, 9),
    Instrument(79, "ocarina", 60, 84, 9),
    Instrument(109, "bagpipe", 56, 76, 9),
    Instrument(111, "indian oboe", 58, 84, 9),
)
PLUCKED = (
    Instrument(24, "nylon guitar", 40, 80, 12),
    Instrument(25, "steel guitar", 40, 80, 12),
    Instrument(26, "jazz guitar", 40, 80, 12),
    Instrument(27, "electric guitar", 40, 80, 12),
    Instrument(28, "muted guitar", 40, 80, 12),
    Instrument(32, "acoustic bass", 28, 60, 12),
    Instrument(33, "fingered bass", 28, 60, 12),
    Instrument(34, "picked bass", 28, 60, 12),
    Instrument(35, "fretless bass", 28, 60, 12),
    Instrument(36, "slap bass", 28, 60, 12),
    Instrument(37, "pop bass", 28, 60, 12),
    Instrument(46, "harp", 40, 84, 12),
    Instrument(104, "sitar", 48, 78, 12),
    Instrument(105, "banjo", 48, 82, 12),
    Instrument(106, "shamisen", 50, 80, 12),
    Instrument(107, "koto", 50, 84, 12),
)
BOWED = (
    Instrument(40, "violin", 55, 88, 16, "violin"),
    Instrument(110, "fiddle", 55, 88, 16, "violin"),
    Instrument(41, "viola", 48, 80, 18),
    Instrument(42, "cello", 36, 72, 18),
    Instrument(43, "double bass", 28, 60, 18),
    Instrument(44, "tremolo strings", 40, 84, 13, "string section"),
    Instrument(48, "fast strings", 40, 84, 13, "string section"),
    Instrument(49, "slow strings", 40, 84, 13, "string section"),
)
MALLET = (
    Instrument(8, "celesta", 60, 90, 15),
    Instrument(9, "glockenspiel", 70, 96, 15),
    Instrument(10, "music box", 60, 90, 15),
    Instrument(11, "vibraphone", 53, 86, 15),
    Instrument(12, "marimba", 45, 84, 15),
    Instrument(13, "xylophone", 60, 92, 15),
    Instrument(14, "tubular bells", 58, 78, 15),
    Instrument(108, "kalimba", 58, 84, 15),
    Instrument(112, "tiny bells", 64, 88, 15),
    Instrument(114, "steel drums", 50, 78, 15),
)
DRUM = (
    Instrument(47, "timpani", 36, 58, 12),
    Instrument(115, "woodblock", 55, 80, 12),
    Instrument(116, "taiko drum", 36, 60, 12),
    Instrument(117, "tom drum", 40, 72, 12),
    Instrument(118, "synth drum", 40, 72, 12),
)

FAMILIES = {
    "bowed": (BOWED, "a bowed instrument"),
    "drum": (DRUM, "a drum"),
    "mallet": (MALLET, "a mallet instrument"),
    "plucked": (PLUCKED, "a plucked instrument"),
    "wind": (WIND, "a wind instrument"),
}
"""Answer -> instruments, and what captions call any of them."""

DRUM_RECORDINGS = {
    "bd_": ("kick drum", "beat on kick drum"),
    "drum_bass": ("kick drum", "beat on kick drum"),
    "drum_heavy_kick": ("kick drum", "beat on kick drum"),
    "elec_hollow_kick": ("kick drum", "beat on electric kick drum"),
    "elec_soft_kick": ("kick drum", "beat on electric kick drum"),
    "sn_": ("snare drum", "beat on snare drum"),
    "drum_snare": ("snare drum", "beat on snare drum"),
    "drum_roll": ("snare drum", "roll on snare drum"),
    "elec_filt_snare": ("snare drum", "beat on electric snare drum"),
    "elec_hi_snare": ("snare drum", "beat on electric snare drum"),
    "elec_lo_snare": ("snare drum", "beat on electric snare drum"),
    "elec_mid_snare": ("snare drum", "beat on electric snare drum"),
    "elec_snare": ("snare drum", "beat on electric snare drum"),
    "drum_cymbal": ("cymbal", "beat on cymbal"),
    "drum_splash": ("cymbal", "beat on splash cymbal"),
    "elec_cymbal": ("cymbal", "beat on electric cymbal"),
    "drum_tom_hi": ("tom drum", "beat on high tom drum"),
    "drum_tom_mid": ("tom drum", "beat on middle tom drum"),
    "drum_tom_lo": ("tom drum", "beat on low tom drum"),
    "elec_fuzz_tom": ("tom drum", "beat on electric tom drum"),
    "tabla_": ("tabla", "beat on tabla"),
    "loop_tabla": ("tabla", "rhythm on tabla"),
    "loop_amen": ("drum set", "rhythm on drum set"),
    "loop_breakbeat": ("drum set", "rhythm on drum set"),
    "loop_compus": ("drum set", "rhythm on drum set"),
    "loop_industrial": ("drum set", "rhythm on drum set"),
    "loop_mika": ("drum set", "rhythm on drum set"),
    "loop_safari": ("drum set", "rhythm on drum set"),
}
"""Start of a Sonic Pi sample's name -> concept and caption; the rest is not drums."""
