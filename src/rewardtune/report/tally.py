"""`rewardtune tally KEY VOTES...`: what people chose on an A/B sheet, with intervals, and how far they agree.

A vote for B counts 1, for A 0, a tie one half. Votes on a prompt are averaged over its pictures and raters first:
prompts are the independent draws, as everywhere (`stats.py`). Left out: models of raters (Bradley-Terry).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..stats import FEW, Interval, by_prompt, share_interval
from ..tables import text_table
from .page import finite
from .read import read_json

CHOICES = ("left", "right", "tie")


@dataclass(frozen=True, kw_only=True)
class Share:
    """B's share of some votes: prompts and votes behind it, and how often each was chosen."""

    prompts: int
    votes: int
    a: int
    b: int
    ties: int
    rate: Interval  # of B, from 0 to 1


@dataclass(frozen=True, kw_only=True)
class Tally:
    """agreement: share of pairs of votes on one pair of pictures that are equal; alpha: Krippendorff's, nominal.

    Both are NaN where no two raters voted on the same pair. left: share of the untied votes for the left side,
    averaged by pair first: all raters see the same sides.
    """

    a: str
    b: str
    all: Share
    categories: dict[str, Share]
    raters: dict[str, Share]
    agreement: float
    alpha: float
    left: Interval
    missing: int

    def as_json(self) -> str:
        return json.dumps(finite({"kind": "tally", **asdict(self)}), indent=1, ensure_ascii=False) + "\n"

    def as_text(self) -> str:
        """The table for a terminal."""
        rows = [_row("all", self.all)]
        rows += [_row(f"category {name}", share) for name, share in self.categories.items()]
        if len(self.raters) > 1:
            rows += [_row(f"rater {name}", share) for name, share in self.raters.items()]
        table = text_table(
            ["", "prompts", "votes", "for A", "ties", "for B", "B better than A [95 %]"],
            rows, flexible=0, numbers=[1, 2, 3, 4, 5],
        )  # fmt: skip
        few = [row[0] for row in rows if int(row[1]) < FEW]
        lines = [f"A: {self.a}", f"B: {self.b}", table, self.verdict()]
        if few:
            lines.append(f"few prompts (below {FEW}), so the intervals are rough: {', '.join(few)}")
        if math.isfinite(self.agreement):
            alpha = f"{self.alpha:.2f}" if math.isfinite(self.alpha) else "undefined: all votes are the same"
            words = f"{100 * self.agreement:.0f} % of the pairs of votes are equal, Krippendorff's alpha {alpha}"
            lines.append(f"agreement of the raters: {words} (1: all, 0: chance)")
        lines.append(f"the left picture won {_rate(self.left)} of the votes without a tie (50 % without a habit)")
        if self.missing:
            lines.append(f"{self.missing} votes are missing")
        return "\n".join(lines)

    def verdict(self) -> str:
        rate = self.all.rate
        if not rate.excludes(0.5):
            return "neither is better beyond the noise over prompts"
        return f"{'B' if rate.value > 0.5 else 'A'} is better"


def tally(key: str | Path, votes: Sequence[str | Path], *, missing: bool = False) -> Tally:
    """Read the key and the raters' files. missing: count what is there where raters left pairs out.

    Raises ConfigError for a damaged key, for votes of another sheet, for unknown, doubled and missing ones, and for a
    rater given twice.
    """
    facts, pairs = _read_key(Path(key))
    if not votes:
        raise ConfigError("no votes are given; give the JSON files that the raters saved")
    cast: dict[str, dict[str, str]] = {}
    for path in map(Path, votes):
        rater, chosen = _read(path, facts["sheet"], pairs)
        if rater in cast:
            raise ConfigError(
                f"{path}: the rater {rater!r} has voted in another file too; give one file for each rater"
            )
        lacking = [pair for pair in pairs if pair not in chosen]
        if lacking and not missing:
            raise ConfigError(
                f"{path}: {len(lacking)} of {len(pairs)} votes are missing (the first: {lacking[0]}); let {rater} "
                "finish the sheet (opened again in the same browser, it goes on), or pass --missing to count the rest"
            )
        cast[rater] = chosen
    if not any(cast.values()):
        raise ConfigError("there is not one vote in the files")
    ballots = [(rater, pairs[pair], choice) for rater, chosen in cast.items() for pair, choice in chosen.items()]
    named = sorted({row["category"] for row in pairs.values() if row["category"]})
    agreement, alpha = agree([[chosen[pair] for chosen in cast.values() if pair in chosen] for pair in pairs])
    return Tally(
        a=str(facts["a"]),
        b=str(facts["b"]),
        all=_share(ballots),
        categories={name: _share([ballot for ballot in ballots if ballot[1]["category"] == name]) for name in named},
        raters={name: _share([ballot for ballot in ballots if ballot[0] == name]) for name in cast},
        agreement=agreement,
        alpha=alpha,
        left=_left(ballots),
        missing=len(pairs) * len(cast) - len(ballots),
    )


