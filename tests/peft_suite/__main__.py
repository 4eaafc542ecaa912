"""PEFT's own tests, with `peftc.peft` in PEFT's place: `python -m tests.peft_suite FOLDER`, then `... .page FOLDER`.

The tests come from PEFT's source distribution, of the release that the project's extra `test` installs. They are
downloaded into FOLDER, as is an environment of their own, and run twice: with PEFT, which says what passes on this
machine with these releases, and with peftc. Models of the Hub's are tiny ones, made here: no test needs the network.
What comes of each test is kept in FOLDER/peft.jsonl and FOLDER/peftc.jsonl; a test that is there is not run again.
"""

import argparse
import os
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = (
    "test_custom_models",
    "test_decoder_models",
    "test_initialization",
    "test_low_level_api",
    "test_config",
    "test_auto",
    "test_mixed",
)
NEEDS = (
    "attrs",
    "datasets",
    "diffusers",
    "parameterized",
    "scikit-learn",
    "scipy",
)  # what the tests import, beside the project's own extra
SIDES = ("peft", "peftc")
SUITES = "suites"  # below the folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", type=Path, help="an environment that has everything, instead of one in FOLDER")
    parser.add_argument("--files", nargs="*", default=FILES, help=f"of PEFT's tests; otherwise {', '.join(FILES)}")
    parser.add_argument("--every", type=int, default=1, help="only one test of so many, of each file")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--side", choices=SIDES, nargs="*", default=SIDES)
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    python = environment(folder / "env") if options.python is None else options.python.absolute()
    tests = source(folder, python)
    places = [str(each) for each in (tests, folder / SUITES, folder / "hub")]
    run([str(python), "-m", "tests.peft_suite.prepared", *places], check=True)
    for side in options.side:
        for file in options.files:
            suite(folder, python, side, file, options)


def environment(place: Path) -> Path:
    """An environment with the project, its extra `test`, and what PEFT's tests need."""
    python = place / "bin" / "python"
    if not python.exists():
        run([sys.executable, "-m", "venv", str(place)], check=True)
        run([str(python), "-m", "pip", "install", "-q", "-e", f"{ROOT}[test]", *NEEDS], check=True)
    return python


def source(folder: Path, python: Path) -> Path:
    """The tests of the installed release of PEFT, out of its source distribution."""
    asked = "from importlib.metadata import version; print(version('peft'))"
    version = subprocess.run([str(python), "-c", asked], capture_output=True, text=True, check=True).stdout.strip()
    tests = folder / f"peft-{version}" / "tests"
    if not tests.exists():
        download = [str(python), "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
        run([*download, "-d", str(folder), f"peft=={version}"], check=True)
        with tarfile.open(folder / f"peft-{version}.tar.gz") as packed:
            packed.extractall(folder, filter="data")
    return tests


def suite(folder: Path, python: Path, side: str, file: str, options: argparse.Namespace) -> None:
    """Run one file of tests on one side, what is not in its results."""
    command = [str(python), "-m", "pytest", "-q", "-n", str(options.workers), "-p", "tests.peft_suite.plugin"]
    command += ["-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", ".", "-W", "ignore", "--tb", "no"]
    command += ["--results", str(folder / f"{side}.jsonl"), "--every", str(options.every), f"peft_tests/{file}.py"]
    run(command, cwd=folder / SUITES / side, check=False, HF_HOME=str(folder / "hub"))


def run(command: list[str], *, check: bool, cwd: Path = ROOT, **variables: str) -> None:
    own = {
        "PYTHONPATH": os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)]),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run(command, cwd=cwd, check=check, env={**os.environ, **own, **variables})


if __name__ == "__main__":
    main()
