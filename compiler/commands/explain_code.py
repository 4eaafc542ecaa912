"""peftc explain CODE"""

import re
from dataclasses import asdict

import typer

from peftc.compiler.report import code_report, console
from peftc.grammar.errors.register import entry

_CODE = re.compile(r"[A-Za-z]\d+")


def explain_code(code: str, json: bool) -> None:
    """Tell what an error code means and how it is mended. What is no code lacks a model, which is wrong usage."""
    if not _CODE.fullmatch(code):
        raise typer.BadParameter("give a model to explain a spec on, or the code of an error, such as E201")
    found = entry(code)
    if json:
        console.write_json(asdict(found))
    else:
        console.show(code_report.code_report(found))
