"""Rules across sections: one that holds always, one that fails for a certain seed."""

from lorakit import hookimpl


@hookimpl
def lorakit_recipe_problems(recipe):
    if recipe.run.seed == 13:
        raise KeyError("thirteen")
    if recipe.optimizer.options.lr > 0.5 and recipe.training.max_grad_norm == 0.0:
        return ["training.max_grad_norm: a learning rate above 0.5 needs clipping"]
    return []
