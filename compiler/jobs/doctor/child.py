"""The process that checks are run in: `python -m peftc.compiler.jobs.doctor.child MODULE:FUNCTION...`.

It prints one line of JSON for each, which the one who reads takes for the answer of the check it asked for next.
What a library prints goes to stderr; whatever it raises, on import too, is the reason that the check fails.
"""

import json
import os
import sys
import time
import traceback
import warnings
from importlib import import_module
from typing import Any

from peftc.grammar.diagnostics import AdapterError


def main() -> None:
    """Run the checks that are named, in this order."""
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for check in sys.argv[1:]:
        answers.write(json.dumps(answer(*check.split(":"))) + "\n")
        answers.flush()


def answer(module: str, function: str) -> dict[str, Any]:
    """What came of a check."""
    start = time.perf_counter()
    try:
        told, error = getattr(import_module(module), function)(), None
    except (Exception, SystemExit) as raised:
        told, error = None, reason(raised)
    return {"told": told, "error": error, "seconds": time.perf_counter() - start}


def reason(error: BaseException) -> str:
    """What was raised, in one line, and where: the last place that is not ours says who to ask."""
    if isinstance(error, AdapterError):
        first = error.diagnostics[0]
        return f"{first.code}: {first.message}"
    lines = str(error).strip().splitlines()
    kind = "" if type(error).__name__ == "CheckFailedError" else f"{type(error).__name__}: "
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if kind and frames else ""
    return f"{kind}{lines[0] if lines else 'no reason given'}{place}"


if __name__ == "__main__":
    main()
