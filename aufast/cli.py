"""The command `aufast`: the first run on a photograph, and what can compute here."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import aufast


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: words after the command's name; None for those of the process.

    Returns:
        The exit status: 0, or 1 where the input could not be used, with one sentence on stderr.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (OSError, TypeError, ValueError, ImportError) as error:
        print(f"aufast: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="aufast", description="Facial action units, fast.")
    parser.add_argument("--version", action="version", version=f"aufast {aufast.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="run both models on a photograph and draw what they see")
    demo.add_argument(
        "images", nargs="*", metavar="IMAGE", help="photographs; without one, scikit-image's astronaut"
    )
    demo.add_argument(
        "--weights", metavar="DIR", help="a folder saved by save_pretrained, or one holding `margl` and `aar`"
    )
    demo.add_argument(
        "--out", metavar="DIR", default="demo", help="where the pictures go (default: %(default)s)"
    )
    demo.set_defaults(run=_demo)

    state = commands.add_parser(
        "backends", help="say who can compute the operators here, and why others cannot"
    )
    state.set_defaults(run=_backends)
    return parser


def _demo(options: argparse.Namespace) -> int:
    from aufast.demo import run_demo

    return run_demo(options.images, weights=options.weights, out=options.out)


def _backends(options: argparse.Namespace) -> int:
    for name, state in aufast.backends().items():
        print(f"{name:<10} {state}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
