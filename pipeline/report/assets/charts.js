// Charts in the page's own colours, drawn by Observable Plot into a container that says what they show.

function colour(name) { return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim(); }

/** Draw into a container, anew at each call and as wide as it is; `describe` is read out in place of the picture. */
function draw(container, options, describe) {
  const width = Math.max(260, Math.min(560, container.clientWidth || 480));
  for (const axis of [options.x, options.y]) if (axis?.label) axis.label = fitted(axis.label, Math.floor(width / 7.5));
  const chart = Plot.plot({ width, marginLeft: 52, style: { fontFamily: "inherit", fontSize: "12px", background: "transparent" }, ...options });
  chart.setAttribute("role", "img");
  chart.setAttribute("aria-label", describe);
  container.replaceChildren(chart);
}

/** A text of at most so many letters: the middle of a longer one is left out. */
function fitted(text, most) {
  if (text.length <= most) return text;
  const half = Math.floor((most - 1) / 2);
  return `${text.slice(0, half)}…${text.slice(-half)}`;
}

/** Buttons under a chart: the picture as SVG, the numbers as CSV. */
function addFiles(container, name, rows) {
  const svg = () => {
    const chart = container.querySelector("svg").cloneNode(true);
    chart.setAttribute("xmlns", "http://www.w3.org/2000/svg");
    chart.style.background = colour("paper");
    chart.style.color = colour("ink");
    chart.style.fontFamily = "sans-serif";
    saveFile(`${name}.svg`, new XMLSerializer().serializeToString(chart), "image/svg+xml");
  };
  const files = make("p", { class: "files" },
    make("button", { class: "link", type: "button", "aria-label": `${name} as SVG`, onclick: svg }, "SVG"),
    make("button", { class: "link", type: "button", "aria-label": `${name} as CSV`, onclick: () => saveFile(`${name}.csv`, csvOf(rows()), "text/csv") }, "CSV"));
  container.after(files);
}

function keyOf(entries) {
  return make("ul", { class: "keys" }, ...entries.map(([label, tone, dash]) =>
    make("li", {}, make("span", { style: `border-color: var(--${tone}); border-top-style: ${dash ?? "solid"}` }), label)));
}
