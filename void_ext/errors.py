"""Errors of the package itself; bad arguments raise the built-in kinds."""


class LibraryError(ImportError):
    """The native libraries are missing, do not load, or were asked for what this machine lacks; says what to do."""
