"""Write a base model without weights, in a process of its own: config, tokenizer, chat template.

`python -m harness.payload.base job.json FOLDER`
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def write(variant: dict[str, Any], folder: Path) -> None:
    """Lay `config.json` and the tokenizer of `variant` into `folder`."""
    from harness.payload import tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(variant["config"], indent=1) + "\n", encoding="utf-8")
    tokenizer.build(variant).save_pretrained(str(folder))


if __name__ == "__main__":
    write(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["variant"], Path(sys.argv[2]))
