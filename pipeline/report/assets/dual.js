// The dual on embedded scores: the same problem as stage1_dual.dual solves, small enough to solve while a slider moves.
//
//   D(λ) = mean over prompts of β log mean over responses exp((r + <λ, g − b>) / β),   λ ≥ 0 (of an equality: any)
//
// Scores g are turned so that higher is better. Everything is worked out in float64 from scores of 32 bits.

/** Reward and turned columns of responses: {starts, reward, scores: [Float32Array], signs, equality}. */
function dualRows(responses, constraints) {
  return {
    starts: responses.starts,
    reward: responses.columns.reward,
    scores: constraints.map((one) => responses.columns[one.column]),
    signs: constraints.map((one) => one.sign),
    equality: constraints.map((one) => one.direction === "="),
  };
}

/**
 * The tilted policy of multipliers: weights that sum to 1 within a prompt, and for each prompt the log-partition
 * against the reference (nats), the effective sample size and the KL divergence.
 */
function tilt(rows, multipliers, beta) {
  const { starts, reward, scores, signs } = rows;
  const nPrompts = starts.length - 1;
  const weight = new Float64Array(starts[nPrompts]);
  const logPartition = new Float64Array(nPrompts), ess = new Float64Array(nPrompts), kl = new Float64Array(nPrompts);
  const pull = multipliers.map((one, j) => one * signs[j]);
  for (let p = 0; p < nPrompts; p++) {
    const from = starts[p], to = starts[p + 1];
    let top = -Infinity;
    for (let i = from; i < to; i++) {
      let logit = reward[i];
      for (let j = 0; j < pull.length; j++) logit += pull[j] * scores[j][i];
      weight[i] = logit / beta;
      if (weight[i] > top) top = weight[i];
    }
    let total = 0, meanLogit = 0, squares = 0;
    for (let i = from; i < to; i++) {
      const logit = weight[i] - top, mass = Math.exp(logit);
      weight[i] = mass;
      total += mass;
      meanLogit += mass * logit;
    }
    for (let i = from; i < to; i++) {
      weight[i] /= total;
      squares += weight[i] * weight[i];
    }
    const logMean = Math.log(total / (to - from));
    logPartition[p] = top + logMean;
    ess[p] = 1 / squares;
    kl[p] = Math.max(0, meanLogit / total - logMean);
  }
  return { weight, logPartition, ess, kl };
}

/** Mean of a column over the responses of each prompt, under weights or, without them, under the reference. */
function promptMeans(starts, column, weight = null) {
  const means = new Float64Array(starts.length - 1);
  for (let p = 0; p < means.length; p++) {
    let sum = 0;
    for (let i = starts[p]; i < starts[p + 1]; i++) sum += (weight ? weight[i] : 1) * column[i];
    means[p] = weight ? sum : sum / (starts[p + 1] - starts[p]);
  }
  return means;
}

function mean(values) {
  let sum = 0;
  for (const value of values) sum += value;
  return sum / values.length;
}

/** Value, slack and Hessian of the dual at multipliers; thresholds are turned. */
function evaluateDual(rows, thresholds, multipliers, beta) {
  const m = thresholds.length, { starts, scores, signs } = rows, nPrompts = starts.length - 1;
  const tilted = tilt(rows, multipliers, beta);
  const slack = new Float64Array(m), hessian = Array.from({ length: m }, () => new Float64Array(m));
  const centre = new Float64Array(m);
  for (let p = 0; p < nPrompts; p++) {
    for (let j = 0; j < m; j++) {
      centre[j] = 0;
      for (let i = starts[p]; i < starts[p + 1]; i++) centre[j] += tilted.weight[i] * signs[j] * scores[j][i];
      slack[j] += centre[j] - thresholds[j];
    }
    for (let j = 0; j < m; j++) {
      for (let k = 0; k <= j; k++) {
        let sum = 0;
        for (let i = starts[p]; i < starts[p + 1]; i++) {
          sum += tilted.weight[i] * (signs[j] * scores[j][i] - centre[j]) * (signs[k] * scores[k][i] - centre[k]);
        }
        hessian[j][k] += sum;
      }
    }
  }
  let value = beta * mean(tilted.logPartition);
  for (let j = 0; j < m; j++) {
    value -= multipliers[j] * thresholds[j];
    slack[j] /= nPrompts;
    for (let k = 0; k <= j; k++) hessian[k][j] = hessian[j][k] /= beta * nPrompts;
  }
  return { value, slack, hessian, tilted };
}

