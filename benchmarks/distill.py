"""What distillation is worth: the examples' students, arm by arm and seed by seed, with what they cost.

    python -m edgekd.benchmarks.distill fashion-15 vad-15     # from a checkout, once the examples' teachers are there
    python -m edgekd.benchmarks.distill fashion-15 --arms control,best

Each task is a recipe of ``examples``, run by the stages that ``edgekd capture`` and ``edgekd distill`` run, so what is
trained stays trained and a stopped run goes on. ``benchmarks/results/distill.json`` is written anew after each student.
The bar is judged on the test split; settings are those of the recipe, which were chosen on validation.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgekd.console import progress_for
from edgekd.distillation.arms import CONTROL, arm_inputs, arms_of
from edgekd.distillation.distill import ArmResult, choose_arm, load_result
from edgekd.metrics import Quality
from edgekd.protocols import Progress
from edgekd.recipes.reading import load_recipe
from edgekd.recipes.seeds import first_seeds
from edgekd.reporting.answers import answers_of
from edgekd.reporting.verdict import Ratio, arm_rows, perplexity_ratio
from edgekd.stages.members import teacher_quality
from edgekd.stages.pipeline import capture_stage, distill_stage
from edgekd.stages.workspace import SPLITS, Workspace
from edgekd.store import load_card, read_json, write_json
from edgekd.types import Json

__all__ = ["BAND", "KEPT", "RESULTS", "ROOT", "TASKS", "Task", "judged", "judged_language"]

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "distill.json"
KEPT = 0.99
"""Share of the teacher's accuracy that a student within the band must keep."""
BAND = (0.10, 0.20)
"""Parameters of a student as a share of its teacher's, for which the bar holds."""
ERRORS = 2.0
"""By how many standard errors a student must beat the control where the control does not reach the bar itself."""


@dataclass(frozen=True)
class Task:
    """A recipe of the examples, and what it learns from what.

    Attributes:
        recipe: Its path in the checkout.
        said: Teacher, data and student, for the table.
    """

    recipe: str
    said: str


TASKS = {
    "digits": Task("examples/digits/edgekd.toml", "scikit-learn's digits: three convolutions to three narrow ones"),
    "fashion-15": Task("examples/fashion/share-15.toml", "Fashion-MNIST: a ResNet to five convolutions"),
    "fashion-2": Task("examples/fashion/share-2.toml", "Fashion-MNIST: a ResNet to three convolutions"),
    "spam": Task("examples/spam/edgekd.toml", "SpamAssassin: MiniLM to two convolutions"),
    "spam-5": Task("examples/spam/share-5.toml", "SpamAssassin: MiniLM to two convolutions on a narrow table of words"),
    "vad-15": Task("examples/vad/edgekd.toml", "voices in noise: Silero VAD to four convolutions"),
    "brown": Task("examples/brown/dist.toml", "the Brown corpus: SmolLM2 to a Llama of four layers"),
}


@dataclass
class Clock:
    """A progress that keeps what each piece of work took, and has what was finished written when the next one begins.

    Attributes:
        written: Called before a piece of work begins.
        spent: Of each piece that came to its end, hours of processor and of clock; of one that was stopped before,
            those since, with ``seen``, the share of its steps.
    """

    told: Progress
    written: Callable[[dict[str, Json]], None]
    spent: dict[str, Json] = field(default_factory=dict)
    _piece: tuple[str, float, float, float] = ("", 0.0, 0.0, 0.0)

    def start(self, what: str, total: int, done: int = 0) -> None:
        self.written(self.spent)
        self._piece = (what, time.process_time(), time.monotonic(), 1 - done / max(1, total))
        self.told.start(what, total, done)

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.told.advance(steps, note)

    def finish(self) -> None:
        what, processor, clock, seen = self._piece
        self.spent[what] = {
            "cpu_hours": round((time.process_time() - processor) / 3600, 4),
            "hours": round((time.monotonic() - clock) / 3600, 4),
            **({"seen": round(seen, 3)} if seen < 1 else {}),
        }
        self.told.finish()

    def say(self, line: str) -> None:
        self.told.say(line)


