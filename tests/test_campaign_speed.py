"""Which runs of a campaign have a clock in common, and what has none to count."""

import pytest

from aletheia_lora.campaign.report import tables
from campaign_results import campaign, method, result, spec


def find(rows, **wanted):
    (row,) = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return row


def test_a_method_under_the_other_trainer_is_timed_and_never_counted(tmp_path):
    plain = method("plain", strategy="all", trainer="trainer")
    campaign(tmp_path, spec("uniform", "paper", plain, match=["steps", "time"]), result)
    found = tables(tmp_path)
    pairs = {(row["match"], row["method"]) for row in found["comparisons"]}
    assert pairs == {("steps", "paper"), ("steps", "plain"), ("time", "paper")}
    assert {row["method"] for row in found["counted"]} == {"paper"}
    row = find(found["speed"], scope="all", method="plain")
    assert (row["n"], row["of"], row["counted_ratio"]) == (3, 3, None)


MACHINE = {"device": "CPU", "threads": "1"}
OWN = {"hits": 4, "bytes_held": 100, "bytes_written": 100}


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        ({"micro_batches": 2}, "steps cut into other micro-batches"),
        ({"environment": {**MACHINE, "workers": "2"}}, "measured with another number of cells at a time"),
        ({"environment": MACHINE}, None),  # an older record, which does not say
        ({"prefix_cache": {**OWN, "bytes_written": 60}}, "paper found its prefix cache filled"),
        ({"prefix_cache": OWN}, None),
        ({"prefix_cache": {"hits": 0, "bytes_held": 100, "bytes_written": 0}}, None),
    ],
    ids=str,
)
def test_seconds_that_did_not_pay_for_the_same_are_no_pair(tmp_path, measured, said):
    def outcome(content):
        other = content["method"]["name"] == "paper" and content["seed"] == 0
        usual = {"micro_batches": 1, "environment": {**MACHINE, "workers": "1"}}
        return result(content, **{**usual, **(measured if other else {})})

    campaign(tmp_path, spec("uniform", "paper"), outcome)
    row = find(tables(tmp_path)["speed"], scope="all", method="paper")
    assert (row["n"], row["of"], row["missing"]) == ((2, 3, f"m, t, seed 0: {said}") if said else (3, 3, ""))
