"""Which rank torchrun's table of failures is about."""

import pytest

from harness.triage.tables import launcher_table

ENTRY = """\
[{index}]:
  time      : 2026-01-01_00:{minute:02}:{second:02}
  host      : localhost
  rank      : {rank} (local_rank: {rank})
  exitcode  : {code} (pid: 4{rank})
  error_file: <N/A>
"""


def table(others: list[tuple[int, int, int, int]], first: tuple[int, int, int, int]) -> str:
    """torch's text for (rank, exit code, minute, second)."""

    def entry(index: int, rank: int, code: int, minute: int, second: int) -> str:
        return ENTRY.format(index=index, rank=rank, code=code, minute=minute, second=second)

    above = "".join(entry(index, *one) for index, one in enumerate(others, 1)) or "  <NO_OTHER_FAILURES>\n"
    line = "-" * 60
    head = "harness.payload.train FAILED"
    return f"{head}\n{line}\nFailures:\n{above}{line}\nRoot Cause (first observed failure):\n{entry(0, *first)}{line}\n"


@pytest.mark.parametrize(
    ("others", "first", "rank", "code"),
    [
        ([], (2, 1, 0, 3), 2, 1),
        ([(1, -9, 0, 3)], (0, 1, 0, 3), 1, -9),  # killed; its peer lost the connection in the same moment
        ([(1, 1, 0, 3), (2, -11, 0, 4)], (0, 1, 0, 3), 2, -11),
        ([(1, -15, 0, 3)], (0, 1, 0, 3), 0, 1),  # ended by torchrun, after the first
        ([(1, -9, 0, 34)], (0, 1, 0, 3), 0, 1),  # ended by torchrun, when its grace was over
        ([(1, 1, 0, 3)], (0, -9, 0, 3), 0, -9),
    ],
)
def test_a_killed_rank_comes_before_those_that_only_lost_it(
    others: list[tuple[int, int, int, int]], first: tuple[int, int, int, int], rank: int, code: int
) -> None:
    found = launcher_table(table(others, first))
    assert found is not None
    assert (found.rank, found.exit_code) == (rank, code)


def test_a_table_with_an_impossible_time_is_read_all_the_same() -> None:
    text = table([(1, -9, 0, 3)], (0, 1, 0, 3)).replace("2026-01-01", "2026-99-99")
    found = launcher_table(text)
    assert found is not None
    assert found.rank == 0
