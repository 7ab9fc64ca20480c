"""A command of mitrain, run in this process."""

import json
from typing import Any

from mitrain.cli import main


def as_json(capsys: Any, *words: object) -> Any:
    """What ``mitrain WORDS --json`` prints, which has to end well."""
    capsys.readouterr()
    code = main([*map(str, words), "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)
