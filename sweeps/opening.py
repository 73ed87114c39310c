"""Opens the session of a command that runs in this process by default, and on Ray if asked."""

from __future__ import annotations

from typing import Any

from orchestrator.config.experiment import ExperimentConfig
from sweeps.session import LocalSession, Session


def open_session(
    config: ExperimentConfig, *, address: str | None, on_ray: bool | None = None, **options: Any
) -> Session:
    """Open a session.

    Args:
        config: A checked configuration.
        address: Ray cluster; None for none, or for the Ray that this process is connected to or starts.
        on_ray: Whether hosts are actors of Ray; None: if there is an address.
        options: Further arguments of :class:`~sweeps.session.Session`.

    Raises:
        UserError: Something in the configuration or the environment cannot work.
    """
    if address is None and not on_ray:
        return LocalSession(config, **options)
    from sweeps.ray_session import RaySession  # imports Ray

    return RaySession(config, address=address, **options)
