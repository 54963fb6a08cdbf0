"""The error that both packages' `forbid_compiles` raises."""


class LateCompileError(RuntimeError):
    """Something was compiled that warm-up should have compiled before."""