def _read_key(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(the whole, pair -> its row). Raises ConfigError for what is no key, or one with something missing."""
    facts = read_json(path)
    if facts.get("kind") != "sheet-key":
        raise ConfigError(f"{path} is no key of a sheet; give the .key.json that `rewardtune sheet` wrote")
    try:
        pairs = {row["pair"]: row for row in facts["pairs"]}
        lacking = {"sheet", "a", "b"} - facts.keys() | ({"pairs"} if len(pairs) < len(facts["pairs"]) else set())
        lacking |= {name for row in pairs.values() for name in ("prompt", "category") if name not in row}
        lacking |= {"left" for row in pairs.values() if row.get("left") not in ("A", "B")}
    except (KeyError, TypeError, AttributeError):
        lacking = {"pairs"}
    if lacking:
        cure = "restore it as `rewardtune sheet` wrote it"
        raise ConfigError(f"{path} is damaged (missing or wrong: {', '.join(sorted(lacking))}); {cure}")
    return facts, pairs


def _read(path: Path, sheet: str, pairs: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """(the rater, pair -> left, right or tie)."""
    facts = read_json(path)
    rows = facts.get("votes")
    if facts.get("kind") != "sheet-votes" or not isinstance(rows, list):
        raise ConfigError(f"{path} holds no votes; give the JSON file that the sheet saved")
    if facts.get("sheet") != sheet:
        raise ConfigError(
            f"{path} holds votes on the sheet {facts.get('sheet')}, but the key is of {sheet}; give "
            "the key that was written with that sheet"
        )
    rater = str(facts.get("rater") or "").strip()
    if not rater:
        raise ConfigError(f"{path} names no rater; let the rater save it again with a name")
    chosen: dict[str, str] = {}
    for row in rows:
        pair, choice = (str(row.get("pair")), row.get("choice")) if isinstance(row, dict) else ("", None)
        if pair not in pairs:
            raise ConfigError(
                f"{path}: a vote on {pair!r}, which is no pair of the key; give the file as the sheet saved it"
            )
        if choice not in CHOICES:
            raise ConfigError(f"{path}, {pair}: the choice {choice!r} is unknown; legal: {', '.join(CHOICES)}")
        if pair in chosen:
            raise ConfigError(f"{path}: two votes on {pair}; keep one")
        chosen[pair] = choice
    return rater, chosen


def _share(ballots: Sequence[tuple[str, Mapping[str, Any], str]]) -> Share:
    """Of votes (rater, row of the key, choice). Pictures without a prompt count as a prompt each."""
    found = [_won(row, choice) for _, row, choice in ballots]
    values = [{"A": 0.0, "tie": 0.5, "B": 1.0}[one] for one in found]
    means = by_prompt(values, [row["prompt"] or row["pair"] for _, row, _ in ballots])
    counts = Counter(found)
    return Share(
        prompts=len(means),
        votes=len(values),
        a=counts["A"],
        b=counts["B"],
        ties=counts["tie"],
        rate=share_interval(means),
    )


def _left(ballots: Sequence[tuple[str, Mapping[str, Any], str]]) -> Interval:
    """The share of the untied votes for the left side, over pairs: each drew its sides once, for all raters."""
    untied = [(float(choice == "left"), row["pair"]) for _, row, choice in ballots if choice != "tie"]
    return share_interval(by_prompt([side for side, _ in untied], [pair for _, pair in untied]))


def _won(row: Mapping[str, Any], choice: str) -> str:
    """A, B or tie: who stood on the side that was chosen."""
    if choice == "tie":
        return "tie"
    return str(row["left"]) if choice == "left" else {"A": "B", "B": "A"}[row["left"]]


def agree(units: Sequence[Sequence[str]]) -> tuple[float, float]:
    """(share of equal pairs of votes, Krippendorff's nominal alpha) of the votes on each unit; NaN without pairs.

    Krippendorff 2011, "Computing Krippendorff's alpha-reliability": each unit's pairs weigh 1 / (votes - 1).
    """
    several = [unit for unit in units if len(unit) > 1]
    pairs = [one == two for unit in several for one, two in combinations(unit, 2)]
    if not pairs:
        return math.nan, math.nan
    together = Counter(vote for unit in several for vote in unit)
    n = sum(together.values())
    observed = sum(
        2 * sum(one != two for one, two in combinations(unit, 2)) / (len(unit) - 1) for unit in several
    )  # fmt: skip
    expected = sum(together[one] * together[two] for one in together for two in together if one != two) / (n - 1)
    alpha = 1 - observed / expected if expected else math.nan
    return sum(pairs) / len(pairs), alpha


def _row(name: str, share: Share) -> list[str]:
    counts = [share.prompts, share.votes, share.a, share.ties, share.b]
    return [name, *map(str, counts), _rate(share.rate)]


def _rate(rate: Interval) -> str:
    if not math.isfinite(rate.value):
        return "–"
    ends = f" [{100 * rate.low:.1f}, {100 * rate.high:.1f}]" if math.isfinite(rate.low) else ""
    return f"{100 * rate.value:.1f} %{ends}"
