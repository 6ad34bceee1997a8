"""Names of what belongs to one of several maps."""

import doctest

import pytest

from limber_jax import map_names
from limber_jax.config import Compute
from limber_jax.errors import UserError
from limber_jax.models.limber import Limber, LimberConfig, Projector


def test_examples_are_true():
  assert doctest.testmod(map_names) == (0, 3)


@pytest.mark.parametrize("what", ("prompt", "cider_d/in", ""))
@pytest.mark.parametrize("name", ("", "random", "a@b", "é 1"))
def test_splitting_undoes_joining(what, name):
  assert map_names.split(map_names.join(what, name)) == (what, name)
  assert map_names.by_map({map_names.join(what, name): 1}) == {name: {what: 1}}


@pytest.mark.parametrize("name", ("blind", "blind_text", "blind_zeros"))
def test_a_projector_may_not_be_called_what_metrics_without_an_image_are(name):
  with pytest.raises(UserError, match=f"extra_projectors: a projector called '{name}'.*choose another name"):
    Limber.from_config(LimberConfig(extra_projectors={name: Projector()}), Compute())
