"""`pytest` runs the short form of every test; `pytest --long` the long form, also of those marked slow, and writes down its figures."""
import csv
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

FIGURES = Path(__file__).parents[1]/"nbs/results/robustness/long.csv"   # study 27 reads it


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run the long form of every test, and the tests marked slow")
    parser.addoption("--minutes", type=float, default=0, help="after which a long form begins no further case (default: none)")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: a long form, run by pytest --long")
    settings.register_profile("laser", deadline=None, suppress_health_check=list(HealthCheck),
                              max_examples=1500 if config.getoption("--long") else 40)
    settings.load_profile("laser")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--long"): return
    for item in items:
        if "slow" in item.keywords: item.add_marker(pytest.mark.skip(reason="pytest --long runs it"))


class Record:
    """What a test counts: cases, failures, and the seconds of computing of the longest case (of waiting, where that is the point)."""

    def __init__(self, config):
        self.long, minutes = config.getoption("--long"), config.getoption("--minutes")
        self.end = time.monotonic() + 60*minutes if self.long and minutes else float("inf")
        self.cases, self.failures, self.seconds = 0, 0, 0.0

    @property
    def over(self):
        """Whether the time of a long form is up."""
        return time.monotonic() > self.end

    def upto(self, short, long):
        """Numbers from 0: `short` of them, or in the long form `long`, or fewer where its time is up."""
        for i in range(long if self.long else short):
            if self.over: return
            yield i

    def add(self, cases, failures, seconds):
        """Count cases that another process has run."""
        self.cases, self.failures, self.seconds = self.cases + cases, self.failures + failures, max(self.seconds, seconds)

    @contextmanager
    def case(self):
        """`with record.case():` is one case; an error in it is a failure."""
        start, failed = time.process_time(), False
        try: yield
        except Exception:
            failed = True
            raise
        finally: self.add(1, failed, time.process_time() - start)


@pytest.fixture
def record(request):
    """Counts cases; `pytest --long` writes a row for each test that uses it."""
    row, config = Record(request.config), request.config
    yield row
    if not row.long or not row.cases: return
    import resource
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    limit = f" --minutes {config.getoption('--minutes'):g}" if config.getoption("--minutes") else ""
    mine = dict(what=request.node.name.removeprefix("test_").replace("_", " "), cases=row.cases, failures=row.failures,
                worst_seconds=f"{row.seconds:.2f}", peak_megabytes=round(peak/(2**20 if sys.platform == "darwin" else 2**10)),
                command=f"pytest --long{limit} {request.node.nodeid.split('[')[0]}")
    rows = list(csv.DictReader(FIGURES.open(encoding="utf-8"))) if FIGURES.exists() else []
    rows = sorted([r for r in rows if r["what"] != mine["what"]] + [mine], key=lambda r: (r["command"].split("tests/")[1], r["what"]))
    FIGURES.parent.mkdir(parents=True, exist_ok=True)
    with FIGURES.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, mine, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
