"""Where a result came from: what every report must carry to be believed and repeated."""

import platform

import msgspec

from rota import __version__


class Provenance(msgspec.Struct, frozen=True, omit_defaults=True):
    """Enough to run the same thing again."""

    rota_version: str
    seed: int | None
    config_hash: str
    journal_digest: str | None = None
    python: str = ""
    platform: str = ""


def provenance(*, seed: int | None, config_hash: str, journal_digest: str | None = None) -> Provenance:
    """The provenance of a result made by this process."""
    return Provenance(
        rota_version=__version__,
        seed=seed,
        config_hash=config_hash,
        journal_digest=journal_digest,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
    )
