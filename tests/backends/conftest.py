"""What the tests of the engines share."""

import pytest

pytest.register_assert_rewrite("tests.backends.contract")
