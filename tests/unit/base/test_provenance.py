"""A report can say where it came from."""

from rota import __version__
from rota.base.provenance import provenance


def test_provenance_names_version_seed_and_configuration():
    made = provenance(seed=3, config_hash="abc")
    assert (made.rota_version, made.seed, made.config_hash) == (__version__, 3, "abc")
    assert made.python
    assert made.platform
