"""What the device holds of the last batch's rows, and whether it serves the next one."""

from operator import le
from typing import NamedTuple


class HeldRows(NamedTuple):
    """The batch buffer begins with ``num_rows`` rows of one ``code`` and one ``choice``.

    ``written`` counts the table entries computed and the choices made until then: a later one may
    be the code's or the choice.
    """

    code: int
    choice: int
    num_rows: int
    written: int

    def covers(self, wanted: "HeldRows") -> bool:
        """Whether a batch like ``wanted`` needs no upload."""
        return (
            self.num_rows >= wanted.num_rows
            and self[:2] == wanted[:2]
            and self.written == wanted.written
        )


class Round(NamedTuple):
    """Who had how many rows in a batch of one code, and how far each request was.

    Plain lists: numpy's calls are dear in a decoding round, whose caches are cold.
    """

    request_ids: list[str]
    first_rows: list[int]
    num_rows: int

    def leads_to(self, request_ids: list[str], first_rows: list[int], num_rows: int) -> bool:
        """Whether the same requests go on with as many rows; a preempted one begins anew."""
        return (
            num_rows == self.num_rows
            and request_ids == self.request_ids
            and all(map(le, self.first_rows, first_rows))
        )
