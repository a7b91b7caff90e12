// The margin slider: one demand is moved, and numbers, charts, weights and texts follow.

/** Build the panel. Returns what is being asked for: {answer, constraint, follow(listener)}. */
function startExplore(data, train) {
  const panel = byId("explore");
  const sliders = data.constraints.map((one, j) => ({ ...one, j })).filter((one) => one.frontier);
  if (!panel || !sliders.length) return null;
  const answers = demandAnswers(data, train);
  const listeners = [];
  const state = { j: sliders[0].j, demand: sliders[0].demanded, answer: null, isOwn: true };

  const choice = make("select", { id: "explore-constraint" }, ...sliders.map((one) => make("option", { value: one.j }, one.subject)));
  const slider = make("input", { type: "range", id: "explore-demand", min: 0, max: 1, step: "any" });
  const exact = make("input", { type: "number", id: "explore-exact", step: "any" });
  const back = make("button", { type: "button", id: "explore-back" }, "as in this solution");
  const ends = [make("span"), make("span")];
  const said = make("p", { id: "explore-said", "aria-live": "polite" });
  const body = make("tbody", { role: "rowgroup" });
  const head = ["score", "demanded", "predicted", "λ*"];
  const table = make("table", { class: "results stacked", role: "table", id: "explore-table" },
    make("caption", { class: "unseen" }, "What the dual answers to the demand"),
    make("thead", { role: "rowgroup" }, make("tr", { role: "row" }, ...head.map((text) => make("th", { scope: "col", role: "columnheader" }, text)))), body);
  const facts = make("dl", { id: "explore-facts" });
  const command = make("code", { class: "command", id: "explore-command", tabindex: "0" });
  const commandNote = make("p", { class: "note", id: "explore-command-note" });
  const frontierChart = make("div", { class: "chart", id: "explore-frontier" });
  const priceChart = make("div", { class: "chart", id: "explore-price" });
  const scatterChart = make("div", { class: "chart", id: "explore-scatter" });
  const scatterNote = make("figcaption");

  byId("explore-panel").replaceChildren(
    make("div", { class: "controls" },
      make("label", { for: "explore-constraint" }, "constraint", choice),
      make("div", { class: "slide" }, make("label", { for: "explore-demand" }, "demand"), slider, make("div", { class: "ends" }, ...ends)),
      make("label", { for: "explore-exact" }, "exactly", exact), back),
    said, table, facts, commandNote, command,
    make("div", { class: "bench" },
      make("figure", {}, frontierChart, priceChart,
        keyOf([["certified frontier", "blue"], ["the demand that is set", "vermillion"], ["this solution's demand", "grey", "dashed"]]),
        make("figcaption", {}, "Above, the gain in reward for each demand; below, what one more unit of it costs: λ*, the shadow price.")),
      make("figure", {}, scatterChart, keyOf([["raised by the tilt", "blue"], ["lowered", "grey", "dotted"]]), scatterNote)));
  byId("explore-how").textContent = howItIsKnown(data, answers);
  if (data.kept) byId("explore-how").after(make("p", { id: "explore-kept", class: "note" }, data.kept));

  const own = () => data.constraints[state.j];
  const update = eachFrame(() => {
    state.answer = answers.answer(state.j, state.demand);
    state.isOwn = Math.abs(state.demand - own().demanded) <= 1e-9 * Math.max(1, Math.abs(own().demanded));
    show();
    listeners.forEach((listener) => listener(state));
  });

  function choose() {
    state.j = Number(choice.value);
    const { frontier, added, demanded } = own();
    const low = frontier.asked[0] - added, high = frontier.asked[frontier.asked.length - 1] - added;
    [slider.min, slider.max] = [low, high];
    [exact.min, exact.max] = [low, high];
    const digits = decimalsFor(low, high);
    ends[0].textContent = inUnit(own(), low, digits);
    ends[1].textContent = inUnit(own(), high, digits);
    set(demanded);
  }

  function set(demand) {
    state.demand = Math.min(Number(slider.max), Math.max(Number(slider.min), demand));
    slider.value = state.demand;
    exact.value = Number(state.demand.toPrecision(6));
    update();
  }

  function show() {
    const { answer } = state, one = own();
    const digits = decimalsFor(...one.frontier.asked);
    slider.setAttribute("aria-valuetext", inUnit(one, state.demand, digits));
    said.textContent = `${one.subject}: ${demandInWords(one, state.demand, digits)} demanded costs λ* = ${shown(answer.multipliers[state.j])}; `
      + `${data.reward.name} ${signed(answer.reward.value)} against the reference, KL ${shown(answer.kl)} nats.`;
    body.replaceChildren(
      rowOf("reward", data.reward.name, "maximise", signed(answer.reward.value), interval(answer.reward.ends), answer.reward.value, "", "", null),
      ...data.constraints.map((bound, i) => {
        const write = bound.unit === "margin" ? signed : shown;
        const demand = i === state.j ? state.demand : bound.demanded;
        return rowOf(`constraint-${i}`, bound.subject, `${relation(bound)} ${inUnit(bound, demand, digits)}`,
          write(answer.scores[i].value), interval(answer.scores[i].ends), answer.scores[i].value,
          shown(answer.multipliers[i], 4), interval(answer.multiplierEnds[i]), answer.multipliers[i]);
      }));
    const price = Math.abs(answer.multipliers[state.j]);
    const lost = data.own.gain - answer.reward.value;
    const share = answer.below2 === null ? "" : `; below 2 on ${percent(answer.below2)} of prompts`;
    setFacts([
      ["KL", "kl", `${shown(answer.kl)} nats a prompt`, answer.kl],
      ["ESS", "ess", `median ${shown(answer.ess, 1)} of ${data.responses} responses${share}`, answer.ess],
      ["shadow price", "price", `${shown(price)}: 0.1 more of the demand costs about ${shown(0.1 * price)} of ${data.reward.name}`, price],
      ["against this solution", "cost", state.isOwn ? "its own demand" : `${signed(-lost)} of ${data.reward.name}`, -lost],
      ...(one.added ? [["asked of the dual", "asked", `${inUnit(one, state.demand + one.added, digits)}, with this solution's safeguards`, state.demand + one.added]] : []),
      ...(answer.ess < 2 ? [["warning", "warning", "half of the prompts lean on fewer than two responses: nothing predicted here can be relied on", 1]] : []),
    ]);
    showCommand(one);
    showFrontier(one);
    showScatter(one);
  }

  function setFacts(entries) {
    facts.replaceChildren(...entries.flatMap(([label, key, text, value]) =>
      [make("dt", {}, label), make("dd", { "data-fact": key, "data-value": value, class: key === "warning" ? "bad" : null }, text)]));
  }

  function showCommand(one) {
    command.hidden = !one.command;
    commandNote.textContent = one.command ? one.commandNote : "No single setting asks for this: change the constraint itself.";
    if (one.command) command.textContent = one.command.replace("{}", String(Number(state.demand.toPrecision(4))));
  }

  function showFrontier(one) {
    const { frontier, added } = one, { answer } = state;
    const line = frontier.asked.map((at, k) => ({ demand: at - added, gain: frontier.reward[k] - data.reward.reference, price: Math.abs(frontier.multipliers[k][state.j]) }));
    const label = `demand on ${one.subject}${one.unit === "margin" ? ", above the reference" : ""}`;
    const at = { demand: state.demand, gain: answer.reward.value, price: Math.abs(answer.multipliers[state.j]), ends: answer.reward.ends, priceEnds: answer.multiplierEnds[state.j] };
    const marks = (key, endsKey) => [
      Plot.ruleX([one.demanded], { stroke: colour("grey"), strokeDasharray: "4 3" }),
      Plot.lineY(line, { x: "demand", y: key, stroke: colour("blue"), strokeWidth: 2 }),
      at[endsKey] ? Plot.ruleX([at], { x: "demand", y1: at[endsKey][0], y2: at[endsKey][1], stroke: colour("vermillion"), strokeWidth: 1.5 }) : null,
      Plot.dot([at], { x: "demand", y: key, r: 5, fill: colour("vermillion") }),
    ];
    draw(frontierChart, { height: 210, marginTop: 26, x: { label: null }, y: { label: `gain in ${data.reward.name}`, grid: true, nice: true }, marks: marks("gain", "ends") },
      `Gain in ${data.reward.name} along the frontier: from ${shown(line[0].gain)} at ${shown(line[0].demand)} to ${shown(line.at(-1).gain)} at ${shown(line.at(-1).demand)}; set to ${shown(at.demand)}, gain ${shown(at.gain)}.`);
    draw(priceChart, { height: 165, marginTop: 26, marginBottom: 40, x: { label, labelAnchor: "center" }, y: { label: "λ*", grid: true, zero: true }, marks: marks("price", "priceEnds") },
      `Price of the demand: from ${shown(line[0].price)} to ${shown(line.at(-1).price)}; here ${shown(at.price)}.`);
  }

  const sample = train ? stride(train.size, 1500) : [];
  function showScatter(one) {
    if (!train) { scatterNote.textContent = "The scores are not in this page."; return; }
    const { answer } = state;
    const follows = data.follows || state.isOwn;
    const tilted = tilt(dualRows(train, data.constraints), follows ? answer.multipliers : data.own.multipliers, follows ? answer.beta : data.beta);
    const place = placesOf(train.starts);
    const points = sample.map((i) => ({ x: train.columns[one.column][i], y: train.columns.reward[i], ratio: tilted.weight[i] * (train.starts[place[i] + 1] - train.starts[place[i]]) }));
    const raised = points.filter((point) => point.ratio >= 1), lowered = points.filter((point) => point.ratio < 1);
    draw(scatterChart, {
      height: 372, marginTop: 26, marginBottom: 40, x: { label: one.scoreLabel, labelAnchor: "center", nice: true }, y: { label: data.reward.name, nice: true }, r: { type: "identity" },
      marks: [
        Plot.dot(lowered, { x: "x", y: "y", r: (point) => 1 + 2 * Math.sqrt(point.ratio), stroke: colour("grey"), strokeOpacity: 0.45, strokeWidth: 0.8 }),
        Plot.dot(raised, { x: "x", y: "y", r: (point) => Math.min(9, 1 + 2 * Math.sqrt(point.ratio)), fill: colour("blue"), fillOpacity: 0.4 }),
      ],
    }, `Weights of ${points.length} responses by ${one.scoreLabel} and ${data.reward.name}: ${raised.length} raised, ${lowered.length} lowered; largest ratio ${shown(Math.max(...points.map((point) => point.ratio)), 1)}.`);
    const which = points.length < train.size ? `${points.length.toLocaleString("en-US")} of ${data.nSamples.toLocaleString("en-US")} responses, evenly taken` : "Every response";
    scatterNote.textContent = `${which}; the larger, the more its weight under the tilted policy.${follows ? "" : " Its columns change with the demand, so the weights shown are this solution's own."}`;
  }

  addFiles(priceChart, "frontier", () => [["demand", "gain", "multiplier"], ...own().frontier.asked.map((at, k) => [at - own().added, own().frontier.reward[k] - data.reward.reference, own().frontier.multipliers[k][state.j]])]);
  addFiles(scatterChart, "weights", () => {
    const one = own(), tilted = tilt(dualRows(train, data.constraints), state.answer.multipliers, state.answer.beta);
    return [[one.column, "reward", "weight"], ...sample.map((i) => [train.columns[one.column][i], train.columns.reward[i], tilted.weight[i]])];
  });
  choice.addEventListener("change", choose);
  slider.addEventListener("input", () => set(Number(slider.value)));
  exact.addEventListener("change", () => set(exact.value === "" ? state.demand : Number(exact.value)));  // an emptied field is no 0
  back.addEventListener("click", () => set(own().demanded));
  choose();
  return { state, follow: (listener) => { listeners.push(listener); update(); }, redraw: update };
}

