"""Truth: what one process holds that shares its networks with nobody, divided."""

from __future__ import annotations

import pytest
from twins import close

from scoreaction.commands.plan import plan, resident_bytes, skeleton_of
from scoreaction.errors import UserError
from scoreaction.recipes.recipe import load_recipe


def resident(name: str, settings: list[str], processes: int) -> dict[str, int]:
    recipe = load_recipe(name, settings)
    return resident_bytes(recipe, skeleton_of(recipe), processes)


def test_of_shared_networks_each_process_holds_its_part():
    """Truth: the bytes of one process, divided; twin: those of all. A LoRA is whole in each."""
    trained = "trained weights, gradient, Adam, average"
    for name, settings, own in (("mixture", [], 4), ("digits", ["model.lora_rank=4"], 1)):
        whole, shared = (resident(name, [*settings, *more], 4) for more in ([], ["train.shard=true"]))
        close(shared["frozen weights"], whole["frozen weights"] / 4, atol=1.0, of_all=whole["frozen weights"])
        wrong = {"of_all": whole[trained]} if own > 1 else {"divided": whole[trained] / 4}
        close(shared[trained], whole[trained] / own, atol=1.0, **wrong)
        assert shared["encoded prompts of a call"] == whole["encoded prompts of a call"]
    with pytest.raises(UserError, match=r"^train\.shard: there is one process"):
        plan(load_recipe("mixture", ["train.shard=true"]))
