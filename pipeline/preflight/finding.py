"""What a preflight says: problems that would stop or spoil the run, and what else is worth knowing."""

from dataclasses import dataclass, field

__all__ = ["Findings", "Problem"]


@dataclass(frozen=True, slots=True)
class Problem:
    """where: the field of the config that it is about. what: expected and got. remedy: what to do."""

    where: str
    what: str
    remedy: str


@dataclass(kw_only=True)
class Findings:
    """Problems and notes of one check."""

    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def problem(self, where: str, what: str, remedy: str) -> None:
        self.problems.append(Problem(where, " ".join(what.split()), remedy))

    def add(self, other: "Findings") -> None:
        self.problems += other.problems
        self.notes += other.notes
