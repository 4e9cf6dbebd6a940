"""What a machine's CPU is, as it is written down: ``host|portable|MODEL[,+FEATURE][,-FEATURE]``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

from tetrarch.errors import ValueProblem

__all__ = ["CpuSpec"]

_HOST: Final = ("host", "portable")


@dataclass(frozen=True)
class CpuSpec:
    """A name, and features more and less; all names as cpu_models.toml has them."""

    name: str = "host"
    """host is all that the engine offers, portable what each engine of the host does."""
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    @classmethod
    def parse(cls, value: object) -> Self:
        """Raises ValueProblem for a model or a feature that is none, with the nearest."""
        if isinstance(value, cls):
            return cls.parse(str(value))  # its values are checked as those that are written down
        if not isinstance(value, str):
            raise ValueProblem(f"{value!r} is no CPU model", mend="give host, or a name")
        name, *words = value.split(",")
        if not words and name in _HOST:
            return cls(name)
        from tetrarch.machine.cpu_models import feature_named, model_named, with_needs

        if name not in _HOST:
            model_named(name)
        signs: dict[str, str] = {}
        for word in words:
            sign, feature = word[:1], feature_named(word[1:]) if word[:1] in ("+", "-") else ""
            if not feature:
                raise ValueProblem(f"{word!r} is no change of a CPU", mend="write +NAME or -NAME")
            if signs.setdefault(feature, sign) != sign:
                raise ValueProblem(f"{feature} is added and removed", mend="give one of both")
        added = tuple(feature for feature, sign in signs.items() if sign == "+")
        removed = tuple(feature for feature, sign in signs.items() if sign == "-")
        for feature in added:
            for needed in sorted(with_needs([feature]) & set(removed)):
                raise ValueProblem(
                    f"{feature} is added, and {needed}, which it needs, is removed",
                    mend=f"leave -{needed} out",
                )
        return cls(name, added, removed)

    def __str__(self) -> str:
        changes = [f"+{name}" for name in self.added] + [f"-{name}" for name in self.removed]
        return ",".join((self.name, *changes))
