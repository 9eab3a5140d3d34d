"""The compiler's passes, one a file; imported only as ``derc.passes.<name>``."""

if __name__ != "derc.passes":
    raise ImportError(f"import this package as derc.passes, not as {__name__}")
