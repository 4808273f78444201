"""Results files: JSON, whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

FORMAT = 1


def read(file: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{file} is not a results file of this version of pyreid bench")
    return content


def write(file: str, text: str) -> None:
    target = Path(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, target)
