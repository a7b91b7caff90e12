"""Published policies as points beside a run's own."""

from pathlib import Path

import pytest

from pipeline.config.loading import load_config
from pipeline.contracts.errors import ConfigError, InputError
from pipeline.published import read_points


def test_points_pair_the_metrics_of_a_policy():
    points = read_points("2505.19387", ["Tables 4 and 5"], score="safety_gain", reward="helpful_gain")
    assert len(points) == 14
    (point,) = [point for point in points if (point.method, point.setting) == ("one-shot", "b=3")]
    assert (point.score.value, point.score.ci95) == (0.352, (0.024, 0.68))
    assert (point.reward.value, point.reward.ci95) == (7.325, (7.17, 7.48))


def test_a_source_without_such_policies_is_refused_with_what_there_is():
    with pytest.raises(InputError, match=r"Table 9: no policy with both .* there are .*Figure 3 left \(safety_gain\)"):
        read_points("2405.19544", ["Table 9"], score="safety_gain", reward="helpful_gain")
    with pytest.raises(InputError, match="no gains are known of this paper"):
        read_points("1706.03762", ["Table 9"], score="safety_gain", reward="helpful_gain")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("published.sources", "[Figure 99]", "Figure 99: no policy with both"),
        ("published.constraints", "{harmles: safety_gain}", r"published.constraints.harmles.*`harmless`"),
        ("constraints.harmless.direction", "<=", r"published.constraints.harmless.*turn its score with `sign: -1`"),
        ("published.sources", "[]", r"published.sources"),
    ],
)
def test_a_recipe_that_names_no_published_policy_is_refused(key, value, message):
    with pytest.raises(ConfigError, match=message):
        load_config(Path("mocan-alpaca-7b"), {key: value})
