"""How tests call the command line: in this process, 100 columns wide, never asking the Hub."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from peftc.compiler.commands.cli import app

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}

SPEC = """adapter support = lora(rank = 4, alpha = 8) {
    on   layers[*].self_attn.{q_proj, v_proj}
    on   mlp.down_proj with rank = 2
    skip layers[0].mlp
}

adapter style = lora(rank = 2) {
    on all linear
}

activate support + 0.5 * style
"""


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def codes(self) -> list[str]:
        return [each["code"] for each in self.json["errors"]]


def peftc(*arguments: object, stdin: str | bytes | None = None) -> Result:
    environment = {"COLUMNS": "100", "NO_COLOR": "1"}
    done = CliRunner().invoke(app, [str(each) for each in arguments], input=stdin, env=environment)
    return Result(done.exit_code, done.stdout, done.stderr)


def write_model(directory: Path, **changes: Any) -> Path:
    """A directory with only a config.json; a change to None takes a field away."""
    directory.mkdir(parents=True, exist_ok=True)
    fields = {name: value for name, value in {**CONFIG, **changes}.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(fields))
    return directory
