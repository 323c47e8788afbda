"""What a sweep found, in sentences, and as lines of a recipe; written into it where that is asked."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from edgekd.choosing.sweep_space import Settings
from edgekd.reporting.pairing import Paired
from edgekd.store import atomic_write
from edgekd.types import Json

if TYPE_CHECKING:
    from edgekd.choosing.sweep import Contestant, Swept

__all__ = ["is_worse", "recipe_lines", "sentences", "swept_json", "write_settings"]


def sentences(swept: Swept) -> list[str]:
    """The best settings, where they were chosen, and what they gain where nothing was chosen."""
    trials, best = swept.trials, swept.best
    pruned = sum(trial.rank is None for trial in trials)
    winner, others = swept.contestants[0], swept.contestants[1:]
    lines = [
        f"Best of {len(trials)} trials ({pruned} pruned): {best.settings.words()}; chosen on {swept.chosen_on:,} "
        f"samples ({swept.chosen_words}), where it reached {_score(best.rank or 0.0, swept.is_tokens)}."
    ]
    lines.append(
        f"Judged on {swept.judged_on:,} validation samples that chose nothing, {_seeds(swept)}: "
        f"{_spread(winner, swept.is_tokens)}."
    )
    if not any(other.name == "the recipe's own" for other in others):
        lines.append("These are the recipe's own settings: no trial was better.")
    lines += [_over(other, swept) for other in others]
    return lines


def _over(other: Contestant, swept: Swept) -> str:
    gain = other.gain
    assert gain is not None
    unit = "nats a token" if swept.is_tokens else "points"
    scale, digits = (1.0, 4) if swept.is_tokens else (100.0, 2)
    over = f"{gain.difference * scale:+.{digits}f} {unit} over {other.name} ({_spread(other, swept.is_tokens)})"
    if gain.low is None or gain.high is None:
        return f"{over}; whether that is better cannot be told with {_seeds(swept)}."
    interval = f"95 % interval {gain.low * scale:+.{digits}f} to {gain.high * scale:+.{digits}f}"
    return f"{over}, {interval}: {_told(gain)}."


def _told(gain: Paired) -> str:
    if not gain.is_told:
        return "cannot be told apart"
    return "better" if gain.difference > 0 else "worse"


def _seeds(swept: Swept) -> str:
    return f"{len(swept.seeds)} seed{'s' if len(swept.seeds) > 1 else ''}"


def _spread(one: Contestant, is_tokens: bool) -> str:
    if one.deviation is None or is_tokens:
        return _score(one.score, is_tokens)
    return f"{one.score * 100:.2f} ± {one.deviation * 100:.2f} %"


def _score(score: float, is_tokens: bool) -> str:
    return f"perplexity {math.exp(-score):.1f}" if is_tokens else f"{score:.2%}"


def recipe_lines(arm: str, settings: Settings) -> str:
    """What the recipe has to say to train an arm so."""
    key = arm if arm.replace("_", "").replace("-", "").isalnum() else f'"{arm}"'
    return "\n".join(
        [f"[distill.overrides.{key}]", *(f"{name} = {value:g}" for name, value in settings.said().items())]
    )


def write_settings(path: Path, arm: str, settings: Settings) -> None:
    """Say them in the recipe's file; comments and everything else stay as they are."""
    import tomlkit

    document = tomlkit.parse(path.read_text(encoding="utf-8"))
    table = document.setdefault("distill", tomlkit.table())
    overrides = table.setdefault("overrides", tomlkit.table(is_super_table=True))
    own = overrides.setdefault(arm, tomlkit.table())
    for name, value in settings.said().items():
        own[name] = value
    atomic_write(path, tomlkit.dumps(document).encode())


def is_worse(swept: Swept) -> bool:
    """Whether the recipe's own settings are better, as far as can be told."""
    own = next((other for other in swept.contestants if other.name == "the recipe's own"), None)
    return own is not None and own.gain is not None and own.gain.high is not None and own.gain.high < 0


def swept_json(swept: Swept) -> Json:
    """All of it for scripts."""
    return {
        "arm": swept.arm,
        "best": swept.best.settings.to_json(),
        "sentences": sentences(swept),
        "recipe": recipe_lines(swept.arm, swept.best.settings),
        "notes": list(swept.notes),
        "seeds": list(swept.seeds),
        "chosen_on": swept.chosen_on,
        "judged_on": swept.judged_on,
        "trials": [
            {
                "number": trial.number,
                "settings": trial.settings.to_json(),
                "rank": trial.rank,
                "epochs": trial.epochs,
                "fault": trial.fault,
            }
            for trial in swept.trials
        ],
        "contestants": [
            {
                "name": one.name,
                "arm": one.arm,
                "settings": one.settings.to_json(),
                "score": one.score,
                "by_seed": one.scores.mean(axis=1).tolist(),
                "gain": None if one.gain is None else vars(one.gain),
            }
            for one in swept.contestants
        ],
    }
