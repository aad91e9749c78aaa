"""`python -m gateway --config FILE`: serve the data plane."""

import argparse
import contextlib
import importlib.util
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from gateway import workers
from gateway.settings import GatewaySettings
from rollout.errors import ConfigError, SluiceError
from rollout.settings import Settings, check_section, load_settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal comes; the exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s gateway %(levelname)s %(message)s")
    try:
        return _serve(options)
    except SluiceError as error:
        sys.stderr.write(f"gateway: {error.message}\n")
        return 1


def _serve(options: argparse.Namespace) -> int:
    # Until somebody can take it; it asks for the configuration to be read anew.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    configuration = _Configuration(options.config)
    settings = configuration.settings
    own = check_section(GatewaySettings, settings.gateway, "gateway")
    # Asked for here, so that what is missing is said once and not by each worker.
    _ = settings.store_url
    count = own.workers if options.workers is None else options.workers
    port = own.port if options.port is None else options.port
    with workers.listen(own.host, port, own.backlog) as sock:
        host, bound = sock.getsockname()[:2]
        log = logging.getLogger("gateway")
        log.info("listening on http://%s:%d; %s", host, bound, _hot_path())
        if count == 1:
            return workers.serve(settings, configuration.read, sock)
        return workers.supervise(
            count,
            settings.data_path / f"gateway-metrics-{bound}",
            lambda: workers.serve(configuration.settings, configuration.read, sock),
            configuration.refresh,
        )


def _hot_path() -> str:
    # Not imported: prometheus_client must be told first that there are several workers.
    found = importlib.util.find_spec("gateway.fast")
    compiled = found is not None and not str(found.origin).endswith(".py")
    return "the hot path is compiled" if compiled else "the hot path is plain Python"


class _Configuration:
    """The file; `settings` are those that were last found to be right."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.settings = self.read()

    def read(self) -> Settings:
        """Read the file anew. Raises ConfigError where it is not right."""
        settings = load_settings(self._path)
        check_section(GatewaySettings, settings.gateway, "gateway")
        return settings

    def refresh(self) -> None:
        """Start new workers by the file as it is now; if it is not right, by what it was."""
        # The workers say what is wrong.
        with contextlib.suppress(ConfigError):
            self.settings = self.read()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gateway", description=__doc__)
    parser.add_argument("--config", type=Path, help="sluice.toml; SLUICE_CONFIG names it too")
    parser.add_argument("--workers", type=_positive, help="processes that share the port")
    parser.add_argument("--port", type=int, help="0 takes any that is free")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("give a number from 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
