"""A site as a record."""

import dataclasses

from fqcompile.report import Plan, Site


def test_recipe_is_neither_compared_nor_shown_nor_written(plan: Plan) -> None:
    site = plan.sites[1]
    bare = dataclasses.replace(site, recipe=None)
    assert site.recipe is not None
    assert bare == site and hash(bare) == hash(site)
    assert "recipe" not in repr(site)
    assert "recipe" not in site.as_dict()


def test_dict_holds_every_other_field(plan: Plan) -> None:
    names = {f.name for f in dataclasses.fields(Site)} - {"recipe"}
    assert set(plan.sites[2].as_dict()) == names
    assert plan.sites[2].as_dict()["shape"] == [8, 2048]


def test_column_is_told_from_group(plan: Plan) -> None:
    assert [site.per_column for site in plan.sites] == [True, False, False, False]


def test_weights_of_a_stack_are_counted(plan: Plan) -> None:
    assert plan.sites[1].num_weights == 8 * 1024 * 2048
