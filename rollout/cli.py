"""The `sluice` command: starts roles as processes, and speaks to the control API for the rest."""

import argparse
import os
import sys
from collections.abc import Sequence

from rollout.commands import (
    advise,
    cases,
    datasets,
    doctor,
    evaluations,
    keys,
    rollouts,
    routes,
    training,
    versions,
)
from rollout.commands.session import Session
from rollout.errors import SluiceError

# Started by the name of their module, in place of this process: signals reach them as they are,
# and this command imports none of what they need.
_ROLES = {
    "up": ("rollout.up", "start everything on this machine; Ctrl-C stops it"),
    "demo": ("trainer.demo", "drive the whole loop on a running Sluice, with real sentences"),
    "gateway": ("gateway", "run the data plane"),
    "controller": ("rollout.controller", "run the control API, the console and the judging loop"),
    "shadow": ("gateway.shadow", "run the comparing of captured exchanges"),
    "trainer": ("trainer.worker", "run the trainer"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 refused or failed, 2 wrong usage, 130 interrupted."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given and given[0] in _ROLES:
        _become(_ROLES[given[0]][0], given[1:])
    session = Session(_parser().parse_args(given))
    try:
        return int(session.options.run(session))
    except SluiceError as exc:
        session.warn(exc.message)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read the output has seen enough. Python must not complain about it on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    finally:
        session.close()


def _become(module: str, arguments: Sequence[str]) -> None:
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])  # noqa: S606  # no shell


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sluice",
        description="A gateway for models with shadow and canary rollout, and the loop that "
        "retrains what it serves.",
        epilog="`sluice COMMAND --help` says more about each.",
    )
    parsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (_, help_text) in _ROLES.items():
        parsers.add_parser(name, help=help_text, add_help=False)
    for part in (
        doctor,
        routes,
        versions,
        rollouts,
        cases,
        training,
        advise,
        datasets,
        evaluations,
        keys,
    ):
        part.add(parsers)
    return parser


if __name__ == "__main__":
    sys.exit(main())
