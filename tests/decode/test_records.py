from __future__ import annotations

import json

from fastdraft_hf.decode.records import DecodingRecord


def make() -> DecodingRecord:
    return DecodingRecord(
        path="transformers",
        task="humaneval",
        key="H/1",
        temperature=0.6,
        num_assistant_tokens=3,
        tokens=[1, 2, 3],
        seconds=0.25,
        target_passes=2,
        drafted=6,
        accepted=1,
        rounds=[(3, 1), (3, 0)],
        first_token_seconds=0.125,
    )


def test_a_record_survives_json() -> None:
    record = make()
    read = DecodingRecord.from_dict(json.loads(json.dumps(record.to_dict())))
    assert read == record
    assert all(isinstance(pair, tuple) for pair in read.rounds)  # JSON has lists only


def test_a_record_of_an_older_journal_is_read() -> None:
    old = make().to_dict()
    del old["first_token_seconds"]
    assert DecodingRecord.from_dict(old).first_token_seconds is None
