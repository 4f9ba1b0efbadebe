"""What a reader must know beside the table: how bold and ± are decided, what is measured, what to be wary of."""

from typing import Any

from .table import UNSTEADY, one_seed

_BASELINES = {
    "classification": "the accuracy of guessing",
    "segmentation": "the mIoU of always predicting the most frequent class",
}


def warnings(results: dict[str, Any]) -> list[str]:
    """Sentences that weaken the whole comparison; none for a sound one."""
    found = []
    if one_seed(results):
        found.append("One seed proves nothing: no figure has a spread, so nothing is bold. Repeat with --seeds 3.")
    if results["settings"].get("quick"):
        found.append("A quick run: an epoch each on little data tests the machinery, and its figures mean nothing.")
    if len(set(results["commits"])) > 1:
        commits = ", ".join(short(commit) for commit in dict.fromkeys(results["commits"]))
        found.append(f"The runs come from several commits ({commits}): rows may differ because the code did.")
    failed = sum(len(seeds) for row in results["rows"].values() for seeds in row["failures"].values())
    if failed:
        found.append(f"Runs that failed: {failed}. The end of each log stands below the rows.")
    return found


def notes(results: dict[str, Any]) -> list[str]:
    """The lines under the table, each one sentence or two."""
    lines = []
    if not one_seed(results):
        seeds = ", ".join(map(str, results["settings"]["seeds"]))
        lines.append(
            "Bold: the best of its column, where the paired differences over seeds to every other row have a mean "
            f"beyond the 95 % interval of Student's t; ±: standard deviation over seeds {seeds}."
        )
    tasks = {name.split(".", maxsplit=1)[0] for name in results["baselines"]}
    known = [what for task, what in _BASELINES.items() if task in tasks]
    if known:
        lines.append(f"To beat: {' and '.join(known)}.")
    if any(results["controls"].values()):
        lines.append(
            "Best control / best: what the best control (no learned attention, or feed-forward) reaches of the best "
            "row without one. Where a control lies within the spread, its paired differences to that row having a mean "
            "no larger than their standard deviation, the column does not measure that part."
        )
    lines.append(
        "Size and speed are of the bare backbone; GFLOPs are multiply-accumulates of one image. Speeds were measured "
        "twice, in turns, alone on the machine after all runs: where the two differ by more than "
        f"{100 * UNSTEADY:.0f} % the cell says so instead of a figure. "
        "Step memory: growth beyond the weights in one training step of the bare backbone at batch 32."
    )
    return lines


def short(commit: str | None) -> str:
    """A commit as it is usually given; ``unknown`` outside of git."""
    return commit[:10] if commit else "unknown"
