"""What a recipe says of the alarms; apart from them, so that reading a recipe does not import transformers."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class AlarmLimits:
    """When an alarm rings and what it does."""

    length_growth: float = 2.0
    """Mean tokens of an answer, over those of the first `window` logged steps."""
    waits_rise: float = 1.0
    """How many more times an answer says "wait" on average than in the first `window` logged steps."""
    window: int = 10
    """Logged steps over which both means are taken."""
    action: Literal["stop", "warn"] = "stop"
    """stop: training ends at this step and the stage fails; warn: it is printed and noted."""
