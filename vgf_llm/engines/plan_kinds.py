"""The kinds of plan that an engine of this version follows, by their word in a plan."""

from __future__ import annotations

from vgf_llm.text.choosing import DRAW
from vgf_llm.text.plans import PlanKind
from vgf_llm.text.regrown_step import REGROW
from vgf_llm.text.tilted_step import TILT

KINDS: dict[str, PlanKind] = {kind.name: kind for kind in (DRAW, TILT, REGROW)}
