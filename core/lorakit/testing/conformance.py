"""All checks of everything that plugins offer, as cases for a test runner."""

from __future__ import annotations

import unittest
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from lorakit.catalog import KINDS, Catalog, Offered, load_catalog
from lorakit.plugins import Plugin
from lorakit.testing.failure import ConformanceError, ensure
from lorakit.testing.inputs import check_dataset, check_model_source, check_weight_format
from lorakit.testing.kernels import check_kernels
from lorakit.testing.layers import check_adapter, check_quantization
from lorakit.testing.models import check_model_family
from lorakit.testing.offers import check_torch_free
from lorakit.testing.steps import check_optimizer, check_precision
from lorakit.testing.storage import check_checkpointer, check_logger, sample_recipe

Samples = Mapping[str, Any]
"""By `kind: name`, what a check cannot invent: a small config.json for a model family, a row for
a dataset, a path for a weight format or a model source."""
Options = Mapping[str, Mapping[str, Any]]
"""By `kind: name`, the section's keys in place of the defaults."""

_WITH_OPTIONS: dict[str, Callable[..., None]] = {
    "adapter": check_adapter,
    "quantization": check_quantization,
    "optimizer": check_optimizer,
    "precision": check_precision,
    "checkpointer": check_checkpointer,
    "logger": check_logger,
}
_WITH_SAMPLE: dict[str, Callable[..., None]] = {
    "weight format": check_weight_format,
    "model source": check_model_source,
}


class Case(NamedTuple):
    """One check: `pytest.param(case.check, id=case.id)`."""

    id: str
    check: Callable[[], None]


def conformance_cases(
    catalog: Catalog | None = None,
    *,
    plugin: str | None = None,
    samples: Samples | None = None,
    options: Options | None = None,
) -> Iterator[Case]:
    """Yields every check of every installed plugin.

    Args:
        catalog: What is installed, by default.
        plugin: Only the plugins of that name, or of the distribution of that name.
        samples: See `Samples`.
        options: See `Options`.

    Yields:
        For each plugin that it is loaded, that its module is torch-free and its recipe rules
        hold; then, for each record, the check of its kind.
    """
    catalog = catalog or load_catalog()
    samples, options = samples or {}, options or {}
    for found in catalog.plugins:
        if plugin not in (None, found.name, found.distribution):
            continue
        yield Case(f"{found.label} loads", partial(_check_loaded, found))
        if found.status != "loaded":
            continue
        yield Case(f"{found.label} is torch-free", partial(check_torch_free, found.module))
        rules = [rule for rule, owner in catalog.rules if owner == found]
        for rule in rules:
            yield Case(f"{found.label} recipe problems", partial(_check_rule, rule))
        for kind in KINDS:
            for name, offered in sorted(catalog.offers[kind].items()):
                for offer in offered:
                    if offer.plugin == found:
                        key = f"{kind}: {name}"
                        check = partial(
                            _check_record, kind, offered, offer, samples.get(key), options.get(key)
                        )
                        yield Case(f"{found.label} {key}", check)


def check_plugin(
    name: str, *, samples: Samples | None = None, options: Options | None = None
) -> None:
    """Checks everything an installed plugin offers.

    Args:
        name: Of its distribution or of its entry point.
        samples: See `Samples`.
        options: See `Options`.

    Raises:
        ConformanceError: With everything that does not hold, a line each.
    """
    cases = list(conformance_cases(plugin=name, samples=samples, options=options))
    ensure(cases, f"no plugin {name!r} is installed (see `lorakit plugins list`)")
    failures = []
    for case in cases:
        try:
            case.check()
        except unittest.SkipTest:
            continue
        except ConformanceError as error:
            failures.append(f"{case.id}: {error}")
        # A verb that raises what its contract does not know.
        except Exception as error:
            failures.append(f"{case.id}: {error!r}")
    ensure(not failures, "\n".join(failures))


def _check_loaded(plugin: Plugin) -> None:
    ensure(plugin.status == "loaded", f"{plugin.label} is {plugin.status}: {plugin.reason}")


def _check_rule(rule: Callable[..., Any]) -> None:
    found = rule(recipe=sample_recipe())
    ensure(
        isinstance(found, (list, tuple)) and all(isinstance(p, str) for p in found),
        f"lorakit_recipe_problems returns {found!r}, not a list of sentences",
    )


def _check_record(
    kind: str,
    offered: list[Offered],
    offer: Offered,
    sample: Any,
    options: Mapping[str, Any] | None,
) -> None:
    owners = [o.plugin.label for o in offered]
    ensure(len(offered) == 1, f"{kind} {offer.record.name!r} is offered by {owners}")
    record = offer.record
    if kind == "model family":
        ensure(
            sample is not None,
            "give a small config.json of it: "
            f'samples={{"model family: {record.name}": {{"model_type": ...}}}}',
        )
        check_model_family(record, sample)
    elif kind == "dataset":
        check_dataset(record, sample, options)
    elif kind == "kernels":
        check_kernels(record)
    elif kind in _WITH_SAMPLE:
        _WITH_SAMPLE[kind](record, sample)
    else:
        _WITH_OPTIONS[kind](record, options)
