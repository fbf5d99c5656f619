"""`pytest` runs the short form of every test; `pytest --long` also those marked slow."""
import pytest


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run the tests marked slow too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: a long form, run by pytest --long")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--long"): return
    for item in items:
        if "slow" in item.keywords: item.add_marker(pytest.mark.skip(reason="pytest --long runs it"))
