"""Why a medium can't be used, before its name is known."""


class Unusable(Exception):
    """A medium is damaged, empty or too large; whoever knows its name says so in a `DataError`."""
