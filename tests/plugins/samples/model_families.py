"""A model family under a name of its own, built by another plugin's code."""

from lorakit import hookimpl
from lorakit.options import ModelOptions
from lorakit.records import ModelFamily


def build(config, options):
    from lorakit_llama.model import build

    return build(config)


@hookimpl
def lorakit_model_families():
    return [
        ModelFamily(
            name="wee", summary="wee", options=ModelOptions, model_types=("wee",), build=build
        )
    ]