def judged(teacher: float, share: float, arms: dict[str, list[float]], best: str, gain: Json | None) -> Json:
    """Whether the bar is met: what it asks, what was found, and the verdict.

    Args:
        teacher: Its accuracy.
        share: The student's parameters as a share of the teacher's.
        arms: Test accuracies, by seed.
        best: The arm that validation chose.
        gain: Of it over the control, in points, with its standard error.

    Returns:
        ``kept``, the share of the teacher's accuracy; ``control_kept``; ``met``: True, False, or None, with ``reason``,
        where the bar says nothing.
    """
    kept = {arm: sum(values) / len(values) / teacher for arm, values in arms.items()}
    found: Json = {"kept": kept[best], "control_kept": kept[CONTROL]}
    if not BAND[0] <= share <= BAND[1]:
        return {**found, "met": None, "reason": f"the bar is for {BAND[0]:.0%} to {BAND[1]:.0%} of the parameters"}
    if kept[best] < KEPT:
        return {**found, "met": False, "reason": f"it keeps less than {KEPT:.0%}"}
    if kept[CONTROL] >= KEPT:
        return {**found, "met": True, "reason": f"the control keeps {KEPT:.0%} as well"}
    if gain is None or gain["standard_error"] is None:
        return {**found, "met": None, "reason": "too few seeds to tell it from the control"}
    errors = gain["points"] / gain["standard_error"] if gain["standard_error"] else float("inf")
    return {**found, "met": errors > ERRORS, "reason": f"{errors:.1f} standard errors above the control"}


def judged_language(teacher: float, arms: dict[str, list[float]], best: str, ratio: Ratio) -> Json:
    """The same of a language model, which the bar says nothing of: next tokens are not classes that a student of these
    sizes could know as well as its teacher; it is held against its control by perplexity.

    Args:
        teacher, arms, best: Shares of next tokens that are right; as of :func:`judged`.
        ratio: Its perplexity over the control's.
    """
    kept = {arm: sum(values) / len(values) / teacher for arm, values in arms.items()}
    interval = "" if ratio.low is None else f" ({ratio.low:.3f}× to {ratio.high:.3f}×)"
    reason = f"of language models, by perplexity: {ratio.ratio:.3f}× the control's{interval}"
    return {"kept": kept[best], "control_kept": kept[CONTROL], "met": None, "reason": reason}


def run(name: str, seeds: int, arms: Sequence[str], path: Path) -> None:
    """Capture what is not captured, train what is not trained, and write the results after each student.

    Args:
        arms: Of the recipe's, those to train now; a cache that holds features wants the arm that learns from them.
    """
    recipe = load_recipe(ROOT / TASKS[name].recipe)
    told = {"seeds": first_seeds(recipe.distill.seeds, seeds), **({"arms": tuple(arms)} if arms else {})}
    work = Workspace(recipe.model_copy(update={"distill": recipe.distill.model_copy(update=told)}))

    def written(spent: Mapping[str, Json]) -> None:
        if work.folder.arm(CONTROL, work.recipe.distill.seeds[0]).is_dir():
            write(name, found(name, work, spent, _before(path, name)), path)

    clock = Clock(progress_for(), written)
    with work.folder.locked():
        capture_stage(work, clock)
        distill_stage(work, clock)
        written(clock.spent)


