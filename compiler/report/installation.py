"""What `peftc doctor` found: libraries, devices, checks."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["ok", "fails", "not installed"]


@dataclass(frozen=True)
class LibraryFacts:
    """A library here: its version, None where it is not installed, and the releases that were tested.

    `standing` is "tested", "newer", "older" or "" (not installed, or nothing is known of it).
    """

    name: str
    version: str | None
    tested: str = ""
    standing: Literal["tested", "newer", "older", ""] = ""


@dataclass(frozen=True)
class CheckFacts:
    """One check. `told` says what was seen, or why it fails; `help` what to do about it."""

    name: str
    status: Status
    told: str
    seconds: float = 0.0
    help: str = ""


@dataclass(frozen=True)
class DoctorFacts:
    """An installation, and whether peftc works in it."""

    python: str
    platform: str
    libraries: tuple[LibraryFacts, ...]
    devices: Mapping[str, str]
    checks: tuple[CheckFacts, ...]

    @property
    def ok(self) -> bool:
        """Whether no check fails; what is not installed is none."""
        return all(check.status != "fails" for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """All of it, and `ok`."""
        return {"ok": self.ok, **asdict(self)}
