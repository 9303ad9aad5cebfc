"""Starts to build the samples when the first test runs, so that compilers work beside the tests."""

import functools
from concurrent.futures import ThreadPoolExecutor

import pytest

from .build import build_cuda, unavailable
from .samples import source

BUGS = ("BUG_WAIT", "BUG_LOOP_BARRIER", "BUG_OUT_OF_BOUNDS", "BUG_MISALIGNED")


@pytest.fixture(scope="session", autouse=True)
def builds(request):
    """Errors are those of the tests that need the library, which build it again."""
    if unavailable():
        yield
        return
    wanted = {item.path.stem for item in request.session.items}
    requests = []
    if {"test_cuda", "test_torch_glue"} & wanted:
        requests.append(dict(sources=(source("basics"),)))
    if "test_cuda" in wanted:
        requests += [dict(sources=(source(name),)) for name in ("gemm", "libraries")]
        requests.append(dict(sources=(source("wgmma"),), arch="90"))
    if {"test_cuda", "test_seeded_bugs", "test_torch_glue"} & wanted:
        requests.append(dict(sources=(source("bugs"),)))
    if "test_seeded_bugs" in wanted:
        requests += [dict(sources=(source("gemm"),), flags=(f"-D{bug}",)) for bug in BUGS]
    if "test_counters" in wanted:
        requests += [dict(sources=(source(name),), count=True) for name in ("counted", "gemm")]
    if "test_sanitizers" in wanted:
        requests += [dict(sources=(source("races"),), sanitizer=s) for s in ("thread", "address")]
    pool = ThreadPoolExecutor(3)
    for r in requests:
        pool.submit(functools.partial(build_cuda, **r))
    yield
    pool.shutdown(cancel_futures=True)