def found(name: str, work: Workspace, spent: Mapping[str, Json], before: Json) -> Json:
    """What is known of a task by now.

    Args:
        spent: What this run took, by piece of work.
        before: What was written of the task before: of a student that is not trained again, the hours are there.
    """
    recipe, folder, test = work.recipe, work.folder, work.splits.test
    results = _finished(work)
    teacher = teacher_quality(work)
    card = load_card(folder.arm(CONTROL, recipe.distill.seeds[0]))
    hours = {**before.get("hours", {}), **spent}
    share = card.parameters / (work.teacher.parameters or card.parameters)
    arms, seeds = _comparable(work, results)
    whole = [results[arm, seed] for seed in seeds for arm in arms]
    report: Json = {
        "said": TASKS[name].said,
        "recipe": TASKS[name].recipe,
        "test_samples": len(test),
        "train_samples": len(work.splits.train),
        "teacher": {
            "accuracy": teacher.accuracy,
            **_perplexity(teacher),
            "parameters": work.teacher.parameters,
            "macs": work.teacher.macs,
        },
        "student": {"parameters": card.parameters, "macs": card.macs, "share": share},
        "distill": {key: value for key, value in recipe.distill.model_dump(mode="json").items() if key in _TOLD},
        "arms": {
            arm: {str(seed): _judgement(result) for (other, seed), result in sorted(results.items()) if other == arm}
            for arm in arms_of(recipe)
        },
        "hours": hours,
        **{key: before[key] for key in ("torchdistill",) if key in before},
    }
    if not whole:
        return report
    best = choose_arm(whole).arm
    tests = {arm: [result.test for result in whole if result.arm == arm] for arm in arms}
    accuracies = {arm: [test.accuracy for test in own] for arm, own in tests.items()}
    if work.is_language_model:
        ratios = {arm: perplexity_ratio(own, tests[CONTROL]) for arm, own in tests.items() if arm != CONTROL}
        gains = {CONTROL: None, **{arm: ratio.to_json() for arm, ratio in ratios.items()}}
        bar = judged_language(teacher.accuracy, accuracies, best, ratios[best])
    else:
        rows = arm_rows(whole, best, answers_of(work, arms, seeds))
        gains = {row.arm: None if row.gain is None else row.gain.to_json() for row in rows}
        bar = judged(teacher.accuracy, share, accuracies, best, gains[best])
    return {**report, "best": best, "gains": gains, "bar": bar}


def _perplexity(quality: Quality) -> Json:
    """Of a language model."""
    return {} if quality.perplexity is None else {"perplexity": quality.perplexity}


def _judgement(result: ArmResult[Quality]) -> Json:
    """Of one student, for the file."""
    found = {"validation": result.validation.accuracy, "test": result.test.accuracy}
    return {**found, "teacher_agreement": result.test.teacher_agreement, **_perplexity(result.test)}


_TOLD = ("epochs", "batch_size", "learning_rate", "weight_decay", "temperature", "label_weight", "overrides", "threads")


def _finished(work: Workspace) -> dict[tuple[str, int], ArmResult[Quality]]:
    """Students that are trained as the recipe says, by arm and seed."""
    data = {split: work.capture_key(split).to_json() for split in SPLITS}
    results = {}
    for seed in work.recipe.distill.seeds:
        for arm in arms_of(work.recipe):
            stage = f"distill-{work.folder.arm(arm, seed).name}"
            if work.folder.is_done(stage, arm_inputs(work.recipe, work.splits, arm, seed, data)):
                results[arm, seed] = load_result(work.recipe, arm, seed, Quality)
    return results


def _comparable(work: Workspace, results: Collection[tuple[str, int]]) -> tuple[list[str], list[int]]:
    """Arms, the control among them, and the seeds that all of these have: as many seeds as two arms have, then arms."""
    for count in range(len(work.recipe.distill.seeds), 0, -1):
        seeds = list(work.recipe.distill.seeds[:count])
        arms = [arm for arm in arms_of(work.recipe) if all((arm, seed) in results for seed in seeds)]
        if CONTROL in arms and len(arms) > 1:
            return arms, seeds
    return [], []


def _before(path: Path, name: str) -> Json:
    tasks: dict[str, Json] = read_json(path)["tasks"] if path.is_file() else {}
    return tasks.get(name, {})


def write(name: str, report: Json, path: Path) -> None:
    """Put what is known of a task into the file, beside the others."""
    tasks = read_json(path)["tasks"] if path.is_file() else {}
    packages = {package: importlib.metadata.version(package) for package in ("torch", "numpy", "edgekd")}
    machine = {"python": platform.python_version(), "machine": platform.machine(), "cores": str(os.cpu_count())}
    bar = {"kept": KEPT, "band": BAND, "standard_errors": ERRORS}
    write_json(path, {"bar": bar, "tasks": {**tasks, name: report}, "environment": {**packages, **machine}})


def main() -> None:
    """Run the tasks that are named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tasks", nargs="+", choices=TASKS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", default="", help="of the recipe's, with commas; all by default")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    for name in options.tasks:
        run(name, options.seeds, [arm for arm in options.arms.split(",") if arm], options.out)


if __name__ == "__main__":
    main()
