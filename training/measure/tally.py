"""`tdm-train user-study tally`: counts of the answers to a page, with binomial intervals."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from tdm_runtime.whole_file import write_whole

CONFIDENCE = 0.95
CHOICES = ("first", "second", "tie")
REMEDY = "ask for the file that the page saves"


@dataclass(frozen=True)
class Votes:
    """Answers about some pairs."""

    a: int
    b: int
    ties: int

    @property
    def share_of_a(self) -> float | None:
        """Share of a among the answers that prefer a side; None if there is none."""
        return self.a / (self.a + self.b) if self.a + self.b else None

    def interval(self) -> tuple[float, float] | None:
        """Return the exact 95 % interval (Clopper and Pearson 1934) of a's share, which leaves ties out.

        It takes answers for independent. Those of one rater, or about one pair, may not be.
        """
        if not self.a + self.b:
            return None
        found = binomtest(self.a, self.a + self.b).proportion_ci(CONFIDENCE)
        return float(found.low), float(found.high)


@dataclass(frozen=True)
class Tally:
    """Counts of a study."""

    a: str
    b: str
    raters: int
    by_question: Mapping[str, Votes]
    by_prompt: Sequence[tuple[str, Votes]]
    """Each pair's prompt with the answers to all questions, in the order of the page."""


def read_key(file: Path) -> Mapping[str, Any]:
    """Read the key of a study.

    Raises:
        ValueError: The file is no key.
    """
    key = _json(file, "give key.json of the study with --key")
    if not {"study", "a", "b", "questions", "pairs"} <= key.keys():
        raise ValueError(f"{file} is no key of a user study; give key.json of the study with --key")
    return key


def tally(files: Sequence[Path], key: Mapping[str, Any]) -> Tally:
    """Count answers.

    Raises:
        ValueError: A file holds answers to another page, or something else; or two files are of one rater.
    """
    of_rater: dict[str, Path] = {}
    votes: Counter[tuple[int, int, str]] = Counter()
    for file in files:
        content = _json(file, REMEDY)
        rater, answers = content.get("rater"), content.get("answers")
        if not isinstance(rater, str) or not isinstance(answers, list):
            raise ValueError(f"{file} holds no answers; {REMEDY}")
        if content.get("study") != key["study"]:
            raise ValueError(
                f"{file} answers the page {content.get('study')!r}, and the key is of {key['study']!r}; leave it out"
            )
        if rater in of_rater:
            raise ValueError(f"{file} and {of_rater[rater]} are of one rater, {rater[:8]}; keep the longer one")
        of_rater[rater] = file
        seen: set[tuple[int, int]] = set()
        for answer in answers:
            pair, question, choice = _checked(file, answer, key)
            if (pair, question) in seen:
                raise ValueError(f"{file} answers question {question} of pair {pair} twice; {REMEDY}")
            seen.add((pair, question))
            first = key["pairs"][pair]["first"]
            second = "b" if first == "a" else "a"
            votes[pair, question, {"first": first, "second": second}.get(choice, "tie")] += 1
    numbers, questions = range(len(key["pairs"])), range(len(key["questions"]))
    return Tally(
        key["a"], key["b"], len(of_rater),
        {key["questions"][question]: _sum(votes, numbers, [question]) for question in questions},
        [(key["pairs"][pair]["prompt"], _sum(votes, [pair], questions)) for pair in numbers],
    )  # fmt: skip


def print_tally(files: Sequence[Path], key_file: Path, output: Path | None = None) -> Tally:
    """Count answers, print tables and write OUTPUT, a JSON file; see `tally`."""
    found = tally(files, read_key(key_file))
    print(f"a is {found.a}\nb is {found.b}\n{found.raters} raters\n")
    print("| question | a | b | no difference | a among a and b | 95% interval |\n|---|---|---|---|---|---|")
    for question, votes in found.by_question.items():
        print(f"| {question} | {votes.a} | {votes.b} | {votes.ties} | {_shown(votes)} |")
    print("\n| prompt | a | b | no difference |\n|---|---|---|---|")
    for prompt, votes in found.by_prompt:
        print(f"| {prompt} | {votes.a} | {votes.b} | {votes.ties} |")
    print(
        "\nThe interval is the exact binomial one. It leaves out answers without a preference, and takes the others for"
    )
    print("independent.")
    if output is not None:
        questions = {
            q: asdict(v) | {"share_of_a": v.share_of_a, "interval": v.interval()} for q, v in found.by_question.items()
        }
        content = asdict(found) | {"by_question": questions, "confidence": CONFIDENCE}
        write_whole(output, json.dumps(content, indent=2, ensure_ascii=False).encode())
    return found


def _sum(votes: Counter[tuple[int, int, str]], pairs: Sequence[int], questions: Sequence[int]) -> Votes:
    return Votes(*(sum(votes[p, q, side] for p in pairs for q in questions) for side in ("a", "b", "tie")))


def _shown(votes: Votes) -> str:
    share, interval = votes.share_of_a, votes.interval()
    if share is None or interval is None:
        return "- | -"
    return f"{share:.1%} | {interval[0]:.1%} to {interval[1]:.1%}"


def _checked(file: Path, answer: Any, key: Mapping[str, Any]) -> tuple[int, int, str]:
    limits = {"pair": len(key["pairs"]), "question": len(key["questions"])}
    is_good = isinstance(answer, dict) and answer.get("choice") in CHOICES
    if not is_good or any(type(answer.get(n)) is not int or not 0 <= answer[n] < limit for n, limit in limits.items()):
        raise ValueError(f"{file} has the answer {answer!r}, which the page cannot give; {REMEDY}")
    return answer["pair"], answer["question"], answer["choice"]


def _json(file: Path, remedy: str) -> Mapping[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}); {remedy}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object; {remedy}")
    return content
