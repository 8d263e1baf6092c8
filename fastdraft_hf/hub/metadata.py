"""The Hub's rules for the metadata of a card, checked without the Hub.

The Hub checks the same at ``/api/validate-yaml`` when a card is pushed; here a mistake is found
when the card is made. Source of the lists: huggingface.co/docs/hub, "Model cards" and "Licenses".
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from fastdraft_hf._errors import FastDraftError, nearest

_IDS = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause
    bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0
    cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
    eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research
    lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0
    postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    grok2-community gemma unknown other
"""
LICENSES = frozenset(_IDS.split())
_LANGUAGE = re.compile(r"^[a-z]{2,3}$")
_NAME = re.compile(r"^[a-z0-9_.-]+$")
_WORDS_FOR_LANGUAGE = {"code", "multilingual"}
_DATASET_TYPE = re.compile(r"^(?:[\w.-]+/)?[\w.-]+$", re.ASCII)
_RELATIONS = {"finetune", "adapter", "quantized", "merge"}


def check_license(license: str, where: str) -> None:
    """Raise `FastDraftError` when the Hub does not know a license identifier."""
    if license not in LICENSES:
        hint = nearest(license, LICENSES) or "; `other` names one that is not on the Hub's list"
        raise FastDraftError(f"{where}: the Hub knows no license '{license}'{hint}")


def check_languages(languages: Any, where: str) -> None:
    """Raise `FastDraftError` for a language that is no code of ISO 639 in two or three letters."""
    for language in _listed(languages, where):
        if not _LANGUAGE.match(language) and language not in _WORDS_FOR_LANGUAGE:
            raise FastDraftError(
                f"{where}: '{language}' is no language code (two or three letters, such as en)"
            )


def check_model_id(name: Any, where: str) -> None:
    """Raise `FastDraftError` when ``name`` cannot be the id of a repository of the Hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise FastDraftError(f"{where}: '{name}' is no id of the Hub") from None


def check_metadata(data: Mapping[str, Any], *, where: str = "README.md") -> None:
    """Check the metadata of a model's or a dataset's card.

    Args:
        data: the card's YAML block as a mapping, as ``ModelCard.data.to_dict()`` gives it.
        where: the file's name, for messages.

    Raises:
        FastDraftError: naming the key: a license, language or id that the Hub does not take, a tag
            that is no text, or a model index that it would not show.
    """
    license = data.get("license")
    for one in _listed(license, f"{where}: license"):
        check_license(one, f"{where}: license")
    if license == "other":
        for key in ("license_name", "license_link"):
            if not isinstance(data.get(key), str):
                raise FastDraftError(f"{where}: {key}: needed, since license is other")
    check_languages(data.get("language"), f"{where}: language")
    for key in ("base_model", "datasets"):
        for one in _listed(data.get(key), f"{where}: {key}"):
            check_model_id(one, f"{where}: {key}")
    relation = data.get("base_model_relation")
    if relation is not None and relation not in _RELATIONS:
        known = ", ".join(sorted(_RELATIONS))
        raise FastDraftError(f"{where}: base_model_relation: '{relation}' is not one of {known}")
    for tag in _listed(data.get("tags"), f"{where}: tags"):
        if not tag.strip() or "\n" in tag:
            raise FastDraftError(f"{where}: tags: {tag!r} is no tag")
    for key in ("library_name", "pipeline_tag"):
        value = data.get(key)
        if value is not None and not (
            isinstance(value, str) and re.match(r"^[a-z0-9_.-]+$", value)
        ):
            raise FastDraftError(f"{where}: {key}: {value!r} is no name of the Hub's")
    if "model-index" in data:
        _check_model_index(data["model-index"], f"{where}: model-index")


def _check_model_index(index: Any, where: str) -> None:
    if not isinstance(index, list):
        raise FastDraftError(f"{where}: expected a list")
    for number, model in enumerate(index):
        place = f"{where}[{number}]"
        _text(model, "name", place)
        results = model.get("results")
        if not isinstance(results, list) or not results:
            raise FastDraftError(f"{place}.results: expected a list of results")
        for at, result in enumerate(results):
            _check_result(result, f"{place}.results[{at}]")


def _check_result(result: Any, place: str) -> None:
    if not isinstance(result, Mapping):
        raise FastDraftError(f"{place}: expected a mapping")
    _text(result.get("task"), "type", f"{place}.task")
    dataset = result.get("dataset")
    _text(dataset, "name", f"{place}.dataset")
    kind = _text(dataset, "type", f"{place}.dataset")
    if not _DATASET_TYPE.match(kind):
        raise FastDraftError(f"{place}.dataset.type: '{kind}' cannot be the id of a dataset")
    metrics = result.get("metrics")
    if not isinstance(metrics, list) or not metrics:
        raise FastDraftError(f"{place}.metrics: expected a list of metrics")
    for at, metric in enumerate(metrics):
        _text(metric, "type", f"{place}.metrics[{at}]")
        value = metric.get("value")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (number and math.isfinite(value)) and not (isinstance(value, str) and value):
            raise FastDraftError(f"{place}.metrics[{at}].value: {value!r} is no value")


def _text(mapping: Any, key: str, place: str) -> str:
    value = mapping.get(key) if isinstance(mapping, Mapping) else None
    if not isinstance(value, str) or not value:
        raise FastDraftError(f"{place}.{key}: a text is needed, got {value!r}")
    return value


def _listed(value: Any, where: str) -> list[str]:
    values = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
        raise FastDraftError(f"{where}: expected a text or a list of texts, got {value!r}")
    return values
