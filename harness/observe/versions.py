"""Ranks that have other versions installed than most."""

from __future__ import annotations

from collections import Counter

from harness.observe.lines import RankSeen, Seen
from harness.schema import OddRank

MAX_ODD = 8
MAX_DIFFERENCES = 8


def odd_ranks(seen: Seen) -> tuple[OddRank, ...]:
    """Ranks whose digest is not the commonest one; of two equal camps the one of the lowest rank is right.

    A rank that said nothing of its versions (an older payload, a file cut early) is neither odd nor counted.
    """
    said = {rank.rank: str(digest) for _, rank in sorted(seen.ranks.items())
            if (digest := rank.start.get("versions_sha256"))}  # fmt: skip
    if len(set(said.values())) < 2:
        return ()
    usual = Counter(said.values()).most_common(1)[0][0]  # of equals the first met, which has the lowest rank
    normal = next(seen.ranks[rank] for rank, digest in said.items() if digest == usual)
    odd = [seen.ranks[rank] for rank, digest in said.items() if digest != usual]
    return tuple(_odd(rank, normal) for rank in odd[:MAX_ODD])


def _odd(rank: RankSeen, normal: RankSeen) -> OddRank:
    names = sorted({*rank.libraries, *normal.libraries})
    apart = [name for name in names if rank.libraries.get(name) != normal.libraries.get(name)]
    sentences = tuple(
        f"{name} {rank.libraries.get(name, 'missing')} (most ranks: {normal.libraries.get(name, 'missing')})"
        for name in apart[:MAX_DIFFERENCES]
    )
    return OddRank(rank=rank.rank, host=rank.start.get("host"), differences=sentences)
