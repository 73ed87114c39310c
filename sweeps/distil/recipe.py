"""The recipe: examination, pairs, race, distillation and comparison, each paid from one budget; resumable."""

from __future__ import annotations

from collections.abc import Callable

from sweeps.distil.outcome import DistilOutcome
from sweeps.distil.place import Place
from sweeps.distil.settings import DistilSettings


def distil(
    place: Place, settings: DistilSettings, on_spend: Callable[[int], object] = lambda evaluations: None
) -> DistilOutcome:
    """Distil one theta per NFE. What an earlier command with equal settings has done in this storage is not repeated.

    Args:
        place: Where it runs.
        settings: What is asked.
        on_spend: Receives velocity evaluations as they are spent, for a progress bar; those of a resumed distillation
            come at once.

    Raises:
        UserError: The budget is too small for anything, the teacher is refused, or the model cannot be distilled.
    """
    raise NotImplementedError
