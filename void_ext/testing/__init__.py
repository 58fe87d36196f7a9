"""What tests of this package, and of models patched by it, compare with. Imports torch alone."""

from void_ext.testing.compare import assert_bits_equal, assert_close, assert_ulp_close
from void_ext.testing.tolerance import Tolerance, tolerance

__all__ = ["Tolerance", "assert_bits_equal", "assert_close", "assert_ulp_close", "tolerance"]
