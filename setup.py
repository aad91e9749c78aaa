"""Compiles the data plane's hot path to C where `SLUICE_COMPILE=1` asks for it; the rest of the build
is in pyproject.toml.

The modules stay plain Python, and without a compiler they run as that: an editable install does, so
that what is edited is what runs. `make compiled`, the image and `make bench` build them.
"""

import os

from setuptools import setup

# In the path of each request. What is left out is run rarely, or consists of classes that are made
# by others (msgspec, pydantic) and stay Python.
HOT = (
    "gateway/accounts.py",
    "gateway/answers.py",
    "gateway/attempts.py",
    "gateway/auth.py",
    "gateway/balance.py",
    "gateway/call.py",
    "gateway/capture.py",
    "gateway/connection.py",
    "gateway/evidence.py",
    "gateway/fast.py",
    "gateway/health.py",
    "gateway/limits.py",
    "gateway/metrics.py",
    "gateway/protocol.py",
    "gateway/quota.py",
    "gateway/receipts.py",
    "gateway/relay.py",
    "gateway/routing.py",
    "gateway/sse.py",
    "gateway/upstream.py",
    "gateway/wire.py",
    "rollout/assignment.py",
)


def extensions() -> list[object]:
    if os.environ.get("SLUICE_COMPILE") != "1":
        return []
    # Found only where it is needed; it comes with mypy.
    from mypyc.build import mypycify

    return list(mypycify(["--config-file=pyproject.toml", *HOT], opt_level="3", debug_level="0"))


setup(ext_modules=extensions())
