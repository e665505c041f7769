"""One clear error, in one line of a test."""

import pytest


def refused(message, call, /, *args, error=ValueError, **options):
    """Assert that a call raises an error of one line that matches, and return that line."""
    with pytest.raises(error, match=message) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)
