// The responses: searched, filtered and sorted, and those of both policies to one prompt side by side.

const PAGE_OF_RESPONSES = 12;

/** Build the panel; weights follow what the margin slider asks for. */
function startResponses(data, populations, explored) {
  const panel = byId("responses-panel"), { browser } = data;
  if (!panel || !browser) return;
  const reference = populations[browser.population], { policy } = populations;
  const entries = entriesOf(data, reference, policy);
  const categories = [...new Set(browser.prompts.map((one) => one.category))].sort();

  const search = make("input", { type: "search", id: "find", placeholder: "words in prompt or response", autocomplete: "off" });
  const category = make("select", { id: "find-category" }, make("option", { value: "" }, "all"), ...categories.map((one) => make("option", { value: `=${one}` }, one || "(none)")));
  const whose = make("select", { id: "find-policy" }, make("option", { value: "" }, "both"), make("option", { value: "reference" }, "reference"), make("option", { value: "policy" }, "trained policy"));
  const order = make("select", { id: "find-order" },
    make("option", { value: "weight-" }, "most raised by the tilt"), make("option", { value: "weight+" }, "most lowered by the tilt"),
    ...data.scores.flatMap((one, i) => [make("option", { value: `${i}-` }, `highest ${one.name}`), make("option", { value: `${i}+` }, `lowest ${one.name}`)]));
  const count = make("p", { id: "found-count", "aria-live": "polite", class: "note" });
  const list = make("ul", { class: "found", id: "found" });
  const more = make("button", { type: "button", id: "found-more" }, "show more");
  const opened = make("div", { class: "opened", id: "opened", tabindex: "-1", hidden: true });
  panel.replaceChildren(
    make("div", { class: "controls", role: "search" },
      make("label", { for: "find" }, "search", search), make("label", { for: "find-category" }, "category", category),
      policy ? make("label", { for: "find-policy" }, "whose", whose) : null, make("label", { for: "find-order" }, "order", order)),
    count, opened, list, more);
  let limit = PAGE_OF_RESPONSES;

  const ratios = () => {
    const asked = explored?.state.answer;
    const follows = asked && (data.follows || explored.state.isOwn);
    const [multipliers, beta] = follows ? [asked.multipliers, asked.beta] : [data.own.multipliers, data.beta];
    return tilt(dualRows(reference, data.constraints), multipliers, beta).weight;
  };

  function weigh() {
    const weight = ratios();
    for (const entry of entries) if (entry.whose === "reference") entry.ratio = weight[entry.row] * entry.of;
  }

  function matching() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    return entries.filter((entry) => (!whose.value || entry.whose === whose.value)
      && (!category.value || `=${entry.prompt.category}` === category.value)
      && words.every((word) => entry.searched.includes(word)));
  }

  function sorted(found) {
    const key = order.value.slice(0, -1), turn = order.value.endsWith("-") ? -1 : 1;
    const value = key === "weight" ? (entry) => entry.ratio : (entry) => entry.scores[Number(key)];
    return found.filter((entry) => value(entry) !== undefined).sort((one, other) => turn * (value(one) - value(other)));
  }

  const update = eachFrame(() => {
    weigh();
    const found = sorted(matching());
    const nPrompts = new Set(found.map((entry) => entry.prompt)).size;
    count.textContent = `${found.length.toLocaleString("en-US")} responses to ${nPrompts.toLocaleString("en-US")} prompts`
      + (order.value.startsWith("weight") && policy ? " (the trained policy's have no weight: order by a score to see them)" : "");
    list.replaceChildren(...found.slice(0, limit).map((entry) => make("li", {},
      promptLine(entry.prompt), quote(entry),
      make("button", { type: "button", class: "link", onclick: () => open(entry.prompt) }, policy ? "both policies on this prompt" : "all responses to this prompt"))));
    more.hidden = found.length <= limit;
    if (!opened.hidden) open(opened.prompt, { quiet: true });
  });

  function promptLine(prompt) {
    const last = prompt.messages[prompt.messages.length - 1];
    return make("p", { class: "prompt" }, make("span", { class: "role" }, `${prompt.category ? `${prompt.category} · ` : ""}${last[0]} `), last[1].length > 400 ? `${last[1].slice(0, 400)}…` : last[1]);
  }

  function quote(entry) {
    const scores = data.scores.map((one, i) => `${one.name} ${shown(entry.scores[i], 2)}`).join(" · ");
    const weight = entry.whose === "reference" ? `weight × ${shown(entry.ratio, 2)} · ` : "trained policy · ";
    const side = entry.whose === "policy" ? null : entry.ratio >= 1 ? "raised" : "lowered";
    return make("blockquote", { class: side }, make("p", {}, entry.text), make("footer", {}, weight + scores));
  }

  function open(prompt, { quiet = false } = {}) {
    opened.prompt = prompt;
    opened.hidden = false;
    const of = (name) => sorted(entries.filter((entry) => entry.prompt === prompt && entry.whose === name));
    const answered = entries.filter((entry) => entry.prompt === prompt && entry.whose === "policy");
    const trained = order.value.startsWith("weight") ? answered : of("policy");
    const column = (head, found) => make("div", {}, make("h4", {}, head), ...found.slice(0, 8).map(quote));
    opened.replaceChildren(
      make("h3", {}, "One prompt"),
      ...prompt.messages.map(([role, text]) => make("p", { class: "prompt" }, make("span", { class: "role" }, `${role} `), text)),
      make("div", { class: "pair" }, column(`reference: ${order.selectedOptions[0].textContent} first`, of("reference")), policy ? column("trained policy", trained) : null),
      make("button", { type: "button", onclick: () => { opened.hidden = true; } }, "close"));
    if (!quiet) { opened.focus(); opened.scrollIntoView({ block: "nearest" }); }
  }

  const again = () => { limit = PAGE_OF_RESPONSES; update(); };
  search.addEventListener("input", again);
  // Only the reference's responses have a weight: asked for the policy's alone, an order by it would show none.
  whose.addEventListener("change", () => {
    if (whose.value === "policy" && order.value.startsWith("weight")) order.value = "0-";
  });
  [category, whose, order].forEach((one) => one.addEventListener("change", again));
  more.addEventListener("click", () => { limit += 4 * PAGE_OF_RESPONSES; update(); });
  byId("responses-what").textContent = browser.note;
  explored?.follow(update);
  update();
}

/** Every response whose text the page holds, with its scores. */
function entriesOf(data, reference, policy) {
  const found = [];
  const add = (prompt, whose, rows, place, texts, key) => texts.forEach((text, k) => {
    const row = rows.starts[place] + k;
    found.push({
      prompt, whose, row, text, of: rows.starts[place + 1] - rows.starts[place],
      scores: data.scores.map((one) => rows.columns[one[key]][row]),
      searched: `${text} ${prompt.messages.map((one) => one[1]).join(" ")}`.toLowerCase(),
    });
  });
  for (const prompt of data.browser.prompts) {
    add(prompt, "reference", reference, prompt.place, prompt.texts, "column");
    if (policy && prompt.policyTexts) add(prompt, "policy", policy, prompt.policyPlace, prompt.policyTexts, "policyColumn");
  }
  return found;
}
