"""Fixtures of the tests of checkpoints."""

import pytest

from fp4pass.synthesize import synthesize


@pytest.fixture(scope="session")
def mixed(tmp_path_factory, tiny_sizes):
    """The directory of a tiny checkpoint like one of the mixed releases, written once."""
    made = {}

    def get(like):
        if like not in made:
            latent = {"latent": 32} if like in ("super", "ultra") else {}
            made[like] = synthesize(tmp_path_factory.mktemp(like) / "tiny", like, **tiny_sizes, **latent)
        return made[like]

    return get
