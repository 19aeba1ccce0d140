"""Every method of PEFT trains with streamed probes, as the table of docs/peft.md says."""

from __future__ import annotations

import peft
import pytest

import zoext
from support.peft_methods import (
    HEAD,
    METHODS,
    MU,
    PAGE,
    Method,
    outcome,
    plain_slope,
    row,
    runs_batched,
    table_of_the_page,
)

#: Losses of these models are float32 numbers between 4 and 8, even where their weights are float64.
LAST_BIT = 2**-21


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_method(method: Method) -> None:
    if not hasattr(peft, method.config):
        pytest.skip(f"PEFT {peft.__version__} has no {method.config}")
    if method.config == "AdamssConfig":
        pytest.importorskip("sklearn")
    built = method.build()
    mezo = outcome(method, built, zoext.MeZO)
    lozo, agzo = (outcome(method, built, recipe, estimates=1) for recipe in (zoext.LOZO, zoext.AGZO))
    expected = plain_slope(method, built)
    assert expected != 0
    assert mezo.slope == pytest.approx(expected, abs=2 * LAST_BIT / (2 * MU))
    for each in (mezo, lozo, agzo):
        assert each.changed == (), "the probes restore every weight and buffer"
        assert each.unmoved == (), "a step moves every trainable weight"
        assert each.gradients == ()
    assert mezo.error == lozo.error == ""
    assert not agzo.error or agzo.error.startswith("ActivationSubspace")
    if PAGE.exists():
        assert row(method, mezo, agzo, runs_batched(method, built)) in table_of_the_page(), (
            "python -m support.peft_methods writes the table"
        )


@pytest.mark.skipif(
    not peft.__version__.startswith("0.21."), reason="the page lists the methods of PEFT 0.21"
)
def test_the_table_has_every_method_of_peft() -> None:
    known = {config.__name__ for config in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.values()}
    assert {method.config for method in METHODS} == known
    if PAGE.exists():
        table = table_of_the_page()
        assert table.startswith(HEAD)
        names = [line.split(" | ")[0].removeprefix("| ") for line in table.removeprefix(HEAD).splitlines()]
        assert names == [method.name for method in METHODS]
