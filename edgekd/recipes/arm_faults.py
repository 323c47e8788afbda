"""What is wrong with a recipe's arms: losses that there are not, and what does not go with teacher, data or cache."""

from __future__ import annotations

from pathlib import Path

from edgekd.recipes.faults import table_of, texts_of
from edgekd.recipes.places import function_faults
from edgekd.recipes.recipe import MOST_DRAWS, TRAINING, ArmOptions, Distill, Recipe
from edgekd.types import Json

__all__ = ["LABEL_LOSSES", "VECTOR_LOSSES", "arm_faults", "known_losses", "learning_faults"]

LABEL_LOSSES = ("dkd", "tckd", "nckd")
"""Losses that compare classes by which of them is the label."""

VECTOR_LOSSES = ("mse", "cosine")
"""Names in ``edgekd.distillation.feature_losses.FEATURE_LOSSES``; see :func:`known_losses`."""


def known_losses() -> tuple[str, ...]:
    """Names in ``edgekd.distillation.losses.LOSSES``; not read there: that imports torch. A test holds them equal."""
    return ("kd", "dist", "reverse_kl", "jsd", "dkd", "tckd", "nckd", "hard")


def arm_faults(table: Json, folder: Path) -> list[str]:
    """What can be seen in the file, whatever else is wrong with it.

    Args:
        table: All of it.
        folder: That paths are relative to.
    """
    distill = table_of(table.get("distill"))
    features, arms, mixes = table_of(distill.get("features")), texts_of(distill.get("arms")), _mixes(distill)
    embeds = table_of(table.get("teacher")).get("gives") == "embedding"
    faults = []
    for name, spec in features.items():
        if name in known_losses() or ":" in name:
            faults.append(f"distill.features.{name}: a loss has this name; an arm would not know which is meant")
        loss = table_of(spec).get("loss")
        if isinstance(loss, str) and ":" in loss:
            faults += function_faults(f"distill.features.{name}.loss", loss, folder)
        elif isinstance(loss, str) and loss not in VECTOR_LOSSES:
            known = ", ".join(VECTOR_LOSSES)
            faults.append(f"distill.features.{name}.loss: {loss!r} is not known; there are {known}, module:function")
    for index, arm in enumerate(arms):
        if arm not in mixes and arm not in features and arm != "control":
            faults += _loss_faults(f"distill.arms.{index}", arm, folder, embeds)
    for arm, losses in mixes.items():
        for name in losses.keys() - features:
            faults += _loss_faults(f"distill.overrides.{arm}.losses", name, folder, embeds)
    if embeds:
        faults += _embedding_faults(table)
    faults += _control_faults(distill)
    faults += _override_faults(distill)
    ship = distill.get("ship", "best")
    if ship not in ("best", "control", *(arms or known_losses())):
        faults.append(f"distill.ship: {ship!r} is not an arm; 'best' or one of distill.arms would work")
    return faults


def learning_faults(recipe: Recipe) -> list[str]:
    """What can be seen once every value is known."""
    return [*_codec_faults(recipe), *_mixed_label_faults(recipe), *_feature_faults(recipe)]


def _loss_faults(key: str, name: str, folder: Path, embeds: bool) -> list[str]:
    if ":" in name:
        return function_faults(key, name, folder)
    if embeds:
        known = ", ".join(VECTOR_LOSSES)
        wrong = f"{key}: {name} compares no embeddings; there are {known}, and module:function"
        return [] if name in VECTOR_LOSSES else [wrong]
    if name in known_losses():
        return []
    return [
        f"{key}: no loss called {name!r}; there are {', '.join(known_losses())}, or module:function; "
        "a mix has [distill.overrides.<arm>] losses = {...}"
    ]


def _mixes(distill: Json) -> dict[str, Json]:
    """Arms with losses of their own, by name."""
    tables = {arm: table_of(own).get("losses") for arm, own in table_of(distill.get("overrides")).items()}
    return {arm: losses for arm, losses in tables.items() if isinstance(losses, dict)}


def _control_faults(distill: Json) -> list[str]:
    """What the control does not hear: it learns from labels alone, but may be trained otherwise."""
    own = table_of(table_of(distill.get("overrides")).get("control"))
    return [
        f"distill.overrides.control.{key}: the control learns from labels alone; there are {', '.join(TRAINING)}"
        for key in own
        if key in ArmOptions.model_fields and key not in TRAINING
    ]


def _override_faults(distill: Json) -> list[str]:
    """Tables for arms that are not trained, which nobody would read."""
    overrides, arms = distill.get("overrides", {}), distill.get("arms", Distill().arms)
    if not isinstance(overrides, dict) or not isinstance(arms, list | tuple):
        return []
    trained = list(dict.fromkeys(("control", *map(str, arms))))
    return [
        f"distill.overrides.{arm}: no arm {arm!r} is trained; distill.arms has {', '.join(trained)}"
        for arm in overrides
        if arm not in trained
    ]


def _embedding_faults(table: Json) -> list[str]:
    """What does not go with a teacher of embeddings."""
    data, distill, compress = (table_of(table.get(name)) for name in ("data", "distill", "compress"))
    said = {
        "distill.arms": "arms" not in distill,
        "distill.features": "features" in distill,
        "data.tokens": "tokens" in data,
        "data.mix": "mix" in data,
        "compress.prune": "prune" in compress,
        "compress.qat_epochs": bool(compress.get("qat_epochs")),
    }
    why = {"distill.arms": 'needs to be said, as ["mse", "cosine"]: the usual arms compare classes'}
    return [
        f"{key}: {why.get(key, 'does not go with a teacher of embeddings yet; leave it out')}"
        for key, wrong in said.items()
        if wrong
    ]


def _codec_faults(recipe: Recipe) -> list[str]:
    """A cache of the top classes, or of draws, does not serve every loss."""
    codec = recipe.teacher.codec or ""
    if codec.startswith("top") and (reason := recipe.distill.needs_all_classes()):
        return [f"teacher.codec: {codec!r} keeps the top classes alone, and {reason}; take 'dense-f16'"]
    if codec.startswith("sampled") and int(codec.removeprefix("sampled")) > MOST_DRAWS:
        return [f"teacher.codec: {codec!r} are more draws than one byte counts; sampled{MOST_DRAWS} are the most"]
    if codec.startswith("sampled") and (reason := recipe.distill.not_served_by_draws()):
        return [f"teacher.codec: {codec!r} keeps draws alone, and {reason}; take 'top50', or 'kd' with temperature = 1"]
    return []


def _mixed_label_faults(recipe: Recipe) -> list[str]:
    """A loss that looks at the one label of a sample has nothing to look at when samples are mixed."""
    if recipe.data.mix is None:
        return []
    looking = [(arm, loss) for arm in recipe.distill.arms for loss in recipe.distill.mix(arm).losses]
    return [
        f"distill: {arm}: {loss} looks at the one label of a sample, and data.mix makes it two; kd, dist … do not"
        for arm, loss in looking
        if loss in LABEL_LOSSES
    ]


def _feature_faults(recipe: Recipe) -> list[str]:
    """Features of a teacher that there is not."""
    count = len(recipe.teacher.members)
    return [
        f"distill.features.{name}.member: {spec.member} is no teacher; they are numbered 0 to {count - 1}"
        for name, spec in recipe.distill.features.items()
        if spec.member >= count
    ]
