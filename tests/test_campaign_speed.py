"""Which runs of a campaign have a clock in common, and what has none to count."""

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