/** Solve A x = y for a symmetric positive matrix, or null where it is none. */
function solveSymmetric(matrix, right) {
  const n = right.length, lower = matrix.map((row) => Float64Array.from(row)), x = Float64Array.from(right);
  for (let j = 0; j < n; j++) {
    for (let k = 0; k < j; k++) lower[j][j] -= lower[j][k] ** 2;
    if (!(lower[j][j] > 0)) return null;
    lower[j][j] = Math.sqrt(lower[j][j]);
    for (let i = j + 1; i < n; i++) {
      for (let k = 0; k < j; k++) lower[i][j] -= lower[i][k] * lower[j][k];
      lower[i][j] /= lower[j][j];
    }
  }
  for (let i = 0; i < n; i++) {
    for (let k = 0; k < i; k++) x[i] -= lower[i][k] * x[k];
    x[i] /= lower[i][i];
  }
  for (let i = n - 1; i >= 0; i--) {
    for (let k = i + 1; k < n; k++) x[i] -= lower[k][i] * x[k];
    x[i] /= lower[i][i];
  }
  return x;
}

const MOST_STEPS = 60;
const RESIDUAL = 1e-7;

/**
 * Minimise the dual by Newton's method on λ ≥ 0, from `start`.
 * Returns null where it does not get to a KKT residual max |min(λ s/β, slack/s)| of 1e-7: then nothing is shown of it.
 */
function solveDual(rows, thresholds, beta, scales, start) {
  const m = thresholds.length;
  const clip = (value, j) => (rows.equality[j] ? value : Math.max(0, value));
  let multipliers = start.map(clip);
  let here = evaluateDual(rows, thresholds, multipliers, beta);
  for (let step = 0; step < MOST_STEPS; step++) {
    let residual = 0;
    for (let j = 0; j < m; j++) {
      const slack = here.slack[j] / scales[j];
      const fault = rows.equality[j] ? slack : Math.min((multipliers[j] * scales[j]) / beta, slack);
      residual = Math.max(residual, Math.abs(fault));
    }
    if (residual <= RESIDUAL) return { ...here, multipliers };
    const free = multipliers.map((_, j) => j).filter((j) => rows.equality[j] || multipliers[j] > 0 || here.slack[j] < 0);
    const ridge = 1e-12 * Math.max(...free.map((j) => here.hessian[j][j]), 1e-300);
    const matrix = free.map((j) => free.map((k) => here.hessian[j][k] + (j === k ? ridge : 0)));
    const move = solveSymmetric(matrix, free.map((j) => -here.slack[j]));
    if (!move) return null;
    let size = 1, next = null;
    for (; size > 1e-10; size /= 2) {
      const trial = multipliers.slice();
      free.forEach((j, place) => { trial[j] = clip(multipliers[j] + size * move[place], j); });
      next = { multipliers: trial, ...evaluateDual(rows, thresholds, trial, beta) };
      const promised = free.reduce((sum, j) => sum + here.slack[j] * (trial[j] - multipliers[j]), 0);
      if (next.value <= here.value + 1e-4 * promised + 1e-13 * Math.abs(here.value)) break;
    }
    if (size <= 1e-10) return null;
    ({ multipliers, ...here } = next);
  }
  return null;
}

/** Quantile 0.975 of Student's t, to three digits from 5 degrees of freedom on (Cornish and Fisher). */
function tQuantile(degrees) {
  const z = 1.959964;
  return z + (z ** 3 + z) / (4 * degrees) + (5 * z ** 5 + 16 * z ** 3 + 3 * z) / (96 * degrees ** 2);
}

/** Mean over prompts with its 95% interval, one number a prompt. */
function estimateMean(values) {
  const n = values.length, centre = mean(values);
  if (n < 2) return { value: centre, ends: null };
  let squares = 0;
  for (const value of values) squares += (value - centre) ** 2;
  const half = tQuantile(n - 1) * Math.sqrt(squares / (n - 1) / n);
  return { value: centre, ends: [centre - half, centre + half] };
}

/** 95% intervals of λ* over prompts (sandwich); null for those at 0, which have none of this kind. */
function multiplierIntervals(rows, solved, slackByPrompt) {
  const m = solved.multipliers.length, n = rows.starts.length - 1;
  const free = solved.multipliers.map((_, j) => j).filter((j) => solved.multipliers[j] !== 0);
  const matrix = free.map((j) => free.map((k) => solved.hessian[j][k]));
  const ends = new Array(m).fill(null);
  free.forEach((j, place) => {
    const unit = free.map((_, k) => (k === place ? 1 : 0));
    const row = solveSymmetric(matrix, unit);
    if (!row || n < 2) return;
    // λ̂_j moves by −H⁻¹ times the slack of each prompt.
    const moved = new Float64Array(n);
    free.forEach((k, at) => { for (let p = 0; p < n; p++) moved[p] += row[at] * slackByPrompt[k][p]; });
    const spread = estimateMean(moved);
    const half = (spread.ends[1] - spread.ends[0]) / 2;
    const low = solved.multipliers[j] - half;
    ends[j] = [rows.equality[j] ? low : Math.max(0, low), solved.multipliers[j] + half];
  });
  return ends;
}

function median(values) {
  const sorted = Float64Array.from(values).sort(), half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
}
