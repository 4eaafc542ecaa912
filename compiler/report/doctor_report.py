"""The tables of `peftc doctor`."""

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from peftc.compiler.report.installation import DoctorFacts

_STYLES = {"ok": "green", "fails": "bold red", "not installed": "dim"}


def doctor_report(facts: DoctorFacts) -> RenderableType:
    """Versions, devices, one line for each check, and under what fails what to do about it."""
    libraries = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name in ("library", "version", "tested", ""):
        libraries.add_column(name, no_wrap=True)
    libraries.add_row("python", facts.python, "", "")
    for library in facts.libraries:
        standing = library.standing if library.standing in ("newer", "older") else ""
        style = "dim" if library.version is None else ""
        libraries.add_row(
            library.name, library.version or "not installed", library.tested, Text(standing, "yellow"), style=style
        )
    devices = Text("\n".join(f"{name}: {told}" for name, told in facts.devices.items()))
    checks = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    checks.add_column("check", no_wrap=True)
    checks.add_column("", no_wrap=True)
    checks.add_column("s", justify="right", no_wrap=True)
    checks.add_column("", overflow="fold")
    for check in facts.checks:
        told = Text(check.told)
        if check.help:
            told.append(f"\nhelp: {check.help}", "cyan")
        checks.add_row(check.name, Text(check.status, _STYLES[check.status]), f"{check.seconds:.1f}", told)
    failed = [check.name for check in facts.checks if check.status == "fails"]
    end = Text(f"{len(failed)} of {len(facts.checks)} checks fail: {', '.join(failed)}", "bold red")
    if not failed:
        end = Text("everything that is installed works", "green")
    return Group(libraries, devices, checks, end)
