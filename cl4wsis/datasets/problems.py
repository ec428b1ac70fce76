"""Several things wrong with the data at once, told together."""

from collections.abc import Sequence

from cl4wsis.errors import DataError

LISTED_PROBLEMS = 20
"""Problems, or names, that a message lists; the rest is counted."""


class ProblemsError(DataError):
    """Several problems at once; the message lists the first.

    Args:
        problems: all of them, one line each.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        rest = len(problems) - LISTED_PROBLEMS
        more = [f"... and {rest} more problems"] if rest > 0 else []
        super().__init__("\n".join([*problems[:LISTED_PROBLEMS], *more]))
        self.problems = list(problems)


def raise_problems(problems: Sequence[str]) -> None:
    """Raise if there is a problem.

    Raises:
        DataError: one line per problem.
    """
    if problems:
        raise ProblemsError(problems)


def problems_of(error: DataError) -> list[str]:
    """Return the single problems of an error."""
    return error.problems if isinstance(error, ProblemsError) else [str(error)]
