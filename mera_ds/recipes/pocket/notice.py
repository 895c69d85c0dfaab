"""NOTICE and SOURCES.json of the pocket set: what it is made of, by whom, under which licence."""

from collections.abc import Iterable
from typing import Any

from mera_ds.recipes.pocket.sources import PACKAGES, TOOLS

_HEAD = """\
NOTICE of the pocket data set

The files in this folder are made from the works below. All of them may be redistributed; keep
this NOTICE with them. What was changed is said with each work. SOURCES.json lists the packages
the works were taken from, with their versions and SHA-256.

== image ==
Noto Emoji drawings, copyright Google LLC and the Noto Emoji authors, taken from the npm package
emoji-datasource-google (copyright 2013 Cal Henderson; the package's own data: MIT).
Licence of the drawings: Apache-2.0, https://www.apache.org/licenses/LICENSE-2.0 (full text also
in the file LICENSE at the root of this repository). Files are unchanged; a part was selected.
English names and groups: emojibase-data, copyright 2017-2019 Miles Johnson, MIT (text below).

== video ==
Fluent Emoji animations, copyright Microsoft Corporation, as packaged in @lobehub/fluent-emoji-anim
(copyright 2023 LobeHub). Licence: MIT (text below).
Changed: four frames of each clip, on white, made smaller, stored as WebP.
English names and groups: emojibase-data, as above.

== audio ==
Instruments: rendered from MuseScore_General_Lite, the Debian package
musescore-general-soundfont-small. Licence: MIT (text below), parts CC0-1.0 or public domain.
  MuseScore_General: copyright 2018-2021 S. Christian Collins; Debian packaging mirabilos
  Fluid (R3) Mono GM: copyright 2014-2017 Michael Cowgill; Temple Blocks instrument copyright
  2002 Ethan Winer; Drumline Cymbals copyright 2016 Michael Schorsch
  Fluid (R3) GM: copyright 2000-2002, 2008 Frank Wen, with Suren M. Seron, Scott Hanan, Steve
  Aupperle, Chris Gillman, Alex Taubr, Chris Prola, Andrew Klenk, Winfried Hubbe, Dylan, Tim,
  Gort, Uros Katic and Ethan Winer
  MuseScore Drumline samples (CC0-1.0): S. Christian Collins and Amir Oosman
  Splendid Grand piano from AKAI S5000 (public domain)
  Versilian Community Sample Library, open crash samples (CC0-1.0): Sam Gossner
Recorded drums: samples of Sonic Pi, made by users of freesound.org, taken from the Debian package
sonic-pi-samples. Licence: CC0-1.0, https://creativecommons.org/publicdomain/zero/1.0/.
Changed: cut, made mono, stored as Ogg Vorbis.

== pointcloud ==
3D models of the furniture catalogues of Sweet Home 3D, converted by Emmanuel Puybaret / eTeks
<info@eteks.com>, taken from the Debian package sweethome3d-furniture.
Changed: points were sampled on the surfaces of the models; names are in lower case.
  BlendSwap-CC-0: CC0-1.0, https://creativecommons.org/publicdomain/zero/1.0/
    Blend Swap contributors (https://www.blendswap.com), named below
  BlendSwap-CC-BY: CC-BY-3.0, https://creativecommons.org/licenses/by/3.0/
    Blend Swap contributors (https://www.blendswap.com), named below
  KatorLegaz: CC-BY-3.0-US, https://creativecommons.org/licenses/by/3.0/us/
    copyright 2003-2008 Andrew Kator & Jennifer Legaz
  Reallusion: CC-BY-3.0-US, https://creativecommons.org/licenses/by/3.0/us/
    copyright 2008-2016 Reallusion (https://www.reallusion.com)
  Scopia: CC-BY-3.0, https://creativecommons.org/licenses/by/3.0/
    copyright 2006-2020 Scopia Visual Interfaces Systems, s.l. (http://www.scopia.es) and
    2014-2020 Emmanuel Puybaret / eTeks
"""
_MIT = """\
== text of the MIT licence ==
Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or
substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT
OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def notice_text(credits: Iterable[str]) -> str:
    """Return the NOTICE; `credits` name the works that must be credited one by one."""
    return "\n".join([_HEAD, "== 3D models used, by catalogue and author ==", *credits, "", _MIT])


def sources_json() -> dict[str, Any]:
    """Return the content of SOURCES.json."""
    return {
        "schema": 1,
        "recipe": "mera-ds shards build pocket --source DIR --out DIR",
        "packages": [package.as_json() for package in PACKAGES],
        "tools": dict(TOOLS),
    }
