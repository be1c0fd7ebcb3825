"""What every test may use: the devices of this machine, and seeds.

A test that takes ``device`` runs once per device, so a new kind of device is one line in ``_DEVICES`` and no new test.
Seeds differ from run to run and are printed when a test fails; ``BNB_TEST_SEED=<number>`` repeats a run.
"""

from __future__ import annotations

import os
import random
import zlib

import pytest
import torch

# Device type -> is one here?
_DEVICES = {
    "cpu": lambda: True,
    "cuda": torch.cuda.is_available,
    "xpu": lambda: hasattr(torch, "xpu") and torch.xpu.is_available(),
    "mps": torch.backends.mps.is_available,
}
DEVICES = [name for name, present in _DEVICES.items() if present()]

_SEED_VARIABLE = "BNB_TEST_SEED"

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # only the property tests need it
    pass
else:
    # No deadline: a first call may compile or load. A fixture without state is as good once as once an example.
    settings.register_profile(
        "bitsandbytes",
        deadline=None,
        max_examples=60,
        print_blob=True,
        derandomize=bool(os.environ.get("CI")),  # as all random inputs there follow from the content
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    settings.load_profile("bitsandbytes")


def pytest_configure(config: pytest.Config) -> None:
    # In the environment, so that parallel workers and subprocesses draw from the same seed.
    os.environ.setdefault(_SEED_VARIABLE, str(random.SystemRandom().randrange(2**31)))


def pytest_report_header(config: pytest.Config) -> str:
    return f"devices: {', '.join(DEVICES)}; {_SEED_VARIABLE}={os.environ[_SEED_VARIABLE]}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if report.failed:
        report.sections.append(("seed", f"repeat with {_SEED_VARIABLE}={os.environ[_SEED_VARIABLE]}"))
    return report


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Each device type of this machine in turn."""
    return request.param


@pytest.fixture
def accelerators() -> list[str]:
    """Every device type of this machine but the CPU."""
    return [name for name in DEVICES if name != "cpu"]


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """A seed of its own for every test, whatever ran before it."""
    own = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed((int(os.environ[_SEED_VARIABLE]) + own) % 2**31)
    random.seed(int(os.environ[_SEED_VARIABLE]) + own)


@pytest.fixture
def default_dtype():
    """``default_dtype(dtype)`` sets torch's default dtype for the rest of the test."""
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)
