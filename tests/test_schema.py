import re
from decimal import Decimal
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, StrictBool

from fastdraft_hf._config import Count, Number, Section, parse_count
from fastdraft_hf._errors import FastDraftError
from fastdraft_hf.data.config import GenerateConfig
from fastdraft_hf.draft.config import DesignConfig
from fastdraft_hf.train.section import training_section


class Inner(Section):
    width: Count = Field(3, description="how wide")
    kind: Literal["oak", "pine"] = Field("oak", description="which wood")
    rate: Number | None = Field(None, description="how fast")

    def check_values(self) -> None:
        if self.width < 0:
            raise FastDraftError(f"width: must not be negative, got {self.width}")


class Outer(Section):
    name: str = Field(description="what it is called")
    flag: StrictBool = Field(False, description="whether")
    rates: list[Number] = Field([0.5], description="several")
    parts: list[Inner] = Field([], description="planks")
    named: dict[str, Inner] = Field({}, description="planks by name")
    inner: Inner = Field(default_factory=Inner, description="one plank")


FACTORS = {"k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@pytest.mark.parametrize("cls", [DesignConfig, GenerateConfig, training_section()])
def test_defaults_of_the_real_sections_are_valid(cls: type[Section]) -> None:
    plain = cls().model_dump()
    assert cls(**plain) == cls()
    assert all(p["description"] for p in cls.model_json_schema()["properties"].values())


BAD: list[tuple[dict[str, Any], str]] = [
    ({"name": "x", "flg": True}, r"^flg: unknown key \(did you mean 'flag'\?\)$"),
    ({"name": "x", "inner": {"widht": 3}}, r"^inner\.widht: unknown key \(did you mean 'width'"),
    ({"name": "x", "parts": [{}, {"kid": "oak"}]}, r"^parts\[1\]\.kid: unknown key .*'kind'"),
    ({"name": "x", "named": {"a": {"width": "wide"}}}, r"^named\.a\.width: expected a whole num"),
    ({"name": "x", "parts": [{"kind": "pin"}]}, r"^parts\[0\]\.kind: 'pin' is not one of .*'pine'"),
    ({"name": "x", "rates": [1, "fast"]}, r"^rates\[1\]: expected a number, got 'fast'"),
    ({"name": "x", "rates": 3}, r"^rates: expected a list, got 3"),
    ({"name": "x", "named": [1]}, r"^named: expected a mapping"),
    ({"name": "x", "inner": 3}, r"^inner: expected a mapping of keys, got 3"),
    ({"name": "x", "flag": "yes"}, r"^flag: expected true or false, got 'yes'"),
    ({"name": 3}, r"^name: expected a text, got 3"),
    ({"name": "x", "inner": {"width": True}}, r"^inner\.width: expected a whole number, got True"),
    ({"name": "x", "inner": {"width": 1.5}}, r"^inner\.width: expected a whole number, got 1\.5"),
    ({"name": "x", "inner": {"width": float("nan")}}, r"^inner\.width: expected a whole number"),
    ({"name": "x", "inner": {"rate": True}}, r"^inner\.rate: expected a number, got True"),
    ({"name": "x", "inner": {"width": -1}}, r"^inner\.width: must not be negative"),
    ({"flag": True}, r"^name: missing.*what it is called"),
    ({"name": "x", "inner": {"zzzzzz": 1}}, r"zzzzzz: unknown key; valid: width, kind, rate"),
]


@pytest.mark.parametrize(("data", "message"), BAD)
def test_errors_name_the_path(data: dict[str, Any], message: str) -> None:
    with pytest.raises(FastDraftError, match=message):
        Outer(**data)


@pytest.mark.parametrize(
    ("text", "number"),
    [("1.5k", 1500), ("0", 0), ("1_000", 1000), ("1,000", 1000), ("1T", 10**12), (" 3k ", 3000)],
)
def test_counts(text: str, number: int) -> None:
    assert parse_count(text) == number
    assert Inner(width=text).width == number


@pytest.mark.parametrize("text", ["", "M", "1.5", "0.0001k", "-3", "1e6", "5 M x", "0x10", "5m"])
def test_no_counts(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a (whole )?count"):
        parse_count(text)
    with pytest.raises(FastDraftError, match="width: expected a whole number"):
        Inner(width=text)


@given(st.integers(0, 10**15), st.integers(0, 999), st.sampled_from(list(FACTORS)))
def test_counts_with_decimals_are_exact(whole: int, thousandths: int, unit: str) -> None:
    text = f"{whole}.{thousandths:03d}"
    assert parse_count(text + unit) == int(Decimal(text) * FACTORS[unit])


def test_numbers_that_yaml_leaves_as_text() -> None:
    data = yaml.safe_load("{name: x, inner: {rate: 1e-3, width: 4.0}}")
    assert isinstance(data["inner"]["rate"], str)  # or this test is about nothing
    inner = Outer(**data).inner
    assert inner.rate == 1e-3
    assert (inner.width, type(inner.width)) == (4, int)


def test_schema_marks_required_and_closes_objects() -> None:
    schema = Outer.model_json_schema()
    assert schema["required"] == ["name"]
    assert (
        schema["additionalProperties"] is schema["$defs"]["Inner"]["additionalProperties"] is False
    )
    number, text = schema["$defs"]["Inner"]["properties"]["width"]["anyOf"]
    assert number == {"type": "integer"}
    assert re.search(text["pattern"], "50M")
    assert not re.search(text["pattern"], "50 apples")


def test_what_is_wrong_inside_a_mapping_is_said() -> None:
    class Weights(Section):
        objective: dict[str, Number] | str = Field("ce", description="weights or a name")

    assert Weights(objective={"ce": 1}).objective == {"ce": 1.0}
    assert Weights(objective="kl").objective == "kl"
    with pytest.raises(FastDraftError, match=r"objective\.kl: expected a number, got 'x'"):
        Weights(objective={"kl": "x"})
    with pytest.raises(FastDraftError, match=r"objective: expected a text, got 3"):
        Weights(objective=3)
