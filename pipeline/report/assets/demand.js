// A demand that is moved: what the dual answers to it, live where the page holds all scores, else along the frontier.

/**
 * Answers to demands on one constraint, the others as the run has them.
 * `answer(j, demand)` is in the units of the demand: {multipliers, beta, multiplierEnds, scores, reward, kl, ess, below2, tilted}.
 */
function demandAnswers(data, train) {
  const { constraints } = data;
  const rows = train ? dualRows(train, constraints) : null;
  const references = rows ? constraints.map((one) => promptMeans(rows.starts, train.columns[one.column])) : null;
  const rewardReference = rows ? promptMeans(rows.starts, train.columns.reward) : null;

  /** Where a demand is asked of the dual: beyond the demand by what this solution's safeguards add. */
  const asked = (j, demand) => demand + constraints[j].added;

  function along(j, demand) {
    const { frontier } = constraints[j], at = asked(j, demand);
    let k = d3.bisectLeft(frontier.asked, at);
    k = Math.min(Math.max(k, 1), frontier.asked.length - 1);
    const low = frontier.asked[k - 1], high = frontier.asked[k];
    const part = high > low ? Math.min(1, Math.max(0, (at - low) / (high - low))) : 1;
    const mix = (values) => values[k - 1] + part * (values[k] - values[k - 1]);
    const mixAll = (lists) => lists[k].map((_, i) => lists[k - 1][i] + part * (lists[k][i] - lists[k - 1][i]));
    return {
      multipliers: mixAll(frontier.multipliers),
      predicted: mixAll(frontier.predicted),
      reward: mix(frontier.reward),
      kl: mix(frontier.kl),
      ess: mix(frontier.ess),
      beta: mix(frontier.beta),
    };
  }

  function interpolated(j, demand) {
    const found = along(j, demand);
    return {
      ...found,
      how: "interpolated",
      multiplierEnds: constraints.map(() => null),
      scores: constraints.map((one, i) => ({ value: found.predicted[i] - one.origin, ends: null })),
      reward: { value: found.reward - data.reward.reference, ends: null },
      below2: null,
    };
  }

  function solved(j, demand) {
    const thresholds = constraints.map((one, i) => one.sign * (i === j ? asked(j, demand) + one.origin : one.columnThreshold));
    // Always from the run's own multipliers: what is compared with the frontier must not begin there.
    const found = solveDual(rows, thresholds, data.beta, constraints.map((one) => one.scale), data.own.multipliers);
    if (!found) return null;
    const { weight, ess, kl } = found.tilted;
    const means = constraints.map((one) => promptMeans(rows.starts, train.columns[one.column], weight));
    const less = (values, other) => values.map((value, p) => value - other[p]);
    const slack = constraints.map((one, i) => {
      const threshold = one.unit === "margin" ? references[i].map((value) => value + asked(i, i === j ? demand : one.demanded)) : null;
      return means[i].map((value, p) => one.sign * (value - (threshold ? threshold[p] : one.sign * thresholds[i])));
    });
    const rewards = promptMeans(rows.starts, train.columns.reward, weight);
    return {
      how: "solved",
      multipliers: found.multipliers,
      beta: data.beta,
      multiplierEnds: multiplierIntervals(rows, found, slack),
      scores: constraints.map((one, i) => estimateMean(one.unit === "margin" ? less(means[i], references[i]) : means[i])),
      reward: estimateMean(less(rewards, rewardReference)),
      kl: mean(kl),
      ess: median(ess),
      below2: ess.filter((size) => size < 2).length / ess.length,
    };
  }

  /** Largest relative difference to the certified multipliers at a few points of each frontier; Infinity where one fails. */
  function disagreement() {
    let worst = 0;
    constraints.forEach(({ frontier, added }, j) => {
      if (!frontier) return;
      const step = Math.max(1, Math.floor(frontier.asked.length / 4));
      for (let k = 0; k < frontier.asked.length; k += step) {
        const found = solved(j, frontier.asked[k] - added);
        const largest = Math.max(...frontier.multipliers[k].map(Math.abs));
        if (!found) { worst = Infinity; return; }
        found.multipliers.forEach((one, i) => {
          worst = Math.max(worst, Math.abs(one - frontier.multipliers[k][i]) / Math.max(largest, 1e-3));
        });
      }
    });
    return worst;
  }

  // Four digits are the promise; where they do not hold, nothing solved here is shown.
  const difference = data.live ? disagreement() : null;
  const live = difference !== null && difference < 5e-5;
  return {
    live,
    difference,
    answer: (j, demand) => (live && solved(j, demand)) || interpolated(j, demand),
  };
}