function howItIsKnown(data, answers) {
  const trust = `Trust in λ* is not judged anew; this solution's is ${data.trust}.`;
  if (answers.live) {
    return `Solved in this page from all ${data.nSamples.toLocaleString("en-US")} scores as you move; at certified points of the frontier λ* agrees to ${Math.floor(-Math.log10(Math.max(answers.difference, 1e-9)))} digits. `
      + "Numbers are for the samples as they are, without the correction for finitely many responses; intervals are over prompts. " + trust;
  }
  const why = answers.difference === null ? data.whyNotLive : "what this page solves differs from the certified frontier by more than four digits allow";
  return `Interpolated between certified points of the frontier: ${why}. No intervals are shown. ${trust}`;
}

function rowOf(key, name, demand, value, ends, number, multiplier, multiplierEnds, multiplierNumber) {
  const cell = (label, text, detail, exactly, what) => make("td", { role: "cell", "data-label": label, "data-cell": `${key}-${what}`, "data-value": exactly, class: text || detail ? null : "empty" },
    make("span", {}, text, detail ? make("span", { class: "detail" }, detail) : null));
  return make("tr", { role: "row" }, make("th", { scope: "row", role: "rowheader" }, name),
    cell("demanded", demand, "", null, "demand"), cell("predicted", value, ends, number, "predicted"), cell("λ*", multiplier, multiplierEnds, multiplierNumber, "multiplier"));
}

function relation(one) { return { ">=": "≥", "<=": "≤", "=": "=" }[one.direction]; }

/** A demand in its own unit: a margin over the reference, or an absolute value. */
function inUnit(one, value, digits) {
  return one.unit === "margin" ? `ref ${value < 0 ? "−" : "+"} ${shown(Math.abs(value), digits)}` : shown(value, digits);
}

function demandInWords(one, value, digits) {
  const how = { ">=": "at least", "<=": "at most", "=": "exactly" }[one.direction];
  return one.unit === "margin" ? `${how} ${inUnit(one, value, digits)}` : `${how} ${shown(value, digits)}`;
}

/** At most `most` of the first `size` numbers, evenly. */
function stride(size, most) {
  const step = Math.max(1, size / most);
  return Array.from({ length: Math.min(size, most) }, (_, i) => Math.floor(i * step));
}

/** The prompt of each row. */
function placesOf(starts) {
  const place = new Int32Array(starts[starts.length - 1]);
  for (let p = 0; p + 1 < starts.length; p++) place.fill(p, starts[p], starts[p + 1]);
  return place;
}
