"""What a check of a dataset found: figures, problems, and both as text and as JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

__all__ = ["Finding", "Report"]

T = TypeVar("T")
_SHOWN = 3  # examples of each kind in the table; the JSON has all


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: short name of the class of problems, such as "missing-image".
        file: in which it is.
        record: image, annotation or line that it concerns.
        message: one line; both numbers where two disagree.
        level: "error": the dataset cannot be used as it is; "warning": look at it.
    """

    kind: str
    file: str
    record: str
    message: str
    level: str = "error"


@dataclass
class Report:
    """All findings of a dataset.

    Attributes:
        name: of the dataset.
        form: how its files are made, as in the metadata.
        figures: counts by what is counted.
        known: published counts by what is counted: ``{"value", "source", "exact"}``.
        findings: in the order in which they were found.
    """

    name: str
    form: str
    figures: dict[str, int] = field(default_factory=dict)
    known: dict[str, dict[str, Any]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def add(self, kind: str, file: Any, record: Any, message: str, level: str = "error") -> None:
        """Note a problem; arguments as `Finding`."""
        self.findings.append(Finding(kind, str(file), str(record), message, level))

    def attempt(
        self, kind: str, file: Any, record: Any, make: Callable[..., T], *args: Any
    ) -> T | None:
        """The result of ``make(*args)``; what it raises is noted, and None returned.

        KeyError, OSError, TypeError and ValueError count, the errors that wrong data cause.
        """
        try:
            return make(*args)
        except (KeyError, OSError, TypeError, ValueError) as error:
            self.add(kind, file, record, " ".join(str(error).split()) or type(error).__name__)
            return None

    def start(self, *names: str) -> None:
        """Put figures at 0, in the order in which they are to be shown."""
        for name in names:
            self.figures.setdefault(name, 0)

    def count(self, what: str, number: int = 1) -> None:
        """Add to a figure."""
        self.figures[what] = self.figures.get(what, 0) + number

    def number(self, level: str) -> int:
        """How many findings are of a level."""
        return sum(finding.level == level for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "dataset": self.name,
            "form": self.form,
            "ok": self.number("error") == 0,
            "errors": self.number("error"),
            "warnings": self.number("warning"),
            "figures": self.figures,
            "known": self.known,
            "findings": [asdict(finding) for finding in self.findings],
        }

    def as_text(self) -> str:
        """The figures, and of each kind of problem how often it is and the first examples."""
        lines = [f"{self.name} ({self.form})"]
        for what, number in self.figures.items():
            known = self.known.get(what)
            about = "" if known is None or known["exact"] else "about "
            beside = "" if known is None else f"   known: {about}{known['value']:,}"
            lines.append(f"  {what:32}{number:>12,}{beside}")
        kinds: dict[tuple[str, str], list[Finding]] = {}
        for finding in self.findings:
            kinds.setdefault((finding.level, finding.kind), []).append(finding)
        for (level, kind), found in sorted(kinds.items()):
            lines.append(f"  {level}: {kind}: {len(found):,}")
            lines += [f"    {f.file}: {f.record}: {f.message}" for f in found[:_SHOWN]]
            if len(found) > _SHOWN:
                lines.append(f"    and {len(found) - _SHOWN:,} more (--json FILE lists all)")
        lines.append(f"  {self.number('error'):,} errors, {self.number('warning'):,} warnings")
        return "\n".join(lines)
