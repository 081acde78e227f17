from tests.harness.workloads.conftest import quick_collection  # noqa: F401 (for these tests too)
