"""Engines and solvers, one a file; imported only as ``derc.backends.<name>``."""

if __name__ != "derc.backends":
    raise ImportError(f"import this package as derc.backends, not as {__name__}")
