"""The `hardmix` command, also as `python -m hardmix`, which launchers such as `accelerate launch -m hardmix` call."""

from __future__ import annotations

import sys


def main() -> None:
    """The command line, or a sentence where the library was installed without it."""
    try:
        from hardmix.cli import main as command
    except ModuleNotFoundError as error:
        sys.stderr.write(
            f'hardmix: the command line needs {error.name}, which is not installed; run pip install "hardmix[train]".\n'
        )
        raise SystemExit(2) from None
    command()


if __name__ == "__main__":
    main()
