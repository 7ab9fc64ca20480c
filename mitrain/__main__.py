"""``python -m mitrain`` and ``deepspeed --module mitrain``: the same as the ``mitrain`` command."""

from mitrain.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
