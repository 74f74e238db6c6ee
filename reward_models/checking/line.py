"""One result of a check: the value seen, the limit it is compared with, a verdict, and advice."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

Verdict = Literal["pass", "warn", "fail", "skip"]


@dataclass(frozen=True)
class Line:
    """A line of the report.

    Attributes:
        check: Name of the check.
        value: Value seen, in words, with units.
        threshold: Limit it is compared with, in words; empty where there is none.
        verdict: "pass", "warn" (look at it), "fail" (mend it) or "skip" (cannot be checked here).
        advice: What to do; empty after "pass".
    """

    check: str
    value: str
    threshold: str = ""
    verdict: Verdict = "pass"
    advice: str = ""

    def to_dict(self) -> dict[str, str]:
        """Return the fields as a dict."""
        return asdict(self)


def judged(check: str, value: str, threshold: str, verdict: Verdict, advice: str) -> Line:
    """Return a line whose advice is only given where the verdict is not "pass"."""
    return Line(check, value, threshold, verdict, "" if verdict == "pass" else advice)


def skipped(check: str, reason: str) -> Line:
    """Return the line of a check that does not apply."""
    return Line(check, reason, "", "skip", "")
