// Each score under the reference, the tilted and the trained policy, with a cut that moves and the shares beyond it.

const BINS = 48;

/** Build the panel; `explored` is what the margin slider asks for, or null. */
function startDistributions(data, populations, explored) {
  const reference = populations[data.judged];
  const panel = byId("distributions-panel");
  if (!panel || !reference) return;
  const choice = make("select", { id: "cut-score" }, ...data.scores.map((one, i) => make("option", { value: i }, one.name)));
  const side = make("select", { id: "cut-side" }, make("option", { value: ">=" }, "at or above the cut"), make("option", { value: "<=" }, "at or below the cut"));
  const slider = make("input", { type: "range", id: "cut", step: "any" });
  const exact = make("input", { type: "number", id: "cut-exact", step: "any" });
  const chart = make("div", { class: "chart", id: "distribution" });
  const body = make("tbody", { role: "rowgroup" });
  const beyond = make("th", { scope: "col", role: "columnheader" });
  const held = reference.counts.length, all = reference.prompts;
  panel.replaceChildren(
    held < all ? make("p", { class: "note", id: "distributions-what" }, `Of ${held.toLocaleString("en-US")} of ${all.toLocaleString("en-US")} ${data.judged} prompts, evenly taken, to keep the page small; figures/distributions.svg beside it is of all.`) : "",
    make("div", { class: "controls" },
      make("label", { for: "cut-score" }, "score", choice), make("label", { for: "cut-side" }, "share", side),
      make("div", { class: "slide" }, make("label", { for: "cut" }, "cut"), slider), make("label", { for: "cut-exact" }, "exactly", exact)),
    make("div", { class: "bench" },
      make("figure", {}, chart, keyOf([["reference", "grey"], ["tilted", "blue", "dashed"], ...(populations.policy ? [["trained policy", "vermillion"]] : [])])),
      make("table", { class: "results stacked", role: "table", id: "cut-table" },
        make("caption", { class: "unseen" }, "Shares beyond the cut"),
        make("thead", { role: "rowgroup" }, make("tr", { role: "row" }, make("th", { scope: "col", role: "columnheader" }, "policy"), make("th", { scope: "col", role: "columnheader" }, "mean"), beyond)),
        body)));

  const state = { score: data.scores[0], cut: 0, bins: null };
  const update = eachFrame(show);

  function choose() {
    state.score = data.scores[Number(choice.value)];
    const all = [reference.columns[state.score.column], ...(populations.policy ? [populations.policy.columns[state.score.policyColumn]] : [])];
    const sorted = Float64Array.from(all.flatMap((column) => Array.from(column))).sort();
    const at = (share) => sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
    let low = at(0.001), high = at(0.999);
    if (!(high > low)) [low, high] = [low - 0.5, low + 0.5];
    state.bins = { low, width: (high - low) / BINS };
    [slider.min, slider.max] = [low, high];
    side.value = state.score.side;
    set(state.score.cut ?? sorted[sorted.length >> 1]);
  }

  function set(cut) {
    state.cut = cut;
    slider.value = cut;
    exact.value = Number(cut.toPrecision(5));
    update();
  }

  function policies() {
    const found = [{ name: "reference", tone: "grey", dash: null, rows: reference, column: state.score.column, weight: null }];
    const asked = explored?.state.answer;
    const follows = asked && (data.follows || explored.state.isOwn);
    const [multipliers, beta] = follows ? [asked.multipliers, asked.beta] : [data.own.multipliers, data.beta];
    const { weight } = tilt(dualRows(reference, data.constraints), multipliers, beta);
    found.push({ name: follows && !explored.state.isOwn ? "tilted, as the slider asks" : "tilted", tone: "blue", dash: "5 3", rows: reference, column: state.score.column, weight });
    if (populations.policy) found.push({ name: "trained policy", tone: "vermillion", dash: null, rows: populations.policy, column: state.score.policyColumn, weight: null });
    return found;
  }

  function density({ rows, column, weight }) {
    const { low, width } = state.bins, mass = new Float64Array(BINS), values = rows.columns[column], nPrompts = rows.starts.length - 1;
    for (let p = 0; p < nPrompts; p++) {
      const size = rows.starts[p + 1] - rows.starts[p];
      for (let i = rows.starts[p]; i < rows.starts[p + 1]; i++) {
        const bin = Math.min(BINS - 1, Math.max(0, Math.floor((values[i] - low) / width)));
        mass[bin] += (weight ? weight[i] : 1 / size) / nPrompts;
      }
    }
    return Array.from(mass, (share, b) => ({ x: low + (b + 0.5) * width, y: share / width }));
  }

  function shareBeyond({ rows, column, weight }) {
    const inside = rows.columns[column].map((value) => Number(side.value === ">=" ? value >= state.cut : value <= state.cut));
    const found = estimateMean(promptMeans(rows.starts, inside, weight));
    return { value: found.value, ends: found.ends && found.ends.map((end) => Math.min(1, Math.max(0, end))) };
  }

  function show() {
    const all = policies().map((one) => ({ ...one, line: density(one), share: shareBeyond(one), mean: estimateMean(promptMeans(one.rows.starts, one.rows.columns[one.column], one.weight)) }));
    beyond.textContent = `share ${side.value === ">=" ? "≥" : "≤"} ${shown(state.cut)}`;
    body.replaceChildren(...all.map((one) => make("tr", { role: "row" },
      make("th", { scope: "row", role: "rowheader" }, one.name),
      make("td", { role: "cell", "data-label": "mean" }, make("span", {}, shown(one.mean.value), make("span", { class: "detail" }, interval(one.mean.ends)))),
      make("td", { role: "cell", "data-label": beyond.textContent, "data-cell": `share-${one.tone}`, "data-value": one.share.value },
        make("span", {}, percent(one.share.value), make("span", { class: "detail" }, one.share.ends ? `[${percent(one.share.ends[0])}, ${percent(one.share.ends[1])}]` : ""))))));
    slider.setAttribute("aria-valuetext", shown(state.cut));
    const cut = side.value === ">=" ? { x1: state.cut, x2: Number(slider.max) } : { x1: Number(slider.min), x2: state.cut };
    draw(chart, {
      height: 270, marginTop: 26, marginBottom: 40, x: { label: state.score.name, labelAnchor: "center", domain: [Number(slider.min), Number(slider.max)] }, y: { label: "density", zero: true, ticks: 4 },
      marks: [
        Plot.rectX([cut], { x1: "x1", x2: "x2", fill: colour("forbidden"), fillOpacity: 0.7 }),
        ...[...all].sort((one, other) => Boolean(one.dash) - Boolean(other.dash)).map((one) => Plot.lineY(one.line, { x: "x", y: "y", stroke: colour(one.tone), strokeWidth: 1.8, strokeDasharray: one.dash, curve: "step" })),
        Plot.ruleX([state.cut], { stroke: colour("ink") }), Plot.ruleY([0]),
      ],
    }, `Distribution of ${state.score.name}. ${all.map((one) => `${one.name}: mean ${shown(one.mean.value)}, ${percent(one.share.value)} beyond the cut at ${shown(state.cut)}`).join("; ")}.`);
    state.shown = all;
  }

  addFiles(chart, "distribution", () => [[state.score.name, ...state.shown.map((one) => one.name)], ...state.shown[0].line.map((point, b) => [point.x, ...state.shown.map((one) => one.line[b].y)])]);
  choice.addEventListener("change", choose);
  side.addEventListener("change", update);
  slider.addEventListener("input", () => set(Number(slider.value)));
  exact.addEventListener("change", () => set(exact.value === "" ? state.cut : Number(exact.value)));  // an emptied field is no 0
  choose();
  explored?.follow(update);
  return update;
}
