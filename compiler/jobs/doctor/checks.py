"""Which checks there are, in which order, and what they need."""

from dataclasses import dataclass

_MODELS = "peftc.compiler.jobs.doctor.model_checks"
_LIBRARIES = "peftc.compiler.jobs.doctor.library_checks"


@dataclass(frozen=True)
class Check:
    """A function that says what it saw, or raises. Its module is imported only where checks are run.

    `needs` are packages without which there is nothing to check.
    """

    name: str
    module: str
    function: str
    needs: tuple[str, ...] = ()


CHECKS = (
    Check("trace", _MODELS, "trace"),
    Check("parity", _MODELS, "parity"),
    Check("training", _MODELS, "training"),
    Check("save and load", _MODELS, "save_and_load"),
    Check("prefix", _MODELS, "prefix"),
    Check("export", _MODELS, "export"),
    Check("accelerators", _MODELS, "accelerators"),
    Check("peft", _LIBRARIES, "peft", ("peft",)),
    Check("accelerate", _LIBRARIES, "accelerate", ("accelerate",)),
    Check("bitsandbytes", _LIBRARIES, "bitsandbytes", ("bitsandbytes",)),
    Check("torchao", _LIBRARIES, "torchao", ("torchao",)),
    Check("hqq", _LIBRARIES, "hqq", ("hqq",)),
    Check("onnx", _LIBRARIES, "onnx", ("onnx", "onnxscript", "onnxruntime")),
    Check("trl", _LIBRARIES, "trl", ("trl",)),
)

# Libraries that a check needs and whose releases nobody has gone through.
UNTRIED = ("trl",)

DEVICES = Check("devices", _MODELS, "devices")
