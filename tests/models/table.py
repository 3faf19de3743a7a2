# SPDX-License-Identifier: Apache-2.0
"""All kinds by name, in the order of the page."""

from __future__ import annotations

from tests.models.kind import Kind
from tests.models.media import MEDIA
from tests.models.others import POOLING, STATES
from tests.models.quantised import QUANTISED
from tests.models.text import TEXT

SECTIONS: dict[str, dict[str, Kind]] = {
    "Text": TEXT,
    "Layers that keep a state": STATES,
    "Images and sounds": MEDIA,
    "Vectors and scores": POOLING,
    "Quantised weights": QUANTISED,
}
KINDS: dict[str, Kind] = {name: kind for kinds in SECTIONS.values() for name, kind in kinds.items()}
assert len(KINDS) == sum(map(len, SECTIONS.values())), "two kinds have one name"
