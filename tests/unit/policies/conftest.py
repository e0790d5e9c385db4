"""What the tests of all three kinds of policy share."""

import pytest
from hypothesis import Phase, settings


@pytest.fixture
def unshrunk():
    """Take the first counter-example as it is, the same every time: shrinking it is for people."""
    before = settings.get_current_profile_name()
    settings.register_profile("unshrunk", phases=[Phase.generate], database=None, derandomize=True)
    settings.load_profile("unshrunk")
    yield
    settings.load_profile(before)
